/* The CUDA backend's life: sizes, the memory plan, what is opened and closed in which order. One stream carries everything. Owns the four pieces of device memory that the other files lay
 * out; nothing is allocated after prepare but captured graphs. The engine's thread. Steps are step.cu's. */
#include "kernels/cuda/codes.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

extern "C" {
extern const struct backend_ops backend_cuda;
}

enum {
    HEAD_ROWS_MAX = 1024,     /* rows whose logits are in memory at once, at most */
    LOGITS_BYTES = 512 << 20, /* and what they may take, at most, if that is one row at least */
};

struct cuda_private {
    struct cuda cuda; /* first: the backend's address */
    struct device_arena weights, pool, rings, scratch;
};

static struct cuda_private *private_of(struct cuda *cuda) { return (struct cuda_private *)(void *)cuda; }

enum status cuda_status(struct error *error, cudaError_t result, const char *what) {
    if (result == cudaSuccess) return STATUS_OK;
    (void)cudaGetLastError(); /* it is said here, and not again by the next launch that is looked after */
    int length = 0;
    while (what[length] && what[length] != '(') length++;
    if (result != cudaErrorMemoryAllocation) return error_set(error, STATUS_DEVICE, "CUDA: %.*s: %s", length, what, cudaGetErrorString(result));
    const bool pinned = strncmp(what, "cudaMallocHost", 14) == 0 || strncmp(what, "cudaHostAlloc", 13) == 0;
    return error_set(error, STATUS_NO_MEMORY, "CUDA: %.*s: %s%s", length, what, cudaGetErrorString(result), pinned ? " of the host that can be pinned" : "");
}

void cuda_check(cudaError_t result, const char *what, const char *file, int line) {
    if (result == cudaSuccess) return;
    (void)fprintf(stderr, "kvasir: CUDA: %s: %s; what the device holds is lost, the process ends (%s:%d)\n", what, cudaGetErrorString(result), file, line);
    _exit(EXIT_FAILURE); /* not exit(): the driver's own handlers may wait for the device */
}

/* ---- sizes ---- */

static size_t kv_bytes(uint32_t d, enum kv_dtype dtype) {
    if (kivi_bits(dtype)) return codes_block_bytes(kivi_bits(dtype), d);
    return 2 * (size_t)BLOCK_TOKENS * d * (dtype == KV_Q8 ? 1 : dtype == KV_F32 ? 4 : 2);
}

static size_t cuda_block_bytes(const struct program *program, enum kv_dtype dtype) {
    if (dtype == KV_F32 || dtype >= KV_DTYPES) return 0;
    if (kivi_bits(dtype)) return kv_bytes(program->head_dim, dtype) + BLOCK_TOKENS * sizeof(int32_t) + sizeof(uint32_t) + sizeof(uint8_t); /* place and closed */
    const size_t scales = dtype == KV_Q8 ? 2 * BLOCK_TOKENS * sizeof(float) : 0;
    return kv_bytes(program->head_dim, dtype) + scales + BLOCK_TOKENS * (sizeof(int32_t) + sizeof(uint64_t));
}

static uint32_t head_rows_max(const struct program *program, const struct backend_limits *limits) {
    size_t rows = (size_t)LOGITS_BYTES / (program->n_vocab * sizeof(float));
    if (rows > HEAD_ROWS_MAX) rows = HEAD_ROWS_MAX;
    if (rows < SKINNY_ROWS) rows = SKINNY_ROWS;
    if (rows > limits->max_samples) rows = limits->max_samples;
    return (uint32_t)(rows ? rows : 1);
}

/* A backend without memory: enough to count with. */
static void begin(struct cuda *cuda, const struct program *program, const struct backend_limits *limits) {
    memset(cuda, 0, sizeof *cuda);
    cuda->program = program;
    cuda->limits = *limits;
    cuda->deterministic = limits->deterministic;
    cuda->n_lanes = program_lanes(program);
    cuda->group = program->n_heads / program->n_kv_heads;
    cuda->n_q = program->n_heads * program->head_dim;
    cuda->n_kv = program->n_kv_heads * program->head_dim;
    cuda->n_tables = limits->n_tables ? limits->n_tables : limits->max_sequences;
    cuda->lane_blocks = limits->table_blocks ? limits->table_blocks : limits->n_blocks;
    cuda->max_tiles = div_up(limits->max_rows * cuda->group, PREFILL_QUERIES) + limits->max_sequences;
    cuda->rows_padded = div_up(limits->max_rows, 64) * 64;
    cuda->max_head_rows = head_rows_max(program, limits);
    cuda->pool.dtype = limits->kv_dtype;
    cuda->pool.d = program->head_dim;
    cuda->pool.n_blocks = limits->n_blocks;
    cuda->pool.block_bytes = kv_bytes(program->head_dim, limits->kv_dtype);
    cuda->layers = (struct device_layer *)check_calloc(program->n_layers, sizeof *cuda->layers);
}

/* Both sides of a step's arrays; `base` NULL: count. Returns bytes. The tiles come last, so that of a step without them less is delivered. */
static size_t lay_out_view(const struct cuda *cuda, struct step_view *view, uint8_t *base) {
    const struct backend_limits *limits = &cuda->limits;
    struct device_arena arena = {base, 0};
    view->header = (struct step_header *)device_take(&arena, 1, sizeof *view->header);
    view->sequences = (struct step_sequence *)device_take(&arena, limits->max_sequences, sizeof *view->sequences);
    view->decode = (uint32_t *)device_take(&arena, limits->max_sequences, sizeof *view->decode);
    view->head_rows = (uint32_t *)device_take(&arena, limits->max_samples, sizeof *view->head_rows);
    view->sample_head_row = (uint32_t *)device_take(&arena, limits->max_samples, sizeof *view->sample_head_row);
    view->tokens = (int32_t *)device_take(&arena, limits->max_rows, sizeof *view->tokens);
    view->positions = (int32_t *)device_take(&arena, limits->max_rows, sizeof *view->positions);
    view->row_sequence = (uint32_t *)device_take(&arena, limits->max_rows, sizeof *view->row_sequence);
    view->tiles = (struct prefill_tile *)device_take(&arena, cuda->max_tiles, sizeof *view->tiles);
    (void)device_take(&arena, 0, 0); /* to a whole number of what is delivered at once */
    return arena.used;
}

static void lay_out_pool(struct cuda *cuda, struct device_arena *arena) {
    const size_t slots = (size_t)cuda->limits.n_blocks * BLOCK_TOKENS;
    cuda->pool.kv = (uint8_t *)device_take(arena, cuda->limits.n_blocks, cuda->pool.block_bytes);
    cuda->pool.scales = cuda->pool.dtype == KV_Q8 ? (float *)device_take(arena, 2 * slots, sizeof(float)) : NULL;
    cuda->pool.positions = (int32_t *)device_take(arena, slots, sizeof(int32_t));
    cuda->pool.accumulated = cuda->limits.accumulators ? (uint64_t *)device_take(arena, slots, sizeof(uint64_t)) : NULL;
    if (kivi_bits(cuda->pool.dtype) == 0) return;
    cuda->pool.place = (uint32_t *)device_take(arena, cuda->limits.n_blocks, sizeof(uint32_t));
    cuda->pool.closed = (uint8_t *)device_take(arena, cuda->limits.n_blocks, sizeof(uint8_t));
    residual_lay_out(cuda, arena);
}

static void lay_out_rings(struct cuda *cuda, struct device_arena *arena) {
    const struct backend_limits *limits = &cuda->limits;
    const size_t rows = (size_t)limits->n_rings * cuda->program->n_layers * limits->ring_rows, sinks = (size_t)limits->n_rings * cuda->n_lanes * limits->sink_slots;
    cuda->ring_queries = (uint16_t *)device_take(arena, rows * cuda->n_q, sizeof(uint16_t));
    cuda->ring_sinks = (float *)device_take(arena, sinks * cuda->program->head_dim, sizeof(float));
}

static void lay_out_scratch(struct cuda *cuda, struct device_arena *arena) {
    const struct program *p = cuda->program;
    const size_t rows = cuda->rows_padded, head_rows = div_up(cuda->max_head_rows, 64) * 64;
    struct step_view counted;
    tables_lay_out(cuda, arena);
    cuda->staging_bytes = lay_out_view(cuda, &counted, NULL);
    cuda->staging_device = device_take(arena, cuda->staging_bytes, 1);
    cuda->dev.lane_tokens = (uint32_t *)device_take(arena, (size_t)cuda->limits.max_sequences * cuda->n_lanes, sizeof(uint32_t));
    cuda->rope_frequency = (double *)device_take(arena, p->rope_dims / 2 + 1, sizeof(double));
    cuda->rope = (float2 *)device_take(arena, rows * (p->rope_dims / 2), sizeof(float2));
    cuda->x = (float *)device_take(arena, rows * p->n_embd, sizeof(float));
    cuda->h = (__half *)device_take(arena, rows * p->n_embd, sizeof(__half));
    cuda->qkv = (float *)device_take(arena, rows * (cuda->n_q + 2 * cuda->n_kv), sizeof(float));
    cuda->q = (uint16_t *)device_take(arena, rows * cuda->n_q, sizeof(uint16_t));
    cuda->a = (__half *)device_take(arena, rows * cuda->n_q, sizeof(__half));
    cuda->gate_up = (__half *)device_take(arena, rows * 2 * p->n_ff, sizeof(__half));
    cuda->g = (__half *)device_take(arena, rows * p->n_ff, sizeof(__half));
    cuda->row_max = (float *)device_take(arena, cuda->limits.accumulators ? rows * p->n_heads : 0, sizeof(float));
    cuda->row_sum = (float *)device_take(arena, cuda->limits.accumulators ? rows * p->n_heads : 0, sizeof(float));
    cuda->head_h = (__half *)device_take(arena, head_rows * p->n_embd, sizeof(__half));
    cuda->logits = (float *)device_take(arena, head_rows * p->n_vocab, sizeof(float));
    products_lay_out(cuda, arena);
    attention_lay_out(cuda, arena);
    services_lay_out(cuda, arena);
    sampling_lay_out(cuda, arena);
}

/* What WEIGHTS_AUTO stands for depends on the device's memory. Without one it is f16. */
static void begin_count(struct cuda *cuda, const struct program *program, const struct backend_limits *limits) {
    cudaDeviceProp properties;
    begin(cuda, program, limits);
    if (limits->weights == WEIGHTS_AUTO && cuda_find_device(limits->device, &properties, NULL) == STATUS_OK) cuda->properties.totalGlobalMem = properties.totalGlobalMem;
}

static uint32_t cuda_memory_plan(const struct program *program, const struct backend_limits *limits, struct memory_line *lines, uint32_t max) {
    struct cuda_private *counted = (struct cuda_private *)check_calloc(1, sizeof *counted);
    struct device_arena weights = {}, rings = {}, scratch = {}, residual = {};
    begin_count(&counted->cuda, program, limits);
    weights_lay_out(&counted->cuda, &weights);
    lay_out_rings(&counted->cuda, &rings);
    lay_out_scratch(&counted->cuda, &scratch);
    residual_lay_out(&counted->cuda, &residual);
    const size_t pinned = FLIGHTS * counted->cuda.staging_bytes + tables_pinned_bytes() + services_pinned_bytes(&counted->cuda) + sampling_pinned_bytes(&counted->cuda) + residual_pinned_bytes(&counted->cuda);
    const struct memory_line all[] = {{"weights", 1, weights.used}, {"scratch", 1, scratch.used}, {"query rings", 1, rings.used}, {"pinned", 1, pinned, true}, {"KV residual", 1, residual.used}};
    free(counted->cuda.layers);
    free(counted);
    const uint32_t n_lines = residual.used > 0 ? 5 : 4;
    uint32_t n = 0;
    for (; n < n_lines && n < max; n++) lines[n] = all[n];
    return n;
}

static enum status cuda_supports(const struct program *program, const struct backend_limits *limits, struct error *error) {
    struct cuda_private *counted = (struct cuda_private *)check_calloc(1, sizeof *counted);
    begin(&counted->cuda, program, limits);
    const enum status status = cuda_supported(&counted->cuda, error);
    free(counted->cuda.layers);
    free(counted);
    return status;
}

static uint64_t cuda_weight_bytes(const struct program *program, const struct backend_limits *limits) {
    struct cuda_private *counted = (struct cuda_private *)check_calloc(1, sizeof *counted);
    struct device_arena weights = {};
    begin_count(&counted->cuda, program, limits);
    weights_lay_out(&counted->cuda, &weights);
    const uint64_t bytes = cuda_laid_out_weight_bytes(&counted->cuda);
    free(counted->cuda.layers);
    free(counted);
    return bytes;
}

/* ---- life ---- */

static void cuda_close(struct backend *backend) {
    if (!backend) return;
    struct cuda *cuda = cuda_of(backend);
    struct cuda_private *own = private_of(cuda);
    if (cuda->stream) (void)cudaStreamSynchronize(cuda->stream);
    step_close(cuda);
    sampling_close(cuda);
    services_close(cuda);
    residual_close(cuda);
    attention_close(cuda);
    products_close(cuda);
    struct device_arena *arenas[] = {&own->weights, &own->pool, &own->rings, &own->scratch};
    for (size_t i = 0; i < sizeof arenas / sizeof *arenas; i++) (void)cudaFree(arenas[i]->base);
    for (int i = 0; i < FLIGHTS; i++) {
        (void)cudaFreeHost(cuda->flights[i].staging);
        if (cuda->flights[i].done) (void)cudaEventDestroy(cuda->flights[i].done);
    }
    tables_close(cuda);
    if (cuda->stream) (void)cudaStreamDestroy(cuda->stream);
    free(cuda->layers);
    free(own);
}

static enum status open_device(struct cuda *cuda, struct error *error) {
    const enum status status = cuda_find_device(cuda->limits.device, &cuda->properties, error);
    if (status != STATUS_OK) return status;
    cuda->device = (int)cuda->limits.device;
    CUDA_TRY(error, cudaSetDevice(cuda->device));
    CUDA_TRY(error, cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking));
    return STATUS_OK;
}

static enum status open_arena(struct device_arena *arena, size_t bytes, const char *what, struct error *error) {
    if (cudaMalloc(&arena->base, bytes ? bytes : 1) == cudaSuccess) {
        arena->used = 0;
        return STATUS_OK;
    }
    (void)cudaGetLastError();
    size_t available = 0, total = 0;
    (void)cudaMemGetInfo(&available, &total);
    return error_set(error, STATUS_NO_MEMORY, "CUDA device: %s takes %.1f MiB, %.1f of %.1f MiB are free", what, (double)bytes / 0x1p20, (double)available / 0x1p20, (double)total / 0x1p20);
}

static enum status open_memory(struct cuda *cuda, struct error *error) {
    struct cuda_private *own = private_of(cuda);
    const struct {
        struct device_arena *arena;
        void (*lay_out)(struct cuda *, struct device_arena *);
        const char *what;
    } parts[] = {{&own->weights, weights_lay_out, "weights"}, {&own->pool, lay_out_pool, "KV pool"}, {&own->rings, lay_out_rings, "query rings"}, {&own->scratch, lay_out_scratch, "scratch"}};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        struct device_arena count = {};
        parts[i].lay_out(cuda, &count);
        const enum status status = open_arena(parts[i].arena, count.used, parts[i].what, error);
        if (status != STATUS_OK) return status;
        parts[i].lay_out(cuda, parts[i].arena);
    }
    CUDA_TRY(error, cudaMemsetAsync(own->pool.base, 0, own->pool.used, cuda->stream)); /* finite */
    CUDA_TRY(error, cudaMemsetAsync(own->rings.base, 0, own->rings.used, cuda->stream));
    CUDA_TRY(error, cudaMemsetAsync(own->scratch.base, 0, own->scratch.used, cuda->stream));
    for (int i = 0; i < FLIGHTS; i++) {
        struct step_flight *flight = &cuda->flights[i];
        CUDA_TRY(error, cudaHostAlloc(&flight->staging, cuda->staging_bytes, cudaHostAllocMapped));
        CUDA_TRY(error, cudaEventCreateWithFlags(&flight->done, cudaEventDisableTiming));
        memset(flight->staging, 0, cuda->staging_bytes);
        (void)lay_out_view(cuda, &flight->host, (uint8_t *)flight->staging);
    }
    cuda->host = cuda->flights[0].host;
    uint32_t *lane_tokens = cuda->dev.lane_tokens;
    (void)lay_out_view(cuda, &cuda->dev, (uint8_t *)cuda->staging_device);
    cuda->dev.lane_tokens = lane_tokens;
    CUDA_TRY(error, cudaMemcpyAsync(cuda->rope_frequency, cuda->program->rope_frequency, cuda->program->rope_dims / 2 * sizeof(double), cudaMemcpyHostToDevice, cuda->stream));
    return STATUS_OK;
}

static enum status open_all(struct cuda *cuda, struct error *error) {
    enum status status = cuda_supported(cuda, error);
    if (status == STATUS_OK) status = open_device(cuda, error);
    if (status == STATUS_OK) status = open_memory(cuda, error);
    if (status == STATUS_OK) status = tables_open(cuda, error);
    if (status == STATUS_OK) status = products_open(cuda, error);
    if (status == STATUS_OK) status = attention_open(cuda, error);
    if (status == STATUS_OK) status = services_open(cuda, error);
    if (status == STATUS_OK) status = sampling_open(cuda, error);
    if (status == STATUS_OK) status = residual_open(cuda, error);
    if (status == STATUS_OK) status = step_open(cuda, error);
    if (status == STATUS_OK) status = weights_load(cuda, error);
    if (status != STATUS_OK) return status;
    CUDA_TRY(error, cudaStreamSynchronize(cuda->stream));
    return STATUS_OK;
}

static enum status cuda_prepare(const struct program *program, const struct backend_limits *limits, struct backend **backend, struct error *error) {
    struct cuda_private *own = (struct cuda_private *)check_calloc(1, sizeof *own);
    struct cuda *cuda = &own->cuda;
    begin(cuda, program, limits);
    cuda->backend.ops = &backend_cuda;
    cuda->backend.takes_two = !limits->phase_ns; /* the events between phases are there once */
    cuda->backend.rank_places = services_rank_places(cuda);
    cuda->backend.joins_blocks = kivi_bits(limits->kv_dtype) > 0;
    const enum status status = open_all(cuda, error);
    if (status != STATUS_OK) {
        cuda_close(&cuda->backend);
        return status;
    }
    (void)snprintf(cuda->description, sizeof cuda->description, "cuda %d, %s (%d.%d), weights %s%s", cuda->device, cuda->properties.name, cuda->properties.major, cuda->properties.minor,
                   cuda->layers[0].o.type == TENSOR_F16 ? "f16" : tensor_type_info(cuda->layers[0].o.type)->name, cuda->deterministic ? ", deterministic" : "");
    *backend = &cuda->backend;
    return STATUS_OK;
}

static const char *cuda_describe(const struct backend *backend) { return ((const struct cuda *)(const void *)backend)->description; }

extern "C" const struct backend_ops backend_cuda = {
    .name = "cuda",
    .memory = cuda_memory,
    .block_bytes = cuda_block_bytes,
    .memory_plan = cuda_memory_plan,
    .supports = cuda_supports,
    .prepare = cuda_prepare,
    .close = cuda_close,
    .describe = cuda_describe,
    .submit = cuda_submit,
    .sync = cuda_sync,
    .copy_blocks = cuda_copy_blocks,
    .resumes = residual_resumes,
    .compact = cuda_compact,
    .read_f32 = cuda_read_f32,
    .score = cuda_score,
    .rank = cuda_rank,
    .cut = cuda_cut,
    .keep = cuda_keep,
    .keep_units = cuda_keep_units,
    .settle = cuda_settle,
    .read_positions = cuda_read_positions,
    .shift_sinks = cuda_shift_sinks,
    .tap_logits = cuda_tap_logits,
    .makes_weights = true,
    .weight_bytes = cuda_weight_bytes,
    .copy_bandwidth = cuda_copy_bandwidth,
};
