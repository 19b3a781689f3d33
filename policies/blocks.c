/* KV-Compress's choice of blocks (arXiv 2410.00161, 3.3): which blocks of which lanes are cheapest to free. Inside choose(); owns nothing.
 *
 * Freeing the j-th block of a lane (j = 1, 2, ...) evicts its lowest (j-1) B + m slots, m being the slots in its last block, and costs the highest of these scores. Costs
 * rise with j, so a choice of the F cheapest (lane, j) is a prefix in each lane, and every lane that is touched ends on a block boundary. Ties: lower j, then lower lane.
 *
 * No sort: with c slots of a lane at or below a score t, it can free blocks(c) at cost <= t. The least t at which all lanes together can free F is found a byte at a time by
 * counting; the blocks that cost exactly t are dealt out in the order of ties. */
#include "base/check.h"
#include "policies/chooser.h"

/* Deals out what is left among the blocks that cost exactly the threshold: j ascending, lanes ascending. chooser->budgets holds blocks to free meanwhile, chooser->needed how many could
 * be up to the threshold. */
static void deal(struct chooser *chooser, uint64_t left) {
    const uint32_t *upto = chooser->needed;
    while (left > 0) {
        uint32_t next = UINT32_MAX; /* the lowest j any lane can free next */
        for (uint32_t l = 0; l < chooser->n_lanes; l++)
            if (chooser->budgets[l] < upto[l] && chooser->budgets[l] < next) next = chooser->budgets[l];
        if (next == UINT32_MAX) return;
        for (uint32_t l = 0; l < chooser->n_lanes && left > 0; l++)
            if (chooser->budgets[l] == next && chooser->budgets[l] < upto[l]) {
                chooser->budgets[l]++;
                left--;
            }
    }
}

/* The least key at which all lanes together can free `wanted` blocks; then those below it, and of those at it as many as are missing. Where they cannot, all that may go is below. */
static void free_blocks(struct chooser *chooser, uint32_t wanted) {
    uint64_t below = 0;
    for (uint32_t l = 0; l < chooser->n_lanes; l++) {
        uint32_t n = chooser->lanes[l].n_slots, unit = chooser->request.block_tokens; /* protected slots are in neither count */
        chooser->budgets[l] = select_units(n, 0, unit, chooser->cut[l].below);
        chooser->needed[l] = select_units(n, 0, unit, chooser->cut[l].below + chooser->cut[l].equal);
        below += chooser->budgets[l];
    }
    CHECK(below <= wanted);
    deal(chooser, wanted - below);
}

/* Blocks to free. The budget is an average over the lanes, which rounding it up to a block a lane, as the published code does, would exceed by up to a block less one slot. */
static uint32_t blocks_wanted(const struct chooser *chooser) {
    uint32_t size = chooser->request.block_tokens;
    uint64_t held = 0, target = (uint64_t)chooser->request.budget * chooser->n_lanes / size;
    for (uint32_t l = 0; l < chooser->n_lanes; l++) held += (chooser->lanes[l].n_slots + size - 1) / size;
    CHECK(held <= UINT32_MAX);
    return held > target ? (uint32_t)(held - target) : 0;
}

void chooser_blocks(struct chooser *chooser) {
    uint32_t wanted = blocks_wanted(chooser);
    const struct cut_request cut = {.lanes_each = chooser->n_lanes, .unit = chooser->request.block_tokens, .needed = &wanted};
    if (wanted > 0) chooser->backend->ops->cut(chooser->backend, chooser->place, &cut, chooser->cut);
}

void chooser_blocks_cut(struct chooser *chooser) {
    uint32_t wanted = blocks_wanted(chooser);
    for (uint32_t l = 0; l < chooser->n_lanes; l++) chooser->budgets[l] = 0;
    if (wanted > 0) free_blocks(chooser, wanted);
    for (uint32_t l = 0; l < chooser->n_lanes; l++)
        chooser->evict[l] = select_evictions(chooser->lanes[l].n_slots, chooser->request.block_tokens, chooser->budgets[l]);
}
