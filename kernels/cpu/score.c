/* Scores of cached slots (kernels/score.h), lanes shared among the workers; the loops are the instruction sets' (scores.inc.h). Owns nothing: scratch is the workers'.
 *
 * Sums over a window's attention use the attention kernels, a tile of window rows at a time. A lane's numbers depend on the lane and the window alone. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "base/check.h"
#include "kernels/cpu/cpu.h"

struct scoring {
    struct cpu *cpu;
    const struct score_request *request;
    float *scores;
};

void keep_weights(struct worker_scratch *own, struct attend *attend) {
    uint32_t n_splits = (attend->visible[attend->n_queries - 1] + SPLIT_SLOTS - 1) / SPLIT_SLOTS;
    if (n_splits > KEPT_SPLITS || n_splits * SPLIT_SLOTS * attend->n_queries > KEPT_SLOTS * ATTEND_QUERIES) return;
    attend->kept = own->kept;
    attend->kept_stride = (size_t)n_splits * SPLIT_SLOTS;
    attend->kept_maxima = own->kept_maxima;
}

struct kept_split weights_of(const struct cpu *cpu, struct worker_scratch *own, const struct attend *attend, uint32_t split, const float *states,
                             size_t stride, float factor[ATTEND_QUERIES]) {
    const uint32_t slot = split * SPLIT_SLOTS, left = attend->visible[attend->n_queries - 1] - slot;
    struct kept_split kept = {
        .factor = factor, .visible = attend->visible, .n = attend->n_queries, .step = 1, .n_slots = left < SPLIT_SLOTS ? left : SPLIT_SLOTS};
    if (attend->kept) {
        kept.weights = attend->kept + slot;
        kept.stride = attend->kept_stride;
        cpu->isa->factors(attend, attend->kept_maxima + (size_t)split * ATTEND_QUERIES, states, stride, factor);
    } else {
        struct attend again = *attend;
        again.kept = own->kept;
        again.kept_stride = kept.stride = SPLIT_SLOTS;
        again.kept_maxima = own->kept_maxima;
        cpu->isa->weights(&again, split);
        kept.weights = own->kept;
        cpu->isa->factors(attend, own->kept_maxima, states, stride, factor);
    }
    return kept;
}

/* Query `head` (within the group) of window row i, as the ring has it, times `scale`; `q` [dims] is padded with zeros. */
static void ring_query(const struct cpu *cpu, const struct score_request *request, uint32_t lane, uint32_t i, uint32_t head, float scale, float *q) {
    const struct program *p = cpu->program;
    const uint32_t group = p->n_heads / p->n_kv_heads, layer = lane / p->n_kv_heads, d = p->head_dim;
    const uint32_t position = (uint32_t)request->last_position - (request->n_window - 1 - i);
    size_t row = ((size_t)(request->ring - 1) * p->n_layers + layer) * cpu->limits.ring_rows + position % cpu->limits.ring_rows;
    size_t at = (row * p->n_heads + lane % p->n_kv_heads * group + head) * d;
    if (cpu->narrow_rings)
        cpu->isa->widen_f16((const uint16_t *)cpu->ring_queries + at, d, scale, q);
    else
        for (uint32_t j = 0; j < d; j++) q[j] = ((const float *)cpu->ring_queries)[at + j] * scale;
    for (uint32_t j = d; j < cpu->kv.dims; j++) q[j] = 0;
}

static int32_t position_of(const struct cpu *cpu, const uint32_t *blocks, uint32_t slot) {
    return cpu->positions[(size_t)blocks[slot / BLOCK_TOKENS] * BLOCK_TOKENS + slot % BLOCK_TOKENS];
}

/* The next tile of the window's queries, row by row and heads of the group within; *next counts them. Rows whose every slot is gone are passed over. Returns how many,
 * the head of query q in heads[q]. */
static uint32_t window_tile(const struct cpu *cpu, const struct score_request *request, uint32_t lane, struct worker_scratch *own, uint32_t *next,
                            uint32_t *visible, struct attend *attend, uint32_t heads[ATTEND_QUERIES]) {
    const uint32_t group = cpu->program->n_heads / cpu->program->n_kv_heads, n_slots = request->lane_tokens[lane], all = request->n_window * group;
    uint32_t n = 0, row = *next / group, head = *next % group;
    for (; *next < all && n < ATTEND_QUERIES; ++*next) {
        int32_t position = request->last_position - (int32_t)(request->n_window - 1 - row);
        while (*visible < n_slots && position_of(cpu, attend->blocks, *visible) <= position) ++*visible;
        if (*visible > 0) {
            float *query = own->queries + (size_t)n * cpu->kv.dims;
            ring_query(cpu, request, lane, row, head, cpu->program->attention_scale, query);
            if (kv_transforms(&cpu->kv)) cpu->isa->hadamard(query, cpu->kv.dims);
            heads[n] = head;
            attend->query[n] = query;
            attend->visible[n++] = *visible;
        }
        if (++head == group) row++, head = 0;
    }
    return attend->n_queries = n;
}

/* What the tile's rows give to the slots they see: of each head its rows in order, which stand `group` apart. */
static void fold_tile(const struct cpu *cpu, const struct score_request *request, struct worker_scratch *own, const struct attend *attend,
                      const uint32_t heads[ATTEND_QUERIES], uint32_t n_slots, float *scores) {
    const uint32_t group = cpu->program->n_heads / cpu->program->n_kv_heads, visible = attend->visible[attend->n_queries - 1];
    for (uint32_t slot = 0; slot < visible; slot += SPLIT_SLOTS) {
        float factor[ATTEND_QUERIES];
        const struct kept_split all = weights_of(cpu, own, attend, slot / SPLIT_SLOTS, own->states, cpu->kv.dims + 2, factor);
        for (uint32_t q = 0; q < group && q < attend->n_queries; q++) {
            struct kept_split head = all;
            head.weights += q * head.stride;
            head.factor += q;
            head.visible += q;
            head.n = (attend->n_queries - q + group - 1) / group;
            head.step = group;
            cpu->isa->fold(request->kind, &head, scores + (size_t)heads[q] * n_slots + slot);
        }
    }
}

static void score_window(struct cpu *cpu, const struct score_request *request, uint32_t lane, struct worker_scratch *own, float *scores) {
    const uint32_t group = cpu->program->n_heads / cpu->program->n_kv_heads, n_slots = request->lane_tokens[lane];
    const size_t stride = cpu->kv.dims + 2;
    uint32_t next = 0, visible = 0, heads[ATTEND_QUERIES];
    memset(scores, 0, (size_t)group * n_slots * sizeof *scores);
    for (;;) {
        struct attend attend = {.shape = &cpu->kv,
                                .pool = cpu->pool,
                                .blocks = request->block_ids + request->lane_first[lane],
                                .residual = residual_now(cpu, request->block_ids + request->lane_first[lane], n_slots, request->last_position),
                                .scratch = own->attend,
                                .sums_only = true};
        if (window_tile(cpu, request, lane, own, &next, &visible, &attend, heads) == 0) return;
        for (uint32_t q = 0; q < attend.n_queries; q++) {
            own->states[q * stride] = -INFINITY;
            own->states[q * stride + 1] = 0;
        }
        keep_weights(own, &attend);
        cpu->isa->attend(&attend, 0, (visible + SPLIT_SLOTS - 1) / SPLIT_SLOTS, own->states, stride);
        fold_tile(cpu, request, own, &attend, heads, n_slots, scores);
    }
}

/* Mean of e^(i angle j) over j = 1..n; 0 over none. */
static void mean_turn(double angle, uint32_t n, double *cosine, double *sine) {
    *cosine = *sine = 0;
    if (n == 0) return;
    angle = remainder(angle, 2 * M_PI);
    double half = sin(angle / 2), size = fabs(half) < 1e-12 ? 1 : sin(n * angle / 2) / (n * half); /* the geometric series */
    *cosine = size * cos(angle * (n + 1.0) / 2);
    *sine = size * sin(angle * (n + 1.0) / 2);
}

/* From each row's own rotation to the mean one over the positions ahead: the same for every lane. */
static void plan_turns(struct cpu *cpu, const struct score_request *request) {
    const struct program *p = cpu->program;
    for (uint32_t i = 0; i < p->rope_dims / 2; i++) {
        double mean_cosine, mean_sine;
        mean_turn(p->rope_frequency[i], request->ahead, &mean_cosine, &mean_sine);
        for (uint32_t r = 0; r < request->n_window; r++) {
            double angle = p->rope_frequency[i] * (request->n_window - 1 - r), c = cos(angle), s = sin(angle);
            double *turn = cpu->turns + ((size_t)r * p->rope_dims + 2 * (size_t)i);
            turn[0] = c * mean_cosine - s * mean_sine;
            turn[1] = c * mean_sine + s * mean_cosine;
        }
    }
}

static void turn_query(const struct program *p, const double *turns, float *x) {
    const uint32_t half = p->rope_dims / 2;
    const bool halves = p->rope_pairs == ROPE_PAIRS_HALVES;
    for (uint32_t i = 0; i < half; i++) {
        float *first = &x[halves ? i : 2 * i], *second = &x[halves ? i + half : 2 * i + 1];
        double a = (double)*first, b = (double)*second, c = turns[2 * (size_t)i], s = turns[2 * (size_t)i + 1];
        *first = (float)(a * c - b * s);
        *second = (float)(a * s + b * c);
    }
}

static void score_expected(struct cpu *cpu, const struct score_request *request, uint32_t lane, struct worker_scratch *own,
                           const struct lane_view *view, float *scores) {
    const struct program *p = cpu->program;
    const uint32_t dims = cpu->kv.dims, n = request->n_window;
    float *mean = own->moments;
    for (uint32_t head = 0; head < p->n_heads / p->n_kv_heads; head++, scores += view->n_slots) {
        memset(mean, 0, dims * sizeof *mean);
        for (uint32_t r = 0; r < n; r++) {
            float *row = own->moments + (size_t)(1 + r) * dims;
            ring_query(cpu, request, lane, r, head, 1, row);
            turn_query(p, cpu->turns + (size_t)r * p->rope_dims, row);
            for (uint32_t i = 0; i < dims; i++) mean[i] += row[i];
        }
        for (uint32_t i = 0; i < dims; i++) mean[i] /= (float)(n > 0 ? n : 1);
        for (uint32_t r = 0; r < n; r++)
            for (uint32_t i = 0; i < dims; i++) own->moments[(size_t)(1 + r) * dims + i] -= mean[i];
        for (uint32_t r = 0; r <= n && kv_transforms(&cpu->kv); r++) cpu->isa->hadamard(own->moments + (size_t)r * dims, dims);
        cpu->isa->expected(view, own->moments, n, p->attention_scale, scores);
    }
}

static void score_accumulated(const struct cpu *cpu, const struct lane_view *view, float *scores) {
    for (uint32_t slot = 0; slot < view->n_slots; slot++) {
        uint64_t sum = atomic_load_explicit(&cpu->accumulated[(size_t)view->blocks[slot / BLOCK_TOKENS] * BLOCK_TOKENS + slot % BLOCK_TOKENS],
                                            memory_order_relaxed);
        scores[slot] = (float)((double)sum / SCORE_ACCUMULATED_ONE);
    }
}

static void score_one(struct cpu *cpu, const struct score_request *request, uint32_t lane, struct worker_scratch *own, float *scores) {
    const struct lane_view view = {
        .shape = &cpu->kv,
        .pool = cpu->pool,
        .blocks = request->block_ids + request->lane_first[lane],
        .residual = residual_now(cpu, request->block_ids + request->lane_first[lane], request->lane_tokens[lane], request->last_position),
        .n_slots = request->lane_tokens[lane],
        .keys = own->keys,
        .sums = own->sums,
        .attend = own->attend};
    if (view.n_slots == 0) return;
    switch (request->kind) {
    case SCORE_ATTENTION:
    case SCORE_SQUARES:
    case SCORE_PERSISTENCE: score_window(cpu, request, lane, own, scores); break;
    case SCORE_EXPECTED: score_expected(cpu, request, lane, own, &view, scores); break;
    case SCORE_KEYDIFF: cpu->isa->keydiff(&view, scores); break;
    case SCORE_ACCUMULATED: score_accumulated(cpu, &view, scores); break;
    case SCORE_VALUE_NORM: cpu->isa->value_norms(&view, scores); break;
    case SCORE_KINDS: CHECK(!"a score kind");
    }
}

static void stage_score(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    (void)stage;
    const struct scoring *scoring = context;
    struct cpu *cpu = scoring->cpu;
    const struct score_request *request = scoring->request;
    for (uint32_t lane = request->first_lane + first; lane < request->first_lane + end; lane++)
        score_one(cpu, request, lane, &cpu->workers_scratch[worker], scoring->scores + request->offset[lane]);
}

void cpu_score(struct backend *backend, const struct score_request *request, float *scores) {
    struct cpu *cpu = (struct cpu *)backend;
    CHECK(request->kind != SCORE_ACCUMULATED || cpu->limits.accumulators);
    CHECK(request->n_lanes <= program_lanes(cpu->program) && request->first_lane <= program_lanes(cpu->program) - request->n_lanes);
    if (score_per_query_head(request->kind)) {
        CHECK(request->ring >= 1 && request->ring <= cpu->limits.n_rings && request->n_window <= cpu->limits.ring_rows);
        CHECK((int64_t)request->last_position + 1 >= (int64_t)request->n_window);
    }
    if (request->kind == SCORE_EXPECTED) plan_turns(cpu, request);
    struct scoring scoring = {cpu, request, scores};
    workers_run(cpu->workers, &scoring, &(struct stage){.run = stage_score, .n_units = request->n_lanes}, 1);
}
