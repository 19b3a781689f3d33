/* See tokenizer.h: what all kinds of vocabulary share. Special tokens are cut out of the text first, the leftmost first and of those the longest; what lies
 * between goes to bpe.c or spm.c. Owns nothing beyond a call's scratch; any thread. How a tokenizer is made is in tokenizer_load.c. */
#include "model/tokenizer.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/random.h"
#include "model/tokenizer_internal.h"
#include "model/utf8.h"

#define TEXT_MAX ((size_t)1 << 30) /* symbols are numbered in 32 bits */

uint32_t tokenizer_vocabulary(const struct tokenizer *tokenizer) { return tokenizer->n_tokens; }
int32_t tokenizer_bos(const struct tokenizer *tokenizer) { return tokenizer->bos; }
int32_t tokenizer_eos(const struct tokenizer *tokenizer) { return tokenizer->eos; }
bool tokenizer_adds_bos(const struct tokenizer *tokenizer) { return tokenizer->adds_bos; }

const char *tokenizer_kind(const struct tokenizer *tokenizer) {
    return tokenizer->type == TOKENIZER_SPM ? "spm" : tokenizer->type == TOKENIZER_BPE ? "bpe" : "bytes";
}

const char *tokenizer_pre_tokenizer(const struct tokenizer *tokenizer) {
    return tokenizer->pre_tokenizer ? pre_tokenizer_traits(tokenizer->pre_tokenizer)->name : "";
}

bool tokenizer_is_end(const struct tokenizer *tokenizer, int32_t token) {
    for (uint32_t i = 0; i < tokenizer->n_ends; i++)
        if (tokenizer->ends[i] == token) return true;
    return false;
}

uint32_t tokenizer_end_tokens(const struct tokenizer *tokenizer, int32_t *tokens, uint32_t max) {
    for (uint32_t i = 0; i < tokenizer->n_ends && i < max; i++) tokens[i] = tokenizer->ends[i];
    return tokenizer->n_ends;
}

static bool in_vocabulary(const struct tokenizer *tokenizer, int32_t token) { return token >= 0 && (uint32_t)token < tokenizer->n_tokens; }

bool tokenizer_is_special(const struct tokenizer *tokenizer, int32_t token) {
    if (!in_vocabulary(tokenizer, token)) return false;
    return tokenizer->tokens[token].type == TOKEN_CONTROL || tokenizer->tokens[token].type == TOKEN_UNKNOWN;
}

const char *tokenizer_bytes(const struct tokenizer *tokenizer, int32_t token, size_t *length) {
    *length = 0;
    if (!in_vocabulary(tokenizer, token)) return "";
    *length = tokenizer->tokens[token].bytes_length;
    return tokenizer->pool + tokenizer->tokens[token].bytes;
}

void token_list_done(struct token_list *list) {
    free(list->tokens);
    *list = (struct token_list){0};
}

/* Look-ups */

uint64_t tokenizer_hash_text(uint64_t seed, const char *text, size_t length) {
    uint64_t hash = random_mix(seed ^ length);
    for (; length > 0;) {
        uint64_t word = 0;
        size_t part = length < sizeof word ? length : sizeof word;
        memcpy(&word, text, part);
        hash = random_mix(hash ^ word);
        text += part;
        length -= part;
    }
    return hash;
}

uint64_t tokenizer_hash_pair(uint64_t seed, int32_t left, int32_t right) {
    return random_mix(seed ^ ((uint64_t)(uint32_t)left << 32 | (uint32_t)right));
}

int32_t tokenizer_find_text(const struct tokenizer *tokenizer, const char *text, size_t length) {
    if (length > TOKEN_TEXT_MAX) return TOKEN_NONE;
    const struct text_map *map = &tokenizer->texts;
    for (size_t slot = tokenizer_hash_text(tokenizer->seed, text, length) & map->mask; map->tokens[slot] != TOKEN_NONE;
         slot = (slot + 1) & map->mask) {
        const struct token *token = &tokenizer->tokens[map->tokens[slot]];
        if (token->text_length == length && memcmp(tokenizer->pool + token->text, text, length) == 0) return map->tokens[slot];
    }
    return TOKEN_NONE;
}

const struct merge *tokenizer_find_merge(const struct tokenizer *tokenizer, int32_t left, int32_t right) {
    const struct merge_map *map = &tokenizer->merges;
    for (size_t slot = tokenizer_hash_pair(tokenizer->seed, left, right) & map->mask; map->merges[slot].left != TOKEN_NONE;
         slot = (slot + 1) & map->mask)
        if (map->merges[slot].left == left && map->merges[slot].right == right) return &map->merges[slot];
    return NULL;
}

/* The longest special token at the start of `text`: a range of the sorted texts, narrowed byte by byte. */
static int32_t special_at(const struct tokenizer *tokenizer, const struct special_set *set, const char *text, size_t length) {
    int32_t longest = TOKEN_NONE;
    size_t low = 0, high = set->count;
    for (uint32_t depth = 0; low < high; depth++) {
        /* All texts in the range share `depth` bytes with the text; one that ends here is the first. */
        if (tokenizer->tokens[set->tokens[low]].text_length == depth) longest = set->tokens[low++];
        if (depth == length) break;
        uint8_t byte = (uint8_t)text[depth];
        for (int bound = 0; bound < 2; bound++) { /* the first text with a byte >= this one, then the first with one > it */
            size_t from = low, to = high;
            while (from < to) {
                size_t middle = from + (to - from) / 2;
                uint8_t other = (uint8_t)tokenizer->pool[tokenizer->tokens[set->tokens[middle]].text + depth];
                if (bound == 0 ? other < byte : other <= byte)
                    from = middle + 1;
                else
                    to = middle;
            }
            *(bound == 0 ? &low : &high) = from;
        }
    }
    return longest;
}

/* Encoding */

enum status encoding_emit(struct encoding *encoding, int32_t token) {
    struct token_list *list = encoding->list;
    if (token == TOKEN_NONE) return STATUS_OK;
    if (list->count == encoding->limit) return error_set(encoding->error, STATUS_INVALID, "the text has too many tokens");
    if (list->count == list->capacity) {
        list->capacity = list->capacity ? 2 * list->capacity : 64;
        list->tokens = check_realloc(list->tokens, list->capacity, sizeof *list->tokens);
    }
    list->tokens[list->count++] = token;
    return STATUS_OK;
}

void encoding_reserve(struct encoding *encoding, size_t symbols) {
    encoding->heap_count = 0;
    if (symbols <= encoding->symbols_capacity) return;
    encoding->symbols_capacity = symbols > 256 ? symbols : 256;
    encoding->symbols = check_realloc(encoding->symbols, encoding->symbols_capacity, sizeof *encoding->symbols);
}

static bool goes_before(const struct encoding *encoding, const struct candidate *a, const struct candidate *b) {
    if (encoding->tokenizer->type == TOKENIZER_BPE && a->rank != b->rank) return a->rank < b->rank;
    if (encoding->tokenizer->type == TOKENIZER_SPM && a->score != b->score) return a->score > b->score;
    return a->left < b->left;
}

void encoding_push(struct encoding *encoding, struct candidate candidate) {
    if (encoding->heap_count == encoding->heap_capacity) {
        encoding->heap_capacity = encoding->heap_capacity ? 2 * encoding->heap_capacity : 256;
        encoding->heap = check_realloc(encoding->heap, encoding->heap_capacity, sizeof *encoding->heap);
    }
    size_t at = encoding->heap_count++;
    for (size_t parent; at > 0 && goes_before(encoding, &candidate, &encoding->heap[parent = (at - 1) / 2]); at = parent)
        encoding->heap[at] = encoding->heap[parent];
    encoding->heap[at] = candidate;
}

struct candidate encoding_pop(struct encoding *encoding) {
    struct candidate *heap = encoding->heap, best = heap[0], last = heap[--encoding->heap_count];
    size_t at = 0;
    for (size_t child; (child = 2 * at + 1) < encoding->heap_count; at = child) {
        if (child + 1 < encoding->heap_count && goes_before(encoding, &heap[child + 1], &heap[child])) child++;
        if (!goes_before(encoding, &heap[child], &last)) break;
        heap[at] = heap[child];
    }
    heap[at] = last;
    return best;
}

/* What lies between special tokens. */
static enum status encode_piece(struct encoding *encoding, const char *text, size_t length) {
    if (length == 0) return STATUS_OK;
    switch (encoding->tokenizer->type) {
    case TOKENIZER_BPE: return bpe_encode(encoding, text, length);
    case TOKENIZER_SPM: return spm_encode(encoding, text, length);
    case TOKENIZER_BYTES: break;
    }
    enum status status = STATUS_OK;
    for (size_t i = 0; i < length && status == STATUS_OK; i++) status = encoding_emit(encoding, (uint8_t)text[i]);
    return status;
}

static enum status encode_text(struct encoding *encoding, const char *text, size_t length, bool parse_special) {
    const struct tokenizer *tokenizer = encoding->tokenizer;
    const struct special_set *set = parse_special ? &tokenizer->specials : &tokenizer->user_defined;
    size_t start = 0;
    enum status status = STATUS_OK;
    for (size_t i = 0; i < length && status == STATUS_OK && set->count > 0;) {
        int32_t special = set->first_byte[(uint8_t)text[i]] ? special_at(tokenizer, set, text + i, length - i) : TOKEN_NONE;
        if (special == TOKEN_NONE) {
            i++;
            continue;
        }
        status = encode_piece(encoding, text + start, i - start);
        if (status == STATUS_OK) status = encoding_emit(encoding, special);
        start = i += tokenizer->tokens[special].text_length;
    }
    return status == STATUS_OK ? encode_piece(encoding, text + start, length - start) : status;
}

enum status tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t length, bool add_special, bool parse_special,
                             size_t max_tokens, struct token_list *list, struct error *error) {
    if (length > TEXT_MAX) return error_set(error, STATUS_INVALID, "a text of %zu bytes (at most %zu)", length, TEXT_MAX);
    struct encoding encoding = {.tokenizer = tokenizer, .list = list, .limit = SIZE_MAX, .error = error};
    if (max_tokens > 0 && !size_add(list->count, max_tokens, &encoding.limit)) encoding.limit = SIZE_MAX;
    enum status status = STATUS_OK;
    if (add_special && tokenizer->adds_bos) status = encoding_emit(&encoding, tokenizer->bos);
    if (status == STATUS_OK) status = encode_text(&encoding, text, length, parse_special);
    if (status == STATUS_OK && add_special && tokenizer->adds_eos) status = encoding_emit(&encoding, tokenizer->eos);
    free(encoding.symbols);
    free(encoding.heap);
    free(encoding.text);
    return status;
}

/* Decoding */

/* Gives out what is complete or can never be. */
static void release(struct detokenizer *state, struct buffer *out) {
    while (state->n_held > 0) {
        int length = utf8_character(state->held, state->n_held);
        if (length == UTF8_PARTIAL) return;
        uint32_t ready = length == UTF8_INVALID ? 1 : (uint32_t)length;
        buffer_append(out, state->held, ready);
        state->n_held -= ready;
        memmove(state->held, state->held + ready, state->n_held);
    }
}

void detokenizer_put(struct detokenizer *state, const struct tokenizer *tokenizer, int32_t token, bool skip_special, struct buffer *out) {
    if (skip_special && tokenizer_is_special(tokenizer, token)) return;
    size_t length;
    const char *bytes = tokenizer_bytes(tokenizer, token, &length);
    if (length == 0) return;
    size_t from = !state->started && tokenizer->adds_space_prefix && bytes[0] == ' ' ? 1 : 0;
    state->started = true;
    for (size_t i = from; i < length; i++) {
        state->held[state->n_held++] = bytes[i];
        release(state, out);
    }
}

void detokenizer_finish(struct detokenizer *state, struct buffer *out) {
    buffer_append(out, state->held, state->n_held);
    state->n_held = 0;
}
