/* A model file of any bytes: all the way that `kvasir serve` takes it, or refused with one line. Rooms: engine model kernels config
 * Parsed, judged, compiled and its vocabulary opened in memory of its exact size; then, if all of that is well, opened as a file, described, planned for, and loaded by `reference` and the
 * generic kernels of `cpu`, which repack its weights and run a prompt through them.
 * Corpus: gguf_writer_tiny_model() of each architecture, vocabularies of tests/golden/tokenizer with few tokens, and models of one layer with four tokens in every tensor type. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/check.h"
#include "engine/internal.h"
#include "kernels/backend.h"
#include "model/compile.h"
#include "model/model.h"
#include "model/tokenizer_load.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define HOST_BYTES (64ull << 20) /* of which the memory plan is made */
#define LANES_MAX 16u            /* of models that are run */
#define VOCAB_MAX 1024u
#define ROWS 3u

static void refused(enum status status, const struct error *error) {
    CHECK(status == STATUS_INVALID || status == STATUS_UNSUPPORTED);
    CHECK(error->status == status && error->text[0] != '\0' && !strchr(error->text, '\n'));
}

static uint64_t touch(const struct gguf *gguf) {
    uint64_t sum = 0;
    for (size_t i = 0; i < gguf_tensor_count(gguf); i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(gguf, i);
        CHECK(tensor->bytes > 0);
        sum += ((const uint8_t *)tensor->data)[0] + ((const uint8_t *)tensor->data)[tensor->bytes - 1];
    }
    return sum;
}

static void encode(const struct tokenizer *tokenizer) {
    static const char text[] = "Hello, <s> 123 w\xc3\xb6rld!\xff\n\n  <|end|>";
    struct error error;
    struct token_list list = {0};
    CHECK(tokenizer_encode(tokenizer, text, sizeof text, true, true, 0, &list, &error) == STATUS_OK);
    struct detokenizer decoder = {0};
    struct buffer out = {0};
    for (size_t i = 0; i < list.count; i++) {
        CHECK(list.tokens[i] >= 0 && (uint32_t)list.tokens[i] < tokenizer_vocabulary(tokenizer));
        detokenizer_put(&decoder, tokenizer, list.tokens[i], false, &out);
    }
    detokenizer_finish(&decoder, &out);
    buffer_done(&out);
    token_list_done(&list);
}

/* Every part of the file in memory of its exact size. true: a whole model. */
static bool parse(const uint8_t *data, size_t size) {
    struct gguf *gguf = NULL;
    struct error error = {0};
    enum status status = gguf_parse(data, size, "input", &gguf, &error);
    if (status != STATUS_OK) {
        refused(status, &error);
        return false;
    }
    CHECK(touch(gguf) <= 2 * 255 * (uint64_t)GGUF_TENSORS_MAX);
    struct hyper_parameters parameters;
    struct program *program = NULL;
    enum status program_status = architecture_read(gguf, &parameters, &error);
    if (program_status == STATUS_OK) program_status = program_compile_gguf(&parameters, gguf, &program, &error);
    if (program_status != STATUS_OK) refused(program_status, &error);
    program_free(program);
    struct tokenizer *tokenizer = NULL;
    status = tokenizer_open(gguf, &tokenizer, &error);
    gguf_close(gguf);
    if (status == STATUS_OK)
        encode(tokenizer);
    else
        refused(status, &error);
    tokenizer_close(tokenizer);
    return status == STATUS_OK && program_status == STATUS_OK;
}

/* As a file. */
static enum status open_model(const uint8_t *data, size_t size, struct model **model, struct error *error) {
    char path[64];
    int file = memfd_create("model", MFD_CLOEXEC);
    CHECK(file >= 0 && write(file, data, size) == (ssize_t)size);
    (void)snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    enum status status = model_open(path, model, error);
    (void)close(file);
    return status;
}

/* What is printed of it are lines of printable ASCII, whatever its keys hold. */
static void describe(const struct model *model) {
    char *text = NULL;
    size_t length = 0;
    FILE *out = open_memstream(&text, &length);
    CHECK(out);
    model_describe(model, out);
    CHECK(fclose(out) == 0 && length > 0);
    for (size_t i = 0; i < length; i++) CHECK(text[i] == '\n' || (text[i] >= 0x20 && text[i] < 0x7f));
    free(text);
}

static void run(const struct backend_ops *ops, const struct program *program) {
    const uint32_t n_lanes = program_lanes(program);
    const struct backend_limits limits = {.n_blocks = n_lanes,
                                          .max_rows = ROWS,
                                          .max_sequences = 1,
                                          .max_samples = 1,
                                          .threads = 1,
                                          .instruction_set = "generic",
                                          .drop_source_pages = true};
    struct backend *backend = NULL;
    struct error error;
    CHECK(ops->prepare(program, &limits, &backend, &error) == STATUS_OK);
    uint32_t ids[LANES_MAX], none[LANES_MAX] = {0};
    int32_t tokens[ROWS], positions[ROWS];
    for (uint32_t i = 0; i < n_lanes; i++) ids[i] = i;
    for (uint32_t i = 0; i < ROWS; i++) tokens[i] = (int32_t)(i % program->n_vocab), positions[i] = (int32_t)i;
    const struct sampling sampling = {.temperature = 1, .top_p = 0.9f, .repetition_penalty = 1.1f, .n_top = 5};
    const struct sample sample = {.row = ROWS - 1, .sampling = &sampling, .target = -1, .history = tokens, .n_prompt = ROWS, .n_history = ROWS};
    const struct batch_sequence sequence = {.n_rows = ROWS, .lane_first = ids, .lane_tokens = none};
    const struct batch batch = {.n_rows = ROWS,
                                .n_sequences = 1,
                                .n_samples = 1,
                                .tokens = tokens,
                                .positions = positions,
                                .sequences = &sequence,
                                .block_ids = ids,
                                .samples = &sample};
    struct sample_result result;
    CHECK(ops->submit(backend, &batch, &error) == STATUS_OK && ops->sync(backend, &result, &error) == STATUS_OK);
    CHECK(result.token >= 0 && (uint32_t)result.token < program->n_vocab && result.n_top <= 5);
    ops->close(backend);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static struct config config;
    if (!parse(data, size)) return 0;
    struct model *model = NULL;
    struct error error = {0};
    enum status status = open_model(data, size, &model, &error);
    if (status != STATUS_OK) { /* the vocabulary is not the embedding's */
        refused(status, &error);
        return 0;
    }
    describe(model);
    const struct program *program = model_program(model);
    config_defaults(&config);
    struct memory_plan plan;
    for (const struct backend_ops *const *ops = backends; *ops; ops++) {
        status = engine_plan_memory_on(*ops, &config, model, HOST_BYTES, &plan, &error);
        CHECK(status == STATUS_OK ? plan.total_bytes <= HOST_BYTES && plan.n_blocks > 0 : error.text[0] != '\0' && !strchr(error.text, '\n'));
    }
    if (program_lanes(program) <= LANES_MAX && program->n_vocab <= VOCAB_MAX) {
        run(&backend_reference, program);
        run(&backend_cpu, program);
    }
    model_close(model);
    return 0;
}
