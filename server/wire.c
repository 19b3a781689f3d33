/* Every byte that libmicrohttpd reads from a connection passes here first, and what is refused does not reach it: it would answer in HTML, some of it with two heads, or just close. It has no
 * hook for that, but it reads with the C library's recv, which the dynamic linker looks for in the program first. So there is one here. Refusals are said on the socket behind libmicrohttpd's
 * back, only while it has nothing to say there itself: between two requests, or before an answer was queued. Loop thread. */
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#include "base/check.h"
#include "server/guard.h"
#include "server/http_internal.h"
#include "server/reply.h"

#define HEAD_KEPT (GUARD_HEAD_MAX + 1u) /* more of a head is not needed to refuse it */
#define DROPS_MAX 32                    /* reads in a row of what is dropped */

/* Whose daemon runs on this thread just now. All other reading passes. */
static _Thread_local struct http *reading;

ssize_t wire_recv(int socket, void *bytes, size_t max, int flags) __asm__("recv");

void wire_check(void) {
    union {
        void *symbol;
        ssize_t (*function)(int, void *, size_t, int);
    } used = {.symbol = dlsym(RTLD_DEFAULT, "recv")};
    CHECK(used.function == wire_recv); /* or requests would pass unseen */
}

void wire_run(struct http *http) {
    reading = http;
    (void)MHD_run(http->daemon);
    reading = NULL;
}

/* ---- what is said ---- */

void wire_refuse(struct connection *connection, const char *id, const struct api_error *error) {
    struct buffer body = {0}, out = {0};
    write_error(&body, error);
    buffer_append_byte(&body, '\n');
    buffer_printf(&out, "HTTP/1.1 %d %s\r\nConnection: close\r\nContent-Type: application/json\r\nx-request-id: %s\r\nContent-Length: %zu\r\n\r\n",
                  error->status, MHD_get_reason_phrase_for((unsigned)error->status), id, body.length);
    buffer_append(&out, body.bytes, body.length);
    /* Less than any socket's buffer, which is empty now: taken whole, or the peer is gone. */
    (void)!send(connection->socket, out.bytes, out.length, MSG_DONTWAIT | MSG_NOSIGNAL);
    (void)shutdown(connection->socket, SHUT_WR);
    connection->refused = true;
    buffer_done(&body);
    buffer_done(&out);
}

/* A request that is no exchange. */
static void refuse(struct connection *connection, const struct api_error *error, const char *why) {
    struct http *http = connection->http;
    char id[32];
    (void)snprintf(id, sizeof id, "%s%08llx", http->id_prefix, (unsigned long long)http->next_id++);
    wire_refuse(connection, id, error);
    http->hooks.refused(http->hooks.context, error->status, why);
    connection_deadline(connection, HTTP_LINGER_S);
}

static void malformed(struct connection *connection, const struct guard_refusal *refusal) {
    struct api_error error;
    api_error_set(&error, refusal->status, "invalid_request_error", refusal->code, NULL, "The request is malformed: %s.", refusal->problem);
    refuse(connection, &error, refusal->problem);
}

bool wire_late(struct connection *connection) {
    struct api_error error;
    if (connection->refused || connection->gone || connection->half_closed) return false;
    if (connection->exchange) {
        if (!exchange_late(connection->exchange)) return false;
        connection_deadline(connection, HTTP_LINGER_S);
        return true;
    }
    if (connection->head.length == 0) return false; /* nobody asked anything */
    api_error_set(&error, 408, "invalid_request_error", "request_timeout", NULL, "The request's headers were not complete within %u s.",
                  connection->http->limits.header_timeout_s);
    refuse(connection, &error, "the headers took too long");
    return true;
}

bool wire_began(struct connection *connection) {
    if (connection->heads == 0) return false;
    connection->heads--;
    return true;
}

void wire_answered(struct connection *connection) {
    if (connection->wrong.problem && connection->heads == 0 && !connection->refused) malformed(connection, &connection->wrong);
}

/* ---- what is read ---- */

/* For libmicrohttpd: nothing has come yet. */
static ssize_t nothing(void) {
    errno = EAGAIN;
    return -1;
}

/* After a refusal: what the peer still sends is dropped until it has read that and leaves, since unread bytes would turn the close into a reset and the refusal would be lost. */
static ssize_t drop(struct connection *connection, ssize_t n) {
    char scratch[8192];
    for (int i = 0; i < DROPS_MAX && n > 0; i++) {
        connection->dropped += (uint64_t)n;
        n = recvfrom(connection->socket, scratch, sizeof scratch, MSG_DONTWAIT, NULL, NULL);
    }
    if (connection->dropped > 4 * connection->http->limits.max_body + (1u << 20)) return 0; /* somebody who goes on for ever is cut off */
    return n > 0 ? nothing() : n; /* others get their turn; more will come, or the deadline */
}

/* Where in these bytes the walk is. A request may have begun in an earlier piece, and end in a later one. */
struct walk {
    const char *bytes;
    size_t length, at;
    size_t start; /* of the request that `at` is in, or 0 where it began earlier */
    bool began;   /* its head was not yet whole when these bytes came: libmicrohttpd does not know it */
};

static void end_request(struct connection *connection, struct walk *walk) {
    connection->part = PART_HEAD;
    walk->start = walk->at;
    walk->began = true;
}

static bool skip_empty(struct connection *connection, size_t n, struct guard_refusal *refusal) {
    connection->empty += (uint32_t)n; /* of a piece no longer than libmicrohttpd's buffer */
    if (connection->empty <= GUARD_EMPTY_MAX) return true;
    *refusal = (struct guard_refusal){400, "bad_request_line", "too many empty lines stand in front of it"};
    return false;
}

/* To what is kept of a head comes a piece without a line's end: nothing new can be wrong with it but its length. */
static bool worth_a_look(const char *bytes, size_t kept, size_t length) {
    return memchr(bytes + kept, '\n', length - kept) || length > (memchr(bytes, '\n', kept) ? GUARD_HEAD_MAX : GUARD_LINE_MAX);
}

/* The head, up to its end or that of the bytes. false: refused. */
static bool walk_head(struct connection *connection, struct walk *walk, struct guard_refusal *refusal) {
    struct buffer *head = &connection->head;
    struct guard_framing framing;
    if (head->length == 0) {
        size_t empty = guard_empty_lines(walk->bytes + walk->at, walk->length - walk->at);
        if (!skip_empty(connection, empty, refusal)) return false;
        walk->start = walk->at += empty;
        if (walk->at == walk->length) return true;
    }
    const size_t kept = head->length, left = walk->length - walk->at, piece = left < HEAD_KEPT - kept ? left : HEAD_KEPT - kept;
    const char *bytes = walk->bytes + walk->at;
    size_t length = piece;
    if (kept) {
        buffer_append(head, bytes, piece);
        bytes = head->bytes;
        length = head->length;
        if (!worth_a_look(bytes, kept, length)) {
            walk->at += piece;
            return true;
        }
    }
    if (guard_bytes(bytes, length, refusal)) return false;
    size_t end = guard_head(bytes, length, &framing);
    if (end == 0) { /* fewer than HEAD_KEPT, or they were refused */
        walk->at += piece;
        if (kept == 0) buffer_append(head, bytes, piece);
        size_t empty = guard_empty_lines(head->bytes, head->length); /* of a line end that came in two pieces */
        buffer_consume(head, empty);
        return skip_empty(connection, empty, refusal);
    }
    walk->at += end - kept;
    buffer_done(head);
    connection->heads++;
    connection->empty = 0;
    connection->chunks = (struct guard_chunks){0};
    connection->body_left = framing.length;
    connection->part = framing.chunked ? PART_CHUNKS : PART_BODY;
    if (!framing.chunked && framing.length == 0) end_request(connection, walk);
    return true;
}

static void walk_body(struct connection *connection, struct walk *walk) {
    size_t left = walk->length - walk->at, piece = connection->body_left < left ? (size_t)connection->body_left : left;
    walk->at += piece;
    connection->body_left -= piece;
    if (connection->body_left == 0) end_request(connection, walk);
}

static bool walk_chunks(struct connection *connection, struct walk *walk, struct guard_refusal *refusal) {
    size_t used;
    enum guard_chunked outcome = guard_chunks(&connection->chunks, walk->bytes + walk->at, walk->length - walk->at, &used, refusal);
    walk->at += used;
    if (outcome == GUARD_CHUNKS_END) end_request(connection, walk);
    return outcome != GUARD_CHUNKS_BROKEN;
}

static bool walk_on(struct connection *connection, struct walk *walk, struct guard_refusal *refusal) {
    switch (connection->part) {
    case PART_BODY: walk_body(connection, walk); return true;
    case PART_CHUNKS: return walk_chunks(connection, walk, refusal);
    case PART_HEAD: break;
    }
    return walk_head(connection, walk, refusal);
}

/* Something in the request at walk->start is wrong, be it that it ends before its end. How much of the bytes libmicrohttpd gets: those of requests before it. */
static ssize_t stop(struct connection *connection, const struct walk *walk, const struct guard_refusal *refusal) {
    if (walk->began && connection->part != PART_HEAD) connection->heads--; /* its own */
    if (walk->began && (connection->heads > 0 || connection->exchange)) {  /* those are answered first */
        connection->wrong = *refusal;
        return walk->start ? (ssize_t)walk->start : nothing();
    }
    if (walk->began) {
        malformed(connection, refusal);
    } else if (connection->exchange && connection->exchange->state == EXCHANGE_BODY) {
        exchange_broken(connection->exchange, refusal);
        connection_deadline(connection, HTTP_LINGER_S);
    } else {
        return 0; /* answered before its end, and the connection with it */
    }
    return drop(connection, (ssize_t)walk->length); /* these, and what is unread */
}

static bool peer_ended(const struct connection *connection) {
    char byte;
    return recvfrom(connection->socket, &byte, 1, MSG_PEEK | MSG_DONTWAIT, NULL, NULL) == 0;
}

/* n bytes came, 0: the peer ends its side, < 0: nothing. What libmicrohttpd is to take for that. */
static ssize_t received(struct connection *connection, const char *bytes, ssize_t n) {
    static const struct guard_refusal head_cut = {400, "truncated_headers", "its headers end before their end"},
                                      body_cut = {400, "truncated_body", "its body ends before its end"};
    struct guard_refusal refusal;
    if (n < 0) return n;
    if (connection->gone) return 0;
    if (connection->refused) return drop(connection, n);
    if (connection->wrong.problem) return n == 0 ? 0 : drop(connection, n); /* behind a request that will be refused */
    struct walk walk = {.bytes = bytes, .length = (size_t)n, .began = connection->part == PART_HEAD};
    while (walk.at < walk.length)
        if (!walk_on(connection, &walk, &refusal)) return stop(connection, &walk, &refusal);
    /* The end is looked for where it would be the end of a request too: libmicrohttpd would just close. */
    bool whole = connection->part == PART_HEAD && connection->head.length == 0;
    if (whole || (n > 0 && !peer_ended(connection))) return n;
    return stop(connection, &walk, connection->part == PART_HEAD ? &head_cut : &body_cut);
}

ssize_t wire_recv(int socket, void *bytes, size_t max, int flags) {
    ssize_t n = recvfrom(socket, bytes, max, flags, NULL, NULL);
    struct connection *connection = reading ? http_connection(reading, socket) : NULL;
    return connection ? received(connection, bytes, n) : n;
}
