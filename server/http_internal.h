/* Shared by http.c (daemon, connections, deadlines) and exchange.c (one request and its answer). Loop thread. */
#pragma once

#include <microhttpd.h>

#include "server/api_error.h"
#include "server/guard.h"
#include "server/http.h"

#define HTTP_TICK_MS 250
#define HTTP_RESERVE 32    /* connections beyond max_connections that are still accepted, so that /health answers when all others are taken */
#define HTTP_BODIES_MAX 32 /* memory of all bodies together: so many times max_body */
#define EXCHANGE_HEADERS_MAX 6
#define HTTP_LINGER_S 1       /* between a refusal on the wire and the cut: a reset would take the answer away */
#define HTTP_SEND_BYTES 65536 /* of a socket's buffer */

struct connection {
    struct connection *next, *previous;
    struct http *http;
    struct MHD_Connection *mhd;
    struct exchange *exchange; /* the current one; NULL between requests */
    int socket;
    uint64_t deadline_ns; /* 0: none */
    uint64_t acked;       /* bytes that the peer had taken when a deadline of an answer last passed */
    uv_poll_t watcher;
    /* Where in the stream of requests the bytes are that libmicrohttpd reads next (wire.c). */
    enum { PART_HEAD, PART_BODY, PART_CHUNKS } part;
    uint32_t heads;             /* that libmicrohttpd has got and not yet made an exchange of */
    uint32_t empty;             /* bytes of empty lines since the last request */
    struct buffer head;         /* what came of a request's head, where it is not all here */
    uint64_t body_left;         /* bytes of a body with a length */
    struct guard_chunks chunks; /* a body in chunks */
    struct guard_refusal wrong; /* of a request behind those that are still to be answered; no problem: none */
    uint64_t dropped;           /* bytes that came after a refusal */
    bool half_closed;           /* the peer has sent its last byte */
    bool gone;                  /* the peer left, or a deadline passed */
    bool refused;               /* answered on the wire: what still comes is read and dropped */
    bool nul_in_path;           /* of the request whose line came last: what libmicrohttpd hands on as its path ends there */
};

enum exchange_state {
    EXCHANGE_BODY,   /* reading */
    EXCHANGE_ASKED,  /* the request is in; suspended until somebody answers */
    EXCHANGE_ANSWER, /* a whole answer waits to be queued */
    EXCHANGE_STREAM, /* a stream waits to be queued */
    EXCHANGE_QUEUED, /* libmicrohttpd has it */
};

struct exchange {
    struct exchange *next, *previous;
    struct connection *connection;
    enum exchange_state state;
    bool suspended, streaming, discard, close, finished_body, aborted;
    bool http_1_0;
    bool last;      /* no request may follow it on its connection */
    bool too_early; /* its answer was refused once */
    char method[24], path[EXCHANGE_PATH_BYTES], id[REQUEST_ID_MAX + 1], notes[320];
    struct buffer body, out;
    size_t body_seen, body_charged, out_at;
    uint64_t started_ns, bytes_out;
    int status;
    const char *content_type;
    struct {
        const char *name;
        char value[128];
    } headers[EXCHANGE_HEADERS_MAX];
    uint32_t n_headers;
    uint32_t route, key;
    const struct exchange_owner *functions;
    void *owner;
};

struct http {
    uv_loop_t *loop;
    struct MHD_Daemon *daemon;
    struct http_limits limits;
    struct http_hooks hooks;
    uv_poll_t epoll;
    uv_timer_t timer, tick;
    uv_check_t check; /* runs libmicrohttpd once a turn, behind all watchers */
    uv_idle_t idle;   /* active while a run is due: the loop does not sleep before it */
    struct connection *connections;
    struct connection **by_socket; /* n_sockets of them, NULL where there is none */
    size_t n_sockets;
    struct exchange *exchanges;
    uint32_t n_connections, n_exchanges;
    uint64_t body_bytes;
    bool draining, stopping, closed_one, due;
    char url[600];
    char id_prefix[17];
    uint64_t next_id;
};

/* wire.c: what is read from a socket before libmicrohttpd gets it, and what is said there behind its back. */
/* The program was built so that libmicrohttpd's reading can be seen. */
void wire_check(void);
/* One run of libmicrohttpd, with its reading seen. */
void wire_run(struct http *http);
/* A request is to become an exchange. false: it was never seen here. */
bool wire_began(struct connection *connection);
/* An exchange has ended and its connection goes on: says what is wrong with the request behind it, if that is known. */
void wire_answered(struct connection *connection);
/* A whole error answer, and the end of our side. What the peer still sends is dropped. */
void wire_refuse(struct connection *connection, const char *id, const struct api_error *error);
/* A deadline passed. true: a request had begun and is answered with 408; the client gets HTTP_LINGER_S to read it. */
bool wire_late(struct connection *connection);
/* exchange.c */
enum MHD_Result exchange_handle(void *context, struct MHD_Connection *mhd, const char *url, const char *method, const char *version,
                                const char *upload, size_t *upload_length, void **slot);
void exchange_completed(void *context, struct MHD_Connection *mhd, void **slot, enum MHD_RequestTerminationCode why);
void exchange_gone(struct exchange *exchange);
/* The body is not in and the deadline passed. false: an answer was made already. */
bool exchange_late(struct exchange *exchange);
/* Its body is broken, or not all of it came: said on the wire, whatever the answer would have been. */
void exchange_broken(struct exchange *exchange, const struct guard_refusal *refusal);
/* http.c */
struct connection *http_connection(const struct http *http, int socket);
struct connection *connection_of(struct MHD_Connection *mhd);
void connection_deadline(struct connection *connection, uint32_t seconds);
