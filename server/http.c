/* See http.h. The daemon, the pump, connections and their deadlines. */
#include "server/http.h"

#include <errno.h>
#include <inttypes.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/check.h"
#include "base/clock.h"
#include "base/log.h"
#include "server/acked.h"
#include "server/http_internal.h"

#define PUMP_SPINS 16

static void on_idle(uv_idle_t *idle) { (void)idle; } /* its being active is all */

/* ---- the pump ---- */

void http_pump(struct http *http) {
    if (http->due || !http->daemon) return;
    http->due = true;
    CHECK(uv_idle_start(&http->idle, on_idle) == 0);
}

static void on_timer(uv_timer_t *timer) { http_pump(timer->data); }

static void on_epoll(uv_poll_t *poll, int status, int events) {
    (void)status;
    (void)events;
    http_pump(poll->data);
}

/* Runs libmicrohttpd until it has nothing to do at once; then arms a timer with what it asks for. Its sockets are edge-triggered: skipping that timer hangs
 * connections. */
static void run(struct http *http) {
    MHD_UNSIGNED_LONG_LONG timeout = 0;
    bool more = true;
    for (int spin = 0; more && spin < PUMP_SPINS; spin++) {
        http->closed_one = false;
        wire_run(http);
        /* After a close the accept socket is offered again only at the beginning of the next run. */
        bool due = MHD_get_timeout(http->daemon, &timeout) == MHD_YES;
        more = (due && timeout == 0) || http->closed_one;
        if (!due) timeout = UINT64_MAX;
    }
    if (more) timeout = 0; /* next turn of the loop: others get theirs */
    if (timeout == UINT64_MAX)
        (void)uv_timer_stop(&http->timer);
    else
        (void)uv_timer_start(&http->timer, on_timer, timeout, 0);
}

static void on_check(uv_check_t *check) {
    struct http *http = check->data;
    if (!http->due || !http->daemon) return;
    http->due = false;
    (void)uv_idle_stop(&http->idle);
    run(http);
}

/* ---- connections ---- */

struct connection *connection_of(struct MHD_Connection *mhd) {
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    return info ? info->socket_context : NULL;
}

void connection_deadline(struct connection *connection, uint32_t seconds) {
    connection->deadline_ns = seconds ? clock_now_ns() + seconds * 1000000000ull : 0;
}

/* Makes libmicrohttpd see the end of the connection, whatever it waits for. */
static void cut(struct connection *connection) {
    connection->gone = true;
    connection->deadline_ns = 0;
    if (connection->exchange) exchange_gone(connection->exchange);
    (void)shutdown(connection->socket, SHUT_RDWR);
}

/* The peer has sent its last byte, or the connection is broken. */
static void on_socket(uv_poll_t *watcher, int status, int events) {
    struct connection *connection = watcher->data;
    (void)events;
    http_pump(connection->http);
    (void)uv_poll_stop(watcher); /* level-triggered */
    connection->half_closed = true;
    const struct exchange *exchange = connection->exchange;
    if (status >= 0 && exchange && exchange->state == EXCHANGE_QUEUED && !exchange->streaming) return; /* the whole answer is on its way */
    /* A request that came together with the end of the stream, and can be answered at once, is: half of all shell one-liners do that. The next tick cuts what is left. */
    if (status >= 0 && (!exchange || exchange->state == EXCHANGE_BODY))
        connection->deadline_ns = clock_now_ns();
    else
        cut(connection);
}

struct connection *http_connection(const struct http *http, int socket) {
    return (size_t)socket < http->n_sockets ? http->by_socket[socket] : NULL;
}

/* Descriptors are small numbers: the limit of open files bounds them. */
static void remember(struct http *http, int socket, struct connection *connection) {
    if ((size_t)socket >= http->n_sockets) {
        size_t n = (size_t)socket + 64;
        http->by_socket = check_realloc(http->by_socket, n, sizeof *http->by_socket);
        memset(http->by_socket + http->n_sockets, 0, (n - http->n_sockets) * sizeof *http->by_socket);
        http->n_sockets = n;
    }
    http->by_socket[socket] = connection;
}

static void watcher_closed(uv_handle_t *handle) { free(handle->data); }

static void connection_opened(struct http *http, struct MHD_Connection *mhd, void **slot) {
    struct connection *connection = check_calloc(1, sizeof *connection);
    connection->http = http;
    connection->mhd = mhd;
    connection->socket = MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_CONNECTION_FD)->connect_fd;
    connection->next = http->connections;
    if (connection->next) connection->next->previous = connection;
    http->connections = connection;
    http->n_connections++;
    connection_deadline(connection, http->limits.header_timeout_s);
    /* What a client does not read waits as tokens of 24 bytes in our memory, not as text in the kernel's (which would take 4 MiB a connection). */
    int send_bytes = HTTP_SEND_BYTES;
    (void)setsockopt(connection->socket, SOL_SOCKET, SO_SNDBUF, &send_bytes, sizeof send_bytes);
    CHECK(uv_poll_init_socket(http->loop, &connection->watcher, connection->socket) == 0);
    connection->watcher.data = connection;
    CHECK(uv_poll_start(&connection->watcher, UV_DISCONNECT, on_socket) == 0);
    remember(http, connection->socket, connection);
    *slot = connection;
}

/* libmicrohttpd closes the socket after this. */
static void connection_closed(struct connection *connection) {
    struct http *http = connection->http;
    if (connection->previous)
        connection->previous->next = connection->next;
    else
        http->connections = connection->next;
    if (connection->next) connection->next->previous = connection->previous;
    http->n_connections--;
    http->closed_one = true;
    buffer_done(&connection->head);
    remember(http, connection->socket, NULL);
    (void)uv_poll_stop(&connection->watcher);
    uv_close((uv_handle_t *)&connection->watcher, watcher_closed);
}

static void on_connection(void *context, struct MHD_Connection *mhd, void **slot, enum MHD_ConnectionNotificationCode code) {
    if (code == MHD_CONNECTION_NOTIFY_STARTED)
        connection_opened(context, mhd, slot);
    else if (*slot)
        connection_closed(*slot);
}

/* The request line is in: from here on the headers have their own, shorter time. */
static void *on_request_line(void *context, const char *uri, struct MHD_Connection *mhd) {
    struct http *http = context;
    struct connection *connection = connection_of(mhd);
    if (!connection) return NULL;
    const char *nul = strstr(uri, "%00");
    connection->nul_in_path = nul && nul < uri + strcspn(uri, "?");
    uint64_t latest = clock_now_ns() + http->limits.header_timeout_s * 1000000000ull;
    if (connection->deadline_ns == 0 || connection->deadline_ns > latest) connection->deadline_ns = latest;
    return NULL;
}

/* A peer that takes little is no peer that takes nothing: what was handed to the system may be megabytes, and libmicrohttpd asks for more only when much of that is gone. */
static bool takes_some(struct connection *connection) {
    if (!connection->exchange || connection->exchange->state != EXCHANGE_QUEUED) return false;
    uint64_t before = connection->acked;
    connection->acked = socket_bytes_acked(connection->socket);
    if (connection->acked <= before) return false;
    connection_deadline(connection, connection->http->limits.stall_timeout_s);
    return true;
}

static void on_tick(uv_timer_t *timer) {
    struct http *http = timer->data;
    uint64_t now = clock_now_ns();
    for (struct connection *connection = http->connections, *next; connection; connection = next) {
        next = connection->next;
        if (connection->deadline_ns && now >= connection->deadline_ns && !takes_some(connection) && !wire_late(connection)) cut(connection);
    }
    http_pump(http);
}

/* ---- start and stop ---- */

static enum status listen_on(const char *host, uint16_t port, int *result, char *url, size_t url_size, struct error *error) {
    struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV}, *list = NULL;
    char service[8], name[512];
    size_t length = strlen(host);
    bool brackets = length > 2 && host[0] == '[' && host[length - 1] == ']';
    (void)snprintf(name, sizeof name, "%.*s", (int)(brackets ? length - 2 : length), host + (brackets ? 1 : 0));
    (void)snprintf(service, sizeof service, "%u", port);
    int failed = getaddrinfo(name, service, &hints, &list);
    if (failed) return error_set(error, STATUS_INVALID, "server.host %s: %s", host, gai_strerror(failed));
    int listener = -1, why = 0;
    for (struct addrinfo *address = list; address && listener < 0; address = address->ai_next) {
        int one = 1;
        listener = socket(address->ai_family, address->ai_socktype | SOCK_NONBLOCK | SOCK_CLOEXEC, address->ai_protocol);
        if (listener < 0) {
            why = errno;
            continue;
        }
        (void)setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        if (bind(listener, address->ai_addr, address->ai_addrlen) != 0 || listen(listener, 4096) != 0) {
            why = errno;
            (void)close(listener);
            listener = -1;
        }
    }
    freeaddrinfo(list);
    if (listener < 0) return error_set(error, STATUS_IO, "cannot listen on %s port %u: %s", host, port, strerror(why));
    struct sockaddr_storage bound;
    socklen_t bound_length = sizeof bound;
    CHECK(getsockname(listener, (struct sockaddr *)&bound, &bound_length) == 0);
    CHECK(getnameinfo((struct sockaddr *)&bound, bound_length, NULL, 0, service, sizeof service, NI_NUMERICSERV) == 0);
    (void)snprintf(url, url_size, strchr(name, ':') ? "http://[%s]:%s" : "http://%s:%s", name, service);
    *result = listener;
    return STATUS_OK;
}

/* Every connection is a descriptor, and libmicrohttpd stops accepting when there are none left. */
static void raise_descriptor_limit(uint32_t connections) {
    struct rlimit limit;
    rlim_t wanted = connections + HTTP_RESERVE + 64;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= wanted) return;
    limit.rlim_cur = limit.rlim_max < wanted ? limit.rlim_max : wanted;
    if (setrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur < wanted)
        log_warn("the limit of open files (%llu) is less than max_connections needs (%llu)", (unsigned long long)limit.rlim_cur,
                 (unsigned long long)wanted);
}

static void on_mhd_log(void *context, const char *format, va_list args) {
    char line[256];
    (void)context;
    (void)vsnprintf(line, sizeof line, format, args);
    line[strcspn(line, "\r\n")] = '\0';
    log_debug("http: %s", line);
}

enum status http_start(struct http **result, uv_loop_t *loop, const char *host, uint16_t port, const struct http_limits *limits,
                       const struct http_hooks *hooks, struct error *error) {
    wire_check();
    struct http *http = check_calloc(1, sizeof *http);
    int listener = -1;
    http->loop = loop;
    http->limits = *limits;
    http->hooks = *hooks;
    enum status status = listen_on(host, port, &listener, http->url, sizeof http->url, error);
    if (status != STATUS_OK) {
        free(http);
        return status;
    }
    uint64_t random;
    CHECK(getrandom(&random, sizeof random, 0) == sizeof random);
    (void)snprintf(http->id_prefix, sizeof http->id_prefix, "%016" PRIx64, random);
    raise_descriptor_limit(limits->max_connections);
    struct MHD_OptionItem options[] = {
        {MHD_OPTION_LISTEN_SOCKET, listener, NULL},
        {MHD_OPTION_CONNECTION_LIMIT, (intptr_t)limits->max_connections + HTTP_RESERVE, NULL},
        {MHD_OPTION_CONNECTION_TIMEOUT, 0, NULL},          /* ours are absolute */
        {MHD_OPTION_CONNECTION_MEMORY_LIMIT, 65536, NULL}, /* half of it to read into; and what guard.h lets pass, twice where it is cookies */
        {MHD_OPTION_STRICT_FOR_CLIENT, 0, NULL},           /* a missing Host is the guard's: 1 answers it with two heads */
        {MHD_OPTION_END, 0, NULL},
    };
    /* The logger comes first: options before it would speak to stderr. */
    http->daemon = MHD_start_daemon(MHD_USE_EPOLL | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ERROR_LOG, port, NULL, NULL, exchange_handle, http,
                                    MHD_OPTION_EXTERNAL_LOGGER, on_mhd_log, NULL, MHD_OPTION_NOTIFY_COMPLETED, exchange_completed, http,
                                    MHD_OPTION_NOTIFY_CONNECTION, on_connection, http, MHD_OPTION_URI_LOG_CALLBACK, on_request_line, http,
                                    MHD_OPTION_ARRAY, options, MHD_OPTION_END);
    if (!http->daemon) {
        (void)close(listener);
        free(http);
        return error_set(error, STATUS_IO, "the HTTP server cannot start (out of memory or descriptors)");
    }
    int epoll = MHD_get_daemon_info(http->daemon, MHD_DAEMON_INFO_EPOLL_FD)->epoll_fd;
    CHECK(uv_poll_init(loop, &http->epoll, epoll) == 0 && uv_timer_init(loop, &http->timer) == 0 && uv_timer_init(loop, &http->tick) == 0);
    CHECK(uv_check_init(loop, &http->check) == 0 && uv_idle_init(loop, &http->idle) == 0);
    http->epoll.data = http->timer.data = http->tick.data = http->check.data = http;
    CHECK(uv_check_start(&http->check, on_check) == 0);
    CHECK(uv_poll_start(&http->epoll, UV_READABLE, on_epoll) == 0);
    CHECK(uv_timer_start(&http->tick, on_tick, HTTP_TICK_MS, HTTP_TICK_MS) == 0);
    http_pump(http);
    *result = http;
    return STATUS_OK;
}

void http_set_limits(struct http *http, const struct http_limits *limits) {
    uint32_t max_connections = http->limits.max_connections;
    http->limits = *limits;
    http->limits.max_connections = max_connections;
}

const char *http_url(const struct http *http) { return http->url; }
uint32_t http_connections(const struct http *http) { return http->n_connections; }
uint32_t http_exchanges(const struct http *http) { return http->n_exchanges; }

void http_drain(struct http *http) {
    if (http->draining) return;
    http->draining = true;
    int listener = MHD_quiesce_daemon(http->daemon);
    if (listener >= 0) (void)close(listener);
    /* Idle connections stay: what still comes on them is told to go elsewhere, which a bare close would not. */
    http_pump(http);
}

void http_stop(struct http *http) {
    http->stopping = http->draining = true;
    /* libmicrohttpd must not be stopped with suspended connections: cut resumes them. */
    for (struct connection *connection = http->connections, *next; connection; connection = next) {
        next = connection->next;
        cut(connection);
    }
    for (int i = 0; i < PUMP_SPINS && http->n_connections; i++) run(http);
    (void)uv_poll_stop(&http->epoll);
    struct MHD_Daemon *daemon = http->daemon;
    http->daemon = NULL;
    MHD_stop_daemon(daemon);
    uv_close((uv_handle_t *)&http->epoll, NULL);
    uv_close((uv_handle_t *)&http->timer, NULL);
    uv_close((uv_handle_t *)&http->tick, NULL);
    uv_close((uv_handle_t *)&http->check, NULL);
    uv_close((uv_handle_t *)&http->idle, NULL);
}

void http_free(struct http *http) {
    free(http->by_socket);
    free(http);
}
