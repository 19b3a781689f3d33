/* The pool of KV blocks: which are free, and how many hold each of the others. Ids only; what lies in a block is the backend's.
 *
 * A block has a number of owners (sequences) and may also be held by the prefix cache. At all times:
 *   free: no owner, not held by the cache      used: at least one owner      cached: no owner, held by the cache      free + used + cached = total
 *
 * Blocks are handed out in runs where that is possible: the pool is cut into extents of `extent_blocks` (64 KiB), a lane that grows takes the block after its last one, else
 * opens a free extent, else takes any block. The rest of an opened extent counts as free and is taken by others when nothing else is left. Which extent, or which block, is
 * the one with the lowest id: what is handed out follows from what is free alone, and lanes that grow together open extents side by side.
 *
 * What is free is kept in bits, a bit a block, so that it stays in a core's caches whatever the size of the pool; and so is what is apart: held by the cache, or by more than one
 * owner. Of all other blocks, which are most, nothing but the first bit is read or written when they are taken and given back.
 * One thread. Allocates in block_pool_init only. Every call is O(blocks named). */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define BLOCK_NONE UINT32_MAX
#define EXTENT_BLOCKS_MAX 64

/* A set of extents whose least is found at once: bits, and above them levels of bits that say which words below have any. */
#define EXTENT_SET_LEVELS 6
struct extent_set {
    uint64_t *levels[EXTENT_SET_LEVELS]; /* [0]: a bit an extent; the last one used is one word */
    uint32_t n_levels;
};

struct block_pool {
    uint32_t n_blocks, extent_blocks, n_extents;
    uint32_t stride_shift;     /* an extent has 1 << stride_shift bits of `free`, at least extent_blocks, so that it never crosses a word */
    uint32_t n_free, n_cached; /* n_cached: held by the cache alone */
    uint32_t n_shared;         /* blocks with more than one owner */
    uint32_t *owners;          /* [n_blocks]; of a free block already 1, as when it is taken */
    uint8_t *cached;           /* [n_blocks] held by the cache */
    uint64_t *free;            /* [n_extents << stride_shift] bits */
    uint64_t *apart;           /* likewise */
    struct extent_set whole;   /* extents all free */
    struct extent_set open;    /* extents with a free block */
};

/* What block_pool_init allocates. */
uint64_t block_pool_bytes(uint32_t n_blocks, uint32_t extent_blocks);
void block_pool_init(struct block_pool *pool, uint32_t n_blocks, uint32_t extent_blocks);
void block_pool_done(struct block_pool *pool);
static inline uint32_t block_pool_used(const struct block_pool *pool) { return pool->n_blocks - pool->n_free - pool->n_cached; }

/* One block with one owner; near: the block it should follow, or BLOCK_NONE. At least one must be free (CHECKed): ask n_free first, so that bulk takes are all or nothing. */
uint32_t block_pool_take(struct block_pool *pool, uint32_t near);
/* Of block_pool_take_next: the extent has no free block left. */
void block_pool_close(struct block_pool *pool, uint32_t extent);
/* block_pool_take where that comes to near + 1, as it does for most blocks of lanes that grow: in place, for loops over lanes. false: it does not, or extent_blocks is no power of two,
 * and nothing was done. */
static inline bool block_pool_take_next(struct block_pool *pool, uint32_t near) {
    uint32_t next = near + 1, within = (1u << pool->stride_shift) - 1; /* 0 after BLOCK_NONE */
    if ((next & within) == 0 || pool->extent_blocks != within + 1) return false;
    uint64_t *word = &pool->free[next / 64], bit = 1ull << next % 64;
    if ((*word & (bit | bit >> 1)) != bit) return false; /* near is taken: the extent was not whole */
    *word ^= bit;
    pool->n_free--;
    if ((*word >> (next % 64 & ~within) & UINT64_MAX >> (63 - within)) == 0) block_pool_close(pool, next >> pool->stride_shift);
    return true;
}
/* `count` blocks, as if taken one by one, each near the one before. */
void block_pool_take_run(struct block_pool *pool, uint32_t near, uint32_t count, uint32_t *ids);
/* One more owner of a block that is used or cached. */
void block_pool_share(struct block_pool *pool, uint32_t id);
/* One owner less. */
void block_pool_give(struct block_pool *pool, uint32_t id);
/* One owner less of each; quick where ids of one extent follow each other. */
void block_pool_give_run(struct block_pool *pool, const uint32_t *ids, uint32_t count);
/* It will be given soon: what is known of it is on its way meanwhile. */
static inline void block_pool_foresee(const struct block_pool *pool, uint32_t id) {
    __builtin_prefetch(&pool->owners[id], 1);
    __asm__ volatile(""); /* or gcc may take this for a function without effect, and leave its calls out */
}
/* The cache holds a used block too; and no longer. */
void block_pool_cache(struct block_pool *pool, uint32_t id);
void block_pool_uncache(struct block_pool *pool, uint32_t id);
/* Of each; quick where ids of one extent follow each other. */
void block_pool_uncache_run(struct block_pool *pool, const uint32_t *ids, uint32_t count);

/* CHECKs the identities above and the sets. `owners` [n_blocks]: recounted by the caller. */
void block_pool_check(const struct block_pool *pool, const uint32_t *owners);
