/* The reference backend's KV pool: plain rows of the KV dtype, slot after slot. Owns its memory; one thread. */
#pragma once

#include <stdint.h>

#include "kernels/backend.h"

/* A block is K [BLOCK_TOKENS][head_dim], V the same, for q8 an f32 scale a slot for each, then accumulated attention (u64) and the
 * position of each slot. */
struct kv_pool {
    enum kv_dtype dtype;
    uint32_t head_dim, n_blocks;
    size_t block_bytes, row_bytes;
    uint8_t *bytes;
};

size_t kv_pool_block_bytes(uint32_t head_dim, enum kv_dtype dtype);
enum status kv_pool_init(struct kv_pool *pool, uint32_t head_dim, enum kv_dtype dtype, uint32_t n_blocks, struct error *error);
void kv_pool_done(struct kv_pool *pool);

/* k and v [head_dim], rounded to the pool's dtype on the way in and widened exactly on the way out. */
void kv_pool_write(struct kv_pool *pool, uint32_t block, uint32_t slot, const float *k, const float *v, int32_t position);
/* The key alone. */
void kv_pool_write_k(struct kv_pool *pool, uint32_t block, uint32_t slot, const float *k);
void kv_pool_read_k(const struct kv_pool *pool, uint32_t block, uint32_t slot, float *k);
void kv_pool_read_v(const struct kv_pool *pool, uint32_t block, uint32_t slot, float *v);
/* Attention the slot was given so far, fixed point (kernels/score.h); 0 when it is written. */
uint64_t kv_pool_accumulated(const struct kv_pool *pool, uint32_t block, uint32_t slot);
void kv_pool_accumulate(struct kv_pool *pool, uint32_t block, uint32_t slot, uint64_t attention);
int32_t kv_pool_position(const struct kv_pool *pool, uint32_t block, uint32_t slot);

void kv_pool_copy_block(struct kv_pool *pool, uint32_t source, uint32_t destination);
/* Every bit of the slot: nothing is rounded again. */
void kv_pool_copy_slot(struct kv_pool *pool, uint32_t source, uint32_t source_slot, uint32_t destination, uint32_t destination_slot);
