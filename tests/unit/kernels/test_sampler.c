/* The sampler against an oracle that sorts the whole vocabulary in double and walks it, and its properties one by one: ties, penalties, bans, what is reported,
 * logits that are no numbers, and draws that follow the distribution and nothing but their key. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <float.h>
#include <math.h>

#include "base/check.h"
#include "base/random.h"
#include "kernels/sample.h"

static const struct sampling plain = {.temperature = 1, .top_p = 1, .repetition_penalty = 1, .n_top = -1};

/* Runs it on a copy, in scratch that ends where it must. */
static struct sample_result run(const struct sample *sample, const float *logits, uint32_t n) {
    float *copy = check_calloc(n, sizeof *copy), *scratch = check_calloc(sampler_scratch_floats(n), sizeof *scratch);
    memcpy(copy, logits, n * sizeof *copy);
    struct sample_result result;
    memset(&result, 0x5a, sizeof result);
    sampler_sample(sample, copy, n, scratch, &result);
    free(copy);
    free(scratch);
    return result;
}

static struct sample_result run_plain(const struct sampling *sampling, const float *logits, uint32_t n) {
    return run(&(struct sample){.sampling = sampling, .target = -1}, logits, n);
}

/* ---- the oracle ---- */

struct entry {
    double logit;
    double mass;
    int32_t token;
};

static int descending(const void *a, const void *b) {
    const struct entry *x = a, *y = b;
    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return x->token < y->token ? -1 : 1;
}

static double penalized(const struct sample *sample, int32_t token, double x) {
    const struct sampling *s = sample->sampling;
    uint32_t all = 0, generated = 0;
    for (uint32_t i = 0; i < sample->n_history; i++) {
        all += sample->history[i] == token;
        generated += i >= sample->n_prompt && sample->history[i] == token;
    }
    if (all > 0) x = x > 0 ? x / (double)s->repetition_penalty : x * (double)s->repetition_penalty;
    if (generated > 0) x -= (double)s->presence_penalty + (double)s->frequency_penalty * generated;
    return x;
}

static struct entry *adjusted(const struct sample *sample, const float *logits, uint32_t n) {
    const struct sampling *s = sample->sampling;
    struct entry *entries = check_calloc(n, sizeof *entries);
    for (uint32_t i = 0; i < n; i++) {
        double x = (double)logits[i];
        for (uint32_t b = 0; b < s->n_bias; b++)
            if (s->bias[b].token == (int32_t)i) x += (double)s->bias[b].bias;
        for (uint32_t b = 0; sample->ban && b < s->n_banned; b++)
            if (s->banned[b] == (int32_t)i) x = -INFINITY;
        entries[i] = (struct entry){.logit = penalized(sample, (int32_t)i, x), .token = (int32_t)i};
    }
    qsort(entries, n, sizeof *entries, descending);
    return entries;
}

/* How close a decision may come to its border before rounding may turn it. */
#define MARGIN 2e-6

/* The token drawn; -1: too close to a border to say. */
static int32_t oracle_draw(const struct sample *sample, const float *logits, uint32_t n) {
    const struct sampling *s = sample->sampling;
    struct entry *entries = adjusted(sample, logits, n);
    double total = 0, reached = 0;
    if (s->top_k > 0 && (uint32_t)s->top_k < n) n = (uint32_t)s->top_k;
    for (uint32_t i = 0; i < n; i++) total += entries[i].mass = exp((entries[i].logit - entries[0].logit) / (double)s->temperature);
    bool close = false;
    if (s->top_p < 1) {
        uint32_t kept = 0;
        while (kept < n && reached < (double)s->top_p * total) {
            reached += entries[kept++].mass;
            close |= fabs(reached / total - (double)s->top_p) < MARGIN;
        }
        n = kept;
    }
    uint32_t kept = 0;
    total = 0;
    for (uint32_t i = 0; i < n && entries[i].mass >= (double)s->min_p; i++, kept++) total += entries[i].mass;
    for (uint32_t i = 0; i < n; i++) close |= fabs(entries[i].mass - (double)s->min_p) < MARGIN * (double)s->min_p;
    double u = (double)random_unit(random_at(s->seed, 0, sample->choice, sample->token_index)), below = 0;
    uint32_t at = 0;
    while (at + 1 < kept && below + entries[at].mass <= u * total) below += entries[at++].mass;
    close |= fabs(below / total - u) < MARGIN || fabs((below + entries[at].mass) / total - u) < MARGIN;
    int32_t token = entries[at].token;
    free(entries);
    return close && u > 0 ? -1 : token;
}

static double log_softmax(const float *logits, uint32_t n, int32_t token) {
    double best = -INFINITY, sum = 0;
    for (uint32_t i = 0; i < n; i++) best = fmax(best, (double)logits[i]);
    for (uint32_t i = 0; i < n; i++) sum += exp((double)logits[i] - best);
    return (double)logits[token] - best - log(sum);
}

/* ---- properties ---- */

static void fill(struct random *random, float *logits, uint32_t n, float spread) {
    for (uint32_t i = 0; i < n; i++) {
        float a = random_unit(random_next(random)), b = random_unit(random_next(random));
        logits[i] = spread * (a + b * b * b - 0.5f);
    }
}

static float pick(struct random *random, const float *from, uint32_t n) { return from[random_below(random, n)]; }

static void test_random_cases_match_the_oracle(void **state) {
    (void)state;
    static float logits[5000];
    struct random random = {11};
    uint32_t undecided = 0, cases = 6000;
    for (uint32_t i = 0; i < cases; i++) {
        uint32_t n = i % 20 == 0 ? 5000 : 1 + random_below(&random, 200);
        fill(&random, logits, n, pick(&random, (const float[]){0, 1, 8, 40}, 4));
        struct logit_bias bias[3];
        int32_t banned[2], history[40];
        for (int b = 0; b < 3; b++) bias[b] = (struct logit_bias){(int32_t)random_below(&random, n), 8 * random_unit(random_next(&random)) - 4};
        for (int b = 0; b < 2; b++) banned[b] = (int32_t)random_below(&random, n);
        for (int h = 0; h < 40; h++) history[h] = (int32_t)random_below(&random, n);
        const struct sampling sampling = {
            .temperature = pick(&random, (const float[]){0.1f, 0.7f, 1, 1.7f}, 4),
            .top_p = pick(&random, (const float[]){1, 0.95f, 0.5f, 0.01f}, 4),
            .min_p = pick(&random, (const float[]){0, 0, 0.05f, 0.9f}, 4),
            .top_k = (int32_t)pick(&random, (const float[]){0, 1, 7, 60}, 4),
            .repetition_penalty = pick(&random, (const float[]){1, 1.2f, 0.8f}, 3),
            .presence_penalty = pick(&random, (const float[]){0, 0.5f, -1}, 3),
            .frequency_penalty = pick(&random, (const float[]){0, 0.25f}, 2),
            .seed = random_next(&random),
            .n_top = -1,
            .n_bias = random_below(&random, 4),
            .bias = bias,
            .n_banned = n > 2 ? 2 : 0,
            .banned = banned,
        };
        const struct sample sample = {.sampling = &sampling,
                                      .choice = random_below(&random, 4),
                                      .token_index = i,
                                      .ban = random_below(&random, 2),
                                      .target = -1,
                                      .history = history,
                                      .n_prompt = 20,
                                      .n_history = random_below(&random, 41)};
        int32_t expected = oracle_draw(&sample, logits, n);
        struct sample_result result = run(&sample, logits, n);
        assert_true(result.token >= 0 && (uint32_t)result.token < n);
        if (expected < 0)
            undecided++;
        else if (result.token != expected)
            fail_msg("case %u of %u tokens: drew %d, expected %d", i, n, result.token, expected);
    }
    assert_true(undecided < cases / 50);
}

static void test_greedy(void **state) {
    (void)state;
    struct sampling greedy = plain;
    greedy.temperature = 0;
    const float ties[] = {1, 3, 2, 3, 3, -1};
    assert_int_equal(run_plain(&greedy, ties, 6).token, 1);
    greedy.top_k = 2; /* of no influence */
    greedy.min_p = 0.5f;
    assert_int_equal(run_plain(&greedy, ties, 6).token, 1);
    struct random random = {5};
    float logits[300];
    for (int i = 0; i < 300; i++) {
        fill(&random, logits, 300, 1);
        struct sampling first = plain;
        first.top_k = 1;
        first.seed = (uint64_t)i;
        struct sampling tiny_p = plain;
        tiny_p.top_p = 1e-6f;
        struct sampling peak = plain;
        peak.min_p = 1;
        greedy.top_k = 0;
        int32_t best = run_plain(&greedy, logits, 300).token;
        assert_int_equal(run_plain(&first, logits, 300).token, best);
        assert_int_equal(run_plain(&tiny_p, logits, 300).token, best);
        assert_int_equal(run_plain(&peak, logits, 300).token, best);
        struct sampling cold = plain;
        cold.temperature = 1e-30f;
        assert_int_equal(run_plain(&cold, logits, 300).token, best);
    }
}

static void test_penalties_follow_the_formula(void **state) {
    (void)state;
    const float logits[] = {2, -2, 1.5f, 0.5f, 0.25f};
    const int32_t history[] = {0, 1, 1, 0, 2, 2, 2};
    struct sampling greedy = plain;
    greedy.temperature = 0;
    struct sample sample = {.sampling = &greedy, .target = -1, .history = history, .n_prompt = 3, .n_history = 7};
    assert_int_equal(run(&sample, logits, 5).token, 0);
    greedy.repetition_penalty = 2; /* 1, -4, 0.75, 0.5, 0.25 */
    assert_int_equal(run(&sample, logits, 5).token, 0);
    greedy.repetition_penalty = 4.5f; /* 0.44, -9, 0.33, 0.5, 0.25 */
    assert_int_equal(run(&sample, logits, 5).token, 3);
    greedy.repetition_penalty = 1;
    greedy.presence_penalty = 1; /* of generated ones: 0 and 2 */
    assert_int_equal(run(&sample, logits, 5).token, 0);
    greedy.presence_penalty = 1.6f; /* 0.4, -2, -0.1, 0.5 */
    assert_int_equal(run(&sample, logits, 5).token, 3);
    greedy.presence_penalty = 0;
    greedy.frequency_penalty = -0.3f; /* 2.3, -2, 2.4 */
    assert_int_equal(run(&sample, logits, 5).token, 2);
    sample.n_prompt = 7; /* nothing is generated yet */
    assert_int_equal(run(&sample, logits, 5).token, 0);
    greedy.repetition_penalty = 0.5f; /* negative logits shrink too: 4, -1, 3 */
    const float negative[] = {-4, -1, -0.9f};
    assert_int_equal(run(&sample, negative, 3).token, 2); /* -2, -0.5, -0.45 */
}

static void test_bias_and_bans(void **state) {
    (void)state;
    const float logits[] = {5, 4, 3, 2};
    const struct logit_bias bias[] = {{3, 100}, {900, 100}, {-1, 100}};
    const int32_t banned[] = {3, 0, 900};
    struct sampling greedy = plain;
    greedy.temperature = 0;
    greedy.n_bias = 3; /* two of them name no token of this vocabulary */
    greedy.bias = bias;
    greedy.n_banned = 3;
    greedy.banned = banned;
    struct sample sample = {.sampling = &greedy, .target = -1};
    assert_int_equal(run(&sample, logits, 4).token, 3);
    sample.ban = true; /* after the bias */
    assert_int_equal(run(&sample, logits, 4).token, 1);
    greedy.temperature = 3;
    for (uint32_t i = 0; i < 200; i++) {
        sample.token_index = i;
        int32_t token = run(&sample, logits, 4).token;
        assert_true(token == 1 || token == 2);
    }
    const int32_t everything[] = {0, 1, 2, 3};
    greedy.n_banned = 4;
    greedy.banned = everything;
    struct sample_result result = run(&sample, logits, 4);
    assert_int_equal(result.token, 0);
    assert_true(result.logprob == -INFINITY);
}

static void test_reports_raw_logprobs(void **state) {
    (void)state;
    struct random random = {3};
    static float logits[50000];
    for (int i = 0; i < 40; i++) {
        uint32_t n = i % 4 == 0 ? 50000 : 1 + random_below(&random, 60);
        fill(&random, logits, n, 20);
        if (n > 8) logits[7] = logits[3] = 30; /* a tie at the top */
        struct sampling sampling = plain;
        sampling.n_top = (int32_t)random_below(&random, SAMPLE_TOP_MAX + 1);
        sampling.temperature = i % 2 ? 0.5f : 0;
        const struct logit_bias bias = {0, 50};
        sampling.n_bias = 1;
        sampling.bias = &bias; /* moves the choice, not the report */
        struct sample sample = {.sampling = &sampling, .target = -1, .token_index = (uint32_t)i};
        struct sample_result result = run(&sample, logits, n);
        assert_true(fabs((double)result.logprob - log_softmax(logits, n, result.token)) < 1e-5);
        assert_int_equal(result.n_top, (uint32_t)sampling.n_top < n ? sampling.n_top : (int32_t)n);
        struct entry *entries = check_calloc(n, sizeof *entries);
        for (uint32_t t = 0; t < n; t++) entries[t] = (struct entry){.logit = (double)logits[t], .token = (int32_t)t};
        qsort(entries, n, sizeof *entries, descending);
        for (int32_t t = 0; t < result.n_top; t++) {
            assert_int_equal(result.top[t].token, entries[t].token);
            assert_true(fabs((double)result.top[t].logprob - log_softmax(logits, n, entries[t].token)) < 1e-5);
        }
        free(entries);
        sample.target = (int32_t)(n / 2);
        result = run(&sample, logits, n);
        assert_int_equal(result.token, n / 2);
        assert_true(fabs((double)result.logprob - log_softmax(logits, n, (int32_t)(n / 2))) < 1e-5);
        sample.target = -1;
        sampling.n_top = -1;
        result = run(&sample, logits, n);
        assert_true(result.logprob == 0 && result.n_top == 0);
    }
}

static void test_logits_that_are_no_numbers(void **state) {
    (void)state;
    struct sampling sampling = plain;
    sampling.n_top = 5;
    for (int greedy = 0; greedy < 2; greedy++) {
        sampling.temperature = greedy ? 0 : 1;
        const float nothing[3][4] = {{NAN, NAN, NAN, NAN}, {-INFINITY, -INFINITY, -INFINITY, -INFINITY}, {INFINITY, NAN, -INFINITY, INFINITY}};
        for (int i = 0; i < 3; i++) {
            struct sample_result result = run_plain(&sampling, nothing[i], 4);
            assert_int_equal(result.token, 0);
            assert_true(result.logprob == -INFINITY);
            assert_int_equal(result.n_top, 0);
            result = run(&(struct sample){.sampling = &sampling, .target = 2}, nothing[i], 4);
            assert_int_equal(result.token, 2);
            assert_true(result.logprob == -INFINITY);
        }
        const float one[] = {NAN, -INFINITY, -3, NAN};
        struct sample_result result = run_plain(&sampling, one, 4);
        assert_int_equal(result.token, 2);
        assert_true(result.logprob == 0);
        assert_int_equal(result.n_top, 1);
        const float over[] = {1, INFINITY, FLT_MAX / 2, -FLT_MAX};
        assert_int_equal(run_plain(&sampling, over, 4).token, 1);
        sampling.repetition_penalty = 0.01f; /* overflows */
        const int32_t history[] = {2};
        int32_t token = run(&(struct sample){.sampling = &sampling, .target = -1, .history = history, .n_history = 1}, over, 4).token;
        assert_true(token == 1 || (token == 2 && !greedy)); /* both are as large as a float can be */
        sampling.repetition_penalty = 1;
    }
    for (uint32_t i = 0; i < 100; i++) { /* a token without probability is never drawn */
        const float some[] = {-INFINITY, 0, NAN, 0, -INFINITY};
        int32_t token = run(&(struct sample){.sampling = &sampling, .target = -1, .token_index = i}, some, 5).token;
        assert_true(token == 1 || token == 3);
    }
}

/* chi^2 of 20,000 draws over 8 tokens: above 29.9 once in 10,000 seeds; the seed is fixed. */
static void test_draws_follow_the_distribution(void **state) {
    (void)state;
    const float logits[] = {0, 1, -1, 2, 0.5f, -2, 1.5f, 0};
    const int draws = 20000;
    for (int way = 0; way < 3; way++) { /* over token indices, seeds, choices */
        struct sampling sampling = plain;
        sampling.temperature = 1.3f;
        int seen[8] = {0};
        for (int i = 0; i < draws; i++) {
            sampling.seed = way == 1 ? (uint64_t)i : 77;
            const struct sample sample = {
                .sampling = &sampling, .target = -1, .token_index = way == 0 ? (uint32_t)i : 3, .choice = way == 2 ? (uint32_t)i : 0};
            seen[run(&sample, logits, 8).token]++;
        }
        double total = 0, chi = 0;
        for (int i = 0; i < 8; i++) total += exp((double)logits[i] / 1.3);
        for (int i = 0; i < 8; i++) {
            double expected = draws * exp((double)logits[i] / 1.3) / total;
            chi += (seen[i] - expected) * (seen[i] - expected) / expected;
        }
        assert_true(chi < 29.9);
        assert_true(chi > 0.5); /* nor suspiciously exact */
    }
}

/* Equal logits: nothing to sort by but the id, in a whole vocabulary. The draw is the inverse of the cumulative distribution, exactly. */
static void test_a_flat_vocabulary(void **state) {
    (void)state;
    enum { N = 1 << 16 };
    float *logits = check_calloc(N, sizeof *logits);
    struct sampling sampling = plain;
    for (uint32_t i = 0; i < 20; i++) {
        float u = random_unit(random_at(sampling.seed, 0, 0, i));
        const struct sample sample = {.sampling = &sampling, .target = -1, .token_index = i};
        assert_int_equal(run(&sample, logits, N).token, (int32_t)(u * N));
    }
    sampling.top_k = 1000;
    for (uint32_t i = 0; i < 20; i++)
        assert_true(run(&(struct sample){.sampling = &sampling, .target = -1, .token_index = i}, logits, N).token < 1000);
    free(logits);
}

static void test_nothing_but_the_key_matters(void **state) {
    (void)state;
    struct random random = {9};
    float logits[2][500];
    fill(&random, logits[0], 500, 4);
    fill(&random, logits[1], 500, 30);
    struct sampling sampling = plain;
    sampling.top_p = 0.9f;
    int32_t forward[2][50];
    for (uint32_t i = 0; i < 50; i++)
        for (uint32_t which = 0; which < 2; which++)
            forward[which][i] = run(&(struct sample){.sampling = &sampling, .target = -1, .token_index = i}, logits[which], 500).token;
    /* Backwards, and with scratch that others have used. */
    float *scratch = check_calloc(sampler_scratch_floats(500), sizeof *scratch), copy[500];
    for (size_t i = 0; i < sampler_scratch_floats(500); i++) scratch[i] = NAN;
    for (uint32_t i = 50; i-- > 0;)
        for (uint32_t which = 0; which < 2; which++) {
            struct sample_result result;
            memcpy(copy, logits[which], sizeof copy);
            sampler_sample(&(struct sample){.sampling = &sampling, .target = -1, .token_index = i, .row = 9}, copy, 500, scratch, &result);
            assert_int_equal(result.token, forward[which][i]);
        }
    free(scratch);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_cases_match_the_oracle), cmocka_unit_test(test_greedy),
        cmocka_unit_test(test_penalties_follow_the_formula),  cmocka_unit_test(test_bias_and_bans),
        cmocka_unit_test(test_reports_raw_logprobs),          cmocka_unit_test(test_logits_that_are_no_numbers),
        cmocka_unit_test(test_draws_follow_the_distribution), cmocka_unit_test(test_a_flat_vocabulary),
        cmocka_unit_test(test_nothing_but_the_key_matters),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
