/* Compression between two steps: sequences that wait at a point are scored, their lanes cut, blocks given back; under pressure others are made to wait. Engine thread. What stays is
 * chosen by the compressor, which blocks may be written and which come free is the scheduler's business, moving is the backend's. Nothing here allocates after init. */
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/clock.h"
#include "engine/internal.h"
#include "model/tokenizer.h"

static bool is_punctuation(const char *bytes, size_t length) {
    for (size_t i = 0; i < length; i++)
        if (!strchr(" !\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~\t\r\n", bytes[i]) || bytes[i] == '\0') return false;
    return length > 0;
}

static uint8_t *token_classes(const struct tokenizer *tokenizer) {
    uint32_t n = tokenizer_vocabulary(tokenizer);
    uint8_t *classes = check_calloc(n, sizeof *classes);
    for (uint32_t token = 0; token < n; token++) {
        size_t length;
        const char *bytes = tokenizer_bytes(tokenizer, (int32_t)token, &length);
        if (tokenizer_is_special(tokenizer, (int32_t)token))
            classes[token] = TOKEN_CLASS_SPECIAL;
        else if (is_punctuation(bytes, length))
            classes[token] = TOKEN_CLASS_PUNCTUATION;
    }
    return classes;
}

struct compressor_limits compress_limits(const struct memory_plan *plan, const struct program *program) {
    uint32_t slots = plan->max_model_len;
    return (struct compressor_limits){.slots_max = slots, .slots_total = (size_t)slots * program_lanes(program)};
}

uint64_t compress_bytes(const struct memory_plan *plan, const struct program *program) {
    struct compressor_limits limits = compress_limits(plan, program);
    return compressor_bytes(program, &limits) + program->n_vocab +
           (uint64_t)program_lanes(program) * (2 * sizeof(uint32_t) + sizeof(struct compaction));
}

void compress_init(struct compress *compress, struct backend *backend, const struct config *config, const struct model *model,
                   const struct memory_plan *plan) {
    const struct program *program = model_program(model);
    uint32_t lanes = program_lanes(program);
    struct compressor_limits limits = compress_limits(plan, program);
    *compress = (struct compress){.n_lanes = lanes,
                                  .n_kv_heads = program->n_kv_heads,
                                  .n_layers = program->n_layers,
                                  .sink_slots = plan->sink_slots,
                                  .pressure_high = config->pressure_high,
                                  .pressure_low = config->pressure_low,
                                  .classes = token_classes(model_tokenizer(model)),
                                  .n_keep = check_calloc(lanes, sizeof(uint32_t)),
                                  .first = check_calloc(lanes, sizeof(uint32_t)),
                                  .items = check_calloc(lanes, sizeof(struct compaction))};
    limits.classes = compress->classes;
    compress->compressor = compressor_new(backend, program, &limits);
}

void compress_done(struct compress *compress) {
    compressor_free(compress->compressor);
    free(compress->classes);
    free(compress->n_keep);
    free(compress->first);
    free(compress->items);
    *compress = (struct compress){0};
}

static unsigned trigger_bit(const struct scheduler_due *due, const struct kv_plan *kv) {
    unsigned trigger = TRIGGER_BUDGET;
    if (due->pressure)
        trigger = TRIGGER_PRESSURE;
    else if (due->n_computed <= due->n_prompt && kv->triggers & TRIGGER_PROMPT_END)
        trigger = TRIGGER_PROMPT_END;
    return (unsigned)__builtin_ctz(trigger);
}

static void count(struct engine *engine, const struct scheduler_due *due, const struct kv_plan *kv, const struct compressor_result *result) {
    struct engine_stats *stats = &engine->stats;
    stats->compressions[policy_index(kv->policy)][trigger_bit(due, kv)]++;
    stats->slots_kept += result->n_keep;
    stats->slots_evicted += result->n_slots - result->n_keep;
    for (uint32_t l = 0; l < engine->compress.n_lanes; l++) {
        uint32_t layer = l / engine->compress.n_kv_heads;
        stats->layer_kept[layer < ENGINE_LAYERS_MAX ? layer : ENGINE_LAYERS_MAX - 1] += result->lanes[l].n_keep;
    }
}

static void count_hits(struct engine *engine, struct request *request, const struct compressor_result *result) {
    struct engine_stats *stats = &engine->stats;
    request->kv_report.hits_kept += result->hits_kept;
    request->kv_report.hits_all += result->hits_all;
    for (uint32_t l = 0; result->hits && l < engine->compress.n_lanes; l++) {
        uint32_t layer = l / engine->compress.n_kv_heads;
        if (layer >= ENGINE_LAYERS_MAX) layer = ENGINE_LAYERS_MAX - 1;
        stats->layer_hits_kept[layer] += (uint64_t)result->hits[l].kept;
        stats->layer_hits[layer] += (uint64_t)result->hits[l].all;
        if (!request->head_hits) continue;
        request->head_hits[l].kept += result->hits[l].kept;
        request->head_hits[l].all += result->hits[l].all;
    }
}

/* Survivors move forward, lane by lane; the scheduler knows what may be written in place. false: preempted instead, it comes again. */
static bool cut_lanes(struct engine *engine, const struct scheduler_due *due, const struct compressor_result *result) {
    struct compress *compress = &engine->compress;
    uint32_t n_items = 0;
    for (uint32_t l = 0; l < compress->n_lanes; l++) {
        compress->n_keep[l] = result->lanes[l].n_keep;
        compress->first[l] = result->lanes[l].first_moved;
    }
    const struct scheduler_lane_move *moves = scheduler_compact(engine->scheduler, due, compress->n_keep, compress->first);
    if (!moves) return false;
    for (uint32_t l = 0; l < compress->n_lanes; l++) {
        uint32_t last = (compress->n_keep[l] + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
        bool cut_alone = compress->first[l] == compress->n_keep[l] && (last == 0 || moves[l].destination[last - 1] == moves[l].source[last - 1]);
        if (!moves[l].moves || cut_alone) continue; /* nothing moves, not even into a block of its own */
        compress->items[n_items++] = (struct compaction){.source = moves[l].source,
                                                         .n_slots = result->lanes[l].n_slots,
                                                         .keep = result->lanes[l].keep,
                                                         .n_keep = result->lanes[l].n_keep,
                                                         .destination = moves[l].destination,
                                                         .place = result->place,
                                                         .lane = l};
    }
    if (n_items > 0) engine->backend->ops->compact(engine->backend, n_items, compress->items);
    scheduler_compacted(engine->scheduler, due);
    return true;
}

/* Whole blocks leave the middle of every lane. Where sinks follow the recents, their keys are turned by as much as has left, from a copy taken before the first turn. false: preempted
 * instead, it comes again. */
static bool drop_blocks(struct engine *engine, const struct scheduler_due *due, const struct kv_plan *kv, const struct compressor_result *result) {
    struct compress *compress = &engine->compress;
    uint32_t gone = 0;
    for (uint32_t l = 0; l < compress->n_lanes; l++) {
        const struct choose_lane *lane = &result->lanes[l];
        gone = lane->n_slots - lane->n_keep;
        CHECK(gone % BLOCK_TOKENS == 0 && (gone == 0 || lane->first_moved % BLOCK_TOKENS == 0));
        compress->first[l] = lane->first_moved / BLOCK_TOKENS;
        compress->n_keep[l] = gone / BLOCK_TOKENS;
    }
    if (kv->policy->shifts_sinks && due->ring) {
        uint32_t n_copies, before = due->n_computed - due->lane_tokens[0];
        const uint32_t *source, *destination;
        if (!scheduler_own_first(engine->scheduler, due, compress->sink_slots / BLOCK_TOKENS, &n_copies, &source, &destination)) return false;
        if (n_copies > 0) engine->backend->ops->copy_blocks(engine->backend, n_copies, source, destination);
        struct shift_request shift = {.ring = due->ring,
                                      .first = before == 0,
                                      .n_slots = compress->sink_slots,
                                      .shift = (int32_t)(before + gone),
                                      .block_ids = due->block_ids,
                                      .lane_first = due->lane_first};
        engine->backend->ops->shift_sinks(engine->backend, &shift);
    }
    scheduler_dropped(engine->scheduler, due, compress->first, compress->n_keep);
    return true;
}

/* ---- choices that are under way ---- */

static bool is_for(const struct begun *begun, const struct scheduler_due *due) {
    return begun->request_id == due->request_id && begun->choice == due->choice && begun->n_computed == due->n_computed;
}

static struct begun *begun_for(struct compress *compress, const struct scheduler_due *due) {
    for (uint32_t i = 0; i < compress->n_begun; i++)
        if (is_for(&compress->begun[i], due)) return &compress->begun[i];
    return NULL;
}

/* A point is passed again after a preemption: then it is neither measured nor counted. */
static bool is_first_time(const struct scheduler_due *due) { return due->n_computed > ((const struct request *)due->owner)->state->compressed_to; }

static bool needs_room(const struct compress *compress, const struct scheduler_due *due) {
    const struct request *request = due->owner;
    return compressor_needs_room(compress->compressor, &request->kv, request->measure_hits && is_first_time(due));
}

/* false: there is no place, or it must be alone. */
static bool begin_one(struct compress *compress, const struct scheduler_due *due, bool behind) {
    const struct request *request = due->owner;
    const struct compressor_sequence sequence = {.ring = due->ring,
                                                 .n_computed = due->n_computed,
                                                 .n_window = compression_window(&request->kv, due->n_computed, due->n_prompt),
                                                 .tokens = request->tokens[due->choice],
                                                 .block_ids = due->block_ids,
                                                 .lane_first = due->lane_first,
                                                 .lane_tokens = due->lane_tokens};
    const uint32_t place = compressor_begin(compress->compressor, &request->kv, &sequence, request->measure_hits && is_first_time(due));
    if (place == COMPRESSOR_PLACE_NONE) return false;
    compress->begun[compress->n_begun++] =
        (struct begun){.place = place, .request_id = due->request_id, .choice = due->choice, .n_computed = due->n_computed, .behind = behind};
    return true;
}

static void forget(struct compress *compress, struct begun *begun) { *begun = compress->begun[--compress->n_begun]; }

static void drop(struct compress *compress, struct begun *begun) {
    compressor_drop(compress->compressor, begun->place);
    forget(compress, begun);
}

/* Those whose sequence is not due any more: what they were begun with may be gone. */
static void drop_others(struct engine *engine, const struct scheduler_due *due, uint32_t n_due) {
    struct compress *compress = &engine->compress;
    for (uint32_t i = compress->n_begun; i-- > 0;) {
        bool lives = false;
        for (uint32_t d = 0; d < n_due; d++) lives = lives || is_for(&compress->begun[i], &due[d]);
        if (lives) continue;
        engine->stats.choices_dropped++;
        drop(compress, &compress->begun[i]);
    }
}

void compress_behind(struct engine *engine) {
    struct compress *compress = &engine->compress;
    struct scheduler_due due[RANK_PLACES_MAX];
    if (engine->requests.n_compressed == 0) return;
    CHECK(compress->n_begun == 0);
    const uint32_t n = scheduler_list_due(engine->scheduler, due, RANK_PLACES_MAX);
    for (uint32_t i = 0; i < n; i++)
        if (!needs_room(compress, &due[i]) && !begin_one(compress, &due[i], true)) break;
}

static void compress_one(struct engine *engine, const struct scheduler_due *due) {
    struct compress *compress = &engine->compress;
    struct request *request = due->owner;
    const struct kv_plan *kv = &request->kv;
    struct begun *begun = begun_for(compress, due);
    if (!begun) { /* there are more than places, or it must be alone */
        while (!begin_one(compress, due, false)) {
            CHECK(compress->n_begun > 0);
            drop(compress, &compress->begun[compress->n_begun - 1]);
        }
        compressor_run(compress->compressor);
        begun = begun_for(compress, due);
    }
    struct compressor_result result;
    const bool evicts = compressor_take(compress->compressor, begun->place, &result);
    engine->stats.compressions_behind += begun->behind;
    forget(compress, begun);
    if (is_first_time(due)) {
        request->state->compressed_to = due->n_computed;
        count_hits(engine, request, &result);
        request->kv_report.pressure_compressions += due->pressure;
    }
    if (!evicts) {
        scheduler_kept(engine->scheduler, due);
        return;
    }
    bool done = kv->policy->granularity == GRANULARITY_BLOCK ? drop_blocks(engine, due, kv, &result) : cut_lanes(engine, due, &result);
    if (done) count(engine, due, kv, &result);
}

static bool may_press(void *context, void *owner) {
    (void)context;
    const struct request *request = owner;
    return compression_is_on(&request->kv) && request->kv.triggers & TRIGGER_PRESSURE;
}

static double pool_usage(struct engine *engine, struct scheduler_stats *stats) {
    scheduler_stats(engine->scheduler, stats);
    return (double)stats->blocks_used / stats->blocks_total;
}

/* Those who are due, as many at a time as there are places: they wait for the device together. To deal with one may preempt another. */
static void compress_all_due(struct engine *engine) {
    struct compress *compress = &engine->compress;
    struct scheduler_due due[RANK_PLACES_MAX], next;
    for (;;) {
        const uint32_t n = scheduler_list_due(engine->scheduler, due, RANK_PLACES_MAX);
        drop_others(engine, due, n);
        if (n == 0) return;
        for (uint32_t i = 0; i < n; i++)
            if (!begun_for(compress, &due[i]) && (needs_room(compress, &due[i]) || !begin_one(compress, &due[i], false))) break;
        compressor_run(compress->compressor);
        for (uint32_t i = 0; i < n && scheduler_next_due(engine->scheduler, &next); i++) {
            compress_one(engine, &next);
            if (compress->n_begun == 0) break; /* the next ones begin together */
        }
    }
}

/* From the high mark down to the low one, longest uncompressed first; while it is above, no new prompt is admitted. */
static void relieve_pressure(struct engine *engine) {
    struct compress *compress = &engine->compress;
    struct scheduler_stats stats;
    double usage = pool_usage(engine, &stats);
    if (usage >= compress->pressure_high) compress->pressing = true;
    while (compress->pressing && usage > compress->pressure_low && scheduler_press(engine->scheduler, may_press, NULL)) {
        compress_all_due(engine);
        usage = pool_usage(engine, &stats);
    }
    if (usage <= compress->pressure_low || stats.running == 0) compress->pressing = false;
    scheduler_hold_admission(engine->scheduler, compress->pressing);
}

void compress_step(struct engine *engine) {
    if (engine->requests.n_compressed == 0 && !engine->compress.pressing) {
        drop_others(engine, NULL, 0);
        return;
    }
    uint64_t begin = clock_now_ns();
    compress_all_due(engine);
    if (engine->requests.n_pressed > 0)
        relieve_pressure(engine);
    else if (engine->compress.pressing)
        scheduler_hold_admission(engine->scheduler, engine->compress.pressing = false);
    engine->stats.compression_ns += clock_now_ns() - begin;
}

void compress_report(struct engine *engine, struct request *request, const uint32_t *lane_tokens, uint32_t n_rows, uint32_t n_seen) {
    struct compress *compress = &engine->compress;
    struct kv_report *report = &request->kv_report;
    uint32_t *head_slots = request->head_slots ? request->head_slots + (size_t)report->n_choices * compress->n_lanes : NULL;
    uint32_t least = UINT32_MAX, most = 0;
    uint64_t kept = 0;
    CHECK(report->n_choices < request->n_candidates);
    for (uint32_t l = 0; l < compress->n_lanes; l++) {
        uint32_t slots = lane_tokens[l] + n_rows;
        if (head_slots) head_slots[l] = slots;
        if (slots < least) least = slots;
        if (slots > most) most = slots;
        kept += slots;
        report->blocks += (slots + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    }
    report->head_min = report->n_choices == 0 || least < report->head_min ? least : report->head_min;
    report->head_max = most > report->head_max ? most : report->head_max;
    report->n_choices++;
    report->tokens_seen += n_seen;
    report->slots_kept += kept;
    report->slots_evicted += (uint64_t)n_seen * compress->n_lanes - kept;
}
