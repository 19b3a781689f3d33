/* Text of any bytes through every kind of vocabulary: ids are in range, decoding gives the bytes back, the limit holds, words cover the text. Rooms: model kernels
 * The first byte chooses the vocabulary and whether special tokens are parsed; the rest is the text. */
#include <stdint.h>
#include <string.h>

#include "base/check.h"
#include "model/pre_tokenizer.h"
#include "model/tokenizer_load.h"
#include "model/utf8.h"

#define FOLDER KVASIR_SOURCE_DIR "/tests/golden/tokenizer/"
#define TURN "<|turn|>" /* of spm.gguf: what follows gets a space in front, which decoding keeps */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { BPE, SPM, BYTES, KINDS };

static const struct tokenizer *tokenizer_of(unsigned kind) {
    static const char *const paths[] = {FOLDER "bpe.gguf", FOLDER "spm.gguf"};
    static struct tokenizer *tokenizers[KINDS];
    if (tokenizers[kind]) return tokenizers[kind];
    struct gguf *gguf = NULL;
    if (kind == BYTES) return tokenizers[kind] = tokenizer_byte_level(300);
    CHECK(gguf_open(paths[kind], &gguf, NULL) == STATUS_OK && tokenizer_open(gguf, &tokenizers[kind], NULL) == STATUS_OK);
    gguf_close(gguf);
    return tokenizers[kind];
}

static enum status add_length(void *context, const char *word, size_t length) {
    (void)word;
    CHECK(length > 0);
    *(size_t *)context += length;
    return STATUS_OK;
}

static void check_words(const char *text, size_t length) {
    static const char *const names[] = {"default", "gpt-2", "smollm", "qwen2", "llama-bpe", "tekken"};
    static struct pre_tokenizer *pre_tokenizers[sizeof names / sizeof *names];
    size_t valid = utf8_valid_run(text, length);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (!pre_tokenizers[i]) CHECK(pre_tokenizer_open((struct gguf_string){names[i], strlen(names[i])}, &pre_tokenizers[i], NULL) == STATUS_OK);
        size_t covered = 0;
        CHECK(pre_tokenizer_split(pre_tokenizers[i], text, valid, add_length, &covered, NULL) == STATUS_OK);
        CHECK(covered == valid);
    }
}

/* SPM writes a space as U+2581, so that this character comes back as a space. */
static void write_expected(const char *text, size_t length, bool spm, struct buffer *out) {
    for (size_t i = 0; i < length; i++) {
        bool space = spm && length - i >= 3 && memcmp(text + i, "\xe2\x96\x81", 3) == 0;
        buffer_append_byte(out, space ? ' ' : text[i]);
        i += space ? 2 : 0;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size == 0) return 0;
    unsigned kind = data[0] % KINDS;
    bool parse_special = data[0] & 0x80;
    const char *text = (const char *)data + 1;
    size_t length = size - 1;
    const struct tokenizer *tokenizer = tokenizer_of(kind);
    struct token_list list = {0}, again = {0};
    struct detokenizer decoder = {0};
    struct buffer out = {0}, expected = {0};
    CHECK(tokenizer_encode(tokenizer, text, length, false, parse_special, 0, &list, NULL) == STATUS_OK);
    CHECK(list.count <= length + 1 + (kind == SPM ? length : 0));
    for (size_t i = 0; i < list.count; i++) {
        CHECK(list.tokens[i] >= 0 && (uint32_t)list.tokens[i] < tokenizer_vocabulary(tokenizer));
        CHECK(parse_special || !tokenizer_is_special(tokenizer, list.tokens[i]));
        detokenizer_put(&decoder, tokenizer, list.tokens[i], false, &out);
    }
    detokenizer_finish(&decoder, &out);
    if (kind != SPM || (!parse_special && !memmem(text, length, TURN, strlen(TURN)))) {
        write_expected(text, length, kind == SPM, &expected);
        CHECK(out.length == expected.length && (out.length == 0 || memcmp(out.bytes, expected.bytes, out.length) == 0));
    }
    if (list.count > 1) {
        CHECK(tokenizer_encode(tokenizer, text, length, false, parse_special, list.count, &again, NULL) == STATUS_OK);
        again.count = 0;
        CHECK(tokenizer_encode(tokenizer, text, length, false, parse_special, list.count - 1, &again, NULL) == STATUS_INVALID);
    }
    check_words(text, length);
    token_list_done(&list);
    token_list_done(&again);
    buffer_done(&out);
    buffer_done(&expected);
    return 0;
}
