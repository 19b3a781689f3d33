/* The memory plan: everything large, from the configuration, the model, and the memory there is. Pure but for reading that. Any thread.
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
};

/* Memory that is left to the system, to other processes' growth, to the server's buffers. */
static uint64_t usable(uint64_t available) { return available - available / 10; }

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

/* Draws: one for each running sequence, and a prompt's end draws for all of its candidates at once. Events that wait: all tokens of a step beside one terminal event a
 * choice, for which there is always room, and as many again, so that a step need not wait for the last one's events to be taken. */
struct engine_sizes engine_sizes(const struct memory_plan *plan, const struct config *config) {
    struct engine_sizes sizes = {.draws = plan->max_sequences + config->max_choices};
    sizes.samples = sizes.draws + plan->max_rows;
    sizes.inbox = 3 * plan->max_choices + INBOX_SPARE;
    sizes.outbox = 2 * plan->max_choices + sizes.draws;
    return sizes;
}

void engine_backend_limits(const struct memory_plan *plan, const struct config *config, struct backend_limits *limits) {
    *limits = (struct backend_limits){
        .kv_dtype = plan->kv_dtype,
        .n_blocks = plan->n_blocks,
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
        .mock_tokens_per_second = config->mock_tokens_per_second,
    };
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

static void add_line(struct memory_plan *plan, const char *what, uint64_t count, uint64_t bytes_each) {
    CHECK(plan->n_lines < sizeof plan->lines / sizeof *plan->lines);
    if (count == 0 || bytes_each == 0) return;
    plan->lines[plan->n_lines++] = (struct memory_line){.what = what, .count = count, .bytes_each = bytes_each};
    plan->total_bytes += count * bytes_each;
}

/* A mailbox rounds its capacity up to a power of two. */
static uint64_t mailbox_places(uint32_t capacity) {
    uint64_t places = 1;
    while (places < capacity) places *= 2;
    return places;
}

/* All that does not depend on the pool's size. */
static void add_fixed_lines(const struct backend_ops *ops, const struct config *config, const struct program *program, struct memory_plan *plan) {
    struct backend_limits limits;
    struct memory_line lines[16];
    engine_backend_limits(plan, config, &limits);
    uint32_t n = ops->memory_plan(program, &limits, lines, sizeof lines / sizeof *lines);
    for (uint32_t i = 0; i < n; i++) add_line(plan, lines[i].what, lines[i].count, lines[i].bytes_each);
    struct engine_sizes sizes = engine_sizes(plan, config);
    add_line(plan, "sequences", plan->max_sequences, sizeof(struct batch_sequence) + 2 * sizeof(uint32_t));
    add_line(plan, "choices", plan->max_choices, requests_bytes_per_choice());
    add_line(plan, "compression", 1, compress_bytes(plan, program));
    add_line(plan, "rows", plan->max_rows, 2 * sizeof(int32_t));
    add_line(plan, "samples", sizes.samples, sizeof(struct sample) + sizeof(struct sample_result));
    add_line(plan, "draws", sizes.draws, sizeof(struct draw) + sizeof(enum finish) + sizeof(bool));
    add_line(plan, "inbox", mailbox_places(sizes.inbox), sizeof(struct letter));
    add_line(plan, "outbox", mailbox_places(sizes.outbox), sizeof(struct posted));
}

#define MIB(bytes) ((double)(bytes) / 0x1p20)

static enum status does_not_fit(const struct config *config, const struct memory_plan *plan, const struct program *program, uint64_t pool_bytes,
                                struct error *error) {
    struct memory_plan one = *plan;
    uint64_t blocks = blocks_of(program, plan->max_model_len);
    one.n_blocks = blocks > BLOCKS_MAX ? BLOCKS_MAX : (uint32_t)blocks;
    uint64_t tables = scheduler_takes(config, program, &one);
    if (config->kv_memory)
        return error_set(error, STATUS_INVALID,
                         "engine.kv_memory: %.1f MiB do not hold one sequence of %u tokens: %u lanes x %u blocks x %zu bytes = %.1f MiB",
                         MIB(pool_bytes), plan->max_model_len, program_lanes(program), (plan->max_model_len + BLOCK_TOKENS - 1) / BLOCK_TOKENS,
                         plan->block_bytes, MIB(blocks * plan->block_bytes));
    return error_set(
        error, STATUS_NO_MEMORY,
        "memory: %.1f MiB are available, 10 %% of that stays free, %.1f MiB go to weights and scratch; the rest, %.1f MiB, does not hold one "
        "sequence of %u tokens: %" PRIu64 " blocks x %zu bytes, and %.1f MiB of tables",
        MIB(plan->available_bytes), MIB(plan->total_bytes), MIB(pool_bytes), plan->max_model_len, blocks, plan->block_bytes, MIB(tables));
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

/* The most blocks that fit into `bytes` with the tables that they take. */
static uint64_t most_blocks(const struct config *config, const struct program *program, const struct memory_plan *plan, uint64_t bytes) {
    struct memory_plan tried = *plan;
    uint64_t low = 0, high = BLOCKS_MAX;
    while (low < high) {
        uint64_t middle = (low + high + 1) / 2;
        tried.n_blocks = (uint32_t)middle;
        if (middle * plan->block_bytes + scheduler_takes(config, program, &tried) <= bytes)
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

/* Lowers max_model_len to what the pool holds, where that is ours to choose. */
static enum status fit_model_len(const struct config *config, const struct program *program, uint64_t blocks, uint64_t pool_bytes,
                                 struct memory_plan *plan, struct error *error) {
    if (blocks >= blocks_of_one(config, program, plan)) return STATUS_OK;
    if (config->max_model_len) return does_not_fit(config, plan, program, pool_bytes, error);
    uint64_t holds = longest_held(config, program, plan, pool_bytes);
    uint32_t wanted = plan->max_model_len, least = wanted < MODEL_LEN_MIN ? wanted : MODEL_LEN_MIN;
    if (holds < least) {
        plan->max_model_len = least;
        return does_not_fit(config, plan, program, pool_bytes, error);
    }
    plan->max_model_len = (uint32_t)holds;
    (void)snprintf(plan->lowered, sizeof plan->lowered, "max_model_len %u -> %u: %s holds no more", wanted, plan->max_model_len,
                   config->kv_memory ? "engine.kv_memory" : "free memory");
    return STATUS_OK;
}

/* How many blocks: what is asked for or what is left, never more than all sequences together can use. */
static enum status size_pool(const struct config *config, const struct program *program, struct memory_plan *plan, struct error *error) {
    uint64_t left = usable(plan->available_bytes), pool_bytes;
    left = left > plan->total_bytes ? left - plan->total_bytes : 0;
    if (config->kv_memory) {
        pool_bytes = config->kv_memory;
        if (pool_bytes > plan->available_bytes || plan->total_bytes > plan->available_bytes - pool_bytes)
            return error_set(error, STATUS_NO_MEMORY,
                             "engine.kv_memory: %.1f MiB, with %.1f MiB of weights and scratch, exceed the %.1f MiB available", MIB(pool_bytes),
                             MIB(plan->total_bytes), MIB(plan->available_bytes));
    } else {
        pool_bytes = left;
    }
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

enum status engine_plan_memory_on(const struct backend_ops *ops, const struct config *config, const struct model *model, uint64_t available_bytes,
                                  struct memory_plan *plan, struct error *error) {
    const struct program *program = model_program(model);
    *plan = (struct memory_plan){.available_bytes = available_bytes, .max_rows = config->max_rows};
    if (!kv_dtype_parse(config->kv_dtype, &plan->kv_dtype))
        plan->kv_dtype = backend_kv_dtype(ops, strcmp(config->instruction_set, "auto") == 0 ? NULL : config->instruction_set);
    plan->block_bytes = ops->block_bytes(program, plan->kv_dtype);
    plan->extent_blocks = plan->block_bytes >= EXTENT_BYTES ? 1 : (uint32_t)(EXTENT_BYTES / plan->block_bytes);
    if (plan->extent_blocks > EXTENT_BLOCKS) plan->extent_blocks = EXTENT_BLOCKS;
    plan->max_sequences = config->max_sequences ? config->max_sequences : auto_sequences(config);
    plan->max_choices = plan->max_sequences + config->max_queue;
    plan->max_stream_tokens = config->max_stream_tokens;
    plan_compression(config, plan);
    if (config->max_model_len > program->context_train)
        return error_set(error, STATUS_INVALID, "engine.max_model_len: %u tokens; the model was trained for %u", config->max_model_len,
                         program->context_train);
    plan->max_model_len = config->max_model_len ? config->max_model_len : program->context_train;
    add_fixed_lines(ops, config, program, plan);
    enum status status = size_pool(config, program, plan, error);
    if (status != STATUS_OK) return status;
    plan->kv_tokens = (uint64_t)plan->n_blocks / program_lanes(program) * BLOCK_TOKENS;
    add_line(plan, "KV block", plan->n_blocks, plan->block_bytes);
    add_line(plan, "scheduler", 1, scheduler_takes(config, program, plan)); /* block tables, prefix cache, queues */
    if (plan->total_bytes > available_bytes)
        return error_set(error, STATUS_NO_MEMORY, "memory: the plan takes %.1f MiB, %.1f MiB are available", MIB(plan->total_bytes),
                         MIB(available_bytes));
    return STATUS_OK;
}

enum status engine_plan_memory(const struct config *config, const struct model *model, struct memory_plan *plan, struct error *error) {
    const struct backend_ops *ops = backend_find(config->backend);
    if (!ops) return error_set(error, STATUS_UNSUPPORTED, "engine.backend: this build has no \"%s\"", config->backend);
    return engine_plan_memory_on(ops, config, model, system_memory_available(""), plan, error);
}

static const char *readable(uint64_t bytes, char text[32]) {
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double value = (double)bytes;
    int unit = 0;
    while (value >= 1024 && unit < 6) value /= 1024, unit++;
    (void)snprintf(text, 32, unit ? "%.2f %s" : "%.0f %s", value, units[unit]);
    return text;
}

void memory_plan_print(const struct memory_plan *plan, FILE *out) {
    char total[32];
    (void)fprintf(out, "%-16s %12s   %14s   %12s\n", "memory", "count", "bytes each", "total");
    for (uint32_t i = 0; i < plan->n_lines; i++) {
        const struct memory_line *line = &plan->lines[i];
        (void)fprintf(out, "%-16s %12" PRIu64 " x %14" PRIu64 " = %12s\n", line->what, line->count, line->bytes_each,
                      readable(line->count * line->bytes_each, total));
    }
    (void)fprintf(out, "%-16s %12s   %14s   %12s", "all", "", "", readable(plan->total_bytes, total));
    if (plan->available_bytes != UINT64_MAX) (void)fprintf(out, " of %s available", readable(plan->available_bytes, total));
    (void)fprintf(out, "\n%-16s %" PRIu64 " tokens (%s), %u sequences at once of at most %u tokens, %u rows a step\n", "KV cache", plan->kv_tokens,
                  kv_dtype_name(plan->kv_dtype), plan->max_sequences, plan->max_model_len, plan->max_rows);
    if (plan->lowered[0]) (void)fprintf(out, "%-16s %s\n", "lowered", plan->lowered);
}
