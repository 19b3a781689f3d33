/* Which path and method mean what, who may ask, and what is counted and logged of it. Loop thread. */
#include <stdio.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "server/internal.h"

struct route {
    const char *path; /* ends in '/': everything below it */
    const char *name; /* in metrics */
    bool post;        /* else GET and HEAD */
    bool open;        /* no key needed */
    bool always;      /* answered while loading and draining, and on the reserve of connections */
    void (*answer)(struct server *server, struct exchange *exchange);
};

static const struct route routes[] = {
    {"/v1/completions", "/v1/completions", true, false, false, serving_start},
    {"/v1/models", "/v1/models", false, false, false, utility_models},
    {"/v1/models/", "/v1/models/:id", false, false, false, utility_model},
    {"/tokenize", "/tokenize", true, false, false, utility_tokenize},
    {"/detokenize", "/detokenize", true, false, false, utility_detokenize},
    {"/health", "/health", false, true, true, utility_health},
    {"/version", "/version", false, true, true, utility_version},
    {"/metrics", "/metrics", false, true, true, utility_metrics},
};
#define ROUTES (sizeof routes / sizeof *routes)
_Static_assert(ROUTES < METRIC_ROUTES, "the last row of the counters is for paths without a route");

const char *const route_names[] = {"/v1/completions", "/v1/models", "/v1/models/:id", "/tokenize", "/detokenize",
                                   "/health",         "/version",   "/metrics",       "other"};
_Static_assert(sizeof route_names / sizeof *route_names == ROUTES + 1, "one name a route");
uint32_t route_count(void) { return (uint32_t)ROUTES; }

/* A path that was cut is no route and names no model. */
_Static_assert(EXCHANGE_PATH_BYTES - 1 > sizeof "/v1/models/" + CONFIG_TEXT, "longer than all that is found");

static uint32_t find(const struct server *server, const char *path) {
    for (uint32_t i = 0; i < ROUTES; i++) {
        size_t length = strlen(routes[i].path);
        bool below = routes[i].path[length - 1] == '/';
        if (!below && strcmp(path, routes[i].path) == 0) return i;
        /* One name below it; a served name may have slashes of its own ("org/model"). */
        if (below && strncmp(path, routes[i].path, length) == 0 && path[length] &&
            (!strchr(path + length, '/') || strcmp(path + length, server->model.served_name) == 0))
            return i;
    }
    return UINT32_MAX;
}

static void refuse(struct exchange *exchange, int status, const char *type, const char *code, const char *message) {
    struct api_error error;
    api_error_set(&error, status, type, code, NULL, "%s", message);
    reply_error(exchange, &error);
}

/* false: answered with a 401. */
static bool authenticate(struct server *server, struct exchange *exchange, uint32_t route) {
    size_t length;
    const char *key = keys_from_headers(exchange_header(exchange, "Authorization"), exchange_header(exchange, "X-Api-Key"), &length);
    uint32_t found = key && server->keys.required ? keys_find(&server->keys, key, length) : KEY_NONE;
    exchange_set_tag(exchange, route, found);
    if (!server->keys.required || found != KEY_NONE || (route < ROUTES && routes[route].open)) return true;
    refuse(exchange, 401, "authentication_error", "invalid_api_key",
           key ? "This API key is not known." : "An API key is needed: Authorization: Bearer KEY, or X-Api-Key: KEY.");
    return false;
}

static void answer_options(struct exchange *exchange, const char *allow) {
    struct buffer nothing = {0};
    exchange_add_header(exchange, "Allow", allow);
    exchange_reply(exchange, 204, NULL, &nothing);
}

void route_headers(void *context, struct exchange *exchange) {
    struct server *server = context;
    const char *method = exchange_method(exchange), *path = exchange_path(exchange);
    uint32_t index = find(server, path);
    exchange_set_tag(exchange, index, KEY_NONE);
    const struct route *route = index < ROUTES ? &routes[index] : NULL;
    /* Who has no key learns nothing of which paths there are. OPTIONS never carries one. */
    const bool options = strcmp(method, "OPTIONS") == 0;
    if (!options && !authenticate(server, exchange, index)) return;
    if (options && strcmp(path, "*") == 0) { /* of the server as a whole */
        answer_options(exchange, "GET, HEAD, POST, OPTIONS");
        return;
    }
    if (!route) {
        char message[360];
        (void)snprintf(message, sizeof message, "There is no %.255s here.", path);
        refuse(exchange, 404, "invalid_request_error", "not_found", message);
        return;
    }
    const char *allow = route->post ? "POST, OPTIONS" : "GET, HEAD, OPTIONS";
    bool fits = route->post ? strcmp(method, "POST") == 0 : strcmp(method, "GET") == 0 || strcmp(method, "HEAD") == 0;
    if (options) {
        answer_options(exchange, allow);
    } else if (!fits) {
        exchange_add_header(exchange, "Allow", allow);
        refuse(exchange, 405, "invalid_request_error", "method_not_allowed", route->post ? "This path takes POST." : "This path takes GET.");
    } else if (!route->always) {
        struct api_error error = {0};
        if (server_takes_requests(server, &error) && exchange_is_reserve(exchange)) {
            api_error_set(&error, 503, "server_error", "overloaded", NULL, "Too many connections. Try again later.");
            error.retry_after_s = 1;
        }
        if (error.status) {
            server->metrics.rejected_not_ready++;
            reply_error(exchange, &error);
        }
    }
}

void route_request(void *context, struct exchange *exchange) {
    struct server *server = context;
    const struct route *route = &routes[exchange_route(exchange)];
    struct api_error error = {0};
    /* The phase may have changed while the body came. */
    if (!route->always && !server_takes_requests(server, &error))
        reply_error(exchange, &error);
    else
        route->answer(server, exchange);
}

void route_answered(void *context, struct exchange *exchange) {
    struct server *server = context;
    metrics_answer(&server->metrics, exchange_route(exchange), exchange_status(exchange));
}

/* One line a request. Health checks and scrapes come every few seconds: only for debugging. */
void route_finished(void *context, struct exchange *exchange) {
    (void)context;
    uint32_t index = exchange_route(exchange);
    bool quiet = index < ROUTES && routes[index].always && exchange_status(exchange) < 500;
    char path[128], method[16];
    size_t n = 0;
    for (const char *c = exchange_path(exchange); *c && n < sizeof path - 1; c++) path[n++] = *c > 0x20 && *c < 0x7f ? *c : '?';
    path[n] = '\0';
    n = 0;
    for (const char *c = exchange_method(exchange); *c && n < sizeof method - 1; c++) method[n++] = *c > 0x20 && *c < 0x7f ? *c : '?';
    method[n] = '\0';
    log_write(quiet ? LOG_LEVEL_DEBUG : LOG_LEVEL_INFO, "request id=%s method=%s path=%s status=%d ms=%.1f bytes=%llu%s%s%s",
              exchange_request_id(exchange), method, path, exchange_status(exchange), (double)(clock_now_ns() - exchange_started_ns(exchange)) / 1e6,
              (unsigned long long)exchange_bytes_out(exchange), exchange_aborted(exchange) ? " client=gone" : "",
              exchange_notes(exchange)[0] ? " " : "", exchange_notes(exchange));
}

void route_refused(void *context, int status, const char *why) {
    struct server *server = context;
    metrics_answer(&server->metrics, UINT32_MAX, status);
    log_info("request status=%d refused=\"%s\"", status, why);
}
