/* See prefix_cache.h. */
#include "blockmgr/prefix_cache.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/check.h"

static uint32_t buckets_for(uint32_t capacity) {
    uint32_t n = 16;
    while (n < capacity && n < 1u << 30) n *= 2;
    return n;
}

uint64_t prefix_cache_bytes(uint32_t n_lanes, uint32_t capacity, uint32_t n_blocks) {
    return (uint64_t)n_blocks * sizeof(uint32_t) + (uint64_t)capacity * (sizeof(struct prefix_entry) + (n_lanes + 2) * sizeof(uint32_t)) +
           buckets_for(capacity) * sizeof(uint32_t);
}

void prefix_cache_init(struct prefix_cache *cache, struct block_pool *pool, uint32_t n_lanes, uint32_t capacity, uint64_t seed) {
    CHECK(capacity < ENTRY_NONE);
    *cache = (struct prefix_cache){
        .pool = pool, .n_lanes = n_lanes, .capacity = capacity, .seed = seed, .oldest = ENTRY_NONE, .newest = ENTRY_NONE, .free_entry = ENTRY_NONE};
    cache->n_buckets = buckets_for(capacity);
    cache->entries = check_calloc(capacity, sizeof *cache->entries);
    cache->ids = check_calloc((size_t)capacity * n_lanes, sizeof *cache->ids);
    cache->removed = check_calloc(capacity, sizeof *cache->removed);
    cache->released = check_calloc(capacity, sizeof *cache->released);
    cache->buckets = check_calloc(cache->n_buckets, sizeof *cache->buckets);
    memset(cache->buckets, 0xff, cache->n_buckets * sizeof *cache->buckets);
    cache->entry_of = check_calloc(pool->n_blocks, sizeof *cache->entry_of);
    for (uint32_t entry = capacity; entry-- > 0;) {
        cache->entries[entry].next_in_bucket = cache->free_entry;
        cache->free_entry = entry;
    }
}

void prefix_cache_done(struct prefix_cache *cache) {
    free(cache->entries);
    free(cache->ids);
    free(cache->removed);
    free(cache->released);
    free(cache->buckets);
    free(cache->entry_of);
}

/* The hash of a run covers the hash of its parent, and so everything before it. */
static struct prefix_hash hash_of(const struct prefix_cache *cache, uint64_t scope, uint32_t parent, const int32_t *tokens) {
    struct {
        struct prefix_hash before;
        uint64_t scope;
        int32_t tokens[BLOCK_TOKENS];
    } input = {.scope = scope};
    if (parent != ENTRY_NONE) input.before = cache->entries[parent].hash;
    memcpy(input.tokens, tokens, sizeof input.tokens);
    XXH128_hash_t hash = XXH3_128bits_withSeed(&input, sizeof input, cache->seed);
    return (struct prefix_hash){.low = hash.low64, .high = hash.high64};
}

uint32_t prefix_cache_find(const struct prefix_cache *cache, uint64_t scope, uint32_t parent, const int32_t *tokens) {
    if (cache->n_entries == 0) return ENTRY_NONE;
    struct prefix_hash hash = hash_of(cache, scope, parent, tokens);
    for (uint32_t i = cache->buckets[hash.low & (cache->n_buckets - 1)]; i != ENTRY_NONE; i = cache->entries[i].next_in_bucket) {
        const struct prefix_entry *entry = &cache->entries[i];
        if (entry->hash.low == hash.low && entry->hash.high == hash.high && entry->scope == scope && entry->parent == parent &&
            memcmp(entry->tokens, tokens, sizeof entry->tokens) == 0)
            return i;
    }
    return ENTRY_NONE;
}

uint32_t prefix_cache_insert(struct prefix_cache *cache, uint64_t scope, uint32_t parent, const int32_t *tokens, const uint32_t *ids) {
    uint32_t i = cache->free_entry;
    if (i == ENTRY_NONE || prefix_cache_find(cache, scope, parent, tokens) != ENTRY_NONE) return ENTRY_NONE;
    struct prefix_entry *entry = &cache->entries[i];
    cache->free_entry = entry->next_in_bucket;
    *entry = (struct prefix_entry){.hash = hash_of(cache, scope, parent, tokens),
                                   .scope = scope,
                                   .parent = parent,
                                   .first_child = ENTRY_NONE,
                                   .next_sibling = ENTRY_NONE,
                                   .previous_sibling = ENTRY_NONE,
                                   .n_users = 1,
                                   .live = true};
    memcpy(entry->tokens, tokens, sizeof entry->tokens);
    if (parent != ENTRY_NONE) {
        uint32_t sibling = cache->entries[parent].first_child;
        CHECK(cache->entries[parent].n_users > 0);
        entry->next_sibling = sibling;
        if (sibling != ENTRY_NONE) cache->entries[sibling].previous_sibling = i;
        cache->entries[parent].first_child = i;
    }
    uint32_t *bucket = &cache->buckets[entry->hash.low & (cache->n_buckets - 1)];
    entry->next_in_bucket = *bucket;
    *bucket = i;
    uint32_t *own = cache->ids + (size_t)i * cache->n_lanes;
    for (uint32_t lane = 0; lane < cache->n_lanes; lane++) {
        own[lane] = ids[lane];
        cache->entry_of[ids[lane]] = i;
        block_pool_cache(cache->pool, ids[lane]);
    }
    cache->n_entries++;
    return i;
}

static void idle_push(struct prefix_cache *cache, uint32_t i) {
    struct prefix_entry *entry = &cache->entries[i];
    entry->older = cache->newest;
    entry->newer = ENTRY_NONE;
    if (cache->newest != ENTRY_NONE)
        cache->entries[cache->newest].newer = i;
    else
        cache->oldest = i;
    cache->newest = i;
    cache->n_idle++;
}

static void idle_unlink(struct prefix_cache *cache, uint32_t i) {
    struct prefix_entry *entry = &cache->entries[i];
    if (entry->older != ENTRY_NONE)
        cache->entries[entry->older].newer = entry->newer;
    else
        cache->oldest = entry->newer;
    if (entry->newer != ENTRY_NONE)
        cache->entries[entry->newer].older = entry->older;
    else
        cache->newest = entry->older;
    cache->n_idle--;
}

void prefix_cache_use(struct prefix_cache *cache, uint32_t i) {
    CHECK(cache->entries[i].live);
    if (cache->entries[i].n_users++ == 0) idle_unlink(cache, i);
}

void prefix_cache_leave(struct prefix_cache *cache, uint32_t i) {
    CHECK(cache->entries[i].live && cache->entries[i].n_users > 0);
    if (--cache->entries[i].n_users == 0) idle_push(cache, i);
}

/* Its ids stay until it is used again. */
static void remove_leaf(struct prefix_cache *cache, uint32_t i) {
    struct prefix_entry *entry = &cache->entries[i];
    CHECK(entry->live && entry->first_child == ENTRY_NONE);
    if (entry->n_users == 0) idle_unlink(cache, i);
    if (entry->previous_sibling != ENTRY_NONE)
        cache->entries[entry->previous_sibling].next_sibling = entry->next_sibling;
    else if (entry->parent != ENTRY_NONE)
        cache->entries[entry->parent].first_child = entry->next_sibling;
    if (entry->next_sibling != ENTRY_NONE) cache->entries[entry->next_sibling].previous_sibling = entry->previous_sibling;
    uint32_t *link = &cache->buckets[entry->hash.low & (cache->n_buckets - 1)];
    while (*link != i) link = &cache->entries[*link].next_in_bucket;
    *link = entry->next_in_bucket;
    entry->live = false;
    entry->next_in_bucket = cache->free_entry;
    cache->free_entry = i;
    cache->n_entries--;
}

/* The blocks of entries that were removed, children before their parents. Lane by lane: runs that follow each other often have blocks that do. */
static void release(struct prefix_cache *cache, const uint32_t *removed, uint32_t n) {
    for (uint32_t lane = 0; lane < cache->n_lanes; lane++) {
        for (uint32_t i = 0; i < n; i++) cache->released[i] = prefix_entry_ids(cache, removed[n - 1 - i])[lane];
        block_pool_uncache_run(cache->pool, cache->released, n);
    }
}

bool prefix_cache_evict(struct prefix_cache *cache) {
    uint32_t i = cache->oldest;
    if (i == ENTRY_NONE) return false;
    remove_leaf(cache, i);
    release(cache, &i, 1);
    return true;
}

void prefix_cache_remove(struct prefix_cache *cache, uint32_t top) {
    CHECK(cache->entries[top].live);
    uint32_t n = 0;
    for (uint32_t i = top;; i = cache->entries[i].parent) { /* down to a leaf, away with it, on from its parent: no stack whatever the depth */
        while (cache->entries[i].first_child != ENTRY_NONE) i = cache->entries[i].first_child;
        remove_leaf(cache, i);
        cache->removed[n++] = i;
        if (i == top) break;
    }
    release(cache, cache->removed, n);
}

void prefix_cache_clear_idle(struct prefix_cache *cache) {
    while (prefix_cache_evict(cache)) {}
}

void prefix_cache_check(const struct prefix_cache *cache, const uint32_t *users) {
    uint32_t live = 0, idle = 0, held = 0;
    for (uint32_t i = 0; i < cache->capacity; i++) {
        const struct prefix_entry *entry = &cache->entries[i];
        if (!entry->live) {
            CHECK(users[i] == 0);
            continue;
        }
        live++;
        idle += entry->n_users == 0;
        CHECK(entry->n_users == users[i]);
        CHECK(entry->parent == ENTRY_NONE || (cache->entries[entry->parent].live && cache->entries[entry->parent].n_users >= entry->n_users));
        struct prefix_hash hash = hash_of(cache, entry->scope, entry->parent, entry->tokens);
        CHECK(hash.low == entry->hash.low && hash.high == entry->hash.high);
        for (uint32_t lane = 0; lane < cache->n_lanes; lane++)
            CHECK(cache->pool->cached[prefix_entry_ids(cache, i)[lane]] && cache->entry_of[prefix_entry_ids(cache, i)[lane]] == i);
    }
    for (uint32_t id = 0; id < cache->pool->n_blocks; id++) held += cache->pool->cached[id];
    CHECK(live == cache->n_entries && idle == cache->n_idle && held == live * cache->n_lanes);
    uint32_t walked = 0;
    for (uint32_t i = cache->oldest; i != ENTRY_NONE; i = cache->entries[i].newer, walked++)
        CHECK(cache->entries[i].live && cache->entries[i].n_users == 0);
    CHECK(walked == idle);
}
