/* Ranking, cutting and listing the slots that stay, on every backend that computes and for every KV dtype: keys bit for bit those that the backend's own scores make by the oracle
 * (kernels/select.c), cuts and lists those of slow searches through the keys, and a compaction by a list that stayed in the backend. Then the same on arrays, where lanes have any length
 * and positions: blocks whose slots go together (kernels/kivi.h). */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/check.h"
#include "base/random.h"
#include "kernels/kivi.h"
#include "tests/support/array_backend.h"
#include "tests/support/backends.h"
#include "tests/support/tiny_program.h"

enum {
    TOKENS = 300,
    LANE_BLOCKS = 10,
    LANES = 4,
    HEADS = 2,
    GROUP = 2,
    POOL = 2 * LANES * LANE_BLOCKS, /* the second half is free */
    RING_ROWS = 40,
    D = 32,
#ifdef KVASIR_SANITIZED
    ROUNDS = 20,
#else
    ROUNDS = 60,
#endif
};

/* One sequence on one backend, and all that it has about its slots. */
struct cache {
    struct program *program;
    struct backend *backend;
    const struct backend_ops *ops;
    uint32_t ids[POOL], lane_first[LANES], lane_tokens[LANES];
    int32_t positions[LANES][LANE_BLOCKS * BLOCK_TOKENS];
    float raw[LANES][GROUP * TOKENS], norms[LANES][TOKENS];
};

static uint32_t blocks_of(uint32_t slots) { return (slots + BLOCK_TOKENS - 1) / BLOCK_TOKENS; }

static void run_rows(struct cache *cache, uint32_t rows) {
    int32_t tokens[TOKENS], positions[TOKENS];
    struct sample_result result;
    struct error error;
    for (uint32_t i = 0; i < rows; i++) {
        tokens[i] = (int32_t)(random_at(3, 0, 0, i) % 64);
        positions[i] = (int32_t)i;
    }
    const struct batch_sequence sequence = {
        .n_rows = rows, .lane_first = cache->lane_first, .lane_tokens = cache->lane_tokens, .ring = 2, .accumulate = true};
    const struct batch batch = {
        .n_rows = rows, .n_sequences = 1, .tokens = tokens, .positions = positions, .sequences = &sequence, .block_ids = cache->ids};
    assert_int_equal(cache->ops->submit(cache->backend, &batch, &error), STATUS_OK);
    assert_int_equal(cache->ops->sync(cache->backend, &result, &error), STATUS_OK);
    for (uint32_t lane = 0; lane < LANES; lane++) cache->lane_tokens[lane] = rows;
}

/* Lanes of one layer end up with the same slots, those of the other with their own, one with very few. */
static void thin_lanes(struct cache *cache, struct random *random) {
    static uint32_t keep[LANES][TOKENS];
    struct compaction items[LANES];
    for (uint32_t lane = 0; lane < LANES; lane++) {
        uint32_t n = 0, *ids = cache->ids + cache->lane_first[lane];
        for (uint32_t i = 0; i < cache->lane_tokens[lane]; i++) {
            bool stays = lane < HEADS ? random_at(5, 0, 0, i) % 8 != 0 : random_below(random, lane == LANES - 1 ? 40 : 2) == 0;
            uint32_t block = i / BLOCK_TOKENS;
            if (cache->backend->joins_blocks && kivi_reads_codes((int32_t)(block * BLOCK_TOKENS + BLOCK_TOKENS - 1), TOKENS)) /* whole blocks alone */
                stays = random_at(5, 0, lane < HEADS ? 0 : lane, block) % 4 != 0;
            else
                stays = stays || i == 7 || i == cache->lane_tokens[lane] - 1; /* the newest token, by which a compaction knows what is codes */
            if (stays) keep[lane][n++] = i;
        }
        items[lane] = (struct compaction){.source = ids, .n_slots = cache->lane_tokens[lane], .keep = keep[lane], .n_keep = n, .destination = ids};
    }
    cache->ops->compact(cache->backend, LANES, items);
    for (uint32_t lane = 0; lane < LANES; lane++) {
        cache->lane_tokens[lane] = items[lane].n_keep;
        cache->ops->read_positions(cache->backend, blocks_of(items[lane].n_keep), cache->ids + cache->lane_first[lane], cache->positions[lane]);
    }
}

static void open_cache(struct cache *cache, const struct backend_ops *ops, enum kv_dtype dtype, struct random *random) {
    struct tiny_shape shape = tiny_shape_default();
    *cache = (struct cache){.program = tiny_program_new(&shape), .ops = ops};
    const struct backend_limits limits = {.kv_dtype = dtype,
                                          .n_blocks = POOL,
                                          .max_rows = TOKENS,
                                          .n_tables = 8,
                                          .max_sequences = 1,
                                          .max_samples = 1,
                                          .threads = 2,
                                          .n_rings = 2,
                                          .ring_rows = RING_ROWS,
                                          .accumulators = true,
                                          .rank_slots = TOKENS,
                                          .rank_places = 3};
    struct error error = {0};
    if (ops->prepare(cache->program, &limits, &cache->backend, &error) != STATUS_OK) fail_msg("%s: %s", ops->name, error.text);
    for (uint32_t i = 0; i < POOL; i++) cache->ids[i] = i * 37 % POOL; /* 37 and the pool's size have no common divisor */
    for (uint32_t lane = 0; lane < LANES; lane++) cache->lane_first[lane] = lane * LANE_BLOCKS;
    run_rows(cache, TOKENS);
    thin_lanes(cache, random);
}

static struct rank_request draw_request(const struct cache *cache, struct random *random) {
    return (struct rank_request){.source = random_below(random, 5) ? RANK_SCORES : RANK_POSITIONS + random_below(random, 2),
                                 .seed = random_next(random),
                                 .score = {.kind = (enum score_kind)random_below(random, SCORE_KINDS),
                                           .ring = 2,
                                           .last_position = TOKENS - 1,
                                           .n_window = 1 + random_below(random, RING_ROWS),
                                           .ahead = 64,
                                           .block_ids = cache->ids,
                                           .lane_first = cache->lane_first,
                                           .lane_tokens = cache->lane_tokens},
                                 .fold = (enum rank_fold)random_below(random, 3),
                                 .pooling = (enum rank_pooling)random_below(random, 3),
                                 .pooling_kernel = 1 + 2 * random_below(random, 4),
                                 .value_power = random_below(random, 3),
                                 .layer_mean = random_below(random, 3) == 0,
                                 .protect_below = random_below(random, 6),
                                 .protect_above = (int64_t)TOKENS - random_below(random, random_below(random, 10) ? 40 : TOKENS)};
}

/* What the backend itself scores, as arrays. */
static void read_scores(struct cache *cache, const struct rank_request *request) {
    size_t offset[LANES];
    static float numbers[LANES * GROUP * TOKENS];
    for (int values = 0; values < 2; values++) {
        struct score_request score = request->score;
        if (values) score.kind = SCORE_VALUE_NORM;
        score.n_lanes = LANES;
        score.offset = offset;
        for (uint32_t lane = 0; lane < LANES; lane++) offset[lane] = (size_t)lane * GROUP * TOKENS;
        cache->ops->score(cache->backend, &score, numbers);
        for (uint32_t lane = 0; lane < LANES; lane++) {
            size_t n = (score_per_query_head(score.kind) ? GROUP : 1) * (size_t)cache->lane_tokens[lane];
            memcpy(values ? cache->norms[lane] : cache->raw[lane], numbers + offset[lane], n * sizeof *numbers);
        }
    }
}

static int ascending(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

/* What a round of requests about one ranking is measured against. */
struct expected {
    uint32_t keys[LANES][TOKENS], n_protected[LANES], n_joined[LANES];
};

/* The least of the group's keys at which enough comes free, tried one after another; where nothing is enough, a key above all. */
static void expect_cut(const struct cache *cache, const struct expected *expected, const struct cut_request *request, uint32_t group,
                       const struct cut_lane *got) {
    const uint32_t(*keys)[TOKENS] = expected->keys, *n_protected = expected->n_protected;
    uint32_t first = group * request->lanes_each, end = first + request->lanes_each, n = 0, threshold = RANK_PROTECTED;
    static uint32_t all[LANES * TOKENS];
    for (uint32_t l = first; l < end; l++)
        for (uint32_t i = 0; i < cache->lane_tokens[l]; i++)
            if (keys[l][i] != RANK_PROTECTED) all[n++] = keys[l][i];
    if (request->needed[group] == 0) n = 0, threshold = 0; /* nothing is asked */
    qsort(all, n, sizeof *all, ascending);
    for (uint32_t k = 0; k < n; k++) {
        uint64_t freed = 0;
        if (k > 0 && all[k] == all[k - 1]) continue;
        for (uint32_t l = first; l < end; l++) {
            uint32_t count = 0;
            for (uint32_t i = 0; i < cache->lane_tokens[l]; i++) count += keys[l][i] != RANK_PROTECTED && keys[l][i] <= all[k];
            freed += select_units(cache->lane_tokens[l], n_protected[l], request->unit, count);
        }
        if (freed < request->needed[group]) continue;
        threshold = all[k];
        break;
    }
    for (uint32_t l = first; l < end; l++) {
        uint32_t below = 0, equal = 0;
        for (uint32_t i = 0; i < cache->lane_tokens[l] && request->needed[group] > 0; i++) {
            below += keys[l][i] < threshold;
            equal += keys[l][i] == threshold && threshold != RANK_PROTECTED;
        }
        if (got[l].below != below || got[l].equal != equal)
            fail_msg("%s: unit %u, %u needed: lane %u has %u below and %u equal, expected %u and %u", cache->ops->name, request->unit,
                     request->needed[group], l, got[l].below, got[l].equal, below, equal);
    }
}

/* The rule of KIVI dtypes, block by block: the slots of one that the row at `next` reads as codes get one key, the highest among them. Returns how many slots that are. */
static uint32_t expect_join(uint32_t *keys, const int32_t *positions, uint32_t n, int32_t next) {
    uint32_t joined = 0;
    for (uint32_t first = 0; first + BLOCK_TOKENS <= n && positions[first + BLOCK_TOKENS - 1] + 1 + KIVI_RESIDUAL <= next; first += BLOCK_TOKENS) {
        uint32_t sorted[BLOCK_TOKENS];
        memcpy(sorted, keys + first, sizeof sorted);
        qsort(sorted, BLOCK_TOKENS, sizeof *sorted, ascending);
        for (uint32_t i = 0; i < BLOCK_TOKENS; i++) keys[first + i] = sorted[BLOCK_TOKENS - 1];
        joined += BLOCK_TOKENS;
    }
    return joined;
}

/* One slot after another goes, the one with the lowest key, of equals the newest, and with it its block if that is joined: until enough have gone, or the rest must stay. */
static uint32_t expect_keep(const uint32_t *keys, uint32_t n, uint32_t joined, uint32_t evict, uint32_t *keep) {
    bool gone[TOKENS] = {false};
    uint32_t n_gone = 0, n_keep = 0;
    while (n_gone < evict) {
        uint32_t worst = n;
        for (uint32_t i = n; i-- > 0;)
            if (!gone[i] && keys[i] != RANK_PROTECTED && (worst == n || keys[i] < keys[worst])) worst = i;
        if (worst == n) break;
        uint32_t first = worst < joined ? worst / BLOCK_TOKENS * BLOCK_TOKENS : worst, count = worst < joined ? BLOCK_TOKENS : 1;
        for (uint32_t i = first; i < first + count; i++) {
            assert_true(!gone[i] && keys[i] == keys[worst]);
            gone[i] = true;
        }
        n_gone += count;
    }
    for (uint32_t i = 0; i < n; i++)
        if (!gone[i]) keep[n_keep++] = i;
    return n_keep;
}

static void check_cuts(const struct cache *cache, uint32_t place, const struct expected *expected, struct random *random) {
    static const uint32_t each[] = {1, HEADS, LANES}, units[] = {1, 8, BLOCK_TOKENS};
    uint32_t needed[LANES];
    struct cut_lane got[LANES];
    struct cut_request request = {.lanes_each = each[random_below(random, 3)], .unit = units[random_below(random, 3)], .needed = needed};
    for (uint32_t g = 0; g < LANES / request.lanes_each; g++)
        needed[g] = random_below(random, 4) ? random_below(random, TOKENS / request.unit + 2) : random_below(random, 2) * 5000;
    memset(got, 0xa5, sizeof got);
    cache->ops->cut(cache->backend, place, &request, got);
    cache->ops->settle(cache->backend);
    for (uint32_t g = 0; g < LANES / request.lanes_each; g++) expect_cut(cache, expected, &request, g, got);
}

/* Keys from scores and positions; joined where the dtype's blocks are. */
static void expect_keys(const struct cache *cache, const struct rank_request *request, const float *scores, struct expected *expected) {
    for (uint32_t l = 0; l < LANES; scores += cache->lane_tokens[l++]) {
        const uint32_t n = cache->lane_tokens[l];
        const int32_t *positions = cache->positions[l];
        for (uint32_t i = 0; i < n; i++) {
            bool stays = positions[i] < request->protect_below || positions[i] > request->protect_above;
            expected->keys[l][i] = stays ? RANK_PROTECTED : select_key(scores[i]);
        }
        bool joins = cache->backend->joins_blocks;
        expected->n_joined[l] = joins ? expect_join(expected->keys[l], positions, n, request->score.last_position + 1) : 0;
        expected->n_protected[l] = 0;
        for (uint32_t i = 0; i < n; i++) expected->n_protected[l] += expected->keys[l][i] == RANK_PROTECTED;
    }
}

/* Lists what stays, asks once more, which changes nothing. `lists` [LANES * TOKENS], one lane's behind the other's slots. Returns how many slots went beyond what was asked for. */
static uint32_t check_lists(const struct cache *cache, uint32_t place, const struct expected *expected, struct random *random, struct kept_lane *got,
                            uint32_t *lists) {
    uint32_t evict[LANES], beyond = 0;
    for (uint32_t l = 0; l < LANES; l++)
        evict[l] = random_below(random, 4) ? random_below(random, cache->lane_tokens[l] + 1) : random_below(random, 2) * TOKENS;
    for (int asked = 0; asked < 2; asked++) {
        uint32_t *list = lists;
        memset(got, 0xa5, LANES * sizeof *got);
        cache->ops->keep(cache->backend, place, evict, got, asked == 1 || random_below(random, 2) ? lists : NULL);
        cache->ops->settle(cache->backend);
        for (uint32_t l = 0; l < LANES; list += cache->lane_tokens[l++]) {
            uint32_t keep[TOKENS], n = cache->lane_tokens[l], most = n - expected->n_protected[l], moved = 0;
            const uint32_t n_keep = expect_keep(expected->keys[l], n, expected->n_joined[l], evict[l], keep);
            while (moved < n_keep && keep[moved] == moved) moved++;
            if (got[l].n_keep != n_keep || got[l].first_moved != moved)
                fail_msg("%s: lane %u of %u slots, %u joined, %u to evict: %u stay, the first moved is %u; expected %u and %u", cache->ops->name, l,
                         n, expected->n_joined[l], evict[l], got[l].n_keep, got[l].first_moved, n_keep, moved);
            if (asked == 1) assert_memory_equal(list, keep, n_keep * sizeof *keep);
            beyond += asked == 1 ? n - n_keep - (evict[l] < most ? evict[l] : most) : 0;
        }
    }
    return beyond;
}

/* Lists, and a compaction into free blocks by the lists that stayed in the backend: each slot is known by its position. */
static void check_keep(const struct cache *cache, uint32_t place, const struct expected *expected, struct random *random) {
    static uint32_t lists[LANES * TOKENS];
    uint32_t next = POOL / 2;
    int32_t positions[LANE_BLOCKS * BLOCK_TOKENS];
    struct kept_lane got[LANES];
    struct compaction items[LANES];
    (void)check_lists(cache, place, expected, random, got, lists);
    for (uint32_t l = 0; l < LANES; l++) {
        items[l] = (struct compaction){.source = cache->ids + cache->lane_first[l],
                                       .n_slots = cache->lane_tokens[l],
                                       .n_keep = got[l].n_keep,
                                       .destination = cache->ids + next,
                                       .place = place,
                                       .lane = l};
        next += blocks_of(got[l].n_keep);
    }
    cache->ops->compact(cache->backend, LANES, items);
    size_t at = 0;
    for (uint32_t l = 0; l < LANES; at += cache->lane_tokens[l++]) {
        cache->ops->read_positions(cache->backend, blocks_of(got[l].n_keep), items[l].destination, positions);
        for (uint32_t i = 0; i < got[l].n_keep; i++) assert_int_equal(positions[i], cache->positions[l][lists[at + i]]);
    }
}

/* One unit after another goes: of the next ones of all lanes the one whose last slot has the lowest key; of equals the lane's earlier one, then the lower lane. Blocks that are joined are whole. */
static struct unit_request draw_units(const struct cache *cache, struct random *random) {
    static const uint32_t sizes[] = {1, 8, BLOCK_TOKENS};
    struct unit_request request = {.unit = sizes[random_below(random, 3)]};
    uint32_t n_units = 0;
    for (uint32_t l = 0; l < LANES; l++) n_units += (cache->lane_tokens[l] + request.unit - 1) / request.unit;
    request.needed = random_below(random, 8) ? random_below(random, n_units + 1) : random_below(random, 2) * 2 * n_units;
    return request;
}

static void expect_units(const struct cache *cache, const struct expected *expected, const struct unit_request *request, uint32_t *evict) {
    static uint32_t sorted[LANES][TOKENS];
    uint32_t freed[LANES] = {0};
    for (uint32_t l = 0; l < LANES; l++) {
        evict[l] = 0;
        memcpy(sorted[l], expected->keys[l], cache->lane_tokens[l] * sizeof *sorted[l]);
        qsort(sorted[l], cache->lane_tokens[l], sizeof *sorted[l], ascending);
    }
    for (uint32_t i = 0; i < request->needed; i++) {
        uint32_t best = LANES, cost = RANK_PROTECTED;
        for (uint32_t l = 0; l < LANES; l++) {
            const uint32_t last = select_evictions(cache->lane_tokens[l], request->unit, freed[l] + 1); /* so many slots would be gone */
            if (last == 0 || last > cache->lane_tokens[l] - expected->n_protected[l]) continue;
            const uint32_t key = sorted[l][last - 1];
            if (best == LANES || key < cost || (key == cost && freed[l] < freed[best])) best = l, cost = key;
        }
        if (best == LANES) break;
        evict[best] = select_evictions(cache->lane_tokens[best], request->unit, ++freed[best]);
    }
}

/* lists: NULL, or of all lanes, one behind the other's slots. */
static void check_kept_units(const struct cache *cache, const struct expected *expected, const struct unit_request *request,
                             const struct kept_lane *got, const uint32_t *lists) {
    uint32_t evict[LANES], keep[TOKENS];
    size_t at = 0;
    expect_units(cache, expected, request, evict);
    for (uint32_t l = 0; l < LANES; at += cache->lane_tokens[l++]) {
        const uint32_t n_keep = expect_keep(expected->keys[l], cache->lane_tokens[l], expected->n_joined[l], evict[l], keep);
        uint32_t moved = 0;
        while (moved < n_keep && keep[moved] == moved) moved++;
        if (got[l].n_keep != n_keep || got[l].first_moved != moved)
            fail_msg("%s: %u units of %u: lane %u of %u slots keeps %u, the first moved is %u; expected %u and %u", cache->ops->name, request->needed,
                     request->unit, l, cache->lane_tokens[l], got[l].n_keep, got[l].first_moved, n_keep, moved);
        if (lists) assert_memory_equal(lists + at, keep, n_keep * sizeof *keep);
    }
}

static void check_units(const struct cache *cache, uint32_t place, const struct expected *expected, struct random *random) {
    static uint32_t lists[LANES * TOKENS];
    const struct unit_request request = draw_units(cache, random);
    uint32_t *const asked = random_below(random, 2) ? lists : NULL;
    struct kept_lane got[LANES];
    memset(got, 0xa5, sizeof got);
    cache->ops->keep_units(cache->backend, place, &request, got, asked);
    cache->ops->settle(cache->backend);
    check_kept_units(cache, expected, &request, got, asked);
}

/* Numbers that the backend's own scores must give, by the oracle of ranking. */
static void host_ranking(const struct cache *cache, const struct rank_request *request, uint32_t *n_protected, float *scores) {
    struct array_lane lanes[LANES];
    for (uint32_t l = 0; l < LANES; l++)
        lanes[l] =
            (struct array_lane){.n_slots = cache->lane_tokens[l], .positions = cache->positions[l], .raw = cache->raw[l], .norms = cache->norms[l]};
    struct array_backend *array = array_backend_new(LANES / HEADS, HEADS, GROUP, lanes);
    struct rank_request host = *request;
    host.score.block_ids = array->block_ids;
    host.score.lane_first = array->lane_first;
    host.score.lane_tokens = array->lane_tokens;
    array->backend.joins_blocks = cache->backend->joins_blocks;
    host_rank(&array->backend, 0, &host, n_protected, scores);
    array_backend_free(array);
}

/* What is in one place is not changed by what is done in another. */
struct others {
    uint32_t n;
    struct expected expected[RANK_PLACES_MAX];
};

static void check_round(struct cache *cache, uint32_t place, struct others *others, struct random *random) {
    static float scores[LANES * TOKENS], host_scores[LANES * TOKENS];
    struct expected *expected = &others->expected[place];
    struct rank_request request = draw_request(cache, random);
    uint32_t n_protected[LANES], host_protected[LANES];
    read_scores(cache, &request);
    host_ranking(cache, &request, host_protected, host_scores);
    memset(scores, 0xa5, sizeof scores);
    memset(n_protected, 0xa5, sizeof n_protected);
    cache->ops->rank(cache->backend, place, &request, n_protected, random_below(random, 2) ? scores : NULL);
    cache->ops->settle(cache->backend);
    assert_memory_equal(n_protected, host_protected, sizeof n_protected);
    cache->ops->rank(cache->backend, place, &request, n_protected, scores);
    cache->ops->settle(cache->backend);
    size_t at = 0;
    for (uint32_t l = 0; l < LANES; at += cache->lane_tokens[l++])
        for (uint32_t i = 0; i < cache->lane_tokens[l]; i++)
            if (memcmp(&scores[at + i], &host_scores[at + i], sizeof *scores) != 0)
                fail_msg("%s, kind %d, fold %d, pooling %d of %u, value power %u: lane %u slot %u has %.9g, expected %.9g", cache->ops->name,
                         request.score.kind, request.fold, request.pooling, request.pooling_kernel, request.value_power, l, i, (double)scores[at + i],
                         (double)host_scores[at + i]);
    expect_keys(cache, &request, scores, expected);
    assert_memory_equal(n_protected, expected->n_protected, sizeof n_protected);
    for (int i = 0; i < 3; i++) check_cuts(cache, place, expected, random);
    for (int i = 0; i < 2; i++) check_keep(cache, place, expected, random);
    for (int i = 0; i < 3; i++) check_units(cache, place, expected, random);
    if (place >= others->n) others->n = place + 1;
    if (random_below(random, 4) > 0) return;
    const uint32_t other = random_below(random, others->n);
    check_cuts(cache, other, &others->expected[other], random);
    check_keep(cache, other, &others->expected[other], random);
}

/* Requests of all places are under way before the first is waited for: rank and cut, then keep; rank and keep_units. */
static void check_places_at_once(struct cache *cache, const struct others *others, struct random *random) {
    static float scores[LANES * TOKENS];
    static struct expected expected[RANK_PLACES_MAX];
    const uint32_t n = cache->backend->rank_places, needed = random_below(random, LANES * LANE_BLOCKS);
    uint32_t evict[RANK_PLACES_MAX][LANES], lists[TOKENS];
    struct cut_lane cuts[RANK_PLACES_MAX][LANES];
    struct kept_lane kept[RANK_PLACES_MAX][LANES];
    struct rank_request requests[RANK_PLACES_MAX];
    const struct cut_request cut = {.lanes_each = LANES, .unit = BLOCK_TOKENS, .needed = &needed};
    assert_int_equal(others->n, n);
    for (uint32_t place = 0; place < n; place++) { /* what must come of it, one after another */
        requests[place] = draw_request(cache, random);
        cache->ops->rank(cache->backend, 0, &requests[place], NULL, scores);
        cache->ops->settle(cache->backend);
        expect_keys(cache, &requests[place], scores, &expected[place]);
    }
    memset(cuts, 0xa5, sizeof cuts);
    memset(kept, 0xa5, sizeof kept);
    for (uint32_t place = 0; place < n; place++) {
        cache->ops->rank(cache->backend, place, &requests[place], NULL, NULL);
        cache->ops->cut(cache->backend, place, &cut, cuts[place]);
    }
    cache->ops->settle(cache->backend);
    for (uint32_t place = 0; place < n; place++) {
        expect_cut(cache, &expected[place], &cut, 0, cuts[place]);
        for (uint32_t l = 0; l < LANES; l++) evict[place][l] = random_below(random, cache->lane_tokens[l] + 1);
        cache->ops->keep(cache->backend, place, evict[place], kept[place], NULL);
    }
    cache->ops->settle(cache->backend);
    for (uint32_t place = 0; place < n; place++)
        for (uint32_t l = 0; l < LANES; l++)
            assert_int_equal(kept[place][l].n_keep,
                             expect_keep(expected[place].keys[l], cache->lane_tokens[l], expected[place].n_joined[l], evict[place][l], lists));
    struct unit_request units[RANK_PLACES_MAX];
    memset(kept, 0xa5, sizeof kept);
    for (uint32_t place = n; place-- > 0;) { /* all that is left of a choice goes by what the device knows alone */
        units[place] = draw_units(cache, random);
        cache->ops->rank(cache->backend, place, &requests[place], NULL, NULL);
        cache->ops->keep_units(cache->backend, place, &units[place], kept[place], NULL);
    }
    cache->ops->settle(cache->backend);
    for (uint32_t place = 0; place < n; place++) check_kept_units(cache, &expected[place], &units[place], kept[place], NULL);
}

static void test_choice(const struct backend_ops *ops, enum kv_dtype dtype) {
    static struct cache cache;
    struct random random = {(uint64_t)dtype + 11};
    open_cache(&cache, ops, dtype, &random);
    static struct others others;
    others.n = 0;
    const char *brief = getenv("KVASIR_TEST_SHORT"); /* the host device takes a second a round */
    const uint32_t rounds = brief && *brief && strcmp(brief, "0") != 0 ? ROUNDS / 3 : ROUNDS;
    for (uint32_t round = 0; round < rounds; round++) check_round(&cache, round % cache.backend->rank_places, &others, &random);
    check_places_at_once(&cache, &others, &random);
    ops->close(cache.backend);
    tiny_program_free(cache.program);
}

static void test_on_every_backend(void **state) {
    (void)state;
    const struct tiny_shape shape = tiny_shape_default();
    struct program *program = tiny_program_new(&shape);
    for (const struct backend_ops *const *ops = backends; *ops; ops++) {
        if (*ops == &backend_mock || !test_runs_on(*ops)) continue;
        for (int dtype = 0; dtype < KV_DTYPES; dtype++)
            if ((*ops)->block_bytes(program, (enum kv_dtype)dtype) > 0) test_choice(*ops, (enum kv_dtype)dtype);
    }
    tiny_program_free(program);
}

/* ---- arrays ---- */

/* A lane of any length, blocks and remainders alike; positions with gaps as evictions leave them; few different scores, so that many are equal. */
static void draw_lane(struct cache *cache, uint32_t lane, struct random *random) {
    const uint32_t kinds = 1 + random_below(random, 12), gaps = random_below(random, 3) * 20;
    int32_t position = (int32_t)random_below(random, 5) - 1;
    uint32_t n = random_below(random, TOKENS + 1);
    if (random_below(random, 3) == 0) n = n / BLOCK_TOKENS * BLOCK_TOKENS;
    cache->lane_tokens[lane] = n;
    for (uint32_t i = 0; i < n; i++) {
        cache->positions[lane][i] = position += 1 + (int32_t)(random_below(random, 8) == 0 ? random_below(random, gaps + 1) : 0);
        cache->raw[lane][i] = random_below(random, 50) == 0 ? (float)NAN : (float)random_below(random, kinds) - 2;
    }
}

/* Lanes that are nobody's cache: every length, age and tie, as no run of a model would give them. Where blocks are joined, each stays or goes whole. */
static void test_on_arrays(bool joins) {
    static struct cache cache;
    static struct expected expected;
    static uint32_t lists[LANES * TOKENS];
    struct random random = {joins ? 17 : 19};
    uint32_t beyond = 0, joined = 0;
    for (uint32_t round = 0; round < 20 * ROUNDS; round++) {
        struct array_lane lanes[LANES];
        struct kept_lane kept[LANES];
        uint32_t n_protected[LANES];
        static float scores[LANES * TOKENS];
        int32_t newest = 0;
        for (uint32_t l = 0; l < LANES; l++) {
            draw_lane(&cache, l, &random);
            uint32_t n = cache.lane_tokens[l];
            lanes[l] = (struct array_lane){.n_slots = n, .positions = cache.positions[l], .raw = cache.raw[l]};
            if (n > 0 && cache.positions[l][n - 1] > newest) newest = cache.positions[l][n - 1];
        }
        struct array_backend *array = array_backend_new(LANES / HEADS, HEADS, GROUP, lanes);
        array->backend.joins_blocks = joins;
        cache.backend = &array->backend;
        cache.ops = array->backend.ops;
        struct rank_request request = {.source = RANK_SCORES,
                                       .score = {.kind = SCORE_KEYDIFF,
                                                 .last_position = newest + (int32_t)random_below(&random, 3) * 40,
                                                 .block_ids = array->block_ids,
                                                 .lane_first = array->lane_first,
                                                 .lane_tokens = array->lane_tokens},
                                       .protect_below = random_below(&random, 6),
                                       .protect_above = (int64_t)newest - random_below(&random, random_below(&random, 10) ? 40 : TOKENS)};
        const uint32_t place = random_below(&random, array->backend.rank_places);
        cache.ops->rank(cache.backend, place, &request, n_protected, scores);
        cache.ops->settle(cache.backend);
        expect_keys(&cache, &request, scores, &expected);
        assert_memory_equal(n_protected, expected.n_protected, sizeof n_protected);
        check_cuts(&cache, place, &expected, &random);
        check_units(&cache, place, &expected, &random);
        for (int i = 0; i < 2; i++) beyond += check_lists(&cache, place, &expected, &random, kept, lists) > 0;
        for (uint32_t l = 0; l < LANES; l++) joined += expected.n_joined[l] > 0;
        array_backend_free(array);
    }
    if (joins) /* blocks that could not be split did come up */
        assert_true(beyond > 5 * ROUNDS && joined > 20 * ROUNDS);
    else
        assert_true(beyond == 0 && joined == 0);
}

static void test_slots_on_arrays(void **state) {
    (void)state;
    test_on_arrays(false);
}
static void test_joined_blocks_on_arrays(void **state) {
    (void)state;
    test_on_arrays(true);
}

/* Bits of floats in the order of floats; NaN below all. */
static void test_keys_are_in_order(void **state) {
    (void)state;
    static const float ascending_floats[] = {-1e30f, -2, -1, -1e-30f, 0, 1e-40f, 1, 2, 3e38f};
    for (size_t i = 1; i < sizeof ascending_floats / sizeof *ascending_floats; i++)
        assert_true(select_key(ascending_floats[i - 1]) < select_key(ascending_floats[i]));
    const uint32_t largest_nan = 0x7fffffffu, negative_nan = UINT32_MAX;
    float nan_value;
    memcpy(&nan_value, &largest_nan, sizeof nan_value);
    assert_int_equal(select_key(nan_value), 0);
    memcpy(&nan_value, &negative_nan, sizeof nan_value);
    assert_int_equal(select_key(nan_value), 0);
    assert_true(select_key(-1e30f) > 0 && select_key(3e38f) < RANK_PROTECTED);
}

/* Freeing and evicting are each other's inverse, whatever the tail. */
static void test_units(void **state) {
    (void)state;
    for (uint32_t unit = 1; unit <= 40; unit += 13)
        for (uint32_t n = 0; n < 200; n++)
            for (uint32_t units = 1; units * unit < n + unit; units++) {
                uint32_t evict = select_evictions(n, unit, units), held = (n + unit - 1) / unit;
                assert_true(evict <= n && (n - evict + unit - 1) / unit == held - units);
                assert_int_equal(select_units(n, 0, unit, evict), units);
                assert_int_equal(select_units(n, 0, unit, evict - 1), units - 1);
                assert_true(select_units(n, n - evict + 1 > n ? n : n - evict + 1, unit, UINT32_MAX) < units); /* one too few may go */
            }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_keys_are_in_order), cmocka_unit_test(test_units), cmocka_unit_test(test_slots_on_arrays),
                                       cmocka_unit_test(test_joined_blocks_on_arrays), cmocka_unit_test(test_on_every_backend)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
