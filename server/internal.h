/* What the parts of the running server share: the loop's own state. Everything in it belongs to the loop thread, except `loading`, which the start thread writes. */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <uv.h>

#include "server/completion_write.h"
#include "server/http.h"
#include "server/keys.h"
#include "server/metrics.h"
#include "server/notify.h"
#include "server/reply.h"
#include "server/server.h"

enum server_phase { SERVER_LOADING, SERVER_SERVING, SERVER_DRAINING };

#define ENGINE_STALL_NS 10000000000ull       /* no step for so long: /health says so, the watchdog starves */
#define WORKER_BYTES 16384                   /* longer bodies are parsed and tokenized off the loop */
#define PROMPT_RESULT_BYTES_MAX (256u << 20) /* echo with logprobs: of all requests together */

struct serving;

struct server {
    uv_loop_t loop;
    const struct server_setup *setup;
    struct config config;
    struct config config_at_start; /* for what no reload changes; workers read it */
    struct http *http;
    struct keys keys;
    struct metrics metrics;
    struct notify notify;
    uv_async_t wake, loaded;
    uv_timer_t tick;
    uv_signal_t signals[3];
    enum server_phase phase;
    bool cancelled; /* the drain's time is over */
    uint64_t drain_deadline_ns, watchdog_due_ns;
    int64_t started_at; /* unix seconds */
    double start_time;

    pthread_t loader;
    bool loader_joined;
    _Atomic uint32_t load_permille;
    struct server_model loading_model; /* this and the next two: written before `loaded` is sent */
    enum status load_status;
    struct error load_error;
    uint32_t told_percent;

    struct server_model model; /* all zero until it is loaded */
    char fingerprint[40];
    uint64_t next_request, seed;
    struct serving *servings;
    uint32_t n_servings, n_live; /* n_live: choices the engine has and clients wait for */
    uint64_t prompt_result_bytes;
};

/* admission.c: /v1/completions from a whole body to the engine. */
void serving_start(struct server *server, struct exchange *exchange);
/* serving.c: from there to the answer. */
void serving_poll(struct server *server);                  /* takes all events of the engine */
void serving_tick(struct server *server, uint64_t now_ns); /* deadlines, heartbeats */
void serving_abort_all(struct server *server);             /* the drain is over: what still runs is told so */

/* routes.c */
extern const char *const route_names[];
uint32_t route_count(void);
void route_headers(void *context, struct exchange *exchange);
void route_request(void *context, struct exchange *exchange);
void route_answered(void *context, struct exchange *exchange);
void route_finished(void *context, struct exchange *exchange);
void route_refused(void *context, int status, const char *why);

/* utility.c: the small endpoints. */
void utility_health(struct server *server, struct exchange *exchange);
void utility_version(struct server *server, struct exchange *exchange);
void utility_models(struct server *server, struct exchange *exchange);
void utility_model(struct server *server, struct exchange *exchange);
void utility_metrics(struct server *server, struct exchange *exchange);
void utility_tokenize(struct server *server, struct exchange *exchange);
void utility_detokenize(struct server *server, struct exchange *exchange);

/* server.c */
struct completion_limits server_limits(const struct server *server);
/* false: not now, and *error says why (loading, draining). */
bool server_takes_requests(const struct server *server, struct api_error *error);
