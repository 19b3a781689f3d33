/* Life of the cpu backend: the memory plan, packing of the weights, the pool; and submit/sync, which run a step on the spot.
 *
 * Memory comes in three pieces: weights, pool, scratch. Each is laid out by a function that walks what it must hold, once to count and once to hand out
 * addresses, so that the printed plan and the allocation cannot differ. After prepare nothing is allocated. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/check.h"
#include "base/clock.h"
#include "kernels/cpu/cpu.h"
#include "kernels/kivi.h"

enum { HUGE_PAGE = 2 << 20 };

/* Worst first: the last one present is the default. */
const struct cpu_isa *const cpu_isas[] = {
    &cpu_isa_generic,
#if defined(__x86_64__)
    &cpu_isa_avx2,
    &cpu_isa_avxvnni,
    &cpu_isa_avx512,
    &cpu_isa_avx512bf16,
#endif
    NULL,
};

const struct cpu_isa *cpu_isa_best(void) {
    const struct cpu_isa *best = NULL;
    for (const struct cpu_isa *const *isa = cpu_isas; *isa; isa++)
        if ((*isa)->present()) best = *isa;
    return best;
}

static enum status choose_isa(const char *name, const struct cpu_isa **chosen, struct error *error) {
    *chosen = cpu_isa_best();
    if (!name) return STATUS_OK;
    for (const struct cpu_isa *const *isa = cpu_isas; *isa; isa++) {
        if (strcmp((*isa)->name, name) != 0) continue;
        if (!(*isa)->present())
            return error_set(error, STATUS_UNSUPPORTED, "instruction set %s: this CPU does not have %s; the best it has is %s", name, (*isa)->text,
                             (*chosen)->name);
        *chosen = *isa;
        return STATUS_OK;
    }
    return error_set(error, STATUS_INVALID, "instruction set %s: unknown on this architecture; known are generic, avx2, avxvnni, avx512, avx512bf16",
                     name);
}

/* `bytes` of the arena, on a cache line; NULL while only counting. */
static void *take(struct arena *arena, size_t count, size_t size) {
    size_t bytes;
    CHECK(size_mul(count, size, &bytes));
    void *memory = arena->base ? arena->base + arena->used : NULL;
    CHECK(size_add(arena->used, (bytes + 63) / 64 * 64, &arena->used));
    CHECK(!arena->base || arena->used <= arena->size);
    return memory;
}

/* Zeroed, not yet touched: pages come to be where they are first used. */
static enum status arena_open(struct arena *arena, size_t bytes, const char *what, struct error *error) {
    size_t size = (bytes / HUGE_PAGE + 1) * HUGE_PAGE, space = size + HUGE_PAGE;
    uint8_t *memory = mmap(NULL, space, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return error_set(error, STATUS_NO_MEMORY, "%s: the system refused %zu bytes", what, space);
    /* Huge pages need their own alignment: give back what lies before and behind. */
    size_t before = (HUGE_PAGE - (uintptr_t)memory % HUGE_PAGE) % HUGE_PAGE;
    if (before) (void)munmap(memory, before);
    if (before < HUGE_PAGE) (void)munmap(memory + before + size, HUGE_PAGE - before);
    *arena = (struct arena){.base = memory + before, .size = size};
    (void)madvise(arena->base, size, MADV_HUGEPAGE);
    return STATUS_OK;
}

static void arena_close(struct arena *arena) {
    if (arena->base) (void)munmap(arena->base, arena->size);
}

static void take_panel(struct arena *arena, const struct tensor *tensor, struct panel *panel) {
    *panel = panel_of(tensor);
    panel->data = take(arena, panel_bytes(panel), 1);
}

static void take_vector(struct arena *arena, const struct tensor *tensor, const float **vector) {
    if (tensor->data) *vector = take(arena, tensor->cols, sizeof(float));
}

static struct panel *layer_panel(struct layer *layer, enum phase_kind kind, int which) {
    switch (kind) {
    case PHASE_ATTN_IN: return which == WEIGHT_Q ? &layer->q : which == WEIGHT_K ? &layer->k : &layer->v;
    case PHASE_ATTN_OUT: return &layer->o;
    case PHASE_MLP_IN: return which == WEIGHT_GATE ? &layer->gate : &layer->up;
    case PHASE_MLP_OUT: return &layer->down;
    default: CHECK(!"a phase with weights"); return NULL;
    }
}

/* Addresses (or, without memory, the size) of everything that is packed. */
static void lay_out_weights(struct cpu *cpu, struct arena *arena) {
    const struct program *p = cpu->program;
    for (uint32_t i = 0; i < p->n_phases; i++) {
        const struct phase *phase = &p->phases[i];
        struct layer *layer = phase->layer < p->n_layers ? &cpu->layers[phase->layer] : NULL;
        switch (phase->kind) {
        case PHASE_EMBED:
            if (!p->tied_head) cpu->embedding = phase->weight[WEIGHT_ONLY];
            break;
        case PHASE_HEAD:
            take_vector(arena, &phase->norm, &cpu->head_norm);
            take_panel(arena, &phase->weight[WEIGHT_ONLY], &cpu->head);
            break;
        case PHASE_ATTN: break;
        default:
            for (int w = 0; w < 3; w++)
                if (phase->weight[w].data) take_panel(arena, &phase->weight[w], layer_panel(layer, phase->kind, w));
            if (phase->kind == PHASE_MLP_IN) take_vector(arena, &phase->norm, &layer->mlp_norm);
            if (phase->kind != PHASE_ATTN_IN) break;
            take_vector(arena, &phase->norm, &layer->attention_norm);
            take_vector(arena, &phase->q_norm, &layer->q_norm);
            take_vector(arena, &phase->k_norm, &layer->k_norm);
            for (int w = 0; w < 3; w++) take_vector(arena, &phase->bias[w], &layer->bias[w]);
        }
    }
}

/* What kinds of activations the matrices reading them take. */
struct needs {
    bool blocks, values;
};

static void need(struct needs *needs, const struct panel *panel) {
    if (panel_is_float(panel->type))
        needs->values = true;
    else
        needs->blocks = true;
}

static void take_act(struct arena *arena, struct act *act, struct needs needs, uint32_t rows, uint32_t cols, uint32_t planes) {
    *act = (struct act){
        .planes = planes, .row_bytes = cols / PANEL_K * act_block_bytes(planes), .value_stride = (cols + PANEL_K - 1) / PANEL_K * PANEL_K};
    if (needs.blocks) act->blocks = take(arena, rows, act->row_bytes);
    if (needs.values) act->values = take(arena, rows * act->value_stride, sizeof(float));
}

static void lay_out_scratch(struct cpu *cpu, struct arena *arena, uint32_t n_workers) {
    const struct program *p = cpu->program;
    const struct backend_limits *limits = &cpu->limits;
    const uint32_t planes = act_planes(limits), rows = limits->max_rows, n_q = p->n_heads * p->head_dim, n_kv = p->n_kv_heads * p->head_dim;
    struct needs h = {0}, a = {0}, g = {0}, z = {0};
    for (uint32_t i = 0; i < p->n_layers; i++) {
        const struct layer *layer = &cpu->layers[i];
        const struct panel *from_h[] = {&layer->q, &layer->k, &layer->v, &layer->gate, &layer->up};
        for (size_t j = 0; j < sizeof from_h / sizeof *from_h; j++) need(&h, from_h[j]);
        need(&a, &layer->o);
        need(&g, &layer->down);
    }
    need(&z, &cpu->head);
    if (p->head_dim % PANEL_K) a.values = true; /* quantised row by row, later */
    cpu->x = take(arena, (size_t)rows * p->n_embd, sizeof(float));
    cpu->rope = take(arena, (size_t)rows * 2 * p->rope_dims, sizeof(float));
    cpu->qkv_stride = n_q + 2 * (size_t)n_kv;
    cpu->qkv = take(arena, rows * cpu->qkv_stride, sizeof(float));
    take_act(arena, &cpu->h, h, rows, p->n_embd, planes);
    take_act(arena, &cpu->a, a, rows, n_q, planes);
    take_act(arena, &cpu->g, g, rows, p->n_ff, planes);
    take_act(arena, &cpu->z, z, HEAD_ROWS, p->n_embd, planes);
    cpu->logits_stride = (size_t)cpu->head.n_strips * STRIP_ROWS;
    cpu->logits = take(arena, HEAD_ROWS * cpu->logits_stride, sizeof(float));
    cpu->head_rows = take(arena, limits->max_samples, sizeof(uint32_t));
    cpu->sample_row = take(arena, limits->max_samples, sizeof(uint32_t));
    cpu->plain = take(arena, limits->max_samples, sizeof(bool));
    cpu->turns = take(arena, (size_t)limits->ring_rows * p->rope_dims, sizeof(double));
    cpu->partials = take(arena, PARTIAL_FLOATS, sizeof(float));
    size_t chunks = (limits->max_samples + HEAD_ROWS - 1) / HEAD_ROWS;
    size_t stages = 1 + (size_t)STAGES_A_LAYER * p->n_layers + 3 * chunks;
    cpu->stages = take(arena, stages, sizeof(struct stage));
    cpu->stage_phases = take(arena, stages, sizeof(uint8_t));
    cpu->first_tile = take(arena, (size_t)limits->max_sequences + 1, sizeof(uint32_t));
    cpu->row_sequence = take(arena, rows, sizeof(uint32_t));
    const uint32_t dims = cpu->kv.dims;
    size_t widest = p->n_embd > n_q ? p->n_embd : n_q;
    for (uint32_t w = 0; w < n_workers; w++) {
        struct worker_scratch own = {0};
        take_act(arena, &own.act, h, PRIVATE_ROWS, p->n_embd, planes);
        own.row = take(arena, widest + PANEL_K, sizeof(float));
        own.head = take(arena, dims, sizeof(float));
        own.queries = take(arena, (size_t)ATTEND_QUERIES * dims, sizeof(float));
        own.states = take(arena, (size_t)ATTEND_QUERIES * (dims + 2), sizeof(float));
        own.attend = take(arena, attend_scratch_bytes(&cpu->kv), 1);
        own.kept = take(arena, (size_t)ATTEND_QUERIES * KEPT_SLOTS, sizeof(float));
        own.kept_maxima = take(arena, (size_t)ATTEND_QUERIES * KEPT_SPLITS, sizeof(float));
        own.keys = take(arena, (size_t)BLOCK_TOKENS * dims, sizeof(float));
        own.raw = take(arena, KIVI_RAW_BLOCKS * cpu->kv.raw_bytes, 1);
        own.sums = take(arena, (size_t)16 * dims, sizeof(float));
        own.moments = take(arena, (size_t)(limits->ring_rows + 1) * dims, sizeof(float));
        own.logits = take(arena, p->n_vocab, sizeof(float));
        own.sampler = take(arena, sampler_scratch_floats(p->n_vocab), sizeof(float));
        own.best = take(arena, HEAD_ROWS, sizeof(float));
        own.best_token = take(arena, HEAD_ROWS, sizeof(uint32_t));
        (void)take(arena, 4096, 1); /* no two workers on one page */
        if (cpu->workers_scratch) cpu->workers_scratch[w] = own;
    }
}

/* Of the pool, what does not depend on how many blocks it has. */
static void lay_out_residual(struct cpu *cpu, struct arena *arena) {
    const struct program *p = cpu->program;
    struct raw_places *raw = &cpu->raw;
    if (cpu->kv.raw_bytes == 0) return;
    cpu->raw_shape = kv_shape_of(p, KV_F16);
    cpu->raw_shared = raw_shared_needed(&cpu->limits);
    raw->n_places = (uint32_t)raw_places_needed(p, &cpu->limits);
    raw->n_tables = cpu->limits.n_tables ? cpu->limits.n_tables : cpu->limits.max_sequences;
    raw->n_lanes = program_lanes(p);
    raw->places = take(arena, (size_t)raw->n_places + 1, sizeof *raw->places);
    raw->held = take(arena, (size_t)raw->n_tables * raw->n_lanes * KIVI_RAW_BLOCKS, sizeof *raw->held);
    cpu->raw_used = take(arena, p->n_kv_heads, sizeof *cpu->raw_used);
    cpu->raw_pool = take(arena, raw->n_places + (size_t)p->n_kv_heads * cpu->raw_shared, cpu->kv.raw_bytes);
}

static void lay_out_pool(struct cpu *cpu, struct arena *arena) {
    size_t slots = (size_t)cpu->limits.n_blocks * BLOCK_TOKENS;
    cpu->pool = take(arena, cpu->limits.n_blocks, cpu->kv.bytes);
    cpu->positions = take(arena, slots, sizeof *cpu->positions);
    if (cpu->kv.raw_bytes == 0 || cpu->limits.accumulators) cpu->accumulated = take(arena, slots, sizeof *cpu->accumulated);
    if (cpu->kv.raw_bytes == 0) return;
    cpu->raw.n_blocks = cpu->limits.n_blocks;
    cpu->raw.of = take(arena, cpu->limits.n_blocks, sizeof *cpu->raw.of);
    cpu->closed = take(arena, cpu->limits.n_blocks, sizeof *cpu->closed);
    lay_out_residual(cpu, arena);
}

static void lay_out_rings(struct cpu *cpu, struct arena *arena) {
    const struct program *p = cpu->program;
    const struct backend_limits *limits = &cpu->limits;
    cpu->narrow_rings = limits->kv_dtype != KV_F32;
    size_t rows = (size_t)limits->n_rings * p->n_layers * limits->ring_rows, sinks = (size_t)limits->n_rings * program_lanes(p) * limits->sink_slots;
    cpu->ring_queries = take(arena, rows * p->n_heads * p->head_dim, cpu->narrow_rings ? sizeof(uint16_t) : sizeof(float));
    cpu->ring_sinks = take(arena, sinks * p->head_dim, sizeof(float));
}

static uint32_t count_of_workers(const struct backend_limits *limits) {
    uint32_t n = limits->threads ? limits->threads : workers_default_count();
    return n < WORKERS_MAX ? n : WORKERS_MAX;
}

/* A backend without memory: enough to count with. */
static void begin(struct cpu *cpu, const struct program *program, const struct backend_limits *limits) {
    *cpu = (struct cpu){.program = program, .limits = *limits, .kv = kv_shape_of(program, limits->kv_dtype)};
    cpu->layers = check_calloc(program->n_layers, sizeof *cpu->layers);
}

static uint32_t cpu_memory_plan(const struct program *program, const struct backend_limits *limits, struct memory_line *lines, uint32_t max) {
    struct cpu cpu;
    struct arena weights = {0}, residual = {0}, rings = {0}, scratch = {0};
    begin(&cpu, program, limits);
    lay_out_weights(&cpu, &weights);
    lay_out_scratch(&cpu, &scratch, count_of_workers(limits));
    lay_out_rings(&cpu, &rings);
    lay_out_residual(&cpu, &residual);
    free(cpu.layers);
    uint32_t n = 0;
    if (n < max) lines[n++] = (struct memory_line){.what = "weights", .count = 1, .bytes_each = weights.used};
    if (n < max) lines[n++] = (struct memory_line){.what = "KV residual", .count = 1, .bytes_each = residual.used};
    if (n < max) lines[n++] = (struct memory_line){.what = "scratch", .count = 1, .bytes_each = scratch.used};
    if (n < max) lines[n++] = (struct memory_line){.what = "query rings", .count = 1, .bytes_each = rings.used};
    if (n < max) lines[n++] = (struct memory_line){.what = "ranking", .count = 1, .bytes_each = ranking_bytes(program, limits->rank_slots, 1)};
    return n;
}

/* The matrix being packed by all workers: each begins with the strips that are its own in every step, and so touches that memory first. */
struct packing {
    const struct panel *panel;
    const struct tensor *tensor;
};

static void stage_pack(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    (void)stage, (void)worker;
    const struct packing *packing = context;
    panel_pack(packing->panel, packing->tensor, first, end);
}

/* Whole pages within the tensor; those at its ends belong to its neighbours too. */
static void drop_pages(const struct tensor *tensor) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uintptr_t first = ((uintptr_t)tensor->data + page - 1) / page * page, end = ((uintptr_t)tensor->data + tensor_bytes(tensor)) / page * page;
    if (first < end) (void)madvise((void *)first, end - first, MADV_DONTNEED);
}

static void pack(struct cpu *cpu, const struct panel *panel, const struct tensor *tensor) {
    if (!tensor->data) return;
    struct packing packing = {panel, tensor};
    workers_run(cpu->workers, &packing, &(struct stage){.run = stage_pack, .n_units = panel->n_strips}, 1);
    if (cpu->limits.drop_source_pages) drop_pages(tensor);
}

static void fill_vector(const float *vector, const struct tensor *tensor) {
    if (tensor->data) tensor_row_f32(tensor, 0, (float *)(uintptr_t)vector); /* ours, const to all others */
}

static void pack_phase(struct cpu *cpu, const struct phase *phase) {
    struct layer *layer = phase->layer < cpu->program->n_layers ? &cpu->layers[phase->layer] : NULL;
    switch (phase->kind) {
    case PHASE_EMBED:
    case PHASE_ATTN: break;
    case PHASE_HEAD:
        fill_vector(cpu->head_norm, &phase->norm);
        pack(cpu, &cpu->head, &phase->weight[WEIGHT_ONLY]);
        break;
    default:
        for (int w = 0; w < 3; w++)
            if (phase->weight[w].data) pack(cpu, layer_panel(layer, phase->kind, w), &phase->weight[w]);
        if (phase->kind == PHASE_MLP_IN) fill_vector(layer->mlp_norm, &phase->norm);
        if (phase->kind != PHASE_ATTN_IN) break;
        fill_vector(layer->attention_norm, &phase->norm);
        fill_vector(layer->q_norm, &phase->q_norm);
        fill_vector(layer->k_norm, &phase->k_norm);
        for (int w = 0; w < 3; w++) fill_vector(layer->bias[w], &phase->bias[w]);
    }
}

static void cpu_close(struct backend *backend) {
    struct cpu *cpu = (struct cpu *)backend;
    if (!cpu) return;
    workers_stop(cpu->workers);
    ranking_free(cpu->backend.ranking);
    arena_close(&cpu->weights);
    arena_close(&cpu->pool_arena);
    arena_close(&cpu->rings);
    arena_close(&cpu->scratch);
    free(cpu->workers_scratch);
    free(cpu->layers);
    free(cpu);
}

static enum status open_memory(struct cpu *cpu, uint32_t n_workers, struct error *error) {
    struct arena count = {0};
    lay_out_weights(cpu, &count);
    enum status status = arena_open(&cpu->weights, count.used, "weights", error);
    if (status) return status;
    lay_out_weights(cpu, &cpu->weights);

    count = (struct arena){0};
    lay_out_pool(cpu, &count);
    status = arena_open(&cpu->pool_arena, count.used, "KV pool", error);
    if (status) return status;
    lay_out_pool(cpu, &cpu->pool_arena);
    if (cpu->kv.raw_bytes) raw_init(&cpu->raw);

    count = (struct arena){0};
    lay_out_rings(cpu, &count);
    status = arena_open(&cpu->rings, count.used, "query rings", error);
    if (status) return status;
    lay_out_rings(cpu, &cpu->rings);

    count = (struct arena){0};
    lay_out_scratch(cpu, &count, n_workers);
    status = arena_open(&cpu->scratch, count.used, "scratch", error);
    if (status) return status;
    cpu->workers_scratch = check_calloc(n_workers, sizeof *cpu->workers_scratch);
    lay_out_scratch(cpu, &cpu->scratch, n_workers);
    return STATUS_OK;
}

extern const struct backend_ops backend_cpu;

static enum status cpu_supports(const struct program *program, const struct backend_limits *limits, struct error *error) {
    const struct cpu_isa *isa;
    enum status status = backend_needs_data(&backend_cpu, program, error);
    return status ? status : choose_isa(limits->instruction_set, &isa, error);
}

static enum status cpu_prepare(const struct program *program, const struct backend_limits *limits, struct backend **backend, struct error *error) {
    const struct cpu_isa *isa;
    enum status status = backend_needs_data(&backend_cpu, program, error);
    if (!status) status = choose_isa(limits->instruction_set, &isa, error);
    if (status) return status;
    uint32_t n_workers = count_of_workers(limits);
    struct cpu *cpu = check_calloc(1, sizeof *cpu);
    begin(cpu, program, limits);
    cpu->stages_before = 1;
    cpu->backend.ops = &backend_cpu;
    cpu->backend.joins_blocks = cpu->kv.raw_bytes > 0;
    cpu->isa = isa;
    status = open_memory(cpu, n_workers, error);
    if (!status) status = workers_start(n_workers, &cpu->workers, error);
    if (status) {
        cpu_close(&cpu->backend);
        return status;
    }
    (void)snprintf(cpu->description, sizeof cpu->description, "cpu %s, %u thread%s%s", isa->name, n_workers, n_workers == 1 ? "" : "s",
                   act_planes(limits) == 2 ? ", 16-bit activations" : "");
    if (limits->rank_slots > 0) {
        cpu->backend.rank_places = 1;
        cpu->backend.ranking = ranking_new(program, limits->rank_slots, cpu->backend.rank_places);
    }
    for (uint32_t i = 0; i < program->n_phases; i++) {
        pack_phase(cpu, &program->phases[i]);
        if (limits->progress) limits->progress(limits->progress_context, (double)(i + 1) / program->n_phases);
    }
    *backend = &cpu->backend;
    return STATUS_OK;
}

static const char *cpu_describe(const struct backend *backend) { return ((const struct cpu *)backend)->description; }

/* The answer is the highest logit's token and nothing else. */
static bool is_plain(const struct sample *sample) {
    const struct sampling *s = sample->sampling;
    return s->temperature == 0 && s->n_top < 0 && sample->target < 0 && s->n_bias == 0 && !(sample->ban && s->n_banned) &&
           s->repetition_penalty == 1 && s->presence_penalty == 0 && s->frequency_penalty == 0;
}

/* Rows to sequences, query tiles of each, distinct rows of the head. */
static void index_batch(struct cpu *cpu, const struct batch *batch) {
    const struct backend_limits *limits = &cpu->limits;
    CHECK(batch->n_rows >= 1 && batch->n_rows <= limits->max_rows && batch->n_sequences <= limits->max_sequences &&
          batch->n_samples <= limits->max_samples);
    uint32_t group = cpu->program->n_heads / cpu->program->n_kv_heads, row = 0;
    cpu->first_tile[0] = 0;
    for (uint32_t s = 0; s < batch->n_sequences; s++) {
        CHECK(batch->sequences[s].first_row == row && batch->sequences[s].n_rows <= batch->n_rows - row);
        for (uint32_t i = 0; i < batch->sequences[s].n_rows; i++) cpu->row_sequence[row++] = s;
        uint32_t tiles = (batch->sequences[s].n_rows * group + ATTEND_QUERIES - 1) / ATTEND_QUERIES;
        cpu->first_tile[s + 1] = cpu->first_tile[s] + tiles;
    }
    CHECK(row == batch->n_rows);
    cpu->n_head_rows = 0;
    for (uint32_t i = 0; i < batch->n_samples; i++) {
        uint32_t sampled = batch->samples[i].row;
        CHECK(sampled < batch->n_rows && (i == 0 || sampled >= batch->samples[i - 1].row));
        if (i == 0 || sampled != batch->samples[i - 1].row) {
            cpu->plain[cpu->n_head_rows] = !cpu->tap;
            cpu->head_rows[cpu->n_head_rows++] = sampled;
        }
        cpu->sample_row[i] = cpu->n_head_rows - 1;
        if (!is_plain(&batch->samples[i])) cpu->plain[cpu->n_head_rows - 1] = false;
    }
}

/* The engine's thread is worker 0, so nothing is gained by coming back earlier: sync runs the step. */
static enum status cpu_submit(struct backend *backend, const struct batch *batch, struct error *error) {
    (void)error;
    struct cpu *cpu = (struct cpu *)backend;
    CHECK(!cpu->batch);
    index_batch(cpu, batch);
    cpu->batch = batch;
    return STATUS_OK;
}

static enum status cpu_sync(struct backend *backend, struct sample_result *results, struct error *error) {
    (void)error;
    struct cpu *cpu = (struct cpu *)backend;
    CHECK(cpu->batch);
    cpu->results = results;
    uint64_t begun = cpu->limits.wait_ns ? clock_now_ns() : 0;
    residual_begin(cpu);
    cpu_step(cpu);
    residual_end(cpu);
    if (cpu->limits.wait_ns) *cpu->limits.wait_ns += clock_now_ns() - begun;
    cpu->batch = NULL;
    cpu->tap = NULL;
    return STATUS_OK;
}

static void cpu_tap_logits(struct backend *backend, float *destination) { ((struct cpu *)backend)->tap = destination; }

/* The embedding stays in the file, unless it is the head. */
static uint64_t cpu_weight_bytes(const struct program *program, const struct backend_limits *limits) {
    struct cpu cpu;
    struct arena weights = {0};
    begin(&cpu, program, limits);
    lay_out_weights(&cpu, &weights);
    free(cpu.layers);
    return weights.used;
}

static double cpu_copy_bandwidth(const struct backend_limits *limits) { return backend_host_copy_bandwidth(count_of_workers(limits)); }

const struct backend_ops backend_cpu = {
    .name = "cpu",
    .memory = backend_host_memory,
    .block_bytes = cpu_block_bytes,
    .memory_plan = cpu_memory_plan,
    .supports = cpu_supports,
    .prepare = cpu_prepare,
    .close = cpu_close,
    .describe = cpu_describe,
    .submit = cpu_submit,
    .sync = cpu_sync,
    .copy_blocks = cpu_copy_blocks,
    .resumes = cpu_resumes,
    .compact = cpu_compact,
    .read_f32 = cpu_read_f32,
    .score = cpu_score,
    .rank = host_rank,
    .cut = host_cut,
    .keep = host_keep,
    .keep_units = host_keep_units,
    .settle = host_settle,
    .read_positions = cpu_read_positions,
    .shift_sinks = cpu_shift_sinks,
    .tap_logits = cpu_tap_logits,
    .weight_bytes = cpu_weight_bytes,
    .copy_bandwidth = cpu_copy_bandwidth,
};
