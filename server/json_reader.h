/* JSON text from outside (RFC 8259, strict) -> a flat tree that points into the text. One allocation that grows to `max_nodes`, no recursion, so neither depth nor size of a
 * body can take more than max_nodes * 16 bytes or a fixed stack. Refused: invalid UTF-8, anything behind the value, bare control characters, NaN and Infinity, numbers such as
 * 01 or 1., lone surrogates, the same key twice in the outermost object (what would it mean?), as it is written: two spellings of one ("a", "\u0061") are the caller's to refuse.
 * (cJSON 1.7 accepts all of these and takes 40 bytes of memory a byte of `[1,1,..`; it is the oracle in the tests instead.)
 * Any thread; a document belongs to one. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/buffer.h"

#define JSON_DEPTH_MAX 32

enum json_type { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT };

/* Pre-order: the first child of node i is i + 1, the one after it is nodes[i + 1].next, and so on up to nodes[i].next. In an object a key (a string) is followed by its value. */
struct json_node {
    uint32_t start, length; /* number: its text; string: between the quotes, still escaped; array: length = elements; object: length = members */
    uint32_t next;          /* first node behind this one and all below it */
    uint8_t type;
    bool escaped; /* string: has backslashes */
};

struct json_document {
    const char *text; /* the caller's; must outlive the document */
    size_t length;
    struct json_node *nodes;
    uint32_t n_nodes, capacity;
};

struct json_failure {
    size_t offset;
    const char *what; /* "a comma or ] was expected" */
    char key[64];     /* member of the outermost object in which it happened; empty: none */
};

/* false: *failure says why, and the document holds nothing. */
bool json_read(struct json_document *document, const char *text, size_t length, uint32_t max_nodes, struct json_failure *failure);
void json_document_done(struct json_document *document);

/* A number's value: finite, or false. */
bool json_number(const struct json_document *document, uint32_t node, double *value);
/* An integer's value, exact. 16.0 and 1e2 are integers; 1.5 and what does not fit are not. */
bool json_int64(const struct json_document *document, uint32_t node, int64_t *value);
/* Appends a string's bytes, escapes resolved. */
void json_string_append(const struct json_document *document, uint32_t node, struct buffer *out);
bool json_string_equals(const struct json_document *document, uint32_t node, const char *text);
