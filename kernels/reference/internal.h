/* What the files of the reference backend share. */
#pragma once

#include "kernels/backend.h"
#include "kernels/reference/kv_pool.h"

struct reference {
    struct backend backend;
    const struct program *program;
    struct backend_limits limits;
    struct kv_pool pool;
    /* Ring i (0..n_rings-1) keeps the rotated queries of its sequence's last rows, position p at p % ring_rows, and the unrotated keys of its sinks. */
    float *ring_queries;           /* [n_rings][n_layers][ring_rows][n_heads * head_dim] */
    float *ring_sinks;             /* [n_rings][n_lanes][sink_slots][head_dim] */
    struct sample_result *results; /* [max_samples] */
    uint32_t pending_samples;
    bool pending;
    float *tap;
    /* Scratch: rows of activations, and single vectors. */
    float *x, *h, *q, *k, *v, *a, *gate, *up;
    float *weight_row, *logits, *sampler_logits, *sampler_scratch;
    float *split; /* [SPLIT_SLOTS] weights, then [head_dim] a widened row, then [2 * head_dim] sums */
};

static inline uint64_t q_dims(const struct program *p) { return (uint64_t)p->n_heads * p->head_dim; }
static inline uint64_t kv_dims(const struct program *p) { return (uint64_t)p->n_kv_heads * p->head_dim; }
static inline uint64_t ring_query_floats(const struct program *p, const struct backend_limits *limits) {
    return p->n_layers * (uint64_t)limits->ring_rows * q_dims(p);
}
static inline uint64_t ring_sink_floats(const struct program *p, const struct backend_limits *limits) {
    return program_lanes(p) * (uint64_t)limits->sink_slots * p->head_dim;
}

/* services.c */
void reference_copy_blocks(struct backend *backend, uint32_t count, const uint32_t *source, const uint32_t *destination);
void reference_compact(struct backend *backend, uint32_t count, const struct compaction *items);
void reference_read_f32(struct backend *backend, uint32_t block, uint32_t slot, float *k, float *v, int32_t *position);
void reference_read_positions(struct backend *backend, uint32_t count, const uint32_t *blocks, int32_t *positions);
void reference_score(struct backend *backend, const struct score_request *request, float *scores);
void reference_shift_sinks(struct backend *backend, const struct shift_request *request);
