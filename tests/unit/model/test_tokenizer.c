/* Tokenizers on small vocabularies written here: special tokens, bytes that are no text, limits, streaming. That ids equal
 * those of other implementations is for tests/golden/test_tokenizer.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/check.h"
#include "model/tokenizer_load.h"
#include "tests/support/gguf_writer.h"

/* A megabyte; less where a sanitizer takes half a minute for it. */
#ifdef KVASIR_SANITIZED
enum { LONG_TEXT = 1 << 17 };
#else
enum { LONG_TEXT = 1 << 20 };
#endif

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

static struct tokenizer *opened(struct gguf_writer *writer) {
    struct tokenizer *tokenizer;
    struct error error = {0};
    if (open_written(writer, &tokenizer, &error) != STATUS_OK) fail_msg("%s", error.text);
    gguf_writer_done(writer);
    return tokenizer;
}

static void check_ids(const struct tokenizer *tokenizer, const char *text, size_t length, bool add_special, bool parse_special, const int32_t *ids,
                      size_t count) {
    struct token_list list = {0};
    struct error error = {0};
    if (tokenizer_encode(tokenizer, text, length, add_special, parse_special, 0, &list, &error) != STATUS_OK) fail_msg("%s", error.text);
    if (list.count != count || (count > 0 && memcmp(list.tokens, ids, count * sizeof *ids) != 0))
        for (size_t i = 0; i < list.count || i < count; i++)
            print_error("%s: token %zu: %d, expected %d\n", text, i, i < list.count ? list.tokens[i] : TOKEN_NONE, i < count ? ids[i] : TOKEN_NONE);
    assert_int_equal(list.count, count);
    assert_true(count == 0 || memcmp(list.tokens, ids, count * sizeof *ids) == 0);
    token_list_done(&list);
}
#define IDS(tokenizer, text, add, parse, ...)                                                                                                        \
    check_ids(tokenizer, text, sizeof(text) - 1, add, parse, (const int32_t[]){__VA_ARGS__}, sizeof((const int32_t[]){__VA_ARGS__}) / sizeof(int32_t))

/* Encoding */

static struct tokenizer *tiny(void) {
    struct gguf_writer writer = {0};
    gguf_writer_tiny_model(&writer, "llama");
    return opened(&writer);
}

static void test_bytes_that_are_no_text(void **state) {
    (void)state;
    struct tokenizer *tokenizer = tiny();
    char text[256];
    int32_t ids[256];
    for (int i = 0; i < 256; i++) {
        text[i] = (char)i;
        ids[i] = i;
    }
    check_ids(tokenizer, text, 256, false, false, ids, 256);
    IDS(tokenizer, "\xff\xfe", false, false, 0xff, 0xfe);
    IDS(tokenizer, "he\xc3", false, false, 256, 0xc3);
    IDS(tokenizer, "\xe4\xb8", false, false, 0xe4, 0xb8);
    IDS(tokenizer, "\xed\xa0\x80he", false, false, 0xed, 0xa0, 0x80, 256); /* a surrogate */
    IDS(tokenizer, "\xc0\xaf\xf8\x80", false, false, 0xc0, 0xaf, 0xf8, 0x80);
    IDS(tokenizer, "h\xffhe\0he", false, false, 'h', 0xff, 256, 0, 256);
    check_ids(tokenizer, "", 0, true, true, NULL, 0);
    tokenizer_close(tokenizer);
}

static void test_special_tokens(void **state) {
    (void)state;
    struct gguf_writer writer = {0};
    gguf_writer_tiny_model(&writer, "llama");
    gguf_writer_u32(&writer, "tokenizer.ggml.bos_token_id", 257);
    gguf_writer_bool(&writer, "tokenizer.ggml.add_bos_token", true);
    gguf_writer_bool(&writer, "tokenizer.ggml.add_eos_token", true);
    struct tokenizer *tokenizer = opened(&writer);
    IDS(tokenizer, "he<|end|>he", false, true, 256, 257, 256);
    IDS(tokenizer, "<|end|>", false, false, '<', '|', 'e', 'n', 'd', '|', '>');
    IDS(tokenizer, "<<|end|><|end|", false, true, '<', 257, '<', '|', 'e', 'n', 'd', '|');
    IDS(tokenizer, "he", true, true, 257, 256, 257);
    assert_true(tokenizer_adds_bos(tokenizer) && tokenizer_is_special(tokenizer, 257) && !tokenizer_is_special(tokenizer, 256));
    assert_false(tokenizer_is_special(tokenizer, -1) || tokenizer_is_special(tokenizer, 258) || tokenizer_is_special(tokenizer, INT32_MIN));
    assert_true(tokenizer_is_end(tokenizer, 257) && !tokenizer_is_end(tokenizer, TOKEN_NONE));
    int32_t ends[1] = {0};
    assert_int_equal(tokenizer_end_tokens(tokenizer, ends, 0), 1);
    assert_int_equal(ends[0], 0);
    assert_int_equal(tokenizer_end_tokens(tokenizer, ends, 1), 1);
    assert_int_equal(ends[0], 257);
    tokenizer_close(tokenizer);
}

/* The leftmost, and of those the longest; user-defined ones always, control ones when asked for. */
static void test_special_tokens_that_overlap(void **state) {
    (void)state;
    struct gguf_writer writer = {0};
    gguf_writer_string(&writer, "tokenizer.ggml.model", "gpt2");
    gguf_writer_strings(&writer, "tokenizer.ggml.tokens", (const char *const[]){"a", "b", "c", "d", "ab", "abc", "bcd", "<|im_end|>"}, 8);
    gguf_writer_numbers(&writer, "tokenizer.ggml.token_type", GGUF_I32, (const int32_t[]){1, 1, 1, 1, 4, 3, 4, 1}, 8);
    gguf_writer_strings(&writer, "tokenizer.ggml.merges", NULL, 0);
    struct tokenizer *tokenizer = opened(&writer);
    IDS(tokenizer, "abcd", false, true, 5, 3);
    IDS(tokenizer, "abcd", false, false, 4, 2, 3);
    IDS(tokenizer, "abdbcda", false, true, 4, 3, 6, 0);
    IDS(tokenizer, "a", false, true, 0);
    assert_true(tokenizer_is_special(tokenizer, 7) && tokenizer_is_end(tokenizer, 7)); /* known by its text, whatever its type says */
    tokenizer_close(tokenizer);
}

static void test_whole_words_before_merges(void **state) {
    (void)state;
    for (int llama3 = 0; llama3 < 2; llama3++) {
        struct gguf_writer writer = {0};
        gguf_writer_string(&writer, "tokenizer.ggml.model", "gpt2");
        gguf_writer_string(&writer, "tokenizer.ggml.pre", llama3 ? "llama-bpe" : "gpt-2");
        gguf_writer_strings(&writer, "tokenizer.ggml.tokens", (const char *const[]){"a", "b", "c", "ab", "abc", "cb"}, 6);
        gguf_writer_numbers(&writer, "tokenizer.ggml.token_type", GGUF_I32, (const int32_t[]){1, 1, 1, 1, 1, 3}, 6);
        gguf_writer_strings(&writer, "tokenizer.ggml.merges", (const char *const[]){"a b"}, 1);
        struct tokenizer *tokenizer = opened(&writer);
        if (llama3)
            IDS(tokenizer, "abc", false, false, 4);
        else
            IDS(tokenizer, "abc", false, false, 3, 2);
        IDS(tokenizer, "abca", false, false, 3, 2, 0);
        IDS(tokenizer, "cb", false, false, 2, 1);    /* text is never a control token */
        assert_false(tokenizer_adds_bos(tokenizer)); /* there is none */
        tokenizer_close(tokenizer);
    }
}

static void test_limits(void **state) {
    (void)state;
    struct tokenizer *tokenizer = tiny();
    struct token_list list = {0};
    struct error error = {0};
    assert_int_equal(tokenizer_encode(tokenizer, "abcd", 4, false, false, 4, &list, &error), STATUS_OK);
    assert_int_equal(tokenizer_encode(tokenizer, "abcd", 4, false, false, 4, &list, &error), STATUS_OK); /* appends; the limit is this call's */
    assert_int_equal(list.count, 8);
    assert_int_equal(tokenizer_encode(tokenizer, "abcde", 5, false, false, 4, &list, &error), STATUS_INVALID);
    assert_string_equal(error.text, "the text has too many tokens");
    assert_int_equal(tokenizer_encode(tokenizer, "a", 1, false, false, SIZE_MAX, &list, &error), STATUS_OK);
    assert_int_equal(tokenizer_encode(tokenizer, "a", (size_t)1 << 40, false, false, 0, &list, &error), STATUS_INVALID); /* not looked at */
    token_list_done(&list);
    tokenizer_close(tokenizer);
}

/* A long text of one letter, on a vocabulary in which every power of two of it is a token: merges all the way. */
static void test_a_megabyte_of_one_letter(void **state) {
    (void)state;
    enum { POWERS = 11, LENGTH = LONG_TEXT };
    static char texts[POWERS][(1 << (POWERS - 1)) + 1], rules[POWERS][(1 << POWERS) + 2];
    const char *tokens[POWERS], *merges[POWERS];
    float scores[POWERS];
    int32_t types[POWERS];
    for (int i = 0; i < POWERS; i++) {
        memset(texts[i], 'a', (size_t)1 << i);
        tokens[i] = texts[i];
        types[i] = 1;
        scores[i] = (float)-i;
        (void)snprintf(rules[i], sizeof rules[i], "%s %s", texts[i], texts[i]);
        merges[i] = rules[i];
    }
    char *text = malloc(LENGTH);
    memset(text, 'a', LENGTH);
    for (int spm = 0; spm < 2; spm++) {
        struct gguf_writer writer = {0};
        gguf_writer_string(&writer, "tokenizer.ggml.model", spm ? "llama" : "gpt2");
        gguf_writer_strings(&writer, "tokenizer.ggml.tokens", tokens, POWERS);
        gguf_writer_numbers(&writer, "tokenizer.ggml.token_type", GGUF_I32, types, POWERS);
        gguf_writer_numbers(&writer, "tokenizer.ggml.scores", GGUF_F32, scores, POWERS);
        gguf_writer_strings(&writer, "tokenizer.ggml.merges", merges, POWERS - 1);
        gguf_writer_bool(&writer, "tokenizer.ggml.add_space_prefix", false);
        struct tokenizer *tokenizer = opened(&writer);
        struct token_list list = {0};
        struct error error = {0};
        if (tokenizer_encode(tokenizer, text, LENGTH, false, true, 0, &list, &error) != STATUS_OK) fail_msg("%s", error.text);
        assert_int_equal(list.count, LENGTH >> (POWERS - 1));
        for (size_t i = 0; i < list.count; i++) assert_int_equal(list.tokens[i], POWERS - 1);
        token_list_done(&list);
        tokenizer_close(tokenizer);
    }
    free(text);
}

/* A long text of what patterns might look at again and again. */
static void test_long_runs_split(void **state) {
    (void)state;
    enum { LENGTH = LONG_TEXT };
    static const char *const names[] = {"default", "gpt-2", "smollm", "qwen2", "llama-bpe", "tekken"};
    static const char *const units[] = {
        " ", "\t", "\n", "\r", " \n", "'", "1", "!", "a", "a ", "\xc2\xa0", "'s", "! ", "\xcc\x81", "\xf0\x9f\x98\x80"};
    char *text = malloc(LENGTH + 8);
    for (size_t unit = 0; unit < sizeof units / sizeof *units; unit++) {
        size_t length = 0, size = strlen(units[unit]);
        while (length < LENGTH) memcpy(text + length, units[unit], size), length += size;
        text[length++] = 'x';
        for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
            struct gguf_writer writer = {0};
            gguf_writer_tiny_model(&writer, "llama");
            gguf_writer_string(&writer, "tokenizer.ggml.pre", names[i]);
            struct tokenizer *tokenizer = opened(&writer);
            struct token_list list = {0};
            struct error error = {0};
            if (tokenizer_encode(tokenizer, text, length, false, true, 0, &list, &error) != STATUS_OK) fail_msg("%s: %s", names[i], error.text);
            assert_int_equal(list.count, length);
            token_list_done(&list);
            tokenizer_close(tokenizer);
        }
    }
    free(text);
}

static void test_spm(void **state) {
    (void)state;
    struct gguf_writer writer = {0};
    gguf_writer_spm_vocabulary(&writer);
    struct tokenizer *tokenizer = opened(&writer);
    assert_true(tokenizer_bos(tokenizer) == 1 && tokenizer_eos(tokenizer) == 2 && tokenizer_adds_bos(tokenizer));
    IDS(tokenizer, "ab", true, false, 1, SPM_SPACE, SPM_AB); /* "ab" scores above " a" */
    IDS(tokenizer, "a", false, false, SPM_SPACE_A);
    IDS(tokenizer, "aab", false, false, SPM_SPACE_A, SPM_AB);
    IDS(tokenizer, "\n", false, false, SPM_SPACE, SPM_BYTES + '\n');
    IDS(tokenizer, "\xc3\xa9\xff", false, false, SPM_SPACE, SPM_BYTES + 0xc3, SPM_BYTES + 0xa9, SPM_BYTES + 0xff);
    IDS(tokenizer, "<s>", false, false, SPM_SPACE, SPM_LESS, SPM_S, SPM_GREATER); /* text, not the token */
    IDS(tokenizer, "<s>a", false, true, 1, SPM_SPACE_A);
    IDS(tokenizer, "a<turn>a", false, false, SPM_SPACE_A, SPM_TURN, SPM_SPACE_A);
    check_ids(tokenizer, "", 0, false, false, NULL, 0);
    struct detokenizer decoder = {0};
    struct buffer out = {0};
    static const int32_t said[] = {1, SPM_SPACE_A, SPM_SPACE, SPM_AB, SPM_BYTES + 0xc3, SPM_BYTES + 0xa9, SPM_TURN, SPM_SPACE_A, 2};
    for (size_t i = 0; i < sizeof said / sizeof *said; i++) detokenizer_put(&decoder, tokenizer, said[i], true, &out);
    detokenizer_finish(&decoder, &out);
    buffer_append_byte(&out, '\0');
    assert_string_equal(out.bytes, "a ab\xc3\xa9<turn> a");
    buffer_done(&out);
    tokenizer_close(tokenizer);
}

/* Without tokenizer.ggml.token_type, byte tokens are known by their text. */
static void test_spm_without_types(void **state) {
    (void)state;
    struct gguf_writer writer = {0};
    gguf_writer_spm_vocabulary(&writer);
    gguf_writer_drop(&writer, "tokenizer.ggml.token_type");
    struct tokenizer *tokenizer = opened(&writer);
    IDS(tokenizer, "a\n", false, false, SPM_SPACE_A, SPM_BYTES + '\n');
    tokenizer_close(tokenizer);
}

static void test_spm_without_byte_tokens(void **state) {
    (void)state;
    struct gguf_writer writer = {0};
    gguf_writer_string(&writer, "tokenizer.ggml.model", "llama");
    gguf_writer_strings(&writer, "tokenizer.ggml.tokens", (const char *const[]){"<unk>", "<s>", "</s>", "a", "\xe2\x96\x81"}, 5);
    gguf_writer_numbers(&writer, "tokenizer.ggml.token_type", GGUF_I32, (const int32_t[]){2, 3, 3, 1, 1}, 5);
    gguf_writer_numbers(&writer, "tokenizer.ggml.scores", GGUF_F32, (const float[]){0, 0, 0, -1, -2}, 5);
    struct tokenizer *tokenizer = opened(&writer);
    IDS(tokenizer, "a\xc3\xa9z", false, false, 4, 3, 0, 0); /* one unknown a character */
    tokenizer_close(tokenizer);
}

/* Decoding */

static void test_characters_are_held_until_whole(void **state) {
    (void)state;
    struct tokenizer *tokenizer = tokenizer_byte_level(300);
    struct detokenizer decoder = {0};
    struct buffer out = {0};
    static const uint8_t bytes[] = {'a', 0xf0, 0x9f, 0x98, 0x80, 0xe4, 'b', 0xc3, 0xa9, 0xff, 0xed, 0xa0, 0x80, 0xe2, 0x82};
    static const uint8_t ready[] = {1, 1, 1, 1, 5, 5, 7, 7, 9, 10, 10, 12, 13, 13, 13}; /* after each */
    for (size_t i = 0; i < sizeof bytes; i++) {
        detokenizer_put(&decoder, tokenizer, bytes[i], true, &out);
        if (out.length != ready[i]) fail_msg("after byte %zu (%02x): %zu bytes are out, expected %u", i, bytes[i], out.length, ready[i]);
    }
    detokenizer_put(&decoder, tokenizer, 256, true, &out);
    detokenizer_put(&decoder, tokenizer, 299, true, &out);
    detokenizer_put(&decoder, tokenizer, -5, true, &out);
    detokenizer_put(&decoder, tokenizer, INT32_MAX, false, &out);
    assert_int_equal(out.length, 13);
    detokenizer_finish(&decoder, &out);
    assert_true(out.length == sizeof bytes && memcmp(out.bytes, bytes, sizeof bytes) == 0);
    buffer_done(&out);
    tokenizer_close(tokenizer);
}

static void test_byte_level(void **state) {
    (void)state;
    struct tokenizer *tokenizer = tokenizer_byte_level(257);
    assert_int_equal(tokenizer_vocabulary(tokenizer), 257);
    assert_true(tokenizer_eos(tokenizer) == 256 && tokenizer_bos(tokenizer) == TOKEN_NONE && tokenizer_is_end(tokenizer, 256));
    assert_string_equal(tokenizer_pre_tokenizer(tokenizer), "");
    IDS(tokenizer, "h\xff", true, true, 'h', 0xff);
    size_t length;
    assert_true(tokenizer_bytes(tokenizer, 'h', &length)[0] == 'h' && length == 1);
    (void)tokenizer_bytes(tokenizer, 256, &length);
    assert_int_equal(length, 0);
    (void)tokenizer_bytes(tokenizer, 257, &length);
    assert_int_equal(length, 0);
    tokenizer_close(tokenizer);
}

static void test_tokens_not_written_in_byte_characters(void **state) {
    (void)state;
    struct gguf_writer writer = {0};
    gguf_writer_string(&writer, "tokenizer.ggml.model", "gpt2");
    /* A byte character, plain text beyond them, a broken character, a control token with a space. */
    gguf_writer_strings(&writer, "tokenizer.ggml.tokens",
                        (const char *const[]){"\xc4\xa0"
                                              "a",
                                              "\xe4\xb8\xad", "\xc4", "< a>"},
                        4);
    gguf_writer_numbers(&writer, "tokenizer.ggml.token_type", GGUF_I32, (const int32_t[]){1, 1, 1, 3}, 4);
    gguf_writer_strings(&writer, "tokenizer.ggml.merges", NULL, 0);
    struct tokenizer *tokenizer = opened(&writer);
    static const char *const expected[] = {" a", "\xe4\xb8\xad", "\xc4", "< a>"};
    for (int32_t i = 0; i < 4; i++) {
        size_t length;
        const char *bytes = tokenizer_bytes(tokenizer, i, &length);
        assert_true(length == strlen(expected[i]) && memcmp(bytes, expected[i], length) == 0);
    }
    check_ids(tokenizer, "xyz", 3, false, false, NULL, 0); /* no token for any of these bytes */
    tokenizer_close(tokenizer);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bytes_that_are_no_text),
        cmocka_unit_test(test_special_tokens),
        cmocka_unit_test(test_special_tokens_that_overlap),
        cmocka_unit_test(test_whole_words_before_merges),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_a_megabyte_of_one_letter),
        cmocka_unit_test(test_long_runs_split),
        cmocka_unit_test(test_spm),
        cmocka_unit_test(test_spm_without_types),
        cmocka_unit_test(test_spm_without_byte_tokens),
        cmocka_unit_test(test_characters_are_held_until_whole),
        cmocka_unit_test(test_byte_level),
        cmocka_unit_test(test_tokens_not_written_in_byte_characters),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
