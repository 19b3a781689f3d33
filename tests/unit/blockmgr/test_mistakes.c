/* What no caller may do to a pool stops the process, whatever the block is: of most, calls look at nothing but two bits. And that blocks of which more is known come back among those. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/random.h"
#include "blockmgr/block_pool.h"
#include "tests/support/stops.h"

enum { N_BLOCKS = 10, EXTENT = 4 };

/* Blocks 0..3 have one owner, 4 two, 5 one and the cache, 6 the cache alone; 7..9 are free, 8 and 9 in an extent that is cut short. */
static void fill(struct block_pool *pool) {
    uint32_t ids[7];
    block_pool_init(pool, N_BLOCKS, EXTENT);
    block_pool_take_run(pool, BLOCK_NONE, 7, ids);
    block_pool_share(pool, 4);
    block_pool_cache(pool, 5);
    block_pool_cache(pool, 6);
    block_pool_give(pool, 6);
    const uint32_t owners[N_BLOCKS] = {1, 1, 1, 1, 2, 1};
    block_pool_check(pool, owners);
}

static void give_free(struct block_pool *pool) { block_pool_give(pool, 7); }
static void give_twice(struct block_pool *pool) {
    block_pool_give(pool, 0);
    block_pool_give(pool, 0);
}
static void give_shared_thrice(struct block_pool *pool) {
    for (uint32_t i = 0; i < 3; i++) block_pool_give(pool, 4);
}
static void give_cached_twice(struct block_pool *pool) {
    block_pool_give(pool, 5);
    block_pool_give(pool, 5);
}
static void give_what_only_the_cache_holds(struct block_pool *pool) { block_pool_give(pool, 6); }
static void give_past_the_end(struct block_pool *pool) { block_pool_give(pool, N_BLOCKS); }
static void give_run_with_a_free_one(struct block_pool *pool) {
    block_pool_give(pool, 2);
    block_pool_give_run(pool, (const uint32_t[]){0, 1, 2, 3}, 4);
}
static void give_run_twice(struct block_pool *pool) { block_pool_give_run(pool, (const uint32_t[]){0, 1, 0, 1}, 4); }
static void give_run_of_all_kinds(struct block_pool *pool) { block_pool_give_run(pool, (const uint32_t[]){4, 5, 6}, 3); }
static void give_run_past_the_end(struct block_pool *pool) { block_pool_give_run(pool, (const uint32_t[]){9, 10}, 2); }
static void share_free(struct block_pool *pool) { block_pool_share(pool, 8); }
static void share_past_the_end(struct block_pool *pool) { block_pool_share(pool, N_BLOCKS); }
static void cache_free(struct block_pool *pool) { block_pool_cache(pool, 9); }
static void cache_twice(struct block_pool *pool) { block_pool_cache(pool, 5); }
static void uncache_run_with_one_that_is_not_cached(struct block_pool *pool) { block_pool_uncache_run(pool, (const uint32_t[]){5, 6, 7}, 3); }
static void uncache_run_twice(struct block_pool *pool) { block_pool_uncache_run(pool, (const uint32_t[]){5, 5}, 2); }
static void uncache_run_past_the_end(struct block_pool *pool) {
    uint32_t ids[3];
    block_pool_take_run(pool, BLOCK_NONE, 3, ids);
    block_pool_cache(pool, 9);
    block_pool_uncache_run(pool, (const uint32_t[]){9, 10}, 2);
}
static void uncache_what_is_not_cached(struct block_pool *pool) { block_pool_uncache(pool, 4); }
static void take_from_none(struct block_pool *pool) {
    for (uint32_t i = 0; i < 4; i++) (void)block_pool_take(pool, BLOCK_NONE); /* three are free */
}

typedef void mistake(struct block_pool *pool);

static void make(const void *context) {
    mistake *const *made = context;
    struct block_pool pool;
    fill(&pool);
    if (*made) (*made)(&pool);
}

static void test_mistakes_are_found(void **state) {
    (void)state;
    static const struct {
        const char *name;
        mistake *made;
    } mistakes[] = {
        {"give free", give_free},
        {"give twice", give_twice},
        {"give shared thrice", give_shared_thrice},
        {"give cached twice", give_cached_twice},
        {"give what only the cache holds", give_what_only_the_cache_holds},
        {"give past the end", give_past_the_end},
        {"give run with a free one", give_run_with_a_free_one},
        {"give run twice", give_run_twice},
        {"give run of all kinds", give_run_of_all_kinds},
        {"give run past the end", give_run_past_the_end},
        {"share free", share_free},
        {"share past the end", share_past_the_end},
        {"cache free", cache_free},
        {"cache twice", cache_twice},
        {"uncache what is not cached", uncache_what_is_not_cached},
        {"uncache run with one that is not cached", uncache_run_with_one_that_is_not_cached},
        {"uncache run twice", uncache_run_twice},
        {"uncache run past the end", uncache_run_past_the_end},
        {"take from none", take_from_none},
    };
    mistake *const none = NULL;
    assert_false(stops(make, &none));
    for (size_t i = 0; i < sizeof mistakes / sizeof *mistakes; i++)
        if (!stops(make, &mistakes[i].made)) fail_msg("not found: %s", mistakes[i].name);
}

/* A block that was apart, whatever came last, is like any other once it is free or one owner's again. */
static void test_apart_and_back(void **state) {
    (void)state;
    struct block_pool pool;
    fill(&pool);
    block_pool_give(&pool, 4);    /* shared to one owner's */
    block_pool_uncache(&pool, 5); /* cached to one owner's */
    block_pool_uncache(&pool, 6); /* cached to free */
    const uint32_t alone[N_BLOCKS] = {1, 1, 1, 1, 1, 1};
    block_pool_check(&pool, alone);
    assert_int_equal(block_pool_take(&pool, 5), 6);
    block_pool_cache(&pool, 6);
    block_pool_give(&pool, 6);
    block_pool_share(&pool, 6); /* a hit: from the cache's alone to one owner's, and the cache's */
    block_pool_uncache(&pool, 6);
    block_pool_give_run(&pool, (const uint32_t[]){0, 1, 2, 3, 4, 5, 6}, 7);
    const uint32_t none[N_BLOCKS] = {0};
    block_pool_check(&pool, none);
    assert_int_equal(pool.n_free, N_BLOCKS);
    block_pool_done(&pool);
}

/* Many at once are as many one by one, whoever owns them and in whatever order. */
static void test_uncache_run(void **state) {
    (void)state;
    enum { N = 61 };
    for (uint64_t seed = 1; seed <= 200; seed++) {
        struct random random = {seed};
        struct block_pool pool;
        uint32_t ids[N], owners[N], n_listed = 0, n_free = 0;
        block_pool_init(&pool, N, 1 + random_below(&random, 9));
        block_pool_take_run(&pool, BLOCK_NONE, N, ids);
        for (uint32_t id = 0; id < N; id++) {
            bool listed = random_below(&random, 8) > 0; /* the others stay cached */
            owners[id] = random_below(&random, 6) ? 1 : random_below(&random, 3);
            block_pool_cache(&pool, id);
            if (owners[id] == 0) block_pool_give(&pool, id);
            if (owners[id] == 2) block_pool_share(&pool, id);
            if (listed) ids[n_listed++] = id;
            n_free += listed && owners[id] == 0;
        }
        for (uint32_t swaps = random_below(&random, 4); swaps > 0 && n_listed > 0; swaps--) {
            uint32_t a = random_below(&random, n_listed), b = random_below(&random, n_listed), id = ids[a];
            ids[a] = ids[b];
            ids[b] = id;
        }
        block_pool_uncache_run(&pool, ids, n_listed);
        block_pool_check(&pool, owners);
        assert_int_equal(pool.n_free, n_free);
        for (uint32_t i = 0; i < n_listed; i++) assert_int_equal(pool.cached[ids[i]], 0);
        block_pool_done(&pool);
    }
}

/* Of two pools to which the same is done, one asks for the next block first: both hand out the same. */
static void test_take_next(void **state) {
    (void)state;
    enum { N = 150, LANES = 9 };
    uint32_t n_next = 0;
    for (uint64_t seed = 1; seed <= 200; seed++) {
        struct random random = {seed};
        struct block_pool pool, other;
        uint32_t n_blocks = 1 + random_below(&random, N),
                 extent = random_below(&random, 3) ? 1u << random_below(&random, 7) : 1 + random_below(&random, 64);
        uint32_t owners[N] = {0}, last[LANES];
        block_pool_init(&pool, n_blocks, extent);
        block_pool_init(&other, n_blocks, extent);
        for (uint32_t lane = 0; lane < LANES; lane++) last[lane] = BLOCK_NONE;
        for (uint32_t step = 0; step < 600; step++) {
            uint32_t lane = random_below(&random, LANES),
                     near = random_below(&random, 10) ? last[lane] : random_below(&random, n_blocks); /* free, maybe */
            if (pool.n_free == 0 || random_below(&random, 4) == 0) {
                uint32_t id = random_below(&random, n_blocks);
                if (owners[id] == 0) continue;
                owners[id] = 0;
                block_pool_give(&pool, id);
                block_pool_give(&other, id);
                continue;
            }
            bool next = block_pool_take_next(&pool, near);
            last[lane] = next ? near + 1 : block_pool_take(&pool, near);
            assert_int_equal(last[lane], block_pool_take(&other, near));
            owners[last[lane]] = 1;
            n_next += next;
            block_pool_check(&pool, owners);
        }
        block_pool_done(&pool);
        block_pool_done(&other);
    }
    assert_true(n_next > 1000);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_mistakes_are_found), cmocka_unit_test(test_apart_and_back),
                                       cmocka_unit_test(test_uncache_run), cmocka_unit_test(test_take_next)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
