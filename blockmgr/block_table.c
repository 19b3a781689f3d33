/* See block_table.h. */
#include "blockmgr/block_table.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/block.h"
#include "base/check.h"

static uint32_t blocks_for(uint32_t tokens) { return (tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS; }

uint64_t block_tables_bytes(uint32_t n_tables, uint32_t n_lanes, uint32_t blocks_max) {
    return (uint64_t)n_tables * n_lanes * ((uint64_t)blocks_max + 3) * sizeof(uint32_t) +
           (uint64_t)n_tables * (sizeof(struct table_sums) + sizeof(uint32_t));
}

void block_tables_init(struct block_tables *tables, struct block_pool *pool, uint32_t n_tables, uint32_t n_lanes, uint32_t blocks_max) {
    size_t lanes, ids;
    CHECK(size_mul(n_tables, n_lanes, &lanes) && size_mul(lanes, blocks_max, &ids) && ids < UINT32_MAX);
    *tables =
        (struct block_tables){.pool = pool, .n_tables = n_tables, .n_lanes = n_lanes, .blocks_max = blocks_max, .ids_bytes = ids * sizeof(uint32_t)};
    tables->ids = mmap(NULL, tables->ids_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(tables->ids != MAP_FAILED);
    tables->lane_first = check_calloc(lanes, sizeof *tables->lane_first);
    tables->lane_tokens = check_calloc(lanes, sizeof *tables->lane_tokens);
    tables->n_blocks = check_calloc(lanes, sizeof *tables->n_blocks);
    tables->sums = check_calloc(n_tables, sizeof *tables->sums);
    tables->changes = check_calloc(n_tables, sizeof *tables->changes);
    for (uint32_t table = 0; table < n_tables; table++) tables->changes[table] = 1;
    for (size_t lane = 0; lane < lanes; lane++) tables->lane_first[lane] = (uint32_t)(lane * blocks_max);
}

void block_tables_done(struct block_tables *tables) {
    (void)munmap(tables->ids, tables->ids_bytes);
    free(tables->lane_first);
    free(tables->lane_tokens);
    free(tables->n_blocks);
    free(tables->sums);
    free(tables->changes);
}

/* An id that was listed leaves its place, or one lane's slots become more or fewer. */
static void changed(struct block_tables *tables, uint32_t table) {
    if (++tables->changes[table] == 0) tables->changes[table] = 1;
}

uint32_t table_room(const struct block_tables *tables, uint32_t table) {
    const uint32_t *tokens = table_lane_tokens(tables, table), *blocks = table_lane_blocks(tables, table);
    uint32_t room = UINT32_MAX;
    for (uint32_t lane = 0; lane < tables->n_lanes; lane++) {
        uint32_t left = blocks[lane] * BLOCK_TOKENS - tokens[lane];
        room = left < room ? left : room;
    }
    return room;
}

uint64_t table_missing(const struct block_tables *tables, uint32_t table, uint32_t rows) {
    if (rows <= tables->sums[table].room) return 0;
    tables->sums[table].room = table_room(tables, table);
    if (rows <= tables->sums[table].room) return 0;
    const uint32_t *tokens = table_lane_tokens(tables, table), *blocks = table_lane_blocks(tables, table);
    uint64_t missing = 0;
    for (uint32_t lane = 0; lane < tables->n_lanes; lane++) {
        uint32_t needed = blocks_for(tokens[lane] + rows);
        if (needed > blocks[lane]) missing += needed - blocks[lane];
    }
    return missing;
}

bool table_append(struct block_tables *tables, uint32_t table, uint32_t rows) {
    uint64_t missing = table_missing(tables, table, rows);
    if (missing > tables->pool->n_free) return false;
    if (missing == 0) return true;
    const uint32_t *tokens = table_lane_tokens(tables, table);
    uint32_t *blocks = table_lane_blocks(tables, table);
    for (uint32_t lane = 0; lane < tables->n_lanes; lane++) {
        uint32_t needed = blocks_for(tokens[lane] + rows), *ids = table_lane_ids(tables, table, lane);
        CHECK(needed <= tables->blocks_max);
        for (; blocks[lane] < needed; blocks[lane]++)
            ids[blocks[lane]] = block_pool_take(tables->pool, blocks[lane] ? ids[blocks[lane] - 1] : BLOCK_NONE);
    }
    tables->sums[table].blocks += missing;
    tables->sums[table].room = table_room(tables, table);
    return true;
}

void table_fill(struct block_tables *tables, uint32_t table, uint32_t rows) {
    uint32_t *tokens = table_lane_tokens(tables, table);
    CHECK(table_missing(tables, table, rows) == 0);
    for (uint32_t lane = 0; lane < tables->n_lanes; lane++) tokens[lane] += rows;
    tables->sums[table].room -= rows;
}

void table_share(struct block_tables *tables, uint32_t table, uint32_t lane, uint32_t id) {
    uint32_t *blocks = table_lane_blocks(tables, table);
    CHECK(blocks[lane] < tables->blocks_max);
    block_pool_share(tables->pool, id);
    table_lane_ids(tables, table, lane)[blocks[lane]++] = id;
    tables->sums[table].blocks++;
}

uint32_t table_take(struct block_tables *tables, uint32_t table, uint32_t lane) {
    uint32_t *blocks = table_lane_blocks(tables, table) + lane, *ids = table_lane_ids(tables, table, lane);
    CHECK(*blocks < tables->blocks_max);
    uint32_t id = block_pool_take(tables->pool, *blocks ? ids[*blocks - 1] : BLOCK_NONE);
    ids[(*blocks)++] = id;
    tables->sums[table].blocks++;
    return id;
}

void table_set_tokens(struct block_tables *tables, uint32_t table, uint32_t lane, uint32_t tokens) {
    uint32_t *filled = table_lane_tokens(tables, table) + lane;
    CHECK(blocks_for(tokens) <= table_lane_blocks(tables, table)[lane]);
    if (*filled != tokens) changed(tables, table);
    *filled = tokens;
    tables->sums[table].room = 0;
}

void table_truncate(struct block_tables *tables, uint32_t table, uint32_t lane, uint32_t tokens) {
    uint32_t *filled = table_lane_tokens(tables, table) + lane, *blocks = table_lane_blocks(tables, table) + lane;
    const uint32_t *ids = table_lane_ids(tables, table, lane);
    CHECK(tokens <= *filled);
    if (tokens < *filled || *blocks > blocks_for(tokens)) changed(tables, table);
    *filled = tokens;
    for (; *blocks > blocks_for(tokens); tables->sums[table].blocks--) block_pool_give(tables->pool, ids[--*blocks]);
    tables->sums[table].room = 0;
}

void table_drop(struct block_tables *tables, uint32_t table, uint32_t lane, uint32_t first, uint32_t count) {
    uint32_t *filled = table_lane_tokens(tables, table) + lane, *blocks = table_lane_blocks(tables, table) + lane,
             *ids = table_lane_ids(tables, table, lane);
    CHECK(first + count <= *filled / BLOCK_TOKENS);
    if (count > 0) changed(tables, table);
    for (uint32_t i = first; i < first + count; i++) block_pool_give(tables->pool, ids[i]);
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
    for (uint32_t lane = 0; lane < tables->n_lanes; lane++) {
        uint32_t *blocks = table_lane_blocks(tables, table) + lane;
        const uint32_t *ids = table_lane_ids(tables, table, lane);
        while (*blocks > 0) block_pool_give(tables->pool, ids[--*blocks]);
        table_lane_tokens(tables, table)[lane] = 0;
    }
    tables->sums[table] = (struct table_sums){0};
}

void table_check(const struct block_tables *tables, uint32_t table) {
    const uint32_t *tokens = table_lane_tokens(tables, table), *blocks = table_lane_blocks(tables, table);
    uint64_t sum = 0;
    for (uint32_t lane = 0; lane < tables->n_lanes; lane++) {
        CHECK(blocks_for(tokens[lane]) <= blocks[lane] && blocks[lane] <= tables->blocks_max);
        sum += blocks[lane];
    }
    CHECK(tables->sums[table].blocks == sum && tables->sums[table].room <= table_room(tables, table));
}
