/* KV blocks of token runs that were computed before, to be shared by sequences that begin alike. An entry is one run of BLOCK_TOKENS tokens, full, with the block ids of ALL
 * lanes; it follows a parent entry (the run before it). Inserted, hit and evicted as a unit. The cache holds each of its blocks beside whoever owns it (block_pool.h).
 *
 * Keys are a chain of XXH3-128 hashes, seeded per process and by scope; the ids of the tokens are compared on every hit, so that a collision is a miss.
 * Users: sequences that hold an entry's blocks. An entry without users waits in a list, least recently used first; a child always stands there before its parent, so eviction
 * takes leaves first. One thread. Allocates in prefix_cache_init only. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/block.h"
#include "blockmgr/block_pool.h"

#define ENTRY_NONE UINT32_MAX

struct prefix_hash {
    uint64_t low, high;
};

struct prefix_entry {
    struct prefix_hash hash;
    uint64_t scope;
    int32_t tokens[BLOCK_TOKENS];
    uint32_t parent, first_child, next_sibling, previous_sibling;
    uint32_t n_users;
    uint32_t newer, older; /* in the list of entries without users */
    uint32_t next_in_bucket;
    bool live;
};

struct prefix_cache {
    struct block_pool *pool;
    uint32_t n_lanes, capacity, n_entries, n_idle;
    uint64_t seed;
    struct prefix_entry *entries;
    uint32_t *ids;                /* [capacity][n_lanes] */
    uint32_t *entry_of;           /* [n_blocks] the entry that holds a block, while one does */
    uint32_t *removed, *released; /* [capacity] by one prefix_cache_remove: entries, blocks of a lane */
    uint32_t *buckets;            /* [n_buckets] */
    uint32_t n_buckets;           /* a power of two */
    uint32_t oldest, newest;
    uint32_t free_entry; /* list through next_in_bucket */
};

uint64_t prefix_cache_bytes(uint32_t n_lanes, uint32_t capacity, uint32_t n_blocks);
/* capacity: entries at most; 0: the cache is off and never holds anything. */
void prefix_cache_init(struct prefix_cache *cache, struct block_pool *pool, uint32_t n_lanes, uint32_t capacity, uint64_t seed);
void prefix_cache_done(struct prefix_cache *cache);

static inline const uint32_t *prefix_entry_ids(const struct prefix_cache *cache, uint32_t entry) {
    return cache->ids + (size_t)entry * cache->n_lanes;
}

/* The entry of run `tokens` [BLOCK_TOKENS] after `parent` (ENTRY_NONE: the first run), or ENTRY_NONE. */
uint32_t prefix_cache_find(const struct prefix_cache *cache, uint64_t scope, uint32_t parent, const int32_t *tokens);
/* Adds it with its blocks, one a lane, each owned by the sequence that inserts, which is its first user. ENTRY_NONE: it is there already, or no entry is free (the caller may evict
 * and ask again). */
uint32_t prefix_cache_insert(struct prefix_cache *cache, uint64_t scope, uint32_t parent, const int32_t *tokens, const uint32_t *ids);
/* One user more, one less. A chain is used from the root down and left from the leaf up. */
void prefix_cache_use(struct prefix_cache *cache, uint32_t entry);
void prefix_cache_leave(struct prefix_cache *cache, uint32_t entry);
/* The least recently used entry without users goes; false: there is none. */
bool prefix_cache_evict(struct prefix_cache *cache);
/* The entry goes whoever uses it, with all that follow it; their users' blocks stay theirs. */
void prefix_cache_remove(struct prefix_cache *cache, uint32_t entry);
void prefix_cache_clear_idle(struct prefix_cache *cache);

/* CHECKs hashes, lists, users (recounted by the caller, [capacity]), and that every block is held once. */
void prefix_cache_check(const struct prefix_cache *cache, const uint32_t *users);
