/* kvasir bench: prompt and generation speed in llama-bench's terms. What is measured and what is not stands in bench.h. Main thread. */
#include "cli/bench.h"

#include <inttypes.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/check.h"
#include "base/clock.h"
#include "cli/cli.h"

#define WARM_UP_TOKENS 16u

enum status bench_list_parse(const char *text, const char *flag, uint32_t min, uint32_t max, struct bench_list *list, struct error *error) {
    list->count = 0;
    for (const char *at = text; *at;) {
        char *end;
        unsigned long long value = *at >= '0' && *at <= '9' ? strtoull(at, &end, 10) : ULLONG_MAX;
        if (value > max || value < min || (*end != ',' && *end != '\0') || (*end == ',' && end[1] == '\0'))
            return error_set(error, STATUS_INVALID, "%s: \"%.60s\": numbers from %" PRIu32 " to %" PRIu32 " with commas between belong here", flag,
                             text, min, max);
        if (list->count == BENCH_LIST_MAX) return error_set(error, STATUS_INVALID, "%s: more than %d numbers", flag, BENCH_LIST_MAX);
        list->values[list->count++] = (uint32_t)value;
        at = *end ? end + 1 : end;
    }
    if (list->count == 0) return error_set(error, STATUS_INVALID, "%s: no number given", flag);
    return STATUS_OK;
}

struct bench {
    const struct config *config;
    struct bench_list prompts, batches;
    struct model *model;
    struct bench_driver *driver;
    uint32_t n_rows;
    struct bench_row rows[2 * BENCH_LIST_MAX];
    double *samples;   /* [rounds] tokens a second */
    uint32_t n_phases; /* --phases */
    struct bench_phases phases[2 * BENCH_LIST_MAX];
    struct bench_ceilings ceilings;
    struct bench_runs runs; /* --requests */
};

static enum status read_options(struct bench *bench, struct error *error) {
    const struct config *config = bench->config;
    enum status status = bench_list_parse(config->bench.prompts, "--prompt", 0, 1u << 24, &bench->prompts, error);
    if (status == STATUS_OK) status = bench_list_parse(config->bench.batches, "--batch", 1, 4096, &bench->batches, error);
    if (status != STATUS_OK) return status;
    if (config->bench.requests) return bench_requests_arms(config, &bench->prompts, &bench->runs, error);
    for (uint32_t i = 0; config->bench.generate > 0 && i < bench->batches.count; i++)
        if (bench->batches.values[i] > config->max_rows)
            return error_set(error, STATUS_INVALID, "--batch: %" PRIu32 " sequences need as many rows in a step; --max-rows is %" PRIu32,
                             bench->batches.values[i], config->max_rows);
    return STATUS_OK;
}

static enum status open_model(struct bench *bench, struct error *error) {
    const struct config *config = bench->config;
    if (!config->bench.dummy[0]) return cli_open_model(config, &bench->model, error);
    const struct backend_ops *ops = backend_choose(config->backend, config->device);
    if (config->model[0] || !ops || !ops->makes_weights) return cli_open_dummy(config, config->bench.dummy, &bench->model, error);
    return model_dummy_seeded(config->bench.dummy, 1, &bench->model, error);
}

/* The largest of everything the rows will ask for. */
static struct bench_size size_needed(const struct bench *bench) {
    struct bench_size size = {.max_sequences = 1, .max_tokens = 1, .max_rows = bench->config->max_rows};
    for (uint32_t i = 0; i < bench->prompts.count; i++)
        if (bench->prompts.values[i] > size.max_tokens) size.max_tokens = bench->prompts.values[i];
    if (bench->config->bench.generate == 0) return size;
    for (uint32_t i = 0; i < bench->batches.count; i++)
        if (bench->batches.values[i] > size.max_sequences) size.max_sequences = bench->batches.values[i];
    uint32_t tokens = bench->config->bench.context + bench->config->bench.generate;
    if (tokens > size.max_tokens) size.max_tokens = tokens;
    return size;
}

static enum status open_driver(struct bench *bench, struct error *error) {
    struct bench_size size = size_needed(bench);
    return bench_driver_open(bench->config, bench->model, &size, &bench->driver, error);
}

static int ascending(const void *a, const void *b) {
    const double *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

static void finish_row(struct bench *bench, struct bench_row row) {
    uint32_t n = bench->config->bench.rounds;
    qsort(bench->samples, n, sizeof *bench->samples, ascending);
    row.rounds = n;
    row.tok_s = n % 2 ? bench->samples[n / 2] : (bench->samples[n / 2 - 1] + bench->samples[n / 2]) / 2;
    row.tok_s_min = bench->samples[0];
    row.tok_s_max = bench->samples[n - 1];
    bench->rows[bench->n_rows++] = row;
}

static void show_round(const char *test, uint32_t tokens, uint32_t batch, uint32_t round, uint32_t rounds) {
    if (isatty(STDERR_FILENO))
        fprintf(stderr, "\r\033[K%s%" PRIu32 ", batch %" PRIu32 ": round %" PRIu32 " of %" PRIu32, test, tokens, batch, round, rounds);
}

static double tokens_a_second(uint64_t tokens, uint64_t begun_ns) {
    uint64_t elapsed = clock_now_ns() - begun_ns;
    return (double)tokens * 1e9 / (double)(elapsed ? elapsed : 1);
}

static enum status measure_prompt(struct bench *bench, uint32_t n_prompt, struct error *error) {
    uint32_t rounds = bench->config->bench.rounds;
    for (uint32_t round = 0; round <= rounds; round++) {
        show_round("pp", n_prompt, 1, round, rounds);
        bench_driver_truncate(bench->driver, 0, 0);
        uint64_t begun = clock_now_ns();
        enum status status = bench_driver_prompt(bench->driver, 0, n_prompt, round + 1, error);
        if (status != STATUS_OK) return status;
        if (round > 0) bench->samples[round - 1] = tokens_a_second(n_prompt, begun);
    }
    finish_row(bench, (struct bench_row){.test = "pp", .batch = 1, .n_prompt = n_prompt});
    return STATUS_OK;
}

static void truncate_contexts(struct bench *bench, uint32_t batch) {
    for (uint32_t s = 0; s < batch; s++) bench_driver_truncate(bench->driver, s, bench->config->bench.context);
}

/* The contexts were read before; each round begins at their end again. */
static enum status generate(struct bench *bench, uint32_t batch, uint32_t n_tokens, struct error *error) {
    truncate_contexts(bench, batch);
    return bench_driver_generate(bench->driver, batch, n_tokens, error);
}

/* What the step in the middle of a round must read. */
static void set_bound(struct bench *bench, uint32_t batch, struct bench_row *row) {
    const struct program *program = model_program(bench->model);
    truncate_contexts(bench, batch);
    double slots = (double)bench_driver_slots(bench->driver, batch) + (double)batch * program_lanes(program) * (row->n_gen + 1.0) / 2;
    row->weight_bytes = (double)bench_driver_weight_bytes(bench->driver);
    row->kv_bytes = slots * bench_driver_slot_bytes(bench->driver);
    double bandwidth = bench_driver_copy_bandwidth(bench->driver);
    row->bound_tok_s = bandwidth > 0 ? batch * bandwidth / (row->weight_bytes + row->kv_bytes) : 0;
}

static enum status measure_generation(struct bench *bench, uint32_t batch, struct error *error) {
    uint32_t n_gen = bench->config->bench.generate, rounds = bench->config->bench.rounds;
    struct bench_row row = {.test = "tg", .batch = batch, .n_gen = n_gen, .context = bench->config->bench.context};
    set_bound(bench, batch, &row);
    enum status status = generate(bench, batch, n_gen < WARM_UP_TOKENS ? n_gen : WARM_UP_TOKENS, error);
    (void)bench_driver_take_host_us(bench->driver);
    for (uint32_t round = 0; round < rounds && status == STATUS_OK; round++) {
        show_round("tg", n_gen, batch, round + 1, rounds);
        uint64_t begun = clock_now_ns();
        status = generate(bench, batch, n_gen, error);
        bench->samples[round] = tokens_a_second((uint64_t)n_gen * batch, begun);
    }
    if (status != STATUS_OK) return status;
    row.host_us = bench_driver_take_host_us(bench->driver);
    row.steps_ahead = bench_driver_runs_ahead(bench->driver) ? n_gen - 1 : 0;
    finish_row(bench, row);
    return STATUS_OK;
}

static enum status read_contexts(struct bench *bench, struct error *error) {
    struct bench_size size = size_needed(bench);
    enum status status = STATUS_OK;
    for (uint32_t s = 0; s < size.max_sequences && status == STATUS_OK; s++) {
        bench_driver_truncate(bench->driver, s, 0);
        status = bench_driver_prompt(bench->driver, s, bench->config->bench.context, 0, error);
        if (bench->config->bench.ragged) bench_driver_cut(bench->driver, s, 1);
    }
    return status;
}

static enum status measure(struct bench *bench, struct error *error) {
    enum status status = STATUS_OK;
    for (uint32_t i = 0; i < bench->prompts.count && status == STATUS_OK; i++)
        if (bench->prompts.values[i] > 0) status = measure_prompt(bench, bench->prompts.values[i], error);
    if (bench->config->bench.generate > 0 && status == STATUS_OK) {
        status = read_contexts(bench, error);
        for (uint32_t i = 0; i < bench->batches.count && status == STATUS_OK; i++)
            status = measure_generation(bench, bench->batches.values[i], error);
    }
    if (isatty(STDERR_FILENO)) fprintf(stderr, "\r\033[K");
    return status;
}

/* --phases: the same steps once more, with the backend's clock on them. */
static enum status measure_phases(struct bench *bench, struct error *error) {
    const struct config *config = bench->config;
    const struct program *program = model_program(bench->model);
    uint32_t rounds = config->bench.rounds;
    enum status status = STATUS_OK;
    if (bench_driver_on_host(bench->driver))
        status = bench_measure_ceilings(bench_driver_threads(bench->driver), model_bytes(bench->model), &bench->ceilings, error);
    else
        bench->ceilings = (struct bench_ceilings){.gb_s = bench_driver_copy_bandwidth(bench->driver) / 1e9, .instruction = "not measured"};
    for (uint32_t i = 0; i < bench->n_rows && status == STATUS_OK; i++) {
        const struct bench_row *row = &bench->rows[i];
        struct bench_phases *phases = &bench->phases[bench->n_phases];
        if (row->n_prompt) {
            status = bench_phases_prompt(bench->driver, program, row->n_prompt, rounds, phases, error);
        } else {
            if (bench->n_phases == 0 || phases[-1].n_prompt) status = read_contexts(bench, error); /* sequence 0 held prompts */
            if (status == STATUS_OK)
                status = bench_phases_generation(bench->driver, program, row->batch, row->context, row->n_gen, rounds, phases, error);
        }
        if (status != STATUS_OK) break;
        bench_phases_rate(phases, &bench->ceilings);
        bench->n_phases++;
    }
    return status;
}

static void print(const struct bench *bench) {
    struct bench_report report = {
        .config = bench->config,
        .model = bench->model,
        .backend = bench_driver_describe(bench->driver),
        .kv_dtype = bench_driver_kv_dtype(bench->driver),
        .threads = bench_driver_threads(bench->driver),
        .copy_bandwidth = bench_driver_copy_bandwidth(bench->driver),
        .on_host = bench_driver_on_host(bench->driver),
        .runs_ahead = bench_driver_runs_ahead(bench->driver),
        .n_phases = bench->n_phases,
        .phases = bench->phases,
        .ceilings = bench->ceilings,
        .n_rows = bench->n_rows,
        .rows = bench->rows,
    };
    if (bench->config->bench.json)
        bench_print_json(&report, stdout);
    else
        bench_print_table(&report, stdout);
}

/* --requests, from the options to what is printed. */
static enum status serve_requests(struct bench *bench, struct error *error) {
    const struct config *config = bench->config;
    const struct program *program = model_program(bench->model);
    struct cli_backend chosen;
    enum status status = cli_choose_backend(config, program, &chosen, error);
    if (status != STATUS_OK) return status;
    double bandwidth = chosen.ops->copy_bandwidth(&chosen.limits), weight_bytes = (double)chosen.ops->weight_bytes(program, &chosen.limits);
    struct bench_report report = {.config = config,
                                  .model = bench->model,
                                  .backend = bench->runs.runs[0].engine,
                                  .kv_dtype = chosen.limits.kv_dtype,
                                  .copy_bandwidth = bandwidth,
                                  .weight_bytes = weight_bytes};
    struct bench_runs_printer *printer = NULL;
    for (uint32_t i = 0; i < bench->runs.count && status == STATUS_OK; i++) {
        status = bench_requests_run(config, bench->model, &bench->runs.runs[i], error);
        if (status != STATUS_OK) break;
        bench_requests_compare(&bench->runs, i, bandwidth, weight_bytes, bench_slot_bytes(program, chosen.limits.kv_dtype));
        report.threads = bench_threads_of(report.backend);
        if (!printer) printer = bench_runs_begin(&report, stdout); /* what fails at once prints nothing */
        bench_runs_add(printer, &bench->runs.runs[i]);
    }
    bench_runs_end(printer);
    return status;
}

static enum status drive_backend(struct bench *bench, struct error *error) {
    enum status status = open_driver(bench, error);
    if (status == STATUS_OK) status = measure(bench, error);
    if (status == STATUS_OK && bench->config->bench.phases) status = measure_phases(bench, error);
    if (status == STATUS_OK) print(bench);
    bench_driver_close(bench->driver);
    return status;
}

int command_bench(const struct config *config, const char *argument) {
    (void)argument;
    struct bench bench = {.config = config};
    struct error error;
    bench.samples = check_calloc(config->bench.rounds, sizeof *bench.samples);
    enum status status = read_options(&bench, &error);
    if (status == STATUS_OK) status = open_model(&bench, &error);
    if (status == STATUS_OK) cli_warn_backend(config);
    if (status == STATUS_OK) status = config->bench.requests ? serve_requests(&bench, &error) : drive_backend(&bench, &error);
    model_close(bench.model);
    free(bench.samples);
    return status == STATUS_OK ? CLI_OK : cli_fail(&error);
}
