/* The memory plan: everything large, from the configuration, the model, and the memory there is. Pure but for reading that. Any thread.
 * There are one or two memories: the host's, and that of a backend's device, where pool, weights and scratch lie then. Each line counts against the one it lies in.
 *
 * What is asked for by name is granted or refused with the arithmetic; what is left to us is made to fit, and what was lowered is said. */
#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>

#include "base/check.h"
#include "engine/internal.h"
#include "engine/system_memory.h"

enum {
    SEQUENCES_MIN = 64, /* of "auto": enough to fill a batch on two cores, */
    SEQUENCES_MAX = 256,
    SEQUENCES_PER_THREAD = 32,
    BLOCKS_MAX = 1 << 28,
    EXTENT_BYTES = 64 << 10,
    EXTENT_BLOCKS = 64,
    MODEL_LEN_MIN = 2 * BLOCK_TOKENS,
    INBOX_SPARE = 64,
    BACKEND_LINES = 16,
};

#define DEVICE_SPARE_MAX (1ull << 30)

/* Memory that is left to the system, to other processes' growth, to the server's buffers. */
static uint64_t host_spare(const struct memory_plan *plan) { return plan->available_bytes / 10; }

/* To libraries, which load their kernels when they first run them. */
static uint64_t device_spare(const struct memory_plan *plan) {
    uint64_t spare = plan->device_available_bytes / 20;
    return spare < DEVICE_SPARE_MAX ? spare : DEVICE_SPARE_MAX;
}

static uint64_t less(uint64_t a, uint64_t b) { return a > b ? a - b : 0; }
static uint64_t host_left(const struct memory_plan *plan) { return less(plan->available_bytes - host_spare(plan), plan->total_bytes); }
static uint64_t device_left(const struct memory_plan *plan) { return less(plan->device_available_bytes - device_spare(plan), plan->device_bytes); }

/* The memory in which the pool lies. */
static uint64_t pool_left(const struct memory_plan *plan) { return plan->has_device ? device_left(plan) : host_left(plan); }
static uint64_t pool_available(const struct memory_plan *plan) { return plan->has_device ? plan->device_available_bytes : plan->available_bytes; }
static uint64_t pool_spare(const struct memory_plan *plan) { return plan->has_device ? device_spare(plan) : host_spare(plan); }
static uint64_t beside_pool(const struct memory_plan *plan) { return plan->has_device ? plan->device_bytes : plan->total_bytes; }

static uint32_t thread_count(const struct config *config) {
    cpu_set_t set;
    if (config->threads) return config->threads;
    if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
    return (uint32_t)CPU_COUNT(&set);
}

static uint32_t auto_sequences(const struct config *config) {
    uint64_t n = (uint64_t)thread_count(config) * SEQUENCES_PER_THREAD;
    return n < SEQUENCES_MIN ? SEQUENCES_MIN : n > SEQUENCES_MAX ? SEQUENCES_MAX : (uint32_t)n;
}

static uint64_t blocks_of(const struct program *program, uint64_t tokens) {
    return (tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS * program_lanes(program);
}

/* One for each running sequence, and a prompt's end draws for all of its candidates at once. */
static uint32_t draws_of(const struct memory_plan *plan, const struct config *config) { return plan->max_sequences + config->max_choices; }

/* Events that wait: all tokens of a step beside one terminal event a choice, for which there is always room, and as many again, so that a step need not wait for the last one's events to be taken. */
struct engine_sizes engine_sizes(const struct memory_plan *plan, const struct config *config) {
    struct engine_sizes sizes = {.draws = draws_of(plan, config)};
    sizes.samples = sizes.draws + plan->max_rows;
    sizes.inbox = 3 * plan->max_choices + INBOX_SPARE;
    sizes.outbox = 2 * plan->max_choices + sizes.draws;
    return sizes;
}

void engine_backend_limits(const struct memory_plan *plan, const struct config *config, struct backend_limits *limits) {
    const struct scheduler_limits tables = {.max_model_len = plan->max_model_len};
    *limits = (struct backend_limits){
        .kv_dtype = plan->kv_dtype,
        .device = config->device,
        .weights = plan->weights,
        .deterministic = config->deterministic,
        .n_blocks = plan->n_blocks,
        .n_tables = plan->max_sequences,
        .table_blocks = scheduler_table_blocks(&tables),
        .max_rows = plan->max_rows,
        .max_sequences = plan->max_sequences,
        .max_samples = engine_sizes(plan, config).samples,
        .threads = config->threads,
        .instruction_set = strcmp(config->instruction_set, "auto") == 0 ? NULL : config->instruction_set,
        .drop_source_pages = true,
        .n_rings = plan->n_rings,
        .ring_rows = plan->ring_rows,
        .sink_slots = plan->sink_slots,
        .accumulators = plan->accumulators,
        .rank_slots = plan->max_model_len,
        .rank_places = RANK_PLACES_MAX,
        .mock_tokens_per_second = config->mock_tokens_per_second,
    };
    CHECK(activation_bits_parse(config->activations, &limits->activation_bits)); /* one of the option's choices */
}

void engine_scheduler_limits(const struct memory_plan *plan, const struct config *config, uint32_t n_lanes, struct scheduler_limits *limits) {
    uint64_t sequence = (uint64_t)((plan->max_model_len + BLOCK_TOKENS - 1) / BLOCK_TOKENS) * n_lanes;
    uint64_t watermark = plan->n_blocks / 50,
             spare = plan->n_blocks > sequence ? plan->n_blocks - sequence : 0; /* 2 %, but one sequence of max_model_len is always admitted */
    *limits = (struct scheduler_limits){
        .n_lanes = n_lanes,
        .n_blocks = plan->n_blocks,
        .extent_blocks = plan->extent_blocks,
        .max_sequences = plan->max_sequences,
        .max_choices = plan->max_choices,
        .max_model_len = plan->max_model_len,
        .max_rows = plan->max_rows,
        .max_samples = engine_sizes(plan, config).draws,
        .step_budget_us = config->step_ms * 1000,
        .watermark_blocks = (uint32_t)(watermark < spare ? watermark : spare),
        .n_rings = plan->n_rings,
        .prefix_cache = config->prefix_cache,
    };
}

static uint64_t scheduler_takes(const struct config *config, const struct program *program, const struct memory_plan *plan) {
    struct scheduler_limits limits;
    engine_scheduler_limits(plan, config, program_lanes(program), &limits);
    return scheduler_bytes(&limits);
}

static void add_line(struct memory_plan *plan, const struct memory_line *line) {
    CHECK(plan->n_lines < sizeof plan->lines / sizeof *plan->lines);
    if (line->count == 0 || line->bytes_each == 0) return;
    plan->lines[plan->n_lines++] = *line;
    *(plan->has_device && !line->host ? &plan->device_bytes : &plan->total_bytes) += line->count * line->bytes_each;
}

static void add_host_line(struct memory_plan *plan, const char *what, uint64_t count, uint64_t bytes_each) {
    add_line(plan, &(struct memory_line){.what = what, .count = count, .bytes_each = bytes_each, .host = true});
}

/* The backend's lines. */
static uint32_t backend_lines(const struct backend_ops *ops, const struct config *config, const struct program *program,
                              const struct memory_plan *plan, struct memory_line lines[BACKEND_LINES]) {
    struct backend_limits limits;
    engine_backend_limits(plan, config, &limits);
    return ops->memory_plan(program, &limits, lines, BACKEND_LINES);
}

static enum status backend_supports(const struct backend_ops *ops, const struct config *config, const struct program *program,
                                    const struct memory_plan *plan, struct error *error) {
    struct backend_limits limits;
    engine_backend_limits(plan, config, &limits);
    return ops->supports(program, &limits, error);
}

/* A mailbox rounds its capacity up to a power of two. */
static uint64_t mailbox_places(uint32_t capacity) {
    uint64_t places = 1;
    while (places < capacity) places *= 2;
    return places;
}

/* All that does not depend on the pool's size. */
static void add_fixed_lines(const struct backend_ops *ops, const struct config *config, const struct program *program, struct memory_plan *plan) {
    struct memory_line lines[BACKEND_LINES];
    plan->n_lines = 0;
    plan->total_bytes = plan->device_bytes = 0;
    uint32_t n = backend_lines(ops, config, program, plan, lines);
    for (uint32_t i = 0; i < n; i++) add_line(plan, &lines[i]);
    struct engine_sizes sizes = engine_sizes(plan, config);
    /* Of two steps. */
    add_host_line(plan, "sequences", plan->max_sequences, 2 * (sizeof(struct batch_sequence) + 2 * sizeof(uint32_t)));
    add_host_line(plan, "choices", plan->max_choices, requests_bytes_per_choice());
    add_host_line(plan, "compression", 1, compress_bytes(plan, program));
    add_host_line(plan, "rows", plan->max_rows, 2 * 2 * sizeof(int32_t));
    add_host_line(plan, "samples", sizes.samples, 2 * (sizeof(struct sample) + sizeof(struct sample_result)));
    add_host_line(plan, "draws", sizes.draws, 2 * (sizeof(struct draw) + sizeof(enum finish) + sizeof(bool)));
    add_host_line(plan, "inbox", mailbox_places(sizes.inbox), sizeof(struct letter));
    add_host_line(plan, "outbox", mailbox_places(sizes.outbox), sizeof(struct posted));
}

#define MIB(bytes) ((double)(bytes) / 0x1p20)

static enum status does_not_fit(const struct config *config, const struct memory_plan *plan, const struct program *program, uint64_t pool_bytes,
                                struct error *error) {
    struct memory_plan one = *plan;
    uint64_t blocks = blocks_of(program, plan->max_model_len);
    one.n_blocks = blocks > BLOCKS_MAX ? BLOCKS_MAX : (uint32_t)blocks;
    if (config->kv_memory)
        return error_set(error, STATUS_INVALID,
                         "engine.kv_memory: %.1f MiB do not hold one sequence of %u tokens: %u lanes x %u blocks x %zu bytes = %.1f MiB",
                         MIB(pool_bytes), plan->max_model_len, program_lanes(program), (plan->max_model_len + BLOCK_TOKENS - 1) / BLOCK_TOKENS,
                         plan->block_bytes, MIB(blocks * plan->block_bytes));
    char tables[64] = "";
    if (!plan->has_device)
        (void)snprintf(tables, sizeof tables, ", and %.1f MiB of tables", MIB(scheduler_takes(config, program, &one)));
    else if (blocks * plan->block_bytes <= pool_bytes)
        return error_set(error, STATUS_NO_MEMORY,
                         "memory: %.1f MiB are available, %.1f MiB of that stay free, %.1f MiB are taken; the rest, %.1f MiB, does not hold the "
                         "tables of sequences of %u tokens: %.1f MiB",
                         MIB(plan->available_bytes), MIB(host_spare(plan)), MIB(plan->total_bytes), MIB(host_left(plan)), plan->max_model_len,
                         MIB(scheduler_takes(config, program, &one)));
    char takers[64] = "weights and scratch";
    if (plan->has_device && plan->max_sequences > 1)
        (void)snprintf(takers, sizeof takers, "weights and to scratch of %u sequences", plan->max_sequences);
    return error_set(error, STATUS_NO_MEMORY,
                     "%s: %.1f MiB are available, %.1f MiB of that stay free, %.1f MiB go to %s; the rest, %.1f MiB, does not hold one "
                     "sequence of %u tokens: %" PRIu64 " blocks x %zu bytes%s",
                     plan->has_device ? "device memory" : "memory", MIB(pool_available(plan)), MIB(pool_spare(plan)), MIB(beside_pool(plan)), takers,
                     MIB(pool_bytes), plan->max_model_len, blocks, plan->block_bytes, tables);
}

/* What one sequence holds at most: all of it, or, where prompts are compressed while they are read, the operator's budget and what is read between two points. */
static uint64_t blocks_of_one(const struct config *config, const struct program *program, const struct memory_plan *plan) {
    uint64_t tokens = plan->max_model_len;
    struct kv_plan kv;
    const char *field;
    if (config->compress_while_reading && compression_plan(config, &(struct kv_wish){.policy = ""}, &kv, &field, NULL) && kv.while_reading &&
        compression_tokens_max(&kv) != UINT32_MAX) {
        uint64_t held = (uint64_t)compression_tokens_max(&kv) + COMPRESSION_READING + 2 * BLOCK_TOKENS;
        if (held < tokens) tokens = held;
    }
    return blocks_of(program, tokens);
}

/* So many blocks fit into `bytes`, and the tables that they take too, there or in the host's memory. */
static bool blocks_fit(const struct config *config, const struct program *program, const struct memory_plan *plan, uint64_t bytes) {
    uint64_t pool = plan->n_blocks * plan->block_bytes, tables = scheduler_takes(config, program, plan);
    return plan->has_device ? pool <= bytes && tables <= host_left(plan) : pool + tables <= bytes;
}

static uint64_t most_blocks(const struct config *config, const struct program *program, const struct memory_plan *plan, uint64_t bytes) {
    struct memory_plan tried = *plan;
    uint64_t low = 0, high = BLOCKS_MAX;
    while (low < high) {
        uint64_t middle = (low + high + 1) / 2;
        tried.n_blocks = (uint32_t)middle;
        if (blocks_fit(config, program, &tried, bytes))
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

/* The longest sequence, in whole blocks, of which `bytes` hold one with its tables. */
static uint64_t longest_held(const struct config *config, const struct program *program, const struct memory_plan *plan, uint64_t bytes) {
    if (config->kv_memory) return bytes / plan->block_bytes / program_lanes(program) * BLOCK_TOKENS;
    struct memory_plan tried = *plan;
    uint32_t low = 0, high = plan->max_model_len / BLOCK_TOKENS;
    while (low < high) {
        uint32_t middle = (low + high + 1) / 2;
        tried.max_model_len = middle * BLOCK_TOKENS;
        if (most_blocks(config, program, &tried, bytes) >= blocks_of(program, tried.max_model_len))
            low = middle;
        else
            high = middle - 1;
    }
    return (uint64_t)low * BLOCK_TOKENS;
}

/* Both at once, where both were. */
static void say_lowered(const struct config *config, const struct program *program, struct memory_plan *plan) {
    char sequences[48] = "", length[48] = "";
    if (!config->max_sequences && plan->max_sequences < plan->wanted_sequences)
        (void)snprintf(sequences, sizeof sequences, "max_sequences %u -> %u", plan->wanted_sequences, plan->max_sequences);
    if (!config->max_model_len && plan->max_model_len < program->context_train)
        (void)snprintf(length, sizeof length, "max_model_len %u -> %u", program->context_train, plan->max_model_len);
    if (!sequences[0] && !length[0]) return;
    (void)snprintf(plan->lowered, sizeof plan->lowered, "%s%s%s: %s holds no more", sequences, sequences[0] && length[0] ? ", " : "", length,
                   config->kv_memory  ? "engine.kv_memory"
                   : plan->has_device ? "free memory of the device"
                                      : "free memory");
}

/* What a device has beside the pool grows with max_model_len too: that is halved, where it is ours to choose, while no sequence fits and half the length at least doubles the room. */
static void fit_device_scratch(const struct backend_ops *ops, const struct config *config, const struct program *program, struct memory_plan *plan) {
    while (plan->has_device && !config->max_model_len && !config->kv_memory && plan->max_model_len / 2 >= MODEL_LEN_MIN &&
           device_left(plan) < blocks_of(program, plan->max_model_len) * plan->block_bytes) {
        struct memory_plan half = *plan;
        half.max_model_len /= 2;
        add_fixed_lines(ops, config, program, &half);
        if (device_left(&half) / 2 < device_left(plan)) return;
        *plan = half;
    }
}

static void set_sequences(const struct config *config, struct memory_plan *plan, uint32_t n) {
    plan->max_sequences = n;
    plan->queue_choices = n + config->max_queue;
    plan->max_choices = plan->queue_choices + draws_of(plan, config); /* whose answer a step's tokens end are still there in the next */
    if (plan->n_rings) plan->n_rings = n;
}

/* Is it better with half as many? With a pool of its own size, where there is no room beside it; else, where what sequences take beside the pool is more than the pool. */
static bool half_is_better(const struct config *config, const struct memory_plan *plan, const struct memory_plan *half) {
    if (config->kv_memory) return plan->device_bytes > less(plan->device_available_bytes, config->kv_memory);
    return device_left(half) >= device_left(plan) + device_left(plan) / 2;
}

/* Tables, rings and their like are each sequence's own on a device: how many run at once is halved, where that is ours to choose, as long as it is better. */
static void fit_device(const struct backend_ops *ops, const struct config *config, const struct program *program, struct memory_plan *plan) {
    const struct memory_plan whole = *plan; /* each number of sequences begins with the whole length */
    add_fixed_lines(ops, config, program, plan);
    fit_device_scratch(ops, config, program, plan);
    while (plan->has_device && !config->max_sequences && plan->max_sequences > 1) {
        struct memory_plan half = whole;
        set_sequences(config, &half, plan->max_sequences / 2);
        add_fixed_lines(ops, config, program, &half);
        fit_device_scratch(ops, config, program, &half);
        if (!half_is_better(config, plan, &half)) return;
        *plan = half;
    }
}

/* Lowers max_model_len to what the pool holds, where that is ours to choose. */
static enum status fit_model_len(const struct config *config, const struct program *program, uint64_t blocks, uint64_t pool_bytes,
                                 struct memory_plan *plan, struct error *error) {
    if (blocks >= blocks_of_one(config, program, plan)) return STATUS_OK;
    if (config->max_model_len) return does_not_fit(config, plan, program, pool_bytes, error);
    uint64_t holds = longest_held(config, program, plan, pool_bytes);
    uint32_t least = plan->max_model_len < MODEL_LEN_MIN ? plan->max_model_len : MODEL_LEN_MIN;
    if (holds < least) {
        plan->max_model_len = least;
        return does_not_fit(config, plan, program, pool_bytes, error);
    }
    plan->max_model_len = (uint32_t)holds;
    return STATUS_OK;
}

/* How many blocks: what is asked for or what is left, never more than all sequences together can use. */
static enum status size_pool(const struct config *config, const struct program *program, struct memory_plan *plan, struct error *error) {
    uint64_t pool_bytes = config->kv_memory ? config->kv_memory : pool_left(plan), available = pool_available(plan);
    if (config->kv_memory && (pool_bytes > available || beside_pool(plan) > available - pool_bytes))
        return error_set(error, STATUS_NO_MEMORY, "engine.kv_memory: %.1f MiB, with %.1f MiB of weights and scratch, exceed the %.1f MiB available%s",
                         MIB(pool_bytes), MIB(beside_pool(plan)), MIB(available), plan->has_device ? " on the device" : "");
    uint64_t blocks = config->kv_memory ? pool_bytes / plan->block_bytes : most_blocks(config, program, plan, pool_bytes);
    enum status status = fit_model_len(config, program, blocks, pool_bytes, plan, error);
    if (status != STATUS_OK) return status;
    if (!config->kv_memory) blocks = most_blocks(config, program, plan, pool_bytes); /* shorter sequences have smaller tables */
    uint64_t lane_blocks = (uint64_t)plan->max_sequences * program_lanes(program), blocks_max = plan->max_model_len / BLOCK_TOKENS + 2;
    if (lane_blocks >= UINT32_MAX / blocks_max)
        return error_set(error, STATUS_UNSUPPORTED,
                         "engine.max_sequences: the tables of %u sequences of %u tokens, %u lanes each, list more than 2^32 blocks",
                         plan->max_sequences, plan->max_model_len, program_lanes(program));
    uint64_t useful = blocks_of(program, plan->max_model_len) * plan->max_sequences;
    if (blocks > useful) blocks = useful;
    if (blocks > BLOCKS_MAX) blocks = BLOCKS_MAX;
    if (blocks < blocks_of_one(config, program, plan))
        return error_set(error, STATUS_UNSUPPORTED, "engine.max_model_len: one sequence of %u tokens takes %" PRIu64 " blocks; %d are supported",
                         plan->max_model_len, blocks_of(program, plan->max_model_len), BLOCKS_MAX);
    plan->n_blocks = (uint32_t)blocks;
    return STATUS_OK;
}

/* State for the most demanding policies that may be asked for. */
static void plan_compression(const struct config *config, struct memory_plan *plan) {
    for (const struct policy *const *policy = policies; *policy; policy++) {
        if (!compression_may_use(config, *policy)) continue;
        plan->accumulators = plan->accumulators || (*policy)->rows == POLICY_ROWS_ALL;
        if ((*policy)->shifts_sinks) plan->sink_slots = (config->sink_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS * BLOCK_TOKENS;
        if ((*policy)->shifts_sinks || (*policy)->rows == POLICY_ROWS_WINDOW || (*policy)->rows == POLICY_ROWS_LAST)
            plan->n_rings = plan->max_sequences;
    }
    if (plan->n_rings) plan->ring_rows = config->window;
}

/* What f16 and native weights would take, and leave at the lengths there are now. */
static void plan_weights(const struct backend_ops *ops, const struct config *config, const struct program *program, struct memory_plan *plan) {
    for (int mode = WEIGHTS_F16; mode <= WEIGHTS_NATIVE; mode++) {
        struct memory_plan tried = *plan;
        struct weights_plan *told = &plan->weights_plans[mode];
        tried.weights = (enum weights_mode)mode;
        add_fixed_lines(ops, config, program, &tried);
        told->bytes = 0;
        for (uint32_t i = 0; i < tried.n_lines; i++)
            if (strcmp(tried.lines[i].what, "weights") == 0) told->bytes += tried.lines[i].count * tried.lines[i].bytes_each;
        told->kv_tokens = device_left(&tried) / plan->block_bytes / program_lanes(program) * BLOCK_TOKENS;
    }
}

static void choose_weights(const struct backend_ops *ops, const struct config *config, const struct program *program, uint64_t device_total,
                           struct memory_plan *plan) {
    plan_weights(ops, config, program, plan);
    CHECK(weights_mode_parse(config->weights, &plan->weights)); /* one of the option's choices */
    if (plan->weights == WEIGHTS_AUTO) plan->weights = weights_choice(plan->weights_plans[WEIGHTS_F16].bytes, device_total);
}

/* What does not depend on how much memory there is. */
static enum status plan_sizes(const struct backend_ops *ops, const struct config *config, const struct program *program, struct memory_plan *plan,
                              struct error *error) {
    if (!kv_dtype_parse(config->kv_dtype, &plan->kv_dtype))
        plan->kv_dtype = backend_kv_dtype(ops, strcmp(config->instruction_set, "auto") == 0 ? NULL : config->instruction_set);
    plan->wanted_sequences = config->max_sequences ? config->max_sequences : plan->has_device ? SEQUENCES_MAX : auto_sequences(config);
    set_sequences(config, plan, plan->wanted_sequences);
    plan->max_stream_tokens = config->max_stream_tokens;
    plan_compression(config, plan);
    plan->block_bytes = backend_block_bytes(ops, program, plan->kv_dtype, plan->accumulators);
    if (plan->block_bytes == 0)
        return error_set(error, STATUS_UNSUPPORTED, "engine.kv_dtype: the %s backend does not store %s", ops->name, kv_dtype_name(plan->kv_dtype));
    plan->extent_blocks = plan->block_bytes >= EXTENT_BYTES ? 1 : (uint32_t)(EXTENT_BYTES / plan->block_bytes);
    if (plan->extent_blocks > EXTENT_BLOCKS) plan->extent_blocks = EXTENT_BLOCKS;
    if (config->max_model_len > program->context_train)
        return error_set(error, STATUS_INVALID, "engine.max_model_len: %u tokens; the model was trained for %u", config->max_model_len,
                         program->context_train);
    plan->max_model_len = config->max_model_len ? config->max_model_len : program->context_train;
    return STATUS_OK;
}

enum status engine_plan_memory_on(const struct backend_ops *ops, const struct config *config, const struct model *model, uint64_t available_bytes,
                                  struct memory_plan *plan, struct error *error) {
    const struct program *program = model_program(model);
    uint64_t device_total;
    *plan = (struct memory_plan){
        .available_bytes = available_bytes, .max_rows = config->max_rows, .n_layers = program->n_layers, .n_kv_heads = program->n_kv_heads};
    enum status status = ops->memory(config->device, &plan->device_available_bytes, &device_total, error);
    if (status != STATUS_OK) {
        (void)error_prefix(error, "engine.backend: %s", ops->name);
        return status;
    }
    plan->has_device = device_total > 0;
    status = plan_sizes(ops, config, program, plan, error);
    if (status != STATUS_OK) return status;
    if (plan->has_device) choose_weights(ops, config, program, device_total, plan);
    fit_device(ops, config, program, plan);
    uint32_t wanted_len = plan->max_model_len;
    status = size_pool(config, program, plan, error);
    if (status == STATUS_OK && plan->max_model_len < wanted_len) { /* what depends on the length is smaller then */
        add_fixed_lines(ops, config, program, plan);
        status = size_pool(config, program, plan, error);
    }
    if (status == STATUS_OK) status = backend_supports(ops, config, program, plan, error);
    if (status != STATUS_OK) return status;
    say_lowered(config, program, plan);
    if (plan->has_device) plan_weights(ops, config, program, plan);
    plan->kv_tokens = (uint64_t)plan->n_blocks / program_lanes(program) * BLOCK_TOKENS;
    add_line(plan, &(struct memory_line){.what = "KV block", .count = plan->n_blocks, .bytes_each = plan->block_bytes});
    add_host_line(plan, "scheduler", 1, scheduler_takes(config, program, plan)); /* block tables, prefix cache, queues */
    if (plan->total_bytes > available_bytes)
        return error_set(error, STATUS_NO_MEMORY, "memory: the plan takes %.1f MiB, %.1f MiB are available", MIB(plan->total_bytes),
                         MIB(available_bytes));
    return STATUS_OK;
}

enum status engine_plan_memory(const struct config *config, const struct model *model, struct memory_plan *plan, struct error *error) {
    const struct backend_ops *ops = backend_choose(config->backend, config->device);
    if (!ops) return backend_absent(config->backend, error);
    return engine_plan_memory_on(ops, config, model, system_memory_available(""), plan, error);
}
