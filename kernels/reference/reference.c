/* The oracle of the fast backends: the program read phase by phase, in plain f32 with sums in f64, one row at a time. Obvious first; fast enough to hold a short
 * conversation with a small model.
 *
 * Owns its KV pool and scratch; weights stay where the model mapped them and are widened row by row. One thread (the engine's), whatever limits->threads says. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/clock.h"
#include "kernels/kivi.h"
#include "kernels/reference/internal.h"

#define SPLIT_SLOTS 256 /* attention adds up a lane in pieces that begin at multiples of this */
#define HEAD_ROWS 16    /* rows whose logits are in memory at once */

static uint64_t weight_row_floats(const struct program *p) {
    uint64_t widest = p->n_embd;
    if (q_dims(p) > widest) widest = q_dims(p);
    if (p->n_ff > widest) widest = p->n_ff;
    return widest;
}

static uint64_t floats_a_row(const struct program *p) { return 2 * (uint64_t)p->n_embd + 2 * q_dims(p) + 2 * kv_dims(p) + 2 * (uint64_t)p->n_ff; }

static uint64_t floats_once(const struct program *p) {
    return weight_row_floats(p) + (HEAD_ROWS + 1) * (uint64_t)p->n_vocab + sampler_scratch_floats(p->n_vocab) + SPLIT_SLOTS +
           3 * (uint64_t)p->head_dim;
}

static size_t reference_block_bytes(const struct program *program, enum kv_dtype dtype) { return kv_pool_block_bytes(program->head_dim, dtype); }

static uint32_t reference_memory_plan(const struct program *program, const struct backend_limits *limits, struct memory_line *lines, uint32_t max) {
    const struct memory_line all[] = {
        {"scratch rows", limits->max_rows, sizeof(float) * floats_a_row(program), false},
        {"scratch", 1, sizeof(float) * floats_once(program), false},
        {"scratch samples", limits->max_samples, sizeof(struct sample_result), false},
        {"query rings", limits->n_rings, sizeof(float) * (ring_query_floats(program, limits) + ring_sink_floats(program, limits)), false},
        {"ranking", 1, ranking_bytes(program, limits->rank_slots, 1), false},
    };
    uint32_t n = 0;
    for (; n < sizeof all / sizeof *all && n < max; n++) lines[n] = all[n];
    return n;
}

static void reference_close(struct backend *backend) {
    struct reference *r = (struct reference *)(void *)backend;
    if (!r) return;
    kv_pool_done(&r->pool);
    ranking_free(r->backend.ranking);
    free(r->ring_queries);
    free(r->ring_sinks);
    free(r->results);
    free(r->x); /* the first of all scratch */
    free(r);
}

/* One allocation, cut up. */
static bool allocate_scratch(struct reference *r) {
    const struct program *p = r->program;
    size_t rows = r->limits.max_rows, floats;
    if (!size_mul(rows, floats_a_row(p), &floats) || !size_add(floats, floats_once(p), &floats)) return false;
    float *next = calloc(floats, sizeof *next);
    if (!next) return false;
    const struct {
        float **where;
        size_t count;
    } parts[] = {
        {&r->x, rows * p->n_embd},
        {&r->h, rows * p->n_embd},
        {&r->q, rows * q_dims(p)},
        {&r->a, rows * q_dims(p)},
        {&r->k, rows * kv_dims(p)},
        {&r->v, rows * kv_dims(p)},
        {&r->gate, rows * p->n_ff},
        {&r->up, rows * p->n_ff},
        {&r->weight_row, weight_row_floats(p)},
        {&r->logits, (size_t)HEAD_ROWS * p->n_vocab},
        {&r->sampler_logits, p->n_vocab},
        {&r->sampler_scratch, sampler_scratch_floats(p->n_vocab)},
        {&r->split, SPLIT_SLOTS + 3 * (size_t)p->head_dim},
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].where = next;
        next += parts[i].count;
    }
    return true;
}

/* One float more than asked for, so that none is not a failure. */
static bool allocate_rings(struct reference *r) {
    size_t queries, sinks;
    if (!size_mul(r->limits.n_rings, ring_query_floats(r->program, &r->limits), &queries)) return false;
    if (!size_mul(r->limits.n_rings, ring_sink_floats(r->program, &r->limits), &sinks)) return false;
    r->ring_queries = calloc(queries + 1, sizeof *r->ring_queries);
    r->ring_sinks = calloc(sinks + 1, sizeof *r->ring_sinks);
    return r->ring_queries && r->ring_sinks;
}

static enum status reference_supports(const struct program *program, const struct backend_limits *limits, struct error *error) {
    (void)limits;
    return backend_needs_data(&backend_reference, program, error);
}

static enum status reference_prepare(const struct program *program, const struct backend_limits *limits, struct backend **backend,
                                     struct error *error) {
    enum status status = reference_supports(program, limits, error);
    if (status != STATUS_OK) return status;
    struct reference *r = check_calloc(1, sizeof *r);
    r->backend.ops = &backend_reference;
    r->backend.joins_blocks = kivi_bits(limits->kv_dtype) > 0;
    r->program = program;
    r->limits = *limits;
    status = kv_pool_init(&r->pool, program->head_dim, limits->kv_dtype, limits->n_blocks, error);
    if (status == STATUS_OK) {
        r->results = calloc(limits->max_samples, sizeof *r->results);
        if (!r->results || !allocate_scratch(r) || !allocate_rings(r))
            status = error_set(error, STATUS_NO_MEMORY, "reference backend: scratch for %u rows, %u query rings", (unsigned)limits->max_rows,
                               (unsigned)limits->n_rings);
    }
    if (status != STATUS_OK) {
        reference_close(&r->backend);
        return status;
    }
    if (limits->rank_slots > 0) {
        r->backend.rank_places = 1;
        r->backend.ranking = ranking_new(program, limits->rank_slots, r->backend.rank_places);
    }
    if (limits->progress) limits->progress(limits->progress_context, 1);
    *backend = &r->backend;
    return STATUS_OK;
}

static const char *reference_describe(const struct backend *backend) {
    (void)backend;
    return "reference, 1 thread";
}

/* Eight sums, so that additions overlap; always the same eight. */
static float dot(const float *a, const float *b, uint32_t n) {
    double sum[8] = {0};
    uint32_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (uint32_t j = 0; j < 8; j++) sum[j] += (double)a[i + j] * (double)b[i + j];
    for (; i < n; i++) sum[i % 8] += (double)a[i] * (double)b[i];
    return (float)(((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7])));
}

/* out[row] = W in[row] (+ bias), for rows of W's cols and rows floats. */
static void product(struct reference *r, const struct tensor *w, const struct tensor *bias, const float *in, uint32_t rows, float *out) {
    for (uint32_t i = 0; i < w->rows; i++) {
        tensor_row_f32(w, i, r->weight_row);
        float b = 0;
        if (bias && bias->data) tensor_dequantize(TENSOR_F32, (const uint8_t *)bias->data + i * sizeof b, &b, 1);
        for (uint32_t m = 0; m < rows; m++) out[(size_t)m * w->rows + i] = dot(r->weight_row, in + (size_t)m * w->cols, w->cols) + b;
    }
}

static void rmsnorm(const struct reference *r, const struct tensor *norm, const float *in, uint32_t n, float *out) {
    tensor_row_f32(norm, 0, r->weight_row);
    double squares = 0;
    for (uint32_t i = 0; i < n; i++) squares += (double)in[i] * (double)in[i];
    float scale = (float)(1 / sqrt(squares / n + (double)r->program->norm_epsilon));
    for (uint32_t i = 0; i < n; i++) out[i] = in[i] * scale * r->weight_row[i];
}

static void rope(const struct program *p, float *head, int32_t position) {
    for (uint32_t i = 0; i < p->rope_dims / 2; i++) {
        double angle = (double)position * p->rope_frequency[i];
        float c = (float)(cos(angle) * (double)p->rope_magnitude), s = (float)(sin(angle) * (double)p->rope_magnitude);
        uint32_t first = p->rope_pairs == ROPE_PAIRS_ADJACENT ? 2 * i : i;
        uint32_t second = p->rope_pairs == ROPE_PAIRS_ADJACENT ? 2 * i + 1 : i + p->rope_dims / 2;
        float a = head[first], b = head[second];
        head[first] = a * c - b * s;
        head[second] = a * s + b * c;
    }
}

static void attention_in(struct reference *r, const struct phase *phase, uint32_t rows) {
    const struct program *p = r->program;
    for (uint32_t m = 0; m < rows; m++) rmsnorm(r, &phase->norm, r->x + (size_t)m * p->n_embd, p->n_embd, r->h + (size_t)m * p->n_embd);
    product(r, &phase->weight[WEIGHT_Q], &phase->bias[WEIGHT_Q], r->h, rows, r->q);
    product(r, &phase->weight[WEIGHT_K], &phase->bias[WEIGHT_K], r->h, rows, r->k);
    product(r, &phase->weight[WEIGHT_V], &phase->bias[WEIGHT_V], r->h, rows, r->v);
    for (size_t i = 0; phase->q_norm.data && i < (size_t)rows * p->n_heads; i++)
        rmsnorm(r, &phase->q_norm, r->q + i * p->head_dim, p->head_dim, r->q + i * p->head_dim);
    for (size_t i = 0; phase->k_norm.data && i < (size_t)rows * p->n_kv_heads; i++)
        rmsnorm(r, &phase->k_norm, r->k + i * p->head_dim, p->head_dim, r->k + i * p->head_dim);
}

/* The row at `position` sees the lane's first n_slots slots, the last of them its own. */
struct view {
    const uint32_t *block_ids;
    uint32_t n_slots;
    int32_t position;
};

static bool reads_codes(const struct reference *r, const struct view *view, uint32_t slot) {
    return kv_pool_reads_codes(&r->pool, view->block_ids, slot / BLOCK_TOKENS, view->n_slots - 1, view->position);
}

static float score_of(struct reference *r, const struct view *view, uint32_t slot, const float *q) {
    float *k = r->split + SPLIT_SLOTS;
    kv_pool_read_k(&r->pool, view->block_ids[slot / BLOCK_TOKENS], slot % BLOCK_TOKENS, reads_codes(r, view, slot), k);
    return dot(q, k, r->program->head_dim) * r->program->attention_scale;
}

/* out = softmax(q.k * scale) v over what the row sees. Each split has its own maximum; splits are added in ascending order. */
static void attend(struct reference *r, const struct view *view, const float *q, bool accumulate, float *out) {
    const uint32_t *block_ids = view->block_ids, n_slots = view->n_slots;
    uint32_t d_count = r->program->head_dim;
    float *weight = r->split, *row = weight + SPLIT_SLOTS, *sums = row + d_count, *split_sums = sums + d_count;
    float maximum = -INFINITY, total = 0;
    for (uint32_t d = 0; d < d_count; d++) sums[d] = 0;
    for (uint32_t first = 0; first < n_slots; first += SPLIT_SLOTS) {
        uint32_t count = n_slots - first < SPLIT_SLOTS ? n_slots - first : SPLIT_SLOTS;
        float split_maximum = -INFINITY, split_total = 0;
        for (uint32_t i = 0; i < count; i++) {
            weight[i] = score_of(r, view, first + i, q);
            split_maximum = fmaxf(split_maximum, weight[i]);
        }
        for (uint32_t d = 0; d < d_count; d++) split_sums[d] = 0;
        for (uint32_t i = 0; i < count; i++) {
            kv_pool_read_v(&r->pool, block_ids[(first + i) / BLOCK_TOKENS], (first + i) % BLOCK_TOKENS, reads_codes(r, view, first + i), row);
            float w = expf(weight[i] - split_maximum);
            split_total += w;
            for (uint32_t d = 0; d < d_count; d++) split_sums[d] += w * row[d];
        }
        float merged = fmaxf(maximum, split_maximum), old = expf(maximum - merged), new = expf(split_maximum - merged);
        total = total * old + split_total * new;
        for (uint32_t d = 0; d < d_count; d++) sums[d] = sums[d] * old + split_sums[d] * new;
        maximum = merged;
    }
    for (uint32_t d = 0; d < d_count; d++) out[d] = sums[d] / total;
    for (uint32_t slot = 0; accumulate && slot < n_slots; slot++) {
        double p = (double)(expf(score_of(r, view, slot, q) - maximum) / total);
        kv_pool_accumulate(&r->pool, block_ids[slot / BLOCK_TOKENS], slot % BLOCK_TOKENS, (uint64_t)llrint(p * SCORE_ACCUMULATED_ONE));
    }
}

static void keep_query(struct reference *r, uint32_t layer, uint32_t ring, int32_t position, const float *q) {
    CHECK(ring < r->limits.n_rings);
    size_t at = ((size_t)ring * r->program->n_layers + layer) * r->limits.ring_rows + (uint32_t)position % r->limits.ring_rows;
    memcpy(r->ring_queries + at * q_dims(r->program), q, q_dims(r->program) * sizeof *q);
}

/* Everything a sequence's rows append is in the pool before the first of them reads it; a row sees the slots up to its own. */
static void attention(struct reference *r, uint32_t layer, const struct batch *batch, const struct batch_sequence *sequence) {
    const struct program *p = r->program;
    uint32_t group = p->n_heads / p->n_kv_heads, end = sequence->first_row + sequence->n_rows;
    for (uint32_t row = sequence->first_row; row < end; row++) {
        float *q = r->q + row * q_dims(p), *k = r->k + row * kv_dims(p), *v = r->v + row * kv_dims(p);
        for (uint32_t head = 0; head < p->n_heads; head++) rope(p, q + (size_t)head * p->head_dim, batch->positions[row]);
        for (uint32_t head = 0; head < p->n_kv_heads; head++) {
            uint32_t lane = layer * p->n_kv_heads + head, slot = sequence->lane_tokens[lane] + (row - sequence->first_row);
            uint32_t block = batch->block_ids[sequence->lane_first[lane] + slot / BLOCK_TOKENS];
            size_t at = (size_t)head * p->head_dim;
            rope(p, k + at, batch->positions[row]);
            kv_pool_write(&r->pool, block, slot % BLOCK_TOKENS, k + at, v + at, batch->positions[row]);
        }
        if (sequence->ring > 0 && end - row <= r->limits.ring_rows) keep_query(r, layer, sequence->ring - 1, batch->positions[row], q);
    }
    for (uint32_t row = sequence->first_row; row < end; row++) {
        for (uint32_t head = 0; head < p->n_heads; head++) {
            uint32_t lane = layer * p->n_kv_heads + head / group;
            uint32_t n_slots = sequence->lane_tokens[lane] + (row - sequence->first_row) + 1;
            size_t at = row * q_dims(p) + (size_t)head * p->head_dim;
            const struct view view = {batch->block_ids + sequence->lane_first[lane], n_slots, batch->positions[row]};
            attend(r, &view, r->q + at, sequence->accumulate, r->a + at);
        }
    }
}

static void add_product(struct reference *r, const struct tensor *w, const float *in, uint32_t rows) {
    product(r, w, NULL, in, rows, r->h);
    for (size_t i = 0; i < (size_t)rows * w->rows; i++) r->x[i] += r->h[i];
}

static void mlp_in(struct reference *r, const struct phase *phase, uint32_t rows) {
    const struct program *p = r->program;
    for (uint32_t m = 0; m < rows; m++) rmsnorm(r, &phase->norm, r->x + (size_t)m * p->n_embd, p->n_embd, r->h + (size_t)m * p->n_embd);
    product(r, &phase->weight[WEIGHT_GATE], NULL, r->h, rows, r->gate);
    product(r, &phase->weight[WEIGHT_UP], NULL, r->h, rows, r->up);
    for (size_t i = 0; i < (size_t)rows * p->n_ff; i++) r->gate[i] = r->gate[i] / (1 + expf(-r->gate[i])) * r->up[i];
}

/* The logits of up to HEAD_ROWS different rows at a time, then their samples. */
static void head(struct reference *r, const struct phase *phase, const struct batch *batch) {
    const struct program *p = r->program;
    for (uint32_t first = 0, end; first < batch->n_samples; first = end) {
        uint32_t rows = 0;
        for (end = first; end < batch->n_samples; end++) {
            uint32_t row = batch->samples[end].row;
            if (end > first && row == batch->samples[end - 1].row) continue;
            if (rows == HEAD_ROWS) break;
            rmsnorm(r, &phase->norm, r->x + (size_t)row * p->n_embd, p->n_embd, r->h + (size_t)rows++ * p->n_embd);
        }
        product(r, &phase->weight[WEIGHT_ONLY], NULL, r->h, rows, r->logits);
        const float *logits = r->logits;
        for (uint32_t i = first; i < end; i++) {
            if (i > first && batch->samples[i].row != batch->samples[i - 1].row) logits += p->n_vocab;
            if (r->tap) memcpy(r->tap + (size_t)i * p->n_vocab, logits, p->n_vocab * sizeof *logits);
            memcpy(r->sampler_logits, logits, p->n_vocab * sizeof *logits);
            sampler_sample(&batch->samples[i], r->sampler_logits, p->n_vocab, r->sampler_scratch, &r->results[i]);
        }
    }
}

static void check_batch(const struct reference *r, const struct batch *batch) {
    CHECK(!r->pending);
    CHECK(batch->n_rows <= r->limits.max_rows && batch->n_sequences <= r->limits.max_sequences && batch->n_samples <= r->limits.max_samples);
    uint32_t rows = 0;
    for (uint32_t s = 0; s < batch->n_sequences; s++) {
        CHECK(batch->sequences[s].first_row == rows && batch->sequences[s].n_rows <= batch->n_rows - rows);
        rows += batch->sequences[s].n_rows;
    }
    CHECK(rows == batch->n_rows);
    for (uint32_t i = 0; i < batch->n_samples; i++)
        CHECK(batch->samples[i].row < batch->n_rows && (i == 0 || batch->samples[i].row >= batch->samples[i - 1].row));
}

static enum status reference_submit(struct backend *backend, const struct batch *batch, struct error *error) {
    (void)error;
    struct reference *r = (struct reference *)(void *)backend;
    const struct program *p = r->program;
    check_batch(r, batch);
    uint32_t rows = batch->n_rows;
    uint64_t *phase_ns = r->limits.phase_ns, *wait_ns = r->limits.wait_ns, before = phase_ns || wait_ns ? clock_now_ns() : 0, begun = before;
    for (uint32_t i = 0; i < p->n_phases; i++) {
        const struct phase *phase = &p->phases[i];
        const struct tensor *weight = &phase->weight[WEIGHT_ONLY];
        switch (phase->kind) {
        case PHASE_EMBED:
            for (uint32_t m = 0; m < rows; m++) tensor_row_f32(weight, (uint32_t)batch->tokens[m], r->x + (size_t)m * p->n_embd);
            break;
        case PHASE_ATTN_IN: attention_in(r, phase, rows); break;
        case PHASE_ATTN:
            for (uint32_t s = 0; s < batch->n_sequences; s++) attention(r, phase->layer, batch, &batch->sequences[s]);
            break;
        case PHASE_ATTN_OUT: add_product(r, weight, r->a, rows); break;
        case PHASE_MLP_IN: mlp_in(r, phase, rows); break;
        case PHASE_MLP_OUT: add_product(r, weight, r->gate, rows); break;
        case PHASE_HEAD: head(r, phase, batch); break;
        case PHASE_KINDS: CHECK(!"a phase");
        }
        if (phase_ns) {
            uint64_t now = clock_now_ns();
            phase_ns[phase->kind] += now - before;
            before = now;
        }
    }
    if (wait_ns) *wait_ns += clock_now_ns() - begun;
    r->tap = NULL;
    r->pending = true;
    r->pending_samples = batch->n_samples;
    return STATUS_OK;
}

static enum status reference_sync(struct backend *backend, struct sample_result *results, struct error *error) {
    (void)error;
    struct reference *r = (struct reference *)(void *)backend;
    CHECK(r->pending);
    r->pending = false;
    if (r->pending_samples > 0) memcpy(results, r->results, r->pending_samples * sizeof *results);
    return STATUS_OK;
}

static void reference_tap_logits(struct backend *backend, float *destination) { ((struct reference *)(void *)backend)->tap = destination; }

/* As the file stores them: they are read where they lie. */
static uint64_t reference_weight_bytes(const struct program *program, const struct backend_limits *limits) {
    (void)limits;
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < program->n_phases; i++) {
        const struct phase *phase = &program->phases[i];
        if (phase->kind == PHASE_EMBED) continue;
        const struct tensor *const all[] = {&phase->norm,    &phase->weight[0], &phase->weight[1], &phase->weight[2], &phase->bias[0],
                                            &phase->bias[1], &phase->bias[2],   &phase->q_norm,    &phase->k_norm};
        for (size_t t = 0; t < sizeof all / sizeof *all; t++)
            if (all[t]->data) bytes += tensor_bytes(all[t]);
    }
    return bytes;
}

static double reference_copy_bandwidth(const struct backend_limits *limits) {
    (void)limits;
    return backend_host_copy_bandwidth(1);
}

const struct backend_ops backend_reference = {
    .name = "reference",
    .memory = backend_host_memory,
    .block_bytes = reference_block_bytes,
    .memory_plan = reference_memory_plan,
    .supports = reference_supports,
    .prepare = reference_prepare,
    .close = reference_close,
    .describe = reference_describe,
    .submit = reference_submit,
    .sync = reference_sync,
    .copy_blocks = reference_copy_blocks,
    .resumes = backend_resumes_always,
    .compact = reference_compact,
    .read_f32 = reference_read_f32,
    .score = reference_score,
    .rank = host_rank,
    .cut = host_cut,
    .keep = host_keep,
    .keep_units = host_keep_units,
    .settle = host_settle,
    .read_positions = reference_read_positions,
    .shift_sinks = reference_shift_sinks,
    .tap_logits = reference_tap_logits,
    .weight_bytes = reference_weight_bytes,
    .copy_bandwidth = reference_copy_bandwidth,
};
