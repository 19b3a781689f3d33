/* Nothing is lost: 10,000 mixed requests (policies, budgets, candidates, prefixes) with random aborts through an engine on the mock backend, which stops the process at any slot
 * that is not where the tables say. In the end every choice has had one terminal event (engine_client.h checks each), no block is held by a sequence, and tables and rings are back.
 *
 * Sanitized builds, and KVASIR_TEST_SHORT=1: 1,000 requests. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>

#include <cmocka.h>

#include "tests/support/engine_client.h"

enum { REQUESTS = 5000, LIVE_MAX = 40, PROMPT_MAX = 300, NEW_MAX = 120, MODEL_LEN = 420 };

static struct model *model;

struct totals {
    uint32_t n_requests, n_choices, n_aborted, n_refused, n_of[ENGINE_POLICIES_MAX];
};

static struct job *random_request(struct random *r, const struct config *config, struct totals *totals) {
    int32_t prompt[PROMPT_MAX];
    uint32_t n_prompt = 1 + random_below(r, PROMPT_MAX), family = random_below(r, 4), shared = random_below(r, n_prompt + 1);
    for (uint32_t t = 0; t < n_prompt; t++) prompt[t] = (int32_t)(t < shared ? random_mix(family * 1000 + t) % 256 : random_below(r, 256));
    struct job *job = job_new(prompt, n_prompt, random_below(r, NEW_MAX), random_below(r, 4) ? 1 : 1 + random_below(r, 4));
    uint32_t policy = random_below(r, policy_count());
    struct kv_wish wish = {.protect_tokens = random_below(r, 4) ? 0 : random_below(r, 64)};
    if (random_below(r, 3))
        wish.budget_tokens = 36 + random_below(r, 200);
    else
        wish.keep_ratio = 0.05 + 0.9 * (double)random_unit(random_next(r));
    (void)snprintf(wish.policy, sizeof wish.policy, "%s", policies[policy]->name);
    const char *field;
    struct error error;
    if (!compression_plan(config, &wish, &job->request.kv, &field, &error)) {
        assert_string_equal(field, "kv.protect_tokens"); /* more than this budget holds */
        totals->n_refused++;
        wish.protect_tokens = 0;
        assert_true(compression_plan(config, &wish, &job->request.kv, &field, &error));
    }
    totals->n_of[policy]++;
    job->request.measure_hits = random_below(r, 2);
    if (random_below(r, 2)) job->request.sampling.temperature = 1, job->request.sampling.seed = random_next(r);
    if (random_below(r, 16) == 0) job->request.prompt_results = check_calloc(n_prompt, sizeof *job->request.prompt_results);
    job->request.cache_scope = random_below(r, 8) == 0;
    job->request.priority = (int32_t)random_below(r, 3) - 1;
    return job;
}

/* A quarter of all requests do not live to their end: aborted at once, or when so many of their events have come; whole or one choice. By id. */
struct fate {
    uint32_t events_left, choice;
    bool aborted;
};
static struct fate fates[REQUESTS + 1];

static struct fate random_fate(struct random *r, const struct job *job) {
    bool ends_early = random_below(r, 4) == 0;
    return (struct fate){.events_left = ends_early ? random_below(r, 60) : UINT32_MAX,
                         .choice = random_below(r, 2) ? ENGINE_ALL_CHOICES : random_below(r, job->request.n_candidates)};
}

static void meet_fate(void *context, struct job *job, const struct event *event) {
    struct client *client = context;
    struct fate *fate = &fates[job->request.id];
    if (fate->events_left == UINT32_MAX || fate->aborted) return;
    if (fate->events_left > 0 && event) fate->events_left--;
    if (fate->events_left > 0) return;
    fate->aborted = true;
    engine_abort(client->engine, &job->request, fate->choice);
}

static bool is_over(const struct job *job) { return job->order > 0; }

/* What the report says holds together. */
static void check_report(const struct job *job, uint32_t lanes) {
    const struct kv_report *report = &job->request.kv_report;
    assert_true(report->slots_kept + report->slots_evicted == report->tokens_seen * lanes);
    assert_true(report->head_min <= report->head_max && report->blocks * BLOCK_TOKENS >= report->slots_kept);
    assert_true(report->hits_kept <= report->hits_all);
    if (!compression_is_on(&job->request.kv)) assert_int_equal(report->slots_evicted, 0);
}

/* Idle: the engine thread sleeps, and what it wrote was published. The check recounts owners, tables and rings; with nobody left, that is all of them back. */
static void check_all_is_back(struct client *client) {
    struct engine_stats stats = client_settled(client);
    struct scheduler_stats own;
    scheduler_stats(client->engine->scheduler, &own);
    assert_int_equal(stats.blocks_used, 0);
    assert_int_equal(own.running + own.waiting, 0);
    assert_null(client->engine->requests.oldest);
    assert_int_equal(client->engine->requests.n_compressed + client->engine->requests.n_pressed, 0);
    scheduler_check(client->engine->scheduler);
}

static void run_mixed(uint64_t seed, const char *triggers, bool reading, uint32_t n_requests) {
    struct random r = {seed};
    struct totals totals = {0};
    struct config config;
    struct error error;
    config_defaults(&config);
    (void)snprintf(config.backend, sizeof config.backend, "mock");
    (void)snprintf(config.compression_triggers, sizeof config.compression_triggers, "%s", triggers);
    config.compress_while_reading = reading;
    config.max_model_len = MODEL_LEN;
    config.max_sequences = 24;
    config.max_rows = 200;
    config.pressure_high = 0.9;
    config.pressure_low = 0.7;
    uint32_t lanes = program_lanes(model_program(model));
    config.kv_memory = (uint64_t)backend_mock.block_bytes(model_program(model), KV_F16) * lanes * 60;
    struct client client;
    struct engine_hooks hooks = client_init(&client);
    client.on_event = meet_fate;
    client.context = &client;
    if (engine_start(&config, model, &hooks, &client.engine, &error) != STATUS_OK) fail_msg("%s", error.text);

    struct job *live[LIVE_MAX];
    uint32_t n_live = 0;
    while (totals.n_requests < n_requests || n_live > 0) {
        while (n_live < LIVE_MAX && totals.n_requests < n_requests) {
            struct job *job = random_request(&r, &config, &totals);
            if (!engine_can_hold(client.engine, &job->request.kv, job->request.n_prompt, job->request.max_new)) fail_msg("a request is too large");
            CHECK(client_submit(&client, job));
            totals.n_requests++;
            totals.n_choices += job->request.n_candidates;
            live[n_live++] = job;
            fates[job->request.id] = random_fate(&r, job);
            meet_fate(&client, job, NULL);
        }
        client_drain(&client);
        uint32_t before = n_live;
        for (uint32_t i = 0; i < n_live;) {
            struct job *job = live[i];
            if (!is_over(job)) {
                i++;
                continue;
            }
            for (uint32_t c = 0; c < job->request.n_candidates; c++) {
                assert_int_equal(job->choices[c].n_terminal, 1);
                if (job->choices[c].finish == FINISH_ERROR) fail_msg("%s", job->choices[c].error);
                totals.n_aborted += job->choices[c].finish == FINISH_ABORTED;
            }
            check_report(job, lanes);
            job_free(job);
            live[i] = live[--n_live];
        }
        if (n_live == before) client_sleep(&client);
    }
    check_all_is_back(&client);
    struct scheduler_stats stats;
    scheduler_stats(client.engine->scheduler, &stats);
    const struct engine_stats counted = client_settled(&client);
    print_message("  %s: %u choices, %u aborted; %u compactions, %u preemptions, %u replays, %u forks, %u steals, %u copies, %u drops, %u pressed, "
                  "%u chosen behind\n",
                  triggers, totals.n_choices, totals.n_aborted, (unsigned)stats.compactions, (unsigned)stats.preemptions, (unsigned)stats.replays,
                  (unsigned)stats.forks, (unsigned)stats.prefix_steals, (unsigned)stats.compaction_copies, (unsigned)stats.compaction_drops,
                  (unsigned)stats.pressure_compactions, (unsigned)counted.compressions_behind);
    for (uint32_t p = 0; p < policy_count(); p++) assert_true(totals.n_of[p] >= n_requests / 40);
    assert_true(totals.n_aborted >= totals.n_choices / 20 && totals.n_aborted <= totals.n_choices / 2);
    assert_true(stats.compactions >= n_requests && stats.preemptions >= n_requests / 100 && stats.forks >= n_requests / 20);
    assert_true(stats.prefix_steals > 0 && stats.compaction_copies > 0 && stats.compaction_drops > 0 && stats.replays > 0);
    assert_true(counted.compressions_behind >= n_requests / 4);
    if (strstr(triggers, "pressure")) assert_true(stats.pressure_compactions >= n_requests / 100);
    client_done(&client);
}

static uint32_t n_requests(void) {
#ifdef KVASIR_SANITIZED
    return 500;
#else
    const char *brief = getenv("KVASIR_TEST_SHORT");
    return brief && *brief && strcmp(brief, "0") != 0 ? 500 : REQUESTS;
#endif
}

static void test_own_triggers(void **state) { (void)state, run_mixed(1, "", false, n_requests()); }
static void test_pressure_while_reading(void **state) { (void)state, run_mixed(2, "prompt_end, budget, pressure", true, n_requests()); }

int main(void) {
    struct error error;
    if (model_dummy("tiny", 3, &model, &error) != STATUS_OK) {
        (void)fprintf(stderr, "%s\n", error.text);
        return 1;
    }
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_own_triggers), cmocka_unit_test(test_pressure_while_reading)};
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    model_close(model);
    return failed;
}
