/* Block tables: for each sequence, lane by lane, the ids of its blocks in order, and how many slots of the lane are filled. A lane never has holes: blocks are appended at the
 * end, cut from the end, or one whole block leaves the middle (no data moves). Ids are views on a pool that counts owners; a table owns one count of each id it lists.
 *
 * All tables lie in one array [table][lane][blocks_max], so that a batch can name a lane by one index; pages of it that were never written take no memory
 * (huge ones, where lanes' lists are short).
 * What a plan asks of every running sequence at every step (blocks listed, blocks missing for one more row) is O(1) until a lane has to grow, and then O(lanes that do).
 * One thread. Allocates in block_tables_init only. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "blockmgr/block_pool.h"

#define NOT_SORTED UINT32_MAX
struct table_sums {
    uint64_t blocks; /* listed in all lanes */
    uint32_t room;   /* so many more slots fit in every lane as listed; at most the true number, 0 until it is asked for */
    uint32_t next;   /* NOT_SORTED; else where `order` begins */
};

struct block_tables {
    struct block_pool *pool;
    uint32_t n_tables, n_lanes, blocks_max; /* blocks_max: of one lane */
    uint32_t *ids;                          /* [n_tables][n_lanes][blocks_max] */
    size_t ids_bytes;
    uint32_t *lane_first;  /* [n_tables][n_lanes] index in ids of the lane's first block; const */
    uint32_t *lane_tokens; /* [n_tables][n_lanes] slots filled */
    uint32_t *n_blocks;    /* [n_tables][n_lanes] blocks listed, >= filled ones */
    uint32_t *
        changes; /* [n_tables] never 0. While it stays, ids are only added at the ends of lanes, and all lanes are filled by the same number of slots: who has copied a
                                table needs the new ids and one number */
    /* [n_tables][n_lanes] lanes by their room, from sums.next on and around, the last with a block more than the first at most. As all lanes grow alike, one that has got a block
       comes last: nothing but the beginning moves. */
    uint32_t *order;
    struct table_sums *sums; /* [n_tables] */
};

uint64_t block_tables_bytes(uint32_t n_tables, uint32_t n_lanes, uint32_t blocks_max);
void block_tables_init(struct block_tables *tables, struct block_pool *pool, uint32_t n_tables, uint32_t n_lanes, uint32_t blocks_max);
void block_tables_done(struct block_tables *tables);

static inline uint32_t *table_lane_tokens(const struct block_tables *tables, uint32_t table) {
    return tables->lane_tokens + (size_t)table * tables->n_lanes;
}
static inline uint32_t *table_lane_first(const struct block_tables *tables, uint32_t table) {
    return tables->lane_first + (size_t)table * tables->n_lanes;
}
static inline uint32_t *table_lane_blocks(const struct block_tables *tables, uint32_t table) {
    return tables->n_blocks + (size_t)table * tables->n_lanes;
}
static inline uint32_t *table_lane_ids(const struct block_tables *tables, uint32_t table, uint32_t lane) {
    return tables->ids + ((size_t)table * tables->n_lanes + lane) * tables->blocks_max;
}

/* Blocks listed in all lanes. */
static inline uint64_t table_blocks(const struct block_tables *tables, uint32_t table) { return tables->sums[table].blocks; }
/* Blocks that `rows` more slots in every lane need beyond those listed. */
uint64_t table_missing(const struct block_tables *tables, uint32_t table, uint32_t rows);
/* So many more slots fit in every lane as listed. */
uint32_t table_room(const struct block_tables *tables, uint32_t table);
/* Takes them: all, or none and false. */
bool table_append(struct block_tables *tables, uint32_t table, uint32_t rows);
/* `rows` slots of every lane are filled now; their blocks are listed (CHECKed). */
void table_fill(struct block_tables *tables, uint32_t table, uint32_t rows);
/* Lists one more block of `lane`, which gets one more owner (a prefix hit, a fork). */
void table_share(struct block_tables *tables, uint32_t table, uint32_t lane, uint32_t id);
/* Lists one more block of `lane`, taken from the pool (one must be free). Returns it. */
uint32_t table_take(struct block_tables *tables, uint32_t table, uint32_t lane);
/* `tokens` slots of one lane are filled now; their blocks are listed (CHECKed). */
void table_set_tokens(struct block_tables *tables, uint32_t table, uint32_t lane, uint32_t tokens);
/* The lane keeps `tokens` slots; blocks past them are given back. */
void table_truncate(struct block_tables *tables, uint32_t table, uint32_t lane, uint32_t tokens);
/* The lane's blocks [first, first + count) leave, full ones all; what follows moves up. */
void table_drop(struct block_tables *tables, uint32_t table, uint32_t lane, uint32_t first, uint32_t count);
/* Block `index` of the lane is replaced by one taken from the pool (one must be free); the old one is given back. Returns the new id. */
uint32_t table_replace(struct block_tables *tables, uint32_t table, uint32_t lane, uint32_t index);
/* The same, by a block that the caller has taken and no longer owns then. */
void table_replace_by(struct block_tables *tables, uint32_t table, uint32_t lane, uint32_t index, uint32_t id);
/* Everything is given back. */
void table_clear(struct block_tables *tables, uint32_t table);

/* CHECKs what is kept beside the lanes against them. */
void table_check(const struct block_tables *tables, uint32_t table);
