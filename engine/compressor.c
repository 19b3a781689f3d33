/* See compressor.h. */
#include "engine/compressor.h"

#include <stdlib.h>
#include <string.h>

#include "base/check.h"

#define RAW_BYTES_WANTED (8u << 20) /* raw scores of as many layers at a time as fit; one at least */

struct compressor {
    struct backend *backend;
    const struct program *program;
    struct compressor_limits limits;
    uint32_t n_lanes, group, raw_layers;
    struct choose_lane *lanes;
    int32_t *positions; /* [slots_total] */
    uint32_t *keep;     /* [slots_total] */
    float *raw;         /* [raw_layers * n_kv_heads * group * slots_max] */
    float *norms;       /* [raw_layers * n_kv_heads * slots_max] */
    size_t *offset;
    int32_t *block_positions; /* [slots_max rounded up to blocks] */
    void *scratch;
};

static uint32_t layers_at_once(const struct program *program, const struct compressor_limits *limits) {
    size_t layer = (size_t)program->n_heads * limits->slots_max * sizeof(float);
    size_t layers = RAW_BYTES_WANTED / (layer ? layer : 1);
    return layers < 1 ? 1 : layers > program->n_layers ? program->n_layers : (uint32_t)layers;
}

static uint32_t padded(uint32_t slots) { return (slots + BLOCK_TOKENS - 1) / BLOCK_TOKENS * BLOCK_TOKENS; }

uint64_t compressor_bytes(const struct program *program, const struct compressor_limits *limits) {
    uint64_t lanes = program_lanes(program), layers = layers_at_once(program, limits);
    return lanes * (sizeof(struct choose_lane) + sizeof(size_t)) + limits->slots_total * (uint64_t)(sizeof(int32_t) + sizeof(uint32_t)) +
           layers * (program->n_heads + program->n_kv_heads) * limits->slots_max * sizeof(float) + padded(limits->slots_max) * sizeof(int32_t) +
           choose_scratch_bytes((uint32_t)lanes, limits->slots_max, limits->slots_total);
}

struct compressor *compressor_new(struct backend *backend, const struct program *program, const struct compressor_limits *limits) {
    struct compressor *compressor = check_calloc(1, sizeof *compressor);
    *compressor = (struct compressor){.backend = backend,
                                      .program = program,
                                      .limits = *limits,
                                      .n_lanes = program_lanes(program),
                                      .group = program->n_heads / program->n_kv_heads,
                                      .raw_layers = layers_at_once(program, limits)};
    size_t lanes = (size_t)compressor->raw_layers * program->n_kv_heads;
    compressor->lanes = check_calloc(compressor->n_lanes, sizeof *compressor->lanes);
    compressor->positions = check_calloc(limits->slots_total, sizeof *compressor->positions);
    compressor->keep = check_calloc(limits->slots_total, sizeof *compressor->keep);
    compressor->raw = check_calloc(lanes * compressor->group * limits->slots_max, sizeof *compressor->raw);
    compressor->norms = check_calloc(lanes * limits->slots_max, sizeof *compressor->norms);
    compressor->offset = check_calloc(compressor->n_lanes, sizeof *compressor->offset);
    compressor->block_positions = check_calloc(padded(limits->slots_max), sizeof *compressor->block_positions);
    compressor->scratch = check_calloc(1, choose_scratch_bytes(compressor->n_lanes, limits->slots_max, limits->slots_total));
    return compressor;
}

void compressor_free(struct compressor *compressor) {
    if (!compressor) return;
    free(compressor->lanes);
    free(compressor->positions);
    free(compressor->keep);
    free(compressor->raw);
    free(compressor->norms);
    free(compressor->offset);
    free(compressor->block_positions);
    free(compressor->scratch);
    free(compressor);
}

static void lay_out(struct compressor *compressor, const struct compressor_sequence *sequence) {
    size_t used = 0;
    for (uint32_t l = 0; l < compressor->n_lanes; l++) {
        uint32_t n = sequence->lane_tokens[l];
        CHECK(n <= compressor->limits.slots_max && used + n <= compressor->limits.slots_total);
        compressor->backend->ops->read_positions(compressor->backend, (n + BLOCK_TOKENS - 1) / BLOCK_TOKENS,
                                                 sequence->block_ids + sequence->lane_first[l], compressor->block_positions);
        memcpy(compressor->positions + used, compressor->block_positions, n * sizeof *compressor->positions);
        compressor->lanes[l] = (struct choose_lane){.n_slots = n, .positions = compressor->positions + used, .keep = compressor->keep + used};
        used += n;
    }
}

/* Raw numbers of `n_layers` layers from `layer` on into `numbers`, lane after lane. */
static void score_layers(struct compressor *compressor, const struct compressor_sequence *sequence, const struct kv_plan *plan, enum score_kind kind,
                         uint32_t layer, uint32_t n_layers, uint32_t n_window, float *numbers) {
    uint32_t heads = compressor->program->n_kv_heads, per_slot = score_per_query_head(kind) ? compressor->group : 1;
    size_t used = 0;
    for (uint32_t l = layer * heads; l < (layer + n_layers) * heads; l++) {
        compressor->offset[l] = used;
        used += (size_t)per_slot * sequence->lane_tokens[l];
    }
    struct score_request request = {.kind = kind,
                                    .ring = sequence->ring,
                                    .last_position = (int32_t)sequence->n_computed - 1,
                                    .n_window = n_window,
                                    .ahead = plan->options.ahead,
                                    .first_lane = layer * heads,
                                    .n_lanes = n_layers * heads,
                                    .block_ids = sequence->block_ids,
                                    .lane_first = sequence->lane_first,
                                    .lane_tokens = sequence->lane_tokens,
                                    .offset = compressor->offset};
    compressor->backend->ops->score(compressor->backend, &request, numbers);
}

static bool needs_values(const struct kv_plan *plan) {
    return plan->policy->scorer == SCORER_KERNEL && plan->policy->budget != BUDGET_LADDER &&
           (plan->options.value_aware || plan->policy->always_value);
}

static void choose_layers(struct compressor *compressor, const struct kv_plan *plan, const struct compressor_sequence *sequence, uint32_t n_window,
                          struct chooser *chooser) {
    uint32_t heads = compressor->program->n_kv_heads;
    for (uint32_t first = 0; first < compressor->program->n_layers; first += compressor->raw_layers) {
        uint32_t left = compressor->program->n_layers - first, count = left < compressor->raw_layers ? left : compressor->raw_layers;
        if (needs_values(plan)) {
            score_layers(compressor, sequence, plan, SCORE_VALUE_NORM, first, count, n_window, compressor->norms);
            for (uint32_t l = first * heads; l < (first + count) * heads; l++)
                compressor->lanes[l].value_norms = compressor->norms + compressor->offset[l];
        }
        if (plan->policy->scorer == SCORER_KERNEL) {
            score_layers(compressor, sequence, plan, plan->policy->kernel, first, count, n_window, compressor->raw);
            for (uint32_t l = first * heads; l < (first + count) * heads; l++) compressor->lanes[l].raw = compressor->raw + compressor->offset[l];
        }
        for (uint32_t layer = first; layer < first + count; layer++) choose_layer(chooser, layer);
    }
}

static void measure(struct compressor *compressor, const struct kv_plan *plan, const struct compressor_sequence *sequence, uint32_t n_window,
                    struct compressor_result *result) {
    uint32_t heads = compressor->program->n_kv_heads;
    for (uint32_t first = 0; first < compressor->program->n_layers; first += compressor->raw_layers) {
        uint32_t left = compressor->program->n_layers - first, count = left < compressor->raw_layers ? left : compressor->raw_layers;
        score_layers(compressor, sequence, plan, SCORE_PERSISTENCE, first, count, n_window, compressor->raw);
        for (uint32_t l = first * heads; l < (first + count) * heads; l++)
            choose_hits(&compressor->lanes[l], compressor->raw + compressor->offset[l], compressor->group, &result->hits_kept, &result->hits_all);
    }
}

bool compressor_choose(struct compressor *compressor, const struct kv_plan *plan, const struct compressor_sequence *sequence, bool measure_hits,
                       struct compressor_result *result) {
    *result = (struct compressor_result){.lanes = compressor->lanes};
    lay_out(compressor, sequence);
    uint32_t window = sequence->n_window;
    struct choose_request request = {.policy = plan->policy,
                                     .options = &plan->options,
                                     .n_layers = compressor->program->n_layers,
                                     .n_kv_heads = compressor->program->n_kv_heads,
                                     .group = compressor->group,
                                     .block_tokens = BLOCK_TOKENS,
                                     .budget = policy_target_tokens(&plan->target, sequence->n_computed),
                                     .n_window = window,
                                     .last_position = (int32_t)sequence->n_computed - 1,
                                     .tokens = sequence->tokens,
                                     .classes = compressor->limits.classes};
    struct chooser *chooser;
    bool chosen = choose_begin(&request, compressor->lanes, compressor->scratch, &chooser);
    if (chosen) {
        choose_layers(compressor, plan, sequence, window, chooser);
        choose_end(chooser);
    }
    for (uint32_t l = 0; l < compressor->n_lanes; l++) {
        result->n_slots += compressor->lanes[l].n_slots;
        result->n_keep += compressor->lanes[l].n_keep;
    }
    if (measure_hits && sequence->ring) measure(compressor, plan, sequence, window, result);
    return result->n_keep < result->n_slots;
}
