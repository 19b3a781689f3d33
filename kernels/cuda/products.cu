/* Products of the step: out[row] = W in[row], W and in f16, sums in f32. Owns the cuBLASLt handle and the algorithms chosen so far; workspace and widened weights lie in the
 * backend's arena. Runs on the engine's thread and the backend's stream.
 *
 * Up to SKINNY_ROWS rows a product is skinny.cu's; more are cuBLASLt's, or broad.cu's when deterministic. Of native weights those two get some rows at a time, widened. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cublas.h"
#include "kernels/cuda/products.h"

extern "C" {
#include "base/random.h"
}

enum {
    ALGORITHMS = 1024, /* of cuBLASLt, remembered by shape: far more than a model has */
    PROBES = 8,
    ALIGNMENT = 256, /* of everything in an arena */
    CANDIDATES = 8,  /* algorithms that cuBLASLt is asked for */
    TRIED = 8,       /* matrices of a shape that they are timed on: together they are larger than the L2 cache where it matters */
};

/* ---- cuBLASLt ---- */

/* What an algorithm is chosen for. */
struct lt_shape {
    uint32_t rows, n, k, out_stride, out_alignment; /* rows: of a bucket; 0: none */
    enum product_out kind;
};

struct algorithm {
    struct lt_shape shape;
    bool usable; /* false: cuBLASLt has none, or broad.cu is faster */
    bool tuned;  /* the fastest, not the first guess */
    cublasLtMatmulAlgo_t algorithm;
};

struct product_device {
    struct skinny_device *skinny;
    cublasLtHandle_t handle;
    cudaEvent_t begin, end;                  /* of a timing */
    struct algorithm algorithms[ALGORITHMS]; /* by hash, PROBES places each */
};

static void check_lt(cublasStatus_t result, const char *what) {
    if (result == CUBLAS_STATUS_SUCCESS) return;
    char text[160];
    (void)snprintf(text, sizeof text, "%s: %s", what, cublas_lt()->GetStatusString(result));
    cuda_check(cudaErrorUnknown, text, __FILE__, __LINE__);
}

/* Row counts share an algorithm with the next of 32, 48, 64, 96, 128, ... */
static uint32_t bucket_of(uint32_t rows) {
    uint32_t bucket = 32;
    while (bucket < rows) bucket = bucket % 3 == 0 ? bucket / 3 * 4 : bucket / 2 * 3;
    return bucket;
}

static uint32_t element_bytes(enum product_out kind) { return kind == PRODUCT_F16 ? sizeof(__half) : sizeof(float); }

/* cuBLAS counts in columns: out^T [n][rows] = (W^T)^T [n][k] in^T [k][rows]; our rows are its columns. */
struct lt_problem {
    cublasLtMatmulDescOpaque_t operation;
    cublasLtMatrixLayoutOpaque_t w, in, out;
};

static void describe(struct lt_problem *problem, const struct lt_shape *shape, uint32_t rows) {
    const cublasOperation_t transposed = CUBLAS_OP_T;
    const cudaDataType_t out = shape->kind == PRODUCT_F16 ? CUDA_R_16F : CUDA_R_32F;
    check_lt(cublas_lt()->MatmulDescInit_internal(&problem->operation, sizeof problem->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescInit");
    check_lt(cublas_lt()->MatmulDescSetAttribute(&problem->operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed), "transposing");
    check_lt(cublas_lt()->MatrixLayoutInit_internal(&problem->w, sizeof problem->w, CUDA_R_16F, shape->k, shape->n, shape->k), "layout of weights");
    check_lt(cublas_lt()->MatrixLayoutInit_internal(&problem->in, sizeof problem->in, CUDA_R_16F, shape->k, rows, shape->k), "layout of activations");
    check_lt(cublas_lt()->MatrixLayoutInit_internal(&problem->out, sizeof problem->out, out, shape->n, rows, shape->out_stride), "layout of results");
}

/* What cuBLASLt thinks best first; how many. */
static uint32_t candidates(const struct product_device *products, const struct lt_shape *shape, cublasLtMatmulAlgo_t found[CANDIDATES]) {
    const uint64_t most = WORKSPACE_BYTES;
    const uint32_t alignment = shape->out_alignment, sums = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE; /* parts of a sum are added in f32, not in what is stored */
    const cublasLtMatmulPreferenceAttributes_t aligned[] = {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    struct lt_problem problem;
    cublasLtMatmulPreferenceOpaque_t preference;
    cublasLtMatmulHeuristicResult_t results[CANDIDATES];
    int returned = 0;
    describe(&problem, shape, shape->rows);
    check_lt(cublas_lt()->MatmulPreferenceInit_internal(&preference, sizeof preference), "cublasLtMatmulPreferenceInit");
    check_lt(cublas_lt()->MatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &most, sizeof most), "workspace");
    check_lt(cublas_lt()->MatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &sums, sizeof sums), "sums");
    for (int i = 0; i < 2; i++) check_lt(cublas_lt()->MatmulPreferenceSetAttribute(&preference, aligned[i], &alignment, sizeof alignment), "alignment");
    cublasStatus_t status = cublas_lt()->MatmulAlgoGetHeuristic(products->handle, &problem.operation, &problem.w, &problem.in, &problem.out, &problem.out,
                                                           &preference, CANDIDATES, results, &returned);
    uint32_t count = 0;
    for (int i = 0; status == CUBLAS_STATUS_SUCCESS && i < returned; i++)
        if (results[i].state == CUBLAS_STATUS_SUCCESS && results[i].workspaceSize <= WORKSPACE_BYTES) found[count++] = results[i].algo;
    return count;
}

static bool same_shape(const struct lt_shape *a, const struct lt_shape *b) {
    return a->rows == b->rows && a->n == b->n && a->k == b->k && a->out_stride == b->out_stride && a->out_alignment == b->out_alignment &&
           a->kind == b->kind;
}

/* The shape's entry; `known` says whether it was there. */
static struct algorithm *entry_for(struct product_device *products, const struct lt_shape *shape, bool *known) {
    uint64_t hash =
        random_at((uint64_t)shape->rows << 32 | shape->n, shape->k, (uint64_t)shape->out_stride << 32 | shape->out_alignment, shape->kind);
    struct algorithm *entry = NULL;
    for (uint32_t i = 0; i < PROBES; i++) {
        entry = &products->algorithms[(hash + i) % ALGORITHMS];
        *known = same_shape(&entry->shape, shape);
        if (*known) return entry;
        if (entry->shape.rows == 0) break;
    } /* all taken: the last one looked at is forgotten */
    entry->shape = *shape;
    entry->tuned = false;
    return entry;
}

static struct lt_shape shape_of(const struct product_call *call) {
    struct lt_shape shape = {
        .rows = bucket_of(call->rows), .n = call->n, .k = call->k, .out_stride = call->out_stride, .out_alignment = ALIGNMENT, .kind = call->kind};
    while ((uintptr_t)call->out % shape.out_alignment != 0) shape.out_alignment /= 2;
    return shape;
}

/* false: not with this number of rows, where the algorithm was chosen for the bucket's; nothing was launched. */
static bool lt_launch(struct cuda *cuda, const struct lt_shape *shape, const cublasLtMatmulAlgo_t *algorithm, const struct product_call *call) {
    struct lt_problem problem;
    const float one = 1, beta = call->kind == PRODUCT_ADD_F32 ? 1 : 0;
    describe(&problem, shape, call->rows);
    cublasStatus_t result =
        cublas_lt()->Matmul(cuda->products->handle, &problem.operation, &one, call->w, &problem.w, call->in, &problem.in, &beta, call->out, &problem.out,
                       call->out, &problem.out, algorithm, cuda->workspace, WORKSPACE_BYTES, cuda->stream);
    if (result == CUBLAS_STATUS_NOT_SUPPORTED || result == CUBLAS_STATUS_INVALID_VALUE) return false;
    check_lt(result, "cublasLtMatmul");
    return true;
}

/* false: cuBLASLt cannot, or slower than broad.cu. Calls nothing that a capture forbids, once its kernel is loaded. */
static bool lt_run(struct cuda *cuda, const struct product_call *call) {
    const struct lt_shape shape = shape_of(call);
    bool known;
    struct algorithm *entry = entry_for(cuda->products, &shape, &known);
    if (!known) {
        cublasLtMatmulAlgo_t found[CANDIDATES];
        entry->usable = candidates(cuda->products, &shape, found) > 0;
        if (entry->usable) entry->algorithm = found[0];
    }
    return entry->usable && lt_launch(cuda, &shape, &entry->algorithm, call);
}

/* Seconds of all calls with an algorithm, NULL: broad.cu; the better of two passes after a first. */
static double seconds_with(struct cuda *cuda, const struct lt_shape *shape, const cublasLtMatmulAlgo_t *algorithm, const struct product_call *calls,
                           uint32_t count) {
    float best = INFINITY;
    for (int pass = 0; pass < 3; pass++) {
        float ms;
        CUDA_CHECK(cudaEventRecord(cuda->products->begin, cuda->stream));
        for (uint32_t i = 0; i < count; i++) {
            if (!algorithm)
                broad_run(cuda, &calls[i]);
            else if (!lt_launch(cuda, shape, algorithm, &calls[i]))
                return INFINITY;
        }
        CUDA_CHECK(cudaEventRecord(cuda->products->end, cuda->stream));
        CUDA_CHECK(cudaEventSynchronize(cuda->products->end));
        CUDA_CHECK(cudaEventElapsedTime(&ms, cuda->products->begin, cuda->products->end));
        if (pass > 0 && ms < best) best = ms;
    }
    return best;
}

void products_tune(struct cuda *cuda, const struct product_call *calls, uint32_t count) {
    const struct lt_shape shape = shape_of(&calls[0]);
    cublasLtMatmulAlgo_t found[CANDIDATES];
    bool known;
    struct algorithm *entry = entry_for(cuda->products, &shape, &known);
    if (known && entry->tuned) return;
    entry->tuned = true;
    entry->usable = false;
    double best = seconds_with(cuda, &shape, NULL, calls, count);
    for (uint32_t i = 0, n = candidates(cuda->products, &shape, found); i < n; i++) {
        double seconds = seconds_with(cuda, &shape, &found[i], calls, count);
        if (seconds >= best) continue;
        best = seconds;
        entry->algorithm = found[i];
        entry->usable = true;
    }
}

/* ---- native weights as f16 ---- */

/* A thread a lane of a tile: rows g and g + 8, eight columns of each half. */
template <enum native_form FORM> static __global__ void widen_tiles(const uint8_t *tiles, uint32_t rows, uint32_t k, __half *out) {
    const uint32_t steps = (k + NATIVE_COLS - 1) / NATIVE_COLS, index = blockIdx.x * blockDim.x + threadIdx.x, lane = index % 32;
    const uint32_t band = index / 32 / steps, step = index / 32 % steps;
    if (band * NATIVE_ROWS >= rows) return;
    struct native_lane<FORM> native;
    native_read<FORM>(native, tiles + (size_t)(index / 32) * native_tile_bytes(FORM), lane);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t row = band * NATIVE_ROWS + (uint32_t)i % 2 * 8 + lane / 4, column = step * NATIVE_COLS + (uint32_t)i / 2 * 32 + lane % 4 * 8;
        if (row < rows && column < k) *(uint4 *)(out + (size_t)row * k + column) = native_widen<FORM>(native, i / 2, i % 2);
    }
}

static void widen(const struct cuda *cuda, enum native_form form, const uint8_t *tiles, uint32_t rows, uint32_t k) {
    const uint32_t blocks = div_up(div_up(rows, NATIVE_ROWS) * div_up(k, NATIVE_COLS) * 32, 256);
    switch (form) {
    case FORM_4: launch(widen_tiles<FORM_4>, blocks, 256, 0, cuda->stream, tiles, rows, k, cuda->widened); break;
    case FORM_4_OFFSET: launch(widen_tiles<FORM_4_OFFSET>, blocks, 256, 0, cuda->stream, tiles, rows, k, cuda->widened); break;
    case FORM_8: launch(widen_tiles<FORM_8>, blocks, 256, 0, cuda->stream, tiles, rows, k, cuda->widened); break;
    case FORM_6: launch(widen_tiles<FORM_6>, blocks, 256, 0, cuda->stream, tiles, rows, k, cuda->widened); break;
    default: CHECK(!"a native form");
    }
    CUDA_CHECK(cudaGetLastError());
}

/* ---- which way ---- */

static void many_rows(struct cuda *cuda, const struct product_call *call) {
    if (cuda->deterministic || !lt_run(cuda, call)) broad_run(cuda, call);
}

/* Slices of W's rows, as many as `widened` holds. */
static void many_rows_native(struct cuda *cuda, const struct product_call *call) {
    const uint32_t most = (uint32_t)(WIDENED_BYTES / sizeof(__half) / call->k / NATIVE_ROWS * NATIVE_ROWS);
    CHECK(most > 0 && cuda->widened);
    for (uint32_t first = 0; first < call->n; first += most) {
        struct product_call slice = *call;
        slice.form = FORM_F16;
        slice.w = cuda->widened;
        slice.n = call->n - first < most ? call->n - first : most;
        slice.out = (uint8_t *)call->out + (size_t)first * element_bytes(call->kind);
        widen(cuda, call->form, (const uint8_t *)call->w + native_bytes(call->form, first, call->k), slice.n, call->k);
        many_rows(cuda, &slice);
    }
}

static struct product_call call_of(const struct matrix *w, uint32_t part, const __half *in, uint32_t rows, void *out, enum product_out kind) {
    return {.form = native_form_of(w->parts[part].type),
            .w = w->parts[part].data,
            .in = in,
            .out = (uint8_t *)out + (size_t)w->parts[part].first_row * element_bytes(kind),
            .n = w->parts[part].rows,
            .k = w->cols,
            .rows = rows,
            .out_stride = w->rows,
            .kind = kind};
}

void product(struct cuda *cuda, const struct matrix *w, const __half *in, uint32_t rows, void *out, enum product_out kind) {
    CHECK(rows > 0 && w->n_parts > 0 && w->cols > 0 && w->cols % 8 == 0 && in && out);
    for (uint32_t i = 0; i < w->n_parts; i++) {
        const struct product_call call = call_of(w, i, in, rows, out, kind);
        if (rows <= SKINNY_ROWS)
            skinny_run(cuda, cuda->products->skinny, &call);
        else if (call.form == FORM_F16)
            many_rows(cuda, &call);
        else
            many_rows_native(cuda, &call);
    }
}

/* ---- life ---- */

static bool any_native(const struct cuda *cuda) {
    bool any = cuda->head.type != TENSOR_F16;
    for (uint32_t i = 0; i < cuda->program->n_layers; i++) {
        const struct device_layer *layer = &cuda->layers[i];
        any |= layer->qkv.type != TENSOR_F16 || layer->o.type != TENSOR_F16 || layer->gate_up.type != TENSOR_F16 || layer->down.type != TENSOR_F16;
    }
    return any;
}

void products_lay_out(struct cuda *cuda, struct device_arena *arena) {
    cuda->workspace = (uint8_t *)device_take(arena, WORKSPACE_BYTES, 1);
    cuda->widened = any_native(cuda) ? (__half *)device_take(arena, WIDENED_BYTES, 1) : NULL;
}

enum status products_open(struct cuda *cuda, struct error *error) {
    cuda->products = (struct product_device *)check_calloc(1, sizeof *cuda->products);
    cublasStatus_t result = cublas_lt()->Create(&cuda->products->handle);
    if (result != CUBLAS_STATUS_SUCCESS) {
        cuda->products->handle = NULL;
        return error_set(error, STATUS_DEVICE, "cuBLASLt: %s", cublas_lt()->GetStatusString(result));
    }
    CUDA_TRY(error, cudaEventCreate(&cuda->products->begin));
    CUDA_TRY(error, cudaEventCreate(&cuda->products->end));
    enum status status = skinny_open(cuda, &cuda->products->skinny, error);
    return status == STATUS_OK ? broad_open(error) : status;
}

void products_close(struct cuda *cuda) {
    if (!cuda->products) return;
    if (cuda->products->handle) (void)cublas_lt()->Destroy(cuda->products->handle);
    if (cuda->products->begin) (void)cudaEventDestroy(cuda->products->begin);
    if (cuda->products->end) (void)cudaEventDestroy(cuda->products->end);
    free(cuda->products->skinny);
    free(cuda->products);
    cuda->products = NULL;
}

/* One of the products of a layer, for all layers; the head's `matrix` is its only one. */
static void warm(struct cuda *cuda, const struct matrix *first, size_t stride, uint32_t count, const __half *in, uint32_t rows, void *out,
                 enum product_out kind) {
    struct product_call calls[TRIED];
    uint32_t n = 0;
    for (uint32_t i = 0; i < count && n < TRIED; i++) {
        const struct matrix *matrix = (const struct matrix *)(const void *)((const uint8_t *)first + i * stride);
        if (matrix->type == TENSOR_F16) calls[n++] = call_of(matrix, 0, in, rows, out, kind);
    }
    if (n > 0 && rows > SKINNY_ROWS && !cuda->deterministic) products_tune(cuda, calls, n);
    for (uint32_t i = 0; i < count; i++) /* layers may differ in their types */
        product(cuda, (const struct matrix *)(const void *)((const uint8_t *)first + i * stride), in, rows, out, kind);
}

void products_warm(struct cuda *cuda, uint32_t rows) {
    const uint32_t head_rows = rows < cuda->max_head_rows ? rows : cuda->max_head_rows, n = cuda->program->n_layers;
    const struct device_layer *layer = &cuda->layers[0];
    warm(cuda, &layer->qkv, sizeof *layer, n, cuda->h, rows, cuda->qkv, PRODUCT_F32);
    warm(cuda, &layer->o, sizeof *layer, n, cuda->a, rows, cuda->x, PRODUCT_ADD_F32);
    warm(cuda, &layer->gate_up, sizeof *layer, n, cuda->h, rows, cuda->gate_up, PRODUCT_F16);
    warm(cuda, &layer->down, sizeof *layer, n, cuda->g, rows, cuda->x, PRODUCT_ADD_F32);
    if (head_rows > 0) warm(cuda, &cuda->head, 0, 1, cuda->head_h, head_rows, cuda->logits, PRODUCT_F32);
}
