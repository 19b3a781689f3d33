/* The engine's steps with compression: how often it waits for the backend, and what becomes of choices whose step fails. */
#include "tests/support/kv_wish.h"
#include "tests/unit/engine/engine_gate.h"

/* Those who come to a point with one step are chosen for as many at a time as there are places: each time it takes two waits for the backend. */
static void test_those_due_together_wait_together(void **state) {
    (void)state;
    static const uint32_t places[] = {1, 2, 3, RANK_PLACES_MAX};
    enum { DUE = 8 };
    for (size_t p = 0; p < sizeof places / sizeof *places; p++) {
        struct client client;
        struct job *first, *jobs[DUE];
        int32_t prompt[60] = {0};
        gate.rank_places = places[p];
        start(&client, (struct shape){.sequences = DUE, .queue = 20, .rows = 1024, .len = 128, .pool = DUE});
        gate_hold();
        first = job_new(prompt, 4, 1, 1);
        assert_true(client_submit(&client, first));
        gate_wait();
        for (uint32_t i = 0; i < DUE; i++) {
            prompt[0] = (int32_t)i;
            jobs[i] = job_new(prompt, 60, 3, 1);
            jobs[i]->request.kv = kv_wish_granted(NULL, "snapkv", 40, 0);
            assert_true(client_submit(&client, jobs[i]));
        }
        gate_open();
        client_run(&client, 0);
        struct engine_stats stats = client_settled(&client);
        assert_int_equal(stats.reading_steps, 2); /* the prompts in one */
        assert_int_equal(gate.n_ranks, DUE);
        assert_int_equal(gate.n_settles, 2 * ((DUE + places[p] - 1) / places[p]));
        assert_int_equal(stats.compressions_behind, runs_ahead ? places[p] : 0);
        assert_int_equal(stats.choices_dropped, 0);
        for (uint32_t i = 0; i < DUE; i++) {
            assert_int_equal(jobs[i]->choices[0].finish, FINISH_LENGTH);
            assert_true(jobs[i]->request.kv_report.slots_evicted > 0);
            job_free(jobs[i]);
        }
        job_free(first);
        client_done(&client);
    }
    gate.rank_places = 0;
}

/* The step behind which choices were begun fails: its sequences end, what was begun for them is dropped, and what comes later is served. */
static void test_failures_before_a_choice(void **state) {
    (void)state;
    static const char *const policies_taken[] = {"snapkv", "kv_compress", "h2o", "streaming_llm", "ada_snapkv", "tova"};
    enum { JOBS = 6 };
    uint64_t n_dropped = 0;
    for (int when = 1; when <= 24; when++) {
        struct client client;
        struct job *jobs[2 * JOBS];
        int32_t prompt[200];
        start(&client, (struct shape){.sequences = 4, .queue = 40, .rows = 160, .len = 256, .pool = 4});
        for (uint32_t round = 0; round < 2; round++) {
            if (round == 0) gate_hold();
            for (uint32_t i = 0; i < JOBS; i++) {
                for (uint32_t t = 0; t < 200; t++) prompt[t] = (int32_t)((t * (i % 3 + 1)) % 200);
                struct job *job = jobs[round * JOBS + i] = job_new(prompt, 100 + 15 * i, 40, 1 + i % 3);
                job->request.kv = kv_wish_granted(NULL, policies_taken[(i + (uint32_t)when) % JOBS], 70, 0);
                assert_true(client_submit(&client, job));
            }
            if (round == 0) {
                atomic_store(&gate.fail_sync, when);
                gate_open();
            }
            client_run(&client, 0);
        }
        uint32_t n_failed = 0;
        for (uint32_t i = 0; i < 2 * JOBS; i++) {
            for (uint32_t c = 0; c < jobs[i]->request.n_candidates; c++) {
                assert_int_equal(jobs[i]->choices[c].n_terminal, 1);
                n_failed += jobs[i]->choices[c].finish == FINISH_ERROR;
                if (i >= JOBS) assert_int_equal(jobs[i]->choices[c].finish, FINISH_LENGTH);
            }
            job_free(jobs[i]);
        }
        assert_true(n_failed > 0);
        n_dropped += client_settled(&client).choices_dropped;
        scheduler_check(client.engine->scheduler);
        client_done(&client);
    }
    assert_int_equal(n_dropped > 0, runs_ahead);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_those_due_together_wait_together),
        cmocka_unit_test(test_failures_before_a_choice),
    };
    int failed = cmocka_run_group_tests_name("one step at a time", tests, open_model, close_model);
    return failed + cmocka_run_group_tests_name("one step ahead", tests, ahead, close_model);
}
