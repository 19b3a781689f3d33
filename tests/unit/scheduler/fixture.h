/* A scheduler with small limits, requests whose prompts are one token repeated, and what the tests ask of a plan. */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/block.h"
#include "scheduler/scheduler.h"

#define LENGTH 512
#define REQUESTS 12
#define CANDIDATES 4
#define SECOND 1000000000ull

struct fixture {
    struct scheduler_limits limits;
    struct scheduler *scheduler;
    int32_t tokens[REQUESTS][CANDIDATES][LENGTH];
    int32_t *pointers[REQUESTS][CANDIDATES];
    uint32_t n_candidates[REQUESTS];
    const struct plan *plan;
    uint64_t now_ns;
};

/* What is 0 in `limits` gets a value that bounds nothing here. */
static inline struct fixture *fixture_new(struct scheduler_limits limits) {
    struct fixture *f = calloc(1, sizeof *f);
    assert_non_null(f);
    if (limits.n_lanes == 0) limits.n_lanes = 2;
    if (limits.n_blocks == 0) limits.n_blocks = 200;
    if (limits.max_sequences == 0) limits.max_sequences = 8;
    if (limits.max_rows == 0) limits.max_rows = 1000;
    if (limits.max_samples == 0) limits.max_samples = limits.max_sequences + CANDIDATES;
    if (limits.step_budget_us == 0) limits.step_budget_us = 1e9;
    limits.extent_blocks = 4;
    limits.max_choices = 32;
    limits.max_model_len = LENGTH;
    if (limits.n_blocks / limits.n_lanes < LENGTH / BLOCK_TOKENS) limits.max_model_len = limits.n_blocks / limits.n_lanes * BLOCK_TOKENS;
    f->limits = limits;
    f->scheduler = scheduler_new(&limits);
    for (uint32_t r = 0; r < REQUESTS; r++)
        for (uint32_t c = 0; c < CANDIDATES; c++) f->pointers[r][c] = f->tokens[r][c];
    return f;
}

static inline void fixture_free(struct fixture *f) {
    scheduler_check(f->scheduler);
    scheduler_free(f->scheduler);
    free(f);
}

/* Request `id` < REQUESTS whose prompt is all `token`; the ids are the order of arrival. */
static inline struct scheduler_request ask(struct fixture *f, uint64_t id, int32_t token, uint32_t n_prompt, uint32_t max_new) {
    for (uint32_t p = 0; p < n_prompt; p++) f->tokens[id][0][p] = token;
    return (struct scheduler_request){.id = id,
                                      .n_candidates = 1,
                                      .tokens = f->pointers[id],
                                      .n_prompt = n_prompt,
                                      .max_new = max_new,
                                      .arrival_ns = id,
                                      .first_needed_row = UINT32_MAX};
}

static inline void add(struct fixture *f, struct scheduler_request request) {
    if (request.id < REQUESTS) f->n_candidates[request.id] = request.n_candidates;
    assert_true(scheduler_add(f->scheduler, &request));
}

static inline const struct plan_entry *entry_of(const struct fixture *f, uint64_t id, uint32_t choice) {
    for (uint32_t i = 0; i < f->plan->n_entries; i++)
        if (f->plan->entries[i].request_id == id && f->plan->entries[i].choice == choice) return &f->plan->entries[i];
    return NULL;
}

static inline uint32_t rows_of(const struct fixture *f, uint64_t id) { return entry_of(f, id, 0) ? entry_of(f, id, 0)->n_rows : 0; }

static inline void plan(struct fixture *f) {
    f->plan = scheduler_plan(f->scheduler, f->now_ns);
    if (f->plan->n_entries == 0) assert_int_equal(f->plan->n_copies, 0);
    assert_true(f->plan->n_rows <= f->limits.max_rows && f->plan->n_samples <= f->limits.max_samples);
}

/* Sample i of the plan ends its choice if last[i]. Candidate c says token + c. */
static inline void commit_ended(struct fixture *f, int32_t token, const bool *last) {
    for (uint32_t i = 0; i < f->plan->n_entries; i++) {
        const struct plan_entry *entry = &f->plan->entries[i];
        if (entry->n_samples == 1) f->tokens[entry->request_id][entry->choice][entry->n_tokens] = token;
        for (uint32_t c = 0; entry->n_samples > 1 && c < entry->n_samples; c++) f->tokens[entry->request_id][c][entry->n_tokens] = token + (int32_t)c;
    }
    if (f->plan->n_entries > 0) scheduler_commit(f->scheduler, last);
    scheduler_check(f->scheduler);
}

static inline void commit(struct fixture *f) {
    bool last[64] = {false};
    commit_ended(f, 1000, last);
}

static inline void step(struct fixture *f) {
    plan(f);
    commit(f);
}

static inline void steps(struct fixture *f, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) step(f);
}

static inline struct scheduler_stats stats_of(const struct fixture *f) {
    struct scheduler_stats stats;
    scheduler_stats(f->scheduler, &stats);
    return stats;
}

static inline uint32_t live(const struct fixture *f) {
    struct scheduler_stats stats = stats_of(f);
    return stats.running + stats.waiting;
}

/* To the end, within `most` steps; nothing is lost on the way. */
static inline void drain(struct fixture *f, uint32_t most) {
    for (; live(f) > 0; most--) {
        assert_true(most > 0);
        step(f);
    }
    plan(f);
    assert_int_equal(f->plan->n_entries, 0);
    assert_int_equal(stats_of(f).blocks_used, 0);
}
