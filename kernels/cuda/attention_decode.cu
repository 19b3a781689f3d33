/* Attention of the sequences whose queries of a KV head fit into one matrix tile: decode. A persistent kernel: each CTA goes through a contiguous part of the splits of all lanes, of about
 * the same cost for each (attention.cu cuts them), with copies running ahead across splits and lanes.
 *
 * A CTA that has a lane from its first split on folds the splits as they come. A CTA that takes over inside a lane cannot: folding is not associative. It leaves each split as a partial;
 * so does, with what it has folded, the CTA that had the lane's beginning. Partials of a lane lie in order, and the last CTA to finish its share merges them.
 *
 * Within a piece the four warps split its slots for q . k, then the columns for p . v, so that each element has the same chain of products as in prefill. */
#include "kernels/cuda/attention.h"

constexpr uint32_t P_PITCH = PIECE_SLOTS * 2 + 16; /* bytes of a row of p in shared memory */

template <int KV, int DIMS> struct decode_shared {
    static constexpr uint32_t p = 0;
    static constexpr uint32_t p_bytes = TILE_QUERIES * P_PITCH;
    static constexpr uint32_t row_max = p + (KV == KV_Q8 ? 2 : 1) * p_bytes; /* q8: then p times the scale of V */
    static constexpr uint32_t last = row_max + ATTENTION_WARPS * TILE_QUERIES * sizeof(float);
    static constexpr uint32_t pieces = last + 16;
};

/* Walks the pieces of a CTA's part, as the copies do. */
struct cursor {
    uint32_t lane, slot, end, length; /* of the lane: where the part ends, its slots */
    const uint32_t *blocks;
    uint32_t codes_first, codes_last, view; /* KIVI: of the lane; of the piece at `slot` */
    uint32_t whole_end;                     /* KIVI: pieces up to it are whole_codes, of whom only ids are asked for */
    struct piece_source source;             /* of the piece at `slot` */
};

ATTENTION_INLINE struct attention_lane read_lane(const struct attention_args &args, uint32_t lane) {
    const uint4 *at = (const uint4 *)(const void *)&args.lanes[lane];
    uint4 first = __ldg(at), second = __ldg(at + 1);
    struct attention_lane read = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
    return read;
}

ATTENTION_INLINE uint32_t lane_slots(const struct attention_lane &lane) { return lane.n_rows ? lane.before + lane.n_rows : 0; }

/* KIVI: up to this slot all of a lane is codes for all its rows, of DIMS dims: those pieces have one view, of which every row sees all. */
template <int KV, int DIMS> ATTENTION_INLINE uint32_t whole_codes(const struct attention_args &args, uint32_t codes_first, uint32_t end) {
    if constexpr (code_bits<KV> == 0) return 0;
    return codes_dims(args.d) == DIMS ? min(codes_first * BLOCK_TOKENS, end) : 0;
}

/* From `slot` of `lane` to the next piece there is before `stop`; without one, lane is stop's and slot >= end. */
template <int KV, int DIMS>
ATTENTION_INLINE void cursor_settle(const struct attention_args &args, struct cursor *c, const struct attention_cut &stop) {
    while (c->slot >= c->end) {
        if (c->lane >= stop.lane) return;
        c->lane++;
        c->slot = c->end = 0;
        if (c->lane == stop.lane && stop.split == 0) return;
        struct attention_lane lane = read_lane(args, c->lane);
        c->length = lane_slots(lane);
        c->end = c->lane == stop.lane ? min(c->length, stop.split * SPLIT_SLOTS) : c->length;
        c->blocks = lane_blocks_of(args, lane.table, c->lane % args.n_kv_heads);
        c->codes_first = lane.codes_first;
        c->codes_last = lane.codes_last;
        c->whole_end = whole_codes<KV, DIMS>(args, c->codes_first, c->end);
    }
    c->view = view_of<KV>(c->codes_first, c->slot);
    c->source = source_of<KV>(args, piece_blocks(c->blocks, c->slot, c->length), c->slot, c->length, c->view);
}

/* To the next view of the piece, or the next piece. */
template <int KV, int DIMS> ATTENTION_INLINE void cursor_step(const struct attention_args &args, struct cursor *c, const struct attention_cut &stop) {
    if (code_bits<KV> != 0 && c->slot + 2 * PIECE_SLOTS <= c->whole_end) {
        c->slot += PIECE_SLOTS;
        const uint32_t *ids = c->blocks + c->slot / BLOCK_TOKENS;
        c->source.ids = make_uint2(__ldg(ids), __ldg(ids + 1));
        return; /* the view is the one before's */
    }
    if (c->view < view_of<KV>(c->codes_last, c->slot)) {
        c->view++;
        c->source = source_of<KV>(args, c->source.ids, c->slot, c->length, c->view);
        return;
    }
    c->slot += PIECE_SLOTS;
    cursor_settle<KV, DIMS>(args, c, stop);
}

ATTENTION_INLINE void wait_for_piece(uint32_t stages) {
    if (stages == 2)
        copies_wait<0>();
    else if (stages == 3)
        copies_wait<1>();
    else
        copies_wait<2>();
}

/* The state of a softmax, of the two queries a thread has a part of, and of its columns. */
template <int TILES> struct softmax { float m[2], l[2], o[TILES][4]; };

template <int TILES> ATTENTION_INLINE void softmax_reset(struct softmax<TILES> *s) {
    s->m[0] = s->m[1] = -INFINITY;
    s->l[0] = s->l[1] = 0;
#pragma unroll
    for (int t = 0; t < TILES; t++) s->o[t][0] = s->o[t][1] = s->o[t][2] = s->o[t][3] = 0;
}

/* both: else there are eight queries at most, and the second half of the sums does not matter. */
template <int TILES> ATTENTION_INLINE void softmax_fold(struct softmax<TILES> *total, const struct softmax<TILES> *split, bool both) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (half == 1 && !both) break;
        struct merge_factors f = merge_max(&total->m[half], split->m[half]);
        total->l[half] = fold(f, total->l[half], split->l[half]);
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            total->o[t][2 * half] = fold(f, total->o[t][2 * half], split->o[t][2 * half]);
            total->o[t][2 * half + 1] = fold(f, total->o[t][2 * half + 1], split->o[t][2 * half + 1]);
        }
    }
}

/* One piece, which begins at `slot`, in one view. seen: how many slots of the lane the thread's two queries see. coded: which of its blocks are codes, of `dims` dims. WHOLE: both are, of DIMS
 * dims, there is nothing that a query does not see, and there are eight queries at most, so that the thread has one of them: `seen`, `coded` and the other half of the sums do not matter. */
template <int KV, int DIMS, int TILES, bool WHOLE>
ATTENTION_INLINE void decode_piece(struct softmax<TILES> *split, const uint32_t q[DIMS / 16][4], uint8_t *shared, uint32_t piece_at, uint32_t slot,
                                   const uint32_t seen[2], float scale_log2, uint32_t coded, uint32_t dims) {
    using layout = piece<KV, DIMS>;
    using places = decode_shared<KV, DIMS>;
    constexpr int HALVES = WHOLE ? 1 : 2;
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const struct coded_piece from = {shared + piece_at, coded, dims};
    float s[2][4] = {};
    uint32_t k_at = shared_address(shared) + piece_at + k_offset<KV, DIMS>(lane) + warp * 16 * layout::pitch;
    if (code_bits<KV> != 0 && (WHOLE || coded >> warp / 2 & 1)) {
        if constexpr (code_bits<KV> != 0) multiply_coded_keys<KV, DIMS>(s, q, from, warp, lane);
    } else {
#pragma unroll
        for (int k = 0; k < DIMS / 16; k++) {
            uint32_t b[4];
            load_k<KV>(b, k_at + k * dims_step<KV>);
            multiply<KV>(s[0], q[k], b[0], b[1]);
            multiply<KV>(s[1], q[k], b[2], b[3]);
        }
    }
    const float *scales = (const float *)(const void *)(shared + piece_at + layout::scales);
    float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int tile = i / 4, half = i / 2 % 2;
        if (half >= HALVES) continue;
        uint32_t in_piece = warp * 16 + tile * 8 + lane % 4 * 2 + i % 2;
        float x = s[tile][i % 4];
        if constexpr (KV == KV_Q8) x = __fmul_rn(x, scales[in_piece]);
        if (!WHOLE && slot + in_piece >= seen[half]) x = -INFINITY;
        s[tile][i % 4] = x;
        largest[half] = fmaxf(largest[half], x);
    }
    float *row_max = (float *)(void *)(shared + places::row_max);
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        largest[half] = max_of_quad(largest[half]);
        if (lane % 4 == 0) row_max[warp * TILE_QUERIES + half * 8 + lane / 4] = largest[half];
    }
    __syncthreads();
    float a[2], m[2];
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        float x = row_max[half * 8 + lane / 4];
#pragma unroll
        for (int w = 1; w < ATTENTION_WARPS; w++) x = fmaxf(x, row_max[w * TILE_QUERIES + half * 8 + lane / 4]);
        float next = fmaxf(split->m[half], __fmul_rn(x, scale_log2));
        m[half] = finite_max(next);
        a[half] = power_of_2(split->m[half] - m[half]);
        split->m[half] = next;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int tile = i / 2, half = i % 2;
        if (half >= HALVES) continue; /* of rows of p that are nobody's anything will do */
        uint32_t in_piece = warp * 16 + tile * 8 + lane % 4 * 2;
        float x = weight_of(s[tile][2 * half], scale_log2, m[half]), y = weight_of(s[tile][2 * half + 1], scale_log2, m[half]);
        uint8_t *to = shared + places::p + (half * 8 + lane / 4) * P_PITCH + in_piece * 2;
        *(uint32_t *)(void *)to = pack<KV>(x, y);
        if constexpr (KV == KV_Q8)
            *(uint32_t *)(void *)(to + places::p_bytes) =
                pack<KV>(with_v_scale(x, scales[PIECE_SLOTS + in_piece]), with_v_scale(y, scales[PIECE_SLOTS + in_piece + 1]));
    }
    __syncthreads();
    float l[4] = {__fmul_rn(split->l[0], a[0]), 0, WHOLE ? 0 : __fmul_rn(split->l[1], a[1]), 0};
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int i = 0; i < 2 * HALVES; i++) split->o[t][i] = __fmul_rn(split->o[t][i], a[i / 2]);
    }
    uint32_t p_at = shared_address(shared) + places::p + (lane % 16) * P_PITCH + lane / 16 * 16;
    uint32_t v_at = shared_address(shared) + piece_at + layout::k_bytes + v_offset<KV, DIMS>(lane) + warp * (TILES / 2) * dims_step<KV>;
#pragma unroll
    for (uint32_t block = 0; block < PIECE_SLOTS / BLOCK_TOKENS; block++) {
        uint32_t p[2][4];
#pragma unroll
        for (uint32_t step = 0; step < 2; step++) {
            const uint32_t at = p_at + (2 * block + step) * 32;
            load_matrices_4(p[step], at);
            multiply<KV>(l, p[step], ones<KV>(), ones<KV>());
            if constexpr (KV == KV_Q8) load_matrices_4(p[step], at + places::p_bytes);
        }
        const bool from_codes = code_bits<KV> != 0 && (WHOLE || coded >> block & 1);
        if constexpr (code_bits<KV> != 0)
            if (from_codes) multiply_coded_values<KV, DIMS, TILES / 2>(split->o, p, from, block, warp * (TILES / 2), lane);
#pragma unroll
        for (uint32_t step = 0; step < 2 && !from_codes; step++) {
#pragma unroll
            for (int pair = 0; pair < TILES / 2; pair++) {
                uint32_t b[4];
                load_v<KV>(b, v_at + (2 * block + step) * 16 * layout::pitch + pair * dims_step<KV>);
                multiply<KV>(split->o[2 * pair], p[step], b[0], b[1]);
                multiply<KV>(split->o[2 * pair + 1], p[step], b[2], b[3]);
            }
        }
    }
    split->l[0] = l[0];
    if (!WHOLE) split->l[1] = l[2];
}

/* Queries of a lane: query i is row i / group, head i % group of the KV head's group. */
ATTENTION_INLINE uint32_t query_row(const struct attention_args &args, const struct attention_lane &lane, uint32_t query) {
    return lane.first_row + query / args.group;
}
ATTENTION_INLINE uint32_t query_head(const struct attention_args &args, uint32_t head, uint32_t query) {
    return head * args.group + query % args.group;
}

ATTENTION_INLINE void write_row_sums(const struct attention_args &args, const struct attention_lane &lane, uint32_t head, uint32_t query, float m,
                                     float l) {
    size_t at = (size_t)query_row(args, lane, query) * args.n_heads + query_head(args, head, query);
    args.row_max[at] = m;
    args.row_sum[at] = l;
}

template <int KV, int TILES>
ATTENTION_INLINE void write_result(const struct attention_args &args, const struct attention_lane &work, uint32_t head, uint32_t n_queries,
                                   const struct softmax<TILES> *total) {
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t query = half * 8 + lane / 4;
        if (query >= n_queries) continue;
        float factor = result_factor<KV>(total->l[half]);
        __half *out = args.a + (size_t)query_row(args, work, query) * args.n_q + query_head(args, head, query) * args.d;
#pragma unroll
        for (int pair = 0; pair < TILES / 2; pair++) {
            uint32_t base = (warp * (TILES / 2) + pair) * 16;
            each_pair<KV>(total->o[2 * pair], total->o[2 * pair + 1], lane, half, [&](uint32_t dim, float x, float y) {
                if (base + dim < args.d) *(__half2 *)(void *)(out + base + dim) = result_pair(x, y, factor);
            });
        }
        if (warp == 0 && lane % 4 == 0 && args.header->any_accumulates) write_row_sums(args, work, head, query, total->m[half], total->l[half]);
    }
}

template <int KV, int TILES>
ATTENTION_INLINE void write_partial(const struct attention_args &args, uint32_t partial, uint32_t n_queries, const struct softmax<TILES> *part) {
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t query = half * 8 + lane / 4;
        if (query >= n_queries) continue;
        float *out = args.partial_o + (size_t)(partial + query) * args.d;
#pragma unroll
        for (int pair = 0; pair < TILES / 2; pair++) {
            uint32_t base = (warp * (TILES / 2) + pair) * 16;
            each_pair<KV>(part->o[2 * pair], part->o[2 * pair + 1], lane, half, [&](uint32_t dim, float x, float y) {
                if (base + dim < args.d) *(float2 *)(void *)(out + base + dim) = make_float2(x, y);
            });
        }
        if (warp == 0 && lane % 4 == 0) args.partial_ml[partial + query] = make_float2(part->m[half], part->l[half]);
    }
}

/* All partials of a lane are there: folds them in order. Each thread has four neighbouring dims of a query. Nothing branches between the loads and their use: the compiler would move each
 * load behind the branch and wait for them one by one. What lies behind the last partial is one of which the query saw nothing. */
template <int KV>
ATTENTION_INLINE void merge_partials(const struct attention_args &args, const struct attention_lane &work, uint32_t head, uint32_t n_queries,
                                     uint32_t n_splits) {
    constexpr uint32_t AHEAD = 16; /* a long lane cut by several CTAs has a hundred partials, and nobody else works by then */
    const uint32_t count = 1 + n_splits - work.n_head, quarters = args.d / 4, step = n_queries * args.d;
    const bool accumulates = args.header->any_accumulates;
    for (uint32_t i = threadIdx.x; i < n_queries * quarters; i += ATTENTION_THREADS) {
        const uint32_t query = i / quarters, dim = i % quarters * 4;
        const float2 *const ml_at = args.partial_ml + work.partial + query;
        const float *const o_at = args.partial_o + (size_t)(work.partial + query) * args.d + dim;
        float m = -INFINITY, l = 0;
        float4 o = {0, 0, 0, 0};
        for (uint32_t first = 0; first < count; first += AHEAD) {
            float2 ml[AHEAD];
            float4 part[AHEAD];
#pragma unroll
            for (uint32_t j = 0; j < AHEAD; j++) ml[j] = __ldcg(ml_at + (size_t)min(first + j, count - 1) * n_queries);
#pragma unroll
            for (uint32_t j = 0; j < AHEAD; j++) part[j] = __ldcg((const float4 *)(const void *)(o_at + (size_t)min(first + j, count - 1) * step));
#pragma unroll
            for (uint32_t j = 0; j < AHEAD; j++) {
                struct merge_factors f = merge_max(&m, first + j < count ? ml[j].x : -INFINITY);
                l = fold(f, l, ml[j].y);
                o.x = fold(f, o.x, part[j].x), o.y = fold(f, o.y, part[j].y), o.z = fold(f, o.z, part[j].z), o.w = fold(f, o.w, part[j].w);
            }
        }
        const float factor = result_factor<KV>(l);
        __half2 *out = (__half2 *)(void *)(args.a + (size_t)query_row(args, work, query) * args.n_q + query_head(args, head, query) * args.d + dim);
        out[0] = result_pair(o.x, o.y, factor);
        out[1] = result_pair(o.z, o.w, factor);
        if (dim == 0 && accumulates) write_row_sums(args, work, head, query, m, l);
    }
}

/* After the CTA's partials of a lane: it adds the splits it did, and merges if these were the last. */
template <int KV>
ATTENTION_INLINE void arrive(const struct attention_args &args, uint32_t lane, const struct attention_lane &work, uint32_t n_queries, uint32_t done,
                             uint32_t n_splits, uint8_t *shared_last) {
    uint32_t *last = (uint32_t *)(void *)shared_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *last = atomicAdd(&args.arrived[lane], done) + done == n_splits;
        if (*last) args.arrived[lane] = 0; /* for the next layer */
    }
    __syncthreads();
    if (!*last) return;
    __threadfence();
    merge_partials<KV>(args, work, lane % args.n_kv_heads, n_queries, n_splits);
}

/* CTAs an SM for which registers must do; 0: that is up to the compiler. KIVI's hide one another's conversions: at 128 dims as many as an H100 has shared memory for. */
template <int KV, int DIMS> constexpr int decode_ctas = code_bits<KV> == 0 ? 0 : DIMS == 64 ? 4 : 3;

template <int KV, int DIMS>
__global__ void __launch_bounds__(ATTENTION_THREADS, decode_ctas<KV, DIMS>) decode(const __grid_constant__ struct attention_args args) {
    using layout = piece<KV, DIMS>;
    using places = decode_shared<KV, DIMS>;
    constexpr int TILES = DIMS / ATTENTION_WARPS / 8;
    uint8_t *const shared = dynamic_shared<uint8_t>();
    const struct attention_cut start = args.cuts[blockIdx.x], stop = args.cuts[blockIdx.x + 1];
    if (start.lane == stop.lane && start.split == stop.split) return;
    uint32_t lane = threadIdx.x % 32, pieces = shared_address(shared) + places::pieces;
    if (args.d < DIMS) clear_shared(shared + places::pieces, args.stages * layout::bytes);
    if (code_bits<KV> != 0) clear_shared(shared + places::p, places::p_bytes); /* of a WHOLE piece, half of it is written */
    __syncthreads();

    struct attention_lane work = read_lane(args, start.lane);
    struct cursor ahead = {start.lane,
                           start.split * SPLIT_SLOTS,
                           lane_slots(work),
                           lane_slots(work),
                           lane_blocks_of(args, work.table, start.lane % args.n_kv_heads),
                           work.codes_first,
                           work.codes_last,
                           0,
                           0,
                           {}};
    if (start.lane == stop.lane) ahead.end = min(ahead.end, stop.split * SPLIT_SLOTS);
    ahead.whole_end = whole_codes<KV, DIMS>(args, ahead.codes_first, ahead.end);
    cursor_settle<KV, DIMS>(args, &ahead, stop);
    uint32_t stage_to = 0, stage = 0, coded = 0; /* coded: two bits a stage, which of its blocks are codes */
    auto copy_next = [&]() {
        if (ahead.slot < ahead.end) {
            const uint32_t to = pieces + stage_to * layout::bytes;
            if (code_bits<KV> != 0 && ahead.slot + PIECE_SLOTS <= ahead.whole_end)
                copy_codes<KV, DIMS>(args, to, ahead.source.ids);
            else
                copy_piece<KV, DIMS>(args, to, ahead.source, ahead.length - ahead.slot);
            if constexpr (code_bits<KV> != 0) coded = (coded & ~(3u << 2 * stage_to)) | ahead.source.coded << 2 * stage_to;
            cursor_step<KV, DIMS>(args, &ahead, stop);
        }
        copies_commit();
        stage_to = stage_to + 1 == args.stages ? 0 : stage_to + 1;
    };
    for (uint32_t i = 1; i < args.stages; i++) copy_next();

    uint32_t partial = start.partial;
    for (uint32_t at = start.lane; at <= stop.lane; at++) {
        if (at == stop.lane && stop.split == 0) break;
        work = read_lane(args, at);
        uint32_t length = lane_slots(work), head = at % args.n_kv_heads, n_queries = work.n_rows * args.group;
        uint32_t first = at == start.lane ? start.split * SPLIT_SLOTS : 0, end = at == stop.lane ? min(length, stop.split * SPLIT_SLOTS) : length;
        if (first >= end) continue;
        const uint16_t *queries[2];
        uint32_t seen[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t query = half * 8 + lane / 4, within = min(query, n_queries - 1);
            queries[half] =
                query < n_queries ? args.q + (size_t)query_row(args, work, query) * args.n_q + query_head(args, head, query) * args.d : NULL;
            seen[half] = work.before + within / args.group + 1;
        }
        uint32_t codes[2] = {work.codes_first, work.codes_first};
        if constexpr (code_bits<KV> != 0) {
            for (int half = 0; half < 2 && work.codes_first < work.codes_last; half++)
                codes[half] = codes_before(args.positions, lane_blocks_of(args, work.table, head), seen[half] - 1,
                                           args.row_positions[work.first_row + seen[half] - 1 - work.before]);
        }
        uint32_t q[DIMS / 16][4];
        load_queries<KV, DIMS>(q, queries[0], queries[1], args.d, lane);
        const uint32_t whole_end = n_queries <= 8 ? whole_codes<KV, DIMS>(args, work.codes_first, end) : 0;

        struct softmax<TILES> total, split;
        softmax_reset(&total);
        softmax_reset(&split);
        for (uint32_t slot = first, view = view_of<KV>(work.codes_first, slot); slot < end;) {
            wait_for_piece(args.stages);
            __syncthreads(); /* everybody's copies are there, and the piece before was read */
            const uint32_t here = coded >> 2 * stage & 3;
            copy_next();
            const bool whole = code_bits<KV> != 0 && slot + PIECE_SLOTS <= whole_end;
            if (whole) {
                decode_piece<KV, DIMS, TILES, true>(&split, q, shared, places::pieces + stage * layout::bytes, slot, seen, args.scale_log2, 3, DIMS);
            } else {
                uint32_t seen_here[2];
#pragma unroll
                for (int half = 0; half < 2; half++) seen_here[half] = view_of<KV>(codes[half], slot) == view ? seen[half] : 0;
                decode_piece<KV, DIMS, TILES, false>(&split, q, shared, places::pieces + stage * layout::bytes, slot, seen_here, args.scale_log2,
                                                     here, codes_dims(args.d));
            }
            stage = stage + 1 == args.stages ? 0 : stage + 1;
            if (!whole && view < view_of<KV>(work.codes_last, slot)) {
                view++;
                continue;
            }
            slot += PIECE_SLOTS;
            if (slot + PIECE_SLOTS > whole_end) view = view_of<KV>(work.codes_first, slot);
            if (slot % SPLIT_SLOTS != 0 && slot < end) continue;
            if (first == 0) {
                softmax_fold(&total, &split, code_bits<KV> == 0 || n_queries > 8);
            } else {
                write_partial<KV, TILES>(args, partial, n_queries, &split);
                partial += n_queries;
            }
            softmax_reset(&split);
        }
        if (first == 0 && end == length) {
            write_result<KV, TILES>(args, work, head, n_queries, &total);
            continue;
        }
        if (first == 0) {
            write_partial<KV, TILES>(args, partial, n_queries, &total);
            partial += n_queries;
        }
        arrive<KV>(args, at, work, n_queries, splits_of(end - first), splits_of(length), shared + places::last);
    }
    copies_wait<0>();
}

static_assert(decode_shared<KV_F16, 128>::pieces + 2 * piece<KV_F16, 128>::bytes <= SHARED_BYTES_LEAST && decode_shared<KV_Q8, 128>::pieces + 2 * piece<KV_Q8, 128>::bytes <= SHARED_BYTES_LEAST,
              "choose_stages finds a number of pieces on every device");

attention_kernel attention_decode_kernel(enum kv_dtype dtype, uint32_t dims) {
    CHECK(dims == 64 || dims == 128);
    if (dtype == KV_F16) return dims == 64 ? decode<KV_F16, 64> : decode<KV_F16, 128>;
    if (dtype == KV_BF16) return dims == 64 ? decode<KV_BF16, 64> : decode<KV_BF16, 128>;
    if (dtype == KV_KIVI4) return dims == 64 ? decode<KV_KIVI4, 64> : decode<KV_KIVI4, 128>;
    if (dtype == KV_KIVI2) return dims == 64 ? decode<KV_KIVI2, 64> : decode<KV_KIVI2, 128>;
    CHECK(dtype == KV_Q8);
    return dims == 64 ? decode<KV_Q8, 64> : decode<KV_Q8, 128>;
}

size_t attention_decode_shared(enum kv_dtype dtype, uint32_t dims, uint32_t stages) {
    CHECK(dims == 64 || dims == 128);
    if (dtype == KV_Q8)
        return dims == 64 ? decode_shared<KV_Q8, 64>::pieces + stages * piece<KV_Q8, 64>::bytes
                          : decode_shared<KV_Q8, 128>::pieces + stages * piece<KV_Q8, 128>::bytes;
    return dims == 64 ? decode_shared<KV_F16, 64>::pieces + stages * piece<KV_F16, 64>::bytes
                      : decode_shared<KV_F16, 128>::pieces + stages * piece<KV_F16, 128>::bytes;
}
