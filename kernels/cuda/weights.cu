/* Weights on the device: where they lie, how they come there, and rows of the embedding. Tensors travel as the file has them, through a ring of pinned buffers, and are
 * widened on the device: exactly tensor_dequantize's value, rounded to f16 once; or put into the order of native.h. Owns the pinned ring while it loads; the arena is the
 * backend's. Runs on the engine's thread, before the first step (weights_embed: in steps). It deliberately does not multiply (products.cu).
 *
 * f16 and not bf16: Q4_1's offsets need the mantissa. What f16's range does not hold is refused by name; to saturate would be another model. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernels/cuda/blocks.h"
#include "kernels/cuda/native.h"

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

/* In its own type on the device, if native weights are wanted: a type there is a form of, and rows of which 16 pass through a stage. */
static enum tensor_type type_on_device(const struct tensor *tensor, bool native) {
    bool fits = tensor_row_bytes(tensor) * NATIVE_ROWS <= STAGE_BYTES;
    return native && fits && native_form_of(tensor->type) != FORM_F16 ? tensor->type : TENSOR_F16;
}

static size_t part_bytes(const struct matrix_part *part, uint32_t cols) {
    enum native_form form = native_form_of(part->type);
    return form == FORM_F16 ? (size_t)part->rows * cols * sizeof(__half) : native_bytes(form, part->rows, cols);
}

/* Tensors that have a type in common share a part, unless one would begin within a tile. */
static void take_matrix(struct device_arena *arena, struct matrix *matrix, const struct tensor *tensors, bool native) {
    *matrix = {.type = TENSOR_F16, .rows = 0, .cols = tensors[0].cols, .n_parts = 0, .parts = {}};
    for (uint32_t w = 0; w < TENSORS_A_PHASE; w++) {
        if (!tensors[w].data) continue;
        enum tensor_type type = type_on_device(&tensors[w], native);
        struct matrix_part *last = matrix->n_parts ? &matrix->parts[matrix->n_parts - 1] : NULL;
        if (last && last->type == type && (type == TENSOR_F16 || last->rows % NATIVE_ROWS == 0))
            last->rows += tensors[w].rows;
        else
            matrix->parts[matrix->n_parts++] = {.type = type, .first_row = matrix->rows, .rows = tensors[w].rows, .data = NULL};
        if (matrix->type == TENSOR_F16) matrix->type = type;
        matrix->rows += tensors[w].rows;
    }
    for (uint32_t i = 0; i < matrix->n_parts; i++) matrix->parts[i].data = device_take(arena, part_bytes(&matrix->parts[i], matrix->cols), 1);
}

size_t weights_matrix_bytes(const struct matrix *matrix) {
    size_t bytes = 0;
    for (uint32_t i = 0; i < matrix->n_parts; i++) bytes += part_bytes(&matrix->parts[i], matrix->cols);
    return bytes;
}

static float *take_vector(struct device_arena *arena, const struct tensor *tensor) {
    return tensor->data ? (float *)device_take(arena, tensor->cols, sizeof(float)) : NULL;
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

static void lay_out(struct cuda *cuda, struct device_arena *arena, bool native) {
    const struct program *p = cuda->program;
    for (uint32_t i = 0; i < p->n_phases; i++) {
        const struct phase *phase = &p->phases[i];
        struct matrix *matrix = matrix_of(cuda, phase);
        if (!matrix || (phase->kind == PHASE_EMBED && p->tied_head)) continue;
        take_matrix(arena, matrix, phase->weight, native);
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
}

size_t weights_bytes(const struct program *program, bool native) {
    struct cuda *cuda = (struct cuda *)check_calloc(1, sizeof *cuda);
    struct device_arena arena = {};
    cuda->program = program;
    cuda->layers = (struct device_layer *)check_calloc(program->n_layers, sizeof *cuda->layers);
    lay_out(cuda, &arena, native);
    free(cuda->layers);
    free(cuda);
    return arena.used;
}

static bool keeps_native(const struct cuda *cuda) {
    if (cuda->limits.weights != WEIGHTS_AUTO) return cuda->limits.weights == WEIGHTS_NATIVE;
    const uint64_t total = cuda->properties.totalGlobalMem; /* 0: no device was asked yet */
    return total > 0 && weights_choice(weights_bytes(cuda->program, false), total) == WEIGHTS_NATIVE;
}

void weights_lay_out(struct cuda *cuda, struct device_arena *arena) { lay_out(cuda, arena, keeps_native(cuda)); }

/* ---- what is done to each weight once, on the device ---- */

/* *unfit becomes the lowest `name` of a tensor with a value that f16 does not hold: half a unit beyond its largest, 65504, or no number. */
static __global__ void widen_blocks(struct block_format format, const uint8_t *source, __half *destination, uint32_t count, uint32_t *unfit,
                                    uint32_t name) {
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        float x = widen_element(format.type, source + (size_t)(i / format.size) * format.bytes, i % format.size);
        if (beyond_f16(x)) atomicMin(unfit, name);
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

/* So many blocks of a quantised type whose elements have about this standard deviation and a mean near 0: random quants, all scales of a block the same. */
static __global__ void make_random_blocks(struct block_format format, uint8_t *destination, uint32_t blocks, uint64_t first_block, uint64_t key,
                                          float deviation) {
    for (uint32_t b = blockIdx.x * blockDim.x + threadIdx.x; b < blocks; b += gridDim.x * blockDim.x) {
        uint8_t *block = destination + (size_t)b * format.bytes;
        uint64_t block_key = mix(key ^ (first_block + b));
        for (uint32_t i = 0; i < format.bytes; i++) block[i] = (uint8_t)(mix(block_key ^ i / 8) >> (i % 8 * 8));
        const float of_nibbles = 4.6098f, of_six_bits = 18.473f, of_bytes = 73.9f; /* deviations of uniform integers: sqrt((n^2 - 1) / 12) */
        switch (format.type) {
        case TENSOR_Q8_0: set_f16(block, deviation / of_bytes); break;
        case TENSOR_Q4_0: set_f16(block, deviation / of_nibbles); break;
        case TENSOR_Q4_1:
            set_f16(block, deviation / of_nibbles);
            set_f16(block + 2, -7.5f * deviation / of_nibbles);
            break;
        case TENSOR_Q4_K: /* scales and minima of 32, as tensor.c reads them */
            set_f16(block, deviation / of_nibbles / 32);
            set_f16(block + 2, 7.5f * deviation / of_nibbles / 32);
            for (uint32_t i = 0; i < 12; i++) block[4 + i] = i < 8 ? 32 | 2 << 6 : 0;
            break;
        default: /* Q6_K */
            for (uint32_t i = 0; i < 16; i++) block[192 + i] = 32;
            set_f16(block + 208, deviation / of_six_bits / 32);
        }
    }
}

/* Whole rows of blocks, the first of them the first of a tile, to tiles (native.h). A thread a lane of a tile. */
struct packing {
    struct block_format format;
    enum native_form form;
    const uint8_t *source;
    uint8_t *tiles;
    uint32_t rows, cols;
    uint32_t *unfit, name;
};

static __device__ void put_quant(enum native_form form, uint32_t (&quants)[8], uint32_t half, uint32_t high, uint32_t i, uint32_t q) {
    uint32_t pair = i / 2, at = 4 * pair + 16 * (i % 2);
    if (form == FORM_8) {
        quants[half * 4 + high * 2 + i / 4] |= q << (i % 4 * 8);
        return;
    }
    quants[half * 2 + high] |= (q & 15) << at;
    if (form == FORM_6) quants[4 + half] |= (q >> 4) << (2 * pair + 16 * (i % 2) + 8 * high);
}

static __global__ void pack_blocks(const struct packing p) {
    const uint32_t steps = (p.cols + NATIVE_COLS - 1) / NATIVE_COLS, bands = (p.rows + NATIVE_ROWS - 1) / NATIVE_ROWS;
    const uint32_t index = blockIdx.x * blockDim.x + threadIdx.x, lane = index % 32, step = index / 32 % steps, band = index / 32 / steps;
    if (band >= bands) return;
    const size_t row_bytes = (size_t)(p.cols / p.format.size) * p.format.bytes;
    uint32_t quants[8] = {}; /* 0 under a scale of 0 past the matrix */
    uint16_t scales[8] = {};
    bool unfit = false;
    for (uint32_t i = 0; i < 32; i++) {
        uint32_t half = i / 16, high = i / 8 % 2, row = band * NATIVE_ROWS + high * 8 + lane / 4,
                 column = step * NATIVE_COLS + half * 32 + lane % 4 * 8 + i % 8;
        if (row >= p.rows || column >= p.cols) continue;
        const uint8_t *block = p.source + row * row_bytes + (size_t)(column / p.format.size) * p.format.bytes;
        struct block_element e = element_at(p.format.type, block, column % p.format.size);
        unfit |= beyond_f16(widen_element(p.format.type, block, column % p.format.size)) || beyond_f16(e.scale) || beyond_f16(e.offset);
        put_quant(p.form, quants, half, high, i % 8, (uint32_t)(e.quant + e.zero));
        uint16_t scale = __half_as_ushort(__float2half_rn(e.scale)); /* the same for the eight of a row and half */
        if (p.form == FORM_4_OFFSET) {
            scales[(half * 2 + high) * 2] = scale;
            scales[(half * 2 + high) * 2 + 1] = __half_as_ushort(__float2half_rn(e.offset));
        } else {
            scales[half * 2 + high] = scale;
        }
    }
    if (unfit) atomicMin(p.unfit, p.name);
    uint8_t *tile = p.tiles + (size_t)(band * steps + step) * native_tile_bytes(p.form);
    memcpy(tile + native_quants_at(lane), quants, 16);
    if (p.form == FORM_8) memcpy(tile + 512 + native_quants_at(lane), quants + 4, 16);
    if (p.form == FORM_6) memcpy(tile + native_high_bits_at(lane), quants + 4, 8);
    memcpy(tile + native_scales_at(p.form, lane), scales, native_scale_bytes(p.form)); /* lanes that share them write the same */
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

/* Blocks [first, first + count) of a tensor to the current stage of the device: copied, or made. */
static enum status stage_blocks(struct loader *loader, const struct tensor *tensor, uint32_t name, size_t first, size_t count) {
    struct block_format format = block_format_of(tensor->type);
    uint64_t seed = loader->cuda->program->random_seed;
    if (seed != 0) {
        uint64_t key = random_mix(random_mix(seed) ^ name);
        launch(make_random_blocks, grid_for(count), 256, 0, loader->cuda->stream, format, stage_device(loader), (uint32_t)count, first, key,
               1 / sqrtf((float)tensor->cols));
        CUDA_TRY(loader->error, cudaGetLastError());
        return STATUS_OK;
    }
    memcpy(stage_host(loader), (const uint8_t *)tensor->data + first * format.bytes, count * format.bytes);
    CUDA_TRY(loader->error,
             cudaMemcpyAsync(stage_device(loader), stage_host(loader), count * format.bytes, cudaMemcpyHostToDevice, loader->cuda->stream));
    return STATUS_OK;
}

/* The whole tensor is one run of blocks, and so is its place: rows do not matter. */
static enum status load_f16(struct loader *loader, const struct tensor *tensor, uint32_t name, __half *destination) {
    struct block_format format = block_format_of(tensor->type);
    size_t blocks = tensor_bytes(tensor) / format.bytes, most = STAGE_BYTES / format.bytes;
    for (size_t first = 0; first < blocks; first += most) {
        size_t n = blocks - first < most ? blocks - first : most;
        uint32_t count = (uint32_t)(n * format.size);
        enum status status = stage_take(loader);
        if (status == STATUS_OK) status = stage_blocks(loader, tensor, name, first, n);
        if (status != STATUS_OK) return status;
        launch(widen_blocks, grid_for(count), 256, 0, loader->cuda->stream, format, stage_device(loader), destination + first * format.size, count,
               loader->unfit, name);
        status = stage_used(loader);
        if (status != STATUS_OK) return status;
    }
    return STATUS_OK;
}

/* Whole bands of tiles at a time. */
static enum status load_native(struct loader *loader, const struct tensor *tensor, uint32_t name, uint8_t *tiles) {
    const size_t row_bytes = tensor_row_bytes(tensor), row_blocks = tensor->cols / tensor_type_info(tensor->type)->block_size;
    const uint32_t most = (uint32_t)(STAGE_BYTES / row_bytes / NATIVE_ROWS * NATIVE_ROWS), steps = div_up(tensor->cols, NATIVE_COLS);
    struct packing p = {.format = block_format_of(tensor->type), .form = native_form_of(tensor->type), .source = NULL, .tiles = NULL, .rows = 0};
    CHECK(most > 0 && p.form != FORM_F16);
    p.cols = tensor->cols;
    p.unfit = loader->unfit;
    p.name = name;
    for (uint32_t first = 0; first < tensor->rows; first += most) {
        p.rows = tensor->rows - first < most ? tensor->rows - first : most;
        enum status status = stage_take(loader);
        if (status == STATUS_OK) status = stage_blocks(loader, tensor, name, first * row_blocks, p.rows * row_blocks);
        if (status != STATUS_OK) return status;
        p.source = stage_device(loader);
        p.tiles = tiles + native_bytes(p.form, first, tensor->cols);
        launch(pack_blocks, div_up(div_up(p.rows, NATIVE_ROWS) * steps * 32, 128), 128, 0, loader->cuda->stream, p);
        status = stage_used(loader);
        if (status != STATUS_OK) return status;
    }
    return STATUS_OK;
}

/* f16 from a seed: no blocks between. */
static enum status make_f16(struct loader *loader, const struct tensor *tensor, uint32_t name, __half *destination) {
    size_t count = (size_t)tensor->rows * tensor->cols;
    uint64_t key = random_mix(random_mix(loader->cuda->program->random_seed) ^ name);
    launch(make_random, grid_for(count), 256, 0, loader->cuda->stream, destination, count, key, sqrtf(3.0f / (float)tensor->cols));
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

/* A tensor into the part of its matrix that has its rows, the first of them `row`. */
static enum status load_tensor(struct loader *loader, const struct tensor *tensor, uint32_t name, const struct matrix *matrix, uint32_t row) {
    const struct matrix_part *part = matrix->parts;
    while (row >= part->first_row + part->rows) part++;
    uint32_t within = row - part->first_row;
    CHECK(part < matrix->parts + matrix->n_parts && tensor->cols == matrix->cols && tensor->rows <= part->rows - within);
    if (part->type != TENSOR_F16) {
        CHECK(part->type == tensor->type && within % NATIVE_ROWS == 0);
        return load_native(loader, tensor, name, (uint8_t *)part->data + native_bytes(native_form_of(part->type), within, matrix->cols));
    }
    __half *destination = (__half *)part->data + (size_t)within * matrix->cols;
    return (loader->cuda->program->random_seed ? make_f16 : load_f16)(loader, tensor, name, destination);
}

static enum status load_matrices(struct loader *loader, uint32_t index) {
    const struct phase *phase = &loader->cuda->program->phases[index];
    const struct matrix *matrix = matrix_of(loader->cuda, phase);
    const struct backend_limits *limits = &loader->cuda->limits;
    for (uint32_t w = 0, row = 0; w < TENSORS_A_PHASE; w++) {
        const struct tensor *tensor = &phase->weight[w];
        if (!tensor->data) continue;
        enum status status = load_tensor(loader, tensor, index * TENSORS_A_PHASE + w, matrix, row);
        if (status != STATUS_OK) return status;
        if (limits->drop_source_pages && loader->cuda->program->random_seed == 0) drop_pages(tensor);
        row += tensor->rows;
        loader->done += (uint64_t)tensor->rows * tensor->cols;
        if (limits->progress) limits->progress(limits->progress_context, (double)loader->done / (double)loader->total);
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
    return error_set(error, STATUS_UNSUPPORTED,
                     "%s%s holds a value that is not within +-65504, the range of 16-bit floats in which the cuda backend computes", layer, matrix);
}

static enum status load_all(struct loader *loader) {
    const struct program *p = loader->cuda->program;
    uint32_t unfit;
    CUDA_TRY(loader->error, cudaMemsetAsync(loader->unfit, 0xff, sizeof *loader->unfit, loader->cuda->stream));
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

struct embedding {
    enum native_form form;
    const void *data;
    uint32_t n_embd;
};

template <enum native_form FORM> static __device__ void embed_native(const uint8_t *tiles, uint32_t token, uint32_t n_embd, float *x) {
    const uint32_t steps = (n_embd + NATIVE_COLS - 1) / NATIVE_COLS;
    const uint8_t *band = tiles + (size_t)(token / NATIVE_ROWS) * steps * native_tile_bytes(FORM);
    for (uint32_t i = threadIdx.x; i < n_embd / 8; i += blockDim.x) { /* 8 columns: step, half, quarter of it */
        struct native_lane<FORM> lane;
        native_read<FORM>(lane, band + (size_t)(i / 8) * native_tile_bytes(FORM), token % 8 * 4 + i % 4);
        uint4 halves[2][2] = {{native_widen<FORM>(lane, 0, 0), native_widen<FORM>(lane, 0, 1)},
                              {native_widen<FORM>(lane, 1, 0), native_widen<FORM>(lane, 1, 1)}};
        const uint4 v = halves[i / 4 % 2][token / 8 % 2];
        const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
        for (uint32_t pair = 0; pair < 4; pair++) {
            float2 two = __half22float2(half2_of(pairs[pair]));
            x[i * 8 + pair * 2] = two.x;
            x[i * 8 + pair * 2 + 1] = two.y;
        }
    }
}

static __global__ void embed_rows(const struct step_header *header, const int32_t *tokens, const int32_t *drawn, const struct embedding e, float *x) {
    uint32_t row = blockIdx.x;
    if (row >= header->n_rows) return;
    const int32_t staged = tokens[row];
    const uint32_t token = (uint32_t)(staged < 0 ? drawn[-1 - staged] : staged); /* < 0: the step before drew it */
    x += (size_t)row * e.n_embd;
    switch (e.form) {
    case FORM_4: embed_native<FORM_4>((const uint8_t *)e.data, token, e.n_embd, x); break;
    case FORM_4_OFFSET: embed_native<FORM_4_OFFSET>((const uint8_t *)e.data, token, e.n_embd, x); break;
    case FORM_8: embed_native<FORM_8>((const uint8_t *)e.data, token, e.n_embd, x); break;
    case FORM_6: embed_native<FORM_6>((const uint8_t *)e.data, token, e.n_embd, x); break;
    default:
        for (uint32_t i = threadIdx.x; i < e.n_embd; i += blockDim.x) x[i] = __half2float(((const __half *)e.data)[(size_t)token * e.n_embd + i]);
    }
}

void weights_embed(struct cuda *cuda, const struct step_shape *shape) {
    const struct matrix *matrix = &cuda->embedding;
    CHECK(shape->rows > 0 && matrix->n_parts == 1);
    const struct embedding e = {.form = native_form_of(matrix->parts[0].type), .data = matrix->parts[0].data, .n_embd = matrix->cols};
    launch(embed_rows, shape->rows, 256, 0, cuda->stream, cuda->dev.header, cuda->dev.tokens, cuda->drawn, e, cuda->x);
    CUDA_CHECK(cudaGetLastError());
}
