/* What is said on a socket behind libmicrohttpd's back: refusals that it would get wrong, or that it cannot send in the middle of a body. Only while it has nothing to say there itself:
 * between two requests, or before an answer was queued. Loop thread. */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#include "server/guard.h"
#include "server/http_internal.h"
#include "server/reply.h"
#include "server/taken.h"

#define DRAIN_BYTES_MAX (1u << 20)

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

bool wire_ended(const struct connection *connection) {
    struct pollfd end = {.fd = connection->socket, .events = POLLRDHUP};
    return poll(&end, 1, 0) == 1;
}

/* What is unread, up to HTTP_LOOK_BYTES; <= 0: nothing, or the connection is no more. */
static ssize_t peek(struct connection *connection) {
    ssize_t n;
    do n = recv(connection->socket, connection->http->look, HTTP_LOOK_BYTES, MSG_PEEK | MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    return n;
}

/* Unread bytes would turn the close into a reset, and the answer would be lost. */
static void drain(struct connection *connection) {
    ssize_t n;
    for (size_t drained = 0; drained < DRAIN_BYTES_MAX; drained += (size_t)n) {
        n = recv(connection->socket, connection->http->look, HTTP_LOOK_BYTES, MSG_DONTWAIT);
        if (n <= 0) break;
    }
}

/* libmicrohttpd read what was not yet seen. Where the next request begins may be known all the same. */
static void lose(struct connection *connection) {
    if (connection->in_chunks) connection->next_at = PLACE_UNKNOWN;
    connection->in_chunks = false;
    connection->seen_at = PLACE_UNKNOWN;
    buffer_done(&connection->ahead);
}

/* Looks at what is unread: *n bytes of it in http->look, of which *fresh, the last ones, were not seen before. *taken: bytes of the connection before them. */
static void look(struct connection *connection, ssize_t *n, size_t *fresh, uint64_t *taken) {
    *taken = socket_bytes_taken(connection->socket);
    *n = peek(connection);
    *fresh = 0;
    if (connection->seen_at == PLACE_UNKNOWN || *n <= 0 || *taken == PLACE_UNKNOWN)
        return; /* the last: bytes come just now, and will be seen at the next look, unless that is too late */
    if (*taken > connection->seen_at)
        lose(connection);
    else if (*taken + (uint64_t)*n > connection->seen_at)
        *fresh = (size_t)(*taken + (uint64_t)*n - connection->seen_at);
}

/* These bytes were seen; those from next_at on are kept, as many as a head may have and more. What does not fit is lost when libmicrohttpd has read it. */
static void keep(struct connection *connection, const char *bytes, size_t n) {
    size_t skipped = connection->next_at > connection->seen_at ? (size_t)(connection->next_at - connection->seen_at) : 0;
    if (skipped > n) skipped = n;
    size_t kept = n - skipped, room = connection->ahead.length < HTTP_LOOK_BYTES ? HTTP_LOOK_BYTES - connection->ahead.length : 0;
    if (kept > room) kept = room;
    if (kept) buffer_append(&connection->ahead, bytes + skipped, kept);
    connection->seen_at += skipped + kept;
}

void wire_began(struct connection *connection, bool chunked, uint64_t length) {
    struct guard_refusal refusal;
    struct buffer *ahead = &connection->ahead;
    size_t used, head = ahead->length ? guard_head(ahead->bytes, ahead->length) : 0;
    if (head ==
        0) { /* of libmicrohttpd's count, as far as that goes: without empty lines in front, so that of the next request some will seem to be taken already */
        const union MHD_ConnectionInfo *info = MHD_get_connection_info(connection->mhd, MHD_CONNECTION_INFO_REQUEST_HEADER_SIZE);
        bool known = info && !chunked && connection->next_at != PLACE_UNKNOWN && length < UINT64_MAX / 2;
        lose(connection);
        connection->next_at = connection->seen_at = known ? connection->next_at + info->header_size + length : PLACE_UNKNOWN;
        return;
    }
    if (!chunked) {
        connection->next_at += head + length;
        buffer_consume(ahead, length < ahead->length - head ? head + (size_t)length : ahead->length);
        return;
    }
    connection->chunks = (struct guard_chunks){0};
    enum guard_chunked outcome = guard_chunks(&connection->chunks, ahead->bytes + head, ahead->length - head, &used, &refusal);
    connection->in_chunks = outcome != GUARD_CHUNKS_END;
    connection->next_at += head + used;
    buffer_consume(ahead, head + used);
    if (outcome == GUARD_CHUNKS_BROKEN) lose(connection); /* libmicrohttpd was too fast for us to refuse it */
}

bool wire_wants_body(const struct connection *connection) {
    return connection->exchange && connection->exchange->state == EXCHANGE_BODY && connection->seen_at != PLACE_UNKNOWN && !connection->refused;
}

bool wire_body(struct connection *connection) {
    struct guard_refusal refusal;
    ssize_t n;
    size_t fresh, used = 0;
    uint64_t taken;
    look(connection, &n, &fresh, &taken);
    if (fresh == 0) return false;
    const char *bytes = connection->http->look + ((size_t)n - fresh);
    if (connection->in_chunks) { /* next_at is seen_at */
        enum guard_chunked outcome = guard_chunks(&connection->chunks, bytes, fresh, &used, &refusal);
        connection->in_chunks = outcome == GUARD_CHUNKS_GO_ON;
        connection->next_at = connection->seen_at += used;
        if (outcome == GUARD_CHUNKS_BROKEN) {
            exchange_broken(connection->exchange, &refusal);
            drain(connection);
            return true;
        }
    }
    keep(connection, bytes + used, fresh - used);
    return false;
}

bool wire_look(struct connection *connection) {
    struct http *http = connection->http;
    struct api_error error;
    struct guard_refusal refusal;
    ssize_t n;
    size_t fresh;
    uint64_t taken;
    look(connection, &n, &fresh, &taken);
    if (fresh) keep(connection, http->look + ((size_t)n - fresh), fresh);
    const bool whole = connection->seen_at != PLACE_UNKNOWN; /* all that came of this request was seen */
    const char *bytes = whole ? connection->ahead.bytes : http->look;
    size_t length = whole ? connection->ahead.length : n > 0 ? (size_t)n : 0;
    uint64_t before = whole ? 0 : GUARD_UNKNOWN;
    if (!whole && taken != PLACE_UNKNOWN && connection->next_at != PLACE_UNKNOWN && taken > connection->next_at) before = taken - connection->next_at;
    if (length == 0) return false;
    bool all = whole || (length < HTTP_LOOK_BYTES && !connection->begun);
    connection->begun = true;
    if (!guard_bytes(bytes, length, before, &refusal)) {
        if (!all || n >= HTTP_LOOK_BYTES || !guard_cut_short(bytes, length) || !(connection->half_closed || wire_ended(connection))) return false;
        refusal = (struct guard_refusal){.status = 400, .code = "truncated_body", .problem = "it ends before its end"};
    }
    char id[32];
    (void)snprintf(id, sizeof id, "%s%08llx", http->id_prefix, (unsigned long long)http->next_id++);
    api_error_set(&error, refusal.status, "invalid_request_error", refusal.code, NULL, "The request is malformed: %s.", refusal.problem);
    wire_refuse(connection, id, &error);
    http->hooks.refused(http->hooks.context, error.status, refusal.problem);
    drain(connection); /* nothing of it is for libmicrohttpd: that finds the end of the stream */
    connection->gone = true;
    (void)shutdown(connection->socket, SHUT_RD);
    return true;
}

bool wire_late(struct connection *connection) {
    struct http *http = connection->http;
    struct api_error error;
    if (connection->refused || connection->gone || connection->half_closed) return false;
    if (connection->exchange) {
        if (!exchange_late(connection->exchange)) return false;
    } else {
        if (!connection->begun) return false; /* nobody asked anything */
        char id[32];
        (void)snprintf(id, sizeof id, "%s%08llx", http->id_prefix, (unsigned long long)http->next_id++);
        api_error_set(&error, 408, "invalid_request_error", "request_timeout", NULL, "The request's headers were not complete within %u s.",
                      http->limits.header_timeout_s);
        wire_refuse(connection, id, &error);
        http->hooks.refused(http->hooks.context, error.status, "the headers took too long");
    }
    connection_deadline(connection, HTTP_LINGER_S);
    return true;
}
