/* Sequences with block tables of their own over one backend: see bench.h. Owns the backend, the tables and the batch arrays. Main thread (the backend's worker 0). */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/clock.h"
#include "base/random.h"
#include "cli/bench.h"
#include "cli/cli.h"
#include "kernels/kivi.h"

#define EXTENT_BYTES 65536u

/* A step's arrays: of two, one may be under way while the other is filled. */
struct bench_step {
    int32_t *tokens, *positions; /* [max_rows] */
    struct batch_sequence *sequences;
    struct sample *samples;
    struct batch batch;
};

struct bench_driver {
    struct backend *backend;
    const struct program *program;
    struct bench_size size;
    enum kv_dtype kv_dtype;
    uint32_t n_lanes, lane_blocks; /* blocks of one lane of one sequence */

    uint32_t *block_ids;   /* [max_sequences][n_lanes][lane_blocks] */
    uint32_t *lane_first;  /* [max_sequences][n_lanes] */
    uint32_t *lane_tokens; /* [max_sequences][n_lanes] */
    uint32_t *lane_lost;   /* [max_sequences][n_lanes] slots that a lane has less than its sequence has tokens */
    uint32_t *changes;     /* [max_sequences] of the table: counts every time that a lane's length did not follow its sequence's */
    uint32_t *length;      /* [max_sequences] tokens in the cache */
    int32_t *next;         /* [max_sequences] the token to take in */

    struct bench_step steps[2]; /* in turn */
    uint32_t step;
    bool runs_ahead;
    struct sample_result *results;
    struct sampling greedy;
    uint64_t phase_ns[PHASE_KINDS];
    bool on_host;
    double copy_bandwidth; /* bytes a second */
    uint64_t weight_bytes;
    uint64_t wait_ns, host_ns, n_steps; /* of generation, since they were last taken */
};

/* Block b of a lane, as a pool under many sequences that grow together would place it: whole extents, taken in turn by every lane of every sequence. */
static void place_blocks(struct bench_driver *driver, uint32_t extent) {
    uint32_t lanes = driver->size.max_sequences * driver->n_lanes;
    for (uint32_t lane = 0; lane < lanes; lane++) {
        driver->lane_first[lane] = lane * driver->lane_blocks;
        for (uint32_t b = 0; b < driver->lane_blocks; b++)
            driver->block_ids[lane * driver->lane_blocks + b] = (b / extent * lanes + lane) * extent + b % extent;
    }
}

static void allocate(struct bench_driver *driver) {
    uint32_t sequences = driver->size.max_sequences, lanes = sequences * driver->n_lanes;
    driver->block_ids = check_calloc((size_t)lanes * driver->lane_blocks, sizeof *driver->block_ids);
    driver->lane_first = check_calloc(lanes, sizeof *driver->lane_first);
    driver->lane_tokens = check_calloc(lanes, sizeof *driver->lane_tokens);
    driver->lane_lost = check_calloc(lanes, sizeof *driver->lane_lost);
    driver->changes = check_calloc(sequences, sizeof *driver->changes);
    for (uint32_t s = 0; s < sequences; s++) driver->changes[s] = 1;
    driver->length = check_calloc(sequences, sizeof *driver->length);
    driver->next = check_calloc(sequences, sizeof *driver->next);
    for (uint32_t i = 0; i < 2; i++) {
        struct bench_step *step = &driver->steps[i];
        step->tokens = check_calloc(driver->size.max_rows, sizeof *step->tokens);
        step->positions = check_calloc(driver->size.max_rows, sizeof *step->positions);
        step->sequences = check_calloc(sequences, sizeof *step->sequences);
        step->samples = check_calloc(sequences, sizeof *step->samples);
    }
    driver->results = check_calloc(sequences, sizeof *driver->results);
    driver->greedy = (struct sampling){.temperature = 0, .top_p = 1, .repetition_penalty = 1, .n_top = -1};
}

enum status bench_driver_open(const struct config *config, const struct model *model, const struct bench_size *size, struct bench_driver **result,
                              struct error *error) {
    const struct program *program = model_program(model);
    struct cli_backend chosen;
    struct progress progress;
    enum status status = cli_choose_backend(config, program, &chosen, error);
    if (status != STATUS_OK) return status;
    if (chosen.ops == &backend_mock)
        return error_set(error, STATUS_UNSUPPORTED,
                         "bench: the mock computes nothing, and follows histories that cannot be taken back for another round; --requests measures "
                         "what is above it");
    size_t block_bytes = chosen.block_bytes;
    uint32_t extent = block_bytes < EXTENT_BYTES ? (uint32_t)(EXTENT_BYTES / block_bytes) : 1;
    uint64_t blocks = ((uint64_t)size->max_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    blocks = (blocks + extent - 1) / extent * extent;
    uint64_t total = blocks * size->max_sequences * program_lanes(program);
    if (total > UINT32_MAX / 2 || total * block_bytes > chosen.memory_bytes)
        return error_set(error, STATUS_NO_MEMORY,
                         "bench: %" PRIu32 " sequences of %" PRIu32 " tokens do not fit into the memory there is: %.1f of %.1f MiB",
                         size->max_sequences, size->max_tokens, (double)(total * block_bytes) / 0x1p20, (double)chosen.memory_bytes / 0x1p20);
    struct backend_limits limits = chosen.limits;
    limits.n_blocks = (uint32_t)total;
    limits.n_tables = size->max_sequences;
    limits.table_blocks = (uint32_t)blocks;
    limits.max_rows = size->max_rows;
    limits.max_sequences = size->max_sequences;
    limits.max_samples = size->max_sequences;
    limits.progress = progress_report;
    limits.progress_context = &progress;
    struct bench_driver *driver = check_calloc(1, sizeof *driver);
    *driver = (struct bench_driver){.program = program, .size = *size, .kv_dtype = limits.kv_dtype};
    if (config->bench.phases) limits.phase_ns = driver->phase_ns;
    limits.wait_ns = &driver->wait_ns;
    driver->on_host = chosen.on_host;
    /* Before anything else has that memory, or computes. */
    driver->copy_bandwidth = chosen.ops->copy_bandwidth(&limits);
    driver->weight_bytes = chosen.ops->weight_bytes(program, &limits);
    progress_begin(&progress, "loading"); /* what was before is not part of it */
    status = chosen.ops->prepare(program, &limits, &driver->backend, error);
    progress_end(&progress);
    if (status != STATUS_OK) {
        free(driver);
        return status;
    }
    driver->n_lanes = program_lanes(program);
    driver->lane_blocks = (uint32_t)blocks;
    driver->runs_ahead = config->run_ahead && driver->backend->takes_two;
    allocate(driver);
    place_blocks(driver, extent);
    *result = driver;
    return STATUS_OK;
}

void bench_driver_close(struct bench_driver *driver) {
    if (!driver) return;
    driver->backend->ops->close(driver->backend);
    free(driver->block_ids);
    free(driver->lane_first);
    free(driver->lane_tokens);
    free(driver->lane_lost);
    free(driver->changes);
    free(driver->length);
    free(driver->next);
    for (uint32_t i = 0; i < 2; i++) {
        free(driver->steps[i].tokens);
        free(driver->steps[i].positions);
        free(driver->steps[i].sequences);
        free(driver->steps[i].samples);
    }
    free(driver->results);
    free(driver);
}

double bench_slot_bytes(const struct program *program, enum kv_dtype dtype) {
    double elements = 2.0 * program->head_dim;
    switch (dtype) {
    case KV_F32: return elements * sizeof(float);
    case KV_F16:
    case KV_BF16: return elements * sizeof(uint16_t);
    case KV_Q8: return elements + 2 * sizeof(float);
    case KV_KIVI4:
    case KV_KIVI2: /* what most of a long context takes: the residual is not in it */
        return elements * kivi_bits(dtype) / 8 +
               sizeof(struct kivi_scale) * (1.0 * program->head_dim / BLOCK_TOKENS + kivi_value_groups(program->head_dim));
    case KV_DTYPES: break;
    }
    CHECK(!"a KV dtype");
    return 0;
}

const char *bench_driver_describe(const struct bench_driver *driver) { return driver->backend->ops->describe(driver->backend); }

void bench_driver_take_phases(struct bench_driver *driver, uint64_t ns[PHASE_KINDS]) {
    memcpy(ns, driver->phase_ns, sizeof driver->phase_ns);
    memset(driver->phase_ns, 0, sizeof driver->phase_ns);
}

double bench_driver_take_host_us(struct bench_driver *driver) {
    double us = driver->n_steps ? (double)driver->host_ns / 1e3 / (double)driver->n_steps : 0;
    driver->host_ns = driver->n_steps = 0;
    return us;
}

bool bench_driver_runs_ahead(const struct bench_driver *driver) { return driver->runs_ahead; }
bool bench_driver_on_host(const struct bench_driver *driver) { return driver->on_host; }
double bench_driver_copy_bandwidth(const struct bench_driver *driver) { return driver->copy_bandwidth; }
uint64_t bench_driver_weight_bytes(const struct bench_driver *driver) { return driver->weight_bytes; }

uint32_t bench_threads_of(const char *description) {
    for (const char *comma = strchr(description, ','); comma; comma = strchr(comma + 1, ',')) {
        char *end;
        long threads = strtol(comma + 1, &end, 10);
        if (threads > 0 && strncmp(end, " thread", 7) == 0) return (uint32_t)threads;
    }
    return 1;
}

uint32_t bench_driver_threads(const struct bench_driver *driver) { return bench_threads_of(bench_driver_describe(driver)); }

uint32_t bench_driver_max_rows(const struct bench_driver *driver) { return driver->size.max_rows; }

double bench_driver_slot_bytes(const struct bench_driver *driver) { return bench_slot_bytes(driver->program, driver->kv_dtype); }

enum kv_dtype bench_driver_kv_dtype(const struct bench_driver *driver) { return driver->kv_dtype; }

void bench_driver_truncate(struct bench_driver *driver, uint32_t sequence, uint32_t n_tokens) {
    bool cuts = false;
    CHECK(n_tokens <= driver->length[sequence]);
    driver->length[sequence] = n_tokens;
    for (uint32_t lane = 0; lane < driver->n_lanes; lane++) {
        uint32_t *lost = &driver->lane_lost[sequence * driver->n_lanes + lane];
        cuts = cuts || *lost > n_tokens;
        if (*lost > n_tokens) *lost = n_tokens;
    }
    driver->changes[sequence] += cuts;
}

void bench_driver_cut(struct bench_driver *driver, uint32_t sequence, uint64_t seed) {
    uint32_t length = driver->length[sequence];
    for (uint32_t lane = 0; lane < driver->n_lanes; lane++)
        driver->lane_lost[sequence * driver->n_lanes + lane] = (uint32_t)(random_at(seed, sequence, lane, 1) % (length - length / 16 + 1));
    driver->changes[sequence]++;
}

uint64_t bench_driver_slots(const struct bench_driver *driver, uint32_t batch) {
    uint64_t slots = 0;
    for (uint32_t s = 0; s < batch; s++)
        for (uint32_t lane = 0; lane < driver->n_lanes; lane++) slots += driver->length[s] - driver->lane_lost[s * driver->n_lanes + lane];
    return slots;
}

/* Slots filled in each of so many lanes. In pieces of a length known here, which the compiler does with vectors: this is in what the host is measured to cost. */
static void count_slots(uint32_t length, const uint32_t *restrict lost, size_t n_lanes, uint32_t *restrict slots) {
    enum { AT_ONCE = 16 };
    for (; n_lanes >= AT_ONCE; lost += AT_ONCE, slots += AT_ONCE, n_lanes -= AT_ONCE)
        for (size_t i = 0; i < AT_ONCE; i++) slots[i] = length - lost[i];
    for (size_t i = 0; i < n_lanes; i++) slots[i] = length - lost[i];
}

/* The next `n_rows` rows of `sequence` go behind those the step already has; their tokens are the caller's to write. */
static uint32_t add_rows(struct bench_driver *driver, struct bench_step *step, uint32_t sequence, uint32_t n_rows, bool sampled) {
    struct batch *batch = &step->batch;
    uint32_t first = batch->n_rows, length = driver->length[sequence], *lane_tokens = driver->lane_tokens + sequence * driver->n_lanes;
    CHECK(length + n_rows <= driver->size.max_tokens && first + n_rows <= driver->size.max_rows);
    count_slots(length, driver->lane_lost + sequence * driver->n_lanes, driver->n_lanes, lane_tokens);
    for (uint32_t i = 0; i < n_rows; i++) step->positions[first + i] = (int32_t)(length + i);
    step->sequences[batch->n_sequences++] = (struct batch_sequence){.first_row = first,
                                                                    .n_rows = n_rows,
                                                                    .table = sequence,
                                                                    .table_changes = driver->changes[sequence],
                                                                    .lane_first = driver->lane_first + sequence * driver->n_lanes,
                                                                    .lane_tokens = lane_tokens};
    batch->n_rows += n_rows;
    if (sampled) step->samples[batch->n_samples++] = (struct sample){.row = batch->n_rows - 1, .sampling = &driver->greedy, .target = -1};
    driver->length[sequence] = length + n_rows;
    return first;
}

static struct bench_step *next_step(struct bench_driver *driver) {
    struct bench_step *step = &driver->steps[driver->step ^= 1];
    step->batch = (struct batch){
        .tokens = step->tokens, .positions = step->positions, .sequences = step->sequences, .block_ids = driver->block_ids, .samples = step->samples};
    return step;
}

static enum status submit(struct bench_driver *driver, const struct bench_step *step, struct error *error) {
    return driver->backend->ops->submit(driver->backend, &step->batch, error);
}

static enum status sync_step(struct bench_driver *driver, struct error *error) {
    return driver->backend->ops->sync(driver->backend, driver->results, error);
}

enum status bench_driver_prompt(struct bench_driver *driver, uint32_t sequence, uint32_t n_tokens, uint64_t seed, struct error *error) {
    enum status status = STATUS_OK;
    driver->next[sequence] =
        (int32_t)(random_at(seed, sequence, n_tokens, 0) % driver->program->n_vocab); /* where there is no prompt to sample after */
    for (uint32_t done = 0; done < n_tokens && status == STATUS_OK;) {
        uint32_t n_rows = n_tokens - done < driver->size.max_rows ? n_tokens - done : driver->size.max_rows;
        struct bench_step *step = next_step(driver);
        bool last = done + n_rows == n_tokens;
        add_rows(driver, step, sequence, n_rows, last);
        for (uint32_t i = 0; i < n_rows; i++) step->tokens[i] = (int32_t)(random_at(seed, sequence, done + i, 0) % driver->program->n_vocab);
        status = submit(driver, step, error);
        if (status == STATUS_OK) status = sync_step(driver, error);
        if (last && status == STATUS_OK) driver->next[sequence] = driver->results[0].token;
        done += n_rows;
    }
    return status;
}

/* With the step before under way, each token is the one that it draws. */
static enum status submit_row_each(struct bench_driver *driver, uint32_t batch_size, bool ahead, struct error *error) {
    struct bench_step *step = next_step(driver);
    for (uint32_t s = 0; s < batch_size; s++) step->tokens[add_rows(driver, step, s, 1, true)] = ahead ? -1 - (int32_t)s : driver->next[s];
    return submit(driver, step, error);
}

enum status bench_driver_generate(struct bench_driver *driver, uint32_t batch_size, uint32_t n_tokens, struct error *error) {
    uint64_t begun = clock_now_ns(), waited = driver->wait_ns;
    enum status status = STATUS_OK;
    for (uint32_t i = 0; i < n_tokens && status == STATUS_OK; i++) {
        if (i == 0 || !driver->runs_ahead) status = submit_row_each(driver, batch_size, false, error);
        if (status == STATUS_OK && driver->runs_ahead && i + 1 < n_tokens) status = submit_row_each(driver, batch_size, true, error);
        if (status == STATUS_OK) status = sync_step(driver, error);
        for (uint32_t s = 0; s < batch_size && status == STATUS_OK; s++) driver->next[s] = driver->results[s].token;
    }
    driver->host_ns += clock_now_ns() - begun - (driver->wait_ns - waited);
    driver->n_steps += n_tokens;
    return status;
}
