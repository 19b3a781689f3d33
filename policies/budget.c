/* How many slots each lane keeps: uniform, a ramp over layers, pooled over the lanes of a layer. Inside choose(); owns nothing. */
#include <math.h>
#include <string.h>

#include "policies/chooser.h"

static uint32_t most_protected(const struct chooser *chooser) {
    uint32_t most = 0;
    for (uint32_t l = 0; l < chooser->n_lanes; l++)
        if (chooser->lanes[l].n_protected > most) most = chooser->lanes[l].n_protected;
    return most;
}

/* PyramidKV (arXiv 2406.02069, 3.2; the published code's integer form): with c the average beyond the protected slots, min = c/beta, max = 2c - min, a straight line
 * from max in the first layer down to min in the last. A lane of fewer than 2c evictable slots has nothing to gain from it: uniform. */
static void ramp(const struct chooser *chooser, uint32_t average, uint32_t n, uint32_t *layer_budget) {
    const struct choose_request *request = &chooser->request;
    uint32_t layers = request->n_layers;
    uint32_t min = average / request->options->ramp, max = 2 * average - min;
    bool flat = n < 2 * average || layers < 2;
    if (max > n) {
        max = n;
        min = 2 * average > max ? 2 * average - max : 0;
    }
    uint32_t step = layers > 1 && max > min ? (max - min) / (layers - 1) : 0;
    for (uint32_t layer = 0; layer < layers; layer++) layer_budget[layer] = flat ? average : max - layer * step;
}

/* Ada-KV (arXiv 2407.11550, algorithm 1; the safeguard is algorithm 2's alpha): of the layer's best H*b scores a lane holds c_h; it keeps (1 - a) c_h + a b. Equal scores: lanes in order.
 * `base`: what the lane would keep beyond its protected slots under a uniform budget. */
static void pool_layer(const struct chooser *chooser, uint32_t layer, uint32_t base) {
    const struct choose_request *request = &chooser->request;
    uint32_t heads = request->n_kv_heads;
    struct chooser_lane *lanes = chooser->lanes + (size_t)layer * heads;
    uint32_t *budgets = chooser->budgets + (size_t)layer * heads;
    uint64_t evictable = 0, wanted = (uint64_t)heads * base;
    for (uint32_t h = 0; h < heads; h++) evictable += lanes[h].n_slots - lanes[h].n_protected;
    if (evictable <= wanted) {
        for (uint32_t h = 0; h < heads; h++) budgets[h] = lanes[h].n_slots;
        return;
    }
    /* The key of ascending rank evictable - wanted among the evictable of all lanes: four counting passes. */
    uint64_t rank = evictable - wanted, below = 0;
    uint32_t prefix = 0, mask = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        uint64_t counts[256] = {0};
        for (uint32_t h = 0; h < heads; h++)
            for (uint32_t i = 0; i < lanes[h].n_slots; i++)
                if (lanes[h].keys[i] != CHOOSER_PROTECTED && (lanes[h].keys[i] & mask) == prefix) counts[lanes[h].keys[i] >> shift & 255]++;
        uint32_t byte = 0;
        while (byte < 255 && below + counts[byte] <= rank) below += counts[byte++];
        prefix |= byte << shift;
        mask |= 255u << shift;
    }
    uint64_t above = 0;
    for (uint32_t h = 0; h < heads; h++)
        for (uint32_t i = 0; i < lanes[h].n_slots; i++) above += lanes[h].keys[i] != CHOOSER_PROTECTED && lanes[h].keys[i] > prefix;
    uint64_t equal_left = wanted > above ? wanted - above : 0;
    double a = request->options->floor;
    for (uint32_t h = 0; h < heads; h++) {
        uint64_t held = 0, equal = 0;
        for (uint32_t i = 0; i < lanes[h].n_slots; i++) {
            held += lanes[h].keys[i] != CHOOSER_PROTECTED && lanes[h].keys[i] > prefix;
            equal += lanes[h].keys[i] == prefix;
        }
        if (equal > equal_left) equal = equal_left;
        equal_left -= equal;
        double keep = nearbyint((1 - a) * (double)(held + equal) + a * base);
        uint64_t budget = (uint64_t)keep + lanes[h].n_protected;
        budgets[h] = budget < lanes[h].n_slots ? (uint32_t)budget : lanes[h].n_slots;
    }
}

void chooser_budgets(struct chooser *chooser) {
    const struct choose_request *request = &chooser->request;
    enum policy_budget shape = request->policy->budget;
    uint32_t reserved = most_protected(chooser), slots = 0;
    for (uint32_t l = 0; l < chooser->n_lanes; l++)
        if (chooser->lanes[l].n_slots > slots) slots = chooser->lanes[l].n_slots;
    uint32_t average = request->budget > reserved ? request->budget - reserved : 0;
    bool ramped = shape == BUDGET_RAMP || shape == BUDGET_RAMP_LAYER, pooled = shape == BUDGET_LAYER || shape == BUDGET_RAMP_LAYER;
    /* The budgets array doubles as the layers' list: layer <= lane, filled from the end. */
    uint32_t *layer_budget = chooser->budgets;
    if (ramped)
        ramp(chooser, average, slots > reserved ? slots - reserved : 0, layer_budget);
    else
        for (uint32_t layer = 0; layer < request->n_layers; layer++) layer_budget[layer] = average;
    for (uint32_t layer = request->n_layers; layer-- > 0;) {
        uint32_t base = layer_budget[layer];
        if (pooled) {
            pool_layer(chooser, layer, base);
            continue;
        }
        for (uint32_t h = request->n_kv_heads; h-- > 0;) {
            uint32_t lane = layer * request->n_kv_heads + h;
            uint32_t budget = base + reserved, least = chooser->lanes[lane].n_protected;
            chooser->budgets[lane] = budget > least ? budget : least;
        }
    }
}
