/* Who runs, with how many rows: the scheduler's rules one by one, on loads small enough to work out by hand. What holds for every load is in tests/simulation. */
#include <malloc.h>

#include "tests/unit/scheduler/fixture.h"

static void test_reads_in_chunks_then_decodes(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.max_rows = 40});
    add(f, ask(f, 1, 7, 100, 3));
    uint32_t expected[] = {40, 40, 20, 1, 1}, first = 0;
    for (uint32_t i = 0; i < 5; i++) {
        plan(f);
        assert_int_equal(f->plan->n_entries, 1);
        assert_int_equal(f->plan->entries[0].first_token, first);
        assert_int_equal(f->plan->entries[0].n_rows, expected[i]);
        assert_int_equal(f->plan->entries[0].n_samples, i >= 2);
        assert_int_equal(f->plan->entries[0].first_run, i == 0);
        assert_int_equal(f->plan->entries[0].n_tokens, i < 3 ? 100 : 98 + i);
        first += expected[i];
        commit(f);
    }
    plan(f); /* three tokens were sampled: over */
    assert_int_equal(f->plan->n_entries, 0);
    assert_int_equal(stats_of(f).blocks_used, 0);
    assert_int_equal(stats_of(f).chunks, 2);
    assert_int_equal(stats_of(f).steps, 5);
    fixture_free(f);
}

static void test_ends_at_a_stop_token(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){0});
    struct scheduler_request request = ask(f, 1, 7, 10, 50);
    request.n_candidates = 3;
    add(f, request);
    plan(f);
    bool last[] = {false, true, false};
    commit_ended(f, 5, last); /* sample 1 is choice 1's */
    plan(f);
    assert_null(entry_of(f, 1, 1));
    assert_int_equal(f->plan->n_entries, 2);
    bool zero[] = {true, false};
    commit_ended(f, 5, zero); /* entries are in order of age: choice 0 first */
    plan(f);
    assert_int_equal(f->plan->n_entries, 1);
    assert_non_null(entry_of(f, 1, 2));
    bool all[] = {true};
    commit_ended(f, 5, all);
    assert_int_equal(live(f), 0);
    fixture_free(f);
}

static void test_max_new_zero_samples_nothing(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.max_rows = 20});
    struct scheduler_request request = ask(f, 1, 7, 33, 0);
    request.n_candidates = 3;
    add(f, request);
    step(f);
    assert_int_equal(live(f), 3);
    plan(f);
    assert_int_equal(f->plan->n_rows, 13);
    assert_int_equal(f->plan->n_samples, 0);
    commit(f);
    assert_int_equal(live(f), 0);
    assert_int_equal(stats_of(f).blocks_used, 0);
    fixture_free(f);
}

/* Rows of those who decode come first; chunks share what the budget leaves. Where nobody decodes, nobody is held up. */
static void test_budget(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.cost = {0, 1, 0}, .step_budget_us = 50, .max_rows = 300});
    add(f, ask(f, 1, 1, 10, 20));
    add(f, ask(f, 2, 2, 400, 20));
    plan(f);
    assert_int_equal(rows_of(f, 1), 10);
    assert_int_equal(rows_of(f, 2), 290);
    commit(f);
    add(f, ask(f, 3, 3, 10, 20));
    plan(f);
    assert_int_equal(f->plan->entries[0].request_id, 1);
    assert_int_equal(rows_of(f, 2), 49);
    assert_int_equal(rows_of(f, 3), 0);
    assert_int_equal(stats_of(f).waiting, 1); /* whoever would get no row is not admitted */
    commit(f);
    fixture_free(f);
}

/* What is left would pay for a row at a prompt's begin, but not for one behind a long hit: no admission. */
static void test_budget_counts_the_hit(void **state) {
    (void)state;
    for (uint32_t enough = 0; enough < 2; enough++) {
        struct fixture *f = fixture_new((struct scheduler_limits){.cost = {0, 1, 1}, .step_budget_us = enough ? 310 : 280, .prefix_cache = true});
        add(f, ask(f, 9, 7, 70, 1));
        step(f);
        add(f, ask(f, 1, 1, 1, 20));
        step(f);
        add(f, ask(f, 2, 2, 20, 20)); /* 20 x (1 + 10) */
        add(f, ask(f, 3, 7, 70, 20)); /* 64 of them cached: 1 + 64.5 for a row */
        plan(f);
        assert_int_equal(rows_of(f, 1), 1);
        assert_int_equal(rows_of(f, 2), 20);
        assert_int_equal(rows_of(f, 3), enough);
        commit(f);
        assert_int_equal(stats_of(f).running, 2 + enough);
        fixture_free(f);
    }
}

/* The cost of a chunk counts the context that its own rows add. */
static void test_budget_counts_context(void **state) {
    (void)state;
    const struct step_cost cost = {7, 1, 0.05};
    for (double budget = 100; budget < 1500; budget += 77) {
        struct fixture *f = fixture_new((struct scheduler_limits){.cost = cost, .step_budget_us = budget, .max_rows = 200});
        add(f, ask(f, 1, 1, 100, 20));
        add(f, ask(f, 2, 2, 480, 2));
        step(f);
        plan(f);
        uint32_t context = entry_of(f, 2, 0)->first_token, rows = rows_of(f, 2);
        assert_int_equal(context, 100);
        double decode = 7 + 1 + 0.05 * 100.5, sum = decode + rows * (1 + 0.05 * (context + rows / 2.0)),
               more = decode + (rows + 1) * (1 + 0.05 * (context + (rows + 1) / 2.0));
        if (rows > BLOCK_TOKENS) assert_true(sum <= budget + 1e-9);
        if (f->plan->n_rows < 200) assert_true(more > budget);
        assert_true(rows >= BLOCK_TOKENS);
        commit(f);
        fixture_free(f);
    }
}

/* A stream that decodes, and prompts one after the other beside it. Takes a step, which costs `times` what the model says; returns the rows of a chunk that only the budget bounded. */
static uint32_t costly_step(struct fixture *f, uint64_t reader, double times) {
    plan(f);
    const struct plan_entry *entry = entry_of(f, reader, 0);
    uint32_t rows = entry && entry->first_token + entry->n_rows < entry->n_tokens ? entry->n_rows : 0;
    double us = times * f->plan->n_rows;
    commit(f);
    scheduler_took(f->scheduler, us);
    return rows;
}

static uint32_t read_costly(struct fixture *f, uint64_t reader, double times) {
    uint32_t last = 0;
    add(f, ask(f, reader, (int32_t)reader, 480, 1));
    for (uint32_t rows, n = 0; n == 0 || (rows > 0 && n < 40); n++)
        if ((rows = costly_step(f, reader, times)) > 0) last = rows;
    costly_step(f, reader, times);
    return last;
}

/* Steps that read beside a stream come to take what they may, whatever the model thinks of them. */
static void test_cost_follows_what_steps_take(void **state) {
    (void)state;
    const double machines[] = {2, 1, 0.6, 3};
    struct fixture *f = fixture_new((struct scheduler_limits){.cost = {0, 1, 0}, .step_budget_us = 200});
    add(f, ask(f, 1, 1, 1, 500));
    step(f);
    assert_int_equal(read_costly(f, 2, 1), 199); /* as the model says */
    for (size_t m = 0; m < sizeof machines / sizeof *machines; m++) {
        uint32_t rows = 0;
        for (uint64_t reader = 2; reader < 10; reader++) rows = read_costly(f, reader, machines[m]);
        assert_in_range((uint32_t)(machines[m] * (rows + 1)), 170, 210);
    }
    fixture_free(f);
}

static void test_cost_is_bounded(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.cost = {0, 1, 0}, .step_budget_us = 400});
    add(f, ask(f, 1, 1, 1, 500));
    for (int i = 0; i < 20; i++) { /* nobody reads: what such steps take says nothing of those in which somebody does */
        step(f);
        scheduler_took(f->scheduler, 1e9);
    }
    assert_true(stats_of(f).cost_ratio == 1);
    add(f, ask(f, 2, 2, 480, 1));
    plan(f);
    assert_int_equal(rows_of(f, 2), 399);
    commit(f);
    scheduler_took(f->scheduler, 1e12); /* held up once: half as much again, and soon forgotten */
    assert_true(stats_of(f).cost_ratio == 1.5);
    steps(f, 3);
    for (uint64_t reader = 3; reader < 7; reader++) (void)read_costly(f, reader, 1e9);
    assert_true(stats_of(f).cost_ratio == SCHEDULER_COST_RATIO_MAX);
    assert_int_equal(read_costly(f, 7, 1e9), 400 / 8 - 1);
    for (uint64_t reader = 2; reader < 12; reader++) (void)read_costly(f, reader, 0);
    assert_true(stats_of(f).cost_ratio >= SCHEDULER_COST_RATIO_MIN && stats_of(f).cost_ratio < 1);
    fixture_free(f);
}

/* The oldest reader gets BLOCK_TOKENS rows however dear the step, and nobody else gets any. */
static void test_one_chunk_always(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.cost = {1000, 1, 0}, .step_budget_us = 50, .max_rows = 60});
    add(f, ask(f, 1, 1, 10, 20));
    add(f, ask(f, 2, 2, 200, 20));
    step(f);
    assert_int_equal(stats_of(f).running, 2);
    add(f, ask(f, 3, 3, 200, 20));
    add(f, ask(f, 4, 4, 1, 20));
    plan(f);
    assert_int_equal(rows_of(f, 1), 1);
    assert_int_equal(rows_of(f, 2), BLOCK_TOKENS);
    assert_int_equal(f->plan->n_entries, 2);
    commit(f);
    assert_int_equal(stats_of(f).waiting, 2);
    assert_true(scheduler_abort(f->scheduler, 2, 0));
    assert_true(scheduler_abort(f->scheduler, 3, 0));
    add(f, ask(f, 5, 5, 1, 20));
    plan(f); /* a prompt of one token is a chunk too: one of the two */
    assert_int_equal(f->plan->n_entries, 2);
    assert_int_equal(rows_of(f, 4), 1);
    commit(f);
    fixture_free(f);
}

static void test_priority_and_ageing(void **state) {
    (void)state;
    for (uint32_t late = 0; late < 2; late++) {
        struct fixture *f = fixture_new((struct scheduler_limits){.max_sequences = 1});
        struct scheduler_request low = ask(f, 1, 1, 5, 1), high = ask(f, 2, 2, 5, 1), equal = ask(f, 3, 3, 5, 1);
        low.priority = 2;
        low.arrival_ns = 100 * SECOND;
        high.arrival_ns = equal.arrival_ns = late ? 103 * SECOND : 101 * SECOND; /* a step of priority for every second */
        add(f, low);
        add(f, high);
        add(f, equal);
        f->now_ns = 104 * SECOND;
        uint64_t order[2][3] = {{2, 3, 1}, {1, 2, 3}};
        for (uint32_t i = 0; i < 3; i++) {
            plan(f);
            assert_int_equal(f->plan->n_entries, 1);
            assert_int_equal(f->plan->entries[0].request_id, order[late][i]);
            commit(f);
        }
        fixture_free(f);
    }
}

/* One lane, seven blocks, three that decode: the highest priority number gives way, however old; then the youngest; the oldest never. Who gave way stands first in the queue,
 * and is not admitted by the step that preempts somebody else. */
static void test_preemption(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.n_lanes = 1, .n_blocks = 7});
    struct scheduler_request oldest = ask(f, 1, 1, 64, 100), small = ask(f, 2, 2, 10, 100), big = ask(f, 3, 3, 80, 100);
    oldest.priority = 100;
    small.priority = 9;
    big.priority = 1;
    add(f, oldest);
    add(f, small);
    add(f, big);
    steps(f, 17); /* 3 has filled its third block */
    assert_int_equal(stats_of(f).preemptions, 0);
    assert_int_equal(stats_of(f).blocks_used, 7);
    plan(f);
    assert_int_equal(stats_of(f).preemptions, 1);
    assert_null(entry_of(f, 2, 0));
    assert_int_equal(f->plan->n_entries, 2);
    commit(f);
    assert_int_equal(scheduler_preemptions(f->scheduler, 2, 0), 1);
    assert_int_equal(scheduler_preemptions(f->scheduler, 3, 0), 0);
    assert_int_equal(scheduler_preemptions(f->scheduler, 77, 0), 0);
    struct scheduler_request urgent = ask(f, 4, 4, 1, 1);
    urgent.priority = -1000;
    add(f, urgent); /* would fit, but does not stand first */
    while (stats_of(f).preemptions == 1) {
        plan(f);
        assert_null(entry_of(f, 4, 0));
        if (stats_of(f).preemptions == 1) assert_null(entry_of(f, 2, 0));
        if (stats_of(f).preemptions == 1) commit(f);
    }
    /* 1 needed its fourth block, 3 was the only one to give way: now there is room for 2, but not in this step. */
    assert_int_equal(stats_of(f).preemptions, 2);
    assert_int_equal(f->plan->n_entries, 1);
    assert_int_equal(rows_of(f, 1), 1);
    commit(f);
    plan(f);
    const struct plan_entry *back = entry_of(f, 2, 0);
    assert_non_null(back);
    assert_int_equal(back->n_tokens, 10 + 17); /* it knows all that it had sampled, and reads it again */
    assert_int_equal(back->first_token, 0);
    assert_int_equal(back->n_rows, 27);
    assert_int_equal(back->n_samples, 1);
    assert_int_equal(back->preemptions, 1);
    assert_false(back->first_run);
    assert_int_equal(entry_of(f, 1, 0)->preemptions, 0);
    commit(f);
    drain(f, 400);
    fixture_free(f);
}

static void test_the_youngest_of_equals_gives_way(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.n_lanes = 1, .n_blocks = 6});
    add(f, ask(f, 1, 1, 31, 40));
    add(f, ask(f, 3, 3, 31, 40));
    add(f, ask(f, 2, 2, 31, 40)); /* came in late, but had arrived before */
    while (stats_of(f).preemptions == 0) {
        plan(f);
        if (stats_of(f).preemptions == 0) commit(f);
    }
    assert_non_null(entry_of(f, 1, 0));
    assert_non_null(entry_of(f, 2, 0));
    assert_null(entry_of(f, 3, 0));
    commit(f);
    drain(f, 400);
    fixture_free(f);
}

/* The oldest is still reading when those who decode have taken all blocks, and they will not need more for long: it gets its rows all the same. */
static void test_the_oldest_always_gets_on(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.n_lanes = 1, .n_blocks = 6, .max_rows = 62});
    add(f, ask(f, 2, 2, 31, 100));
    add(f, ask(f, 3, 3, 31, 100));
    step(f);
    struct scheduler_request oldest = ask(f, 1, 1, 4 * BLOCK_TOKENS - 2, 5);
    add(f, oldest);
    uint32_t rows = 0;
    for (uint32_t i = 0; i < 6 && rows < oldest.n_prompt; i++) {
        plan(f);
        assert_non_null(entry_of(f, 1, 0));
        rows = entry_of(f, 1, 0)->first_token + rows_of(f, 1);
        commit(f);
    }
    assert_int_equal(rows, oldest.n_prompt);
    assert_int_equal(scheduler_preemptions(f->scheduler, 1, 0), 0);
    drain(f, 600);
    fixture_free(f);
}

/* 1 reads six blocks and will hold a seventh; of ten, three are left for 2, which will hold three; a watermark of one more makes it wait. */
static void test_admission_by_peak(void **state) {
    (void)state;
    for (uint32_t watermark = 0; watermark < 2; watermark++) {
        for (uint32_t tokens = 2 * BLOCK_TOKENS; tokens <= 3 * BLOCK_TOKENS; tokens += BLOCK_TOKENS) {
            struct fixture *f = fixture_new((struct scheduler_limits){.n_lanes = 1, .n_blocks = 10, .max_rows = 40, .watermark_blocks = watermark});
            add(f, ask(f, 1, 1, 6 * BLOCK_TOKENS, 2));
            add(f, ask(f, 2, 2, tokens, 2));
            bool fits = watermark == 0 && tokens == 2 * BLOCK_TOKENS;
            for (uint32_t i = 0; i < 4; i++) {
                plan(f);
                assert_int_equal(rows_of(f, 1), 40);
                commit(f);
            }
            plan(f); /* the last 32 rows of 1: eight are left over */
            assert_int_equal(rows_of(f, 1), 32);
            assert_int_equal(rows_of(f, 2), fits ? 8 : 0);
            commit(f);
            assert_int_equal(stats_of(f).running, fits ? 2 : 1);
            drain(f, 40);
            fixture_free(f);
        }
    }
}

/* Nobody runs: the watermark keeps nobody waiting. */
static void test_alone_it_is_admitted(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.n_lanes = 1, .n_blocks = 4, .watermark_blocks = 4});
    add(f, ask(f, 1, 1, 4 * BLOCK_TOKENS, 0));
    plan(f);
    assert_int_equal(rows_of(f, 1), 4 * BLOCK_TOKENS);
    commit(f);
    fixture_free(f);
}

static void test_held_admission(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.max_sequences = 1});
    struct scheduler_request request = ask(f, 1, 1, 10, 3);
    request.n_candidates = 2;
    add(f, request);
    step(f);
    scheduler_hold_admission(f->scheduler, true);
    add(f, ask(f, 2, 2, 10, 3));
    for (uint32_t i = 0; i < 8; i++) { /* the fork for which there was no place comes back, new ones do not come */
        plan(f);
        assert_null(entry_of(f, 2, 0));
        commit(f);
    }
    assert_int_equal(stats_of(f).forks_recomputed, 1);
    assert_int_equal(live(f), 1);
    scheduler_hold_admission(f->scheduler, false);
    plan(f);
    assert_non_null(entry_of(f, 2, 0));
    commit(f);
    fixture_free(f);
}

/* Four that decode use up the samples of every step; a prompt that draws four comes to its end beside them, and they to their next tokens. */
static void test_samples_run_out(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.max_samples = 4, .max_sequences = 12});
    for (uint64_t id = 1; id <= 4; id++) add(f, ask(f, id, (int32_t)id, 5, 300));
    step(f);
    struct scheduler_request request = ask(f, 5, 5, 50, 3);
    request.n_candidates = 4;
    add(f, request);
    request = ask(f, 6, 6, 1, 3);
    request.n_candidates = 3;
    add(f, request);
    uint32_t ended = 0, longest[5] = {0};
    for (uint32_t i = 0; i < 20; i++) {
        plan(f);
        for (uint64_t id = 1; id <= 4; id++) longest[id] = entry_of(f, id, 0) ? 0 : longest[id] + 1;
        for (uint64_t id = 1; id <= 4; id++) assert_true(longest[id] <= 8);
        for (uint64_t id = 5; id <= 6; id++) ended += entry_of(f, id, 0) && entry_of(f, id, 0)->n_samples == (id == 5 ? 4 : 3);
        commit(f);
    }
    assert_int_equal(ended, 2);
    fixture_free(f);
}

/* More that decode than rows in a step: they take turns. */
static void test_rows_run_out(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.max_rows = 2});
    struct scheduler_request request = ask(f, 1, 1, 2, 60);
    request.n_candidates = 4;
    add(f, request);
    step(f);
    uint32_t count[4] = {0};
    for (uint32_t i = 0; i < 40; i++) {
        plan(f);
        assert_int_equal(f->plan->n_rows, 2);
        for (uint32_t c = 0; c < 4; c++) count[c] += entry_of(f, 1, c) != NULL;
        commit(f);
    }
    for (uint32_t c = 0; c < 4; c++) assert_true(count[c] >= 10);
    fixture_free(f);
}

static void test_prefix_hits(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.prefix_cache = true});
    add(f, ask(f, 1, 7, 3 * BLOCK_TOKENS, 2 * BLOCK_TOKENS));
    steps(f, 2 * BLOCK_TOKENS);
    assert_int_equal(live(f), 0);
    assert_int_equal(stats_of(f).blocks_used, 0);
    assert_int_equal(stats_of(f).blocks_cached, 2 * 4); /* the prompt's runs and a generated one; the last token was never computed */
    struct scheduler_request same = ask(f, 2, 7, 3 * BLOCK_TOKENS, 1), scoped = ask(f, 3, 7, 3 * BLOCK_TOKENS, 1),
                             needed = ask(f, 4, 7, 3 * BLOCK_TOKENS, 1), nothing = ask(f, 5, 7, 3 * BLOCK_TOKENS, 1),
                             private = ask(f, 7, 7, 3 * BLOCK_TOKENS, 1), continued = ask(f, 6, 7, 4 * BLOCK_TOKENS + 5, 1),
                             other = ask(f, 8, 7, 3 * BLOCK_TOKENS, 1);
    scoped.cache_scope = 1;
    needed.first_needed_row = 2 * BLOCK_TOKENS - 1;
    nothing.first_needed_row = 0;
    private.private = true;
    memcpy(f->tokens[6][0], f->tokens[1][0], LENGTH * sizeof(int32_t));
    f->tokens[8][0][BLOCK_TOKENS + 31] = 8; /* its second run is another one */
    struct scheduler_request all[] = {same, scoped, needed, nothing, continued, private, other};
    uint32_t expected[] = {2, 0, 1, 0, 4, 0, 1}; /* the last token is always computed; generated tokens are found too */
    for (uint32_t i = 0; i < 7; i++) add(f, all[i]);
    plan(f);
    for (uint32_t i = 0; i < 7; i++) {
        assert_int_equal(entry_of(f, all[i].id, 0)->cached_tokens, expected[i] * BLOCK_TOKENS);
        assert_int_equal(entry_of(f, all[i].id, 0)->first_token, expected[i] * BLOCK_TOKENS);
    }
    commit(f);
    assert_int_equal(stats_of(f).prefix_hits, 8 * BLOCK_TOKENS);
    assert_int_equal(stats_of(f).prefix_queries, (3 + 5 * 3 + 4) * BLOCK_TOKENS + 5); /* the private one did not ask */
    assert_int_equal(stats_of(f).prefix_partial_hits, 2);
    scheduler_drop_prefix_cache(f->scheduler);
    assert_int_equal(stats_of(f).blocks_cached, 0);
    fixture_free(f);
}

struct resuming {
    uint32_t n_lanes, refused[4], n_refused, asked;
};

static bool resumes(void *context, const uint32_t *ids) {
    struct resuming *resuming = context;
    resuming->asked++;
    for (uint32_t i = 0; i < resuming->n_refused; i++)
        for (uint32_t lane = 0; lane < resuming->n_lanes; lane++)
            if (ids[lane] == resuming->refused[i]) return false;
    return true;
}

/* Hits end where the backend can go on from its last two blocks; choices of a request that rereads do so too, instead of forking. */
static void test_hits_end_where_rows_can_go_on(void **state) {
    (void)state;
    static const struct {
        uint32_t refused[2], n_refused, hit;
    } cases[] = {{{0}, 0, 4}, {{3}, 1, 3}, {{2}, 1, 2}, {{1}, 1, 4}, {{3, 1}, 2, 1}, {{2, 0}, 2, 0}};
    for (size_t n = 0; n < sizeof cases / sizeof *cases; n++) {
        struct resuming resuming = {.n_lanes = 2};
        struct fixture *f =
            fixture_new((struct scheduler_limits){.prefix_cache = true, .resumes = resumes, .resumes_context = &resuming, .resume_runs = 2});
        add(f, ask(f, 1, 7, 4 * BLOCK_TOKENS + 3, 20));
        plan(f);
        for (uint32_t i = 0; i < cases[n].n_refused; i++)
            resuming.refused[resuming.n_refused++] = f->plan->block_ids[entry_of(f, 1, 0)->lane_first[i] + cases[n].refused[i]];
        commit(f);
        add(f, ask(f, 2, 7, 4 * BLOCK_TOKENS + 9, 1));
        plan(f);
        assert_int_equal(entry_of(f, 2, 0)->cached_tokens, cases[n].hit * BLOCK_TOKENS);
        assert_true(resuming.asked > 0);
        commit(f);
        struct scheduler_request several = ask(f, 3, 9, 2 * BLOCK_TOKENS + 3, 3);
        several.n_candidates = 3;
        several.rereads = true;
        add(f, several);
        steps(f, 2);
        plan(f);
        assert_int_equal(stats_of(f).forks, 0);
        assert_int_equal(stats_of(f).forks_recomputed, 2);
        commit(f);
        drain(f, 40);
        fixture_free(f);
    }
}

/* A hit needs blocks only where nobody holds them: two that begin alike fit where two that do not would not. */
static void test_admission_counts_hits(void **state) {
    (void)state;
    for (int32_t token = 7; token <= 8; token++) {
        struct fixture *f = fixture_new((struct scheduler_limits){.n_lanes = 1, .n_blocks = 8, .prefix_cache = true});
        add(f, ask(f, 1, 7, 4 * BLOCK_TOKENS + 1, 10));
        step(f);
        add(f, ask(f, 2, token, 4 * BLOCK_TOKENS + 1, 10));
        plan(f);
        assert_int_equal(rows_of(f, 2), token == 7 ? 1 : 0);
        commit(f);
        fixture_free(f);
    }
    /* Blocks that the cache alone holds are not there twice: as what is hit, and as what could be evicted. */
    struct fixture *f = fixture_new((struct scheduler_limits){.n_lanes = 1, .n_blocks = 8, .prefix_cache = true});
    add(f, ask(f, 1, 7, 4 * BLOCK_TOKENS + 1, 1));
    step(f);
    add(f, ask(f, 2, 8, 2 * BLOCK_TOKENS + 1, 100));
    step(f);
    assert_int_equal(stats_of(f).blocks_used, 3);
    assert_int_equal(stats_of(f).blocks_cached, 4);
    add(f, ask(f, 3, 7, 5 * BLOCK_TOKENS, 10)); /* six blocks: four are cached, one is free */
    plan(f);
    assert_int_equal(rows_of(f, 3), 0);
    commit(f);
    fixture_free(f);
}

static void test_eviction_before_preemption(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.n_lanes = 1, .n_blocks = 6, .prefix_cache = true});
    add(f, ask(f, 1, 1, 2 * BLOCK_TOKENS, 1));
    step(f);
    assert_int_equal(stats_of(f).blocks_cached, 2);
    add(f, ask(f, 2, 2, BLOCK_TOKENS, 60));
    add(f, ask(f, 3, 3, BLOCK_TOKENS, 60));
    steps(f, 35);
    assert_int_equal(stats_of(f).preemptions, 0);
    assert_int_equal(stats_of(f).prefix_evictions, 2);
    assert_int_equal(stats_of(f).blocks_used, 6);
    drain(f, 200);
    fixture_free(f);
}

/* Rows that somebody needs are computed at a replay too. */
static void test_needed_rows_at_a_replay(void **state) {
    (void)state;
    for (uint32_t needed = 0; needed < 2; needed++) {
        struct fixture *f = fixture_new((struct scheduler_limits){.max_sequences = 1, .prefix_cache = true});
        struct scheduler_request request = ask(f, 1, 7, 2 * BLOCK_TOKENS + 5, 3);
        request.n_candidates = 2;
        request.first_needed_row = needed ? BLOCK_TOKENS : UINT32_MAX;
        add(f, request);
        step(f); /* there is no place for the fork: it recomputes */
        while (!entry_of(f, 1, 1)) {
            plan(f);
            if (!entry_of(f, 1, 1)) commit(f);
        }
        assert_int_equal(entry_of(f, 1, 1)->first_token, needed ? BLOCK_TOKENS : 2 * BLOCK_TOKENS);
        commit(f);
        fixture_free(f);
    }
}

/* Where blocks are short, a chunk takes all rows that there are blocks for. */
static void test_chunks_fill_the_blocks_there_are(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.n_lanes = 1, .n_blocks = 6, .max_rows = 45});
    add(f, ask(f, 1, 1, 31, 100));
    add(f, ask(f, 2, 2, 150, 2));              /* five blocks; 1 will take two */
    uint32_t expected[] = {14, 44, 44, 26, 0}; /* the last ones: 128 rows fill the four blocks that are left */
    for (uint32_t i = 0; i < 5; i++) {
        plan(f);
        assert_int_equal(rows_of(f, 2), expected[i]);
        commit(f);
    }
    fixture_free(f);
}

static void test_queue_is_bounded(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){0});
    struct scheduler_request request = ask(f, 1, 7, 5, 2);
    request.n_candidates = 4;
    for (uint64_t id = 20; id < 28; id++) {
        request.id = id;
        add(f, request);
    }
    request.id = 28;
    request.n_candidates = 1;
    assert_false(scheduler_add(f->scheduler, &request)); /* 8 x 4 of 32 */
    for (uint32_t c = 0; c < 4; c++) assert_true(scheduler_abort(f->scheduler, 20, c));
    add(f, request);
    fixture_free(f);
}

/* While a sequence only grows, its table stays the same to whoever copied it; the next one in the same place is another. */
static void test_table_changes(void **state) {
    (void)state;
    struct fixture *f = fixture_new((struct scheduler_limits){.max_sequences = 2});
    add(f, ask(f, 1, 1, 40, 90));
    add(f, ask(f, 2, 2, 40, 3));
    uint32_t table[3] = {0}, changes[3] = {0};
    for (uint32_t i = 0; i < 90; i++) {
        plan(f);
        for (uint32_t id = 1; id <= 2; id++) {
            const struct plan_entry *entry = entry_of(f, id, 0);
            if (!entry) continue;
            assert_true(entry->table < f->limits.max_sequences && entry->table_changes != 0);
            if (i == 0) table[id] = entry->table, changes[id] = entry->table_changes;
            assert_int_equal(entry->table, table[id]);
            assert_int_equal(entry->table_changes, changes[id]);
        }
        commit(f);
        if (i == 0) assert_int_not_equal(table[1], table[2]);
    }
    assert_int_equal(live(f), 0);
    add(f, ask(f, 3, 3, 40, 3));
    plan(f);
    const struct plan_entry *entry = entry_of(f, 3, 0);
    assert_true(entry->table == table[1] || entry->table == table[2]);
    assert_int_not_equal(entry->table_changes, changes[entry->table == table[1] ? 1 : 2]);
    commit(f);
    drain(f, 5);
    const struct scheduler_limits limits = {.max_model_len = 100};
    assert_int_equal(scheduler_table_blocks(&limits), 5);
    fixture_free(f);
}

static void test_peak_blocks(void **state) {
    (void)state;
    struct scheduler_limits limits = {.n_lanes = 3};
    assert_int_equal(scheduler_peak_blocks(&limits, BLOCK_TOKENS, 0), 3);
    assert_int_equal(scheduler_peak_blocks(&limits, BLOCK_TOKENS, 1), 3); /* the last token is never computed */
    assert_int_equal(scheduler_peak_blocks(&limits, BLOCK_TOKENS, 2), 6);
    assert_int_equal(scheduler_peak_blocks(&limits, UINT32_MAX, UINT32_MAX), 3 * (1ull << 28)); /* no overflow on the way */
}

#ifndef KVASIR_SANITIZED
/* What is said to be allocated is what the allocator has given. Limits that make every array but those of a lane large beside pages and headers. */
static void test_bytes(void **state) {
    (void)state;
    const struct scheduler_limits limits = {.n_lanes = 8,
                                            .n_blocks = 400000,
                                            .extent_blocks = 4,
                                            .max_sequences = 100000,
                                            .max_choices = 100000,
                                            .max_model_len = 64,
                                            .max_rows = 10,
                                            .max_samples = 10,
                                            .n_rings = 100000,
                                            .prefix_cache = true};
    struct mallinfo2 before = mallinfo2();
    struct scheduler *scheduler = scheduler_new(&limits);
    struct mallinfo2 after = mallinfo2();
    uint64_t ids = (uint64_t)limits.max_sequences * limits.n_lanes * (64 / BLOCK_TOKENS + 1) * sizeof(uint32_t); /* not from the allocator */
    uint64_t given = after.uordblks + after.hblkhd - before.uordblks - before.hblkhd + ids, said = scheduler_bytes(&limits);
    assert_true(said <= given && given - said < 32 * 4096);
    scheduler_free(scheduler);
}
#endif

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reads_in_chunks_then_decodes),
        cmocka_unit_test(test_ends_at_a_stop_token),
        cmocka_unit_test(test_max_new_zero_samples_nothing),
        cmocka_unit_test(test_budget),
        cmocka_unit_test(test_budget_counts_context),
        cmocka_unit_test(test_cost_follows_what_steps_take),
        cmocka_unit_test(test_cost_is_bounded),
        cmocka_unit_test(test_budget_counts_the_hit),
        cmocka_unit_test(test_one_chunk_always),
        cmocka_unit_test(test_priority_and_ageing),
        cmocka_unit_test(test_preemption),
        cmocka_unit_test(test_the_youngest_of_equals_gives_way),
        cmocka_unit_test(test_the_oldest_always_gets_on),
        cmocka_unit_test(test_admission_by_peak),
        cmocka_unit_test(test_alone_it_is_admitted),
        cmocka_unit_test(test_held_admission),
        cmocka_unit_test(test_samples_run_out),
        cmocka_unit_test(test_rows_run_out),
        cmocka_unit_test(test_prefix_hits),
        cmocka_unit_test(test_hits_end_where_rows_can_go_on),
        cmocka_unit_test(test_admission_counts_hits),
        cmocka_unit_test(test_eviction_before_preemption),
        cmocka_unit_test(test_needed_rows_at_a_replay),
        cmocka_unit_test(test_chunks_fill_the_blocks_there_are),
        cmocka_unit_test(test_queue_is_bounded),
        cmocka_unit_test(test_table_changes),
        cmocka_unit_test(test_peak_blocks),
#ifndef KVASIR_SANITIZED
        cmocka_unit_test(test_bytes),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
