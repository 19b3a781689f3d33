/* How connections and the daemon itself begin, break and end: framing, deadlines, clients that leave or do not read, loading, reload, drain. The whole server in this process, over real
 * sockets, on a fake engine. What it answers is in test_server.c. */
#include <sys/socket.h>

#include "daemon.h"

static void test_loading_and_failure(void **state) {
    (void)state;
    struct daemon *daemon = daemon_new(NULL);
    expect(daemon->port, "GET", "/health", NULL, NULL, 503, "Retry-After: ");
    expect(daemon->port, "POST", "/v1/completions", NULL, "{\"prompt\":\"a\"}", 503, "\"code\":\"loading\"");
    expect(daemon->port, "GET", "/metrics", NULL, NULL, 200, "kvasir_ready{model_name=\"\"} 0");
    load(daemon, 'f');
    wait_for(daemon, 'e');
    assert_int_equal(daemon->status, STATUS_INVALID);
    assert_string_equal(daemon->error.text, "model.gguf: not a model");
    say(daemon, 'e');
    daemon_join(daemon);
}

static char config_path[] = "/tmp/kvasir-test-config-XXXXXX";

static void write_config(const char *text) {
    FILE *file = fopen(config_path, "w");
    assert_non_null(file);
    assert_true(fputs(text, file) >= 0);
    assert_int_equal(fclose(file), 0);
}

static void with_file(struct config *config) {
    struct error error;
    (void)snprintf(config->config_file, sizeof config->config_file, "%s", config_path);
    assert_int_equal(config_load_file(config, config_path, &error), STATUS_OK);
}

/* A body of `length` spaces: what is wrong with it, its size or that it is no JSON, tells which limit holds. Reloads take effect between two requests. */
static void until_spaces_get(const struct daemon *daemon, int length, int status) {
    char body[8192];
    (void)snprintf(body, sizeof body, "%*s", length, "");
    until_status(daemon->port, body, status);
}

static void test_reload(void **state) {
    (void)state;
    int fd = mkstemp(config_path);
    assert_true(fd >= 0);
    (void)close(fd);
    write_config("[server]\nmax_body = \"2KiB\"\n");
    struct daemon *daemon = daemon_ready(with_file);
    until_spaces_get(daemon, 3000, 413);
    write_config("[server]\nmax_body = \"4KiB\"\n");
    assert_int_equal(kill(getpid(), SIGHUP), 0);
    until_spaces_get(daemon, 3000, 400);                           /* read, and not JSON */
    write_config("[server]\nmax_body = \"8KiB\"\nmax_bodi = 1\n"); /* broken: nothing changes */
    assert_int_equal(kill(getpid(), SIGHUP), 0);
    write_config("[server]\nmax_body = \"4KiB\"\nport = 1\n"); /* needs a restart: the rest is taken */
    assert_int_equal(kill(getpid(), SIGHUP), 0);
    until_spaces_get(daemon, 5000, 413);
    until_spaces_get(daemon, 3000, 400);
    daemon_end(daemon);
    assert_int_equal(unlink(config_path), 0);
}

static void test_drain(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(NULL);
    FAKE_SET(daemon->engine, held, true);
    int fd = dial(daemon->port), idle = dial(daemon->port);
    const char *body = "{\"prompt\":\"abc\",\"max_tokens\":3}";
    send_request(fd, "POST", COMPLETIONS, NULL, body);
    until_metric(daemon->port, "kvasir_requests_waiting", 1);
    assert_int_equal(kill(getpid(), SIGTERM), 0);
    /* No new connections; who has one is told to go elsewhere */
    struct buffer told = {0};
    for (int i = 0; i < 100 && !(told.bytes && strstr(told.bytes, "\"code\":\"draining\"")); i++) { /* until the signal was seen */
        buffer_done(&told);
        send_text(idle, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
        told = receive(idle, "}\n");
    }
    assert_non_null(strstr(told.bytes, "HTTP/1.1 503"));
    assert_non_null(strstr(told.bytes, "Retry-After: "));
    buffer_done(&told);
    dial_refused(daemon->port);
    FAKE_SET(daemon->engine, held, false);
    struct buffer answer = receive(fd, NULL); /* the one in flight is answered */
    assert_non_null(strstr(answer.bytes, "\"text\":\"abc\""));
    assert_non_null(strstr(answer.bytes, "Connection: close"));
    buffer_done(&answer);
    (void)close(fd);
    (void)close(idle);
    daemon_join(daemon);
}

static void no_patience(struct config *config) { config->drain_timeout_s = 0; }

/* The drain's time is over: a stream is told, and the daemon ends all the same. */
static void test_drain_timeout(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(no_patience);
    FAKE_SET(daemon->engine, budget, 1);
    FAKE_SET(daemon->engine, counted, true);
    int fd = start_stream(daemon->port, 1000);
    assert_int_equal(kill(getpid(), SIGTERM), 0);
    struct buffer got = receive(fd, NULL);
    assert_non_null(strstr(got.bytes, "\"code\":\"shutting_down\""));
    assert_non_null(strstr(got.bytes, "data: [DONE]\n\n"));
    buffer_done(&got);
    (void)close(fd);
    daemon_join(daemon);
}

static void test_client_gone(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(NULL);
    static const char *const bodies[] = {"{\"prompt\":\"abc\",\"max_tokens\":300}", "{\"prompt\":\"abc\",\"max_tokens\":300,\"stream\":true}"};
    for (int i = 0; i < 4; i++) {
        const char *body = bodies[i % 2];
        FAKE_SET(daemon->engine, held, true);
        int fd = dial(daemon->port);
        send_request(fd, "POST", COMPLETIONS, NULL, body);
        until_metric(daemon->port, "kvasir_requests_waiting", 1);
        if (i < 2) { /* RST instead of FIN */
            struct linger linger = {.l_onoff = 1, .l_linger = 0};
            assert_int_equal(setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger), 0);
        }
        (void)close(fd);
        until_metric(daemon->port, "kvasir_clients_gone_total", i + 1);
        FAKE_SET(daemon->engine, held, false);
        until_metric(daemon->port, "kvasir_requests_waiting", 0);
        until_metric(daemon->port, "kvasir_requests_running", 0);
    }
    assert_int_equal(daemon->engine->aborts, 4);
    daemon_end(daemon);
}

static void short_stall(struct config *config) { config->stall_timeout_s = config->heartbeat_s = 1; }

/* A client that reads nothing is cut off, and the engine told; one that waits in vain gets a comment. */
static void test_stall_and_heartbeat(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(short_stall);
    int fd = dial_slow(daemon->port);
    send_request(fd, "POST", COMPLETIONS, NULL, "{\"prompt\":\"abc\",\"max_tokens\":4000,\"stream\":true,\"logprobs\":20}");
    until_metric(daemon->port, "kvasir_clients_gone_total", 1);
    until_metric(daemon->port, "kvasir_requests_running", 0);
    (void)close(fd);
    FAKE_SET(daemon->engine, budget, 1);
    FAKE_SET(daemon->engine, counted, true);
    fd = start_stream(daemon->port, 1000);
    struct buffer got = receive(fd, "\r\n:\n\n\r\n"); /* a chunk that is a comment and nothing else */
    assert_non_null(strstr(got.bytes, "\r\n:\n\n\r\n"));
    buffer_done(&got);
    (void)close(fd);
    FAKE_SET(daemon->engine, counted, false);
    daemon_end(daemon);
}

/* Sends `bytes` and another request behind it; one JSON error is all that may come back. `bytes` is told in what fails. */
static void expect_refused(const struct daemon *daemon, const char *bytes, const char *begins) {
    int fd = dial(daemon->port);
    send_text(fd, bytes);
    (void)send(fd, "GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n", 42, MSG_NOSIGNAL);
    struct buffer got = receive(fd, NULL); /* to the end: the connection was closed */
    if (strstr(got.bytes, "\"version\"")) fail_msg("smuggled behind:\n%.200s\n%s", bytes, got.bytes);
    if (strncmp(got.bytes, begins, strlen(begins)) != 0) fail_msg("not %s:\n%.200s\n%s", begins, bytes, got.bytes);
    if (strstr(got.bytes + 1, "HTTP/1.1 ") || !strstr(got.bytes, "{\"error\":{\"message\":"))
        fail_msg("not one JSON answer:\n%.200s\n%s", bytes, got.bytes);
    buffer_done(&got);
    (void)close(fd);
}

/* The same behind a good request, which is answered: in one write with it (part 0), or after its answer in two parts. */
static void second_refused(const struct daemon *daemon, const char *bytes, size_t part) {
    static const char good[] = "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n";
    int fd = dial(daemon->port);
    send_text(fd, good);
    if (part > 0) {
        (void)send(fd, bytes, part, MSG_NOSIGNAL);
        expect(daemon->port, "GET", "/health", NULL, NULL, 200, NULL); /* came later: the part was read */
    }
    (void)send(fd, bytes + part, strlen(bytes) - part, MSG_NOSIGNAL);
    struct buffer got = receive(fd, NULL);
    const char *second = strstr(got.bytes + 1, "HTTP/1.1 ");
    if (strncmp(got.bytes, "HTTP/1.1 200", 12) != 0 || !second || second[9] == '2' || strstr(second + 1, "HTTP/1.1 ") ||
        !strstr(second, "{\"error\":{\"message\":"))
        fail_msg("not one good answer and one JSON error, after %zu bytes of:\n%.200s\n%s", part, bytes, got.bytes);
    buffer_done(&got);
    (void)close(fd);
}

static void expect_second_refused(const struct daemon *daemon, const char *bytes) {
    size_t length = strlen(bytes);
    for (size_t part = 0; part <= length; part += part == 0 ? 1 : (length + 4) / 5) second_refused(daemon, bytes, part);
}

/* A request that ends before its end is told so: the end comes with it (how 0), after it was read (1), or right behind another request (2). */
static void expect_cut_short(const struct daemon *daemon, const char *bytes, int how) {
    int fd = dial(daemon->port);
    if (how == 2) send_text(fd, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
    send_text(fd, bytes);
    if (how == 1) expect(daemon->port, "GET", "/health", NULL, NULL, 200, NULL);
    assert_int_equal(shutdown(fd, SHUT_WR), 0);
    struct buffer got = receive(fd, NULL);
    const char *answer = how == 2 ? strstr(got.bytes + 1, "HTTP/1.1 ") : got.bytes;
    if (!answer || strncmp(answer, "HTTP/1.1 400", 12) != 0 || !strstr(answer, "\"code\":\"truncated_"))
        fail_msg("way %d of %s:\n%s", how, bytes, got.bytes);
    buffer_done(&got);
    (void)close(fd);
}

/* Two requests in one write: what the parser may not take for one, two or half of one. */
static void test_framing(void **state) {
    (void)state;
    static const char *const bad[] = {
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length : 5\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked, identity\r\n\r\n",
        "GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        "GET /health HTTP/1.1\r\n\r\n",
        "GET /health HTTP/1.1\r\nHost: localhost\r\n: nameless\r\n\r\n",
        "GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\001b\r\n\r\n",
        "GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\r\n Content-Length: 7\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: +5\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5,5\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n",
        "GET /health HTTP/1.1 \r\nHost: localhost\r\n\r\n",
        "GET  /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}}\r\n0\r\n\r\n",
    };
    struct daemon *daemon = daemon_ready(NULL);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        expect_refused(daemon, bad[i], "HTTP/1.1 400");
        expect_second_refused(daemon, bad[i]);
    }
    expect_second_refused(daemon, "nonsense\r\n");
    expect_second_refused(daemon, "GET / HTTP/3.0\r\n\r\n");
    expect_second_refused(daemon,
                          "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nnonsense\r\n\r\n");
    expect(daemon->port, "GET", "/health", NULL, NULL, 200, NULL);
    static const char *const cut[] = {
        "GET",
        "GET /health HTTP/1.1\r\n",
        "GET /health HTTP/1.1\r\nHost: localhost\r\n",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n{",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX: y\r\n",
    };
    for (size_t i = 0; i < sizeof cut / sizeof *cut; i++)
        for (int how = 0; how < 3; how++) expect_cut_short(daemon, cut[i], how);
    /* An empty line in two pieces is nobody's either: its end is no request cut short */
    int fd = dial(daemon->port);
    send_text(fd, "\r");
    expect(daemon->port, "GET", "/health", NULL, NULL, 200, NULL); /* that was read */
    send_text(fd, "\n");
    assert_int_equal(shutdown(fd, SHUT_WR), 0);
    struct buffer none = receive(fd, NULL);
    assert_int_equal(none.length, 0);
    buffer_done(&none);
    (void)close(fd);
    /* Pipelining itself is fine */
    fd = dial(daemon->port);
    send_text(fd, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    struct buffer got = receive(fd, NULL);
    assert_non_null(strstr(got.bytes, "{\"status\":\"ok\"}"));
    assert_non_null(strstr(got.bytes, "\"version\""));
    buffer_done(&got);
    (void)close(fd);
    /* All good ones are answered before what is wrong behind them, and nothing is after that; also where the connection of an older client stays open because it asks for that */
    fd = dial(daemon->port);
    send_text(fd, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /version HTTP/1.0\r\nConnection: x, Keep-Alive\r\n\r\nnonsense\r\nGET /metrics "
                  "HTTP/1.1\r\nHost: localhost\r\n\r\n");
    got = receive(fd, NULL);
    const char *version = strstr(got.bytes, "\"version\""), *error = strstr(got.bytes, "\"code\":\"bad_request_line\"");
    if (!strstr(got.bytes, "{\"status\":\"ok\"}") || !version || !error || error < version || strstr(got.bytes, "kvasir_")) fail_msg("%s", got.bytes);
    buffer_done(&got);
    (void)close(fd);
    daemon_end(daemon);
}

/* A request that waits for 100 Continue, has no body, and comes together with the next one: libmicrohttpd asks for its answer before it takes one. */
static void test_continue_without_body(void **state) {
    (void)state;
    static const struct {
        const char *request, *status;
    } cases[] = {{"GET /health HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n\r\n", "HTTP/1.1 200"},
                 {"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n\r\n", "HTTP/1.1 400"},
                 {"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 400"}};
    struct daemon *daemon = daemon_ready(NULL);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[400];
        (void)snprintf(text, sizeof text, "%sGET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", cases[i].request);
        int fd = dial(daemon->port);
        send_text(fd, text);
        struct buffer got = receive(fd, NULL);
        const char *first = strstr(got.bytes, "HTTP/1.1 100"), *answer = first ? strstr(first + 1, "HTTP/1.1 ") : NULL;
        const char *next = answer ? strstr(answer + 1, "HTTP/1.1 ") : NULL;
        if (!next || strncmp(answer, cases[i].status, 12) != 0 || strncmp(next, "HTTP/1.1 200", 12) != 0) fail_msg("case %zu:\n%s", i, got.bytes);
        buffer_done(&got);
        (void)close(fd);
    }
    daemon_end(daemon);
}

/* `head`, then `piece` so many times, then `end`. */
static char *repeated(const char *head, const char *piece, size_t times, const char *end) {
    struct buffer text = {0};
    buffer_append_text(&text, head);
    for (size_t i = 0; i < times; i++) buffer_append_text(&text, piece);
    buffer_append(&text, end, strlen(end) + 1);
    return text.bytes;
}

/* What libmicrohttpd makes a list of, or has to keep until a line ends, is bounded before it. */
static void test_much_of_little(void **state) {
    (void)state;
    static const char version[] = "GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n",
                      chunked[] = "POST /nowhere HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n";
    const struct {
        const char *head, *piece;
        size_t good, bad;
        const char *end, *begins, *refused;
    } cases[] = {
        {"", "\r\n", 500, 40000, version, "HTTP/1.1 200", "HTTP/1.1 400"},
        {"GET /version?a=b", "&a", 120, 1000, " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n", "HTTP/1.1 200", "HTTP/1.1 431"},
        {"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nCookie: a=b", "; c=d", 120, 1000, "\r\n", "HTTP/1.1 200", "HTTP/1.1 431"},
        {"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nCookie: a=", "0123456789", 1600, 2000, "\r\n", "HTTP/1.1 200",
         "HTTP/1.1 431"},
        {chunked, "0", 1000, 40000, "1\r\n{\r\n0\r\n", "HTTP/1.1 404", "HTTP/1.1 400"},
        {chunked, "1;a=b\r\n{\r\n", 3000, 1, "0;a=b\r\n", "HTTP/1.1 404", NULL},
    };
    struct daemon *daemon = daemon_ready(NULL);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *good = repeated(cases[i].head, cases[i].piece, cases[i].good, cases[i].end);
        int fd = dial(daemon->port);
        send_text(fd, good);
        send_text(fd, "\r\n");
        struct buffer got = receive(fd, NULL);
        if (strncmp(got.bytes, cases[i].begins, strlen(cases[i].begins)) != 0) fail_msg("case %zu:\n%s", i, got.bytes);
        buffer_done(&got);
        (void)close(fd);
        free(good);
        if (!cases[i].refused) continue;
        char *bad = repeated(cases[i].head, cases[i].piece, cases[i].bad, cases[i].end);
        expect_refused(daemon, bad, cases[i].refused);
        free(bad);
    }
    char *trailers = repeated(chunked, "1\r\n{\r\n", 1000, "0\r\n"), *more = repeated(trailers, "a:b\r\n", 1000, "\r\n");
    expect_refused(daemon, more, "HTTP/1.1 431");
    free(trailers);
    free(more);
    daemon_end(daemon);
}

/* What would be too much for libmicrohttpd's memory never gets there: in one piece or in many, on the first request. What is just not too much is answered. */
static void test_sizes_of_heads(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(NULL);
    char *text = check_calloc(70001, 1);
    expect_refused(daemon, "GET /health HTTP/2.0\r\n\r\n", "HTTP/1.1 505");
    (void)snprintf(text, 70001, "GET /%*s", 20000, "");
    for (size_t i = 5; text[i]; i++) text[i] = 'a';
    expect_refused(daemon, text, "HTTP/1.1 414");
    size_t n = (size_t)snprintf(text, 70001, "GET /health HTTP/1.1\r\nHost: localhost\r\n");
    for (int i = 0; i < 200; i++) n += (size_t)snprintf(text + n, 70001 - n, "X-%d: y\r\n", i);
    expect_refused(daemon, text, "HTTP/1.1 431");
    int fd = dial(daemon->port);
    send_text(fd, "GET /health HTTP/1.1\r\nHost: localhost\r\nX: ");
    memset(text, 'y', 1000);
    for (int i = 0; i < 100 && send(fd, text, 1000, MSG_NOSIGNAL) == 1000; i++)
        until_metric(daemon->port, "kvasir_ready", 1); /* an answer later it was read */
    struct buffer got = receive(fd, NULL);
    if (strncmp(got.bytes, "HTTP/1.1 431", 12) != 0 || !strstr(got.bytes, "\"code\":\"header_too_large\"")) fail_msg("%s", got.bytes);
    buffer_done(&got);
    (void)close(fd);
    (void)snprintf(text, 70001, "X: %*s\r\n", 16000, "y");
    expect(daemon->port, "GET", "/health", text, NULL, 200, NULL);
    free(text);
    daemon_end(daemon);
}

static void short_times(struct config *config) {
    config->header_timeout_s = config->body_timeout_s = config->idle_timeout_s = 1;
    config->max_body = 2000;
}

static void test_deadlines_and_size(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(short_times);
    static const char *const slow[] = {"", "GET /hea", "GET /health HTTP/1.1\r\nHost: loc",
                                       "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{",
                                       "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"};
    int fds[5];
    for (int i = 0; i < 5; i++) {
        fds[i] = dial(daemon->port);
        send_text(fds[i], slow[i]);
    }
    for (int i = 0; i < 5; i++) { /* all are cut off by the server; the bound is receive's */
        struct buffer got = receive(fds[i], NULL);
        if (i == 4) assert_non_null(strstr(got.bytes, "{\"status\":\"ok\"}"));
        buffer_done(&got);
        (void)close(fds[i]);
    }
    char *large = check_calloc(1, 5001);
    memset(large, ' ', 5000);
    expect(daemon->port, "POST", "/v1/completions", NULL, large, 413, "body_too_large");
    large[3000] = '\0';
    expect(daemon->port, "POST", "/v1/completions", NULL, large, 413, "body_too_large");
    free(large);
    /* Chunked, without a declared length */
    int fd = dial(daemon->port);
    send_text(fd, "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\nbb8\r\n");
    for (int i = 0; i < 3000; i++) send_text(fd, " ");
    send_text(fd, "\r\n0\r\n\r\n");
    struct buffer got = receive(fd, NULL);
    assert_int_equal(strncmp(got.bytes, "HTTP/1.1 413", 12), 0);
    buffer_done(&got);
    (void)close(fd);
    expect(daemon->port, "GET", "/health", NULL, NULL, 200, NULL);
    daemon_end(daemon);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_loading_and_failure),
        cmocka_unit_test(test_reload),
        cmocka_unit_test(test_drain),
        cmocka_unit_test(test_drain_timeout),
        cmocka_unit_test(test_client_gone),
        cmocka_unit_test(test_stall_and_heartbeat),
        cmocka_unit_test(test_framing),
        cmocka_unit_test(test_continue_without_body),
        cmocka_unit_test(test_much_of_little),
        cmocka_unit_test(test_sizes_of_heads),
        cmocka_unit_test(test_deadlines_and_size),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
