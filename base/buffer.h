/* A growable run of bytes with a limit: what the JSON writer, the SSE writer and the metrics page append to. Single owner, no locks. */
#pragma once

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct buffer {
    char *bytes; /* not terminated */
    size_t length;
    size_t capacity;
};

void buffer_done(struct buffer *buffer);
/* Room for `extra` more bytes; returns where they go (length is not changed). */
char *buffer_reserve(struct buffer *buffer, size_t extra);
void buffer_append(struct buffer *buffer, const void *bytes, size_t length);
void buffer_append_text(struct buffer *buffer, const char *text);
void buffer_append_byte(struct buffer *buffer, char byte);
void buffer_printf(struct buffer *buffer, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Drops the first `length` bytes (a consumer took them). */
void buffer_consume(struct buffer *buffer, size_t length);
