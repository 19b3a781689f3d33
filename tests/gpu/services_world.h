/* What the programs that check and time the services of the cuda backend share: a backend with all that the services need over a pool, rings and tables of its own, the same on the host, and a
 * stopwatch. Include it in one file of a program.
 *
 *   --check   exit 1 if anything is wrong; the first differences are printed
 *   --bench   one line a case: median time, bytes moved, GB/s, percent of what copies on the device reach in this run
 *
 * Inputs are random, what is written was poisoned before. */
#pragma once

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

extern "C" {
#include "base/half.h"
#include "base/random.h"
#include "tests/support/array_backend.h"
}
#include "kernels/cuda/services.h"
#include "tests/gpu/wrong.h"

enum { POISON = 0xa5, LANES_8B = 256, SLOTS_8B = 6000 };
static const size_t drawn_bytes = 24000000;

struct shape {
    enum kv_dtype dtype;
    uint32_t d, group, n_layers, n_kv_heads, n_blocks, lane_blocks, ring_rows;
    bool halves;
    uint32_t rope_dims;
};

/* A backend with all that the services need, and a host's copy of its pool and rings. */
struct world {
    struct shape shape;
    struct program program;
    double frequency[HEAD_DIM_MAX / 2];
    struct cuda cuda;
    void *arena;
    struct random random;
    size_t kv_bytes, scale_count, slot_count, ring_count, sink_count;
    uint8_t *kv;
    float *scales, *sinks;
    int32_t *positions;
    uint64_t *accumulated;
    uint16_t *ring;
    uint32_t *ids; /* the pool in a random order */
};

static float normal(struct random *random) { /* nearly: the sum of four */
    float sum = -2;
    for (int i = 0; i < 4; i++) sum += random_unit(random_next(random));
    return sum * 1.7f;
}

static void *there(const void *host, size_t bytes) {
    void *device;
    CUDA_CHECK(cudaMalloc(&device, bytes ? bytes : 16));
    if (host) CUDA_CHECK(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice));
    return device;
}

static uint16_t narrow(enum kv_dtype dtype, float x) { return dtype == KV_BF16 ? bf16_from_float(x) : f16_from_float(x); }
static float widen(enum kv_dtype dtype, uint16_t x) { return dtype == KV_BF16 ? float_from_bf16(x) : float_from_f16(x); }

static void fill(struct world *world) {
    const struct shape *shape = &world->shape;
    struct random *random = &world->random;
    const size_t n = world->kv_bytes < drawn_bytes ? world->kv_bytes : drawn_bytes; /* what is larger repeats it */
    if (shape->dtype == KV_Q8)
        for (size_t i = 0; i < n; i++) world->kv[i] = (uint8_t)(int8_t)((int)random_below(random, 255) - 127);
    else
        for (size_t i = 0; i < n / 2; i++) ((uint16_t *)(void *)world->kv)[i] = narrow(shape->dtype, normal(random));
    for (size_t at = n; at < world->kv_bytes; at += n) memcpy(world->kv + at, world->kv, world->kv_bytes - at < n ? world->kv_bytes - at : n);
    for (size_t i = 0; i < world->scale_count; i++) world->scales[i] = (0.5f + random_unit(random_next(random))) / 60;
    for (size_t i = 0; i < world->slot_count; i++) {
        world->positions[i] = (int32_t)random_below(random, 1u << 30);
        world->accumulated[i] = random_next(random) >> 20;
    }
    for (size_t i = 0; i < world->ring_count; i++) world->ring[i] = narrow(shape->dtype, 2 * normal(random));
    for (uint32_t i = 0; i < shape->n_blocks; i++) world->ids[i] = i;
    for (uint32_t i = shape->n_blocks; i-- > 1;) {
        uint32_t j = random_below(random, i + 1), id = world->ids[i];
        world->ids[i] = world->ids[j], world->ids[j] = id;
    }
}

static void upload(struct world *world) {
    struct device_pool *pool = &world->cuda.pool;
    CUDA_CHECK(cudaMemcpy(pool->kv, world->kv, world->kv_bytes, cudaMemcpyHostToDevice));
    if (pool->scales) CUDA_CHECK(cudaMemcpy(pool->scales, world->scales, world->scale_count * sizeof(float), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(pool->positions, world->positions, world->slot_count * sizeof(int32_t), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(pool->accumulated, world->accumulated, world->slot_count * sizeof(uint64_t), cudaMemcpyHostToDevice));
}

static void world_open(struct world *world, const struct shape *shape) {
    memset(world, 0, sizeof *world);
    world->shape = *shape;
    world->random.state = shape->d * 31u + shape->dtype * 7u + shape->group;
    struct program *program = &world->program;
    program->n_layers = shape->n_layers, program->n_kv_heads = shape->n_kv_heads, program->n_heads = shape->n_kv_heads * shape->group;
    program->head_dim = shape->d, program->attention_scale = 1.0f / sqrtf((float)shape->d);
    program->rope_pairs = shape->halves ? ROPE_PAIRS_HALVES : ROPE_PAIRS_ADJACENT, program->rope_dims = shape->rope_dims;
    program->rope_frequency = world->frequency, program->rope_magnitude = 1;
    for (uint32_t i = 0; i < shape->rope_dims / 2; i++) world->frequency[i] = pow(10000.0, -2.0 * i / shape->rope_dims);

    struct cuda *cuda = &world->cuda;
    cuda->program = program;
    cuda->limits.n_blocks = shape->n_blocks, cuda->limits.n_rings = 2, cuda->limits.ring_rows = shape->ring_rows;
    cuda->limits.sink_slots = 2 * BLOCK_TOKENS, cuda->limits.accumulators = true, cuda->limits.kv_dtype = shape->dtype;
    cuda->limits.rank_slots = shape->lane_blocks * BLOCK_TOKENS, cuda->limits.rank_places = 3;
    cuda->n_lanes = shape->n_layers * shape->n_kv_heads, cuda->group = shape->group;
    cuda->n_q = program->n_heads * shape->d, cuda->n_kv = program->n_kv_heads * shape->d, cuda->lane_blocks = shape->lane_blocks;
    CUDA_CHECK(cudaStreamCreate(&cuda->stream));

    size_t block_bytes = (size_t)2 * BLOCK_TOKENS * shape->d * element_bytes(shape->dtype);
    world->kv_bytes = block_bytes * shape->n_blocks, world->slot_count = (size_t)shape->n_blocks * BLOCK_TOKENS;
    world->scale_count = shape->dtype == KV_Q8 ? 2 * world->slot_count : 0;
    world->ring_count = (size_t)2 * shape->n_layers * shape->ring_rows * cuda->n_q;
    world->sink_count = (size_t)2 * cuda->n_lanes * cuda->limits.sink_slots * shape->d;
    world->kv = (uint8_t *)check_calloc(world->kv_bytes, 1), world->scales = (float *)check_calloc(world->scale_count + 1, sizeof(float));
    world->positions = (int32_t *)check_calloc(world->slot_count, sizeof(int32_t));
    world->accumulated = (uint64_t *)check_calloc(world->slot_count, sizeof(uint64_t));
    world->ring = (uint16_t *)check_calloc(world->ring_count, sizeof(uint16_t)),
    world->ids = (uint32_t *)check_calloc(shape->n_blocks, sizeof(uint32_t));
    fill(world);
    struct device_pool *pool = &cuda->pool;
    pool->dtype = shape->dtype, pool->d = shape->d, pool->n_blocks = shape->n_blocks, pool->block_bytes = block_bytes;
    pool->kv = (uint8_t *)there(NULL, world->kv_bytes), pool->positions = (int32_t *)there(NULL, world->slot_count * sizeof(int32_t));
    pool->accumulated = (uint64_t *)there(NULL, world->slot_count * sizeof(uint64_t));
    if (world->scale_count) pool->scales = (float *)there(NULL, world->scale_count * sizeof(float));
    upload(world);
    cuda->ring_queries = (uint16_t *)there(world->ring, world->ring_count * sizeof(uint16_t));
    cuda->ring_sinks = (float *)there(NULL, world->sink_count * sizeof(float));
    cuda->rope_frequency = (double *)there(world->frequency, sizeof world->frequency);

    struct device_arena arena = {};
    services_lay_out(cuda, &arena);
    world->arena = there(NULL, arena.used);
    CUDA_CHECK(cudaMemset(world->arena, POISON, arena.used));
    arena.base = (uint8_t *)world->arena, arena.used = 0;
    services_lay_out(cuda, &arena);
    struct error error = {};
    if (services_open(cuda, &error) != STATUS_OK) printf("%s\n", error.text), exit(1);
}

static void world_close(struct world *world) {
    struct cuda *cuda = &world->cuda;
    services_close(cuda);
    void *device[] = {world->arena,           cuda->pool.kv,      cuda->pool.scales, cuda->pool.positions,
                      cuda->pool.accumulated, cuda->ring_queries, cuda->ring_sinks,  cuda->rope_frequency};
    for (void *memory : device) CUDA_CHECK(cudaFree(memory));
    CUDA_CHECK(cudaStreamDestroy(cuda->stream));
    free(world->kv), free(world->scales), free(world->positions), free(world->accumulated), free(world->ring), free(world->ids);
}

/* ---- the pool, on the host ---- */

static uint8_t *row_of(const struct world *world, uint32_t block, int which, uint32_t slot) {
    const struct device_pool *pool = &world->cuda.pool;
    return world->kv + block * pool->block_bytes + (size_t)(which * BLOCK_TOKENS + slot) * pool->d * element_bytes(pool->dtype);
}

static float element_of(const struct world *world, uint32_t block, int which, uint32_t slot, uint32_t i) {
    const uint8_t *row = row_of(world, block, which, slot);
    if (world->shape.dtype == KV_Q8) return world->scales[(size_t)(2 * block + which) * BLOCK_TOKENS + slot] * (float)(int8_t)row[i];
    uint16_t bits;
    memcpy(&bits, row + 2 * i, 2);
    return widen(world->shape.dtype, bits);
}

/* Between a key as it was and as it is cached (kernels/cuda/hadamard.h), either way: of KV_Q8, by the transform's definition; of others nothing changes. The same of a query and the ring's. */
static void transform(const struct world *world, const float *x, float *out) {
    const uint32_t d = world->shape.d, size = d & (0u - d);
    for (uint32_t i = 0; i < d; i++) {
        double sum = 0;
        for (uint32_t j = 0; j < size; j++) sum += __builtin_parity(i % size & j) ? -(double)x[i / size * size + j] : (double)x[i / size * size + j];
        out[i] = world->shape.dtype == KV_Q8 ? (float)(sum / sqrt((double)size)) : x[i];
    }
}

/* K of a slot as it was before it was cached. */
static void key_of(const struct world *world, uint32_t block, uint32_t slot, float *k) {
    float cached[HEAD_DIM_MAX];
    for (uint32_t i = 0; i < world->shape.d; i++) cached[i] = element_of(world, block, WHICH_K, slot, i);
    transform(world, cached, k);
}

static void move_slot(struct world *world, uint32_t from_block, uint32_t from, uint32_t to_block, uint32_t to) {
    for (int which = 0; which < 2; which++) {
        memmove(row_of(world, to_block, which, to), row_of(world, from_block, which, from), world->shape.d * element_bytes(world->shape.dtype));
        if (world->scale_count)
            world->scales[(size_t)(2 * to_block + which) * BLOCK_TOKENS + to] = world->scales[(size_t)(2 * from_block + which) * BLOCK_TOKENS + from];
    }
    world->positions[(size_t)to_block * BLOCK_TOKENS + to] = world->positions[(size_t)from_block * BLOCK_TOKENS + from];
    world->accumulated[(size_t)to_block * BLOCK_TOKENS + to] = world->accumulated[(size_t)from_block * BLOCK_TOKENS + from];
}

static void compare_bytes(const struct world *world, const char *what, const char *of, const void *host, const void *device, size_t bytes,
                          size_t a_block) {
    if (bytes == 0) return;
    uint8_t *got = (uint8_t *)malloc(bytes);
    CUDA_CHECK(cudaMemcpy(got, device, bytes, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < bytes; i++)
        if (got[i] != ((const uint8_t *)host)[i]) {
            WRONG("%s %s d %u: %s of block %zu differ from byte %zu on", what, kv_dtype_name(world->shape.dtype), world->shape.d, of, i / a_block,
                  i % a_block);
            break;
        }
    free(got);
}

/* Every byte of the device's pool is the host's. */
static void compare_pool(const struct world *world, const char *what) {
    const struct device_pool *pool = &world->cuda.pool;
    CUDA_CHECK(cudaStreamSynchronize(world->cuda.stream));
    compare_bytes(world, what, "K and V", world->kv, pool->kv, world->kv_bytes, pool->block_bytes);
    compare_bytes(world, what, "scales", world->scales, pool->scales, world->scale_count * sizeof(float), 2 * BLOCK_TOKENS * sizeof(float));
    compare_bytes(world, what, "positions", world->positions, pool->positions, world->slot_count * sizeof(int32_t), BLOCK_TOKENS * sizeof(int32_t));
    compare_bytes(world, what, "accumulated", world->accumulated, pool->accumulated, world->slot_count * sizeof(uint64_t),
                  BLOCK_TOKENS * sizeof(uint64_t));
}

/* ---- a sequence ---- */

/* Tables of one sequence over ids; positions ascend from lane to lane with other gaps, so that rows of the window see different numbers of slots, and some see none. */
struct tables {
    uint32_t *lane_first, *lane_tokens;
    size_t *offset;
    int32_t last_position;
};

static const uint32_t lengths[] = {0, 1, 31, 33, 255, 256, 257, 1500, 512, 512};
enum { LENGTHS = sizeof lengths / sizeof *lengths };

static inline void make_tables(struct world *world, struct tables *tables) {
    const uint32_t n_lanes = world->cuda.n_lanes;
    tables->lane_first = (uint32_t *)check_calloc(n_lanes, sizeof(uint32_t)),
    tables->lane_tokens = (uint32_t *)check_calloc(n_lanes, sizeof(uint32_t));
    tables->offset = (size_t *)check_calloc(n_lanes, sizeof(size_t));
    tables->last_position = 5000;
    uint32_t next = 0;
    for (uint32_t lane = 0; lane < n_lanes; lane++) {
        const uint32_t n = lengths[lane % LENGTHS], early = random_below(&world->random, 60);
        tables->lane_first[lane] = next, tables->lane_tokens[lane] = n;
        int32_t position = tables->last_position - (int32_t)early + 1;
        for (uint32_t slot = n; slot-- > 0;) { /* from the newest: runs and gaps */
            position -= 1 + (int32_t)(random_below(&world->random, 8) == 0 ? random_below(&world->random, 5) : 0);
            world->positions[(size_t)world->ids[next + slot / BLOCK_TOKENS] * BLOCK_TOKENS + slot % BLOCK_TOKENS] = position;
        }
        CHECK(position >= 0);
        next += blocks_of(n);
    }
    CHECK(next <= world->shape.n_blocks);
    upload(world);
}

static inline void free_tables(struct tables *tables) { free(tables->lane_first), free(tables->lane_tokens), free(tables->offset); }

/* Every check, in many shapes, or some of them. */
static int check_all(void (*check)(struct world *), bool few) {
    static const struct { uint32_t d, group; } sizes[] = {{8, 2}, {32, 2}, {40, 2}, {64, 3}, {80, 1}, {96, 5}, {128, 4}, {128, 8}};
    static const enum kv_dtype dtypes[] = {KV_F16, KV_BF16, KV_Q8};
    static struct world world;
    for (const auto &size : sizes)
        for (enum kv_dtype dtype : dtypes) {
            if (few && (size.d / 32 != (uint32_t)(dtype - KV_F16) || size.d == 64)) continue;
            struct shape shape = {};
            shape.dtype = dtype, shape.d = size.d, shape.group = size.group, shape.n_layers = 5, shape.n_kv_heads = 2, shape.n_blocks = 520,
            shape.lane_blocks = 50;
            shape.ring_rows = 40, shape.halves = size.d % 64 == 0, shape.rope_dims = size.d == 64 ? 32 : size.d;
            world_open(&world, &shape);
            const uint32_t before = n_wrong;
            check(&world);
            printf("%-4s d %3u group %u: %s\n", kv_dtype_name(dtype), size.d, size.group, n_wrong == before ? "ok" : "WRONG");
            world_close(&world);
        }
    return n_wrong > 0;
}

/* ---- speed ---- */

static int compare_doubles(const void *a, const void *b) {
    return *(const double *)a < *(const double *)b ? -1 : *(const double *)a > *(const double *)b;
}

static double seconds(void) {
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

enum { RUNS = 15 };

/* Median time from the call to the end of the device's work, and of the device's part alone. */
template <typename F> static void measure(const char *what, double bytes, double copy_rate, cudaStream_t stream, const F &run) {
    double whole[RUNS], part[RUNS];
    cudaEvent_t begin, end;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    run();
    for (int i = 0; i < RUNS; i++) {
        CUDA_CHECK(cudaStreamSynchronize(stream));
        double start = seconds();
        CUDA_CHECK(cudaEventRecord(begin, stream));
        run();
        CUDA_CHECK(cudaEventRecord(end, stream));
        CUDA_CHECK(cudaStreamSynchronize(stream));
        whole[i] = seconds() - start;
        float ms;
        CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
        part[i] = ms * 1e-3;
    }
    qsort(whole, RUNS, sizeof *whole, compare_doubles);
    qsort(part, RUNS, sizeof *part, compare_doubles);
    printf("%-44s %9.1f us (device's clock %9.1f us)  %8.1f MB  %7.1f GB/s  %5.1f %% of copies\n", what, whole[RUNS / 2] * 1e6, part[RUNS / 2] * 1e6,
           bytes * 1e-6, bytes / part[RUNS / 2] * 1e-9, copy_rate > 0 ? 100 * bytes / part[RUNS / 2] / copy_rate : 100);
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
}

static double copy_rate(cudaStream_t stream) {
    const size_t bytes = (size_t)1 << 30;
    void *a = there(NULL, bytes), *b = there(NULL, bytes);
    cudaEvent_t begin, end;
    double best = 0;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    for (int i = 0; i < RUNS; i++) {
        float ms;
        CUDA_CHECK(cudaEventRecord(begin, stream));
        CUDA_CHECK(cudaMemcpyAsync(b, a, bytes, cudaMemcpyDeviceToDevice, stream));
        CUDA_CHECK(cudaEventRecord(end, stream));
        CUDA_CHECK(cudaStreamSynchronize(stream));
        CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (2.0 * bytes / (ms * 1e-3) > best) best = 2.0 * bytes / (ms * 1e-3);
    }
    CUDA_CHECK(cudaFree(a));
    CUDA_CHECK(cudaFree(b));
    printf("copies on the device: %.1f GB/s read and written\n", best * 1e-9);
    return best;
}

/* The 8B shape: 256 lanes with room for 6,080 slots, each with slots of positions 0, 1, ... */
static double open_8b(struct world *world, uint32_t *lane_first) {
    struct shape shape = {};
    shape.dtype = KV_F16, shape.d = 128, shape.group = 4, shape.n_layers = 32, shape.n_kv_heads = 8, shape.lane_blocks = 190,
    shape.n_blocks = LANES_8B * 190;
    shape.ring_rows = 32, shape.rope_dims = 128;
    world_open(world, &shape);
    for (uint32_t lane = 0; lane < LANES_8B; lane++) {
        lane_first[lane] = lane * shape.lane_blocks;
        for (uint32_t i = 0; i < shape.lane_blocks * BLOCK_TOKENS; i++)
            world->positions[(size_t)world->ids[lane_first[lane] + i / BLOCK_TOKENS] * BLOCK_TOKENS + i % BLOCK_TOKENS] = (int32_t)i;
    }
    upload(world);
    return copy_rate(world->cuda.stream);
}

static int run_program(int argc, char **argv, void (*check)(struct world *), void (*bench)(void)) {
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || n == 0) return puts("skipped: no CUDA device"), 77;
    if (argc == 2 && strcmp(argv[1], "--check") == 0) return check_all(check, false);
    if (argc == 2 && strcmp(argv[1], "--check-few") == 0) return check_all(check, true);
    if (argc == 2 && strcmp(argv[1], "--bench") == 0) return bench(), 0;
    return fprintf(stderr, "usage: %s --check | --check-few | --bench\n", argv[0]), 2;
}
