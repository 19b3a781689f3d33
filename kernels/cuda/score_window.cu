/* What a window of queries says of cached slots: attention, its squares, persistence, expected attention (kernels/score.h; the oracle is kernels/score.c). Launched by score.cu on
 * cuda->stream, for the lanes of one pass. Owns nothing: scratch is struct score_device's.
 *
 * A window's attention is computed twice, never stored: once for the (max, sum) of each query over each split, merged in ascending order, once more for what the slots receive. Every
 * sum runs in an order that depends on the lane and the window alone. Does not fold heads or choose. */
#include "kernels/cuda/services.h"

enum {
    TILE_ROWS = 16,   /* query rows of a matrix tile */
    SHARED_ROWS = 64, /* query rows in shared memory at a time */
    SLOT_TILES = 4,   /* matrix tiles of 8 slots in a block */
};
enum window_mode { MODE_SUMS, MODE_FOLD, MODE_EXPECTED };

struct window_pass {
    struct lane_jobs jobs;
    const uint16_t *ring; /* [n_layers][ring_rows][n_q] of the sequence; transformed if the pool's keys are (hadamard.h) */
    uint32_t ring_rows, n_q, n_kv_heads, group, n_window;
    int32_t last_position;
    /* Queries in tiles of TILE_ROWS, head after head: head_tiles each. MODE_EXPECTED: of the mean and the rows less the mean. */
    uint32_t head_tiles, n_tiles;
    float scale, half_variance;
    enum score_kind kind;
    float2 *partials; /* [n_splits][n_tiles * TILE_ROWS] max (units of log2) and sum */
    float4 *states;   /* [n_jobs][n_tiles * TILE_ROWS] max, 1 / sum, visible slots */
    double2 *turns;   /* MODE_EXPECTED: [n_window][rope_dims / 2] */
    uint16_t *rows;   /* MODE_EXPECTED: [n_jobs][n_tiles][2][TILE_ROWS][padded d] in 16 bits: the number rounded, then what that left */
    float *numbers;
};

/* ---- matrices ---- */

static __device__ inline void multiply_tile(bool bf16, float c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    if (bf16)
        multiply_bf16(c, a0, a1, a2, a3, b0, b1);
    else
        multiply_f16(c, a0, a1, a2, a3, b0, b1);
}

/* Two of four signed bytes as f16, exactly: 1024 + (x + 128) has x + 128 in its lowest bits. */
static __device__ inline uint32_t halves_of_bytes(uint32_t biased, uint32_t selector) {
    const uint32_t bits = __byte_perm(biased, 0x64646464u, selector);
    __half2 value;
    memcpy(&value, &bits, sizeof value);
    value = __hsub2(value, __half2half2(__ushort_as_half(0x6480))); /* 1152 */
    uint32_t out;
    memcpy(&out, &value, sizeof out);
    return out;
}

/* The warp's block of keys as B fragments. A product does not care for the order of its dims, as long as both sides have the same: thread c of a quad takes eight dims in a row, chunk
 * 4 j + c, which are the pairs (2 c, 2 c + 1), (2 c + 8, 2 c + 9) of two steps. */
template <int TYPE, int GROUPS>
static __device__ inline void load_keys(const struct device_pool &pool, bool present, const struct block_numbers &from, uint32_t lane,
                                        uint32_t k[SLOT_TILES][GROUPS][4]) {
    const uint8_t *base = from.at;
#pragma unroll
    for (int n = 0; n < SLOT_TILES; n++)
#pragma unroll
        for (int j = 0; j < GROUPS; j++) {
            const uint32_t slot = (uint32_t)n * 8 + lane / 4, dim = ((uint32_t)j * 4 + lane % 4) * 8;
            uint4 chunk = make_uint4(0, 0, 0, 0);
            if (present && dim < pool.d) {
                if (TYPE == KV_KIVI4 && from.coded) {
                    chunk = code_key_chunk(pool.bits, codes_dims(pool.d), base, slot, dim / 8);
                } else if constexpr (TYPE == KV_Q8) {
                    uint2 codes = *(const uint2 *)(base + slot * pool.d + dim);
                    codes.x ^= 0x80808080u, codes.y ^= 0x80808080u;
                    chunk = make_uint4(halves_of_bytes(codes.x, 0x4140), halves_of_bytes(codes.x, 0x4342), halves_of_bytes(codes.y, 0x4140),
                                       halves_of_bytes(codes.y, 0x4342));
                } else {
                    chunk = *(const uint4 *)(base + ((size_t)slot * pool.d + dim) * 2);
                }
            }
            k[n][j][0] = chunk.x, k[n][j][1] = chunk.y, k[n][j][2] = chunk.z, k[n][j][3] = chunk.w;
        }
}

/* ---- a window's queries against the keys of a split ---- */

/* 16 bytes of row `row` (of all tiles), as they lie in the ring or in pass.rows. */
template <int GROUPS, int MODE>
static __device__ inline uint4 query_chunk(const struct window_pass &pass, uint32_t job, uint32_t lane, uint32_t first_tile, uint32_t row,
                                           uint32_t chunk) {
    if constexpr (MODE == MODE_EXPECTED) {
        const size_t at = ((size_t)job * pass.n_tiles + first_tile) * 2 * TILE_ROWS + row;
        return ((const uint4 *)pass.rows)[at * (GROUPS * 4) + chunk];
    } else {
        const uint32_t d = pass.jobs.pool.d, tile = first_tile + row / TILE_ROWS, head = tile / pass.head_tiles;
        const uint32_t i = tile % pass.head_tiles * TILE_ROWS + row % TILE_ROWS;
        if (i >= pass.n_window || head >= pass.group || chunk * 8 >= d) return make_uint4(0, 0, 0, 0);
        const uint32_t position = (uint32_t)pass.last_position - (pass.n_window - 1 - i);
        const size_t at = ((size_t)(lane / pass.n_kv_heads) * pass.ring_rows + position % pass.ring_rows) * pass.n_q;
        return *(const uint4 *)(pass.ring + at + (lane % pass.n_kv_heads * pass.group + head) * d + chunk * 8);
    }
}

/* Position of the window row that row `row` of all tiles is; of filling, one that sees nothing. */
static __device__ inline int32_t position_of_row(const struct window_pass &pass, uint32_t row) {
    const uint32_t i = row / TILE_ROWS % pass.head_tiles * TILE_ROWS + row % TILE_ROWS;
    return i < pass.n_window ? pass.last_position - (int32_t)(pass.n_window - 1 - i) : INT32_MIN;
}

/* (max, sum) over the warp's block of rows g and g + 8 of a tile. */
static __device__ inline void sum_tile(const float acc[SLOT_TILES][4], const float scale[SLOT_TILES][2], const int32_t position[SLOT_TILES][2],
                                       const int32_t *row_position, uint32_t lane, float2 *out) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int32_t mine = row_position[lane / 4 + half * 8];
        float max = -INFINITY, sum = 0;
#pragma unroll
        for (int n = 0; n < SLOT_TILES; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) max = position[n][e] <= mine ? fmaxf(max, acc[n][2 * half + e] * scale[n][e]) : max;
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
#pragma unroll
        for (int n = 0; n < SLOT_TILES; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) sum += position[n][e] <= mine ? exp2f(acc[n][2 * half + e] * scale[n][e] - max) : 0;
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (lane % 4 == 0) out[lane / 4 + half * 8] = make_float2(max, sum);
    }
}

/* What rows g and g + 8 of a tile give to the thread's slots. */
static __device__ inline void fold_tile(enum score_kind kind, const float acc[SLOT_TILES][4], const float scale[SLOT_TILES][2],
                                        const int32_t position[SLOT_TILES][2], const int32_t *row_position, const float4 *state, uint32_t lane,
                                        float received[SLOT_TILES][2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int32_t mine = row_position[lane / 4 + half * 8];
        const float4 row = state[lane / 4 + half * 8];
#pragma unroll
        for (int n = 0; n < SLOT_TILES; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float p = position[n][e] <= mine ? exp2f(acc[n][2 * half + e] * scale[n][e] - row.x) * row.y : 0;
                received[n][e] += kind == SCORE_ATTENTION ? p : kind == SCORE_SQUARES ? p * p : p > 0 && p * row.z >= 1 ? 1.0f : 0.0f;
            }
    }
}

/* Row 0 of a head is the mean, the others what deviates from it. */
static __device__ inline void expect_tile(const struct window_pass &pass, const float acc[SLOT_TILES][4], const float scale[SLOT_TILES][2],
                                          bool first, uint32_t lane, float received[SLOT_TILES][2]) {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int n = 0; n < SLOT_TILES; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float z = acc[n][2 * half + e] * scale[n][e];
                received[n][e] += first && half == 0 && lane / 4 == 0 ? z : z * z * pass.half_variance;
            }
}

/* Grid: the pass's splits. */
template <int TYPE, int GROUPS, int MODE> static __global__ void __launch_bounds__(THREADS, 2) window_kernel(const struct window_pass pass) {
    constexpr uint32_t CHUNKS = GROUPS * 4,
                       STRIDE = CHUNKS + (GROUPS % 2 ? 0 : 4); /* rows a half of the banks apart: eight threads read two of them without a conflict */
    constexpr uint32_t PARTS = MODE == MODE_EXPECTED ? 2 : 1, SHARED_TILES = SHARED_ROWS / TILE_ROWS / PARTS;
    __shared__ uint4 queries[SHARED_ROWS * STRIDE];
    __shared__ int32_t row_position[SHARED_ROWS];
    __shared__ float4 row_state[MODE == MODE_FOLD ? SHARED_ROWS : 1];
    __shared__ float2 sums[MODE == MODE_SUMS ? WARPS : 1][SHARED_ROWS];
    const uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, all_rows = pass.n_tiles * TILE_ROWS;
    const uint32_t split = blockIdx.x, job_index = job_of(pass.jobs, split);
    const struct lane_job job = pass.jobs.job[job_index];
    const struct device_pool &pool = pass.jobs.pool;
    const uint32_t block_index = (split - job.first_split) * WARPS + warp, first_slot = block_index * BLOCK_TOKENS;
    const bool present = first_slot < job.n_slots; /* else the warp has nothing to read */
    const uint32_t block = present ? pass.jobs.ids[job.first_id + block_index] : 0;
    uint32_t keys[SLOT_TILES][GROUPS][4];
    int32_t position[SLOT_TILES][2];
    float scale[SLOT_TILES][2], received[SLOT_TILES][2] = {};
    const struct block_numbers from = present ? numbers_of_job(pass.jobs, job, block_index) : numbers_of(pool, 0, true);
    load_keys<TYPE, GROUPS>(pool, present, from, lane, keys);
#pragma unroll
    for (int n = 0; n < SLOT_TILES; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const uint32_t slot = (uint32_t)n * 8 + lane % 4 * 2 + (uint32_t)e;
            position[n][e] = first_slot + slot < job.n_slots ? pool.positions[(size_t)block * BLOCK_TOKENS + slot] : INT32_MAX;
            scale[n][e] = pass.scale * (TYPE == KV_Q8 && present ? pool.scales[(size_t)block * 2 * BLOCK_TOKENS + slot] : 1.0f);
        }
    for (uint32_t first = 0; first < pass.n_tiles; first += SHARED_TILES) {
        const uint32_t n_tiles = pass.n_tiles - first < SHARED_TILES ? pass.n_tiles - first : SHARED_TILES;
        __syncthreads(); /* what was read of the tiles before */
        for (uint32_t i = threadIdx.x; i < n_tiles * PARTS * TILE_ROWS * CHUNKS; i += THREADS)
            queries[i / CHUNKS * STRIDE + i % CHUNKS] = query_chunk<GROUPS, MODE>(pass, job_index, job.lane, first, i / CHUNKS, i % CHUNKS);
        if (threadIdx.x < n_tiles * TILE_ROWS) {
            row_position[threadIdx.x] = position_of_row(pass, first * TILE_ROWS + threadIdx.x);
            if constexpr (MODE == MODE_FOLD) row_state[threadIdx.x] = pass.states[(size_t)job_index * all_rows + first * TILE_ROWS + threadIdx.x];
        }
        __syncthreads();
        for (uint32_t tile = 0; tile < n_tiles; tile++) {
            const uint32_t in_head = (first + tile) % pass.head_tiles;
            float acc[SLOT_TILES][4] = {};
#pragma unroll
            for (uint32_t part = 0; part < PARTS; part++) {
                const uint4 *row = queries + (tile * PARTS + part) * TILE_ROWS * STRIDE + lane / 4 * STRIDE + lane % 4;
#pragma unroll
                for (int j = 0; j < GROUPS; j++) {
                    const uint4 a = row[j * 4], b = row[8 * STRIDE + j * 4];
#pragma unroll
                    for (int n = 0; n < SLOT_TILES; n++) {
                        multiply_tile(TYPE == KV_BF16, acc[n], a.x, b.x, a.y, b.y, keys[n][j][0], keys[n][j][1]);
                        multiply_tile(TYPE == KV_BF16, acc[n], a.z, b.z, a.w, b.w, keys[n][j][2], keys[n][j][3]);
                    }
                }
            }
            if constexpr (MODE == MODE_SUMS)
                sum_tile(acc, scale, position, row_position + tile * TILE_ROWS, lane, sums[warp] + tile * TILE_ROWS);
            else {
                if constexpr (MODE == MODE_FOLD)
                    fold_tile(pass.kind, acc, scale, position, row_position + tile * TILE_ROWS, row_state + tile * TILE_ROWS, lane, received);
                else
                    expect_tile(pass, acc, scale, in_head == 0, lane, received);
                if (in_head + 1 < pass.head_tiles) continue;
                float *out = pass.numbers + job.slots_before * pass.group + (size_t)((first + tile) / pass.head_tiles) * job.n_slots;
#pragma unroll
                for (int n = 0; n < SLOT_TILES; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++) { /* the head's rows are all in: over the rows g */
                        float sum = received[n][e];
#pragma unroll
                        for (int other = 4; other < WARP; other *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
                        const uint32_t slot = first_slot + (uint32_t)n * 8 + lane % 4 * 2 + (uint32_t)e;
                        if (lane / 4 == (uint32_t)n && slot < job.n_slots) out[slot] = sum;
                        received[n][e] = 0;
                    }
            }
        }
        if constexpr (MODE == MODE_SUMS) {
            __syncthreads();
            if (threadIdx.x < n_tiles * TILE_ROWS) { /* the split's blocks in order */
                float max = -INFINITY, sum = 0;
                for (int w = 0; w < WARPS; w++) max = fmaxf(max, sums[w][threadIdx.x].x);
                for (int w = 0; w < WARPS; w++)
                    if (!(sums[w][threadIdx.x].y <= 0)) sum += sums[w][threadIdx.x].y * exp2f(sums[w][threadIdx.x].x - max);
                pass.partials[(size_t)split * all_rows + first * TILE_ROWS + threadIdx.x] = make_float2(max, sum);
            }
        }
    }
}

/* Slots of the lane that a row at `position` sees: positions ascend. */
static __device__ uint32_t visible_to(const struct lane_jobs &jobs, const struct lane_job &job, int32_t position) {
    uint32_t low = 0, high = job.n_slots;
    while (low < high) {
        const uint32_t middle = (low + high) / 2, block = jobs.ids[job.first_id + middle / BLOCK_TOKENS];
        if (jobs.pool.positions[(size_t)block * BLOCK_TOKENS + middle % BLOCK_TOKENS] <= position)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* A thread a row of a lane: its splits in ascending order. A row that sees nothing gives nothing. */
static __global__ void __launch_bounds__(THREADS) merge_kernel(const struct window_pass pass) {
    const uint32_t all_rows = pass.n_tiles * TILE_ROWS, at = blockIdx.x * THREADS + threadIdx.x, row = at % all_rows;
    if (at >= pass.jobs.n_jobs * all_rows) return;
    const struct lane_job job = pass.jobs.job[at / all_rows];
    const uint32_t n_splits = splits_of(job.n_slots);
    const float2 *partials = pass.partials + (size_t)job.first_split * all_rows + row;
    float max = -INFINITY, sum = 0;
    for (uint32_t i = 0; i < n_splits; i++) max = fmaxf(max, partials[(size_t)i * all_rows].x);
    for (uint32_t i = 0; i < n_splits; i++) {
        const float2 split = partials[(size_t)i * all_rows];
        if (!(split.y <= 0)) sum += split.y * exp2f(split.x - max);
    }
    const float visible = pass.kind == SCORE_PERSISTENCE ? (float)visible_to(pass.jobs, job, position_of_row(pass, row)) : 0;
    pass.states[at] = sum == 0 ? make_float4(0, 0, 0, 0) : make_float4(max, 1.0f / sum, visible, 0);
}

/* ---- expected attention ---- */

/* From each row's own rotation to the mean one over the positions ahead, one factor a pair. */
static __global__ void __launch_bounds__(THREADS)
    turns_kernel(double2 *turns, const double *frequency, uint32_t pairs, uint32_t n_window, uint32_t ahead) {
    const uint32_t at = blockIdx.x * THREADS + threadIdx.x, row = at / pairs, pair = at % pairs;
    if (row >= n_window) return;
    double mean_c = 0, mean_s = 0, c, s;
    if (ahead > 0) { /* the mean of e^(i angle j) over j = 1..ahead is a geometric series */
        const double angle = remainder(frequency[pair], 6.283185307179586476925), half = sin(angle / 2);
        const double size = fabs(half) < 1e-12 ? 1 : sin(ahead * angle / 2) / (ahead * half);
        mean_c = size * cos(angle * (ahead + 1.0) / 2);
        mean_s = size * sin(angle * (ahead + 1.0) / 2);
    }
    sincos(frequency[pair] * (n_window - 1 - row), &s, &c);
    turns[at] = make_double2(c * mean_c - s * mean_s, c * mean_s + s * mean_c);
}

static __device__ inline uint16_t narrow(bool bf16, float x) {
    if (bf16) return __bfloat16_as_ushort(__float2bfloat16_rn(x));
    return __half_as_ushort(__float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f)));
}
static __device__ inline float widen(bool bf16, uint16_t bits) {
    return bf16 ? __bfloat162float(__ushort_as_bfloat16(bits)) : __half2float(__ushort_as_half(bits));
}

struct turned_rows {
    struct window_pass pass;
    uint32_t rope_dims;
    bool halves, bf16;
};

/* Element i of window row r, turned. x(j): element j as it was. */
template <typename X> static __device__ double turned_element(const struct turned_rows &rows, uint32_t r, uint32_t i, const X &x) {
    const uint32_t half = rows.rope_dims / 2;
    if (i >= rows.rope_dims) return x(i);
    const uint32_t pair = rows.halves ? i % half : i / 2, a = rows.halves ? pair : 2 * pair, b = rows.halves ? pair + half : 2 * pair + 1;
    const double2 turn = rows.pass.turns[(size_t)r * half + pair];
    const double re = x(a), im = x(b);
    return i == a ? re * turn.x - im * turn.y : re * turn.y + im * turn.x;
}

/* A job's query head: its first element in the ring's row of window row r. */
static __device__ const uint16_t *ring_row(const struct window_pass &pass, uint32_t lane, uint32_t head, uint32_t r) {
    const uint32_t position = (uint32_t)pass.last_position - (pass.n_window - 1 - r);
    return pass.ring + ((size_t)(lane / pass.n_kv_heads) * pass.ring_rows + position % pass.ring_rows) * pass.n_q +
           (lane % pass.n_kv_heads * pass.group + head) * pass.jobs.pool.d;
}

/* Element i of row `row` of the head's tiles, as query_chunk reads it. */
static __device__ void put_row_element(const struct turned_rows &rows, uint32_t job, uint32_t head, uint32_t row, uint32_t i, uint32_t padded,
                                       float x) {
    const struct window_pass &pass = rows.pass;
    const uint16_t high = narrow(rows.bf16, x), low = narrow(rows.bf16, x - widen(rows.bf16, high));
    const size_t tile = (size_t)job * pass.n_tiles + head * pass.head_tiles + row / TILE_ROWS;
    pass.rows[((tile * 2 + 0) * TILE_ROWS + row % TILE_ROWS) * padded + i] = high;
    pass.rows[((tile * 2 + 1) * TILE_ROWS + row % TILE_ROWS) * padded + i] = low;
}

/* Grid: jobs x query heads of the group; a thread a dim (padded). Row 0 of the head's tiles: the mean of the turned rows; then each less the mean; zeros to the end. */
static __global__ void __launch_bounds__(HEAD_DIM_MAX) expected_rows_kernel(const struct turned_rows rows, uint32_t padded) {
    const struct window_pass &pass = rows.pass;
    const uint32_t i = threadIdx.x, d = pass.jobs.pool.d, lane = pass.jobs.job[blockIdx.x].lane, head = blockIdx.y;
    if (i >= padded) return;
    auto element = [&](uint32_t r) {
        const uint16_t *x = ring_row(pass, lane, head, r);
        return turned_element(rows, r, i, [&](uint32_t j) { return (double)widen(rows.bf16, x[j]); });
    };
    double mean = 0;
    for (uint32_t r = 0; i < d && r < pass.n_window; r++) mean += element(r) / pass.n_window;
    for (uint32_t row = 0; row < pass.head_tiles * TILE_ROWS; row++) {
        const bool filled = i < d && row <= pass.n_window;
        put_row_element(rows, blockIdx.x, head, row, i, padded, !filled ? 0 : (float)(row == 0 ? mean : element(row - 1) - mean));
    }
}

/* The same where the ring's queries are transformed: each is taken back before it is turned, and what comes of it is transformed as the keys are that it meets. A warp a row, each thread
 * elements lane + 32 i; sums of four rows apart, then of the warps in order. */
static __global__ void __launch_bounds__(HEAD_DIM_MAX) expected_transformed_rows_kernel(const struct turned_rows rows, uint32_t padded) {
    constexpr uint32_t ROW_WARPS = HEAD_DIM_MAX / WARP;
    __shared__ float plain[ROW_WARPS][HEAD_DIM_MAX];
    __shared__ double sums[ROW_WARPS][HEAD_DIM_MAX];
    const struct window_pass &pass = rows.pass;
    const uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, d = pass.jobs.pool.d, head = blockIdx.y;
    auto turned_row = [&](uint32_t r, double x[ROW_ELEMENTS]) {
        const uint16_t *ring = ring_row(pass, pass.jobs.job[blockIdx.x].lane, head, r);
        float own[ROW_ELEMENTS];
        for (uint32_t i = 0; i < ROW_ELEMENTS; i++) own[i] = lane + i * WARP < d ? widen(rows.bf16, ring[lane + i * WARP]) : 0;
        hadamard(own, d, lane);
        __syncwarp(); /* the row before was read */
        for (uint32_t i = 0; i < ROW_ELEMENTS; i++) plain[warp][lane + i * WARP] = own[i];
        __syncwarp();
        for (uint32_t i = 0; i < ROW_ELEMENTS; i++)
            x[i] = lane + i * WARP < d ? turned_element(rows, r, lane + i * WARP, [&](uint32_t j) { return (double)plain[warp][j]; }) : 0;
    };
    double mean[ROW_ELEMENTS] = {}, x[ROW_ELEMENTS] = {};
    for (uint32_t r = warp; r < pass.n_window; r += ROW_WARPS) {
        turned_row(r, x);
        for (uint32_t i = 0; i < ROW_ELEMENTS; i++) mean[i] += x[i] / pass.n_window;
    }
    for (uint32_t i = 0; i < ROW_ELEMENTS; i++) sums[warp][lane + i * WARP] = mean[i], mean[i] = 0;
    __syncthreads();
    for (uint32_t i = 0; i < ROW_ELEMENTS * ROW_WARPS; i++) mean[i / ROW_WARPS] += sums[i % ROW_WARPS][lane + i / ROW_WARPS * WARP];
    for (uint32_t row = warp; row < pass.head_tiles * TILE_ROWS; row += ROW_WARPS) {
        float out[ROW_ELEMENTS];
        if (row > 0 && row <= pass.n_window) turned_row(row - 1, x);
        for (uint32_t i = 0; i < ROW_ELEMENTS; i++) out[i] = row > pass.n_window ? 0 : (float)(row == 0 ? mean[i] : x[i] - mean[i]);
        hadamard(out, d, lane);
        for (uint32_t i = 0; i < ROW_ELEMENTS; i++)
            if (lane + i * WARP < padded) put_row_element(rows, blockIdx.x, head, row, lane + i * WARP, padded, lane + i * WARP < d ? out[i] : 0);
    }
}

/* The same number in all threads, in a fixed order. */
static __device__ float reduce_threads(float x, bool max, float *shared) {
    for (int other = WARP / 2; other > 0; other /= 2) {
        const float y = __shfl_xor_sync(0xffffffffu, x, other);
        x = max ? fmaxf(x, y) : x + y;
    }
    __syncthreads();
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    x = shared[0];
    for (int w = 1; w < WARPS; w++) x = max ? fmaxf(x, shared[w]) : x + shared[w];
    return x;
}

/* Grid: jobs x query heads. In place over the lane's slots. */
static __global__ void __launch_bounds__(THREADS) softmax_kernel(const struct window_pass pass) {
    __shared__ float shared[WARPS];
    const struct lane_job job = pass.jobs.job[blockIdx.x];
    float *x = pass.numbers + job.slots_before * pass.group + (size_t)blockIdx.y * job.n_slots, max = -INFINITY, sum = 0;
    for (uint32_t i = threadIdx.x; i < job.n_slots; i += THREADS) max = fmaxf(max, x[i]);
    max = reduce_threads(max, true, shared);
    for (uint32_t i = threadIdx.x; i < job.n_slots; i += THREADS) sum += x[i] = expf(x[i] - max);
    const float inverse = 1.0f / reduce_threads(sum, false, shared);
    for (uint32_t i = threadIdx.x; i < job.n_slots; i += THREADS) x[i] *= inverse;
}

/* ---- the host's side ---- */

static uint32_t head_tiles_of(enum score_kind kind, uint32_t n_window) {
    uint32_t rows = kind == SCORE_EXPECTED ? n_window + 1 : n_window;
    return rows ? div_up(rows, TILE_ROWS) : 1;
}

static uint32_t dim_groups(const struct cuda *cuda) { return div_up(cuda->program->head_dim, 32); }

struct work_need window_need(const struct cuda *cuda, enum score_kind kind, uint32_t n_window) {
    const size_t rows = (size_t)cuda->group * head_tiles_of(kind, n_window) * TILE_ROWS, turns = (size_t)n_window * (cuda->program->rope_dims / 2);
    if (kind == SCORE_EXPECTED) return (struct work_need){turns * sizeof(double2), rows * 2 * dim_groups(cuda) * 32 * sizeof(uint16_t), 0};
    return (struct work_need){0, rows * sizeof(float4), rows * sizeof(float2)};
}

template <int MODE, int TYPE> static void launch_window(struct cuda *cuda, const struct window_pass *pass) {
    const uint32_t n = pass->jobs.n_splits;
    switch (dim_groups(cuda)) {
    case 1: launch(window_kernel<TYPE, 1, MODE>, n, THREADS, 0, cuda->stream, *pass); break;
    case 2: launch(window_kernel<TYPE, 2, MODE>, n, THREADS, 0, cuda->stream, *pass); break;
    case 3: launch(window_kernel<TYPE, 3, MODE>, n, THREADS, 0, cuda->stream, *pass); break;
    case 4: launch(window_kernel<TYPE, 4, MODE>, n, THREADS, 0, cuda->stream, *pass); break;
    default: CHECK(!"head_dim <= HEAD_DIM_MAX");
    }
    CUDA_CHECK(cudaGetLastError());
}

template <int MODE> static void run_window(struct cuda *cuda, const struct window_pass *pass) {
    switch (cuda->pool.dtype) {
    case KV_F16: launch_window<MODE, KV_F16>(cuda, pass); return;
    case KV_BF16: launch_window<MODE, KV_BF16>(cuda, pass); return;
    case KV_Q8: launch_window<MODE, KV_Q8>(cuda, pass); return;
    case KV_KIVI4:
    case KV_KIVI2: launch_window<MODE, KV_KIVI4>(cuda, pass); return;
    default: CHECK(!"a dtype of the device's pool");
    }
}

void window_score(struct cuda *cuda, const struct score_request *request, const struct lane_jobs *jobs, float *numbers) {
    const struct program *program = cuda->program;
    const struct work_need need = window_need(cuda, request->kind, request->n_window);
    uint8_t *work = cuda->score->work;
    const uint32_t head_tiles = head_tiles_of(request->kind, request->n_window), n_rows = request->n_window ? request->n_window : 1;
    struct window_pass pass = {};
    pass.jobs = *jobs;
    pass.ring = cuda->ring_queries + (size_t)(request->ring - 1) * program->n_layers * cuda->limits.ring_rows * cuda->n_q;
    pass.ring_rows = cuda->limits.ring_rows;
    pass.n_q = cuda->n_q;
    pass.n_kv_heads = program->n_kv_heads;
    pass.group = cuda->group;
    pass.n_window = request->n_window;
    pass.last_position = request->last_position;
    pass.head_tiles = head_tiles;
    pass.n_tiles = head_tiles * cuda->group;
    pass.scale = program->attention_scale;
    pass.half_variance = 0.5f / (float)n_rows;
    pass.kind = request->kind;
    pass.numbers = numbers;
    if (request->kind == SCORE_EXPECTED) {
        pass.turns = (double2 *)(void *)work;
        pass.rows = (uint16_t *)(void *)(work + need.fixed);
        struct turned_rows rows = {.pass = pass,
                                   .rope_dims = program->rope_dims,
                                   .halves = program->rope_pairs == ROPE_PAIRS_HALVES,
                                   .bf16 = kv_computes_bf16(cuda->pool.dtype)};
        const uint32_t n_turns = request->n_window * (program->rope_dims / 2), padded = dim_groups(cuda) * 32;
        if (n_turns > 0)
            launch(turns_kernel, div_up(n_turns, THREADS), THREADS, 0, cuda->stream, pass.turns, cuda->rope_frequency, program->rope_dims / 2,
                   request->n_window, request->ahead);
        launch(kv_transforms(cuda->pool.dtype) ? expected_transformed_rows_kernel : expected_rows_kernel, dim3(jobs->n_jobs, cuda->group),
               HEAD_DIM_MAX, 0, cuda->stream, rows, padded);
        run_window<MODE_EXPECTED>(cuda, &pass);
        launch(softmax_kernel, dim3(jobs->n_jobs, cuda->group), THREADS, 0, cuda->stream, pass);
    } else {
        pass.scale *= 1.44269504088896340736f; /* exp2 */
        pass.states = (float4 *)(void *)work;
        pass.partials = (float2 *)(void *)(work + jobs->n_jobs * need.per_job);
        run_window<MODE_SUMS>(cuda, &pass);
        launch(merge_kernel, div_up(jobs->n_jobs * pass.n_tiles * TILE_ROWS, THREADS), THREADS, 0, cuda->stream, pass);
        run_window<MODE_FOLD>(cuda, &pass);
    }
    CUDA_CHECK(cudaGetLastError());
}
