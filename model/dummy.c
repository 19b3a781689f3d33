/* Models without a file, for tests and measurements of what is above: real shapes, random weights. Owns the memory of the weights. Runs on the thread that
 * opens the model. It deliberately makes no text that means anything: scales are chosen so that activations stay near 1, logits are sharp, and
 * what comes out depends on the whole context rather than on the last token.
 * A seeded one has no weights at all: the backend makes them (kernels/program.h), so that a model larger than this machine's memory can be measured on a device.
 * The bytes of the others lie in a shared memory file: dropping pages of a mapped file loses nothing, and dropping pages of these must not either. */
#include "model/dummy.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/check.h"
#include "base/half.h"
#include "base/random.h"

#define DUMMY_ALIGNMENT 64u

struct shape {
    const char *name;
    uint32_t n_layers, n_embd, n_heads, n_kv_heads, n_ff, n_vocab, context;
    double rope_base;
    enum tensor_type matrices; /* where they lie in memory */
    bool tied;
};

/* The hyper-parameters of HuggingFaceTB/SmolLM2-135M and meta-llama/Llama-3.1-8B as published, but for Llama's scaling of rotary frequencies, which costs nothing. */
/* clang-format off */
static const struct shape shapes[] = {
    /* name            layers  embd  heads  kv     ff   vocab context    rope */
    {"tiny",                2,   64,     4,  2,   128,    320,   8192,  10000, TENSOR_Q8_0, false},
    {"smollm2-135m",       30,  576,     9,  3,  1536,  49152,   8192, 100000, TENSOR_Q4_0, true},
    {"llama-3.1-8b",       32, 4096,    32,  8, 14336, 128256, 131072, 500000, TENSOR_Q4_0, false},
};
/* clang-format on */
#define SHAPES (sizeof shapes / sizeof *shapes)

struct generator {
    const struct shape *shape;
    uint64_t seed;
    enum tensor_type matrices;
    uint8_t *bytes; /* NULL: only counting */
    size_t length, whole_length;
    struct model_progress progress;
    uint64_t parameters, weight_bytes;
};

static uint64_t hash_name(const char *name) {
    uint64_t hash = 0;
    for (; *name; name++) hash = random_mix(hash ^ (uint8_t)*name);
    return hash;
}

/* Near 1; the last norm makes logits sharp (standard deviation about 4). */
static void fill_vector(struct random *random, const char *name, float *values, uint32_t count) {
    float middle = strcmp(name, "output_norm.weight") == 0 ? 4.0f : 1.0f;
    for (uint32_t i = 0; i < count; i++) values[i] = middle * (0.75f + 0.5f * random_unit(random_next(random)));
}

/* Blocks of an f16 scale and random quants; the scale brings the weights' standard deviation to 1/sqrt(cols). */
static void fill_blocks(struct random *random, enum tensor_type type, uint32_t cols, uint8_t *bytes, size_t length) {
    const struct tensor_type_info *info = tensor_type_info(type);
    double quant_deviation = type == TENSOR_Q8_0 ? 256 / sqrt(12) : 16 / sqrt(12);
    uint16_t scale = f16_from_float((float)(1 / (quant_deviation * sqrt(cols))));
    for (uint8_t *block = bytes; block < bytes + length; block += info->block_bytes) {
        memcpy(block, &scale, sizeof scale);
        for (uint32_t i = sizeof scale; i < info->block_bytes; i += 8) {
            uint64_t quants = random_next(random);
            memcpy(block + i, &quants, info->block_bytes - i < 8 ? info->block_bytes - i : 8);
        }
    }
}

static enum status generate(void *context, const struct weight_request *request, struct tensor *tensor, struct error *error) {
    (void)error;
    struct generator *generator = context;
    bool optional_here = !generator->shape->tied && strcmp(request->name, "output.weight") == 0;
    if (!request->required && !optional_here) return STATUS_OK;
    static const uint8_t present; /* any address will do while counting, and where nobody reads */
    *tensor = (struct tensor){.type = request->vector ? TENSOR_F32 : generator->matrices, .rows = request->rows, .cols = request->cols};
    size_t bytes = tensor_bytes(tensor);
    tensor->data = generator->bytes ? generator->bytes + generator->length : &present;
    if (generator->bytes) {
        struct random random = {random_at(generator->seed, hash_name(request->name), 0, 0)};
        if (request->vector)
            fill_vector(&random, request->name, (float *)(void *)(generator->bytes + generator->length), request->cols);
        else
            fill_blocks(&random, tensor->type, request->cols, generator->bytes + generator->length, bytes);
    }
    generator->length += (bytes + DUMMY_ALIGNMENT - 1) / DUMMY_ALIGNMENT * DUMMY_ALIGNMENT;
    generator->parameters += (uint64_t)request->rows * request->cols;
    generator->weight_bytes += bytes;
    if (generator->progress.report)
        generator->progress.report(generator->progress.context, (double)generator->length / (double)generator->whole_length);
    return STATUS_OK;
}

static enum status map_memory(struct dummy *dummy, size_t length, struct error *error) {
    int file = memfd_create("kvasir-dummy", MFD_CLOEXEC);
    if (file < 0) return error_set(error, STATUS_NO_MEMORY, "dummy model: memory file: %s", strerror(errno));
    void *bytes = ftruncate(file, (off_t)length) == 0 ? mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) : MAP_FAILED;
    int problem = errno;
    (void)close(file);
    if (bytes == MAP_FAILED) return error_set(error, STATUS_NO_MEMORY, "dummy model: %zu bytes: %s", length, strerror(problem));
    dummy->bytes = bytes;
    dummy->length = length;
    return STATUS_OK;
}

static void describe_shape(const struct shape *shape, struct hyper_parameters *p) {
    *p = (struct hyper_parameters){
        .architecture = architecture_find("llama"),
        .n_layers = shape->n_layers,
        .n_embd = shape->n_embd,
        .n_heads = shape->n_heads,
        .n_kv_heads = shape->n_kv_heads,
        .head_dim = shape->n_embd / shape->n_heads,
        .n_ff = shape->n_ff,
        .n_vocab = shape->n_vocab,
        .context_train = shape->context,
        .norm_epsilon = 1e-5f,
    };
    p->rope = (struct rope_parameters){.dims = p->head_dim, .base = shape->rope_base, .factor = 1, .magnitude = 1};
}

static const struct shape *find_shape(const char *name, struct error *error) {
    char known[128] = "";
    for (size_t i = 0, used = 0; i < SHAPES; i++) {
        if (strcmp(shapes[i].name, name) == 0) return &shapes[i];
        if (used < sizeof known) used += (size_t)snprintf(known + used, sizeof known - used, "%s%s", i ? ", " : "", shapes[i].name);
    }
    (void)error_set(error, STATUS_INVALID, "dummy model \"%s\"; known: %s", name, known);
    return NULL;
}

/* A program of tensors that only have shapes; *length: what their bytes would take. */
static enum status compile_empty(const struct shape *shape, enum tensor_type matrices, struct hyper_parameters *p, struct dummy *dummy,
                                 struct program **program, size_t *length, struct error *error) {
    describe_shape(shape, p);
    struct generator generator = {.shape = shape, .matrices = matrices};
    struct weight_source source = {.context = &generator, .get = generate};
    enum status status = program_compile(p, &source, program, error);
    *dummy = (struct dummy){.parameters = generator.parameters, .weight_bytes = generator.weight_bytes};
    *length = generator.length;
    return status;
}

enum status dummy_make_seeded(const char *name, uint64_t seed, struct dummy *dummy, struct hyper_parameters *p, struct program **program,
                              struct error *error) {
    CHECK(seed != 0);
    const struct shape *shape = find_shape(name, error);
    size_t length;
    if (!shape) return STATUS_INVALID;
    enum status status = compile_empty(shape, TENSOR_F16, p, dummy, program, &length, error);
    if (status == STATUS_OK) (*program)->random_seed = seed;
    return status;
}

enum status dummy_bytes(const char *name, uint64_t *bytes, struct error *error) {
    const struct shape *shape = find_shape(name, error);
    struct hyper_parameters p;
    struct dummy dummy;
    struct program *program = NULL;
    size_t length;
    if (!shape) return STATUS_INVALID;
    enum status status = compile_empty(shape, shape->matrices, &p, &dummy, &program, &length, error);
    program_free(program);
    *bytes = length;
    return status;
}

enum status dummy_make(const char *name, uint64_t seed, const struct model_progress *progress, struct dummy *dummy, struct hyper_parameters *p,
                       struct program **program, struct error *error) {
    const struct shape *shape = find_shape(name, error);
    size_t length;
    if (!shape) return STATUS_INVALID;
    enum status status = compile_empty(shape, shape->matrices, p, dummy, program, &length, error);
    if (status != STATUS_OK) return status;
    program_free(*program);
    *program = NULL;
    status = map_memory(dummy, length, error);
    if (status != STATUS_OK) return status;
    struct generator generator = {
        .shape = shape, .seed = seed, .matrices = shape->matrices, .bytes = dummy->bytes, .whole_length = length, .progress = *progress};
    struct weight_source source = {.context = &generator, .get = generate};
    status = program_compile(p, &source, program, error);
    if (status == STATUS_OK && mprotect(dummy->bytes, dummy->length, PROT_READ) != 0)
        status = error_set(error, STATUS_IO, "dummy model: protect: %s", strerror(errno));
    if (status != STATUS_OK) {
        program_free(*program);
        *program = NULL;
        dummy_done(dummy);
    }
    return status;
}

void dummy_done(struct dummy *dummy) {
    if (dummy->bytes) (void)munmap(dummy->bytes, dummy->length);
    *dummy = (struct dummy){0};
}
