/* How an engine comes to be and ends; and the calls by which the loop thread reaches it, and any thread looks at it. The life of the engine thread is engine_serve (engine.c). */
#include "engine/engine.h"

#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/check.h"
#include "base/clock.h"
#include "engine/compression.h"
#include "engine/internal.h"
#include "engine/step_cost.h"
#include "engine/system_memory.h"
#include "kernels/kivi.h"

/* ---- start ---- */

/* What engine_start and the new thread share until the engine serves or has failed to. */
struct birth {
    struct engine *engine;
    const struct backend_ops *ops;
    const struct config *config;
    const struct model *model;
    const struct program *program;
    struct error *error;
    enum status status;
    sem_t done;
};

static uint64_t random_seed(void) {
    uint64_t seed;
    CHECK(getrandom(&seed, sizeof seed, 0) == (ssize_t)sizeof seed); /* up to 256 bytes it is never cut short */
    return seed;
}

static bool can_resume(void *context, const uint32_t *ids) {
    struct engine *engine = context;
    return engine->backend->ops->resumes(engine->backend, engine->compress.n_lanes, ids);
}

static struct scheduler *new_scheduler(struct engine *engine, const struct birth *birth, const struct step_cost *cost) {
    const struct memory_plan *plan = &engine->plan;
    struct scheduler_limits limits;
    engine_scheduler_limits(plan, birth->config, program_lanes(birth->program), &limits);
    limits.cost = *cost;
    limits.hash_seed = random_seed();
    if (kivi_bits(plan->kv_dtype)) {
        limits.resumes = can_resume;
        limits.resumes_context = engine;
        limits.resume_runs = KIVI_RESIDUAL / BLOCK_TOKENS;
    }
    return scheduler_new(&limits);
}

/* On the engine thread: a backend belongs to one thread. */
static enum status open_engine(struct birth *birth) {
    struct engine *engine = birth->engine;
    const struct memory_plan *plan = &engine->plan;
    struct backend_limits limits;
    struct step_cost cost;
    engine_backend_limits(plan, birth->config, &limits);
    limits.progress = engine->hooks.progress;
    limits.progress_context = engine->hooks.progress_context;
    limits.wait_ns = &engine->stats.wait_ns;
    enum status status = birth->ops->prepare(birth->program, &limits, &engine->backend, birth->error);
    if (status == STATUS_OK) status = step_cost_fit(engine->backend, birth->program, &limits, plan->max_model_len, &cost, birth->error);
    if (status != STATUS_OK) return status;
    engine->scheduler = new_scheduler(engine, birth, &cost);
    engine->times_steps = step_cost_is_measured(engine->backend, &limits);
    requests_init(&engine->requests, plan->max_choices);
    compress_init(&engine->compress, engine->backend, birth->config, birth->model, plan);
    engine->stats = (struct engine_stats){.n_layers = birth->program->n_layers}; /* the steps that fitted the cost waited too */
    for (uint32_t i = 0; i < 2; i++)
        batch_builder_init(&engine->flights[i].builder, plan->max_rows, plan->max_sequences, engine->sizes.samples, engine->sizes.draws);
    engine->runs_ahead = birth->config->run_ahead && engine->backend->takes_two;
    (void)snprintf(engine->description, sizeof engine->description, "%s, kv %s", engine->backend->ops->describe(engine->backend),
                   kv_dtype_name(plan->kv_dtype));
    return STATUS_OK;
}

static void *engine_main(void *argument) {
    struct birth *birth = argument;
    struct engine *engine = birth->engine;
    (void)pthread_setname_np(pthread_self(), "kvasir-engine");
    enum status status = birth->status = open_engine(birth);
    if (status == STATUS_OK) engine_publish(engine);
    /* Loading may take longer than a stall: whoever asks right after it must not read the time from before. */
    atomic_store_explicit(&engine->progress_ns, clock_now_ns(), memory_order_relaxed);
    CHECK(sem_post(&birth->done) == 0); /* `birth` is gone from here on */
    if (status == STATUS_OK) engine_serve(engine);
    if (engine->backend) engine->backend->ops->close(engine->backend);
    return NULL;
}

/* Signals are the loop thread's. */
static int start_thread(struct engine *engine, struct birth *birth) {
    sigset_t all, before;
    (void)sigfillset(&all);
    CHECK(pthread_sigmask(SIG_SETMASK, &all, &before) == 0);
    int failed = pthread_create(&engine->thread, NULL, engine_main, birth);
    CHECK(pthread_sigmask(SIG_SETMASK, &before, NULL) == 0);
    return failed;
}

static void free_engine(struct engine *engine) {
    scheduler_free(engine->scheduler);
    for (uint32_t i = 0; i < 2; i++) batch_builder_done(&engine->flights[i].builder);
    requests_done(&engine->requests);
    compress_done(&engine->compress);
    mailbox_done(&engine->inbox);
    mailbox_done(&engine->outbox);
    free(engine);
}

enum status engine_start_on(const struct backend_ops *ops, const struct config *config, const struct model *model, const struct engine_hooks *hooks,
                            struct engine **result, struct error *error) {
    struct memory_plan plan;
    enum status status = compression_check(config, error);
    if (status != STATUS_OK) return status;
    status = engine_plan_memory_on(ops, config, model, system_memory_available(""), &plan, error);
    if (status != STATUS_OK) return status;
    struct engine *engine = aligned_alloc(64, (sizeof *engine + 63) / 64 * 64);
    CHECK(engine);
    memset(engine, 0, sizeof *engine);
    engine->plan = plan;
    engine->sizes = engine_sizes(&plan, config);
    if (hooks) engine->hooks = *hooks;
    engine->n_vocab = model_program(model)->n_vocab;
    mailbox_init(&engine->inbox, sizeof(struct letter), engine->sizes.inbox);
    mailbox_init(&engine->outbox, sizeof(struct posted), engine->sizes.outbox);
    atomic_init(&engine->progress_ns, clock_now_ns());

    struct birth birth = {.engine = engine, .ops = ops, .config = config, .model = model, .program = model_program(model), .error = error};
    CHECK(sem_init(&birth.done, 0, 0) == 0);
    int failed = start_thread(engine, &birth);
    if (failed) {
        status = error_set(error, STATUS_NO_MEMORY, "engine thread: %s", strerror(failed));
    } else {
        while (sem_wait(&birth.done) != 0) {}
        status = birth.status;
        if (status != STATUS_OK) CHECK(pthread_join(engine->thread, NULL) == 0);
    }
    (void)sem_destroy(&birth.done);
    if (status != STATUS_OK) {
        free_engine(engine);
        return status;
    }
    *result = engine;
    return STATUS_OK;
}

enum status engine_start(const struct config *config, const struct model *model, const struct engine_hooks *hooks, struct engine **engine,
                         struct error *error) {
    const struct backend_ops *ops = backend_choose(config->backend, config->device);
    if (!ops) return backend_absent(config->backend, error);
    return engine_start_on(ops, config, model, hooks, engine, error);
}

void engine_stop(struct engine *engine) {
    if (!engine) return;
    atomic_store(&engine->stop, true);
    bell_ring(&engine->bell);
    CHECK(pthread_join(engine->thread, NULL) == 0);
    free_engine(engine);
}

/* ---- the loop thread's calls ---- */

uint32_t engine_tokens_max(const struct engine *engine, const struct kv_plan *kv) {
    const struct memory_plan *plan = &engine->plan;
    return compression_is_endless(kv, plan->max_model_len) && plan->max_stream_tokens > plan->max_model_len ? plan->max_stream_tokens
                                                                                                            : plan->max_model_len;
}

bool engine_can_hold(const struct engine *engine, const struct kv_plan *kv, uint32_t n_prompt, uint32_t max_new) {
    uint64_t tokens = (uint64_t)n_prompt + max_new;
    uint32_t bound = compression_tokens_max(kv);
    if (bound != UINT32_MAX) {
        /* The prompt is whole in the cache before its end is compressed, unless it is compressed while being read; lanes differ by a block. */
        uint64_t held = kv->while_reading ? (uint64_t)bound + COMPRESSION_READING : bound > n_prompt ? bound : n_prompt;
        held += 2 * BLOCK_TOKENS;
        if (held < tokens) tokens = held;
    }
    return (tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS * engine->compress.n_lanes <= engine->plan.n_blocks;
}

bool engine_submit(struct engine *engine, struct request *request) {
    const struct memory_plan *plan = &engine->plan;
    CHECK(request->n_candidates >= 1 && request->n_candidates <= engine->sizes.draws && request->n_prompt >= 1);
    CHECK(request->n_prompt <= plan->max_model_len && request->max_new <= engine_tokens_max(engine, &request->kv) - request->n_prompt);
    CHECK(engine_can_hold(engine, &request->kv, request->n_prompt, request->max_new));
    uint32_t staying = engine->live_choices - engine->leaving_choices;
    if (request->n_candidates > plan->queue_choices - staying || request->n_candidates > plan->max_choices - engine->live_choices) return false;
    if (!mailbox_put(&engine->inbox, &(struct letter){.kind = LETTER_SUBMIT, .request = request, .id = request->id})) return false;
    engine->live_choices += request->n_candidates;
    request->open = true;
    request->leaving = false;
    bell_ring(&engine->bell);
    return true;
}

/* There is a place for one ABORT of each choice and of each request. A caller that repeats itself may have to wait until the engine has read its letters, a step at most. */
void engine_abort(struct engine *engine, struct request *request, uint32_t choice) {
    if (!request->open) return;
    if (!request->leaving && (choice == ENGINE_ALL_CHOICES || (choice == 0 && request->n_candidates == 1))) {
        request->leaving = true;
        engine->leaving_choices += request->n_candidates;
    }
    while (!mailbox_put(&engine->inbox, &(struct letter){.kind = LETTER_ABORT, .id = request->id, .choice = choice})) {
        bell_ring(&engine->bell);
        (void)sched_yield();
    }
    bell_ring(&engine->bell);
}

bool engine_poll(struct engine *engine, struct event *event) {
    const struct posted *posted = mailbox_first(&engine->outbox);
    if (!posted) return false;
    struct request *released = posted->released;
    if (released) {
        released->open = false;
        engine->live_choices -= released->n_candidates;
        if (released->leaving) engine->leaving_choices -= released->n_candidates;
    }
    *event = posted->event;
    mailbox_take_first(&engine->outbox);
    bell_ring_room(&engine->bell);
    return true;
}

/* ---- anybody's calls ---- */

void engine_stats(const struct engine *engine, struct engine_stats *stats) { publisher_read(&engine->publisher, stats); }

const struct memory_plan *engine_limits(const struct engine *engine) { return &engine->plan; }

const char *engine_describe(const struct engine *engine) { return engine->description; }

bool engine_alive(const struct engine *engine, uint64_t now_ns, uint64_t stall_ns) {
    bool asleep = atomic_load(&engine->bell.word) & BELL_ASLEEP;
    if (asleep && mailbox_waiting((struct mailbox *)(uintptr_t)&engine->inbox) == 0) return true; /* idle, or waiting for the loop to take events */
    uint64_t progress = atomic_load_explicit(&engine->progress_ns, memory_order_relaxed);
    return now_ns <= progress || now_ns - progress <= stall_ns;
}
