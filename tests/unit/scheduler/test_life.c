/* Forks and aborts: a choice in each of its states, and what becomes of the others. */
#include "tests/unit/scheduler/fixture.h"

static struct scheduler_request ask_for(struct fixture *f, uint64_t id, uint32_t n_candidates, uint32_t n_prompt, uint32_t max_new) {
    struct scheduler_request request = ask(f, id, 7, n_prompt, max_new);
    request.n_candidates = n_candidates;
    return request;
}

static void test_fork_copies_the_last_block(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){0});
    add(f, ask_for(f, 1, 3, BLOCK_TOKENS + 5, 10));
    plan(f);
    assert_int_equal(f->plan->n_samples, 3);
    assert_int_equal(f->plan->n_entries, 1);
    commit(f);
    assert_memory_equal(f->tokens[1][2], f->tokens[1][0], (BLOCK_TOKENS + 5) * sizeof(int32_t)); /* the prompt was copied, */
    assert_int_equal(f->tokens[1][2][BLOCK_TOKENS + 5], 1002);                                   /* its first token left alone */
    assert_true(scheduler_abort(f->scheduler, 1, 1)); /* between the fork and its copy: that copy must not happen */
    assert_int_equal(live(f), 2);
    plan(f);
    assert_int_equal(f->plan->n_entries, 2);
    assert_int_equal(f->plan->n_copies, 2); /* one a lane */
    const struct plan_entry *parent = entry_of(f, 1, 0), *child = entry_of(f, 1, 2);
    for (uint32_t lane = 0; lane < 2; lane++) {
        const uint32_t *from = f->plan->block_ids + parent->lane_first[lane], *to = f->plan->block_ids + child->lane_first[lane];
        assert_int_equal(from[0], to[0]);
        assert_int_not_equal(from[1], to[1]);
        assert_int_equal(f->plan->copy_source[lane], from[1]);
        assert_int_equal(f->plan->copy_destination[lane], to[1]);
        assert_int_equal(child->lane_tokens[lane], BLOCK_TOKENS + 5);
    }
    assert_int_equal(child->n_tokens, BLOCK_TOKENS + 6);
    commit(f);
    plan(f);
    assert_int_equal(f->plan->n_copies, 0);
    commit(f);
    assert_int_equal(stats_of(f).forks, 1);
    assert_int_equal(stats_of(f).blocks_copied, 2);
    assert_int_equal(stats_of(f).blocks_used, 2 * 3);
    drain(f, 20);
    fixture_free(f);
}

static void test_fork_of_whole_blocks_copies_nothing(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){0});
    add(f, ask_for(f, 1, 2, BLOCK_TOKENS, 10));
    step(f);
    plan(f);
    assert_int_equal(f->plan->n_copies, 0);
    assert_int_equal(f->plan->n_entries, 2);
    commit(f);
    assert_int_equal(stats_of(f).blocks_used, 2 * 3);
    fixture_free(f);
}

/* A choice that is over with its first token is not forked; if it is choice 0, its blocks stay until the others have theirs. */
static void test_over_with_the_first_token(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){0});
    add(f, ask_for(f, 1, 3, BLOCK_TOKENS + 5, 10));
    plan(f);
    bool last[] = {true, true, false};
    commit_ended(f, 1000, last);
    assert_int_equal(live(f), 1);
    assert_false(scheduler_abort(f->scheduler, 1, 0));
    plan(f);
    assert_int_equal(f->plan->n_entries, 1);
    assert_int_equal(f->plan->entries[0].choice, 2);
    assert_int_equal(f->plan->n_copies, 2);
    assert_int_not_equal(f->plan->copy_source[0], f->plan->copy_destination[0]);
    commit(f);
    assert_int_equal(stats_of(f).blocks_used, 4);
    assert_true(scheduler_abort(f->scheduler, 1, 2));
    add(f, ask_for(f, 2, 4, 5, 1)); /* one token each: all over at once */
    step(f);
    drain(f, 1);
    fixture_free(f);
}

static void test_fork_without_a_place_recomputes(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.max_sequences = 1, .prefix_cache = true});
    add(f, ask_for(f, 1, 2, BLOCK_TOKENS + 5, 3));
    step(f);
    step(f);
    assert_int_equal(stats_of(f).forks_recomputed, 1);
    step(f); /* choice 0 is over */
    plan(f);
    assert_int_equal(entry_of(f, 1, 1)->n_tokens, BLOCK_TOKENS + 6);
    assert_int_equal(entry_of(f, 1, 1)->cached_tokens, BLOCK_TOKENS);
    assert_int_equal(entry_of(f, 1, 1)->n_samples, 1);
    assert_int_equal(entry_of(f, 1, 1)->preemptions, 0); /* it never ran before */
    commit(f);
    drain(f, 3);
    assert_int_equal(stats_of(f).preemptions, 0);
    fixture_free(f);
}

static void test_fork_without_blocks_recomputes(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.n_blocks = 4});
    add(f, ask_for(f, 1, 2, BLOCK_TOKENS + 5, 3));
    step(f);
    plan(f);
    assert_int_equal(f->plan->n_entries, 1);
    assert_int_equal(f->plan->n_copies, 0);
    assert_int_equal(stats_of(f).forks_recomputed, 1);
    commit(f);
    drain(f, 8);
    fixture_free(f);
}

/* The fork takes the last block, then an older sequence needs one: the fork gives way in the same plan, and its copy with it. */
static void test_a_fork_preempted_at_once_copies_nothing(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.n_lanes = 1, .n_blocks = 3});
    add(f, ask(f, 1, 1, BLOCK_TOKENS, 60));
    add(f, ask_for(f, 2, 2, 5, 60));
    step(f);
    assert_int_equal(stats_of(f).blocks_used, 2);
    plan(f);
    assert_int_equal(stats_of(f).forks, 1);
    assert_int_equal(stats_of(f).preemptions, 1);
    assert_int_equal(f->plan->n_copies, 0);
    assert_int_equal(f->plan->n_entries, 2);
    commit(f);
    assert_int_equal(stats_of(f).blocks_used, 3);
    assert_int_equal(scheduler_preemptions(f->scheduler, 2, 1), 1);
    drain(f, 600);
    fixture_free(f);
}

static void test_abort_while_waiting(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.max_sequences = 1});
    add(f, ask(f, 1, 1, 5, 3));
    step(f);
    add(f, ask(f, 2, 2, 5, 3));
    assert_int_equal(stats_of(f).waiting, 1);
    assert_true(scheduler_abort(f->scheduler, 2, 0));
    assert_false(scheduler_abort(f->scheduler, 2, 0));
    assert_false(scheduler_abort(f->scheduler, 77, 0));
    assert_false(scheduler_abort(f->scheduler, 1, 1)); /* there is no such choice */
    assert_int_equal(live(f), 1);
    drain(f, 3);
    assert_false(scheduler_abort(f->scheduler, 1, 0));
    fixture_free(f);
}

static void test_abort_while_reading_and_decoding(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.max_rows = 40});
    add(f, ask(f, 1, 1, 70, 5));
    step(f);
    assert_int_equal(stats_of(f).blocks_used, 4);
    assert_true(scheduler_abort(f->scheduler, 1, 0));
    assert_int_equal(stats_of(f).blocks_used, 0);
    assert_int_equal(live(f), 0);
    add(f, ask(f, 2, 2, 30, 5));
    steps(f, 2);
    assert_int_equal(stats_of(f).blocks_used, 2);
    assert_true(scheduler_abort(f->scheduler, 2, 0));
    assert_int_equal(stats_of(f).blocks_used, 0);
    drain(f, 0);
    fixture_free(f);
}

static void test_abort_while_preempted(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.n_lanes = 1, .n_blocks = 3});
    add(f, ask(f, 1, 1, 31, 60));
    add(f, ask(f, 2, 2, 31, 60));
    while (stats_of(f).preemptions == 0) step(f);
    assert_int_equal(stats_of(f).waiting, 1);
    assert_true(scheduler_abort(f->scheduler, 2, 0));
    assert_int_equal(stats_of(f).waiting, 0);
    drain(f, 60);
    fixture_free(f);
}

/* Choice 0 is aborted; the others wait for it to read the prompt, and it does, without a word of its own. `when`: in the queue, half-read, preempted while reading. */
static void test_abort_of_the_reader(void **state) {
    (void)state;
    for (uint32_t when = 0; when < 3; when++) {
        struct fixture *f = fixture_new((struct scheduler_limits){.n_lanes = 1, .n_blocks = 6, .max_rows = 34});
        if (when == 2) {
            add(f, ask(f, 1, 1, 31, 40));
            add(f, ask(f, 3, 3, 31, 40));
            step(f);
        }
        struct scheduler_request request = ask_for(f, 2, 3, 100, 2);
        request.priority = 1;
        add(f, request);
        if (when > 0) step(f);
        while (when == 2 && scheduler_preemptions(f->scheduler, 2, 0) == 0) step(f);
        assert_true(scheduler_abort(f->scheduler, 2, 0));
        assert_false(scheduler_abort(f->scheduler, 2, 0));
        assert_int_equal(live(f), when == 2 ? 4 : 2);
        assert_int_equal(stats_of(f).waiting, 2);
        uint32_t said[3] = {0}, rows = when == 1 ? 34 : 0;
        while (live(f) > 0) {
            plan(f);
            const struct plan_entry *reader = entry_of(f, 2, 0);
            if (reader) {
                assert_int_equal(reader->first_token, rows); /* nothing is read twice, unless it gave its blocks back */
                rows += reader->n_rows;
                if (reader->n_samples) assert_int_equal(reader->n_samples, 3);
            }
            for (uint32_t c = 0; c < 3; c++) said[c] += entry_of(f, 2, c) && entry_of(f, 2, c)->n_samples == 1;
            commit(f);
        }
        assert_int_equal(rows, 100);
        assert_int_equal(said[0], 0);
        assert_int_equal(said[1], 1); /* beside the first token, which choice 0 read */
        assert_int_equal(said[2], 1);
        drain(f, 0);
        fixture_free(f);
    }
}

/* All choices go, in any order, at any moment: nothing is left. */
static void test_abort_of_all(void **state) {
    (void)state;
    static const uint32_t orders[6][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};
    for (uint32_t order = 0; order < 6; order++)
        for (uint32_t n_steps = 0; n_steps < 5; n_steps++) { /* waiting; reading; forking; running */
            struct fixture *f = fixture_new((struct scheduler_limits){.max_rows = 40});
            add(f, ask_for(f, 1, 3, 70, 5));
            steps(f, n_steps);
            for (uint32_t i = 0; i < 3; i++) {
                assert_int_equal(live(f), 3 - i);
                assert_true(scheduler_abort(f->scheduler, 1, orders[order][i]));
                scheduler_check(f->scheduler);
            }
            assert_int_equal(live(f), 0);
            assert_int_equal(stats_of(f).blocks_used, 0);
            drain(f, 0);
            fixture_free(f);
        }
}

/* Choice 0 goes between its first token and the forks. */
static void test_abort_of_the_forked_from(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){0});
    add(f, ask_for(f, 1, 3, 37, 5));
    step(f);
    assert_true(scheduler_abort(f->scheduler, 1, 0));
    assert_false(scheduler_abort(f->scheduler, 1, 0));
    assert_int_equal(live(f), 2);
    plan(f);
    assert_null(entry_of(f, 1, 0));
    assert_int_equal(f->plan->n_entries, 2);
    assert_int_equal(f->plan->n_copies, 4);
    commit(f);
    assert_int_equal(stats_of(f).blocks_used, 2 * 3); /* what choice 0 held alone is back */
    drain(f, 10);
    fixture_free(f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fork_copies_the_last_block),
        cmocka_unit_test(test_fork_of_whole_blocks_copies_nothing),
        cmocka_unit_test(test_over_with_the_first_token),
        cmocka_unit_test(test_fork_without_a_place_recomputes),
        cmocka_unit_test(test_fork_without_blocks_recomputes),
        cmocka_unit_test(test_a_fork_preempted_at_once_copies_nothing),
        cmocka_unit_test(test_abort_while_waiting),
        cmocka_unit_test(test_abort_while_reading_and_decoding),
        cmocka_unit_test(test_abort_while_preempted),
        cmocka_unit_test(test_abort_of_the_reader),
        cmocka_unit_test(test_abort_of_all),
        cmocka_unit_test(test_abort_of_the_forked_from),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
