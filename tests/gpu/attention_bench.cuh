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

enum { REPEATS = 15 };
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
/* Bytes read and written a second by a copy of 1 GiB. */
static double copy_bandwidth(void) {
    struct copying c = {NULL, NULL, (size_t)1 << 30};
    CUDA_CHECK(cudaMalloc(&c.from, c.bytes));
    CUDA_CHECK(cudaMalloc(&c.to, c.bytes));
    CUDA_CHECK(cudaMemset(c.from, 1, c.bytes));
    float ms = median_ms(0, 4, copy_once, &c);
    CUDA_CHECK(cudaFree(c.from));
    CUDA_CHECK(cudaFree(c.to));
    return 2.0 * (double)c.bytes / ((double)ms * 1e-3);
}

struct bench_case {
    const char *name;
    uint32_t sequences, tokens; /* tokens: of each lane; 0: ragged, 128 to 32,000 */
    uint32_t rows, layers;
    bool accumulate;
};
static const struct bench_case bench_cases[] = {
    {"decode 64 x 4k", 64, 4096, 1, 2, false},
    {"decode 64 ragged 128..32000", 64, 0, 1, 1, false},
    {"decode 1 x 32k", 1, 32768, 1, 8, false},
    {"decode 256 x 1k", 256, 1024, 1, 2, false},
    {"decode 1 x 1k", 1, 1024, 1, 32, false},
    {"decode 256 x 128", 256, 128, 1, 8, false},
    {"prefill 1 x 6000", 1, 0, 6000, 1, false},
    {"prefill 1 x 512 after 16k", 1, 16384, 512, 1, false},
    {"decode 64 x 4k, accumulating", 64, 4096, 1, 2, true},
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

static void bench_one(const struct bench_case *b, struct geometry geometry, uint32_t stages, double copy) {
    struct running *r = (struct running *)check_calloc(1, sizeof *r);
    struct random random = {7};
    bool ragged = b->rows == 1 && b->tokens == 0;
    geometry.n_layers = b->layers;
    geometry.max_sequences = b->sequences;
    geometry.max_rows = b->sequences * b->rows;
    geometry.lane_blocks = ragged ? 1001 : div_up(b->tokens + b->rows, BLOCK_TOKENS);
    geometry.accumulators = b->accumulate;
    uint32_t n_lanes = b->layers * geometry.n_kv_heads;
    uint32_t *before = (uint32_t *)check_calloc((size_t)b->sequences * n_lanes, sizeof *before);
    struct entry *entries = (struct entry *)check_calloc(b->sequences, sizeof *entries);
    double slots = 0, pairs = 0;
    for (uint32_t s = 0; s < b->sequences; s++) {
        for (uint32_t lane = 0; lane < n_lanes; lane++) {
            uint32_t tokens = ragged ? (uint32_t)(128 * pow(250, random_unit(random_next(&random)))) - 1 : b->rows == 1 ? b->tokens - 1 : b->tokens;
            before[(size_t)s * n_lanes + lane] = tokens;
            slots += tokens + b->rows;
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
        if (stages) {
            cuda->attention->stages = stages;
            cuda->attention->decode_shared = attention_decode_shared(geometry.dtype, cuda->attention->dims, stages);
            int ctas;
            CUDA_CHECK(cudaFuncSetAttribute((const void *)cuda->attention->decode, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            (int)cuda->attention->decode_shared));
            CUDA_CHECK(
                cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, cuda->attention->decode, ATTENTION_THREADS, cuda->attention->decode_shared));
            cuda->attention->ctas = (uint32_t)(ctas * cuda->properties.multiProcessorCount);
        }
        launch(fill_random, 1024, 256, 0, 0, (uint32_t *)(void *)cuda->pool.kv, cuda->pool.n_blocks * cuda->pool.block_bytes / 4);
        launch(fill_random, 1024, 256, 0, 0, (uint32_t *)(void *)cuda->q, (size_t)geometry.max_rows * cuda->n_q / 2);
        if (cuda->pool.scales) launch(fill_scales, 1024, 256, 0, 0, cuda->pool.scales, (size_t)cuda->pool.n_blocks * 2 * BLOCK_TOKENS);
        CUDA_CHECK(cudaDeviceSynchronize());
        r->shape = stage(&r->world, entries, b->sequences);
        float plan_ms = median_ms(cuda->stream, 4, run_plan, r), ms = median_ms(cuda->stream, b->layers * (b->rows > 1 ? 2 : 8), run_layer, r);
        double bytes = slots / b->layers * (2.0 * geometry.d * (geometry.dtype == KV_Q8 ? 1 : 2) + (geometry.dtype == KV_Q8 ? 8 : 0));
        double flops = pairs / b->layers * geometry.group * geometry.d * 4;
        printf("%-30s %-4s d %3u group %u: %9.1f us, %8.1f MB, %7.0f GB/s, %5.1f %% of copy, %6.1f TFLOP/s; plan of %u layers %.1f us; %u stages, %u "
               "CTAs\n",
               b->name, kv_dtype_name(geometry.dtype), geometry.d, geometry.group, (double)ms * 1e3, bytes / 1e6, bytes / (double)ms / 1e6,
               100 * bytes / ((double)ms * 1e-3) / copy, flops / (double)ms / 1e9, b->layers, (double)plan_ms * 1e3, cuda->attention->stages,
               cuda->attention->ctas);
        fflush(stdout);
        world_close(&r->world);
    }
    free(r);
    free(before);
    free(entries);
}

static void bench_all(uint32_t stages) {
    double copy = copy_bandwidth();
    printf("copy of 1 GiB on the device: %.0f GB/s read and written\n", copy / 1e9);
    for (size_t i = 0; i < sizeof bench_cases / sizeof *bench_cases; i++) {
        const struct bench_case *b = &bench_cases[i];
        struct geometry llama = {}, small = {};
        llama.dtype = KV_F16;
        llama.d = 128;
        llama.group = 4;
        llama.n_kv_heads = 8;
        small.dtype = KV_F16;
        small.d = 64;
        small.group = 3;
        small.n_kv_heads = 3;
        bench_one(b, llama, stages, copy);
        if (i == 0 || b->rows == 6000) {
            llama.dtype = KV_BF16;
            bench_one(b, llama, stages, copy);
            llama.dtype = KV_Q8;
            bench_one(b, llama, stages, copy);
        }
        bench_one(b, small, stages, copy);
    }
}
