/* See http_client.h. Owns nothing between two calls. */
#include "tests/support/http_client.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"

#define RECEIVE_BYTES 65536
#define SLOW_BYTES 2048

/* ---- bytes ---- */

/* receive_buffer: 0 as the system has it. Returns errno, 0 when it is connected. */
static int connect_to(int port, int receive_buffer, int *fd) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    *fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(*fd >= 0);
    if (receive_buffer) assert_int_equal(setsockopt(*fd, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer), 0);
    return connect(*fd, (struct sockaddr *)&address, sizeof address) == 0 ? 0 : errno;
}

int dial(int port) {
    int fd;
    assert_int_equal(connect_to(port, 0, &fd), 0);
    return fd;
}

int dial_slow(int port) {
    int fd;
    assert_int_equal(connect_to(port, SLOW_BYTES, &fd), 0);
    return fd;
}

void dial_refused(int port) {
    int fd;
    assert_int_equal(connect_to(port, 0, &fd), ECONNREFUSED);
    (void)close(fd);
}

static void send_bytes(int fd, const char *bytes, size_t length) {
    while (length) {
        ssize_t n = send(fd, bytes, length, MSG_NOSIGNAL);
        assert_true(n > 0);
        bytes += n;
        length -= (size_t)n;
    }
}

void send_text(int fd, const char *text) { send_bytes(fd, text, strlen(text)); }

struct buffer receive(int fd, const char *until) {
    struct buffer got = {0};
    while (!until || !got.length || !memmem(got.bytes, got.length, until, strlen(until))) {
        struct pollfd wait = {.fd = fd, .events = POLLIN};
        assert_int_equal(poll(&wait, 1, CLIENT_WAIT_MS), 1);
        ssize_t n = recv(fd, buffer_reserve(&got, RECEIVE_BYTES), RECEIVE_BYTES, 0);
        if (n <= 0) break;
        got.length += (size_t)n;
    }
    buffer_append_byte(&got, '\0');
    got.length--;
    return got;
}

/* ---- requests ---- */

void answer_done(struct answer *answer) { buffer_done(&answer->raw); }

void send_request(int fd, const char *method, const char *path, const char *headers, const char *body) {
    struct buffer request = {0};
    buffer_printf(&request, "%s %s HTTP/1.1\r\nHost: localhost\r\n%s", method, path, headers ? headers : "");
    if (body) buffer_printf(&request, "Content-Length: %zu\r\n", strlen(body));
    buffer_append_text(&request, "\r\n");
    if (body) buffer_append_text(&request, body);
    send_bytes(fd, request.bytes, request.length);
    buffer_done(&request);
}

struct answer ask(int port, const char *method, const char *path, const char *headers, const char *body) {
    struct answer answer = {0};
    struct buffer with_close = {0};
    int fd = dial(port);
    buffer_printf(&with_close, "Connection: close\r\n%s", headers ? headers : "");
    buffer_append_byte(&with_close, '\0');
    send_request(fd, method, path, with_close.bytes, body);
    buffer_done(&with_close);
    answer.raw = receive(fd, NULL);
    (void)close(fd);
    assert_true(answer.raw.length > 12);
    answer.status = atoi(answer.raw.bytes + 9); /* behind "HTTP/1.1 " */
    const char *end = strstr(answer.raw.bytes, "\r\n\r\n");
    assert_non_null(end);
    answer.body = end + 4;
    return answer;
}

void expect(int port, const char *method, const char *path, const char *headers, const char *body, int status, const char *text) {
    struct answer answer = ask(port, method, path, headers, body);
    if (answer.status != status) fail_msg("%s %s: %d instead of %d:\n%s", method, path, answer.status, status, answer.raw.bytes);
    if (text) assert_has(answer, text);
    assert_has(answer, "x-request-id: ");
    answer_done(&answer);
}

/* ---- kvasir's ---- */

struct answer complete(int port, const char *body) {
    return ask(port, "POST", COMPLETIONS, NULL, body);
}

int start_stream(int port, unsigned tokens) {
    char body[100];
    int fd = dial(port);
    (void)snprintf(body, sizeof body, "{\"prompt\":\"abc\",\"max_tokens\":%u,\"stream\":true}", tokens);
    send_request(fd, "POST", COMPLETIONS, NULL, body);
    struct buffer got = receive(fd, "data: ");
    assert_non_null(strstr(got.bytes, "HTTP/1.1 200"));
    buffer_done(&got);
    return fd;
}

double metric(int port, const char *name) {
    struct answer answer = ask(port, "GET", "/metrics", NULL, NULL);
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

void until_metric(int port, const char *name, double wanted) {
    uint64_t end = clock_now_ns() + CLIENT_WAIT_MS * 1000000ull;
    double got;
    while ((got = metric(port, name)) != wanted)
        if (clock_now_ns() > end) fail_msg("%s is %g instead of %g", name, got, wanted);
}

void until_status(int port, const char *body, int status) {
    uint64_t end = clock_now_ns() + CLIENT_WAIT_MS * 1000000ull;
    for (;;) {
        struct answer answer = complete(port, body);
        int got = answer.status;
        answer_done(&answer);
        if (got == status) return;
        if (clock_now_ns() > end) fail_msg("%d instead of %d", got, status);
    }
}
