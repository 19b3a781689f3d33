/* How a team of blocks samples from one row of logits: the device half of sample.cu, which owns the memory and launches.
 *
 * A team is a cluster of `ranks` blocks (1, 2, 4, 8; a single block before compute capability 9.0). Rank r looks after the tokens [r * chunk, (r + 1) * chunk). It reads its part of the
 * row once, into shared memory; all further passes go over that copy, which is also where biases, bans and penalties are put in. Where no copy fits (no clusters, a large vocabulary),
 * a row that is adjusted gets one in global memory, any other is read again. Logits are never written.
 *
 * It decides as kernels/sampler.c does, bit for bit: the same float operations in the same order (never fused), mass as a 64-bit integer (2^40 for the best token; 2^18 tokens are below
 * 2^58), whose sums do not depend on who adds first. Hence the same logits and the same u give the same token as on the host, with no exception at borders; tests compare for equality.
 *
 * Nothing is sorted. Tokens are ordered by key, the bits of |(logit - best) / temperature|, ties by id. A histogram of counts and masses over 1024 equal steps of that distance is made
 * once; top_k, top_p and the draw each find the step in which their prefix ends, collect the few tokens of it and rank those. A step with too many is cut by the bits of the key, 10 at a
 * time, until it is few tokens or a single key, whose tokens weigh the same.
 * Histograms and lists are merged into every rank's shared memory, so that all ranks decide the same on their own and wait for each other only where data moves.
 *
 * What it does not do: random numbers (u comes with the parameters), logarithms (the sum of exponentials goes back as it is). */
#pragma once

#include <cuda_runtime.h>
#include <float.h>

extern "C" {
#include "kernels/sample.h"
}

enum {
    THREADS = 512,
    WARPS = THREADS / 32,
    RANKS_MAX = 8,
    BINS = 1024,    /* of a histogram; a multiple of THREADS and RANKS_MAX */
    BIN_BITS = 10,
    LIST_MAX = 256, /* tokens that are ranked by comparing each with each */
    MARKS_MAX = 36 * BINS / 4,
};
#define ALL_LANES 0xffffffffu
#define NO_KEY 0xffffffffu
#define NO_TOKEN 0xffffffffu
#define BIN_SCALE 36.5f /* steps for a distance of 1: the last begins at 28.03, where mass (2^40 exp(-distance)) is 0 */

/* One sample's parameters. Lists are in the same buffer, at an index of 32-bit words. */
struct sample_params {
    float temperature, top_p, min_p;
    int32_t top_k;
    float repetition, presence, frequency;
    uint32_t u;      /* * 2^-24 */
    int32_t target;
    int32_t n_top;   /* -1: no report */
    uint32_t bias_at, n_bias;       /* pairs: token, bits of the bias */
    uint32_t banned_at, n_banned;
    uint32_t history_at, n_prompt, n_history; /* n_history > 0 only with penalties */
    uint32_t on_host; /* bool: the host samples; nothing to do */
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
    const uint32_t *n_samples;       /* in device memory */
    const uint32_t *sample_head_row; /* [n_samples] */
    const float *logits;             /* [head rows][n_vocab] */
    const uint32_t *stage;           /* parameters of all samples, then lists */
    float *scratch;                  /* [teams][n_vocab]; NULL: copies are in shared memory */
    struct sample_answer *answers;   /* [n_samples], in the host's memory */
    struct sample_place *tops;       /* [n_samples][SAMPLE_TOP_MAX], in the host's memory */
    uint32_t n_vocab, ranks, chunk;
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

struct __align__(16) team_shared {
    union {
        struct {
            uint64_t mass[LEVELS][BINS]; /* of the team: sums up to and including the bin */
            uint32_t count[LEVELS][BINS];
            uint32_t own_count[BINS], own_low[BINS], own_high[BINS]; /* of this block; mass in two words */
        };
        uint32_t marks[MARKS_MAX]; /* before any histogram: 2 * generated occurrences + occurs in the prompt */
    };
    uint64_t list[2][LIST_MAX]; /* key << 32 | token */
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
};

struct team {
    uint32_t rank, ranks;
    uint32_t first, count; /* tokens [first, first + count) are this block's */
    const float *raw;      /* their logits */
    float *values;         /* a copy of its own: adjusted, later keys; or raw itself */
    bool own;
    float best, temperature;
    float floor; /* distances beyond it are no candidates */
    float min_e; /* of less there is no mass */
    uint32_t cut; /* keys from here on are no candidates */
    uint32_t n_lists;
};

/* ---- teams ---- */

extern __shared__ __align__(16) uint8_t shared_memory[];
static __device__ __forceinline__ struct team_shared *block_memory(void) { return (struct team_shared *)shared_memory; }

static __device__ __forceinline__ uint32_t lane_index(void) { return threadIdx.x % 32; }
static __device__ __forceinline__ uint32_t warp_index(void) { return threadIdx.x / 32; }

static __device__ __forceinline__ void team_arrive(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

static __device__ __forceinline__ void team_wait(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

static __device__ __forceinline__ void team_sync(void) {
    team_arrive();
    team_wait();
}

/* The same place in another rank's shared memory. */
template <typename T> static __device__ __forceinline__ T *of_rank(T *place, uint32_t rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint64_t mapped;
    asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(place), "r"(rank));
    return (T *)mapped;
#else
    (void)rank;
    return place;
#endif
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
static __device__ void offer(const struct team *t, enum exchange what, uint64_t value) {
    if (threadIdx.x < t->ranks) *of_rank(&block_memory()->exchange[what][t->rank], threadIdx.x) = value;
}

static __device__ uint64_t offered_max(const struct team *t, enum exchange what) {
    uint64_t best = 0;
#pragma unroll 1
    for (uint32_t rank = 0; rank < t->ranks; rank++) best = max(best, block_memory()->exchange[what][rank]);
    return best;
}

static __device__ uint64_t offered_sum(const struct team *t, enum exchange what, uint32_t ranks) {
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

static __device__ __forceinline__ float exp_negative(float x) {
    if (!(x > -87.0f)) return 0;
    float shifted = __fadd_rn(__fmul_rn(x, 1.44269504f), 12582912.0f);
    float n = __fsub_rn(shifted, 12582912.0f);
    float r = __fadd_rn(__fsub_rn(x, __fmul_rn(n, 0.693359375f)), __fmul_rn(n, 2.12194440e-4f));
    float p = 1.0f / 5040;
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 720);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 120);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 24);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 6);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    p = __fadd_rn(__fmul_rn(p, r), 1);
    p = __fadd_rn(__fmul_rn(p, r), 1);
    return __fmul_rn(p, __uint_as_float((uint32_t)((int32_t)n + 127) << 23));
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

static __device__ __forceinline__ float value_at(const struct team *t, uint32_t i) { return clean(t->values[i]); }

static __device__ __forceinline__ uint32_t key_of(const struct team *t, float value) {
    float x = __fsub_rn(value, t->best);
    if (t->temperature != 1) x = __fdiv_rn(x, t->temperature);
    return x > t->floor ? __float_as_uint(fabsf(x)) : NO_KEY;
}

static __device__ __forceinline__ uint32_t key_at(const struct team *t, uint32_t i) {
    uint32_t key = t->own ? __float_as_uint(t->values[i]) : key_of(t, value_at(t, i));
    return key < t->cut ? key : NO_KEY;
}

static __device__ __forceinline__ uint64_t weight_of(const struct team *t, uint32_t key) {
    float e = exp_negative(-__uint_as_float(key));
    return e >= t->min_e ? mass_of(e) : 0;
}

/* ---- the row ---- */

/* Looks at every logit, and copies them where `copy` says so. Returns the best of this thread; *finite: one of them is a number. */
static __device__ uint64_t read_row(const struct team *t, bool copy, bool aligned, bool *finite) {
    enum { BATCH = 4 }; /* loads in flight */
    float best = -INFINITY;
    uint32_t token = t->first;
    auto look = [&](float value, uint32_t i) {
        *finite |= fabsf(value) <= FLT_MAX;
        value = clean(value);
        if (value > best) best = value, token = t->first + i;
    };
    const uint32_t vectors = aligned ? t->count / 4 : 0;
    for (uint32_t from = threadIdx.x; from < vectors; from += BATCH * THREADS) {
        float4 v[BATCH];
#pragma unroll
        for (uint32_t j = 0; j < BATCH; j++)
            if (from + j * THREADS < vectors) v[j] = __ldg((const float4 *)t->raw + from + j * THREADS);
#pragma unroll
        for (uint32_t j = 0; j < BATCH; j++) {
            const uint32_t at = from + j * THREADS;
            if (at >= vectors) break;
            if (copy) ((float4 *)t->values)[at] = v[j];
            look(v[j].x, 4 * at);
            look(v[j].y, 4 * at + 1);
            look(v[j].z, 4 * at + 2);
            look(v[j].w, 4 * at + 3);
        }
    }
    for (uint32_t i = 4 * vectors + threadIdx.x; i < t->count; i += THREADS) {
        float value = __ldg(t->raw + i);
        if (copy) t->values[i] = value;
        look(value, i);
    }
    return ranked(best, token);
}

static __device__ uint64_t best_value(const struct team *t) {
    float best = -INFINITY;
    uint32_t token = t->first;
    for (uint32_t i = threadIdx.x; i < t->count; i += THREADS) {
        float value = value_at(t, i);
        if (value > best) best = value, token = t->first + i;
    }
    return ranked(best, token);
}

static __device__ uint64_t sum_of_exponentials(const struct team *t) {
    uint64_t mass = 0;
    for (uint32_t i = threadIdx.x; i < t->count; i += THREADS) mass += mass_of(exp_negative(__fsub_rn(value_at(t, i), t->best)));
    return mass;
}

/* ---- the best few, for reports ---- */

static __device__ uint64_t best_below(const struct team *t, uint64_t bound) {
    uint64_t best = 0;
    for (uint32_t i = threadIdx.x; i < t->count; i += THREADS) {
        float value = value_at(t, i);
        uint64_t candidate = ranked(value, t->first + i);
        if (value > -INFINITY && candidate < bound) best = max(best, candidate);
    }
    return best;
}

/* Each rank gives its n best to rank 0, one after the other: who offered the best looks for its next. */
static __device__ __noinline__ void offer_tops(const struct team *t, uint32_t n) {
    struct team_shared *s = block_memory();
    uint64_t mine = best_below(t, ~0ull);
    for (uint32_t i = 0; i < n; i++) {
        uint64_t best = block_max(s, i % 2, mine);
        if (threadIdx.x == 0) *of_rank(&s->tops[t->rank * SAMPLE_TOP_MAX + i], 0) = best;
        if (best != 0 && best == mine) mine = best_below(t, best);
    }
    __syncthreads();
}

/* Rank 0, once all have offered. Returns how many there are. */
static __device__ __noinline__ uint32_t report_tops(const struct team *t, uint32_t n, struct sample_place *tops) {
    const uint64_t *offers = block_memory()->tops;
    const uint32_t all = t->ranks * SAMPLE_TOP_MAX;
    uint32_t reported = 0;
    for (uint32_t from = 0; from < all; from += THREADS) {
        const uint32_t i = from + threadIdx.x;
        const bool offered = i < all && i % SAMPLE_TOP_MAX < n && offers[i] != 0;
        uint32_t before = 0;
        for (uint32_t j = 0; offered && j < all; j++) before += j % SAMPLE_TOP_MAX < n && offers[j] > offers[i];
        if (offered && before < n) tops[before] = {(int32_t)ranked_token(offers[i]), ranked_value(offers[i])};
        reported += (uint32_t)__syncthreads_count(offered && before < n);
    }
    return reported;
}

/* ---- what is changed before a draw ---- */

/* By one warp, in the order of the list: a token may stand in it more than once. */
static __device__ void add_biases(const struct team *t, const uint32_t *bias, uint32_t n) {
    const uint32_t lane = lane_index();
    for (uint32_t from = 0; from < n; from += 32) {
        const uint32_t i = from + lane, at = i < n ? bias[2 * i] - t->first : NO_TOKEN;
        const bool here = at < t->count;
        const uint32_t same = __match_any_sync(ALL_LANES, here ? at : 0x80000000u | lane);
        const uint32_t before = (uint32_t)__popc(same & ((1u << lane) - 1)), rounds = __reduce_max_sync(ALL_LANES, before);
        for (uint32_t round = 0; round <= rounds; round++) {
            if (here && before == round) t->values[at] = clean(__fadd_rn(value_at(t, at), __uint_as_float(bias[2 * i + 1])));
            __syncwarp();
        }
    }
}

static __device__ void penalize(const struct team *t, const uint32_t *history) {
    const struct sample_params *p = &block_memory()->params;
    uint32_t *marks = block_memory()->marks;
    for (uint32_t low = 0; low < t->count; low += MARKS_MAX) {
        const uint32_t width = min((uint32_t)MARKS_MAX, t->count - low);
        for (uint32_t i = threadIdx.x; i < width; i += THREADS) marks[i] = 0;
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < p->n_history; i += THREADS) {
            const uint32_t at = history[i] - t->first - low;
            if (at >= width) continue;
            if (i >= p->n_prompt)
                atomicAdd(&marks[at], 2);
            else
                atomicOr(&marks[at], 1);
        }
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < width; i += THREADS) {
            if (marks[i] == 0) continue;
            float x = value_at(t, low + i);
            x = x > 0 ? __fdiv_rn(x, p->repetition) : __fmul_rn(x, p->repetition);
            if (marks[i] >= 2) {
                x = __fsub_rn(x, p->presence);
                x = __fsub_rn(x, __fmul_rn(p->frequency, (float)(marks[i] / 2)));
            }
            t->values[low + i] = clean(x);
        }
        __syncthreads();
    }
}

static __device__ __noinline__ void adjust(const struct team *team, const uint32_t *words) {
    const struct team copied = *team, *t = &copied; /* values are written below: not through a pointer that might be to itself */
    const struct sample_params *p = &block_memory()->params;
    __syncthreads(); /* the copy is read by others than who made it */
    if (warp_index() == 0) add_biases(t, words + p->bias_at, p->n_bias);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < p->n_banned; i += THREADS) {
        const uint32_t at = words[p->banned_at + i] - t->first;
        if (at < t->count) t->values[at] = -INFINITY;
    }
    __syncthreads();
    if (p->n_history > 0) penalize(t, words + p->history_at);
}

/* ---- histograms ---- */

static __device__ __forceinline__ uint32_t bin_of(uint32_t key) { return min((uint32_t)__fmul_rn(__uint_as_float(key), BIN_SCALE), (uint32_t)BINS - 1); }

/* Not above any key of the bin: the quotient is off by less than 64 units in the last place. Keys of a bin are less than 2^24 further (2^30 in the first), as distances at most double. */
static __device__ __forceinline__ uint32_t bin_base(uint32_t bin) { return bin ? __float_as_uint(__fmul_rn((float)bin, 1.0f / BIN_SCALE)) - 64 : 0; }

/* What is left of the search: keys of `bin` whose offset from its base, without the last `shift` bits, is `prefix`. */
struct interval {
    uint32_t bin, base, shift, prefix;
};

static __device__ __forceinline__ bool is_within(const struct interval *in, uint32_t key) {
    return key != NO_KEY && bin_of(key) == in->bin && (key - in->base) >> in->shift == in->prefix;
}

/* 64-bit sums from 32-bit additions: who makes the low word overflow carries. */
static __device__ __forceinline__ void histogram_add(struct team_shared *s, uint32_t bin, uint64_t mass) {
    atomicAdd(&s->own_count[bin], 1);
    if (mass == 0) return;
    const uint32_t low = (uint32_t)mass, before = atomicAdd(&s->own_low[bin], low), high = (uint32_t)(mass >> 32) + (before + low < low);
    if (high) atomicAdd(&s->own_high[bin], high);
}

/* Every bin of the team's histogram is summed by one rank, a lane for each rank's part, and given to all; then sums up to each bin. */
static __device__ void histogram_finish(const struct team *t, uint32_t level) {
    struct team_shared *s = block_memory();
    team_sync();
    for (uint32_t i = threadIdx.x; i < BINS; i += THREADS) {
        const uint32_t rank = i % t->ranks, bin = (t->rank * BINS + i) / t->ranks;
        uint32_t count = *of_rank(&s->own_count[bin], rank);
        uint64_t mass = ((uint64_t)*of_rank(&s->own_high[bin], rank) << 32) + *of_rank(&s->own_low[bin], rank);
        for (uint32_t step = 1; step < t->ranks; step *= 2) {
            count += __shfl_xor_sync(ALL_LANES, count, step);
            mass += __shfl_xor_sync(ALL_LANES, mass, step);
        }
        *of_rank(&s->count[level][bin], rank) = count;
        *of_rank(&s->mass[level][bin], rank) = mass;
    }
    team_sync();
    enum { EACH = BINS / THREADS };
    const uint32_t first = threadIdx.x * EACH, lane = lane_index();
    uint32_t count = 0;
    uint64_t mass = 0;
    for (uint32_t i = first; i < first + EACH; i++) {
        s->count[level][i] = count += s->count[level][i];
        s->mass[level][i] = mass += s->mass[level][i];
    }
    uint32_t count_up = count;
    uint64_t mass_up = mass;
    for (uint32_t step = 1; step < 32; step *= 2) {
        uint32_t count_left = __shfl_up_sync(ALL_LANES, count_up, step);
        uint64_t mass_left = __shfl_up_sync(ALL_LANES, mass_up, step);
        if (lane >= step) count_up += count_left, mass_up += mass_left;
    }
    if (lane == 31) s->warp_count[warp_index()] = count_up, s->warp_mass[warp_index()] = mass_up;
    __syncthreads();
    count_up -= count;
    mass_up -= mass;
    for (uint32_t warp = 0; warp < warp_index(); warp++) count_up += s->warp_count[warp], mass_up += s->warp_mass[warp];
    for (uint32_t i = first; i < first + EACH; i++) {
        s->count[level][i] += count_up;
        s->mass[level][i] += mass_up;
    }
    __syncthreads();
}

/* LEVEL_STEPS: of all candidates, by steps of distance. LEVEL_BITS: of those within `in`, by the next bits of their keys. first: the copy holds logits still, and keys from now on.
 * Called from several places: one copy of it in the instruction cache is better than three. */
static __device__ __noinline__ void histogram(const struct team *team, uint32_t level, struct interval in, bool first) {
    const struct team t = *team;
    struct team_shared *s = block_memory();
    const uint32_t bits = min(in.shift, (uint32_t)BIN_BITS), shift = in.shift - bits;
    for (uint32_t i = threadIdx.x; i < BINS; i += THREADS) s->own_count[i] = s->own_low[i] = s->own_high[i] = 0;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < t.count; i += THREADS) {
        const uint32_t key = first ? key_of(&t, value_at(&t, i)) : key_at(&t, i);
        if (first && t.own) t.values[i] = __uint_as_float(key);
        if (level == LEVEL_STEPS ? key == NO_KEY : !is_within(&in, key)) continue;
        histogram_add(s, level == LEVEL_STEPS ? bin_of(key) : (key - in.base) >> shift & ((1u << bits) - 1), weight_of(&t, key));
    }
    histogram_finish(&t, level);
}

/* The bin in which the sum reaches `target`, which it does reach. */
static __device__ struct crossing histogram_cross(struct team_shared *s, uint32_t level, bool by_mass, uint64_t target, uint64_t count_before, uint64_t mass_before) {
    __syncthreads(); /* the last crossing was read */
    for (uint32_t i = threadIdx.x; i < BINS; i += THREADS) {
        const uint32_t count = i ? s->count[level][i - 1] : 0;
        const uint64_t mass = i ? s->mass[level][i - 1] : 0;
        const uint64_t before = by_mass ? mass_before + mass : count_before + count;
        const uint64_t upto = by_mass ? mass_before + s->mass[level][i] : count_before + s->count[level][i];
        if (before < target && target <= upto) s->crossing = {count_before + count, mass_before + mass, i, s->count[level][i] - count};
    }
    __syncthreads();
    return s->crossing;
}

/* ---- prefixes ---- */

static __device__ struct position rank_list(struct team *t, bool by_mass, uint64_t target, const struct interval *in,
                                            const struct crossing *at) {
    struct team_shared *s = block_memory();
    const uint32_t which = t->n_lists++;
    uint64_t *list = s->list[which % 2]; /* the one before may still be read by a rank that is late */
    for (uint32_t i = threadIdx.x; i < t->count; i += THREADS) {
        const uint32_t key = key_at(t, i);
        if (!is_within(in, key)) continue;
        const uint32_t place = atomicAdd(of_rank(&s->list_used[which], 0), 1);
#pragma unroll 1
        for (uint32_t rank = 0; rank < t->ranks && place < LIST_MAX; rank++) *of_rank(&list[place], rank) = (uint64_t)key << 32 | (t->first + i);
    }
    team_sync();
    for (uint32_t i = threadIdx.x; i < at->count; i += THREADS) s->weight[i] = weight_of(t, (uint32_t)(list[i] >> 32));
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < at->count; i += THREADS) {
        const uint64_t mine = list[i], weight = s->weight[i];
        uint32_t count = 0, same = 0;
        uint64_t mass = 0;
        for (uint32_t j = 0; j < at->count; j++) {
            if (list[j] >= mine) continue;
            count++;
            mass += s->weight[j];
            same += (uint32_t)(list[j] >> 32) == (uint32_t)(mine >> 32);
        }
        const uint64_t before = by_mass ? at->mass_before + mass : at->count_before + count;
        if (before < target && target <= before + (by_mass ? weight : 1))
            s->position = {at->mass_before + mass - same * weight, (uint32_t)(mine >> 32), same + 1, (uint32_t)mine};
    }
    __syncthreads();
    return s->position;
}

/* The end of the shortest prefix whose weight (mass or count) is at least `target`, which all tokens together reach. Needs the histogram by steps. */
static __device__ struct position prefix_end(struct team *t, bool by_mass, uint64_t target) {
    struct team_shared *s = block_memory();
    struct crossing at = histogram_cross(s, LEVEL_STEPS, by_mass, target, 0, 0);
    struct interval in = {at.bin, bin_base(at.bin), at.bin ? 24u : 30u, 0};
    while (at.count > LIST_MAX && in.shift > 0) {
        const uint32_t bits = min(in.shift, (uint32_t)BIN_BITS);
        histogram(t, LEVEL_BITS, in, false);
        at = histogram_cross(s, LEVEL_BITS, by_mass, target, at.count_before, at.mass_before);
        in.shift -= bits;
        in.prefix = in.prefix << bits | at.bin;
    }
    if (at.count <= LIST_MAX) return rank_list(t, by_mass, target, &in, &at);
    const uint32_t key = in.base + in.prefix;
    const uint64_t weight = by_mass ? weight_of(t, key) : 1, before = by_mass ? at.mass_before : at.count_before;
    return {at.mass_before, key, (uint32_t)((target - before + weight - 1) / weight), NO_TOKEN};
}

/* The token with `rank` - 1 tokens of the same key and lower ids. */
static __device__ __noinline__ uint32_t token_of(const struct team *t, uint32_t key, uint32_t rank) {
    struct team_shared *s = block_memory();
    const uint32_t each = (t->count + WARPS - 1) / WARPS, first = min(warp_index() * each, t->count), end = min(first + each, t->count), lane = lane_index();
    uint32_t here = 0;
    for (uint32_t from = first; from < end; from += 32) here += (uint32_t)__popc(__ballot_sync(ALL_LANES, from + lane < end && key_at(t, from + lane) == key));
    if (lane == 0) s->warp_count[warp_index()] = here;
    __syncthreads();
    uint32_t all = 0, before = 0;
    for (uint32_t warp = 0; warp < WARPS; warp++) {
        if (warp == warp_index()) before = all;
        all += s->warp_count[warp];
    }
    offer(t, EXCHANGE_TIES, all);
    team_sync();
    before += (uint32_t)offered_sum(t, EXCHANGE_TIES, t->rank);
    for (uint32_t from = first; from < end && before < rank; from += 32) {
        const bool is = from + lane < end && key_at(t, from + lane) == key;
        const uint32_t found = __ballot_sync(ALL_LANES, is);
        if (is && before + (uint32_t)__popc(found & ((1u << lane) - 1)) + 1 == rank)
#pragma unroll 1
            for (uint32_t other = 0; other < t->ranks; other++) *of_rank(&s->walked, other) = t->first + from + lane;
        before += (uint32_t)__popc(found);
    }
    team_sync();
    return s->walked;
}

/* ---- the draw ---- */

static __device__ __noinline__ uint32_t draw(struct team *t, uint32_t token_of_best) {
    struct team_shared *s = block_memory();
    const float top_p = s->params.top_p, min_p = s->params.min_p;
    const uint32_t top_k = s->params.top_k > 0 ? (uint32_t)s->params.top_k : 0;
    const struct interval everything = {};
    t->temperature = s->params.temperature;
    t->floor = top_k ? -87.0f : -27.8f; /* below, the mass is 0: only counts see it */
    t->min_e = top_p < 1 ? 0 : min_p;
    histogram(t, LEVEL_STEPS, everything, true);
    struct position end = {0, NO_KEY, 0, NO_TOKEN};
    uint64_t total = s->mass[LEVEL_STEPS][BINS - 1];
    const uint32_t n = s->count[LEVEL_STEPS][BINS - 1];
#pragma unroll 1
    for (uint32_t which = SELECT_TOP_K; which < SELECTIONS; which++) {
        uint64_t target = top_k;
        if (which == SELECT_TOP_K && (top_k == 0 || top_k >= n)) continue;
        if (which == SELECT_TOP_P && !(top_p < 1)) continue;
        if (which == SELECT_TOP_P) target = (uint64_t)ceil(__dmul_rn((double)top_p, (double)total));
        if (which == SELECT_DRAW) {
            uint64_t before_end = total; /* mass that the histogram knows */
            if (min_p > 0 && top_p < 1) { /* the mass is another one now: of the prefix alone, and without what min_p takes away */
                t->min_e = min_p;
                t->cut = end.key;
                __syncthreads();
                histogram(t, LEVEL_STEPS, everything, false);
                before_end = s->mass[LEVEL_STEPS][BINS - 1];
                total = before_end + end.rank * weight_of(t, end.key);
            }
            if (total == 0) return token_of_best; /* min_p above 1 */
            target = (__umul64hi(total, s->params.u) << 40 | total * s->params.u >> 24) + 1;
            if (target > before_end) { /* among those of the last key */
                const uint64_t weight = weight_of(t, end.key);
                end.rank = (uint32_t)((target - before_end + weight - 1) / weight);
                end.token = NO_TOKEN;
                t->cut = NO_KEY;
                break;
            }
        }
        end = prefix_end(t, which != SELECT_TOP_K, target);
        total = end.mass_before + end.rank * weight_of(t, end.key);
    }
    return end.token != NO_TOKEN ? end.token : token_of(t, end.key, end.rank);
}

/* ---- one sample ---- */

static __device__ void answer(const struct team *t, enum answer_kind kind, uint32_t token, uint32_t n_top, struct sample_answer *out) {
    if (t->rank != 0 || threadIdx.x != 0) return;
    struct sample_answer a = {0, (int32_t)token, 0, 0, n_top, (uint32_t)kind, 0};
    if (kind != ANSWER_NO_LOGITS && (block_memory()->params.n_top >= 0 || block_memory()->params.target >= 0)) {
        a.mass = offered_sum(t, EXCHANGE_MASS, t->ranks);
        a.best = ranked_value(offered_max(t, EXCHANGE_BEST));
        a.logit = clean(__ldg(t->raw + token)); /* rank 0 begins at token 0 */
    }
    *out = a;
}

static __device__ void sample_row(const struct sampling_args *a, uint32_t sample, float *chunk, struct team_shared *s) {
    struct sample_params *p = &s->params;
    struct team t = {};
    t.cut = NO_KEY;
    t.temperature = 1;
    t.ranks = a->ranks;
    t.rank = blockIdx.x % a->ranks;
    t.first = t.rank * a->chunk;
    t.count = min(a->chunk, a->n_vocab - t.first);
    t.raw = a->logits + (size_t)__ldg(a->sample_head_row + sample) * a->n_vocab + t.first;
    if (threadIdx.x < PARAMS_WORDS) ((uint32_t *)p)[threadIdx.x] = __ldg(a->stage + sample * PARAMS_WORDS + threadIdx.x);
    if (threadIdx.x < SELECTIONS) s->list_used[threadIdx.x] = 0;
    __syncthreads();
    if (p->on_host) return;
    team_arrive();
    const bool report = p->n_top >= 0 || p->target >= 0, draws = p->target < 0, adjusted = draws && (p->n_bias || p->n_banned || p->n_history);
    t.own = a->scratch ? adjusted : report || adjusted || (draws && p->temperature != 0);
    t.values = !t.own ? (float *)t.raw : a->scratch ? a->scratch + (size_t)(blockIdx.x / a->ranks) * a->n_vocab : chunk;
    struct sample_answer *out = &a->answers[sample];

    bool finite = false;
    uint64_t best = block_max(s, 0, read_row(&t, t.own, a->n_vocab % 4 == 0, &finite));
    finite = __syncthreads_or(finite);
    team_wait(); /* all ranks are there */
    offer(&t, EXCHANGE_BEST, best);
    offer(&t, EXCHANGE_FINITE, finite);
    team_sync();
    best = offered_max(&t, EXCHANGE_BEST);
    t.best = ranked_value(best);
    if (offered_max(&t, EXCHANGE_FINITE) == 0) {
        answer(&t, ANSWER_NO_LOGITS, 0, 0, out);
        return;
    }
    uint32_t n_top = 0;
    if (report) {
        offer(&t, EXCHANGE_MASS, block_sum(s, sum_of_exponentials(&t)));
        if (p->n_top > 0) offer_tops(&t, (uint32_t)p->n_top);
        team_sync();
        if (p->n_top > 0 && t.rank == 0) n_top = report_tops(&t, (uint32_t)p->n_top, a->tops + (size_t)sample * SAMPLE_TOP_MAX);
    }
    if (!draws) {
        answer(&t, ANSWER_TOKEN, (uint32_t)p->target, n_top, out);
        return;
    }
    if (adjusted) {
        adjust(&t, a->stage);
        best = block_max(s, 1, best_value(&t));
        offer(&t, EXCHANGE_ADJUSTED, best);
        team_sync();
        best = offered_max(&t, EXCHANGE_ADJUSTED);
        t.best = ranked_value(best);
        if (t.best == -INFINITY) {
            answer(&t, ANSWER_NO_TOKEN, 0, n_top, out);
            return;
        }
    }
    const uint32_t token = p->temperature == 0 ? ranked_token(best) : draw(&t, ranked_token(best));
    answer(&t, ANSWER_TOKEN, token, n_top, out);
}

static __device__ void sample_all(const struct sampling_args *a) {
    struct team_shared *s = block_memory();
    float *chunk = (float *)(s + 1);
    const uint32_t teams = gridDim.x / a->ranks, n = __ldg(a->n_samples);
    for (uint32_t sample = blockIdx.x / a->ranks; sample < n; sample += teams) {
        sample_row(a, sample, chunk, s);
        if (sample + teams < n) team_sync(); /* nobody reads this sample's exchange any more */
    }
}
