/* Weights and products of the CUDA backend on a device, without the rest of it.
 *   --check  weights of every tensor type against tensor.c, bit for bit; products of odd and even shapes against sums in double; which rows must agree bit for bit
 *   --check-few  small products of that alone: for a device that is slow (tests/host_device)
 *   --bench  the shapes of an 8B and of a 135M model: time, bytes, their rate beside that of a copy within the device
 * Exit status 1: a result is wrong. Inputs are random, results are poisoned before. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/products.h"

extern "C" {
#include "base/half.h"
#include "base/random.h"
#include "tests/support/tiny_program.h"
}

enum { ROWS_MAX = 320, SHOWN = 5 };

static uint32_t failures;
static bool few;

/* The first few are printed with their places, the rest counted. */
static bool shown(uint32_t *count) {
    failures++;
    return (*count)++ < SHOWN;
}

static void open_device(struct cuda *cuda) {
    struct error error;
    memset(cuda, 0, sizeof *cuda);
    CUDA_CHECK(cudaGetDeviceProperties(&cuda->properties, 0));
    CUDA_CHECK(cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking));
    CUDA_CHECK(cudaMalloc((void **)&cuda->workspace, WORKSPACE_BYTES));
    CUDA_CHECK(cudaMalloc((void **)&cuda->widened, WIDENED_BYTES));
    if (products_open(cuda, &error) != STATUS_OK) {
        fprintf(stderr, "%s\n", error.text);
        exit(1);
    }
}

static void close_device(struct cuda *cuda) {
    products_close(cuda);
    CUDA_CHECK(cudaFree(cuda->widened));
    CUDA_CHECK(cudaFree(cuda->workspace));
    CUDA_CHECK(cudaStreamDestroy(cuda->stream));
}

static struct matrix matrix_f16(uint32_t rows, uint32_t cols, void *data) {
    struct matrix matrix = {.type = TENSOR_F16, .rows = rows, .cols = cols, .n_parts = 1, .parts = {}};
    matrix.parts[0] = {.type = TENSOR_F16, .first_row = 0, .rows = rows, .data = data};
    return matrix;
}

static void *device_copy(const void *host, size_t bytes) {
    void *device;
    CUDA_CHECK(cudaMalloc(&device, bytes));
    CUDA_CHECK(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice));
    return device;
}

/* ---- weights ---- */

static void check_matrix(const char *what, const struct matrix *matrix, const struct tensor *tensors, uint32_t count) {
    uint32_t wrong = 0, row = 0;
    float *row_f32 = (float *)check_calloc(matrix->cols, sizeof *row_f32);
    uint16_t *got = (uint16_t *)check_calloc((size_t)matrix->rows * matrix->cols, sizeof *got);
    CHECK(matrix->type == TENSOR_F16 && matrix->n_parts == 1);
    CUDA_CHECK(cudaMemcpy(got, matrix->parts[0].data, (size_t)matrix->rows * matrix->cols * sizeof *got, cudaMemcpyDeviceToHost));
    for (uint32_t t = 0; t < count; t++)
        for (uint32_t r = 0; r < tensors[t].rows; r++, row++) {
            tensor_row_f32(&tensors[t], r, row_f32);
            for (uint32_t c = 0; c < matrix->cols; c++) {
                uint16_t want = f16_from_float(row_f32[c]), is = got[(size_t)row * matrix->cols + c];
                if (want != is && shown(&wrong))
                    printf("WRONG %s, type %s: row %u column %u is %04x, expected %04x\n", what, tensor_type_info(tensors[t].type)->name, row, c, is,
                           want);
            }
        }
    if (row != matrix->rows && shown(&wrong)) printf("WRONG %s: %u rows, expected %u\n", what, matrix->rows, row);
    free(got);
    free(row_f32);
}

static void check_vector(const char *what, const float *device, const struct tensor *tensor) {
    uint32_t wrong = 0;
    if (!tensor->data) {
        if (device && shown(&wrong)) printf("WRONG %s: present without a tensor\n", what);
        return;
    }
    float *want = (float *)check_calloc(tensor->cols, sizeof *want), *got = (float *)check_calloc(tensor->cols, sizeof *got);
    tensor_row_f32(tensor, 0, want);
    CUDA_CHECK(cudaMemcpy(got, device, tensor->cols * sizeof *got, cudaMemcpyDeviceToHost));
    for (uint32_t i = 0; i < tensor->cols; i++)
        if (memcmp(&want[i], &got[i], sizeof *got) != 0 && shown(&wrong))
            printf("WRONG %s: element %u is %g, expected %g\n", what, i, (double)got[i], (double)want[i]);
    free(got);
    free(want);
}

/* Loads the program; the arena is returned. */
static void *load_weights(struct cuda *cuda, const struct program *program, bool native, enum status expected) {
    struct error error = {};
    struct device_arena arena = {};
    cuda->program = program;
    cuda->limits.weights = native ? WEIGHTS_NATIVE : WEIGHTS_F16;
    cuda->layers = (struct device_layer *)check_calloc(program->n_layers, sizeof *cuda->layers);
    weights_lay_out(cuda, &arena);
    if (arena.used != weights_bytes(program, native)) {
        failures++;
        printf("WRONG weights_bytes: %zu, laid out %zu\n", weights_bytes(program, native), arena.used);
    }
    CUDA_CHECK(cudaMalloc((void **)&arena.base, arena.used));
    CUDA_CHECK(cudaMemset(arena.base, 0xff, arena.used));
    CUDA_CHECK(cudaDeviceSynchronize());
    arena.used = 0;
    weights_lay_out(cuda, &arena);
    enum status status = weights_load(cuda, &error);
    if (status != expected) {
        failures++;
        printf("WRONG weights_load: %s %s\n", status_name(status), error.text);
    }
    if (status != STATUS_OK) printf("refused, as it must be: %s\n", error.text);
    return arena.base;
}

static void unload_weights(struct cuda *cuda, void *arena) {
    CUDA_CHECK(cudaFree(arena));
    free(cuda->layers);
    cuda->layers = NULL;
    cuda->embedding = cuda->head = (struct matrix){};
    cuda->head_norm = NULL;
}

/* Rows of the embedding; `loose`: of a type whose scales are rounded on the device. */
static void check_embedding(struct cuda *cuda, const struct tensor *tensor, bool loose) {
    uint32_t n = tensor->rows, k = tensor->cols, wrong = 0;
    struct step_header header = {.n_rows = n};
    int32_t *tokens = (int32_t *)check_calloc(n, sizeof *tokens);
    float *want = (float *)check_calloc(k, sizeof *want), *got = (float *)check_calloc((size_t)(n + 1) * k, sizeof *got);
    for (uint32_t i = 0; i < n; i++) tokens[i] = (int32_t)(i * 5 % n);
    cuda->dev.header = (struct step_header *)device_copy(&header, sizeof header);
    cuda->dev.tokens = (int32_t *)device_copy(tokens, n * sizeof *tokens);
    memset(got, 0xff, (size_t)(n + 1) * k * sizeof *got);
    cuda->x = (float *)device_copy(got, (size_t)(n + 1) * k * sizeof *got);
    struct step_shape shape = {.rows = n + 1}; /* the grid is larger than the step */
    weights_embed(cuda, &shape);
    CUDA_CHECK(cudaStreamSynchronize(cuda->stream));
    CUDA_CHECK(cudaMemcpy(got, cuda->x, (size_t)(n + 1) * k * sizeof *got, cudaMemcpyDeviceToHost));
    for (uint32_t i = 0; i < n; i++) {
        float largest = 0;
        tensor_row_f32(tensor, (uint32_t)tokens[i], want);
        for (uint32_t c = 0; c < k; c++) largest = fmaxf(largest, fabsf(want[c]));
        for (uint32_t c = 0; c < k; c++) {
            float x = got[(size_t)i * k + c], exact = float_from_f16(f16_from_float(want[c]));
            if (!(fabsf(x - exact) <= (loose ? largest * 0x1p-9f : 0)) && shown(&wrong))
                printf("WRONG embedding, type %s: token %d column %u is %g, expected %g\n", tensor_type_info(tensor->type)->name, tokens[i], c,
                       (double)x, (double)exact);
        }
    }
    for (uint32_t c = 0; c < k; c++)
        if (!isnan(got[(size_t)n * k + c]) && shown(&wrong)) printf("WRONG embedding: column %u past the last row was written\n", c);
    CUDA_CHECK(cudaFree(cuda->x));
    CUDA_CHECK(cudaFree(cuda->dev.tokens));
    CUDA_CHECK(cudaFree(cuda->dev.header));
    free(got);
    free(want);
    free(tokens);
}

static void check_program(struct cuda *cuda, const struct tiny_shape *shape) {
    struct program *program = tiny_program_new(shape);
    void *arena = load_weights(cuda, program, false, STATUS_OK);
    check_matrix("embedding", &cuda->embedding, &program->phases[0].weight[0], 1);
    for (uint32_t i = 0; i < shape->n_layers; i++) {
        const struct phase *phases = &program->phases[1 + 5 * i];
        const struct device_layer *layer = &cuda->layers[i];
        check_matrix("qkv", &layer->qkv, phases[0].weight, 3);
        check_matrix("o", &layer->o, phases[2].weight, 1);
        check_matrix("gate_up", &layer->gate_up, phases[3].weight, 2);
        check_matrix("down", &layer->down, phases[4].weight, 1);
        check_vector("attention norm", layer->attention_norm, &phases[0].norm);
        check_vector("MLP norm", layer->mlp_norm, &phases[3].norm);
        check_vector("q norm", layer->q_norm, &phases[0].q_norm);
        check_vector("k norm", layer->k_norm, &phases[0].k_norm);
        for (uint32_t w = 0, at = 0; w < 3; at += phases[0].weight[w++].rows)
            check_vector("bias", layer->qkv_bias ? layer->qkv_bias + at : NULL, &phases[0].bias[w]);
    }
    check_embedding(cuda, &program->phases[0].weight[0], false);
    const struct phase *head = &program->phases[program->n_phases - 1];
    check_matrix("head", &cuda->head, head->weight, 1);
    check_vector("head norm", cuda->head_norm, &head->norm);
    if (program->tied_head != (cuda->embedding.parts[0].data == cuda->head.parts[0].data)) {
        failures++;
        printf("WRONG embedding and head: one matrix if and only if they are tied\n");
    }
    unload_weights(cuda, arena);
    tiny_program_free(program);
}

/* Weights made on the device: the same for the same seed, others for another, of the deviation promised. */
static void check_random(struct cuda *cuda) {
    struct tiny_shape shape = tiny_shape_default();
    struct program *program = tiny_program_new(&shape);
    const uint64_t seeds[3] = {7, 7, 8};
    size_t count = (size_t)shape.n_ff * 2 * shape.n_embd;
    uint16_t *made[3];
    for (int i = 0; i < 3; i++) {
        program->random_seed = seeds[i];
        void *arena = load_weights(cuda, program, false, STATUS_OK);
        made[i] = (uint16_t *)check_calloc(count, sizeof **made);
        CUDA_CHECK(cudaMemcpy(made[i], cuda->layers[1].gate_up.parts[0].data, count * sizeof **made, cudaMemcpyDeviceToHost));
        unload_weights(cuda, arena);
    }
    double sum = 0, squares = 0;
    for (size_t i = 0; i < count; i++) {
        double x = (double)float_from_f16(made[0][i]);
        sum += x;
        squares += x * x;
    }
    double mean = sum / (double)count, deviation = sqrt(squares / (double)count - mean * mean), wanted = 1 / sqrt(shape.n_embd);
    bool same = memcmp(made[0], made[1], count * sizeof **made) == 0, other = memcmp(made[0], made[2], count * sizeof **made) != 0;
    if (!same || !other || fabs(mean) > wanted / 20 || fabs(deviation - wanted) > wanted / 20) {
        failures++;
        printf("WRONG random weights: same seed %d, other seed differs %d, mean %g, deviation %g, expected 0 and %g\n", same, other, mean, deviation,
               wanted);
    }
    for (int i = 0; i < 3; i++) free(made[i]);
    tiny_program_free(program);
}

/* The last weight of layer 1's v is the largest that rounds to one f16 holds; then the smallest that does not; then no number at all. */
static void check_refusal(struct cuda *cuda) {
    struct tiny_shape shape = tiny_shape_default();
    struct program *program = tiny_program_new(&shape), changed = *program;
    struct phase *phases = (struct phase *)check_calloc(program->n_phases, sizeof *phases);
    struct tensor *v = &phases[6].weight[WEIGHT_V];
    memcpy(phases, program->phases, program->n_phases * sizeof *phases);
    float *values = (float *)check_calloc(1, tensor_bytes(v));
    size_t last = (size_t)v->rows * v->cols - 1;
    memcpy(values, v->data, tensor_bytes(v));
    v->data = values;
    changed.phases = phases;
    values[last] = 65519.0f;
    unload_weights(cuda, load_weights(cuda, &changed, false, STATUS_OK));
    static const float unfit[] = {-65520.0f, INFINITY, NAN};
    for (float value : unfit) {
        values[last] = value;
        unload_weights(cuda, load_weights(cuda, &changed, false, STATUS_UNSUPPORTED));
    }
    free(values);
    free(phases);
    tiny_program_free(program);
}

static void check_weights(struct cuda *cuda) {
    for (int type = 0; type < TENSOR_TYPES; type++) {
        struct tiny_shape shape = tiny_shape_default();
        shape.seed = 100 + (uint64_t)type;
        shape.type = (enum tensor_type)type;
        shape.n_embd = 256;
        shape.n_heads = 8;
        shape.n_kv_heads = 4;
        shape.n_ff = 512;
        shape.n_vocab = 67;
        shape.biases = type % 2 == 0;
        shape.qk_norms = type % 3 == 0;
        shape.tied_head = type % 2 == 1;
        shape.misaligned = type % 4 >= 2;
        check_program(cuda, &shape);
    }
    struct tiny_shape mixed = tiny_shape_default();
    mixed.mixed_types = true;
    mixed.n_embd = 512;
    mixed.n_ff = 256;
    mixed.n_vocab = 9000; /* several stages */
    check_program(cuda, &mixed);
    struct tiny_shape odd = tiny_shape_default();
    odd.n_embd = 40;
    odd.n_ff = 56;
    odd.head_dim = 8;
    odd.type = TENSOR_F16;
    check_program(cuda, &odd);
    check_random(cuda);
}

/* ---- products ---- */

struct subject {
    const char *name;
    uint32_t n, k;
    uint16_t *in;         /* [ROWS_MAX][k] */
    double *want, *bound; /* [ROWS_MAX][n]: sums of w x, and by how much they may differ */
    float *before;        /* [ROWS_MAX][n]: what PRODUCT_ADD_F32 adds to */
    struct matrix matrix;
    uint16_t *in_device;
    void *out_device;
};

static float random_value(struct random *random) { return 2 * random_unit(random_next(random)) - 1; }

/* w: [n][k], what the matrix stands for. weight_error: how far the device's weights may be from it, relative to the largest of the row. */
static void make_subject(struct subject *s, const char *name, const struct matrix *matrix, const float *w, double weight_error) {
    const uint32_t n = matrix->rows, k = matrix->cols;
    struct random random = {.state = (uint64_t)n << 32 | k};
    *s = {.name = name, .n = n, .k = k};
    s->matrix = *matrix;
    s->in = (uint16_t *)check_calloc((size_t)ROWS_MAX * k, sizeof *s->in);
    s->want = (double *)check_calloc((size_t)ROWS_MAX * n, sizeof *s->want);
    s->bound = (double *)check_calloc((size_t)ROWS_MAX * n, sizeof *s->bound);
    s->before = (float *)check_calloc((size_t)ROWS_MAX * n, sizeof *s->before);
    float *in = (float *)check_calloc((size_t)ROWS_MAX * k, sizeof *in);
    for (size_t i = 0; i < (size_t)ROWS_MAX * k; i++) in[i] = float_from_f16(s->in[i] = f16_from_float(random_value(&random)));
    for (size_t i = 0; i < (size_t)ROWS_MAX * n; i++) s->before[i] = 10 * random_value(&random);
    for (uint32_t out = 0; out < n; out++) {
        double largest = 0;
        for (uint32_t i = 0; i < k; i++) largest = fmax(largest, fabs((double)w[(size_t)out * k + i]));
        for (uint32_t row = 0; row < ROWS_MAX; row++) {
            double sum[4] = {}, size[4] = {};
            for (uint32_t i = 0; i < k; i++) {
                double x = (double)in[(size_t)row * k + i], term = (double)w[(size_t)out * k + i] * x;
                sum[i % 4] += term;
                size[i % 4] += fabs(term) * 0x1p-17 + fabs(x) * largest * weight_error; /* f32 sums in blocks, each step cut, not rounded; weights */
            }
            s->want[(size_t)row * n + out] = sum[0] + sum[1] + sum[2] + sum[3];
            s->bound[(size_t)row * n + out] = size[0] + size[1] + size[2] + size[3];
        }
    }
    free(in);
    CUDA_CHECK(cudaMalloc((void **)&s->in_device, (size_t)ROWS_MAX * k * sizeof *s->in));
    CUDA_CHECK(cudaMalloc(&s->out_device, (size_t)ROWS_MAX * n * sizeof(float)));
}

/* Random f16 weights, uniform to +-scale. The matrix is the caller's to free. */
static void make_f16_subject(struct subject *s, uint32_t n, uint32_t k, float scale) {
    struct random random = {.state = (uint64_t)k << 32 | n};
    uint16_t *bits = (uint16_t *)check_calloc((size_t)n * k, sizeof *bits);
    float *w = (float *)check_calloc((size_t)n * k, sizeof *w);
    for (size_t i = 0; i < (size_t)n * k; i++) w[i] = float_from_f16(bits[i] = f16_from_float(random_value(&random) * scale));
    struct matrix matrix = matrix_f16(n, k, device_copy(bits, (size_t)n * k * sizeof *bits));
    make_subject(s, "F16", &matrix, w, 0);
    free(w);
    free(bits);
}

static void free_subject(struct subject *s) {
    CUDA_CHECK(cudaFree(s->out_device));
    CUDA_CHECK(cudaFree(s->in_device));
    free(s->before);
    free(s->bound);
    free(s->want);
    free(s->in);
}

static const char *const kind_names[] = {"f32", "f16", "f32 +="};

/* Runs it; *results is [ROWS_MAX][n] of float or half, as the device has it: poison where nothing was written. */
static void run_product(struct cuda *cuda, const struct subject *s, uint32_t rows, enum product_out kind, uint8_t *results) {
    size_t out_bytes = (size_t)ROWS_MAX * s->n * sizeof(float), in_row = s->k * sizeof *s->in;
    CUDA_CHECK(cudaMemset(s->in_device, 0xff, ROWS_MAX * in_row)); /* not a number: rows that are not there must not be seen */
    CUDA_CHECK(cudaMemcpy(s->in_device, s->in, rows * in_row, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemset(s->out_device, 0xff, out_bytes));
    if (kind == PRODUCT_ADD_F32) CUDA_CHECK(cudaMemcpy(s->out_device, s->before, (size_t)rows * s->n * sizeof(float), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaDeviceSynchronize());
    product(cuda, &s->matrix, (const __half *)s->in_device, rows, s->out_device, kind);
    CUDA_CHECK(cudaStreamSynchronize(cuda->stream));
    CUDA_CHECK(cudaMemcpy(results, s->out_device, out_bytes, cudaMemcpyDeviceToHost));
}

static double result_at(const uint8_t *results, enum product_out kind, size_t at) {
    if (kind == PRODUCT_F16) return (double)float_from_f16(((const uint16_t *)(const void *)results)[at]);
    return (double)((const float *)(const void *)results)[at];
}

static void check_product(struct cuda *cuda, const struct subject *s, uint32_t rows, enum product_out kind, uint8_t *results, double *worst) {
    uint32_t wrong = 0;
    size_t out_bytes = kind == PRODUCT_F16 ? sizeof(uint16_t) : sizeof(float), end = (size_t)(rows + 63) / 64 * 64 * s->n * out_bytes;
    run_product(cuda, s, rows, kind, results);
    for (size_t i = 0; i < (size_t)rows * s->n; i++) {
        double want = s->want[i] + (kind == PRODUCT_ADD_F32 ? (double)s->before[i] : 0), got = result_at(results, kind, i);
        /* of the sum, then of what is stored */
        double bound = s->bound[i] + fabs(want) * (kind == PRODUCT_F16 ? 0x1p-10 : 0x1p-22) + (kind == PRODUCT_F16 ? 0x1p-24 : 0);
        if (fabs(got - want) / bound > *worst) *worst = fabs(got - want) / bound;
        if (!(fabs(got - want) <= bound) && shown(&wrong))
            printf("WRONG product %s %ux%u, %u rows, %s%s: row %zu, output %zu is %.9g, expected %.9g +- %.3g\n", s->name, s->n, s->k, rows,
                   kind_names[kind], cuda->deterministic ? ", deterministic" : "", i / s->n, i % s->n, got, want, bound);
    }
    for (size_t i = end; i < (size_t)ROWS_MAX * s->n * sizeof(float); i++)
        if (results[i] != 0xff && shown(&wrong))
            printf("WRONG product %s %ux%u, %u rows, %s: byte %zu past the rows was written\n", s->name, s->n, s->k, rows, kind_names[kind], i - end);
    if (wrong > SHOWN) printf("      ... %u in all\n", wrong);
}

/* The first rows of `results` equal those of `one`, bit for bit. */
static void check_bits(const struct cuda *cuda, const struct subject *s, uint32_t rows, enum product_out kind, const uint8_t *one,
                       const uint8_t *results) {
    uint32_t wrong = 0;
    size_t each = kind == PRODUCT_F16 ? sizeof(uint16_t) : sizeof(float);
    for (size_t i = 0; i < (size_t)rows * s->n; i++)
        if (memcmp(one + i * each, results + i * each, each) != 0 && shown(&wrong))
            printf("WRONG product %s %ux%u, %s%s: with %u rows, row %zu output %zu is %.9g; with all, %.9g\n", s->name, s->n, s->k, kind_names[kind],
                   cuda->deterministic ? ", deterministic" : "", rows, i / s->n, i % s->n, result_at(results, kind, i), result_at(one, kind, i));
    if (wrong > SHOWN) printf("      ... %u in all\n", wrong);
}

static const uint32_t row_counts[] = {300, 97, 64, 33, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1};

/* Every kind and number of rows, and which bits agree. */
static void check_subject(struct cuda *cuda, const struct subject *s) {
    double worst = 0;
    uint32_t before = failures;
    size_t bytes = (size_t)ROWS_MAX * s->n * sizeof(float);
    uint8_t *results = (uint8_t *)check_calloc(bytes, 1), *all = (uint8_t *)check_calloc(bytes, 1);
    for (int deterministic = 0; deterministic < 2; deterministic++)
        for (int kind = 0; kind < 3; kind++) {
            cuda->deterministic = deterministic;
            for (size_t i = 0; i < sizeof row_counts / sizeof *row_counts; i++) {
                uint32_t rows = row_counts[i];
                check_product(cuda, s, rows, (enum product_out)kind, results, &worst);
                bool same = deterministic ? i > 0 : rows < SKINNY_ROWS;
                if (same) check_bits(cuda, s, rows, (enum product_out)kind, all, results);
                if (i == 0 || (!deterministic && rows == SKINNY_ROWS)) memcpy(all, results, bytes);
            }
        }
    cuda->deterministic = false;
    printf("%s product %s %u x %u: largest error %.3f of its bound\n", failures == before ? "ok   " : "WRONG", s->name, s->n, s->k, worst);
    free(all);
    free(results);
}

static void check_shape(struct cuda *cuda, uint32_t n, uint32_t k) {
    struct subject s;
    make_f16_subject(&s, n, k, 1);
    check_subject(cuda, &s);
    CUDA_CHECK(cudaFree(s.matrix.parts[0].data));
    free_subject(&s);
}

static void check_native_matrix(struct cuda *cuda, const struct matrix *matrix, const struct tensor *tensors, uint32_t count) {
    struct subject s;
    float *w = (float *)check_calloc((size_t)matrix->rows * matrix->cols, sizeof *w);
    for (uint32_t t = 0, row = 0; t < count; t++)
        for (uint32_t r = 0; r < tensors[t].rows; r++, row++) tensor_row_f32(&tensors[t], r, w + (size_t)row * matrix->cols);
    make_subject(&s, tensor_type_info(matrix->type)->name, matrix, w, 0x1p-10);
    check_subject(cuda, &s);
    free_subject(&s);
    free(w);
}

static void check_native_program(struct cuda *cuda, const struct tiny_shape *shape) {
    struct program *program = tiny_program_new(shape);
    void *arena = load_weights(cuda, program, true, STATUS_OK);
    check_embedding(cuda, &program->phases[0].weight[0], true);
    for (uint32_t i = 0; i < shape->n_layers; i++) {
        const struct phase *phases = &program->phases[1 + 5 * i];
        const struct device_layer *layer = &cuda->layers[i];
        check_native_matrix(cuda, &layer->qkv, phases[0].weight, 3);
        check_native_matrix(cuda, &layer->o, phases[2].weight, 1);
        check_native_matrix(cuda, &layer->gate_up, phases[3].weight, 2);
        check_native_matrix(cuda, &layer->down, phases[4].weight, 1);
    }
    check_native_matrix(cuda, &cuda->head, program->phases[program->n_phases - 1].weight, 1);
    if (!shape->mixed_types && (cuda->head.type != shape->type || cuda->layers[0].qkv.type != shape->type)) {
        failures++;
        printf("WRONG native weights: type %s is kept as %s\n", tensor_type_info(shape->type)->name, tensor_type_info(cuda->head.type)->name);
    }
    unload_weights(cuda, arena);
    tiny_program_free(program);
}

static void check_native(struct cuda *cuda) {
    static const enum tensor_type types[] = {TENSOR_Q4_0, TENSOR_Q4_1, TENSOR_Q8_0, TENSOR_Q4_K, TENSOR_Q6_K};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        struct tiny_shape shape = tiny_shape_default();
        shape.n_layers = 1;
        shape.type = types[i];
        shape.n_vocab = 203;
        shape.tied_head = i % 2 == 0;
        shape.n_embd = 256;
        shape.n_heads = 8;
        shape.n_kv_heads = 4;
        shape.n_ff = 512;
        if (!few) check_native_program(cuda, &shape);
        if (tensor_type_info(types[i])->block_size != 32) continue;
        shape.n_embd = 96; /* the last tile of a band is half empty */
        shape.n_heads = 3;
        shape.n_kv_heads = 1;
        shape.n_ff = 160;
        check_native_program(cuda, &shape);
    }
    if (few) return;
    struct tiny_shape mixed = tiny_shape_default();
    mixed.mixed_types = true;
    mixed.n_embd = 512;
    mixed.n_ff = 256;
    mixed.n_vocab = 61;
    check_native_program(cuda, &mixed); /* q, k, v: F16, BF16, Q8_0; then Q4_K, Q5_K, Q6_K */
}

/* f16 results beyond its range, from our kernel: the largest number there is. */
static void check_saturation(struct cuda *cuda) {
    struct subject s;
    uint32_t wrong = 0, beyond = 0;
    make_f16_subject(&s, 32, 512, 60000);
    uint8_t *results = (uint8_t *)check_calloc((size_t)ROWS_MAX * s.n, sizeof(float));
    run_product(cuda, &s, SKINNY_ROWS, PRODUCT_F16, results);
    for (size_t i = 0; i < (size_t)SKINNY_ROWS * s.n; i++) {
        double want = s.want[i] > 65504 ? 65504 : s.want[i] < -65504 ? -65504 : s.want[i], got = result_at(results, PRODUCT_F16, i);
        beyond += fabs(s.want[i]) > 65504;
        if (!(fabs(got - want) <= s.bound[i] + fabs(want) * 0x1p-10) && shown(&wrong))
            printf("WRONG saturation: output %zu is %g, expected %g\n", i, got, want);
    }
    if (beyond < s.n && shown(&wrong)) printf("WRONG saturation: only %u results are beyond the range\n", beyond);
    free(results);
    CUDA_CHECK(cudaFree(s.matrix.parts[0].data));
    free_subject(&s);
}

static void check_products(struct cuda *cuda) {
    static const uint32_t shapes[][2] = {{16, 32},    {1, 8},     {33, 64},    {40, 96},    {17, 576},   {576, 576}, {960, 576},
                                         {192, 1536}, {64, 4096}, {50, 14336}, {1000, 136}, {3100, 72}, {3073, 64}, {200, 2056}};
    const size_t n = few ? 4 : sizeof shapes / sizeof *shapes;
    for (size_t i = 0; i < n; i++) check_shape(cuda, shapes[i][0], shapes[i][1]);
    check_saturation(cuda);
    check_native(cuda);
}

/* ---- bench ---- */

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Median seconds of one of `count` launches, of rounds of them in a graph. */
template <typename launch_function> static double seconds_each(struct cuda *cuda, uint32_t count, const launch_function &launch_one) {
    enum { ROUNDS = 9 };
    double seconds[ROUNDS];
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    cudaEvent_t begin, end;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    launch_one(0); /* cuBLAS loads its kernel */
    CUDA_CHECK(cudaStreamSynchronize(cuda->stream));
    CUDA_CHECK(cudaStreamBeginCapture(cuda->stream, cudaStreamCaptureModeThreadLocal));
    for (uint32_t i = 0; i < count; i++) launch_one(i);
    CUDA_CHECK(cudaStreamEndCapture(cuda->stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
    for (int i = -2; i < ROUNDS; i++) {
        float ms;
        CUDA_CHECK(cudaEventRecord(begin, cuda->stream));
        CUDA_CHECK(cudaGraphLaunch(executable, cuda->stream));
        CUDA_CHECK(cudaEventRecord(end, cuda->stream));
        CUDA_CHECK(cudaEventSynchronize(end));
        CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (i >= 0) seconds[i] = (double)ms / 1e3 / count;
    }
    qsort(seconds, ROUNDS, sizeof *seconds, by_value);
    CUDA_CHECK(cudaGraphExecDestroy(executable));
    CUDA_CHECK(cudaGraphDestroy(graph));
    CUDA_CHECK(cudaEventDestroy(end));
    CUDA_CHECK(cudaEventDestroy(begin));
    return seconds[ROUNDS / 2];
}

static double copy_rate(struct cuda *cuda) {
    size_t bytes = (size_t)1 << 30;
    void *from, *to;
    CUDA_CHECK(cudaMalloc(&from, bytes));
    CUDA_CHECK(cudaMalloc(&to, bytes));
    CUDA_CHECK(cudaMemset(from, 1, bytes));
    double seconds = seconds_each(cuda, 8, [&](uint32_t) { CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, cuda->stream)); });
    CUDA_CHECK(cudaFree(to));
    CUDA_CHECK(cudaFree(from));
    return 2 * (double)bytes / seconds;
}

static __global__ void fill(__half *to, size_t count) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x)
        to[i] = __float2half(((float)(uint32_t)(i * 2654435761u >> 16 & 1023) - 511.5f) / 8192);
}

struct bench_shape {
    const char *name;
    uint32_t n, k;
    enum product_out kind;
};

static size_t bytes_of(enum tensor_type type, uint32_t n, uint32_t k) {
    enum native_form form = native_form_of(type);
    return form == FORM_F16 ? (size_t)n * k * sizeof(__half) : native_bytes(form, n, k);
}

static void print_line(const struct bench_shape *s, enum tensor_type type, uint32_t rows, const char *how, double seconds, double copy) {
    double out_bytes = (double)rows * s->n * (s->kind == PRODUCT_F16 ? 2 : s->kind == PRODUCT_F32 ? 4 : 8);
    double moved = (double)bytes_of(type, s->n, s->k) + (double)rows * s->k * 2 + out_bytes;
    printf("%-12s %-4s %6u x %-5u rows %4u %-13s %9.2f us %8.1f MB %7.1f GB/s %5.1f %% of copy %6.1f TFLOP/s\n", s->name,
           tensor_type_info(type)->name, s->n, s->k, rows, how, seconds * 1e6, moved / 1e6, moved / seconds / 1e9, moved / seconds / copy * 100,
           2 * (double)rows * s->n * s->k / seconds / 1e12);
}

/* As many matrices as are 4 times the L2 cache and more, in turn. What is in them takes no time. */
static void bench_one(struct cuda *cuda, const struct bench_shape *s, enum tensor_type type, const uint32_t *rows, uint32_t row_counts, double copy) {
    enum { CALLS = 8 };
    size_t bytes = bytes_of(type, s->n, s->k);
    uint32_t count = (uint32_t)(4 * (size_t)cuda->properties.l2CacheSize / bytes) + 2, most = rows[row_counts - 1];
    uint8_t *w;
    __half *in;
    void *out;
    CUDA_CHECK(cudaMalloc((void **)&w, count * bytes));
    CUDA_CHECK(cudaMalloc((void **)&in, (size_t)most * s->k * sizeof *in));
    CUDA_CHECK(cudaMalloc(&out, (size_t)most * s->n * sizeof(float)));
    launch(fill, 1024, 256, 0, cuda->stream, (__half *)w, count * bytes / sizeof(__half));
    launch(fill, 1024, 256, 0, cuda->stream, in, (size_t)most * s->k);
    CUDA_CHECK(cudaMemsetAsync(out, 0, (size_t)most * s->n * sizeof(float), cuda->stream));
    for (uint32_t i = 0; i < row_counts; i++) {
        uint32_t launches = rows[i] > 256 || count > 20 ? count : 20 / count * count + count;
        auto measure = [&](const char *how) {
            double seconds = seconds_each(cuda, launches, [&](uint32_t launch) {
                struct matrix matrix = matrix_f16(s->n, s->k, w + launch % count * bytes);
                matrix.type = matrix.parts[0].type = type;
                product(cuda, &matrix, in, rows[i], out, s->kind);
            });
            print_line(s, type, rows[i], how, seconds, copy);
        };
        if (rows[i] <= SKINNY_ROWS) {
            measure("");
            continue;
        }
        measure("first guess");
        if (type != TENSOR_F16) continue;
        struct product_call calls[CALLS];
        uint32_t n = 0;
        for (; n < CALLS && n < count; n++)
            calls[n] = {.form = FORM_F16,
                        .w = w + n * bytes,
                        .in = in,
                        .out = out,
                        .n = s->n,
                        .k = s->k,
                        .rows = rows[i],
                        .out_stride = s->n,
                        .kind = s->kind};
        products_tune(cuda, calls, n);
        measure("tuned");
        cuda->deterministic = true;
        measure("deterministic");
        cuda->deterministic = false;
    }
    CUDA_CHECK(cudaFree(out));
    CUDA_CHECK(cudaFree(in));
    CUDA_CHECK(cudaFree(w));
}

static void bench(struct cuda *cuda) {
    static const uint32_t rows[] = {1, 4, 8, 16, 64, 256, 2048};
    static const enum tensor_type types[] = {TENSOR_Q4_0, TENSOR_Q4_K, TENSOR_Q8_0, TENSOR_Q6_K};
    static const struct bench_shape shapes[] = {
        {"8B qkv", 6144, 4096, PRODUCT_F32},       {"8B o", 4096, 4096, PRODUCT_ADD_F32},    {"8B gate_up", 28672, 4096, PRODUCT_F16},
        {"8B down", 4096, 14336, PRODUCT_ADD_F32}, {"8B head", 128256, 4096, PRODUCT_F32},   {"135M qkv", 960, 576, PRODUCT_F32},
        {"135M o", 576, 576, PRODUCT_ADD_F32},     {"135M gate_up", 3072, 576, PRODUCT_F16}, {"135M down", 576, 1536, PRODUCT_ADD_F32},
        {"135M head", 49152, 576, PRODUCT_F32},
    };
    const size_t of_8b = 5;
    double copy = copy_rate(cuda);
    printf("%s: copy within the device %.1f GB/s (read + written)\n", cuda->properties.name, copy / 1e9);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) bench_one(cuda, &shapes[i], TENSOR_F16, rows, sizeof rows / sizeof *rows, copy);
    for (size_t t = 0; t < sizeof types / sizeof *types; t++)
        for (size_t i = 0; i < of_8b; i++) bench_one(cuda, &shapes[i], types[t], rows, 5, copy);
}

int main(int argc, char **argv) {
    few = argc == 2 && strcmp(argv[1], "--check-few") == 0;
    bool checks = few || (argc == 2 && strcmp(argv[1], "--check") == 0), benches = argc == 2 && strcmp(argv[1], "--bench") == 0;
    int devices = 0;
    if (!checks && !benches) {
        fprintf(stderr, "usage: products --check | --check-few | --bench\n");
        return 2;
    }
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("skipped: no CUDA device\n");
        return 77;
    }
    static struct cuda cuda;
    open_device(&cuda);
    if (checks) {
        if (!few) check_weights(&cuda);
        check_refusal(&cuda);
        check_products(&cuda);
        printf("%u failures\n", failures);
    } else {
        bench(&cuda);
    }
    close_device(&cuda);
    return failures ? 1 : 0;
}
