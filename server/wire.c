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

bool wire_look(struct connection *connection) {
    struct http *http = connection->http;
    struct api_error error;
    struct guard_refusal refusal;
    /* Until a request has begun, all that was taken is of this one. */
    uint64_t taken = connection->asked ? GUARD_UNKNOWN : socket_bytes_taken(connection->socket);
    ssize_t n;
    do n = recv(connection->socket, http->look, HTTP_LOOK_BYTES, MSG_PEEK | MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    if (n <= 0) return false;
    bool all = n < HTTP_LOOK_BYTES && !connection->begun;
    connection->begun = true;
    if (!guard_bytes(http->look, (size_t)n, taken, &refusal)) {
        if (!all || !guard_cut_short(http->look, (size_t)n) || !(connection->half_closed || wire_ended(connection))) return false;
        refusal = (struct guard_refusal){.status = 400, .code = "truncated_body", .problem = "it ends before its end"};
    }
    char id[32];
    (void)snprintf(id, sizeof id, "%s%08llx", http->id_prefix, (unsigned long long)http->next_id++);
    api_error_set(&error, refusal.status, "invalid_request_error", refusal.code, NULL, "The request is malformed: %s.", refusal.problem);
    wire_refuse(connection, id, &error);
    http->hooks.refused(http->hooks.context, error.status, refusal.problem);
    /* Nothing of it is for libmicrohttpd: it finds the end of the stream. Unread bytes would turn the close into a reset, and the answer would be lost. */
    for (size_t drained = 0; drained < DRAIN_BYTES_MAX; drained += (size_t)n) {
        n = recv(connection->socket, http->look, HTTP_LOOK_BYTES, MSG_DONTWAIT);
        if (n <= 0) break;
    }
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
