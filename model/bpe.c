/* Byte-level BPE: each byte of a word is a token, then the pair with the lowest rank is merged until no pair has one. A heap keeps it O(n log n) for words of
 * any length. Bytes the vocabulary has no token for are passed over, as the model's own tokenizers do.
 * Source: Sennrich et al. 2016 (BPE); Radford et al. 2019 (bytes as characters). Owns nothing; any thread. */
#include "base/check.h"
#include "model/tokenizer_internal.h"
#include "model/utf8.h"

static void consider(struct encoding *encoding, uint32_t left, uint32_t right) {
    if (left == NO_SYMBOL || right == NO_SYMBOL) return;
    int32_t first = encoding->symbols[left].token, second = encoding->symbols[right].token;
    if (first < 0 || second < 0) return;
    const struct merge *merge = tokenizer_find_merge(encoding->tokenizer, first, second);
    if (!merge) return;
    encoding_push(
        encoding,
        (struct candidate){.left = left, .right = right, .left_token = first, .right_token = second, .merged = merge->merged, .rank = merge->rank});
}

static void merge_all(struct encoding *encoding) {
    struct symbol *symbols = encoding->symbols;
    while (encoding->heap_count > 0) {
        struct candidate best = encoding_pop(encoding);
        struct symbol *left = &symbols[best.left], *right = &symbols[best.right];
        /* Outdated when either side has been merged since. */
        if (left->token != best.left_token || right->token != best.right_token || left->next != best.right) continue;
        left->token = best.merged;
        left->next = right->next;
        right->token = DEAD;
        if (left->next != NO_SYMBOL) symbols[left->next].previous = best.left;
        consider(encoding, left->previous, best.left);
        consider(encoding, best.left, left->next);
    }
}

enum status bpe_encode_word(void *context, const char *word, size_t length) {
    struct encoding *encoding = context;
    const struct tokenizer *tokenizer = encoding->tokenizer;
    if (length == 1) return encoding_emit(encoding, tokenizer->byte_tokens[(uint8_t)word[0]]);
    if (pre_tokenizer_traits(tokenizer->pre_tokenizer)->ignore_merges && length <= TOKEN_TEXT_MAX) {
        char text[2 * TOKEN_TEXT_MAX];
        size_t used = 0;
        for (size_t i = 0; i < length; i++) used += byte_character((uint8_t)word[i], text + used);
        int32_t whole = tokenizer_find_text(tokenizer, text, used);
        if (whole != TOKEN_NONE && !tokenizer_is_special(tokenizer, whole)) return encoding_emit(encoding, whole);
    }
    encoding_reserve(encoding, length);
    for (size_t i = 0; i < length; i++)
        encoding->symbols[i] = (struct symbol){.token = tokenizer->byte_tokens[(uint8_t)word[i]],
                                               .previous = i == 0 ? NO_SYMBOL : (uint32_t)i - 1,
                                               .next = i + 1 == length ? NO_SYMBOL : (uint32_t)i + 1};
    for (size_t i = 1; i < length; i++) consider(encoding, (uint32_t)i - 1, (uint32_t)i);
    merge_all(encoding);
    for (uint32_t i = 0; i != NO_SYMBOL; i = encoding->symbols[i].next) {
        enum status status = encoding_emit(encoding, encoding->symbols[i].token);
        if (status != STATUS_OK) return status;
    }
    return STATUS_OK;
}

enum status bpe_encode(struct encoding *encoding, const char *text, size_t length) {
    enum status status = STATUS_OK;
    while (length > 0 && status == STATUS_OK) {
        size_t run = utf8_valid_run(text, length);
        if (run > 0)
            status = pre_tokenizer_split(encoding->tokenizer->pre_tokenizer, text, run, bpe_encode_word, encoding, encoding->error);
        else /* a byte that is no character is a word of its own */
            status = bpe_encode_word(encoding, text, run = 1);
        text += run;
        length -= run;
    }
    return status;
}
