/* A loop thread for tests of the engine: makes requests, takes events, checks the contract of each choice's events as they come. Include it in one file of a program.
 * Every wait ends with a failure after CLIENT_WAIT_S. */
#pragma once

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/check.h"
#include "base/clock.h"
#include "base/random.h"
#include "engine/internal.h"

#define CLIENT_WAIT_S 240

struct job_choice {
    uint32_t n_events, n_tokens, n_terminal, preemptions, cached;
    enum finish finish;
    char error[96];
};

struct job {
    struct request request;
    int32_t **tokens;
    struct job_choice *choices;
    uint64_t order; /* of its last terminal event among all jobs; 0: lives */
    uint64_t scheduled_ns;
    int32_t stop[4];
};

struct client {
    struct engine *engine;
    pthread_mutex_t mutex;
    pthread_cond_t rung;
    bool wakes;
    uint64_t next_id, next_order;
    uint32_t n_open; /* choices submitted and without a terminal event */
    void (*on_event)(void *context, struct job *job, const struct event *event);
    void *context;
};

static void client_wake(void *context) {
    struct client *client = context;
    pthread_mutex_lock(&client->mutex);
    client->wakes = true;
    pthread_cond_signal(&client->rung);
    pthread_mutex_unlock(&client->mutex);
}

static inline struct engine_hooks client_init(struct client *client) {
    *client = (struct client){.next_id = 1, .next_order = 1};
    CHECK(pthread_mutex_init(&client->mutex, NULL) == 0 && pthread_cond_init(&client->rung, NULL) == 0);
    return (struct engine_hooks){.wake = client_wake, .context = client};
}

static inline void client_done(struct client *client) {
    engine_stop(client->engine);
    pthread_cond_destroy(&client->rung);
    pthread_mutex_destroy(&client->mutex);
}

static inline struct job *job_new(const int32_t *prompt, uint32_t n_prompt, uint32_t max_new, uint32_t n_candidates) {
    struct job *job = check_calloc(1, sizeof *job);
    job->tokens = check_calloc(n_candidates, sizeof *job->tokens);
    job->choices = check_calloc(n_candidates, sizeof *job->choices);
    for (uint32_t c = 0; c < n_candidates; c++) job->tokens[c] = check_calloc(n_prompt + max_new, sizeof **job->tokens);
    memcpy(job->tokens[0], prompt, n_prompt * sizeof *prompt);
    job->request = (struct request){.n_candidates = n_candidates,
                                    .n_prompt = n_prompt,
                                    .max_new = max_new,
                                    .tokens = job->tokens,
                                    .stop_tokens = job->stop,
                                    .sampling = {.top_p = 1, .repetition_penalty = 1, .n_top = -1},
                                    .owner = job};
    return job;
}

static inline void job_free(struct job *job) {
    for (uint32_t c = 0; c < job->request.n_candidates; c++) free(job->tokens[c]);
    free(job->tokens);
    free(job->choices);
    free(job->request.prompt_results);
    free(job);
}

static inline bool client_submit(struct client *client, struct job *job) {
    job->request.id = client->next_id++;
    if (job->request.arrival_ns == 0) job->request.arrival_ns = job->request.id;
    if (!engine_submit(client->engine, &job->request)) return false;
    client->n_open += job->request.n_candidates;
    return true;
}

static inline void client_take(struct client *client, const struct event *event) {
    struct job *job = event->owner;
    CHECK(event->id == job->request.id && event->choice < job->request.n_candidates);
    struct job_choice *choice = &job->choices[event->choice];
    CHECK(choice->n_terminal == 0); /* nothing follows the terminal event */
    if (choice->n_events++ == 0) choice->cached = event->cached_tokens;
    CHECK(event->has_token ==
          (event->finish == FINISH_NONE || event->finish == FINISH_STOP || (event->finish == FINISH_LENGTH && job->request.max_new > 0)));
    if (event->has_token) {
        CHECK(choice->n_tokens < job->request.max_new);
        CHECK(job->tokens[event->choice][job->request.n_prompt + choice->n_tokens] == event->sample.token);
        choice->n_tokens++;
    }
    if (event->finish != FINISH_NONE) {
        choice->n_terminal++;
        choice->finish = event->finish;
        choice->preemptions = event->preemptions;
        memcpy(choice->error, event->error, sizeof choice->error);
        job->scheduled_ns = event->scheduled_ns;
        client->n_open--;
        bool all = true;
        for (uint32_t c = 0; c < job->request.n_candidates; c++) all = all && job->choices[c].n_terminal == 1;
        if (all) job->order = client->next_order++;
    }
    if (client->on_event) client->on_event(client->context, job, event);
}

/* Takes what is there; how many. */
static inline uint32_t client_drain(struct client *client) {
    struct event event;
    uint32_t n = 0;
    for (; engine_poll(client->engine, &event); n++) client_take(client, &event);
    return n;
}

/* Sleeps until the engine's next wake, or takes note of one that was. */
static inline void client_sleep(struct client *client) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += CLIENT_WAIT_S;
    pthread_mutex_lock(&client->mutex);
    while (!client->wakes) CHECK(pthread_cond_timedwait(&client->rung, &client->mutex, &until) == 0);
    client->wakes = false;
    pthread_mutex_unlock(&client->mutex);
}

/* Until `n_open` choices are left. */
static inline void client_run(struct client *client, uint32_t n_open) {
    while (client_drain(client), client->n_open > n_open) client_sleep(client);
}

/* Until the engine has published a state without living choices. */
static inline struct engine_stats client_settled(struct client *client) {
    struct engine_stats stats;
    uint64_t limit = clock_now_ns() + CLIENT_WAIT_S * 1000000000ull;
    do {
        CHECK(clock_now_ns() < limit);
        engine_stats(client->engine, &stats);
    } while (stats.running + stats.waiting > 0 || stats.blocks_used > 0);
    return stats;
}
