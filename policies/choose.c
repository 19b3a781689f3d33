/* See choose.h: what a policy's scores are, protection, and the common way from a number of slots to the list of those that stay. Budgets are in budget.c, blocks in blocks.c, FastGen's
 * ladder in ladder.c. Owns nothing; any thread. */
#include "policies/choose.h"

#include <string.h>

#include "base/check.h"
#include "policies/chooser.h"

static size_t align(size_t bytes) { return (bytes + 63) / 64 * 64; }

static size_t whole_blocks(size_t slots) { return (slots + BLOCK_TOKENS - 1) / BLOCK_TOKENS * BLOCK_TOKENS; }

bool choose_needs_room(const struct policy *policy, bool wants_lists) { return wants_lists || policy->budget == BUDGET_LADDER; }

size_t choose_room_bytes(uint32_t slots_max, size_t slots_total) {
    return align(slots_total * sizeof(float)) + align(slots_max * sizeof(uint32_t)) + align(whole_blocks(slots_max) * sizeof(int32_t)) +
           align(slots_max);
}

size_t choose_scratch_bytes(uint32_t n_lanes) {
    return align(sizeof(struct chooser)) + 5 * align(n_lanes * sizeof(uint32_t)) + align(n_lanes * sizeof(struct cut_lane)) +
           align(n_lanes * sizeof(struct kept_lane));
}

static void *carve(char **scratch, size_t bytes) {
    char *memory = *scratch;
    *scratch += align(bytes);
    return memory;
}

/* ---- a policy as numbers ---- */

static enum rank_pooling pooling_of(enum pooling pooling) {
    switch (pooling) {
    case POOLING_NONE: return RANK_POOL_NONE;
    case POOLING_AVERAGE: return RANK_POOL_AVERAGE;
    case POOLING_MAX: return RANK_POOL_MAX;
    }
    CHECK(!"a pooling");
    return RANK_POOL_NONE;
}

static enum rank_fold fold_of(enum policy_reduce reduce) {
    switch (reduce) {
    case REDUCE_MEAN_POOL: return RANK_FOLD_MEAN_POOLED;
    case REDUCE_POOL_SUM: return RANK_FOLD_SUM_OF_POOLED;
    case REDUCE_MEAN:
    case REDUCE_LAYER: return RANK_FOLD_MEAN;
    }
    CHECK(!"a way to reduce");
    return RANK_FOLD_MEAN;
}

static uint32_t value_power(const struct choose_request *request) {
    const struct policy *policy = request->policy;
    if (policy->budget == BUDGET_LADDER || !(request->options->value_aware || policy->always_value)) return 0;
    return policy->kernel == SCORE_SQUARES ? 2 : 1;
}

static uint32_t protected_recent(const struct choose_request *request) {
    uint32_t recent = request->options->recent_tokens;
    if (request->policy->protects_window && request->n_window > recent) recent = request->n_window;
    if (request->policy->half_recent && request->budget / 2 > recent) recent = request->budget / 2;
    return recent;
}

static struct rank_request rank_of(const struct choose_request *request) {
    const struct policy *policy = request->policy;
    const struct policy_options *options = request->options;
    const bool scored = policy->scorer == SCORER_KERNEL;
    return (struct rank_request){
        .source = scored                            ? RANK_SCORES
                  : policy->scorer == SCORER_RANDOM ? RANK_RANDOM
                                                    : RANK_POSITIONS,
        .seed = options->seed,
        .score = {.kind = policy->kernel,
                  .ring = request->ring,
                  .last_position = request->last_position,
                  .n_window = request->n_window,
                  .ahead = options->ahead,
                  .block_ids = request->block_ids,
                  .lane_first = request->lane_first,
                  .lane_tokens = request->lane_tokens},
        .fold = fold_of(policy->reduce),
        .pooling = pooling_of(options->pooling),
        .pooling_kernel = options->pooling_kernel,
        .value_power = scored ? value_power(request) : 0,
        .layer_mean = scored && policy->reduce == REDUCE_LAYER,
        .protect_below = options->sink_tokens > options->protect_tokens ? options->sink_tokens : options->protect_tokens,
        .protect_above = (int64_t)request->last_position - protected_recent(request),
    };
}

/* ---- lists ---- */

static void keep_all(const struct choose_request *request, struct choose_lane *lane, uint32_t *list) {
    lane->n_keep = lane->first_moved = lane->n_slots;
    if (!request->wants_lists) return;
    lane->keep = list;
    for (uint32_t i = 0; i < lane->n_slots; i++) list[i] = i;
}

/* Whole blocks between the pinned first ones and the recents: the oldest go. */
static void drop_blocks(const struct choose_request *request, uint32_t budget, struct choose_lane *lane, uint32_t *list) {
    const struct policy_options *options = request->options;
    uint32_t size = request->block_tokens, sinks = options->sink_tokens > options->protect_tokens ? options->sink_tokens : options->protect_tokens;
    uint32_t pinned = (sinks + size - 1) / size, recent = options->recent_tokens;
    keep_all(request, lane, list);
    if (lane->n_slots <= budget || lane->n_slots <= pinned * size + recent) return;
    uint32_t wanted = (lane->n_slots - budget + size - 1) / size, possible = (lane->n_slots - pinned * size - recent) / size;
    uint32_t dropped = wanted < possible ? wanted : possible;
    if (dropped == 0) return;
    lane->n_keep = lane->n_slots - dropped * size;
    lane->first_moved = pinned * size;
    for (uint32_t i = pinned * size; lane->keep && i < lane->n_keep; i++) lane->keep[i] = i + dropped * size;
}

static void keep_budgets(struct chooser *chooser) {
    uint32_t *list = chooser->request.wants_lists ? chooser->request.lists : NULL;
    for (uint32_t l = 0; l < chooser->n_lanes; l++) {
        uint32_t n = chooser->lanes[l].n_slots, budget = chooser->budgets[l];
        chooser->evict[l] = n > budget ? n - budget : 0;
        if (chooser->request.policy->granularity == GRANULARITY_BLOCK) drop_blocks(&chooser->request, budget, &chooser->lanes[l], list);
        if (list) list += n;
    }
}

/* Of each lane the `evict` lowest go; of equals the newest. */
static void list_best(struct chooser *chooser) {
    uint32_t *lists = chooser->request.wants_lists ? chooser->request.lists : NULL;
    chooser->backend->ops->keep(chooser->backend, chooser->place, chooser->evict, chooser->kept, lists);
    chooser->stage = CHOOSER_LISTED;
}

static void keep_best(struct chooser *chooser) {
    uint32_t *list = chooser->request.wants_lists ? chooser->request.lists : NULL;
    for (uint32_t l = 0; l < chooser->n_lanes; l++) {
        struct choose_lane *lane = &chooser->lanes[l];
        lane->n_keep = chooser->kept[l].n_keep;
        lane->first_moved = chooser->kept[l].first_moved;
        lane->keep = list;
        if (list) list += lane->n_slots;
    }
}

static struct chooser *prepare(const struct choose_request *request, struct backend *backend, uint32_t place, struct choose_lane *lanes,
                               void *scratch) {
    uint32_t n_lanes = request->n_layers * request->n_kv_heads;
    char *memory = scratch;
    struct chooser *chooser = carve(&memory, sizeof *chooser);
    *chooser =
        (struct chooser){.request = *request, .backend = backend, .place = place, .rank = rank_of(request), .lanes = lanes, .n_lanes = n_lanes};
    uint32_t **const counts[] = {&chooser->n_protected, &chooser->budgets, &chooser->evict, &chooser->layer_budgets, &chooser->needed};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) *counts[i] = carve(&memory, n_lanes * sizeof(uint32_t));
    chooser->cut = carve(&memory, n_lanes * sizeof *chooser->cut);
    chooser->kept = carve(&memory, n_lanes * sizeof *chooser->kept);
    return chooser;
}

static void furnish(struct chooser *chooser, uint32_t slots_max, size_t slots_total) {
    char *room = chooser->request.room;
    chooser->scores = carve(&room, slots_total * sizeof *chooser->scores);
    chooser->keys = carve(&room, slots_max * sizeof *chooser->keys);
    chooser->positions = carve(&room, whole_blocks(slots_max) * sizeof *chooser->positions);
    chooser->flags = carve(&room, slots_max);
}

struct chooser *choose_begin(const struct choose_request *request, struct backend *backend, uint32_t place, struct choose_lane *lanes,
                             void *scratch) {
    const struct policy *policy = request->policy;
    uint32_t n_lanes = request->n_layers * request->n_kv_heads, slots_max = 0;
    size_t slots_total = 0;
    CHECK(!choose_needs_room(policy, request->wants_lists) || (request->lists && request->room));
    for (uint32_t l = 0; l < n_lanes; l++) {
        lanes[l] = (struct choose_lane){.n_slots = request->lane_tokens[l]};
        keep_all(request, &lanes[l], request->wants_lists ? request->lists + slots_total : NULL);
        slots_total += lanes[l].n_slots;
        if (lanes[l].n_slots > slots_max) slots_max = lanes[l].n_slots;
    }
    if (policy->scorer == SCORER_NONE || (slots_max <= request->budget && policy->budget != BUDGET_LADDER)) return NULL;
    struct chooser *chooser = prepare(request, backend, place, lanes, scratch);
    if (policy->budget == BUDGET_LADDER) furnish(chooser, slots_max, slots_total);
    backend->ops->rank(backend, place, &chooser->rank, policy->budget == BUDGET_BLOCKS ? NULL : chooser->n_protected,
                       policy->budget == BUDGET_LADDER ? chooser->scores : NULL);
    chooser->stage = CHOOSER_RANKED;
    if (policy->budget == BUDGET_BLOCKS) {
        chooser_blocks(chooser);
        chooser->stage = CHOOSER_CUT;
    }
    return chooser;
}

bool choose_go_on(struct chooser *chooser) {
    const struct policy *policy = chooser->request.policy;
    switch (chooser->stage) {
    case CHOOSER_LISTED: keep_best(chooser); return false;
    case CHOOSER_RANKED:
        if (policy->budget == BUDGET_LADDER) {
            chooser_ladder(chooser);
            return false;
        }
        if (!chooser_budgets(chooser)) {
            chooser->stage = CHOOSER_CUT;
            return true;
        }
        keep_budgets(chooser);
        break;
    case CHOOSER_CUT:
        if (policy->budget == BUDGET_BLOCKS) {
            chooser_blocks_cut(chooser);
            break;
        }
        chooser_budgets_cut(chooser);
        keep_budgets(chooser);
        break;
    default: CHECK(!"a stage");
    }
    if (policy->granularity != GRANULARITY_SLOT) return false;
    list_best(chooser);
    return true;
}

void choose_hits(const struct choose_lane *lane, const float *persistence, uint32_t group, double *kept, double *all) {
    for (uint32_t h = 0; h < group; h++) {
        const float *row = persistence + (size_t)h * lane->n_slots;
        for (uint32_t i = 0; i < lane->n_slots; i++) *all += (double)row[i];
        for (uint32_t i = 0; i < lane->n_keep; i++) *kept += (double)row[lane->keep[i]];
    }
}
