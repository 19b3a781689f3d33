/* See choose.h: scores, protection and the common way from a number of slots to the list of those that stay. Budgets are in budget.c, blocks in blocks.c, FastGen's ladder in
 * ladder.c. Owns nothing; any thread. */
#include "policies/choose.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "base/check.h"
#include "base/half.h"
#include "base/random.h"
#include "policies/chooser.h"

static size_t align(size_t bytes) { return (bytes + 63) / 64 * 64; }

size_t choose_scratch_bytes(uint32_t n_lanes, uint32_t slots_max, size_t slots_total) {
    return align(sizeof(struct chooser)) + align(slots_total * sizeof(uint32_t)) + align(slots_total * sizeof(float)) +
           align(n_lanes * sizeof(struct chooser_lane)) + align(n_lanes * sizeof(struct radix_counts)) + 2 * align(slots_max * sizeof(float)) +
           align(slots_max) + align(n_lanes * sizeof(uint32_t)) + 64;
}

static void *carve(char **scratch, size_t bytes) {
    char *memory = *scratch;
    *scratch += align(bytes);
    return memory;
}

/* Order of floats as order of integers; the highest key is kept for protected slots, NaN is the lowest. */
static uint32_t key_of(float score) {
    if (isnan(score)) return 0;
    uint32_t bits = float_bits(score), key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return key == CHOOSER_PROTECTED ? key - 1 : key;
}

static void pool(const struct policy_options *options, const float *in, float *out, uint32_t n) {
    if (options->pooling == POOLING_NONE || options->pooling_kernel <= 1) {
        memcpy(out, in, n * sizeof *out);
        return;
    }
    uint32_t half = options->pooling_kernel / 2;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t first = i < half ? 0 : i - half, last = i + half < n ? i + half : n - 1;
        float sum = 0, max = -FLT_MAX;
        for (uint32_t j = first; j <= last; j++) {
            sum += in[j];
            max = in[j] > max ? in[j] : max;
        }
        /* Same padding, zeros counted, as the published pooling does. */
        out[i] = options->pooling == POOLING_MAX ? max : sum / (float)options->pooling_kernel;
    }
}

/* One number a slot from what the kernel gave: `out` [n_slots]. */
static void reduce(const struct choose_request *request, const struct choose_lane *lane, float *out, float *sum, float *pooled) {
    const struct policy *policy = request->policy;
    uint32_t n = lane->n_slots;
    if (!score_per_query_head(policy->kernel)) {
        memcpy(out, lane->raw, n * sizeof *out);
        return;
    }
    bool pool_first = policy->reduce == REDUCE_POOL_SUM, pool_last = policy->reduce == REDUCE_MEAN_POOL;
    memset(sum, 0, n * sizeof *sum);
    for (uint32_t h = 0; h < request->group; h++) {
        const float *row = lane->raw + (size_t)h * n;
        if (pool_first) {
            pool(request->options, row, pooled, n);
            row = pooled;
        }
        for (uint32_t i = 0; i < n; i++) sum[i] += row[i];
    }
    if (!pool_first)
        for (uint32_t i = 0; i < n; i++) sum[i] /= (float)request->group;
    if (pool_last)
        pool(request->options, sum, out, n);
    else
        memcpy(out, sum, n * sizeof *out);
}

static void value_factor(const struct choose_request *request, const struct choose_lane *lane, float *score) {
    if (!lane->value_norms || request->policy->budget == BUDGET_LADDER || !(request->options->value_aware || request->policy->always_value)) return;
    for (uint32_t i = 0; i < lane->n_slots; i++) {
        float norm = lane->value_norms[i];
        score[i] *= request->policy->kernel == SCORE_SQUARES ? norm * norm : norm;
    }
}

static float score_without_kernel(const struct choose_request *request, int32_t position) {
    if (request->policy->scorer == SCORER_RANDOM) return random_unit(random_at(request->options->seed, (uint64_t)(uint32_t)position, 0, 0));
    return (float)position; /* recents */
}

static uint32_t protected_recent(const struct choose_request *request) {
    uint32_t recent = request->options->recent_tokens;
    if (request->policy->protects_window && request->n_window > recent) recent = request->n_window;
    if (request->policy->half_recent && request->budget / 2 > recent) recent = request->budget / 2;
    return recent;
}

static void protect(const struct choose_request *request, const struct choose_lane *lane, struct chooser_lane *mine) {
    const struct policy_options *options = request->options;
    int64_t first = options->sink_tokens > options->protect_tokens ? options->sink_tokens : options->protect_tokens;
    int64_t last = (int64_t)request->last_position - protected_recent(request);
    mine->n_protected = 0;
    for (uint32_t i = 0; i < lane->n_slots; i++)
        if (lane->positions[i] < first || lane->positions[i] > last) {
            mine->keys[i] = CHOOSER_PROTECTED;
            mine->n_protected++;
        }
}

/* Lanes of a layer that hold the same positions get the mean of their scores. */
static void average_layer(const struct choose_request *request, const struct choose_lane *lanes, float **scores) {
    uint32_t n = lanes[0].n_slots, heads = request->n_kv_heads;
    for (uint32_t h = 1; h < heads; h++)
        if (lanes[h].n_slots != n || memcmp(lanes[h].positions, lanes[0].positions, n * sizeof *lanes[h].positions) != 0) return;
    for (uint32_t i = 0; i < n; i++) {
        float sum = 0;
        for (uint32_t h = 0; h < heads; h++) sum += scores[h][i];
        for (uint32_t h = 0; h < heads; h++) scores[h][i] = sum / (float)heads;
    }
}

void choose_layer(struct chooser *chooser, uint32_t layer) {
    const struct choose_request *request = &chooser->request;
    const struct choose_lane *lane = chooser->results + (size_t)layer * request->n_kv_heads;
    struct chooser_lane *mine = chooser->lanes + (size_t)layer * request->n_kv_heads;
    float *scores[CHOOSER_HEADS_MAX];
    CHECK(layer < request->n_layers && request->n_kv_heads <= CHOOSER_HEADS_MAX);
    for (uint32_t h = 0; h < request->n_kv_heads; h++) {
        scores[h] = mine[h].scores;
        if (request->policy->scorer == SCORER_KERNEL) {
            reduce(request, &lane[h], scores[h], chooser->floats[0], chooser->floats[1]);
            value_factor(request, &lane[h], scores[h]);
        } else {
            for (uint32_t i = 0; i < lane[h].n_slots; i++) scores[h][i] = score_without_kernel(request, lane[h].positions[i]);
        }
    }
    if (request->policy->scorer == SCORER_KERNEL && request->policy->reduce == REDUCE_LAYER) average_layer(request, lane, scores);
    for (uint32_t h = 0; h < request->n_kv_heads; h++) {
        for (uint32_t i = 0; i < lane[h].n_slots; i++) mine[h].keys[i] = key_of(scores[h][i]);
        protect(request, &lane[h], &mine[h]);
    }
}

static void keep_all(struct choose_lane *lane) {
    for (uint32_t i = 0; i < lane->n_slots; i++) lane->keep[i] = i;
    lane->n_keep = lane->n_slots;
}

/* All but the `evict` lowest; of equals the newest go. */
void chooser_keep(const struct chooser_lane *mine, uint32_t evict, struct choose_lane *lane) {
    uint32_t n = lane->n_slots, evictable = n - mine->n_protected;
    if (evict > evictable) evict = evictable;
    if (evict == 0) {
        keep_all(lane);
        return;
    }
    uint32_t below;
    uint32_t threshold = chooser_rank(mine->keys, n, evict - 1, &below);
    uint32_t equal = 0;
    for (uint32_t i = 0; i < n; i++) equal += mine->keys[i] == threshold;
    uint32_t equal_kept = equal - (evict - below);
    lane->n_keep = 0;
    for (uint32_t i = 0; i < n; i++) {
        bool stays = mine->keys[i] > threshold;
        if (mine->keys[i] == threshold && equal_kept > 0) {
            stays = true;
            equal_kept--;
        }
        if (stays) lane->keep[lane->n_keep++] = i;
    }
}

/* The key of ascending rank `rank` (0-based) and how many are strictly below it. Four counting passes of a byte each. */
uint32_t chooser_rank(const uint32_t *keys, uint32_t n, uint32_t rank, uint32_t *below) {
    CHECK(rank < n);
    uint32_t prefix = 0, mask = 0;
    *below = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        uint32_t counts[256] = {0};
        for (uint32_t i = 0; i < n; i++)
            if ((keys[i] & mask) == prefix) counts[keys[i] >> shift & 255]++;
        uint32_t byte = 0;
        while (*below + counts[byte] <= rank) *below += counts[byte++];
        prefix |= byte << shift;
        mask |= 255u << shift;
    }
    return prefix;
}

/* Whole blocks between the pinned first ones and the recents: the oldest go. */
static void drop_blocks(const struct choose_request *request, uint32_t budget, struct choose_lane *lane) {
    const struct policy_options *options = request->options;
    uint32_t size = request->block_tokens, sinks = options->sink_tokens > options->protect_tokens ? options->sink_tokens : options->protect_tokens;
    uint32_t pinned = (sinks + size - 1) / size, recent = options->recent_tokens;
    if (lane->n_slots <= budget || lane->n_slots <= pinned * size + recent) {
        keep_all(lane);
        return;
    }
    uint32_t wanted = (lane->n_slots - budget + size - 1) / size, possible = (lane->n_slots - pinned * size - recent) / size;
    uint32_t dropped = wanted < possible ? wanted : possible;
    lane->n_keep = 0;
    for (uint32_t i = 0; i < lane->n_slots; i++)
        if (i < pinned * size || i >= (pinned + dropped) * size) lane->keep[lane->n_keep++] = i;
}

static void keep_budgets(struct chooser *chooser) {
    struct choose_lane *lanes = chooser->results;
    for (uint32_t l = 0; l < chooser->n_lanes; l++) {
        uint32_t n = lanes[l].n_slots, budget = chooser->budgets[l];
        if (chooser->request.policy->granularity == GRANULARITY_BLOCK)
            drop_blocks(&chooser->request, budget, &lanes[l]);
        else
            chooser_keep(&chooser->lanes[l], n > budget ? n - budget : 0, &lanes[l]);
    }
}

bool choose_begin(const struct choose_request *request, struct choose_lane *lanes, void *scratch, struct chooser **result) {
    uint32_t n_lanes = request->n_layers * request->n_kv_heads, slots_max = 0;
    size_t slots_total = 0;
    for (uint32_t l = 0; l < n_lanes; l++) {
        slots_total += lanes[l].n_slots;
        if (lanes[l].n_slots > slots_max) slots_max = lanes[l].n_slots;
    }
    if (request->policy->scorer == SCORER_NONE || (slots_max <= request->budget && request->policy->budget != BUDGET_LADDER)) {
        for (uint32_t l = 0; l < n_lanes; l++) keep_all(&lanes[l]);
        return false;
    }
    char *memory = scratch;
    struct chooser *chooser = carve(&memory, sizeof *chooser);
    *chooser = (struct chooser){.request = *request, .n_lanes = n_lanes, .results = lanes};
    uint32_t *keys = carve(&memory, slots_total * sizeof *keys);
    float *scores = carve(&memory, slots_total * sizeof *scores);
    chooser->lanes = carve(&memory, n_lanes * sizeof *chooser->lanes);
    chooser->counts = carve(&memory, n_lanes * sizeof *chooser->counts);
    for (int i = 0; i < 2; i++) chooser->floats[i] = carve(&memory, slots_max * sizeof(float));
    chooser->flags = carve(&memory, slots_max);
    chooser->budgets = carve(&memory, n_lanes * sizeof *chooser->budgets);
    for (uint32_t l = 0; l < n_lanes; l++) {
        chooser->lanes[l] = (struct chooser_lane){.keys = keys, .scores = scores, .n_slots = lanes[l].n_slots};
        keys += lanes[l].n_slots;
        scores += lanes[l].n_slots;
    }
    *result = chooser;
    return true;
}

void choose_end(struct chooser *chooser) {
    switch (chooser->request.policy->budget) {
    case BUDGET_BLOCKS: chooser_blocks(chooser); return;
    case BUDGET_LADDER: chooser_ladder(chooser); return;
    default: chooser_budgets(chooser); keep_budgets(chooser);
    }
}

void choose(const struct choose_request *request, struct choose_lane *lanes, void *scratch) {
    struct chooser *chooser;
    if (!choose_begin(request, lanes, scratch, &chooser)) return;
    for (uint32_t layer = 0; layer < request->n_layers; layer++) choose_layer(chooser, layer);
    choose_end(chooser);
}

void choose_hits(const struct choose_lane *lane, const float *persistence, uint32_t group, double *kept, double *all) {
    for (uint32_t h = 0; h < group; h++) {
        const float *row = persistence + (size_t)h * lane->n_slots;
        for (uint32_t i = 0; i < lane->n_slots; i++) *all += (double)row[i];
        for (uint32_t i = 0; i < lane->n_keep; i++) *kept += (double)row[lane->keep[i]];
    }
}
