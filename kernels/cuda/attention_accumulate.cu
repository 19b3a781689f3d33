/* Accumulated attention (kernels/score.h): for sequences that ask for it, each slot gets, in fixed point, the sum of p over the step's queries of its KV head. p comes from the scores again and
 * from the maximum and sum of each query's softmax, which decode and prefill left: bit for bit what another cut into steps gives, and integers add up in any order.
 *
 * A CTA takes a piece of a lane with all queries that see some of it; its warps share the queries' tiles. Launched only when somebody accumulates. */
#include "kernels/cuda/attention.h"

constexpr int PIECE_TILES = PIECE_SLOTS / 8;
constexpr uint32_t CHUNK = ATTENTION_THREADS; /* sequences looked at together */

template <int KV, int DIMS> struct accumulate_shared {
    static constexpr uint32_t k = 0;
    static constexpr uint32_t scales = k + piece<KV, DIMS>::k_bytes;
    static constexpr uint32_t sums = scales + 2 * PIECE_SLOTS * sizeof(float);
    static constexpr uint32_t pieces = sums + PIECE_SLOTS * sizeof(uint64_t); /* [CHUNK] of the sequences of a chunk up to and with each */
    static constexpr uint32_t warps = pieces + CHUNK * sizeof(uint32_t);
    static constexpr uint32_t bytes = warps + ATTENTION_WARPS * sizeof(uint32_t);
};

static_assert(accumulate_shared<KV_F16, 128>::bytes <= SHARED_BYTES_LEAST && accumulate_shared<KV_Q8, 128>::bytes <= SHARED_BYTES_LEAST, "on every device");

/* out[i] = the sum of everybody's value up to thread i's. */
ATTENTION_INLINE void prefix_sums(uint32_t value, uint32_t *out, uint32_t *of_warps) {
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (uint32_t step = 1; step < 32; step *= 2) {
        uint32_t below = __shfl_up_sync(0xffffffffu, value, step);
        if (lane >= step) value += below;
    }
    __syncthreads(); /* the sums before were read */
    if (lane == 31) of_warps[warp] = value;
    __syncthreads();
    for (uint32_t w = 0; w < warp; w++) value += of_warps[w];
    out[threadIdx.x] = value;
    __syncthreads();
}

struct piece_sums {
    uint64_t of[PIECE_TILES][2]; /* by the thread's columns */
};

/* A piece in one of its views. */
struct accumulated_piece {
    uint32_t slot; /* its first */
    uint32_t view, coded;
    bool views; /* there are others */
};

/* Does query `query` of the sequence see the piece in this view? */
template <int KV>
ATTENTION_INLINE bool has_view(const struct attention_args &args, const struct step_sequence &sequence, uint32_t before, uint32_t head, const struct accumulated_piece &at, uint32_t query) {
    if constexpr (code_bits<KV> == 0) return true;
    if (!at.views) return true;
    const uint32_t row = query / args.group;
    return view_of<KV>(codes_before(args.positions, lane_blocks_of(args, sequence.table, head), before + row, args.row_positions[sequence.first_row + row]), at.slot) == at.view;
}

/* The queries [16 tile, 16 tile + 16) of the sequence. */
template <int KV, int DIMS>
ATTENTION_INLINE void add_tile(const struct attention_args &args, struct piece_sums *sums, const uint8_t *shared,
                               const struct step_sequence &sequence, uint32_t before, uint32_t head, const struct accumulated_piece &piece_at, uint32_t tile) {
    using places = accumulate_shared<KV, DIMS>;
    uint32_t lane = threadIdx.x % 32, n_queries = sequence.n_rows * args.group;
    const uint16_t *queries[2];
    float m[2] = {}, factor[2] = {};
    uint32_t seen[2] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t query = tile * TILE_QUERIES + half * 8 + lane / 4;
        queries[half] = NULL;
        if (query >= n_queries) continue;
        uint32_t row = sequence.first_row + query / args.group, at_head = head * args.group + query % args.group;
        queries[half] = args.q + (size_t)row * args.n_q + at_head * args.d;
        m[half] = args.row_max[(size_t)row * args.n_heads + at_head];
        factor[half] = __frcp_rn(args.row_sum[(size_t)row * args.n_heads + at_head]);
        seen[half] = has_view<KV>(args, sequence, before, head, piece_at, query) ? before + query / args.group + 1 : 0;
    }
    const struct coded_piece from = {shared + places::k, piece_at.coded, codes_dims(args.d)};
    uint32_t q[DIMS / 16][4];
    load_queries<KV, DIMS>(q, queries[0], queries[1], args.d, lane);
    float s[PIECE_TILES][4] = {};
    uint32_t k_at = shared_address(shared + places::k) + k_offset<KV, DIMS>(lane);
    multiply_keys<KV, DIMS>(s, q, k_at, from, lane);
    const float *scales = (const float *)(const void *)(shared + places::scales);
#pragma unroll
    for (int i = 0; i < PIECE_TILES * 4; i++) {
        int half = i / 2 % 2;
        uint32_t in_piece = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float x = s[i / 4][i % 4];
        if constexpr (KV == KV_Q8) x = __fmul_rn(x, scales[in_piece]);
        float p = __fmul_rn(weight_of(x, args.scale_log2, m[half]), factor[half]);
        if (piece_at.slot + in_piece < seen[half]) sums->of[i / 4][i % 2] += __float2ull_rn(p * (float)SCORE_ACCUMULATED_ONE);
    }
}

/* From the threads' sums to one a slot, in shared memory. */
ATTENTION_INLINE void gather_sums(const struct piece_sums *sums, unsigned long long *shared_sums) {
    uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < PIECE_TILES * 2; i++) {
        unsigned long long sum = sums->of[i / 2][i % 2];
        for (uint32_t step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (lane < 4) atomicAdd(&shared_sums[i / 2 * 8 + lane * 2 + i % 2], sum);
    }
}

/* The piece's keys to shared memory; waits for nothing. */
template <int KV, int DIMS> ATTENTION_INLINE void copy_keys(const struct attention_args &args, uint8_t *shared, const struct piece_source &source, uint32_t visible) {
    using places = accumulate_shared<KV, DIMS>;
    if constexpr (code_bits<KV> != 0) {
        copy_blocks<KV, DIMS, false>(args, shared_address(shared + places::k), source, visible);
    } else {
        copy_rows<KV, DIMS>(args, shared_address(shared + places::k), source.ids, 0, visible);
        copy_scales<KV, DIMS>(args, shared_address(shared + places::scales), source.ids, visible);
    }
    copies_commit();
}

template <int KV, int DIMS>
ATTENTION_INLINE void accumulate_piece(const struct attention_args &args, uint8_t *shared, const struct step_sequence &sequence, uint32_t before,
                                       uint32_t head, uint32_t slot) {
    using places = accumulate_shared<KV, DIMS>;
    uint32_t length = before + sequence.n_rows, visible = length - slot;
    const uint32_t *blocks = lane_blocks_of(args, sequence.table, head);
    uint2 ids = piece_blocks(blocks, slot, length);
    unsigned long long *shared_sums = (unsigned long long *)(void *)(shared + places::sums);
    uint32_t first_row = slot > before ? slot - before : 0, tiles = (sequence.n_rows * args.group + TILE_QUERIES - 1) / TILE_QUERIES;
    uint32_t view = 0, views = 0; /* the first row's and the last's */
    if constexpr (code_bits<KV> != 0) {
        view = view_of<KV>(codes_before(args.positions, blocks, before + first_row, args.row_positions[sequence.first_row + first_row]), slot);
        views = view_of<KV>(codes_before(args.positions, blocks, length - 1, args.row_positions[sequence.first_row + sequence.n_rows - 1]), slot);
    }
    struct piece_sums sums = {};
    for (const uint32_t first_view = view; view <= views; view++) {
        const struct piece_source source = source_of<KV>(args, ids, slot, length, view);
        __syncthreads(); /* the piece before is done */
        copy_keys<KV, DIMS>(args, shared, source, visible);
        if (threadIdx.x < PIECE_SLOTS && view == first_view) shared_sums[threadIdx.x] = 0;
        copies_wait<0>();
        __syncthreads();
        const struct accumulated_piece piece_at = {slot, view, source.coded, first_view < views};
        for (uint32_t tile = first_row * args.group / TILE_QUERIES + threadIdx.x / 32; tile < tiles; tile += ATTENTION_WARPS)
            add_tile<KV, DIMS>(args, &sums, shared, sequence, before, head, piece_at, tile);
    }
    gather_sums(&sums, shared_sums);
    __syncthreads();
    if (threadIdx.x >= PIECE_SLOTS || threadIdx.x >= visible) return;
    /* Candidates of one prompt share its blocks, and each of them adds. */
    uint32_t block = threadIdx.x < BLOCK_TOKENS ? ids.x : ids.y;
    atomicAdd((unsigned long long *)&args.accumulated[(size_t)block * BLOCK_TOKENS + threadIdx.x % BLOCK_TOKENS], shared_sums[threadIdx.x]);
}

template <int KV, int DIMS> __global__ void __launch_bounds__(ATTENTION_THREADS, 2) accumulate(const __grid_constant__ struct attention_args args) {
    using places = accumulate_shared<KV, DIMS>;
    uint8_t *const shared = dynamic_shared<uint8_t>();
    if (!args.header->any_accumulates) return;
    uint32_t head = blockIdx.y, n_sequences = args.header->n_sequences;
    const uint32_t *lane_tokens = args.lane_tokens + args.layer * args.n_kv_heads + head;
    uint32_t *pieces = (uint32_t *)(void *)(shared + places::pieces);
    if (args.d < DIMS) clear_shared(shared, piece<KV, DIMS>::k_bytes);
    for (uint32_t first = 0; first < n_sequences; first += CHUNK) {
        uint32_t mine = first + threadIdx.x, count = 0;
        if (mine < n_sequences && args.sequences[mine].accumulate && args.sequences[mine].n_rows)
            count = (lane_tokens[(size_t)mine * args.n_lanes] + args.sequences[mine].n_rows + PIECE_SLOTS - 1) / PIECE_SLOTS;
        prefix_sums(count, pieces, (uint32_t *)(void *)(shared + places::warps));
        for (uint32_t item = blockIdx.x; item < pieces[CHUNK - 1]; item += gridDim.x) {
            uint32_t low = 0, high = CHUNK - 1; /* the first whose sum is above */
            while (low < high) {
                uint32_t middle = (low + high) / 2;
                if (pieces[middle] > item)
                    high = middle;
                else
                    low = middle + 1;
            }
            const struct step_sequence sequence = args.sequences[first + low];
            uint32_t before = lane_tokens[(size_t)(first + low) * args.n_lanes];
            accumulate_piece<KV, DIMS>(args, shared, sequence, before, head, (item - (low ? pieces[low - 1] : 0)) * PIECE_SLOTS);
        }
    }
}

attention_kernel attention_accumulate_kernel(enum kv_dtype dtype, uint32_t dims) {
    CHECK(dims == 64 || dims == 128);
    if (dtype == KV_F16) return dims == 64 ? accumulate<KV_F16, 64> : accumulate<KV_F16, 128>;
    if (dtype == KV_BF16) return dims == 64 ? accumulate<KV_BF16, 64> : accumulate<KV_BF16, 128>;
    if (dtype == KV_KIVI4) return dims == 64 ? accumulate<KV_KIVI4, 64> : accumulate<KV_KIVI4, 128>;
    if (dtype == KV_KIVI2) return dims == 64 ? accumulate<KV_KIVI2, 64> : accumulate<KV_KIVI2, 128>;
    CHECK(dtype == KV_Q8);
    return dims == 64 ? accumulate<KV_Q8, 64> : accumulate<KV_Q8, 128>;
}

size_t attention_accumulate_shared(enum kv_dtype dtype, uint32_t dims) {
    CHECK(dims == 64 || dims == 128);
    if (dtype == KV_Q8) return dims == 64 ? accumulate_shared<KV_Q8, 64>::bytes : accumulate_shared<KV_Q8, 128>::bytes;
    return dims == 64 ? accumulate_shared<KV_F16, 64>::bytes : accumulate_shared<KV_F16, 128>::bytes;
}
