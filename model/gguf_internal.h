/* What gguf_parse.c builds and gguf.c hands out. Inside model/gguf*.c only. */
#pragma once

#include "model/gguf.h"

struct gguf_value {
    struct gguf_string key;
    enum gguf_type type;
    const uint8_t *bytes;    /* a number or bool, in place */
    struct gguf_string text; /* GGUF_STRING */
    struct gguf_array array; /* GGUF_ARRAY */
};

struct gguf {
    char *path;
    const uint8_t *bytes;
    size_t length;
    void *mapping; /* NULL: the bytes are borrowed */
    uint32_t version;
    struct gguf_value *values; /* sorted by key */
    size_t n_values;
    struct gguf_tensor *tensors; /* in file order */
    const struct gguf_tensor **by_name;
    size_t n_tensors;
};

size_t gguf_type_bytes(enum gguf_type type); /* 0 for strings and arrays */
int gguf_string_compare(struct gguf_string a, struct gguf_string b);

/* Fills version, values, tensors and by_name from path, bytes and length. What it allocated before failing is left for gguf_close. */
enum status gguf_read(struct gguf *gguf, struct error *error);
