/* The forward pass by phases: how long each takes in the steps that bench's rows measure, what it computes and reads (kernels/program.h), and how near that comes to
 * what the machine can do. The backend times itself (backend_limits.phase_ns). Main thread. */
#include <stdlib.h>

#include "base/check.h"
#include "cli/bench.h"

static void add_matrix(struct bench_phase_row *row, const struct tensor *weight, double rows) {
    if (!weight->data) return;
    row->macs += rows * weight->rows * weight->cols;
    row->bytes += (double)tensor_bytes(weight);
}

/* Adds one step of n_rows rows, n_samples of them sampled; together they see `slots` slots of a lane, `slots_read` of them distinct. */
static void add_step(struct bench_phases *phases, const struct program *program, double n_rows, double n_samples, double slots, double slots_read,
                     double slot_bytes) {
    for (uint32_t i = 0; i < program->n_phases; i++) {
        const struct phase *phase = &program->phases[i];
        struct bench_phase_row *row = &phases->rows[phase->kind];
        switch (phase->kind) {
        case PHASE_EMBED: row->bytes += n_rows * (double)tensor_row_bytes(&phase->weight[WEIGHT_ONLY]); break;
        case PHASE_ATTN: /* q.k and p.v */
            row->macs += 2.0 * program->n_heads * program->head_dim * slots;
            row->bytes += slots_read * program->n_kv_heads * slot_bytes;
            break;
        case PHASE_HEAD:
            if (n_samples > 0) add_matrix(row, &phase->weight[WEIGHT_ONLY], n_samples);
            break;
        default:
            for (int w = 0; w < 3; w++) add_matrix(row, &phase->weight[w], n_rows);
        }
    }
}

static struct bench_phases begin(const char *test) {
    struct bench_phases phases = {.test = test};
    for (int kind = 0; kind < PHASE_KINDS; kind++) phases.rows[kind].kind = (enum phase_kind)kind;
    return phases;
}

static int ascending(const void *a, const void *b) {
    const uint64_t *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

/* ns [rounds][PHASE_KINDS], each over `steps` steps. */
static void take_medians(struct bench_phases *phases, const uint64_t *ns, uint32_t rounds, uint32_t steps) {
    uint64_t *column = check_calloc(rounds, sizeof *column);
    for (int kind = 0; kind < PHASE_KINDS; kind++) {
        for (uint32_t r = 0; r < rounds; r++) column[r] = ns[r * PHASE_KINDS + (uint32_t)kind];
        qsort(column, rounds, sizeof *column, ascending);
        size_t middle = rounds / 2;
        phases->rows[kind].us = (double)column[middle] / 1e3 / steps;
    }
    free(column);
}

enum status bench_phases_prompt(struct bench_driver *driver, const struct program *program, uint32_t n_prompt, uint32_t rounds,
                                struct bench_phases *phases, struct error *error) {
    *phases = begin("pp");
    phases->batch = 1;
    phases->n_prompt = n_prompt;
    double slot_bytes = bench_driver_slot_bytes(driver);
    for (uint32_t done = 0, n; done < n_prompt; done += n) {
        n = n_prompt - done < bench_driver_max_rows(driver) ? n_prompt - done : bench_driver_max_rows(driver);
        double slots = (double)n * done + (double)n * (n + 1.0) / 2;
        add_step(phases, program, n, done + n == n_prompt, slots, (double)done + n, slot_bytes);
    }
    uint64_t *ns = check_calloc((size_t)rounds * PHASE_KINDS, sizeof *ns);
    enum status status = STATUS_OK;
    for (uint32_t r = 0; r <= rounds && status == STATUS_OK; r++) {
        uint64_t *round = ns + (size_t)(r > 0 ? r - 1 : 0) * PHASE_KINDS; /* the first is overwritten */
        bench_driver_truncate(driver, 0, 0);
        status = bench_driver_prompt(driver, 0, n_prompt, r + 1, error);
        bench_driver_take_phases(driver, round);
    }
    take_medians(phases, ns, rounds, 1);
    free(ns);
    return status;
}

enum status bench_phases_generation(struct bench_driver *driver, const struct program *program, uint32_t batch, uint32_t context, uint32_t n_gen,
                                    uint32_t rounds, struct bench_phases *phases, struct error *error) {
    *phases = begin("tg");
    phases->batch = batch;
    phases->n_gen = n_gen;
    phases->context = context;
    for (uint32_t s = 0; s < batch; s++) bench_driver_truncate(driver, s, context);
    /* Of the middle step; where lanes have lost some, the mean of them. */
    double slots = (double)bench_driver_slots(driver, batch) / program_lanes(program) + batch * (n_gen + 1.0) / 2;
    add_step(phases, program, batch, batch, slots, slots, bench_driver_slot_bytes(driver));
    uint64_t *ns = check_calloc((size_t)rounds * PHASE_KINDS, sizeof *ns);
    enum status status = STATUS_OK;
    for (uint32_t r = 0; r <= rounds && status == STATUS_OK; r++) {
        for (uint32_t s = 0; s < batch; s++) bench_driver_truncate(driver, s, context);
        status = bench_driver_generate(driver, batch, n_gen, error);
        bench_driver_take_phases(driver, ns + (size_t)(r > 0 ? r - 1 : 0) * PHASE_KINDS);
    }
    take_medians(phases, ns, rounds, n_gen);
    free(ns);
    return status;
}

void bench_phases_rate(struct bench_phases *phases, const struct bench_ceilings *ceilings) {
    for (int kind = 0; kind < PHASE_KINDS; kind++) {
        struct bench_phase_row *row = &phases->rows[kind];
        if (row->us <= 0) continue;
        row->gmac_s = row->macs / row->us / 1e3;
        row->gb_s = row->bytes / row->us / 1e3;
        double by_macs = ceilings->gmac_s > 0 ? row->gmac_s / ceilings->gmac_s : 0, by_bytes = ceilings->gb_s > 0 ? row->gb_s / ceilings->gb_s : 0;
        row->of_ceiling = by_macs > by_bytes ? by_macs : by_bytes;
    }
}
