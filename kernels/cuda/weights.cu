/* Weights on the device: where they lie, how they come there, and rows of the embedding. Tensors travel as the file has them, through a ring of pinned buffers, and are
 * widened on the device: exactly tensor_dequantize's value, rounded to f16 once. Owns the pinned ring while it loads; the arena is the backend's.
 * Runs on the engine's thread, before the first step (weights_embed: in steps). It deliberately does not multiply (products.cu).
 *
 * f16 and not bf16: Q4_1's offsets need the mantissa. What f16's range does not hold is refused by name; to saturate would be another model. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernels/cuda/cuda.h"

extern "C" {
#include "base/random.h"
}

enum {
    STAGES = 3,
    STAGE_BYTES = 4 << 20, /* large enough that a copy runs at the bus's speed, small enough that three are nothing */
    TENSORS_A_PHASE = 3,
};
static_assert(256 + STAGES * STAGE_BYTES <= WORKSPACE_BYTES, "tensors are staged in the products' workspace");

/* ---- layout ---- */

static void take_matrix(struct device_arena *arena, struct matrix *matrix, uint32_t rows, uint32_t cols) {
    *matrix = {.type = TENSOR_F16, .rows = rows, .cols = cols, .data = NULL};
    matrix->data = device_take(arena, (size_t)rows * cols, sizeof(__half));
}

static float *take_vector(struct device_arena *arena, const struct tensor *tensor) {
    return tensor->data ? (float *)device_take(arena, tensor->cols, sizeof(float)) : NULL;
}

static uint32_t rows_of(const struct phase *phase) {
    uint32_t rows = 0;
    for (int w = 0; w < TENSORS_A_PHASE; w++)
        if (phase->weight[w].data) rows += phase->weight[w].rows;
    return rows;
}

static struct device_layer *layer_of(struct cuda *cuda, const struct phase *phase) {
    CHECK(phase->layer < cuda->program->n_layers);
    return &cuda->layers[phase->layer];
}

/* The matrix that a phase's tensors are rows of, one below the other. */
static struct matrix *matrix_of(struct cuda *cuda, const struct phase *phase) {
    switch (phase->kind) {
    case PHASE_EMBED: return &cuda->embedding;
    case PHASE_ATTN_IN: return &layer_of(cuda, phase)->qkv;
    case PHASE_ATTN_OUT: return &layer_of(cuda, phase)->o;
    case PHASE_MLP_IN: return &layer_of(cuda, phase)->gate_up;
    case PHASE_MLP_OUT: return &layer_of(cuda, phase)->down;
    case PHASE_HEAD: return &cuda->head;
    default: return NULL;
    }
}

void weights_lay_out(struct cuda *cuda, struct device_arena *arena) {
    const struct program *p = cuda->program;
    if (!cuda->layers) cuda->layers = (struct device_layer *)check_calloc(p->n_layers, sizeof *cuda->layers);
    for (uint32_t i = 0; i < p->n_phases; i++) {
        const struct phase *phase = &p->phases[i];
        struct matrix *matrix = matrix_of(cuda, phase);
        if (!matrix || (phase->kind == PHASE_EMBED && p->tied_head)) continue;
        take_matrix(arena, matrix, rows_of(phase), phase->weight[0].cols);
        if (phase->kind == PHASE_HEAD) cuda->head_norm = take_vector(arena, &phase->norm);
        if (phase->kind == PHASE_MLP_IN) layer_of(cuda, phase)->mlp_norm = take_vector(arena, &phase->norm);
        if (phase->kind != PHASE_ATTN_IN) continue;
        struct device_layer *layer = layer_of(cuda, phase);
        layer->attention_norm = take_vector(arena, &phase->norm);
        layer->q_norm = take_vector(arena, &phase->q_norm);
        layer->k_norm = take_vector(arena, &phase->k_norm);
        bool biased = phase->bias[WEIGHT_Q].data || phase->bias[WEIGHT_K].data || phase->bias[WEIGHT_V].data;
        layer->qkv_bias = biased ? (float *)device_take(arena, matrix->rows, sizeof(float)) : NULL;
    }
    if (p->tied_head) cuda->embedding = cuda->head;
    cuda->rope_frequency = (double *)device_take(arena, p->rope_dims / 2, sizeof(double));
}

size_t weights_bytes(const struct program *program, bool native) {
    struct cuda *cuda = (struct cuda *)check_calloc(1, sizeof *cuda);
    struct device_arena arena = {};
    cuda->program = program;
    cuda->limits.weights = native ? WEIGHTS_NATIVE : WEIGHTS_F16;
    weights_lay_out(cuda, &arena);
    free(cuda->layers);
    free(cuda);
    return arena.used;
}

/* ---- widening: kernels/tensor.c, element by element. No multiply-add is fused that is not fused there (where one rounds, that is) ---- */

static __device__ uint32_t u16_at(const uint8_t *bytes) { return bytes[0] | (uint32_t)bytes[1] << 8; }
static __device__ uint32_t u32_at(const uint8_t *bytes) { return u16_at(bytes) | u16_at(bytes + 2) << 16; }
static __device__ float f16_at(const uint8_t *bytes) { return __half2float(__ushort_as_half((unsigned short)u16_at(bytes))); }

/* The nibble of element i of 32, low half first. */
static __device__ int nibble_at(const uint8_t *nibbles, uint32_t i) { return nibbles[i % 16] >> (i / 16 * 4) & 15; }
static __device__ int fifth_at(const uint8_t *bits, uint32_t i) { return (int)(u32_at(bits) >> i & 1) << 4; }

static __device__ float widen_group(const uint8_t *block, const uint8_t *fifth, const uint8_t *nibbles, uint32_t i) {
    const uint8_t *scales = block + 4;
    uint32_t g = i / 32, lane = i % 32;
    int scale, min;
    if (g < 4) {
        scale = scales[g] & 63;
        min = scales[g + 4] & 63;
    } else {
        scale = (scales[g + 4] & 15) | (scales[g - 4] >> 6) << 4;
        min = scales[g + 4] >> 4 | (scales[g] >> 6) << 4;
    }
    int q = nibbles[g / 2 * 32 + lane] >> (g % 2 * 4) & 15;
    if (fifth) q |= (fifth[lane] >> g & 1) << 4;
    float group_d = __fmul_rn(f16_at(block), (float)scale), group_min = __fmul_rn(f16_at(block + 2), (float)min);
    return __fsub_rn(__fmul_rn(group_d, (float)q), group_min);
}

static __device__ float widen_q6_k(const uint8_t *block, uint32_t i) {
    uint32_t half = i / 128, quarter = i / 32 % 4, lane = i % 32;
    int nibble = block[half * 64 + quarter % 2 * 32 + lane] >> (quarter / 2 * 4) & 15;
    int top = block[128 + half * 32 + lane] >> (quarter * 2) & 3;
    float scale = (float)(int8_t)block[192 + i / 16];
    return __fmul_rn(__fmul_rn(f16_at(block + 208), scale), (float)((nibble | top << 4) - 32));
}

/* Element i of a block. */
static __device__ float widen_element(enum tensor_type type, const uint8_t *block, uint32_t i) {
    switch (type) {
    case TENSOR_F32: return __uint_as_float(u32_at(block));
    case TENSOR_F16: return f16_at(block);
    case TENSOR_BF16: return __uint_as_float(u16_at(block) << 16);
    case TENSOR_Q8_0: return __fmul_rn(f16_at(block), (float)(int8_t)block[2 + i]);
    case TENSOR_Q4_0: return __fmul_rn(f16_at(block), (float)(nibble_at(block + 2, i) - 8));
    case TENSOR_Q4_1: return __fadd_rn(__fmul_rn(f16_at(block), (float)nibble_at(block + 4, i)), f16_at(block + 2));
    case TENSOR_Q5_0: return __fmul_rn(f16_at(block), (float)((nibble_at(block + 6, i) | fifth_at(block + 2, i)) - 16));
    case TENSOR_Q5_1: return __fadd_rn(__fmul_rn(f16_at(block), (float)(nibble_at(block + 8, i) | fifth_at(block + 4, i))), f16_at(block + 2));
    case TENSOR_Q4_K: return widen_group(block, NULL, block + 16, i);
    case TENSOR_Q5_K: return widen_group(block, block + 16, block + 48, i);
    case TENSOR_Q6_K: return widen_q6_k(block, i);
    default: return 0;
    }
}

struct block_format {
    enum tensor_type type;
    uint32_t size, bytes;
};

/* *unfit becomes the lowest `name` of a tensor with a value that f16 does not hold: half a unit beyond its largest, 65504. */
static __global__ void widen_blocks(struct block_format format, const uint8_t *source, __half *destination, uint32_t count, uint32_t *unfit,
                                    uint32_t name) {
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        float x = widen_element(format.type, source + (size_t)(i / format.size) * format.bytes, i % format.size);
        if (isfinite(x) && fabsf(x) >= 65520.0f) atomicMin(unfit, name);
        destination[i] = __float2half_rn(x);
    }
}

/* Uniform in [-bound, bound), from (seed, name of the matrix, index) alone. */
static __device__ uint64_t mix(uint64_t x) { /* as random_mix of base/random.h */
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static __global__ void make_random(__half *destination, size_t count, uint64_t key, float bound) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) {
        uint32_t bits = (uint32_t)(mix(key ^ i / 4) >> (i % 4 * 16)) & 0xffff;
        destination[i] = __float2half_rn(((float)bits * 0x1p-15f - 1) * bound);
    }
}

/* ---- loading ---- */

struct loader {
    struct cuda *cuda;
    struct error *error;
    uint8_t *pinned, *staging; /* [STAGES][STAGE_BYTES] on the host and on the device */
    cudaEvent_t used[STAGES];  /* what the stage held has been read */
    uint32_t next, current;
    uint32_t *unfit;
    uint64_t done, total; /* elements, for the progress */
};

static uint8_t *stage_host(struct loader *loader) { return loader->pinned + (size_t)loader->current * STAGE_BYTES; }
static uint8_t *stage_device(struct loader *loader) { return loader->staging + (size_t)loader->current * STAGE_BYTES; }

/* The next stage, free to be written. */
static enum status stage_take(struct loader *loader) {
    loader->current = loader->next++ % STAGES;
    CUDA_TRY(loader->error, cudaEventSynchronize(loader->used[loader->current]));
    return STATUS_OK;
}

static enum status stage_used(struct loader *loader) {
    CUDA_TRY(loader->error, cudaGetLastError()); /* of the launch that reads it */
    CUDA_TRY(loader->error, cudaEventRecord(loader->used[loader->current], loader->cuda->stream));
    return STATUS_OK;
}

static uint32_t grid_for(size_t count) { return count < (size_t)256 * 4096 ? (uint32_t)((count + 255) / 256) : 4096; }

/* Whole pages within the tensor; those at its ends belong to its neighbours too. */
static void drop_pages(const struct tensor *tensor) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uintptr_t first = ((uintptr_t)tensor->data + page - 1) / page * page, end = ((uintptr_t)tensor->data + tensor_bytes(tensor)) / page * page;
    if (first < end) (void)madvise((void *)first, end - first, MADV_DONTNEED);
}

/* The whole tensor is one run of blocks, and so is its place: rows do not matter. */
static enum status load_blocks(struct loader *loader, const struct tensor *tensor, uint32_t name, __half *destination) {
    const struct tensor_type_info *info = tensor_type_info(tensor->type);
    struct block_format format = {tensor->type, info->block_size, info->block_bytes};
    size_t blocks = tensor_bytes(tensor) / info->block_bytes, most = STAGE_BYTES / info->block_bytes;
    for (size_t first = 0; first < blocks; first += most) {
        size_t n = blocks - first < most ? blocks - first : most;
        uint32_t count = (uint32_t)(n * info->block_size);
        enum status status = stage_take(loader);
        if (status != STATUS_OK) return status;
        memcpy(stage_host(loader), (const uint8_t *)tensor->data + first * info->block_bytes, n * info->block_bytes);
        CUDA_TRY(loader->error,
                 cudaMemcpyAsync(stage_device(loader), stage_host(loader), n * info->block_bytes, cudaMemcpyHostToDevice, loader->cuda->stream));
        widen_blocks<<<grid_for(count), 256, 0, loader->cuda->stream>>>(format, stage_device(loader), destination + first * info->block_size, count,
                                                                        loader->unfit, name);
        status = stage_used(loader);
        if (status != STATUS_OK) return status;
    }
    if (loader->cuda->limits.drop_source_pages) drop_pages(tensor);
    return STATUS_OK;
}

static enum status load_random(struct loader *loader, const struct tensor *tensor, uint32_t name, __half *destination) {
    size_t count = (size_t)tensor->rows * tensor->cols;
    uint64_t key = random_mix(random_mix(loader->cuda->program->random_seed) ^ name);
    make_random<<<grid_for(count), 256, 0, loader->cuda->stream>>>(destination, count, key, sqrtf(3.0f / (float)tensor->cols));
    CUDA_TRY(loader->error, cudaGetLastError());
    return STATUS_OK;
}

/* A vector of f32; where the tensor is absent or the weights are random, `otherwise` everywhere. */
static enum status load_vector(struct loader *loader, const struct tensor *tensor, uint32_t count, float otherwise, float *destination) {
    const uint32_t most = STAGE_BYTES / sizeof(float);
    bool given = tensor->data && loader->cuda->program->random_seed == 0;
    CHECK(!given || (tensor->cols == count && tensor->type == TENSOR_F32));
    for (uint32_t first = 0; first < count; first += most) {
        uint32_t n = count - first < most ? count - first : most;
        enum status status = stage_take(loader);
        if (status != STATUS_OK) return status;
        float *values = (float *)stage_host(loader);
        if (given) memcpy(values, (const uint8_t *)tensor->data + first * sizeof(float), n * sizeof(float));
        for (uint32_t i = 0; i < n && !given; i++) values[i] = otherwise;
        CUDA_TRY(loader->error, cudaMemcpyAsync(destination + first, values, n * sizeof(float), cudaMemcpyHostToDevice, loader->cuda->stream));
        status = stage_used(loader);
        if (status != STATUS_OK) return status;
    }
    return STATUS_OK;
}

static void advance(struct loader *loader, const struct tensor *tensor) {
    const struct backend_limits *limits = &loader->cuda->limits;
    loader->done += (uint64_t)tensor->rows * tensor->cols;
    if (limits->progress) limits->progress(limits->progress_context, (double)loader->done / (double)loader->total);
}

static enum status load_matrices(struct loader *loader, uint32_t index) {
    const struct phase *phase = &loader->cuda->program->phases[index];
    const struct matrix *matrix = matrix_of(loader->cuda, phase);
    bool random = loader->cuda->program->random_seed != 0;
    uint32_t row = 0;
    for (uint32_t w = 0; w < TENSORS_A_PHASE; w++) {
        const struct tensor *tensor = &phase->weight[w];
        if (!tensor->data) continue;
        CHECK(tensor->cols == matrix->cols && tensor->rows <= matrix->rows - row);
        __half *destination = (__half *)matrix->data + (size_t)row * matrix->cols;
        enum status status = (random ? load_random : load_blocks)(loader, tensor, index * TENSORS_A_PHASE + w, destination);
        if (status != STATUS_OK) return status;
        advance(loader, tensor);
        row += tensor->rows;
    }
    return STATUS_OK;
}

static enum status load_vectors(struct loader *loader, const struct phase *phase) {
    const struct program *p = loader->cuda->program;
    if (phase->kind == PHASE_HEAD) return load_vector(loader, &phase->norm, p->n_embd, 1, loader->cuda->head_norm);
    if (phase->kind != PHASE_ATTN_IN && phase->kind != PHASE_MLP_IN) return STATUS_OK;
    struct device_layer *layer = layer_of(loader->cuda, phase);
    if (phase->kind == PHASE_MLP_IN) return load_vector(loader, &phase->norm, p->n_embd, 1, layer->mlp_norm);
    enum status status = load_vector(loader, &phase->norm, p->n_embd, 1, layer->attention_norm);
    if (status == STATUS_OK && layer->q_norm) status = load_vector(loader, &phase->q_norm, p->head_dim, 1, layer->q_norm);
    if (status == STATUS_OK && layer->k_norm) status = load_vector(loader, &phase->k_norm, p->head_dim, 1, layer->k_norm);
    for (uint32_t w = 0, at = 0; w < TENSORS_A_PHASE && status == STATUS_OK && layer->qkv_bias; at += phase->weight[w++].rows)
        status = load_vector(loader, &phase->bias[w], phase->weight[w].rows, 0, layer->qkv_bias + at);
    return status;
}

/* "layer 3: attention's v". */
static enum status refuse(const struct program *program, uint32_t name, struct error *error) {
    static const char *const matrices[PHASE_KINDS][TENSORS_A_PHASE] = {
        {"the embedding"},   {"attention q", "attention k", "attention v"}, {}, {"attention output"}, {"MLP gate", "MLP up"}, {"MLP down"},
        {"the output head"},
    };
    const struct phase *phase = &program->phases[name / TENSORS_A_PHASE];
    const char *matrix = matrices[phase->kind][name % TENSORS_A_PHASE];
    char layer[32] = "";
    if (phase->kind != PHASE_EMBED && phase->kind != PHASE_HEAD) (void)snprintf(layer, sizeof layer, "layer %u: ", (unsigned)phase->layer);
    return error_set(error, STATUS_UNSUPPORTED, "%s%s holds a value beyond +-65504, the range of 16-bit floats in which the cuda backend computes",
                     layer, matrix);
}

static enum status load_all(struct loader *loader) {
    const struct program *p = loader->cuda->program;
    uint32_t unfit;
    CUDA_TRY(loader->error, cudaMemsetAsync(loader->unfit, 0xff, sizeof *loader->unfit, loader->cuda->stream));
    CUDA_TRY(loader->error, cudaMemcpyAsync(loader->cuda->rope_frequency, p->rope_frequency, p->rope_dims / 2 * sizeof(double),
                                            cudaMemcpyHostToDevice, loader->cuda->stream));
    for (uint32_t i = 0; i < p->n_phases; i++) {
        enum status status = load_vectors(loader, &p->phases[i]);
        if (status == STATUS_OK && matrix_of(loader->cuda, &p->phases[i]) && !(p->phases[i].kind == PHASE_EMBED && p->tied_head))
            status = load_matrices(loader, i);
        if (status != STATUS_OK) return status;
    }
    CUDA_TRY(loader->error, cudaMemcpyAsync(&unfit, loader->unfit, sizeof unfit, cudaMemcpyDeviceToHost, loader->cuda->stream));
    CUDA_TRY(loader->error, cudaStreamSynchronize(loader->cuda->stream));
    return unfit == UINT32_MAX ? STATUS_OK : refuse(p, unfit, loader->error);
}

static enum status open_ring(struct loader *loader) {
    CUDA_TRY(loader->error, cudaMallocHost((void **)&loader->pinned, (size_t)STAGES * STAGE_BYTES));
    for (uint32_t i = 0; i < STAGES; i++) CUDA_TRY(loader->error, cudaEventCreateWithFlags(&loader->used[i], cudaEventDisableTiming));
    return STATUS_OK;
}

enum status weights_load(struct cuda *cuda, struct error *error) {
    const struct program *p = cuda->program;
    CHECK(cuda->workspace);
    struct loader loader = {.cuda = cuda, .error = error, .staging = cuda->workspace + 256, .unfit = (uint32_t *)cuda->workspace};
    for (uint32_t i = 0; i < p->n_phases; i++)
        for (uint32_t w = 0; w < TENSORS_A_PHASE && !(p->phases[i].kind == PHASE_EMBED && p->tied_head); w++)
            if (p->phases[i].weight[w].data) loader.total += (uint64_t)p->phases[i].weight[w].rows * p->phases[i].weight[w].cols;
    enum status status = open_ring(&loader);
    if (status == STATUS_OK) status = load_all(&loader);
    if (status != STATUS_OK) (void)cudaStreamSynchronize(cuda->stream); /* nothing may read the ring when it goes */
    for (uint32_t i = 0; i < STAGES; i++)
        if (loader.used[i]) (void)cudaEventDestroy(loader.used[i]);
    (void)cudaFreeHost(loader.pinned);
    return status;
}

/* ---- rows of the embedding ---- */

static __global__ void embed_rows(const struct step_header *header, const int32_t *tokens, const __half *embedding, uint32_t n_embd, float *x) {
    uint32_t row = blockIdx.x;
    if (row >= header->n_rows) return;
    const __half *from = embedding + (size_t)tokens[row] * n_embd;
    for (uint32_t i = threadIdx.x; i < n_embd; i += blockDim.x) x[(size_t)row * n_embd + i] = __half2float(from[i]);
}

void weights_embed(struct cuda *cuda, const struct step_shape *shape) {
    CHECK(shape->rows > 0 && cuda->embedding.type == TENSOR_F16);
    embed_rows<<<shape->rows, 256, 0, cuda->stream>>>(cuda->dev.header, cuda->dev.tokens, (const __half *)cuda->embedding.data, cuda->program->n_embd,
                                                      cuda->x);
    CUDA_CHECK(cudaGetLastError());
}
