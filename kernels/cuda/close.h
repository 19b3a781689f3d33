/* KIVI: f16 rows of a block become codes, by CLOSE_THREADS threads. Device code for close.cu, compact.cu and sinks.cu. */
#pragma once

#include "kernels/cuda/codes.h"

constexpr uint32_t CLOSE_THREADS = 128;

static_assert(CLOSE_THREADS >= (uint32_t)HEAD_DIM_MAX, "a thread takes a dim of K, or a slot's group of V");

/* The uint2 of two neighbours along k is filled by halves. */
static __device__ inline void put_scale(const struct device_pool &pool, uint32_t dims, uint8_t *side, int which, uint32_t slot, uint32_t dim,
                                        struct kivi_scale scale) {
    uint16_t *to =
        (uint16_t *)(void *)(side + codes_bytes(pool.bits, dims)) + code_scales_of(which, slot, dim) * 4 + (which == WHICH_K ? dim : slot) % 2;
    to[0] = scale.scale;
    to[2] = scale.minimum;
}

/* A thread a channel over the slots. */
static __device__ inline void quantize_keys(const struct device_pool &pool, const uint16_t *rows, uint8_t *side, uint8_t *codes) {
    const uint32_t dims = codes_dims(pool.d), dim = threadIdx.x;
    float x[BLOCK_TOKENS];
    if (dim >= dims) return;
    for (uint32_t slot = 0; slot < BLOCK_TOKENS; slot++) x[slot] = dim < pool.d ? kivi_widen(rows[slot * pool.d + dim]) : 0;
    put_scale(pool, dims, side, WHICH_K, 0, dim, kivi_quantize(x, 1, BLOCK_TOKENS, pool.bits, codes + dim * BLOCK_TOKENS, 1));
}

/* A thread a slot's group of channels. */
static __device__ inline void quantize_values(const struct device_pool &pool, const uint16_t *rows, uint8_t *side, uint8_t *codes) {
    const uint32_t dims = codes_dims(pool.d), slot = threadIdx.x % BLOCK_TOKENS, first = threadIdx.x / BLOCK_TOKENS * KIVI_GROUP;
    float x[KIVI_GROUP];
    if (first >= dims) return;
    const uint32_t n = pool.d - first < KIVI_GROUP ? pool.d - first : KIVI_GROUP;
    for (uint32_t i = 0; i < KIVI_GROUP; i++) {
        x[i] = i < n ? kivi_widen(rows[slot * pool.d + first + i]) : 0;
        codes[slot * dims + first + i] = 0;
    }
    put_scale(pool, dims, side, WHICH_V, slot, first, kivi_quantize(x, 1, n, pool.bits, codes + slot * dims + first, 1));
}

/* Codes, [k][n] (codes.h) a byte each, to the words they lie in: code_place_of the other way round. */
static __device__ inline void pack_codes(const struct device_pool &pool, int which, const uint8_t *codes, uint32_t *words) {
    const uint32_t dims = codes_dims(pool.d), bits = pool.bits, tiles = 4 / bits, n_count = which == WHICH_K ? BLOCK_TOKENS : dims,
                   n_groups = n_count / (8 * tiles);
    for (uint32_t i = threadIdx.x; i < dims * bits; i += CLOSE_THREADS) {
        const uint32_t thread = i % 32, group = i / 32;
        uint32_t word = 0;
        for (uint32_t pair = 0; pair < 4 * tiles; pair++) {
            const uint32_t n = (group % n_groups * tiles + pair / 4) * 8 + thread / 4, k = group / n_groups * 32 + pair % 4 * 8 + thread % 4 * 2;
            const uint32_t low = codes[k * n_count + n], high = codes[(k + 1) * n_count + n];
            word |= (low | high << 16) << (bits * pair);
        }
        words[i] = word;
    }
}

/* K or V of a block: rows [BLOCK_TOKENS][d] of f16 to its half of the block. codes: [BLOCK_TOKENS * HEAD_DIM_MAX] shared. All threads of the group. */
static __device__ inline void close_side(const struct device_pool &pool, int which, const uint16_t *rows, uint8_t *side, uint8_t *codes) {
    __syncthreads(); /* what was read of the codes before */
    if (which == WHICH_K)
        quantize_keys(pool, rows, side, codes);
    else
        quantize_values(pool, rows, side, codes);
    __syncthreads();
    pack_codes(pool, which, codes, (uint32_t *)(void *)side);
}

/* A block whose f16 block is full. */
static __device__ inline void close_block(const struct device_pool &pool, uint32_t block, uint8_t *codes) {
    const uint32_t dims = codes_dims(pool.d);
    uint8_t *to = pool.kv + block * pool.block_bytes;
    const uint16_t *rows = (const uint16_t *)(const void *)raw_of(pool, block);
    close_side(pool, WHICH_K, rows, to, codes);
    close_side(pool, WHICH_V, rows + (size_t)BLOCK_TOKENS * pool.d, to + codes_side_bytes(pool.bits, dims), codes);
    if (threadIdx.x == 0) pool.closed[block] = true;
}
