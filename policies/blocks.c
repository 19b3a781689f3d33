/* KV-Compress's choice of blocks (arXiv 2410.00161, 3.3): which blocks of which lanes are cheapest to free. Inside choose(); owns nothing.
 *
 * Freeing the j-th block of a lane (j = 1, 2, ...) evicts its lowest (j-1) B + m slots, m being the slots in its last block, and costs the highest of these scores. Costs
 * rise with j, so a choice of the F cheapest (lane, j) is a prefix in each lane, and every lane that is touched ends on a block boundary. Ties: lower j, then lower lane.
 *
 * No sort: with c slots of a lane at or below a score t, it can free blocks(c) at cost <= t. The least t at which all lanes together can free F is found a byte at a time by
 * counting; the blocks that cost exactly t are dealt out in the order of ties. */
#include "base/check.h"
#include "policies/chooser.h"

struct lane_shape {
    uint32_t tail; /* slots in the last block, 1..B */
    uint32_t evictable;
    uint32_t size; /* B */
};

static struct lane_shape shape_of(const struct chooser_lane *lane, uint32_t size) {
    return (struct lane_shape){
        .tail = lane->n_slots ? (lane->n_slots - 1) % size + 1 : 0, .evictable = lane->n_slots - lane->n_protected, .size = size};
}

/* Blocks that the lowest `count` slots can free. */
static uint32_t blocks_of(struct lane_shape shape, uint32_t count) {
    if (count > shape.evictable) count = shape.evictable;
    return shape.tail == 0 || count < shape.tail ? 0 : (count - shape.tail) / shape.size + 1;
}

static uint32_t evictions_of(struct lane_shape shape, uint32_t blocks) { return blocks ? (blocks - 1) * shape.size + shape.tail : 0; }

static void count_byte(const struct chooser_lane *lane, uint32_t prefix, uint32_t mask, int shift, struct radix_counts *counts) {
    for (int i = 0; i < 256; i++) counts->counts[i] = 0;
    for (uint32_t i = 0; i < lane->n_slots; i++)
        if (lane->keys[i] != CHOOSER_PROTECTED && (lane->keys[i] & mask) == prefix) counts->counts[lane->keys[i] >> shift & 255]++;
}

/* The least key at which all lanes together can free `wanted` blocks; counts[l].below: slots of the lane strictly below it. */
static uint32_t threshold_of(struct chooser *chooser, uint64_t wanted) {
    uint32_t prefix = 0, mask = 0, size = chooser->request.block_tokens;
    for (uint32_t l = 0; l < chooser->n_lanes; l++) chooser->counts[l].below = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (uint32_t l = 0; l < chooser->n_lanes; l++) count_byte(&chooser->lanes[l], prefix, mask, shift, &chooser->counts[l]);
        uint32_t byte = 0;
        for (;; byte++) {
            uint64_t freed = 0;
            for (uint32_t l = 0; l < chooser->n_lanes; l++)
                freed += blocks_of(shape_of(&chooser->lanes[l], size), chooser->counts[l].below + chooser->counts[l].counts[byte]);
            if (freed >= wanted || byte == 255) break;
            for (uint32_t l = 0; l < chooser->n_lanes; l++) chooser->counts[l].below += chooser->counts[l].counts[byte];
        }
        prefix |= byte << shift;
        mask |= 255u << shift;
    }
    return prefix;
}

/* Deals out what is left among the blocks that cost exactly the threshold: j ascending, lanes ascending. chooser->budgets holds blocks to free meanwhile. */
static void deal(struct chooser *chooser, uint32_t threshold, uint64_t left) {
    uint32_t size = chooser->request.block_tokens;
    for (uint32_t l = 0; l < chooser->n_lanes; l++) { /* counts[0]: blocks up to the threshold */
        uint32_t upto = chooser->counts[l].below;
        for (uint32_t i = 0; i < chooser->lanes[l].n_slots; i++) upto += chooser->lanes[l].keys[i] == threshold;
        chooser->counts[l].counts[0] = blocks_of(shape_of(&chooser->lanes[l], size), upto);
    }
    while (left > 0) {
        uint32_t next = UINT32_MAX; /* the lowest j any lane can free next */
        for (uint32_t l = 0; l < chooser->n_lanes; l++)
            if (chooser->budgets[l] < chooser->counts[l].counts[0] && chooser->budgets[l] < next) next = chooser->budgets[l];
        if (next == UINT32_MAX) return;
        for (uint32_t l = 0; l < chooser->n_lanes && left > 0; l++)
            if (chooser->budgets[l] == next && chooser->budgets[l] < chooser->counts[l].counts[0]) {
                chooser->budgets[l]++;
                left--;
            }
    }
}

void chooser_blocks(struct chooser *chooser) {
    struct choose_lane *lanes = chooser->results;
    uint32_t size = chooser->request.block_tokens;
    uint64_t held = 0, possible = 0, target = (uint64_t)((chooser->request.budget + size - 1) / size) * chooser->n_lanes;
    for (uint32_t l = 0; l < chooser->n_lanes; l++) {
        held += (lanes[l].n_slots + size - 1) / size;
        possible += blocks_of(shape_of(&chooser->lanes[l], size), UINT32_MAX);
    }
    uint64_t wanted = held > target ? held - target : 0;
    if (wanted > possible) wanted = possible;
    uint64_t below = 0;
    uint32_t threshold = wanted ? threshold_of(chooser, wanted) : 0;
    for (uint32_t l = 0; l < chooser->n_lanes; l++) {
        chooser->budgets[l] = wanted ? blocks_of(shape_of(&chooser->lanes[l], size), chooser->counts[l].below) : 0;
        below += chooser->budgets[l];
    }
    CHECK(below <= wanted);
    deal(chooser, threshold, wanted - below);
    for (uint32_t l = 0; l < chooser->n_lanes; l++)
        chooser_keep(&chooser->lanes[l], evictions_of(shape_of(&chooser->lanes[l], size), chooser->budgets[l]), &lanes[l]);
}
