/* The attention phase: rotated keys and values appended to the pool, then query tiles against their lanes.
 *
 * A unit is one KV head of one sequence and a tile of at most ATTEND_QUERIES of its query vectors (rows x heads of the group, row by row).
 * Where every sequence is a single tile, its unit appends its own rows first; else appending is a phase of its own, with a barrier behind it. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "base/half.h"
#include "kernels/cpu/cpu.h"

/* Norm (if any) and rotation of one head's vector; `out` [dims] is padded with zeros. */
static void prepare_head(const struct cpu *cpu, uint32_t row, const float *x, const float *weight, struct worker_scratch *own, float *out) {
    const struct program *p = cpu->program;
    const uint32_t d = p->head_dim, rotated = p->rope_dims;
    const float *cosine = cpu->rope + (size_t)row * 2 * rotated;
    if (weight) {
        cpu->isa->norm(x, weight, d, p->norm_epsilon, own->head);
        x = own->head;
    }
    cpu->isa->rotate(x, rotated, p->rope_pairs == ROPE_PAIRS_HALVES, cosine, cosine + rotated, out);
    for (uint32_t i = rotated; i < d; i++) out[i] = x[i];
    for (uint32_t i = d; i < cpu->kv.dims; i++) out[i] = 0;
}

static const uint32_t *table_of(const struct cpu *cpu, const struct batch_sequence *sequence, uint32_t lane) {
    return cpu->batch->block_ids + sequence->lane_first[lane];
}

/* Row i of the sequence into KV head `head` of the layer. */
static void append_row(struct cpu *cpu, uint32_t layer, const struct batch_sequence *sequence, uint32_t i, uint32_t head,
                       struct worker_scratch *own) {
    const struct program *p = cpu->program;
    const uint32_t lane = layer * p->n_kv_heads + head, row = sequence->first_row + i, slot = sequence->lane_tokens[lane] + i;
    const float *k = cpu->qkv + row * cpu->qkv_stride + (size_t)(p->n_heads + head) * p->head_dim;
    const float *v = k + (size_t)p->n_kv_heads * p->head_dim;
    const uint32_t block = table_of(cpu, sequence, lane)[slot / BLOCK_TOKENS];
    prepare_head(cpu, row, k, cpu->layers[layer].k_norm, own, own->queries);
    if (cpu->kv.raw_bytes)
        cpu->isa->append(&cpu->raw_shape, raw_block(cpu, block), slot % BLOCK_TOKENS, own->queries, v);
    else
        cpu->isa->append(&cpu->kv, cpu->pool + block * cpu->kv.bytes, slot % BLOCK_TOKENS, own->queries, v);
    cpu->positions[(size_t)block * BLOCK_TOKENS + slot % BLOCK_TOKENS] = cpu->batch->positions[row];
    if (cpu->limits.accumulators) cpu->accumulated[(size_t)block * BLOCK_TOKENS + slot % BLOCK_TOKENS] = 0;
}

/* The rotated query of a row that is among the last of its sequence, for scores to come. */
static void keep_query(struct cpu *cpu, uint32_t layer, const struct batch_sequence *sequence, uint32_t row, uint32_t query_head, const float *q) {
    const struct program *p = cpu->program;
    if (sequence->ring == 0 || sequence->first_row + sequence->n_rows - row > cpu->limits.ring_rows) return;
    size_t at =
        ((size_t)(sequence->ring - 1) * p->n_layers + layer) * cpu->limits.ring_rows + (uint32_t)cpu->batch->positions[row] % cpu->limits.ring_rows;
    at = (at * p->n_heads + query_head) * p->head_dim;
    if (cpu->narrow_rings)
        cpu->isa->narrow_f16(q, p->head_dim, (uint16_t *)cpu->ring_queries + at);
    else
        memcpy((float *)cpu->ring_queries + at, q, p->head_dim * sizeof *q);
}

/* Each row's attention onto the slots it saw. Sums are whole numbers: order and company do not matter. */
static void accumulate(struct cpu *cpu, const struct attend *attend, uint32_t n_splits, const float *states, size_t stride,
                       struct worker_scratch *own) {
    for (uint32_t split = 0; split < n_splits; split++) {
        uint64_t sums[SPLIT_SLOTS] = {0};
        float factor[ATTEND_QUERIES];
        const struct kept_split kept = weights_of(cpu, own, attend, split, states, stride, factor);
        cpu->isa->accumulate(&kept, sums);
        for (uint32_t i = 0; i < kept.n_slots; i++) {
            size_t at = (size_t)attend->blocks[split * (SPLIT_SLOTS / BLOCK_TOKENS) + i / BLOCK_TOKENS] * BLOCK_TOKENS + i % BLOCK_TOKENS;
            if (sums[i]) atomic_fetch_add_explicit(&cpu->accumulated[at], sums[i], memory_order_relaxed);
        }
    }
}

void stage_append(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    struct cpu *cpu = context;
    const uint32_t n_kv = cpu->program->n_kv_heads;
    for (uint32_t unit = first; unit < end; unit++) {
        uint32_t row = unit / n_kv;
        const struct batch_sequence *sequence = &cpu->batch->sequences[cpu->row_sequence[row]];
        append_row(cpu, stage->index, sequence, row - sequence->first_row, unit % n_kv, &cpu->workers_scratch[worker]);
    }
}

/* Of one KV head of a sequence, what this step filled. */
static void close_rows(const struct cpu *cpu, uint32_t layer, const struct batch_sequence *sequence, uint32_t head) {
    const uint32_t lane = layer * cpu->program->n_kv_heads + head, first = sequence->lane_tokens[lane];
    close_lane(cpu, table_of(cpu, sequence, lane), first, first + sequence->n_rows);
}

void stage_close(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    (void)worker;
    const struct cpu *cpu = context;
    const uint32_t n_kv = cpu->program->n_kv_heads;
    for (uint32_t unit = first; unit < end; unit++) close_rows(cpu, stage->index, &cpu->batch->sequences[unit / n_kv], unit % n_kv);
}

/* Output of query q of the tile, normalised, to where ATTN_OUT reads it. */
static void put_output(struct cpu *cpu, uint32_t row, uint32_t head, const float *state, float *scratch) {
    const uint32_t d = cpu->program->head_dim;
    float inverse = 1.0f / state[1];
    float *to = cpu->a.values ? cpu->a.values + row * cpu->a.value_stride + (size_t)head * d : scratch;
    for (uint32_t i = 0; i < d; i++) to[i] = state[2 + i] * inverse;
    if (cpu->a.blocks && d % PANEL_K == 0)
        cpu->isa->quantize(to, d / PANEL_K, cpu->a.planes, act_block_at(&cpu->a, row, (size_t)head * (d / PANEL_K)));
}

/* A tile of query vectors of one KV head. */
struct tile {
    const struct batch_sequence *sequence;
    uint32_t lane, head; /* KV head */
    uint32_t first, n;   /* query vectors of the sequence: row by row, heads of the group within */
    uint32_t n_slots;    /* that its last row sees */
};

static struct tile tile_of(const struct cpu *cpu, uint32_t layer, uint32_t index) {
    const struct program *p = cpu->program;
    const uint32_t n_kv = p->n_kv_heads, group = p->n_heads / n_kv;
    uint32_t low = 0, high = cpu->batch->n_sequences; /* first_tile[low] * n_kv <= index < first_tile[high] * n_kv */
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (cpu->first_tile[middle] * n_kv <= index)
            low = middle;
        else
            high = middle;
    }
    while (cpu->first_tile[low + 1] == cpu->first_tile[low]) low++; /* sequences without rows */
    index -= cpu->first_tile[low] * n_kv;
    struct tile tile = {.sequence = &cpu->batch->sequences[low], .head = index % n_kv, .first = index / n_kv * ATTEND_QUERIES};
    tile.lane = layer * n_kv + tile.head;
    uint32_t all = tile.sequence->n_rows * group;
    tile.n = all - tile.first < ATTEND_QUERIES ? all - tile.first : ATTEND_QUERIES;
    tile.n_slots = tile.sequence->lane_tokens[tile.lane] + (tile.first + tile.n - 1) / group + 1;
    return tile;
}

static uint32_t splits_of(uint32_t n_slots) { return (n_slots + SPLIT_SLOTS - 1) / SPLIT_SLOTS; }

/* Row and query head of vector q of the tile. */
static uint32_t row_of(const struct cpu *cpu, const struct tile *tile, uint32_t q, uint32_t *query_head) {
    const uint32_t group = cpu->program->n_heads / cpu->program->n_kv_heads;
    *query_head = tile->head * group + (tile->first + q) % group;
    return tile->sequence->first_row + (tile->first + q) / group;
}

/* keep: for the ring too. Several units may load the same queries, one of them keeps. */
static void load_queries(struct cpu *cpu, uint32_t layer, const struct tile *tile, bool keep, struct worker_scratch *own, struct attend *attend) {
    const struct program *p = cpu->program;
    *attend = (struct attend){
        .shape = &cpu->kv, .pool = cpu->pool, .blocks = table_of(cpu, tile->sequence, tile->lane), .scratch = own->attend, .n_queries = tile->n};
    for (uint32_t q = 0; q < tile->n; q++) {
        uint32_t query_head, row = row_of(cpu, tile, q, &query_head);
        float *query = own->queries + (size_t)q * cpu->kv.dims;
        prepare_head(cpu, row, cpu->qkv + row * cpu->qkv_stride + (size_t)query_head * p->head_dim, cpu->layers[layer].q_norm, own, query);
        if (keep) keep_query(cpu, layer, tile->sequence, row, query_head, query);
        for (uint32_t d = 0; d < p->head_dim; d++) query[d] *= p->attention_scale;
        if (kv_transforms(&cpu->kv)) cpu->isa->hadamard(query, cpu->kv.dims);
        attend->query[q] = query;
        attend->visible[q] = tile->sequence->lane_tokens[tile->lane] + (row - tile->sequence->first_row) + 1;
    }
}

/* KIVI: rows of a tile may differ in which blocks they read as codes. Queries from `first` on that do not, as a call of their own: `part`. Returns their end. */
static uint32_t part_of(const struct cpu *cpu, const struct tile *tile, const struct attend *attend, uint32_t first, struct attend *part) {
    uint32_t end = attend->n_queries, head;
    *part = *attend;
    if (cpu->kv.raw_bytes) {
        const uint32_t row = row_of(cpu, tile, first, &head);
        part->residual = residual_of(cpu, attend->blocks, attend->visible[first] - 1, cpu->batch->positions[row]);
        for (end = first + 1; end < attend->n_queries; end++)
            if (count_codes(cpu, attend->blocks, attend->visible[end] - 1, cpu->batch->positions[row_of(cpu, tile, end, &head)]) !=
                part->residual.n_codes)
                break;
    }
    part->n_queries = end - first;
    memmove(part->query, part->query + first, part->n_queries * sizeof *part->query);
    memmove(part->visible, part->visible + first, part->n_queries * sizeof *part->visible);
    return end;
}

static void clear_states(float *states, uint32_t n, size_t stride) {
    memset(states, 0, n * stride * sizeof *states);
    for (uint32_t q = 0; q < n; q++) states[q * stride] = -INFINITY;
}

static uint32_t splits_seen(const struct attend *attend) { return splits_of(attend->visible[attend->n_queries - 1]); }

static void put_outputs(struct cpu *cpu, const struct tile *tile, const float *states, size_t stride, struct worker_scratch *own) {
    for (uint32_t q = 0; q < tile->n; q++) {
        uint32_t query_head, row = row_of(cpu, tile, q, &query_head);
        put_output(cpu, row, query_head, states + q * stride, own->row);
    }
}

/* Where the state of query q in a split of a tile lies, while splits are units. */
static float *partial_of(const struct cpu *cpu, uint32_t tile, uint32_t split, uint32_t q) {
    return cpu->partials + (((size_t)tile * cpu->n_splits + split) * ATTEND_QUERIES + q) * (cpu->kv.dims + 2);
}

/* Behind a unit's lane the kernels fetch the first keys of the next one's. */
static void look_ahead(const struct cpu *cpu, const struct tile *next, struct attend *attend) {
    attend->next_blocks = table_of(cpu, next->sequence, next->lane);
    attend->n_next_blocks = (next->n_slots + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
}

void stage_attend(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    struct cpu *cpu = context;
    struct worker_scratch *own = &cpu->workers_scratch[worker];
    const uint32_t layer = stage->index, pieces = cpu->n_splits ? cpu->n_splits : 1;
    const size_t stride = cpu->kv.dims + 2;
    for (uint32_t unit = first; unit < end; unit++) {
        struct tile tile = tile_of(cpu, layer, unit / pieces);
        uint32_t split = unit % pieces, n_splits = splits_of(tile.n_slots);
        struct attend attend, part;
        if (cpu->fused_append) {
            for (uint32_t i = 0; i < tile.sequence->n_rows; i++) append_row(cpu, layer, tile.sequence, i, tile.head, own);
            if (cpu->kv.raw_bytes) close_rows(cpu, layer, tile.sequence, tile.head);
        }
        if (cpu->n_splits) {
            if (split >= n_splits) continue;
            load_queries(cpu, layer, &tile, split == 0, own, &attend);
            float *states = partial_of(cpu, unit / pieces, split, 0);
            clear_states(states, tile.n, stride);
            for (uint32_t q = 0, part_end; q < tile.n; q = part_end) {
                part_end = part_of(cpu, &tile, &attend, q, &part);
                cpu->isa->attend(&part, split, split + 1, states + q * stride, stride);
            }
        } else {
            load_queries(cpu, layer, &tile, true, own, &attend);
            if (unit + 1 < end) {
                struct tile next = tile_of(cpu, layer, unit + 1);
                look_ahead(cpu, &next, &attend);
            }
            clear_states(own->states, tile.n, stride);
            for (uint32_t q = 0, part_end; q < tile.n; q = part_end) {
                part_end = part_of(cpu, &tile, &attend, q, &part);
                if (tile.sequence->accumulate) keep_weights(own, &part);
                cpu->isa->attend(&part, 0, splits_seen(&part), own->states + q * stride, stride);
                if (tile.sequence->accumulate) accumulate(cpu, &part, splits_seen(&part), own->states + q * stride, stride, own);
            }
            put_outputs(cpu, &tile, own->states, stride, own);
        }
    }
}

/* Splits that were units, in ascending order: the same folding that one worker does on its way. */
void stage_merge(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    struct cpu *cpu = context;
    struct worker_scratch *own = &cpu->workers_scratch[worker];
    const size_t stride = cpu->kv.dims + 2;
    for (uint32_t unit = first; unit < end; unit++) {
        struct tile tile = tile_of(cpu, stage->index, unit);
        struct attend attend;
        load_queries(cpu, stage->index, &tile, false, own, &attend);
        clear_states(own->states, tile.n, stride);
        for (uint32_t q = 0; q < tile.n; q++)
            for (uint32_t split = 0; split < splits_of(attend.visible[q]); split++)
                cpu->isa->merge(own->states + q * stride, partial_of(cpu, unit, split, q), cpu->kv.dims);
        for (uint32_t q = 0, part_end; tile.sequence->accumulate && q < tile.n; q = part_end) {
            struct attend part;
            part_end = part_of(cpu, &tile, &attend, q, &part);
            accumulate(cpu, &part, splits_seen(&part), own->states + q * stride, stride, own);
        }
        put_outputs(cpu, &tile, own->states, stride, own);
    }
}

uint32_t plan_attention(struct cpu *cpu) {
    const struct batch *batch = cpu->batch;
    const uint32_t n_kv = cpu->program->n_kv_heads, n_tiles = cpu->first_tile[batch->n_sequences] * n_kv;
    uint32_t most = 0;
    for (uint32_t s = 0; s < batch->n_sequences; s++)
        for (uint32_t lane = 0; lane < program_lanes(cpu->program); lane++) {
            uint32_t n_splits = splits_of(batch->sequences[s].lane_tokens[lane] + batch->sequences[s].n_rows);
            if (n_splits > most) most = n_splits;
        }
    /* Few tiles over long lanes would leave workers idle: then the splits of a tile are units. */
    cpu->n_splits = 0;
    if (most > 1 && n_tiles < 4 * workers_count(cpu->workers) && (size_t)n_tiles * most * ATTEND_QUERIES * (cpu->kv.dims + 2) <= PARTIAL_FLOATS)
        cpu->n_splits = most;
    cpu->fused_append = cpu->n_splits == 0;
    for (uint32_t s = 0; s < batch->n_sequences; s++)
        if (cpu->first_tile[s + 1] - cpu->first_tile[s] > 1) cpu->fused_append = false;
    return n_tiles * (cpu->n_splits ? cpu->n_splits : 1);
}
