/* Attention of the sequences with more queries a KV head than one matrix tile: prompts. A CTA takes PREFILL_QUERIES packed queries of a sequence and KV head, a warp 16 of them with all
 * slots and all columns, and goes through the lane up to the last slot that one of them sees, from the pool: what was cached before and what this step appended alike. */
#include "kernels/cuda/attention.h"

static_assert(PREFILL_QUERIES == ATTENTION_WARPS * TILE_QUERIES, "a warp takes one matrix tile of queries");

constexpr uint32_t PREFILL_STAGES = 2;
constexpr int PIECE_TILES = PIECE_SLOTS / 8;
static_assert(PREFILL_STAGES * piece<KV_F16, 128>::bytes <= SHARED_BYTES_LEAST && PREFILL_STAGES * piece<KV_Q8, 128>::bytes <= SHARED_BYTES_LEAST, "on every device");

/* The softmax of a warp's queries, as in decode, but with all columns. */
template <int DIMS> struct part { float m[2], l[2], o[DIMS / 8][4]; };

template <int DIMS> ATTENTION_INLINE void part_reset(struct part<DIMS> *s) {
    s->m[0] = s->m[1] = -INFINITY;
    s->l[0] = s->l[1] = 0;
#pragma unroll
    for (int t = 0; t < DIMS / 8; t++) s->o[t][0] = s->o[t][1] = s->o[t][2] = s->o[t][3] = 0;
}

template <int DIMS> ATTENTION_INLINE void part_fold(struct part<DIMS> *total, const struct part<DIMS> *split) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        struct merge_factors f = merge_max(&total->m[half], split->m[half]);
        total->l[half] = fold(f, total->l[half], split->l[half]);
#pragma unroll
        for (int t = 0; t < DIMS / 8; t++) {
            total->o[t][2 * half] = fold(f, total->o[t][2 * half], split->o[t][2 * half]);
            total->o[t][2 * half + 1] = fold(f, total->o[t][2 * half + 1], split->o[t][2 * half + 1]);
        }
    }
}

/* One piece, in one view. seen: as many of its slots the thread's two queries see; all_seen: every query of the warp sees all of them. coded: which of its blocks are codes, of `dims` dims. */
template <int KV, int DIMS>
ATTENTION_INLINE void prefill_piece(struct part<DIMS> *split, const uint32_t q[DIMS / 16][4], const uint8_t *at, const int32_t seen[2], bool all_seen,
                                    float scale_log2, uint32_t coded, uint32_t dims) {
    using layout = piece<KV, DIMS>;
    uint32_t lane = threadIdx.x % 32;
    const struct coded_piece from = {at, coded, dims};
    float s[PIECE_TILES][4] = {};
    uint32_t k_at = shared_address(at) + k_offset<KV, DIMS>(lane), v_at = shared_address(at) + layout::k_bytes + v_offset<KV, DIMS>(lane);
    multiply_keys<KV, DIMS>(s, q, k_at, from, lane);
    const float *scales = (const float *)(const void *)(at + layout::scales);
    if constexpr (KV == KV_Q8) {
#pragma unroll
        for (int tile = 0; tile < PIECE_TILES; tile++) {
            float2 scale = *(const float2 *)(const void *)(scales + tile * 8 + lane % 4 * 2);
#pragma unroll
            for (int i = 0; i < 4; i++) s[tile][i] = __fmul_rn(s[tile][i], i % 2 ? scale.y : scale.x);
        }
    }
    if (!all_seen) {
#pragma unroll
        for (int i = 0; i < PIECE_TILES * 4; i++)
            if ((int32_t)(i / 4 * 8 + lane % 4 * 2 + i % 2) >= seen[i / 2 % 2]) s[i / 4][i % 4] = -INFINITY;
    }
    float a[2], m[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float x = fmaxf(s[0][2 * half], s[0][2 * half + 1]);
#pragma unroll
        for (int tile = 1; tile < PIECE_TILES; tile++) x = fmaxf(x, fmaxf(s[tile][2 * half], s[tile][2 * half + 1]));
        float next = fmaxf(split->m[half], __fmul_rn(max_of_quad(x), scale_log2));
        m[half] = finite_max(next);
        a[half] = power_of_2(split->m[half] - m[half]);
        split->m[half] = next;
    }
#pragma unroll
    for (int t = 0; t < DIMS / 8; t++) {
#pragma unroll
        for (int i = 0; i < 4; i++) split->o[t][i] = __fmul_rn(split->o[t][i], a[i / 2]);
    }
    float l[4] = {__fmul_rn(split->l[0], a[0]), 0, __fmul_rn(split->l[1], a[1]), 0};
    uint32_t p[2][4];
#pragma unroll
    for (int k = 0; k < PIECE_SLOTS / 16; k++) {
        uint32_t *const now = p[k % 2];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int tile = 2 * k + i / 2, half = i % 2;
            s[tile][2 * half] = weight_of(s[tile][2 * half], scale_log2, m[half]);
            s[tile][2 * half + 1] = weight_of(s[tile][2 * half + 1], scale_log2, m[half]);
            now[i] = pack<KV>(s[tile][2 * half], s[tile][2 * half + 1]);
        }
        multiply<KV>(l, now, ones<KV>(), ones<KV>());
        if constexpr (KV == KV_Q8) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int tile = 2 * k + i / 2, half = i % 2;
                float2 scale = *(const float2 *)(const void *)(scales + PIECE_SLOTS + tile * 8 + lane % 4 * 2);
                now[i] = pack<KV>(with_v_scale(s[tile][2 * half], scale.x), with_v_scale(s[tile][2 * half + 1], scale.y));
            }
        }
        multiply_values<KV, DIMS>(split->o, p, v_at, from, k, lane);
    }
    split->l[0] = l[0];
    split->l[1] = l[2];
}

/* A piece and a view of it. */
struct piece_walk {
    uint32_t slot, view;
};
template <int KV> ATTENTION_INLINE void walk_on(struct piece_walk *walk, uint32_t codes_first, uint32_t codes_last) {
    if (walk->view < view_of<KV>(codes_last, walk->slot)) {
        walk->view++;
        return;
    }
    walk->slot += PIECE_SLOTS;
    walk->view = view_of<KV>(codes_first, walk->slot);
}

template <int KV, int DIMS>
__global__ void __launch_bounds__(ATTENTION_THREADS, DIMS == 64 ? 3 : 2) prefill(const __grid_constant__ struct attention_args args) {
    using layout = piece<KV, DIMS>;
    uint8_t *const shared = dynamic_shared<uint8_t>();
    uint32_t n_tiles = args.header->n_tiles, head = blockIdx.x;
    if (blockIdx.y >= n_tiles) return;
    const struct prefill_tile tile = args.tiles[n_tiles - 1 - blockIdx.y]; /* a prompt's last tiles see most: they start first */
    const struct step_sequence sequence = args.sequences[tile.sequence];
    uint32_t before = args.lane_tokens[(size_t)tile.sequence * args.n_lanes + args.layer * args.n_kv_heads + head];
    uint32_t n_queries = sequence.n_rows * args.group, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t tile_last = min(tile.first_query + PREFILL_QUERIES, n_queries) - 1, end = before + tile_last / args.group + 1;
    const uint32_t *blocks = lane_blocks_of(args, sequence.table, head);

    /* Queries past the last see what that sees, so that nothing is masked for them. */
    uint32_t warp_first = tile.first_query + warp * TILE_QUERIES, seen[2], query[2];
    const uint16_t *queries[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        query[half] = warp_first + half * 8 + lane / 4;
        uint32_t row = sequence.first_row + query[half] / args.group, at_head = head * args.group + query[half] % args.group;
        queries[half] = query[half] < n_queries ? args.q + (size_t)row * args.n_q + at_head * args.d : NULL;
        seen[half] = before + min(query[half], n_queries - 1) / args.group + 1;
    }
    uint32_t warp_seen_least = before + min(warp_first, n_queries - 1) / args.group + 1;
    uint32_t warp_seen_most = before + min(warp_first + TILE_QUERIES - 1, n_queries - 1) / args.group + 1;
    uint32_t codes[2] = {}, codes_first = 0, codes_last = 0; /* of the thread's queries, and of all */
    if constexpr (code_bits<KV> != 0) {
        auto codes_of = [&](uint32_t slots) { return codes_before(args.positions, blocks, slots - 1, args.row_positions[sequence.first_row + slots - 1 - before]); };
        codes_first = codes_of(before + tile.first_query / args.group + 1);
        codes_last = codes_of(end);
        for (int half = 0; half < 2; half++) codes[half] = codes_of(seen[half]);
    }

    if (args.d < DIMS) clear_shared(shared, PREFILL_STAGES * layout::bytes);
    __syncthreads();
    struct piece_source source = source_of<KV>(args, piece_blocks(blocks, 0, end), 0, end, view_of<KV>(codes_first, 0));
    copy_piece<KV, DIMS>(args, shared_address(shared), source, end);
    copies_commit();
    struct piece_walk walk = {0, view_of<KV>(codes_first, 0)}, ahead = walk;
    uint32_t coded = source.coded;
    walk_on<KV>(&ahead, codes_first, codes_last);
    source = source_of<KV>(args, piece_blocks(blocks, ahead.slot, end), ahead.slot, end, ahead.view);
    uint32_t q[DIMS / 16][4];
    load_queries<KV, DIMS>(q, queries[0], queries[1], args.d, lane);

    struct part<DIMS> total, split;
    part_reset(&total);
    part_reset(&split);
    for (uint32_t stage = 0; walk.slot < end; stage ^= 1) {
        copies_wait<0>();
        __syncthreads(); /* everybody's copies are there, and the piece before was read */
        const uint32_t slot = walk.slot, view = walk.view, here = coded;
        walk = ahead;
        if (walk.slot < end) {
            copy_piece<KV, DIMS>(args, shared_address(shared) + (stage ^ 1) * layout::bytes, source, end - walk.slot);
            copies_commit();
            coded = source.coded;
            walk_on<KV>(&ahead, codes_first, codes_last);
            source = source_of<KV>(args, piece_blocks(blocks, ahead.slot, end), ahead.slot, end, ahead.view);
        }
        if (slot < warp_seen_most) {
            int32_t seen_here[2];
            bool mine = true; /* this view, of both queries */
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const bool same = view_of<KV>(codes[half], slot) == view;
                seen_here[half] = same ? (int32_t)(seen[half] - slot) : 0;
                mine = mine && same;
            }
            if constexpr (code_bits<KV> != 0) mine = __all_sync(0xffffffffu, mine);
            prefill_piece<KV, DIMS>(&split, q, shared + stage * layout::bytes, seen_here, mine && slot + PIECE_SLOTS <= warp_seen_least, args.scale_log2, here, codes_dims(args.d));
        }
        if (walk.slot != slot && (walk.slot % SPLIT_SLOTS == 0 || walk.slot >= end)) {
            part_fold(&total, &split);
            part_reset(&split);
        }
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (query[half] >= n_queries) continue;
        float factor = result_factor<KV>(total.l[half]);
        uint32_t row = sequence.first_row + query[half] / args.group, at_head = head * args.group + query[half] % args.group;
        __half *out = args.a + (size_t)row * args.n_q + at_head * args.d;
#pragma unroll
        for (int pair = 0; pair < DIMS / 16; pair++) {
            each_pair<KV>(total.o[2 * pair], total.o[2 * pair + 1], lane, half, [&](uint32_t dim, float x, float y) {
                if (pair * 16 + dim < args.d) *(__half2 *)(void *)(out + pair * 16 + dim) = result_pair(x, y, factor);
            });
        }
        if (lane % 4 == 0 && args.header->any_accumulates) {
            args.row_max[(size_t)row * args.n_heads + at_head] = total.m[half];
            args.row_sum[(size_t)row * args.n_heads + at_head] = total.l[half];
        }
    }
}

attention_kernel attention_prefill_kernel(enum kv_dtype dtype, uint32_t dims) {
    CHECK(dims == 64 || dims == 128);
    if (dtype == KV_F16) return dims == 64 ? prefill<KV_F16, 64> : prefill<KV_F16, 128>;
    if (dtype == KV_BF16) return dims == 64 ? prefill<KV_BF16, 64> : prefill<KV_BF16, 128>;
    if (dtype == KV_KIVI4) return dims == 64 ? prefill<KV_KIVI4, 64> : prefill<KV_KIVI4, 128>;
    if (dtype == KV_KIVI2) return dims == 64 ? prefill<KV_KIVI2, 64> : prefill<KV_KIVI2, 128>;
    CHECK(dtype == KV_Q8);
    return dims == 64 ? prefill<KV_Q8, 64> : prefill<KV_Q8, 128>;
}

size_t attention_prefill_shared(enum kv_dtype dtype, uint32_t dims) {
    CHECK(dims == 64 || dims == 128);
    if (dtype == KV_Q8) return PREFILL_STAGES * (dims == 64 ? piece<KV_Q8, 64>::bytes : piece<KV_Q8, 128>::bytes);
    return PREFILL_STAGES * (dims == 64 ? piece<KV_F16, 64>::bytes : piece<KV_F16, 128>::bytes);
}
