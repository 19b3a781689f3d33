/* What the reference backend does to cached slots between steps: copies, compaction, scores, shifted sinks. Used by the engine thread. Scores are those of the
 * oracle (kernels/score.h), from a lane that is widened into plain arrays for each call. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "kernels/kivi.h"
#include "kernels/reference/internal.h"

void reference_copy_blocks(struct backend *backend, uint32_t count, const uint32_t *source, const uint32_t *destination) {
    struct reference *r = (struct reference *)(void *)backend;
    for (uint32_t i = 0; i < count; i++) kv_pool_copy_block(&r->pool, source[i], destination[i]);
}

/* Slot keep[i], and the 31 after it, become block i / 32: codes move as they are, 32 at a time. */
static void move_block(struct reference *r, const struct compaction *item, const uint32_t *keep, uint32_t i) {
    uint32_t source = item->source[keep[i] / BLOCK_TOKENS], destination = item->destination[i / BLOCK_TOKENS];
    CHECK(kivi_whole_block(keep, item->n_keep, i));
    if (source != destination) kv_pool_copy_block(&r->pool, source, destination);
}

void reference_compact(struct backend *backend, uint32_t count, const struct compaction *items) {
    struct reference *r = (struct reference *)(void *)backend;
    for (const struct compaction *item = items; item < items + count; item++) {
        const uint32_t *keep = host_kept(backend, item);
        int32_t next = 0; /* position of the sequence's next row: the lane's last slot holds the newest token */
        if (item->n_slots > 0)
            next = kv_pool_position(&r->pool, item->source[(item->n_slots - 1) / BLOCK_TOKENS], (item->n_slots - 1) % BLOCK_TOKENS) + 1;
        for (uint32_t i = 0; i < item->n_keep; i++) {
            uint32_t from = keep[i];
            CHECK(from < item->n_slots && (i == 0 || from > keep[i - 1]));
            if (kv_pool_reads_codes(&r->pool, item->source, from / BLOCK_TOKENS, item->n_slots, next)) {
                move_block(r, item, keep, i);
                i += BLOCK_TOKENS - 1;
                continue;
            }
            kv_pool_copy_slot(&r->pool, item->source[from / BLOCK_TOKENS], from % BLOCK_TOKENS, item->destination[i / BLOCK_TOKENS],
                              i % BLOCK_TOKENS);
            if (i % BLOCK_TOKENS == BLOCK_TOKENS - 1 && (from != i || item->source[i / BLOCK_TOKENS] != item->destination[i / BLOCK_TOKENS]))
                kv_pool_close(&r->pool, item->destination[i / BLOCK_TOKENS]);
        }
    }
}

void reference_read_f32(struct backend *backend, uint32_t block, uint32_t slot, float *k, float *v, int32_t *position) {
    const struct reference *r = (const struct reference *)(void *)backend;
    kv_pool_read_k(&r->pool, block, slot, kv_pool_is_closed(&r->pool, block), k);
    kv_pool_read_v(&r->pool, block, slot, kv_pool_is_closed(&r->pool, block), v);
    *position = kv_pool_position(&r->pool, block, slot);
}

void reference_read_positions(struct backend *backend, uint32_t count, const uint32_t *blocks, int32_t *positions) {
    const struct reference *r = (const struct reference *)(void *)backend;
    for (uint32_t i = 0; i < count; i++)
        for (uint32_t slot = 0; slot < BLOCK_TOKENS; slot++) positions[(size_t)i * BLOCK_TOKENS + slot] = kv_pool_position(&r->pool, blocks[i], slot);
}

/* The window's queries of one KV head: [n_window][group][head_dim]. */
static void gather_queries(const struct reference *r, const struct score_request *request, uint32_t lane, float *q) {
    const struct program *p = r->program;
    CHECK(request->ring >= 1 && request->ring <= r->limits.n_rings && request->n_window <= r->limits.ring_rows);
    CHECK((int64_t)request->last_position + 1 >= (int64_t)request->n_window);
    uint32_t layer = lane / p->n_kv_heads, head = lane % p->n_kv_heads, group = p->n_heads / p->n_kv_heads;
    const float *ring = r->ring_queries + ((size_t)(request->ring - 1) * p->n_layers + layer) * r->limits.ring_rows * q_dims(p);
    for (uint32_t i = 0; i < request->n_window; i++) {
        uint32_t position = (uint32_t)request->last_position - (request->n_window - 1 - i);
        const float *row = ring + position % r->limits.ring_rows * q_dims(p) + (size_t)head * group * p->head_dim;
        memcpy(q + (size_t)i * group * p->head_dim, row, group * p->head_dim * sizeof *q);
    }
}

static void score_one_lane(const struct reference *r, const struct score_request *request, uint32_t lane, float *scores) {
    const struct program *p = r->program;
    uint32_t n = request->lane_tokens[lane], d = p->head_dim, group = p->n_heads / p->n_kv_heads;
    const uint32_t *ids = request->block_ids + request->lane_first[lane];
    float *k = check_calloc((size_t)n * d + 1, sizeof *k), *v = check_calloc((size_t)n * d + 1, sizeof *v);
    float *q = check_calloc((size_t)request->n_window * group * d + 1, sizeof *q);
    int32_t *positions = check_calloc((size_t)n + 1, sizeof *positions);
    uint64_t *accumulated = check_calloc((size_t)n + 1, sizeof *accumulated);
    /* KIVI: as the row after the newest token reads the lane, even if the rows that score are older. */
    int32_t newest = n > 0 ? kv_pool_position(&r->pool, ids[(n - 1) / BLOCK_TOKENS], (n - 1) % BLOCK_TOKENS) : -1;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t block = ids[i / BLOCK_TOKENS], slot = i % BLOCK_TOKENS;
        bool codes = kv_pool_reads_codes(&r->pool, ids, i / BLOCK_TOKENS, n, (newest > request->last_position ? newest : request->last_position) + 1);
        kv_pool_read_k(&r->pool, block, slot, codes, k + (size_t)i * d);
        kv_pool_read_v(&r->pool, block, slot, codes, v + (size_t)i * d);
        positions[i] = kv_pool_position(&r->pool, block, slot);
        accumulated[i] = kv_pool_accumulated(&r->pool, block, slot);
    }
    if (score_per_query_head(request->kind)) gather_queries(r, request, lane, q);
    const struct score_lane plain = {
        .n_slots = n,
        .k = k,
        .v = v,
        .positions = positions,
        .accumulated = accumulated,
        .q = q,
        .n_window = request->n_window,
        .last_position = request->last_position,
        .ahead = request->ahead,
    };
    score_lane(p, request->kind, &plain, scores);
    free(k);
    free(v);
    free(q);
    free(positions);
    free(accumulated);
}

void reference_score(struct backend *backend, const struct score_request *request, float *scores) {
    const struct reference *r = (const struct reference *)(void *)backend;
    CHECK(request->kind != SCORE_ACCUMULATED || r->limits.accumulators);
    CHECK(request->first_lane + request->n_lanes <= program_lanes(r->program));
    for (uint32_t lane = request->first_lane; lane < request->first_lane + request->n_lanes; lane++)
        score_one_lane(r, request, lane, scores + request->offset[lane]);
}

/* The rotation alone: what rope_magnitude did to the key when it was cached stays in it. */
static void rotate(const struct program *p, double positions, float *x) {
    for (uint32_t i = 0; i < p->rope_dims / 2; i++) {
        double c = cos(positions * p->rope_frequency[i]), s = sin(positions * p->rope_frequency[i]);
        uint32_t first = p->rope_pairs == ROPE_PAIRS_ADJACENT ? 2 * i : i;
        uint32_t second = p->rope_pairs == ROPE_PAIRS_ADJACENT ? 2 * i + 1 : i + p->rope_dims / 2;
        double a = (double)x[first], b = (double)x[second];
        x[first] = (float)(a * c - b * s);
        x[second] = (float)(a * s + b * c);
    }
}

void reference_shift_sinks(struct backend *backend, const struct shift_request *request) {
    struct reference *r = (struct reference *)(void *)backend;
    const struct program *p = r->program;
    uint32_t d = p->head_dim;
    CHECK(request->ring >= 1 && request->ring <= r->limits.n_rings && request->n_slots <= r->limits.sink_slots);
    CHECK(kivi_bits(r->pool.dtype) == 0 || request->n_slots % BLOCK_TOKENS == 0);
    float *sinks = r->ring_sinks + (request->ring - 1) * ring_sink_floats(p, &r->limits);
    float *shifted = check_calloc(d, sizeof *shifted);
    for (uint32_t lane = 0; lane < program_lanes(p); lane++) {
        for (uint32_t i = 0; i < request->n_slots; i++) {
            uint32_t block = request->block_ids[request->lane_first[lane] + i / BLOCK_TOKENS], slot = i % BLOCK_TOKENS;
            double position = kv_pool_position(&r->pool, block, slot);
            float *plain = sinks + ((size_t)lane * r->limits.sink_slots + i) * d;
            if (request->first) {
                kv_pool_read_k(&r->pool, block, slot, kv_pool_is_closed(&r->pool, block), plain);
                rotate(p, -position, plain);
            }
            memcpy(shifted, plain, d * sizeof *shifted);
            rotate(p, position + request->shift, shifted);
            kv_pool_write_k(&r->pool, block, slot, shifted);
            if (kivi_bits(r->pool.dtype) && slot == BLOCK_TOKENS - 1) kv_pool_close(&r->pool, block);
        }
    }
    free(shifted);
}
