/* How a byte-level BPE vocabulary cuts text into words before it merges: by tokenizer.ggml.pre, one or several regular expressions applied one after the other.
 * Each cuts every piece the one before it left: its matches and the gaps between them become pieces. Const after pre_tokenizer_open; any number of threads. */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "base/error.h"
#include "model/gguf.h"

struct pre_tokenizer;

/* What goes with a name beside the expressions. */
struct pre_tokenizer_traits {
    const char *name;   /* as the file has it */
    bool ignore_merges; /* a word that is a token as a whole is that token, whatever the merges say */
    bool adds_bos;      /* unless the file says otherwise */
};

/* STATUS_UNSUPPORTED with the names that are, for one that is not in the table. */
enum status pre_tokenizer_open(struct gguf_string name, struct pre_tokenizer **pre_tokenizer, struct error *error);
void pre_tokenizer_close(struct pre_tokenizer *pre_tokenizer); /* NULL is fine */
const struct pre_tokenizer_traits *pre_tokenizer_traits(const struct pre_tokenizer *pre_tokenizer);

/* Calls `word` for each piece in order; together they are the whole text. `text` is valid UTF-8. A status other than OK from `word` ends it and is returned.
 * STATUS_INVALID: the text needs more matching work than the limits allow. */
typedef enum status pre_tokenizer_word(void *context, const char *word, size_t length);
enum status pre_tokenizer_split(const struct pre_tokenizer *pre_tokenizer, const char *text, size_t length, pre_tokenizer_word *word, void *context,
                                struct error *error);
