/* From tokenizer.ggml.* of a GGUF file to a struct tokenizer. The vocabulary is hostile: types, counts, ids, lengths, duplicates and merges are checked here, so
 * that encoding and decoding need no checks. Owns the tokenizer until tokenizer_close; runs on the thread that opens the model.
 * Deliberately stricter than loaders that repair: an id outside the vocabulary or two tokens with one text is an error, not a guess. */
#include "model/tokenizer_load.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/check.h"
#include "model/tokenizer_internal.h"
#include "model/utf8.h"

#define TOKENS_MAX (1u << 24)
#define MERGES_MAX (1u << 25)
#define BYTE_EOS 256

struct loader {
    const struct gguf *gguf;
    struct tokenizer *tokenizer;
    struct error *error;
    size_t pool_used, pool_capacity;
};

#define FAIL(loader, status, format, ...) error_set((loader)->error, status, "%s: " format, gguf_path((loader)->gguf), __VA_ARGS__)

/* Bytes as characters (Radford et al. 2019): the printable ones of Latin-1 are themselves, the others U+0100 and up in order. */
static bool is_printable(uint32_t byte) { return (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae; }

static uint32_t byte_codepoint(uint8_t byte) {
    if (is_printable(byte)) return byte;
    uint32_t others = 0;
    for (uint32_t i = 0; i < byte; i++) others += !is_printable(i);
    return 256 + others;
}

uint32_t byte_character(uint8_t byte, char out[2]) {
    uint32_t codepoint = byte_codepoint(byte);
    if (codepoint < 0x80) {
        out[0] = (char)codepoint;
        return 1;
    }
    out[0] = (char)(0xc0 | codepoint >> 6);
    out[1] = (char)(0x80 | (codepoint & 0x3f));
    return 2;
}

static size_t pool_add(struct loader *loader, const char *bytes, size_t length) {
    size_t needed = loader->pool_used + length;
    if (needed > loader->pool_capacity) {
        loader->pool_capacity = needed > (1u << 19) ? 2 * needed : 1u << 20;
        loader->tokenizer->pool = check_realloc(loader->tokenizer->pool, loader->pool_capacity, 1);
    }
    size_t at = loader->pool_used;
    if (length > 0) memcpy(loader->tokenizer->pool + at, bytes, length);
    loader->pool_used = needed;
    return at;
}

/* "<0x0A>": the byte, or -1. */
static int byte_of(const char *text, size_t length) {
    static const char digits[] = "0123456789ABCDEF";
    if (length != 6 || memcmp(text, "<0x", 3) != 0 || text[5] != '>') return -1;
    const char *high = memchr(digits, text[3], 16), *low = memchr(digits, text[4], 16);
    return high && low ? (int)((high - digits) * 16 + (low - digits)) : -1;
}

/* Keys */

static enum status read_types(struct loader *loader) {
    struct tokenizer *tokenizer = loader->tokenizer;
    struct gguf_array types = {0};
    enum status status = gguf_get_array(loader->gguf, "tokenizer.ggml.token_type", GGUF_OPTIONAL, GGUF_I32, &types, loader->error);
    if (status != STATUS_OK) return status;
    bool present = gguf_has(loader->gguf, "tokenizer.ggml.token_type");
    if (present && types.count != tokenizer->n_tokens)
        return FAIL(loader, STATUS_INVALID, "key tokenizer.ggml.token_type has %zu elements for %" PRIu32 " tokens", types.count,
                    tokenizer->n_tokens);
    for (uint32_t i = 0; i < tokenizer->n_tokens; i++) {
        struct token *token = &tokenizer->tokens[i];
        bool byte = tokenizer->type == TOKENIZER_SPM && byte_of(tokenizer->pool + token->text, token->text_length) >= 0;
        int32_t type = present ? gguf_array_i32(&types, i) : byte ? TOKEN_BYTE : TOKEN_NORMAL;
        if (type < 0 || type >= TOKEN_TYPES)
            return FAIL(loader, STATUS_INVALID, "key tokenizer.ggml.token_type: token %" PRIu32 " has type %" PRId32 " (0 to %d)", i, type,
                        TOKEN_TYPES - 1);
        token->type = (uint8_t)type;
    }
    return STATUS_OK;
}

static enum status read_scores(struct loader *loader) {
    struct tokenizer *tokenizer = loader->tokenizer;
    struct gguf_array scores = {0};
    if (tokenizer->type != TOKENIZER_SPM) return STATUS_OK;
    enum status status = gguf_get_array(loader->gguf, "tokenizer.ggml.scores", GGUF_REQUIRED, GGUF_F32, &scores, loader->error);
    if (status != STATUS_OK) return status;
    if (scores.count != tokenizer->n_tokens)
        return FAIL(loader, STATUS_INVALID, "key tokenizer.ggml.scores has %zu elements for %" PRIu32 " tokens", scores.count, tokenizer->n_tokens);
    for (uint32_t i = 0; i < tokenizer->n_tokens; i++) {
        tokenizer->tokens[i].score = gguf_array_f32(&scores, i);
        if (!isfinite(tokenizer->tokens[i].score))
            return FAIL(loader, STATUS_INVALID, "key tokenizer.ggml.scores: the score of token %" PRIu32 " is not a number", i);
    }
    return STATUS_OK;
}

static enum status read_texts(struct loader *loader) {
    struct tokenizer *tokenizer = loader->tokenizer;
    struct gguf_array texts = {0};
    enum status status = gguf_get_array(loader->gguf, "tokenizer.ggml.tokens", GGUF_REQUIRED, GGUF_STRING, &texts, loader->error);
    if (status != STATUS_OK) return status;
    if (texts.count == 0 || texts.count > TOKENS_MAX)
        return FAIL(loader, STATUS_INVALID, "key tokenizer.ggml.tokens has %zu elements (1 to %u)", texts.count, TOKENS_MAX);
    tokenizer->n_tokens = (uint32_t)texts.count;
    tokenizer->tokens = check_calloc(texts.count, sizeof *tokenizer->tokens);
    struct gguf_strings cursor = gguf_strings_begin(&texts);
    struct gguf_string text;
    for (uint32_t i = 0; gguf_strings_next(&cursor, &text); i++) {
        if (text.length > TOKEN_TEXT_MAX)
            return FAIL(loader, STATUS_UNSUPPORTED, "key tokenizer.ggml.tokens: token %" PRIu32 " has %zu bytes (at most %u)", i, text.length,
                        TOKEN_TEXT_MAX);
        tokenizer->tokens[i].text_length = (uint32_t)text.length;
        tokenizer->tokens[i].text = pool_add(loader, text.bytes, text.length);
    }
    return STATUS_OK;
}

static enum status read_id(struct loader *loader, const char *key, int32_t fallback, int32_t *id) {
    uint32_t value = 0;
    enum status status = gguf_get_u32(loader->gguf, key, GGUF_OPTIONAL, &value, loader->error);
    if (status != STATUS_OK) return status;
    if (!gguf_has(loader->gguf, key)) {
        *id = fallback >= 0 && (uint32_t)fallback < loader->tokenizer->n_tokens ? fallback : TOKEN_NONE;
        return STATUS_OK;
    }
    if (value >= loader->tokenizer->n_tokens)
        return FAIL(loader, STATUS_INVALID, "key %s is %" PRIu32 ", the vocabulary has %" PRIu32 " tokens", key, value, loader->tokenizer->n_tokens);
    *id = (int32_t)value;
    return STATUS_OK;
}

/* Tables */

static size_t map_size(size_t count) {
    size_t size = 16;
    while (size < 2 * count) size *= 2;
    return size;
}

/* In SPM, control, unknown and byte tokens are never made from text that merely looks like them; in BPE no merge makes them, and a word is one only by name. */
static bool from_text(const struct tokenizer *tokenizer, const struct token *token) {
    if (token->text_length == 0) return false;
    if (tokenizer->type == TOKENIZER_BPE) return true;
    return token->type != TOKEN_CONTROL && token->type != TOKEN_UNKNOWN && token->type != TOKEN_BYTE;
}

static enum status map_texts(struct loader *loader) {
    struct tokenizer *tokenizer = loader->tokenizer;
    struct text_map *map = &tokenizer->texts;
    size_t size = map_size(tokenizer->n_tokens);
    map->tokens = check_calloc(size, sizeof *map->tokens);
    memset(map->tokens, 0xff, size * sizeof *map->tokens); /* TOKEN_NONE */
    map->mask = size - 1;
    for (uint32_t i = 0; i < tokenizer->n_tokens; i++) {
        const struct token *token = &tokenizer->tokens[i];
        if (!from_text(tokenizer, token)) continue;
        const char *text = tokenizer->pool + token->text;
        int32_t same = tokenizer_find_text(tokenizer, text, token->text_length);
        if (same != TOKEN_NONE) {
            char shown[64];
            return FAIL(loader, STATUS_INVALID, "key tokenizer.ggml.tokens: tokens %" PRId32 " and %" PRIu32 " are both \"%s\"", same, i,
                        gguf_printable((struct gguf_string){text, token->text_length}, shown, sizeof shown));
        }
        size_t slot = tokenizer_hash_text(tokenizer->seed, text, token->text_length) & map->mask;
        while (map->tokens[slot] != TOKEN_NONE) slot = (slot + 1) & map->mask;
        map->tokens[slot] = (int32_t)i;
    }
    return STATUS_OK;
}

static enum status broken_merge(struct loader *loader, size_t index, struct gguf_string merge, const char *problem) {
    char shown[96];
    return FAIL(loader, STATUS_INVALID, "key tokenizer.ggml.merges: merge %zu \"%s\" %s", index, gguf_printable(merge, shown, sizeof shown), problem);
}

static enum status add_merge(struct loader *loader, size_t index, struct gguf_string rule) {
    struct tokenizer *tokenizer = loader->tokenizer;
    char joined[2 * TOKEN_TEXT_MAX];
    const char *space = rule.length > 2 ? memchr(rule.bytes + 1, ' ', rule.length - 2) : NULL;
    if (!space || rule.length > sizeof joined) return broken_merge(loader, index, rule, "is not two texts with a space between");
    size_t first = (size_t)(space - rule.bytes), second = rule.length - first - 1;
    memcpy(joined, rule.bytes, first);
    memcpy(joined + first, space + 1, second);
    struct merge merge = {.left = tokenizer_find_text(tokenizer, joined, first),
                          .right = tokenizer_find_text(tokenizer, joined + first, second),
                          .merged = tokenizer_find_text(tokenizer, joined, first + second),
                          .rank = (uint32_t)index};
    if (merge.left == TOKEN_NONE || merge.right == TOKEN_NONE || merge.merged == TOKEN_NONE)
        return broken_merge(loader, index, rule, "is not made of tokens that make a token");
    if (tokenizer_find_merge(tokenizer, merge.left, merge.right)) return STATUS_OK; /* the first has the better rank */
    size_t slot = tokenizer_hash_pair(tokenizer->seed, merge.left, merge.right) & tokenizer->merges.mask;
    while (tokenizer->merges.merges[slot].left != TOKEN_NONE) slot = (slot + 1) & tokenizer->merges.mask;
    tokenizer->merges.merges[slot] = merge;
    return STATUS_OK;
}

static enum status read_merges(struct loader *loader) {
    struct merge_map *map = &loader->tokenizer->merges;
    struct gguf_array rules = {0};
    enum status status = gguf_get_array(loader->gguf, "tokenizer.ggml.merges", GGUF_REQUIRED, GGUF_STRING, &rules, loader->error);
    if (status != STATUS_OK) return status;
    if (rules.count > MERGES_MAX)
        return FAIL(loader, STATUS_INVALID, "key tokenizer.ggml.merges has %zu elements (at most %u)", rules.count, MERGES_MAX);
    size_t size = map_size(rules.count);
    map->merges = check_calloc(size, sizeof *map->merges);
    for (size_t i = 0; i < size; i++) map->merges[i].left = TOKEN_NONE;
    map->mask = size - 1;
    struct gguf_strings cursor = gguf_strings_begin(&rules);
    struct gguf_string rule;
    for (size_t i = 0; gguf_strings_next(&cursor, &rule) && status == STATUS_OK; i++) status = add_merge(loader, i, rule);
    return status;
}

static enum status map_bytes(struct loader *loader) {
    struct tokenizer *tokenizer = loader->tokenizer;
    for (int byte = 0; byte < 256; byte++) tokenizer->byte_tokens[byte] = TOKEN_NONE;
    if (tokenizer->type == TOKENIZER_BPE) {
        char text[2];
        for (int byte = 0; byte < 256; byte++)
            tokenizer->byte_tokens[byte] = tokenizer_find_text(tokenizer, text, byte_character((uint8_t)byte, text));
        return STATUS_OK;
    }
    for (uint32_t i = 0; i < tokenizer->n_tokens; i++) {
        const struct token *token = &tokenizer->tokens[i];
        if (token->type != TOKEN_BYTE) continue;
        int byte = byte_of(tokenizer->pool + token->text, token->text_length);
        if (byte < 0 || tokenizer->byte_tokens[byte] != TOKEN_NONE)
            return FAIL(loader, STATUS_INVALID, "key tokenizer.ggml.tokens: byte token %" PRIu32 " is not \"<0x00>\" to \"<0xFF>\", each once", i);
        tokenizer->byte_tokens[byte] = (int32_t)i;
    }
    return STATUS_OK;
}

/* What a token stands for. */
static size_t bytes_of(const struct tokenizer *tokenizer, const struct token *token, const int16_t *byte_of_codepoint, char *out) {
    const char *text = tokenizer->pool + token->text;
    size_t used = 0;
    bool plain = token->type == TOKEN_CONTROL || token->type == TOKEN_USER_DEFINED || token->type == TOKEN_UNKNOWN;
    if (!plain && token->type == TOKEN_BYTE && byte_of(text, token->text_length) >= 0) {
        out[used++] = (char)byte_of(text, token->text_length);
        return used;
    }
    for (size_t i = 0; i < token->text_length && !plain;) {
        uint8_t first = (uint8_t)text[i];
        size_t left = token->text_length - i;
        if (tokenizer->type == TOKENIZER_SPM) {
            bool space = left >= 3 && memcmp(text + i, "\xe2\x96\x81", 3) == 0;
            out[used++] = space ? ' ' : text[i];
            i += space ? 3 : 1;
            continue;
        }
        int length = utf8_character(text + i, left);
        uint32_t codepoint = length == 1 ? first : length == 2 ? (uint32_t)((first & 0x1f) << 6 | (text[i + 1] & 0x3f)) : UINT32_MAX;
        if (codepoint >= 512 || byte_of_codepoint[codepoint] < 0) {
            plain = true; /* not written in byte characters: the text itself, as it is */
            break;
        }
        out[used++] = (char)byte_of_codepoint[codepoint];
        i += (size_t)length;
    }
    if (!plain) return used;
    if (token->text_length) memcpy(out, text, token->text_length);
    return token->text_length;
}

static void decode_tokens(struct loader *loader) {
    struct tokenizer *tokenizer = loader->tokenizer;
    int16_t byte_of_codepoint[512];
    char bytes[TOKEN_TEXT_MAX];
    memset(byte_of_codepoint, 0xff, sizeof byte_of_codepoint);
    for (int byte = 0; byte < 256; byte++) byte_of_codepoint[byte_codepoint((uint8_t)byte)] = (int16_t)byte;
    for (uint32_t i = 0; i < tokenizer->n_tokens; i++) {
        size_t length = bytes_of(tokenizer, &tokenizer->tokens[i], byte_of_codepoint, bytes);
        tokenizer->tokens[i].bytes_length = (uint32_t)length;
        tokenizer->tokens[i].bytes = pool_add(loader, bytes, length);
    }
}

/* Special tokens */

static int order_texts(const void *a, const void *b, void *context) {
    const struct tokenizer *tokenizer = context;
    const struct token *first = &tokenizer->tokens[*(const int32_t *)a], *second = &tokenizer->tokens[*(const int32_t *)b];
    struct gguf_string x = {tokenizer->pool + first->text, first->text_length}, y = {tokenizer->pool + second->text, second->text_length};
    size_t shared = x.length < y.length ? x.length : y.length;
    int order = memcmp(x.bytes, y.bytes, shared);
    if (order != 0) return order;
    if (x.length != y.length) return x.length < y.length ? -1 : 1;
    return *(const int32_t *)a < *(const int32_t *)b ? -1 : 1;
}

static void collect(struct tokenizer *tokenizer, struct special_set *set, unsigned types) {
    for (int pass = 0; pass < 2; pass++) {
        size_t count = 0;
        for (uint32_t i = 0; i < tokenizer->n_tokens; i++) {
            const struct token *token = &tokenizer->tokens[i];
            if (!(types >> token->type & 1) || token->text_length == 0) continue;
            if (pass == 1) {
                set->tokens[count] = (int32_t)i;
                set->first_byte[(uint8_t)tokenizer->pool[token->text]] = true;
            }
            count++;
        }
        if (pass == 0) set->tokens = check_calloc(count ? count : 1, sizeof *set->tokens);
        set->count = count;
    }
    qsort_r(set->tokens, set->count, sizeof *set->tokens, order_texts, tokenizer);
}

static void add_end(struct tokenizer *tokenizer, int32_t token) {
    if (token == TOKEN_NONE || tokenizer_is_end(tokenizer, token) || tokenizer->n_ends == END_TOKENS_MAX) return;
    tokenizer->ends[tokenizer->n_ends++] = token;
}

/* Files rarely say which tokens end a turn: these texts do, in the models that have them. */
static void find_ends(struct tokenizer *tokenizer) {
    static const char *const names[] = {"<|eot_id|>",
                                        "<|im_end|>",
                                        "<|end|>",
                                        "<|return|>",
                                        "<|call|>",
                                        "<end_of_turn>",
                                        "<|endoftext|>",
                                        "<|eom_id|>",
                                        "<EOT>",
                                        "_<EOT>",
                                        "[EOT]",
                                        "[EOS]",
                                        "</s>",
                                        "<eos>",
                                        "<|end_of_text|>",
                                        "<end_of_utterance>",
                                        "<｜end▁of▁sentence｜>",
                                        "<|fim_pad|>",
                                        "<|repo_name|>",
                                        "<reponame>",
                                        "<|file_sep|>"};
    for (uint32_t i = 0; i < tokenizer->n_tokens; i++) {
        struct token *token = &tokenizer->tokens[i];
        for (size_t name = 0; name < sizeof names / sizeof *names; name++) {
            if (!gguf_string_equals((struct gguf_string){tokenizer->pool + token->text, token->text_length}, names[name])) continue;
            token->type = TOKEN_CONTROL; /* converters forget it for some */
            add_end(tokenizer, (int32_t)i);
        }
    }
}

static enum status read_specials(struct loader *loader) {
    struct tokenizer *tokenizer = loader->tokenizer;
    bool spm = tokenizer->type == TOKENIZER_SPM;
    int32_t eot = TOKEN_NONE, eom = TOKEN_NONE;
    enum status status = read_id(loader, "tokenizer.ggml.bos_token_id", spm ? 1 : TOKEN_NONE, &tokenizer->bos);
    if (status == STATUS_OK) status = read_id(loader, "tokenizer.ggml.eos_token_id", spm ? 2 : TOKEN_NONE, &tokenizer->eos);
    if (status == STATUS_OK) status = read_id(loader, "tokenizer.ggml.unknown_token_id", spm ? 0 : TOKEN_NONE, &tokenizer->unknown);
    if (status == STATUS_OK) status = read_id(loader, "tokenizer.ggml.eot_token_id", TOKEN_NONE, &eot);
    if (status == STATUS_OK) status = read_id(loader, "tokenizer.ggml.eom_token_id", TOKEN_NONE, &eom);
    if (status != STATUS_OK) return status;
    add_end(tokenizer, tokenizer->eos);
    add_end(tokenizer, eot);
    add_end(tokenizer, eom);
    find_ends(tokenizer);

    bool adds_bos = spm || pre_tokenizer_traits(tokenizer->pre_tokenizer)->adds_bos, adds_eos = false;
    tokenizer->adds_space_prefix = spm;
    status = gguf_get_bool(loader->gguf, "tokenizer.ggml.add_bos_token", GGUF_OPTIONAL, &adds_bos, loader->error);
    if (status == STATUS_OK) status = gguf_get_bool(loader->gguf, "tokenizer.ggml.add_eos_token", GGUF_OPTIONAL, &adds_eos, loader->error);
    bool prefix = spm;
    if (status == STATUS_OK) status = gguf_get_bool(loader->gguf, "tokenizer.ggml.add_space_prefix", GGUF_OPTIONAL, &prefix, loader->error);
    if (status != STATUS_OK) return status;
    tokenizer->adds_space_prefix = spm && prefix;
    if (adds_bos && tokenizer->bos == TOKEN_NONE && gguf_has(loader->gguf, "tokenizer.ggml.add_bos_token"))
        return FAIL(loader, STATUS_INVALID, "%s", "key tokenizer.ggml.add_bos_token is true, but there is no tokenizer.ggml.bos_token_id");
    if (adds_eos && tokenizer->eos == TOKEN_NONE)
        return FAIL(loader, STATUS_INVALID, "%s", "key tokenizer.ggml.add_eos_token is true, but there is no tokenizer.ggml.eos_token_id");
    tokenizer->adds_bos = adds_bos && tokenizer->bos != TOKEN_NONE;
    tokenizer->adds_eos = adds_eos;
    collect(tokenizer, &tokenizer->specials, 1u << TOKEN_CONTROL | 1u << TOKEN_UNKNOWN | 1u << TOKEN_USER_DEFINED);
    collect(tokenizer, &tokenizer->user_defined, 1u << TOKEN_USER_DEFINED);
    return STATUS_OK;
}

/* Opening */

static enum status read_model(struct loader *loader) {
    struct gguf_string model = {0}, pre = {"default", 7};
    enum status status = gguf_get_string(loader->gguf, "tokenizer.ggml.model", GGUF_REQUIRED, &model, loader->error);
    if (status != STATUS_OK) return status;
    if (gguf_string_equals(model, "llama")) {
        loader->tokenizer->type = TOKENIZER_SPM;
        return STATUS_OK;
    }
    char shown[64];
    if (!gguf_string_equals(model, "gpt2"))
        return FAIL(loader, STATUS_UNSUPPORTED, "key tokenizer.ggml.model is \"%s\"; supported: gpt2, llama",
                    gguf_printable(model, shown, sizeof shown));
    loader->tokenizer->type = TOKENIZER_BPE;
    status = gguf_get_string(loader->gguf, "tokenizer.ggml.pre", GGUF_OPTIONAL, &pre, loader->error);
    if (status != STATUS_OK) return status;
    status = pre_tokenizer_open(pre, &loader->tokenizer->pre_tokenizer, loader->error);
    return status == STATUS_OK ? status : error_prefix(loader->error, "%s", gguf_path(loader->gguf));
}

static enum status load(struct loader *loader) {
    enum status status = read_model(loader);
    if (status == STATUS_OK) status = read_texts(loader);
    if (status == STATUS_OK) status = read_types(loader);
    if (status == STATUS_OK) status = read_scores(loader);
    if (status == STATUS_OK) status = map_texts(loader);
    if (status == STATUS_OK) status = map_bytes(loader);
    if (status == STATUS_OK && loader->tokenizer->type == TOKENIZER_BPE) status = read_merges(loader);
    if (status == STATUS_OK) status = read_specials(loader);
    if (status == STATUS_OK) decode_tokens(loader);
    return status;
}

enum status tokenizer_open(const struct gguf *gguf, struct tokenizer **result, struct error *error) {
    struct error ignored;
    struct tokenizer *tokenizer = check_calloc(1, sizeof *tokenizer);
    struct loader loader = {.gguf = gguf, .tokenizer = tokenizer, .error = error ? error : &ignored};
    tokenizer->bos = tokenizer->eos = tokenizer->unknown = TOKEN_NONE;
    if (getrandom(&tokenizer->seed, sizeof tokenizer->seed, GRND_NONBLOCK) != sizeof tokenizer->seed)
        tokenizer->seed = (uint64_t)(uintptr_t)tokenizer;
    enum status status = load(&loader);
    if (status != STATUS_OK) {
        tokenizer_close(tokenizer);
        return status;
    }
    *result = tokenizer;
    return STATUS_OK;
}

struct tokenizer *tokenizer_byte_level(uint32_t n_vocab) {
    CHECK(n_vocab > BYTE_EOS && n_vocab <= INT32_MAX);
    struct tokenizer *tokenizer = check_calloc(1, sizeof *tokenizer);
    tokenizer->type = TOKENIZER_BYTES;
    tokenizer->n_tokens = n_vocab;
    tokenizer->tokens = check_calloc(n_vocab, sizeof *tokenizer->tokens);
    tokenizer->pool = check_calloc(256, 1);
    for (uint32_t i = 0; i < n_vocab; i++) {
        tokenizer->tokens[i].type = i == BYTE_EOS ? TOKEN_CONTROL : TOKEN_NORMAL;
        if (i >= 256) continue;
        tokenizer->pool[i] = (char)i;
        tokenizer->tokens[i].bytes = i;
        tokenizer->tokens[i].bytes_length = 1;
    }
    tokenizer->bos = tokenizer->unknown = TOKEN_NONE;
    tokenizer->eos = BYTE_EOS;
    add_end(tokenizer, BYTE_EOS);
    return tokenizer;
}

void tokenizer_close(struct tokenizer *tokenizer) {
    if (!tokenizer) return;
    pre_tokenizer_close(tokenizer->pre_tokenizer);
    free(tokenizer->specials.tokens);
    free(tokenizer->user_defined.tokens);
    free(tokenizer->texts.tokens);
    free(tokenizer->merges.merges);
    free(tokenizer->tokens);
    free(tokenizer->pool);
    free(tokenizer);
}
