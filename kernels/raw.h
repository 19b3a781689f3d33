/* Which blocks of a KIVI pool (kernels/kivi.h) are kept in f16 as well, and where: the residual. Bookkeeping alone, for backends that keep codes and f16 blocks apart; the numbers lie in the
 * backend's memory.
 *
 * A place belongs to a block until another block needs it. Held are the places that the next row of each table's sequence reads, KIVI_RAW_BLOCKS a lane at most: for all tables together
 * there is always room. What is not held is given away, longest unused first.
 * Blocks that a step fills and has no further use for (the inside of a chunk of a prompt) need their numbers only while their layer runs. Where places are short they lie in ones that layers
 * share, and are nobody's after the step; else they stay for sequences to come that may go on from there.
 *
 * The engine's thread, between and at the edges of steps; workers read `of`. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "kernels/backend.h"

#define RAW_NONE UINT32_MAX

struct raw_place {
    uint32_t block; /* whose it is, or RAW_NONE */
    uint32_t holds;
    uint32_t older, newer; /* ring of places that are not held */
};

struct raw_places {
    uint32_t n_blocks, n_places, n_tables, n_lanes;
    uint32_t n_idle;          /* places that are not held */
    uint32_t *of;             /* [n_blocks] the block's place, or RAW_NONE; >= n_places: a shared one */
    struct raw_place *places; /* [n_places + 1]; of the last one, only the ring: it is its end, newer than the newest, older than the oldest */
    uint32_t *held;           /* [n_tables][n_lanes][KIVI_RAW_BLOCKS] places, or RAW_NONE */
    /* For who keeps a copy of `of` elsewhere: blocks whose entry has changed since n_changed was 0, each once. Both NULL: nobody does. */
    uint32_t *changed;   /* [n_blocks] */
    uint8_t *is_changed; /* [n_blocks] bool; who empties the list clears them */
    uint32_t n_changed;
};

/* Places for a backend with these limits; and, of those that layers share, places for a KV head. */
uint64_t raw_places_needed(const struct program *program, const struct backend_limits *limits);
uint32_t raw_shared_needed(const struct backend_limits *limits);

/* After the arrays have been handed out. */
void raw_init(struct raw_places *raw);
/* The block's place; where it has none, the one that was unused longest. */
uint32_t raw_take(struct raw_places *raw, uint32_t block);
/* Soon one of these will be asked for the block: its entry is on the way to a core's caches. */
void raw_expect(const struct raw_places *raw, uint32_t block);
void raw_expect_place(const struct raw_places *raw, uint32_t block); /* once that is there: so is its place's */
/* The block's place becomes a shared one, or nobody's, which says nothing of places that are the block's own. */
void raw_put(struct raw_places *raw, uint32_t block, uint32_t place);
/* Its numbers are no longer those of the codes. */
void raw_forget(struct raw_places *raw, uint32_t block);
void raw_hold(struct raw_places *raw, uint32_t place);
void raw_release(struct raw_places *raw, uint32_t place);
/* The table's sequence needs nothing any more. */
void raw_release_table(struct raw_places *raw, uint32_t table);
/* Of one lane. */
void raw_release_lane(struct raw_places *raw, uint32_t table, uint32_t lane);
/* From now on the lane's next row needs these blocks, all of which have places of their own; n <= KIVI_RAW_BLOCKS. The table held nothing of the lane. */
void raw_hold_lane(struct raw_places *raw, uint32_t table, uint32_t lane, const uint32_t *blocks, uint32_t n);
