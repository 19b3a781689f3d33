/* The whole server in this process, over real sockets, on a fake engine: routing, guards, answers, streams, limits, drain. What needs a model or many processes is in tests/http. */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

#include "fake_engine.h"
#include "model/tokenizer_load.h"
#include "server/json_reader.h"
#include "server/server.h"

#define WAIT_MS 10000 /* nothing here takes as long: a bound, not a time */

/* ---- the daemon under test ---- */

struct daemon {
    pthread_t thread;
    struct config config;
    struct server_setup setup;
    struct tokenizer *tokenizer;
    struct engine *engine;
    int events[2]; /* 'l'istening, 'r'eady, 'e'nded */
    int gate[2];   /* `start` reads one byte: the test says when the model is loaded */
    int port;
    enum status status;
    struct error error;
};

static void say(struct daemon *daemon, char what) { assert_int_equal(write(daemon->events[1], &what, 1), 1); }

static void wait_for(struct daemon *daemon, char what) {
    char got = 0;
    struct pollfd wait = {.fd = daemon->events[0], .events = POLLIN};
    assert_int_equal(poll(&wait, 1, WAIT_MS), 1);
    assert_int_equal(read(daemon->events[0], &got, 1), 1);
    assert_int_equal(got, what);
}

static enum status start(void *context, const struct engine_hooks *hooks, struct server_model *model, struct error *error) {
    struct daemon *daemon = context;
    char go;
    (void)error;
    hooks->progress(hooks->progress_context, 0.42);
    if (read(daemon->gate[0], &go, 1) != 1) return error_set(error, STATUS_INVALID, "no gate");
    if (go == 'f') return error_set(error, STATUS_INVALID, "model.gguf: not a model");
    daemon->engine = fake_engine_new(hooks, 4096);
    model->engine = daemon->engine;
    model->tokenizer = daemon->tokenizer;
    (void)snprintf(model->served_name, sizeof model->served_name, "fake");
    (void)snprintf(model->root, sizeof model->root, "fake");
    (void)snprintf(model->architecture, sizeof model->architecture, "none");
    return STATUS_OK;
}

static void listening(void *context, const char *url) {
    struct daemon *daemon = context;
    daemon->port = atoi(strrchr(url, ':') + 1);
    say(daemon, 'l');
}
static void ready(void *context, const char *url) {
    (void)url;
    say(context, 'r');
}

static void *run(void *context) {
    struct daemon *daemon = context;
    daemon->status = server_run(&daemon->setup, &daemon->error);
    say(daemon, 'e');
    return NULL;
}

static void load(struct daemon *daemon, char how) { assert_int_equal(write(daemon->gate[1], &how, 1), 1); }

/* Up to listening. */
static struct daemon *daemon_new(void (*change)(struct config *config)) {
    struct daemon *daemon = check_calloc(1, sizeof *daemon);
    config_defaults(&daemon->config);
    daemon->config.port = 0;
    (void)snprintf(daemon->config.log_level, sizeof daemon->config.log_level, "error");
    if (change) change(&daemon->config);
    daemon->tokenizer = tokenizer_byte_level(300);
    daemon->setup = (struct server_setup){&daemon->config, start, listening, ready, daemon};
    assert_int_equal(pipe(daemon->events), 0);
    assert_int_equal(pipe(daemon->gate), 0);
    assert_int_equal(pthread_create(&daemon->thread, NULL, run, daemon), 0);
    wait_for(daemon, 'l');
    return daemon;
}

static struct daemon *daemon_ready(void (*change)(struct config *config)) {
    struct daemon *daemon = daemon_new(change);
    load(daemon, 'g');
    wait_for(daemon, 'r');
    return daemon;
}

static void daemon_join(struct daemon *daemon) {
    wait_for(daemon, 'e');
    assert_int_equal(pthread_join(daemon->thread, NULL), 0);
    tokenizer_close(daemon->tokenizer);
    for (int i = 0; i < 2; i++) {
        (void)close(daemon->events[i]);
        (void)close(daemon->gate[i]);
    }
    free(daemon);
}

static void daemon_end(struct daemon *daemon) {
    assert_int_equal(kill(getpid(), SIGTERM), 0);
    wait_for(daemon, 'e');
    assert_int_equal(daemon->status, STATUS_OK);
    say(daemon, 'e');
    daemon_join(daemon);
}

/* ---- a client ---- */

static int dial(const struct daemon *daemon) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)daemon->port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    return fd;
}

static void send_bytes(int fd, const char *bytes, size_t length) {
    while (length) {
        ssize_t n = send(fd, bytes, length, MSG_NOSIGNAL);
        assert_true(n > 0);
        bytes += n;
        length -= (size_t)n;
    }
}
static void send_text(int fd, const char *text) { send_bytes(fd, text, strlen(text)); }

/* Reads until `until` stands in what came, or the end. */
static struct buffer receive(int fd, const char *until) {
    struct buffer got = {0};
    for (;;) {
        if (until && got.length && memmem(got.bytes, got.length, until, strlen(until))) break;
        struct pollfd wait = {.fd = fd, .events = POLLIN};
        assert_int_equal(poll(&wait, 1, WAIT_MS), 1);
        ssize_t n = recv(fd, buffer_reserve(&got, 65536), 65536, 0);
        if (n <= 0) break;
        got.length += (size_t)n;
    }
    buffer_append_byte(&got, '\0');
    got.length--;
    return got;
}

struct answer {
    int status;
    struct buffer raw;
    const char *body;
};

static void answer_done(struct answer *answer) { buffer_done(&answer->raw); }

/* One request on a connection of its own. */
static struct answer ask(const struct daemon *daemon, const char *method, const char *path, const char *headers, const char *body) {
    struct answer answer = {0};
    struct buffer request = {0};
    int fd = dial(daemon);
    buffer_printf(&request, "%s %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n%s", method, path, headers ? headers : "");
    if (body) buffer_printf(&request, "Content-Length: %zu\r\n", strlen(body));
    buffer_append_text(&request, "\r\n");
    if (body) buffer_append_text(&request, body);
    send_bytes(fd, request.bytes, request.length);
    buffer_done(&request);
    answer.raw = receive(fd, NULL);
    (void)close(fd);
    assert_true(answer.raw.length > 12);
    answer.status = atoi(answer.raw.bytes + 9);
    const char *end = strstr(answer.raw.bytes, "\r\n\r\n");
    assert_non_null(end);
    answer.body = end + 4;
    return answer;
}

#define assert_has(answer, text)                                                                                                                     \
    do {                                                                                                                                             \
        if (!strstr((answer).raw.bytes, (text))) fail_msg("no %s in:\n%s", (text), (answer).raw.bytes);                                              \
    } while (0)
#define assert_has_not(answer, text)                                                                                                                 \
    do {                                                                                                                                             \
        if (strstr((answer).raw.bytes, (text))) fail_msg("%s in:\n%s", (text), (answer).raw.bytes);                                                  \
    } while (0)

static void expect(const struct daemon *daemon, const char *method, const char *path, const char *headers, const char *body, int status,
                   const char *text) {
    struct answer answer = ask(daemon, method, path, headers, body);
    if (answer.status != status) fail_msg("%s %s: %d instead of %d:\n%s", method, path, answer.status, status, answer.raw.bytes);
    if (text) assert_has(answer, text);
    assert_has(answer, "x-request-id: ");
    answer_done(&answer);
}

static struct answer complete(const struct daemon *daemon, const char *body) { return ask(daemon, "POST", "/v1/completions", NULL, body); }

static double metric(const struct daemon *daemon, const char *name) {
    struct answer answer = ask(daemon, "GET", "/metrics", NULL, NULL);
    char line[200];
    (void)snprintf(line, sizeof line, "\n%s{", name);
    const char *found = strstr(answer.body, line);
    assert_non_null(found);
    const char *value = strstr(found, "} ");
    assert_non_null(value);
    double number = strtod(value + 2, NULL);
    answer_done(&answer);
    return number;
}

/* Asks again until it is so; the bound is WAIT_MS of asking. */
static void until_metric(const struct daemon *daemon, const char *name, double wanted) {
    uint64_t end = clock_now_ns() + WAIT_MS * 1000000ull;
    double got;
    while ((got = metric(daemon, name)) != wanted)
        if (clock_now_ns() > end) fail_msg("%s is %g instead of %g", name, got, wanted);
}

static int dial_slow(const struct daemon *daemon) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)daemon->port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), bytes = 2048;
    assert_true(fd >= 0);
    assert_int_equal(setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes), 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    return fd;
}

static void begin_stream(int fd, unsigned tokens, const char *more) {
    char body[200], request[400];
    (void)snprintf(body, sizeof body, "{\"prompt\":\"abc\",\"max_tokens\":%u,\"stream\":true%s}", tokens, more);
    (void)snprintf(request, sizeof request, "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %zu\r\n\r\n%s", strlen(body), body);
    send_text(fd, request);
}

/* A stream whose first event has come. */
static int start_stream(const struct daemon *daemon, unsigned tokens) {
    int fd = dial(daemon);
    begin_stream(fd, tokens, "");
    struct buffer got = receive(fd, "data: ");
    assert_non_null(strstr(got.bytes, "HTTP/1.1 200"));
    buffer_done(&got);
    return fd;
}

/* ---- tests ---- */

static void test_routes(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(NULL);
    expect(daemon, "GET", "/health", NULL, NULL, 200, "{\"status\":\"ok\"}");
    expect(daemon, "GET", "/version", NULL, NULL, 200, "\"version\":\"");
    expect(daemon, "GET", "/v1/models", NULL, NULL, 200, "\"max_model_len\":4096");
    expect(daemon, "GET", "/v1/models/fake", NULL, NULL, 200, "\"root\":\"fake\"");
    expect(daemon, "GET", "/v1/models/other", NULL, NULL, 404, "model_not_found");
    expect(daemon, "GET", "/nowhere", NULL, NULL, 404, "\"code\":\"not_found\"");
    expect(daemon, "POST", "/v1/completionsx", NULL, "{}", 404, "\"error\"");
    expect(daemon, "GET", "/v1/completions", NULL, NULL, 405, "Allow: POST, OPTIONS");
    expect(daemon, "DELETE", "/health", NULL, NULL, 405, "Allow: GET, HEAD, OPTIONS");
    expect(daemon, "OPTIONS", "/v1/completions", NULL, NULL, 204, "Allow: POST");
    struct answer head = ask(daemon, "HEAD", "/health", NULL, NULL);
    assert_int_equal(head.status, 200);
    assert_string_equal(head.body, "");
    answer_done(&head);
    expect(daemon, "GET", "/health", "Host: evil.example\r\n", NULL, 400, "more than one Host");
    expect(daemon, "GET", "/health", "x-request-id: abc-1\"<\r\n", NULL, 200, "x-request-id: abc-1\r\n");
    expect(daemon, "GET", "/health", "Origin: http://evil.example\r\n", NULL, 403, "host_not_allowed");
    expect(daemon, "GET", "/health", "Origin: http://localhost:3000\r\n", NULL, 200, NULL);
    expect(daemon, "POST", "/tokenize", NULL, "{\"prompt\":\"ab\",\"return_token_strs\":true}", 200,
           "{\"count\":2,\"max_model_len\":4096,\"tokens\":[97,98],\"token_strs\":[\"a\",\"b\"]}");
    expect(daemon, "POST", "/tokenize", NULL, "{\"content\":\"\"}", 200, "\"tokens\":[]");
    expect(daemon, "POST", "/tokenize", NULL, "{}", 400, "\"param\":\"prompt\"");
    expect(daemon, "POST", "/detokenize", NULL, "{\"tokens\":[97,98]}", 200, "{\"prompt\":\"ab\",\"content\":\"ab\"}");
    expect(daemon, "POST", "/detokenize", NULL, "{\"tokens\":[97,300]}", 400, "\"param\":\"tokens\"");
    daemon_end(daemon);
}

static void test_completion(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(NULL);
    struct answer answer = complete(daemon, "{\"prompt\":\"hello \",\"max_tokens\":8}");
    assert_int_equal(answer.status, 200);
    assert_has(answer, "\"object\":\"text_completion\"");
    assert_has(answer, "\"model\":\"fake\"");
    assert_has(answer, "\"index\":0,\"text\":\"hello he\",\"logprobs\":null,\"finish_reason\":\"length\",\"stop_reason\":null");
    assert_has(answer, "\"usage\":{\"prompt_tokens\":6,\"completion_tokens\":8,\"total_tokens\":14,\"prompt_tokens_details\":{\"cached_tokens\":0}}");
    assert_has(answer, "Content-Type: application/json");
    answer_done(&answer);
    /* EOS (byte 4 of the script), stop strings, n, several prompts, echo */
    answer = complete(daemon, "{\"prompt\":\"abc\\u0004\",\"max_tokens\":50}");
    assert_has(answer, "\"text\":\"abc\",\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":null");
    assert_has(answer, "\"completion_tokens\":4");
    answer_done(&answer);
    answer = complete(daemon, "{\"prompt\":\"abcdef\",\"max_tokens\":50,\"stop\":[\"xx\",\"de\"]}");
    assert_has(answer, "\"text\":\"abc\",\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":\"de\"");
    assert_has(answer, "\"completion_tokens\":5");
    answer_done(&answer);
    answer = complete(daemon, "{\"prompt\":\"abcdef\",\"max_tokens\":50,\"stop\":\"de\",\"include_stop_str_in_output\":true}");
    assert_has(answer, "\"text\":\"abcde\"");
    answer_done(&answer);
    answer = complete(daemon, "{\"prompt\":\"abcdef\",\"max_tokens\":50,\"stop\":\"de\",\"min_tokens\":5}");
    assert_has(answer, "\"text\":\"abcdefabc\"");
    answer_done(&answer);
    answer = complete(daemon, "{\"prompt\":[\"ab\",\"xyz\"],\"max_tokens\":3,\"n\":2}");
    assert_has(answer, "\"index\":0,\"text\":\"aba\"");
    assert_has(answer, "\"index\":1,\"text\":\"bab\"");
    assert_has(answer, "\"index\":2,\"text\":\"xyz\"");
    assert_has(answer, "\"index\":3,\"text\":\"yzx\"");
    assert_has(answer, "\"prompt_tokens\":5,\"completion_tokens\":12,\"total_tokens\":17");
    answer_done(&answer);
    answer = complete(daemon, "{\"prompt\":[[97,98],[99]],\"max_tokens\":1,\"echo\":true}");
    assert_has(answer, "\"index\":0,\"text\":\"aba\"");
    assert_has(answer, "\"index\":1,\"text\":\"cc\"");
    answer_done(&answer);
    answer = complete(daemon, "{\"prompt\":\"ab\",\"max_tokens\":0,\"echo\":true}");
    assert_has(answer, "\"text\":\"ab\",\"logprobs\":null,\"finish_reason\":\"length\"");
    assert_has(answer, "\"completion_tokens\":0");
    answer_done(&answer);
    answer = complete(daemon, "{\"prompt\":\"\",\"max_tokens\":1}");
    assert_int_equal(answer.status, 400);
    assert_has(answer, "\"param\":\"prompt\"");
    answer_done(&answer);
    answer = complete(daemon, "{\"prompt\":\"abc\",\"max_tokens\":4096}");
    assert_int_equal(answer.status, 400);
    assert_has(answer, "\"code\":\"context_length_exceeded\"");
    assert_has(answer, "4096 tokens. However, you requested 4099 tokens (3 in the prompt, 4096 for the completion)");
    answer_done(&answer);
    daemon_end(daemon);
}

static void test_logprobs(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(NULL);
    struct answer answer = complete(daemon, "{\"prompt\":\"a\\u00e9b\",\"max_tokens\":3,\"logprobs\":2,\"echo\":true}");
    /* 4 prompt tokens (two bytes of the accent), 3 new ones: a, and the two bytes again */
    assert_has(answer, "\"text\":\"a\303\251ba\303\251\"");
    assert_has(answer, "\"tokens\":[\"a\",\"bytes:\\\\xc3\",\"bytes:\\\\xa9\",\"b\",\"a\",\"bytes:\\\\xc3\",\"bytes:\\\\xa9\"]");
    /* The second most likely token is the next byte: two halves of a character each have their own key. */
    assert_has(answer, "{\"bytes:\\\\xc3\":-0.85,\"bytes:\\\\xc4\":-1.85}");
    assert_has(answer, "\"token_logprobs\":[null,-0.85,-0.35,-0.25,-0.85,-0.85,-0.35]");
    assert_has(answer, "\"text_offset\":[0,1,1,2,3,4,4]");
    assert_has(answer, "\"top_logprobs\":[null,");
    answer_done(&answer);
    answer = complete(daemon, "{\"prompt\":\"ab\",\"max_tokens\":1,\"logprobs\":0}");
    assert_has(answer, "\"top_logprobs\":[{\"a\":-0.85}]");
    answer_done(&answer);
    answer = complete(daemon, "{\"prompt\":\"ab\",\"max_tokens\":1,\"logprobs\":1,\"return_tokens_as_token_ids\":true,\"return_token_ids\":true}");
    assert_has(answer, "\"tokens\":[\"token_id:97\"]");
    assert_has(answer, "\"top_logprobs\":[{\"token_id:97\":-0.85}]");
    assert_has(answer, "\"token_ids\":[97],\"prompt_token_ids\":[97,98]");
    answer_done(&answer);
    /* best_of: the candidates are rotations of the prompt; the one of the likelier first token wins */
    answer = complete(daemon, "{\"prompt\":\"ab\",\"max_tokens\":1,\"best_of\":2}");
    assert_has(answer, "\"text\":\"b\"");
    assert_has(answer, "\"completion_tokens\":1");
    answer_done(&answer);
    daemon_end(daemon);
}

static void test_stream(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(NULL);
    struct answer answer = complete(daemon, "{\"prompt\":\"abc\",\"max_tokens\":3,\"stream\":true,\"stream_options\":{\"include_usage\":true}}");
    assert_int_equal(answer.status, 200);
    assert_has(answer, "Content-Type: text/event-stream");
    assert_has(answer, "Cache-Control: no-cache");
    assert_has(answer, "Transfer-Encoding: chunked");
    assert_has(answer, "data: {\"id\":\"cmpl-");
    assert_has(answer, "\"text\":\"a\",\"logprobs\":null,\"finish_reason\":null");
    assert_has(answer, "\"text\":\"c\",\"logprobs\":null,\"finish_reason\":\"length\"");
    assert_has(answer, "\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":3,");
    assert_has(answer, "data: [DONE]\n\n");
    answer_done(&answer);
    answer = complete(daemon, "{\"prompt\":\"abc\",\"max_tokens\":3,\"stream\":true}");
    assert_has_not(answer, "\"usage\"");
    answer_done(&answer);
    /* Hold-back: "ab" could become the stop "abX" each time round, and never does */
    answer = complete(daemon, "{\"prompt\":\"abc\",\"max_tokens\":4,\"stream\":true,\"stop\":\"abX\"}");
    assert_has_not(answer, "\"text\":\"a\",\"logprobs\":null,\"finish_reason\":null");
    assert_has(answer, "\"text\":\"abc\"");
    assert_has(answer, "\"text\":\"a\",\"logprobs\":null,\"finish_reason\":\"length\"");
    answer_done(&answer);
    answer = complete(daemon, "{\"prompt\":\"a\\u00e9\",\"max_tokens\":3,\"stream\":true}");
    assert_has(answer, "\"text\":\"\303\251\"");
    assert_has_not(answer, "\357\277\275");
    answer_done(&answer);
    /* An error before the first token is an HTTP error */
    FAKE_SET(daemon->engine, fail, "device lost");
    answer = complete(daemon, "{\"prompt\":\"abc\",\"max_tokens\":3,\"stream\":true}");
    assert_int_equal(answer.status, 500);
    assert_has(answer, "engine_error");
    assert_has_not(answer, "device lost");
    answer_done(&answer);
    FAKE_SET(daemon->engine, fail, NULL);
    expect(daemon, "GET", "/health", NULL, NULL, 200, NULL);
    daemon_end(daemon);
}

static void first_byte(struct config *config) { config->first_byte_timeout_s = 1; }

static void test_late_error(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(first_byte);
    FAKE_SET(daemon->engine, held, true);
    int fd = dial(daemon);
    const char *body = "{\"prompt\":\"abc\",\"max_tokens\":3,\"stream\":true}";
    char request[300];
    (void)snprintf(request, sizeof request, "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %zu\r\n\r\n%s",
                   strlen(body), body);
    send_text(fd, request);
    /* No token comes: the 200 goes out all the same after first_byte_timeout */
    struct buffer head = receive(fd, "\r\n\r\n");
    assert_int_equal(strncmp(head.bytes, "HTTP/1.1 200", 12), 0);
    FAKE_SET(daemon->engine, fail, "device lost");
    FAKE_SET(daemon->engine, held, false);
    struct buffer rest = receive(fd, NULL);
    assert_non_null(strstr(rest.bytes, "data: {\"error\":{\"message\":"));
    assert_non_null(strstr(rest.bytes, "data: [DONE]\n\n"));
    buffer_done(&head);
    buffer_done(&rest);
    (void)close(fd);
    daemon_end(daemon);
}

static void test_client_gone(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(NULL);
    static const char *const bodies[] = {"{\"prompt\":\"abc\",\"max_tokens\":300}", "{\"prompt\":\"abc\",\"max_tokens\":300,\"stream\":true}"};
    for (int i = 0; i < 4; i++) {
        const char *body = bodies[i % 2];
        char request[300];
        FAKE_SET(daemon->engine, held, true);
        int fd = dial(daemon);
        (void)snprintf(request, sizeof request, "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %zu\r\n\r\n%s", strlen(body),
                       body);
        send_text(fd, request);
        until_metric(daemon, "kvasir_requests_waiting", 1);
        if (i < 2) { /* RST instead of FIN */
            struct linger linger = {.l_onoff = 1, .l_linger = 0};
            assert_int_equal(setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger), 0);
        }
        (void)close(fd);
        until_metric(daemon, "kvasir_clients_gone_total", i + 1);
        FAKE_SET(daemon->engine, held, false);
        until_metric(daemon, "kvasir_requests_waiting", 0);
        until_metric(daemon, "kvasir_requests_running", 0);
    }
    assert_int_equal(daemon->engine->aborts, 4);
    daemon_end(daemon);
}

static void test_loading_and_failure(void **state) {
    (void)state;
    struct daemon *daemon = daemon_new(NULL);
    expect(daemon, "GET", "/health", NULL, NULL, 503, "Retry-After: ");
    expect(daemon, "POST", "/v1/completions", NULL, "{\"prompt\":\"a\"}", 503, "\"code\":\"loading\"");
    expect(daemon, "GET", "/metrics", NULL, NULL, 200, "kvasir_ready{model_name=\"\"} 0");
    load(daemon, 'f');
    wait_for(daemon, 'e');
    assert_int_equal(daemon->status, STATUS_INVALID);
    assert_string_equal(daemon->error.text, "model.gguf: not a model");
    say(daemon, 'e');
    daemon_join(daemon);
}

static void test_drain(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(NULL);
    FAKE_SET(daemon->engine, held, true);
    int fd = dial(daemon), idle = dial(daemon);
    const char *body = "{\"prompt\":\"abc\",\"max_tokens\":3}";
    char request[300];
    (void)snprintf(request, sizeof request, "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %zu\r\n\r\n%s", strlen(body), body);
    send_text(fd, request);
    until_metric(daemon, "kvasir_requests_waiting", 1);
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
    int late = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)daemon->port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    assert_int_equal(connect(late, (struct sockaddr *)&address, sizeof address), -1);
    assert_int_equal(errno, ECONNREFUSED);
    (void)close(late);
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
    int fd = start_stream(daemon, 1000);
    assert_int_equal(kill(getpid(), SIGTERM), 0);
    struct buffer got = receive(fd, NULL);
    assert_non_null(strstr(got.bytes, "\"code\":\"shutting_down\""));
    assert_non_null(strstr(got.bytes, "data: [DONE]\n\n"));
    buffer_done(&got);
    (void)close(fd);
    daemon_join(daemon);
}

static void short_stall(struct config *config) { config->stall_timeout_s = config->heartbeat_s = 1; }

/* A client that reads nothing is cut off, and the engine told; one that waits in vain gets a comment. */
static void test_stall_and_heartbeat(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(short_stall);
    int fd = dial_slow(daemon);
    begin_stream(fd, 4000, ",\"logprobs\":20");
    until_metric(daemon, "kvasir_clients_gone_total", 1);
    until_metric(daemon, "kvasir_requests_running", 0);
    (void)close(fd);
    FAKE_SET(daemon->engine, budget, 1);
    FAKE_SET(daemon->engine, counted, true);
    fd = start_stream(daemon, 1000);
    struct buffer got = receive(fd, "\r\n:\n\n\r\n"); /* a chunk that is a comment and nothing else */
    assert_non_null(strstr(got.bytes, "\r\n:\n\n\r\n"));
    buffer_done(&got);
    (void)close(fd);
    FAKE_SET(daemon->engine, counted, false);
    daemon_end(daemon);
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

/* Asks until a body of `length` spaces is answered with `status`: reloads take effect between two requests. */
static void until_status(const struct daemon *daemon, size_t length, int status) {
    uint64_t end = clock_now_ns() + WAIT_MS * 1000000ull;
    char *body = check_calloc(length + 1, 1);
    memset(body, ' ', length);
    for (;;) {
        struct answer answer = complete(daemon, body);
        int got = answer.status;
        answer_done(&answer);
        if (got == status) break;
        if (clock_now_ns() > end) fail_msg("%d instead of %d", got, status);
    }
    free(body);
}

static void test_reload(void **state) {
    (void)state;
    int fd = mkstemp(config_path);
    assert_true(fd >= 0);
    (void)close(fd);
    write_config("[server]\nmax_body = \"2KiB\"\n");
    struct daemon *daemon = daemon_ready(with_file);
    until_status(daemon, 3000, 413);
    write_config("[server]\nmax_body = \"4KiB\"\n");
    assert_int_equal(kill(getpid(), SIGHUP), 0);
    until_status(daemon, 3000, 400);                               /* read, and not JSON */
    write_config("[server]\nmax_body = \"8KiB\"\nmax_bodi = 1\n"); /* broken: nothing changes */
    assert_int_equal(kill(getpid(), SIGHUP), 0);
    write_config("[server]\nmax_body = \"4KiB\"\nport = 1\n"); /* needs a restart: the rest is taken */
    assert_int_equal(kill(getpid(), SIGHUP), 0);
    until_status(daemon, 5000, 413);
    until_status(daemon, 3000, 400);
    daemon_end(daemon);
    assert_int_equal(unlink(config_path), 0);
}

static void test_queue_full(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(NULL);
    FAKE_SET(daemon->engine, max_requests, 1);
    FAKE_SET(daemon->engine, held, true);
    /* The second prompt finds no room: the first is taken back. */
    int fd = dial(daemon);
    const char *body = "{\"prompt\":[\"a\",\"b\"]}";
    char request[300];
    (void)snprintf(request, sizeof request, "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %zu\r\n\r\n%s",
                   strlen(body), body);
    send_text(fd, request);
    struct buffer answer = receive(fd, NULL);
    assert_int_equal(strncmp(answer.bytes, "HTTP/1.1 503", 12), 0);
    assert_non_null(strstr(answer.bytes, "Retry-After: 1"));
    buffer_done(&answer);
    (void)close(fd);
    FAKE_SET(daemon->engine, max_requests, 64);
    FAKE_SET(daemon->engine, held, false);
    until_metric(daemon, "kvasir_requests_waiting", 0);
    struct answer good = complete(daemon, "{\"prompt\":\"abc\",\"max_tokens\":1}");
    assert_int_equal(good.status, 200);
    answer_done(&good);
    daemon_end(daemon);
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
    };
    struct daemon *daemon = daemon_ready(NULL);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        int fd = dial(daemon);
        send_text(fd, bad[i]);
        (void)send(fd, "GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n", 42, MSG_NOSIGNAL);
        struct buffer got = receive(fd, NULL); /* to the end: the connection was closed */
        if (strstr(got.bytes, "\"version\"")) fail_msg("smuggled behind:\n%s\n%s", bad[i], got.bytes);
        if (strncmp(got.bytes, "HTTP/1.1 4", 10) != 0) fail_msg("accepted:\n%s\n%s", bad[i], got.bytes);
        if (strstr(got.bytes + 1, "HTTP/1.1 ") || !strstr(got.bytes, "{\"error\":{\"message\":"))
            fail_msg("not one JSON answer:\n%s\n%s", bad[i], got.bytes);
        buffer_done(&got);
        (void)close(fd);
    }
    expect(daemon, "GET", "/health", NULL, NULL, 200, NULL);
    /* Pipelining itself is fine */
    int fd = dial(daemon);
    send_text(fd, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    struct buffer got = receive(fd, NULL);
    assert_non_null(strstr(got.bytes, "{\"status\":\"ok\"}"));
    assert_non_null(strstr(got.bytes, "\"version\""));
    buffer_done(&got);
    (void)close(fd);
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
        fds[i] = dial(daemon);
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
    expect(daemon, "POST", "/v1/completions", NULL, large, 413, "body_too_large");
    large[3000] = '\0';
    expect(daemon, "POST", "/v1/completions", NULL, large, 413, "body_too_large");
    free(large);
    /* Chunked, without a declared length */
    int fd = dial(daemon);
    send_text(fd, "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\nbb8\r\n");
    for (int i = 0; i < 3000; i++) send_text(fd, " ");
    send_text(fd, "\r\n0\r\n\r\n");
    struct buffer got = receive(fd, NULL);
    assert_int_equal(strncmp(got.bytes, "HTTP/1.1 413", 12), 0);
    buffer_done(&got);
    (void)close(fd);
    expect(daemon, "GET", "/health", NULL, NULL, 200, NULL);
    daemon_end(daemon);
}

static void test_long_body(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(NULL);
    /* Long enough for a worker: 8,000 ids that are too many, and 3,000 that fit */
    struct buffer body = {0};
    buffer_append_text(&body, "{\"max_tokens\":1,\"echo\":false,\"prompt\":[");
    for (int i = 0; i < 8000; i++) buffer_append_text(&body, i ? ",100" : "100");
    buffer_append_text(&body, "]}");
    buffer_append_byte(&body, '\0');
    struct answer answer = complete(daemon, body.bytes);
    assert_int_equal(answer.status, 400);
    assert_has(answer, "(8000 in the prompt, 1 for the completion)");
    answer_done(&answer);
    body.length = 0;
    buffer_append_text(&body, "{\"max_tokens\":1,\"truncate_prompt_tokens\":3000,\"prompt\":\"");
    for (int i = 0; i < 30000; i++) buffer_append_byte(&body, 'x');
    buffer_append_text(&body, "\"}");
    buffer_append_byte(&body, '\0');
    answer = complete(daemon, body.bytes);
    assert_int_equal(answer.status, 200);
    assert_has(answer, "\"prompt_tokens\":3000");
    answer_done(&answer);
    buffer_done(&body);
    daemon_end(daemon);
}

static char key_file[] = "/tmp/kvasir-test-keys-XXXXXX";
static void with_keys(struct config *config) {
    (void)snprintf(config->api_key_file, sizeof config->api_key_file, "%s", key_file);
    config->max_requests_per_key = 1;
}

static void write_keys(const char *text) {
    FILE *file = fopen(key_file, "w");
    assert_non_null(file);
    assert_true(fputs(text, file) >= 0);
    assert_int_equal(fclose(file), 0);
}

static void test_keys(void **state) {
    (void)state;
    int fd = mkstemp(key_file);
    assert_true(fd >= 0);
    (void)close(fd);
    write_keys("# ours\n  secret-1  \nsecret-2\n");
    struct daemon *daemon = daemon_ready(with_keys);
    expect(daemon, "GET", "/health", NULL, NULL, 200, NULL);
    expect(daemon, "GET", "/v1/models", NULL, NULL, 401, "invalid_api_key");
    expect(daemon, "GET", "/nowhere", NULL, NULL, 401, NULL);
    expect(daemon, "GET", "/v1/models", "Authorization: Bearer secret-3\r\n", NULL, 401, "WWW-Authenticate: Bearer");
    expect(daemon, "GET", "/v1/models", "Authorization: Bearer secret-1\r\n", NULL, 200, NULL);
    expect(daemon, "GET", "/v1/models", "X-Api-Key: secret-2\r\n", NULL, 200, NULL);
    expect(daemon, "POST", "/v1/completions", "Authorization: Bearer wrong\r\n", "{\"prompt\":\"a\"}", 401, NULL);
    /* The limit of one key is its own */
    FAKE_SET(daemon->engine, held, true);
    fd = dial(daemon);
    send_text(fd, "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: secret-1\r\nContent-Length: 14\r\n\r\n{\"prompt\":\"a\"}");
    until_metric(daemon, "kvasir_requests_waiting", 1);
    expect(daemon, "POST", "/v1/completions", "X-Api-Key: secret-1\r\n", "{\"prompt\":\"a\"}", 429, "Retry-After: 1");
    FAKE_SET(daemon->engine, held, false);
    until_metric(daemon, "kvasir_requests_waiting", 0);
    until_metric(daemon, "kvasir_requests_running", 0);
    expect(daemon, "POST", "/v1/completions", "X-Api-Key: secret-1\r\n", "{\"prompt\":\"a\"}", 200, NULL);
    (void)close(fd);
    daemon_end(daemon);
    assert_int_equal(unlink(key_file), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_routes),
        cmocka_unit_test(test_completion),
        cmocka_unit_test(test_logprobs),
        cmocka_unit_test(test_stream),
        cmocka_unit_test(test_late_error),
        cmocka_unit_test(test_client_gone),
        cmocka_unit_test(test_loading_and_failure),
        cmocka_unit_test(test_drain),
        cmocka_unit_test(test_queue_full),
        cmocka_unit_test(test_framing),
        cmocka_unit_test(test_deadlines_and_size),
        cmocka_unit_test(test_long_body),
        cmocka_unit_test(test_keys),
        cmocka_unit_test(test_drain_timeout),
        cmocka_unit_test(test_stall_and_heartbeat),
        cmocka_unit_test(test_reload),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
