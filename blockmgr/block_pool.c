/* See block_pool.h. */
#include "blockmgr/block_pool.h"

#include <stdlib.h>

#include "base/check.h"

#define EXTENT_NONE UINT32_MAX

static uint64_t full_mask(const struct block_pool *pool, uint32_t extent) {
    uint32_t first = extent * pool->extent_blocks, left = pool->n_blocks - first, count = left < pool->extent_blocks ? left : pool->extent_blocks;
    return count == 64 ? UINT64_MAX : (1ull << count) - 1;
}

/* The list an extent with this mask belongs to; NULL: none, all its blocks are taken. */
static uint32_t *list_of(struct block_pool *pool, uint32_t extent, uint64_t mask) {
    if (mask == 0) return NULL;
    return mask == full_mask(pool, extent) ? &pool->whole : &pool->partial;
}

static void unlink_extent(struct block_pool *pool, uint32_t *head, uint32_t extent) {
    struct block_extent *it = &pool->extents[extent];
    if (it->previous != EXTENT_NONE)
        pool->extents[it->previous].next = it->next;
    else
        *head = it->next;
    if (it->next != EXTENT_NONE) pool->extents[it->next].previous = it->previous;
}

static void link_extent(struct block_pool *pool, uint32_t *head, uint32_t extent) {
    struct block_extent *it = &pool->extents[extent];
    it->previous = EXTENT_NONE;
    it->next = *head;
    if (*head != EXTENT_NONE) pool->extents[*head].previous = extent;
    *head = extent;
}

static void set_mask(struct block_pool *pool, uint32_t extent, uint64_t mask) {
    uint32_t *from = list_of(pool, extent, pool->extents[extent].free_mask), *to = list_of(pool, extent, mask);
    pool->extents[extent].free_mask = mask;
    if (from == to) return;
    if (from) unlink_extent(pool, from, extent);
    if (to) link_extent(pool, to, extent);
}

static uint32_t extents_for(uint32_t n_blocks, uint32_t extent_blocks) { return n_blocks / extent_blocks + (n_blocks % extent_blocks != 0); }

uint64_t block_pool_bytes(uint32_t n_blocks, uint32_t extent_blocks) {
    return (uint64_t)n_blocks * (sizeof(uint32_t) + sizeof(uint8_t)) + (uint64_t)extents_for(n_blocks, extent_blocks) * sizeof(struct block_extent);
}

void block_pool_init(struct block_pool *pool, uint32_t n_blocks, uint32_t extent_blocks) {
    CHECK(n_blocks > 0 && n_blocks < BLOCK_NONE && extent_blocks >= 1 && extent_blocks <= EXTENT_BLOCKS_MAX);
    *pool =
        (struct block_pool){.n_blocks = n_blocks, .extent_blocks = extent_blocks, .n_free = n_blocks, .whole = EXTENT_NONE, .partial = EXTENT_NONE};
    pool->n_extents = extents_for(n_blocks, extent_blocks);
    pool->owners = check_calloc(n_blocks, sizeof *pool->owners);
    pool->cached = check_calloc(n_blocks, sizeof *pool->cached);
    pool->extents = check_calloc(pool->n_extents, sizeof *pool->extents);
    for (uint32_t extent = pool->n_extents; extent-- > 0;) set_mask(pool, extent, full_mask(pool, extent));
}

void block_pool_done(struct block_pool *pool) {
    free(pool->owners);
    free(pool->cached);
    free(pool->extents);
}

static bool is_free(const struct block_pool *pool, uint32_t id) {
    return pool->extents[id / pool->extent_blocks].free_mask >> (id % pool->extent_blocks) & 1;
}

static uint32_t choose_block(const struct block_pool *pool, uint32_t near) {
    if (near != BLOCK_NONE && near + 1 < pool->n_blocks && (near + 1) % pool->extent_blocks != 0 && is_free(pool, near + 1)) return near + 1;
    uint32_t extent = pool->whole != EXTENT_NONE ? pool->whole : pool->partial;
    CHECK(extent != EXTENT_NONE);
    return extent * pool->extent_blocks + (uint32_t)__builtin_ctzll(pool->extents[extent].free_mask);
}

static void mark(struct block_pool *pool, uint32_t id, bool free) {
    uint32_t extent = id / pool->extent_blocks;
    uint64_t bit = 1ull << (id % pool->extent_blocks), mask = pool->extents[extent].free_mask;
    CHECK(((mask & bit) != 0) != free);
    set_mask(pool, extent, free ? mask | bit : mask & ~bit);
    if (free)
        pool->n_free++;
    else
        pool->n_free--;
}

uint32_t block_pool_take(struct block_pool *pool, uint32_t near) {
    uint32_t id = choose_block(pool, near);
    mark(pool, id, false);
    pool->owners[id] = 1;
    return id;
}

void block_pool_share(struct block_pool *pool, uint32_t id) {
    CHECK(id < pool->n_blocks && (pool->owners[id] > 0 || pool->cached[id]));
    if (pool->owners[id]++ == 0) pool->n_cached--;
}

void block_pool_give(struct block_pool *pool, uint32_t id) {
    CHECK(id < pool->n_blocks && pool->owners[id] > 0);
    if (--pool->owners[id] > 0) return;
    if (pool->cached[id])
        pool->n_cached++;
    else
        mark(pool, id, true);
}

void block_pool_cache(struct block_pool *pool, uint32_t id) {
    CHECK(id < pool->n_blocks && pool->owners[id] > 0 && !pool->cached[id]);
    pool->cached[id] = 1;
}

void block_pool_uncache(struct block_pool *pool, uint32_t id) {
    CHECK(id < pool->n_blocks && pool->cached[id]);
    pool->cached[id] = 0;
    if (pool->owners[id] > 0) return;
    pool->n_cached--;
    mark(pool, id, true);
}

void block_pool_check(const struct block_pool *pool, const uint32_t *owners) {
    uint32_t n_free = 0, n_cached = 0, listed = 0;
    for (uint32_t id = 0; id < pool->n_blocks; id++) {
        CHECK(owners[id] == pool->owners[id]);
        CHECK(is_free(pool, id) == (pool->owners[id] == 0 && !pool->cached[id]));
        n_free += is_free(pool, id);
        n_cached += pool->owners[id] == 0 && pool->cached[id];
    }
    CHECK(n_free == pool->n_free && n_cached == pool->n_cached);
    for (uint32_t extent = pool->whole; extent != EXTENT_NONE; extent = pool->extents[extent].next, listed++)
        CHECK(pool->extents[extent].free_mask == full_mask(pool, extent));
    for (uint32_t extent = pool->partial; extent != EXTENT_NONE; extent = pool->extents[extent].next, listed++)
        CHECK(pool->extents[extent].free_mask != 0 && pool->extents[extent].free_mask != full_mask(pool, extent));
    for (uint32_t extent = 0; extent < pool->n_extents; extent++) listed -= pool->extents[extent].free_mask != 0;
    CHECK(listed == 0);
}
