/* See raw.h. */
#include "kernels/raw.h"

#include "base/check.h"
#include "kernels/kivi.h"

static void unlink_place(struct raw_places *raw, uint32_t place) {
    const struct raw_place *at = &raw->places[place];
    raw->places[at->older].newer = at->newer;
    raw->places[at->newer].older = at->older;
}

/* Between `newer`'s neighbour and it. */
static void link_before(struct raw_places *raw, uint32_t place, uint32_t newer) {
    struct raw_place *at = &raw->places[place], *behind = &raw->places[newer];
    at->newer = newer;
    at->older = behind->older;
    raw->places[at->older].newer = place;
    behind->older = place;
}

/* Among those that are not held: the newest, or, if it is nobody's, the first to be given away. */
static void link_place(struct raw_places *raw, uint32_t place) {
    const uint32_t end = raw->n_places;
    link_before(raw, place, raw->places[place].block == RAW_NONE ? raw->places[end].newer : end);
}

void raw_put(struct raw_places *raw, uint32_t block, uint32_t place) {
    raw->of[block] = place;
    if (!raw->changed || raw->is_changed[block]) return;
    raw->is_changed[block] = true;
    raw->changed[raw->n_changed++] = block;
}

void raw_init(struct raw_places *raw) {
    const uint32_t end = raw->n_places;
    raw->places[end].older = raw->places[end].newer = end;
    raw->n_idle = raw->n_places;
    for (uint32_t i = 0; i < raw->n_blocks; i++) raw->of[i] = RAW_NONE;
    for (uint32_t i = 0; i < raw->n_places; i++) {
        raw->places[i].block = RAW_NONE;
        link_before(raw, i, end);
    }
    for (size_t i = 0; i < (size_t)raw->n_tables * raw->n_lanes * KIVI_RAW_BLOCKS; i++) raw->held[i] = RAW_NONE;
}

uint32_t raw_take(struct raw_places *raw, uint32_t block) {
    CHECK(block < raw->n_blocks);
    uint32_t place = raw->of[block];
    if (place == RAW_NONE) {
        place = raw->places[raw->n_places].newer; /* the oldest */
        CHECK(place != raw->n_places);
        uint32_t *whose = &raw->places[place].block;
        if (*whose != RAW_NONE) raw_put(raw, *whose, RAW_NONE);
        *whose = block;
        raw_put(raw, block, place);
    }
    CHECK(place < raw->n_places);
    if (raw->places[place].holds == 0) {
        unlink_place(raw, place);
        link_place(raw, place);
    }
    return place;
}

void raw_expect(const struct raw_places *raw, uint32_t block) {
    __builtin_prefetch(&raw->of[block], 1);
    if (raw->is_changed) __builtin_prefetch(&raw->is_changed[block], 1);
}

void raw_expect_place(const struct raw_places *raw, uint32_t block) {
    if (raw->of[block] < raw->n_places) __builtin_prefetch(&raw->places[raw->of[block]], 1);
}

void raw_forget(struct raw_places *raw, uint32_t block) {
    uint32_t place = raw->of[block];
    if (place == RAW_NONE) return;
    raw_put(raw, block, RAW_NONE);
    if (place >= raw->n_places) return;
    raw->places[place].block = RAW_NONE;
    if (raw->places[place].holds > 0) return;
    unlink_place(raw, place);
    link_place(raw, place);
}

void raw_hold(struct raw_places *raw, uint32_t place) {
    CHECK(place < raw->n_places);
    if (raw->places[place].holds++ > 0) return;
    unlink_place(raw, place);
    raw->n_idle--;
}

void raw_release(struct raw_places *raw, uint32_t place) {
    CHECK(place < raw->n_places && raw->places[place].holds > 0);
    if (--raw->places[place].holds > 0) return;
    link_place(raw, place);
    raw->n_idle++;
}

static uint32_t *held_by(struct raw_places *raw, uint32_t table, uint32_t lane) {
    CHECK(table < raw->n_tables);
    return raw->held + ((size_t)table * raw->n_lanes + lane) * KIVI_RAW_BLOCKS;
}

void raw_release_lane(struct raw_places *raw, uint32_t table, uint32_t lane) {
    uint32_t *held = held_by(raw, table, lane);
    for (uint32_t i = 0; i < KIVI_RAW_BLOCKS; i++) {
        if (held[i] != RAW_NONE) raw_release(raw, held[i]);
        held[i] = RAW_NONE;
    }
}

void raw_release_table(struct raw_places *raw, uint32_t table) {
    for (uint32_t lane = 0; lane < raw->n_lanes; lane++) raw_release_lane(raw, table, lane);
}

void raw_hold_lane(struct raw_places *raw, uint32_t table, uint32_t lane, const uint32_t *blocks, uint32_t n) {
    CHECK(n <= KIVI_RAW_BLOCKS);
    uint32_t *held = held_by(raw, table, lane);
    for (uint32_t i = 0; i < n; i++) {
        CHECK(held[i] == RAW_NONE);
        raw_hold(raw, held[i] = raw->of[blocks[i]]);
    }
}

uint64_t raw_places_needed(const struct program *program, const struct backend_limits *limits) {
    /* Three a lane of each table; while a step runs, as many that several rows of a sequence open beside the ones that the first of them still reads; and between steps, as many for each
     * sequence that is compacted, until its next step lets go of the old ones. */
    const uint32_t tables = limits->n_tables ? limits->n_tables : limits->max_sequences;
    return (uint64_t)program_lanes(program) * KIVI_RAW_BLOCKS * ((uint64_t)tables + limits->max_sequences);
}

uint32_t raw_shared_needed(const struct backend_limits *limits) { return limits->max_rows / BLOCK_TOKENS + limits->max_sequences + 1; }
