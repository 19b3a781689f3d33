/* What a q8 cache loses of keys of which one dim is many times the others, as models have them: on every backend that has q8, far less than a scale a slot would lose on the dims as they are,
 * which is what `reference` does. The oracle is tests/support/oracle.h with a cache of its own precision. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#include <math.h>

#include "base/check.h"
#include "tests/support/backends.h"
#include "tests/support/oracle.h"
#include "tests/support/phase_cases.h"

static const float outlier = 60; /* the others are about 1.5 */

static struct phase_case case_of(uint32_t head_dim) {
    return (struct phase_case){.name = "one large dim of K",
                               .type = TENSOR_F32,
                               .n_layers = 2,
                               .n_embd = 128,
                               .n_heads = 4,
                               .n_kv_heads = 2,
                               .head_dim = head_dim,
                               .n_ff = 192,
                               .n_vocab = 64,
                               .flags = PHASE_BIASES | PHASE_HALVES,
                               .sequences = {{.history = 70, .rows = 40}}};
}

static struct program *program_of(const struct phase_case *c, float key_outlier) {
    struct tiny_shape shape = phase_case_shape(c);
    shape.key_outlier = key_outlier;
    return tiny_program_new(&shape);
}

/* Mean squared errors: of the first layer's keys, without the two dims that the large one is rotated into; of the logits, against their mean square. */
struct loss {
    double keys, logits;
};

static double key_error(const struct phase_case *c, struct phase_world *world, const struct backend_ops *ops, const struct oracle *oracle) {
    const uint32_t d = c->head_dim, slots = c->sequences[0].history + c->sequences[0].rows;
    float *k = check_calloc(2 * (size_t)d, sizeof *k);
    double *exact = check_calloc(2 * (size_t)slots * d, sizeof *exact), sum = 0;
    for (uint32_t lane = 0; lane < c->n_kv_heads; lane++) {
        assert_int_equal(oracle_lane_slots(oracle, lane), slots);
        oracle_seen(oracle, lane, exact, exact + (size_t)slots * d);
        for (uint32_t slot = 0; slot < slots; slot++) {
            int32_t position;
            ops->read_f32(phase_world_backend(world), phase_world_block(world, 0, lane, slot / BLOCK_TOKENS), slot % BLOCK_TOKENS, k, k + d,
                          &position);
            assert_int_equal(position, slot);
            for (uint32_t i = 0; i < d; i++) {
                const double difference = (double)k[i] - exact[(size_t)slot * d + i];
                if (i % (d / 2) != TINY_OUTLIER_DIM) sum += difference * difference;
            }
        }
    }
    free(k);
    free(exact);
    return sum / (c->n_kv_heads * (double)slots * (d - 2));
}

static struct phase_world *run(const struct phase_case *c, const struct program *program, const struct backend_ops *ops) {
    struct phase_world *world;
    struct error error = {0};
    const struct phase_world_options options = {.kv_dtype = KV_Q8, .threads = 1, .activation_bits = 16};
    if (phase_world_new(c, program, ops, &options, &world, &error) != STATUS_OK) fail_msg("%s: %s", ops->name, error.text);
    phase_world_run(world);
    return world;
}

static struct loss loss_of(const struct phase_case *c, const struct program *program, const struct backend_ops *ops) {
    struct phase_world *world = run(c, program, ops);
    struct oracle *oracle = oracle_new(program, KV_F32);
    double logits[64], difference = 0, size = 0;
    for (uint32_t t = 0; t < c->sequences[0].history; t++) oracle_row(oracle, phase_case_token(c, 0, t), NULL);
    for (uint32_t row = 0; row < c->sequences[0].rows; row++) {
        oracle_row(oracle, phase_case_token(c, 0, c->sequences[0].history + row), logits);
        for (uint32_t i = 0; i < c->n_vocab; i++) {
            const double e = (double)phase_world_logits(world, 0, row)[i] - logits[i];
            difference += e * e;
            size += logits[i] * logits[i];
        }
    }
    const struct loss loss = {key_error(c, world, ops, oracle), difference / size};
    oracle_free(oracle);
    phase_world_free(world);
    return loss;
}

/* Heads of as many dims as are transformed as one, and of several times as many (16 of 80, 32 of 96). */
static void test_large_dim(void **state) {
    (void)state;
    static const uint32_t dims[] = {32, 64, 80, 96, 128};
    uint32_t n = 0;
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++) {
        const struct phase_case c = case_of(dims[i]);
        struct program *program = program_of(&c, outlier);
        const struct loss plain = loss_of(&c, program, &backend_reference);
        /* A step of outlier / 127, of which every part is as likely; so that the others have something to be better than. */
        assert_true(plain.keys > 0.8 * (double)outlier * (double)outlier / (127 * 127 * 12) &&
                    plain.keys < 1.5 * (double)outlier * (double)outlier / (127 * 127 * 12));
        for (const struct backend_ops *const *ops = backends; *ops; ops++) {
            if (*ops == &backend_mock || *ops == &backend_reference || !test_runs_on(*ops)) continue;
            const struct loss loss = loss_of(&c, program, *ops);
            print_message("    %s, %u dims: of keys %.1e, of logits %.1e; as they are %.1e, %.1e\n", (*ops)->name, dims[i], loss.keys, loss.logits,
                          plain.keys, plain.logits);
            if (!(loss.keys < plain.keys / 4 && loss.logits < plain.logits / 2))
                fail_msg("%s, %u dims: loses as much as without a transform", (*ops)->name, dims[i]);
            n++;
        }
        tiny_program_free(program);
    }
    if (n == 0) skip();
}

/* A dim that is not finite is not spread to the others, as far as a scale can hold both: a NaN leaves them as they are; an infinite one is finite in the cache, and all that follows from it. */
static void test_not_finite(void **state) {
    (void)state;
    static const uint32_t dims[] = {64, 80};
    static const float values[] = {NAN, INFINITY, -INFINITY};
    uint32_t n = 0;
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++) {
        const struct phase_case c = case_of(dims[i]);
        struct program *plain = program_of(&c, 0);
        struct oracle *oracle = oracle_new(plain, KV_F32);
        for (uint32_t t = 0; t < c.sequences[0].history + c.sequences[0].rows; t++) oracle_row(oracle, phase_case_token(&c, 0, t), NULL);
        for (size_t v = 0; v < sizeof values / sizeof *values; v++) {
            struct program *program = program_of(&c, values[v]);
            for (const struct backend_ops *const *ops = backends; *ops; ops++) {
                if (*ops == &backend_mock || *ops == &backend_reference || !test_runs_on(*ops)) continue;
                struct phase_world *world = run(&c, program, *ops);
                const double keys = key_error(&c, world, *ops, oracle);
                if (!(isnan(values[v]) ? keys < 1e-3 : isfinite(keys)))
                    fail_msg("%s, %u dims, %g: keys are off by %g", (*ops)->name, dims[i], (double)values[v], keys);
                for (uint32_t row = 0; row < c.sequences[0].rows; row++)
                    for (uint32_t at = 0; at < c.n_vocab; at++)
                        if (!isfinite(phase_world_logits(world, 0, row)[at]))
                            fail_msg("%s, %u dims, %g: row %u has no logits", (*ops)->name, dims[i], (double)values[v], row);
                phase_world_free(world);
                n++;
            }
            tiny_program_free(program);
        }
        oracle_free(oracle);
        tiny_program_free(plain);
    }
    if (n == 0) skip();
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_large_dim), cmocka_unit_test(test_not_finite)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
