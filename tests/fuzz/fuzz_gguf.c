/* A model file of any bytes: parsed, judged, compiled and its vocabulary opened, or refused with one line. Rooms: model kernels
 * Corpus: gguf_writer_tiny_model() of each architecture, and vocabularies of tests/golden/tokenizer with few tokens. */
#include <stdint.h>
#include <string.h>

#include "base/check.h"
#include "model/compile.h"
#include "model/tokenizer_load.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

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

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct gguf *gguf = NULL;
    struct error error = {0};
    enum status status = gguf_parse(data, size, "input", &gguf, &error);
    if (status != STATUS_OK) {
        refused(status, &error);
        return 0;
    }
    CHECK(touch(gguf) <= 2 * 255 * (uint64_t)GGUF_TENSORS_MAX);

    struct hyper_parameters parameters;
    struct program *program = NULL;
    status = architecture_read(gguf, &parameters, &error);
    if (status == STATUS_OK) status = program_compile_gguf(&parameters, gguf, &program, &error);
    if (status != STATUS_OK) refused(status, &error);
    program_free(program);

    struct tokenizer *tokenizer = NULL;
    status = tokenizer_open(gguf, &tokenizer, &error);
    gguf_close(gguf);
    if (status != STATUS_OK) {
        refused(status, &error);
        return 0;
    }
    static const char text[] = "Hello, <s> 123 w\xc3\xb6rld!\xff\n\n  <|end|>";
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
    tokenizer_close(tokenizer);
    return 0;
}
