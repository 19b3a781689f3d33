/* An engine for the server's tests: engine.h's contract without a model. One thread that makes one token a choice and step while it may (fake_engine_gate), from a script that the
 * prompt itself is: generated token k repeats prompt token k mod n_prompt; the byte 0x04 in a prompt stands for EOS. Log-probabilities are a function of the token.
 * Included by one test program, whose definitions then stand in for the engine room's. */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/check.h"
#include "base/clock.h"
#include "engine/engine.h"

#define FAKE_EOS 256

struct fake_choice {
    uint32_t n_new;
    bool over, aborted;
};

struct request_state {
    struct request *request;
    struct request_state *next;
    struct fake_choice *choices;
    bool scheduled;
    uint64_t scheduled_ns;
};

struct fake_event {
    struct event event;
    struct fake_event *next;
};

struct engine {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    pthread_t thread;
    struct request_state *requests;
    struct fake_event *first, **last;
    struct engine_hooks hooks;
    struct memory_plan plan;
    uint32_t max_requests;    /* more: engine_submit says not now */
    bool held, stop, stalled; /* held: no steps */
    bool counted;             /* make `budget` more tokens, then none */
    uint32_t budget;
    const char *fail; /* the next token of anybody is FINISH_ERROR with these words */
    struct engine_stats stats;
    uint32_t aborts, n_requests;
};

static float fake_logprob(int32_t token) { return -0.25f - (float)(token % 7) * 0.1f; }

static void fake_post(struct engine *engine, const struct event *event) {
    struct fake_event *letter = check_calloc(1, sizeof *letter);
    letter->event = *event;
    *engine->last = letter;
    engine->last = &letter->next;
}

static void fake_finish(struct engine *engine, struct request_state *state, uint32_t i, struct event *event, enum finish finish) {
    state->choices[i].over = true;
    event->finish = finish;
    event->scheduled_ns = state->scheduled_ns;
    (void)engine;
}

/* true: an event was posted. */
static bool fake_step_choice(struct engine *engine, struct request_state *state, uint32_t i) {
    const struct request *request = state->request;
    struct fake_choice *choice = &state->choices[i];
    struct event event = {.id = request->id, .owner = request->owner, .choice = i, .cached_tokens = 0};
    if (choice->over) return false;
    if (choice->aborted) {
        fake_finish(engine, state, i, &event, FINISH_ABORTED);
        fake_post(engine, &event);
        return true;
    }
    if (engine->held || (engine->counted && engine->budget == 0)) return false;
    if (!state->scheduled) {
        state->scheduled = true;
        state->scheduled_ns = clock_now_ns();
        for (uint32_t k = 1; request->prompt_results && k < request->n_prompt; k++) {
            struct sample_result *result = &request->prompt_results[k];
            result->token = request->tokens[0][k];
            result->logprob = fake_logprob(result->token);
            result->n_top = request->sampling.n_top > 0 ? 1 : 0;
            result->top[0].token = result->token;
            result->top[0].logprob = result->logprob;
        }
    }
    if (engine->fail) {
        (void)snprintf(event.error, sizeof event.error, "%s", engine->fail);
        fake_finish(engine, state, i, &event, FINISH_ERROR);
        fake_post(engine, &event);
        return true;
    }
    if (request->max_new == 0) {
        fake_finish(engine, state, i, &event, FINISH_LENGTH);
        fake_post(engine, &event);
        return true;
    }
    int32_t token = request->tokens[0][(choice->n_new + i) % request->n_prompt];
    if (token == 4) token = FAKE_EOS;
    event.has_token = true;
    event.sample = (struct sample_result){.token = token, .logprob = fake_logprob(token), .n_top = request->sampling.n_top};
    for (int32_t k = 0; k < request->sampling.n_top; k++) {
        event.sample.top[k].token = (token + k) % 256;
        event.sample.top[k].logprob = k == 0 ? event.sample.logprob : event.sample.logprob - (float)k;
    }
    choice->n_new++;
    if (engine->counted) engine->budget--;
    bool stop = false;
    for (uint32_t k = 0; k < request->n_stop_tokens; k++) stop |= request->stop_tokens[k] == token;
    if (stop && choice->n_new > request->min_new)
        fake_finish(engine, state, i, &event, FINISH_STOP);
    else if (choice->n_new == request->max_new)
        fake_finish(engine, state, i, &event, FINISH_LENGTH);
    fake_post(engine, &event);
    return true;
}

static bool fake_step(struct engine *engine) {
    bool posted = false;
    engine->stats.running = engine->stats.waiting = 0;
    for (struct request_state **link = &engine->requests; *link;) {
        struct request_state *state = *link;
        uint32_t over = 0, n = state->request->n_candidates;
        for (uint32_t i = 0; i < n; i++) {
            posted |= fake_step_choice(engine, state, i);
            over += state->choices[i].over;
        }
        if (state->scheduled)
            engine->stats.running += n - over;
        else
            engine->stats.waiting += n - over;
        if (over < n) {
            link = &state->next;
            continue;
        }
        *link = state->next;
        engine->n_requests--;
        free(state->choices);
        free(state);
    }
    return posted;
}

static void *fake_run(void *context) {
    struct engine *engine = context;
    pthread_mutex_lock(&engine->mutex);
    while (!engine->stop) {
        bool posted = fake_step(engine);
        engine->stats.steps++;
        if (posted) {
            pthread_mutex_unlock(&engine->mutex);
            engine->hooks.wake(engine->hooks.context);
            pthread_mutex_lock(&engine->mutex);
            continue;
        }
        pthread_cond_wait(&engine->changed, &engine->mutex);
    }
    pthread_mutex_unlock(&engine->mutex);
    return NULL;
}

static struct engine *fake_engine_new(const struct engine_hooks *hooks, uint32_t max_model_len) {
    struct engine *engine = check_calloc(1, sizeof *engine);
    pthread_mutex_init(&engine->mutex, NULL);
    pthread_cond_init(&engine->changed, NULL);
    engine->last = &engine->first;
    engine->hooks = *hooks;
    engine->max_requests = 64;
    engine->plan = (struct memory_plan){.max_model_len = max_model_len, .max_sequences = 16, .max_choices = 256, .n_blocks = 100};
    engine->stats.blocks_total = 100;
    CHECK(pthread_create(&engine->thread, NULL, fake_run, engine) == 0);
    return engine;
}

/* Changes a setting under the lock and lets the thread look again. */
#define FAKE_SET(engine, field, value)                                                                                                               \
    do {                                                                                                                                             \
        pthread_mutex_lock(&(engine)->mutex);                                                                                                        \
        (engine)->field = (value);                                                                                                                   \
        pthread_cond_signal(&(engine)->changed);                                                                                                     \
        pthread_mutex_unlock(&(engine)->mutex);                                                                                                      \
    } while (0)

void engine_stop(struct engine *engine) {
    FAKE_SET(engine, stop, true);
    pthread_join(engine->thread, NULL);
    CHECK(!engine->requests && !engine->first); /* the server took every terminal event */
    free(engine);
}

bool engine_submit(struct engine *engine, struct request *request) {
    struct request_state *state = check_calloc(1, sizeof *state);
    CHECK(request->n_prompt >= 1 && request->n_prompt + request->max_new <= engine->plan.max_model_len);
    pthread_mutex_lock(&engine->mutex);
    bool room = engine->n_requests < engine->max_requests;
    if (room) {
        state->request = request;
        state->choices = check_calloc(request->n_candidates, sizeof *state->choices);
        struct request_state **link = &engine->requests;
        while (*link) link = &(*link)->next;
        *link = state;
        engine->n_requests++;
        engine->stats.waiting += request->n_candidates;
        pthread_cond_signal(&engine->changed);
    } else {
        free(state);
    }
    pthread_mutex_unlock(&engine->mutex);
    return room;
}

void engine_abort(struct engine *engine, struct request *request, uint32_t choice) {
    pthread_mutex_lock(&engine->mutex);
    for (struct request_state *state = engine->requests; state; state = state->next)
        for (uint32_t i = 0; state->request == request && i < state->request->n_candidates; i++)
            if (choice == ENGINE_ALL_CHOICES || choice == i) state->choices[i].aborted = true;
    engine->aborts++;
    pthread_cond_signal(&engine->changed);
    pthread_mutex_unlock(&engine->mutex);
}

bool engine_poll(struct engine *engine, struct event *event) {
    pthread_mutex_lock(&engine->mutex);
    struct fake_event *letter = engine->first;
    if (letter) {
        *event = letter->event;
        engine->first = letter->next;
        if (!engine->first) engine->last = &engine->first;
        free(letter);
    }
    pthread_mutex_unlock(&engine->mutex);
    return letter != NULL;
}

void engine_stats(const struct engine *engine, struct engine_stats *stats) {
    struct engine *locked = (struct engine *)(uintptr_t)engine;
    pthread_mutex_lock(&locked->mutex);
    *stats = engine->stats;
    pthread_mutex_unlock(&locked->mutex);
}

bool engine_can_hold(const struct engine *engine, const struct kv_plan *kv, uint32_t n_prompt, uint32_t max_new) {
    (void)kv;
    return n_prompt + max_new <= engine->plan.max_model_len;
}
const struct memory_plan *engine_limits(const struct engine *engine) { return &engine->plan; }
const char *engine_describe(const struct engine *engine) {
    (void)engine;
    return "fake";
}
bool engine_alive(const struct engine *engine, uint64_t now_ns, uint64_t stall_ns) {
    (void)now_ns;
    (void)stall_ns;
    struct engine *locked = (struct engine *)(uintptr_t)engine;
    pthread_mutex_lock(&locked->mutex);
    bool alive = !engine->stalled;
    pthread_mutex_unlock(&locked->mutex);
    return alive;
}
