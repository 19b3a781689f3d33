/* Every backend and every instruction set of this machine on the whole table of phase cases, for every KV dtype that it has:
 *   - `reference` against a forward pass in double over a contiguous cache;
 *   - the others against `reference`, by normalised mean squared error;
 *   - the row contract on each of them, bit for bit: rows one at a time, in random chunks and batches, on two threads, after a history that was read in other
 *     chunks: the same logits as all rows at once; and M = 1..97 rows in one step.
 * A backend that may trade the row contract for speed runs as it is against `reference`, and with limits.deterministic for both; with either kind of weights.
 * What ran and what this machine cannot run is printed; KVASIR_TEST_BACKENDS=cuda runs that alone. Sanitizers look for bad accesses, not for bits: under them, and with KVASIR_TEST_PART=I/N
 * (which is cases I, I + N, I + 2 N ... alone), a case runs with one KV dtype, in turn, and histories are read in larger parts. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <math.h>

#include "base/check.h"
#include "base/random.h"
#include "kernels/backend.h"
#include "kernels/kivi.h"
#include "tests/support/backends.h"
#include "tests/support/oracle.h"
#include "tests/support/phase_cases.h"

struct variant {
    const struct backend_ops *ops;
    const char *instruction_set;
    enum weights_mode weights;
    uint32_t activation_bits;
    bool has_device, deterministic; /* has_device and not deterministic: no row contract */
    char name[48];
    double worst[KV_DTYPES]; /* error against reference */
    uint32_t runs, contracts;
};

static struct variant variants[24];
static uint32_t n_variants;
static double worst_reference[KV_DTYPES];

static uint32_t first_case, case_step = 1; /* by KVASIR_TEST_PART */
static bool is_short;

static void read_part(void) {
    const char *asked = getenv("KVASIR_TEST_PART");
#ifdef KVASIR_SANITIZED
    is_short = true;
#endif
    if (!asked) return;
    is_short = sscanf(asked, "%u/%u", &first_case, &case_step) == 2 && first_case < case_step;
    if (is_short) return;
    (void)fprintf(stderr, "KVASIR_TEST_PART=%s: not a part of the cases, as 0/4 is\n", asked);
    exit(1);
}

static bool computes(const struct variant *variant) { return variant->ops != &backend_mock; }
static bool keeps_contract(const struct variant *variant) { return !variant->has_device || variant->deterministic; }
static bool has_dtype(const struct variant *variant, const struct program *program, enum kv_dtype dtype) {
    return variant->ops->block_bytes(program, dtype) > 0;
}

static struct phase_world *new_world(const struct phase_case *c, const struct program *program, const struct variant *variant, enum kv_dtype dtype,
                                     uint32_t threads, uint32_t history_chunk) {
    const struct phase_world_options options = {.kv_dtype = dtype,
                                                .instruction_set = variant->instruction_set,
                                                .threads = threads,
                                                .history_chunk = history_chunk,
                                                .weights = variant->weights,
                                                .activation_bits = variant->activation_bits,
                                                .deterministic = variant->deterministic};
    struct phase_world *world;
    struct error error = {0};
    if (phase_world_new(c, program, variant->ops, &options, &world, &error) != STATUS_OK) fail_msg("%s: %s", variant->name, error.text);
    return world;
}

/* sum (x - truth)^2 / sum truth^2 */
static double error_of(const float *x, const double *truth, uint32_t n) {
    double difference = 0, size = 0;
    for (uint32_t i = 0; i < n; i++) {
        difference += ((double)x[i] - truth[i]) * ((double)x[i] - truth[i]);
        size += truth[i] * truth[i];
    }
    return difference / size;
}

static bool floats(const struct phase_case *c) { return c->type <= TENSOR_BF16 && !(c->flags & PHASE_MIXED_TYPES); }

/* What `reference` may differ from exact arithmetic. f32 with sums in double leaves about 1e-7 a value, relative, and a layer or two amplify it: 1e-11 squared is
 * generous. With narrow caches a key that lies on the border between two codes may be rounded to the other one: one dim of one slot, by one step of 2^-11, 2^-8
 * or 1/127. A wrong slot, head or angle costs 1e-2 or more. */
static const double reference_bound[KV_DTYPES] = {
    [KV_F32] = 1e-11, [KV_F16] = 1e-6, [KV_BF16] = 1e-5, [KV_Q8] = 1e-4, [KV_KIVI4] = 1e-4, [KV_KIVI2] = 1e-3};

/* What a fast backend may differ from `reference`: its own rounding of activations, of queries and of attention weights.
 *   Weights: float types keep activations in f32 (error 1e-7, as above). Quantised types meet activations of 8 bits in blocks of 32: about 0.5 % noise a
 *   product, 2e-5 squared, seven products a layer, two layers: 3e-4 where nothing is amplified; attention and silu may double it.
 *   With 16 bits it is 256 times less: a float type's error, were it not for keys and values at a border between two codes, which noise of
 *   any size may take to the other one, as in `reference_bound`. q8 keys are rounded after their transform, which `reference` has not: two roundings of 1/254 differ.
 *   Cache: queries and weights are rounded to the dtype too: 2^-12, 2^-9 or 1/254 of each, and scores of up to 30 turn a relative error into an absolute one.
 *   A device rounds weights and activations to f16: 2^-12 of each operand of seven products a layer, 1e-6 squared over two layers, more where attention and silu amplify it. */
static double backend_bound(const struct phase_case *c, const struct variant *variant, enum kv_dtype dtype) {
    static const double of_dtype[KV_DTYPES] = {
        [KV_F32] = 1e-9, [KV_F16] = 1e-5, [KV_BF16] = 5e-4, [KV_Q8] = 1e-3, [KV_KIVI4] = 1e-3, [KV_KIVI2] = 1e-2};
    /* What a product's noise moves across the border between two codes is wrong by a whole step of 1/15 or a third of the range. */
    double flips = dtype == KV_KIVI2 ? 0.1 : dtype == KV_KIVI4 ? 1e-2 : 0;
    if (floats(c)) flips *= variant->has_device ? 0.2 : 0; /* f16's 2^-12 instead of 0.5 %: many times fewer */
    if (variant->activation_bits == 16) return of_dtype[dtype] + flips + (floats(c) ? 0 : 2e-7);
    return of_dtype[dtype] + (floats(c) ? 0 : 6e-4) + flips + (variant->has_device ? 5e-5 : 0);
}

/* The case's rows by the oracle: [rows][n_vocab]. */
static double *oracle_logits(const struct phase_case *c, const struct program *program, enum kv_dtype dtype) {
    double *logits = check_calloc((size_t)phase_case_rows(c) * program->n_vocab, sizeof *logits), *next = logits;
    for (uint32_t s = 0; s < phase_case_sequences(c); s++) {
        const struct phase_sequence *plan = &c->sequences[s];
        struct oracle *oracle = oracle_new(program, dtype);
        for (uint32_t t = 0; t < plan->history; t++) oracle_row(oracle, phase_case_token(c, s, t), NULL);
        for (uint32_t lane = 0; lane < program_lanes(program); lane++) {
            if (plan->ragged) oracle_cut(oracle, lane, plan->lanes[lane % PHASE_LANES]);
            for (uint32_t i = 0; i < plan->dropped && lane % 2 == 1; i++)
                if (oracle_lane_slots(oracle, lane) >= BLOCK_TOKENS) oracle_drop(oracle, lane, BLOCK_TOKENS);
        }
        for (uint32_t t = 0; t < plan->rows; t++, next += program->n_vocab) oracle_row(oracle, phase_case_token(c, s, plan->history + t), next);
        oracle_free(oracle);
    }
    return logits;
}

static double worst_error(const struct phase_case *c, const struct phase_world *world, const double *truth, uint32_t n_vocab) {
    double worst = 0;
    for (uint32_t s = 0; s < phase_case_sequences(c); s++)
        for (uint32_t row = 0; row < c->sequences[s].rows; row++, truth += n_vocab) {
            double error = error_of(phase_world_logits(world, s, row), truth, n_vocab);
            if (!(error <= worst)) worst = error; /* a NaN is the worst */
        }
    return worst;
}

static void assert_same_bits(const struct phase_case *c, const struct variant *variant, enum kv_dtype dtype, const char *how,
                             const struct phase_world *expected, const struct phase_world *world) {
    for (uint32_t s = 0; s < phase_case_sequences(c); s++)
        for (uint32_t row = 0; row < c->sequences[s].rows; row++)
            if (memcmp(phase_world_logits(expected, s, row), phase_world_logits(world, s, row), c->n_vocab * sizeof(float)) != 0)
                fail_msg("%s, %s, %s: sequence %u row %u differs %s", variant->name, kv_dtype_name(dtype), c->name, s, row, how);
}

static void run_one_at_a_time(const struct phase_case *c, struct phase_world *world) {
    for (bool more = true; more;) {
        more = false;
        for (uint32_t s = phase_case_sequences(c); s-- > 0;) {
            if (phase_world_rows_left(world, s) == 0) continue;
            phase_world_step(world, &(struct phase_part){s, 1}, 1);
            more = true;
        }
    }
}

/* Each step takes some of the sequences that have rows left, in any order, with any number of rows. */
static void run_random(const struct phase_case *c, struct phase_world *world, uint64_t seed) {
    struct random random = {seed};
    for (;;) {
        struct phase_part parts[PHASE_SEQUENCES];
        uint32_t n_parts = 0, left = 0;
        for (uint32_t s = 0; s < phase_case_sequences(c); s++) {
            uint32_t rows = phase_world_rows_left(world, s);
            left += rows;
            if (rows == 0 || random_below(&random, 3) == 0) continue;
            uint32_t at = random_below(&random, n_parts + 1);
            memmove(&parts[at + 1], &parts[at], (n_parts - at) * sizeof *parts);
            parts[at] = (struct phase_part){s, 1 + random_below(&random, rows)};
            n_parts++;
        }
        if (left == 0) return;
        if (n_parts > 0) phase_world_step(world, parts, n_parts);
    }
}

/* Of the dtypes that somebody here has. */
static bool in_turn(const struct phase_case *c, const struct program *program, enum kv_dtype dtype) {
    bool had[KV_DTYPES] = {false};
    uint32_t n = 0, before = 0;
    for (int d = 0; d < KV_DTYPES; d++) {
        for (const struct variant *variant = variants; variant < variants + n_variants; variant++)
            had[d] = had[d] || has_dtype(variant, program, (enum kv_dtype)d);
        n += had[d];
        before += had[d] && d < (int)dtype;
    }
    return had[dtype] && (uint32_t)(c - phase_cases) % n == before;
}

/* `reference` has one thread, and its rows share nothing but the widening of weights: one KV dtype a case, in turn, keeps it from taking most of the time. */
static void check_row_contract(const struct phase_case *c, const struct program *program, struct variant *variant, enum kv_dtype dtype,
                               const struct phase_world *expected) {
    bool slow = variant->ops == &backend_reference, quick = variant->has_device && is_short,
         other = (c - phase_cases) % 2 == (variant->weights == WEIGHTS_NATIVE);
    if ((slow && !in_turn(c, program, dtype)) || (quick && other)) return;
    variant->contracts++;
    struct phase_world *world = new_world(c, program, variant, dtype, 1, quick ? 0 : slow ? 31 : 1);
    run_one_at_a_time(c, world);
    assert_same_bits(c, variant, dtype, "one at a time", expected, world);
    phase_world_free(world);
    world = new_world(c, program, variant, dtype, slow ? 1 : 2, quick ? 50 : 13);
    run_random(c, world, 1 + (uint64_t)dtype);
    assert_same_bits(c, variant, dtype, "in random batches", expected, world);
    phase_world_free(world);
    if (slow || quick) return;
    world = new_world(c, program, variant, dtype, 2, 0);
    phase_world_run(world);
    assert_same_bits(c, variant, dtype, "on two threads", expected, world);
    phase_world_free(world);
}

/* The mock keeps what no sequence lost, so it cannot run lanes that were cut. Devices take heads of multiples of 8 dims, and say so of others in prepare. */
static bool can_run(const struct variant *variant, const struct phase_case *c) {
    if (variant->has_device && phase_case_shape(c).head_dim % 8 != 0) return false;
    if (variant->activation_bits == 16 && floats(c)) return false; /* nothing there has 8 bits */
    for (uint32_t s = 0; s < phase_case_sequences(c); s++)
        if (!computes(variant) && (c->sequences[s].ragged || c->sequences[s].dropped)) return false;
    return true;
}

/* KIVI: cases without codes are those of f16. */
static bool reads_codes(const struct phase_case *c, enum kv_dtype dtype) {
    bool does = kivi_bits(dtype) == 0;
    for (uint32_t s = 0; s < phase_case_sequences(c); s++)
        does = does || kivi_reads_codes(BLOCK_TOKENS - 1, (int32_t)(c->sequences[s].history + c->sequences[s].rows - 1));
    return does;
}

/* Nobody may cut a block that is codes. */
static bool can_cut(const struct phase_case *c, enum kv_dtype dtype) {
    for (uint32_t s = 0; s < phase_case_sequences(c) && kivi_bits(dtype) > 0; s++)
        for (uint32_t lane = 0; c->sequences[s].ragged && lane < PHASE_LANES; lane++) {
            uint32_t slots = c->sequences[s].lanes[lane], newest = slots / BLOCK_TOKENS * BLOCK_TOKENS + BLOCK_TOKENS - 1;
            if (slots % BLOCK_TOKENS && kivi_reads_codes((int32_t)newest, (int32_t)c->sequences[s].history)) return false;
        }
    return true;
}

static void test_case(void **state) {
    const struct phase_case *c = *state;
    const struct tiny_shape shape = phase_case_shape(c);
    struct program *program = tiny_program_new(&shape);
    for (int d = 0; d < KV_DTYPES; d++) {
        enum kv_dtype dtype = (enum kv_dtype)d;
        if ((is_short && !in_turn(c, program, dtype)) || !can_cut(c, dtype) || !reads_codes(c, dtype)) continue;
        const struct variant reference = {.ops = &backend_reference, .name = "reference"};
        struct phase_world *truth = new_world(c, program, &reference, dtype, 1, 0);
        phase_world_run(truth);
        double *exact = oracle_logits(c, program, dtype);
        double error = worst_error(c, truth, exact, c->n_vocab);
        if (!(error <= reference_bound[dtype])) fail_msg("reference, %s, %s: error %g", kv_dtype_name(dtype), c->name, error);
        worst_reference[d] = fmax(worst_reference[d], error);
        size_t at = 0;
        for (uint32_t s = 0; s < phase_case_sequences(c); s++)
            for (uint32_t row = 0; row < c->sequences[s].rows; row++)
                for (uint32_t i = 0; i < c->n_vocab; i++) exact[at++] = (double)phase_world_logits(truth, s, row)[i];
        for (struct variant *variant = variants; variant < variants + n_variants; variant++) {
            if (!can_run(variant, c) || !has_dtype(variant, program, dtype)) continue;
            variant->runs++;
            if (variant->ops == &backend_reference) {
                check_row_contract(c, program, variant, dtype, truth);
                continue;
            }
            struct phase_world *world = new_world(c, program, variant, dtype, 1, 0);
            phase_world_run(world);
            if (computes(variant)) {
                error = worst_error(c, world, exact, c->n_vocab);
                if (!(error <= backend_bound(c, variant, dtype)))
                    fail_msg("%s, %s, %s: error %g", variant->name, kv_dtype_name(dtype), c->name, error);
                variant->worst[d] = fmax(variant->worst[d], error);
            }
            if (keeps_contract(variant)) check_row_contract(c, program, variant, dtype, world);
            phase_world_free(world);
        }
        free(exact);
        phase_world_free(truth);
    }
    tiny_program_free(program);
}

/* M rows in one step, for every M: the first M rows of the sequence, over and over on the same history. */
static void test_every_number_of_rows(void **state) {
    (void)state;
    const struct phase_case *c = phase_cases;
    while (strcmp(c->name, "97 rows") != 0) c++;
    const struct tiny_shape shape = phase_case_shape(c);
    struct program *program = tiny_program_new(&shape);
    for (struct variant *variant = variants; variant < variants + n_variants; variant++) {
        if (!computes(variant) || !keeps_contract(variant) || (is_short && variant->weights == WEIGHTS_F16))
            continue; /* the mock's slots are written once */
        for (int d = 0; d < KV_DTYPES; d++) {
            if (!has_dtype(variant, program, (enum kv_dtype)d)) continue;
            struct phase_world *expected = new_world(c, program, variant, (enum kv_dtype)d, 1, 0);
            struct phase_world *world = new_world(c, program, variant, (enum kv_dtype)d, 1, 0);
            run_one_at_a_time(c, expected);
            /* The rows of `reference` share nothing, and products with two planes are checked for every number in test_cpu.c: a sample will do. */
            uint32_t step = variant->ops == &backend_reference || variant->activation_bits == 16 || is_short ? 16 : 1;
            for (uint32_t m = 1; m <= c->sequences[0].rows; m += step) {
                phase_world_rewind(world);
                phase_world_step(world, &(struct phase_part){0, m}, 1);
                for (uint32_t row = 0; row < m; row++)
                    if (memcmp(phase_world_logits(expected, 0, row), phase_world_logits(world, 0, row), c->n_vocab * sizeof(float)) != 0)
                        fail_msg("%s, %s: row %u of %u differs", variant->name, kv_dtype_name((enum kv_dtype)d), row, m);
            }
            phase_world_free(expected);
            phase_world_free(world);
        }
    }
    tiny_program_free(program);
}

/* The first backend in the list that has a device is what "auto" means, and it must not invent its numbers. */
static void test_names(void **state) {
    (void)state;
    const struct backend_ops *const *best = backends;
    while ((*best)->memory(0, NULL, NULL, NULL) != STATUS_OK) best++;
    assert_ptr_equal(backend_choose("auto", 0), *best);
    assert_ptr_not_equal(backend_choose("auto", 0), &backend_mock);
    assert_ptr_equal(backend_choose("auto", 4096), *best); /* nobody has it: the best one says so */
    assert_ptr_equal(backend_choose("reference", 4096), &backend_reference);
    assert_null(backend_choose("abacus", 0));
    assert_null(backend_find("auto")); /* no backend's name */
    assert_ptr_equal(backend_find("reference"), &backend_reference);
    assert_ptr_equal(backend_find("mock"), &backend_mock);
    assert_null(backend_find("abacus"));
    for (int d = 0; d < KV_DTYPES; d++) {
        enum kv_dtype dtype;
        assert_true(kv_dtype_parse(kv_dtype_name((enum kv_dtype)d), &dtype));
        assert_int_equal(dtype, d);
    }
    enum kv_dtype dtype;
    assert_false(kv_dtype_parse("f64", &dtype));
    for (int w = WEIGHTS_AUTO; w <= WEIGHTS_NATIVE; w++) {
        enum weights_mode mode;
        assert_true(weights_mode_parse(weights_mode_name((enum weights_mode)w), &mode));
        assert_int_equal(mode, w);
    }
    enum weights_mode mode;
    assert_false(weights_mode_parse("f32", &mode));
    uint32_t bits;
    assert_true(activation_bits_parse("8bit", &bits) && bits == 8);
    assert_true(activation_bits_parse("16bit", &bits) && bits == 16);
    assert_false(activation_bits_parse("16", &bits));
    assert_int_equal(weights_choice(400, 1000), WEIGHTS_F16);
    assert_int_equal(weights_choice(401, 1000), WEIGHTS_NATIVE);
}

/* On the host there is device 0, without a memory of its own. */
static void test_host_memory(void **state) {
    (void)state;
    for (const struct backend_ops *const *ops = backends; *ops; ops++) {
        uint64_t available = 1, total = 1;
        struct error error = {.text = ""};
        if ((*ops)->memory(0, &available, &total, &error) != STATUS_OK) {
            assert_true(strlen(error.text) > 0);
            continue;
        }
        bool on_host = *ops == &backend_cpu || *ops == &backend_reference || *ops == &backend_mock;
        assert_true(on_host ? available == 0 && total == 0 : available <= total && total > 0);
        assert_int_equal((*ops)->memory(4096, &available, &total, &error), STATUS_UNSUPPORTED);
        assert_non_null(strstr(error.text, "4096"));
    }
}

/* STATUS_UNSUPPORTED: not on this machine; STATUS_INVALID: not on this architecture. What must run fails the test. */
static void try_variant(const struct program *program, struct variant variant, bool must_run) {
    struct phase_world *world;
    struct error error = {0};
    const struct phase_world_options options = {.kv_dtype = KV_F16, .instruction_set = variant.instruction_set, .threads = 1};
    CHECK(n_variants < sizeof variants / sizeof *variants);
    enum status status = phase_world_new(&phase_cases[0], program, variant.ops, &options, &world, &error);
    if (!must_run && (status == STATUS_UNSUPPORTED || status == STATUS_INVALID)) {
        print_message("not on this machine: %s (%s)\n", variant.name, error.text);
        return;
    }
    if (status != STATUS_OK) fail_msg("%s: %s", variant.name, error.text);
    phase_world_free(world);
    variants[n_variants++] = variant;
}

/* Backends and instruction sets. Those without a choice must run, and so must "generic". */
static void find_variants(void) {
    static const char *const sets[] = {"generic", "avx2", "avxvnni", "avx512", "avx512bf16"};
    const struct tiny_shape shape = phase_case_shape(&phase_cases[0]);
    struct program *program = tiny_program_new(&shape);
    for (const struct backend_ops *const *ops = backends; *ops; ops++) {
        struct variant variant = {.ops = *ops};
        bool is_mock = *ops == &backend_mock && !getenv("KVASIR_TEST_BACKENDS");
        if (!is_mock && !test_runs_on(*ops)) continue;
        (void)snprintf(variant.name, sizeof variant.name, "%s", (*ops)->name);
        if (strcmp((*ops)->name, "cpu") == 0) {
            for (uint32_t i = 0; i < 2 * sizeof sets / sizeof *sets; i++) {
                variant.instruction_set = sets[i / 2];
                variant.activation_bits = i % 2 ? 16 : 8;
                (void)snprintf(variant.name, sizeof variant.name, "cpu %s, %u-bit activations", sets[i / 2], variant.activation_bits);
                try_variant(program, variant, i / 2 == 0);
            }
        } else if (test_has_device(*ops)) {
            variant.has_device = true;
            for (int i = 0; i < 4; i++) {
                variant.weights = i % 2 ? WEIGHTS_NATIVE : WEIGHTS_F16;
                variant.deterministic = i >= 2;
                (void)snprintf(variant.name, sizeof variant.name, "%s %s%s", (*ops)->name, weights_mode_name(variant.weights),
                               variant.deterministic ? " deterministic" : "");
                try_variant(program, variant, true);
            }
        } else {
            try_variant(program, variant, true);
        }
    }
    tiny_program_free(program);
}

static int report(void **state) {
    (void)state;
    for (int d = 0; d < KV_DTYPES; d++)
        print_message("reference against double, %s: worst error %.1e\n", kv_dtype_name((enum kv_dtype)d), worst_reference[d]);
    for (const struct variant *variant = variants; variant < variants + n_variants; variant++) {
        print_message("%s: %u of %u cases x dtypes, row contract on %u; against reference", variant->name, variant->runs, n_phase_cases * KV_DTYPES,
                      variant->contracts);
        for (int d = 0; d < KV_DTYPES; d++) print_message(" %s %.1e", kv_dtype_name((enum kv_dtype)d), variant->worst[d]);
        print_message("\n");
    }
    return 0;
}

int main(void) {
    read_part();
    find_variants();
    struct CMUnitTest tests[64] = {cmocka_unit_test(test_names), cmocka_unit_test(test_host_memory), cmocka_unit_test(test_every_number_of_rows)};
    size_t n = first_case == 0 ? 3 : 0;
    for (uint32_t i = first_case; i < n_phase_cases; i += case_step) {
        CHECK(n < sizeof tests / sizeof *tests);
        tests[n++] = (struct CMUnitTest){.name = phase_cases[i].name, .test_func = test_case, .initial_state = (void *)(uintptr_t)&phase_cases[i]};
    }
    return _cmocka_run_group_tests("backends", tests, n, NULL, report);
}
