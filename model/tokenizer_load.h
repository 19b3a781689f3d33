/* How a tokenizer comes to be: inside model/ only. What others may do with one is in model/tokenizer.h. */
#pragma once

#include "base/error.h"
#include "model/gguf.h"
#include "model/tokenizer.h"

/* Reads tokenizer.ggml.*. Copies what it needs: the gguf may be closed afterwards. A vocabulary that is broken or not supported: STATUS_INVALID or
 * STATUS_UNSUPPORTED with the key's name and what is supported. */
enum status tokenizer_open(const struct gguf *gguf, struct tokenizer **tokenizer, struct error *error);

/* Bytes are ids 0..255, EOS is 256, ids from 257 to n_vocab - 1 are ordinary tokens without bytes. n_vocab >= 257. For models without a file. */
struct tokenizer *tokenizer_byte_level(uint32_t n_vocab);

void tokenizer_close(struct tokenizer *tokenizer); /* NULL is fine */
