/* struct model, for model.c and describe.c. */
#pragma once

#include "model/compile.h"
#include "model/dummy.h"
#include "model/gguf.h"
#include "model/model.h"

struct model {
    char *path, *name;
    struct gguf *gguf; /* NULL: a dummy */
    struct dummy dummy;
    struct hyper_parameters parameters;
    struct program *program;
    struct tokenizer *tokenizer;
    struct gguf_string chat_template; /* bytes NULL: none */
    uint64_t n_parameters, n_bytes;
};
