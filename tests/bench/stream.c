/* See stream.h. */
#include "tests/bench/stream.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/check.h"
#include "base/clock.h"
#include "base/random.h"

enum { HEAD_MAX = 16 << 10, LINE_MAX_BYTES = 1 << 20, CHUNK_LINE_MAX = 64, READ_BYTES = 64 << 10 };
enum { CHUNK_SIZE, CHUNK_DATA, CHUNK_END, CHUNK_LAST };

static void fail(struct stream *stream, const char *what) {
    if (stream->state == STREAM_FAILED) return;
    (void)snprintf(stream->error, sizeof stream->error, "%s", what);
    stream->state = STREAM_FAILED;
}

void stream_prepare(struct stream *stream, const struct stream_settings *settings, uint64_t number, uint32_t n_prompt, uint32_t n_new) {
    struct buffer body = {0};
    uint32_t n_ids = settings->id_high - settings->id_low;
    CHECK(settings->id_high > settings->id_low);
    *stream = (struct stream){.number = number, .n_prompt = n_prompt, .n_new = n_new, .socket = -1};
    buffer_append_text(&body, "{\"prompt\":[");
    for (uint32_t i = 0; i < n_prompt; i++) {
        uint32_t id = settings->id_low + (uint32_t)(random_at(settings->seed, number, i, 0) % n_ids);
        buffer_printf(&body, i ? ",%" PRIu32 : "%" PRIu32, id);
    }
    buffer_printf(&body,
                  "],\"max_tokens\":%" PRIu32 ",\"ignore_eos\":true,\"temperature\":0,\"stream\":true,\"stream_options\":{\"include_usage\":true}",
                  n_new);
    if (settings->model) buffer_printf(&body, ",\"model\":\"%s\"", settings->model);
    if (settings->extra) buffer_printf(&body, ",%s", settings->extra);
    buffer_append_byte(&body, '}');
    buffer_printf(
        &stream->request,
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %zu\r\n\r\n",
        body.length);
    buffer_append(&stream->request, body.bytes, body.length);
    buffer_done(&body);
}

void stream_start(struct stream *stream, const struct stream_settings *settings) {
    static const int one = 1;
    stream->submit_ns = clock_now_ns();
    stream->state = STREAM_SENDS;
    stream->socket = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (stream->socket < 0) {
        fail(stream, strerror(errno));
        return;
    }
    (void)setsockopt(stream->socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(stream->socket, (const struct sockaddr *)&settings->address, sizeof settings->address) != 0 && errno != EINPROGRESS)
        fail(stream, strerror(errno));
}

/* ---- one event ---- */

/* Where the value of `"name":` begins in one event, or NULL. A quote behind a backslash is inside of a string. `quoted_name` has its quotes. */
static const char *member(const char *event, const char *quoted_name) {
    for (const char *at = event; (at = strstr(at, quoted_name)) != NULL; at++) {
        const char *value = at + strlen(quoted_name);
        if (at > event && at[-1] == '\\') continue;
        value += strspn(value, " ");
        if (*value != ':') continue;
        return value + 1 + strspn(value + 1, " ");
    }
    return NULL;
}

static void take_event(struct stream *stream, const char *event, uint64_t now_ns) {
    if (strcmp(event, "[DONE]") == 0) {
        stream->state = STREAM_DONE;
        stream->end_ns = now_ns;
        return;
    }
    const char *text = member(event, "\"text\""), *tokens = member(event, "\"completion_tokens\""), *error = member(event, "\"error\"");
    if (error && !text) {
        fail(stream, event);
        return;
    }
    if (tokens) stream->n_tokens = (uint32_t)strtoul(tokens, NULL, 10);
    if (!text || text[0] != '"' || text[1] == '"') return; /* an end without text */
    if (stream->n_events == stream->event_room) {
        stream->event_room = stream->event_room ? 2 * stream->event_room : 64;
        stream->event_ns = check_realloc(stream->event_ns, stream->event_room, sizeof *stream->event_ns);
    }
    stream->event_ns[stream->n_events++] = now_ns;
}

static void take_line(struct stream *stream, uint64_t now_ns) {
    struct buffer *line = &stream->line;
    if (line->length > 0 && line->bytes[line->length - 1] == '\r') line->length--;
    buffer_append_byte(line, '\0');
    if (strncmp(line->bytes, "data: ", 6) == 0) take_event(stream, line->bytes + 6, now_ns);
    line->length = 0;
}

/* Bytes of the body, chunk headers taken off. */
static void take_body(struct stream *stream, const char *bytes, size_t length, uint64_t now_ns) {
    if (stream->status != 200) { /* an error's body is its words; their beginning will do */
        size_t room = STREAM_ERROR - (stream->line.length < STREAM_ERROR ? stream->line.length : STREAM_ERROR);
        buffer_append(&stream->line, bytes, length < room ? length : room);
        return;
    }
    while (length > 0 && stream->state == STREAM_READS) {
        const char *end = memchr(bytes, '\n', length);
        size_t part = end ? (size_t)(end - bytes) : length;
        if (stream->line.length + part > LINE_MAX_BYTES) {
            fail(stream, "an event longer than 1 MiB");
            return;
        }
        buffer_append(&stream->line, bytes, part);
        if (end) take_line(stream, now_ns);
        part += end != NULL;
        bytes += part;
        length -= part;
    }
}

/* ---- HTTP ---- */

static void read_head(struct stream *stream) {
    struct buffer *head = &stream->head;
    buffer_append_byte(head, '\0');
    for (char *c = head->bytes; *c; c++) *c = *c >= 'A' && *c <= 'Z' ? (char)(*c + 32) : *c;
    if (sscanf(head->bytes, "http/1.1 %3d", &stream->status) != 1) {
        fail(stream, "the answer is not HTTP/1.1");
        return;
    }
    stream->chunked = strstr(head->bytes, "\r\ntransfer-encoding: chunked") != NULL;
    stream->have_head = true;
}

/* Takes bytes of the head; returns how many. */
static size_t take_head(struct stream *stream, const char *bytes, size_t length) {
    for (size_t i = 0; i < length; i++) {
        buffer_append_byte(&stream->head, bytes[i]);
        const struct buffer *head = &stream->head;
        if (head->length >= 4 && memcmp(head->bytes + head->length - 4, "\r\n\r\n", 4) == 0) {
            read_head(stream);
            return i + 1;
        }
        if (head->length > HEAD_MAX) {
            fail(stream, "a head longer than 16 KiB");
            return i + 1;
        }
    }
    return length;
}

/* A line of the chunked coding: the size of a chunk, or the empty one behind its data. */
static void take_chunk_line(struct stream *stream) {
    struct buffer *line = &stream->chunk_line;
    buffer_append_byte(line, '\0');
    if (stream->chunk_state == CHUNK_SIZE) {
        char *end;
        stream->chunk_left = strtoull(line->bytes, &end, 16);
        if (end == line->bytes) fail(stream, "a chunk without a size");
        stream->chunk_state = stream->chunk_left ? CHUNK_DATA : CHUNK_LAST;
    } else if (stream->chunk_state == CHUNK_END) {
        stream->chunk_state = CHUNK_SIZE;
    }
    line->length = 0;
}

static size_t take_chunked(struct stream *stream, const char *bytes, size_t length, uint64_t now_ns) {
    if (stream->chunk_state == CHUNK_LAST) return length; /* trailers */
    if (stream->chunk_state == CHUNK_DATA) {
        size_t part = length < stream->chunk_left ? length : (size_t)stream->chunk_left;
        take_body(stream, bytes, part, now_ns);
        stream->chunk_left -= part;
        if (stream->chunk_left == 0) stream->chunk_state = CHUNK_END;
        return part;
    }
    const char *end = memchr(bytes, '\n', length);
    size_t part = end ? (size_t)(end - bytes) + 1 : length;
    if (stream->chunk_line.length + part > CHUNK_LINE_MAX) {
        fail(stream, "a chunk size longer than 64 bytes");
        return length;
    }
    buffer_append(&stream->chunk_line, bytes, part);
    if (end) take_chunk_line(stream);
    return part;
}

void stream_feed(struct stream *stream, const char *bytes, size_t length, uint64_t now_ns) {
    while (length > 0 && stream->state == STREAM_READS) {
        size_t taken = length;
        if (!stream->have_head)
            taken = take_head(stream, bytes, length);
        else if (stream->chunked)
            taken = take_chunked(stream, bytes, length, now_ns);
        else
            take_body(stream, bytes, length, now_ns);
        bytes += taken;
        length -= taken;
    }
}

/* The server closed the connection, or read failed. */
static void answer_ended(struct stream *stream, const char *why) {
    char words[STREAM_ERROR];
    if (stream->have_head && stream->status != 200)
        (void)snprintf(words, sizeof words, "status %d: %.*s", stream->status, (int)stream->line.length,
                       stream->line.length ? stream->line.bytes : "");
    else
        (void)snprintf(words, sizeof words, "%s before the end of the answer", why);
    fail(stream, words);
}

void stream_continue(struct stream *stream) {
    char bytes[READ_BYTES];
    while (stream->state == STREAM_SENDS) {
        ssize_t n = send(stream->socket, stream->request.bytes + stream->sent, stream->request.length - stream->sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && (errno == EAGAIN || errno == ENOTCONN)) return;
        if (n < 0) {
            fail(stream, strerror(errno));
            return;
        }
        stream->sent += (size_t)n;
        if (stream->sent == stream->request.length) stream->state = STREAM_READS;
    }
    while (stream->state == STREAM_READS) {
        ssize_t n = recv(stream->socket, bytes, sizeof bytes, 0);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) return;
        if (n > 0)
            stream_feed(stream, bytes, (size_t)n, clock_now_ns());
        else
            answer_ended(stream, n == 0 ? "closed" : strerror(errno));
    }
}

void stream_close(struct stream *stream) {
    if (stream->socket >= 0) (void)close(stream->socket);
    stream->socket = -1;
}

void stream_free(struct stream *stream) {
    stream_close(stream);
    buffer_done(&stream->request);
    buffer_done(&stream->head);
    buffer_done(&stream->line);
    buffer_done(&stream->chunk_line);
    free(stream->event_ns);
    stream->event_ns = NULL;
}
