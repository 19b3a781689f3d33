/* See block_table.h. */
#include "blockmgr/block_table.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/block.h"
#include "base/check.h"

enum {
    AT_ONCE = 16, /* lanes */
    LANES_AHEAD = 16,
    PAGE_BYTES = 4096,
};

static uint32_t blocks_for(uint32_t tokens) { return (tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS; }

uint64_t block_tables_bytes(uint32_t n_tables, uint32_t n_lanes, uint32_t blocks_max) {
    return (uint64_t)n_tables * n_lanes * ((uint64_t)blocks_max + 4) * sizeof(uint32_t) +
           (uint64_t)n_tables * (sizeof(struct table_sums) + sizeof(uint32_t));
}

void block_tables_init(struct block_tables *tables, struct block_pool *pool, uint32_t n_tables, uint32_t n_lanes, uint32_t blocks_max) {
    size_t lanes, ids;
    CHECK(size_mul(n_tables, n_lanes, &lanes) && size_mul(lanes, blocks_max, &ids) && ids < UINT32_MAX);
    *tables =
        (struct block_tables){.pool = pool, .n_tables = n_tables, .n_lanes = n_lanes, .blocks_max = blocks_max, .ids_bytes = ids * sizeof(uint32_t)};
    tables->ids = mmap(NULL, tables->ids_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(tables->ids != MAP_FAILED);
    /* Lanes' ends lie all over them: each would be a miss of the TLB too. Where a list is longer than a page, most of them may never be written to their ends. */
    if (blocks_max * sizeof(uint32_t) <= PAGE_BYTES) (void)madvise(tables->ids, tables->ids_bytes, MADV_HUGEPAGE);
    tables->lane_first = check_calloc(lanes, sizeof *tables->lane_first);
    tables->lane_tokens = check_calloc(lanes, sizeof *tables->lane_tokens);
    tables->n_blocks = check_calloc(lanes, sizeof *tables->n_blocks);
    tables->order = check_calloc(lanes, sizeof *tables->order);
    tables->sums = check_calloc(n_tables, sizeof *tables->sums);
    tables->changes = check_calloc(n_tables, sizeof *tables->changes);
    for (uint32_t table = 0; table < n_tables; table++) {
        tables->changes[table] = 1;
        tables->sums[table].next = NOT_SORTED;
    }
    for (size_t lane = 0; lane < lanes; lane++) tables->lane_first[lane] = (uint32_t)(lane * blocks_max);
}

void block_tables_done(struct block_tables *tables) {
    (void)munmap(tables->ids, tables->ids_bytes);
    free(tables->lane_first);
    free(tables->lane_tokens);
    free(tables->n_blocks);
    free(tables->order);
    free(tables->sums);
    free(tables->changes);
}

/* An id that was listed leaves its place, or one lane's slots become more or fewer. */
static void changed(struct block_tables *tables, uint32_t table) {
    if (++tables->changes[table] == 0) tables->changes[table] = 1;
}

/* The lanes' room changes, not in all alike. */
static void room_changed(struct block_tables *tables, uint32_t table) {
    tables->sums[table].room = 0;
    tables->sums[table].next = NOT_SORTED;
}

static uint32_t room_of(const struct block_tables *tables, uint32_t table, uint32_t lane) {
    return table_lane_blocks(tables, table)[lane] * BLOCK_TOKENS - table_lane_tokens(tables, table)[lane];
}

uint32_t table_room(const struct block_tables *tables, uint32_t table) {
    uint32_t room = UINT32_MAX;
    for (uint32_t lane = 0; lane < tables->n_lanes; lane++) {
        uint32_t left = room_of(tables, table, lane);
        room = left < room ? left : room;
    }
    return room;
}

static uint32_t *order_of(const struct block_tables *tables, uint32_t table) { return tables->order + (size_t)table * tables->n_lanes; }

static uint32_t after(const struct block_tables *tables, uint32_t at) { return at + 1 < tables->n_lanes ? at + 1 : 0; }

/* Lanes' lists lie far apart: each is a cache miss, which need not wait for the one before. */
static void prefetch_end(const struct block_tables *tables, uint32_t table, uint32_t lane) {
    uint32_t blocks = table_lane_blocks(tables, table)[lane];
    __builtin_prefetch(table_lane_ids(tables, table, lane) + (blocks ? blocks - 1 : 0), 1);
    __asm__ volatile(""); /* as in block_pool_foresee */
}

/* false: one has more than a block more than another. */
static bool sort_lanes(const struct block_tables *tables, uint32_t table) {
    struct table_sums *sums = &tables->sums[table];
    uint32_t starts[BLOCK_TOKENS + 2] = {0}, *order = order_of(tables, table), least = sums->room = table_room(tables, table);
    for (uint32_t lane = 0; lane < tables->n_lanes; lane++) {
        uint32_t more = room_of(tables, table, lane) - least;
        if (more > BLOCK_TOKENS) return false;
        starts[more + 1]++;
    }
    for (uint32_t more = 1; more <= BLOCK_TOKENS; more++) starts[more] += starts[more - 1];
    for (uint32_t lane = 0; lane < tables->n_lanes; lane++) order[starts[room_of(tables, table, lane) - least]++] = lane;
    sums->next = 0;
    return true;
}

/* Can the lanes that `rows` need blocks for, one each then, be told from the order? */
static bool use_order(const struct block_tables *tables, uint32_t table, uint32_t rows) {
    return rows <= BLOCK_TOKENS && (tables->sums[table].next != NOT_SORTED || sort_lanes(tables, table));
}

uint64_t table_missing(const struct block_tables *tables, uint32_t table, uint32_t rows) {
    struct table_sums *sums = &tables->sums[table];
    if (rows <= sums->room) return 0;
    const uint32_t *tokens = table_lane_tokens(tables, table), *blocks = table_lane_blocks(tables, table), *order = order_of(tables, table);
    uint64_t missing = 0;
    if (use_order(tables, table, rows)) {
        for (uint32_t at = sums->next; missing < tables->n_lanes && room_of(tables, table, order[at]) < rows; at = after(tables, at), missing++)
            prefetch_end(tables, table, order[at]);
        return missing;
    }
    sums->room = table_room(tables, table);
    for (uint32_t lane = 0; rows > sums->room && lane < tables->n_lanes; lane++) {
        uint32_t needed = blocks_for(tokens[lane] + rows);
        if (needed > blocks[lane]) missing += needed - blocks[lane];
    }
    return missing;
}

/* Lists so many more blocks of the lane. */
static void lengthen(struct block_tables *tables, uint32_t table, uint32_t lane, uint32_t count) {
    uint32_t *blocks = table_lane_blocks(tables, table) + lane, *ids = table_lane_ids(tables, table, lane);
    CHECK(count <= tables->blocks_max - *blocks);
    block_pool_take_run(tables->pool, *blocks ? ids[*blocks - 1] : BLOCK_NONE, count, ids + *blocks);
    *blocks += count;
}

/* One more. */
static uint32_t take_one(struct block_tables *tables, uint32_t table, uint32_t lane) {
    uint32_t *blocks = table_lane_blocks(tables, table) + lane, *ids = table_lane_ids(tables, table, lane);
    CHECK(*blocks < tables->blocks_max);
    uint32_t id = block_pool_take(tables->pool, *blocks ? ids[*blocks - 1] : BLOCK_NONE);
    ids[(*blocks)++] = id;
    return id;
}

/* A block for each lane that `rows` more do not fit in: at every step, so that nothing is looked up twice. */
static void take_in_order(struct block_tables *tables, uint32_t table, uint32_t rows) {
    struct table_sums *sums = &tables->sums[table];
    struct block_pool *pool = tables->pool;
    const uint32_t *tokens = table_lane_tokens(tables, table), *order = order_of(tables, table), n_lanes = tables->n_lanes,
                   blocks_max = tables->blocks_max;
    uint32_t *blocks = table_lane_blocks(tables, table), *lists = table_lane_ids(tables, table, 0), at = sums->next;
    uint64_t taken = 0;
    for (; blocks[order[at]] * BLOCK_TOKENS - tokens[order[at]] < rows; at = at + 1 < n_lanes ? at + 1 : 0, taken++) {
        uint32_t lane = order[at], n = blocks[lane], *ids = lists + (size_t)lane * blocks_max;
        CHECK(n < blocks_max);
        uint32_t near = n ? ids[n - 1] : BLOCK_NONE;
        ids[n] = block_pool_take_next(pool, near) ? near + 1 : block_pool_take(pool, near);
        blocks[lane] = n + 1;
    }
    sums->next = at;
    sums->room = room_of(tables, table, order[at]);
    sums->blocks += taken;
}

bool table_append(struct block_tables *tables, uint32_t table, uint32_t rows) {
    struct table_sums *sums = &tables->sums[table];
    if (rows <= sums->room) return true;
    bool ordered = use_order(tables, table, rows);
    /* One a lane at most: where so many are free they need not be counted again. */
    uint64_t missing = ordered && tables->n_lanes <= tables->pool->n_free ? 0 : table_missing(tables, table, rows);
    if (missing > tables->pool->n_free) return false;
    if (ordered) {
        take_in_order(tables, table, rows);
        return true;
    }
    if (missing == 0) return true;
    sums->blocks += missing;
    const uint32_t *tokens = table_lane_tokens(tables, table), *blocks = table_lane_blocks(tables, table);
    for (uint32_t lane = 0; lane < tables->n_lanes; lane++) {
        uint32_t needed = blocks_for(tokens[lane] + rows);
        if (needed > blocks[lane]) lengthen(tables, table, lane, needed - blocks[lane]);
    }
    room_changed(tables, table);
    return true;
}

/* In pieces of a length known here, which the compiler does with vectors. */
static void add_to_all(uint32_t *values, uint32_t count, uint32_t more) {
    for (; count >= AT_ONCE; values += AT_ONCE, count -= AT_ONCE)
        for (uint32_t i = 0; i < AT_ONCE; i++) values[i] += more;
    for (uint32_t i = 0; i < count; i++) values[i] += more;
}

void table_fill(struct block_tables *tables, uint32_t table, uint32_t rows) {
    CHECK(table_missing(tables, table, rows) == 0);
    add_to_all(table_lane_tokens(tables, table), tables->n_lanes, rows);
    tables->sums[table].room -= rows;
}

void table_share(struct block_tables *tables, uint32_t table, uint32_t lane, uint32_t id) {
    uint32_t *blocks = table_lane_blocks(tables, table);
    CHECK(blocks[lane] < tables->blocks_max);
    block_pool_share(tables->pool, id);
    table_lane_ids(tables, table, lane)[blocks[lane]++] = id;
    tables->sums[table].blocks++;
    tables->sums[table].next = NOT_SORTED;
}

uint32_t table_take(struct block_tables *tables, uint32_t table, uint32_t lane) {
    tables->sums[table].blocks++;
    tables->sums[table].next = NOT_SORTED;
    return take_one(tables, table, lane);
}

void table_set_tokens(struct block_tables *tables, uint32_t table, uint32_t lane, uint32_t tokens) {
    uint32_t *filled = table_lane_tokens(tables, table) + lane;
    CHECK(blocks_for(tokens) <= table_lane_blocks(tables, table)[lane]);
    if (*filled != tokens) changed(tables, table);
    *filled = tokens;
    room_changed(tables, table);
}

void table_truncate(struct block_tables *tables, uint32_t table, uint32_t lane, uint32_t tokens) {
    uint32_t *filled = table_lane_tokens(tables, table) + lane, *blocks = table_lane_blocks(tables, table) + lane;
    const uint32_t *ids = table_lane_ids(tables, table, lane);
    CHECK(tokens <= *filled);
    uint32_t needed = blocks_for(tokens), gone = *blocks > needed ? *blocks - needed : 0;
    if (tokens < *filled || gone > 0) changed(tables, table);
    *filled = tokens;
    *blocks -= gone;
    tables->sums[table].blocks -= gone;
    block_pool_give_run(tables->pool, ids + needed, gone);
    room_changed(tables, table);
}

void table_drop(struct block_tables *tables, uint32_t table, uint32_t lane, uint32_t first, uint32_t count) {
    uint32_t *filled = table_lane_tokens(tables, table) + lane, *blocks = table_lane_blocks(tables, table) + lane,
             *ids = table_lane_ids(tables, table, lane);
    CHECK(first + count <= *filled / BLOCK_TOKENS);
    if (count > 0) changed(tables, table);
    block_pool_give_run(tables->pool, ids + first, count);
    memmove(ids + first, ids + first + count, (*blocks - first - count) * sizeof *ids);
    *blocks -= count;
    *filled -= count * BLOCK_TOKENS; /* the room stays */
    tables->sums[table].blocks -= count;
}

uint32_t table_replace(struct block_tables *tables, uint32_t table, uint32_t lane, uint32_t index) {
    uint32_t *ids = table_lane_ids(tables, table, lane);
    CHECK(index < table_lane_blocks(tables, table)[lane]);
    uint32_t id = block_pool_take(tables->pool, index ? ids[index - 1] : BLOCK_NONE);
    table_replace_by(tables, table, lane, index, id);
    return id;
}

void table_replace_by(struct block_tables *tables, uint32_t table, uint32_t lane, uint32_t index, uint32_t id) {
    uint32_t *ids = table_lane_ids(tables, table, lane);
    CHECK(index < table_lane_blocks(tables, table)[lane]);
    block_pool_give(tables->pool, ids[index]);
    ids[index] = id;
    changed(tables, table);
}

void table_clear(struct block_tables *tables, uint32_t table) {
    if (tables->sums[table].blocks > 0) changed(tables, table);
    for (uint32_t lane = 0, next = LANES_AHEAD, list = 2 * LANES_AHEAD; lane < tables->n_lanes; lane++, next++, list++) {
        if (list < tables->n_lanes) __builtin_prefetch(table_lane_ids(tables, table, list));
        if (next < tables->n_lanes && table_lane_blocks(tables, table)[next] > 0)
            block_pool_foresee(tables->pool, *table_lane_ids(tables, table, next));
        uint32_t *blocks = table_lane_blocks(tables, table) + lane;
        const uint32_t *ids = table_lane_ids(tables, table, lane);
        block_pool_give_run(tables->pool, ids, *blocks);
        *blocks = 0;
        table_lane_tokens(tables, table)[lane] = 0;
    }
    tables->sums[table] = (struct table_sums){.next = NOT_SORTED};
}

void table_check(const struct block_tables *tables, uint32_t table) {
    const uint32_t *tokens = table_lane_tokens(tables, table), *blocks = table_lane_blocks(tables, table);
    uint64_t sum = 0;
    for (uint32_t lane = 0; lane < tables->n_lanes; lane++) {
        CHECK(blocks_for(tokens[lane]) <= blocks[lane] && blocks[lane] <= tables->blocks_max);
        sum += blocks[lane];
    }
    const struct table_sums *sums = &tables->sums[table];
    CHECK(sums->blocks == sum && sums->room <= table_room(tables, table));
    if (sums->next == NOT_SORTED) return;
    const uint32_t *order = order_of(tables, table);
    uint64_t lanes = 0;
    CHECK(sums->next < tables->n_lanes);
    uint32_t at = sums->next, least = room_of(tables, table, order[at]), before = least;
    for (uint32_t i = 0; i < tables->n_lanes; i++, at = after(tables, at)) {
        uint32_t room = room_of(tables, table, order[at]);
        CHECK(room >= before && room <= least + BLOCK_TOKENS);
        before = room;
        lanes += order[at];
    }
    CHECK(lanes == (uint64_t)tables->n_lanes * (tables->n_lanes - 1) / 2);
}
