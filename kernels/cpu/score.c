/* Scores of cached slots. Those that are sums over a window's attention run on the attention kernels, a tile of window rows at a time, lanes shared among
 * the workers; the others, rarer, widen the lane and ask the oracle (kernels/score.c). A lane's numbers depend on nothing but the lane and the window. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/half.h"
#include "kernels/cpu/cpu.h"

struct scoring {
    struct cpu *cpu;
    const struct score_request *request;
    float *scores;
};

/* Query `head` (within the group) of window row i, as the ring has it. */
static void ring_query(const struct cpu *cpu, const struct score_request *request, uint32_t lane, uint32_t i, uint32_t head, float *q) {
    const struct program *p = cpu->program;
    const uint32_t group = p->n_heads / p->n_kv_heads, layer = lane / p->n_kv_heads, d = p->head_dim;
    const uint32_t position = (uint32_t)request->last_position - (request->n_window - 1 - i);
    size_t row = ((size_t)(request->ring - 1) * p->n_layers + layer) * cpu->limits.ring_rows + position % cpu->limits.ring_rows;
    size_t at = (row * p->n_heads + lane % p->n_kv_heads * group + head) * d;
    for (uint32_t j = 0; j < d; j++)
        q[j] = cpu->narrow_rings ? float_from_f16(((const uint16_t *)cpu->ring_queries)[at + j]) : ((const float *)cpu->ring_queries)[at + j];
}

static int32_t position_of(const struct cpu *cpu, const uint32_t *blocks, uint32_t slot) {
    return cpu->positions[(size_t)blocks[slot / BLOCK_TOKENS] * BLOCK_TOKENS + slot % BLOCK_TOKENS];
}

/* Adds what n rows give to the slots of one split: rows in order, so that sums are the same however rows are tiled. */
static void fold(enum score_kind kind, const float *weights, const uint32_t *visible, uint32_t n, uint32_t count, float *total) {
    for (uint32_t q = 0; q < n; q++, weights += SPLIT_SLOTS) {
        float least = 1.0f / (float)visible[q];
        for (uint32_t i = 0; i < count; i++) {
            float p = weights[i];
            total[i] += kind == SCORE_ATTENTION ? p : kind == SCORE_SQUARES ? p * p : (float)(p > 0 && p >= least);
        }
    }
}

static void score_window(struct cpu *cpu, const struct score_request *request, uint32_t lane, struct worker_scratch *own, float *scores) {
    const struct program *p = cpu->program;
    const uint32_t group = p->n_heads / p->n_kv_heads, n_slots = request->lane_tokens[lane], stride = cpu->kv.dims + 2;
    struct attend attend = {
        .shape = &cpu->kv, .pool = cpu->pool, .blocks = request->block_ids + request->lane_first[lane], .scratch = own->attend, .sums_only = true};
    memset(scores, 0, (size_t)group * n_slots * sizeof *scores);
    for (uint32_t head = 0; head < group; head++, scores += n_slots) {
        uint32_t visible = 0;
        for (uint32_t first = 0; first < request->n_window;) {
            attend.n_queries = 0;
            for (; first < request->n_window && attend.n_queries < ATTEND_QUERIES; first++) {
                int32_t position = request->last_position - (int32_t)(request->n_window - 1 - first);
                while (visible < n_slots && position_of(cpu, attend.blocks, visible) <= position) visible++;
                if (visible == 0) continue; /* everything it saw is gone */
                const uint32_t q = attend.n_queries++;
                float *query = own->queries + (size_t)q * cpu->kv.dims, *state = own->states + (size_t)q * stride;
                memset(query, 0, cpu->kv.dims * sizeof *query);
                ring_query(cpu, request, lane, first, head, query);
                for (uint32_t i = 0; i < p->head_dim; i++) query[i] *= p->attention_scale;
                attend.query[q] = query;
                attend.visible[q] = visible;
                state[0] = -INFINITY;
                state[1] = 0;
            }
            if (attend.n_queries == 0) continue;
            uint32_t n_splits = (visible + SPLIT_SLOTS - 1) / SPLIT_SLOTS;
            cpu->isa->attend(&attend, 0, n_splits, own->states, stride);
            for (uint32_t split = 0; split < n_splits; split++) {
                uint32_t slot = split * SPLIT_SLOTS, count = visible - slot < SPLIT_SLOTS ? visible - slot : SPLIT_SLOTS;
                const float *weights = cpu->isa->weights(&attend, split, own->states, stride);
                fold(request->kind, weights, attend.visible, attend.n_queries, count, scores + slot);
            }
        }
    }
}

static void score_plain(struct cpu *cpu, const struct score_request *request, uint32_t lane, float *scores) {
    const struct program *p = cpu->program;
    const uint32_t n = request->lane_tokens[lane], d = p->head_dim, group = p->n_heads / p->n_kv_heads;
    const uint32_t *blocks = request->block_ids + request->lane_first[lane];
    bool rows = score_per_query_head(request->kind);
    float *k = check_calloc((size_t)n * d + 1, sizeof *k), *v = check_calloc((size_t)n * d + 1, sizeof *v);
    float *q = check_calloc((rows ? (size_t)request->n_window * group * d : 0) + 1, sizeof *q);
    int32_t *positions = check_calloc((size_t)n + 1, sizeof *positions);
    uint64_t *accumulated = check_calloc((size_t)n + 1, sizeof *accumulated);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t block = blocks[i / BLOCK_TOKENS], slot = i % BLOCK_TOKENS;
        cpu_read_f32(&cpu->backend, block, slot, k + (size_t)i * d, v + (size_t)i * d, &positions[i]);
        if (cpu->limits.accumulators) accumulated[i] = cpu->accumulated[(size_t)block * BLOCK_TOKENS + slot];
    }
    for (uint32_t i = 0; rows && i < request->n_window; i++)
        for (uint32_t head = 0; head < group; head++) ring_query(cpu, request, lane, i, head, q + ((size_t)i * group + head) * d);
    const struct score_lane plain = {.n_slots = n,
                                     .k = k,
                                     .v = v,
                                     .positions = positions,
                                     .accumulated = accumulated,
                                     .q = q,
                                     .n_window = request->n_window,
                                     .last_position = request->last_position,
                                     .ahead = request->ahead};
    score_lane(p, request->kind, &plain, scores);
    free(k);
    free(v);
    free(q);
    free(positions);
    free(accumulated);
}

static void stage_score(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    (void)stage;
    const struct scoring *scoring = context;
    struct cpu *cpu = scoring->cpu;
    const struct score_request *request = scoring->request;
    for (uint32_t lane = request->first_lane + first; lane < request->first_lane + end; lane++) {
        float *scores = scoring->scores + request->offset[lane];
        if (request->kind <= SCORE_PERSISTENCE)
            score_window(cpu, request, lane, &cpu->workers_scratch[worker], scores);
        else
            score_plain(cpu, request, lane, scores);
    }
}

void cpu_score(struct backend *backend, const struct score_request *request, float *scores) {
    struct cpu *cpu = (struct cpu *)backend;
    CHECK(request->kind != SCORE_ACCUMULATED || cpu->limits.accumulators);
    CHECK(request->n_lanes <= program_lanes(cpu->program) && request->first_lane <= program_lanes(cpu->program) - request->n_lanes);
    if (score_per_query_head(request->kind)) {
        CHECK(request->ring >= 1 && request->ring <= cpu->limits.n_rings && request->n_window <= cpu->limits.ring_rows);
        CHECK((int64_t)request->last_position + 1 >= (int64_t)request->n_window);
    }
    struct scoring scoring = {cpu, request, scores};
    workers_run(cpu->workers, &scoring, &(struct stage){.run = stage_score, .n_units = request->n_lanes}, 1);
}
