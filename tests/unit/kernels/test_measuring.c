/* What backends say for those who measure them: bytes of weights, copy bandwidth, time waited; and who makes weights from a seed, and who refuses to. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <string.h>

#include "base/clock.h"
#include "kernels/backend.h"
#include "tests/support/tiny_program.h"

enum { BLOCKS = 8, ROWS = 4 };

static struct backend_limits small_limits(void) {
    return (struct backend_limits){.kv_dtype = KV_F16, .n_blocks = BLOCKS, .max_rows = ROWS, .max_sequences = 1, .max_samples = 1, .threads = 1};
}

static void test_no_backend_reads_weights_that_are_not_there(void **state) {
    (void)state;
    struct tiny_shape shape = tiny_shape_default();
    struct program *program = tiny_program_new(&shape);
    struct backend_limits limits = small_limits();
    program->random_seed = 1;
    for (const struct backend_ops *const *ops = backends; *ops; ops++) {
        if ((*ops)->makes_weights) continue;
        struct backend *backend = NULL;
        struct error error = {0};
        assert_int_equal((*ops)->prepare(program, &limits, &backend, &error), STATUS_UNSUPPORTED);
        assert_non_null(strstr(error.text, (*ops)->name));
        assert_null(backend);
    }
    assert_false(backend_cpu.makes_weights || backend_reference.makes_weights);
    tiny_program_free(program);
}

/* f32 stays f32 on both, row by row: what differs is what is rounded up to whole cache lines or strips of rows. */
static void test_weight_bytes(void **state) {
    (void)state;
    struct tiny_shape shape = tiny_shape_default();
    struct backend_limits limits = small_limits();
    for (int tied = 0; tied < 2; tied++) {
        shape.tied_head = tied;
        struct program *program = tiny_program_new(&shape);
        uint64_t n_q = (uint64_t)shape.n_heads * shape.head_dim, n_kv = (uint64_t)shape.n_kv_heads * shape.head_dim, n = shape.n_embd;
        uint64_t matrices = shape.n_layers * ((2 * n_q + 2 * n_kv) * n + 3ull * shape.n_ff * n) + shape.n_vocab * n,
                 norms = (2ull * shape.n_layers + 1) * n;
        assert_int_equal(backend_reference.weight_bytes(program, &limits), sizeof(float) * (matrices + norms));
        uint64_t packed = backend_cpu.weight_bytes(program, &limits);
        assert_in_range(packed, sizeof(float) * (matrices + norms), 2 * sizeof(float) * (matrices + norms));
        struct memory_line lines[16];
        assert_true(backend_cpu.memory_plan(program, &limits, lines, 16) > 0);
        assert_string_equal(lines[0].what, "weights");
        assert_int_equal(packed, lines[0].bytes_each);
        tiny_program_free(program);
    }
}

static void test_copy_bandwidth(void **state) {
    (void)state;
    struct backend_limits limits = small_limits();
    for (const struct backend_ops *const *ops = backends; *ops; ops++) {
        if (*ops != &backend_cpu && *ops != &backend_reference && *ops != &backend_mock) continue;
        double bandwidth = (*ops)->copy_bandwidth(&limits);
        assert_true(bandwidth > 1e7 && bandwidth < 1e14);
    }
}

/* What is not waited is the host's: both are some of the step and, together, all of it. */
static void test_time_waited(void **state) {
    (void)state;
    struct tiny_shape shape = tiny_shape_default();
    struct program *program = tiny_program_new(&shape);
    static const struct sampling greedy = {.top_p = 1, .repetition_penalty = 1, .n_top = -1};
    uint32_t lanes = program_lanes(program), ids[BLOCKS], first[BLOCKS], filled[BLOCKS] = {0};
    const int32_t tokens[ROWS] = {1, 2, 3, 4}, positions[ROWS] = {0, 1, 2, 3};
    assert_true(lanes <= BLOCKS);
    for (uint32_t i = 0; i < BLOCKS; i++) ids[i] = first[i] = i;
    const struct batch_sequence sequence = {.n_rows = ROWS, .lane_first = first, .lane_tokens = filled};
    const struct sample sample = {.row = ROWS - 1, .sampling = &greedy, .target = -1, .history = tokens, .n_prompt = 1, .n_history = ROWS};
    const struct batch batch = {.n_rows = ROWS,
                                .n_sequences = 1,
                                .n_samples = 1,
                                .tokens = tokens,
                                .positions = positions,
                                .sequences = &sequence,
                                .block_ids = ids,
                                .samples = &sample};
    const struct backend_ops *const all[] = {&backend_cpu, &backend_reference, &backend_mock};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        struct backend_limits limits = small_limits();
        uint64_t waited = 0;
        struct backend *backend;
        struct sample_result result;
        limits.wait_ns = &waited;
        limits.mock_tokens_per_second = 1000; /* mock: four milliseconds */
        assert_int_equal(all[i]->prepare(program, &limits, &backend, NULL), STATUS_OK);
        uint64_t begun = clock_now_ns();
        assert_int_equal(all[i]->submit(backend, &batch, NULL), STATUS_OK);
        assert_int_equal(all[i]->sync(backend, &result, NULL), STATUS_OK);
        uint64_t elapsed = clock_now_ns() - begun;
        assert_true(waited > 0 && waited <= elapsed);
        if (all[i] == &backend_mock) assert_true(waited >= 4000000);
        all[i]->close(backend);
    }
    tiny_program_free(program);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_no_backend_reads_weights_that_are_not_there),
        cmocka_unit_test(test_weight_bytes),
        cmocka_unit_test(test_copy_bandwidth),
        cmocka_unit_test(test_time_waited),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
