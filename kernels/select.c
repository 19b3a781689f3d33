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

struct ranking {
    uint32_t n_lanes, n_layers, n_kv_heads, group, lane_slots, raw_layers;
    /* Of the sequence that was ranked last: */
    uint32_t *n_slots, *n_protected, *n_joined; /* [n_lanes] */
    size_t *first;                              /* [n_lanes] where a lane's keys and list begin */
    uint32_t *keys, *kept;                      /* [n_lanes * lane_slots] */
    /* Scratch: */
    uint32_t *below;         /* [n_lanes] */
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

uint64_t ranking_bytes(const struct program *program, uint32_t lane_slots) {
    if (lane_slots == 0) return 0;
    lane_slots = whole_blocks(lane_slots);
    uint64_t lanes = program_lanes(program), layers = layers_at_once(program, lane_slots), heads = program->n_kv_heads;
    return lanes * (4 * sizeof(uint32_t) + 2 * sizeof(size_t) + 256 * sizeof(uint32_t)) + lanes * lane_slots * 2 * sizeof(uint32_t) +
           layers * (program->n_heads + heads) * lane_slots * sizeof(float) + (2 * heads + 2) * lane_slots * sizeof(float);
}

struct ranking *ranking_new(const struct program *program, uint32_t lane_slots) {
    lane_slots = whole_blocks(lane_slots);
    struct ranking *r = check_calloc(1, sizeof *r);
    *r = (struct ranking){.n_lanes = program_lanes(program),
                          .n_layers = program->n_layers,
                          .n_kv_heads = program->n_kv_heads,
                          .group = program->n_heads / program->n_kv_heads,
                          .lane_slots = lane_slots,
                          .raw_layers = layers_at_once(program, lane_slots)};
    size_t lanes = r->n_lanes, slots = lanes * lane_slots, layer = (size_t)r->n_kv_heads * lane_slots;
    r->n_slots = check_calloc(lanes, sizeof *r->n_slots);
    r->n_protected = check_calloc(lanes, sizeof *r->n_protected);
    r->n_joined = check_calloc(lanes, sizeof *r->n_joined);
    r->first = check_calloc(lanes, sizeof *r->first);
    r->keys = check_calloc(slots, sizeof *r->keys);
    r->kept = check_calloc(slots, sizeof *r->kept);
    r->below = check_calloc(lanes, sizeof *r->below);
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
    void *all[] = {r->n_slots, r->n_protected, r->n_joined, r->first,  r->keys,      r->kept,   r->below, r->counts,
                   r->offset,  r->raw,         r->norms,    r->scores, r->positions, r->pooled, r->sum};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    free(r);
}

/* ---- rank ---- */

static void pool(const struct rank_request *request, const float *in, float *out, uint32_t n) {
    if (request->pooling == RANK_POOL_NONE || request->pooling_kernel <= 1) {
        memcpy(out, in, n * sizeof *out);
        return;
    }
    uint32_t half = request->pooling_kernel / 2;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t first = i < half ? 0 : i - half, last = i + half < n ? i + half : n - 1;
        float sum = 0, max = -FLT_MAX;
        for (uint32_t j = first; j <= last; j++) {
            sum += in[j];
            max = in[j] > max ? in[j] : max;
        }
        /* Same padding, zeros counted, as the published pooling does. */
        out[i] = request->pooling == RANK_POOL_MAX ? max : sum / (float)request->pooling_kernel;
    }
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
    uint32_t n = r->n_slots[lane], heads = r->n_kv_heads;
    for (uint32_t h = 1; h < heads; h++)
        if (r->n_slots[lane + h] != n || memcmp(positions[h], positions[0], n * sizeof *positions[h]) != 0) return;
    for (uint32_t i = 0; i < n; i++) {
        float sum = 0;
        for (uint32_t h = 0; h < heads; h++) sum += scores[h][i];
        for (uint32_t h = 0; h < heads; h++) scores[h][i] = sum / (float)heads;
    }
}

/* Scores of a layer's lanes to keys; raw numbers and value norms of the lanes at their offsets. */
static void rank_layer(struct backend *backend, const struct rank_request *request, uint32_t layer, float *scores_out) {
    struct ranking *r = backend->ranking;
    float *scores[RANK_HEADS_MAX];
    int32_t *positions[RANK_HEADS_MAX];
    const uint32_t lane = layer * r->n_kv_heads, group = score_per_query_head(request->score.kind) ? r->group : 1;
    for (uint32_t h = 0; h < r->n_kv_heads; h++) {
        const uint32_t l = lane + h, n = r->n_slots[l];
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
        uint32_t *keys = r->keys + r->first[l];
        if (scores_out) memcpy(scores_out + r->first[l], scores[h], r->n_slots[l] * sizeof *scores_out);
        r->n_protected[l] = 0;
        for (uint32_t i = 0; i < r->n_slots[l]; i++) {
            bool stays = positions[h][i] < request->protect_below || positions[h][i] > request->protect_above;
            keys[i] = stays ? RANK_PROTECTED : select_key(scores[h][i]);
            r->n_protected[l] += stays;
        }
        r->n_joined[l] =
            backend->joins_blocks ? select_join(keys, positions[h], r->n_slots[l], request->score.last_position + 1, &r->n_protected[l]) : 0;
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
        used += r->n_slots[l];
    }
    score.kind = kind;
    score.first_lane = first;
    score.n_lanes = end - first;
    score.offset = r->offset;
    backend->ops->score(backend, &score, numbers);
    for (uint32_t l = first; l < end; l++) r->offset[l] /= per_slot;
}

void host_rank(struct backend *backend, const struct rank_request *request, uint32_t *n_protected, float *scores) {
    struct ranking *r = backend->ranking;
    CHECK(r && r->n_kv_heads <= RANK_HEADS_MAX);
    size_t used = 0;
    for (uint32_t l = 0; l < r->n_lanes; l++) {
        r->n_slots[l] = request->score.lane_tokens[l];
        CHECK(r->n_slots[l] <= r->lane_slots);
        r->first[l] = used;
        used += r->n_slots[l];
    }
    for (uint32_t first = 0; first < r->n_layers; first += r->raw_layers) {
        uint32_t left = r->n_layers - first, count = left < r->raw_layers ? left : r->raw_layers;
        if (request->source == RANK_SCORES) {
            if (request->value_power > 0) score_layers(backend, request, SCORE_VALUE_NORM, first, count, r->norms);
            score_layers(backend, request, request->score.kind, first, count, r->raw);
        }
        for (uint32_t layer = first; layer < first + count; layer++) rank_layer(backend, request, layer, scores);
    }
    if (n_protected) memcpy(n_protected, r->n_protected, r->n_lanes * sizeof *n_protected);
}

/* ---- cut ---- */

static void count_byte(const struct ranking *r, uint32_t lane, uint32_t prefix, uint32_t mask, int shift) {
    const uint32_t *keys = r->keys + r->first[lane];
    uint32_t *counts = r->counts[lane];
    memset(counts, 0, sizeof r->counts[lane]);
    for (uint32_t i = 0; i < r->n_slots[lane]; i++)
        if (keys[i] != RANK_PROTECTED && (keys[i] & mask) == prefix) counts[keys[i] >> shift & 255]++;
}

/* With c slots of a lane at or below a key, the lane frees select_units(c). A byte of the key at a time. */
static void cut_group(struct ranking *r, uint32_t first, uint32_t end, uint32_t unit, uint32_t needed, struct cut_lane *lanes) {
    uint32_t prefix = 0, mask = 0, byte = 0;
    for (uint32_t l = first; l < end; l++) r->below[l] = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (uint32_t l = first; l < end; l++) count_byte(r, l, prefix, mask, shift);
        for (byte = 0;; byte++) {
            uint64_t freed = 0;
            for (uint32_t l = first; l < end; l++) freed += select_units(r->n_slots[l], r->n_protected[l], unit, r->below[l] + r->counts[l][byte]);
            if (freed >= needed || byte == 255) break;
            for (uint32_t l = first; l < end; l++) r->below[l] += r->counts[l][byte];
        }
        prefix |= byte << shift;
        mask |= 255u << shift;
    }
    for (uint32_t l = first; l < end; l++) lanes[l] = (struct cut_lane){.below = r->below[l], .equal = r->counts[l][byte]};
}

void host_cut(struct backend *backend, const struct cut_request *request, struct cut_lane *lanes) {
    struct ranking *r = backend->ranking;
    CHECK(r && request->lanes_each > 0 && r->n_lanes % request->lanes_each == 0 && request->unit > 0);
    for (uint32_t first = 0; first < r->n_lanes; first += request->lanes_each) {
        uint32_t needed = request->needed[first / request->lanes_each], end = first + request->lanes_each;
        if (needed > 0)
            cut_group(r, first, end, request->unit, needed, lanes);
        else
            for (uint32_t l = first; l < end; l++) lanes[l] = (struct cut_lane){0};
    }
}

/* ---- keep ---- */

uint32_t select_rank(const uint32_t *keys, uint32_t n, uint32_t rank, uint32_t *below) {
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
    uint32_t threshold = evict ? select_rank(keys, n, evict - 1, &below) : 0;
    for (uint32_t i = 0; evict && i < n; i++) equal += keys[i] == threshold;
    uint32_t equal_kept = equal - (evict - below); /* the older ones */
    for (uint32_t i = 0; i < n; i++) {
        /* Its slots are equal, so that a block is split here or not at all. Newer ones go first: if it cannot stay, those behind it do not either. */
        if (evict && i < joined && i % BLOCK_TOKENS == 0 && keys[i] == threshold && equal_kept < BLOCK_TOKENS) equal_kept = 0;
        bool stays = !evict || keys[i] > threshold;
        if (evict && keys[i] == threshold && equal_kept > 0) {
            stays = true;
            equal_kept--;
        }
        if (stays) keep[n_keep++] = i;
    }
    return n_keep;
}

void host_keep(struct backend *backend, const uint32_t *evict, struct kept_lane *lanes, uint32_t *keep) {
    struct ranking *r = backend->ranking;
    CHECK(r);
    for (uint32_t l = 0; l < r->n_lanes; l++) {
        uint32_t *kept = r->kept + r->first[l], moved = 0;
        uint32_t n_keep = select_keep_joined(r->keys + r->first[l], r->n_slots[l], r->n_protected[l], evict[l], r->n_joined[l], kept);
        while (moved < n_keep && kept[moved] == moved) moved++;
        lanes[l] = (struct kept_lane){.n_keep = n_keep, .first_moved = moved};
        if (keep) memcpy(keep + r->first[l], kept, n_keep * sizeof *keep);
    }
}

const uint32_t *host_kept(const struct backend *backend, const struct compaction *item) {
    const struct ranking *r = backend->ranking;
    if (item->keep) return item->keep;
    CHECK(r && item->lane < r->n_lanes && item->n_slots == r->n_slots[item->lane]);
    return r->kept + r->first[item->lane];
}
