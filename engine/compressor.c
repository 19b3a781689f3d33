/* See compressor.h. */
#include "engine/compressor.h"

#include <stdlib.h>

#include "base/check.h"

#define RAW_BYTES_WANTED (8u << 20) /* persistence of as many layers at a time as fit; one at least */

struct place {
    bool taken, measure_hits, uses_room;
    struct chooser *chooser; /* NULL: the lanes are filled */
    struct compressor_sequence sequence;
    struct choose_lane *lanes; /* [n_lanes] */
    void *scratch;
};

struct compressor {
    struct backend *backend;
    const struct program *program;
    struct compressor_limits limits;
    uint32_t n_lanes, group, raw_layers, n_places;
    struct place places[RANK_PLACES_MAX];
    /* Of one choice at a time: */
    bool room_taken;
    uint32_t *lists; /* [slots_total] */
    void *room;
    float *raw; /* [raw_layers * n_kv_heads * group * slots_max] */
    size_t *offset;
    struct head_hits *hits;
};

static uint32_t layers_at_once(const struct program *program, const struct compressor_limits *limits) {
    size_t layer = (size_t)program->n_heads * limits->slots_max * sizeof(float);
    size_t layers = RAW_BYTES_WANTED / (layer ? layer : 1);
    return layers < 1 ? 1 : layers > program->n_layers ? program->n_layers : (uint32_t)layers;
}

uint64_t compressor_bytes(const struct program *program, const struct compressor_limits *limits) {
    uint64_t lanes = program_lanes(program), layers = layers_at_once(program, limits);
    return lanes * (sizeof(size_t) + sizeof(struct head_hits)) + limits->slots_total * (uint64_t)sizeof(uint32_t) +
           layers * program->n_heads * limits->slots_max * sizeof(float) + choose_room_bytes(limits->slots_max, limits->slots_total) +
           RANK_PLACES_MAX * (lanes * sizeof(struct choose_lane) + choose_scratch_bytes((uint32_t)lanes));
}

struct compressor *compressor_new(struct backend *backend, const struct program *program, const struct compressor_limits *limits) {
    struct compressor *compressor = check_calloc(1, sizeof *compressor);
    *compressor = (struct compressor){.backend = backend,
                                      .program = program,
                                      .limits = *limits,
                                      .n_lanes = program_lanes(program),
                                      .group = program->n_heads / program->n_kv_heads,
                                      .raw_layers = layers_at_once(program, limits),
                                      .n_places = backend->rank_places};
    CHECK(compressor->n_places >= 1 && compressor->n_places <= RANK_PLACES_MAX);
    for (uint32_t i = 0; i < compressor->n_places; i++) {
        compressor->places[i].lanes = check_calloc(compressor->n_lanes, sizeof(struct choose_lane));
        compressor->places[i].scratch = check_calloc(1, choose_scratch_bytes(compressor->n_lanes));
    }
    compressor->lists = check_calloc(limits->slots_total, sizeof *compressor->lists);
    compressor->raw = check_calloc((size_t)compressor->raw_layers * program->n_heads * limits->slots_max, sizeof *compressor->raw);
    compressor->offset = check_calloc(compressor->n_lanes, sizeof *compressor->offset);
    compressor->hits = check_calloc(compressor->n_lanes, sizeof *compressor->hits);
    compressor->room = check_calloc(1, choose_room_bytes(limits->slots_max, limits->slots_total));
    return compressor;
}

void compressor_free(struct compressor *compressor) {
    if (!compressor) return;
    for (uint32_t i = 0; i < compressor->n_places; i++) {
        free(compressor->places[i].lanes);
        free(compressor->places[i].scratch);
    }
    free(compressor->lists);
    free(compressor->raw);
    free(compressor->offset);
    free(compressor->hits);
    free(compressor->room);
    free(compressor);
}

/* Persistence of `n_layers` layers from `layer` on into compressor->raw, lane after lane. */
static void score_layers(struct compressor *compressor, const struct compressor_sequence *sequence, uint32_t layer, uint32_t n_layers) {
    uint32_t heads = compressor->program->n_kv_heads;
    size_t used = 0;
    for (uint32_t l = layer * heads; l < (layer + n_layers) * heads; l++) {
        compressor->offset[l] = used;
        used += (size_t)compressor->group * sequence->lane_tokens[l];
    }
    const struct score_request request = {.kind = SCORE_PERSISTENCE,
                                          .ring = sequence->ring,
                                          .last_position = (int32_t)sequence->n_computed - 1,
                                          .n_window = sequence->n_window,
                                          .first_lane = layer * heads,
                                          .n_lanes = n_layers * heads,
                                          .block_ids = sequence->block_ids,
                                          .lane_first = sequence->lane_first,
                                          .lane_tokens = sequence->lane_tokens,
                                          .offset = compressor->offset};
    compressor->backend->ops->score(compressor->backend, &request, compressor->raw);
}

static void measure(struct compressor *compressor, const struct place *place, struct compressor_result *result) {
    uint32_t heads = compressor->program->n_kv_heads;
    for (uint32_t first = 0; first < compressor->program->n_layers; first += compressor->raw_layers) {
        uint32_t left = compressor->program->n_layers - first, count = left < compressor->raw_layers ? left : compressor->raw_layers;
        score_layers(compressor, &place->sequence, first, count);
        for (uint32_t l = first * heads; l < (first + count) * heads; l++) {
            struct head_hits *hits = &compressor->hits[l];
            *hits = (struct head_hits){0};
            choose_hits(&place->lanes[l], compressor->raw + compressor->offset[l], compressor->group, &hits->kept, &hits->all);
            result->hits_kept += hits->kept;
            result->hits_all += hits->all;
        }
    }
    result->hits = compressor->hits;
}

bool compressor_needs_room(const struct compressor *compressor, const struct kv_plan *plan, bool measure_hits) {
    return choose_needs_room(plan->policy, measure_hits || compressor->limits.lists);
}

static uint32_t free_place(const struct compressor *compressor) {
    for (uint32_t i = 0; i < compressor->n_places; i++)
        if (!compressor->places[i].taken) return i;
    return COMPRESSOR_PLACE_NONE;
}

uint32_t compressor_begin(struct compressor *compressor, const struct kv_plan *plan, const struct compressor_sequence *sequence, bool measure_hits) {
    const uint32_t at = free_place(compressor);
    size_t slots = 0;
    for (uint32_t l = 0; l < compressor->n_lanes; l++) {
        CHECK(sequence->lane_tokens[l] <= compressor->limits.slots_max);
        slots += sequence->lane_tokens[l];
    }
    CHECK(slots <= compressor->limits.slots_total);
    measure_hits = measure_hits && sequence->ring;
    const bool uses_room = compressor_needs_room(compressor, plan, measure_hits);
    if (at == COMPRESSOR_PLACE_NONE || (uses_room && compressor->room_taken)) return COMPRESSOR_PLACE_NONE;
    struct place *place = &compressor->places[at];
    *place = (struct place){
        .taken = true, .measure_hits = measure_hits, .uses_room = uses_room, .sequence = *sequence, .lanes = place->lanes, .scratch = place->scratch};
    if (uses_room) compressor->room_taken = true;
    const struct choose_request request = {.policy = plan->policy,
                                           .options = &plan->options,
                                           .n_layers = compressor->program->n_layers,
                                           .n_kv_heads = compressor->program->n_kv_heads,
                                           .block_tokens = BLOCK_TOKENS,
                                           .budget = policy_target_tokens(&plan->target, sequence->n_computed),
                                           .ring = sequence->ring,
                                           .n_window = sequence->n_window,
                                           .last_position = (int32_t)sequence->n_computed - 1,
                                           .tokens = sequence->tokens,
                                           .classes = compressor->limits.classes,
                                           .block_ids = sequence->block_ids,
                                           .lane_first = sequence->lane_first,
                                           .lane_tokens = sequence->lane_tokens,
                                           .wants_lists = measure_hits || compressor->limits.lists,
                                           .lists = uses_room ? compressor->lists : NULL,
                                           .room = uses_room ? compressor->room : NULL};
    place->chooser = choose_begin(&request, compressor->backend, at, place->lanes, place->scratch);
    return at;
}

void compressor_run(struct compressor *compressor) {
    for (;;) {
        bool waits = false;
        for (uint32_t i = 0; i < compressor->n_places; i++) waits = waits || (compressor->places[i].taken && compressor->places[i].chooser);
        if (!waits) return;
        compressor->backend->ops->settle(compressor->backend);
        for (uint32_t i = 0; i < compressor->n_places; i++) {
            struct place *place = &compressor->places[i];
            if (place->taken && place->chooser && !choose_go_on(place->chooser)) place->chooser = NULL;
        }
    }
}

void compressor_drop(struct compressor *compressor, uint32_t place) {
    struct place *dropped = &compressor->places[place];
    CHECK(place < compressor->n_places && dropped->taken);
    if (dropped->chooser) compressor->backend->ops->settle(compressor->backend); /* the next one there is not to find its results */
    dropped->chooser = NULL;
    dropped->taken = false;
    if (dropped->uses_room) compressor->room_taken = false;
}

bool compressor_take(struct compressor *compressor, uint32_t at, struct compressor_result *result) {
    CHECK(at < compressor->n_places && compressor->places[at].taken && !compressor->places[at].chooser);
    const struct place *place = &compressor->places[at];
    *result = (struct compressor_result){.lanes = place->lanes, .place = at};
    for (uint32_t l = 0; l < compressor->n_lanes; l++) {
        result->n_slots += place->lanes[l].n_slots;
        result->n_keep += place->lanes[l].n_keep;
    }
    if (place->measure_hits) measure(compressor, place, result);
    compressor_drop(compressor, at); /* lists stay until room is taken again */
    return result->n_keep < result->n_slots;
}

bool compressor_choose(struct compressor *compressor, const struct kv_plan *plan, const struct compressor_sequence *sequence, bool measure_hits,
                       struct compressor_result *result) {
    const uint32_t place = compressor_begin(compressor, plan, sequence, measure_hits);
    CHECK(place != COMPRESSOR_PLACE_NONE);
    compressor_run(compressor);
    return compressor_take(compressor, place, result);
}
