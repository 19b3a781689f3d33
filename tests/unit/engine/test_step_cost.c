/* The step cost: what is recovered from exact and noisy times, and that a fit over the real backend is sane and leaves it usable. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/random.h"
#include "engine/internal.h"
#include "engine/step_cost.h"
#include "tests/support/backends.h"

enum { ROWS = 64, TIMES = 10 };

static void times_of(struct step_cost cost, double noise, struct random *random, struct step_time *times) {
    for (uint32_t i = 0; i < TIMES; i++) {
        double rows = i ? ROWS : 1, context = i ? (i - 1) * ROWS + (ROWS + 1) / 2.0 : 1;
        double us = cost.fixed_us + rows * cost.per_row_us + rows * context * cost.per_row_context_us;
        times[i] = (struct step_time){.rows = rows, .context = context, .us = us * (1 + noise * (2 * (double)random_unit(random_next(random)) - 1))};
    }
}

static void near(double got, double expected, double share) {
    if (fabs(got - expected) > share * fabs(expected) + 1e-9) fail_msg("%g is not %g", got, expected);
}

static void test_exact_times(void **state) {
    (void)state;
    struct random random = {1};
    struct step_time times[TIMES];
    const struct step_cost costs[] = {{1200, 90, 0.02}, {0, 5, 0}, {300, 1, 0.5}};
    for (uint32_t i = 0; i < 3; i++) {
        times_of(costs[i], 0, &random, times);
        struct step_cost got = step_cost_solve(times, TIMES);
        near(got.fixed_us, costs[i].fixed_us, 1e-6);
        near(got.per_row_us, costs[i].per_row_us, 1e-6);
        near(got.per_row_context_us, costs[i].per_row_context_us, 1e-6);
        got = step_cost_solve(times, 2); /* one chunk only: context unknown, the rest near */
        near(got.per_row_context_us, 0, 0);
        assert_true(got.per_row_us >= costs[i].per_row_us);
    }
}

/* Whatever the times, no coefficient is negative, rows are never free, and what it says of the chunks themselves is right. */
static void test_noisy_times(void **state) {
    (void)state;
    struct random random = {2};
    struct step_time times[TIMES];
    for (uint32_t round = 0; round < 2000; round++) {
        struct step_cost cost = {random_below(&random, 2000), 1 + random_below(&random, 100), random_below(&random, 100) / 1000.0};
        times_of(cost, 0.05, &random, times);
        struct step_cost got = step_cost_solve(times, TIMES);
        double middle = times[5].context, expected = cost.fixed_us + ROWS * cost.per_row_us + ROWS * middle * cost.per_row_context_us;
        near(got.fixed_us + ROWS * got.per_row_us + ROWS * middle * got.per_row_context_us, expected, 0.08);
        for (uint32_t i = 0; i < TIMES; i++) times[i].us = random_below(&random, 1000);
        got = step_cost_solve(times, 2 + random_below(&random, TIMES - 1));
        assert_true(got.fixed_us >= 0 && got.per_row_us > 0 && got.per_row_context_us >= 0 &&
                    isfinite(got.fixed_us + got.per_row_us + got.per_row_context_us));
    }
}

static void test_fit_on_backends(void **state) {
    (void)state;
    struct model *model;
    struct error error;
    assert_int_equal(model_dummy("tiny", 1, &model, &error), STATUS_OK);
    const struct program *program = model_program(model);
    for (const struct backend_ops *const *ops = backends; *ops; ops++) {
        if (*ops != &backend_mock && !test_runs_on(*ops)) continue;
        for (uint32_t blocks = 1; blocks <= 40; blocks += 13)
            for (uint32_t rows = 1; rows <= 101; rows += 50) {
                struct backend_limits limits = {.kv_dtype = KV_F16,
                                                .n_blocks = blocks * program_lanes(program),
                                                .max_rows = rows,
                                                .max_sequences = 1,
                                                .max_samples = 1,
                                                .threads = 1};
                struct backend *backend;
                struct step_cost cost;
                assert_int_equal((*ops)->prepare(program, &limits, &backend, &error), STATUS_OK);
                assert_int_equal(step_cost_fit(backend, program, &limits, blocks * BLOCK_TOKENS - blocks % 5, &cost, &error), STATUS_OK);
                assert_true(cost.fixed_us >= 0 && cost.per_row_us > 0 && cost.per_row_context_us >= 0);
                (*ops)->close(backend);
            }
    }
    model_close(model);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_exact_times), cmocka_unit_test(test_noisy_times),
                                       cmocka_unit_test(test_fit_on_backends)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
