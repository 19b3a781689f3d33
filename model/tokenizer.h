/* Text <-> token ids, from a GGUF vocabulary: byte-level BPE with the pre-tokenizer the file names, or SPM with byte fallback.
 * A tokenizer is const after load and may be used by any number of threads at once; what varies (scratch, detokenizer state) is the caller's or the call's. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/buffer.h"
#include "base/error.h"

struct tokenizer;

#define TOKEN_NONE (-1)

uint32_t tokenizer_vocabulary(const struct tokenizer *tokenizer);
const char *tokenizer_kind(const struct tokenizer *tokenizer);          /* "bpe", "spm", or "bytes" (models without a file) */
const char *tokenizer_pre_tokenizer(const struct tokenizer *tokenizer); /* "smollm", ...; "" where there is none */
int32_t tokenizer_bos(const struct tokenizer *tokenizer); /* TOKEN_NONE: none */
int32_t tokenizer_eos(const struct tokenizer *tokenizer);
/* End of generation: EOS, and the end-of-turn tokens a model names (eot, <|im_end|>, <|eot_id|>, <|endoftext|>, ...). */
bool tokenizer_is_end(const struct tokenizer *tokenizer, int32_t token);
/* All of them; returns the count, writes at most `max`. */
uint32_t tokenizer_end_tokens(const struct tokenizer *tokenizer, int32_t *tokens, uint32_t max);
/* Control tokens: not part of a text answer (skip_special_tokens). */
bool tokenizer_is_special(const struct tokenizer *tokenizer, int32_t token);
bool tokenizer_adds_bos(const struct tokenizer *tokenizer); /* what add_special does for this model */

struct token_list {
    int32_t *tokens; /* grown by the call, freed by token_list_done */
    size_t count, capacity;
};
void token_list_done(struct token_list *list);

/* Appends the ids of `text` (any bytes; invalid UTF-8 is encoded byte by byte, never a crash).
 * add_special: BOS (and EOS where the file says so). parse_special: text such as "<|im_start|>" becomes its token.
 * Stops with STATUS_INVALID once more than max_tokens would be made (0: no limit): time and memory are O(text), bounded. */
enum status tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t length, bool add_special, bool parse_special, size_t max_tokens,
                             struct token_list *list, struct error *error);

/* The bytes of one token (special tokens: their text). Empty for ids outside the vocabulary. Valid while the tokenizer lives. */
const char *tokenizer_bytes(const struct tokenizer *tokenizer, int32_t token, size_t *length);

/* Streaming: bytes of tokens in, whole UTF-8 out. A split character is held back until it is complete; bytes that can never become valid are
 * given out as they are (the JSON writer shows U+FFFD). SPM: the leading space of the very first piece is dropped if the vocabulary says so. */
struct detokenizer {
    char held[8];
    uint32_t n_held;
    bool started;
};
void detokenizer_put(struct detokenizer *state, const struct tokenizer *tokenizer, int32_t token, bool skip_special, struct buffer *out);
void detokenizer_finish(struct detokenizer *state, struct buffer *out); /* what is still held, as it is */
