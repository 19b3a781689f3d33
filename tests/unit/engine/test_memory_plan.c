/* The memory plan: what fits, what is lowered, what is refused with which arithmetic, on the host and on a device made up here; and the memory there is, read from trees made
 * here. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <ftw.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/check.h"
#include "engine/internal.h"
#include "engine/system_memory.h"
#include "kernels/cpu/isa.h"

#define MIB (1ull << 20)
#define GIB (1ull << 30)

static struct model *model;

static struct config defaults(void) {
    struct config config;
    config_defaults(&config);
    config.threads = 2;
    return config;
}

static enum status plan_for(const struct config *config, uint64_t available, struct memory_plan *plan, struct error *error) {
    return engine_plan_memory_on(&backend_reference, config, model, available, plan, error);
}

static struct memory_plan planned(const struct config *config, uint64_t available) {
    struct memory_plan plan;
    struct error error;
    if (plan_for(config, available, &plan, &error) != STATUS_OK) fail_msg("%s", error.text);
    return plan;
}

static uint64_t sequence_blocks(const struct memory_plan *plan) {
    return (uint64_t)program_lanes(model_program(model)) * ((plan->max_model_len + BLOCK_TOKENS - 1) / BLOCK_TOKENS);
}

static void check_plan(const struct memory_plan *plan) {
    uint64_t sum = 0, pool = 0;
    for (uint32_t i = 0; i < plan->n_lines; i++) {
        sum += plan->lines[i].count * plan->lines[i].bytes_each;
        if (strcmp(plan->lines[i].what, "KV block") == 0) pool = plan->lines[i].count;
    }
    assert_int_equal(sum, plan->total_bytes);
    assert_int_equal(pool, plan->n_blocks);
    assert_true(plan->total_bytes <= plan->available_bytes);
    assert_true(plan->n_blocks >= sequence_blocks(plan));
    assert_true(plan->n_blocks <= sequence_blocks(plan) * plan->max_sequences);
}

static void test_with_no_options_it_fits(void **state) {
    (void)state;
    struct config config = defaults();
    struct memory_plan plan = planned(&config, 64 * GIB);
    check_plan(&plan);
    assert_int_equal(plan.max_model_len, 8192);
    assert_int_equal(plan.max_sequences, 64);
    assert_int_equal(plan.queue_choices, 64 + config.max_queue);
    assert_int_equal(plan.max_choices, plan.queue_choices + 64 + config.max_choices);
    assert_int_equal(plan.n_blocks, 64 * sequence_blocks(&plan)); /* no more than can be used */
    assert_string_equal(plan.lowered, "");
    config.threads = 64;
    assert_int_equal(planned(&config, 256 * GIB).max_sequences, 256);
}

static void test_less_memory_gives_a_smaller_pool(void **state) {
    (void)state;
    struct config config = defaults();
    uint32_t before = UINT32_MAX;
    for (uint64_t available = 2 * GIB; available >= 16 * MIB; available = available * 2 / 3) {
        struct memory_plan plan = planned(&config, available);
        check_plan(&plan);
        assert_true(plan.n_blocks <= before);
        assert_true(plan.total_bytes <= available - available / 10);
        assert_true((plan.lowered[0] != 0) == (plan.max_model_len < 8192));
        before = plan.n_blocks;
    }
}

static void test_max_model_len_is_lowered_and_said(void **state) {
    (void)state;
    struct config config = defaults();
    config.kv_memory = 1 * MIB;
    struct memory_plan plan = planned(&config, 4 * GIB);
    check_plan(&plan);
    assert_true(plan.max_model_len < 8192 && plan.max_model_len >= 64);
    assert_non_null(strstr(plan.lowered, "max_model_len 8192 -> "));
    assert_non_null(strstr(plan.lowered, "engine.kv_memory"));
}

static void refused(const struct config *config, uint64_t available, enum status expected, const char *words) {
    struct memory_plan plan;
    struct error error = {.text = ""};
    assert_int_equal(plan_for(config, available, &plan, &error), expected);
    if (!strstr(error.text, words)) fail_msg("\"%s\" does not say \"%s\"", error.text, words);
}

static void test_what_is_asked_for_and_does_not_fit_is_refused(void **state) {
    (void)state;
    struct config config = defaults();
    config.kv_memory = 1 * MIB;
    config.max_model_len = 8192;
    refused(&config, 4 * GIB, STATUS_INVALID, "4 lanes x 256 blocks x");
    config.max_model_len = 0;
    config.kv_memory = 4096;
    refused(&config, 4 * GIB, STATUS_INVALID, "do not hold one sequence of 64 tokens");
    config.kv_memory = 8 * GIB;
    refused(&config, 4 * GIB, STATUS_NO_MEMORY, "exceed the 4096.0 MiB available");
    config.kv_memory = UINT64_MAX;
    refused(&config, 4 * GIB, STATUS_NO_MEMORY, "exceed");
    config = defaults();
    config.max_model_len = 8193;
    refused(&config, 4 * GIB, STATUS_INVALID, "the model was trained for 8192");
    config.max_model_len = 8192;
    refused(&config, 3 * MIB, STATUS_NO_MEMORY, "one sequence of 8192 tokens");
    config = defaults();
    refused(&config, 1 * MIB, STATUS_NO_MEMORY, "1.0 MiB are available");
    refused(&config, 0, STATUS_NO_MEMORY, "0.0 MiB are available");
}

static void test_printed(void **state) {
    (void)state;
    struct config config = defaults();
    struct memory_plan plan = planned(&config, 64 * GIB);
    char *text = NULL;
    size_t length = 0;
    FILE *out = open_memstream(&text, &length);
    memory_plan_print(&plan, out);
    (void)fclose(out);
    char expected[128];
    (void)snprintf(expected, sizeof expected, "%-16s %12u x %14zu = ", "KV block", plan.n_blocks, plan.block_bytes);
    assert_non_null(strstr(text, expected));
    assert_non_null(strstr(text, "of 64.00 GiB available"));
    assert_non_null(strstr(text, "64 sequences at once of at most 8192 tokens"));
    free(text);
}

/* ---- a device ---- */

#define F16_BYTES (1000 * MIB)
#define NATIVE_BYTES (300 * MIB)
#define STAGING_BYTES (5 * MIB)

static struct {
    uint32_t asked; /* for this device */
    uint64_t available, total;
    bool absent;
    uint64_t block_scratch;  /* for each block of the longest lane */
    uint64_t sequence_bytes; /* for each sequence */
    const char *cannot;      /* what supports says; NULL: all is well */
} device;

static enum status device_memory(uint32_t number, uint64_t *available, uint64_t *total, struct error *error) {
    device.asked = number;
    if (device.absent) return error_set(error, STATUS_UNSUPPORTED, "no CUDA device: nothing is plugged in");
    *available = device.available;
    *total = device.total;
    return STATUS_OK;
}

static size_t device_block_bytes(const struct program *program, enum kv_dtype dtype) {
    return dtype == KV_F32 ? 0 : backend_reference.block_bytes(program, dtype);
}

static uint32_t device_plan(const struct program *program, const struct backend_limits *limits, struct memory_line *lines, uint32_t max) {
    assert_true(max >= 5);
    lines[0] = (struct memory_line){.what = "weights", .count = 1, .bytes_each = limits->weights == WEIGHTS_NATIVE ? NATIVE_BYTES : F16_BYTES};
    lines[1] = (struct memory_line){
        .what = "tables", .count = limits->n_tables, .bytes_each = (uint64_t)program_lanes(program) * limits->table_blocks * sizeof(uint32_t)};
    lines[2] = (struct memory_line){.what = "staging", .count = 1, .bytes_each = STAGING_BYTES, .host = true};
    lines[3] = (struct memory_line){.what = "scratch", .count = limits->table_blocks, .bytes_each = device.block_scratch};
    if (device.sequence_bytes == 0) return 4;
    lines[4] = (struct memory_line){.what = "query rings", .count = limits->max_sequences, .bytes_each = device.sequence_bytes};
    return 5;
}

static enum status device_supports(const struct program *program, const struct backend_limits *limits, struct error *error) {
    (void)program;
    assert_true(limits->n_tables > 0 && limits->table_blocks > 0 && limits->n_blocks > 0); /* as they will be */
    return device.cannot ? error_set(error, STATUS_UNSUPPORTED, "%s", device.cannot) : STATUS_OK;
}

static struct backend_ops device_ops(uint64_t available, uint64_t total) {
    struct backend_ops ops = backend_reference;
    ops.name = "cuda";
    ops.memory = device_memory;
    ops.block_bytes = device_block_bytes;
    ops.memory_plan = device_plan;
    ops.supports = device_supports;
    device.available = available;
    device.total = total;
    device.absent = false;
    device.block_scratch = device.sequence_bytes = 0;
    device.cannot = NULL;
    return ops;
}

static struct memory_plan planned_on(const struct backend_ops *ops, const struct config *config, uint64_t available) {
    struct memory_plan plan;
    struct error error;
    if (engine_plan_memory_on(ops, config, model, available, &plan, &error) != STATUS_OK) fail_msg("%s", error.text);
    return plan;
}

static void refused_on(const struct backend_ops *ops, const struct config *config, uint64_t available, enum status expected, const char *words) {
    struct memory_plan plan;
    struct error error = {.text = ""};
    assert_int_equal(engine_plan_memory_on(ops, config, model, available, &plan, &error), expected);
    if (!strstr(error.text, words)) fail_msg("\"%s\" does not say \"%s\"", error.text, words);
}

/* Each line counts against the memory it lies in. */
static void check_device_plan(const struct memory_plan *plan) {
    uint64_t host = 0, on_device = 0, pool = 0;
    for (uint32_t i = 0; i < plan->n_lines; i++) {
        const struct memory_line *line = &plan->lines[i];
        *(line->host ? &host : &on_device) += line->count * line->bytes_each;
        bool of_backend = strcmp(line->what, "weights") == 0 || strcmp(line->what, "scratch") == 0 || strcmp(line->what, "tables") == 0 ||
                          strcmp(line->what, "KV block") == 0 || strcmp(line->what, "query rings") == 0;
        assert_true(line->host != of_backend);
        if (strcmp(line->what, "KV block") == 0) pool = line->count;
    }
    assert_true(plan->has_device);
    assert_int_equal(host, plan->total_bytes);
    assert_int_equal(on_device, plan->device_bytes);
    assert_int_equal(pool, plan->n_blocks);
    assert_true(host <= plan->available_bytes && on_device < plan->device_available_bytes);
    assert_true(plan->n_blocks >= sequence_blocks(plan));
}

static void test_two_memories(void **state) {
    (void)state;
    struct config config = defaults();
    config.device = 3;
    struct backend_ops ops = device_ops(1100 * MIB, 4 * GIB);
    struct memory_plan plan = planned_on(&ops, &config, 200 * MIB);
    check_device_plan(&plan);
    assert_int_equal(device.asked, 3);
    assert_int_equal(plan.max_sequences, 256);
    assert_int_equal(plan.weights, WEIGHTS_F16); /* 1000 MiB are less than 40 % of 4 GiB */
    uint64_t tables = 256ull * program_lanes(model_program(model)) * 257 * sizeof(uint32_t);
    assert_int_equal(plan.device_bytes, F16_BYTES + tables + plan.n_blocks * plan.block_bytes);
    /* A twentieth stays free, and what is left is filled to the last block. */
    uint64_t left = 1100 * MIB - 1100 * MIB / 20 - F16_BYTES - tables;
    assert_int_equal(plan.n_blocks, left / plan.block_bytes);
    assert_int_equal(plan.weights_plans[WEIGHTS_F16].bytes, F16_BYTES);
    assert_int_equal(plan.weights_plans[WEIGHTS_NATIVE].bytes, NATIVE_BYTES);
    assert_int_equal(plan.weights_plans[WEIGHTS_F16].kv_tokens, left / plan.block_bytes / program_lanes(model_program(model)) * BLOCK_TOKENS);
    assert_int_equal(plan.weights_plans[WEIGHTS_NATIVE].kv_tokens,
                     (left + 700 * MIB) / plan.block_bytes / program_lanes(model_program(model)) * BLOCK_TOKENS);
    device.total = 2 * GIB;
    plan = planned_on(&ops, &config, 200 * MIB);
    assert_int_equal(plan.weights, WEIGHTS_NATIVE);
    check_device_plan(&plan);
    strcpy(config.weights, "f16"); /* as is said */
    assert_int_equal(planned_on(&ops, &config, 200 * MIB).weights, WEIGHTS_F16);
    device.available = 100 * GIB; /* of a large device a twentieth would be much */
    plan = planned_on(&ops, &config, 4 * GIB);
    assert_int_equal(plan.n_blocks, 256 * sequence_blocks(&plan));
    assert_int_equal(plan.weights_plans[WEIGHTS_F16].kv_tokens,
                     (99 * GIB - F16_BYTES - tables) / plan.block_bytes / program_lanes(model_program(model)) * BLOCK_TOKENS);
}

static void test_device_limits(void **state) {
    (void)state;
    struct config config = defaults();
    config.device = 1;
    config.deterministic = true;
    config.max_model_len = 100;
    strcpy(config.weights, "native");
    struct backend_ops ops = device_ops(2 * GIB, 2 * GIB);
    struct memory_plan plan = planned_on(&ops, &config, GIB);
    struct backend_limits limits;
    engine_backend_limits(&plan, &config, &limits);
    assert_int_equal(limits.activation_bits, 8);
    strcpy(config.activations, "16bit");
    engine_backend_limits(&plan, &config, &limits);
    assert_int_equal(limits.activation_bits, 16);
    assert_int_equal(limits.device, 1);
    assert_true(limits.deterministic);
    assert_int_equal(limits.weights, WEIGHTS_NATIVE);
    assert_int_equal(limits.n_tables, plan.max_sequences);
    assert_int_equal(limits.table_blocks, 5); /* 100 tokens lie in 4 blocks, and one more may be listed */
}

static void test_what_a_device_does_not_hold_is_refused(void **state) {
    (void)state;
    struct config config = defaults();
    struct backend_ops ops = device_ops(512 * MIB, 4 * GIB);
    refused_on(&ops, &config, GIB, STATUS_NO_MEMORY, "device memory: 512.0 MiB are available");
    config.kv_memory = 400 * MIB;
    strcpy(config.weights, "native");
    refused_on(&ops, &config, GIB, STATUS_NO_MEMORY, "exceed the 512.0 MiB available on the device");
    config = defaults();
    ops = device_ops(2 * GIB, 4 * GIB);
    refused_on(&ops, &config, 1 * MIB, STATUS_NO_MEMORY, "memory: 1.0 MiB are available");
    strcpy(config.kv_dtype, "f32");
    refused_on(&ops, &config, GIB, STATUS_UNSUPPORTED, "engine.kv_dtype: the cuda backend does not store f32");
    config = defaults();
    device.absent = true;
    refused_on(&ops, &config, GIB, STATUS_UNSUPPORTED, "engine.backend: cuda: no CUDA device: nothing is plugged in");
    config.device = 1; /* on the host there is one */
    refused_on(&backend_reference, &config, GIB, STATUS_UNSUPPORTED, "engine.backend: reference: no device 1");
}

static void test_less_memory_of_a_device_shortens_sequences(void **state) {
    (void)state;
    struct config config = defaults();
    strcpy(config.weights, "native");
    for (uint64_t pool = 64 * MIB; pool >= 256 << 10; pool /= 2) {
        struct backend_ops ops = device_ops((NATIVE_BYTES + pool) * 20 / 19 + MIB, 4 * GIB);
        struct memory_plan plan = planned_on(&ops, &config, GIB);
        check_device_plan(&plan);
        assert_true((plan.lowered[0] != 0) == (plan.max_model_len < 8192));
        if (plan.lowered[0]) assert_non_null(strstr(plan.lowered, "free memory of the device"));
    }
}

/* What lies beside the pool grows with the length too: a model may have been trained for more tokens than there is room to list. */
static void test_scratch_of_long_sequences_shortens_them(void **state) {
    (void)state;
    struct config config = defaults();
    strcpy(config.weights, "native");
    struct backend_ops ops = device_ops((NATIVE_BYTES + 256 * MIB) * 20 / 19 + MIB, 4 * GIB);
    device.block_scratch = 2 * MIB; /* 514 MiB for 8192 tokens */
    struct memory_plan plan = planned_on(&ops, &config, GIB);
    check_device_plan(&plan);
    assert_true(plan.max_model_len >= 1024 && plan.max_model_len < 4096);
    assert_non_null(strstr(plan.lowered, "max_model_len 8192 -> "));
    config.max_model_len = 8192;
    refused_on(&ops, &config, GIB, STATUS_NO_MEMORY, "device memory: ");
    config.max_model_len = 0;
    device.block_scratch = GIB; /* of the shortest too */
    refused_on(&ops, &config, GIB, STATUS_NO_MEMORY, "device memory: ");
}

/* Both ways to keep the weights are told at the lengths that it came to: what the chosen one leaves is the pool's, as far as that is of use. */
static void check_weights_plans(const struct memory_plan *plan) {
    const uint64_t useful = (uint64_t)plan->max_sequences * plan->max_model_len, left = plan->weights_plans[plan->weights].kv_tokens;
    assert_int_equal(plan->kv_tokens, left < useful ? left : useful);
    assert_true(plan->weights_plans[WEIGHTS_NATIVE].kv_tokens > plan->weights_plans[WEIGHTS_F16].kv_tokens);
}

static void test_weights_leave_what_the_pool_takes(void **state) {
    (void)state;
    struct config config = defaults();
    struct backend_ops ops = device_ops((F16_BYTES + 256 * MIB) * 20 / 19 + MIB, 4 * GIB);
    device.block_scratch = 2 * MIB; /* more than there is, at 8192 tokens */
    struct memory_plan plan = planned_on(&ops, &config, GIB);
    assert_true(plan.lowered[0] && plan.weights == WEIGHTS_F16);
    check_device_plan(&plan);
    check_weights_plans(&plan);
}

/* What each sequence takes beside the pool: so many run at once, where that is ours to choose, that most of it is the pool's. */
static void test_fewer_sequences_leave_more_of_a_device(void **state) {
    (void)state;
    struct config config = defaults();
    strcpy(config.weights, "native");
    struct backend_ops ops = device_ops(GIB, 4 * GIB);
    device.sequence_bytes = 8 * MIB; /* 2 GiB of 256 */
    struct memory_plan plan = planned_on(&ops, &config, GIB);
    check_device_plan(&plan);
    check_weights_plans(&plan);
    assert_in_range(plan.max_sequences, 16, 64);
    assert_int_equal(plan.queue_choices, plan.max_sequences + config.max_queue);
    assert_int_equal(plan.n_rings, plan.max_sequences);
    assert_non_null(strstr(plan.lowered, "max_sequences 256 -> "));
    assert_non_null(strstr(plan.lowered, "free memory of the device"));
    assert_null(strstr(plan.lowered, "max_model_len"));
    device.block_scratch = 2 * MIB; /* and both */
    plan = planned_on(&ops, &config, GIB);
    check_device_plan(&plan);
    assert_non_null(strstr(plan.lowered, "max_sequences 256 -> "));
    assert_non_null(strstr(plan.lowered, "max_model_len 8192 -> "));
    device.block_scratch = 0;
    config.max_sequences = 256; /* what is asked for is granted or refused */
    refused_on(&ops, &config, GIB, STATUS_NO_MEMORY, "2348.0 MiB go to weights and to scratch of 256 sequences; the rest, 0.0 MiB");
    config.max_sequences = 0;
    config.kv_memory = 128 * MIB; /* there is room beside it for 64 */
    plan = planned_on(&ops, &config, GIB);
    check_device_plan(&plan);
    assert_int_equal(plan.max_sequences, 64);
    config.kv_memory = 0;
    device.sequence_bytes = 2 * GIB;
    refused_on(&ops, &config, GIB, STATUS_NO_MEMORY, "device memory: ");
}

static void test_what_a_backend_cannot_do_is_refused(void **state) {
    (void)state;
    struct config config = defaults();
    struct backend_ops ops = device_ops(2 * GIB, 4 * GIB);
    device.cannot = "heads of 256 dims";
    refused_on(&ops, &config, GIB, STATUS_UNSUPPORTED, "heads of 256 dims");
}

static void test_two_memories_printed(void **state) {
    (void)state;
    struct config config = defaults();
    struct backend_ops ops = device_ops(1100 * MIB, 2 * GIB);
    struct memory_plan plan = planned_on(&ops, &config, 200 * MIB);
    char *text = NULL, expected[128];
    size_t length = 0;
    FILE *out = open_memstream(&text, &length);
    memory_plan_print(&plan, out);
    (void)fclose(out);
    const char *first = strstr(text, "device memory"), *second = strstr(text, "host memory");
    assert_true(first == text && second > first);
    const char *weights = strstr(text, "weights "), *staging = strstr(text, "staging "), *pool = strstr(text, "KV block ");
    assert_true(weights > first && weights < second && pool > first && pool < second && staging > second);
    (void)snprintf(expected, sizeof expected, "leaving room for %llu tokens (chosen)",
                   (unsigned long long)plan.weights_plans[WEIGHTS_NATIVE].kv_tokens);
    assert_non_null(strstr(text, expected));
    (void)snprintf(expected, sizeof expected, "leaving room for %llu tokens\n", (unsigned long long)plan.weights_plans[WEIGHTS_F16].kv_tokens);
    assert_non_null(strstr(text, expected));
    free(text);
}

static void test_kv_dtype_auto(void **state) {
    (void)state;
    assert_int_equal(backend_kv_dtype(&backend_mock, NULL), KV_F16);
    assert_int_equal(backend_kv_dtype(&backend_cpu, "generic"), KV_F16);
    assert_int_equal(backend_kv_dtype(&backend_cpu, "avx512bf16"), KV_BF16);
    /* Nothing asked: what fits the instructions that the backend chooses for itself, the last in the list that this CPU has. */
    const char *best = NULL;
    for (const struct cpu_isa *const *isa = cpu_isas; *isa; isa++)
        if ((*isa)->present()) best = (*isa)->name;
    assert_non_null(best);
    assert_int_equal(backend_kv_dtype(&backend_cpu, NULL), backend_kv_dtype(&backend_cpu, best));
    struct config config = defaults();
    strcpy(config.kv_dtype, "q8");
    assert_int_equal(planned(&config, 4 * GIB).kv_dtype, KV_Q8);
}

/* ---- the memory there is ---- */

static char root[] = "/tmp/kvasir-memory-XXXXXX";

static void put(const char *path, const char *text) {
    char full[512];
    (void)snprintf(full, sizeof full, "%s%s", root, path);
    for (char *slash = full + strlen(root) + 1; (slash = strchr(slash, '/')); slash++) {
        *slash = 0;
        (void)mkdir(full, 0700);
        *slash = '/';
    }
    FILE *file = fopen(full, "w");
    CHECK(file && fputs(text, file) >= 0 && fclose(file) == 0);
}

static int remove_one(const char *path, const struct stat *info, int type, struct FTW *ftw) {
    (void)info, (void)type, (void)ftw;
    return remove(path);
}

static void test_control_groups(void **state) {
    (void)state;
    assert_true(system_memory_available("") > 0);
    CHECK(mkdtemp(root));
    assert_true(system_memory_available(root) == UINT64_MAX);
    put("/proc/meminfo", "MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:    8000000 kB\n");
    assert_int_equal(system_memory_available(root), 8000000ull * 1024);
    put("/proc/self/cgroup", "0::/a/b\n");
    assert_int_equal(system_memory_available(root), 8000000ull * 1024); /* no such group here */
    put("/sys/fs/cgroup/a/b/memory.max", "max\n");
    put("/sys/fs/cgroup/a/memory.max", "1000000\n"); /* the parent's limit */
    assert_int_equal(system_memory_available(root), 1000000);
    put("/sys/fs/cgroup/a/memory.current", "400000\n");
    assert_int_equal(system_memory_available(root), 600000);
    put("/sys/fs/cgroup/a/memory.stat", "anon 5\ninactive_file 100000\nactive_file 7\n");
    assert_int_equal(system_memory_available(root), 700000);
    put("/sys/fs/cgroup/a/b/memory.max", "500000\n");
    assert_int_equal(system_memory_available(root), 500000);
    put("/sys/fs/cgroup/a/b/memory.current", "600000\n");
    assert_int_equal(system_memory_available(root), 0);
    put("/sys/fs/cgroup/a/b/memory.max", "99999999999999999999999\n"); /* no number: no limit */
    assert_int_equal(system_memory_available(root), 700000);
    put("/proc/self/cgroup", "12:cpu,cpuacct:/a\n4:memory:/v1\n1:name=systemd:/x\n");
    put("/sys/fs/cgroup/memory/v1/memory.limit_in_bytes", "9223372036854771712\n");
    put("/sys/fs/cgroup/memory/memory.limit_in_bytes", "300000\n"); /* at the root of the mount */
    put("/sys/fs/cgroup/memory/memory.usage_in_bytes", "100000\n");
    put("/sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 50000\n");
    assert_int_equal(system_memory_available(root), 250000);
    CHECK(nftw(root, remove_one, 16, FTW_DEPTH | FTW_PHYS) == 0);
}

static int open_model(void **state) {
    (void)state;
    struct error error;
    return model_dummy("tiny", 1, &model, &error);
}

static int close_model(void **state) {
    (void)state;
    model_close(model);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_with_no_options_it_fits),
        cmocka_unit_test(test_less_memory_gives_a_smaller_pool),
        cmocka_unit_test(test_max_model_len_is_lowered_and_said),
        cmocka_unit_test(test_what_is_asked_for_and_does_not_fit_is_refused),
        cmocka_unit_test(test_printed),
        cmocka_unit_test(test_two_memories),
        cmocka_unit_test(test_device_limits),
        cmocka_unit_test(test_what_a_device_does_not_hold_is_refused),
        cmocka_unit_test(test_less_memory_of_a_device_shortens_sequences),
        cmocka_unit_test(test_scratch_of_long_sequences_shortens_them),
        cmocka_unit_test(test_weights_leave_what_the_pool_takes),
        cmocka_unit_test(test_fewer_sequences_leave_more_of_a_device),
        cmocka_unit_test(test_what_a_backend_cannot_do_is_refused),
        cmocka_unit_test(test_two_memories_printed),
        cmocka_unit_test(test_kv_dtype_auto),
        cmocka_unit_test(test_control_groups),
    };
    return cmocka_run_group_tests(tests, open_model, close_model);
}
