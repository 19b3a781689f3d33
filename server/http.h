/* HTTP/1.1 for the loop thread: libmicrohttpd in external epoll mode, driven by a libuv loop, with what it lacks made good (always on):
 *   1 ambiguous framing is refused before a body byte is read (guard.h), 2 a watcher of our own on every socket notices peers that left, 3 the accept socket is offered again after
 *   every close, 4 absolute deadlines for headers, body, idling and unread answers, 5 a tick every 250 ms bounds whatever wake-up was missed.
 * Currency: exchanges (one request and its answer). Knows nothing of JSON documents, models or tokens.
 *
 * All of it belongs to the loop thread; nothing here may be called from another. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <uv.h>

#include "base/buffer.h"
#include "base/error.h"

struct http;
struct exchange;

#define REQUEST_ID_MAX 96
#define EXCHANGE_PATH_BYTES 1024 /* with the zero behind it */

struct http_limits { /* may change between requests (reload) */
    uint64_t max_body;
    uint32_t max_connections; /* fixed after http_start */
    uint32_t header_timeout_s, body_timeout_s, idle_timeout_s, stall_timeout_s;
    char bound_host[512];
    char allowed_hosts[512];
};

struct http_hooks {
    /* The headers are in. Routing and authentication: may answer at once (exchange_reply), which spares reading the body. */
    void (*headers)(void *context, struct exchange *exchange);
    /* The whole request is in, and `headers` did not answer. Must answer now or, after exchange_own, later. */
    void (*request)(void *context, struct exchange *exchange);
    /* A status was decided; once an exchange (counters). */
    void (*answered)(void *context, struct exchange *exchange);
    /* Over, the connection may be gone: the last chance to look at it (access log). */
    void (*finished)(void *context, struct exchange *exchange);
    /* Refused on the wire, without an exchange. */
    void (*refused)(void *context, int status, const char *why);
    void *context;
};

/* What a stream does when the socket takes bytes. */
enum produced {
    PRODUCED,      /* something was appended */
    PRODUCED_NONE, /* nothing now: exchange_wake will come */
    PRODUCED_END,  /* nothing any more */
};

/* Who answers later. Exactly one of `gone` or a complete answer ends the relation. */
struct exchange_owner {
    /* The client left, a deadline passed, or the daemon stops: the exchange must not be used any more. */
    void (*gone)(void *owner);
    enum produced (*produce)(void *owner, struct buffer *out);
    /* The answer has been handed to the socket to its end: like gone, but all is well. */
    void (*complete)(void *owner);
};

enum status http_start(struct http **http, uv_loop_t *loop, const char *host, uint16_t port, const struct http_limits *limits,
                       const struct http_hooks *hooks, struct error *error);
void http_set_limits(struct http *http, const struct http_limits *limits);
const char *http_url(const struct http *http); /* "http://127.0.0.1:8080" */
/* No new connections; those there are end with their next answer. */
void http_drain(struct http *http);
uint32_t http_connections(const struct http *http);
/* Requests whose answer is not complete. */
uint32_t http_exchanges(const struct http *http);
/* libmicrohttpd is to run, in this turn of the loop. Needed after exchange_wake or a late answer that did not happen inside one of the hooks; cheap to say often. */
void http_pump(struct http *http);
/* Ends every exchange (owners are told) and closes every socket. The loop must run once more to free the handles, then http_free. */
void http_stop(struct http *http);
void http_free(struct http *http);

/* ---- the exchange ---- */

const char *exchange_method(const struct exchange *exchange);
const char *exchange_path(const struct exchange *exchange); /* what is longer than EXCHANGE_PATH_BYTES allows is cut */
const char *exchange_request_id(const struct exchange *exchange);
const char *exchange_header(const struct exchange *exchange, const char *name); /* NULL: absent */
/* The body; buffer_append and such are not for the caller, but it may take the buffer over (and leave an empty one). */
struct buffer *exchange_body(struct exchange *exchange);
uint64_t exchange_started_ns(const struct exchange *exchange);
int exchange_status(const struct exchange *exchange); /* 0: none yet */
uint64_t exchange_bytes_out(const struct exchange *exchange);
bool exchange_aborted(const struct exchange *exchange); /* ended before its answer was complete */
/* Two words for the hooks: which route, whose key. */
void exchange_set_tag(struct exchange *exchange, uint32_t route, uint32_t key);
uint32_t exchange_route(const struct exchange *exchange);
uint32_t exchange_key(const struct exchange *exchange);
/* Something for the access log ("tokens=12 ..."); copied, cut to 320 bytes. */
void exchange_note(struct exchange *exchange, const char *words);
const char *exchange_notes(const struct exchange *exchange);
/* Is there room for one more connection's work, or is this one of the reserve that only /health and /metrics may use? */
bool exchange_is_reserve(const struct exchange *exchange);

/* The answer comes later, from `owner`. */
void exchange_own(struct exchange *exchange, const struct exchange_owner *functions, void *owner);
/* Before the answer. `name` is static. */
void exchange_add_header(struct exchange *exchange, const char *name, const char *value);
/* A whole answer. Takes the bytes of `body` (leaves it empty). */
void exchange_reply(struct exchange *exchange, int status, const char *content_type, struct buffer *body);
/* 200, and the body comes from owner->produce until it ends. */
void exchange_stream(struct exchange *exchange, const char *content_type);
/* produce has something, or the end, to give. */
void exchange_wake(struct exchange *exchange);
