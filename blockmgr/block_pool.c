/* See block_pool.h. */
#include "blockmgr/block_pool.h"

#include <stdlib.h>

#include "base/check.h"

enum {
    WORD = 64,
    WORD_SHIFT = 6,
    IDS_AHEAD = 24, /* of a list: what is known of them lies anywhere, and is asked for so far ahead */
};

/* ---- sets of extents ---- */

static uint64_t words_for(uint64_t n_bits) { return n_bits / WORD + (n_bits % WORD != 0); }

static uint64_t extent_set_words(uint32_t n_extents) {
    uint64_t sum = 0, words = n_extents;
    do sum += words = words_for(words);
    while (words > 1);
    return sum;
}

static void extent_set_init(struct extent_set *set, uint32_t n_extents) {
    uint64_t words = n_extents, *at = check_calloc(extent_set_words(n_extents), sizeof *at);
    set->n_levels = 0;
    do {
        set->levels[set->n_levels++] = at;
        words = words_for(words);
        at += words;
    } while (words > 1);
}

static void extent_set_done(struct extent_set *set) { free(set->levels[0]); }

static bool extent_set_has(const struct extent_set *set, uint32_t extent) { return set->levels[0][extent / WORD] >> extent % WORD & 1; }

static void extent_set_add(struct extent_set *set, uint32_t extent) {
    for (uint32_t level = 0; level < set->n_levels; level++, extent /= WORD) {
        uint64_t *word = &set->levels[level][extent / WORD], before = *word;
        *word |= 1ull << extent % WORD;
        if (before != 0) return;
    }
}

static void extent_set_remove(struct extent_set *set, uint32_t extent) {
    for (uint32_t level = 0; level < set->n_levels; level++, extent /= WORD) {
        uint64_t *word = &set->levels[level][extent / WORD];
        *word &= ~(1ull << extent % WORD);
        if (*word != 0) return;
    }
}

static bool extent_set_is_empty(const struct extent_set *set) { return set->levels[set->n_levels - 1][0] == 0; }

/* Of a set that is not empty. */
static uint32_t extent_set_least(const struct extent_set *set) {
    uint32_t at = 0;
    for (uint32_t level = set->n_levels; level-- > 0;) at = at << WORD_SHIFT | (uint32_t)__builtin_ctzll(set->levels[level][at]);
    return at;
}

static void extent_set_check(const struct extent_set *set, uint32_t n_extents) {
    uint64_t n_bits = n_extents;
    for (uint32_t level = 0; level < set->n_levels; level++) {
        uint64_t words = words_for(n_bits);
        if (n_bits % WORD != 0) CHECK(set->levels[level][words - 1] >> n_bits % WORD == 0);
        for (uint64_t i = 0; i < words && level + 1 < set->n_levels; i++)
            CHECK((set->levels[level][i] != 0) == (set->levels[level + 1][i / WORD] >> i % WORD & 1));
        n_bits = words;
    }
}

/* ---- extents ---- */

/* Where a block lies. */
struct place {
    uint32_t extent, index; /* in the extent */
};

static struct place place_of(const struct block_pool *pool, uint32_t id) {
    uint32_t blocks = pool->extent_blocks;
    if (blocks == 1u << pool->stride_shift)
        return (struct place){id >> pool->stride_shift, id & (blocks - 1)}; /* a division costs as much as the rest */
    return (struct place){id / blocks, id % blocks};
}

/* `count` bits, 1 to 64. */
static uint64_t ones(uint32_t count) { return UINT64_MAX >> (WORD - count); }

static uint32_t blocks_of(const struct block_pool *pool, uint32_t extent) {
    return extent + 1 < pool->n_extents ? pool->extent_blocks : pool->n_blocks - extent * pool->extent_blocks;
}

static uint64_t full_mask(const struct block_pool *pool, uint32_t extent) { return ones(blocks_of(pool, extent)); }

/* Of `free` or `apart`. */
static uint64_t *word_of(const struct block_pool *pool, uint64_t *words, uint32_t extent, uint32_t *shift) {
    uint64_t bit = (uint64_t)extent << pool->stride_shift;
    *shift = bit % WORD;
    return &words[bit / WORD];
}

/* Bits from the block on: its own, those of the rest of its extent, and others above. */
static uint64_t free_from(const struct block_pool *pool, struct place place) {
    uint32_t shift;
    const uint64_t *word = word_of(pool, pool->free, place.extent, &shift);
    return *word >> shift >> place.index;
}

static uint64_t free_mask(const struct block_pool *pool, uint32_t extent) {
    return free_from(pool, (struct place){extent, 0}) & full_mask(pool, extent);
}

/* `count` blocks from there on are free now, or no longer; all of them were not, or were (CHECKed). */
__attribute__((always_inline)) static inline void mark(struct block_pool *pool, struct place place, uint32_t count, bool free) {
    uint32_t shift;
    uint64_t *word = word_of(pool, pool->free, place.extent, &shift), full = full_mask(pool, place.extent) << shift,
             bits = ones(count) << place.index << shift, before = *word & full, after = before ^ bits;
    CHECK((before & bits) == (free ? 0 : bits));
    *word ^= bits;
    if (free) {
        pool->n_free += count;
        if (before == 0) extent_set_add(&pool->open, place.extent);
        if (after == full) extent_set_add(&pool->whole, place.extent);
    } else {
        pool->n_free -= count;
        if (before == full) extent_set_remove(&pool->whole, place.extent);
        if (after == 0) extent_set_remove(&pool->open, place.extent);
    }
}

static uint32_t extents_for(uint32_t n_blocks, uint32_t extent_blocks) { return n_blocks / extent_blocks + (n_blocks % extent_blocks != 0); }

static uint32_t stride_shift_for(uint32_t extent_blocks) {
    uint32_t shift = 0;
    while (1u << shift < extent_blocks) shift++;
    return shift;
}

static uint64_t free_words(uint32_t n_extents, uint32_t stride_shift) { return words_for((uint64_t)n_extents << stride_shift); }

/* ---- the pool ---- */

uint64_t block_pool_bytes(uint32_t n_blocks, uint32_t extent_blocks) {
    uint32_t n_extents = extents_for(n_blocks, extent_blocks);
    return (uint64_t)n_blocks * (sizeof(uint32_t) + sizeof(uint8_t)) +
           2 * (free_words(n_extents, stride_shift_for(extent_blocks)) + extent_set_words(n_extents)) * sizeof(uint64_t);
}

void block_pool_init(struct block_pool *pool, uint32_t n_blocks, uint32_t extent_blocks) {
    CHECK(n_blocks > 0 && n_blocks < BLOCK_NONE && extent_blocks >= 1 && extent_blocks <= EXTENT_BLOCKS_MAX);
    *pool = (struct block_pool){.n_blocks = n_blocks,
                                .extent_blocks = extent_blocks,
                                .n_extents = extents_for(n_blocks, extent_blocks),
                                .stride_shift = stride_shift_for(extent_blocks)};
    pool->owners = check_calloc(n_blocks, sizeof *pool->owners);
    pool->cached = check_calloc(n_blocks, sizeof *pool->cached);
    pool->free = check_calloc(free_words(pool->n_extents, pool->stride_shift), sizeof *pool->free);
    pool->apart = check_calloc(free_words(pool->n_extents, pool->stride_shift), sizeof *pool->apart);
    extent_set_init(&pool->whole, pool->n_extents);
    extent_set_init(&pool->open, pool->n_extents);
    for (uint32_t extent = 0; extent < pool->n_extents; extent++) mark(pool, (struct place){extent, 0}, blocks_of(pool, extent), true);
    for (uint32_t id = 0; id < n_blocks; id++) pool->owners[id] = 1;
}

void block_pool_done(struct block_pool *pool) {
    free(pool->owners);
    free(pool->cached);
    free(pool->free);
    free(pool->apart);
    extent_set_done(&pool->whole);
    extent_set_done(&pool->open);
}

static bool is_free(const struct block_pool *pool, uint32_t id) { return free_from(pool, place_of(pool, id)) & 1; }

static void set_apart(struct block_pool *pool, struct place place, uint32_t count, bool apart) {
    uint32_t shift;
    uint64_t *word = word_of(pool, pool->apart, place.extent, &shift), bits = ones(count) << place.index << shift;
    *word = apart ? *word | bits : *word & ~bits;
}

/* Of `count` blocks from there on, those that are. */
static uint64_t apart_from(const struct block_pool *pool, struct place place, uint32_t count) {
    uint32_t shift;
    const uint64_t *word = word_of(pool, pool->apart, place.extent, &shift);
    return *word >> shift >> place.index & ones(count);
}

/* Where the next block comes from: what follows `near` in its extent, else a whole extent, else any. */
__attribute__((always_inline)) static inline struct place choose_place(const struct block_pool *pool, uint32_t near) {
    if (near != BLOCK_NONE) {
        struct place place = place_of(pool, near);
        if (++place.index < pool->extent_blocks && free_from(pool, place) & 1) return place;
    }
    const struct extent_set *set = extent_set_is_empty(&pool->whole) ? &pool->open : &pool->whole;
    CHECK(!extent_set_is_empty(set));
    uint32_t extent = extent_set_least(set);
    return (struct place){extent, (uint32_t)__builtin_ctzll(free_mask(pool, extent))};
}

void block_pool_close(struct block_pool *pool, uint32_t extent) { extent_set_remove(&pool->open, extent); }

uint32_t block_pool_take(struct block_pool *pool, uint32_t near) {
    struct place place = choose_place(pool, near);
    mark(pool, place, 1, false);
    return place.extent * pool->extent_blocks + place.index;
}

void block_pool_take_run(struct block_pool *pool, uint32_t near, uint32_t count, uint32_t *ids) {
    while (count > 0) {
        struct place place = choose_place(pool, near);
        uint32_t most = pool->extent_blocks - place.index, n = 1, id = place.extent * pool->extent_blocks + place.index;
        if (most > count) most = count;
        for (uint64_t next = free_from(pool, place) >> 1; n < most && next & 1; next >>= 1) n++;
        mark(pool, place, n, false);
        for (uint32_t i = 0; i < n; i++) ids[i] = id + i;
        near = id + n - 1;
        ids += n;
        count -= n;
    }
}

void block_pool_share(struct block_pool *pool, uint32_t id) {
    CHECK(id < pool->n_blocks && !is_free(pool, id));
    pool->n_cached -= pool->owners[id] == 0;
    if (pool->owners[id]++ != 1) return;
    pool->n_shared++;
    set_apart(pool, place_of(pool, id), 1, true);
}

static inline void give_apart(struct block_pool *pool, uint32_t id) {
    CHECK(pool->owners[id] > 0);
    uint32_t left = --pool->owners[id];
    pool->n_cached += left == 0;
    if (left != 1) return;
    pool->n_shared--;
    set_apart(pool, place_of(pool, id), 1, pool->cached[id]);
}

void block_pool_give(struct block_pool *pool, uint32_t id) {
    CHECK(id < pool->n_blocks);
    struct place place = place_of(pool, id);
    if (apart_from(pool, place, 1))
        give_apart(pool, id);
    else
        mark(pool, place, 1, true);
}

/* So many ids from ids[0] on follow each other in one extent. */
static uint32_t run_length(const struct block_pool *pool, struct place place, const uint32_t *ids, uint32_t count) {
    uint32_t most = pool->extent_blocks - place.index, n = 1;
    if (most > count) most = count;
    while (n < most && ids[n] == ids[0] + n) n++;
    return n;
}

void block_pool_give_run(struct block_pool *pool, const uint32_t *ids, uint32_t count) {
    for (uint32_t i = 0, n; i < count; i += n) {
        uint32_t id = ids[i];
        CHECK(id < pool->n_blocks);
        struct place place = place_of(pool, id);
        n = run_length(pool, place, ids + i, count - i);
        CHECK(n <= pool->n_blocks - id);
        uint64_t apart = apart_from(pool, place, n);
        if (apart & 1) {
            block_pool_foresee(pool, ids[i + IDS_AHEAD < count ? i + IDS_AHEAD : count - 1]);
            if (apart != ones(n)) n = (uint32_t)__builtin_ctzll(~apart); /* the others in the next round */
            for (uint32_t b = id; b < id + n; b++) give_apart(pool, b);
        } else {
            if (apart != 0) n = (uint32_t)__builtin_ctzll(apart);
            mark(pool, place, n, true);
        }
    }
}

void block_pool_cache(struct block_pool *pool, uint32_t id) {
    CHECK(id < pool->n_blocks && !is_free(pool, id) && !pool->cached[id]);
    pool->cached[id] = 1;
    set_apart(pool, place_of(pool, id), 1, true);
}

void block_pool_uncache(struct block_pool *pool, uint32_t id) {
    CHECK(id < pool->n_blocks && pool->cached[id]);
    pool->cached[id] = 0;
    if (pool->owners[id] > 1) return;
    struct place place = place_of(pool, id);
    set_apart(pool, place, 1, false);
    if (pool->owners[id] == 1) return;
    pool->owners[id] = 1;
    pool->n_cached--;
    mark(pool, place, 1, true);
}

void block_pool_uncache_run(struct block_pool *pool, const uint32_t *ids, uint32_t count) {
    for (uint32_t i = 0, n; i < count; i += n) {
        uint32_t id = ids[i], ahead = ids[i + IDS_AHEAD < count ? i + IDS_AHEAD : count - 1];
        __builtin_prefetch(&pool->owners[ahead]);
        __builtin_prefetch(&pool->cached[ahead], 1);
        CHECK(id < pool->n_blocks);
        struct place place = place_of(pool, id);
        n = run_length(pool, place, ids + i, count - i);
        CHECK(n <= pool->n_blocks - id);
        bool alone = true; /* each is one sequence's beside the cache */
        for (uint32_t b = id; b < id + n; b++) alone = alone && pool->owners[b] == 1 && pool->cached[b];
        if (alone) {
            set_apart(pool, place, n, false);
            for (uint32_t b = id; b < id + n; b++) pool->cached[b] = 0;
        } else {
            for (uint32_t b = id; b < id + n; b++) block_pool_uncache(pool, b);
        }
    }
}

void block_pool_check(const struct block_pool *pool, const uint32_t *owners) {
    uint32_t n_free = 0, n_cached = 0, n_shared = 0, n_apart = 0, n_bits[2] = {0};
    for (uint32_t id = 0; id < pool->n_blocks; id++) {
        CHECK(pool->owners[id] == (is_free(pool, id) ? 1 : owners[id]));
        CHECK(is_free(pool, id) == (owners[id] == 0 && !pool->cached[id]));
        bool apart = pool->owners[id] > 1 || pool->cached[id];
        CHECK(apart_from(pool, place_of(pool, id), 1) == apart);
        n_free += is_free(pool, id);
        n_cached += pool->owners[id] == 0 && pool->cached[id];
        n_shared += pool->owners[id] > 1;
        n_apart += apart;
    }
    CHECK(n_free == pool->n_free && n_cached == pool->n_cached && n_shared == pool->n_shared);
    for (uint64_t i = 0; i < free_words(pool->n_extents, pool->stride_shift); i++) {
        n_bits[0] += (uint32_t)__builtin_popcountll(pool->free[i]);
        n_bits[1] += (uint32_t)__builtin_popcountll(pool->apart[i]);
    }
    CHECK(n_bits[0] == n_free && n_bits[1] == n_apart); /* no bit is set beside the blocks' */
    for (uint32_t extent = 0; extent < pool->n_extents; extent++) {
        uint64_t mask = free_mask(pool, extent);
        CHECK(extent_set_has(&pool->whole, extent) == (mask == full_mask(pool, extent)));
        CHECK(extent_set_has(&pool->open, extent) == (mask != 0));
    }
    extent_set_check(&pool->whole, pool->n_extents);
    extent_set_check(&pool->open, pool->n_extents);
}
