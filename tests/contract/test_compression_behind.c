/* Choices that begin behind a step in flight are those that are made between steps: on the mock, whose slots know whose they are, and where there is a device on `cuda`, there with KV of kivi4 too.
 *
 * KVASIR_TEST_SHORT=1: few requests on `cuda`. */
#include "tests/contract/compression_expect.h"

/* On the host device each request takes seconds. */
static uint32_t behind_requests(bool is_short, struct run_request *asked) {
    static const char *const some[] = {"kv_compress", "ada_snapkv", "h2o", "streaming_llm"};
    uint32_t n = 0;
    if (!is_short) {
        for (uint32_t p = 0; p < policy_count(); p++) n += cut_requests(policies[p]->name, n, asked + n);
        return n;
    }
    for (size_t p = 0; p < sizeof some / sizeof *some; p++) {
        (void)cut_requests(some[p], n, asked + n);
        asked[n].n_prompt = 100;
        asked[n].temperature = 2; /* or the tiny model repeats itself, and stops too early */
        asked[n++].n_new = 35;
    }
    return n;
}

/* All of them at once, into `second`. */
static void run_behind(const char *backend, const struct run_request *asked, uint32_t n, struct engine_stats *stats) {
    const struct run_setting setting = {.backend = backend, .threads = 1, .max_rows = 80, .max_sequences = 24};
    struct client client;
    struct config config;
    memset(&second, 0, sizeof second);
    run_open(&client, &setting, &config, &second);
    run_all(&client, &config, asked, n, &second);
    *stats = client_settled(&client);
    client_done(&client);
    assert_int_equal(stats->preemptions, 0);
}

/* Choices that begin behind a step in flight, several at a time, keep what they keep between steps, one sequence after another. The mock's slots know whose they are, and when they are written. */
static void check_behind(const char *backend, uint32_t places, bool is_short) {
    static struct run_request asked[RUN_JOBS_MAX];
    static uint64_t moves[RUN_MOVES_MAX];
    uint32_t n = behind_requests(is_short, asked), n_moves;
    struct run_setting setting = {.backend = backend, .threads = 1, .max_rows = 512, .max_sequences = 1, .in_turn = true};
    run_alone(&setting, asked, n, &first);
    n_moves = n_run_moves;
    memcpy(moves, run_moves, n_moves * sizeof *moves);
    qsort(moves, n_moves, sizeof *moves, by_hash);
    struct engine_stats stats;
    run_places_max = places;
    run_behind(backend, asked, n, &stats);
    expect_same(backend, asked, n, &first, &second);
    if (stats.compressions_behind <= n / 2) fail_msg("%s, %u places: %lu choices began behind a step", backend, places, stats.compressions_behind);
    assert_int_equal(n_run_moves, n_moves);
    qsort(run_moves, n_moves, sizeof *run_moves, by_hash);
    assert_memory_equal(run_moves, moves, n_moves * sizeof *moves);
    run_unseen = true; /* and with nobody who waits for the lists */
    run_behind(backend, asked, n, &stats);
    run_unseen = false;
    run_places_max = RANK_PLACES_MAX;
    expect_same(backend, asked, n, &first, &second);
    assert_true(stats.compressions_behind > n / 2);
}

/* The step that brings a sequence to a point draws its stop token: what was begun for it is dropped, whoever comes after it has its place. */
static void check_stops_behind(const char *backend, bool is_short) {
    static struct run_request asked[RUN_JOBS_MAX];
    const uint32_t n = behind_requests(is_short, asked);
    uint32_t n_stops = 0;
    struct run_setting setting = {.backend = backend, .threads = 1, .max_rows = 80, .max_sequences = 24};
    (void)run_together(&setting, asked, n, &first);
    for (uint32_t i = 0; i < n; i++) {
        const struct run_answer *answer = &first.of[asked[i].number][0];
        struct kv_plan plan = run_plan(&setting, &asked[i]);
        const uint32_t point = compression_points(&plan).growing; /* n_computed of that step is n_prompt + point */
        if (point == 0 || point >= answer->n_tokens) continue;
        asked[i].stops = true;
        asked[i].stop = answer->tokens[point];
        for (uint32_t t = 0; t < point; t++) asked[i].stops = asked[i].stops && answer->tokens[t] != asked[i].stop;
        n_stops += asked[i].stops;
    }
    assert_true(n_stops > n / 4);
    struct engine_stats stats;
    run_unseen = true;
    run_behind(backend, asked, n, &stats);
    run_unseen = false;
    for (uint32_t i = 0; i < n; i++) {
        struct run_answer *whole = &first.of[asked[i].number][0];
        for (uint32_t t = 0; asked[i].stops && t < whole->n_tokens; t++)
            if (whole->tokens[t] == asked[i].stop) whole->n_tokens = t + 1;
        expect_answer(asked[i].policy, asked[i].number, 0, whole, &second.of[asked[i].number][0]);
    }
    if (stats.choices_dropped < n_stops / 2) fail_msg("%s: %lu choices were dropped, %u sequences stopped", backend, stats.choices_dropped, n_stops);
}

static void test_behind_a_step_the_same_is_chosen(void **state) {
    (void)state;
    static const uint32_t places[] = {RANK_PLACES_MAX, 2, 1};
    const bool is_short = getenv("KVASIR_TEST_SHORT") != NULL;
    run_measured_each = 5; /* what is measured needs the one room for lists, and waits for its turn */
    for (size_t i = 0; i < sizeof places / sizeof *places && !run_kivi4; i++) check_behind("mock", places[i], false);
    for (size_t b = 0; b < n_run_backends; b++)
        if (strcmp(run_backends[b], "cuda") == 0) check_behind("cuda", is_short ? 2 : RANK_PLACES_MAX, is_short);
    run_measured_each = 1;
}

static void test_behind_a_step_that_ends_it(void **state) {
    (void)state;
    const bool is_short = getenv("KVASIR_TEST_SHORT") != NULL;
    run_measured_each = RUN_JOBS_MAX;
    if (!run_kivi4) check_stops_behind("mock", false);
    for (size_t b = 0; b < n_run_backends; b++)
        if (strcmp(run_backends[b], "cuda") == 0) check_stops_behind("cuda", is_short);
    run_measured_each = 1;
}

int main(void) {
    struct error error;
    find_backends();
    if (model_dummy("tiny", 3, &run_model, &error) != STATUS_OK) {
        (void)fprintf(stderr, "%s\n", error.text);
        return 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_behind_a_step_the_same_is_chosen),
        cmocka_unit_test(test_behind_a_step_that_ends_it),
    };
    int failed = cmocka_run_group_tests_name("f16", tests, NULL, NULL);
    run_kivi4 = test_runs_on_name("cuda");
    if (run_kivi4) failed += cmocka_run_group_tests_name("kivi4", tests, NULL, NULL);
    model_close(run_model);
    return failed;
}
