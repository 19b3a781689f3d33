/* What is in an event and what is not, whatever the event before it in the same place of the outbox has left there: each says no more than its own. */
#include "tests/unit/engine/engine_gate.h"

struct seen {
    uint32_t n_events, n_cached, n_preempted, n_failed, n_tops, n_wrong; /* counted, and asserted by the caller */
};

static bool is_right(const struct job *job, const struct event *event) {
    const struct job_choice *choice = &job->choices[event->choice];
    bool first = choice->n_events == 1, last = event->finish != FINISH_NONE;
    if (event->owner != job || (!first && event->cached_tokens != 0)) return false;
    if (!last && (event->preemptions != 0 || event->scheduled_ns != 0)) return false;
    if (last && (event->error[0] != 0) != (event->finish == FINISH_ERROR)) return false;
    if (!event->has_token) return true;
    const struct sample_result *sample = &event->sample;
    int32_t n_top = job->request.sampling.n_top;
    if (sample->n_top != (n_top < 0 ? 0 : n_top) || (n_top < 0) != (sample->logprob == 0)) return false;
    for (int32_t i = 1; i < n_top; i++)
        if (sample->top[i].logprob > sample->top[i - 1].logprob || sample->top[i].token == sample->top[i - 1].token) return false;
    return true;
}

static void look(void *context, struct job *job, const struct event *event) {
    struct seen *seen = context;
    seen->n_events++;
    seen->n_cached += event->cached_tokens > 0;
    seen->n_preempted += event->preemptions > 0;
    seen->n_failed += event->finish == FINISH_ERROR;
    seen->n_tops += event->has_token && event->sample.n_top > 0;
    seen->n_wrong += !is_right(job, event);
}

static void test_each_says_no_more_than_its_own(void **state) {
    (void)state;
    enum { ROUNDS = 12, JOBS = 10 };
    struct client client;
    struct random random = {17};
    struct seen seen = {0};
    start(&client, (struct shape){.sequences = 6, .queue = 12, .rows = 64, .len = 256, .pool = 2});
    client.on_event = look;
    client.context = &seen;
    size_t places = mailbox_room(&client.engine->outbox);
    for (uint32_t round = 0; round < ROUNDS; round++) {
        struct job *jobs[JOBS];
        for (uint32_t i = 0; i < JOBS; i++) {
            jobs[i] = random_job(&random, 120, 60, 1 + i % 2);
            jobs[i]->request.sampling.n_top = (int32_t)random_below(&random, SAMPLE_TOP_MAX + 2) - 1;
            assert_true(client_submit(&client, jobs[i]));
        }
        if (round % 3 == 1) atomic_store(&gate.fail_sync, 10);
        client_run(&client, 0);
        for (uint32_t i = 0; i < JOBS; i++) job_free(jobs[i]);
    }
    assert_int_equal(seen.n_wrong, 0);
    assert_true(seen.n_events > 10 * places); /* each place was used for many */
    assert_true(seen.n_cached > 0 && seen.n_preempted > 0 && seen.n_failed > 0 && seen.n_tops > 0);
    (void)client_settled(&client);
    client_done(&client);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_each_says_no_more_than_its_own)};
    int failed = cmocka_run_group_tests_name("one step at a time", tests, open_model, close_model);
    return failed + cmocka_run_group_tests_name("one step ahead", tests, ahead, close_model);
}
