/* The engine over the mock backend, whose tokens are a function of the history, and which stops the process at a wrong block table. A wrapper holds and fails steps, and counts what compression asks
 * for. Include it in one file of a program, whose tests run twice: one step at a time, and with steps that run ahead of the host. */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>

#include <cmocka.h>

#include <semaphore.h>

#include "kernels/mock/mock.h"
#include "tests/support/engine_client.h"

static struct {
    _Atomic bool held;
    sem_t entered, permits;             /* while held: a step says that it began, and waits for its permit */
    _Atomic int fail_submit, fail_sync; /* the n-th from now; 0: none */
    uint32_t n_flights;                 /* engine thread; main thread while it is held */
    uint64_t *wait_ns;                  /* limits.wait_ns: each sync says that it waited WAITED ns */
    uint32_t rank_places;               /* 0: as many as are asked for */
    uint32_t n_ranks, n_settles;        /* engine thread; main thread once it has settled */
    struct backend_ops ops;
} gate;

enum { WAITED = 7 };

static inline bool strikes(_Atomic int *countdown) {
    if (atomic_load(countdown) == 0) return false;
    return atomic_fetch_sub(countdown, 1) == 1;
}

static inline enum status gate_prepare(const struct program *program, const struct backend_limits *limits, struct backend **backend,
                                       struct error *error) {
    struct backend_limits own = *limits;
    if (gate.rank_places > 0) own.rank_places = gate.rank_places;
    enum status status = backend_mock.prepare(program, &own, backend, error);
    if (status == STATUS_OK) (*backend)->ops = &gate.ops;
    gate.wait_ns = limits->wait_ns;
    return status;
}

static inline enum status gate_submit(struct backend *backend, const struct batch *batch, struct error *error) {
    if (atomic_load(&gate.held)) {
        sem_post(&gate.entered);
        while (sem_wait(&gate.permits) != 0) {}
    }
    if (strikes(&gate.fail_submit)) return error_set(error, STATUS_DEVICE, "mock: submit failed");
    gate.n_flights++;
    return backend_mock.submit(backend, batch, error);
}

static inline enum status gate_sync(struct backend *backend, struct sample_result *results, struct error *error) {
    enum status status = backend_mock.sync(backend, results, error);
    gate.n_flights--;
    *gate.wait_ns += WAITED;
    if (strikes(&gate.fail_sync)) return error_set(error, STATUS_DEVICE, "mock: sync failed");
    return status;
}

static inline void gate_rank(struct backend *backend, uint32_t place, const struct rank_request *request, uint32_t *n_protected, float *scores) {
    gate.n_ranks++;
    backend_mock.rank(backend, place, request, n_protected, scores);
}

static inline void gate_settle(struct backend *backend) {
    gate.n_settles++;
    backend_mock.settle(backend);
}

static inline void gate_hold(void) { atomic_store(&gate.held, true); }
static inline void gate_wait(void) {
    while (sem_wait(&gate.entered) != 0) {}
}
static inline void gate_step(void) { sem_post(&gate.permits); }
static inline void gate_open(void) {
    atomic_store(&gate.held, false);
    sem_post(&gate.permits); /* one step may wait */
}

/* ---- fixture ---- */

static struct model *model;
static bool runs_ahead; /* config.run_ahead */

struct shape {
    uint32_t sequences, queue, rows, len, pool; /* pool: sequences of `len` tokens it holds */
};

static inline void start(struct client *client, struct shape shape) {
    struct config config;
    struct error error;
    config_defaults(&config);
    config.max_sequences = shape.sequences;
    config.max_queue = shape.queue;
    config.max_rows = shape.rows;
    config.max_model_len = shape.len;
    config.max_choices = 8;
    config.run_ahead = runs_ahead;
    config.kv_memory = (uint64_t)backend_mock.block_bytes(model_program(model), KV_F16) * shape.pool * program_lanes(model_program(model)) *
                       ((shape.len + BLOCK_TOKENS - 1) / BLOCK_TOKENS);
    gate.ops = backend_mock;
    gate.ops.prepare = gate_prepare;
    gate.ops.submit = gate_submit;
    gate.ops.sync = gate_sync;
    gate.ops.rank = gate_rank;
    gate.ops.settle = gate_settle;
    gate.n_ranks = gate.n_settles = 0;
    atomic_store(&gate.held, false);
    gate.n_flights = 0;
    atomic_store(&gate.fail_submit, 0);
    atomic_store(&gate.fail_sync, 0);
    CHECK(sem_init(&gate.entered, 0, 0) == 0 && sem_init(&gate.permits, 0, 0) == 0);
    struct engine_hooks hooks = client_init(client);
    if (engine_start_on(&gate.ops, &config, model, &hooks, &client->engine, &error) != STATUS_OK) fail_msg("%s", error.text);
}

static inline struct job *random_job(struct random *random, uint32_t prompt_max, uint32_t new_max, uint32_t n) {
    int32_t prompt[1024];
    uint32_t n_prompt = 1 + random_below(random, prompt_max), shared = random_below(random, 3) * 40;
    for (uint32_t i = 0; i < n_prompt; i++) prompt[i] = i < shared ? (int32_t)(i % 200) : (int32_t)random_below(random, 256);
    struct job *job = job_new(prompt, n_prompt, 1 + random_below(random, new_max), n);
    job->request.sampling.temperature = random_below(random, 2) ? 0.8f : 0;
    job->request.sampling.seed = random_next(random);
    job->request.priority = (int32_t)random_below(random, 3);
    return job;
}

static inline int open_model(void **state) {
    (void)state;
    struct error error;
    return model_dummy("tiny", 1, &model, &error);
}

static inline int close_model(void **state) {
    (void)state;
    model_close(model);
    return 0;
}

static inline int ahead(void **state) {
    runs_ahead = true;
    return open_model(state);
}
