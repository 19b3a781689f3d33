/* The forward pass of kernels/program.h, filled with a model's weights. Tensor names are GGUF's (gguf-py, constants.py: TENSOR_NAMES).
 * Owns the program it makes; runs on the thread that opens the model. */
#include "model/compile.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"

struct compiler {
    const struct hyper_parameters *p;
    const struct weight_source *source;
    struct phase *next;
    enum status status; /* the first failure stays, what follows does nothing */
    struct error *error;
};

static void get(struct compiler *compiler, const char *name, uint32_t rows, uint32_t cols, bool vector, enum weight_presence presence,
                struct tensor *tensor) {
    if (compiler->status != STATUS_OK || presence == WEIGHT_ABSENT) return;
    struct weight_request request = {.name = name, .rows = rows, .cols = cols, .vector = vector, .required = presence == WEIGHT_REQUIRED};
    compiler->status = compiler->source->get(compiler->source->context, &request, tensor, compiler->error);
}

static void get_matrix(struct compiler *compiler, uint32_t layer, const char *part, uint32_t rows, uint32_t cols, struct tensor *tensor) {
    char name[64];
    (void)snprintf(name, sizeof name, "blk.%" PRIu32 ".%s.weight", layer, part);
    get(compiler, name, rows, cols, false, WEIGHT_REQUIRED, tensor);
}

static void get_vector(struct compiler *compiler, uint32_t layer, const char *part, uint32_t cols, enum weight_presence presence,
                       struct tensor *tensor) {
    char name[64];
    (void)snprintf(name, sizeof name, "blk.%" PRIu32 ".%s", layer, part);
    get(compiler, name, 1, cols, true, presence, tensor);
}

static struct phase *add(struct compiler *compiler, enum phase_kind kind, uint32_t layer) {
    struct phase *phase = compiler->next++;
    *phase = (struct phase){.kind = kind, .layer = layer};
    return phase;
}

static void add_layer(struct compiler *compiler, uint32_t layer) {
    const struct hyper_parameters *p = compiler->p;
    const struct architecture *architecture = p->architecture;
    uint32_t q_rows = p->n_heads * p->head_dim, kv_rows = p->n_kv_heads * p->head_dim;

    struct phase *in = add(compiler, PHASE_ATTN_IN, layer);
    get_vector(compiler, layer, "attn_norm.weight", p->n_embd, WEIGHT_REQUIRED, &in->norm);
    get_matrix(compiler, layer, "attn_q", q_rows, p->n_embd, &in->weight[WEIGHT_Q]);
    get_matrix(compiler, layer, "attn_k", kv_rows, p->n_embd, &in->weight[WEIGHT_K]);
    get_matrix(compiler, layer, "attn_v", kv_rows, p->n_embd, &in->weight[WEIGHT_V]);
    get_vector(compiler, layer, "attn_q.bias", q_rows, architecture->qkv_bias, &in->bias[WEIGHT_Q]);
    get_vector(compiler, layer, "attn_k.bias", kv_rows, architecture->qkv_bias, &in->bias[WEIGHT_K]);
    get_vector(compiler, layer, "attn_v.bias", kv_rows, architecture->qkv_bias, &in->bias[WEIGHT_V]);
    get_vector(compiler, layer, "attn_q_norm.weight", p->head_dim, architecture->qk_norm, &in->q_norm);
    get_vector(compiler, layer, "attn_k_norm.weight", p->head_dim, architecture->qk_norm, &in->k_norm);

    add(compiler, PHASE_ATTN, layer);
    struct phase *out = add(compiler, PHASE_ATTN_OUT, layer);
    get_matrix(compiler, layer, "attn_output", p->n_embd, q_rows, &out->weight[WEIGHT_ONLY]);

    struct phase *mlp = add(compiler, PHASE_MLP_IN, layer);
    get_vector(compiler, layer, "ffn_norm.weight", p->n_embd, WEIGHT_REQUIRED, &mlp->norm);
    get_matrix(compiler, layer, "ffn_gate", p->n_ff, p->n_embd, &mlp->weight[WEIGHT_GATE]);
    get_matrix(compiler, layer, "ffn_up", p->n_ff, p->n_embd, &mlp->weight[WEIGHT_UP]);
    struct phase *down = add(compiler, PHASE_MLP_OUT, layer);
    get_matrix(compiler, layer, "ffn_down", p->n_embd, p->n_ff, &down->weight[WEIGHT_ONLY]);
}

static void add_phases(struct compiler *compiler, struct program *program) {
    const struct hyper_parameters *p = compiler->p;
    struct phase *embed = add(compiler, PHASE_EMBED, 0);
    get(compiler, "token_embd.weight", p->n_vocab, p->n_embd, false, WEIGHT_REQUIRED, &embed->weight[WEIGHT_ONLY]);
    for (uint32_t layer = 0; layer < p->n_layers && compiler->status == STATUS_OK; layer++) add_layer(compiler, layer);
    struct phase *head = add(compiler, PHASE_HEAD, p->n_layers);
    get(compiler, "output_norm.weight", 1, p->n_embd, true, WEIGHT_REQUIRED, &head->norm);
    get(compiler, "output.weight", p->n_vocab, p->n_embd, false, WEIGHT_OPTIONAL, &head->weight[WEIGHT_ONLY]);
    program->tied_head = !head->weight[WEIGHT_ONLY].data;
    if (program->tied_head) head->weight[WEIGHT_ONLY] = embed->weight[WEIGHT_ONLY];
}

static void add_rope(struct compiler *compiler, struct program *program, double *frequency) {
    const struct hyper_parameters *p = compiler->p;
    float factors[MODEL_HEAD_DIM_MAX / 2];
    struct tensor tensor = {0};
    get(compiler, "rope_freqs.weight", 1, p->rope.dims / 2, true, p->architecture->rope_factors, &tensor);
    if (compiler->status != STATUS_OK) return;
    if (tensor.data) memcpy(factors, tensor.data, p->rope.dims / 2 * sizeof *factors);
    for (uint32_t i = 0; tensor.data && i < p->rope.dims / 2; i++) {
        if (isfinite(factors[i]) && factors[i] > 0) continue;
        compiler->status = error_set(compiler->error, STATUS_INVALID,
                                     "tensor rope_freqs.weight: factor %" PRIu32 " is %g; supported: positive numbers", i, (double)factors[i]);
        return;
    }
    rope_frequencies(&p->rope, tensor.data ? factors : NULL, frequency, &program->rope_magnitude);
}

enum status program_compile(const struct hyper_parameters *p, const struct weight_source *source, struct program **result, struct error *error) {
    struct program *program = check_calloc(1, sizeof *program);
    uint32_t n_phases = 5 * p->n_layers + 2;
    struct phase *phases = check_calloc(n_phases, sizeof *phases);
    double *frequency = check_calloc(p->rope.dims / 2, sizeof *frequency);
    *program = (struct program){
        .phases = phases,
        .n_phases = n_phases,
        .n_layers = p->n_layers,
        .n_embd = p->n_embd,
        .n_heads = p->n_heads,
        .n_kv_heads = p->n_kv_heads,
        .head_dim = p->head_dim,
        .n_ff = p->n_ff,
        .n_vocab = p->n_vocab,
        .context_train = p->context_train,
        .norm_epsilon = p->norm_epsilon,
        .attention_scale = (float)(1 / sqrt(p->head_dim)),
        .rope_pairs = p->architecture->rope_pairs,
        .rope_dims = p->rope.dims,
        .rope_frequency = frequency,
    };
    struct compiler compiler = {.p = p, .source = source, .next = phases, .status = STATUS_OK, .error = error};
    add_rope(&compiler, program, frequency);
    add_phases(&compiler, program);
    if (compiler.status != STATUS_OK) {
        program_free(program);
        return compiler.status;
    }
    CHECK(compiler.next == phases + n_phases);
    *result = program;
    return STATUS_OK;
}

void program_free(struct program *program) {
    if (!program) return;
    free((void *)(uintptr_t)program->phases);
    free((void *)(uintptr_t)program->rope_frequency);
    free(program);
}

struct file_weights {
    const struct gguf *gguf;
    bool *used; /* [tensors] */
};

static enum status get_from_file(void *context, const struct weight_request *request, struct tensor *tensor, struct error *error) {
    struct file_weights *weights = context;
    const char *path = gguf_path(weights->gguf);
    const struct gguf_tensor *found = gguf_tensor_find(weights->gguf, request->name);
    if (!found && !request->required) return STATUS_OK;
    if (!found) return error_set(error, STATUS_INVALID, "%s: tensor %s is missing", path, request->name);
    bool fits = request->vector ? found->n_dims == 1 && found->dims[0] == request->cols
                                : found->n_dims == 2 && found->dims[0] == request->cols && found->dims[1] == request->rows;
    if (!fits) {
        char expected[48];
        (void)snprintf(expected, sizeof expected, request->vector ? "[%" PRIu32 "]" : "[%" PRIu32 ", %" PRIu32 "]", request->cols, request->rows);
        return error_set(error, STATUS_INVALID,
                         "%s: tensor %s has shape [%" PRIu64 ", %" PRIu64 ", %" PRIu64 ", %" PRIu64 "] in %" PRIu32 " dimensions, expected %s", path,
                         request->name, found->dims[0], found->dims[1], found->dims[2], found->dims[3], found->n_dims, expected);
    }
    if (request->vector && found->type != TENSOR_F32)
        return error_set(error, STATUS_UNSUPPORTED, "%s: tensor %s has type %s; supported for vectors: F32", path, request->name,
                         tensor_type_info(found->type)->name);
    weights->used[found - gguf_tensor_at(weights->gguf, 0)] = true;
    *tensor = (struct tensor){.type = found->type, .rows = request->rows, .cols = request->cols, .data = found->data};
    return STATUS_OK;
}

enum status program_compile_gguf(const struct hyper_parameters *p, const struct gguf *gguf, struct program **result, struct error *error) {
    size_t count = gguf_tensor_count(gguf);
    struct file_weights weights = {.gguf = gguf, .used = check_calloc(count ? count : 1, sizeof *weights.used)};
    struct weight_source source = {.context = &weights, .get = get_from_file};
    struct program *program = NULL;
    enum status status = program_compile(p, &source, &program, error);
    for (size_t i = 0; i < count && status == STATUS_OK; i++) {
        char name[GGUF_TENSOR_NAME_MAX + 4];
        if (!weights.used[i])
            status = error_set(error, STATUS_UNSUPPORTED, "%s: tensor %s is not part of architecture %s as this program computes it", gguf_path(gguf),
                               gguf_printable(gguf_tensor_at(gguf, i)->name, name, sizeof name), p->architecture->name);
    }
    free(weights.used);
    if (status != STATUS_OK) {
        program_free(program);
        return status;
    }
    *result = program;
    return STATUS_OK;
}
