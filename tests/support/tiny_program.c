/* See tiny_program.h. Used by the thread that builds the test. */
#include "tests/support/tiny_program.h"

#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/check.h"
#include "base/random.h"
#include "tests/support/quantize.h"

/* Address space, not memory: pages of the file that nothing was written to take none. */
#define WEIGHT_SPACE ((size_t)1 << 30)

struct tiny {
    struct program program; /* first: the caller holds its address */
    const struct tiny_shape *shape;
    struct random random;
    uint8_t *weights;
    size_t used;
    uint32_t n_matrices;
};

struct tiny_shape tiny_shape_default(void) {
    return (struct tiny_shape){.seed = 1,
                               .n_layers = 2,
                               .n_embd = 128,
                               .n_heads = 4,
                               .n_kv_heads = 2,
                               .head_dim = 32,
                               .n_ff = 192,
                               .n_vocab = 64,
                               .type = TENSOR_F32,
                               .rope_pairs = ROPE_PAIRS_ADJACENT};
}

/* Uniform in (-1, 1) times sqrt(3) * deviation: standard deviation `deviation`. */
static float draw(struct tiny *tiny, float deviation) { return (2 * random_unit(random_next(&tiny->random)) - 1) * 1.7320508f * deviation; }

static uint8_t *place(struct tiny *tiny, size_t bytes) {
    size_t at = (tiny->used + 63) / 64 * 64 + (tiny->shape->misaligned ? 1 : 0);
    CHECK(bytes <= WEIGHT_SPACE - at);
    tiny->used = at + bytes;
    return tiny->weights + at;
}

static enum tensor_type choose_type(struct tiny *tiny, uint32_t cols) {
    if (!tiny->shape->mixed_types) return tiny->shape->type;
    for (;;) {
        enum tensor_type type = (enum tensor_type)(tiny->n_matrices++ % TENSOR_TYPES);
        if (cols % tensor_type_info(type)->block_size == 0) return type;
    }
}

static struct tensor matrix(struct tiny *tiny, uint32_t rows, uint32_t cols, float gain) {
    struct tensor tensor = {.type = choose_type(tiny, cols), .rows = rows, .cols = cols};
    size_t row_bytes = tensor_row_bytes(&tensor);
    uint8_t *bytes = place(tiny, tensor_bytes(&tensor));
    float *row = check_calloc(cols, sizeof *row);
    for (uint32_t r = 0; r < rows; r++) {
        for (uint32_t c = 0; c < cols; c++) row[c] = draw(tiny, gain / sqrtf((float)cols));
        quantize(tensor.type, row, bytes + r * row_bytes, cols);
    }
    free(row);
    tensor.data = bytes;
    return tensor;
}

static void set_f32(const struct tensor *vector, uint32_t i, float value) {
    quantize(TENSOR_F32, &value, (uint8_t *)(uintptr_t)vector->data + i * sizeof value, 1);
}

static struct tensor vector(struct tiny *tiny, uint32_t cols, float middle, float deviation) {
    struct tensor tensor = {.type = TENSOR_F32, .rows = 1, .cols = cols};
    uint8_t *bytes = place(tiny, tensor_bytes(&tensor));
    for (uint32_t c = 0; c < cols; c++) {
        float value = middle + draw(tiny, deviation);
        quantize(TENSOR_F32, &value, bytes + c * sizeof value, 1);
    }
    tensor.data = bytes;
    return tensor;
}

/* Queries and keys are larger than 1, so that attention is far from uniform and a wrong slot shows. */
static void add_layer(struct tiny *tiny, uint32_t layer, struct phase *phase) {
    const struct tiny_shape *s = tiny->shape;
    uint32_t n_q = s->n_heads * s->head_dim, n_kv = s->n_kv_heads * s->head_dim;
    for (int i = 0; i < 5; i++) phase[i] = (struct phase){.kind = (enum phase_kind)(PHASE_ATTN_IN + i), .layer = layer};
    phase[0].norm = vector(tiny, s->n_embd, 1, 0.2f);
    phase[0].weight[WEIGHT_Q] = matrix(tiny, n_q, s->n_embd, 1.5f);
    phase[0].weight[WEIGHT_K] = matrix(tiny, n_kv, s->n_embd, 1.5f);
    phase[0].weight[WEIGHT_V] = matrix(tiny, n_kv, s->n_embd, 1);
    if (s->biases) {
        phase[0].bias[WEIGHT_Q] = vector(tiny, n_q, 0, 0.5f);
        phase[0].bias[WEIGHT_K] = vector(tiny, n_kv, 0, 0.5f);
        phase[0].bias[WEIGHT_V] = vector(tiny, n_kv, 0, 0.5f);
        for (uint32_t head = 0; head < s->n_kv_heads && s->key_outlier != 0; head++)
            set_f32(&phase[0].bias[WEIGHT_K], head * s->head_dim + TINY_OUTLIER_DIM, s->key_outlier);
    }
    if (s->qk_norms) {
        phase[0].q_norm = vector(tiny, s->head_dim, 1.5f, 0.3f);
        phase[0].k_norm = vector(tiny, s->head_dim, 1.5f, 0.3f);
    }
    phase[2].weight[WEIGHT_ONLY] = matrix(tiny, s->n_embd, n_q, 1);
    phase[3].norm = vector(tiny, s->n_embd, 1, 0.2f);
    phase[3].weight[WEIGHT_GATE] = matrix(tiny, s->n_ff, s->n_embd, 1);
    phase[3].weight[WEIGHT_UP] = matrix(tiny, s->n_ff, s->n_embd, 1);
    phase[4].weight[WEIGHT_ONLY] = matrix(tiny, s->n_embd, s->n_ff, 1);
}

static struct phase *make_phases(struct tiny *tiny) {
    const struct tiny_shape *s = tiny->shape;
    struct phase *phases = check_calloc(5 * (size_t)s->n_layers + 2, sizeof *phases);
    struct tensor embedding = matrix(tiny, s->n_vocab, s->n_embd, sqrtf((float)s->n_embd));
    phases[0] = (struct phase){.kind = PHASE_EMBED, .weight = {embedding}};
    for (uint32_t layer = 0; layer < s->n_layers; layer++) add_layer(tiny, layer, &phases[1 + 5 * (size_t)layer]);
    struct phase *head = &phases[1 + 5 * (size_t)s->n_layers];
    *head = (struct phase){.kind = PHASE_HEAD, .layer = s->n_layers};
    head->norm = vector(tiny, s->n_embd, s->tied_head ? 4 / sqrtf((float)s->n_embd) : 4, s->tied_head ? 1 / sqrtf((float)s->n_embd) : 0.5f);
    head->weight[WEIGHT_ONLY] = s->tied_head ? embedding : matrix(tiny, s->n_vocab, s->n_embd, 1);
    return phases;
}

static double *make_frequencies(const struct tiny_shape *shape, uint32_t dims) {
    double *frequency = check_calloc(dims / 2, sizeof *frequency);
    for (uint32_t i = 0; i < dims / 2; i++) {
        double plain = pow(10000, -2.0 * i / dims);
        frequency[i] = plain;
        if (!shape->rope_scaled) continue;
        /* Fast pairs as they are, slow ones a factor 8 slower, between them a ramp in turns within the original context. */
        double turns = 64 * plain / (2 * M_PI), keep = (turns - 1) / (4 - 1);
        keep = keep < 0 ? 0 : keep > 1 ? 1 : keep;
        frequency[i] = keep * plain + (1 - keep) * plain / 8;
    }
    return frequency;
}

struct program *tiny_program_new(const struct tiny_shape *shape) {
    struct tiny *tiny = check_calloc(1, sizeof *tiny);
    tiny->shape = shape;
    tiny->random.state = shape->seed;
    int file = memfd_create("tiny-program", MFD_CLOEXEC);
    CHECK(file >= 0 && ftruncate(file, (off_t)WEIGHT_SPACE) == 0);
    tiny->weights = mmap(NULL, WEIGHT_SPACE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    CHECK(tiny->weights != MAP_FAILED);
    (void)close(file);
    uint32_t dims = shape->rope_dims ? shape->rope_dims : shape->head_dim;
    tiny->program = (struct program){
        .phases = make_phases(tiny),
        .n_phases = 5 * shape->n_layers + 2,
        .n_layers = shape->n_layers,
        .n_embd = shape->n_embd,
        .n_heads = shape->n_heads,
        .n_kv_heads = shape->n_kv_heads,
        .head_dim = shape->head_dim,
        .n_ff = shape->n_ff,
        .n_vocab = shape->n_vocab,
        .context_train = 8192,
        .norm_epsilon = 1e-5f,
        .attention_scale = 1 / sqrtf((float)shape->head_dim),
        .rope_pairs = shape->rope_pairs,
        .rope_dims = dims,
        .rope_frequency = make_frequencies(shape, dims),
        .rope_magnitude = 1,
        .tied_head = shape->tied_head,
    };
    CHECK(mprotect(tiny->weights, WEIGHT_SPACE, PROT_READ) == 0);
    tiny->shape = NULL; /* the caller's; only read while building */
    return &tiny->program;
}

void tiny_program_free(struct program *program) {
    struct tiny *tiny = (struct tiny *)(void *)program;
    if (!tiny) return;
    (void)munmap(tiny->weights, WEIGHT_SPACE);
    free((void *)(uintptr_t)tiny->program.phases);
    free((void *)(uintptr_t)tiny->program.rope_frequency);
    free(tiny);
}
