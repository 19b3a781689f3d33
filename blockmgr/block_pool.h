/* The pool of KV blocks: which are free, and how many hold each of the others. Ids only; what lies in a block is the backend's.
 *
 * A block has a number of owners (sequences) and may also be held by the prefix cache. At all times:
 *   free: no owner, not held by the cache      used: at least one owner      cached: no owner, held by the cache      free + used + cached = total
 *
 * Blocks are handed out in runs where that is possible: the pool is cut into extents of `extent_blocks` (64 KiB), a lane that grows takes the block after its last one, else
 * opens a free extent, else takes any block. The rest of an opened extent counts as free and is taken by others when nothing else is left.
 *
 * One thread. Allocates in block_pool_init only. Every call is O(blocks named). */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define BLOCK_NONE UINT32_MAX
#define EXTENT_BLOCKS_MAX 64

struct block_extent {
    uint64_t free_mask;
    uint32_t previous, next; /* in its list */
};

struct block_pool {
    uint32_t n_blocks, extent_blocks, n_extents;
    uint32_t n_free, n_cached; /* n_cached: held by the cache alone */
    uint32_t *owners;          /* [n_blocks] */
    uint8_t *cached;           /* [n_blocks] held by the cache */
    struct block_extent *extents;
    uint32_t whole, partial; /* heads of lists: extents all free, extents partly free */
};

/* What block_pool_init allocates. */
uint64_t block_pool_bytes(uint32_t n_blocks, uint32_t extent_blocks);
void block_pool_init(struct block_pool *pool, uint32_t n_blocks, uint32_t extent_blocks);
void block_pool_done(struct block_pool *pool);
static inline uint32_t block_pool_used(const struct block_pool *pool) { return pool->n_blocks - pool->n_free - pool->n_cached; }

/* One block with one owner; near: the block it should follow, or BLOCK_NONE. At least one must be free (CHECKed): ask n_free first, so that bulk takes are all or nothing. */
uint32_t block_pool_take(struct block_pool *pool, uint32_t near);
/* One more owner of a block that is used or cached. */
void block_pool_share(struct block_pool *pool, uint32_t id);
/* One owner less. */
void block_pool_give(struct block_pool *pool, uint32_t id);
/* The cache holds a used block too; and no longer. */
void block_pool_cache(struct block_pool *pool, uint32_t id);
void block_pool_uncache(struct block_pool *pool, uint32_t id);

/* CHECKs the identities above and the lists. `owners` [n_blocks]: recounted by the caller. */
void block_pool_check(const struct block_pool *pool, const uint32_t *owners);
