/* One request and its answer: what libmicrohttpd's handler, reader and completion calls mean to the rest of the server. Loop thread. See http.h.
 * Answers are queued only inside the handler; late ones resume the connection, whereupon the handler is called again. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/check.h"
#include "base/clock.h"
#include "server/guard.h"
#include "server/http_internal.h"
#include "server/reply.h"

#define READ_BLOCK 16384
#define AUTHORITY_BYTES 300 /* of a name and a port */

/* ---- what others see ---- */

const char *exchange_method(const struct exchange *exchange) { return exchange->method; }
const char *exchange_path(const struct exchange *exchange) { return exchange->path; }
const char *exchange_request_id(const struct exchange *exchange) { return exchange->id; }
struct buffer *exchange_body(struct exchange *exchange) {
    return &exchange->body;
}
uint64_t exchange_started_ns(const struct exchange *exchange) { return exchange->started_ns; }
int exchange_status(const struct exchange *exchange) { return exchange->status; }
uint64_t exchange_bytes_out(const struct exchange *exchange) { return exchange->bytes_out; }
bool exchange_aborted(const struct exchange *exchange) { return exchange->aborted; }
uint32_t exchange_route(const struct exchange *exchange) { return exchange->route; }
uint32_t exchange_key(const struct exchange *exchange) { return exchange->key; }
const char *exchange_notes(const struct exchange *exchange) { return exchange->notes; }

const char *exchange_header(const struct exchange *exchange, const char *name) {
    return MHD_lookup_connection_value(exchange->connection->mhd, MHD_HEADER_KIND, name);
}

void exchange_set_tag(struct exchange *exchange, uint32_t route, uint32_t key) {
    exchange->route = route;
    exchange->key = key;
}

void exchange_note(struct exchange *exchange, const char *words) { (void)snprintf(exchange->notes, sizeof exchange->notes, "%s", words); }

bool exchange_is_reserve(const struct exchange *exchange) {
    const struct http *http = exchange->connection->http;
    return http->n_connections > http->limits.max_connections;
}

void exchange_own(struct exchange *exchange, const struct exchange_owner *functions, void *owner) {
    CHECK(!exchange->owner && exchange->state == EXCHANGE_ASKED);
    exchange->functions = functions;
    exchange->owner = owner;
}

void exchange_add_header(struct exchange *exchange, const char *name, const char *value) {
    CHECK(exchange->n_headers < EXCHANGE_HEADERS_MAX);
    exchange->headers[exchange->n_headers].name = name;
    (void)snprintf(exchange->headers[exchange->n_headers].value, sizeof exchange->headers->value, "%s", value);
    exchange->n_headers++;
}

static void resume(struct exchange *exchange) {
    if (!exchange->suspended) return;
    exchange->suspended = false;
    MHD_resume_connection(exchange->connection->mhd);
    http_pump(exchange->connection->http);
}

static void answered(struct exchange *exchange, int status, const char *content_type) {
    CHECK(exchange->status == 0);
    exchange->status = status;
    exchange->content_type = content_type;
    struct http *http = exchange->connection->http;
    http->hooks.answered(http->hooks.context, exchange);
}

void exchange_reply(struct exchange *exchange, int status, const char *content_type, struct buffer *body) {
    exchange->out = *body;
    *body = (struct buffer){0};
    answered(exchange, status, content_type);
    /* Before the body is in, the answer waits until it has been read (and dropped), so that the client is ready to listen. */
    if (exchange->state == EXCHANGE_ASKED) {
        exchange->state = EXCHANGE_ANSWER;
        resume(exchange);
    }
}

void exchange_stream(struct exchange *exchange, const char *content_type) {
    CHECK(exchange->state == EXCHANGE_ASKED && exchange->owner);
    answered(exchange, 200, content_type);
    exchange->streaming = true;
    exchange->state = EXCHANGE_STREAM;
    resume(exchange);
}

void exchange_wake(struct exchange *exchange) { resume(exchange); }

/* ---- the end ---- */

/* Also called when the answer is complete but libmicrohttpd has not yet said so: then there is no owner any more. */
void exchange_gone(struct exchange *exchange) {
    if (exchange->owner) {
        void *owner = exchange->owner;
        exchange->owner = NULL;
        exchange->aborted = true;
        exchange->functions->gone(owner);
    }
    resume(exchange);
}

static void uncharge(struct exchange *exchange) {
    exchange->connection->http->body_bytes -= exchange->body_charged;
    exchange->body_charged = 0;
}

static void complete(struct exchange *exchange) {
    if (!exchange->owner) return;
    void *owner = exchange->owner;
    exchange->owner = NULL;
    exchange->functions->complete(owner);
}

void exchange_completed(void *context, struct MHD_Connection *mhd, void **slot, enum MHD_RequestTerminationCode why) {
    struct http *http = context;
    struct exchange *exchange = *slot;
    struct connection *connection = connection_of(mhd);
    *slot = NULL;
    if (connection && !connection->gone) {
        connection_deadline(connection, http->limits.idle_timeout_s);
        if (connection->half_closed) connection->deadline_ns = clock_now_ns(); /* nothing more can come: the next tick ends it */
    }
    if (!exchange) return;
    if (why != MHD_REQUEST_TERMINATED_COMPLETED_OK) exchange->aborted = true;
    exchange->suspended = false; /* a connection that ends is not to be resumed */
    if (exchange->aborted)
        exchange_gone(exchange);
    else
        complete(exchange);
    http->hooks.finished(http->hooks.context, exchange);
    uncharge(exchange);
    exchange->connection->exchange = NULL;
    bool goes_on = !exchange->last && !exchange->close && !exchange->aborted && !http->draining;
    if (goes_on && !exchange->connection->gone) wire_answered(exchange->connection);
    if (exchange->previous)
        exchange->previous->next = exchange->next;
    else
        http->exchanges = exchange->next;
    if (exchange->next) exchange->next->previous = exchange->previous;
    http->n_exchanges--;
    buffer_done(&exchange->body);
    buffer_done(&exchange->out);
    free(exchange);
    if (http->draining && connection && !connection->gone) connection_deadline(connection, 1);
}

/* ---- the answer ---- */

/* libmicrohttpd asks for bytes: the socket took the last ones. It may take as long as stall_timeout to ask again. */
static ssize_t read_answer(void *context, uint64_t position, char *bytes, size_t max) {
    struct exchange *exchange = context;
    struct http *http = exchange->connection->http;
    (void)position;
    if (exchange->connection->gone) return MHD_CONTENT_READER_END_WITH_ERROR;
    if (exchange->out_at == exchange->out.length && exchange->streaming) {
        exchange->out.length = exchange->out_at = 0;
        enum produced produced = exchange->owner ? exchange->functions->produce(exchange->owner, &exchange->out) : PRODUCED_END;
        if (produced == PRODUCED_END && exchange->out.length == 0) {
            complete(exchange);
            return MHD_CONTENT_READER_END_OF_STREAM;
        }
        if (exchange->out.length == 0) {
            exchange->connection->deadline_ns = 0; /* it is we who are silent */
            exchange->suspended = true;
            MHD_suspend_connection(exchange->connection->mhd);
            return 0;
        }
    }
    size_t left = exchange->out.length - exchange->out_at, n = left < max ? left : max;
    if (n == 0) return MHD_CONTENT_READER_END_OF_STREAM;
    memcpy(bytes, exchange->out.bytes + exchange->out_at, n);
    exchange->out_at += n;
    exchange->bytes_out += n;
    connection_deadline(exchange->connection, http->limits.stall_timeout_s);
    return (ssize_t)n;
}

static void common_headers(struct exchange *exchange, struct MHD_Response *response) {
    if (exchange->content_type) (void)MHD_add_response_header(response, "Content-Type", exchange->content_type);
    (void)MHD_add_response_header(response, "x-request-id", exchange->id);
    for (uint32_t i = 0; i < exchange->n_headers; i++) (void)MHD_add_response_header(response, exchange->headers[i].name, exchange->headers[i].value);
    if (exchange->close || exchange->connection->http->draining) (void)MHD_add_response_header(response, "Connection", "close");
}

static enum MHD_Result queue_answer(struct exchange *exchange) {
    struct MHD_Response *response;
    if (exchange->streaming)
        response = MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, READ_BLOCK, read_answer, exchange, NULL);
    else if (exchange->out.length == 0)
        response = MHD_create_response_from_buffer(0, (void *)"", MHD_RESPMEM_PERSISTENT);
    else
        response = MHD_create_response_from_callback(exchange->out.length, READ_BLOCK, read_answer, exchange, NULL);
    if (!response) return MHD_NO;
    common_headers(exchange, response);
    if (exchange->streaming) {
        exchange->last |= exchange->http_1_0; /* which knows no chunks: it ends with the connection */
        (void)MHD_add_response_header(response, "Cache-Control", "no-cache");
        (void)MHD_add_response_header(response, "X-Accel-Buffering", "no"); /* nginx */
    }
    connection_deadline(exchange->connection, exchange->connection->http->limits.stall_timeout_s);
    exchange->state = EXCHANGE_QUEUED;
    enum MHD_Result result = MHD_queue_response(exchange->connection->mhd, (unsigned)exchange->status, response);
    MHD_destroy_response(response);
    if (result == MHD_YES || exchange->too_early) return result;
    /* After 100 Continue for a body of no bytes, libmicrohttpd calls for it with what already came behind the request, when it takes no answer yet; it calls again. */
    exchange->too_early = true;
    exchange->state = exchange->streaming ? EXCHANGE_STREAM : EXCHANGE_ANSWER;
    return MHD_YES;
}

/* ---- the request ---- */

/* A caller's id if it is one (letters, digits and a few signs), else one of ours. */
static void choose_id(struct exchange *exchange, const char *given) {
    struct http *http = exchange->connection->http;
    size_t n = 0;
    for (const char *c = given ? given : ""; *c && n < REQUEST_ID_MAX; c++)
        if ((*c >= '0' && *c <= '9') || (*c >= 'a' && *c <= 'z') || (*c >= 'A' && *c <= 'Z') || strchr("-_.:", *c)) exchange->id[n++] = *c;
    exchange->id[n] = '\0';
    if (n == 0) (void)snprintf(exchange->id, sizeof exchange->id, "%s%08" PRIx64, http->id_prefix, http->next_id++);
}

static enum MHD_Result visit_field(void *context, enum MHD_ValueKind kind, const char *name, size_t name_length, const char *value,
                                   size_t value_length) {
    (void)kind;
    guard_field(context, name, name_length, value, value_length);
    return MHD_YES;
}

/* In the middle of a body: libmicrohttpd can answer only at its end, which a client that waits for the answer may never send. */
static void refuse_at_once(struct exchange *exchange, const struct api_error *error) {
    exchange->aborted = exchange->close = true;
    answered(exchange, error->status, NULL);
    wire_refuse(exchange->connection, exchange->id, error);
}

static bool refuse_body(struct exchange *exchange, const struct api_error *error) {
    if (exchange->state != EXCHANGE_BODY || exchange->status) return false;
    exchange->discard = true;
    uncharge(exchange);
    buffer_done(&exchange->body);
    refuse_at_once(exchange, error);
    return true;
}

bool exchange_late(struct exchange *exchange) {
    struct api_error error;
    if (exchange->state != EXCHANGE_BODY) return false;
    api_error_set(&error, 408, "invalid_request_error", "request_timeout", NULL, "The request's body was not complete within %u s.",
                  exchange->connection->http->limits.body_timeout_s);
    if (!refuse_body(exchange, &error))
        wire_refuse(exchange->connection, exchange->id, &error); /* its answer, an error too, would have come behind the body */
    return true;
}

void exchange_broken(struct exchange *exchange, const struct guard_refusal *refusal) {
    struct api_error error;
    api_error_set(&error, refusal->status, "invalid_request_error", refusal->code, NULL, "The request is malformed: %s.", refusal->problem);
    if (!refuse_body(exchange, &error)) wire_refuse(exchange->connection, exchange->id, &error);
}

/* The path of a target, which proxies and some clients write with the host in front of it (RFC 9112 3.2.2). *authority: that host, as long as it is one, or empty. */
static const char *path_of(const char *target, char authority[AUTHORITY_BYTES]) {
    authority[0] = '\0';
    if (strncasecmp(target, "http://", 7) != 0) return target;
    const char *host = target + 7, *path = host + strcspn(host, "/");
    int n = path - host < AUTHORITY_BYTES ? (int)(path - host) : 0;
    (void)snprintf(authority, AUTHORITY_BYTES, "%.*s", n ? n : 1, n ? host : "/"); /* a slash is nobody's name */
    return *path ? path : "/";
}

/* Framing, Host, Origin and size. true: refused, an answer is set. */
static bool refuse(struct exchange *exchange, const struct guard *guard, const char *problem, const char *authority) {
    const struct http_limits *limits = &exchange->connection->http->limits;
    struct api_error error = {0};
    if (problem) {
        /* What follows on this connection cannot be trusted to be what it seems: nothing of it is read. */
        exchange->close = true;
        exchange->finished_body = true;
        api_error_set(&error, 400, "invalid_request_error", "bad_framing", NULL, "The request is malformed: %s.", problem);
        reply_error(exchange, &error);
        return true;
    }
    const char *host = exchange_header(exchange, "Host"), *origin = exchange_header(exchange, "Origin");
    if ((host && !guard_host_allowed(host, limits->bound_host, limits->allowed_hosts)) ||
        (authority[0] && !guard_host_allowed(authority, limits->bound_host, limits->allowed_hosts)) ||
        (origin && !guard_origin_allowed(origin, limits->bound_host, limits->allowed_hosts))) {
        api_error_set(&error, 403, "permission_error", "host_not_allowed", NULL,
                      "This %s is not one this server answers to (server.allowed_hosts lists the others).",
                      host && !origin ? "Host" : "Host or Origin");
        reply_error(exchange, &error);
        return true;
    }
    if (guard->encoded && (guard->content_lengths || guard->transfer_encodings)) {
        exchange_add_header(exchange, "Accept-Encoding", "identity");
        api_error_set(&error, 415, "invalid_request_error", "unsupported_content_encoding", NULL,
                      "The body has a Content-Encoding: only plain JSON is read.");
        reply_error(exchange, &error);
        return true;
    }
    const char *length = exchange_header(exchange, "Content-Length");
    unsigned long long declared = length ? strtoull(length, NULL, 10) : 0;
    if (declared > limits->max_body) {
        api_error_set(&error, 413, "invalid_request_error", "body_too_large", NULL, "The body has %llu bytes; at most %" PRIu64 " are allowed.",
                      declared, limits->max_body);
        /* A little too long is read and dropped, so that the client sees the answer; a client that waits for 100 Continue sees it at once. */
        if (exchange_header(exchange, "Expect")) exchange->close = exchange->finished_body = true;
        if (declared > 2 * limits->max_body && !exchange->finished_body)
            refuse_at_once(exchange, &error);
        else
            reply_error(exchange, &error);
        return true;
    }
    return false;
}

static enum MHD_Result begin(struct http *http, struct MHD_Connection *mhd, const char *url, const char *method, const char *version, void **slot) {
    struct connection *connection = connection_of(mhd);
    if (!connection || !wire_began(connection) || connection->gone || connection->refused || http->stopping) return MHD_NO;
    struct exchange *exchange = check_calloc(1, sizeof *exchange);
    exchange->connection = connection;
    exchange->started_ns = clock_now_ns();
    exchange->route = exchange->key = UINT32_MAX;
    (void)snprintf(exchange->method, sizeof exchange->method, "%s", method);
    char authority[AUTHORITY_BYTES];
    (void)snprintf(exchange->path, sizeof exchange->path, "%s%s", path_of(url, authority),
                   connection->nul_in_path ? "%00" : ""); /* no route and no model has such a name */
    exchange->next = http->exchanges;
    if (exchange->next) exchange->next->previous = exchange;
    http->exchanges = exchange;
    http->n_exchanges++;
    connection->exchange = exchange;
    *slot = exchange;
    choose_id(exchange, exchange_header(exchange, "x-request-id"));
    connection_deadline(connection, http->limits.body_timeout_s);
    struct guard guard = {0};
    (void)MHD_get_connection_values_n(mhd, MHD_HEADER_KIND, visit_field, &guard);
    exchange->http_1_0 = strcmp(version, "HTTP/1.0") == 0;
    exchange->last = guard.close || (exchange->http_1_0 && !guard.keep_alive);
    if (!refuse(exchange, &guard, guard_verdict(&guard, !exchange->http_1_0), authority)) http->hooks.headers(http->hooks.context, exchange);
    if (exchange->status == 0) return MHD_YES;
    exchange->discard = true;
    /* Queued before its body, an answer ends the connection: only where that is wanted, or the client waits for 100 Continue. */
    if (exchange->finished_body || exchange_header(exchange, "Expect")) {
        exchange->close = true;
        return queue_answer(exchange);
    }
    return MHD_YES;
}

static enum MHD_Result take_body(struct exchange *exchange, const char *bytes, size_t *length) {
    struct http *http = exchange->connection->http;
    struct api_error error = {0};
    size_t n = *length;
    *length = 0;
    exchange->body_seen += n;
    if (exchange->discard) /* bounded: somebody who goes on for ever is cut off */
        return exchange->body_seen > 4 * http->limits.max_body + (1u << 20) ? MHD_NO : MHD_YES;
    if (exchange->body_seen > http->limits.max_body) {
        api_error_set(&error, 413, "invalid_request_error", "body_too_large", NULL, "The body has more than %" PRIu64 " bytes.",
                      http->limits.max_body);
        exchange->close = true;
    } else if (http->body_bytes + n > HTTP_BODIES_MAX * http->limits.max_body) {
        api_error_set(&error, 503, "server_error", "overloaded", NULL, "Too many large requests at once.");
        error.retry_after_s = 1;
    }
    if (error.status) {
        exchange->discard = true;
        uncharge(exchange);
        buffer_done(&exchange->body);
        refuse_at_once(exchange, &error);
        return MHD_YES;
    }
    buffer_append(&exchange->body, bytes, n);
    exchange->body_charged += n;
    http->body_bytes += n;
    return MHD_YES;
}

enum MHD_Result exchange_handle(void *context, struct MHD_Connection *mhd, const char *url, const char *method, const char *version,
                                const char *upload, size_t *upload_length, void **slot) {
    struct http *http = context;
    struct exchange *exchange = *slot;
    if (!exchange) return begin(http, mhd, url, method, version, slot);
    if (exchange->connection->gone) return MHD_NO;
    if (*upload_length) return take_body(exchange, upload, upload_length);
    if (exchange->state == EXCHANGE_BODY) { /* all is in */
        exchange->connection->deadline_ns = 0;
        exchange->state = EXCHANGE_ASKED;
        if (exchange->aborted) return MHD_NO; /* it has been answered on the wire */
        if (exchange->status)
            exchange->state = EXCHANGE_ANSWER;
        else
            http->hooks.request(http->hooks.context, exchange);
    }
    if (exchange->state == EXCHANGE_ANSWER || exchange->state == EXCHANGE_STREAM) return queue_answer(exchange);
    CHECK(exchange->owner);                  /* whoever does not answer has taken it over */
    if (exchange->connection->half_closed) { /* nobody is left to wait for a late answer */
        exchange_gone(exchange);
        return MHD_NO;
    }
    exchange->suspended = true;
    MHD_suspend_connection(mhd);
    return MHD_YES;
}
