/* See json_writer.h. */
#include "base/json_writer.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"

void json_begin(struct json_writer *json, struct buffer *out) { *json = (struct json_writer){.out = out}; }

static void before_value(struct json_writer *json) {
    if (json->comma[json->depth]) buffer_append_byte(json->out, ',');
    json->comma[json->depth] = true;
}

static void open(struct json_writer *json, char bracket) {
    before_value(json);
    buffer_append_byte(json->out, bracket);
    CHECK(json->depth < JSON_WRITER_DEPTH);
    json->comma[++json->depth] = false;
}

static void close(struct json_writer *json, char bracket) {
    CHECK(json->depth > 0);
    json->depth--;
    buffer_append_byte(json->out, bracket);
}

void json_object(struct json_writer *json) { open(json, '{'); }
void json_object_end(struct json_writer *json) { close(json, '}'); }
void json_array(struct json_writer *json) { open(json, '['); }
void json_array_end(struct json_writer *json) { close(json, ']'); }

size_t utf8_sequence_length(const char *text, size_t length) {
    const unsigned char *b = (const unsigned char *)text;
    if (length == 0) return 0;
    if (b[0] < 0x80) return 1;
    size_t n = b[0] >= 0xf0 ? 4 : b[0] >= 0xe0 ? 3 : 2;
    if (b[0] < 0xc2 || b[0] > 0xf4 || length < n) return 0;
    for (size_t i = 1; i < n; i++)
        if ((b[i] & 0xc0) != 0x80) return 0;
    if (b[0] == 0xe0 && b[1] < 0xa0) return 0;
    if (b[0] == 0xed && b[1] > 0x9f) return 0;
    if (b[0] == 0xf0 && b[1] < 0x90) return 0;
    if (b[0] == 0xf4 && b[1] > 0x8f) return 0;
    return n;
}

bool utf8_valid(const char *bytes, size_t length) {
    for (size_t i = 0; i < length;) {
        size_t n = utf8_sequence_length(bytes + i, length - i);
        if (n == 0) return false;
        i += n;
    }
    return true;
}

static void escape(struct buffer *out, unsigned char byte) {
    char text[8];
    switch (byte) {
    case '"': buffer_append(out, "\\\"", 2); return;
    case '\\': buffer_append(out, "\\\\", 2); return;
    case '\n': buffer_append(out, "\\n", 2); return;
    case '\r': buffer_append(out, "\\r", 2); return;
    case '\t': buffer_append(out, "\\t", 2); return;
    default: (void)snprintf(text, sizeof text, "\\u%04x", byte); buffer_append(out, text, 6);
    }
}

static void quoted(struct buffer *out, const char *bytes, size_t length) {
    buffer_append_byte(out, '"');
    size_t run = 0; /* start of the bytes not yet copied */
    for (size_t i = 0; i < length;) {
        unsigned char byte = (unsigned char)bytes[i];
        size_t n = byte >= 0x80 ? utf8_sequence_length(bytes + i, length - i) : 1;
        bool plain = n > 0 && byte >= 0x20 && byte != '"' && byte != '\\' && byte != 0x7f;
        if (!plain) {
            buffer_append(out, bytes + run, i - run);
            if (n == 0)
                buffer_append(out, "\xef\xbf\xbd", 3);
            else
                escape(out, byte);
            n = 1;
            run = i + 1;
        }
        i += n;
    }
    if (run < length) buffer_append(out, bytes + run, length - run); /* `bytes` may be NULL where there are none */
    buffer_append_byte(out, '"');
}

void json_key(struct json_writer *json, const char *key) {
    before_value(json);
    quoted(json->out, key, strlen(key));
    buffer_append_byte(json->out, ':');
    json->comma[json->depth] = false; /* the value that follows belongs to the key */
}

void json_string(struct json_writer *json, const char *bytes, size_t length) {
    before_value(json);
    quoted(json->out, bytes, length);
}

void json_text(struct json_writer *json, const char *text) { json_string(json, text, strlen(text)); }

void json_integer(struct json_writer *json, int64_t value) {
    before_value(json);
    buffer_printf(json->out, "%" PRId64, value);
}

void json_unsigned(struct json_writer *json, uint64_t value) {
    before_value(json);
    buffer_printf(json->out, "%" PRIu64, value);
}

void json_float(struct json_writer *json, float value) {
    if (isnan(value)) {
        json_null(json);
        return;
    }
    if (isinf(value)) {
        json_double(json, value);
        return;
    }
    before_value(json);
    char text[40];
    for (int digits = 6; digits <= 9; digits++) {
        (void)snprintf(text, sizeof text, "%.*g", digits, (double)value);
        if (strtof(text, NULL) == value) break;
    }
    buffer_append_text(json->out, text);
}

void json_double(struct json_writer *json, double value) {
    if (isnan(value)) {
        json_null(json);
        return;
    }
    if (isinf(value)) value = value > 0 ? 1e308 : -1e308;
    before_value(json);
    char text[40];
    for (int digits = 15; digits <= 17; digits++) {
        (void)snprintf(text, sizeof text, "%.*g", digits, value);
        if (strtod(text, NULL) == value) break;
    }
    buffer_append_text(json->out, text);
}

void json_bool(struct json_writer *json, bool value) {
    before_value(json);
    buffer_append_text(json->out, value ? "true" : "false");
}

void json_null(struct json_writer *json) {
    before_value(json);
    buffer_append_text(json->out, "null");
}
