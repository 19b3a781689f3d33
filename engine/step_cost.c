/* See step_cost.h. */
#include "engine/step_cost.h"

#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/clock.h"

enum {
    CHUNK_ROWS = 64,
    DEVICE_CHUNK_ROWS = 512,
    CHUNKS = 9,
    PASSES = 5
};                                  /* a device reads its weights in the time that it computes some hundred rows */
#define TIME_LIMIT_NS 1000000000ull /* after it no further pass, and no further chunk once there are two */

/* A sequence of its own in the first blocks of the pool. */
struct probe {
    struct backend *backend;
    uint32_t n_lanes, lane_blocks, rows;
    uint32_t *block_ids, *lane_first, *lane_tokens;
    int32_t *tokens, *positions;
};

static void probe_init(struct probe *probe, struct backend *backend, const struct program *program, uint32_t rows, uint32_t lane_blocks) {
    uint32_t lanes = program_lanes(program);
    *probe = (struct probe){.backend = backend, .n_lanes = lanes, .lane_blocks = lane_blocks, .rows = rows};
    probe->block_ids = check_calloc((size_t)lanes * lane_blocks, sizeof *probe->block_ids);
    probe->lane_first = check_calloc(lanes, sizeof *probe->lane_first);
    probe->lane_tokens = check_calloc(lanes, sizeof *probe->lane_tokens);
    probe->tokens = check_calloc(rows, sizeof *probe->tokens);
    probe->positions = check_calloc(rows, sizeof *probe->positions);
    for (uint32_t i = 0; i < lanes * lane_blocks; i++) probe->block_ids[i] = i;
    for (uint32_t l = 0; l < lanes; l++) probe->lane_first[l] = l * lane_blocks;
    for (uint32_t i = 0; i < rows; i++) probe->tokens[i] = (int32_t)((i * 7 + 1) % program->n_vocab);
}

static void probe_done(struct probe *probe) {
    free(probe->block_ids);
    free(probe->lane_first);
    free(probe->lane_tokens);
    free(probe->tokens);
    free(probe->positions);
}

/* Microseconds of one step: `rows` rows behind `first` tokens, the last one sampled. */
static enum status probe_step(struct probe *probe, uint32_t first, uint32_t rows, double *us, struct error *error) {
    const struct sampling greedy = {.top_p = 1, .repetition_penalty = 1, .n_top = -1};
    const struct sample sample = {.row = rows - 1, .sampling = &greedy, .target = -1, .history = probe->tokens, .n_prompt = 1, .n_history = 1};
    const struct batch_sequence sequence = {.n_rows = rows, .lane_first = probe->lane_first, .lane_tokens = probe->lane_tokens};
    const struct batch batch = {.n_rows = rows,
                                .n_sequences = 1,
                                .n_samples = 1,
                                .tokens = probe->tokens,
                                .positions = probe->positions,
                                .sequences = &sequence,
                                .block_ids = probe->block_ids,
                                .samples = &sample};
    for (uint32_t l = 0; l < probe->n_lanes; l++) probe->lane_tokens[l] = first;
    for (uint32_t i = 0; i < rows; i++) probe->positions[i] = (int32_t)(first + i);
    struct sample_result result;
    uint64_t start = clock_now_ns();
    enum status status = probe->backend->ops->submit(probe->backend, &batch, error);
    if (status == STATUS_OK) status = probe->backend->ops->sync(probe->backend, &result, error);
    *us = (double)(clock_now_ns() - start) / 1000;
    return status;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, uint32_t n) {
    qsort(values, n, sizeof *values, ascending);
    return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

struct step_cost step_cost_solve(const struct step_time *times, uint32_t n_times) {
    CHECK(n_times >= 2);
    /* Chunks of the same number of rows differ by their context alone: the slope of a line through them. */
    double mean_context = 0, mean_us = 0, covariance = 0, variance = 0, n = n_times - 1;
    for (uint32_t i = 1; i < n_times; i++) mean_context += times[i].context / n, mean_us += times[i].us / n;
    for (uint32_t i = 1; i < n_times; i++) {
        covariance += (times[i].context - mean_context) * (times[i].us - mean_us);
        variance += (times[i].context - mean_context) * (times[i].context - mean_context);
    }
    double rows = times[1].rows, slope = variance > 0 ? covariance / variance / rows : 0;
    if (!(slope > 0)) slope = 0;
    struct step_cost cost = {.per_row_context_us = slope};
    double chunk = mean_us - slope * rows * mean_context, one = times[0].us - slope * times[0].context;
    cost.per_row_us = rows > 1 ? (chunk - one) / (rows - 1) : chunk;
    double least = mean_us / rows / 10000; /* noise made more rows cheaper than one: rows are never free */
    if (!(cost.per_row_us > least)) cost.per_row_us = least > 0 ? least : 1e-3;
    cost.fixed_us = one - cost.per_row_us;
    if (!(cost.fixed_us > 0)) cost.fixed_us = 0;
    return cost;
}

/* times[p]: pass p of each step. Step 0 is one row, step c chunk c - 1. Returns how many passes were whole; n_steps may shrink when time runs out in the first. */
static enum status measure(struct probe *probe, uint32_t *n_steps, double times[CHUNKS + 1][PASSES], uint32_t *n_passes, struct error *error) {
    double us;
    enum status status = probe_step(probe, 0, probe->rows, &us, error); /* pages, caches, clocks: not counted */
    uint64_t start = clock_now_ns();
    for (*n_passes = 0; *n_passes < PASSES && status == STATUS_OK; ++*n_passes) {
        if (*n_passes > 0 && clock_now_ns() - start > TIME_LIMIT_NS) break;
        status = probe_step(probe, 0, 1, &times[0][*n_passes], error);
        for (uint32_t c = 1; c < *n_steps && status == STATUS_OK; c++) {
            status = probe_step(probe, (c - 1) * probe->rows, probe->rows, &times[c][*n_passes], error);
            if (*n_passes == 0 && c >= 2 && clock_now_ns() - start > TIME_LIMIT_NS) *n_steps = c + 1;
        }
    }
    return status;
}

static bool has_device(const struct backend *backend, const struct backend_limits *limits) {
    uint64_t available, total = 0;
    return backend->ops->memory(limits->device, &available, &total, NULL) == STATUS_OK && total > 0;
}

bool step_cost_is_measured(const struct backend *backend, const struct backend_limits *limits) {
    return backend->ops == &backend_cpu || has_device(backend, limits);
}

enum status step_cost_fit(struct backend *backend, const struct program *program, const struct backend_limits *limits, uint32_t max_model_len,
                          struct step_cost *cost, struct error *error) {
    if (!step_cost_is_measured(backend, limits)) {
        double rate = limits->mock_tokens_per_second;
        *cost = (struct step_cost){.fixed_us = 10, .per_row_us = rate > 0 ? 1e6 / rate : 1};
        return STATUS_OK;
    }
    uint32_t lane_blocks = limits->n_blocks / program_lanes(program);
    uint32_t tokens = lane_blocks < UINT32_MAX / BLOCK_TOKENS ? lane_blocks * BLOCK_TOKENS : max_model_len;
    if (tokens > max_model_len) tokens = max_model_len;
    uint32_t rows = has_device(backend, limits) ? DEVICE_CHUNK_ROWS : CHUNK_ROWS;
    if (rows > limits->max_rows) rows = limits->max_rows;
    if (rows > tokens) rows = tokens;
    uint32_t n_steps = tokens / rows + 1;
    if (n_steps > CHUNKS + 1) n_steps = CHUNKS + 1;

    struct probe probe;
    double times[CHUNKS + 1][PASSES];
    uint32_t n_passes = 0;
    probe_init(&probe, backend, program, rows, (rows * (n_steps - 1) + BLOCK_TOKENS - 1) / BLOCK_TOKENS);
    enum status status = measure(&probe, &n_steps, times, &n_passes, error);
    probe_done(&probe);
    if (status != STATUS_OK) return status;
    struct step_time medians[CHUNKS + 1];
    for (uint32_t c = 0; c < n_steps; c++)
        medians[c] = (struct step_time){
            .rows = c ? rows : 1, .context = c ? (double)(c - 1) * rows + ((double)rows + 1) / 2 : 1, .us = median(times[c], n_passes)};
    *cost = step_cost_solve(medians, n_steps);
    return STATUS_OK;
}
