/* The bytes of a connection, any bytes in any pieces, through a real socket, libmicrohttpd and the guards around it. Rooms: server
 * The first byte of the input chooses how many pieces there are (its three lowest bits) and whether the client ends its side at last (0x08) or resets the connection; the rest is what it sends.
 * What is shown of each input: every request that reaches a handler is one that a second, strict reader of our own finds at its place, so that nothing was smuggled past it; what comes back
 * is a row of whole HTTP answers in order, each with a body in JSON; the connection ends and leaves nothing behind; and the next client is served. */
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/check.h"
#include "base/log.h"
#include "server/http_internal.h"
#include "server/json_reader.h"
#include "server/reply.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define REQUESTS_MAX 2560u /* of one input: looked at; the input is cut where more would fit. More bytes than libmicrohttpd has memory for */
#define BODY_MAX 2048u
#define TURNS_MAX 4000 /* of the loop, until a connection must have ended */
#define QUIET_TURNS 6  /* without a byte: nothing more will come of itself */

static uv_loop_t loop;
static struct http *http;
static struct sockaddr_in address;

/* What the handlers saw since the connection opened. */
static struct {
    uint32_t n_begun, n_answered;
    bool head[REQUESTS_MAX]; /* of those that are answered, in order */
    uint32_t n_late;
    struct exchange *late[REQUESTS_MAX];
    uint32_t streamed;
} seen;

/* ---- handlers: /late is answered a turn later, /stream in pieces, /no as soon as its head is in, all others at once ---- */

static void answer(struct exchange *exchange) {
    struct buffer body = {0};
    buffer_printf(&body, "{\"bytes\":%zu}", exchange_body(exchange)->length);
    reply_json(exchange, 200, &body);
}

static void on_headers(void *context, struct exchange *exchange) {
    (void)context;
    CHECK(seen.n_begun < REQUESTS_MAX);
    seen.n_begun++;
    if (strcmp(exchange_path(exchange), "/no") != 0) return;
    struct api_error error;
    api_error_set(&error, 405, "invalid_request_error", "method_not_allowed", NULL, "No.");
    reply_error(exchange, &error);
}

static void on_gone(void *owner) {
    for (uint32_t i = 0; i < seen.n_late; i++)
        if (seen.late[i] == owner) seen.late[i] = NULL;
}

static enum produced produce(void *owner, struct buffer *out) {
    (void)owner;
    if (seen.streamed == 3) return PRODUCED_END;
    buffer_printf(out, "%s%u", seen.streamed == 0 ? "[" : ",", seen.streamed);
    if (++seen.streamed == 3) buffer_append_byte(out, ']');
    return PRODUCED;
}

static const struct exchange_owner owner = {.gone = on_gone, .produce = produce, .complete = on_gone};

static void on_request(void *context, struct exchange *exchange) {
    (void)context;
    CHECK(exchange_body(exchange)->length <= BODY_MAX);
    /* As the server's routes: a POST alone. (libmicrohttpd would end the head of a stream that answers HEAD with a last chunk.) */
    bool stream = strcmp(exchange_path(exchange), "/stream") == 0 && strcmp(exchange_method(exchange), "POST") == 0;
    if (!stream && strcmp(exchange_path(exchange), "/late") != 0) {
        answer(exchange);
        return;
    }
    CHECK(seen.n_late < REQUESTS_MAX);
    seen.late[seen.n_late++] = exchange;
    exchange_own(exchange, &owner, exchange);
    if (!stream) return;
    seen.streamed = 0;
    exchange_stream(exchange, "application/json");
}

static void on_answered(void *context, struct exchange *exchange) {
    (void)context;
    CHECK(exchange_status(exchange) >= 200 && exchange_status(exchange) < 600 && seen.n_answered < REQUESTS_MAX);
    seen.head[seen.n_answered++] = strcmp(exchange_method(exchange), "HEAD") == 0;
}
static void on_finished(void *context, struct exchange *exchange) {
    (void)context;
    CHECK(exchange_bytes_out(exchange) == 0 || exchange_status(exchange) != 0);
}
static void on_refused(void *context, int status, const char *why) {
    (void)context;
    CHECK(status >= 400 && status < 600 && why[0]);
}

static void answer_late(void) {
    for (uint32_t i = 0; i < seen.n_late; i++) {
        struct exchange *exchange = seen.late[i];
        if (!exchange || exchange_status(exchange)) continue;
        answer(exchange);
        http_pump(http);
    }
}

static void start(void) {
    const struct http_limits limits = {.max_body = BODY_MAX,
                                       .max_connections = 8,
                                       .header_timeout_s = 600,
                                       .body_timeout_s = 600,
                                       .idle_timeout_s = 600,
                                       .stall_timeout_s = 600,
                                       .bound_host = "127.0.0.1",
                                       .allowed_hosts = "one.example"};
    const struct http_hooks hooks = {
        .headers = on_headers, .request = on_request, .answered = on_answered, .finished = on_finished, .refused = on_refused};
    struct error error;
    log_set_level(LOG_LEVEL_ERROR);
    CHECK(signal(SIGPIPE, SIG_IGN) != SIG_ERR && uv_loop_init(&loop) == 0);
    CHECK(http_start(&http, &loop, "127.0.0.1", 0, &limits, &hooks, &error) == STATUS_OK);
    const char *port = strrchr(http_url(http), ':');
    address = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port + 1)), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    /* What the tick does four times a second, at every turn. */
    CHECK(uv_timer_start(&http->tick, http->tick.timer_cb, 1, 1) == 0);
}

/* ---- the client ---- */

static int connect_client(void) {
    static uint32_t n_connected;
    int client = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
    /* Ports of connections that this side ended first stay taken for a minute: another address has others. */
    const struct sockaddr_in source = {.sin_family = AF_INET, .sin_addr = {htonl(0x7f010000u + n_connected++ % 0x10000u)}};
    CHECK(client >= 0 && setsockopt(client, IPPROTO_IP, 24 /* IP_BIND_ADDRESS_NO_PORT */, &one, sizeof one) == 0);
    CHECK(bind(client, (const struct sockaddr *)&source, sizeof source) == 0);
    /* libFuzzer's clock interrupts; then the connection is made all the same. */
    CHECK(connect(client, (const struct sockaddr *)&address, sizeof address) == 0 || errno == EINTR);
    CHECK(setsockopt(client, IPPROTO_TCP, 1 /* TCP_NODELAY */, &one, sizeof one) == 0);
    return client;
}

/* What has come. true: and that was all there will ever be. */
static bool receive(int client, struct buffer *in) {
    char bytes[4096];
    for (;;) {
        ssize_t n = recv(client, bytes, sizeof bytes, MSG_DONTWAIT);
        if (n > 0)
            buffer_append(in, bytes, (size_t)n);
        else
            return n == 0 || errno != EAGAIN;
    }
}

/* Turns of the loop until nothing comes any more, or, with `end`, until the server has ended the connection. */
static bool turn(int client, struct buffer *in, bool end) {
    int quiet = 0;
    for (int i = 0; i < TURNS_MAX && (end || quiet < QUIET_TURNS); i++) {
        size_t before = in->length;
        (void)uv_run(&loop, end && quiet > QUIET_TURNS ? UV_RUN_ONCE : UV_RUN_NOWAIT);
        answer_late();
        if (receive(client, in)) return true;
        quiet = in->length == before ? quiet + 1 : 0;
    }
    return false;
}

static void leave(int client) {
    const struct linger reset = {.l_onoff = 1};
    (void)setsockopt(client, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    (void)close(client);
    for (int i = 0; i < TURNS_MAX && http_connections(http) > 0; i++) (void)uv_run(&loop, i < QUIET_TURNS ? UV_RUN_NOWAIT : UV_RUN_ONCE);
    CHECK(http_connections(http) == 0 && http_exchanges(http) == 0);
}

/* ---- the strict reader (RFC 9112) ---- */

struct text {
    const char *bytes;
    size_t length, at;
};

static bool next_line(struct text *text, const char **line, size_t *length) {
    const char *begin = text->bytes + text->at, *end = memchr(begin, '\n', text->length - text->at);
    if (!end) return false;
    *line = begin, *length = (size_t)(end - begin);
    text->at += *length + 1;
    if (*length && begin[*length - 1] == '\r') --*length;
    return true;
}

static bool is_request(const char *line, size_t n) {
    return n >= 12 && memchr(line, ' ', n) != line && memcmp(line + n - 9, " HTTP/1.", 8) == 0 && isdigit((unsigned char)line[n - 1]);
}

static bool is_name(const char *line, size_t n, const char *name) {
    size_t length = strlen(name);
    return n > length && strncasecmp(line, name, length) == 0 && line[length] == ':';
}

static uint64_t number(const char *text, size_t n, int base) {
    uint64_t value = 0;
    for (size_t i = 0; i < n; i++) {
        int c = tolower((unsigned char)text[i]), digit = isdigit(c) ? c - '0' : isalpha(c) ? c - 'a' + 10 : base;
        if (digit >= base || value > UINT32_MAX) break;
        value = value * (unsigned)base + (unsigned)digit;
    }
    return value;
}

/* Past the body in chunks; false: it is not all here, or malformed. */
static bool skip_chunks(struct text *text) {
    const char *line;
    size_t n;
    while (next_line(text, &line, &n)) {
        uint64_t size = number(line, n, 16);
        if (n == 0 || !isxdigit((unsigned char)line[0]) || size > text->length - text->at) return false;
        text->at += (size_t)size;
        if (size > 0 && !(next_line(text, &line, &n) && n == 0)) return false;
        if (size > 0) continue;
        while (next_line(text, &line, &n))
            if (n == 0) return true;
        return false;
    }
    return false;
}

/* How many requests there are, heads whole. What comes behind something malformed or cut is none. */
static uint32_t count_requests(struct text text) {
    uint32_t count = 0;
    const char *line;
    size_t n;
    for (;;) {
        bool chunked = false;
        uint64_t length = 0;
        do
            if (!next_line(&text, &line, &n)) return count;
        while (n == 0);
        if (!is_request(line, n)) return count;
        for (;;) {
            if (!next_line(&text, &line, &n)) return count;
            if (n == 0) break;
            if (!memchr(line, ':', n) || isspace((unsigned char)line[0])) return count;
            chunked = chunked || is_name(line, n, "transfer-encoding");
            if (!is_name(line, n, "content-length")) continue;
            const char *digits = line + sizeof "content-length";
            size_t left = n - sizeof "content-length";
            for (; left && isspace((unsigned char)*digits); left--) digits++;
            length = number(digits, left, 10);
        }
        count++;
        if (chunked ? !skip_chunks(&text) : length > text.length - text.at) return count;
        if (!chunked) text.at += (size_t)length;
    }
}

/* ---- what came back ---- */

static void check_body(const char *bytes, size_t length) {
    struct json_document json;
    struct json_failure failure;
    CHECK(json_read(&json, bytes, length, 1000, &failure));
    json_document_done(&json);
}

/* A body in chunks, joined in `body`; false: not all of it is here. */
static bool read_chunks(struct text *text, struct buffer *body) {
    const char *line;
    size_t n;
    while (next_line(text, &line, &n)) {
        size_t size = (size_t)number(line, n, 16);
        if (size > text->length - text->at) return false;
        buffer_append(body, text->bytes + text->at, size);
        text->at += size;
        if (!next_line(text, &line, &n)) return false;
        CHECK(n == 0);
        if (size == 0) return true;
    }
    return false;
}

/* One answer; false: it is not all here. */
static bool check_answer(struct text *text, uint32_t *n_answers, bool ended) {
    const char *line;
    size_t n, length = 0;
    bool chunked = false, sized = false;
    if (!next_line(text, &line, &n)) return false;
    CHECK(n > 13 && (memcmp(line, "HTTP/1.1 ", 9) == 0 || memcmp(line, "HTTP/1.0 ", 9) == 0));
    int status = (int)number(line + 9, 3, 10);
    CHECK(status == 100 || status == 200 || (status >= 400 && status < 506));
    for (;;) {
        if (!next_line(text, &line, &n)) return false;
        if (n == 0) break;
        CHECK(memchr(line, ':', n));
        chunked = chunked || is_name(line, n, "transfer-encoding");
        if (is_name(line, n, "content-length")) sized = true, length = (size_t)number(line + 16, n - 16, 10);
    }
    if (status == 100) return true;
    CHECK(*n_answers < REQUESTS_MAX);
    bool head = *n_answers < seen.n_answered && seen.head[*n_answers];
    ++*n_answers;
    if (head && text->at < text->length && memcmp(text->bytes + text->at, "HTTP", 4) == 0) return true; /* else: refused on the wire, with a body */
    if (head && text->at == text->length) return true;
    if (sized && length > text->length - text->at) return false;
    struct buffer body = {0};
    bool whole = true;
    if (chunked)
        whole = read_chunks(text, &body);
    else if (sized)
        buffer_append(&body, text->bytes + text->at, length), text->at += length;
    else
        buffer_append(&body, text->bytes + text->at, text->length - text->at), text->at = text->length, whole = ended;
    if (whole) check_body(body.bytes ? body.bytes : "", body.length);
    buffer_done(&body);
    return whole;
}

static void check_answers(const struct buffer *in, bool ended) {
    struct text text = {in->bytes, in->length, 0};
    uint32_t n_answers = 0;
    while (text.at < text.length && check_answer(&text, &n_answers, ended)) {}
}

/* The next client. */
static void check_served(void) {
    static const char request[] = "GET /next HTTP/1.1\r\nHost: localhost\r\n\r\n";
    struct buffer in = {0};
    int client = connect_client();
    memset(&seen, 0, sizeof seen);
    CHECK(send(client, request, sizeof request - 1, MSG_NOSIGNAL) == (ssize_t)(sizeof request - 1));
    for (int i = 0; i < TURNS_MAX && in.length == 0; i++) {
        (void)uv_run(&loop, i < QUIET_TURNS ? UV_RUN_NOWAIT : UV_RUN_ONCE);
        CHECK(!receive(client, &in));
    }
    CHECK(in.length > 12 && memcmp(in.bytes, "HTTP/1.1 200", 12) == 0);
    leave(client);
    buffer_done(&in);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 2) return 0;
    if (!http) start();
    const uint8_t options = data[0];
    const size_t pieces = 1 + (options & 7u);
    struct text sent = {(const char *)data + 1, size - 1, 0};
    if (sent.length > REQUESTS_MAX * 16) sent.length = REQUESTS_MAX * 16; /* "GET / HTTP/1.1\n\n" is the shortest request */
    struct buffer in = {0};
    int client = connect_client();
    bool ended = false;
    memset(&seen, 0, sizeof seen);
    for (size_t i = 0; i < pieces && !ended; i++) {
        size_t from = sent.length * i / pieces, to = sent.length * (i + 1) / pieces;
        if (to > from && send(client, sent.bytes + from, to - from, MSG_NOSIGNAL) < 0) break;
        ended = turn(client, &in, false);
    }
    if (options & 8 && !ended) {
        (void)shutdown(client, SHUT_WR);
        ended = turn(client, &in, true);
        CHECK(ended);
    }
    CHECK(seen.n_begun <= count_requests(sent));
    check_answers(&in, ended);
    leave(client);
    buffer_done(&in);
    check_served();
    return 0;
}
