/* Vocabularies with one thing wrong: each is refused with the key's name. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include <math.h>

#include "base/check.h"
#include "model/tokenizer_load.h"
#include "tests/support/gguf_writer.h"

static enum status open_written(const struct gguf_writer *writer, struct tokenizer **tokenizer, struct error *error) {
    struct buffer file = {0};
    struct gguf *gguf = NULL;
    *tokenizer = NULL;
    gguf_writer_finish(writer, &file);
    if (gguf_parse(file.bytes, file.length, "vocabulary", &gguf, error) != STATUS_OK) fail_msg("%s", error->text);
    enum status status = tokenizer_open(gguf, tokenizer, error);
    gguf_close(gguf);
    buffer_done(&file); /* the tokenizer keeps nothing of it */
    return status;
}

enum { STRINGS, INTS, FLOATS, NUMBER, TEXT, TRUTH, DROP };
static const struct {
    bool spm;
    int change;
    const char *key;
    double value;
    const char *text;
    enum status status;
    const char *words;
} broken[] = {
    {false, DROP, "tokenizer.ggml.model", 0, NULL, STATUS_INVALID, "tokenizer.ggml.model is missing"},
    {false, NUMBER, "tokenizer.ggml.model", 1, NULL, STATUS_INVALID, "tokenizer.ggml.model has type u32"},
    {false, TEXT, "tokenizer.ggml.model", 0, "bert", STATUS_UNSUPPORTED, "tokenizer.ggml.model is \"bert\"; supported: gpt2, llama"},
    {false, TEXT, "tokenizer.ggml.pre", 0, "viking", STATUS_UNSUPPORTED, "tokenizer.ggml.pre is \"viking\"; supported: default"},
    {false, TEXT, "tokenizer.ggml.pre", 0, "", STATUS_UNSUPPORTED, "tokenizer.ggml.pre is \"\""},
    {false, NUMBER, "tokenizer.ggml.pre", 1, NULL, STATUS_INVALID, "tokenizer.ggml.pre has type u32"},
    {false, DROP, "tokenizer.ggml.tokens", 0, NULL, STATUS_INVALID, "tokenizer.ggml.tokens is missing"},
    {false, INTS, "tokenizer.ggml.tokens", 1, NULL, STATUS_INVALID, "tokenizer.ggml.tokens has type array of i32"},
    {false, STRINGS, "tokenizer.ggml.tokens", 0, NULL, STATUS_INVALID, "tokenizer.ggml.tokens has 0 elements"},
    {false, STRINGS, "tokenizer.ggml.tokens", 2, "twice", STATUS_INVALID, "token_type has 258 elements for 2 tokens"},
    {false, INTS, "tokenizer.ggml.token_type", 257, NULL, STATUS_INVALID, "token_type has 257 elements for 258 tokens"},
    {false, INTS, "tokenizer.ggml.token_type", 259, NULL, STATUS_INVALID, "token_type has 259 elements"},
    {false, FLOATS, "tokenizer.ggml.token_type", 258, NULL, STATUS_INVALID, "token_type has type array of f32"},
    {false, DROP, "tokenizer.ggml.merges", 0, NULL, STATUS_INVALID, "tokenizer.ggml.merges is missing"},
    {false, INTS, "tokenizer.ggml.merges", 1, NULL, STATUS_INVALID, "tokenizer.ggml.merges has type array of i32"},
    {false, STRINGS, "tokenizer.ggml.merges", 1, "he", STATUS_INVALID, "merge 0 \"he\" is not two texts"},
    {false, STRINGS, "tokenizer.ggml.merges", 1, "", STATUS_INVALID, "merge 0 \"\" is not two texts"},
    {false, STRINGS, "tokenizer.ggml.merges", 1, " ", STATUS_INVALID, "is not two texts"},
    {false, STRINGS, "tokenizer.ggml.merges", 1, "h ", STATUS_INVALID, "is not two texts"},
    {false, STRINGS, "tokenizer.ggml.merges", 1, " e", STATUS_INVALID, "is not two texts"},
    {false, STRINGS, "tokenizer.ggml.merges", 1, "h a", STATUS_INVALID, "is not made of tokens"},
    {false, STRINGS, "tokenizer.ggml.merges", 1, "he he", STATUS_INVALID, "is not made of tokens"},
    {false, STRINGS, "tokenizer.ggml.merges", 1, "hh e", STATUS_INVALID, "is not made of tokens"},
    {false, NUMBER, "tokenizer.ggml.bos_token_id", 258, NULL, STATUS_INVALID, "bos_token_id is 258, the vocabulary has 258 tokens"},
    {false, NUMBER, "tokenizer.ggml.eos_token_id", 4294967295.0, NULL, STATUS_INVALID, "eos_token_id is 4294967295"},
    {false, TEXT, "tokenizer.ggml.eos_token_id", 0, "2", STATUS_INVALID, "eos_token_id has type string"},
    {false, NUMBER, "tokenizer.ggml.unknown_token_id", 300, NULL, STATUS_INVALID, "unknown_token_id is 300"},
    {false, NUMBER, "tokenizer.ggml.eot_token_id", 300, NULL, STATUS_INVALID, "eot_token_id is 300"},
    {false, TRUTH, "tokenizer.ggml.add_bos_token", 1, NULL, STATUS_INVALID, "add_bos_token is true, but there is no tokenizer.ggml.bos_token_id"},
    {false, NUMBER, "tokenizer.ggml.add_bos_token", 1, NULL, STATUS_INVALID, "add_bos_token has type u32"},
    {true, DROP, "tokenizer.ggml.scores", 0, NULL, STATUS_INVALID, "tokenizer.ggml.scores is missing"},
    {true, INTS, "tokenizer.ggml.scores", 268, NULL, STATUS_INVALID, "scores has type array of i32"},
    {true, FLOATS, "tokenizer.ggml.scores", 267, NULL, STATUS_INVALID, "scores has 267 elements for 268 tokens"},
    {true, FLOATS, "tokenizer.ggml.scores", 268, "nan", STATUS_INVALID, "score of token 0 is not a number"},
    {true, NUMBER, "tokenizer.ggml.add_space_prefix", 1, NULL, STATUS_INVALID, "add_space_prefix has type u32"},
};

static void change(struct gguf_writer *writer, size_t i) {
    static int32_t ints[512];
    static float floats[512];
    size_t count = (size_t)broken[i].value;
    const char *strings[2] = {broken[i].text, broken[i].text};
    for (size_t n = 0; n < 512; n++) {
        ints[n] = 1;
        floats[n] = broken[i].text ? NAN : 0;
    }
    switch (broken[i].change) {
    case STRINGS: gguf_writer_strings(writer, broken[i].key, strings, count); break;
    case INTS: gguf_writer_numbers(writer, broken[i].key, GGUF_I32, ints, count); break;
    case FLOATS: gguf_writer_numbers(writer, broken[i].key, GGUF_F32, floats, count); break;
    case NUMBER: gguf_writer_u32(writer, broken[i].key, (uint32_t)broken[i].value); break;
    case TEXT: gguf_writer_string(writer, broken[i].key, broken[i].text); break;
    case TRUTH: gguf_writer_bool(writer, broken[i].key, broken[i].value != 0); break;
    case DROP: gguf_writer_drop(writer, broken[i].key); break;
    default: break;
    }
}

static void test_broken_vocabularies_are_named(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        struct gguf_writer writer = {0};
        struct tokenizer *tokenizer;
        struct error error = {0};
        if (broken[i].spm)
            gguf_writer_spm_vocabulary(&writer);
        else
            gguf_writer_tiny_model(&writer, "llama");
        change(&writer, i);
        enum status status = open_written(&writer, &tokenizer, &error);
        if (status != broken[i].status || !strstr(error.text, broken[i].words))
            fail_msg("%zu: %s \"%s\", expected %s \"%s\"", i, status_name(status), error.text, status_name(broken[i].status), broken[i].words);
        assert_int_equal(strncmp(error.text, "vocabulary: ", 12), 0);
        assert_null(tokenizer);
        gguf_writer_done(&writer);
    }
}

static enum status open_tokens(const char *const *tokens, const int32_t *types, size_t count, struct error *error) {
    struct gguf_writer writer = {0};
    struct tokenizer *tokenizer;
    gguf_writer_string(&writer, "tokenizer.ggml.model", "gpt2");
    gguf_writer_strings(&writer, "tokenizer.ggml.tokens", tokens, count);
    gguf_writer_numbers(&writer, "tokenizer.ggml.token_type", GGUF_I32, types, count);
    gguf_writer_strings(&writer, "tokenizer.ggml.merges", NULL, 0);
    enum status status = open_written(&writer, &tokenizer, error);
    tokenizer_close(tokenizer);
    gguf_writer_done(&writer);
    return status;
}

static void test_broken_tokens_are_named(void **state) {
    (void)state;
    static char long_text[4098];
    memset(long_text, 'x', sizeof long_text - 1);
    struct error error = {0};
    assert_int_equal(open_tokens((const char *const[]){"a", "b", "a"}, (const int32_t[]){1, 1, 1}, 3, &error), STATUS_INVALID);
    assert_non_null(strstr(error.text, "tokenizer.ggml.tokens: tokens 0 and 2 are both \"a\""));
    assert_int_equal(open_tokens((const char *const[]){"a", long_text}, (const int32_t[]){1, 1}, 2, &error), STATUS_UNSUPPORTED);
    assert_non_null(strstr(error.text, "token 1 has 4097 bytes"));
    assert_int_equal(open_tokens((const char *const[]){"a", "b"}, (const int32_t[]){1, 7}, 2, &error), STATUS_INVALID);
    assert_non_null(strstr(error.text, "token 1 has type 7"));
    assert_int_equal(open_tokens((const char *const[]){"a", "b"}, (const int32_t[]){-1, 1}, 2, &error), STATUS_INVALID);
    assert_non_null(strstr(error.text, "token 0 has type -1"));
    /* Gaps of a vocabulary: any number of tokens without text. */
    assert_int_equal(open_tokens((const char *const[]){"", "", "a"}, (const int32_t[]){5, 3, 1}, 3, &error), STATUS_OK);
}

static void test_broken_byte_tokens_are_named(void **state) {
    (void)state;
    static const char *const bad[] = {"<0x0a>", "<0xG0>", "0x00", "<0x000>", "<0x41>"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct gguf_writer writer = {0};
        struct tokenizer *tokenizer;
        struct error error = {0};
        gguf_writer_string(&writer, "tokenizer.ggml.model", "llama");
        gguf_writer_strings(&writer, "tokenizer.ggml.tokens", (const char *const[]){"<0x41>", bad[i]}, 2);
        gguf_writer_numbers(&writer, "tokenizer.ggml.token_type", GGUF_I32, (const int32_t[]){6, 6}, 2);
        gguf_writer_numbers(&writer, "tokenizer.ggml.scores", GGUF_F32, (const float[]){0, 0}, 2);
        assert_int_equal(open_written(&writer, &tokenizer, &error), STATUS_INVALID);
        assert_non_null(strstr(error.text, "byte token 1"));
        gguf_writer_done(&writer);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_broken_vocabularies_are_named),
        cmocka_unit_test(test_broken_tokens_are_named),
        cmocka_unit_test(test_broken_byte_tokens_are_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
