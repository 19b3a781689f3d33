/* See server.h. The life of the daemon: bind, load on another thread, serve, reload, drain, stop. Loop thread, but for load and the engine's and loader's signals (wake, progress).
 * Handles no request itself. */
#include "server/server.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "base/check.h"
#include "base/clock.h"
#include "base/log.h"
#include "config/options.h"
#include "server/internal.h"

#define TICK_MS 250

/* ---- what others ask ---- */

struct completion_limits server_limits(const struct server *server) {
    const struct memory_plan *plan = engine_limits(server->model.engine);
    uint32_t max_choices = server->config.max_choices;
    return (struct completion_limits){
        .served_name = server->model.served_name,
        .tokenizer = server->model.tokenizer,
        .max_model_len = plan->max_model_len,
        .max_stream_tokens = plan->max_stream_tokens,
        .compression = &server->config_at_start,
        .max_prompts = server->config.max_prompts,
        .max_choices = max_choices,
        .max_logprobs = server->config.max_logprobs < SAMPLE_TOP_MAX ? server->config.max_logprobs : SAMPLE_TOP_MAX,
    };
}

bool server_takes_requests(const struct server *server, struct api_error *error) {
    switch (server->phase) {
    case SERVER_SERVING: return true;
    case SERVER_LOADING:
        api_error_set(error, 503, "server_error", "loading", NULL, "The model is loading (%u %%).", atomic_load(&server->load_permille) / 10);
        error->retry_after_s = 5;
        return false;
    case SERVER_DRAINING:
        api_error_set(error, 503, "server_error", "draining", NULL, "The server is shutting down.");
        error->retry_after_s = 5;
        return false;
    }
    return false;
}

static struct http_limits http_limits_of(const struct config *config) {
    struct http_limits limits = {.max_body = config->max_body,
                                 .max_connections = config->max_connections,
                                 .header_timeout_s = config->header_timeout_s,
                                 .body_timeout_s = config->body_timeout_s,
                                 .idle_timeout_s = config->idle_timeout_s,
                                 .stall_timeout_s = config->stall_timeout_s};
    (void)snprintf(limits.bound_host, sizeof limits.bound_host, "%s", config->host);
    (void)snprintf(limits.allowed_hosts, sizeof limits.allowed_hosts, "%s", config->allowed_hosts);
    return limits;
}

/* ---- loading ---- */

static void on_wake(uv_async_t *async) { serving_poll(async->data); }

/* Engine thread. */
static void wake(void *context) { (void)uv_async_send(&((struct server *)context)->wake); }

/* Start thread. */
static void progress(void *context, double fraction) {
    struct server *server = context;
    double clamped = fraction < 0 ? 0 : fraction > 1 ? 1 : fraction;
    atomic_store(&server->load_permille, (uint32_t)(clamped * 1000));
}

static void *load(void *context) {
    struct server *server = context;
    struct engine_hooks hooks = {.wake = wake, .context = server, .progress = progress, .progress_context = server};
    server->load_status = server->setup->start(server->setup->context, &hooks, &server->loading_model, &server->load_error);
    (void)uv_async_send(&server->loaded);
    return NULL;
}

static void on_loaded(uv_async_t *async) {
    struct server *server = async->data;
    if (server->loader_joined) return;
    CHECK(pthread_join(server->loader, NULL) == 0);
    server->loader_joined = true;
    if (server->load_status != STATUS_OK) {
        uv_stop(&server->loop);
        return;
    }
    server->model = server->loading_model;
    const char *describe = engine_describe(server->model.engine);
    uint8_t digest[SHA256_BYTES];
    char words[CONFIG_TEXT + 256];
    /* The same model on the same kernels with the same cache gives the same tokens for a seed. */
    (void)snprintf(words, sizeof words, "%s|%s|%s|%llu", KVASIR_VERSION, describe, server->model.root, (unsigned long long)server->model.parameters);
    sha256(words, strlen(words), digest);
    (void)snprintf(server->fingerprint, sizeof server->fingerprint, "kvasir-%02x%02x%02x%02x%02x", digest[0], digest[1], digest[2], digest[3],
                   digest[4]);
    metrics_set_context(&server->metrics, engine_limits(server->model.engine)->max_model_len);
    if (server->phase != SERVER_LOADING) return;
    server->phase = SERVER_SERVING;
    notify_send(&server->notify, "READY=1\nSTATUS=serving %.200s on %.200s", server->model.served_name, http_url(server->http));
    log_info("serving %s on %s", server->model.served_name, http_url(server->http));
    if (server->setup->ready) server->setup->ready(server->setup->context, http_url(server->http));
}

/* ---- drain ---- */

static bool drained(const struct server *server) { return http_exchanges(server->http) == 0 && server->n_servings == 0; }

static void drain(struct server *server) {
    server->phase = SERVER_DRAINING;
    server->drain_deadline_ns = clock_now_ns() + server->config.drain_timeout_s * 1000000000ull;
    notify_send(&server->notify, "STOPPING=1\nSTATUS=draining %u requests", server->n_servings);
    log_info("draining: %u requests in flight, %u s", server->n_servings, server->config.drain_timeout_s);
    http_drain(server->http);
    if (drained(server)) uv_stop(&server->loop);
}

static void on_terminate(uv_signal_t *handle, int number) {
    struct server *server = handle->data;
    (void)number;
    if (server->phase == SERVER_DRAINING) {
        log_warn("a second signal: stopping at once");
        uv_stop(&server->loop);
    } else if (server->phase == SERVER_LOADING && !server->loader_joined) {
        /* Nothing is in flight, and the loader cannot be interrupted: there is nothing to wait for. */
        notify_send(&server->notify, "STOPPING=1");
        log_info("stopped while loading");
        _exit(0);
    } else {
        drain(server);
    }
}

/* ---- reload ---- */

/* Each option that is another now, by the table. No option holds a secret: keys stand in a file of their own. */
static void log_changes(const struct config *before, const struct config *after) {
    unsigned changes = 0;
    for (size_t i = 0; i < options_count(); i++) {
        char was[CONFIG_TEXT], is[CONFIG_TEXT];
        option_text(&options[i], before, was, sizeof was);
        option_text(&options[i], after, is, sizeof is);
        if (strcmp(was, is) == 0) continue;
        log_info("reload: %s: %s -> %s", options[i].key, was, is);
        changes++;
    }
    if (changes == 0) log_info("reload: no option changed");
}

static enum log_level level_of(const char *name) {
    static const char *const names[] = {"error", "warn", "info", "debug"};
    for (int i = 0; i < 4; i++)
        if (strcmp(name, names[i]) == 0) return (enum log_level)i;
    return LOG_LEVEL_INFO;
}

static void on_reload(uv_signal_t *handle, int number) {
    struct server *server = handle->data;
    struct config *next = check_calloc(1, sizeof *next);
    struct error error = {0};
    char refused[512] = "";
    (void)number;
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    notify_send(&server->notify, "RELOADING=1\nMONOTONIC_USEC=%llu",
                (unsigned long long)now.tv_sec * 1000000ull + (unsigned long long)now.tv_nsec / 1000);
    /* All or nothing: keys that cannot be read leave the limits as they were, too. */
    if (config_reload(&server->config, next, refused, sizeof refused, &error) != STATUS_OK ||
        keys_load(&server->keys, next->api_key_file, &error) != STATUS_OK) {
        log_error("reload: %s; nothing was changed", error.text);
    } else {
        struct http_limits limits = http_limits_of(next);
        log_changes(&server->config, next);
        if (server->keys.required) log_info("reload: %u keys", server->keys.n_valid);
        server->config = *next;
        http_set_limits(server->http, &limits);
        log_set_level(level_of(next->log_level));
        if (refused[0]) log_warn("reload: needs a restart, left as it was: %s", refused);
    }
    free(next);
    if (server->phase == SERVER_SERVING)
        notify_send(&server->notify, "READY=1\nSTATUS=serving %.200s on %.200s", server->model.served_name, http_url(server->http));
    else
        notify_send(&server->notify, "READY=1");
}

/* ---- tick ---- */

static void feed_watchdog(struct server *server, uint64_t now) {
    if (!server->notify.watchdog_ns || now < server->watchdog_due_ns) return;
    /* This line runs, so the loop does; the engine must prove itself. */
    if (server->model.engine && server->loader_joined && !engine_alive(server->model.engine, now, ENGINE_STALL_NS)) return;
    server->watchdog_due_ns = now + server->notify.watchdog_ns / 3;
    notify_send(&server->notify, "WATCHDOG=1");
}

static void on_tick(uv_timer_t *timer) {
    struct server *server = timer->data;
    uint64_t now = clock_now_ns();
    feed_watchdog(server, now);
    if (server->phase == SERVER_LOADING) {
        uint32_t percent = atomic_load(&server->load_permille) / 10;
        if (percent != server->told_percent) notify_send(&server->notify, "STATUS=loading %u %%\nEXTEND_TIMEOUT_USEC=60000000", percent);
        server->told_percent = percent;
        return;
    }
    serving_poll(server); /* bounds a lost wake-up to one tick */
    serving_tick(server, now);
    if (server->phase != SERVER_DRAINING) return;
    if (now >= server->drain_deadline_ns) {
        if (server->cancelled) { /* they had their time to read the error */
            uv_stop(&server->loop);
            return;
        }
        log_warn("drain_timeout: %u requests are cancelled", server->n_servings);
        server->cancelled = true;
        server->drain_deadline_ns = now + 2000000000ull;
        serving_abort_all(server);
    }
    if (drained(server)) uv_stop(&server->loop);
}

/* ---- start and stop ---- */

static void start_signal(struct server *server, int slot, int number, uv_signal_cb callback) {
    CHECK(uv_signal_init(&server->loop, &server->signals[slot]) == 0);
    server->signals[slot].data = server;
    CHECK(uv_signal_start(&server->signals[slot], callback, number) == 0);
}

static void start_loop(struct server *server) {
    CHECK(uv_loop_init(&server->loop) == 0);
    CHECK(uv_async_init(&server->loop, &server->wake, on_wake) == 0 && uv_async_init(&server->loop, &server->loaded, on_loaded) == 0);
    CHECK(uv_timer_init(&server->loop, &server->tick) == 0);
    server->wake.data = server->loaded.data = server->tick.data = server;
    CHECK(uv_timer_start(&server->tick, on_tick, TICK_MS, TICK_MS) == 0);
    (void)signal(SIGPIPE, SIG_IGN);
    start_signal(server, 0, SIGTERM, on_terminate);
    start_signal(server, 1, SIGINT, on_terminate);
    start_signal(server, 2, SIGHUP, on_reload);
}

/* The engine's last events, so that every request is freed: each live choice has one to come. */
static void settle(struct server *server) {
    uint64_t give_up = clock_now_ns() + ENGINE_STALL_NS;
    while (server->n_servings && clock_now_ns() < give_up) {
        serving_poll(server);
        if (server->n_servings) (void)uv_run(&server->loop, UV_RUN_ONCE); /* the engine's wake-up, a worker that still parses, or the tick */
    }
    if (server->n_servings == 0) return;
    log_error("the engine did not end %u requests in time", server->n_servings);
    _exit(1);
}

static void close_handle(uv_handle_t *handle, void *context) {
    (void)context;
    if (!uv_is_closing(handle)) uv_close(handle, NULL);
}

static void stop_all(struct server *server) {
    server->phase = SERVER_DRAINING; /* a signal from now on changes nothing */
    if (server->http) {
        serving_abort_all(server);
        http_stop(server->http);
    }
    if (server->model.engine) {
        settle(server);
        engine_stop(server->model.engine);
    }
    uv_walk(&server->loop, close_handle, NULL);
    while (uv_run(&server->loop, UV_RUN_DEFAULT) != 0) continue;
    CHECK(uv_loop_close(&server->loop) == 0);
    if (server->http) http_free(server->http);
    keys_done(&server->keys);
    notify_close(&server->notify);
}

static enum status start_all(struct server *server, struct error *error) {
    const struct config *config = &server->config;
    struct http_limits limits = http_limits_of(config);
    struct http_hooks hooks = {route_headers, route_request, route_answered, route_finished, route_refused, server};
    enum status status = keys_load(&server->keys, config->api_key_file, error);
    if (status != STATUS_OK) config_locate_value(config, "server.api_key_file", error);
    /* A key file that cannot be read is a configuration that is wrong; a port in use may be free the next time. */
    if (status == STATUS_IO) status = error->status = STATUS_INVALID;
    if (status == STATUS_OK) status = http_start(&server->http, &server->loop, config->host, config->port, &limits, &hooks, error);
    if (status != STATUS_OK) return status;
    if (server->setup->listening) server->setup->listening(server->setup->context, http_url(server->http));
    notify_send(&server->notify, "STATUS=loading 0 %%\nEXTEND_TIMEOUT_USEC=60000000");
    if (pthread_create(&server->loader, NULL, load, server) != 0)
        return error_set(error, STATUS_NO_MEMORY, "cannot start a thread: %s", strerror(errno));
    return STATUS_OK;
}

enum status server_run(const struct server_setup *setup, struct error *error) {
    struct server *server = check_calloc(1, sizeof *server);
    uv_timeval64_t wall;
    server->setup = setup;
    server->config = server->config_at_start = *setup->config;
    (void)uv_gettimeofday(&wall);
    server->started_at = wall.tv_sec;
    server->start_time = (double)wall.tv_sec + (double)wall.tv_usec / 1e6;
    server->next_request = 1;
    CHECK(getrandom(&server->seed, sizeof server->seed, 0) == sizeof server->seed);
    metrics_init(&server->metrics);
    log_set_level(level_of(server->config.log_level));
    notify_open(&server->notify);
    start_loop(server);
    enum status status = start_all(server, error);
    if (status == STATUS_OK) {
        (void)uv_run(&server->loop, UV_RUN_DEFAULT);
        status = server->load_status;
        if (status != STATUS_OK && error) *error = server->load_error;
    }
    stop_all(server);
    free(server);
    return status;
}
