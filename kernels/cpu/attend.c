/* The attention phase: rotated keys and values appended to the pool, then query tiles against their lanes.
 *
 * A unit is one KV head of one sequence and a tile of at most ATTEND_QUERIES of its query vectors (rows x heads of the group, row by row).
 * Where every sequence is a single tile, its unit appends its own rows first; else appending is a phase of its own, with a barrier behind it. */
#include <math.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

/* Norm (if any), rotation, scale of one head's vector; `out` [dims] is padded with zeros. */
static void prepare_head(const struct cpu *cpu, uint32_t row, const float *x, const float *weight, float scale, float *out) {
    const struct program *p = cpu->program;
    const uint32_t d = p->head_dim, pairs = p->rope_dims / 2;
    const float *rope = cpu->rope + (size_t)row * p->rope_dims;
    if (weight) cpu->isa->norm(x, weight, d, p->norm_epsilon, out);
    else memcpy(out, x, d * sizeof *out);
    bool halves = p->rope_pairs == ROPE_PAIRS_HALVES;
    for (uint32_t i = 0; i < pairs; i++) {
        float *a = &out[halves ? i : 2 * i], *b = &out[halves ? i + pairs : 2 * i + 1];
        float c = rope[2 * i], s = rope[2 * i + 1], x0 = *a, x1 = *b;
        *a = x0 * c - x1 * s;
        *b = x0 * s + x1 * c;
    }
    for (uint32_t i = 0; i < d; i++) out[i] *= scale;
    for (uint32_t i = d; i < cpu->kv.dims; i++) out[i] = 0;
}

static const uint32_t *table_of(const struct cpu *cpu, const struct batch_sequence *sequence, uint32_t lane) {
    return cpu->batch->block_ids + sequence->lane_first[lane];
}

/* Row i of the sequence into KV head `head` of the layer. */
static void append_row(struct cpu *cpu, uint32_t layer, const struct batch_sequence *sequence, uint32_t i, uint32_t head, float *scratch) {
    const struct program *p = cpu->program;
    const uint32_t lane = layer * p->n_kv_heads + head, row = sequence->first_row + i, slot = sequence->lane_tokens[lane] + i;
    const float *k = cpu->qkv + row * cpu->qkv_stride + (size_t)(p->n_heads + head) * p->head_dim;
    const float *v = k + (size_t)p->n_kv_heads * p->head_dim;
    const uint32_t block = table_of(cpu, sequence, lane)[slot / BLOCK_TOKENS];
    prepare_head(cpu, row, k, cpu->layers[layer].k_norm, 1, scratch);
    cpu->isa->append(&cpu->kv, cpu->pool + block * cpu->kv.bytes, slot % BLOCK_TOKENS, scratch, v);
    cpu->positions[(size_t)block * BLOCK_TOKENS + slot % BLOCK_TOKENS] = cpu->batch->positions[row];
}

static void append_all(struct cpu *cpu, uint32_t layer, uint32_t worker) {
    const uint32_t n_kv = cpu->program->n_kv_heads;
    struct share share = share_of(cpu, cpu->batch->n_rows * n_kv, false, worker);
    for (uint32_t unit; share_next(cpu, &share, &unit);) {
        uint32_t row = unit / n_kv;
        const struct batch_sequence *sequence = &cpu->batch->sequences[cpu->row_sequence[row]];
        append_row(cpu, layer, sequence, row - sequence->first_row, unit % n_kv, cpu->workers_scratch[worker].queries);
    }
    workers_barrier(cpu->workers);
}

/* Output of query q of the tile, normalised, to where ATTN_OUT reads it. */
static void put_output(struct cpu *cpu, uint32_t row, uint32_t head, const float *state, float *scratch) {
    const uint32_t d = cpu->program->head_dim;
    float inverse = 1.0f / state[1];
    float *to = cpu->a.values ? cpu->a.values + row * cpu->a.value_stride + (size_t)head * d : scratch;
    for (uint32_t i = 0; i < d; i++) to[i] = state[2 + i] * inverse;
    if (cpu->a.blocks && d % PANEL_K == 0) cpu->isa->quantize(to, d / PANEL_K, cpu->a.blocks + row * cpu->a.block_stride + (size_t)head * (d / PANEL_K));
}

static void attend_tile(struct cpu *cpu, uint32_t layer, uint32_t index, uint32_t tile, uint32_t head, uint32_t worker) {
    const struct program *p = cpu->program;
    const struct batch_sequence *sequence = &cpu->batch->sequences[index];
    struct worker_scratch *own = &cpu->workers_scratch[worker];
    const uint32_t lane = layer * p->n_kv_heads + head, group = p->n_heads / p->n_kv_heads;
    if (cpu->fused_append)
        for (uint32_t i = 0; i < sequence->n_rows; i++) append_row(cpu, layer, sequence, i, head, own->queries);

    struct attend attend = {.shape = &cpu->kv, .pool = cpu->pool, .blocks = table_of(cpu, sequence, lane), .scratch = own->attend};
    const uint32_t first = tile * ATTEND_QUERIES, all = sequence->n_rows * group, stride = cpu->kv.dims + 2;
    attend.n_queries = all - first < ATTEND_QUERIES ? all - first : ATTEND_QUERIES;
    for (uint32_t q = 0; q < attend.n_queries; q++) {
        uint32_t i = (first + q) / group, query_head = head * group + (first + q) % group, row = sequence->first_row + i;
        float *query = own->queries + (size_t)q * cpu->kv.dims;
        prepare_head(cpu, row, cpu->qkv + row * cpu->qkv_stride + (size_t)query_head * p->head_dim, cpu->layers[layer].q_norm, p->attention_scale, query);
        attend.query[q] = query;
        attend.visible[q] = sequence->lane_tokens[lane] + i + 1;
        float *state = own->states + (size_t)q * stride;
        memset(state, 0, stride * sizeof *state);
        state[0] = -INFINITY;
    }
    uint32_t n_splits = (attend.visible[attend.n_queries - 1] + SPLIT_SLOTS - 1) / SPLIT_SLOTS;
    cpu->isa->attend(&attend, 0, n_splits, own->states, stride);
    for (uint32_t q = 0; q < attend.n_queries; q++) {
        uint32_t i = (first + q) / group, query_head = head * group + (first + q) % group;
        put_output(cpu, sequence->first_row + i, query_head, own->states + (size_t)q * stride, own->row);
    }
}

void phase_attention(struct cpu *cpu, uint32_t layer, uint32_t worker) {
    const uint32_t n_kv = cpu->program->n_kv_heads, n_sequences = cpu->batch->n_sequences;
    if (!cpu->fused_append) append_all(cpu, layer, worker);
    const uint32_t n_units = cpu->first_tile[n_sequences] * n_kv;
    struct share share = share_of(cpu, n_units, n_units >= 8, worker);
    uint32_t sequence = 0;
    for (uint32_t unit; share_next(cpu, &share, &unit);) {
        /* Units of a worker ascend. */
        while (unit >= cpu->first_tile[sequence + 1] * n_kv) sequence++;
        uint32_t within = unit - cpu->first_tile[sequence] * n_kv;
        attend_tile(cpu, layer, sequence, within / n_kv, within % n_kv, worker);
    }
}
