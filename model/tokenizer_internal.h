/* What tokenizer_load.c builds and tokenizer.c, bpe.c and spm.c read. Inside model/ only. Const after load. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "model/pre_tokenizer.h"
#include "model/tokenizer.h"

#define TOKEN_TEXT_MAX 4096u /* bytes of one token's text: bounds what a look-up may cost */
#define END_TOKENS_MAX 64u

enum tokenizer_type { TOKENIZER_BYTES, TOKENIZER_BPE, TOKENIZER_SPM };

enum token_type {
    TOKEN_UNDEFINED,
    TOKEN_NORMAL,
    TOKEN_UNKNOWN,
    TOKEN_CONTROL,
    TOKEN_USER_DEFINED,
    TOKEN_UNUSED,
    TOKEN_BYTE,
    TOKEN_TYPES
}; /* as in the file */

struct token {
    size_t text, bytes; /* where they are in the pool: the text as the vocabulary has it, the bytes it stands for */
    uint32_t text_length, bytes_length;
    float score; /* spm */
    uint8_t type;
};

/* Open addressing, at most half full, under a seed of the process: a file cannot be made to collide. */
struct text_map {
    int32_t *tokens; /* TOKEN_NONE: free */
    size_t mask;
};

struct merge {
    int32_t left, right; /* left TOKEN_NONE: free */
    int32_t merged;
    uint32_t rank;
};
struct merge_map {
    struct merge *merges;
    size_t mask;
};

/* Tokens that are cut out of the text before it is split into words, sorted by text. */
struct special_set {
    int32_t *tokens;
    size_t count;
    bool first_byte[256]; /* of some text: most positions are passed over with one look */
};

struct tokenizer {
    enum tokenizer_type type;
    uint32_t n_tokens;
    struct token *tokens;
    char *pool;
    uint64_t seed;
    struct text_map texts;   /* of tokens that ordinary text may become */
    struct merge_map merges; /* bpe */
    struct pre_tokenizer *pre_tokenizer;
    int32_t byte_tokens[256];                  /* bpe: of the byte's character; spm: <0xNN>; TOKEN_NONE: the vocabulary has none */
    struct special_set specials, user_defined; /* with and without parse_special */
    int32_t bos, eos, unknown;
    bool adds_bos, adds_eos, adds_space_prefix;
    int32_t ends[END_TOKENS_MAX];
    uint32_t n_ends;
};

/* Text, not bytes. TOKEN_NONE: no ordinary token has it. */
int32_t tokenizer_find_text(const struct tokenizer *tokenizer, const char *text, size_t length);
const struct merge *tokenizer_find_merge(const struct tokenizer *tokenizer, int32_t left, int32_t right); /* NULL: none */
uint64_t tokenizer_hash_text(uint64_t seed, const char *text, size_t length);
uint64_t tokenizer_hash_pair(uint64_t seed, int32_t left, int32_t right);
/* The character (its UTF-8, at most two bytes) by which byte-level BPE writes a byte; returns its length. */
uint32_t byte_character(uint8_t byte, char out[2]);

#define NO_SYMBOL UINT32_MAX
#define DEAD (-2)

/* One encoding call: where ids go, and scratch that grows to the longest word. */
struct symbol {
    int32_t token; /* TOKEN_NONE: no token has this text; DEAD: merged into the one before */
    uint32_t previous, next;
    uint32_t start, length; /* in the word's text (spm) */
};
struct candidate { /* of a merge of symbols left and right, as they were when it was found */
    uint32_t left, right;
    int32_t left_token, right_token, merged;
    uint32_t rank; /* bpe: smaller is merged first */
    float score;   /* spm: larger is merged first */
};
struct encoding {
    const struct tokenizer *tokenizer;
    struct token_list *list;
    size_t limit; /* of list->count */
    struct symbol *symbols;
    size_t symbols_capacity;
    struct candidate *heap;
    size_t heap_count, heap_capacity;
    char *text; /* spm: the escaped piece */
    size_t text_capacity;
    struct error *error;
};
enum status encoding_emit(struct encoding *encoding, int32_t token); /* TOKEN_NONE is passed over */
void encoding_reserve(struct encoding *encoding, size_t symbols);
/* The candidate that goes first: by rank, or by score; then the leftmost. */
void encoding_push(struct encoding *encoding, struct candidate candidate);
struct candidate encoding_pop(struct encoding *encoding);

pre_tokenizer_word bpe_encode_word;                                                 /* context: struct encoding */
enum status bpe_encode(struct encoding *encoding, const char *text, size_t length); /* any bytes */
enum status spm_encode(struct encoding *encoding, const char *text, size_t length); /* any bytes; after the start or a special token */
