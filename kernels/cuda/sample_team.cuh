/* How a team of blocks samples from one row of logits: what a team is, what its blocks share, and the host's arithmetic. The device half of sample.cu, which
 * owns the memory and launches; sample_row.cuh reads and adjusts rows, sample_draw.cuh draws.
 *
 * A team is a cluster of `ranks` blocks (1, 2, 4, 8, 16; a single block before compute capability 9.0). Rank r looks after the tokens
 * [r * chunk, (r + 1) * chunk). It reads its part of the row once, into shared memory; all further passes go over that copy, which is also where biases, bans
 * and penalties are put in. Where no copy fits (no clusters, a large vocabulary), a row that is adjusted gets one in global memory, any other is read again.
 * Logits are never written.
 *
 * It decides as kernels/sampler.c does, bit for bit: the same float operations in the same order (never fused), mass as a 64-bit integer (2^40 for the best
 * token; 2^18 tokens are below 2^58), whose sums do not depend on who adds first. Hence the same logits and the same u give the same token as on the host,
 * with no exception at borders, whatever the number of ranks; tests compare for equality. Compiled with fast math it would not be so.
 *
 * Nothing is sorted. Tokens are ordered by key, the bits of |(logit - best) / temperature|, ties by id. A histogram of counts and masses over 1024 equal steps
 * of that distance is made once; top_k, top_p and the draw each find the step in which their prefix ends, collect the few tokens of it and rank those. A step
 * with too many is cut by the bits of the key, 10 at a time, until it is few tokens or a single key, whose tokens weigh the same.
 * Histograms and lists are merged into every rank's shared memory, so that all ranks decide the same on their own and wait for each other only where data
 * moves.
 *
 * What it does not do: random numbers (u comes with the parameters), logarithms (the sum of exponentials goes back as it is). */
#pragma once

#include <float.h>

#include "kernels/cuda/ptx.h"

extern "C" {
#include "kernels/sample.h"
}

enum {
    THREADS = 512,
    WARPS = THREADS / 32,
    RANKS_MAX = 16,
    BINS = 1024, /* of a histogram; a multiple of THREADS and RANKS_MAX */
    BIN_BITS = 10,
    LIST_MAX = 256, /* tokens that are ranked by comparing each with each */
    BATCH = 4,      /* loads of a thread in flight */
    MARKS_MAX = 36 * BINS / 4,
};
#define ALL_LANES 0xffffffffu
#define NO_KEY 0xffffffffu
#define KEY_END 0x42ae0000u /* keys are below: the bits of 87 */
#define NO_TOKEN 0xffffffffu
#define BIN_SCALE 36.5f /* steps for a distance of 1: the last begins at 28.03, where mass (2^40 exp(-distance)) is 0 */

/* One sample's parameters. Lists are in the same buffer, at an index of 32-bit words. */
struct sample_params {
    float temperature, top_p, min_p;
    int32_t top_k;
    float repetition, presence, frequency;
    uint32_t u; /* * 2^-24 */
    int32_t target;
    int32_t n_top;            /* -1: no report */
    uint32_t bias_at, n_bias; /* pairs: token, bits of the bias */
    uint32_t banned_at, n_banned;
    uint32_t history_at, n_prompt, n_history; /* n_history > 0 only with penalties */
    uint32_t on_host;                         /* bool: the host samples; nothing to do */
    uint32_t unused[2];
};
#define PARAMS_WORDS (sizeof(struct sample_params) / sizeof(uint32_t))

enum answer_kind { ANSWER_TOKEN, ANSWER_NO_LOGITS /* nothing finite */, ANSWER_NO_TOKEN /* nothing finite after adjusting */ };
struct sample_answer {
    uint64_t mass; /* 2^40 * the sum of exp(logit - best) */
    int32_t token;
    float logit, best; /* raw */
    uint32_t n_top;
    uint32_t kind, unused;
};
struct sample_place {
    int32_t token;
    float logit;
};

struct sampling_args {
    const uint32_t *n_samples, *flight;                /* in device memory */
    const uint32_t *sample_head_row;                   /* [n_samples] */
    const float *logits;                               /* [head rows][n_vocab], of head rows from first_head_row on */
    const uint32_t *stage;                             /* parameters of all samples, then lists */
    float *scratch;                                    /* [teams][n_vocab]; NULL: copies are in shared memory */
    struct sample_answer *answers;                     /* [flights][max_samples], in the host's memory */
    struct sample_place *tops;                         /* [flights][max_samples][SAMPLE_TOP_MAX], in the host's memory */
    int32_t *drawn;                                    /* [max_samples] */
    uint32_t first_sample, end_sample, first_head_row; /* what is run of the n_samples */
    uint32_t n_vocab, max_samples, ranks, chunk;
};

/* Where a prefix ends: within the tokens of `key`, after `rank` of them by id. */
struct position {
    uint64_t mass_before; /* of smaller keys */
    uint32_t key, rank;
    uint32_t token; /* the last of the prefix; NO_TOKEN: was not looked for */
};
struct crossing {
    uint64_t count_before, mass_before; /* of the bins before */
    uint32_t bin, count;
};
enum exchange { EXCHANGE_BEST, EXCHANGE_FINITE, EXCHANGE_ADJUSTED, EXCHANGE_MASS, EXCHANGE_TIES, EXCHANGES };
enum selection { SELECT_TOP_K, SELECT_TOP_P, SELECT_DRAW, SELECTIONS };
enum { LEVEL_STEPS, LEVEL_BITS, LEVELS };

/* COPIED: the block has its tokens' logits in shared memory, behind team_shared: made numbers (clean), then adjusted, then keys. Else they are in global
 * memory: a copy of its own, or raw itself.
 * A team lies in shared memory too: registers are few, and a cluster's barrier empties the first-level cache that a stack would be in. The first thread
 * writes, between two barriers. */
template <bool COPIED> struct team {
    uint32_t rank, ranks;
    uint32_t first, count; /* tokens [first, first + count) are this block's */
    const float *raw;      /* their logits */
    float *values;         /* where not COPIED */
    bool own;              /* values are a copy */
    float best, temperature;
    float floor;  /* distances beyond it are no candidates */
    float min_e;  /* of less there is no mass */
    uint32_t cut; /* keys from here on are no candidates */
};

struct __align__(16) team_shared {
    union {
        struct {
            uint64_t mass[LEVELS][BINS]; /* of the team: sums up to and including the bin */
            uint32_t count[LEVELS][BINS];
            uint32_t own_count[BINS], own_low[BINS], own_high[BINS]; /* of this block; mass in two words */
        };
        uint32_t marks[MARKS_MAX]; /* before any histogram: 2 * generated occurrences + occurs in the prompt */
    };
    uint64_t list[SELECTIONS][LIST_MAX]; /* key << 32 | token; a rank that is late still reads the one before */
    uint64_t weight[LIST_MAX];
    uint64_t tops[RANKS_MAX * SAMPLE_TOP_MAX]; /* rank 0's: each rank's best, descending; 0: none */
    uint64_t exchange[EXCHANGES][RANKS_MAX];
    uint64_t warp_best[2][WARPS], warp_mass[WARPS];
    uint32_t warp_count[WARPS];
    uint32_t list_used[SELECTIONS]; /* rank 0's */
    uint32_t walked;
    struct crossing crossing;
    struct position position;
    struct sample_params params;
    struct team<true> team; /* or team<false>, which has the same fields */
};

/* ---- teams ---- */

static __device__ __forceinline__ struct team_shared *block_memory(void) { return (struct team_shared *)(void *)dynamic_shared<uint8_t>(); }
static __device__ __forceinline__ float *block_logits(void) { return (float *)(block_memory() + 1); }

static __device__ __forceinline__ uint32_t lane_index(void) { return threadIdx.x % 32; }
static __device__ __forceinline__ uint32_t warp_index(void) { return threadIdx.x / 32; }

static __device__ __forceinline__ void team_sync(void) {
    cluster_arrive();
    cluster_wait();
}

static __device__ uint64_t warp_max(uint64_t value) {
    uint32_t high = __reduce_max_sync(ALL_LANES, (uint32_t)(value >> 32));
    uint32_t low = __reduce_max_sync(ALL_LANES, (uint32_t)(value >> 32) == high ? (uint32_t)value : 0);
    return (uint64_t)high << 32 | low;
}

/* Known to all threads. Calls that follow each other alternate `parity`: who reads the one is not overtaken by who writes the other. */
static __device__ uint64_t block_max(struct team_shared *s, uint32_t parity, uint64_t value) {
    value = warp_max(value);
    if (lane_index() == 0) s->warp_best[parity][warp_index()] = value;
    __syncthreads();
    return warp_max(lane_index() < WARPS ? s->warp_best[parity][lane_index()] : 0);
}

/* Known to the first warp. */
static __device__ uint64_t block_sum(struct team_shared *s, uint64_t value) {
    for (uint32_t step = 16; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    if (lane_index() == 0) s->warp_mass[warp_index()] = value;
    __syncthreads();
    if (warp_index() != 0) return 0;
    value = lane_index() < WARPS ? s->warp_mass[lane_index()] : 0;
    for (uint32_t step = 16; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

/* The first warp tells all ranks; they know after the next team_sync. */
template <bool COPIED> static __device__ void offer(const struct team<COPIED> *t, enum exchange what, uint64_t value) {
    if (threadIdx.x < t->ranks) *of_rank(&block_memory()->exchange[what][t->rank], threadIdx.x) = value;
}

template <bool COPIED> static __device__ uint64_t offered_max(const struct team<COPIED> *t, enum exchange what) {
    uint64_t best = 0;
#pragma unroll 1
    for (uint32_t rank = 0; rank < t->ranks; rank++) best = max(best, block_memory()->exchange[what][rank]);
    return best;
}

template <bool COPIED> static __device__ uint64_t offered_sum(const struct team<COPIED> *t, enum exchange what, uint32_t ranks) {
    uint64_t sum = 0;
#pragma unroll 1
    for (uint32_t rank = 0; rank < ranks; rank++) sum += block_memory()->exchange[what][rank];
    return sum;
}

/* ---- the oracle's numbers (kernels/sampler.c) ---- */

static __device__ __forceinline__ float clean(float x) {
    if (!(x <= FLT_MAX)) return x > FLT_MAX ? FLT_MAX : -INFINITY;
    return x;
}

/* Without branches: what is computed for less than -87 is not taken. The low bits of `shifted` are those of the integer n. */
static __device__ __forceinline__ float exp_negative(float x) {
    const float shifted = __fadd_rn(__fmul_rn(x, 1.44269504f), 12582912.0f), n = __fsub_rn(shifted, 12582912.0f);
    const float r = __fadd_rn(__fsub_rn(x, __fmul_rn(n, 0.693359375f)), __fmul_rn(n, 2.12194440e-4f));
    float p = 1.0f / 5040;
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 720);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 120);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 24);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 6);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    p = __fadd_rn(__fmul_rn(p, r), 1);
    p = __fadd_rn(__fmul_rn(p, r), 1);
    const float e = __fmul_rn(p, __uint_as_float((__float_as_uint(shifted) << 23) + (127u << 23)));
    return x > -87.0f ? e : 0;
}

static __device__ __forceinline__ uint64_t mass_of(float e) { return (uint64_t)__fmul_rn(e, 0x1p40f); }

/* Integers that order as floats do (-0 as 0); with the id below, the lower token is the greater. */
static __device__ __forceinline__ uint64_t ranked(float x, uint32_t token) {
    uint32_t bits = __float_as_uint(__fadd_rn(x, 0.0f));
    return (uint64_t)(bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | ~token;
}
static __device__ __forceinline__ float ranked_value(uint64_t ranked) {
    uint32_t bits = (uint32_t)(ranked >> 32);
    return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits);
}
static __device__ __forceinline__ uint32_t ranked_token(uint64_t ranked) { return ~(uint32_t)ranked; }

template <bool COPIED> static __device__ __forceinline__ float value_at(const struct team<COPIED> *t, uint32_t i) {
    return COPIED ? block_logits()[i] : clean(t->values[i]);
}

template <bool COPIED> static __device__ __forceinline__ void put_value(const struct team<COPIED> *t, uint32_t i, float value) {
    if (COPIED)
        block_logits()[i] = value;
    else
        t->values[i] = value;
}

template <bool COPIED> static __device__ __forceinline__ uint32_t key_of(const struct team<COPIED> *t, float value) {
    float x = __fsub_rn(value, t->best);
    if (t->temperature != 1) x = __fdiv_rn(x, t->temperature);
    return x > t->floor ? __float_as_uint(fabsf(x)) : NO_KEY;
}

/* What value_at(i), value_at(i + THREADS), ... are made of: loads that do not wait for what is done with the one before. */
template <bool COPIED> static __device__ __forceinline__ void load_batch(const struct team<COPIED> *t, uint32_t i, float stored[BATCH]) {
#pragma unroll
    for (uint32_t j = 0; j < BATCH; j++)
        if (i + j * THREADS < t->count) stored[j] = COPIED ? block_logits()[i + j * THREADS] : t->values[i + j * THREADS];
}

/* From what is stored, once keys are made. */
template <bool COPIED> static __device__ __forceinline__ uint32_t stored_key(const struct team<COPIED> *t, float stored) {
    return COPIED || t->own ? __float_as_uint(stored) : key_of(t, clean(stored));
}

template <bool COPIED> static __device__ __forceinline__ uint64_t weight_of(const struct team<COPIED> *t, uint32_t key) {
    const float e = exp_negative(-__uint_as_float(key));
    return e >= t->min_e ? mass_of(e) : 0;
}
