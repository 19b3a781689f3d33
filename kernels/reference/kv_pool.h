/* The reference backend's KV pool: plain rows of the KV dtype, slot after slot. Owns its memory; one thread. */
#pragma once

#include <stdint.h>

#include "kernels/backend.h"

/* A block is K [BLOCK_TOKENS][head_dim], V the same, for q8 an f32 scale a slot for each, then accumulated attention (u64) and the
 * position of each slot. KIVI dtypes keep f16 rows for good, and behind them the codes a byte each, K and V as the rows are, and their scales: obvious, not small. */
struct kv_pool {
    enum kv_dtype dtype;
    uint32_t head_dim, n_blocks;
    size_t block_bytes, row_bytes, codes_offset;
    uint8_t *bytes;
    bool *closed; /* [n_blocks] the codes are those of 32 slots */
};

size_t kv_pool_block_bytes(uint32_t head_dim, enum kv_dtype dtype);
enum status kv_pool_init(struct kv_pool *pool, uint32_t head_dim, enum kv_dtype dtype, uint32_t n_blocks, struct error *error);
void kv_pool_done(struct kv_pool *pool);

/* k and v [head_dim], rounded to the pool's dtype on the way in and widened exactly on the way out. KIVI: the last slot of a block closes it. */
void kv_pool_write(struct kv_pool *pool, uint32_t block, uint32_t slot, const float *k, const float *v, int32_t position);
/* The key alone. */
void kv_pool_write_k(struct kv_pool *pool, uint32_t block, uint32_t slot, const float *k);
/* codes: what the codes of a closed KIVI block say. */
void kv_pool_read_k(const struct kv_pool *pool, uint32_t block, uint32_t slot, bool codes, float *k);
void kv_pool_read_v(const struct kv_pool *pool, uint32_t block, uint32_t slot, bool codes, float *v);
/* Makes the codes of all its slots. Nothing happens to other dtypes. */
void kv_pool_close(struct kv_pool *pool, uint32_t block);
bool kv_pool_is_closed(const struct kv_pool *pool, uint32_t block);
/* Does the row at `position` read block j of a lane as codes, `before` slots of the lane lying before the row? */
bool kv_pool_reads_codes(const struct kv_pool *pool, const uint32_t *blocks, uint32_t j, uint32_t before, int32_t position);
/* Attention the slot was given so far, fixed point (kernels/score.h); 0 when it is written. */
uint64_t kv_pool_accumulated(const struct kv_pool *pool, uint32_t block, uint32_t slot);
void kv_pool_accumulate(struct kv_pool *pool, uint32_t block, uint32_t slot, uint64_t attention);
int32_t kv_pool_position(const struct kv_pool *pool, uint32_t block, uint32_t slot);

void kv_pool_copy_block(struct kv_pool *pool, uint32_t source, uint32_t destination);
/* Every bit of the slot: nothing is rounded again. */
void kv_pool_copy_slot(struct kv_pool *pool, uint32_t source, uint32_t source_slot, uint32_t destination, uint32_t destination_slot);
