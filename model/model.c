/* An opened model: the mapping, what the architecture says, the program and the tokenizer, made in that order and given back in the reverse.
 * Owns all of them. Opened and closed by one thread, const between. Describing it for people is in describe.c. */
#include "model/model.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "model/internal.h"
#include "model/tokenizer_load.h"

static enum status load(struct model *model, struct error *error) {
    enum status status = gguf_open(model->path, &model->gguf, error);
    if (status == STATUS_OK) status = architecture_read(model->gguf, &model->parameters, error);
    if (status == STATUS_OK) status = program_compile_gguf(&model->parameters, model->gguf, &model->program, error);
    if (status == STATUS_OK) status = gguf_get_string(model->gguf, "tokenizer.chat_template", GGUF_OPTIONAL, &model->chat_template, error);
    if (status == STATUS_OK) status = tokenizer_open(model->gguf, &model->tokenizer, error);
    if (status != STATUS_OK) return status;
    if (tokenizer_vocabulary(model->tokenizer) != model->program->n_vocab)
        return error_set(error, STATUS_INVALID, "%s: the tokenizer has %" PRIu32 " tokens, the embedding %" PRIu32, model->path,
                         tokenizer_vocabulary(model->tokenizer), model->program->n_vocab);
    for (size_t i = 0; i < gguf_tensor_count(model->gguf); i++) {
        model->n_parameters += gguf_tensor_at(model->gguf, i)->elements;
        model->n_bytes += gguf_tensor_at(model->gguf, i)->bytes;
    }
    return STATUS_OK;
}

/* "/models/SmolLM2.gguf" -> "SmolLM2" */
static char *name_of(const char *path) {
    const char *slash = strrchr(path, '/');
    char *name = check_strdup(slash ? slash + 1 : path);
    size_t length = strlen(name);
    if (length > 5 && strcmp(name + length - 5, ".gguf") == 0) name[length - 5] = '\0';
    return name;
}

static enum status hand_over(struct model *model, enum status status, struct model **result) {
    if (status == STATUS_OK)
        *result = model;
    else
        model_close(model);
    return status;
}

enum status model_open(const char *path, struct model **result, struct error *error) {
    struct model *model = check_calloc(1, sizeof *model);
    model->path = check_strdup(path);
    model->name = name_of(path);
    return hand_over(model, load(model, error), result);
}

/* progress: NULL for one whose weights the backend makes. */
static enum status open_dummy(const char *shape, uint64_t seed, const struct model_progress *progress, struct model **result, struct error *error) {
    struct model *model = check_calloc(1, sizeof *model);
    model->path = check_strdup(shape);
    model->name = check_strdup(shape);
    enum status status = progress ? dummy_make(shape, seed, progress, &model->dummy, &model->parameters, &model->program, error)
                                  : dummy_make_seeded(shape, seed, &model->dummy, &model->parameters, &model->program, error);
    if (status == STATUS_OK) {
        model->tokenizer = tokenizer_byte_level(model->parameters.n_vocab);
        model->n_parameters = model->dummy.parameters;
        model->n_bytes = model->dummy.weight_bytes;
    }
    return hand_over(model, status, result);
}

enum status model_dummy(const char *shape, uint64_t seed, struct model **result, struct error *error) {
    return model_dummy_told(shape, seed, (struct model_progress){0}, result, error);
}

enum status model_dummy_told(const char *shape, uint64_t seed, struct model_progress progress, struct model **result, struct error *error) {
    return open_dummy(shape, seed, &progress, result, error);
}

enum status model_dummy_seeded(const char *shape, uint64_t seed, struct model **result, struct error *error) {
    return open_dummy(shape, seed, NULL, result, error);
}

enum status model_dummy_bytes(const char *shape, uint64_t *bytes, struct error *error) { return dummy_bytes(shape, bytes, error); }

void model_close(struct model *model) {
    if (!model) return;
    tokenizer_close(model->tokenizer);
    program_free(model->program);
    dummy_done(&model->dummy);
    gguf_close(model->gguf);
    free(model->name);
    free(model->path);
    free(model);
}

const struct program *model_program(const struct model *model) { return model->program; }
const struct tokenizer *model_tokenizer(const struct model *model) { return model->tokenizer; }
const char *model_path(const struct model *model) { return model->path; }
const char *model_name(const struct model *model) { return model->name; }
const char *model_architecture(const struct model *model) { return model->parameters.architecture->name; }
uint64_t model_parameters(const struct model *model) { return model->n_parameters; }
uint64_t model_bytes(const struct model *model) { return model->n_bytes; }

const char *model_chat_template(const struct model *model, size_t *length) {
    *length = model->chat_template.length;
    return model->chat_template.bytes;
}
