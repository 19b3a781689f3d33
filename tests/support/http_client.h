/* A small HTTP client for tests of a server that runs in the same process: whole requests and answers as text, bytes as they come, and the few of kvasir's own requests that many tests
 * make. Over loopback, blocking; any thread. Descriptors and answers belong to the caller.
 *
 * What goes wrong here fails the test (cmocka): there are no errors to look at. No wait is longer than CLIENT_WAIT_MS. Reads no framing but the end of the stream: what must know chunks
 * and lengths is in tests/http. */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/buffer.h"

#define CLIENT_WAIT_MS 10000 /* nothing here takes as long: a bound, not a time */

/* ---- bytes ---- */

int dial(int port);
int dial_slow(int port);     /* with a receive buffer so small that an answer that nobody reads stays with the server */
void dial_refused(int port); /* nobody listens */
void send_text(int fd, const char *text);
/* Reads until `until` stands in what came, or, NULL, to the end of the stream. There is a zero byte behind what is returned. */
struct buffer receive(int fd, const char *until);

/* ---- requests ---- */

struct answer {
    int status;
    struct buffer raw; /* head and body */
    const char *body;
};

void answer_done(struct answer *answer);
/* On a connection that is there. `headers`: whole lines, or NULL. `body`: NULL for none; its length is told. */
void send_request(int fd, const char *method, const char *path, const char *headers, const char *body);
/* One request on a connection of its own, and its whole answer. */
struct answer ask(int port, const char *method, const char *path, const char *headers, const char *body);
/* ask, the status it must have, and what must stand in the answer (NULL: anything). Every answer has a request id. */
void expect(int port, const char *method, const char *path, const char *headers, const char *body, int status, const char *text);

#define assert_has(answer, text)                                                                                                                     \
    do {                                                                                                                                             \
        if (!strstr((answer).raw.bytes, (text))) fail_msg("no %s in:\n%s", (text), (answer).raw.bytes);                                              \
    } while (0)
#define assert_has_not(answer, text)                                                                                                                 \
    do {                                                                                                                                             \
        if (strstr((answer).raw.bytes, (text))) fail_msg("%s in:\n%s", (text), (answer).raw.bytes);                                                  \
    } while (0)

/* ---- kvasir's ---- */

#define COMPLETIONS "/v1/completions"

struct answer complete(int port, const char *body);
/* A stream whose first event has come; returns its connection. */
int start_stream(int port, unsigned tokens);
double metric(int port, const char *name);
/* Asks again until the metric is `wanted`. */
void until_metric(int port, const char *name, double wanted);
/* Asks for completions until they are answered with `status`. */
void until_status(int port, const char *body, int status);
