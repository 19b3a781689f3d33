/* Writes JSON text straight into a buffer: no document in memory, commas and escapes handled here. The hot path of every answer.
 * Nesting is at most JSON_WRITER_DEPTH. Strings are bytes: invalid UTF-8 becomes U+FFFD, so the output is always valid JSON. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/buffer.h"

#define JSON_WRITER_DEPTH 16

struct json_writer {
    struct buffer *out;
    int depth;
    bool comma[JSON_WRITER_DEPTH + 1]; /* a value was written at this depth: the next one needs a comma */
};

void json_begin(struct json_writer *json, struct buffer *out);
void json_object(struct json_writer *json);
void json_object_end(struct json_writer *json);
void json_array(struct json_writer *json);
void json_array_end(struct json_writer *json);
void json_key(struct json_writer *json, const char *key);
void json_string(struct json_writer *json, const char *bytes, size_t length);
void json_text(struct json_writer *json, const char *text);
void json_integer(struct json_writer *json, int64_t value);
void json_unsigned(struct json_writer *json, uint64_t value);
/* The shortest text that reads back as the same float; JSON has no infinities: they become +-1e308, NaN becomes null. */
void json_float(struct json_writer *json, float value);
void json_double(struct json_writer *json, double value);
void json_bool(struct json_writer *json, bool value);
void json_null(struct json_writer *json);

/* Length of the longest valid UTF-8 prefix step at `bytes` (1..4), or 0 if the sequence is invalid or cut. Overlong forms, surrogates and
 * code points past U+10FFFF are invalid. */
size_t utf8_sequence_length(const char *bytes, size_t length);
bool utf8_valid(const char *bytes, size_t length);
