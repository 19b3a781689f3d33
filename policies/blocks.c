/* How many blocks KV-Compress lets go of all lanes together; which ones is the backend's to find (kernels/select.h, keep_units). Inside choose(); owns nothing. */
#include "base/check.h"
#include "policies/chooser.h"

/* The budget is an average over the lanes, which rounding it up to a block a lane, as the published code does, would exceed by up to a block less one slot. */
uint32_t chooser_blocks(const struct chooser *chooser) {
    uint32_t size = chooser->request.block_tokens;
    uint64_t held = 0, target = (uint64_t)chooser->request.budget * chooser->n_lanes / size;
    for (uint32_t l = 0; l < chooser->n_lanes; l++) held += (chooser->lanes[l].n_slots + size - 1) / size;
    CHECK(held <= UINT32_MAX);
    return held > target ? (uint32_t)(held - target) : 0;
}
