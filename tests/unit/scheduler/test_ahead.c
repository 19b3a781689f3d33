/* One step ahead: what its plan says, when there is none, and what becomes of a row whose choice has ended meanwhile. */
#include "tests/unit/scheduler/fixture.h"

static const struct plan *ahead(struct fixture *f) { return scheduler_plan_ahead(f->scheduler); }

/* The tokens of the older of two plans, and who is over. */
static void commit_first(struct fixture *f, const struct plan *first, const bool *last) {
    for (uint32_t i = 0; i < first->n_entries; i++) {
        const struct plan_entry *entry = &first->entries[i];
        if (!entry->over) f->tokens[entry->request_id][entry->choice][entry->n_tokens] = 1000;
    }
    scheduler_commit(f->scheduler, last);
    scheduler_check(f->scheduler);
}

static const bool goes_on[16] = {false};

static void test_follows_what_is_not_drawn_yet(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.prefix_cache = true});
    add(f, ask(f, 1, 7, 10, 200));
    add(f, ask(f, 2, 8, BLOCK_TOKENS - 1, 200));
    step(f); /* both prompts */
    plan(f);
    const struct plan *first = f->plan, *second = ahead(f);
    assert_non_null(second);
    assert_int_equal(second->n_entries, 2);
    assert_int_equal(second->n_rows, 2);
    assert_int_equal(second->n_samples, 2);
    assert_int_equal(second->n_copies, 0);
    assert_true(first->advanced && !second->advanced);
    for (uint32_t e = 0; e < 2; e++) {
        const struct plan_entry *before = &first->entries[e], *entry = &second->entries[e];
        assert_int_equal(before->drawn_by, UINT32_MAX);
        assert_int_equal(entry->drawn_by, e);
        assert_int_equal(entry->request_id, before->request_id);
        assert_int_equal(entry->first_token, before->first_token + 1);
        assert_int_equal(entry->n_tokens, before->n_tokens + 1);
        assert_int_equal(entry->n_rows, 1);
        assert_int_equal(entry->n_samples, 1);
        assert_int_equal(entry->table, before->table);
        assert_int_equal(entry->table_changes, before->table_changes);
        for (uint32_t lane = 0; lane < 2; lane++)
            assert_int_equal(entry->lane_tokens[lane], entry->first_token); /* the first plan's row is counted */
        assert_false(entry->first_run);
    }
    assert_int_equal(stats_of(f).blocks_used, 2 + 2 * 2); /* for request 2's row at BLOCK_TOKENS */
    assert_int_equal(stats_of(f).steps, 1);
    for (uint32_t i = 0; i < 100; i++) { /* one step after the other ahead, across blocks */
        commit_first(f, first, goes_on);
        first = second;
        second = ahead(f);
        assert_int_equal(second->entries[0].first_token, 12 + i);
        assert_int_equal(second->entries[1].drawn_by, 1);
    }
    commit_first(f, first, goes_on);
    f->plan = second;
    commit(f);
    assert_int_equal(stats_of(f).steps, 1 + 102);
    assert_int_equal(stats_of(f).blocks_used, 2 * (112 / BLOCK_TOKENS + 1) + 2 * (133 / BLOCK_TOKENS + 1));
    drain(f, 200);
    assert_int_equal(stats_of(f).blocks_cached, 2 * (208 / BLOCK_TOKENS + 229 / BLOCK_TOKENS)); /* all full runs of what was computed */
    fixture_free(f);
}

/* Whoever is over with the first plan has a row in the second: it counts for nothing, and his blocks are back at once. */
static void test_over_with_the_step_before(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.prefix_cache = true});
    for (uint64_t id = 1; id <= 3; id++) add(f, ask(f, id, (int32_t)id, 2 * BLOCK_TOKENS - 2, 100));
    step(f);
    plan(f);
    const struct plan *first = f->plan, *second = ahead(f);
    assert_int_equal(second->n_entries, 3);
    commit_first(f, first, (const bool[]){false, true, false});
    assert_int_equal(stats_of(f).running, 2);
    assert_int_equal(stats_of(f).blocks_used, 2 * 2 * 2);
    assert_int_equal(stats_of(f).blocks_cached, 2); /* of the one that is over its only full run, not the block that the row is in */
    assert_true(!second->entries[0].over && second->entries[1].over && !second->entries[2].over);
    const struct plan *third = ahead(f); /* goes on without it */
    assert_int_equal(third->n_entries, 2);
    assert_int_equal(third->entries[0].drawn_by, 0);
    assert_int_equal(third->entries[1].drawn_by, 2);
    assert_int_equal(third->entries[1].request_id, 3);
    commit_first(f, second, (const bool[]){false, true, true}); /* of the middle one nothing is looked at; the last one ends */
    assert_true(!third->entries[0].over && third->entries[1].over);
    assert_int_equal(stats_of(f).running, 1);
    add(f, ask(f, 4, 4, 5, 3));
    assert_null(ahead(f)); /* somebody waits, and a place came free */
    f->plan = third;
    commit_first(f, third, goes_on);
    plan(f);
    assert_int_equal(f->plan->n_entries, 2);
    commit(f);
    drain(f, 200);
    fixture_free(f);
}

/* All of a request's choices over while its row is ahead: the request goes, its id may be asked for again. */
static void test_the_request_is_gone(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){0});
    add(f, ask(f, 1, 7, 10, 100));
    step(f);
    plan(f);
    const struct plan *first = f->plan, *second = ahead(f);
    commit_first(f, first, (const bool[]){true});
    assert_int_equal(live(f), 0);
    assert_int_equal(stats_of(f).blocks_used, 0);
    assert_true(second->entries[0].over);
    assert_false(scheduler_abort(f->scheduler, 1, 0)); /* may be asked at any time */
    assert_null(ahead(f));                             /* nobody is left */
    add(f, ask(f, 1, 7, 10, 2));
    commit_first(f, second, (const bool[]){true});
    assert_int_equal(live(f), 1);
    drain(f, 10);
    fixture_free(f);
}

static void test_ends_by_length(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){0});
    add(f, ask(f, 1, 7, 10, 3));
    add(f, ask(f, 2, 8, 10, 4));
    step(f);
    plan(f);
    const struct plan *first = f->plan, *second = ahead(f), *third;
    assert_int_equal(second->n_entries, 2);
    commit_first(f, first, goes_on);
    third = ahead(f); /* the second plan draws the third and last token of request 1 */
    assert_int_equal(third->n_entries, 1);
    assert_int_equal(third->entries[0].request_id, 2);
    assert_int_equal(third->entries[0].drawn_by, 1);
    commit_first(f, second, goes_on);
    assert_int_equal(live(f), 1);
    assert_null(ahead(f)); /* it would be empty */
    commit_first(f, third, goes_on);
    assert_int_equal(live(f), 0);
    drain(f, 1);
    fixture_free(f);
}

/* The plan that somebody waits behind: if he could be admitted, or it is not known that he cannot, nothing runs ahead. */
static void test_while_somebody_waits(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.max_sequences = 2});
    add(f, ask(f, 1, 7, 10, 5));
    add(f, ask(f, 2, 8, 10, 20));
    step(f);
    plan(f);
    add(f, ask(f, 3, 9, 10, 5));
    assert_null(ahead(f)); /* came after the plan */
    commit(f);
    plan(f); /* which has no place for it */
    const struct plan *first = f->plan, *second = ahead(f);
    assert_non_null(second);
    commit_first(f, first, goes_on);
    first = second, second = ahead(f);
    assert_non_null(second); /* nothing has changed */
    commit_first(f, first, goes_on);
    assert_null(ahead(f)); /* it draws the last token of request 1 */
    commit_first(f, second, goes_on);
    plan(f);
    assert_int_equal(rows_of(f, 3), 10);
    commit(f);
    drain(f, 30);
    fixture_free(f);
}

static void test_not_ahead(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.max_rows = 40});
    struct scheduler_request forks = ask(f, 1, 7, 10, 20), due = ask(f, 2, 8, 20, 20);
    forks.n_candidates = 2;
    add(f, forks);
    plan(f);
    assert_null(ahead(f)); /* a prompt's end */
    assert_false(f->plan->advanced);
    commit(f);
    plan(f);
    assert_int_equal(f->plan->n_copies, 2);
    assert_null(ahead(f)); /* copies */
    commit(f);
    plan(f);
    const struct plan *first = f->plan, *second = ahead(f);
    assert_int_equal(second->n_entries, 2);
    commit_first(f, first, goes_on);
    f->plan = second;
    commit(f);
    due.points.growing = 3;
    add(f, due);
    plan(f);
    assert_null(ahead(f)); /* somebody reads */
    commit(f);
    plan(f);
    first = f->plan; /* 21 tokens of request 2 are computed after it; it is due at 23 */
    for (uint32_t i = 0; i < 2; i++) {
        second = ahead(f);
        assert_non_null(second);
        commit_first(f, first, goes_on);
        first = second;
    }
    assert_null(ahead(f));
    assert_true(first->advanced);
    commit_first(f, first, goes_on);
    struct scheduler_due point;
    assert_true(scheduler_next_due(f->scheduler, &point));
    assert_int_equal(point.n_computed, 23);
    scheduler_kept(f->scheduler, &point);
    assert_true(scheduler_abort(f->scheduler, 2, 0));
    drain(f, 40);
    fixture_free(f);
}

/* Whoever sits out a step for want of a row is not left out of the next one too. */
static void test_somebody_sits_out(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.max_rows = 2});
    struct scheduler_request forks = ask(f, 1, 7, 2, 20);
    forks.n_candidates = 3;
    add(f, forks);
    steps(f, 2); /* the prompt; the forks' copies */
    plan(f);
    assert_int_equal(stats_of(f).running, 3);
    assert_int_equal(f->plan->n_entries, 2);
    assert_null(ahead(f));
    commit(f);
    drain(f, 60);
    fixture_free(f);
}

/* Blocks that are not there are not fought for ahead: the plan that follows preempts. */
static void test_no_blocks(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.n_lanes = 1, .n_blocks = 5});
    add(f, ask(f, 1, 7, 2 * BLOCK_TOKENS - 3, 40));
    add(f, ask(f, 2, 8, 2 * BLOCK_TOKENS - 3, 40));
    step(f);
    for (uint32_t i = 0;; i++) {
        plan(f);
        const struct plan *second = ahead(f);
        if (!second) {
            assert_int_equal(i, 1);
            break;
        }
        commit_first(f, f->plan, goes_on);
        f->plan = second;
        commit(f);
    }
    commit(f);
    assert_int_equal(stats_of(f).preemptions, 0);
    step(f);
    assert_int_equal(stats_of(f).preemptions, 1);
    drain(f, 200);
    fixture_free(f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_follows_what_is_not_drawn_yet),
        cmocka_unit_test(test_over_with_the_step_before),
        cmocka_unit_test(test_the_request_is_gone),
        cmocka_unit_test(test_ends_by_length),
        cmocka_unit_test(test_while_somebody_waits),
        cmocka_unit_test(test_not_ahead),
        cmocka_unit_test(test_somebody_sits_out),
        cmocka_unit_test(test_no_blocks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
