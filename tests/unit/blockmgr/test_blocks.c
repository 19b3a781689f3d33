/* Pool, tables and prefix cache against slow, obvious oracles: a bitmap with owner counts, lists of ids, a list of remembered prefixes. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/check.h"
#include "base/random.h"
#include "blockmgr/block_pool.h"
#include "blockmgr/block_table.h"
#include "blockmgr/prefix_cache.h"

#define POOL_MAX 96

struct oracle {
    uint32_t owners[POOL_MAX];
    bool cached[POOL_MAX];
};

static void compare_pool(const struct block_pool *pool, const struct oracle *oracle) {
    uint32_t n_free = 0, n_cached = 0, n_shared = 0;
    for (uint32_t id = 0; id < pool->n_blocks; id++) {
        n_free += oracle->owners[id] == 0 && !oracle->cached[id];
        n_cached += oracle->owners[id] == 0 && oracle->cached[id];
        n_shared += oracle->owners[id] > 1;
    }
    assert_int_equal(pool->n_shared, n_shared);
    assert_int_equal(pool->n_free, n_free);
    assert_int_equal(pool->n_cached, n_cached);
    assert_int_equal(block_pool_used(pool), pool->n_blocks - n_free - n_cached);
    block_pool_check(pool, oracle->owners);
}

static bool is_free(const struct oracle *oracle, uint32_t id) { return oracle->owners[id] == 0 && !oracle->cached[id]; }

/* The block after `near` in its extent, else the first of the first whole extent, else the first free one. */
static uint32_t oracle_take(const struct block_pool *pool, struct oracle *oracle, uint32_t near) {
    uint32_t n = pool->n_blocks, extent = pool->extent_blocks, chosen = BLOCK_NONE;
    if (near != BLOCK_NONE && near + 1 < n && (near + 1) % extent != 0 && is_free(oracle, near + 1)) chosen = near + 1;
    for (uint32_t first = 0; first < n && chosen == BLOCK_NONE; first += extent) {
        uint32_t n_free = 0, end = first + extent < n ? first + extent : n;
        for (uint32_t id = first; id < end; id++) n_free += is_free(oracle, id);
        if (n_free == end - first) chosen = first;
    }
    for (uint32_t id = 0; id < n && chosen == BLOCK_NONE; id++)
        if (is_free(oracle, id)) chosen = id;
    oracle->owners[chosen] = 1;
    return chosen;
}

static void take_some(struct random *random, struct block_pool *pool, struct oracle *oracle) {
    uint32_t ids[POOL_MAX], near = random_below(random, 2) ? random_below(random, pool->n_blocks) : BLOCK_NONE,
                            count = random_below(random, (pool->n_free < 12 ? pool->n_free : 12) + 1);
    block_pool_take_run(pool, near, count, ids);
    for (uint32_t i = 0; i < count; i++) {
        assert_int_equal(ids[i], oracle_take(pool, oracle, near));
        near = ids[i];
    }
}

/* Ids in pieces of runs, as lanes have them: whatever has an owner. One may be named as often as it has owners. */
static void give_some(struct random *random, struct block_pool *pool, struct oracle *oracle) {
    uint32_t ids[4 * POOL_MAX], count = 0;
    for (uint32_t piece = random_below(random, 4); piece > 0; piece--) {
        uint32_t id = random_below(random, pool->n_blocks), most = random_below(random, 20);
        for (uint32_t i = 0; i < most && id < pool->n_blocks && oracle->owners[id] > 0; i++, id++) {
            oracle->owners[id]--;
            ids[count++] = id;
        }
    }
    block_pool_give_run(pool, ids, count);
}

static void test_pool_against_bitmap(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 300; seed++) {
        struct random random = {seed};
        struct block_pool pool;
        struct oracle oracle = {0};
        uint32_t n_blocks = 1 + random_below(&random, POOL_MAX);
        block_pool_init(&pool, n_blocks, 1 + random_below(&random, random_below(&random, 2) ? 8 : EXTENT_BLOCKS_MAX));
        for (uint32_t step = 0; step < 400; step++) {
            uint32_t id = random_below(&random, n_blocks), near = random_below(&random, 2) ? id : BLOCK_NONE;
            switch (random_below(&random, 7)) {
            case 0:
                if (pool.n_free == 0) break;
                assert_int_equal(block_pool_take(&pool, near), oracle_take(&pool, &oracle, near));
                break;
            case 1:
                if (oracle.owners[id] == 0 && !oracle.cached[id]) break;
                block_pool_share(&pool, id);
                oracle.owners[id]++;
                break;
            case 2:
                if (oracle.owners[id] == 0) break;
                block_pool_give(&pool, id);
                oracle.owners[id]--;
                break;
            case 3:
                if (oracle.owners[id] == 0 || oracle.cached[id]) break;
                block_pool_cache(&pool, id);
                oracle.cached[id] = true;
                break;
            case 4: take_some(&random, &pool, &oracle); break;
            case 5: give_some(&random, &pool, &oracle); break;
            default:
                if (!oracle.cached[id]) break;
                block_pool_uncache(&pool, id);
                oracle.cached[id] = false;
            }
            compare_pool(&pool, &oracle);
        }
        block_pool_done(&pool);
    }
}

/* So many extents that the sets have more than two levels: what is free is found at the far end, and where it is the only one. */
static void test_pool_finds_the_only_free_block(void **state) {
    (void)state;
    static const uint32_t sizes[] = {63, 64, 65, 4096, 4097, 300000};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (uint32_t extent = 1; extent <= 3; extent++) {
            struct block_pool pool;
            uint32_t n = sizes[i], *ids = check_calloc(n, sizeof *ids), *owners = check_calloc(n, sizeof *owners);
            block_pool_init(&pool, n, extent);
            block_pool_take_run(&pool, BLOCK_NONE, n, ids);
            for (uint32_t id = 0; id < n; id++) owners[id] = 1;
            block_pool_check(&pool, owners);
            assert_int_equal(pool.n_free, 0);
            const uint32_t probes[] = {0, n / 2, n - 1};
            for (uint32_t p = 0; p < 3; p++) {
                block_pool_give(&pool, probes[p]);
                assert_int_equal(block_pool_take(&pool, BLOCK_NONE), probes[p]);
            }
            block_pool_give_run(&pool, ids, n);
            memset(owners, 0, n * sizeof *owners);
            block_pool_check(&pool, owners);
            assert_int_equal(pool.n_free, n);
            block_pool_done(&pool);
            free(ids);
            free(owners);
        }
}

/* The next id, then a free extent, then any block. */
static void test_pool_prefers_runs(void **state) {
    (void)state;
    struct block_pool pool;
    block_pool_init(&pool, 12, 4);
    uint32_t a = block_pool_take(&pool, BLOCK_NONE), b = block_pool_take(&pool, BLOCK_NONE), c = block_pool_take(&pool, BLOCK_NONE);
    assert_true(a % 4 == 0 && b % 4 == 0 && c % 4 == 0 && a != b && b != c && a != c); /* each opens an extent of its own */
    for (uint32_t i = 1; i < 4; i++) assert_int_equal(block_pool_take(&pool, a + i - 1), a + i);
    uint32_t stolen = block_pool_take(&pool, a + 3); /* its extent is full, and no other is whole: the soft reservation of b or c gives way */
    assert_true(stolen == b + 1 || stolen == c + 1);
    uint32_t other = stolen == b + 1 ? b : c;
    assert_int_not_equal(block_pool_take(&pool, other), other); /* its next id is gone: any other */
    while (pool.n_free > 0) (void)block_pool_take(&pool, BLOCK_NONE);
    assert_int_equal(block_pool_used(&pool), 12);
    block_pool_done(&pool);
}

/* At the end of an extent the run is over: a whole extent comes before the neighbour that happens to be free. */
static void test_pool_opens_whole_extents(void **state) {
    (void)state;
    struct block_pool pool;
    block_pool_init(&pool, 12, 4);
    bool taken[12] = {false};
    for (uint32_t i = 0; i < 12; i++) taken[block_pool_take(&pool, BLOCK_NONE)] = true;
    for (uint32_t i = 0; i < 12; i++) assert_true(taken[i]);
    block_pool_give(&pool, 4); /* alone in its extent */
    for (uint32_t id = 8; id < 12; id++) block_pool_give(&pool, id);
    assert_int_equal(block_pool_take(&pool, 3), 8);
    block_pool_done(&pool);
}

#define TABLES 4
#define LANES 3
#define LANE_BLOCKS 6

struct lane_oracle {
    uint32_t ids[LANE_BLOCKS], n_blocks, tokens;
};

static void compare_tables(const struct block_tables *tables, struct lane_oracle oracle[TABLES][LANES]) {
    uint32_t owners[POOL_MAX] = {0};
    for (uint32_t table = 0; table < TABLES; table++) {
        uint64_t total = 0;
        for (uint32_t lane = 0; lane < LANES; lane++) {
            const struct lane_oracle *it = &oracle[table][lane];
            assert_int_equal(table_lane_tokens(tables, table)[lane], it->tokens);
            assert_int_equal(table_lane_blocks(tables, table)[lane], it->n_blocks);
            assert_ptr_equal(tables->ids + table_lane_first(tables, table)[lane], table_lane_ids(tables, table, lane));
            for (uint32_t i = 0; i < it->n_blocks; i++) {
                assert_int_equal(table_lane_ids(tables, table, lane)[i], it->ids[i]);
                owners[it->ids[i]]++;
            }
            total += it->n_blocks;
        }
        assert_int_equal(table_blocks(tables, table), total);
        table_check(tables, table);
    }
    block_pool_check(tables->pool, owners);
}

/* What somebody knows of a table who now and then takes what is new of it. */
struct copy {
    uint32_t changes, n[LANES], ids[LANES][LANE_BLOCKS], tokens[LANES];
};

static void follow(const struct block_tables *tables, uint32_t table, const struct lane_oracle lanes[LANES], struct copy *copy) {
    uint32_t changes = tables->changes[table];
    assert_int_not_equal(changes, 0);
    for (uint32_t lane = 0; lane < LANES; lane++) {
        uint32_t from = changes == copy->changes ? copy->n[lane] : 0, n = lanes[lane].n_blocks;
        assert_true(from <= n); /* what was listed still is */
        memcpy(copy->ids[lane] + from, table_lane_ids(tables, table, lane) + from, (n - from) * sizeof(uint32_t));
        assert_memory_equal(copy->ids[lane], lanes[lane].ids, n * sizeof(uint32_t));
        copy->n[lane] = n;
    }
    for (uint32_t lane = 0; lane < LANES && changes == copy->changes; lane++) /* one number says how long all lanes are */
        assert_int_equal(lanes[lane].tokens - copy->tokens[lane], lanes[0].tokens - copy->tokens[0]);
    for (uint32_t lane = 0; lane < LANES; lane++) copy->tokens[lane] = lanes[lane].tokens;
    copy->changes = changes;
}

static void oracle_append(const struct block_tables *tables, struct lane_oracle lanes[LANES], uint32_t table, uint32_t rows) {
    uint64_t missing = 0, fits = 1;
    uint32_t n_free = tables->pool->n_free;
    for (uint32_t lane = 0; lane < LANES; lane++) {
        uint32_t needed = (lanes[lane].tokens + rows + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
        missing += needed > lanes[lane].n_blocks ? needed - lanes[lane].n_blocks : 0;
        fits &= needed <= LANE_BLOCKS;
    }
    if (!fits) return;
    assert_int_equal(table_missing(tables, table, rows), missing);
    bool taken = table_append((struct block_tables *)tables, table, rows);
    assert_int_equal(taken, missing <= n_free);
    assert_int_equal(tables->pool->n_free, taken ? n_free - missing : n_free); /* all or nothing */
    if (!taken) return;
    table_fill((struct block_tables *)tables, table, rows);
    for (uint32_t lane = 0; lane < LANES; lane++) {
        struct lane_oracle *it = &lanes[lane];
        it->tokens += rows;
        for (; it->n_blocks < (it->tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS; it->n_blocks++)
            it->ids[it->n_blocks] = table_lane_ids(tables, table, lane)[it->n_blocks];
    }
}

static void test_tables_against_lists(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 200; seed++) {
        struct random random = {seed};
        struct block_pool pool;
        struct block_tables tables;
        struct lane_oracle oracle[TABLES][LANES] = {0};
        struct copy copies[TABLES] = {0};
        block_pool_init(&pool, 20 + random_below(&random, 60), 1 + random_below(&random, 8));
        block_tables_init(&tables, &pool, TABLES, LANES, LANE_BLOCKS);
        for (uint32_t step = 0; step < 300; step++) {
            uint32_t table = random_below(&random, TABLES), lane = random_below(&random, LANES);
            struct lane_oracle *it = &oracle[table][lane];
            uint32_t what = random_below(&random, 8), changes = tables.changes[table];
            switch (what) {
            case 0: oracle_append(&tables, oracle[table], table, 1 + random_below(&random, 70)); break;
            case 1: /* as a sequence that decodes */
                for (uint32_t rows = random_below(&random, 40); rows > 0; rows--) oracle_append(&tables, oracle[table], table, 1);
                break;
            case 2: /* lanes may have different lengths */
                it->tokens = random_below(&random, it->tokens + 1);
                it->n_blocks = (it->tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
                table_truncate(&tables, table, lane, it->tokens);
                break;
            case 3: {
                uint32_t full = it->tokens / BLOCK_TOKENS, first = random_below(&random, full + 1), count = random_below(&random, full - first + 1);
                table_drop(&tables, table, lane, first, count);
                memmove(it->ids + first, it->ids + first + count, (it->n_blocks - first - count) * sizeof *it->ids);
                it->n_blocks -= count;
                it->tokens -= count * BLOCK_TOKENS;
                break;
            }
            case 5:
                if (it->n_blocks == LANE_BLOCKS || pool.n_free == 0) break;
                it->ids[it->n_blocks] = table_take(&tables, table, lane);
                it->n_blocks++;
                break;
            case 6:
                it->tokens = random_below(&random, it->n_blocks * BLOCK_TOKENS + 1);
                table_set_tokens(&tables, table, lane, it->tokens);
                break;
            case 4:
                if (it->n_blocks == 0 || pool.n_free == 0) break;
                uint32_t index = random_below(&random, it->n_blocks), old = it->ids[index];
                it->ids[index] = table_replace(&tables, table, lane, index);
                assert_int_not_equal(it->ids[index], old);
                break;
            default:
                if (random_below(&random, 4)) break;
                table_clear(&tables, table);
                memset(oracle[table], 0, sizeof oracle[table]);
            }
            compare_tables(&tables, oracle);
            if (what <= 1 || what == 5) assert_int_equal(tables.changes[table], changes); /* longer at the end */
            if (random_below(&random, 3) == 0) follow(&tables, table, oracle[table], &copies[table]);
        }
        for (uint32_t table = 0; table < TABLES; table++) table_clear(&tables, table);
        assert_int_equal(pool.n_free, pool.n_blocks);
        block_tables_done(&tables);
        block_pool_done(&pool);
    }
}

static void test_share_adds_an_owner(void **state) {
    (void)state;
    struct block_pool pool;
    struct block_tables tables;
    block_pool_init(&pool, 8, 1);
    block_tables_init(&tables, &pool, 2, 1, 4);
    assert_true(table_append(&tables, 0, 40));
    table_fill(&tables, 0, 40);
    uint32_t id = table_lane_ids(&tables, 0, 0)[0];
    table_share(&tables, 1, 0, id);
    table_fill(&tables, 1, BLOCK_TOKENS);
    assert_int_equal(pool.owners[id], 2);
    assert_int_equal(tables.changes[1], 1); /* nothing listed before was touched */
    table_clear(&tables, 0);
    assert_int_equal(tables.changes[0], 2);
    tables.changes[0] = UINT32_MAX;
    assert_true(table_append(&tables, 0, 1));
    table_clear(&tables, 0);
    assert_int_equal(tables.changes[0], 1); /* 0 means unknown */
    assert_int_equal(pool.n_free, 7);       /* the shared one stays */
    table_clear(&tables, 1);
    assert_int_equal(pool.n_free, 8);
    block_tables_done(&tables);
    block_pool_done(&pool);
}

/* A cache over `n` blocks of 2 lanes; runs are told apart by their first token. */
struct cache_fixture {
    struct block_pool pool;
    struct prefix_cache cache;
    uint32_t ids[8][2];
};

static void fixture_init(struct cache_fixture *fixture, uint32_t capacity) {
    block_pool_init(&fixture->pool, 16, 1);
    prefix_cache_init(&fixture->cache, &fixture->pool, 2, capacity, 99);
}

static void fixture_done(struct cache_fixture *fixture) {
    prefix_cache_done(&fixture->cache);
    block_pool_done(&fixture->pool);
}

static uint32_t put(struct cache_fixture *fixture, uint64_t scope, uint32_t parent, int32_t first, uint32_t at) {
    int32_t tokens[BLOCK_TOKENS] = {first};
    for (uint32_t lane = 0; lane < 2; lane++) fixture->ids[at][lane] = block_pool_take(&fixture->pool, BLOCK_NONE);
    return prefix_cache_insert(&fixture->cache, scope, parent, tokens, fixture->ids[at]);
}

static uint32_t find(const struct cache_fixture *fixture, uint64_t scope, uint32_t parent, int32_t first) {
    int32_t tokens[BLOCK_TOKENS] = {first};
    return prefix_cache_find(&fixture->cache, scope, parent, tokens);
}

static void give(struct cache_fixture *fixture, uint32_t at) {
    for (uint32_t lane = 0; lane < 2; lane++) block_pool_give(&fixture->pool, fixture->ids[at][lane]);
}

static void test_cache_finds_chains(void **state) {
    (void)state;
    struct cache_fixture f;
    fixture_init(&f, 8);
    uint32_t a = put(&f, 1, ENTRY_NONE, 10, 0), b = put(&f, 1, a, 20, 1);
    assert_int_equal(find(&f, 1, ENTRY_NONE, 10), a);
    assert_int_equal(find(&f, 1, a, 20), b);
    assert_int_equal(find(&f, 2, ENTRY_NONE, 10), ENTRY_NONE); /* another scope */
    assert_int_equal(find(&f, 1, ENTRY_NONE, 20), ENTRY_NONE); /* same tokens, another history */
    assert_int_equal(find(&f, 1, b, 20), ENTRY_NONE);
    assert_int_equal(find(&f, 1, a, 21), ENTRY_NONE);
    uint32_t other = put(&f, 2, ENTRY_NONE, 10, 2);
    assert_true(other != ENTRY_NONE && other != a);
    assert_int_equal(f.pool.cached[f.ids[0][1]], 1);
    /* Each hash covers its parent's: equal runs at different depths do not share one. */
    uint32_t again = put(&f, 1, b, 10, 3);
    assert_true(f.cache.entries[again].hash.low != f.cache.entries[a].hash.low);
    uint32_t users[8] = {1, 1, 1, 1};
    prefix_cache_check(&f.cache, users);
    fixture_done(&f);
}

/* Two runs with one hash: the tokens decide. */
static void test_cache_collision_is_a_miss(void **state) {
    (void)state;
    struct cache_fixture f;
    fixture_init(&f, 8);
    uint32_t a = put(&f, 1, ENTRY_NONE, 10, 0);
    assert_int_equal(find(&f, 1, ENTRY_NONE, 10), a);
    f.cache.entries[a].tokens[BLOCK_TOKENS - 1] = 5; /* as if another run had that hash */
    assert_int_equal(find(&f, 1, ENTRY_NONE, 10), ENTRY_NONE);
    f.cache.entries[a].tokens[BLOCK_TOKENS - 1] = 0;
    f.cache.entries[a].scope = 3;
    assert_int_equal(find(&f, 1, ENTRY_NONE, 10), ENTRY_NONE);
    fixture_done(&f);
}

static void test_cache_evicts_leaves_first_and_oldest_first(void **state) {
    (void)state;
    struct cache_fixture f;
    fixture_init(&f, 8);
    uint32_t a = put(&f, 1, ENTRY_NONE, 1, 0), b = put(&f, 1, a, 2, 1), c = put(&f, 1, ENTRY_NONE, 3, 2);
    assert_false(prefix_cache_evict(&f.cache)); /* all in use */
    prefix_cache_leave(&f.cache, b);
    prefix_cache_leave(&f.cache, a);
    prefix_cache_leave(&f.cache, c);
    for (uint32_t at = 0; at < 3; at++) give(&f, at);
    assert_int_equal(f.pool.n_cached, 6);
    prefix_cache_use(&f.cache, a); /* a is younger than c now, and still after its leaf */
    prefix_cache_leave(&f.cache, a);
    assert_true(prefix_cache_evict(&f.cache));
    assert_int_equal(find(&f, 1, a, 2), ENTRY_NONE);
    assert_true(prefix_cache_evict(&f.cache));
    assert_int_equal(find(&f, 1, ENTRY_NONE, 3), ENTRY_NONE);
    assert_int_equal(find(&f, 1, ENTRY_NONE, 1), a);
    assert_true(prefix_cache_evict(&f.cache));
    assert_false(prefix_cache_evict(&f.cache));
    assert_int_equal(f.pool.n_free, 16);
    fixture_done(&f);
}

static void test_cache_remove_takes_what_follows(void **state) {
    (void)state;
    struct cache_fixture f;
    fixture_init(&f, 8);
    uint32_t a = put(&f, 1, ENTRY_NONE, 1, 0), b = put(&f, 1, a, 2, 1), c = put(&f, 1, b, 3, 2), d = put(&f, 1, a, 4, 3);
    prefix_cache_remove(&f.cache, b);
    assert_int_equal(find(&f, 1, a, 2), ENTRY_NONE);
    assert_int_equal(f.cache.entries[c].live, false);
    assert_int_equal(find(&f, 1, a, 4), d);
    assert_int_equal(f.pool.cached[f.ids[1][0]], 0);
    assert_int_equal(f.pool.owners[f.ids[1][0]], 1); /* its user's block stays its user's */
    fixture_done(&f);
}

static void test_cache_capacity(void **state) {
    (void)state;
    struct cache_fixture f;
    fixture_init(&f, 1);
    uint32_t a = put(&f, 1, ENTRY_NONE, 1, 0);
    assert_int_equal(put(&f, 1, ENTRY_NONE, 1, 1), ENTRY_NONE); /* there already */
    assert_int_equal(put(&f, 1, ENTRY_NONE, 2, 2), ENTRY_NONE); /* full */
    prefix_cache_leave(&f.cache, a);
    assert_true(prefix_cache_evict(&f.cache));
    assert_int_not_equal(put(&f, 1, ENTRY_NONE, 2, 3), ENTRY_NONE);
    fixture_done(&f);
    fixture_init(&f, 0);
    assert_int_equal(put(&f, 1, ENTRY_NONE, 1, 0), ENTRY_NONE); /* off */
    assert_int_equal(find(&f, 1, ENTRY_NONE, 1), ENTRY_NONE);
    fixture_done(&f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pool_against_bitmap),
        cmocka_unit_test(test_pool_finds_the_only_free_block),
        cmocka_unit_test(test_pool_prefers_runs),
        cmocka_unit_test(test_pool_opens_whole_extents),
        cmocka_unit_test(test_tables_against_lists),
        cmocka_unit_test(test_share_adds_an_owner),
        cmocka_unit_test(test_cache_finds_chains),
        cmocka_unit_test(test_cache_collision_is_a_miss),
        cmocka_unit_test(test_cache_evicts_leaves_first_and_oldest_first),
        cmocka_unit_test(test_cache_remove_takes_what_follows),
        cmocka_unit_test(test_cache_capacity),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
