/* See select.h: ranking, cutting and listing on the host, for the backends that compute there, and the oracle of those that do not. Owns the state between the calls. The thread that calls
 * the backend. Selection is by counting bytes of keys: no sorts. */
#include "kernels/select.h"

#include <float.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/random.h"
#include "kernels/backend.h"
#include "kernels/kivi.h"

#define RAW_BYTES_WANTED (8u << 20) /* raw scores of as many layers at a time as fit; one at least */

/* Of the sequence that was ranked last there. */
struct ranked {
    uint32_t *n_slots, *n_protected, *n_joined; /* [n_lanes] */
    size_t *first;                              /* [n_lanes] where a lane's keys and list begin */
    uint32_t *keys, *kept;                      /* [n_lanes * lane_slots] */
};

struct ranking {
    uint32_t n_lanes, n_layers, n_kv_heads, group, lane_slots, raw_layers, n_places;
    struct ranked places[RANK_PLACES_MAX], *at; /* at: that of the call */
    /* Scratch: */
    uint32_t *below;         /* [n_lanes] */
    uint32_t *n_some;        /* [n_lanes] */
    uint32_t (*counts)[256]; /* [n_lanes] */
    size_t *offset;          /* [n_lanes] */
    float *raw;              /* [raw_layers * n_kv_heads * group * lane_slots] */
    float *norms;            /* [raw_layers * n_kv_heads * lane_slots] */
    float *scores;           /* [n_kv_heads * lane_slots] */
    int32_t *positions;      /* [n_kv_heads * lane_slots] */
    float *pooled;           /* [lane_slots] */
    float *sum;              /* [lane_slots] */
};

/* Positions are read by whole blocks. */
static uint32_t whole_blocks(uint32_t slots) { return (slots + BLOCK_TOKENS - 1) / BLOCK_TOKENS * BLOCK_TOKENS; }

static uint32_t layers_at_once(const struct program *program, uint32_t lane_slots) {
    size_t layer = (size_t)program->n_heads * lane_slots * sizeof(float), layers = RAW_BYTES_WANTED / (layer ? layer : 1);
    return layers < 1 ? 1 : layers > program->n_layers ? program->n_layers : (uint32_t)layers;
}

uint64_t ranking_bytes(const struct program *program, uint32_t lane_slots, uint32_t n_places) {
    if (lane_slots == 0) return 0;
    lane_slots = whole_blocks(lane_slots);
    uint64_t lanes = program_lanes(program), layers = layers_at_once(program, lane_slots), heads = program->n_kv_heads;
    uint64_t place = lanes * (3 * sizeof(uint32_t) + sizeof(size_t)) + lanes * lane_slots * 2 * sizeof(uint32_t);
    return (n_places ? n_places : 1) * place + lanes * (2 * sizeof(uint32_t) + sizeof(size_t) + 256 * sizeof(uint32_t)) +
           layers * (program->n_heads + heads) * lane_slots * sizeof(float) + (2 * heads + 2) * lane_slots * sizeof(float);
}

struct ranking *ranking_new(const struct program *program, uint32_t lane_slots, uint32_t n_places) {
    lane_slots = whole_blocks(lane_slots);
    struct ranking *r = check_calloc(1, sizeof *r);
    *r = (struct ranking){.n_lanes = program_lanes(program),
                          .n_layers = program->n_layers,
                          .n_kv_heads = program->n_kv_heads,
                          .group = program->n_heads / program->n_kv_heads,
                          .lane_slots = lane_slots,
                          .raw_layers = layers_at_once(program, lane_slots),
                          .n_places = n_places ? n_places : 1};
    CHECK(r->n_places <= RANK_PLACES_MAX);
    size_t lanes = r->n_lanes, slots = lanes * lane_slots, layer = (size_t)r->n_kv_heads * lane_slots;
    for (uint32_t i = 0; i < r->n_places; i++)
        r->places[i] = (struct ranked){.n_slots = check_calloc(lanes, sizeof(uint32_t)),
                                       .n_protected = check_calloc(lanes, sizeof(uint32_t)),
                                       .n_joined = check_calloc(lanes, sizeof(uint32_t)),
                                       .first = check_calloc(lanes, sizeof(size_t)),
                                       .keys = check_calloc(slots, sizeof(uint32_t)),
                                       .kept = check_calloc(slots, sizeof(uint32_t))};
    r->below = check_calloc(lanes, sizeof *r->below);
    r->n_some = check_calloc(lanes, sizeof *r->n_some);
    r->counts = check_calloc(lanes, sizeof *r->counts);
    r->offset = check_calloc(lanes, sizeof *r->offset);
    r->raw = check_calloc(r->raw_layers * layer * r->group, sizeof *r->raw);
    r->norms = check_calloc(r->raw_layers * layer, sizeof *r->norms);
    r->scores = check_calloc(layer, sizeof *r->scores);
    r->positions = check_calloc(layer, sizeof *r->positions);
    r->pooled = check_calloc(lane_slots, sizeof *r->pooled);
    r->sum = check_calloc(lane_slots, sizeof *r->sum);
    return r;
}

void ranking_free(struct ranking *r) {
    if (!r) return;
    for (uint32_t i = 0; i < r->n_places; i++) {
        void *own[] = {r->places[i].n_slots, r->places[i].n_protected, r->places[i].n_joined,
                       r->places[i].first,   r->places[i].keys,        r->places[i].kept};
        for (size_t j = 0; j < sizeof own / sizeof *own; j++) free(own[j]);
    }
    void *all[] = {r->below, r->n_some, r->counts, r->offset, r->raw, r->norms, r->scores, r->positions, r->pooled, r->sum};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    free(r);
}

static struct ranking *ranking_at(const struct backend *backend, uint32_t place) {
    struct ranking *r = backend->ranking;
    CHECK(r && place < r->n_places);
    r->at = &r->places[place];
    return r;
}

/* ---- rank ---- */

/* Slots that have all their neighbours, many at a time: `in` is the first one's first. Neighbours are taken in ascending order everywhere, so it does not matter how. */
static void max_many(const float *restrict in, uint32_t width, uint32_t n, float *restrict out) {
    for (uint32_t i = 0; i < n; i++) out[i] = -FLT_MAX;
    for (uint32_t j = 0; j < width; j++, in++)
        for (uint32_t i = 0; i < n; i++) out[i] = in[i] > out[i] ? in[i] : out[i];
}

static void sum_many(const float *restrict in, uint32_t width, uint32_t n, float *restrict out) {
    for (uint32_t i = 0; i < n; i++) out[i] = 0;
    for (uint32_t j = 0; j < width; j++, in++)
        for (uint32_t i = 0; i < n; i++) out[i] += in[i];
}

/* Near an end. */
static float pool_one(const float *in, uint32_t n, uint32_t i, uint32_t half, bool of_max) {
    float sum = 0, max = -FLT_MAX;
    for (uint32_t j = i < half ? 0 : i - half; j < n && j <= i + half; j++) {
        sum += in[j];
        max = in[j] > max ? in[j] : max;
    }
    return of_max ? max : sum;
}

enum { POOL_SLOTS = 256 }; /* of a pass: they stay in the nearest cache */

static void pool(const struct rank_request *request, const float *in, float *out, uint32_t n) {
    if (request->pooling == RANK_POOL_NONE || request->pooling_kernel <= 1) {
        memcpy(out, in, n * sizeof *out);
        return;
    }
    const uint32_t half = request->pooling_kernel / 2, end = n > half ? n - half : 0;
    const bool of_max = request->pooling == RANK_POOL_MAX;
    for (uint32_t i = 0; i < n;) {
        if (i < half || i >= end) {
            out[i] = pool_one(in, n, i, half, of_max);
            i++;
            continue;
        }
        uint32_t count = end - i < POOL_SLOTS ? end - i : POOL_SLOTS;
        of_max ? max_many(in + i - half, 2 * half + 1, count, out + i) : sum_many(in + i - half, 2 * half + 1, count, out + i);
        i += count;
    }
    /* Same padding, zeros counted, as the published pooling does. */
    for (uint32_t i = 0; !of_max && i < n; i++) out[i] /= (float)request->pooling_kernel;
}

/* One number a slot from the kind's: `out` [n]. */
static void fold(const struct ranking *r, const struct rank_request *request, const float *raw, uint32_t n, float *out) {
    if (!score_per_query_head(request->score.kind)) {
        memcpy(out, raw, n * sizeof *out);
        return;
    }
    memset(r->sum, 0, n * sizeof *r->sum);
    for (uint32_t h = 0; h < r->group; h++) {
        const float *row = raw + (size_t)h * n;
        if (request->fold == RANK_FOLD_SUM_OF_POOLED) {
            pool(request, row, r->pooled, n);
            row = r->pooled;
        }
        for (uint32_t i = 0; i < n; i++) r->sum[i] += row[i];
    }
    if (request->fold != RANK_FOLD_SUM_OF_POOLED)
        for (uint32_t i = 0; i < n; i++) r->sum[i] /= (float)r->group;
    if (request->fold == RANK_FOLD_MEAN_POOLED)
        pool(request, r->sum, out, n);
    else
        memcpy(out, r->sum, n * sizeof *out);
}

static void average_layer(const struct ranking *r, uint32_t lane, float *const *scores, int32_t *const *positions) {
    uint32_t n = r->at->n_slots[lane], heads = r->n_kv_heads;
    for (uint32_t h = 1; h < heads; h++)
        if (r->at->n_slots[lane + h] != n || memcmp(positions[h], positions[0], n * sizeof *positions[h]) != 0) return;
    for (uint32_t i = 0; i < n; i++) {
        float sum = 0;
        for (uint32_t h = 0; h < heads; h++) sum += scores[h][i];
        for (uint32_t h = 0; h < heads; h++) scores[h][i] = sum / (float)heads;
    }
}

/* Positions are >= 0 and < INT32_MAX: comparing with the nearest such number is the same. */
static int32_t within_int32(int64_t x) { return x < INT32_MIN ? INT32_MIN : x > INT32_MAX ? INT32_MAX : (int32_t)x; }

/* Scores of a layer's lanes to keys; raw numbers and value norms of the lanes at their offsets. */
static void rank_layer(struct backend *backend, const struct rank_request *request, uint32_t layer, float *scores_out) {
    struct ranking *r = backend->ranking;
    float *scores[RANK_HEADS_MAX];
    int32_t *positions[RANK_HEADS_MAX];
    const int32_t below = within_int32(request->protect_below), above = within_int32(request->protect_above);
    const uint32_t lane = layer * r->n_kv_heads, group = score_per_query_head(request->score.kind) ? r->group : 1;
    for (uint32_t h = 0; h < r->n_kv_heads; h++) {
        const uint32_t l = lane + h, n = r->at->n_slots[l];
        scores[h] = r->scores + (size_t)h * r->lane_slots;
        positions[h] = r->positions + (size_t)h * r->lane_slots;
        backend->ops->read_positions(backend, whole_blocks(n) / BLOCK_TOKENS, request->score.block_ids + request->score.lane_first[l], positions[h]);
        if (request->source == RANK_SCORES) {
            fold(r, request, r->raw + r->offset[l] * group, n, scores[h]);
            for (uint32_t i = 0; request->value_power > 0 && i < n; i++) {
                float norm = r->norms[r->offset[l] + i];
                scores[h][i] *= request->value_power == 2 ? norm * norm : norm;
            }
        } else {
            for (uint32_t i = 0; i < n; i++)
                scores[h][i] = request->source == RANK_POSITIONS ? (float)positions[h][i]
                                                                 : random_unit(random_at(request->seed, (uint64_t)(uint32_t)positions[h][i], 0, 0));
        }
    }
    if (request->layer_mean) average_layer(r, lane, scores, positions);
    for (uint32_t h = 0; h < r->n_kv_heads; h++) {
        const uint32_t l = lane + h;
        uint32_t *keys = r->at->keys + r->at->first[l];
        if (scores_out) memcpy(scores_out + r->at->first[l], scores[h], r->at->n_slots[l] * sizeof *scores_out);
        uint32_t n_protected = 0;
        for (uint32_t i = 0; i < r->at->n_slots[l]; i++) {
            bool stays = positions[h][i] < below || positions[h][i] > above;
            keys[i] = stays ? RANK_PROTECTED : select_key(scores[h][i]);
            n_protected += stays;
        }
        r->at->n_protected[l] = n_protected;
        r->at->n_joined[l] =
            backend->joins_blocks ? select_join(keys, positions[h], r->at->n_slots[l], request->score.last_position + 1, &r->at->n_protected[l]) : 0;
    }
}

static void score_layers(struct backend *backend, const struct rank_request *request, enum score_kind kind, uint32_t layer, uint32_t n_layers,
                         float *numbers) {
    struct ranking *r = backend->ranking;
    const uint32_t first = layer * r->n_kv_heads, end = (layer + n_layers) * r->n_kv_heads, per_slot = score_per_query_head(kind) ? r->group : 1;
    struct score_request score = request->score;
    size_t used = 0;
    for (uint32_t l = first; l < end; l++) {
        r->offset[l] = used * per_slot;
        used += r->at->n_slots[l];
    }
    score.kind = kind;
    score.first_lane = first;
    score.n_lanes = end - first;
    score.offset = r->offset;
    backend->ops->score(backend, &score, numbers);
    for (uint32_t l = first; l < end; l++) r->offset[l] /= per_slot;
}

void host_rank(struct backend *backend, uint32_t place, const struct rank_request *request, uint32_t *n_protected, float *scores) {
    struct ranking *r = ranking_at(backend, place);
    CHECK(r->n_kv_heads <= RANK_HEADS_MAX);
    size_t used = 0;
    for (uint32_t l = 0; l < r->n_lanes; l++) {
        r->at->n_slots[l] = request->score.lane_tokens[l];
        CHECK(r->at->n_slots[l] <= r->lane_slots);
        r->at->first[l] = used;
        used += r->at->n_slots[l];
    }
    for (uint32_t first = 0; first < r->n_layers; first += r->raw_layers) {
        uint32_t left = r->n_layers - first, count = left < r->raw_layers ? left : r->raw_layers;
        if (request->source == RANK_SCORES) {
            if (request->value_power > 0) score_layers(backend, request, SCORE_VALUE_NORM, first, count, r->norms);
            score_layers(backend, request, request->score.kind, first, count, r->raw);
        }
        for (uint32_t layer = first; layer < first + count; layer++) rank_layer(backend, request, layer, scores);
    }
    if (n_protected) memcpy(n_protected, r->at->n_protected, r->n_lanes * sizeof *n_protected);
}

/* ---- cut ---- */

/* Those keys whose bits from `shift` on are the prefix's, in order; `to` may be `from`. Returns how many. */
static uint32_t keep_prefix(const uint32_t *from, uint32_t n, uint32_t prefix, int shift, uint32_t *to) {
    uint32_t n_kept = 0;
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t key = from[i];
        to[n_kept] = key;
        n_kept += key >> shift == prefix >> shift;
    }
    return n_kept;
}

/* Of a lane's keys that are still in question (their bytes above are the prefix): for each value of the next byte, how many have it or a lower one. `kept` is free until keep: from
 * the second byte on it holds those keys alone, which are few. */
static void count_byte(struct ranking *r, uint32_t lane, uint32_t prefix, int shift) {
    const uint32_t *keys = r->at->keys + r->at->first[lane];
    uint32_t *counts = r->counts[lane], *some = r->at->kept + r->at->first[lane], n = r->at->n_slots[lane];
    memset(counts, 0, sizeof r->counts[lane]);
    if (shift == 24) { /* neighbours have the same first byte often: two counters do not wait for each other */
        uint32_t odd[256] = {0}, i = 0;
        for (; i + 2 <= n; i += 2) counts[keys[i] >> 24]++, odd[keys[i + 1] >> 24]++;
        if (i < n) counts[keys[i] >> 24]++;
        for (i = 0; i < 256; i++) counts[i] += odd[i];
    } else {
        n = keep_prefix(shift == 16 ? keys : some, shift == 16 ? n : r->n_some[lane], prefix, shift + 8, some);
        r->n_some[lane] = n;
        for (uint32_t i = 0; i < n; i++) counts[some[i] >> shift & 255]++;
    }
    if (prefix == (shift == 24 ? 0 : UINT32_MAX << (shift + 8)))
        counts[255] -= r->at->n_protected[lane]; /* RANK_PROTECTED, all ones, is not in question */
    for (uint32_t byte = 1; byte < 256; byte++) counts[byte] += counts[byte - 1];
}

/* The least byte at which the lanes free enough; 255 where none does. */
static uint32_t find_byte(const struct ranking *r, uint32_t first, uint32_t end, uint32_t unit, uint32_t needed) {
    uint32_t low = 0, high = 255;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        uint64_t freed = 0;
        for (uint32_t l = first; l < end; l++)
            freed += select_units(r->at->n_slots[l], r->at->n_protected[l], unit, r->below[l] + r->counts[l][middle]);
        if (freed >= needed)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* With c slots of a lane at or below a key, the lane frees select_units(c). A byte of the key at a time. */
static void cut_group(struct ranking *r, uint32_t first, uint32_t end, uint32_t unit, uint32_t needed, struct cut_lane *lanes) {
    uint32_t prefix = 0;
    for (uint32_t l = first; l < end; l++) r->below[l] = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (uint32_t l = first; l < end; l++) count_byte(r, l, prefix, shift);
        uint32_t byte = find_byte(r, first, end, unit, needed);
        prefix |= byte << shift;
        for (uint32_t l = first; l < end; l++) {
            uint32_t lower = byte > 0 ? r->counts[l][byte - 1] : 0;
            r->below[l] += lower;
            lanes[l] = (struct cut_lane){.below = r->below[l], .equal = r->counts[l][byte] - lower};
        }
    }
}

void host_cut(struct backend *backend, uint32_t place, const struct cut_request *request, struct cut_lane *lanes) {
    struct ranking *r = ranking_at(backend, place);
    CHECK(request->lanes_each > 0 && r->n_lanes % request->lanes_each == 0 && request->unit > 0);
    for (uint32_t first = 0; first < r->n_lanes; first += request->lanes_each) {
        uint32_t needed = request->needed[first / request->lanes_each], end = first + request->lanes_each;
        if (needed > 0)
            cut_group(r, first, end, request->unit, needed, lanes);
        else
            for (uint32_t l = first; l < end; l++) lanes[l] = (struct cut_lane){0};
    }
}

/* ---- keep ---- */

/* A byte of the key at a time; `some`: the keys still in question. */
uint32_t select_rank(const uint32_t *keys, uint32_t n, uint32_t rank, uint32_t *below, uint32_t *some) {
    CHECK(rank < n);
    uint32_t prefix = 0, n_some = n;
    *below = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        uint32_t counts[256] = {0}, byte = 0;
        const uint32_t *from = shift == 24 ? keys : some;
        if (shift < 24) n_some = keep_prefix(shift == 16 ? keys : some, n_some, prefix, shift + 8, some);
        for (uint32_t i = 0; i < n_some; i++) counts[from[i] >> shift & 255]++;
        while (*below + counts[byte] <= rank) *below += counts[byte++];
        prefix |= byte << shift;
    }
    return prefix;
}

uint32_t select_join(uint32_t *keys, const int32_t *positions, uint32_t n, int32_t next, uint32_t *n_protected) {
    uint32_t joined = 0;
    for (; joined + BLOCK_TOKENS <= n && kivi_reads_codes(positions[joined + BLOCK_TOKENS - 1], next); joined += BLOCK_TOKENS) {
        uint32_t highest = 0; /* RANK_PROTECTED is above all others */
        for (uint32_t i = joined; i < joined + BLOCK_TOKENS; i++) highest = keys[i] > highest ? keys[i] : highest;
        for (uint32_t i = joined; i < joined + BLOCK_TOKENS; i++) {
            *n_protected += highest == RANK_PROTECTED && keys[i] != RANK_PROTECTED;
            keys[i] = highest;
        }
    }
    return joined;
}

uint32_t select_keep(const uint32_t *keys, uint32_t n, uint32_t n_protected, uint32_t evict, uint32_t *keep) {
    return select_keep_joined(keys, n, n_protected, evict, 0, keep);
}

uint32_t select_keep_joined(const uint32_t *keys, uint32_t n, uint32_t n_protected, uint32_t evict, uint32_t joined, uint32_t *keep) {
    uint32_t n_keep = 0, below = 0, equal = 0;
    if (evict > n - n_protected) evict = n - n_protected;
    if (evict == 0) {
        for (uint32_t i = 0; i < n; i++) keep[i] = i;
        return n;
    }
    const uint32_t threshold = select_rank(keys, n, evict - 1, &below, keep);
    for (uint32_t i = 0; i < n; i++) equal += keys[i] == threshold;
    uint32_t equal_kept = equal - (evict - below); /* the older ones */
    for (uint32_t i = 0; i < n; i++) {
        /* Its slots are equal, so that a block is split here or not at all. Newer ones go first: if it cannot stay, those behind it do not either. */
        if (i < joined && i % BLOCK_TOKENS == 0 && keys[i] == threshold && equal_kept < BLOCK_TOKENS) equal_kept = 0;
        const bool at = keys[i] == threshold && equal_kept > 0;
        keep[n_keep] = i;
        n_keep += keys[i] > threshold || at;
        equal_kept -= at;
    }
    return n_keep;
}

void host_keep(struct backend *backend, uint32_t place, const uint32_t *evict, struct kept_lane *lanes, uint32_t *keep) {
    struct ranking *r = ranking_at(backend, place);
    for (uint32_t l = 0; l < r->n_lanes; l++) {
        uint32_t *kept = r->at->kept + r->at->first[l], moved = 0;
        uint32_t n_keep =
            select_keep_joined(r->at->keys + r->at->first[l], r->at->n_slots[l], r->at->n_protected[l], evict[l], r->at->n_joined[l], kept);
        while (moved < n_keep && kept[moved] == moved) moved++;
        lanes[l] = (struct kept_lane){.n_keep = n_keep, .first_moved = moved};
        if (keep) memcpy(keep + r->at->first[l], kept, n_keep * sizeof *keep);
    }
}

void host_settle(struct backend *backend) { (void)backend; }

const uint32_t *host_kept(const struct backend *backend, const struct compaction *item) {
    if (item->keep) return item->keep;
    const struct ranking *r = backend->ranking; /* workers ask side by side: nothing is noted */
    CHECK(r && item->place < r->n_places && item->lane < r->n_lanes && item->n_slots == r->places[item->place].n_slots[item->lane]);
    return r->places[item->place].kept + r->places[item->place].first[item->lane];
}
