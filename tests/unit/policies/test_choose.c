/* Choosing against slow, obvious oracles: full sorts, lists of candidates. Every property over many random cases; the seed of a failing case is printed. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/check.h"
#include "base/random.h"
#include "policies/choose.h"
#include "tests/support/array_backend.h"
#include "tests/support/choosing.h"

#define LANES_MAX 24
#define SLOTS_MAX 400
#ifdef KVASIR_SANITIZED
#define BLOCK_CASES 2000
#else
#define BLOCK_CASES 20000
#endif

struct scenario {
    struct policy_options options;
    struct choose_request request;
    struct choose_lane lanes[LANES_MAX];
    struct array_lane arrays[LANES_MAX];
    uint32_t n_lanes, group;
    int32_t positions[LANES_MAX][SLOTS_MAX];
    float raw[LANES_MAX][SLOTS_MAX * 4];
    float norms[LANES_MAX][SLOTS_MAX];
    uint32_t lists[LANES_MAX * SLOTS_MAX];
    uint8_t classes[4 * SLOTS_MAX];
    int32_t tokens[4 * SLOTS_MAX];
    void *scratch, *room;
};

static struct scenario *scenario_new(void) {
    struct scenario *s = check_calloc(1, sizeof *s);
    s->scratch = check_calloc(1, choose_scratch_bytes(LANES_MAX));
    s->room = check_calloc(1, choose_room_bytes(SLOTS_MAX, (size_t)LANES_MAX * SLOTS_MAX));
    return s;
}

static void scenario_free(struct scenario *s) {
    free(s->scratch);
    free(s->room);
    free(s);
}

/* The choice, with lists here. */
static void run_choose(struct scenario *s) {
    struct array_backend *array = array_backend_new(s->request.n_layers, s->request.n_kv_heads, s->group, s->arrays);
    s->request.block_ids = array->block_ids;
    s->request.lane_first = array->lane_first;
    s->request.lane_tokens = array->lane_tokens;
    s->request.lists = s->lists;
    s->request.room = s->room;
    s->request.wants_lists = true;
    choose_all(&s->request, &array->backend, RANK_PLACES_MAX - 1, s->lanes, s->scratch);
    for (uint32_t l = 0; l < s->request.n_layers * s->request.n_kv_heads; l++) {
        uint32_t moved = 0;
        while (moved < s->lanes[l].n_keep && s->lanes[l].keep[moved] == moved) moved++;
        assert_int_equal(s->lanes[l].first_moved, moved);
        assert_int_equal(s->lanes[l].n_slots, s->arrays[l].n_slots);
    }
    array_backend_free(array);
}

/* Random geometry, positions with gaps, scores with many ties. */
static void scenario_draw(struct scenario *s, uint64_t seed, const char *policy, bool same_lengths) {
    struct random random = {seed};
    policy_options_default(&s->options);
    s->options.sink_tokens = random_below(&random, 6);
    s->options.recent_tokens = random_below(&random, 20);
    s->options.window = 1 + random_below(&random, 8);
    s->options.pooling = (enum pooling)random_below(&random, 3);
    s->options.pooling_kernel = 1 + 2 * random_below(&random, 4);
    s->options.seed = seed;
    static const uint32_t sizes[] = {4, 8, 16, 32};
    uint32_t layers = 1 + random_below(&random, 6), heads = 1 + random_below(&random, 4), group = 1 + random_below(&random, 3);
    s->n_lanes = layers * heads;
    s->group = group;
    uint32_t longest = 1 + random_below(&random, SLOTS_MAX), last = 2 * longest + 5;
    s->request = (struct choose_request){.policy = policy_find(policy),
                                         .options = &s->options,
                                         .n_layers = layers,
                                         .n_kv_heads = heads,
                                         .block_tokens = sizes[random_below(&random, 4)],
                                         .budget = 1 + random_below(&random, longest + 10),
                                         .n_window = s->options.window,
                                         .last_position = (int32_t)last,
                                         .tokens = s->tokens,
                                         .classes = s->classes};
    for (size_t i = 0; i < sizeof s->classes; i++) {
        s->tokens[i] = (int32_t)i;
        s->classes[i] = (uint8_t)random_below(&random, 3);
    }
    uint32_t levels = random_below(&random, 3) == 0 ? 3 : 1000; /* few distinct scores: ties everywhere */
    for (uint32_t l = 0; l < s->n_lanes; l++) {
        uint32_t n = same_lengths ? longest : 1 + random_below(&random, longest);
        s->arrays[l] = (struct array_lane){.n_slots = n, .positions = s->positions[l], .raw = s->raw[l], .norms = s->norms[l]};
        s->lanes[l] = (struct choose_lane){.n_slots = n};
        uint32_t position = last; /* from the newest down, with gaps */
        for (uint32_t i = n; i-- > 0;) {
            s->positions[l][i] = (int32_t)position;
            uint32_t room = position - i;
            position -= 1 + (room > 1 ? random_below(&random, room > 3 ? 3 : room - 1) : 0);
        }
        for (uint32_t i = 0; i < n * group; i++)
            s->raw[l][i] = 630 * (float)random_below(&random, levels); /* means and sums are exact: ties are ties */
        for (uint32_t i = 0; i < n; i++) s->norms[l][i] = 0.5f + random_unit(random_next(&random));
    }
}

static bool is_protected(const struct scenario *s, int32_t position, uint32_t recent) {
    return position < (int32_t)s->options.sink_tokens || position > s->request.last_position - (int32_t)recent;
}

static uint32_t recents(const struct scenario *s) {
    uint32_t recent = s->options.recent_tokens;
    if (s->request.policy->protects_window && s->request.n_window > recent) recent = s->request.n_window;
    if (s->request.policy->half_recent && s->request.budget / 2 > recent) recent = s->request.budget / 2;
    return recent;
}

static double pooled(const struct scenario *s, const double *in, uint32_t n, uint32_t i) {
    int half = (int)s->options.pooling_kernel / 2;
    if (s->options.pooling == POOLING_NONE || half == 0) return in[i];
    double sum = 0, max = -1e30;
    for (int j = (int)i - half; j <= (int)i + half; j++) {
        double value = j >= 0 && j < (int)n ? in[j] : 0;
        sum += value;
        if (j >= 0 && j < (int)n && value > max) max = value;
    }
    return s->options.pooling == POOLING_MAX ? max : sum / s->options.pooling_kernel;
}

/* The score of the policy's formula, in double. */
static void oracle_scores(const struct scenario *s, uint32_t l, double *score) {
    const struct choose_lane *lane = &s->lanes[l];
    const struct policy *policy = s->request.policy;
    uint32_t n = lane->n_slots, group = s->group;
    double *rows = check_calloc((size_t)n * group, sizeof *rows), *mean = check_calloc(n, sizeof *mean);
    for (uint32_t i = 0; i < n * group; i++) rows[i] = (double)s->raw[l][i];
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t h = 0; h < group; h++) mean[i] += rows[h * n + i];
        mean[i] /= group;
    }
    for (uint32_t i = 0; i < n; i++) {
        if (policy->reduce == REDUCE_MEAN_POOL) score[i] = pooled(s, mean, n, i);
        if (policy->reduce == REDUCE_MEAN) score[i] = mean[i];
        if (policy->reduce == REDUCE_POOL_SUM) {
            score[i] = 0;
            for (uint32_t h = 0; h < group; h++) score[i] += pooled(s, rows + h * n, n, i);
        }
    }
    free(rows);
    free(mean);
}

struct candidate {
    double score;
    uint32_t slot, lane, j;
};

/* Lowest first; of equals the newest first, because the older stays. */
static int by_score(const void *a, const void *b) {
    const struct candidate *x = a, *y = b;
    if (fabs(x->score - y->score) > 1e-5) return x->score < y->score ? -1 : 1;
    return x->slot > y->slot ? -1 : x->slot < y->slot;
}

static int by_cost(const void *a, const void *b) {
    const struct candidate *x = a, *y = b;
    if (fabs(x->score - y->score) > 1e-5) return x->score < y->score ? -1 : 1;
    if (x->j != y->j) return x->j < y->j ? -1 : 1;
    return x->lane < y->lane ? -1 : x->lane > y->lane;
}

static uint32_t evictable_sorted(const struct scenario *s, uint32_t l, const double *score, struct candidate *list) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < s->lanes[l].n_slots; i++)
        if (!is_protected(s, s->positions[l][i], recents(s))) list[n++] = (struct candidate){.score = score[i], .slot = i, .lane = l};
    qsort(list, n, sizeof *list, by_score);
    return n;
}

static void expect_evicted(const struct scenario *s, uint32_t l, const struct candidate *list, uint32_t evict, uint64_t seed) {
    bool gone[SLOTS_MAX] = {false};
    for (uint32_t i = 0; i < evict; i++) gone[list[i].slot] = true;
    uint32_t k = 0;
    for (uint32_t i = 0; i < s->lanes[l].n_slots; i++)
        if (!gone[i]) {
            if (k >= s->lanes[l].n_keep || s->lanes[l].keep[k] != i)
                fail_msg("seed %llu lane %u: slot %u should stay", (unsigned long long)seed, l, i);
            k++;
        }
    assert_int_equal(k, s->lanes[l].n_keep);
}

static void test_uniform_is_the_top_of_a_full_sort(void **state) {
    (void)state;
    static const char *const names[] = {"snapkv", "scissorhands"};
    struct scenario *s = scenario_new();
    uint32_t evicting = 0;
    for (uint64_t seed = 1; seed <= 4000; seed++) {
        scenario_draw(s, seed, names[seed % 2], false);
        run_choose(s);
        uint32_t most = 0, reserved = 0;
        for (uint32_t l = 0; l < s->n_lanes; l++) {
            uint32_t protects = 0;
            for (uint32_t i = 0; i < s->lanes[l].n_slots; i++) protects += is_protected(s, s->positions[l][i], recents(s));
            if (protects > reserved) reserved = protects;
            if (s->lanes[l].n_slots > most) most = s->lanes[l].n_slots;
        }
        for (uint32_t l = 0; l < s->n_lanes; l++) {
            double score[SLOTS_MAX];
            struct candidate list[SLOTS_MAX];
            oracle_scores(s, l, score);
            uint32_t n = evictable_sorted(s, l, score, list), n_protected = s->lanes[l].n_slots - n;
            uint32_t budget = s->request.budget > reserved ? s->request.budget : reserved;
            if (budget < n_protected) budget = n_protected;
            if (most <= s->request.budget) budget = UINT32_MAX;
            uint32_t evict = s->lanes[l].n_slots > budget ? s->lanes[l].n_slots - budget : 0;
            evicting += evict > 0;
            expect_evicted(s, l, list, evict, seed);
        }
    }
    assert_true(evicting > 5000);
    scenario_free(s);
}

/* The published procedure: every (lane, j) with its cost, sorted; the cheapest `wanted` are freed. */
static void test_blocks_are_the_cheapest_of_all_lanes(void **state) {
    (void)state;
    struct scenario *s = scenario_new();
    struct candidate *costs = check_calloc((size_t)LANES_MAX * SLOTS_MAX, sizeof *costs);
    struct candidate(*lists)[SLOTS_MAX] = check_calloc(LANES_MAX, sizeof *lists);
    uint64_t freed_in_all = 0, capped = 0;
    for (uint64_t seed = 1; seed <= BLOCK_CASES; seed++) {
        scenario_draw(s, seed, "kv_compress", false);
        run_choose(s);
        uint32_t size = s->request.block_tokens, n_costs = 0, most = 0;
        uint64_t held = 0, freed = 0;
        for (uint32_t l = 0; l < s->n_lanes; l++) {
            double score[SLOTS_MAX];
            oracle_scores(s, l, score);
            uint32_t n = evictable_sorted(s, l, score, lists[l]), slots = s->lanes[l].n_slots, m = (slots - 1) % size + 1;
            for (uint32_t j = 1; (j - 1) * size + m <= n; j++)
                costs[n_costs++] = (struct candidate){.score = lists[l][(j - 1) * size + m - 1].score, .lane = l, .j = j};
            held += (slots + size - 1) / size;
            freed += (slots + size - 1) / size - (s->lanes[l].n_keep + size - 1) / size;
            if (slots > most) most = slots;
        }
        uint64_t target = (uint64_t)s->request.budget * s->n_lanes / size; /* the budget is an average over the lanes, to the block */
        uint64_t wanted = most > s->request.budget && held > target ? held - target : 0;
        if (wanted > n_costs) {
            wanted = n_costs;
            capped++;
        }
        if (freed != wanted)
            fail_msg("seed %llu: %llu blocks freed, %llu asked for", (unsigned long long)seed, (unsigned long long)freed, (unsigned long long)wanted);
        freed_in_all += freed;
        qsort(costs, n_costs, sizeof *costs, by_cost);
        uint32_t blocks[LANES_MAX] = {0};
        for (uint64_t i = 0; i < wanted; i++) blocks[costs[i].lane]++;
        for (uint32_t l = 0; l < s->n_lanes; l++) {
            uint32_t m = (s->lanes[l].n_slots - 1) % size + 1;
            expect_evicted(s, l, lists[l], blocks[l] ? (blocks[l] - 1) * size + m : 0, seed);
            if (blocks[l]) assert_int_equal(s->lanes[l].n_keep % size, 0);
        }
    }
    assert_true(freed_in_all > 5 * BLOCK_CASES && capped > BLOCK_CASES / 200);
    free(costs);
    free(lists);
    scenario_free(s);
}

static void test_every_policy_keeps_what_is_protected(void **state) {
    (void)state;
    struct scenario *s = scenario_new();
    uint64_t evicted = 0;
    for (uint64_t seed = 1; seed <= 500; seed++)
        for (uint32_t p = 0; p < policy_count(); p++) {
            scenario_draw(s, seed, policies[p]->name, seed % 2 == 0);
            run_choose(s);
            uint32_t longest = 0;
            for (uint32_t l = 0; l < s->n_lanes; l++)
                if (s->lanes[l].n_slots > longest) longest = s->lanes[l].n_slots;
            for (uint32_t l = 0; l < s->n_lanes; l++) {
                const struct choose_lane *lane = &s->lanes[l];
                uint32_t k = 0;
                for (uint32_t i = 0; i < lane->n_slots; i++) {
                    bool kept = k < lane->n_keep && lane->keep[k] == i;
                    k += kept;
                    if (!kept && is_protected(s, s->positions[l][i], s->options.recent_tokens))
                        fail_msg("%s, seed %llu, lane %u: protected slot %u went", policies[p]->name, (unsigned long long)seed, l, i);
                }
                assert_int_equal(k, lane->n_keep); /* ascending, no repeats */
                if (longest <= s->request.budget && policies[p]->budget != BUDGET_LADDER) assert_int_equal(lane->n_keep, lane->n_slots);
                evicted += lane->n_slots - lane->n_keep;
            }
        }
    assert_true(evicted > 100000);
    scenario_free(s);
}

static void test_layer_pool_follows_the_paper(void **state) {
    (void)state;
    struct scenario *s = scenario_new();
    struct candidate *all = check_calloc((size_t)LANES_MAX * SLOTS_MAX, sizeof *all);
    uint32_t uneven = 0;
    for (uint64_t seed = 1; seed <= 2000; seed++) {
        scenario_draw(s, seed, "ada_snapkv", true);
        run_choose(s);
        if (s->lanes[0].n_slots <= s->request.budget) continue;
        uint32_t heads = s->request.n_kv_heads;
        for (uint32_t layer = 0; layer < s->request.n_layers; layer++) {
            uint32_t n_all = 0, reserved = 0;
            for (uint32_t l = 0; l < s->n_lanes; l++) {
                uint32_t n_protected = 0;
                for (uint32_t i = 0; i < s->lanes[l].n_slots; i++) n_protected += is_protected(s, s->positions[l][i], recents(s));
                if (n_protected > reserved) reserved = n_protected;
            }
            for (uint32_t h = 0; h < heads; h++) {
                double score[SLOTS_MAX];
                uint32_t l = layer * heads + h;
                oracle_scores(s, l, score);
                for (uint32_t i = 0; i < s->lanes[l].n_slots; i++)
                    if (!is_protected(s, s->positions[l][i], recents(s))) all[n_all++] = (struct candidate){.score = -score[i], .j = h, .lane = i};
            }
            uint32_t base = s->request.budget > reserved ? s->request.budget - reserved : 0, hits[8] = {0};
            if (n_all <= heads * base) continue;
            qsort(all, n_all, sizeof *all, by_cost); /* best first; ties: lower head, older slot */
            for (uint32_t i = 0; i < heads * base; i++) hits[all[i].j]++;
            for (uint32_t h = 0; h < heads; h++) {
                uint32_t l = layer * heads + h, n_protected = 0;
                for (uint32_t i = 0; i < s->lanes[l].n_slots; i++) n_protected += is_protected(s, s->positions[l][i], recents(s));
                uint32_t expected = (uint32_t)nearbyint((1 - s->options.floor) * hits[h] + s->options.floor * base) + n_protected;
                if (expected > s->lanes[l].n_slots) expected = s->lanes[l].n_slots;
                if (s->lanes[l].n_keep != expected)
                    fail_msg("seed %llu lane %u: keeps %u, the paper %u", (unsigned long long)seed, l, s->lanes[l].n_keep, expected);
                uneven += h > 0 && s->lanes[l].n_keep != s->lanes[l - 1].n_keep;
            }
        }
    }
    assert_true(uneven > 500);
    free(all);
    scenario_free(s);
}

static void test_ramp_falls_and_keeps_the_average(void **state) {
    (void)state;
    struct scenario *s = scenario_new();
    uint32_t ramps = 0;
    for (uint64_t seed = 1; seed <= 2000; seed++) {
        scenario_draw(s, seed, "pyramidkv", true);
        s->options.recent_tokens = s->options.sink_tokens = 0;
        for (uint32_t l = 0; l < s->n_lanes; l++) /* the same tokens everywhere, no gaps: the same number is protected */
            for (uint32_t i = 0; i < s->lanes[l].n_slots; i++) s->positions[l][i] = s->request.last_position - (int32_t)(s->lanes[l].n_slots - 1 - i);
        run_choose(s);
        uint32_t layers = s->request.n_layers, heads = s->request.n_kv_heads, n = s->lanes[0].n_slots;
        if (layers < 2 || n <= s->request.budget) continue;
        uint64_t sum = 0;
        for (uint32_t l = 0; l < s->n_lanes; l++) {
            sum += s->lanes[l].n_keep;
            if (l >= heads) assert_true(s->lanes[l].n_keep <= s->lanes[l - heads].n_keep);
        }
        double average = (double)sum / s->n_lanes;
        if (s->request.budget <= s->options.window + s->options.ramp) continue;
        if (average > s->request.budget || average < s->request.budget - 1.0)
            fail_msg("seed %llu: average %.1f for a budget of %u", (unsigned long long)seed, average, s->request.budget);
        ramps += s->lanes[0].n_keep > s->lanes[s->n_lanes - 1].n_keep;
    }
    assert_true(ramps > 100);
    scenario_free(s);
}

static void test_streaming_drops_whole_blocks(void **state) {
    (void)state;
    struct scenario *s = scenario_new();
    uint32_t dropped = 0;
    for (uint64_t seed = 1; seed <= 2000; seed++) {
        scenario_draw(s, seed, "streaming_llm", true);
        run_choose(s);
        uint32_t size = s->request.block_tokens;
        for (uint32_t l = 0; l < s->n_lanes; l++) {
            const struct choose_lane *lane = &s->lanes[l];
            uint32_t gone = lane->n_slots - lane->n_keep, pinned = 0;
            assert_int_equal(gone % size, 0);
            while (pinned < lane->n_keep && lane->keep[pinned] == pinned) pinned++;
            if (gone == 0) continue;
            dropped++;
            assert_int_equal(pinned % size, 0);
            for (uint32_t k = pinned; k < lane->n_keep; k++) assert_int_equal(lane->keep[k], k + gone);
        }
    }
    assert_true(dropped > 1000);
    scenario_free(s);
}

static void test_ladder(void **state) {
    (void)state;
    struct scenario *s = scenario_new();
    uint32_t shorter = 0, lanes = 0;
    for (uint64_t seed = 1; seed <= 1000; seed++) {
        scenario_draw(s, seed, "fastgen", false);
        uint32_t group = s->group;
        for (uint32_t l = 0; l < s->n_lanes; l++) /* attention: each head's row sums to the number of rows */
            for (uint32_t h = 0; h < group; h++) {
                float sum = 0, *row = s->raw[l] + h * s->lanes[l].n_slots;
                for (uint32_t i = 0; i < s->lanes[l].n_slots; i++) sum += row[i] += 0.001f;
                for (uint32_t i = 0; i < s->lanes[l].n_slots; i++) row[i] *= (float)s->request.n_window / sum;
            }
        s->request.budget = SLOTS_MAX;
        s->options.recovery = seed % 3 == 0 ? 1 : 0.5 + 0.4 * random_unit(random_mix(seed));
        run_choose(s);
        for (uint32_t l = 0; l < s->n_lanes; l++) {
            const struct choose_lane *lane = &s->lanes[l];
            double kept = 0;
            for (uint32_t k = 0; k < lane->n_keep; k++)
                for (uint32_t h = 0; h < group; h++) kept += (double)s->raw[l][h * lane->n_slots + lane->keep[k]] / group / s->request.n_window;
            if (s->options.recovery >= 1) assert_int_equal(lane->n_keep, lane->n_slots);
            if (lane->n_keep < lane->n_slots) assert_true(kept >= s->options.recovery - 1e-4);
            shorter += lane->n_keep < lane->n_slots;
            lanes++;
        }
    }
    assert_true(shorter > lanes / 10);
    scenario_free(s);
}

static void test_nan_is_lowest_and_older_stays_on_a_tie(void **state) {
    (void)state;
    struct scenario *s = scenario_new();
    scenario_draw(s, 7, "keydiff", true);
    s->options.sink_tokens = s->options.recent_tokens = 0;
    s->request.n_layers = s->request.n_kv_heads = 1;
    s->request.last_position = 10;
    s->request.budget = 3;
    s->arrays[0].n_slots = 6;
    static const float raw[] = {1, NAN, 2, 1, 1, 3};
    for (int i = 0; i < 6; i++) {
        s->raw[0][i] = raw[i];
        s->positions[0][i] = i;
    }
    run_choose(s);
    assert_int_equal(s->lanes[0].n_keep, 3);
    assert_int_equal(s->lanes[0].keep[0], 0);
    assert_int_equal(s->lanes[0].keep[1], 2);
    assert_int_equal(s->lanes[0].keep[2], 5);
    scenario_free(s);
}

static void test_hits(void **state) {
    (void)state;
    uint32_t keep[] = {0, 2};
    struct choose_lane lane = {.n_slots = 3, .keep = keep, .n_keep = 2};
    float persistence[] = {1, 2, 3, 0, 1, 1};
    double kept = 0, all = 0;
    choose_hits(&lane, persistence, 2, &kept, &all);
    assert_true(kept == 5 && all == 8);
}

static void test_table(void **state) {
    (void)state;
    char names[512] = "";
    for (uint32_t i = 0; i < policy_count(); i++) {
        assert_ptr_equal(policy_find(policies[i]->name), policies[i]);
        assert_int_equal(policy_index(policies[i]), i);
        (void)snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", i ? ", " : "", policies[i]->name);
        assert_true(policies[i]->scorer == SCORER_NONE || policies[i]->triggers != 0);
        assert_true((policies[i]->scorer == SCORER_KERNEL) || policies[i]->rows == POLICY_ROWS_NONE);
    }
    assert_string_equal(names, policy_names());
    assert_null(policy_find("snap"));
    struct policy_target ratio = {.keep_ratio = 0.25}, tokens = {.budget_tokens = 7};
    assert_int_equal(policy_target_tokens(&ratio, 5), 2);
    assert_int_equal(policy_target_tokens(&ratio, 0), 1);
    assert_int_equal(policy_target_tokens(&tokens, 100), 7);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_table),
        cmocka_unit_test(test_uniform_is_the_top_of_a_full_sort),
        cmocka_unit_test(test_blocks_are_the_cheapest_of_all_lanes),
        cmocka_unit_test(test_layer_pool_follows_the_paper),
        cmocka_unit_test(test_ramp_falls_and_keeps_the_average),
        cmocka_unit_test(test_streaming_drops_whole_blocks),
        cmocka_unit_test(test_ladder),
        cmocka_unit_test(test_every_policy_keeps_what_is_protected),
        cmocka_unit_test(test_nan_is_lowest_and_older_stays_on_a_tie),
        cmocka_unit_test(test_hits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
