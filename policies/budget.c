/* How many slots each lane keeps: uniform, a ramp over layers, pooled over the lanes of a layer. Inside choose(); owns nothing. */
#include <math.h>

#include "base/check.h"
#include "policies/chooser.h"

static uint32_t most_protected(const struct chooser *chooser) {
    uint32_t most = 0;
    for (uint32_t l = 0; l < chooser->n_lanes; l++)
        if (chooser->n_protected[l] > most) most = chooser->n_protected[l];
    return most;
}

/* PyramidKV (arXiv 2406.02069, 3.2): with c the average beyond the protected slots, min = c/beta, max = 2c - min, a straight line from max in the first layer down to min in the last. Each
 * layer is rounded by itself (half down), not the step between them as in the published code, which would leave an average above the budget. A lane of fewer than 2c evictable slots has nothing to gain from it: uniform. */
static void ramp(const struct chooser *chooser, uint32_t average, uint32_t n, uint32_t *layer_budget) {
    const struct choose_request *request = &chooser->request;
    uint32_t layers = request->n_layers;
    uint32_t min = average / request->options->ramp, max = 2 * average - min;
    bool flat = n < 2 * average || layers < 2;
    if (max > n) {
        max = n;
        min = 2 * average > max ? 2 * average - max : 0;
    }
    uint32_t fall = max > min ? max - min : 0, steps = layers - 1;
    for (uint32_t layer = 0; layer < layers; layer++)
        layer_budget[layer] = flat ? average : max - (uint32_t)((2 * (uint64_t)layer * fall + steps) / (2 * (uint64_t)steps));
}

static uint64_t layer_evictable(const struct chooser *chooser, uint32_t layer) {
    uint64_t evictable = 0;
    for (uint32_t h = 0; h < chooser->request.n_kv_heads; h++) evictable += chooser_evictable(chooser, layer * chooser->request.n_kv_heads + h);
    return evictable;
}

/* Ada-KV (arXiv 2407.11550, algorithm 1; the safeguard is algorithm 2's alpha): of the layer's best H*b scores a lane holds c_h; it keeps (1 - a) c_h + a b. Equal scores: lanes in order.
 * b: what the lane would keep beyond its protected slots under a uniform budget, layer_budgets[layer]. chooser->cut: of the layer, the key of the best but H*b. */
static void pool_layer(const struct chooser *chooser, uint32_t layer) {
    const struct choose_request *request = &chooser->request;
    uint32_t heads = request->n_kv_heads, first = layer * heads, base = chooser->layer_budgets[layer];
    uint32_t *budgets = chooser->budgets + first;
    uint64_t wanted = (uint64_t)heads * base, above = 0;
    if (chooser->needed[layer] == 0) {
        for (uint32_t h = 0; h < heads; h++) budgets[h] = chooser->lanes[first + h].n_slots;
        return;
    }
    for (uint32_t h = 0; h < heads; h++)
        above += chooser_evictable(chooser, first + h) - chooser->cut[first + h].below - chooser->cut[first + h].equal;
    uint64_t equal_left = wanted > above ? wanted - above : 0;
    double a = request->options->floor;
    for (uint32_t h = 0; h < heads; h++) {
        const struct cut_lane *cut = &chooser->cut[first + h];
        uint64_t held = chooser_evictable(chooser, first + h) - cut->below - cut->equal, equal = cut->equal;
        if (equal > equal_left) equal = equal_left;
        equal_left -= equal;
        double keep = nearbyint((1 - a) * (double)(held + equal) + a * base);
        uint64_t budget = (uint64_t)keep + chooser->n_protected[first + h];
        budgets[h] = budget < chooser->lanes[first + h].n_slots ? (uint32_t)budget : chooser->lanes[first + h].n_slots;
    }
}

static void pool_layers(struct chooser *chooser) {
    const struct choose_request *request = &chooser->request;
    for (uint32_t layer = 0; layer < request->n_layers; layer++) {
        uint64_t evictable = layer_evictable(chooser, layer), wanted = (uint64_t)request->n_kv_heads * chooser->layer_budgets[layer];
        CHECK(evictable < UINT32_MAX);
        /* The evictable - wanted lowest, and one more: the least key of those that stay. */
        chooser->needed[layer] = evictable > wanted ? (uint32_t)(evictable - wanted) + 1 : 0;
    }
    const struct cut_request cut = {.lanes_each = request->n_kv_heads, .unit = 1, .needed = chooser->needed};
    chooser->backend->ops->cut(chooser->backend, chooser->place, &cut, chooser->cut);
}

void chooser_budgets_cut(struct chooser *chooser) {
    for (uint32_t layer = 0; layer < chooser->request.n_layers; layer++) pool_layer(chooser, layer);
}

bool chooser_budgets(struct chooser *chooser) {
    const struct choose_request *request = &chooser->request;
    enum policy_budget shape = request->policy->budget;
    uint32_t reserved = most_protected(chooser), slots = 0;
    for (uint32_t l = 0; l < chooser->n_lanes; l++)
        if (chooser->lanes[l].n_slots > slots) slots = chooser->lanes[l].n_slots;
    uint32_t average = request->budget > reserved ? request->budget - reserved : 0;
    bool ramped = shape == BUDGET_RAMP || shape == BUDGET_RAMP_LAYER, pooled = shape == BUDGET_LAYER || shape == BUDGET_RAMP_LAYER;
    if (ramped)
        ramp(chooser, average, slots > reserved ? slots - reserved : 0, chooser->layer_budgets);
    else
        for (uint32_t layer = 0; layer < request->n_layers; layer++) chooser->layer_budgets[layer] = average;
    if (pooled) {
        pool_layers(chooser);
        return false;
    }
    for (uint32_t l = 0; l < chooser->n_lanes; l++) {
        uint32_t budget = chooser->layer_budgets[l / request->n_kv_heads] + reserved, least = chooser->n_protected[l];
        chooser->budgets[l] = budget > least ? budget : least;
    }
    return true;
}
