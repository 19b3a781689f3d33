/* What gpu_attention's check and bench stand on: a backend with nothing but attention, where sequence s has table s. Included by attention.cu alone. */
#pragma once

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern "C" {
#include "base/half.h"
#include "base/random.h"
}
#include "kernels/cuda/attention.h"
#include "kernels/cuda/close.h"

/* The backend's own where this is linked with it. */
__attribute__((weak)) enum status cuda_status(struct error *error, cudaError_t result, const char *what) {
    return result == cudaSuccess ? STATUS_OK : error_set(error, STATUS_DEVICE, "%s: %s", what, cudaGetErrorString(result));
}
__attribute__((weak)) void cuda_check(cudaError_t result, const char *what, const char *file, int line) {
    if (result == cudaSuccess) return;
    fprintf(stderr, "%s:%d: %s: %s\n", file, line, what, cudaGetErrorString(result));
    exit(1);
}
extern "C" __attribute__((weak)) const char *kv_dtype_name(enum kv_dtype dtype) {
    static const char *const names[KV_DTYPES] = {"f32", "f16", "bf16", "q8", "kivi4", "kivi2"};
    return names[dtype];
}

/* ---- a backend with nothing but attention: sequence s has table s ---- */

struct geometry {
    enum kv_dtype dtype;
    uint32_t d, group, n_kv_heads, n_layers, max_sequences, lane_blocks, max_rows;
    bool accumulators;
};

static const char *only = ""; /* --only */

static void name_of(const struct geometry *geometry, char *name, size_t bytes) {
    snprintf(name, bytes, "%s d %u group %u", kv_dtype_name(geometry->dtype), geometry->d, geometry->group);
}
static bool is_wanted(const struct geometry *geometry) {
    char name[64];
    name_of(geometry, name, sizeof name);
    return strncmp(name, only, strlen(only)) == 0;
}

struct world {
    struct cuda cuda;
    struct program program;
    void *allocations[32];
    uint32_t n_allocations;
    uint32_t *tables; /* host */
};

static void *take(struct world *w, size_t bytes) {
    CHECK(w->n_allocations < sizeof w->allocations / sizeof *w->allocations);
    void *at;
    CUDA_CHECK(cudaMalloc(&at, bytes + 256));
    return w->allocations[w->n_allocations++] = at;
}

static void shuffle(uint32_t *ids, uint32_t n, struct random *random) {
    for (uint32_t i = 0; i < n; i++) ids[i] = i;
    for (uint32_t i = n; i > 1; i--) {
        uint32_t j = random_below(random, i), id = ids[j];
        ids[j] = ids[i - 1];
        ids[i - 1] = id;
    }
}

static void world_open(struct world *w, const struct geometry *g, struct random *random) {
    memset(w, 0, sizeof *w);
    struct cuda *cuda = &w->cuda;
    struct program *p = &w->program;
    p->n_layers = g->n_layers;
    p->n_kv_heads = g->n_kv_heads;
    p->n_heads = g->group * g->n_kv_heads;
    p->head_dim = g->d;
    p->attention_scale = (float)(1 / sqrt((double)g->d));
    cuda->program = p;
    cuda->limits.kv_dtype = g->dtype;
    cuda->limits.max_rows = g->max_rows;
    cuda->limits.max_sequences = g->max_sequences;
    cuda->limits.accumulators = g->accumulators;
    cuda->n_lanes = program_lanes(p);
    cuda->limits.n_blocks = g->max_sequences * cuda->n_lanes * g->lane_blocks;
    CUDA_CHECK(cudaGetDevice(&cuda->device));
    CUDA_CHECK(cudaGetDeviceProperties(&cuda->properties, cuda->device));
    CUDA_CHECK(cudaStreamCreate(&cuda->stream));
    cuda->group = g->group;
    cuda->n_q = p->n_heads * g->d;
    cuda->n_kv = p->n_kv_heads * g->d;
    cuda->n_tables = g->max_sequences;
    cuda->lane_blocks = g->lane_blocks;
    cuda->max_tiles = g->max_sequences + g->max_rows * g->group / PREFILL_QUERIES;
    struct device_pool *pool = &cuda->pool;
    pool->dtype = g->dtype;
    pool->d = g->d;
    pool->n_blocks = cuda->limits.n_blocks;
    pool->block_bytes = (size_t)2 * BLOCK_TOKENS * g->d * (g->dtype == KV_Q8 ? 1 : 2);
    pool->bits = kivi_bits(g->dtype);
    if (pool->bits) pool->raw_bytes = pool->block_bytes, pool->block_bytes = codes_block_bytes(pool->bits, g->d);
    pool->kv = (uint8_t *)take(w, pool->n_blocks * pool->block_bytes);
    size_t slots = (size_t)pool->n_blocks * BLOCK_TOKENS;
    if (pool->bits) {
        pool->raw = (uint8_t *)take(w, pool->n_blocks * pool->raw_bytes);
        pool->place = (uint32_t *)take(w, pool->n_blocks * sizeof *pool->place);
        pool->closed = (uint8_t *)take(w, pool->n_blocks);
    }
    pool->positions = (int32_t *)take(w, slots * sizeof *pool->positions);
    if (g->dtype == KV_Q8) pool->scales = (float *)take(w, slots * 2 * sizeof(float));
    if (g->accumulators) pool->accumulated = (uint64_t *)take(w, slots * sizeof(uint64_t));
    cuda->tables = (uint32_t *)take(w, (size_t)pool->n_blocks * sizeof(uint32_t));
    cuda->q = (uint16_t *)take(w, (size_t)g->max_rows * cuda->n_q * sizeof(uint16_t));
    cuda->a = (__half *)take(w, (size_t)g->max_rows * cuda->n_q * sizeof(__half));
    cuda->row_max = (float *)take(w, (size_t)g->max_rows * p->n_heads * sizeof(float));
    cuda->row_sum = (float *)take(w, (size_t)g->max_rows * p->n_heads * sizeof(float));
    struct step_view *dev = &cuda->dev;
    dev->header = (struct step_header *)take(w, sizeof *dev->header);
    dev->sequences = (struct step_sequence *)take(w, g->max_sequences * sizeof *dev->sequences);
    dev->lane_tokens = (uint32_t *)take(w, (size_t)g->max_sequences * cuda->n_lanes * sizeof *dev->lane_tokens);
    dev->positions = (int32_t *)take(w, g->max_rows * sizeof *dev->positions);
    dev->decode = (uint32_t *)take(w, g->max_sequences * sizeof *dev->decode);
    dev->tiles = (struct prefill_tile *)take(w, cuda->max_tiles * sizeof *dev->tiles);
    w->tables = (uint32_t *)check_calloc(pool->n_blocks, sizeof *w->tables);
    shuffle(w->tables, pool->n_blocks, random);
    CUDA_CHECK(cudaMemcpy(cuda->tables, w->tables, pool->n_blocks * sizeof *w->tables, cudaMemcpyHostToDevice));

    struct device_arena arena = {};
    attention_lay_out(cuda, &arena);
    size_t counted = arena.used;
    arena.base = (uint8_t *)take(w, counted);
    arena.used = 0;
    CUDA_CHECK(cudaMemset(arena.base, 0xff, counted));
    CUDA_CHECK(cudaDeviceSynchronize()); /* before attention_open's stream writes there */
    attention_lay_out(cuda, &arena);
    CHECK(arena.used == counted);
    struct error error;
    if (attention_open(cuda, &error) != STATUS_OK) {
        fprintf(stderr, "attention_open: %s\n", error.text);
        exit(1);
    }
}

static void world_close(struct world *w) {
    CUDA_CHECK(cudaStreamSynchronize(w->cuda.stream));
    attention_close(&w->cuda);
    for (uint32_t i = 0; i < w->n_allocations; i++) CUDA_CHECK(cudaFree(w->allocations[i]));
    CUDA_CHECK(cudaStreamDestroy(w->cuda.stream));
    free(w->tables);
}

/* Part of a step: rows [row, row + n_rows) of the caller's row numbers, of the sequence with table `table`; before[lane]: slots filled before them. */
struct entry {
    uint32_t table, row, n_rows;
    const uint32_t *before;
    bool prefill, accumulate;
};

static struct step_shape stage(struct world *w, const struct entry *entries, uint32_t n) {
    struct cuda *cuda = &w->cuda;
    CHECK(n <= cuda->limits.max_sequences);
    struct step_header header = {};
    struct step_sequence *sequences = (struct step_sequence *)check_calloc(n, sizeof *sequences);
    uint32_t *lane_tokens = (uint32_t *)check_calloc((size_t)n * cuda->n_lanes, sizeof *lane_tokens),
             *decode = (uint32_t *)check_calloc(n, sizeof *decode);
    struct prefill_tile *tiles = (struct prefill_tile *)check_calloc(cuda->max_tiles, sizeof *tiles);
    header.n_sequences = n;
    for (uint32_t i = 0; i < n; i++) {
        const struct entry *e = &entries[i];
        sequences[i].first_row = e->row;
        sequences[i].n_rows = e->n_rows;
        sequences[i].table = e->table;
        sequences[i].accumulate = e->accumulate;
        header.any_accumulates |= e->accumulate;
        header.n_rows += e->n_rows;
        memcpy(lane_tokens + (size_t)i * cuda->n_lanes, e->before, cuda->n_lanes * sizeof *lane_tokens);
        if (!e->prefill) {
            CHECK(e->n_rows * cuda->group <= TILE_QUERIES);
            decode[header.n_decode++] = i;
            continue;
        }
        for (uint32_t query = 0; query < e->n_rows * cuda->group; query += PREFILL_QUERIES) {
            CHECK(header.n_tiles < cuda->max_tiles);
            tiles[header.n_tiles++] = {i, query};
        }
    }
    CUDA_CHECK(cudaMemcpy(cuda->dev.header, &header, sizeof header, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(cuda->dev.sequences, sequences, n * sizeof *sequences, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(cuda->dev.lane_tokens, lane_tokens, (size_t)n * cuda->n_lanes * sizeof *lane_tokens, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(cuda->dev.decode, decode, n * sizeof *decode, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(cuda->dev.tiles, tiles, header.n_tiles * sizeof *tiles, cudaMemcpyHostToDevice));
    free(sequences);
    free(lane_tokens);
    free(decode);
    free(tiles);
    struct step_shape shape = {};
    shape.rows = header.n_rows;
    shape.decode = header.n_decode;
    shape.tiles = header.n_tiles;
    shape.accumulates = header.any_accumulates;
    return shape;
}
