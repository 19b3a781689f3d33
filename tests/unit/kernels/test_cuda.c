/* What the cuda backend says without a device: shapes and limits that it refuses, by name, before it looks for one; plans of any size. Not built where the backend is not. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/backend.h"
#include "tests/support/tiny_program.h"

enum status cublas_lt_open(struct error *error) __attribute__((weak)); /* kernels/cuda/cublas.h, which is C++; absent where the backend is */
void host_lose_device(void) __attribute__((weak));                     /* tests/host_device/launch.h; absent where a device would be */

static struct backend_limits small_limits(void) {
    return (struct backend_limits){.kv_dtype = KV_F16,
                                   .n_blocks = 64,
                                   .n_tables = 2,
                                   .table_blocks = 8,
                                   .max_rows = 16,
                                   .max_sequences = 2,
                                   .max_samples = 2,
                                   .rank_slots = 256};
}

/* `words` are in what supports says, and prepare too, and nothing came of it. */
static void refuses(const struct program *program, const struct backend_limits *limits, const char *words) {
    struct backend *backend = NULL;
    struct error error = {.text = ""};
    assert_int_equal(backend_find("cuda")->supports(program, limits, &error), STATUS_UNSUPPORTED);
    if (!strstr(error.text, words)) fail_msg("\"%s\" does not say \"%s\"", error.text, words);
    error.text[0] = '\0';
    assert_int_equal(backend_find("cuda")->prepare(program, limits, &backend, &error), STATUS_UNSUPPORTED);
    assert_null(backend);
    if (!strstr(error.text, words)) fail_msg("\"%s\" does not say \"%s\"", error.text, words);
}

static void test_refused_shapes(void **state) {
    (void)state;
    static const struct {
        uint32_t n_embd, n_heads, n_kv_heads, head_dim, n_ff;
        const char *words;
    } cases[] = {
        {64, 4, 2, 4, 96, "heads of 4 dims"},        {64, 4, 2, 36, 96, "heads of 36 dims"},  {64, 1, 1, 256, 96, "heads of 256 dims"},
        {60, 4, 2, 32, 96, "embeddings of 60 dims"}, {64, 4, 2, 32, 98, "an MLP of 98 dims"}, {64, 4, 2, 32, 97, "an MLP of 97 dims"},
    };
    const struct backend_limits limits = small_limits();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct tiny_shape shape = tiny_shape_default();
        shape.n_embd = cases[i].n_embd, shape.n_heads = cases[i].n_heads, shape.n_kv_heads = cases[i].n_kv_heads;
        shape.head_dim = cases[i].head_dim, shape.n_ff = cases[i].n_ff;
        struct program *program = tiny_program_new(&shape);
        refuses(program, &limits, cases[i].words);
        refuses(program, &limits, "--backend cpu"); /* what to do, where "auto" came to this device */
        tiny_program_free(program);
    }
}

static void test_refused_limits(void **state) {
    (void)state;
    struct tiny_shape shape = tiny_shape_default();
    struct program *program = tiny_program_new(&shape);
    struct backend_limits limits = small_limits();
    limits.kv_dtype = KV_F32;
    refuses(program, &limits, "KV dtype f32");
    limits = small_limits(), limits.max_rows = 65536;
    refuses(program, &limits, "engine.max_rows 65536");
    limits = small_limits(), limits.n_tables = limits.max_sequences = 4096, limits.table_blocks = 1 << 19;
    refuses(program, &limits, "block tables of 4096 sequences, 4 lanes");
    limits = small_limits(), limits.rank_slots = 1 << 30;
    refuses(program, &limits, "4 lanes of 1073741824 tokens");
    limits = small_limits(), limits.n_tables = 1, limits.table_blocks = 1 << 27;
    refuses(program, &limits, "sequences of 134217728 blocks a lane");
    limits = small_limits(), limits.kv_dtype = KV_KIVI4, limits.n_tables = 1 << 28, limits.table_blocks = 1;
    refuses(program, &limits, "the f16 blocks of 4 lanes");
    tiny_program_free(program);

    shape.n_heads = 64, shape.n_kv_heads = 1, shape.head_dim = 8; /* 64 query heads a KV head: as many tiles as rows */
    program = tiny_program_new(&shape);
    limits = small_limits(), limits.max_rows = 65535;
    refuses(program, &limits, "with 64 query heads a KV head");
    tiny_program_free(program);
}

/* A model may say that it was trained for any length: its plan is a number, not an end of the process. */
static void test_plans_of_any_size(void **state) {
    (void)state;
    struct tiny_shape shape = tiny_shape_default();
    struct program *program = tiny_program_new(&shape);
    struct backend_limits limits = small_limits();
    struct memory_line lines[16];
    uint64_t small = 0, large = 0, pinned = 0;
    for (uint32_t i = 0, n = backend_find("cuda")->memory_plan(program, &limits, lines, 16); i < n; i++)
        small += lines[i].count * lines[i].bytes_each;
    assert_true(backend_find("cuda")->memory_plan(program, &limits, lines, 16) == 4 && strcmp(lines[0].what, "weights") == 0 && !lines[0].host);
    for (uint32_t i = 0; i < 4; i++) pinned += lines[i].host ? lines[i].count * lines[i].bytes_each : 0;
    assert_in_range(pinned, 1 << 20, 64 << 20); /* of the host's memory, and bounded */
    limits.kv_dtype = KV_KIVI2;                 /* of which the newest blocks are kept in f16 as well */
    const uint32_t n_kivi = backend_find("cuda")->memory_plan(program, &limits, lines, 16);
    assert_true(n_kivi == 5 && strcmp(lines[4].what, "KV residual") == 0 && !lines[4].host);
    assert_true(lines[4].bytes_each >
                (uint64_t)program_lanes(program) * 3 * limits.max_sequences * 2 * BLOCK_TOKENS * program->head_dim * sizeof(uint16_t));
    limits.kv_dtype = KV_F16;
    program->n_layers = 1024; /* counted alone; its phases stay two layers' */
    program->n_kv_heads = program->n_heads = 1024;
    limits.table_blocks = 1 << 19, limits.rank_slots = 1 << 24, limits.n_tables = limits.max_sequences = 4096;
    for (uint32_t i = 0, n = backend_find("cuda")->memory_plan(program, &limits, lines, 16); i < n; i++)
        large += lines[i].count * lines[i].bytes_each;
    assert_true(small > 0 && large > 1ull << 50); /* 2^52 table entries alone */
    program->n_layers = shape.n_layers, program->n_heads = shape.n_heads, program->n_kv_heads = shape.n_kv_heads;
    tiny_program_free(program);
}

/* What is not refused comes to the device: one is found, or it is said that there is none. */
static void test_supported(void **state) {
    (void)state;
    struct tiny_shape shape = tiny_shape_default();
    shape.n_heads = 64, shape.n_kv_heads = 1, shape.head_dim = 8, shape.n_layers = 1, shape.n_vocab = 1,
    shape.tied_head = shape.biases = shape.qk_norms = true;
    struct program *program = tiny_program_new(&shape);
    const struct backend_ops *ops = backend_find("cuda");
    const struct backend_limits limits = small_limits();
    struct backend *backend = NULL;
    struct error none = {.text = ""}, error = {.text = ""};
    const enum status device = ops->memory(0, NULL, NULL, &none);
    assert_int_equal(ops->supports(program, &limits, &error), STATUS_OK);
    assert_int_equal(ops->prepare(program, &limits, &backend, &error), device);
    if (device != STATUS_OK) assert_string_equal(error.text, none.text);
    ops->close(backend);
    tiny_program_free(program);
}

/* What does not fit is named, with what it takes. */
static void test_too_little_memory(void **state) {
    (void)state;
    struct tiny_shape shape = tiny_shape_default();
    struct program *program = tiny_program_new(&shape);
    const struct backend_ops *ops = backend_find("cuda");
    struct backend_limits limits = small_limits();
    struct backend *backend = NULL;
    struct error error = {.text = ""};
    const bool there = ops->memory(0, NULL, NULL, NULL) == STATUS_OK;
    limits.n_blocks = 1u << 30; /* a terabyte and more */
    const enum status status = ops->prepare(program, &limits, &backend, &error);
    assert_int_equal(status, there ? STATUS_NO_MEMORY : STATUS_UNSUPPORTED);
    assert_null(backend);
    if (there && !strstr(error.text, "CUDA device: KV pool takes ")) fail_msg("\"%s\"", error.text);
    tiny_program_free(program);
    if (!there) skip();
}

static void test_no_such_device(void **state) {
    (void)state;
    struct error error = {.text = ""};
    assert_int_equal(backend_find("cuda")->memory(4096, NULL, NULL, &error), STATUS_UNSUPPORTED);
    assert_non_null(strstr(error.text, "no CUDA device"));
    assert_null(strstr(error.text, "insufficient")); /* what the runtime says where no driver is */
}

/* Of several devices the others do not matter: not where they are full, and nothing is taken of them. */
static void test_second_device(void **state) {
    (void)state;
    uint64_t available = 0, total = 0;
    struct backend_limits limits = small_limits();
    struct error error = {.text = ""};
    struct backend *backend = NULL;
    const char *const first = getenv("KVASIR_TEST_SECOND_DEVICE"); /* what is wrong with the first one */
    if (!first) skip();
    assert_int_not_equal(backend_find("cuda")->memory(0, &available, &total, &error), STATUS_OK);
    if (!strstr(error.text, first)) fail_msg("\"%s\" does not say \"%s\"", error.text, first);
    if (backend_find("cuda")->memory(1, &available, &total, &error) != STATUS_OK) fail_msg("%s", error.text);
    assert_ptr_equal(backend_choose("auto", 1), backend_find("cuda"));
    assert_in_range(available, 1, total);
    struct tiny_shape shape = tiny_shape_default();
    struct program *program = tiny_program_new(&shape);
    limits.device = 1;
    if (backend_find("cuda")->prepare(program, &limits, &backend, &error) != STATUS_OK) fail_msg("%s", error.text);
    backend_find("cuda")->close(backend);
    tiny_program_free(program);
}

/* A device that the program cannot use, as KVASIR_TEST_NO_DEVICE says of the one that there is: no error later on, and "auto" goes past it. */
static void test_device_that_is_too_old(void **state) {
    (void)state;
    const char *const words = getenv("KVASIR_TEST_NO_DEVICE");
    struct error error = {.text = ""};
    if (!words) skip();
    assert_int_equal(backend_find("cuda")->memory(0, NULL, NULL, &error), STATUS_UNSUPPORTED);
    if (!strstr(error.text, words)) fail_msg("\"%s\" does not say \"%s\"", error.text, words);
    assert_ptr_not_equal(backend_choose("auto", 0), backend_find("cuda"));
}

/* Called in a process of its own, with a backend whose device has stopped working: what is said on stderr; the exit status. */
static int without_a_device(struct backend *backend, void (*call)(struct backend *backend), char *said, size_t bytes) {
    int ends[2], status;
    size_t used = 0;
    assert_int_equal(pipe(ends), 0);
    (void)fflush(NULL);
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        (void)dup2(ends[1], STDERR_FILENO);
        host_lose_device();
        call(backend);
        _exit(0);
    }
    (void)close(ends[1]);
    for (ssize_t n; used + 1 < bytes && (n = read(ends[0], said + used, bytes - 1 - used)) > 0;) used += (size_t)n;
    said[used] = '\0';
    (void)close(ends[0]);
    assert_int_equal(waitpid(child, &status, 0), child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void read_slot(struct backend *backend) {
    float k[128], v[128];
    int32_t position;
    backend->ops->read_f32(backend, 0, 0, k, v, &position);
}
static void step(struct backend *backend) {
    static const int32_t token = 1, position = 0;
    static uint32_t blocks[64], first[64], tokens[64];
    for (uint32_t i = 0; i < 64; i++) blocks[i] = first[i] = i;
    const struct batch_sequence sequence = {.n_rows = 1, .lane_tokens = tokens, .lane_first = first};
    const struct batch batch = {.n_rows = 1, .tokens = &token, .positions = &position, .n_sequences = 1, .sequences = &sequence, .block_ids = blocks};
    struct error error;
    if (backend->ops->submit(backend, &batch, &error) == STATUS_OK) (void)backend->ops->sync(backend, NULL, &error);
}

/* What the device held is gone, so nothing can go on: the process says so and ends with 1, for its supervisor to start a new one; in a step, where errors could be returned, as between steps. */
static void test_device_that_stops_working(void **state) {
    (void)state;
    static void (*const calls[])(struct backend * backend) = {read_slot, step};
    if (!host_lose_device) skip(); /* a real one */
    struct tiny_shape shape = tiny_shape_default();
    struct program *program = tiny_program_new(&shape);
    const struct backend_ops *ops = backend_find("cuda");
    const struct backend_limits limits = small_limits();
    struct backend *backend = NULL;
    struct error error = {.text = ""};
    const enum status status = ops->prepare(program, &limits, &backend, &error);
    for (size_t i = 0; status == STATUS_OK && i < sizeof calls / sizeof *calls; i++) {
        char said[1024];
        assert_int_equal(without_a_device(backend, calls[i], said, sizeof said), 1);
        if (!strstr(said, "kvasir: CUDA: cudaStreamSynchronize") || !strstr(said, "what the device holds is lost, the process ends"))
            fail_msg("said \"%s\"", said);
    }
    ops->close(backend);
    tiny_program_free(program);
    if (status != STATUS_OK) skip(); /* one that is too old */
}

/* Where it was built, it is there, and has every function that is called. */
static void test_cublas_is_loaded(void **state) {
    (void)state;
    struct error error = {.text = ""};
    if (cublas_lt_open(&error) != STATUS_OK) fail_msg("%s", error.text);
    assert_int_equal(cublas_lt_open(NULL), STATUS_OK);
}

/* A prompt in chunks that no block's size divides, with places for one sequence alone: what a chunk has held of KIVI's residual is given back, else there would soon be none. */
static void test_kivi_prompt_in_chunks(void **state) {
    (void)state;
    enum { CHUNK = 20, BLOCKS = 24, LANES = 4 };
    static uint32_t ids[LANES * BLOCKS];
    uint32_t lane_first[LANES], lane_tokens[LANES] = {0};
    int32_t tokens[CHUNK], positions[CHUNK];
    const struct backend_ops *ops = backend_find("cuda");
    const struct tiny_shape shape = tiny_shape_default();
    struct program *program = tiny_program_new(&shape);
    struct backend_limits limits = small_limits();
    struct backend *backend = NULL;
    struct error error = {.text = ""};
    assert_int_equal(program_lanes(program), LANES);
    limits.kv_dtype = KV_KIVI4, limits.n_blocks = LANES * BLOCKS, limits.table_blocks = BLOCKS, limits.max_rows = CHUNK;
    limits.n_tables = limits.max_sequences = limits.max_samples = 1;
    if (ops->memory(0, NULL, NULL, NULL) != STATUS_OK) {
        tiny_program_free(program);
        skip();
    }
    if (ops->prepare(program, &limits, &backend, &error) != STATUS_OK) fail_msg("%s", error.text);
    for (uint32_t i = 0; i < LANES * BLOCKS; i++) ids[i] = i;
    for (uint32_t lane = 0; lane < LANES; lane++) lane_first[lane] = lane * BLOCKS;
    for (uint32_t done = 0; done + CHUNK <= BLOCKS * BLOCK_TOKENS; done += CHUNK) {
        const struct batch_sequence sequence = {.n_rows = CHUNK, .table_changes = 1, .lane_first = lane_first, .lane_tokens = lane_tokens};
        const struct batch batch = {
            .n_rows = CHUNK, .tokens = tokens, .positions = positions, .n_sequences = 1, .sequences = &sequence, .block_ids = ids};
        for (uint32_t i = 0; i < CHUNK; i++) tokens[i] = (int32_t)(i % 7), positions[i] = (int32_t)(done + i);
        if (ops->submit(backend, &batch, &error) != STATUS_OK || ops->sync(backend, NULL, &error) != STATUS_OK) fail_msg("%s", error.text);
        for (uint32_t lane = 0; lane < LANES; lane++) lane_tokens[lane] += CHUNK;
    }
    ops->close(backend);
    tiny_program_free(program);
}

int main(void) {
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_refused_shapes),   cmocka_unit_test(test_refused_limits),         cmocka_unit_test(test_plans_of_any_size),
        cmocka_unit_test(test_supported),        cmocka_unit_test(test_too_little_memory),      cmocka_unit_test(test_no_such_device),
        cmocka_unit_test(test_second_device),    cmocka_unit_test(test_device_that_is_too_old), cmocka_unit_test(test_device_that_stops_working),
        cmocka_unit_test(test_cublas_is_loaded), cmocka_unit_test(test_kivi_prompt_in_chunks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
