/* eval's statistics against closed forms and a plain oracle in double; its windows; its tasks as tokens. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "cli/eval.h"

static double gaussian(struct random *random) {
    double u = ((double)(random_next(random) >> 11) + 0.5) * 0x1p-53, v = (double)(random_next(random) >> 11) * 0x1p-53;
    return sqrt(-2 * log(u)) * cos(2 * M_PI * v);
}

static void test_quantile(void **state) {
    (void)state;
    double values[100];
    for (int i = 0; i < 100; i++) values[i] = (i * 37) % 100 + 1; /* 1..100 in some order */
    assert_true(eval_quantile(values, 100, 0.99) == 99);
    assert_true(eval_quantile(values, 100, 0.5) == 50);
    assert_true(eval_quantile(values, 100, 0) == 1);
    assert_true(eval_quantile(values, 100, 1) == 100);
    assert_true(eval_quantile((double[]){7}, 1, 0.99) == 7);
    assert_true(eval_mean((double[]){1, 2, 6}, 3) == 3);
    assert_true(eval_mean(NULL, 0) == 0);
}

static void test_bootstrap_of_a_constant_difference(void **state) {
    (void)state;
    double a[20], b[20];
    for (int i = 0; i < 20; i++) b[i] = i, a[i] = i - 0.5; /* pairing takes the spread of both away */
    struct eval_interval interval = eval_bootstrap(a, b, 20, EVAL_RESAMPLES, 1);
    assert_true(interval.mean == -0.5 && interval.low == -0.5 && interval.high == -0.5);
    interval = eval_bootstrap(a, b, 1, EVAL_RESAMPLES, 1);
    assert_true(interval.low == -0.5 && interval.high == -0.5);
}

/* Against mean +- 1.96 s / sqrt(n), which the percentiles come to for many normal differences. */
static void test_bootstrap_of_normal_differences(void **state) {
    (void)state;
    enum { N = 400 };
    double a[N], b[N], sum = 0, squares = 0;
    struct random random = {.state = 5};
    for (int i = 0; i < N; i++) {
        b[i] = 10 * gaussian(&random);
        a[i] = b[i] + 0.3 + gaussian(&random);
        sum += a[i] - b[i];
    }
    double mean = sum / N;
    for (int i = 0; i < N; i++) squares += (a[i] - b[i] - mean) * (a[i] - b[i] - mean);
    double error = sqrt(squares / N / N);
    struct eval_interval interval = eval_bootstrap(a, b, N, EVAL_RESAMPLES, 1);
    assert_true(fabs(interval.mean - mean) < 1e-12);
    assert_true(fabs(interval.low - (mean - 1.96 * error)) < 0.2 * error);
    assert_true(fabs(interval.high - (mean + 1.96 * error)) < 0.2 * error);
    struct eval_interval again = eval_bootstrap(a, b, N, EVAL_RESAMPLES, 1), mirrored = eval_bootstrap(b, a, N, EVAL_RESAMPLES, 1);
    assert_memory_equal(&interval, &again, sizeof interval);
    assert_true(fabs(mirrored.mean + interval.mean) < 1e-12 && mirrored.high < 0 && interval.low > 0);
}

/* ---- distributions ---- */

enum { VOCAB = 1000, ROWS = 4 };

static double oracle_kl(const float *p, const float *q) {
    double zp = 0, zq = 0, kl = 0;
    for (int i = 0; i < VOCAB; i++) zp += exp((double)p[i]), zq += exp((double)q[i]);
    for (int i = 0; i < VOCAB; i++) kl += exp((double)p[i]) / zp * (((double)p[i] - log(zp)) - ((double)q[i] - log(zq)));
    return kl;
}

static void test_compare(void **state) {
    (void)state;
    struct eval_reference reference;
    eval_reference_init(&reference, ROWS, VOCAB);
    struct random random = {.state = 9};
    int32_t targets[ROWS] = {0, 17, 999, 500};
    for (size_t i = 0; i < (size_t)ROWS * VOCAB; i++) reference.logits[i] = (float)(3 * gaussian(&random));
    reference.logits[3 * VOCAB + 40] = reference.logits[3 * VOCAB + 41] = 50; /* a tie: the first counts */
    eval_reference_set(&reference, targets);
    for (uint32_t row = 0; row < ROWS; row++) {
        const float *full = reference.logits + (size_t)row * VOCAB;
        float logits[VOCAB];
        struct eval_row same = eval_compare(&reference, row, full, targets[row]);
        assert_true(same.kl == 0 && same.same_top && same.nll == reference.nll[row]);
        for (int scale = 0; scale < 4; scale++) {
            double noise = (double[]){1e-3, 0.03, 0.5, 4}[scale];
            for (int i = 0; i < VOCAB; i++) logits[i] = full[i] + (float)(noise * gaussian(&random));
            struct eval_row compared = eval_compare(&reference, row, logits, targets[row]);
            double expected = oracle_kl(full, logits), z = 0;
            assert_true(fabs(compared.kl - expected) < 1e-4 * expected + 1e-7); /* exponentials are of floats */
            for (int i = 0; i < VOCAB; i++) z += exp((double)logits[i]);
            assert_true(fabs(compared.nll - (log(z) - (double)logits[targets[row]])) < 1e-5);
        }
        for (int i = 0; i < VOCAB; i++) logits[i] = full[i] + 8; /* the same distribution, and exact in float here and there only */
        assert_true(eval_compare(&reference, row, logits, targets[row]).kl < 1e-6);
    }
    float changed[VOCAB];
    memcpy(changed, reference.logits + (size_t)3 * VOCAB, sizeof changed);
    changed[41] = 51;
    assert_false(eval_compare(&reference, 3, changed, 0).same_top);
    eval_reference_done(&reference);
}

/* ---- windows and tasks ---- */

static void test_windows(void **state) {
    (void)state;
    assert_int_equal(eval_window_start(0, 1, 100, 1000), 0);
    assert_int_equal(eval_window_start(0, 4, 100, 1000), 0);
    assert_int_equal(eval_window_start(1, 4, 100, 1000), 300);
    assert_int_equal(eval_window_start(3, 4, 100, 1000), 900);
    assert_int_equal(eval_window_start(2, 3, 100, 100), 0);
    assert_false(eval_windows_overlap(10, 100, 1000));
    assert_true(eval_windows_overlap(11, 100, 1000));
    assert_true(eval_windows_overlap(2, 100, 100));
    assert_false(eval_windows_overlap(1, 100, 100));
    /* Nothing wraps, whatever the counts. */
    size_t total = SIZE_MAX / 2;
    assert_int_equal(eval_window_start(UINT32_MAX - 1, UINT32_MAX, 10, total), total - 10);
}

static struct model *open_tiny(void) {
    struct model *model = NULL;
    struct error error;
    if (model_dummy("tiny", 1, &model, &error) != STATUS_OK) fail_msg("%s", error.text);
    return model;
}

/* Tokens of bytes, as the tiny model's tokenizer has them. */
static void text_of(const struct token_list *list, char *text, size_t size) {
    size_t n = 0;
    for (size_t i = 0; i < list->count && n + 1 < size; i++) text[n++] = list->tokens[i] < 256 ? (char)list->tokens[i] : '?';
    text[n] = '\0';
}

static void test_passkey(void **state) {
    (void)state;
    struct model *model = open_tiny();
    struct error error;
    for (uint64_t seed = 0; seed < 50; seed++) {
        struct eval_task task;
        double depth = (double)(seed % 5) / 5 + 0.1;
        if (eval_passkey(model_tokenizer(model), 600, depth, seed, &task, &error) != STATUS_OK) fail_msg("%s", error.text);
        char context[1024], question[256], answers[EVAL_CANDIDATES][32], fact[64];
        assert_int_equal(task.context.count + task.question.count, 600);
        text_of(&task.context, context, sizeof context);
        text_of(&task.question, question, sizeof question);
        assert_string_equal(question, " What is the pass key? The pass key i");
        for (uint32_t c = 0; c < EVAL_CANDIDATES; c++) {
            text_of(&task.answers[c], answers[c], sizeof answers[c]);
            assert_int_equal(strlen(answers[c]), 7);
            assert_memory_equal(answers[c], "s ", 2);
            assert_true(strspn(answers[c] + 2, "0123456789") == 5);
            for (uint32_t other = 0; other < c; other++) assert_string_not_equal(answers[c], answers[other]);
            (void)snprintf(fact, sizeof fact, "The pass key is %s. Remember it: %s", answers[c] + 2, answers[c] + 2);
            const char *found = strstr(context, fact);
            assert_int_equal(found != NULL, c == task.right);
            if (found) assert_true(fabs((double)(found - context) / (600 - 95.0) - depth) < 0.02);
        }
        eval_task_done(&task);
    }
    struct eval_task task;
    assert_int_equal(eval_passkey(model_tokenizer(model), 80, 0.5, 1, &task, &error), STATUS_INVALID);
    eval_task_done(&task);
    model_close(model);
}

static void test_copy(void **state) {
    (void)state;
    struct model *model = open_tiny();
    uint32_t n_vocab = model_program(model)->n_vocab;
    struct error error;
    for (uint64_t seed = 0; seed < 50; seed++) {
        struct eval_task task;
        if (eval_copy(model_tokenizer(model), n_vocab, 400, 0.5, seed, &task, &error) != STATUS_OK) fail_msg("%s", error.text);
        assert_int_equal(task.context.count, 400);
        assert_int_equal(task.answers[0].count, EVAL_COPY_ASKED + 1);
        /* The whole run of 64 stands in the context: its end is the given tokens and the asked ones. */
        const int32_t *given = task.context.tokens + 400 - (EVAL_COPY_GIVEN - 1);
        uint32_t found = 0;
        for (uint32_t at = 0; at + EVAL_COPY_GIVEN - 1 + EVAL_COPY_ASKED + 1 < 400; at++)
            found += memcmp(task.context.tokens + at, given, (EVAL_COPY_GIVEN - 1) * sizeof *given) == 0 &&
                     memcmp(task.context.tokens + at + EVAL_COPY_GIVEN - 1, task.answers[0].tokens, (EVAL_COPY_ASKED + 1) * sizeof *given) == 0;
        assert_int_equal(found, 1);
        eval_task_done(&task);
    }
    model_close(model);
}

static void test_made_up_text(void **state) {
    (void)state;
    struct model *model = open_tiny();
    struct eval_text text, again;
    struct error error;
    assert_int_equal(eval_text_open("", model_tokenizer(model), 5000, &text, &error), STATUS_OK);
    assert_int_equal(eval_text_open("", model_tokenizer(model), 5000, &again, &error), STATUS_OK);
    assert_true(text.made_up && text.list.count >= 5000 && text.list.count == again.list.count);
    assert_memory_equal(text.list.tokens, again.list.tokens, text.list.count * sizeof *text.list.tokens);
    int32_t tokens[8];
    eval_text_take(&text, 100, 8, tokens, true);
    assert_memory_equal(tokens, text.list.tokens + 100, sizeof tokens);
    text.begins = true, text.begin = 3;
    eval_text_take(&text, 100, 8, tokens, false);
    assert_int_equal(tokens[0], text.list.tokens[100]);
    eval_text_take(&text, 100, 8, tokens, true);
    assert_int_equal(tokens[0], 3);
    assert_memory_equal(tokens + 1, text.list.tokens + 101, sizeof tokens - sizeof *tokens);
    eval_text_done(&text);
    eval_text_done(&again);
    assert_int_equal(eval_text_open("/nonexistent/text", model_tokenizer(model), 10, &text, &error), STATUS_IO);
    eval_text_done(&text);
    model_close(model);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_quantile),
        cmocka_unit_test(test_bootstrap_of_a_constant_difference),
        cmocka_unit_test(test_bootstrap_of_normal_differences),
        cmocka_unit_test(test_compare),
        cmocka_unit_test(test_windows),
        cmocka_unit_test(test_passkey),
        cmocka_unit_test(test_copy),
        cmocka_unit_test(test_made_up_text),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
