/* Runs of requests (compression_runs.h) against one another: which backends, alone or together, and that answers, reports and hits are the same. Include it in one file of a program. */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#include "tests/contract/compression_runs.h"
#include "tests/support/backends.h"

static const char *run_backends[3];
static size_t n_run_backends;
#ifdef KVASIR_SANITIZED /* several times slower: not on `reference`, and every third policy where each takes long */
enum { SANITIZED = true, POLICY_STEP = 3 };
#else
enum { SANITIZED = false, POLICY_STEP = 1 };
#endif

static inline void find_backends(void) {
    static const char *const names[] = {"reference", "cpu", "cuda"};
    for (size_t i = SANITIZED; i < sizeof names / sizeof *names; i++)
        if (test_runs_on_name(names[i]) && (!run_kivi4 || strcmp(names[i], "reference") != 0)) run_backends[n_run_backends++] = names[i];
    CHECK(n_run_backends > 0);
}

static struct run_answers first, second;

static inline void expect_answer(const char *what, uint32_t number, uint32_t choice, const struct run_answer *a, const struct run_answer *b) {
    if (a->n_tokens != b->n_tokens) fail_msg("%s: request %u, choice %u: %u tokens, then %u", what, number, choice, a->n_tokens, b->n_tokens);
    assert_true(a->n_tokens > 0);
    for (uint32_t t = 0; t < a->n_tokens; t++)
        if (a->tokens[t] != b->tokens[t] || memcmp(&a->logprobs[t], &b->logprobs[t], sizeof(float)) != 0)
            fail_msg("%s: request %u, choice %u, token %u of %u: %d (%.9g), then %d (%.9g)", what, number, choice, t, a->n_tokens, a->tokens[t],
                     (double)a->logprobs[t], b->tokens[t], (double)b->logprobs[t]);
}

static inline void expect_report(const char *what, uint32_t number, const struct kv_report *a, const struct kv_report *b) {
    if (a->tokens_seen != b->tokens_seen || a->slots_kept != b->slots_kept || a->slots_evicted != b->slots_evicted || a->blocks != b->blocks ||
        a->head_min != b->head_min || a->head_max != b->head_max || memcmp(&a->hits_kept, &b->hits_kept, sizeof a->hits_kept) != 0 ||
        memcmp(&a->hits_all, &b->hits_all, sizeof a->hits_all) != 0)
        fail_msg(
            "%s: request %u: kept %lu of %lu slots in %lu blocks, heads %u to %u, hits %.9g of %.9g; then %lu of %lu in %lu, %u to %u, %.9g of %.9g",
            what, number, a->slots_kept, a->slots_kept + a->slots_evicted, a->blocks, a->head_min, a->head_max, a->hits_kept, a->hits_all,
            b->slots_kept, b->slots_kept + b->slots_evicted, b->blocks, b->head_min, b->head_max, b->hits_kept, b->hits_all);
}

/* Head by head, they are what the report sums. */
static inline void expect_hits(const char *what, uint32_t number, const struct run_answers *a, const struct run_answers *b) {
    struct head_hits sum = {0};
    if (memcmp(a->head_hits[number], b->head_hits[number], sizeof a->head_hits[number]) != 0)
        fail_msg("%s: request %u: hits of heads differ", what, number);
    for (uint32_t lane = 0; lane < RUN_LANES_MAX; lane++) {
        const struct head_hits *hits = &a->head_hits[number][lane];
        assert_true(hits->kept >= 0 && hits->kept <= hits->all);
        sum.kept += hits->kept;
        sum.all += hits->all;
    }
    assert_true(sum.kept == a->reports[number].hits_kept && sum.all == a->reports[number].hits_all);
}

static inline void expect_same(const char *what, const struct run_request *asked, uint32_t n, const struct run_answers *a,
                               const struct run_answers *b) {
    for (uint32_t i = 0; i < n; i++) {
        char words[128];
        uint32_t number = asked[i].number;
        (void)snprintf(words, sizeof words, "%s, %s", what, asked[i].policy);
        for (uint32_t c = 0; c < (asked[i].n_candidates ? asked[i].n_candidates : 1); c++)
            expect_answer(words, number, c, &a->of[number][c], &b->of[number][c]);
        expect_report(words, number, &a->reports[number], &b->reports[number]);
        expect_hits(words, number, a, b);
    }
}

static inline void run_alone(const struct run_setting *setting, const struct run_request *asked, uint32_t n, struct run_answers *answers) {
    struct client client;
    struct config config;
    memset(answers, 0, sizeof *answers);
    run_open(&client, setting, &config, answers);
    run_each(&client, &config, asked, n, answers);
    struct engine_stats stats = client_settled(&client);
    assert_int_equal(stats.preemptions, 0);
    client_done(&client);
}

static inline struct scheduler_stats run_together(const struct run_setting *setting, const struct run_request *asked, uint32_t n,
                                                  struct run_answers *answers) {
    struct client client;
    struct config config;
    memset(answers, 0, sizeof *answers);
    run_open(&client, setting, &config, answers);
    run_all(&client, &config, asked, n, answers);
    struct scheduler_stats stats = run_scheduler_stats(&client);
    client_done(&client);
    return stats;
}

enum { CUT_JOBS = 4 };

/* Prompts that end within a block, at its edge, within the window of it; answers that reach the budget again. */
static inline uint32_t cut_requests(const char *policy, uint32_t first_number, struct run_request *asked) {
    static const uint32_t prompts[CUT_JOBS] = {150, 192, 70, 300};
    for (uint32_t i = 0; i < CUT_JOBS; i++)
        asked[i] = (struct run_request){.number = first_number + i,
                                        .text = 50 + i,
                                        .shared = RUN_PROMPT_MAX,
                                        .n_prompt = prompts[i],
                                        .n_new = 110,
                                        .policy = policy,
                                        .budget = i == 3 ? 0 : 64 + 10 * i,
                                        .ratio = i == 3 ? 0.4 : 0,
                                        .temperature = i % 2 ? 0.9f : 0};
    return CUT_JOBS;
}

static inline int by_hash(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}
