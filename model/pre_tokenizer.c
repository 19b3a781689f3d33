/* See pre_tokenizer.h. The table of names and patterns, and PCRE2 to run them: compiled at open, shared by all threads; match data belongs to a call.
 * JIT is used where the system lets it (hardened units refuse writable code); without it matching is slower and the same.
 * Source of the patterns: the tokenizer.json files of the models that go by these names. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "model/pre_tokenizer.h"

#include <pcre2.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"

#define PATTERNS_MAX 4
/* Work of one match. The patterns are linear in the piece, so that these bound what a mistake in a pattern could cost, not what users may send. */
#define MATCH_LIMIT 100000000u
#define DEPTH_LIMIT 100000u
#define HEAP_LIMIT_KIB 65536u

/* White_Space of Unicode. Spelled out because PCRE2's \s also takes U+180E, which lost the property. */
#define SPACES "\\t-\\r \\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{3000}"
#define SPACE "[" SPACES "]"
#define NOT_SPACE "[^" SPACES "]"

#define GPT2 "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" SPACES "\\p{L}\\p{N}]+|" SPACE "+(?!" NOT_SPACE ")|" SPACE "+"
/* The family of cl100k: digits in runs of at most `digits`. */
#define CL100K(digits)                                                                                                                               \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" digits "| ?[^" SPACES "\\p{L}\\p{N}]+[\\r\\n]*|" SPACE "*[\\r\\n]+|" SPACE         \
    "+(?!" NOT_SPACE ")|" SPACE "+"

/* Mistral's: words begin where lower case meets upper case. */
#define TEKKEN                                                                                                                                       \
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+|"                                                     \
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*|"                                                     \
    "\\p{N}| ?[^" SPACES "\\p{L}\\p{N}]+[\\r\\n/]*|" SPACE "*[\\r\\n]+|" SPACE "+(?!" NOT_SPACE ")|" SPACE "+"

/* clang-format off */
static const struct entry {
    struct pre_tokenizer_traits traits;
    bool alias; /* of the entry above it; not named in errors */
    const char *patterns[PATTERNS_MAX];
} table[] = {
    {{"default",          false, false}, false, {"[\\p{P}$+<=>^~|]+", GPT2, "\\p{N}+", "[0-9][0-9][0-9]"}},
    {{"gpt-2",            false, false}, false, {GPT2}},
    {{"phi-2",            false, false}, true,  {GPT2}},
    {{"olmo",             false, false}, true,  {GPT2}},
    {{"exaone4",          false, false}, true,  {GPT2}},
    {{"smollm",           false, false}, false, {"\\p{N}", GPT2}},
    {{"starcoder",        false, false}, true,  {"\\p{N}", GPT2}},
    {{"refact",           false, false}, true,  {"\\p{N}", GPT2}},
    {{"codeshell",        false, false}, true,  {"\\p{N}", GPT2}},
    {{"command-r",        false, false}, true,  {"\\p{N}", GPT2}},
    {{"qwen2",            false, false}, false, {CL100K("\\p{N}")}},
    {{"deepseek-r1-qwen", false, false}, true,  {CL100K("\\p{N}")}},
    {{"stablelm2",        false, false}, true,  {CL100K("\\p{N}")}},
    {{"megrez",           false, false}, true,  {CL100K("\\p{N}")}},
    {{"llama-bpe",        true,  true},  false, {CL100K("\\p{N}{1,3}")}},
    {{"llama3",           true,  true},  true,  {CL100K("\\p{N}{1,3}")}},
    {{"llama-v3",         true,  true},  true,  {CL100K("\\p{N}{1,3}")}},
    {{"falcon3",          true,  true},  true,  {CL100K("\\p{N}{1,3}")}},
    {{"lfm2",             true,  true},  true,  {CL100K("\\p{N}{1,3}")}},
    {{"dbrx",             false, false}, true,  {CL100K("\\p{N}{1,3}")}},
    {{"smaug-bpe",        false, false}, true,  {CL100K("\\p{N}{1,3}")}},
    {{"tekken",           true,  true},  false, {TEKKEN}},
};
/* clang-format on */
#define ENTRIES (sizeof table / sizeof *table)

struct pre_tokenizer {
    const struct entry *entry;
    size_t n_codes;
    pcre2_code *codes[PATTERNS_MAX];
    pcre2_match_context *limits;
};

static enum status unsupported(struct gguf_string name, struct error *error) {
    char supported[256] = "", shown[64];
    for (size_t i = 0, used = 0; i < ENTRIES && used < sizeof supported; i++) {
        if (table[i].alias) continue;
        used += (size_t)snprintf(supported + used, sizeof supported - used, "%s%s", i ? ", " : "", table[i].traits.name);
    }
    return error_set(error, STATUS_UNSUPPORTED, "key tokenizer.ggml.pre is \"%s\"; supported: %s", gguf_printable(name, shown, sizeof shown),
                     supported);
}

static pcre2_code *compile(const char *pattern) {
    int problem;
    PCRE2_SIZE offset;
    pcre2_code *code = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP, &problem, &offset, NULL);
    CHECK(code != NULL);
    (void)pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
    return code;
}

enum status pre_tokenizer_open(struct gguf_string name, struct pre_tokenizer **result, struct error *error) {
    const struct entry *entry = NULL;
    for (size_t i = 0; i < ENTRIES && !entry; i++)
        if (gguf_string_equals(name, table[i].traits.name)) entry = &table[i];
    if (!entry) return unsupported(name, error);
    struct pre_tokenizer *pre_tokenizer = check_calloc(1, sizeof *pre_tokenizer);
    pre_tokenizer->entry = entry;
    pre_tokenizer->limits = pcre2_match_context_create(NULL);
    CHECK(pre_tokenizer->limits != NULL);
    (void)pcre2_set_match_limit(pre_tokenizer->limits, MATCH_LIMIT);
    (void)pcre2_set_depth_limit(pre_tokenizer->limits, DEPTH_LIMIT);
    (void)pcre2_set_heap_limit(pre_tokenizer->limits, HEAP_LIMIT_KIB);
    for (size_t i = 0; i < PATTERNS_MAX && entry->patterns[i]; i++) pre_tokenizer->codes[pre_tokenizer->n_codes++] = compile(entry->patterns[i]);
    *result = pre_tokenizer;
    return STATUS_OK;
}

void pre_tokenizer_close(struct pre_tokenizer *pre_tokenizer) {
    if (!pre_tokenizer) return;
    for (size_t i = 0; i < pre_tokenizer->n_codes; i++) pcre2_code_free(pre_tokenizer->codes[i]);
    pcre2_match_context_free(pre_tokenizer->limits);
    free(pre_tokenizer);
}

const struct pre_tokenizer_traits *pre_tokenizer_traits(const struct pre_tokenizer *pre_tokenizer) { return &pre_tokenizer->entry->traits; }

struct split {
    const struct pre_tokenizer *pre_tokenizer;
    pcre2_match_data *match[PATTERNS_MAX];
    pre_tokenizer_word *word;
    void *context;
    struct error *error;
};

/* Cuts with pattern `level` and hands what it gets to the next; depth is PATTERNS_MAX. */
static enum status cut(const struct split *split, size_t level, const char *text, size_t length) {
    if (length == 0) return STATUS_OK;
    if (level == split->pre_tokenizer->n_codes) return split->word(split->context, text, length);
    const PCRE2_SIZE *ends = pcre2_get_ovector_pointer(split->match[level]);
    size_t position = 0;
    enum status status = STATUS_OK;
    while (position < length && status == STATUS_OK) {
        int found = pcre2_match(split->pre_tokenizer->codes[level], (PCRE2_SPTR)text, length, position, PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY,
                                split->match[level], split->pre_tokenizer->limits);
        if (found == PCRE2_ERROR_NOMATCH) return cut(split, level + 1, text + position, length - position);
        if (found < 0) return error_set(split->error, STATUS_INVALID, "the text cannot be split into words (matching limit, code %d)", found);
        size_t start = ends[0], end = ends[1];
        CHECK(start >= position && end > start && end <= length);
        status = cut(split, level + 1, text + position, start - position);
        if (status == STATUS_OK) status = cut(split, level + 1, text + start, end - start);
        position = end;
    }
    return status;
}

enum status pre_tokenizer_split(const struct pre_tokenizer *pre_tokenizer, const char *text, size_t length, pre_tokenizer_word *word, void *context,
                                struct error *error) {
    struct split split = {.pre_tokenizer = pre_tokenizer, .word = word, .context = context, .error = error};
    for (size_t i = 0; i < pre_tokenizer->n_codes; i++) {
        split.match[i] = pcre2_match_data_create(1, NULL);
        CHECK(split.match[i] != NULL);
    }
    enum status status = cut(&split, 0, text, length);
    for (size_t i = 0; i < pre_tokenizer->n_codes; i++) pcre2_match_data_free(split.match[i]);
    return status;
}
