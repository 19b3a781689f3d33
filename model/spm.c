/* SPM (SentencePiece's BPE as GGUF files carry it): each character is a symbol, then the neighbours whose joined text is the token with the highest score are
 * merged until none is; a character without a token becomes the tokens of its bytes. A heap keeps it O(n log n); token texts are bounded at load.
 * Source: Kudo and Richardson 2018. Owns nothing; any thread. */
#include <string.h>

#include "base/check.h"
#include "model/tokenizer_internal.h"
#include "model/utf8.h"

#define ESCAPED_SPACE "\xe2\x96\x81" /* U+2581 */

static void consider(struct encoding *encoding, uint32_t left, uint32_t right) {
    if (left == NO_SYMBOL || right == NO_SYMBOL) return;
    const struct symbol *first = &encoding->symbols[left], *second = &encoding->symbols[right];
    int32_t merged = tokenizer_find_text(encoding->tokenizer, encoding->text + first->start, first->length + second->length);
    if (merged == TOKEN_NONE) return;
    /* The lengths say what the symbols were: they only grow. */
    encoding_push(encoding, (struct candidate){.left = left,
                                               .right = right,
                                               .left_token = (int32_t)first->length,
                                               .right_token = (int32_t)second->length,
                                               .merged = merged,
                                               .score = encoding->tokenizer->tokens[merged].score});
}

static void merge_all(struct encoding *encoding) {
    struct symbol *symbols = encoding->symbols;
    while (encoding->heap_count > 0) {
        struct candidate best = encoding_pop(encoding);
        struct symbol *left = &symbols[best.left], *right = &symbols[best.right];
        if (left->token == DEAD || right->token == DEAD || (int32_t)left->length != best.left_token || (int32_t)right->length != best.right_token)
            continue;
        left->token = best.merged;
        left->length += right->length;
        left->next = right->next;
        right->token = DEAD;
        if (left->next != NO_SYMBOL) symbols[left->next].previous = best.left;
        consider(encoding, left->previous, best.left);
        consider(encoding, best.left, left->next);
    }
}

static enum status emit(struct encoding *encoding, const struct symbol *symbol) {
    const struct tokenizer *tokenizer = encoding->tokenizer;
    if (symbol->token != TOKEN_NONE) return encoding_emit(encoding, symbol->token);
    const char *bytes = encoding->text + symbol->start;
    bool all = true;
    for (uint32_t i = 0; i < symbol->length; i++) all = all && tokenizer->byte_tokens[(uint8_t)bytes[i]] != TOKEN_NONE;
    if (!all) return encoding_emit(encoding, tokenizer->unknown);
    enum status status = STATUS_OK;
    for (uint32_t i = 0; i < symbol->length && status == STATUS_OK; i++) status = encoding_emit(encoding, tokenizer->byte_tokens[(uint8_t)bytes[i]]);
    return status;
}

/* The text with U+2581 for each space, one more in front if `prefix`. Returns its length. */
static size_t escape(struct encoding *encoding, const char *text, size_t length, bool prefix) {
    size_t spaces = prefix ? 1 : 0, used = 0;
    for (size_t i = 0; i < length; i++) spaces += text[i] == ' ';
    size_t needed = length + 3 * spaces;
    if (needed > encoding->text_capacity) {
        encoding->text = check_realloc(encoding->text, needed, 1);
        encoding->text_capacity = needed;
    }
    if (prefix) memcpy(encoding->text, ESCAPED_SPACE, 3), used = 3;
    for (size_t i = 0; i < length; i++) {
        if (text[i] == ' ')
            memcpy(encoding->text + used, ESCAPED_SPACE, 3), used += 3;
        else
            encoding->text[used++] = text[i];
    }
    return used;
}

enum status spm_encode(struct encoding *encoding, const char *piece, size_t piece_length) {
    size_t length = escape(encoding, piece, piece_length, encoding->tokenizer->adds_space_prefix);
    if (length == 0) return STATUS_OK;
    encoding_reserve(encoding, length);
    uint32_t count = 0;
    for (size_t start = 0; start < length; count++) {
        int character = utf8_character(encoding->text + start, length - start);
        size_t size = character > 0 ? (size_t)character : 1; /* a byte that is no character is a symbol of its own */
        encoding->symbols[count] = (struct symbol){.token = tokenizer_find_text(encoding->tokenizer, encoding->text + start, size),
                                                   .previous = count == 0 ? NO_SYMBOL : count - 1,
                                                   .next = start + size == length ? NO_SYMBOL : count + 1,
                                                   .start = (uint32_t)start,
                                                   .length = (uint32_t)size};
        start += size;
    }
    for (uint32_t i = 1; i < count; i++) consider(encoding, i - 1, i);
    merge_all(encoding);
    enum status status = STATUS_OK;
    for (uint32_t i = 0; i != NO_SYMBOL && status == STATUS_OK; i = encoding->symbols[i].next) status = emit(encoding, &encoding->symbols[i]);
    return status;
}
