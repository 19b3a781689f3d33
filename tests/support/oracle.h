/* The forward pass once more, in double, over a contiguous cache, sharing no code with any backend: what `reference` itself is measured against.
 * One sequence. Lanes may be cut and lose blocks, as a paged cache may. */
#pragma once

#include <stdint.h>

#include "kernels/backend.h"

struct oracle;

/* K and V are rounded to `dtype` as they enter the cache. `program` must outlive the oracle. */
struct oracle *oracle_new(const struct program *program, enum kv_dtype dtype);
void oracle_free(struct oracle *oracle);

/* Runs the next token, at the next position; logits [n_vocab], NULL: not wanted. */
void oracle_row(struct oracle *oracle, int32_t token, double *logits);
uint32_t oracle_lane_slots(const struct oracle *oracle, uint32_t lane);
/* Leaves `keep` slots of the lane; removes its first `count`. */
void oracle_cut(struct oracle *oracle, uint32_t lane, uint32_t keep);
void oracle_drop(struct oracle *oracle, uint32_t lane, uint32_t count);
/* Of row `position`, one layer: rotated queries [n_heads][head_dim]. */
const double *oracle_queries(const struct oracle *oracle, int32_t position, uint32_t layer);
/* k and v [slots of the lane][head_dim], as the next row reads them. */
void oracle_seen(const struct oracle *oracle, uint32_t lane, double *k, double *v);
/* Attention that slot was given by every row since it entered, summed over the query heads of the lane. */
double oracle_accumulated(const struct oracle *oracle, uint32_t lane, uint32_t slot);
/* Leaves the slots named. */
void oracle_keep(struct oracle *oracle, uint32_t lane, const uint32_t *keep, uint32_t n_keep);
