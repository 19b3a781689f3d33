/* KIVI in gpu_attention's check: positions, codes made by the backend's own kernel and compared bit by bit with those of kernels/kivi.h, and what a row reads. Included by attention.cu alone. */
#pragma once

#include "tests/gpu/attention_world.cuh"

enum { NEXT_POSITION = 100000 }; /* of the first row of each sequence */

/* What a check of a KIVI dtype has beside the pool; empty for others. */
struct checked_codes {
    int32_t *positions; /* [n_blocks][BLOCK_TOKENS] */
    float *numbers;     /* [n_blocks][2][BLOCK_TOKENS][d] of blocks that are full */
    uint32_t *full, n_full;
};

static __global__ void __launch_bounds__(CLOSE_THREADS) close_full(struct device_pool pool, const uint32_t *ids) {
    __shared__ uint8_t codes[BLOCK_TOKENS * HEAD_DIM_MAX];
    close_block(pool, ids[blockIdx.x], codes);
}

/* Of a lane's n slots, backwards from the sequence's first row on; gaps: some were evicted. */
static void place_lane(struct checked_codes *codes, const uint32_t *blocks, uint32_t before, uint32_t n, bool gaps, struct random *random) {
    int32_t position = NEXT_POSITION;
    for (uint32_t slot = before; slot-- > 0;) {
        position -= 1 + (gaps && random_below(random, 10) == 0 ? (int32_t)random_below(random, 20) : 0);
        codes->positions[(size_t)blocks[slot / BLOCK_TOKENS] * BLOCK_TOKENS + slot % BLOCK_TOKENS] = position;
    }
    for (uint32_t slot = before; slot < n; slot++)
        codes->positions[(size_t)blocks[slot / BLOCK_TOKENS] * BLOCK_TOKENS + slot % BLOCK_TOKENS] = NEXT_POSITION + (int32_t)(slot - before);
    for (uint32_t b = 0; b < n / BLOCK_TOKENS; b++) codes->full[codes->n_full++] = blocks[b];
}

/* Does row `row` read block `b` of the lane as codes? */
static bool row_reads_codes(const struct checked_codes *codes, const uint32_t *blocks, uint32_t b, uint32_t before, uint32_t row) {
    return (b + 1) * BLOCK_TOKENS <= before + row &&
           kivi_reads_codes(codes->positions[(size_t)blocks[b] * BLOCK_TOKENS + BLOCK_TOKENS - 1], NEXT_POSITION + (int32_t)row);
}

/* One side of a block by kernels/kivi.h; returns how many codes and scales of the device's differ. */
static uint32_t quantize_side(const struct device_pool *pool, int which, const uint16_t *rows, const uint8_t *side, float *numbers) {
    const uint32_t d = pool->d, dims = codes_dims(d), groups = which == WHICH_K ? d : BLOCK_TOKENS * kivi_value_groups(d);
    uint32_t wrong = 0;
    for (uint32_t g = 0; g < groups; g++) {
        const uint32_t slot = which == WHICH_K ? 0 : g / kivi_value_groups(d), dim = which == WHICH_K ? g : g % kivi_value_groups(d) * KIVI_GROUP;
        const uint32_t n = which == WHICH_K ? (uint32_t)BLOCK_TOKENS : d - dim < KIVI_GROUP ? d - dim : KIVI_GROUP;
        float x[KIVI_GROUP];
        uint8_t codes[KIVI_GROUP];
        for (uint32_t i = 0; i < n; i++) x[i] = float_from_f16(rows[which == WHICH_K ? i * d + dim : slot * d + dim + i]);
        const struct kivi_scale scale = kivi_quantize(x, 1, n, pool->bits, codes, 1);
        for (uint32_t i = 0; i < n; i++) {
            const uint32_t s = which == WHICH_K ? i : slot, j = which == WHICH_K ? dim : dim + i;
            const struct code_place place = code_place_of(pool->bits, dims, which, s, j);
            const uint16_t *scales = (const uint16_t *)(const void *)(side + codes_bytes(pool->bits, dims)) + 4 * code_scales_of(which, s, j) +
                                     (which == WHICH_K ? j : s) % 2;
            const uint32_t code = ((const uint32_t *)(const void *)side)[place.word] >> place.shift & ((1u << pool->bits) - 1);
            wrong += code != codes[i] || scales[0] != scale.scale || scales[2] != scale.minimum;
            numbers[s * d + j] = kivi_number(codes[i], scale);
        }
    }
    return wrong;
}

/* f16 blocks to the device and to codes there; their numbers. Returns how many codes are wrong. */
static uint32_t make_codes(struct world *w, struct checked_codes *codes, const uint8_t *raw) {
    const struct device_pool *pool = &w->cuda.pool;
    const size_t bytes = pool->n_blocks * pool->block_bytes, side = codes_side_bytes(pool->bits, codes_dims(pool->d)),
                 elements = (size_t)BLOCK_TOKENS * pool->d;
    uint8_t *blocks = (uint8_t *)check_calloc(bytes, 1);
    uint32_t *places = (uint32_t *)check_calloc(pool->n_blocks, sizeof *places), *ids = (uint32_t *)take(w, pool->n_blocks * sizeof *ids), wrong = 0;
    for (uint32_t i = 0; i < pool->n_blocks; i++) places[i] = i;
    CUDA_CHECK(cudaMemcpy(pool->place, places, pool->n_blocks * sizeof *places, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(pool->raw, raw, pool->n_blocks * pool->raw_bytes, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(pool->positions, codes->positions, (size_t)pool->n_blocks * BLOCK_TOKENS * sizeof(int32_t), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(ids, codes->full, codes->n_full * sizeof *ids, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemsetAsync(pool->kv, 0xff, bytes, w->cuda.stream));
    launch(close_full, codes->n_full, CLOSE_THREADS, 0, w->cuda.stream, *pool, ids);
    CUDA_CHECK(cudaGetLastError());
    CUDA_CHECK(cudaStreamSynchronize(w->cuda.stream));
    CUDA_CHECK(cudaMemcpy(blocks, pool->kv, bytes, cudaMemcpyDeviceToHost));
    for (uint32_t i = 0; i < codes->n_full; i++)
        for (int which = WHICH_K; which <= WHICH_V; which++) {
            const size_t block = codes->full[i], at = (size_t)which * elements;
            wrong += quantize_side(pool, which, (const uint16_t *)(const void *)(raw + block * pool->raw_bytes) + at,
                                   blocks + block * pool->block_bytes + which * side, codes->numbers + block * 2 * elements + at);
        }
    free(blocks);
    free(places);
    return wrong;
}
