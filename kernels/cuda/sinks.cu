/* Shifted sinks on the device: the first keys of each lane, rotated to other positions from an unrotated copy in the ring. Called by the engine's thread between steps, runs on
 * cuda->stream. Owns nothing. */
#include "kernels/cuda/close.h"
#include "kernels/cuda/services.h"

struct turn {
    const double *frequency;
    uint32_t rope_dims;
    bool halves;
};

/* Element i of x after the rotation by `positions`; the rotation alone: what rope_magnitude did to the key when it was cached stays in it. x(j): element j. */
template <typename X> static __device__ float turned(const struct turn &turn, double positions, uint32_t i, const X &x) {
    if (i >= turn.rope_dims) return x(i);
    const uint32_t half = turn.rope_dims / 2, pair = turn.halves ? i % half : i / 2;
    const bool second = turn.halves ? i >= half : i % 2;
    const uint32_t a = turn.halves ? pair : 2 * pair, b = turn.halves ? pair + half : 2 * pair + 1;
    double s, c;
    sincos(positions * turn.frequency[pair], &s, &c);
    const double re = (double)x(a), im = (double)x(b);
    return (float)(second ? re * s + im * c : re * c - im * s);
}

struct shift_pass {
    struct device_pool pool;
    struct turn turn;
    float *plain;        /* [n_lanes][sink_slots][d] of the ring */
    const uint32_t *ids; /* [n_lanes][blocks of n_slots] */
    uint32_t n_lanes, sink_slots, n_slots, n_ids;
    int32_t shift;
    bool first;
};

/* Rounds a key to the pool's dtype; the warp holds element lane + 32 i in x[i]. */
static __device__ void write_key(const struct device_pool &pool, uint32_t block, uint32_t slot, uint32_t lane, const float x[ROW_ELEMENTS]) {
    uint8_t *row = pool.kv + block * pool.block_bytes + (size_t)slot * pool.d * (pool.dtype == KV_Q8 ? 1 : 2);
    float scale = 0;
    if (pool.dtype == KV_Q8) {
        float largest = 0;
        for (uint32_t i = 0; i < ROW_ELEMENTS; i++) largest = lane + i * WARP < pool.d && fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
        for (int other = WARP / 2; other > 0; other /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, other));
        scale = __fdiv_rn(largest, 127);
        if (lane == 0) pool.scales[(size_t)block * 2 * BLOCK_TOKENS + slot] = scale;
    }
    for (uint32_t i = 0; i < ROW_ELEMENTS; i++) {
        const uint32_t at = lane + i * WARP;
        if (at >= pool.d) continue;
        if (pool.dtype == KV_F16) ((__half *)row)[at] = __float2half_rn(fminf(fmaxf(x[i], -65504.0f), 65504.0f));
        if (pool.dtype == KV_BF16) ((__nv_bfloat16 *)row)[at] = __float2bfloat16_rn(x[i]);
        if (pool.dtype == KV_Q8) {
            float code = scale > 0 && isfinite(scale) && isfinite(x[i]) ? rintf(__fdiv_rn(x[i], scale)) : 0;
            ((int8_t *)row)[at] = (int8_t)fminf(fmaxf(code, -127), 127);
        }
    }
}

/* A warp a sink. TRANSFORMS: of dtypes that transform keys, which are rotated as they were before and transformed anew. */
template <bool TRANSFORMS> static __global__ void __launch_bounds__(THREADS) shift_kernel(struct shift_pass pass) {
    const uint32_t row = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP, d = pass.pool.d;
    if (row >= pass.n_lanes * pass.n_slots) return;
    const uint32_t kv_lane = row / pass.n_slots, i = row % pass.n_slots;
    const uint32_t block = pass.ids[(size_t)kv_lane * pass.n_ids + i / BLOCK_TOKENS], slot = i % BLOCK_TOKENS;
    const double position = pass.pool.positions[(size_t)block * BLOCK_TOKENS + slot];
    const struct block_numbers from = numbers_of(pass.pool, block, false);
    float *plain = pass.plain + ((size_t)kv_lane * pass.sink_slots + i) * d;
    float key[ROW_ELEMENTS];
    if constexpr (TRANSFORMS) {
        if (pass.first) {
            read_transformed_key(pass.pool, from, slot, lane, key);
            for (uint32_t e = 0; e < ROW_ELEMENTS; e++)
                if (lane + e * WARP < d) plain[lane + e * WARP] = key[e];
            __syncwarp();
            for (uint32_t e = 0; e < ROW_ELEMENTS; e++)
                if (lane + e * WARP < d) key[e] = turned(pass.turn, -position, lane + e * WARP, [&](uint32_t j) { return plain[j]; });
            __syncwarp(); /* all have read the others' elements */
            for (uint32_t e = 0; e < ROW_ELEMENTS; e++)
                if (lane + e * WARP < d) plain[lane + e * WARP] = key[e];
        }
    } else if (pass.first) {
        for (uint32_t at = lane; at < d; at += WARP)
            plain[at] = turned(pass.turn, -position, at, [&](uint32_t j) { return pool_element(pass.pool, from, WHICH_K, slot, j); });
    }
    __syncwarp(); /* the copy is whole, the cached key read */
    for (uint32_t e = 0; e < ROW_ELEMENTS; e++)
        key[e] = lane + e * WARP < d ? turned(pass.turn, position + pass.shift, lane + e * WARP, [&](uint32_t j) { return plain[j]; }) : 0;
    if constexpr (TRANSFORMS) hadamard(key, d, lane);
    write_key(pass.pool, block, slot, lane, key);
}

/* KIVI: a block of a lane, whose codes are made anew from the turned keys in f16; so is its f16 block, if it has one. The copy is that of its codes. */
static __global__ void __launch_bounds__(CLOSE_THREADS) shift_codes_kernel(struct shift_pass pass) {
    __shared__ uint16_t rows[BLOCK_TOKENS * HEAD_DIM_MAX];
    __shared__ uint8_t codes[BLOCK_TOKENS * HEAD_DIM_MAX];
    const uint32_t kv_lane = blockIdx.x / pass.n_ids, index = blockIdx.x % pass.n_ids, block = pass.ids[blockIdx.x], d = pass.pool.d;
    const int32_t *positions = pass.pool.positions + (size_t)block * BLOCK_TOKENS;
    const struct block_numbers from = numbers_of(pass.pool, block, pass.pool.closed[block] || is_lost(pass.pool, block));
    float *plain = pass.plain + ((size_t)kv_lane * pass.sink_slots + (size_t)index * BLOCK_TOKENS) * d;
    for (uint32_t i = threadIdx.x; pass.first && i < BLOCK_TOKENS * d; i += CLOSE_THREADS)
        plain[i] = turned(pass.turn, -(double)positions[i / d], i % d, [&](uint32_t j) { return pool_element(pass.pool, from, WHICH_K, i / d, j); });
    __syncthreads(); /* the copy is whole, the cached keys read */
    for (uint32_t i = threadIdx.x; i < BLOCK_TOKENS * d / 2; i += CLOSE_THREADS)
        for (uint32_t at = 2 * i; at < 2 * i + 2; at++) {
            const float key = turned(pass.turn, (double)positions[at / d] + pass.shift, at % d, [&](uint32_t j) { return plain[at / d * d + j]; });
            rows[at] = __half_as_ushort(__float2half_rn(fminf(fmaxf(key, -65504.0f), 65504.0f)));
            if (!is_lost(pass.pool, block)) ((uint16_t *)(void *)raw_of(pass.pool, block))[at] = rows[at];
        }
    close_side(pass.pool, WHICH_K, rows, pass.pool.kv + block * pass.pool.block_bytes, codes);
}

void cuda_shift_sinks(struct backend *backend, const struct shift_request *request) {
    struct cuda *cuda = cuda_of(backend);
    services_pool_changes(cuda);
    const struct program *program = cuda->program;
    CHECK(request->ring >= 1 && request->ring <= cuda->limits.n_rings && request->n_slots <= cuda->limits.sink_slots);
    CHECK(cuda->pool.bits == 0 || request->n_slots % BLOCK_TOKENS == 0);
    if (request->n_slots == 0) return;
    struct shift_pass pass = {};
    pass.pool = cuda->pool;
    pass.turn = (struct turn){cuda->rope_frequency, program->rope_dims, program->rope_pairs == ROPE_PAIRS_HALVES};
    pass.plain = cuda->ring_sinks + (size_t)(request->ring - 1) * cuda->n_lanes * cuda->limits.sink_slots * cuda->pool.d;
    pass.n_lanes = cuda->n_lanes;
    pass.sink_slots = cuda->limits.sink_slots;
    pass.n_slots = request->n_slots;
    pass.n_ids = blocks_of(request->n_slots);
    pass.shift = request->shift;
    pass.first = request->first;
    const size_t bytes = (size_t)pass.n_lanes * pass.n_ids * sizeof(uint32_t);
    uint32_t *ids = (uint32_t *)stage_take(cuda, bytes, &pass.ids);
    for (uint32_t lane = 0; lane < pass.n_lanes; lane++)
        stage_ids(cuda, request->block_ids + request->lane_first[lane], pass.n_ids, ids + (size_t)lane * pass.n_ids);
    stage_send(cuda, ids, bytes);
    if (cuda->pool.bits)
        launch(shift_codes_kernel, pass.n_lanes * pass.n_ids, CLOSE_THREADS, 0, cuda->stream, pass);
    else
        launch(kv_transforms(cuda->pool.dtype) ? shift_kernel<true> : shift_kernel<false>, div_up(pass.n_lanes * pass.n_slots, THREADS / WARP),
               THREADS, 0, cuda->stream, pass);
    CUDA_CHECK(cudaGetLastError());
}
