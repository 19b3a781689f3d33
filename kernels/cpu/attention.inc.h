/* Attention of up to ATTEND_QUERIES query vectors over one lane, over the vectors of the file that includes this one.
 *
 * The lane is cut at multiples of 256 slots. Within a split: scores with dims ascending, maximum over the visible slots, weights rounded to what the value
 * product takes, their sum, values with slots ascending. Splits are merged in ascending order. Which queries share a call changes nothing in any of it.
 * Slots that a query must not see get weight 0; what they hold is finite (append). */

#include <string.h>

#include "kernels/kivi.h"

#define NO_SCORE (-__builtin_inff())
#define Q8_QUERIES 4  /* of a tile over q8 keys or values */
#define FEW_QUERIES 6 /* fewer wait for memory */
#define Q8_VECTORS (LANES == 16 ? 4 : 2)

struct split {
    const struct attend *a;
    uint32_t first_block, n_blocks; /* of the lane */
    uint32_t n_queries;
    uint32_t n_ahead;     /* blocks from first_block to the end of what the last query sees */
    bool by_turns;        /* keys are fetched while values are summed */
    float *scores;        /* [n_queries][SPLIT_SLOTS] */
    float *out;           /* [n_queries][2 + dims]: a state each, whose first two are filled in last */
    uint16_t *pairs;      /* [n_queries][SPLIT_SLOTS] bf16 weights */
    uint8_t *quants;      /* [n_queries][2 * dims]: queries as the score product takes them, two planes of s8, or bf16 */
    float *keys, *values; /* KIVI: a block of keys, the split's values, as blocks of f32; else NULL */
};

INLINE const uint8_t *split_block(const struct split *s, uint32_t i) {
    return s->a->pool + (size_t)s->a->blocks[s->first_block + i] * s->a->shape->bytes;
}

/* What is fetched while a block is computed with: a few lines at a time between the products. All at once they fill the queue of misses, and loads wait behind.
 *
 * Many queries, or values that must be widened, compute longer than memory takes: with the scores of a block come its values and the keys of the block after the
 * next. Else memory must never be idle: with the scores come the values, and with the values the keys of the next split. Behind the lane comes the next lane. */
struct fetch {
    const uint8_t *at, *end, *then, *then_end;
};

/* Block i of the split, or of what comes behind it: more of the lane, then the next one. NULL: nothing that is known. */
INLINE const uint8_t *block_ahead(const struct split *s, uint32_t i) {
    if (i < s->n_ahead) return split_block(s, i);
    i -= s->n_ahead;
    return i < s->a->n_next_blocks ? s->a->pool + (size_t)s->a->next_blocks[i] * s->a->shape->bytes : NULL;
}

INLINE struct fetch fetch_with_scores(const struct split *s, uint32_t i) {
    const size_t half = s->a->shape->v_offset;
    const uint8_t *block = split_block(s, i), *keys = s->by_turns && s->first_block > 0 ? NULL : block_ahead(s, i + 2);
    struct fetch fetch = {.at = block + half, .end = block + s->a->shape->bytes, .then = keys, .then_end = keys ? keys + half : NULL};
    if (s->a->sums_only) fetch.at = fetch.end;
    return fetch;
}

/* The part of those keys that goes with n_dims of the values, from `dim` on. */
INLINE struct fetch fetch_with_values(const struct split *s, uint32_t i, uint32_t dim, const uint32_t n_dims) {
    const uint8_t *keys = s->by_turns ? block_ahead(s, s->n_blocks + i) : NULL;
    if (!keys) return (struct fetch){0};
    const size_t bytes = s->a->shape->v_offset / s->a->shape->dims;
    return (struct fetch){.at = keys + dim * bytes, .end = keys + (dim + n_dims) * bytes};
}

INLINE void fetch_lines(struct fetch *fetch, const uint32_t n) {
    if (fetch->at >= fetch->end) {
        fetch->at = fetch->then, fetch->end = fetch->then_end, fetch->then = fetch->then_end;
        if (fetch->at >= fetch->end) return;
    }
#pragma GCC unroll 8
    for (uint32_t i = 0; i < n; i++) __builtin_prefetch(fetch->at + i * 64, 0, 2);
    fetch->at += n * 64;
}

INLINE float *split_out(const struct split *s, uint32_t q) { return s->out + (size_t)q * (s->a->shape->dims + 2) + 2; }

INLINE vf load_element(enum kv_dtype dtype, const uint8_t *base, size_t at) {
    if (dtype == KV_F32) return vf_load((const float *)(const void *)base + at);
    const uint16_t *halves = (const uint16_t *)(const void *)base + at;
    return dtype == KV_F16 ? vf_load_f16(halves) : vf_load_bf16(halves);
}

/* Scores of n queries over 16 slots: even dims gather in even lanes, odd ones in odd lanes, joined at the end. */
#define HALF_VECTORS (32 / LANES)
INLINE void widen_scores_tile(enum kv_dtype dtype, const struct split *s, const uint8_t *k, uint32_t slot, uint32_t first, const uint32_t n,
                              struct fetch *fetch) {
    vf sum[WIDEN_QUERIES][HALF_VECTORS];
#pragma GCC unroll 4
    for (uint32_t q = 0; q < n; q++)
#pragma GCC unroll 8
        for (int v = 0; v < HALF_VECTORS; v++) sum[q][v] = vf_zero();
    for (uint32_t pair = 0; pair < s->a->shape->dims / 2; pair++) {
        fetch_lines(fetch, 2);
        size_t at = (size_t)pair * 64 + slot % BLOCK_TOKENS * 2;
#pragma GCC unroll 8
        for (int v = 0; v < HALF_VECTORS; v++) {
            vf element = load_element(dtype, k, at + (size_t)(v * LANES));
#pragma GCC unroll 4
            for (uint32_t q = 0; q < n; q++) sum[q][v] = vf_fma(element, vf_set_pair(s->a->query[first + q] + 2 * pair), sum[q][v]);
        }
    }
#pragma GCC unroll 4
    for (uint32_t q = 0; q < n; q++)
#pragma GCC unroll 4
        for (int v = 0; v < HALF_VECTORS; v += 2)
            vf_store(s->scores + (size_t)(first + q) * SPLIT_SLOTS + slot + (uint32_t)(v * LANES / 2), vf_add_pairs(sum[q][v], sum[q][v + 1]));
}

INLINE void widen_scores_block(enum kv_dtype dtype, const struct split *s, const uint8_t *k, uint32_t b, struct fetch fetch) {
    for (uint32_t slot = b * BLOCK_TOKENS; slot < (b + 1) * BLOCK_TOKENS; slot += 16) {
        uint32_t q = 0;
        for (; q + WIDEN_QUERIES <= s->n_queries; q += WIDEN_QUERIES) widen_scores_tile(dtype, s, k, slot, q, WIDEN_QUERIES, &fetch);
        for (; q < s->n_queries; q++) widen_scores_tile(dtype, s, k, slot, q, 1, &fetch);
    }
}

INLINE void widen_scores(enum kv_dtype dtype, const struct split *s) {
    for (uint32_t b = 0; b < s->n_blocks; b++) widen_scores_block(dtype, s, split_block(s, b), b, fetch_with_scores(s, b));
}

/* 16 dims of n queries: even slots gather in even lanes, odd ones in odd lanes. */
INLINE void widen_values_tile(enum kv_dtype dtype, const struct split *s, uint32_t dim, uint32_t first, const uint32_t n) {
    vf sum[WIDEN_QUERIES][HALF_VECTORS];
    const uint32_t dims = s->a->shape->dims;
#pragma GCC unroll 4
    for (uint32_t q = 0; q < n; q++)
#pragma GCC unroll 8
        for (int v = 0; v < HALF_VECTORS; v++) sum[q][v] = vf_zero();
    for (uint32_t b = 0; b < s->n_blocks; b++) {
        const uint8_t *values =
            s->values ? (const uint8_t *)(s->values + (size_t)b * BLOCK_TOKENS * dims) : split_block(s, b) + s->a->shape->v_offset;
        const float *weights = s->scores + (size_t)first * SPLIT_SLOTS + b * BLOCK_TOKENS;
        for (uint32_t pair = 0; pair < BLOCK_TOKENS / 2; pair++) {
#pragma GCC unroll 8
            for (int v = 0; v < HALF_VECTORS; v++) {
                vf element = load_element(dtype, values, ((size_t)pair * dims + dim) * 2 + (size_t)(v * LANES));
#pragma GCC unroll 4
                for (uint32_t q = 0; q < n; q++) sum[q][v] = vf_fma(element, vf_set_pair(weights + (size_t)q * SPLIT_SLOTS + 2 * pair), sum[q][v]);
            }
        }
    }
#pragma GCC unroll 4
    for (uint32_t q = 0; q < n; q++)
#pragma GCC unroll 4
        for (int v = 0; v < HALF_VECTORS; v += 2)
            vf_store(split_out(s, first + q) + dim + (uint32_t)(v * LANES / 2), vf_add_pairs(sum[q][v], sum[q][v + 1]));
}

INLINE void widen_values(enum kv_dtype dtype, const struct split *s) {
    for (uint32_t dim = 0; dim < s->a->shape->dims; dim += KV_PAD) {
        uint32_t q = 0;
        for (; q + WIDEN_QUERIES <= s->n_queries; q += WIDEN_QUERIES) widen_values_tile(dtype, s, dim, q, WIDEN_QUERIES);
        for (; q < s->n_queries; q++) widen_values_tile(dtype, s, dim, q, 1);
    }
}

/* q8: a query is quantised with one scale to 16 bits, in two planes, so that what the cache rounded is all that is lost; scores are exact integer products times two scales. */
struct q8_query {
    float scale; /* of the second plane; the first is of 256 times as much */
    struct q8_plane {
        const int8_t *quants;
        int32_t nsums[KV_DIMS_MAX / 16]; /* minus the sums of 16 quants */
    } plane[2];
};

static void q8_sums(struct q8_plane *plane, uint32_t dims, const int8_t *quants) {
    plane->quants = quants;
    for (uint32_t i = 0; i < dims / 16; i++) {
        plane->nsums[i] = 0;
        for (uint32_t j = 0; j < 16; j++) plane->nsums[i] -= quants[16 * i + j];
    }
}

static void q8_query(const struct split *s, uint32_t q, struct q8_query *out) {
    const uint32_t dims = s->a->shape->dims;
    const float *x = s->a->query[q];
    int8_t *quants = (int8_t *)s->quants + (size_t)q * 2 * dims;
    vf highest = vf_zero();
    for (uint32_t i = 0; i < dims; i += LANES) highest = vf_max(vf_abs(vf_load(x + i)), highest);
    float most = vf_reduce_max(highest);
    bool small = !(most > 1e-34f);
    vf inverse = vf_set1(small ? 0 : 127.0f / most);
    for (uint32_t i = 0; i < dims; i += LANES) vf_store_s8(quants + i, vf_mul(vf_load(x + i), inverse));
    q8_sums(&out->plane[0], dims, quants);
    out->scale = small ? 0 : most / 127.0f * (1.0f / 256);
    for (uint32_t i = 0; i < dims; i += LANES) vf_store_s8(quants + dims + i, rest_of(vf_mul(vf_load(x + i), inverse), quants + i));
    q8_sums(&out->plane[1], dims, quants + dims);
}

/* n queries from `first` on over the 32 slots of block b: keys are loaded once for all of them. Planes join as floats: of 1024 dims, a plane's product alone is below 2^24. */
INLINE void q8_scores_tile(const struct split *s, const struct q8_query *queries, const uint8_t *k, uint32_t b, uint32_t first, const uint32_t n,
                           struct fetch *fetch) {
    const uint32_t dims = s->a->shape->dims;
    const float *scales = (const float *)(const void *)(k + s->a->shape->scale_offset);
    for (uint32_t slot = 0; slot < BLOCK_TOKENS; slot += LANES) {
        vi dot[Q8_QUERIES][2];
#pragma GCC unroll 4
        for (uint32_t q = 0; q < n; q++) dot[q][0] = dot[q][1] = vi_zero();
        for (uint32_t dim = 0; dim < dims; dim += 16) {
            fetch_lines(fetch, LANES == 16 ? 9 : 5);
            vb quads[4];
#pragma GCC unroll 4
            for (uint32_t i = 0; i < 4; i++) quads[i] = vb_load(k + (size_t)(dim / 4 + i) * 128 + slot * 4);
#pragma GCC unroll 4
            for (uint32_t q = 0; q < n; q++)
#pragma GCC unroll 2
                for (uint32_t p = 0; p < 2; p++) {
                    const struct q8_plane *plane = &queries[q].plane[p];
                    dot[q][p] = vi_dot_signed(dot[q][p], quads, plane->quants + dim, 4, plane->nsums[dim / 16]);
                }
        }
        vf of_slots = vf_load(scales + slot);
#pragma GCC unroll 4
        for (uint32_t q = 0; q < n; q++) {
            vf product = vf_fma(vf_from_vi(dot[q][0]), vf_set1(256), vf_from_vi(dot[q][1]));
            vf_store(s->scores + (size_t)(first + q) * SPLIT_SLOTS + b * BLOCK_TOKENS + slot,
                     vf_mul(product, vf_mul(vf_set1(queries[q].scale), of_slots)));
        }
    }
}

static void q8_scores(const struct split *s) {
    for (uint32_t first = 0; first < s->n_queries; first += Q8_QUERIES) {
        struct q8_query queries[Q8_QUERIES];
        const uint32_t n = s->n_queries - first < Q8_QUERIES ? s->n_queries - first : Q8_QUERIES;
        for (uint32_t q = 0; q < n; q++) q8_query(s, first + q, &queries[q]);
        for (uint32_t b = 0; b < s->n_blocks; b++) {
            const uint8_t *k = split_block(s, b);
            struct fetch fetch = {0};
            if (first == 0) fetch = fetch_with_scores(s, b);
            switch (n) {
            case 1: q8_scores_tile(s, queries, k, b, first, 1, &fetch); break;
            case 2: q8_scores_tile(s, queries, k, b, first, 2, &fetch); break;
            case 3: q8_scores_tile(s, queries, k, b, first, 3, &fetch); break;
            default: q8_scores_tile(s, queries, k, b, first, Q8_QUERIES, &fetch);
            }
        }
    }
}

/* n queries, n_vectors vectors of dims from `dim` on: as many sums as hide the latency of an addition, each with slots ascending. */
INLINE void q8_values_tile(const struct split *s, uint32_t dim, const uint32_t n_vectors, uint32_t first, const uint32_t n) {
    const uint32_t dims = s->a->shape->dims;
    vf sum[Q8_QUERIES][Q8_VECTORS];
#pragma GCC unroll 4
    for (uint32_t q = 0; q < n; q++)
#pragma GCC unroll 4
        for (uint32_t v = 0; v < n_vectors; v++) sum[q][v] = vf_zero();
    for (uint32_t b = 0; b < s->n_blocks; b++) {
        const int8_t *values = (const int8_t *)split_block(s, b) + s->a->shape->v_offset + dim;
        const float *weights = s->scores + (size_t)first * SPLIT_SLOTS + b * BLOCK_TOKENS;
        struct fetch fetch = first == 0 ? fetch_with_values(s, b, dim, n_vectors * LANES) : (struct fetch){0};
        for (uint32_t slot = 0; slot < BLOCK_TOKENS; slot++) {
            fetch_lines(&fetch, 1);
            vf value[Q8_VECTORS];
#pragma GCC unroll 4
            for (uint32_t v = 0; v < n_vectors; v++) value[v] = vf_load_s8(values + (size_t)slot * dims + v * LANES);
#pragma GCC unroll 4
            for (uint32_t q = 0; q < n; q++) {
                vf weight = vf_set1(weights[(size_t)q * SPLIT_SLOTS + slot]);
#pragma GCC unroll 4
                for (uint32_t v = 0; v < n_vectors; v++) sum[q][v] = vf_fma(value[v], weight, sum[q][v]);
            }
        }
    }
#pragma GCC unroll 4
    for (uint32_t q = 0; q < n; q++)
#pragma GCC unroll 4
        for (uint32_t v = 0; v < n_vectors; v++) vf_store(split_out(s, first + q) + dim + v * LANES, sum[q][v]);
}

INLINE void q8_values_queries(const struct split *s, uint32_t dim, const uint32_t n_vectors) {
    uint32_t q = 0;
    for (; q + Q8_QUERIES <= s->n_queries; q += Q8_QUERIES) q8_values_tile(s, dim, n_vectors, q, Q8_QUERIES);
    if (q + 3 <= s->n_queries) q8_values_tile(s, dim, n_vectors, q, 3), q += 3;
    for (; q < s->n_queries; q++) q8_values_tile(s, dim, n_vectors, q, 1);
}

/* The slot's scale goes into its weight (after the weights were summed); values widen exactly. */
static void q8_values(const struct split *s) {
    const uint32_t dims = s->a->shape->dims;
    for (uint32_t b = 0; b < s->n_blocks; b++) {
        const float *scales = (const float *)(const void *)(split_block(s, b) + s->a->shape->scale_offset) + BLOCK_TOKENS;
        for (uint32_t q = 0; q < s->n_queries; q++) {
            float *weights = s->scores + (size_t)q * SPLIT_SLOTS + b * BLOCK_TOKENS;
            for (uint32_t i = 0; i < BLOCK_TOKENS; i += LANES) vf_store(weights + i, vf_mul(vf_load(weights + i), vf_load(scales + i)));
        }
    }
    uint32_t dim = 0;
    for (; dim + Q8_VECTORS * LANES <= dims; dim += Q8_VECTORS * LANES) q8_values_queries(s, dim, Q8_VECTORS);
    for (; dim < dims; dim += LANES) q8_values_queries(s, dim, 1);
}

#include "kernels/cpu/kivi.inc.h"

static void kivi_scores(const struct split *s) {
    for (uint32_t b = 0; b < s->n_blocks; b++) {
        kivi_keys(s->a->shape, &s->a->residual, s->a->pool, s->a->blocks, s->first_block + b, s->keys);
        widen_scores_block(KV_F32, s, (const uint8_t *)s->keys, b, (struct fetch){0});
    }
}

static void kivi_split_values(const struct split *s) {
    for (uint32_t b = 0; b < s->n_blocks; b++)
        kivi_values(s->a->shape, &s->a->residual, s->a->pool, s->a->blocks, s->first_block + b,
                    s->values + (size_t)b * BLOCK_TOKENS * s->a->shape->dims);
    widen_values(KV_F32, s);
}

#ifdef BF16_PAIRS
#include "kernels/cpu/attention_bf16.inc.h"
#endif

/* Are weights rounded to bf16 pairs, as the value product takes them? */
INLINE bool takes_pairs(const struct attend *a) {
#ifdef BF16_PAIRS
    return a->shape->dtype == KV_BF16 && !a->sums_only;
#else
    (void)a;
    return false;
#endif
}

/* Weights of LANES slots to where they are wanted, as given back. */
INLINE vf put_weight(const struct split *s, uint32_t q, uint32_t i, vf weight, const bool pairs, float *kept) {
#ifdef BF16_PAIRS
    if (pairs) weight = store_rounded(s->pairs + (size_t)q * SPLIT_SLOTS + i, weight);
#endif
    if (!pairs && !s->a->sums_only) vf_store(s->scores + (size_t)q * SPLIT_SLOTS + i, weight);
    if (kept) vf_store(kept + i, weight);
    return weight;
}

/* Scores to weights in place; maximum and sum into state[0], state[1]. `count` slots are visible. kept: the weights once more, or NULL. */
INLINE void soften_into(const struct split *s, uint32_t q, uint32_t count, const bool pairs, float *kept, float *state) {
    float *x = s->scores + (size_t)q * SPLIT_SLOTS;
    const uint32_t n = s->n_blocks * BLOCK_TOKENS;
    const uint32_t whole = count / LANES * LANES;
    vf highest = vf_set1(NO_SCORE);
    for (uint32_t i = 0; i < whole; i += LANES) highest = vf_max(vf_load(x + i), highest);
    if (whole < count) highest = vf_max(vf_first(vf_load(x + whole), vf_set1(NO_SCORE), (int)(count - whole)), highest);
    float most = vf_reduce_max(highest);
    vf sum = vf_zero(), m = vf_set1(most);
    for (uint32_t i = 0; i < whole; i += LANES) sum = vf_add(sum, put_weight(s, q, i, vf_exp(vf_sub(vf_load(x + i), m)), pairs, kept));
    for (uint32_t i = whole; i < n; i += LANES) {
        vf weight = vf_zero();
        if (i < count) weight = vf_first(vf_exp(vf_sub(vf_load(x + i), m)), vf_zero(), (int)(count - i));
        sum = vf_add(sum, put_weight(s, q, i, weight, pairs, kept));
    }
    state[0] = most;
    state[1] = vf_reduce_add(sum);
}

static void soften(const struct split *s, uint32_t q, uint32_t count, bool pairs, float *kept, float *state) {
    if (pairs)
        kept ? soften_into(s, q, count, true, kept, state) : soften_into(s, q, count, true, NULL, state);
    else
        kept ? soften_into(s, q, count, false, kept, state) : soften_into(s, q, count, false, NULL, state);
}

static void merge(float *state, const float *next, uint32_t dims) {
    if (state[0] == NO_SCORE) { /* nothing yet */
        memcpy(state, next, (2 + (size_t)dims) * sizeof *state);
        return;
    }
    float most = state[0] > next[0] ? state[0] : next[0];
    float change[LANES], scaled[LANES];
    for (int i = 0; i < LANES; i++) change[i] = 0;
    change[0] = state[0] - most;
    change[1] = next[0] - most;
    vf_store(scaled, vf_exp(vf_load(change)));
    vf old = vf_set1(scaled[0]), new = vf_set1(scaled[1]);
    state[0] = most;
    state[1] = state[1] * scaled[0] + next[1] * scaled[1];
    for (uint32_t i = 0; i < dims; i += LANES) vf_store(state + 2 + i, vf_fma(vf_load(next + 2 + i), new, vf_mul(vf_load(state + 2 + i), old)));
}

/* merge for states without output: of all queries of the call at once. sums [n][maximum, sum] */
static void merge_sums(float *state, size_t state_stride, const float (*sums)[2], uint32_t n) {
    for (uint32_t first = 0; first < n; first += LANES) {
        const uint32_t count = n - first < LANES ? n - first : LANES;
        float old[LANES] = {0}, new[LANES] = {0}, most[LANES] = {0};
        for (uint32_t i = 0; i < count; i++) {
            old[i] = state[(first + i) * state_stride];
            new[i] = sums[first + i][0];
            most[i] = old[i] > new[i] ? old[i] : new[i];
        }
        vf_store(old, vf_exp(vf_sub(vf_load(old), vf_load(most))));
        vf_store(new, vf_exp(vf_sub(vf_load(new), vf_load(most))));
        for (uint32_t i = 0; i < count; i++) {
            float *to = state + (first + i) * state_stride;
            to[0] = most[i];
            to[1] = to[1] * old[i] + sums[first + i][1] * new[i];
        }
    }
}

static void scores(const struct split *s) {
    switch (s->a->shape->dtype) {
    case KV_F32: widen_scores(KV_F32, s); break;
    case KV_F16: widen_scores(KV_F16, s); break;
#ifdef BF16_PAIRS
    case KV_BF16: bf16_scores(s); break;
#else
    case KV_BF16: widen_scores(KV_BF16, s); break;
#endif
    case KV_Q8: q8_scores(s); break;
    default: kivi_scores(s); break;
    }
}

static void values(const struct split *s) {
    switch (s->a->shape->dtype) {
    case KV_F32: widen_values(KV_F32, s); break;
    case KV_F16: widen_values(KV_F16, s); break;
#ifdef BF16_PAIRS
    case KV_BF16: bf16_values(s); break;
#else
    case KV_BF16: widen_values(KV_BF16, s); break;
#endif
    case KV_Q8: q8_values(s); break;
    default: kivi_split_values(s); break;
    }
}

/* Slots of the split that query q sees. */
INLINE uint32_t split_count(const struct attend *a, uint32_t q, uint32_t slot) {
    if (a->visible[q] <= slot) return 0;
    return a->visible[q] - slot < SPLIT_SLOTS ? a->visible[q] - slot : SPLIT_SLOTS;
}

static struct split split_of(const struct attend *a, uint32_t split) {
    const uint32_t n = a->n_queries, slot = split * SPLIT_SLOTS;
    struct split s = {.a = a, .n_queries = n, .scores = (float *)(void *)a->scratch, .first_block = slot / BLOCK_TOKENS};
    s.out = s.scores + (size_t)n * SPLIT_SLOTS;
    s.pairs = (uint16_t *)(void *)(s.out + (size_t)n * (a->shape->dims + 2));
    s.quants = (uint8_t *)(s.pairs + (size_t)n * SPLIT_SLOTS);
    if (a->shape->raw_bytes) {
        s.keys = (float *)(void *)(a->scratch + attend_scratch_queries(a->shape->dims));
        s.values = s.keys + (size_t)BLOCK_TOKENS * a->shape->dims;
    }
    s.n_ahead = (a->visible[n - 1] + BLOCK_TOKENS - 1) / BLOCK_TOKENS - s.first_block;
    s.by_turns = n < FEW_QUERIES && !a->sums_only && (a->shape->dtype == KV_Q8 || takes_pairs(a));
    s.n_blocks = (split_count(a, n - 1, slot) + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    return s;
}

static void attend_split(const struct attend *a, uint32_t split, float *state, size_t state_stride) {
    const uint32_t dims = a->shape->dims, slot = split * SPLIT_SLOTS;
    uint32_t skip = 0; /* visible ascends: the first queries may end before this split */
    while (skip < a->n_queries && a->visible[skip] <= slot) skip++;
    if (skip == a->n_queries) return;
    const struct split s = split_of(a, split);
    scores(&s);
    float sums[ATTEND_QUERIES][2];
    for (uint32_t q = 0; q < a->n_queries; q++) {
        soften(&s, q, split_count(a, q, slot), takes_pairs(a), a->kept ? a->kept + q * a->kept_stride + slot : NULL, sums[q]);
        if (a->kept) a->kept_maxima[split * ATTEND_QUERIES + q] = sums[q][0];
    }
    if (a->sums_only) {
        merge_sums(state + skip * state_stride, state_stride, (const float(*)[2])sums + skip, a->n_queries - skip);
        return;
    }
    values(&s);
    for (uint32_t q = skip; q < a->n_queries; q++) {
        float *next = split_out(&s, q) - 2;
        next[0] = sums[q][0];
        next[1] = sums[q][1];
        merge(state + q * state_stride, next, dims);
    }
}

static void attend(const struct attend *a, uint32_t first_split, uint32_t end_split, float *state, size_t state_stride) {
    for (uint32_t split = first_split; split < end_split; split++) attend_split(a, split, state, state_stride);
}

static void weights(const struct attend *a, uint32_t split) {
    const uint32_t slot = split * SPLIT_SLOTS;
    const struct split s = split_of(a, split);
    float sums[2];
    if (s.n_blocks > 0) scores(&s);
    for (uint32_t q = 0; q < a->n_queries; q++) {
        soften(&s, q, split_count(a, q, slot), takes_pairs(a), a->kept + q * a->kept_stride, sums);
        a->kept_maxima[q] = sums[0];
    }
}

/* Finite: a NaN becomes 0, what is too large the largest. */
INLINE float finite_within(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x == x ? x : 0; }

static void append_q8(const struct kv_shape *shape, uint8_t *block, uint32_t slot, const float *k, const float *v) {
    const float limits[2] = {1e35f, 3e38f}; /* of keys, that the sum of all dims too is finite */
    float *scales = (float *)(void *)(block + shape->scale_offset), x[KV_DIMS_MAX];
    for (int which = 0; which < (v ? 2 : 1); which++) {
        float most = 0;
        for (uint32_t i = 0; i < shape->dims; i++) x[i] = i < shape->head_dim ? finite_within((which ? v : k)[i], limits[which]) : 0;
        if (!which) hadamard(x, shape->dims);
        for (uint32_t i = 0; i < shape->dims; i++) {
            float magnitude = __builtin_fabsf(x[i]);
            most = magnitude > most ? magnitude : most;
        }
        bool small = !(most > 1e-34f);
        float inverse = small ? 0 : 127.0f / most;
        scales[which * BLOCK_TOKENS + (int)slot] = small ? 0 : most / 127.0f;
        for (uint32_t i = 0; i < shape->dims; i++) {
            int q = (int)((x[i] * inverse + 0x1.8p23f) - 0x1.8p23f); /* nearest, ties to even */
            if (which)
                block[shape->v_offset + (size_t)slot * shape->dims + i] = (uint8_t)q;
            else
                block[(size_t)(i / 4) * 128 + slot * 4 + i % 4] = (uint8_t)(q + 128);
        }
    }
}

/* [dims] values of the dtype, padded with zeros. */
INLINE void narrow(enum kv_dtype dtype, const struct kv_shape *shape, const float *x, uint16_t *out) {
    const float limit = dtype == KV_F16 ? 65504.0f : 3.3895314e38f;
    float finite[KV_DIMS_MAX];
    for (uint32_t i = 0; i < shape->head_dim; i++) finite[i] = finite_within(x[i], limit);
    for (uint32_t i = shape->head_dim; i < shape->dims; i++) finite[i] = 0;
    if (dtype == KV_F16) {
        for (uint32_t i = 0; i < shape->dims; i += LANES) vf_store_f16(out + i, vf_load(finite + i));
        return;
    }
    for (uint32_t i = 0; i < shape->dims; i++) {
        uint32_t bits = float_bits(finite[i]);
        out[i] = (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
}

INLINE void append_halves(enum kv_dtype dtype, const struct kv_shape *shape, uint8_t *block, uint32_t slot, const float *k, const float *v) {
    uint16_t halves[KV_DIMS_MAX];
    narrow(dtype, shape, k, halves);
    for (uint32_t i = 0; i < shape->dims / 2; i++) memcpy(block + (size_t)i * 128 + slot * 4, &halves[2 * i], 4);
    if (!v) return;
    narrow(dtype, shape, v, halves);
    uint16_t *values = (uint16_t *)(void *)(block + shape->v_offset) + (size_t)(slot / 2) * shape->dims * 2 + slot % 2;
    for (uint32_t i = 0; i < shape->dims; i++) values[2 * i] = halves[i];
}

static void append_f32(const struct kv_shape *shape, uint8_t *block, uint32_t slot, const float *k, const float *v) {
    const float limit = 3.4028234e38f;
    float *keys = (float *)(void *)block + slot * 2;
    float *values = (float *)(void *)(block + shape->v_offset) + (size_t)(slot / 2) * shape->dims * 2 + slot % 2;
    for (uint32_t i = 0; i < shape->dims; i++) {
        bool real = i < shape->head_dim;
        keys[(size_t)(i / 2) * 64 + i % 2] = real ? finite_within(k[i], limit) : 0;
        if (v) values[2 * i] = real ? finite_within(v[i], limit) : 0;
    }
}

static void append(const struct kv_shape *shape, uint8_t *block, uint32_t slot, const float *k, const float *v) {
    switch (shape->dtype) {
    case KV_F32: append_f32(shape, block, slot, k, v); break;
    case KV_F16: append_halves(KV_F16, shape, block, slot, k, v); break;
    case KV_BF16: append_halves(KV_BF16, shape, block, slot, k, v); break;
    default: append_q8(shape, block, slot, k, v); break;
    }
}
