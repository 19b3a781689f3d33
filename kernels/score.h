/* Scores of cached slots, as numbers that kernels compute from queries kept back, keys and values. What is done with them is policies/ business.
 *
 * With q_r the post-RoPE query of window row r (of one query head), k_s the cached key of slot s, pos their positions:
 *   p_rs = softmax over the slots s with pos_s <= pos_r of (q_r . k_s * attention_scale); 0 elsewhere
 *   SCORE_ATTENTION    sum over r of p_rs                                  per query head
 *   SCORE_SQUARES      sum over r of p_rs^2                                per query head   (KV-Compress, arXiv 2410.00161, squared attention)
 *   SCORE_PERSISTENCE  number of r with p_rs > 0 and p_rs * visible_r >= 1, visible_r = number of slots row r sees   per query head  (Scissorhands; hit rate)
 *   SCORE_EXPECTED     softmax over s of (m . k_s * scale + mean over r of ((q'_r - m) . k_s)^2 * scale^2 / 2)      per query head   (Expected Attention,
 *                      arXiv 2510.00636, with moments of the window's rows): q'_r is row r un-rotated, then rotated by the mean rotation over the next
 *                      `ahead` positions after last_position; m is their mean
 *   SCORE_KEYDIFF      -cos(k_s, mean over slots of k/|k|)                 one a slot       (KeyDiff, arXiv 2504.15364)
 *   SCORE_ACCUMULATED  sum over ALL rows that accumulated of p, summed over the query heads of the KV head, as they were when computed   one a slot  (H2O)
 *   SCORE_VALUE_NORM   |v_s|_2                                             one a slot */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum score_kind {
    SCORE_ATTENTION,
    SCORE_SQUARES,
    SCORE_PERSISTENCE,
    SCORE_EXPECTED,
    SCORE_KEYDIFF,
    SCORE_ACCUMULATED,
    SCORE_VALUE_NORM,
    SCORE_KINDS
};

/* One number a slot and query head, or one a slot? */
static inline bool score_per_query_head(enum score_kind kind) { return kind <= SCORE_EXPECTED; }

/* What a backend's score() is asked: lanes of one sequence. Results: for lane l, at scores + offset[l], lane_tokens[l] floats, for kinds per query head [group][lane_tokens[l]]. */
struct score_request {
    enum score_kind kind;
    uint32_t ring;         /* 1..n_rings, of the sequence; kinds that look at rows */
    int32_t last_position; /* of the newest row in the ring */
    uint32_t n_window;     /* rows: positions last_position - n_window + 1 .. last_position, all in the ring */
    uint32_t ahead;        /* SCORE_EXPECTED: positions to average over, 512 */
    uint32_t first_lane, n_lanes;
    const uint32_t *block_ids;   /* the table arena, as in struct batch */
    const uint32_t *lane_first;  /* [n_lanes] of all lanes of the sequence */
    const uint32_t *lane_tokens; /* [n_lanes] slots filled */
    const size_t *offset;        /* [n_lanes], indexed as lane_first: where in `scores` the lane's numbers begin */
};

/* The oracle: one lane from plain arrays, in double. Every backend's score() agrees with it; `reference` calls it. */
struct score_lane {
    uint32_t n_slots;
    const float *k, *v;          /* [n_slots][head_dim], keys as cached */
    const int32_t *positions;    /* [n_slots] ascending */
    const uint64_t *accumulated; /* [n_slots] fixed point, SCORE_ACCUMULATED_ONE = 1; NULL: none */
    const float *q;              /* [n_window][group][head_dim] post-RoPE, of positions last_position - n_window + 1 .. last_position */
    uint32_t n_window;
    int32_t last_position;
    uint32_t ahead;
};
struct program;
void score_lane(const struct program *program, enum score_kind kind, const struct score_lane *lane, float *scores);

/* Accumulated attention is kept in fixed point, so that the order of adding does not matter: each row adds, per slot, the sum over the query heads of llrint(p * ONE). */
#define SCORE_ACCUMULATED_ONE 4294967296.0
