/* See oracle.h. Used by the thread that runs the test; slow on purpose. */
#include "tests/support/oracle.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/block.h"
#include "base/check.h"
#include "base/half.h"

struct lane {
    uint32_t n_slots, room;
    double *k, *v; /* [n_slots][head_dim] */
    double *accumulated;
    int32_t *positions;
};

struct oracle {
    const struct program *program;
    enum kv_dtype dtype;
    int32_t position;
    struct lane *lanes;
    double *x, *h, *q, *k, *v, *a, *gate, *up;
    double *queries; /* [position][n_layers][n_heads * head_dim] */
};

struct oracle *oracle_new(const struct program *program, enum kv_dtype dtype) {
    struct oracle *oracle = check_calloc(1, sizeof *oracle);
    oracle->program = program;
    oracle->dtype = dtype;
    oracle->lanes = check_calloc(program_lanes(program), sizeof *oracle->lanes);
    size_t n_q = (size_t)program->n_heads * program->head_dim, n_kv = (size_t)program->n_kv_heads * program->head_dim;
    oracle->x = check_calloc(program->n_embd, sizeof(double));
    oracle->h = check_calloc(program->n_embd, sizeof(double));
    oracle->q = check_calloc(n_q, sizeof(double));
    oracle->a = check_calloc(n_q, sizeof(double));
    oracle->k = check_calloc(n_kv, sizeof(double));
    oracle->v = check_calloc(n_kv, sizeof(double));
    oracle->gate = check_calloc(program->n_ff, sizeof(double));
    oracle->up = check_calloc(program->n_ff, sizeof(double));
    return oracle;
}

void oracle_free(struct oracle *oracle) {
    for (uint32_t lane = 0; lane < program_lanes(oracle->program); lane++) {
        free(oracle->lanes[lane].k);
        free(oracle->lanes[lane].v);
        free(oracle->lanes[lane].accumulated);
        free(oracle->lanes[lane].positions);
    }
    free(oracle->lanes);
    free(oracle->x);
    free(oracle->h);
    free(oracle->q);
    free(oracle->a);
    free(oracle->k);
    free(oracle->v);
    free(oracle->gate);
    free(oracle->up);
    free(oracle->queries);
    free(oracle);
}

/* y = W x (+ bias), added to y if `add`. */
static void multiply(const struct tensor *w, const struct tensor *bias, const double *x, double *y, bool add) {
    float *row = check_calloc(w->cols, sizeof *row), *b = check_calloc(w->rows, sizeof *b);
    if (bias && bias->data) tensor_row_f32(bias, 0, b);
    for (uint32_t r = 0; r < w->rows; r++) {
        tensor_row_f32(w, r, row);
        double sum = (double)b[r];
        for (uint32_t c = 0; c < w->cols; c++) sum += (double)row[c] * x[c];
        y[r] = add ? y[r] + sum : sum;
    }
    free(row);
    free(b);
}

static void normalize(const struct program *program, const struct tensor *norm, const double *x, double *y) {
    float *weight = check_calloc(norm->cols, sizeof *weight);
    tensor_row_f32(norm, 0, weight);
    double square = 0;
    for (uint32_t i = 0; i < norm->cols; i++) square += x[i] * x[i];
    double root = sqrt(square / norm->cols + (double)program->norm_epsilon);
    for (uint32_t i = 0; i < norm->cols; i++) y[i] = x[i] / root * (double)weight[i];
    free(weight);
}

static void turn(const struct program *program, double *head, int32_t position) {
    uint32_t pairs = program->rope_dims / 2;
    for (uint32_t i = 0; i < pairs; i++) {
        double *re = program->rope_pairs == ROPE_PAIRS_HALVES ? &head[i] : &head[2 * i];
        double *im = program->rope_pairs == ROPE_PAIRS_HALVES ? &head[i + pairs] : &head[2 * i + 1];
        double angle = program->rope_frequency[i] * position, length = hypot(*re, *im) * (double)program->rope_magnitude;
        double direction = atan2(*im, *re) + angle;
        *re = length * cos(direction);
        *im = length * sin(direction);
    }
}

/* What the cache keeps of a vector. */
static void round_kv(enum kv_dtype dtype, const double *x, uint32_t n, double *out) {
    float largest = 0;
    for (uint32_t i = 0; i < n; i++) largest = fmaxf(largest, fabsf((float)x[i]));
    float scale = largest / 127;
    for (uint32_t i = 0; i < n; i++) {
        float value = (float)x[i];
        if (dtype == KV_F16 || dtype == KV_KIVI4 || dtype == KV_KIVI2) value = float_from_f16(f16_from_float(value));
        if (dtype == KV_BF16) value = float_from_bf16(bf16_from_float(value));
        if (dtype == KV_Q8) value = scale > 0 ? scale * nearbyintf(value / scale) : 0;
        out[i] = (double)value;
    }
}

/* n numbers, `stride` apart, as 4 or 2 bits with a scale and a minimum of f16 say them. */
static void quantize(enum kv_dtype dtype, const double *x, size_t stride, uint32_t n, double *out) {
    double levels = dtype == KV_KIVI4 ? 15 : 3, low = x[0], high = x[0];
    for (uint32_t i = 0; i < n; i++) {
        low = fmin(low, x[i * stride]);
        high = fmax(high, x[i * stride]);
    }
    double scale = (double)float_from_f16(f16_from_float((float)(high - low) / (float)levels));
    for (uint32_t i = 0; i < n; i++) out[i * stride] = low + (scale > 0 ? fmin(nearbyint((x[i * stride] - low) / scale), levels) * scale : 0);
}

/* What the row at oracle->position sees of the lane, of which `before` slots are older than it. KIVI: blocks that are full and whose newest token lies 64 or more back are codes: keys by channel over
 * the block, values by 32 channels of a slot. */
static void see(const struct oracle *oracle, const struct lane *lane, uint32_t before, double *k, double *v) {
    uint32_t d = oracle->program->head_dim;
    memcpy(k, lane->k, (size_t)lane->n_slots * d * sizeof *k);
    memcpy(v, lane->v, (size_t)lane->n_slots * d * sizeof *v);
    if (oracle->dtype != KV_KIVI4 && oracle->dtype != KV_KIVI2) return;
    for (uint32_t first = 0; first + BLOCK_TOKENS <= before; first += BLOCK_TOKENS) {
        if (lane->positions[first + BLOCK_TOKENS - 1] + 1 + 64 > oracle->position) continue;
        for (uint32_t c = 0; c < d; c++) quantize(oracle->dtype, lane->k + (size_t)first * d + c, d, BLOCK_TOKENS, k + (size_t)first * d + c);
        for (uint32_t s = first; s < first + BLOCK_TOKENS; s++)
            for (uint32_t c = 0; c < d; c += 32)
                quantize(oracle->dtype, lane->v + (size_t)s * d + c, 1, d - c < 32 ? d - c : 32, v + (size_t)s * d + c);
    }
}

static void append(struct oracle *oracle, struct lane *lane, const double *k, const double *v) {
    uint32_t d = oracle->program->head_dim;
    if (lane->n_slots == lane->room) {
        lane->room = 2 * lane->room + 16;
        lane->k = check_realloc(lane->k, (size_t)lane->room * d, sizeof(double));
        lane->v = check_realloc(lane->v, (size_t)lane->room * d, sizeof(double));
        lane->accumulated = check_realloc(lane->accumulated, lane->room, sizeof(double));
        lane->positions = check_realloc(lane->positions, lane->room, sizeof *lane->positions);
    }
    round_kv(oracle->dtype, k, d, lane->k + (size_t)lane->n_slots * d);
    round_kv(oracle->dtype, v, d, lane->v + (size_t)lane->n_slots * d);
    lane->positions[lane->n_slots] = oracle->position;
    lane->accumulated[lane->n_slots++] = 0;
}

static void attend(const struct oracle *oracle, struct lane *lane, const double *q, double *out) {
    const struct program *program = oracle->program;
    uint32_t d = program->head_dim;
    double *k = check_calloc((size_t)lane->n_slots * d, sizeof *k), *v = check_calloc((size_t)lane->n_slots * d, sizeof *v);
    see(oracle, lane, lane->n_slots - 1, k, v);
    double *p = check_calloc(lane->n_slots, sizeof *p), largest = -INFINITY, total = 0;
    for (uint32_t s = 0; s < lane->n_slots; s++) {
        for (uint32_t i = 0; i < d; i++) p[s] += q[i] * k[(size_t)s * d + i];
        p[s] *= (double)program->attention_scale;
        largest = fmax(largest, p[s]);
    }
    for (uint32_t s = 0; s < lane->n_slots; s++) total += p[s] = exp(p[s] - largest);
    for (uint32_t s = 0; s < lane->n_slots; s++) lane->accumulated[s] += p[s] / total;
    for (uint32_t i = 0; i < d; i++) {
        out[i] = 0;
        for (uint32_t s = 0; s < lane->n_slots; s++) out[i] += p[s] / total * v[(size_t)s * d + i];
    }
    free(p);
    free(k);
    free(v);
}

static void attention(struct oracle *oracle, uint32_t layer) {
    const struct program *program = oracle->program;
    uint32_t d = program->head_dim, group = program->n_heads / program->n_kv_heads;
    for (uint32_t kv = 0; kv < program->n_kv_heads; kv++) {
        struct lane *lane = &oracle->lanes[layer * program->n_kv_heads + kv];
        turn(program, oracle->k + (size_t)kv * d, oracle->position);
        append(oracle, lane, oracle->k + (size_t)kv * d, oracle->v + (size_t)kv * d);
        for (uint32_t head = kv * group; head < (kv + 1) * group; head++) {
            turn(program, oracle->q + (size_t)head * d, oracle->position);
            attend(oracle, lane, oracle->q + (size_t)head * d, oracle->a + (size_t)head * d);
        }
    }
}

static size_t queries_a_row(const struct program *program) { return (size_t)program->n_layers * program->n_heads * program->head_dim; }

const double *oracle_queries(const struct oracle *oracle, int32_t position, uint32_t layer) {
    return oracle->queries + (size_t)position * queries_a_row(oracle->program) + (size_t)layer * oracle->program->n_heads * oracle->program->head_dim;
}

static void keep_queries(struct oracle *oracle, uint32_t layer) {
    memcpy((double *)(uintptr_t)oracle_queries(oracle, oracle->position, layer), oracle->q,
           (size_t)oracle->program->n_heads * oracle->program->head_dim * sizeof(double));
}

void oracle_seen(const struct oracle *oracle, uint32_t lane, double *k, double *v) {
    see(oracle, &oracle->lanes[lane], oracle->lanes[lane].n_slots, k, v);
}

double oracle_accumulated(const struct oracle *oracle, uint32_t lane, uint32_t slot) { return oracle->lanes[lane].accumulated[slot]; }

static void attention_in(struct oracle *oracle, const struct phase *phase) {
    const struct program *program = oracle->program;
    normalize(program, &phase->norm, oracle->x, oracle->h);
    multiply(&phase->weight[WEIGHT_Q], &phase->bias[WEIGHT_Q], oracle->h, oracle->q, false);
    multiply(&phase->weight[WEIGHT_K], &phase->bias[WEIGHT_K], oracle->h, oracle->k, false);
    multiply(&phase->weight[WEIGHT_V], &phase->bias[WEIGHT_V], oracle->h, oracle->v, false);
    for (uint32_t head = 0; phase->q_norm.data && head < program->n_heads; head++)
        normalize(program, &phase->q_norm, oracle->q + (size_t)head * program->head_dim, oracle->q + (size_t)head * program->head_dim);
    for (uint32_t head = 0; phase->k_norm.data && head < program->n_kv_heads; head++)
        normalize(program, &phase->k_norm, oracle->k + (size_t)head * program->head_dim, oracle->k + (size_t)head * program->head_dim);
}

void oracle_row(struct oracle *oracle, int32_t token, double *logits) {
    const struct program *program = oracle->program;
    float *embedding = check_calloc(program->n_embd, sizeof *embedding);
    oracle->queries = check_realloc(oracle->queries, ((size_t)oracle->position + 1) * queries_a_row(program), sizeof(double));
    for (uint32_t i = 0; i < program->n_phases; i++) {
        const struct phase *phase = &program->phases[i];
        switch (phase->kind) {
        case PHASE_EMBED:
            tensor_row_f32(&phase->weight[WEIGHT_ONLY], (uint32_t)token, embedding);
            for (uint32_t c = 0; c < program->n_embd; c++) oracle->x[c] = (double)embedding[c];
            break;
        case PHASE_ATTN_IN: attention_in(oracle, phase); break;
        case PHASE_ATTN:
            attention(oracle, phase->layer);
            keep_queries(oracle, phase->layer);
            break;
        case PHASE_ATTN_OUT: multiply(&phase->weight[WEIGHT_ONLY], NULL, oracle->a, oracle->x, true); break;
        case PHASE_MLP_IN:
            normalize(program, &phase->norm, oracle->x, oracle->h);
            multiply(&phase->weight[WEIGHT_GATE], NULL, oracle->h, oracle->gate, false);
            multiply(&phase->weight[WEIGHT_UP], NULL, oracle->h, oracle->up, false);
            for (uint32_t f = 0; f < program->n_ff; f++) oracle->gate[f] *= oracle->up[f] / (1 + exp(-oracle->gate[f]));
            break;
        case PHASE_MLP_OUT: multiply(&phase->weight[WEIGHT_ONLY], NULL, oracle->gate, oracle->x, true); break;
        case PHASE_HEAD:
            if (!logits) break;
            normalize(program, &phase->norm, oracle->x, oracle->h);
            multiply(&phase->weight[WEIGHT_ONLY], NULL, oracle->h, logits, false);
            break;
        case PHASE_KINDS: CHECK(!"a phase");
        }
    }
    free(embedding);
    oracle->position++;
}

uint32_t oracle_lane_slots(const struct oracle *oracle, uint32_t lane) { return oracle->lanes[lane].n_slots; }

void oracle_cut(struct oracle *oracle, uint32_t lane, uint32_t keep) {
    if (oracle->lanes[lane].n_slots > keep) oracle->lanes[lane].n_slots = keep;
}

void oracle_keep(struct oracle *oracle, uint32_t lane_index, const uint32_t *keep, uint32_t n_keep) {
    struct lane *lane = &oracle->lanes[lane_index];
    size_t d = oracle->program->head_dim;
    for (uint32_t i = 0; i < n_keep; i++) {
        CHECK(keep[i] < lane->n_slots && keep[i] >= i);
        memmove(lane->k + i * d, lane->k + keep[i] * d, d * sizeof(double));
        memmove(lane->v + i * d, lane->v + keep[i] * d, d * sizeof(double));
        lane->accumulated[i] = lane->accumulated[keep[i]];
        lane->positions[i] = lane->positions[keep[i]];
    }
    lane->n_slots = n_keep;
}

void oracle_drop(struct oracle *oracle, uint32_t lane_index, uint32_t count) {
    struct lane *lane = &oracle->lanes[lane_index];
    size_t d = oracle->program->head_dim;
    CHECK(count <= lane->n_slots);
    lane->n_slots -= count;
    memmove(lane->k, lane->k + count * d, lane->n_slots * d * sizeof(double));
    memmove(lane->v, lane->v + count * d, lane->n_slots * d * sizeof(double));
    memmove(lane->accumulated, lane->accumulated + count, lane->n_slots * sizeof(double));
    memmove(lane->positions, lane->positions + count, lane->n_slots * sizeof *lane->positions);
}
