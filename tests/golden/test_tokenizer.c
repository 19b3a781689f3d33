/* Tokenizers against llama.cpp, Hugging Face's tokenizers and sentencepiece: the files under tests/golden/tokenizer, made by the script beside them.
 * Needs the sample model (tests/support/sample_model.h). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/check.h"
#include "base/random.h"
#include "model/pre_tokenizer.h"
#include "model/tokenizer_load.h"
#include "tests/support/sample_model.h"

#define FOLDER KVASIR_SOURCE_DIR "/tests/golden/tokenizer/"
#define LINE_MAX_BYTES 131072
#ifndef PR_SET_MDWE /* Linux 6.3 */
#define PR_SET_MDWE 65
#define PR_MDWE_REFUSE_EXEC_GAIN 1
#endif

static struct tokenizer *open_tokenizer(const char *path) {
    struct error error = {0};
    struct gguf *gguf = NULL;
    struct tokenizer *tokenizer = NULL;
    if (gguf_open(path, &gguf, &error) != STATUS_OK || tokenizer_open(gguf, &tokenizer, &error) != STATUS_OK) fail_msg("%s", error.text);
    gguf_close(gguf); /* the tokenizer keeps nothing of it */
    return tokenizer;
}

static size_t read_hex(const char *hex, char *out) {
    size_t length = 0;
    if (*hex == '-') return 0;
    for (; hex[0] && hex[1]; hex += 2) {
        char digits[3] = {hex[0], hex[1], 0};
        out[length++] = (char)strtoul(digits, NULL, 16);
    }
    return length;
}

/* The text without the bytes that the vocabulary has no token for: what decoding its ids has to give. */
static size_t encodable(const struct tokenizer *tokenizer, const char *text, size_t length, char *out) {
    size_t used = 0;
    for (size_t i = 0; i < length; i++) {
        struct token_list list = {0};
        assert_int_equal(tokenizer_encode(tokenizer, text + i, 1, false, false, 0, &list, NULL), STATUS_OK);
        if (list.count > 0) out[used++] = text[i];
        token_list_done(&list);
    }
    return used;
}

static void check_round_trip(const struct tokenizer *tokenizer, const struct token_list *list, const char *text, size_t length, const char *hex) {
    static char expected[LINE_MAX_BYTES];
    size_t expected_length = encodable(tokenizer, text, length, expected);
    struct detokenizer state = {0};
    struct buffer out = {0};
    for (size_t i = 0; i < list->count; i++) detokenizer_put(&state, tokenizer, list->tokens[i], false, &out);
    detokenizer_finish(&state, &out);
    if (out.length != expected_length || (out.length > 0 && memcmp(out.bytes, expected, out.length) != 0))
        fail_msg("decoding the tokens of %s gives other bytes", hex);
    buffer_done(&out);
}

/* Every line of the file; returns how many. */
static int check_file(const char *name, const struct tokenizer *tokenizer) {
    FILE *file = fopen(name, "r");
    assert_non_null(file);
    static char line[LINE_MAX_BYTES], text[LINE_MAX_BYTES];
    int lines = 0;
    for (; fgets(line, sizeof line, file); lines++) {
        char *rest = NULL, *kind = strtok_r(line, " \n", &rest), *hex = strtok_r(NULL, " \n", &rest);
        assert_non_null(hex);
        size_t length = read_hex(hex, text);
        struct token_list list = {0};
        struct error error = {0};
        if (tokenizer_encode(tokenizer, text, length, false, *kind == 's', 0, &list, &error) != STATUS_OK) fail_msg("%s", error.text);
        size_t count = 0;
        for (char *id; (id = strtok_r(NULL, " \n", &rest)); count++)
            if (count >= list.count || list.tokens[count] != (int32_t)strtol(id, NULL, 10))
                fail_msg("%s: line %d (%s): token %zu is %d, expected %s", name, lines + 1, hex, count,
                         count < list.count ? list.tokens[count] : TOKEN_NONE, id);
        if (count != list.count) fail_msg("%s: line %d (%s): %zu tokens, expected %zu", name, lines + 1, hex, list.count, count);
        check_round_trip(tokenizer, &list, text, length, hex);
        token_list_done(&list);
    }
    (void)fclose(file);
    return lines;
}

static void test_sample_model(void **state) {
    (void)state;
    char path[4096];
    assert_non_null(sample_model_path(path, sizeof path));
    struct tokenizer *tokenizer = open_tokenizer(path);
    assert_int_equal(tokenizer_vocabulary(tokenizer), 49152);
    assert_string_equal(tokenizer_kind(tokenizer), "bpe");
    assert_string_equal(tokenizer_pre_tokenizer(tokenizer), "smollm");
    assert_int_equal(tokenizer_bos(tokenizer), 1);
    assert_int_equal(tokenizer_eos(tokenizer), 2);
    assert_false(tokenizer_adds_bos(tokenizer));
    assert_true(tokenizer_is_end(tokenizer, 0) && tokenizer_is_end(tokenizer, 2) && !tokenizer_is_end(tokenizer, 1));
    assert_true(check_file(FOLDER "smollm2.txt", tokenizer) >= 500);
    tokenizer_close(tokenizer);
}

static void test_trained_bpe(void **state) {
    (void)state;
    struct tokenizer *tokenizer = open_tokenizer(FOLDER "bpe.gguf");
    assert_true(check_file(FOLDER "bpe.txt", tokenizer) >= 500);
    tokenizer_close(tokenizer);
}

static void test_trained_spm(void **state) {
    (void)state;
    struct tokenizer *tokenizer = open_tokenizer(FOLDER "spm.gguf");
    assert_string_equal(tokenizer_kind(tokenizer), "spm");
    assert_true(tokenizer_adds_bos(tokenizer));
    assert_true(check_file(FOLDER "spm.txt", tokenizer) >= 500);
    tokenizer_close(tokenizer);
}

/* Cut points */

struct ends {
    uint32_t at[8192];
    size_t count;
    uint32_t position;
};

static enum status note_end(void *context, const char *word, size_t length) {
    (void)word;
    struct ends *ends = context;
    assert_true(ends->count < sizeof ends->at / sizeof *ends->at);
    ends->at[ends->count++] = ends->position += (uint32_t)length;
    return STATUS_OK;
}

static const struct ends *cut(const struct pre_tokenizer *pre_tokenizer, const char *text, size_t length) {
    static struct ends ends;
    struct error error = {0};
    ends.count = ends.position = 0;
    if (pre_tokenizer_split(pre_tokenizer, text, length, note_end, &ends, &error) != STATUS_OK) fail_msg("%s", error.text);
    assert_int_equal(ends.position, length);
    return &ends;
}

/* As in make_tokenizer.py. */
static const struct {
    uint32_t first, last;
} runs[] = {
    {0x20, 0x20},     {0x20, 0x20},     {0x61, 0x7A},     {0x61, 0x7A},     {0x41, 0x5A},       {0x30, 0x39},       {0x21, 0x2F},
    {0x3A, 0x40},     {0x5B, 0x60},     {0x7B, 0x7E},     {0x09, 0x0D},     {0x27, 0x27},       {0x72, 0x74},       {0x0, 0x1F},
    {0x7F, 0xA0},     {0xA1, 0xFF},     {0x100, 0x17F},   {0x391, 0x3A1},   {0x3B1, 0x3C9},     {0x410, 0x44F},     {0x5D0, 0x5EA},
    {0x621, 0x64A},   {0x64B, 0x669},   {0x904, 0x939},   {0x93E, 0x94D},   {0x966, 0x96F},     {0xE01, 0xE3A},     {0xE40, 0xE5B},
    {0x10D0, 0x10FA}, {0x1100, 0x1112}, {0x180E, 0x180E}, {0x2000, 0x200F}, {0x2010, 0x2029},   {0x202F, 0x205F},   {0x2070, 0x2071},
    {0x2074, 0x208E}, {0x2150, 0x2188}, {0x2190, 0x21FF}, {0x2460, 0x24FF}, {0x3000, 0x303F},   {0x3041, 0x3096},   {0x30A1, 0x30FA},
    {0x4E00, 0x9FA5}, {0xAC00, 0xD7A3}, {0xE000, 0xE0FF}, {0xFF01, 0xFF5E}, {0x10330, 0x1034A}, {0x1D7CE, 0x1D7FF}, {0x1F600, 0x1F64F},
    {0x0300, 0x036F}, {0xFE00, 0xFE0F}, {0x017F, 0x017F},
};
#define CHUNK_CHARACTERS 1000
#define CHUNKS_A_HASH 10

static size_t write_utf8(uint32_t codepoint, char *out) {
    if (codepoint < 0x80) {
        out[0] = (char)codepoint;
        return 1;
    }
    size_t length = codepoint < 0x800 ? 2 : codepoint < 0x10000 ? 3 : 4;
    static const uint8_t leads[] = {0, 0, 0xc0, 0xe0, 0xf0};
    for (size_t i = length; i-- > 1; codepoint >>= 6) out[i] = (char)(0x80 | (codepoint & 0x3f));
    out[0] = (char)(leads[length] | codepoint);
    return length;
}

static size_t chunk(uint64_t index, char *out) {
    struct random random = {.state = index};
    size_t length = 0;
    for (int characters = 0; characters < CHUNK_CHARACTERS;) {
        uint64_t bits = random_next(&random);
        size_t run = (bits >> 32) % (sizeof runs / sizeof *runs);
        int repeat = 1 + (int)(bits >> 16 & 3);
        for (int i = 0; i < repeat && characters < CHUNK_CHARACTERS; i++, characters++) {
            length += write_utf8(runs[run].first + (uint32_t)(bits & 0xffff) % (runs[run].last - runs[run].first + 1), out + length);
            bits *= 5;
        }
    }
    return length;
}

static uint64_t hash_cuts(const struct pre_tokenizer *pre_tokenizer, uint64_t first_chunk) {
    static char text[4 * CHUNK_CHARACTERS];
    uint64_t hash = 0xcbf29ce484222325; /* FNV-1a */
    for (uint64_t i = first_chunk; i < first_chunk + CHUNKS_A_HASH; i++) {
        const struct ends *ends = cut(pre_tokenizer, text, chunk(i, text));
        for (size_t end = 0; end < ends->count; end++)
            for (int shift = 0; shift < 32; shift += 8) hash = (hash ^ (ends->at[end] >> shift & 0xff)) * 0x100000001b3;
    }
    return hash;
}

static void check_cut(const struct pre_tokenizer *pre_tokenizer, const char *name, char *rest) {
    static char text[LINE_MAX_BYTES];
    char *hex = strtok_r(NULL, " \n", &rest);
    assert_non_null(hex);
    const struct ends *ends = cut(pre_tokenizer, text, read_hex(hex, text));
    size_t count = 0;
    for (char *end; (end = strtok_r(NULL, " \n", &rest)); count++)
        if (count >= ends->count || ends->at[count] != strtoul(end, NULL, 10))
            fail_msg("%s: %s: cut %zu at %u, expected %s", name, hex, count, count < ends->count ? ends->at[count] : 0, end);
    if (count != ends->count) fail_msg("%s: %s: %zu words, expected %zu", name, hex, ends->count, count);
}

static void test_cut_points(void **state) {
    (void)state;
    FILE *file = fopen(FOLDER "splits.txt", "r");
    assert_non_null(file);
    static char line[LINE_MAX_BYTES];
    struct pre_tokenizer *pre_tokenizer = NULL;
    int names = 0, cuts = 0, hashes = 0;
    while (fgets(line, sizeof line, file)) {
        char *rest = NULL, *kind = strtok_r(line, " \n", &rest), *name = strtok_r(NULL, " \n", &rest);
        assert_non_null(name);
        if (!pre_tokenizer || strcmp(pre_tokenizer_traits(pre_tokenizer)->name, name) != 0) {
            pre_tokenizer_close(pre_tokenizer);
            assert_int_equal(pre_tokenizer_open((struct gguf_string){name, strlen(name)}, &pre_tokenizer, NULL), STATUS_OK);
            names++;
        }
        if (strcmp(kind, "cut") == 0) {
            check_cut(pre_tokenizer, name, rest);
            cuts++;
            continue;
        }
        unsigned long first = 0;
        unsigned long long expected = 0;
        assert_int_equal(sscanf(rest, "%lu %llx", &first, &expected), 2);
        if (hash_cuts(pre_tokenizer, first) != expected) fail_msg("%s: the cuts of chunks %lu to %lu differ", name, first, first + CHUNKS_A_HASH - 1);
        hashes++;
    }
    pre_tokenizer_close(pre_tokenizer);
    (void)fclose(file);
    assert_int_equal(names, 6);
    assert_true(cuts >= 6 * 300);
    assert_int_equal(hashes, 6 * 100); /* a million characters each */
}

/* The same where the system refuses writable code, as hardened units do: patterns are interpreted. True: it passed, or this kernel cannot refuse. */
static bool without_jit(void) {
    (void)fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        if (prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) != 0) {
            (void)fprintf(stderr, "not run without JIT: this kernel cannot refuse writable code\n");
            _exit(0);
        }
        const struct CMUnitTest tests[] = {cmocka_unit_test(test_cut_points)};
        int failed = cmocka_run_group_tests_name("without JIT", tests, NULL, NULL);
        (void)fflush(NULL);
        _exit(failed ? 1 : 0);
    }
    int status = 1;
    return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sample_model),
        cmocka_unit_test(test_trained_bpe),
        cmocka_unit_test(test_trained_spm),
        cmocka_unit_test(test_cut_points),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    return without_jit() ? failed : 1;
}
