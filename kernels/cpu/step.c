/* One step of the cpu backend, as a list of stages (workers.h). Products and what is fused with them are here; attention is in attend.c, the output head and
 * sampling in head.c.
 *
 * A layer of a short step is five stages: norm and q|k|v; rotation, append and attention; output and residual; norm and gate|up and activation; down and
 * residual. With many rows normalising, and with prompts appending, are stages of their own. */
#include <math.h>
#include <string.h>

#include "base/clock.h"
#include "kernels/cpu/cpu.h"

static void embed_row(struct cpu *cpu, uint32_t row) {
    const struct program *p = cpu->program;
    const struct batch *batch = cpu->batch;
    float *x = cpu->x + (size_t)row * p->n_embd;
    if (cpu->embedding.data)
        tensor_row_f32(&cpu->embedding, (uint32_t)batch->tokens[row], x);
    else
        panel_row_f32(&cpu->head, (uint32_t)batch->tokens[row], x);
    /* One factor a dim, signs included (isa.h). */
    float *cosine = cpu->rope + (size_t)row * 2 * p->rope_dims, *sine = cosine + p->rope_dims;
    bool halves = p->rope_pairs == ROPE_PAIRS_HALVES;
    for (uint32_t i = 0; i < p->rope_dims / 2; i++) {
        double angle = (double)batch->positions[row] * p->rope_frequency[i];
        float c = (float)(cos(angle) * (double)p->rope_magnitude), s = (float)(sin(angle) * (double)p->rope_magnitude);
        uint32_t first = halves ? i : 2 * i, second = halves ? i + p->rope_dims / 2 : 2 * i + 1;
        cosine[first] = cosine[second] = c;
        sine[first] = -s;
        sine[second] = s;
    }
}

static void stage_embed(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    (void)stage, (void)worker;
    for (uint32_t row = first; row < end; row++) embed_row(context, row);
}

void put_row(struct cpu *cpu, const struct act *act, uint32_t row, const float *values, uint32_t n) {
    if (act->values) {
        float *to = act->values + row * act->value_stride;
        memcpy(to, values, n * sizeof *to);
        for (size_t i = n; i < act->value_stride; i++) to[i] = 0;
    }
    if (act->blocks) cpu->isa->quantize(values, n / PANEL_K, act->planes, act_block_at(act, row, 0));
}

static void normalise(struct cpu *cpu, const float *weight, const struct act *act, uint32_t first, uint32_t end, uint32_t worker) {
    const struct program *p = cpu->program;
    float *out = cpu->workers_scratch[worker].row;
    for (uint32_t row = first; row < end; row++) {
        cpu->isa->norm(cpu->x + (size_t)row * p->n_embd, weight, p->n_embd, p->norm_epsilon, out);
        put_row(cpu, act, row, out, p->n_embd);
    }
}

static bool few_rows(const struct cpu *cpu) { return cpu->batch->n_rows <= PRIVATE_ROWS; }

static void stage_attention_norm(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    struct cpu *cpu = context;
    normalise(cpu, cpu->layers[stage->index].attention_norm, &cpu->h, first, end, worker);
}

static void stage_mlp_norm(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    struct cpu *cpu = context;
    normalise(cpu, cpu->layers[stage->index].mlp_norm, &cpu->h, first, end, worker);
}

/* The normed rows: of many, a stage of its own made them; few are made by every worker for itself, when it takes its first unit of the stage. */
static const struct act *normed(struct cpu *cpu, const struct stage *stage, const float *weight, uint32_t worker) {
    if (!few_rows(cpu)) return &cpu->h;
    struct worker_scratch *own = &cpu->workers_scratch[worker];
    uint64_t norm = cpu->stages_before + (uint64_t)(stage - cpu->stages);
    if (own->norm != norm) normalise(cpu, weight, &own->act, 0, cpu->batch->n_rows, worker);
    own->norm = norm;
    return &own->act;
}

void multiply_strip(const struct cpu *cpu, const struct panel *panel, uint32_t strip, const struct act *act, uint32_t row, uint32_t n_rows,
                    float (*y)[STRIP_ROWS]) {
    const uint8_t *data = panel->data + strip * panel->strip_bytes;
    product_function *product = cpu->isa->product[act->planes - 1][panel->type];
    if (panel_is_float(panel->type))
        product(data, panel->n_blocks, act->values + row * act->value_stride, act->value_stride * sizeof(float), n_rows, y);
    else
        product(data, panel->n_blocks, act_block_at(act, row, 0), act->row_bytes, n_rows, y);
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
        multiply_strip(cpu, panels[which], strip, act, row, rows, y);
        cpu->isa->put_strip((const float(*)[STRIP_ROWS])y, rows, n, bias, cpu->qkv + row * cpu->qkv_stride + column + strip * STRIP_ROWS,
                            cpu->qkv_stride);
    }
}

static uint32_t qkv_strips(const struct layer *layer) { return layer->q.n_strips + layer->k.n_strips + layer->v.n_strips; }

static void stage_qkv(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    struct cpu *cpu = context;
    const struct layer *layer = &cpu->layers[stage->index];
    const struct act *act = normed(cpu, stage, layer->attention_norm, worker);
    for (uint32_t unit = first; unit < end; unit++) qkv_unit(cpu, layer, act, unit_of(cpu, unit, qkv_strips(layer)));
}

/* x += W act: ATTN_OUT and MLP_OUT. */
static void add_product(struct cpu *cpu, const struct panel *panel, const struct act *act, uint32_t first, uint32_t end_unit) {
    const uint32_t n_embd = cpu->program->n_embd;
    float y[TILE_ROWS][STRIP_ROWS];
    for (uint32_t index = first; index < end_unit; index++) {
        struct unit unit = unit_of(cpu, index, panel->n_strips);
        uint32_t n = columns_of(panel, unit.group);
        for (uint32_t row = unit.row; row < unit.end_row; row += TILE_ROWS) {
            uint32_t rows = unit.end_row - row < TILE_ROWS ? unit.end_row - row : TILE_ROWS;
            multiply_strip(cpu, panel, unit.group, act, row, rows, y);
            cpu->isa->add_strip((const float(*)[STRIP_ROWS])y, rows, n, cpu->x + (size_t)row * n_embd + unit.group * STRIP_ROWS, n_embd);
        }
    }
}

/* 32 columns of silu(gate) * up: two strips of each, so that the result is whole blocks of activations. */
static void mlp_unit(struct cpu *cpu, const struct layer *layer, const struct act *act, struct unit unit) {
    float gate[TILE_ROWS][STRIP_ROWS], up[TILE_ROWS][STRIP_ROWS], both[TILE_ROWS][PANEL_K];
    const uint32_t column = unit.group * PANEL_K;
    const bool odd = 2 * unit.group + 1 == layer->gate.n_strips; /* half a block: no quantised type then, but zeros for the padding */
    if (odd) memset(both, 0, sizeof both);
    for (uint32_t row = unit.row; row < unit.end_row; row += TILE_ROWS) {
        uint32_t rows = unit.end_row - row < TILE_ROWS ? unit.end_row - row : TILE_ROWS;
        for (uint32_t half = 0; half < (odd ? 1u : 2u); half++) {
            multiply_strip(cpu, &layer->gate, 2 * unit.group + half, act, row, rows, gate);
            multiply_strip(cpu, &layer->up, 2 * unit.group + half, act, row, rows, up);
            cpu->isa->silu((const float(*)[STRIP_ROWS])gate, (const float(*)[STRIP_ROWS])up, rows, (float(*)[PANEL_K])(both[0] + half * STRIP_ROWS));
        }
        for (uint32_t r = 0; cpu->g.values && r < rows; r++)
            memcpy(cpu->g.values + (row + r) * cpu->g.value_stride + column, both[r], sizeof both[r]);
        if (cpu->g.blocks)
            cpu->isa->quantize_column((const float(*)[PANEL_K])both, rows, cpu->g.planes, act_block_at(&cpu->g, row, unit.group), cpu->g.row_bytes);
    }
}

static void stage_attention_out(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    (void)worker;
    struct cpu *cpu = context;
    add_product(cpu, &cpu->layers[stage->index].o, &cpu->a, first, end);
}

static uint32_t mlp_groups(const struct layer *layer) { return (layer->gate.n_strips + 1) / 2; }

static void stage_mlp_in(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    struct cpu *cpu = context;
    const struct layer *layer = &cpu->layers[stage->index];
    const struct act *act = normed(cpu, stage, layer->mlp_norm, worker);
    for (uint32_t unit = first; unit < end; unit++) mlp_unit(cpu, layer, act, unit_of(cpu, unit, mlp_groups(layer)));
}

static void stage_mlp_out(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    (void)worker;
    struct cpu *cpu = context;
    add_product(cpu, &cpu->layers[stage->index].down, &cpu->g, first, end);
}

/* Head dims that are no whole blocks could not be quantised head by head. */
static void stage_quantize_attention(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    (void)stage, (void)worker;
    struct cpu *cpu = context;
    for (uint32_t row = first; row < end; row++)
        cpu->isa->quantize(cpu->a.values + row * cpu->a.value_stride, cpu->program->n_heads * cpu->program->head_dim / PANEL_K, cpu->a.planes,
                           act_block_at(&cpu->a, row, 0));
}

static void add_stage(struct cpu *cpu, enum phase_kind phase, stage_function *run, uint32_t n_units, uint32_t index) {
    cpu->stage_phases[cpu->n_stages] = (uint8_t)phase;
    cpu->stages[cpu->n_stages++] = (struct stage){.run = run, .n_units = n_units, .index = index};
}

static void plan_layer(struct cpu *cpu, uint32_t i, uint32_t attention_units) {
    const struct layer *layer = &cpu->layers[i];
    const uint32_t n_rows = cpu->batch->n_rows, n_kv = cpu->program->n_kv_heads, norms = few_rows(cpu) ? 0 : n_rows;
    add_stage(cpu, PHASE_ATTN_IN, stage_attention_norm, norms, i);
    add_stage(cpu, PHASE_ATTN_IN, stage_qkv, units_of(cpu, qkv_strips(layer)), i);
    add_stage(cpu, PHASE_ATTN, stage_append, cpu->fused_append ? 0 : n_rows * n_kv, i);
    add_stage(cpu, PHASE_ATTN, stage_close, cpu->kv.raw_bytes && !cpu->fused_append ? cpu->batch->n_sequences * n_kv : 0, i);
    add_stage(cpu, PHASE_ATTN, stage_attend, attention_units, i);
    add_stage(cpu, PHASE_ATTN, stage_merge, cpu->n_splits ? attention_units / cpu->n_splits : 0, i);
    add_stage(cpu, PHASE_ATTN, stage_quantize_attention, cpu->a.blocks && cpu->program->head_dim % PANEL_K ? n_rows : 0, i);
    add_stage(cpu, PHASE_ATTN_OUT, stage_attention_out, units_of(cpu, layer->o.n_strips), i);
    add_stage(cpu, PHASE_MLP_IN, stage_mlp_norm, norms, i);
    add_stage(cpu, PHASE_MLP_IN, stage_mlp_in, units_of(cpu, mlp_groups(layer)), i);
    add_stage(cpu, PHASE_MLP_OUT, stage_mlp_out, units_of(cpu, layer->down.n_strips), i);
}

/* All stages in one run; or, to time them, phase by phase. */
static void run_stages(struct cpu *cpu) {
    uint64_t *phase_ns = cpu->limits.phase_ns;
    if (!phase_ns) {
        workers_run(cpu->workers, cpu, cpu->stages, cpu->n_stages);
        return;
    }
    uint64_t before = clock_now_ns();
    for (uint32_t first = 0, end; first < cpu->n_stages; first = end) {
        for (end = first + 1; end < cpu->n_stages && cpu->stage_phases[end] == cpu->stage_phases[first];) end++;
        workers_run(cpu->workers, cpu, cpu->stages + first, end - first);
        uint64_t now = clock_now_ns();
        phase_ns[cpu->stage_phases[first]] += now - before;
        before = now;
    }
}

void cpu_step(struct cpu *cpu) {
    cpu->n_stages = 0;
    uint32_t attention_units = plan_attention(cpu), first_sample = 0;
    add_stage(cpu, PHASE_EMBED, stage_embed, cpu->batch->n_rows, 0);
    for (uint32_t i = 0; i < cpu->program->n_layers; i++) plan_layer(cpu, i, attention_units);
    for (uint32_t row = 0; row < cpu->n_head_rows; row += HEAD_ROWS) {
        uint32_t n = cpu->n_head_rows - row < HEAD_ROWS ? cpu->n_head_rows - row : HEAD_ROWS;
        add_stage(cpu, PHASE_HEAD, stage_head_norm, n, row);
        add_stage(cpu, PHASE_HEAD, stage_head_product, head_units(cpu), row);
        add_stage(cpu, PHASE_HEAD, stage_sample, samples_of_chunk(cpu, row, &first_sample), row);
    }
    run_stages(cpu);
    cpu->stages_before += cpu->n_stages;
}
