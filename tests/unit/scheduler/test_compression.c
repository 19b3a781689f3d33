/* Compression's side of the scheduler: where sequences stop, which blocks a compaction may write, what comes free, and that a replay stops at the same places. */
#include "tests/unit/scheduler/fixture.h"

static struct scheduler_due due;

static bool next_due(struct fixture *f) { return scheduler_next_due(f->scheduler, &due); }

/* Until somebody is due, within 300 steps. */
static void until_due(struct fixture *f) {
    for (uint32_t i = 0; i < 300; i++) {
        if (next_due(f)) return;
        step(f);
    }
    fail_msg("nobody is due");
}

/* Every lane keeps its first `first` slots and evicts from there so many that `keep` are left. */
static const struct scheduler_lane_move *compact(struct fixture *f, uint32_t keep, uint32_t first) {
    uint32_t n_keep[8], first_evicted[8];
    for (uint32_t lane = 0; lane < f->limits.n_lanes; lane++) {
        n_keep[lane] = keep;
        first_evicted[lane] = first;
    }
    return scheduler_compact(f->scheduler, &due, n_keep, first_evicted);
}

static void compact_to(struct fixture *f, uint32_t keep) {
    (void)compact(f, keep, 0);
    scheduler_compacted(f->scheduler, &due);
    scheduler_check(f->scheduler);
}

static bool may_owner(void *context, void *owner) { return owner == context; }

static bool may_all(void *context, void *owner) {
    (void)context;
    (void)owner;
    return true;
}

/* Due under pressure: nothing was reserved for its copies at admission. */
static void press_owner(struct fixture *f, void *owner) { assert_true(scheduler_press(f->scheduler, may_owner, owner)); }

static struct scheduler_request ask_owned(struct fixture *f, uint64_t id, int32_t token, uint32_t n_prompt, uint32_t max_new, void *owner) {
    struct scheduler_request request = ask(f, id, token, n_prompt, max_new);
    request.owner = owner;
    return request;
}

static struct scheduler_request ask_compressed(struct fixture *f, uint64_t id, int32_t token, uint32_t n_prompt, uint32_t max_new) {
    struct scheduler_request request = ask(f, id, token, n_prompt, max_new);
    request.points.prompt_end = true;
    return request;
}

static void test_points(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){0});
    struct scheduler_request request = ask(f, 1, 1, 100, 30);
    request.points = (struct scheduler_points){.reading = 40, .prompt_end = true, .growing = 7};
    add(f, request);
    uint32_t expected[] = {40, 80, 100, 107, 114, 121, 128}, n = 0, last = 0;
    while (live(f) > 0) {
        while (next_due(f)) {
            assert_int_equal(due.n_computed, expected[n++]);
            assert_int_equal(due.request_id, 1);
            assert_int_equal(due.choice, 0);
            assert_int_equal(due.n_prompt, 100);
            assert_false(due.pressure);
            assert_int_equal(due.lane_tokens[1], due.n_computed);
            scheduler_kept(f->scheduler, &due);
        }
        plan(f);
        last = f->plan->entries[0].first_token + f->plan->entries[0].n_rows;
        if (n < 7) assert_true(last <= expected[n]);
        commit(f);
    }
    assert_int_equal(n, 7);
    assert_int_equal(stats_of(f).compactions, 0);
    fixture_free(f);

    f = fixture_new((struct scheduler_limits){0}); /* a multiple of `reading` at the prompt's end is not a point of it */
    request = ask(f, 1, 1, 80, 3);
    request.points.reading = 40;
    add(f, request);
    step(f);
    assert_true(next_due(f));
    scheduler_kept(f->scheduler, &due);
    step(f);
    assert_false(next_due(f));
    fixture_free(f);
}

/* While a step is under way it is known who will be due after it, but for those whom it ends by a stop token. */
static void test_who_will_be_due(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.prefix_cache = true});
    struct scheduler_due listed[4];
    struct scheduler_request growing = ask(f, 2, 2, 30, 13), endless = ask(f, 4, 4, 30, 100);
    growing.points.growing = endless.points.growing = 4;
    add(f, ask_compressed(f, 1, 1, 20, 5));
    add(f, growing);
    add(f, ask_compressed(f, 3, 3, 25, 0)); /* ends with its prompt, whatever is due */
    add(f, endless);
    assert_int_equal(scheduler_list_due(f->scheduler, listed, 4), 0);
    plan(f); /* all four prompts */
    assert_int_equal(f->plan->n_entries, 4);
    assert_int_equal(scheduler_list_due(f->scheduler, listed, 4), 2);
    assert_int_equal(listed[0].request_id, 1);
    assert_int_equal(listed[0].n_computed, 20);
    assert_int_equal(listed[0].lane_tokens[1], 20); /* the rows under way are counted */
    assert_int_equal(listed[1].request_id, 3);
    assert_int_equal(scheduler_list_due(f->scheduler, listed, 1), 1);
    assert_true(f->plan->advanced);
    commit(f);
    assert_int_equal(scheduler_list_due(f->scheduler, listed, 4), 1);
    assert_int_equal(listed[0].request_id, 1);
    assert_true(next_due(f));
    assert_true(due.owner == listed[0].owner && due.request_id == 1 && due.choice == listed[0].choice && due.n_computed == 20 && due.n_prompt == 20);
    assert_true(due.lane_tokens == listed[0].lane_tokens && due.lane_first == listed[0].lane_first && due.block_ids == listed[0].block_ids);
    assert_false(due.pressure || listed[0].pressure);
    compact_to(f, 10);
    steps(f, 3);
    plan(f); /* requests 2 and 4 will have 34 tokens, 1 ends by its length */
    assert_int_equal(scheduler_list_due(f->scheduler, listed, 4), 2);
    assert_int_equal(listed[0].request_id, 2);
    assert_int_equal(listed[1].request_id, 4);
    assert_null(scheduler_plan_ahead(f->scheduler));
    bool last[64] = {false};
    for (uint32_t i = 0; i < f->plan->n_entries; i++) last[i] = f->plan->entries[i].request_id == 4;
    commit_ended(f, 1000, last);
    assert_int_equal(live(f), 1);
    assert_int_equal(scheduler_list_due(f->scheduler, listed, 4), 1);
    assert_int_equal(listed[0].request_id, 2);
    assert_true(next_due(f));
    compact_to(f, 16);
    steps(f, 3);
    plan(f);
    assert_int_equal(scheduler_list_due(f->scheduler, listed, 4), 1);
    commit(f);
    assert_true(next_due(f)); /* nothing that was listed is lost by being listed */
    compact_to(f, 16);
    steps(f, 3);
    plan(f); /* its last, at a point */
    assert_int_equal(scheduler_list_due(f->scheduler, listed, 4), 0);
    commit(f);
    assert_int_equal(live(f), 0);
    fixture_free(f);
}

/* Who is due and not dealt with has no row, the others have. */
static void test_a_due_sequence_waits(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){0});
    add(f, ask_compressed(f, 1, 1, 20, 5));
    add(f, ask(f, 2, 2, 20, 5));
    step(f);
    plan(f);
    assert_int_equal(f->plan->n_entries, 1);
    assert_non_null(entry_of(f, 2, 0));
    commit(f);
    assert_true(next_due(f));
    compact_to(f, 10);
    plan(f);
    assert_int_equal(entry_of(f, 1, 0)->first_token, 20); /* positions go on, lanes are shorter */
    assert_int_equal(entry_of(f, 1, 0)->lane_tokens[0], 10);
    commit(f);
    assert_false(next_due(f));
    fixture_free(f);
}

static void test_compaction_in_place(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){0});
    add(f, ask_compressed(f, 1, 1, 100, 5));
    until_due(f);
    uint32_t n_keep[] = {40, 100}, first[] = {10, 100}, ids[2][4];
    for (uint32_t lane = 0; lane < 2; lane++) memcpy(ids[lane], due.block_ids + due.lane_first[lane], sizeof ids[lane]);
    const struct scheduler_lane_move *moves = scheduler_compact(f->scheduler, &due, n_keep, first);
    assert_true(moves[0].moves);
    assert_int_equal(moves[0].n_keep, 40);
    assert_memory_equal(moves[0].source, ids[0], sizeof ids[0]);
    assert_memory_equal(moves[0].destination, ids[0], 2 * sizeof ids[0][0]);
    assert_false(moves[1].moves);
    assert_int_equal(stats_of(f).blocks_used, 8); /* nothing is given back before the moves are carried out */
    scheduler_compacted(f->scheduler, &due);
    assert_int_equal(stats_of(f).blocks_used, 6);
    assert_int_equal(stats_of(f).blocks_freed, 2);
    assert_int_equal(stats_of(f).compactions, 1);
    assert_int_equal(stats_of(f).compaction_copies + stats_of(f).prefix_steals, 0);
    plan(f);
    const struct plan_entry *entry = entry_of(f, 1, 0);
    assert_int_equal(entry->lane_tokens[0], 40);
    assert_int_equal(entry->lane_tokens[1], 100);
    assert_memory_equal(f->plan->block_ids + entry->lane_first[1], ids[1], sizeof ids[1]);
    commit(f);
    drain(f, 5);
    fixture_free(f);
}

/* A block that only the cache holds beside this sequence leaves it, with all runs that follow; blocks before the first evicted slot stay. */
static void test_compaction_steals_from_the_cache(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.prefix_cache = true});
    add(f, ask_compressed(f, 1, 1, 100, 5));
    until_due(f);
    const struct scheduler_lane_move *moves = compact(f, 70, 40);
    assert_memory_equal(moves[0].destination, moves[0].source, 3 * sizeof *moves[0].source);
    scheduler_compacted(f->scheduler, &due);
    scheduler_check(f->scheduler);
    assert_int_equal(stats_of(f).prefix_steals, 2);
    assert_int_equal(stats_of(f).compaction_copies, 0);
    assert_int_equal(stats_of(f).blocks_used, 6);
    add(f, ask(f, 2, 1, 100, 5));
    plan(f);
    assert_int_equal(entry_of(f, 2, 0)->cached_tokens, BLOCK_TOKENS);
    commit(f);
    drain(f, 8); /* what was computed after an eviction does not join the cache */
    assert_int_equal(stats_of(f).blocks_cached, 2 * 3);
    fixture_free(f);
}

/* Two that share three runs: what another sequence reads is never written, what is only cut is not copied. */
static void test_compaction_copies_what_is_shared(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.prefix_cache = true, .n_lanes = 1});
    add(f, ask(f, 1, 1, 100, 50));
    step(f);
    add(f, ask_compressed(f, 2, 1, 100, 50));
    until_due(f);
    assert_int_equal(due.request_id, 2);
    uint32_t shared[3];
    memcpy(shared, due.block_ids + due.lane_first[0], sizeof shared);
    const struct scheduler_lane_move *moves = compact(f, 70, 40);
    assert_true(moves[0].moves);
    assert_int_equal(moves[0].destination[0], shared[0]); /* before the first evicted slot: still shared */
    for (uint32_t b = 1; b < 3; b++)
        for (uint32_t other = 0; other < 4; other++) assert_int_not_equal(moves[0].destination[b], moves[0].source[other]);
    scheduler_compacted(f->scheduler, &due);
    scheduler_check(f->scheduler);
    assert_int_equal(stats_of(f).compaction_copies, 2);
    assert_int_equal(stats_of(f).prefix_steals, 0);
    assert_int_equal(stats_of(f).blocks_used, 4 + 2);
    plan(f);
    assert_memory_equal(f->plan->block_ids + entry_of(f, 1, 0)->lane_first[0], shared, sizeof shared);
    assert_int_equal(f->plan->block_ids[entry_of(f, 2, 0)->lane_first[0]], shared[0]);
    commit(f);
    drain(f, 60);
    fixture_free(f);
}

/* Only the end is cut. A block of which a part is kept takes the next row: it is not left shared. */
static void test_cut_at_the_end(void **state) {
    (void)state;
    for (uint32_t keep = 40; keep <= 64; keep += 24) {
        struct fixture *f = fixture_new((struct scheduler_limits){.prefix_cache = true, .n_lanes = 1});
        add(f, ask(f, 1, 1, 100, 50));
        step(f);
        add(f, ask_compressed(f, 2, 1, 100, 50));
        until_due(f);
        const struct scheduler_lane_move *moves = compact(f, keep, keep);
        assert_true(moves[0].moves);
        assert_int_equal(moves[0].destination[0], moves[0].source[0]);
        assert_int_equal(moves[0].destination[1] == moves[0].source[1], keep == 64);
        scheduler_compacted(f->scheduler, &due);
        scheduler_check(f->scheduler);
        assert_int_equal(stats_of(f).compaction_copies, keep == 40);
        assert_int_equal(stats_of(f).blocks_used, keep == 40 ? 5 : 4); /* 1's four, of which 2 shares what it has not copied */
        drain(f, 60);
        fixture_free(f);
    }
}

/* What is kept must not depend on how full the pool is: without blocks to copy to the sequence is preempted, and comes again. */
static void test_compaction_gives_way_without_blocks(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.prefix_cache = true, .n_lanes = 1, .n_blocks = 5});
    add(f, ask(f, 1, 1, 97, 20));
    step(f);
    int owner;
    add(f, ask_owned(f, 2, 1, 97, 20, &owner));
    step(f);
    press_owner(f, &owner);
    assert_true(next_due(f));
    assert_int_equal(stats_of(f).blocks_used, 5);
    assert_null(compact(f, 40, 10));
    assert_int_equal(stats_of(f).preemptions, 1);
    assert_int_equal(stats_of(f).compactions, 0);
    assert_int_equal(stats_of(f).blocks_used, 4);
    scheduler_check(f->scheduler);
    while (stats_of(f).compactions == 0) { /* it comes again, until the other one is over and there is room */
        until_due(f);
        if (compact(f, 40, 10)) scheduler_compacted(f->scheduler, &due);
    }
    drain(f, 60);
    fixture_free(f);
}

static void test_whole_blocks_drop(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){0});
    struct scheduler_request request = ask_compressed(f, 1, 1, 140, 5);
    request.private = true;
    add(f, request);
    until_due(f);
    uint32_t ids[5], first[] = {1, 0}, count[] = {2, 0};
    memcpy(ids, due.block_ids + due.lane_first[0], sizeof ids);
    scheduler_dropped(f->scheduler, &due, first, count);
    assert_int_equal(stats_of(f).compaction_drops, 2);
    assert_int_equal(stats_of(f).blocks_used, 8);
    plan(f);
    const struct plan_entry *entry = entry_of(f, 1, 0);
    const uint32_t *now = f->plan->block_ids + entry->lane_first[0];
    assert_int_equal(entry->lane_tokens[0], 140 - 2 * BLOCK_TOKENS);
    assert_int_equal(entry->lane_tokens[1], 140);
    assert_true(now[0] == ids[0] && now[1] == ids[3] && now[2] == ids[4]);
    commit(f);
    drain(f, 5);
    fixture_free(f);
}

/* Whoever has copied a table hears of lanes that were cut, in the middle of a block too, and of blocks that left or were replaced; not of a point at which nothing was evicted. */
static void test_table_changes(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.prefix_cache = true});
    add(f, ask(f, 1, 1, 100, 400)); /* shares its blocks with those that follow */
    step(f);
    uint32_t first[] = {1, 0}, count[] = {1, 0}, n;
    const uint32_t *source, *destination;
    for (uint32_t way = 0; way < 5; way++) {
        struct scheduler_request request = ask(f, 2 + way, 1, 100, 60);
        request.points.growing = 20;
        add(f, request);
        until_due(f);
        assert_int_equal(due.n_computed, 120);
        scheduler_kept(f->scheduler, &due);
        plan(f);
        uint32_t table = entry_of(f, 2 + way, 0)->table, changes = entry_of(f, 2 + way, 0)->table_changes;
        commit(f);
        until_due(f);
        uint32_t n_keep[] = {140, 140}, evicted[] = {140, 140};
        switch (way) {
        case 0: scheduler_kept(f->scheduler, &due); break;
        case 1:
        case 2:
            if (way == 1)
                n_keep[1] = evicted[1] = 139; /* one slot of one lane */
            else
                n_keep[0] = 40, evicted[0] = 10;
            assert_non_null(scheduler_compact(f->scheduler, &due, n_keep, evicted));
            scheduler_compacted(f->scheduler, &due);
            break;
        case 3: scheduler_dropped(f->scheduler, &due, first, count); break;
        default:
            assert_true(scheduler_own_first(f->scheduler, &due, 1, &n, &source, &destination));
            assert_int_equal(n, 2);
            scheduler_kept(f->scheduler, &due);
        }
        plan(f);
        assert_int_equal(entry_of(f, 2 + way, 0)->table, table);
        assert_int_equal(entry_of(f, 2 + way, 0)->table_changes == changes, way == 0);
        commit(f);
        assert_true(scheduler_abort(f->scheduler, 2 + way, 0));
    }
    assert_true(scheduler_abort(f->scheduler, 1, 0));
    fixture_free(f);
}

static void test_own_first(void **state) {
    (void)state;
    uint32_t n, first[] = {1, 1}, count[] = {1, 1};
    const uint32_t *source, *destination;
    struct fixture *f = fixture_new((struct scheduler_limits){.prefix_cache = true});
    add(f, ask(f, 1, 1, 100, 50));
    step(f);
    add(f, ask_compressed(f, 2, 1, 100, 5));
    until_due(f);
    uint32_t shared[] = {due.block_ids[due.lane_first[0]], due.block_ids[due.lane_first[1]]};
    assert_true(scheduler_own_first(f->scheduler, &due, 1, &n, &source, &destination));
    assert_int_equal(n, 2);
    for (uint32_t lane = 0; lane < 2; lane++) {
        assert_int_equal(source[lane], shared[lane]);
        assert_int_equal(destination[lane], due.block_ids[due.lane_first[lane]]);
        assert_int_not_equal(destination[lane], shared[lane]);
    }
    scheduler_dropped(f->scheduler, &due, first, count);
    scheduler_check(f->scheduler);
    plan(f);
    assert_int_equal(f->plan->block_ids[entry_of(f, 1, 0)->lane_first[0]], shared[0]);
    commit(f);
    drain(f, 60);
    fixture_free(f);

    f = fixture_new((struct scheduler_limits){.prefix_cache = true}); /* what only the cache holds beside it is taken, not copied */
    add(f, ask_compressed(f, 2, 1, 100, 5));
    until_due(f);
    assert_true(scheduler_own_first(f->scheduler, &due, 1, &n, &source, &destination));
    assert_int_equal(n, 0);
    assert_int_equal(stats_of(f).prefix_steals, 3);
    scheduler_kept(f->scheduler, &due);
    drain(f, 10);
    fixture_free(f);
}

/* Without blocks a victim gives way: another sequence, or this one, never the oldest; and the plan that follows admits nobody. */
static void test_own_first_without_blocks(void **state) {
    (void)state;
    for (uint64_t older = 0; older < 2; older++) {
        uint32_t n;
        const uint32_t *source, *destination;
        struct fixture *f = fixture_new((struct scheduler_limits){.prefix_cache = true, .n_lanes = 1, .n_blocks = 6});
        add(f, ask(f, 2, 1, 97, 20));
        step(f);
        int owner;
        add(f, ask_owned(f, older ? 1 : 3, 1, 97, 20, &owner));
        step(f);
        press_owner(f, &owner);
        add(f, ask(f, older ? 4 : 1, 9, 5, 20)); /* takes the last block */
        if (!older) {
            step(f); /* the youngest is due: it gives way itself */
            assert_true(next_due(f));
            assert_int_equal(due.request_id, 3);
            assert_false(scheduler_own_first(f->scheduler, &due, 1, &n, &source, &destination));
            assert_int_equal(scheduler_preemptions(f->scheduler, 3, 0), 1);
            assert_false(next_due(f));
            plan(f);
            assert_null(entry_of(f, 3, 0)); /* there would be room for it */
            assert_int_equal(f->plan->n_entries, 2);
            commit(f);
            plan(f);
            assert_non_null(entry_of(f, 3, 0));
            commit(f);
        } else {
            step(f);
            assert_true(next_due(f));
            assert_int_equal(due.request_id, 1);
            assert_true(scheduler_own_first(f->scheduler, &due, 1, &n, &source, &destination));
            assert_int_equal(n, 1);
            assert_int_equal(scheduler_preemptions(f->scheduler, 1, 0), 0);
            assert_int_equal(scheduler_preemptions(f->scheduler, 4, 0), 1);
            scheduler_kept(f->scheduler, &due);
        }
        scheduler_check(f->scheduler);
        while (live(f) > 0) {
            if (next_due(f))
                scheduler_kept(f->scheduler, &due);
            else
                step(f);
        }
        fixture_free(f);
    }
}

/* The reader is aborted, its forks have their first tokens, and it gives way before they have their tables: they read the prompt themselves, and nobody's first token is drawn twice. */
static void test_a_reader_that_gives_way_leaves_its_forks(void **state) {
    (void)state;
    uint32_t n;
    const uint32_t *source, *destination;
    struct fixture *f = fixture_new((struct scheduler_limits){.prefix_cache = true, .n_lanes = 1, .n_blocks = 5});
    add(f, ask(f, 1, 1, 97, 20));
    step(f);
    int owner;
    struct scheduler_request request = ask_owned(f, 2, 1, 97, 4, &owner);
    request.n_candidates = 3;
    add(f, request);
    plan(f);
    assert_int_equal(entry_of(f, 2, 0)->n_samples, 3);
    commit(f);
    press_owner(f, &owner);
    assert_int_equal(stats_of(f).blocks_used, 5);
    assert_true(scheduler_abort(f->scheduler, 2, 0));
    assert_true(next_due(f));
    assert_int_equal(due.request_id, 2);
    assert_false(scheduler_own_first(f->scheduler, &due, 1, &n, &source, &destination));
    scheduler_check(f->scheduler);
    assert_int_equal(stats_of(f).waiting, 2);
    assert_int_equal(stats_of(f).forks_recomputed, 2);
    uint32_t said[3] = {0};
    while (live(f) > 0) {
        while (next_due(f)) scheduler_kept(f->scheduler, &due);
        plan(f);
        for (uint32_t c = 0; c < 3; c++) said[c] += entry_of(f, 2, c) ? entry_of(f, 2, c)->n_samples : 0;
        commit(f);
    }
    assert_int_equal(said[0], 0);
    assert_int_equal(said[1], 3);
    assert_int_equal(said[2], 3);
    fixture_free(f);
}

/* Choice 0 is compressed once, before the others are forked from it. */
static void test_compressed_before_the_forks(void **state) {
    (void)state;
    for (uint32_t aborted = 0; aborted < 2; aborted++) {
        struct fixture *f = fixture_new((struct scheduler_limits){0});
        struct scheduler_request request = ask_compressed(f, 1, 1, 100, 5);
        request.n_candidates = 3;
        add(f, request);
        step(f);
        if (aborted) assert_true(scheduler_abort(f->scheduler, 1, 0));
        assert_true(next_due(f));
        compact_to(f, 40);
        assert_false(next_due(f));
        plan(f);
        assert_int_equal(f->plan->n_entries, 3 - aborted);
        for (uint32_t c = 1; c < 3; c++) assert_int_equal(entry_of(f, 1, c)->lane_tokens[0], 40);
        for (uint32_t c = 1; c < 3; c++) assert_int_equal(entry_of(f, 1, c)->first_token, 100);
        assert_int_equal(f->plan->n_copies, 4);
        commit(f);
        assert_false(next_due(f));
        assert_int_equal(stats_of(f).compactions, 1);
        drain(f, 5);
        fixture_free(f);
    }
}

/* One that is preempted stops at the same places as before, compresses there again, and then goes on. */
static void test_replay(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.n_lanes = 1, .n_blocks = 6});
    add(f, ask(f, 1, 1, 90, 80));
    struct scheduler_request request = ask(f, 2, 2, 50, 60);
    request.points = (struct scheduler_points){.reading = 20, .prompt_end = true, .growing = 10};
    add(f, request);
    uint32_t points[64], n_points = 0, replays = 0, next = 0;
    while (live(f) > 0) {
        while (next_due(f)) {
            bool replay = n_points > 0 && next < n_points;
            if (replay) assert_int_equal(due.n_computed, points[next]);
            if (!replay) points[n_points++] = due.n_computed;
            replays += replay;
            next++;
            compact_to(f, due.lane_tokens[0] < 24 ? due.lane_tokens[0] : 24);
        }
        uint32_t before = scheduler_preemptions(f->scheduler, 2, 0);
        plan(f);
        if (scheduler_preemptions(f->scheduler, 2, 0) > before) next = 0;
        commit(f);
        if (scheduler_preemptions(f->scheduler, 2, 0) == 0 && stats_of(f).steps == 40) { /* blocks run short for the sake of the test */
            for (uint64_t id = 5; id < 8; id++) {
                struct scheduler_request urgent = ask(f, id, (int32_t)id, 25, 30);
                urgent.priority = -1;
                urgent.arrival_ns = 1;
                add(f, urgent);
            }
        }
    }
    assert_int_equal(n_points, 8); /* 20 40 50 60 .. 100; at 110 it is over */
    assert_int_equal(points[2], 50);
    assert_int_equal(points[7], 100);
    assert_true(replays > 0);
    assert_int_equal(stats_of(f).replays, replays);
    fixture_free(f);
}

/* Where it was pressed it stops again. */
static void test_pressure(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){0});
    int owners[4];
    for (uint64_t id = 1; id <= 2; id++) {
        struct scheduler_request request = ask(f, id, (int32_t)id, 40, 60);
        request.owner = &owners[id];
        add(f, request);
    }
    assert_false(scheduler_press(f->scheduler, may_all, NULL)); /* nobody has read its prompt */
    step(f);
    assert_false(scheduler_press(f->scheduler, may_owner, &owners[0]));
    assert_true(scheduler_press(f->scheduler, may_all, NULL));
    assert_true(scheduler_press(f->scheduler, may_all, NULL)); /* the other one: who is due already is not asked again */
    assert_false(scheduler_press(f->scheduler, may_all, NULL));
    for (uint64_t id = 1; id <= 2; id++) {
        assert_true(next_due(f));
        assert_int_equal(due.request_id, id);
        assert_true(due.pressure);
        assert_int_equal(due.n_computed, 40);
        compact_to(f, 10);
    }
    assert_false(next_due(f));
    assert_false(scheduler_press(f->scheduler, may_all, NULL)); /* nothing was computed since */
    step(f);
    assert_true(scheduler_press(f->scheduler, may_owner, &owners[1]));
    assert_true(next_due(f));
    assert_int_equal(due.request_id, 1);
    scheduler_kept(f->scheduler, &due); /* nothing to evict: still its turn is over */
    step(f);
    assert_true(scheduler_press(f->scheduler, may_all, NULL));
    assert_true(next_due(f));
    assert_int_equal(due.request_id, 2); /* longest ago */
    compact_to(f, 10);
    assert_int_equal(stats_of(f).pressure_compactions, 3);
    uint32_t more = 0;
    for (; more < 30; more++) { /* each is pressed sixteen times at most */
        step(f);
        if (!scheduler_press(f->scheduler, may_owner, &owners[1])) break;
        assert_true(next_due(f));
        compact_to(f, 10);
    }
    assert_int_equal(more, 14);
    fixture_free(f);
}

static void test_pressure_is_replayed(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.n_lanes = 1, .n_blocks = 4, .prefix_cache = true});
    add(f, ask(f, 1, 1, 31, 90));
    add(f, ask(f, 2, 2, 20, 40));
    steps(f, 4); /* 23 rows of 2 are computed */
    assert_true(scheduler_press(f->scheduler, may_all, NULL));
    assert_true(next_due(f)); /* 1 is pressed, then 2 */
    compact_to(f, 30);
    assert_true(scheduler_press(f->scheduler, may_all, NULL));
    assert_true(next_due(f));
    assert_int_equal(due.request_id, 2);
    uint32_t at = due.n_computed;
    compact_to(f, 20);
    add(f, ask(f, 0, 0, 31, 90)); /* older than all: 2 will have to give way */
    while (scheduler_preemptions(f->scheduler, 2, 0) == 0) step(f);
    uint64_t before = stats_of(f).replays;
    for (until_due(f); due.request_id != 2; until_due(f)) compact_to(f, 30); /* 1 may have given way too */
    assert_int_equal(due.n_computed, at);
    assert_true(due.pressure);
    compact_to(f, 20);
    assert_true(stats_of(f).replays > before);
    fixture_free(f);
}

/* A bound on what a lane holds bounds what admission asks for. */
static void test_admission_by_bounded_peak(void **state) {
    (void)state;
    static const struct {
        uint32_t reading, peak, blocks; /* blocks: so many must be left for it */
    } cases[] = {
        {0, 0, 7},    /* no bound: 200 tokens and one */
        {0, 40, 7},   /* the whole prompt is read before it is compressed */
        {32, 40, 4},  /* 40 + 32 + one block for lanes that differ */
        {32, 300, 7}, /* a bound that does not bind */
    };
    for (uint32_t i = 0; i < 4; i++)
        for (uint32_t short_by = 0; short_by < 2; short_by++) {
            struct fixture *f = fixture_new((struct scheduler_limits){.n_lanes = 1, .n_blocks = 10 + cases[i].blocks - short_by});
            add(f, ask(f, 1, 1, 9 * BLOCK_TOKENS + 1, 20));
            step(f);
            struct scheduler_request request = ask_compressed(f, 2, 2, 200, 5);
            request.points.reading = cases[i].reading;
            request.peak_tokens = cases[i].peak;
            add(f, request);
            plan(f);
            assert_int_equal(entry_of(f, 2, 0) != NULL, short_by == 0);
            commit(f);
            fixture_free(f);
        }
}

/* One whose lanes are bounded goes on for longer than max_model_len. */
static void test_a_bounded_sequence_outgrows_the_context(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.n_lanes = 1, .n_blocks = 4});
    assert_int_equal(f->limits.max_model_len, 4 * BLOCK_TOKENS);
    struct scheduler_request request = ask(f, 1, 1, 20, 400);
    request.private = true;
    request.points = (struct scheduler_points){.prompt_end = true, .growing = 16};
    request.peak_tokens = 64;
    add(f, request);
    uint32_t most = 0;
    while (live(f) > 0) {
        while (next_due(f)) compact_to(f, due.lane_tokens[0] < 32 ? due.lane_tokens[0] : 32);
        step(f);
        if (stats_of(f).blocks_used > most) most = stats_of(f).blocks_used;
    }
    assert_int_equal(stats_of(f).steps, 400);
    assert_int_equal(most, 2);
    fixture_free(f);
}

/* The cache holds a prompt up to a point exactly: the row before the point is computed, so that the plan has something to run. */
static void test_a_hit_ends_before_a_point(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.prefix_cache = true});
    add(f, ask(f, 1, 1, 100, 1));
    step(f);
    struct scheduler_request request = ask(f, 2, 1, 100, 5);
    request.points.reading = 2 * BLOCK_TOKENS;
    add(f, request);
    plan(f);
    assert_int_equal(f->plan->n_entries, 1);
    assert_int_equal(f->plan->entries[0].first_token, BLOCK_TOKENS);
    assert_int_equal(f->plan->entries[0].n_rows, BLOCK_TOKENS);
    commit(f);
    assert_true(next_due(f));
    scheduler_kept(f->scheduler, &due);
    drain(f, 8);
    fixture_free(f);
}

/* Blocks that come free by compression admit the next one in the same step. */
static void test_freed_blocks_admit(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.n_lanes = 1, .n_blocks = 8});
    add(f, ask_compressed(f, 1, 1, 200, 5));
    add(f, ask(f, 2, 2, 90, 5));
    step(f);
    assert_int_equal(stats_of(f).waiting, 1);
    assert_true(next_due(f));
    compact_to(f, 50);
    plan(f);
    assert_non_null(entry_of(f, 2, 0));
    commit(f);
    assert_int_equal(stats_of(f).admissions_by_compression, 1);
    assert_int_equal(stats_of(f).blocks_freed, 5);
    add(f, ask(f, 3, 3, 10, 5));
    step(f); /* this one fits without */
    assert_int_equal(stats_of(f).admissions_by_compression, 1);
    drain(f, 10);
    fixture_free(f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_points),
        cmocka_unit_test(test_who_will_be_due),
        cmocka_unit_test(test_a_due_sequence_waits),
        cmocka_unit_test(test_compaction_in_place),
        cmocka_unit_test(test_compaction_steals_from_the_cache),
        cmocka_unit_test(test_compaction_copies_what_is_shared),
        cmocka_unit_test(test_cut_at_the_end),
        cmocka_unit_test(test_compaction_gives_way_without_blocks),
        cmocka_unit_test(test_whole_blocks_drop),
        cmocka_unit_test(test_table_changes),
        cmocka_unit_test(test_own_first),
        cmocka_unit_test(test_own_first_without_blocks),
        cmocka_unit_test(test_a_reader_that_gives_way_leaves_its_forks),
        cmocka_unit_test(test_compressed_before_the_forks),
        cmocka_unit_test(test_replay),
        cmocka_unit_test(test_pressure),
        cmocka_unit_test(test_pressure_is_replayed),
        cmocka_unit_test(test_admission_by_bounded_peak),
        cmocka_unit_test(test_a_bounded_sequence_outgrows_the_context),
        cmocka_unit_test(test_a_hit_ends_before_a_point),
        cmocka_unit_test(test_freed_blocks_admit),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
