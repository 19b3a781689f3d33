/* A model in lines for people: what `kvasir inspect` prints first. Reads only; any thread. */
#include <inttypes.h>
#include <stdio.h>

#include "model/internal.h"

#define LINE "%-16s "

static void print_bytes(FILE *out, uint64_t bytes) {
    if (bytes >= 1u << 30)
        (void)fprintf(out, "%.2f GiB", (double)bytes / 0x1p30);
    else
        (void)fprintf(out, "%.1f MiB", (double)bytes / 0x1p20);
}

static void print_file(const struct model *model, FILE *out) {
    char text[128];
    struct gguf_string title = {0};
    if (!model->gguf) {
        (void)fprintf(out, LINE "random weights of shape %s\n", "source", model->name);
        return;
    }
    (void)fprintf(out, LINE "%s\n" LINE "GGUF v%" PRIu32 ", %zu tensors, ", "file", model->path, "format", gguf_version(model->gguf),
                  gguf_tensor_count(model->gguf));
    print_bytes(out, gguf_file_bytes(model->gguf));
    (void)fputc('\n', out);
    if (gguf_get_string(model->gguf, "general.name", GGUF_OPTIONAL, &title, NULL) == STATUS_OK && title.bytes)
        (void)fprintf(out, LINE "%s\n", "name", gguf_printable(title, text, sizeof text));
}

static void print_rope(const struct hyper_parameters *p, const struct program *program, bool factors, FILE *out) {
    (void)fprintf(out, LINE "base %g, %" PRIu32 " of %" PRIu32 " dimensions, %s", "rope", p->rope.base, program->rope_dims, program->head_dim,
                  program->rope_pairs == ROPE_PAIRS_ADJACENT ? "adjacent pairs" : "halves");
    if (p->rope.scaling == ROPE_SCALING_LINEAR) (void)fprintf(out, ", linear scaling by %g", p->rope.factor);
    if (p->rope.scaling == ROPE_SCALING_YARN)
        (void)fprintf(out, ", yarn scaling by %g from %" PRIu32 " tokens", p->rope.factor, p->rope.original_context);
    if (factors) (void)fprintf(out, ", frequency factors");
    (void)fputc('\n', out);
}

static void print_architecture(const struct model *model, FILE *out) {
    const struct program *program = model->program;
    (void)fprintf(out, LINE "%s\n" LINE "%.1f million, ", "architecture", model_architecture(model), "parameters", (double)model->n_parameters / 1e6);
    print_bytes(out, model->n_bytes);
    (void)fprintf(out, "\n" LINE "%" PRIu32 "\n" LINE "%" PRIu32 "\n", "layers", program->n_layers, "embedding", program->n_embd);
    (void)fprintf(out, LINE "%" PRIu32 ", %" PRIu32 " KV heads, head dimension %" PRIu32 "\n", "heads", program->n_heads, program->n_kv_heads,
                  program->head_dim);
    (void)fprintf(out, LINE "%" PRIu32 "\n" LINE "%s\n" LINE "%" PRIu32 " tokens", "feed forward", program->n_ff, "output",
                  program->tied_head ? "tied to the embedding" : "separate", "context", program->context_train);
    if (model->parameters.sliding_window > 0)
        (void)fprintf(out, " (trained with a sliding window of %" PRIu32 "; the context is not longer than it)", model->parameters.sliding_window);
    (void)fputc('\n', out);
    print_rope(&model->parameters, program, model->gguf && gguf_tensor_find(model->gguf, "rope_freqs.weight"), out);
}

static void print_tensors(const struct model *model, FILE *out) {
    uint64_t count[TENSOR_TYPES] = {0}, bytes[TENSOR_TYPES] = {0};
    for (size_t i = 0; model->gguf && i < gguf_tensor_count(model->gguf); i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(model->gguf, i);
        count[tensor->type]++;
        bytes[tensor->type] += tensor->bytes;
    }
    for (int type = 0; type < TENSOR_TYPES; type++) {
        if (count[type] == 0) continue;
        (void)fprintf(out, LINE "%" PRIu64 " x %s, ", "tensors", count[type], tensor_type_info((enum tensor_type)type)->name);
        print_bytes(out, bytes[type]);
        (void)fputc('\n', out);
    }
}

static void print_token(const struct tokenizer *tokenizer, const char *what, int32_t token, FILE *out) {
    char text[64];
    size_t length;
    const char *bytes = tokenizer_bytes(tokenizer, token, &length);
    if (token == TOKEN_NONE)
        (void)fprintf(out, LINE "none\n", what);
    else
        (void)fprintf(out, LINE "%" PRId32 " \"%s\"\n", what, token, gguf_printable((struct gguf_string){bytes, length}, text, sizeof text));
}

static void print_tokenizer(const struct model *model, FILE *out) {
    const struct tokenizer *tokenizer = model->tokenizer;
    int32_t ends[32];
    const char *pre = tokenizer_pre_tokenizer(tokenizer);
    (void)fprintf(out, LINE "%s%s%s, %" PRIu32 " tokens, BOS %s\n", "tokenizer", tokenizer_kind(tokenizer), *pre ? ", pre-tokenizer " : "", pre,
                  tokenizer_vocabulary(tokenizer), tokenizer_adds_bos(tokenizer) ? "added" : "not added");
    print_token(tokenizer, "bos", tokenizer_bos(tokenizer), out);
    print_token(tokenizer, "eos", tokenizer_eos(tokenizer), out);
    uint32_t count = tokenizer_end_tokens(tokenizer, ends, sizeof ends / sizeof *ends);
    for (uint32_t i = 0; i < count && i < sizeof ends / sizeof *ends; i++)
        if (ends[i] != tokenizer_eos(tokenizer)) print_token(tokenizer, "also ends", ends[i], out);
    if (model->chat_template.bytes)
        (void)fprintf(out, LINE "%zu bytes\n", "chat template", model->chat_template.length);
    else
        (void)fprintf(out, LINE "none\n", "chat template");
}

void model_describe(const struct model *model, FILE *out) {
    print_file(model, out);
    print_architecture(model, out);
    print_tensors(model, out);
    print_tokenizer(model, out);
}
