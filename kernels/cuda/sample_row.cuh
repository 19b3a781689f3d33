/* What a team does with a row of logits before anything is drawn: reading, the sum for log-probabilities, the best few, adjusting. See sample_team.cuh. */
#pragma once

#include "kernels/cuda/sample_team.cuh"

/* ---- reading ---- */

/* What a thread has seen. */
struct seen {
    float best;
    uint32_t token;
    bool finite; /* there was a number */
};

/* Returns what the logit counts as. */
static __device__ __forceinline__ float look(struct seen *seen, float logit, uint32_t token) {
    const float value = clean(logit);
    seen->finite |= fabsf(logit) <= FLT_MAX;
    if (value > seen->best) seen->best = value, seen->token = token;
    return value;
}

/* Looks at every logit of the block, once, and makes its copy where it is to have one. aligned: rows are whole float4s. */
template <bool COPIED> static __device__ struct seen read_row(const struct team<COPIED> *t, bool aligned) {
    struct seen seen = {-INFINITY, t->first, false};
    const uint32_t vectors = aligned ? t->count / 4 : 0;
    float4 *copy = (float4 *)(COPIED ? block_logits() : t->values);
    for (uint32_t from = threadIdx.x; from < vectors; from += BATCH * THREADS) {
        float4 v[BATCH];
#pragma unroll
        for (uint32_t j = 0; j < BATCH; j++)
            if (from + j * THREADS < vectors) v[j] = __ldg((const float4 *)t->raw + from + j * THREADS);
#pragma unroll
        for (uint32_t j = 0; j < BATCH; j++) {
            const uint32_t at = from + j * THREADS, token = t->first + 4 * at;
            if (at >= vectors) break;
            v[j].x = look(&seen, v[j].x, token);
            v[j].y = look(&seen, v[j].y, token + 1);
            v[j].z = look(&seen, v[j].z, token + 2);
            v[j].w = look(&seen, v[j].w, token + 3);
            if (t->own) copy[at] = v[j];
        }
    }
    for (uint32_t i = 4 * vectors + threadIdx.x; i < t->count; i += THREADS) {
        const float value = look(&seen, __ldg(t->raw + i), t->first + i);
        if (t->own) put_value(t, i, value);
    }
    return seen;
}

template <bool COPIED> static __device__ uint64_t best_value(const struct team<COPIED> *t) {
    float best = -INFINITY;
    uint32_t token = t->first;
    for (uint32_t i = threadIdx.x; i < t->count; i += THREADS) {
        float value = value_at(t, i);
        if (value > best) best = value, token = t->first + i;
    }
    return ranked(best, token);
}

template <bool COPIED> static __device__ uint64_t sum_of_exponentials(const struct team<COPIED> *t, float best) {
    uint64_t mass = 0;
    for (uint32_t i = threadIdx.x; i < t->count; i += THREADS) mass += mass_of(exp_negative(__fsub_rn(value_at(t, i), best)));
    return mass;
}

/* ---- the best few, for reports ---- */

template <bool COPIED> static __device__ uint64_t best_below(const struct team<COPIED> *t, uint64_t bound) {
    uint64_t best = 0;
    for (uint32_t i = threadIdx.x; i < t->count; i += THREADS) {
        float value = value_at(t, i);
        uint64_t candidate = ranked(value, t->first + i);
        if (value > -INFINITY && candidate < bound) best = max(best, candidate);
    }
    return best;
}

/* Each rank gives its n best to rank 0, one after the other: who offered the best looks for its next. */
template <bool COPIED> static __device__ __noinline__ void offer_tops(const struct team<COPIED> *t, uint32_t n) {
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
template <bool COPIED> static __device__ __noinline__ uint32_t report_tops(const struct team<COPIED> *t, uint32_t n, struct sample_place *tops) {
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
template <bool COPIED> static __device__ void add_biases(const struct team<COPIED> *t, const uint32_t *bias, uint32_t n) {
    const uint32_t lane = lane_index();
    for (uint32_t from = 0; from < n; from += 32) {
        const uint32_t i = from + lane, at = i < n ? bias[2 * i] - t->first : NO_TOKEN;
        const bool here = at < t->count;
        const uint32_t same = __match_any_sync(ALL_LANES, here ? at : 0x80000000u | lane);
        const uint32_t before = (uint32_t)__popc(same & ((1u << lane) - 1)), rounds = __reduce_max_sync(ALL_LANES, before);
        for (uint32_t round = 0; round <= rounds; round++) {
            if (here && before == round) put_value(t, at, clean(__fadd_rn(value_at(t, at), __uint_as_float(bias[2 * i + 1]))));
            __syncwarp();
        }
    }
}

template <bool COPIED> static __device__ void penalize(const struct team<COPIED> *t, const uint32_t *history) {
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
            put_value(t, low + i, clean(x));
        }
        __syncthreads();
    }
}

template <bool COPIED> static __device__ __noinline__ void adjust(const struct team<COPIED> *given, const uint32_t *words) {
    const struct team<COPIED> copied = *given, *t = &copied; /* a write to the copy of the row is none to this */
    const struct sample_params *p = &block_memory()->params;
    __syncthreads(); /* the copy is read by others than who made it */
    if (warp_index() == 0) add_biases(t, words + p->bias_at, p->n_bias);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < p->n_banned; i += THREADS) {
        const uint32_t at = words[p->banned_at + i] - t->first;
        if (at < t->count) put_value(t, at, -INFINITY);
    }
    __syncthreads();
    if (p->n_history > 0) penalize(t, words + p->history_at);
}
