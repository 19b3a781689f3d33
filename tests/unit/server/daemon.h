/* The server in this process on a fake engine, over real sockets: a thread that runs it, and a test that says when the model is loaded and waits for what it tells. Included once in a
 * program of tests, as fake_engine.h is. The test's thread, but for what server_run calls.
 *
 * One at a time: SIGTERM is how it ends, and there is one of that in a process. */
#pragma once

#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

#include "fake_engine.h"
#include "model/tokenizer_load.h"
#include "server/server.h"
#include "tests/support/http_client.h"

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
    assert_int_equal(poll(&wait, 1, CLIENT_WAIT_MS), 1);
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
