/* One step of the cpu backend: every worker walks the phases, a barrier after each. Products and what is fused with them are here; attention is in attend.c,
 * the output head and sampling in head.c.
 *
 * A layer has five barriers (six where prompt rows are many: rows are normalised in shares, not by every worker for itself). */
#include <math.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

struct share share_of(struct cpu *cpu, uint32_t n_units, bool dynamic, uint32_t worker) {
    uint32_t n = workers_count(cpu->workers);
    if (dynamic) return (struct share){.n = n_units, .dynamic = true};
    return (struct share){.next = (uint32_t)((uint64_t)n_units * worker / n), .end = (uint32_t)((uint64_t)n_units * (worker + 1) / n)};
}

bool share_next(struct cpu *cpu, struct share *share, uint32_t *unit) {
    if (share->dynamic) {
        *unit = workers_take(cpu->workers, 1);
        return *unit < share->n;
    }
    *unit = share->next;
    return share->next++ < share->end;
}

/* Short steps split the work evenly and beforehand: shares stay in the same core's cache, nobody touches a common counter. In long ones a core that is
 * slower, or busy with something else, takes less. */
static bool long_step(const struct cpu *cpu) { return cpu->batch->n_rows >= 16; }

static void embed(struct cpu *cpu, uint32_t worker) {
    const struct program *p = cpu->program;
    const struct batch *batch = cpu->batch;
    struct share share = share_of(cpu, batch->n_rows, false, worker);
    for (uint32_t row; share_next(cpu, &share, &row);) {
        float *x = cpu->x + (size_t)row * p->n_embd;
        if (cpu->embedding.data) tensor_row_f32(&cpu->embedding, (uint32_t)batch->tokens[row], x);
        else panel_row_f32(&cpu->head, (uint32_t)batch->tokens[row], x);
        float *rope = cpu->rope + (size_t)row * p->rope_dims;
        for (uint32_t i = 0; i < p->rope_dims / 2; i++) {
            double angle = (double)batch->positions[row] * p->rope_frequency[i];
            rope[2 * i] = (float)cos(angle) * p->rope_magnitude;
            rope[2 * i + 1] = (float)sin(angle) * p->rope_magnitude;
        }
    }
}

static void put_row(struct cpu *cpu, const struct act *act, uint32_t row, const float *values, uint32_t n) {
    if (act->values) {
        float *to = act->values + row * act->value_stride;
        if (to != values) memcpy(to, values, n * sizeof *to);
        for (size_t i = n; i < act->value_stride; i++) to[i] = 0;
    }
    if (act->blocks) cpu->isa->quantize(values, n / PANEL_K, act->blocks + row * act->block_stride);
}

/* Normalises all rows of x: with few, each worker for itself and into its own memory; with many, in shares and a barrier. */
static const struct act *normalise(struct cpu *cpu, const float *weight, uint32_t worker) {
    const struct program *p = cpu->program;
    struct worker_scratch *own = &cpu->workers_scratch[worker];
    const uint32_t n_rows = cpu->batch->n_rows;
    bool alone = n_rows <= PRIVATE_ROWS;
    const struct act *act = alone ? &own->act : &cpu->h;
    struct share share = {.end = n_rows};
    if (!alone) share = share_of(cpu, n_rows, false, worker);
    for (uint32_t row; share_next(cpu, &share, &row);) {
        cpu->isa->norm(cpu->x + (size_t)row * p->n_embd, weight, p->n_embd, p->norm_epsilon, own->row);
        put_row(cpu, act, row, own->row, p->n_embd);
    }
    if (!alone) workers_barrier(cpu->workers);
    return act;
}

static void multiply(struct cpu *cpu, const struct panel *panel, uint32_t strip, const struct act *act, uint32_t row, uint32_t n_rows, float (*y)[STRIP_ROWS]) {
    const uint8_t *data = panel->data + strip * panel->strip_bytes;
    if (panel_is_float(panel->type))
        cpu->isa->product[panel->type](data, panel->n_blocks, act->values + row * act->value_stride, act->value_stride * sizeof(float), n_rows, y);
    else
        cpu->isa->product[panel->type](data, panel->n_blocks, act->blocks + row * act->block_stride, act->block_stride * sizeof(struct act_block), n_rows, y);
}

enum { TILE_ROWS = 4 * PRODUCT_ROWS };

/* A unit of a product phase: `group` of `n_groups` groups of strips, for one panel of rows. */
struct unit {
    uint32_t group, row, end_row;
};

static struct unit unit_of(const struct cpu *cpu, uint32_t unit, uint32_t n_groups) {
    uint32_t row = unit / n_groups * PANEL_ROWS, end = row + PANEL_ROWS;
    return (struct unit){unit % n_groups, row, end < cpu->batch->n_rows ? end : cpu->batch->n_rows};
}

static uint32_t units_of(const struct cpu *cpu, uint32_t n_groups) { return (cpu->batch->n_rows + PANEL_ROWS - 1) / PANEL_ROWS * n_groups; }

static uint32_t columns_of(const struct panel *panel, uint32_t strip) {
    uint32_t left = panel->rows - strip * STRIP_ROWS;
    return left < STRIP_ROWS ? left : STRIP_ROWS;
}

/* One strip of q, k or v for a panel of rows, into the qkv rows. */
static void qkv_unit(struct cpu *cpu, const struct layer *layer, const struct act *act, struct unit unit) {
    const struct panel *panels[3] = {&layer->q, &layer->k, &layer->v};
    uint32_t which = 0, strip = unit.group;
    size_t column = 0;
    while (strip >= panels[which]->n_strips) {
        strip -= panels[which]->n_strips;
        column += panels[which++]->rows;
    }
    uint32_t n = columns_of(panels[which], strip);
    const float *bias = layer->bias[which] ? layer->bias[which] + strip * STRIP_ROWS : NULL;
    float y[TILE_ROWS][STRIP_ROWS];
    for (uint32_t row = unit.row; row < unit.end_row; row += TILE_ROWS) {
        uint32_t rows = unit.end_row - row < TILE_ROWS ? unit.end_row - row : TILE_ROWS;
        multiply(cpu, panels[which], strip, act, row, rows, y);
        for (uint32_t r = 0; r < rows; r++) {
            float *to = cpu->qkv + (row + r) * cpu->qkv_stride + column + strip * STRIP_ROWS;
            for (uint32_t i = 0; i < n; i++) to[i] = bias ? y[r][i] + bias[i] : y[r][i];
        }
    }
}

static void attention_in(struct cpu *cpu, const struct layer *layer, uint32_t worker) {
    const struct act *act = normalise(cpu, layer->attention_norm, worker);
    uint32_t n_strips = layer->q.n_strips + layer->k.n_strips + layer->v.n_strips;
    struct share share = share_of(cpu, units_of(cpu, n_strips), long_step(cpu), worker);
    for (uint32_t unit; share_next(cpu, &share, &unit);) qkv_unit(cpu, layer, act, unit_of(cpu, unit, n_strips));
}

/* x += W act: ATTN_OUT and MLP_OUT. */
static void add_product(struct cpu *cpu, const struct panel *panel, const struct act *act, uint32_t worker) {
    const uint32_t n_embd = cpu->program->n_embd;
    struct share share = share_of(cpu, units_of(cpu, panel->n_strips), long_step(cpu), worker);
    float y[TILE_ROWS][STRIP_ROWS];
    for (uint32_t index; share_next(cpu, &share, &index);) {
        struct unit unit = unit_of(cpu, index, panel->n_strips);
        uint32_t n = columns_of(panel, unit.group);
        for (uint32_t row = unit.row; row < unit.end_row; row += TILE_ROWS) {
            uint32_t rows = unit.end_row - row < TILE_ROWS ? unit.end_row - row : TILE_ROWS;
            multiply(cpu, panel, unit.group, act, row, rows, y);
            for (uint32_t r = 0; r < rows; r++) {
                float *x = cpu->x + (size_t)(row + r) * n_embd + unit.group * STRIP_ROWS;
                for (uint32_t i = 0; i < n; i++) x[i] += y[r][i];
            }
        }
    }
}

/* 32 columns of silu(gate) * up: two strips of each, so that the result is whole blocks of activations. */
static void mlp_unit(struct cpu *cpu, const struct layer *layer, const struct act *act, struct unit unit) {
    float gate[TILE_ROWS][STRIP_ROWS], up[TILE_ROWS][STRIP_ROWS], both[TILE_ROWS][2 * STRIP_ROWS] = {0};
    const uint32_t column = unit.group * PANEL_K;
    for (uint32_t row = unit.row; row < unit.end_row; row += TILE_ROWS) {
        uint32_t rows = unit.end_row - row < TILE_ROWS ? unit.end_row - row : TILE_ROWS;
        for (uint32_t half = 0; half < 2 && 2 * unit.group + half < layer->gate.n_strips; half++) {
            multiply(cpu, &layer->gate, 2 * unit.group + half, act, row, rows, gate);
            multiply(cpu, &layer->up, 2 * unit.group + half, act, row, rows, up);
            for (uint32_t r = 0; r < rows; r++) cpu->isa->silu(gate[r], up[r], STRIP_ROWS, both[r] + half * STRIP_ROWS);
        }
        for (uint32_t r = 0; r < rows; r++) {
            if (cpu->g.values) memcpy(cpu->g.values + (row + r) * cpu->g.value_stride + column, both[r], sizeof both[r]);
            if (cpu->g.blocks) cpu->isa->quantize(both[r], 1, cpu->g.blocks + (row + r) * cpu->g.block_stride + unit.group);
        }
    }
}

static void mlp_in(struct cpu *cpu, const struct layer *layer, uint32_t worker) {
    const struct act *act = normalise(cpu, layer->mlp_norm, worker);
    uint32_t n_groups = (layer->gate.n_strips + 1) / 2;
    struct share share = share_of(cpu, units_of(cpu, n_groups), long_step(cpu), worker);
    for (uint32_t unit; share_next(cpu, &share, &unit);) mlp_unit(cpu, layer, act, unit_of(cpu, unit, n_groups));
}

/* Head dims that are no whole blocks could not be quantised head by head. */
static void quantize_attention(struct cpu *cpu, uint32_t worker) {
    if (!cpu->a.blocks || cpu->program->head_dim % PANEL_K == 0) return;
    struct share share = share_of(cpu, cpu->batch->n_rows, false, worker);
    for (uint32_t row; share_next(cpu, &share, &row);)
        cpu->isa->quantize(cpu->a.values + row * cpu->a.value_stride, (uint32_t)cpu->a.block_stride, cpu->a.blocks + row * cpu->a.block_stride);
    workers_barrier(cpu->workers);
}

static void walk(void *context, uint32_t worker) {
    struct cpu *cpu = context;
    embed(cpu, worker);
    workers_barrier(cpu->workers);
    for (uint32_t i = 0; i < cpu->program->n_layers; i++) {
        const struct layer *layer = &cpu->layers[i];
        attention_in(cpu, layer, worker);
        workers_barrier(cpu->workers);
        phase_attention(cpu, i, worker);
        workers_barrier(cpu->workers);
        quantize_attention(cpu, worker);
        add_product(cpu, &layer->o, &cpu->a, worker);
        workers_barrier(cpu->workers);
        mlp_in(cpu, layer, worker);
        workers_barrier(cpu->workers);
        add_product(cpu, &layer->down, &cpu->g, worker);
        workers_barrier(cpu->workers);
    }
    phase_head(cpu, worker);
}

void cpu_step(struct cpu *cpu) { workers_run(cpu->workers, walk, cpu); }
