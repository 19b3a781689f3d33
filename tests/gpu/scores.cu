/* Scores of cached slots (score.cu, score_window.cu) and the choice of those that stay (rank.cu), alone on a device: scores against the oracle (kernels/score.c), the choice against the
 * host's (kernels/select.c). See services_world.h. */
#include "tests/gpu/services_world.h"

static void true_scores(const struct world *world, const struct tables *tables, const struct score_request *request, uint32_t lane, float *scores) {
    const uint32_t n = tables->lane_tokens[lane], d = world->shape.d, group = world->shape.group, n_q = world->cuda.n_q,
                   *ids = world->ids + tables->lane_first[lane];
    float *k = (float *)check_calloc((size_t)n * d + 1, 4), *v = (float *)check_calloc((size_t)n * d + 1, 4),
          *q = (float *)check_calloc((size_t)request->n_window * n_q + 1, 4);
    int32_t *positions = (int32_t *)check_calloc(n + 1, 4);
    uint64_t *accumulated = (uint64_t *)check_calloc(n + 1, 8);
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t block = ids[i / BLOCK_TOKENS], slot = i % BLOCK_TOKENS;
        for (uint32_t j = 0; j < d; j++) v[i * d + j] = element_of(world, block, WHICH_V, slot, j);
        key_of(world, block, slot, k + (size_t)i * d);
        positions[i] = world->positions[(size_t)block * BLOCK_TOKENS + slot],
        accumulated[i] = world->accumulated[(size_t)block * BLOCK_TOKENS + slot];
    }
    for (uint32_t r = 0; r < request->n_window; r++) {
        uint32_t position = (uint32_t)request->last_position - (request->n_window - 1 - r);
        size_t row = (((size_t)(request->ring - 1) * world->shape.n_layers + lane / world->shape.n_kv_heads) * world->shape.ring_rows +
                      position % world->shape.ring_rows) *
                     n_q;
        for (uint32_t head = 0; head < group; head++) {
            float cached[HEAD_DIM_MAX];
            for (uint32_t j = 0; j < d; j++)
                cached[j] = widen(world->shape.dtype, world->ring[row + (lane % world->shape.n_kv_heads * group + head) * d + j]);
            transform(world, cached, q + (r * group + head) * d);
        }
    }
    const struct score_lane plain = {.n_slots = n,
                                     .k = k,
                                     .v = v,
                                     .positions = positions,
                                     .accumulated = accumulated,
                                     .q = q,
                                     .n_window = request->n_window,
                                     .last_position = request->last_position,
                                     .ahead = request->ahead};
    score_lane(&world->program, request->kind, &plain, scores);
    free(k), free(v), free(q), free(positions), free(accumulated);
}

/* Squared error against squared size, per lane. The device has the oracle's inputs bit for bit, so what is left is its arithmetic; a count may tip at the border. */
static double bound_of(enum score_kind kind) { return kind == SCORE_PERSISTENCE ? 2e-3 : kind == SCORE_EXPECTED ? 1e-6 : 1e-9; }

static void check_kind(struct world *world, const struct tables *tables, struct score_request request, float *scores, float *again, float *truth) {
    const uint32_t per_slot = score_per_query_head(request.kind) ? world->shape.group : 1;
    size_t count = 0;
    for (uint32_t lane = 0; lane < world->cuda.n_lanes; lane++) tables->offset[lane] = count, count += (size_t)tables->lane_tokens[lane] * per_slot;
    memset(scores, POISON, count * sizeof *scores), memset(again, POISON, count * sizeof *again);
    request.first_lane = 0, request.n_lanes = world->cuda.n_lanes;
    cuda_score(&world->cuda.backend, &request, scores);
    for (uint32_t lane = 0; lane < world->cuda.n_lanes; lane += 3) { /* other passes, the same numbers */
        request.first_lane = lane, request.n_lanes = world->cuda.n_lanes - lane < 3 ? world->cuda.n_lanes - lane : 3;
        cuda_score(&world->cuda.backend, &request, again);
    }
    if (memcmp(scores, again, count * sizeof *scores) != 0) WRONG("scores of kind %d depend on the lanes beside", request.kind);
    for (uint32_t lane = 0; lane < world->cuda.n_lanes; lane++) {
        const size_t n = (size_t)tables->lane_tokens[lane] * per_slot;
        const float *mine = scores + tables->offset[lane];
        true_scores(world, tables, &request, lane, truth);
        double error = 0, size = 1e-30, worst = 0;
        size_t at = 0;
        for (size_t i = 0; i < n; i++) {
            double e = fabs((double)mine[i] - (double)truth[i]);
            if (!(e <= worst)) worst = e, at = i;
            error += e * e, size += (double)truth[i] * (double)truth[i];
        }
        if (n > 0 && !(error / size < bound_of(request.kind)))
            WRONG("score kind %d %s d %u group %u window %u lane %u of %u slots: error %g; the worst at head %zu slot %zu: %g, expected %g",
                  request.kind, kv_dtype_name(world->shape.dtype), world->shape.d, world->shape.group, request.n_window, lane,
                  tables->lane_tokens[lane], error / size, at / tables->lane_tokens[lane], at % tables->lane_tokens[lane], (double)mine[at],
                  (double)truth[at]);
    }
}

static void check_scores(struct world *world) {
    struct tables tables;
    make_tables(world, &tables);
    size_t most = 0;
    for (uint32_t lane = 0; lane < world->cuda.n_lanes; lane++) most += (size_t)tables.lane_tokens[lane] * world->shape.group;
    float *scores = (float *)malloc(most * sizeof(float)), *again = (float *)malloc(most * sizeof(float)),
          *truth = (float *)malloc(most * sizeof(float));
    const uint32_t windows[] = {1, 33, world->shape.ring_rows};
    for (uint32_t window : windows)
        for (int kind = 0; kind < SCORE_KINDS; kind++) {
            struct score_request request = {};
            request.kind = (enum score_kind)kind, request.ring = 2, request.last_position = tables.last_position, request.n_window = window,
            request.ahead = 64;
            request.block_ids = world->ids, request.lane_first = tables.lane_first, request.lane_tokens = tables.lane_tokens,
            request.offset = tables.offset;
            check_kind(world, &tables, request, scores, again, truth);
        }
    free(scores), free(again), free(truth);
    free_tables(&tables);
}

/* Lists of the same choice on both sides, then a compaction by those that stayed on the device. */
static void check_choice(struct world *world, uint32_t place, const struct tables *tables, struct array_backend *array, const char *what) {
    const uint32_t n_lanes = world->cuda.n_lanes, each[] = {1, world->shape.n_kv_heads, n_lanes}, units[] = {1, BLOCK_TOKENS};
    struct cut_lane *cut = (struct cut_lane *)check_calloc(2 * n_lanes, sizeof *cut), *host_cut_lanes = cut + n_lanes;
    struct kept_lane *kept = (struct kept_lane *)check_calloc(2 * n_lanes, sizeof *kept), *host_kept_lanes = kept + n_lanes;
    uint32_t *numbers = (uint32_t *)check_calloc(n_lanes, sizeof *numbers);
    size_t slots = 0;
    for (uint32_t lane = 0; lane < n_lanes; lane++) slots += tables->lane_tokens[lane];
    uint32_t *lists = (uint32_t *)check_calloc(2 * slots, sizeof *lists), *host_lists = lists + slots;
    for (uint32_t lanes_each : each)
        for (uint32_t unit : units) {
            const struct cut_request request = {.lanes_each = lanes_each, .unit = unit, .needed = numbers};
            for (uint32_t g = 0; g < n_lanes / lanes_each; g++) numbers[g] = random_below(&world->random, 800 * lanes_each / unit + 2);
            cuda_cut(&world->cuda.backend, place, &request, cut);
            cuda_settle(&world->cuda.backend);
            host_cut(&array->backend, 0, &request, host_cut_lanes);
            for (uint32_t lane = 0; lane < n_lanes; lane++)
                if (cut[lane].below != host_cut_lanes[lane].below || cut[lane].equal != host_cut_lanes[lane].equal) {
                    WRONG("%s: cut of %u lanes by %u: lane %u has %u below, %u equal; expected %u, %u", what, lanes_each, unit, lane, cut[lane].below,
                          cut[lane].equal, host_cut_lanes[lane].below, host_cut_lanes[lane].equal);
                    break;
                }
        }
    for (uint32_t lane = 0; lane < n_lanes; lane++) numbers[lane] = random_below(&world->random, tables->lane_tokens[lane] + 2);
    cuda_keep(&world->cuda.backend, place, numbers, kept, lists);
    host_keep(&array->backend, 0, numbers, host_kept_lanes, host_lists);
    struct compaction *items = (struct compaction *)check_calloc(n_lanes, sizeof *items);
    size_t at = 0;
    for (uint32_t lane = 0; lane < n_lanes; at += tables->lane_tokens[lane++]) {
        if (kept[lane].n_keep != host_kept_lanes[lane].n_keep || kept[lane].first_moved != host_kept_lanes[lane].first_moved ||
            memcmp(lists + at, host_lists + at, kept[lane].n_keep * sizeof *lists) != 0)
            WRONG("%s: lane %u keeps %u, first moved %u; expected %u, %u", what, lane, kept[lane].n_keep, kept[lane].first_moved,
                  host_kept_lanes[lane].n_keep, host_kept_lanes[lane].first_moved);
        uint32_t *ids = world->ids + tables->lane_first[lane];
        items[lane] = (struct compaction){.source = ids,
                                          .n_slots = tables->lane_tokens[lane],
                                          .keep = NULL,
                                          .n_keep = kept[lane].n_keep,
                                          .destination = ids,
                                          .place = place,
                                          .lane = lane};
    }
    cuda_compact(&world->cuda.backend, n_lanes, items);
    at = 0;
    for (uint32_t lane = 0; lane < n_lanes; at += tables->lane_tokens[lane++])
        for (uint32_t slot = 0; slot < kept[lane].n_keep; slot++) {
            const uint32_t old = host_lists[at + slot], *ids = items[lane].source;
            move_slot(world, ids[old / BLOCK_TOKENS], old % BLOCK_TOKENS, ids[slot / BLOCK_TOKENS], slot % BLOCK_TOKENS);
        }
    compare_pool(world, what);
    free(cut), free(kept), free(numbers), free(lists), free(items);
}

static void check_ranking(struct world *world) {
    static const enum score_kind kinds[] = {SCORE_SQUARES, SCORE_ATTENTION, SCORE_EXPECTED, SCORE_KEYDIFF, SCORE_ACCUMULATED};
    const uint32_t n_lanes = world->cuda.n_lanes, group = world->shape.group;
    for (uint32_t round = 0; round < 7; round++) {
        struct tables tables;
        make_tables(world, &tables);
        struct rank_request request = {};
        request.source = round < 5 ? RANK_SCORES : round == 5 ? RANK_POSITIONS : RANK_RANDOM, request.seed = round;
        request.fold = round == 0 ? RANK_FOLD_SUM_OF_POOLED : round == 1 ? RANK_FOLD_MEAN_POOLED : RANK_FOLD_MEAN;
        request.pooling = round % 2 ? RANK_POOL_AVERAGE : RANK_POOL_MAX, request.pooling_kernel = 7, request.value_power = round < 3 ? 2 - round : 0;
        request.layer_mean = round == 2, request.protect_below = 4, request.protect_above = tables.last_position - 80;
        struct score_request *score = &request.score;
        score->kind = kinds[round < 5 ? round : 0], score->ring = 2, score->last_position = tables.last_position, score->n_window = 32,
        score->ahead = 64;
        score->block_ids = world->ids, score->lane_first = tables.lane_first, score->lane_tokens = tables.lane_tokens;
        /* What the device scores, and where it lies, for the host to choose by. */
        struct array_lane *lanes = (struct array_lane *)check_calloc(n_lanes, sizeof *lanes);
        size_t slots = 0;
        for (uint32_t lane = 0; lane < n_lanes; lane++) slots += tables.lane_tokens[lane];
        float *raw = (float *)check_calloc(slots * (group + 3), sizeof *raw), *norms = raw + slots * group, *mine = norms + slots,
              *host = mine + slots;
        int32_t *positions = (int32_t *)check_calloc(slots, sizeof *positions);
        for (int values = 0; values < 2; values++) {
            struct score_request plain = *score;
            plain.kind = values ? SCORE_VALUE_NORM : score->kind, plain.n_lanes = n_lanes, plain.offset = tables.offset;
            size_t at = 0;
            for (uint32_t lane = 0; lane < n_lanes; lane++) {
                tables.offset[lane] = at;
                if (values)
                    lanes[lane].norms = norms + at;
                else
                    lanes[lane].raw = raw + at;
                at += (size_t)tables.lane_tokens[lane] * (score_per_query_head(plain.kind) ? group : 1);
            }
            cuda_score(&world->cuda.backend, &plain, values ? norms : raw);
        }
        size_t at = 0;
        for (uint32_t lane = 0; lane < n_lanes; lane++) {
            lanes[lane].n_slots = tables.lane_tokens[lane], lanes[lane].positions = positions + at;
            for (uint32_t slot = 0; slot < tables.lane_tokens[lane]; slot++)
                positions[at++] =
                    world->positions[(size_t)world->ids[tables.lane_first[lane] + slot / BLOCK_TOKENS] * BLOCK_TOKENS + slot % BLOCK_TOKENS];
        }
        struct array_backend *array = array_backend_new(world->shape.n_layers, world->shape.n_kv_heads, group, lanes);
        struct rank_request plain = request;
        plain.score.block_ids = array->block_ids, plain.score.lane_first = array->lane_first, plain.score.lane_tokens = array->lane_tokens;
        uint32_t *protected_slots = (uint32_t *)check_calloc(2 * n_lanes, sizeof *protected_slots);
        char what[96];
        (void)snprintf(what, sizeof what, "choice %u, %s d %u group %u", round, kv_dtype_name(world->shape.dtype), world->shape.d, group);
        const uint32_t place = (uint32_t)round % world->cuda.score->rank_places;
        cuda_rank(&world->cuda.backend, place, &request, protected_slots, round % 2 ? mine : NULL);
        cuda_settle(&world->cuda.backend);
        host_rank(&array->backend, 0, &plain, protected_slots + n_lanes, host);
        if (memcmp(protected_slots, protected_slots + n_lanes, n_lanes * sizeof *protected_slots) != 0) WRONG("%s: other slots are protected", what);
        for (size_t i = 0; round % 2 && i < slots; i++)
            if (memcmp(&mine[i], &host[i], sizeof *mine) != 0) {
                WRONG("%s: slot %zu of all: %.9g, expected %.9g", what, i, (double)mine[i], (double)host[i]);
                break;
            }
        check_choice(world, place, &tables, array, what);
        array_backend_free(array);
        free(lanes), free(raw), free(positions), free(protected_slots);
        free_tables(&tables);
    }
}

static void check(struct world *world) {
    check_scores(world);
    check_ranking(world);
}

/* ---- speed ---- */

/* All that kv_compress asks of a sequence whose lanes hold `slots` each and shall hold `kept` on average. */
static void bench_choice(struct world *world, const uint32_t *lane_first, const uint32_t *lane_tokens, uint32_t slots, uint32_t kept, double rate) {
    struct cuda *cuda = &world->cuda;
    const uint32_t n_lanes = cuda->n_lanes, needed = n_lanes * (blocks_of(slots) - kept / BLOCK_TOKENS);
    struct rank_request rank = {};
    rank.fold = RANK_FOLD_SUM_OF_POOLED, rank.pooling = RANK_POOL_MAX, rank.pooling_kernel = 7, rank.protect_below = 4,
    rank.protect_above = (int64_t)slots - 33;
    rank.score.kind = SCORE_SQUARES, rank.score.ring = 1, rank.score.last_position = (int32_t)slots - 1, rank.score.n_window = 32;
    rank.score.block_ids = world->ids, rank.score.lane_first = lane_first, rank.score.lane_tokens = lane_tokens;
    uint32_t *protected_slots = (uint32_t *)check_calloc(n_lanes, 4), *evict = (uint32_t *)check_calloc(n_lanes, 4);
    struct cut_lane *cut = (struct cut_lane *)check_calloc(n_lanes, sizeof *cut);
    struct kept_lane *lanes = (struct kept_lane *)check_calloc(n_lanes, sizeof *lanes);
    struct compaction *items = (struct compaction *)check_calloc(n_lanes, sizeof *items);
    const struct cut_request request = {.lanes_each = n_lanes, .unit = BLOCK_TOKENS, .needed = &needed};
    char what[64];
    (void)snprintf(what, sizeof what, "rank %u x %u: squares, window 32", n_lanes, slots);
    measure(what, (double)n_lanes * slots * 512, rate, cuda->stream, [&] {
        cuda_rank(&cuda->backend, 0, &rank, protected_slots, NULL);
        cuda_settle(&cuda->backend);
    });
    measure("cut: whole blocks over all lanes", (double)n_lanes * slots * 16, rate, cuda->stream, [&] {
        cuda_cut(&cuda->backend, 0, &request, cut);
        cuda_settle(&cuda->backend);
    });
    for (uint32_t lane = 0; lane < n_lanes; lane++)
        evict[lane] = select_evictions(slots, BLOCK_TOKENS, select_units(slots, protected_slots[lane], BLOCK_TOKENS, cut[lane].below));
    measure("keep", (double)n_lanes * slots * 20, rate, cuda->stream, [&] {
        cuda_keep(&cuda->backend, 0, evict, lanes, NULL);
        cuda_settle(&cuda->backend);
    });
    uint64_t moved = 0;
    for (uint32_t lane = 0; lane < n_lanes; lane++) {
        const uint32_t *ids = world->ids + lane_first[lane];
        items[lane] =
            (struct compaction){.source = ids, .n_slots = slots, .keep = NULL, .n_keep = lanes[lane].n_keep, .destination = ids, .lane = lane};
        moved += lanes[lane].n_keep - lanes[lane].first_moved;
    }
    measure("compact by these lists", 2.0 * (double)moved * (512 + 12), rate, cuda->stream, [&] { cuda_compact(&cuda->backend, n_lanes, items); });
    free(protected_slots), free(evict), free(cut), free(lanes), free(items);
}

static void bench_scores(struct world *world, const uint32_t *lane_first, const uint32_t *lane_tokens, double rate) {
    static const struct {
        enum score_kind kind;
        const char *name;
        double row_bytes;
    } kinds[] = {{SCORE_SQUARES, "score: squares, window 32", 2 * 128 * 2},
                 {SCORE_EXPECTED, "score: expected, window 32", 128 * 2},
                 {SCORE_KEYDIFF, "score: keydiff", 2 * 128 * 2},
                 {SCORE_VALUE_NORM, "score: value norms", 128 * 2},
                 {SCORE_ACCUMULATED, "score: accumulated", 8}};
    static size_t offset[LANES_8B];
    float *scores = (float *)check_calloc((size_t)LANES_8B * SLOTS_8B * world->shape.group, sizeof *scores);
    for (const auto &kind : kinds) {
        for (uint32_t lane = 0; lane < LANES_8B; lane++)
            offset[lane] = (size_t)lane * SLOTS_8B * (score_per_query_head(kind.kind) ? world->shape.group : 1);
        struct score_request request = {};
        request.kind = kind.kind, request.ring = 1, request.last_position = SLOTS_8B - 1, request.n_window = 32, request.ahead = 512;
        request.n_lanes = LANES_8B, request.block_ids = world->ids, request.lane_first = lane_first, request.lane_tokens = lane_tokens;
        request.offset = offset;
        measure(kind.name, (double)LANES_8B * (double)SLOTS_8B * kind.row_bytes, rate, world->cuda.stream,
                [&] { cuda_score(&world->cuda.backend, &request, scores); });
    }
    free(scores);
}

/* A sequence of the 8B shape at the end of its prompt, all scores to the host; then what kv_compress asks there and each 32 tokens later, at an eighth and at a 64th. */
static void bench(void) {
    static struct world world;
    static uint32_t lane_first[LANES_8B], lane_tokens[LANES_8B];
    static const struct { uint32_t slots, kept; } choices[] = {{SLOTS_8B, 736}, {768 + 16, 768}, {SLOTS_8B, 96}, {96 + 32, 96}};
    const double rate = open_8b(&world, lane_first);
    for (uint32_t lane = 0; lane < LANES_8B; lane++) lane_tokens[lane] = SLOTS_8B;
    bench_scores(&world, lane_first, lane_tokens, rate);
    for (const auto &choice : choices) {
        for (uint32_t lane = 0; lane < LANES_8B; lane++) lane_tokens[lane] = choice.slots;
        upload(&world); /* the last one moved slots */
        bench_choice(&world, lane_first, lane_tokens, choice.slots, choice.kept, rate);
    }
    world_close(&world);
}

int main(int argc, char **argv) { return run_program(argc, argv, check, bench); }
