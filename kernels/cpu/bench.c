/* See kernels/bench.h. Runs stages of its own over the backend's weights, between steps; activations are whatever the last step left, their values do not
 * matter to the time. */
#include "kernels/bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/check.h"
#include "kernels/cpu/cpu.h"

enum { ROUNDS = 15, PEAK_ROUNDS = 1 << 17 };

static double now(void) {
    struct timespec time;
    CHECK(clock_gettime(CLOCK_MONOTONIC, &time) == 0);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Seconds of ROUNDS runs, ascending: the first is what a ceiling takes, the middle what a line reports. */
static void measure(struct cpu *cpu, void *context, const struct stage *stages, uint32_t n_stages, double seconds[ROUNDS]) {
    for (int i = 0; i < ROUNDS; i++) {
        double start = now();
        workers_run(cpu->workers, context, stages, n_stages);
        seconds[i] = now() - start;
    }
    qsort(seconds, ROUNDS, sizeof *seconds, ascending);
}

/* One ceiling: each worker multiplies registers. A unit a worker. */
struct peak {
    struct cpu *cpu;
    _Atomic uint64_t macs;
};

static void stage_peak(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    (void)stage, (void)worker;
    struct peak *peak = context;
    for (uint32_t unit = first; unit < end; unit++) peak->macs += peak->cpu->isa->peak(PEAK_ROUNDS);
}

/* The other: the weights are read and nothing is done with them. A unit is a piece of 64 KiB. */
enum { PIECE = 1 << 16 };

static void stage_read(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    (void)stage, (void)worker;
    const struct cpu *cpu = context;
    cpu->isa->read(cpu->weights.base + (size_t)first * PIECE, (size_t)(end - first) * PIECE);
}

/* The same matrix of all layers, one stage each, as a step meets them (other matrices between them keep them out of the cache; here the layers do). */
struct sweep {
    struct cpu *cpu;
    const struct panel *panels;
    size_t panel_stride; /* bytes from one layer's panel to the next's */
    uint32_t n_rows;
};

static void stage_sweep(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    (void)worker;
    const struct sweep *sweep = context;
    struct cpu *cpu = sweep->cpu;
    const struct panel *panel = (const struct panel *)(const void *)((const uint8_t *)sweep->panels + stage->index * sweep->panel_stride);
    const struct act *act = panel == &cpu->head                   ? &cpu->z
                            : panel->cols == cpu->program->n_ff   ? &cpu->g
                            : panel->cols == cpu->program->n_embd ? &cpu->h
                                                                  : &cpu->a;
    bool floats = panel_is_float(panel->type);
    const void *rows = floats ? (const void *)act->values : (const void *)act->blocks;
    size_t stride = floats ? act->value_stride * sizeof(float) : act->block_stride * sizeof(struct act_block);
    float y[PANEL_ROWS][STRIP_ROWS];
    for (uint32_t strip = first; strip < end; strip++)
        cpu->isa->product[panel->type](panel->data + strip * panel->strip_bytes, panel->n_blocks, rows, stride, sweep->n_rows, y);
}

static struct bench_phase sweep_line(struct cpu *cpu, const char *what, const struct panel *panels, size_t panel_stride, uint32_t n_panels,
                                     uint32_t n_rows, struct stage *stages, double peak_gmac_s, double read_gb_s) {
    struct sweep sweep = {cpu, panels, panel_stride, n_rows};
    for (uint32_t i = 0; i < n_panels; i++) stages[i] = (struct stage){.run = stage_sweep, .n_units = panels->n_strips, .index = i};
    double seconds[ROUNDS];
    measure(cpu, &sweep, stages, n_panels, seconds);
    struct bench_phase line = {.seconds = seconds[ROUNDS / 2]};
    double bytes = (double)panel_bytes(panels) * n_panels, macs = (double)panels->rows * panels->cols * n_rows * n_panels;
    (void)snprintf(line.name, sizeof line.name, "%s %s %ux%u, %u row%s", what, tensor_type_info(panels->type)->name, (unsigned)panels->rows,
                   (unsigned)panels->cols, (unsigned)n_rows, n_rows == 1 ? "" : "s");
    line.gmac_s = macs / line.seconds / 1e9;
    line.gb_s = bytes / line.seconds / 1e9;
    double of_peak = 100 * line.gmac_s / peak_gmac_s, of_read = 100 * line.gb_s / read_gb_s;
    line.percent = of_peak > of_read ? of_peak : of_read;
    line.ceiling = of_peak > of_read ? "int8 products" : "read bandwidth";
    return line;
}

uint32_t cpu_bench_phases(struct backend *backend, struct bench_phase *lines, uint32_t max) {
    struct cpu *cpu = (struct cpu *)backend;
    CHECK(backend->ops == &backend_cpu && !cpu->batch);
    uint32_t n = 0, pieces = (uint32_t)(cpu->weights.used / PIECE);
    struct peak peak = {.cpu = cpu};
    double seconds[ROUNDS];
    measure(cpu, &peak, &(struct stage){.run = stage_peak, .n_units = workers_count(cpu->workers)}, 1, seconds);
    double peak_gmac_s = (double)peak.macs / ROUNDS / seconds[0] / 1e9, read_gb_s = 1;
    if (n < max)
        lines[n++] =
            (struct bench_phase){.name = "int8 products", .seconds = seconds[0], .gmac_s = peak_gmac_s, .percent = 100, .ceiling = "int8 products"};
    if (pieces > 0) {
        measure(cpu, cpu, &(struct stage){.run = stage_read, .n_units = pieces}, 1, seconds);
        read_gb_s = (double)pieces * PIECE / seconds[0] / 1e9;
        if (n < max)
            lines[n++] =
                (struct bench_phase){.name = "read weights", .seconds = seconds[0], .gb_s = read_gb_s, .percent = 100, .ceiling = "read bandwidth"};
    }
    const struct layer *layer = cpu->layers;
    const struct {
        const char *name;
        const struct panel *panels;
        uint32_t count;
    } sweeps[] = {{"q", &layer->q, cpu->program->n_layers},
                  {"o", &layer->o, cpu->program->n_layers},
                  {"gate", &layer->gate, cpu->program->n_layers},
                  {"down", &layer->down, cpu->program->n_layers},
                  {"head", &cpu->head, 1}};
    static const uint32_t rows[] = {1, 8, 32, PANEL_ROWS};
    struct stage *stages = check_calloc(cpu->program->n_layers, sizeof *stages);
    for (size_t s = 0; s < sizeof sweeps / sizeof *sweeps; s++)
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
            uint32_t limit = sweeps[s].panels == &cpu->head ? HEAD_ROWS : cpu->limits.max_rows;
            if (n < max && rows[r] <= limit)
                lines[n++] =
                    sweep_line(cpu, sweeps[s].name, sweeps[s].panels, sizeof(struct layer), sweeps[s].count, rows[r], stages, peak_gmac_s, read_gb_s);
        }
    free(stages);
    return n;
}
