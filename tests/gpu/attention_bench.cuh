/* gpu_attention --bench: time of decode and prompt attention, and of their plans, against the bandwidth that a copy on the device reaches. Included by attention.cu alone. */
#pragma once

#include "tests/gpu/attention_world.cuh"

/* Small finite numbers in each of the types. */
static __global__ void fill_random(uint32_t *words, size_t n) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        uint64_t x = i * 0x9e3779b97f4a7c15ull + 0x632be59bd9b4e019ull;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
        words[i] = ((uint32_t)(x >> 29) & 0x87ff87ffu) | 0x30003000u;
    }
}
static __global__ void fill_scales(float *scales, size_t n) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) scales[i] = 0.01f;
}

static int by_value(const void *a, const void *b) { return *(const float *)a < *(const float *)b ? -1 : *(const float *)a > *(const float *)b; }
static int by_double(const void *a, const void *b) { return *(const double *)a < *(const double *)b ? -1 : *(const double *)a > *(const double *)b; }

enum { ROUNDS = 5, REPEATS = 7, LAST_POSITION = 100000 };
/* Median milliseconds of a call, of `calls` in a row; what(context, i) launches call i. */
static float median_ms(cudaStream_t stream, uint32_t calls, void (*what)(void *context, uint32_t i), void *context) {
    cudaEvent_t from, to;
    CUDA_CHECK(cudaEventCreate(&from));
    CUDA_CHECK(cudaEventCreate(&to));
    float ms[REPEATS];
    for (int r = -2; r < REPEATS; r++) {
        CUDA_CHECK(cudaEventRecord(from, stream));
        for (uint32_t i = 0; i < calls; i++) what(context, i);
        CUDA_CHECK(cudaEventRecord(to, stream));
        CUDA_CHECK(cudaEventSynchronize(to));
        float one;
        CUDA_CHECK(cudaEventElapsedTime(&one, from, to));
        if (r >= 0) ms[r] = one / (float)calls;
    }
    CUDA_CHECK(cudaEventDestroy(from));
    CUDA_CHECK(cudaEventDestroy(to));
    qsort(ms, REPEATS, sizeof *ms, by_value);
    return ms[REPEATS / 2];
}

struct copying {
    void *from, *to;
    size_t bytes;
};
static void copy_once(void *context, uint32_t i) {
    (void)i;
    const struct copying *c = (const struct copying *)context;
    CUDA_CHECK(cudaMemcpyAsync(c->to, c->from, c->bytes, cudaMemcpyDeviceToDevice, 0));
}
/* Bytes read and written a second. */
static double copy_bandwidth(struct copying *c) { return 2.0 * (double)c->bytes / ((double)median_ms(0, 2, copy_once, c) * 1e-3); }

struct bench_case {
    const char *name;
    uint32_t sequences, tokens; /* tokens: of each lane; 0: ragged, 128 to 32,000 */
    uint32_t rows, layers;
    bool accumulate;
    uint32_t lane_blocks; /* of the pool; 0: no more than are used */
    bool all_types;
};
static const struct bench_case bench_cases[] = {
    {"decode 64 x 4k", 64, 4096, 1, 2, false, 0, true},
    {"decode 64 ragged 128..32000", 64, 0, 1, 1, false, 1001, true},
    {"decode 64 x 4k, wide pool", 64, 4096, 1, 1, false, 1001, false}, /* as the ragged one's: what is left between the two is not the pool's size */
    {"decode 1 x 32k", 1, 32768, 1, 8, false, 0, false},
    {"decode 256 x 1k", 256, 1024, 1, 2, false, 0, false},
    {"decode 1 x 1k", 1, 1024, 1, 32, false, 0, false},
    {"decode 256 x 128", 256, 128, 1, 8, false, 0, false},
    {"prefill 1 x 6000", 1, 0, 6000, 1, false, 0, true},
    {"prefill 1 x 512 after 16k", 1, 16384, 512, 1, false, 0, false},
    {"decode 64 x 4k, accumulating", 64, 4096, 1, 2, true, 0, false},
};

struct running {
    struct world world;
    struct step_shape shape;
};
static void run_layer(void *context, uint32_t i) {
    struct running *r = (struct running *)context;
    attention_run(&r->world.cuda, i % r->world.program.n_layers, &r->shape);
}
static void run_plan(void *context, uint32_t i) {
    (void)i;
    struct running *r = (struct running *)context;
    attention_plan(&r->world.cuda, &r->shape);
}

/* Bytes that a lane of n slots has for its newest row. */
static double lane_bytes(const struct geometry *g, uint32_t n) {
    const uint32_t bits = kivi_bits(g->dtype), coded = bits && n > KIVI_RESIDUAL ? (n - 1 - KIVI_RESIDUAL) / BLOCK_TOKENS : 0;
    const double slot = g->dtype == KV_Q8 ? 2.0 * g->d + 8 : 4.0 * g->d;
    return (bits ? (double)coded * codes_block_bytes(bits, g->d) : 0) + (n - coded * BLOCK_TOKENS) * slot;
}

/* KIVI: every block in its own place in f16, positions without gaps up to the newest row's. */
static void place_all(struct world *w, const struct entry *entries, uint32_t n_entries) {
    struct cuda *cuda = &w->cuda;
    struct device_pool *pool = &cuda->pool;
    uint32_t *places = (uint32_t *)check_calloc(pool->n_blocks, sizeof *places);
    int32_t *positions = (int32_t *)check_calloc((size_t)pool->n_blocks * BLOCK_TOKENS, sizeof *positions),
            *rows = (int32_t *)check_calloc(cuda->limits.max_rows, sizeof *rows);
    for (uint32_t i = 0; i < pool->n_blocks; i++) places[i] = i;
    for (uint32_t s = 0; s < n_entries; s++) {
        const struct entry *e = &entries[s];
        for (uint32_t row = 0; row < e->n_rows; row++) rows[e->row + row] = LAST_POSITION - (int32_t)(e->n_rows - 1 - row);
        for (uint32_t lane = 0; lane < cuda->n_lanes; lane++) {
            const uint32_t *blocks = w->tables + ((size_t)e->table * cuda->n_lanes + lane) * cuda->lane_blocks, n = e->before[lane] + e->n_rows;
            for (uint32_t slot = 0; slot < n; slot++)
                positions[(size_t)blocks[slot / BLOCK_TOKENS] * BLOCK_TOKENS + slot % BLOCK_TOKENS] = LAST_POSITION - (int32_t)(n - 1 - slot);
        }
    }
    CUDA_CHECK(cudaMemcpy(pool->place, places, pool->n_blocks * sizeof *places, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(pool->positions, positions, (size_t)pool->n_blocks * BLOCK_TOKENS * sizeof *positions, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(cuda->dev.positions, rows, cuda->limits.max_rows * sizeof *rows, cudaMemcpyHostToDevice));
    launch(fill_random, 1024, 256, 0, 0, (uint32_t *)(void *)pool->raw, pool->n_blocks * pool->raw_bytes / 4);
    free(places);
    free(positions);
    free(rows);
}

static void choose_stages_of(struct cuda *cuda, uint32_t stages) {
    struct attention_device *device = cuda->attention;
    device->stages = stages;
    device->decode_shared = attention_decode_shared(cuda->pool.dtype, device->dims, stages);
    int ctas;
    CUDA_CHECK(cudaFuncSetAttribute((const void *)device->decode, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)device->decode_shared));
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, device->decode, ATTENTION_THREADS, device->decode_shared));
    device->ctas = (uint32_t)(ctas * cuda->properties.multiProcessorCount);
}

static void bench_one(const struct bench_case *b, struct geometry geometry, uint32_t stages, struct copying *copying) {
    struct running *r = (struct running *)check_calloc(1, sizeof *r);
    struct random random = {7};
    bool ragged = b->rows == 1 && b->tokens == 0;
    geometry.n_layers = b->layers;
    geometry.max_sequences = b->sequences;
    geometry.max_rows = b->sequences * b->rows;
    geometry.lane_blocks = b->lane_blocks ? b->lane_blocks : div_up(b->tokens + b->rows, BLOCK_TOKENS);
    geometry.accumulators = b->accumulate;
    uint32_t n_lanes = b->layers * geometry.n_kv_heads;
    uint32_t *before = (uint32_t *)check_calloc((size_t)b->sequences * n_lanes, sizeof *before);
    struct entry *entries = (struct entry *)check_calloc(b->sequences, sizeof *entries);
    double bytes = 0, pairs = 0;
    for (uint32_t s = 0; s < b->sequences; s++) {
        for (uint32_t lane = 0; lane < n_lanes; lane++) {
            uint32_t tokens = ragged ? (uint32_t)(128 * pow(250, random_unit(random_next(&random)))) - 1 : b->rows == 1 ? b->tokens - 1 : b->tokens;
            before[(size_t)s * n_lanes + lane] = tokens;
            bytes += lane_bytes(&geometry, tokens + b->rows) / b->layers;
            pairs += (double)b->rows * tokens + (double)b->rows * (b->rows + 1) / 2;
        }
        entries[s] = {s, s * b->rows, b->rows, before + (size_t)s * n_lanes, b->rows * geometry.group > TILE_QUERIES, b->accumulate};
    }
    size_t free_bytes, all_bytes, pool = (size_t)b->sequences * n_lanes * geometry.lane_blocks * 2 * BLOCK_TOKENS * geometry.d * 2;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &all_bytes));
    if (pool > free_bytes / 2) {
        printf("%-30s left out: its pool of %zu MB is more than half of the free memory\n", b->name, pool >> 20);
    } else {
        world_open(&r->world, &geometry, &random);
        struct cuda *cuda = &r->world.cuda;
        if (stages) choose_stages_of(cuda, stages);
        launch(fill_random, 1024, 256, 0, 0, (uint32_t *)(void *)cuda->pool.kv, cuda->pool.n_blocks * cuda->pool.block_bytes / 4);
        launch(fill_random, 1024, 256, 0, 0, (uint32_t *)(void *)cuda->q, (size_t)geometry.max_rows * cuda->n_q / 2);
        if (cuda->pool.scales) launch(fill_scales, 1024, 256, 0, 0, cuda->pool.scales, (size_t)cuda->pool.n_blocks * 2 * BLOCK_TOKENS);
        if (cuda->pool.bits) place_all(&r->world, entries, b->sequences);
        CUDA_CHECK(cudaDeviceSynchronize());
        r->shape = stage(&r->world, entries, b->sequences);
        float plan_ms = median_ms(cuda->stream, 4, run_plan, r), ms[ROUNDS];
        double share[ROUNDS], flops = pairs / b->layers * geometry.group * geometry.d * 4;
        for (int round = 0; round < ROUNDS; round++) { /* what the device does meanwhile meets the copy too */
            double copy = copy_bandwidth(copying);
            ms[round] = median_ms(cuda->stream, b->layers * (b->rows > 1 ? 2 : 8), run_layer, r);
            share[round] = 100 * bytes / ((double)ms[round] * 1e-3) / copy;
        }
        qsort(ms, ROUNDS, sizeof *ms, by_value);
        qsort(share, ROUNDS, sizeof *share, by_double);
        double middle = (double)ms[ROUNDS / 2];
        printf("%-30s %-5s d %3u group %u: %9.1f us (%.1f to %.1f), %8.1f MB, %7.0f GB/s, %5.1f %% of copy (%.1f to %.1f), %6.1f TFLOP/s; plan of "
               "%u layers %.1f us; %u stages, %u CTAs\n",
               b->name, kv_dtype_name(geometry.dtype), geometry.d, geometry.group, middle * 1e3, (double)ms[0] * 1e3, (double)ms[ROUNDS - 1] * 1e3,
               bytes / 1e6, bytes / middle / 1e6, share[ROUNDS / 2], share[0], share[ROUNDS - 1], flops / middle / 1e9, b->layers,
               (double)plan_ms * 1e3, cuda->attention->stages, cuda->attention->ctas);
        fflush(stdout);
        world_close(&r->world);
    }
    free(r);
    free(before);
    free(entries);
}

static void bench_all(uint32_t stages) {
    struct copying copying = {NULL, NULL, (size_t)1 << 30};
    CUDA_CHECK(cudaMalloc(&copying.from, copying.bytes));
    CUDA_CHECK(cudaMalloc(&copying.to, copying.bytes));
    CUDA_CHECK(cudaMemset(copying.from, 1, copying.bytes));
    printf("copy of 1 GiB on the device: %.0f GB/s read and written\n", copy_bandwidth(&copying) / 1e9);
    for (size_t i = 0; i < sizeof bench_cases / sizeof *bench_cases; i++) {
        static const enum kv_dtype dtypes[] = {KV_F16, KV_BF16, KV_Q8, KV_KIVI4, KV_KIVI2};
        const struct bench_case *b = &bench_cases[i];
        struct geometry llama = {}, small = {};
        llama.d = 128;
        llama.group = 4;
        llama.n_kv_heads = 8;
        small.dtype = KV_F16;
        small.d = 64;
        small.group = 3;
        small.n_kv_heads = 3;
        for (size_t j = 0; j < (b->all_types ? sizeof dtypes / sizeof *dtypes : 1); j++) {
            llama.dtype = dtypes[j];
            if (is_wanted(&llama)) bench_one(b, llama, stages, &copying);
        }
        if (is_wanted(&small)) bench_one(b, small, stages, &copying);
    }
    CUDA_CHECK(cudaFree(copying.from));
    CUDA_CHECK(cudaFree(copying.to));
}
