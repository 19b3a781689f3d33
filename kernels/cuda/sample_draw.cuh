/* How a team draws: prefixes of the tokens in descending order, found by histograms of keys. See sample_team.cuh. */
#pragma once

#include "kernels/cuda/sample_team.cuh"

/* ---- histograms ---- */

static __device__ __forceinline__ uint32_t bin_of(uint32_t key) {
    return min((uint32_t)__fmul_rn(__uint_as_float(key), BIN_SCALE), (uint32_t)BINS - 1);
}

/* The smallest key of the bin: near where the quotient says, found by halving, as only bin_of knows how products round. */
static __device__ uint32_t bin_low(uint32_t bin) {
    if (bin == 0 || bin == BINS) return bin ? KEY_END : 0;
    uint32_t key = __float_as_uint(__fmul_rn((float)bin, 1.0f / BIN_SCALE)) - 64;
    for (uint32_t step = 64; step > 0; step /= 2)
        if (bin_of(key + step - 1) < bin) key += step;
    return key;
}

/* Keys [low, low + width): where a search has come to. NO_KEY is in none. */
struct interval {
    uint32_t low, width;
};

static __device__ __forceinline__ bool is_within(const struct interval *in, uint32_t key) { return key - in->low < in->width; }

/* 64-bit sums from 32-bit additions: who makes the low word overflow carries. */
static __device__ __forceinline__ void histogram_add(struct team_shared *s, uint32_t bin, uint64_t mass) {
    atomicAdd(&s->own_count[bin], 1);
    if (mass == 0) return;
    const uint32_t low = (uint32_t)mass, before = atomicAdd(&s->own_low[bin], low), high = (uint32_t)(mass >> 32) + (before + low < low);
    if (high) atomicAdd(&s->own_high[bin], high);
}

/* Every bin of the team's histogram is summed by one rank, a lane for each rank's part, and given to all; then sums up to each bin. */
template <bool COPIED> static __device__ void histogram_finish(const struct team<COPIED> *t, uint32_t level) {
    struct team_shared *s = block_memory();
    const uint32_t shift = 31 - (uint32_t)__clz((int)t->ranks);
    team_sync();
    for (uint32_t i = threadIdx.x; i < BINS; i += THREADS) {
        const uint32_t rank = i & (t->ranks - 1), bin = (t->rank * BINS + i) >> shift;
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

static __device__ void histogram_clear(void) {
    struct team_shared *s = block_memory();
    for (uint32_t i = threadIdx.x; i < BINS; i += THREADS) s->own_count[i] = s->own_low[i] = s->own_high[i] = 0;
    __syncthreads();
}

/* Of all candidates, by steps of distance; keys take the place of logits. */
template <bool COPIED> static __device__ __noinline__ void histogram_first(const struct team<COPIED> *given) {
    histogram_clear();
    const struct team<COPIED> t = *given;
    for (uint32_t from = threadIdx.x; from < t.count; from += BATCH * THREADS) {
        float stored[BATCH];
        load_batch(&t, from, stored);
#pragma unroll
        for (uint32_t j = 0; j < BATCH; j++) {
            const uint32_t i = from + j * THREADS;
            if (i >= t.count) break;
            const uint32_t key = key_of(&t, COPIED ? stored[j] : clean(stored[j]));
            if (t.own) put_value(&t, i, __uint_as_float(key));
            if (key != NO_KEY) histogram_add(block_memory(), bin_of(key), weight_of(&t, key));
        }
    }
    histogram_finish(&t, LEVEL_STEPS);
}

/* LEVEL_STEPS: as before, of what is below the cut. LEVEL_BITS: of keys within `in`, by their offset without its last `shift` bits. */
template <bool COPIED>
static __device__ __noinline__ void histogram_again(const struct team<COPIED> *given, uint32_t level, struct interval in, uint32_t shift) {
    histogram_clear();
    const struct team<COPIED> t = *given;
    for (uint32_t from = threadIdx.x; from < t.count; from += BATCH * THREADS) {
        float stored[BATCH];
        load_batch(&t, from, stored);
#pragma unroll
        for (uint32_t j = 0; j < BATCH; j++) {
            if (from + j * THREADS >= t.count) break;
            const uint32_t key = stored_key(&t, stored[j]);
            if (!is_within(&in, key)) continue;
            histogram_add(block_memory(), level == LEVEL_STEPS ? bin_of(key) : (key - in.low) >> shift, weight_of(&t, key));
        }
    }
    histogram_finish(&t, level);
}

/* The bin in which the sum reaches `target`, which it does reach. */
static __device__ struct crossing histogram_cross(struct team_shared *s, uint32_t level, bool by_mass, uint64_t target, uint64_t count_before,
                                                  uint64_t mass_before) {
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

/* Into the list of every rank, at the next place of rank 0's. */
template <bool COPIED> static __device__ __noinline__ void list_add(const struct team<COPIED> *t, uint32_t which, uint32_t key, uint32_t token) {
    struct team_shared *s = block_memory();
    const uint32_t place = atomicAdd(of_rank(&s->list_used[which], 0), 1);
    for (uint32_t rank = 0; rank < t->ranks && place < LIST_MAX; rank++) *of_rank(&s->list[which][place], rank) = (uint64_t)key << 32 | token;
}

template <bool COPIED>
static __device__ __noinline__ struct position rank_list(const struct team<COPIED> *given, uint32_t which, bool by_mass, uint64_t target,
                                                         const struct interval *in, const struct crossing *at) {
    const struct team<COPIED> copied = *given, *t = &copied;
    struct team_shared *s = block_memory();
    const uint64_t *list = s->list[which];
    for (uint32_t from = threadIdx.x; from < t->count; from += BATCH * THREADS) {
        float stored[BATCH];
        load_batch(t, from, stored);
#pragma unroll
        for (uint32_t j = 0; j < BATCH; j++) {
            const uint32_t i = from + j * THREADS;
            if (i >= t->count) break;
            const uint32_t key = stored_key(t, stored[j]);
            if (is_within(in, key)) list_add(given, which, key, t->first + i);
        }
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
template <bool COPIED> static __device__ struct position prefix_end(const struct team<COPIED> *t, uint32_t which, uint64_t target) {
    struct team_shared *s = block_memory();
    const bool by_mass = which != SELECT_TOP_K;
    struct crossing at = histogram_cross(s, LEVEL_STEPS, by_mass, target, 0, 0);
    struct interval in = {bin_low(at.bin), bin_low(at.bin + 1)};
    in.width = min(in.width, t->cut) - in.low;
    while (at.count > LIST_MAX && in.width > 1) {
        const uint32_t bits = 32 - (uint32_t)__clz((int)(in.width - 1)), shift = bits > BIN_BITS ? bits - BIN_BITS : 0;
        histogram_again(t, LEVEL_BITS, in, shift);
        at = histogram_cross(s, LEVEL_BITS, by_mass, target, at.count_before, at.mass_before);
        in.low += at.bin << shift;
        in.width = min(1u << shift, in.width - (at.bin << shift));
    }
    if (at.count <= LIST_MAX) return rank_list(t, which, by_mass, target, &in, &at);
    const uint32_t key = in.low;
    const uint64_t weight = by_mass ? weight_of(t, key) : 1, before = by_mass ? at.mass_before : at.count_before;
    return {at.mass_before, key, (uint32_t)((target - before + weight - 1) / weight), NO_TOKEN};
}

/* The token with `rank` - 1 tokens of the same key and lower ids. */
template <bool COPIED> static __device__ __noinline__ uint32_t token_of(const struct team<COPIED> *t, uint32_t key, uint32_t rank) {
    struct team_shared *s = block_memory();
    const uint32_t each = (t->count + WARPS - 1) / WARPS, first = min(warp_index() * each, t->count), end = min(first + each, t->count),
                   lane = lane_index();
    uint32_t here = 0;
    for (uint32_t from = first; from < end; from += 32)
        here += (uint32_t)__popc(
            __ballot_sync(ALL_LANES, from + lane < end && stored_key(t, COPIED ? block_logits()[from + lane] : t->values[from + lane]) == key));
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
        const bool is = from + lane < end && stored_key(t, COPIED ? block_logits()[from + lane] : t->values[from + lane]) == key;
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

template <bool COPIED> static __device__ __noinline__ uint32_t draw(struct team<COPIED> *t, uint64_t best) {
    struct team_shared *s = block_memory();
    const float top_p = s->params.top_p, min_p = s->params.min_p;
    const uint32_t top_k = s->params.top_k > 0 ? (uint32_t)s->params.top_k : 0;
    if (threadIdx.x == 0) {
        t->best = ranked_value(best);
        t->temperature = s->params.temperature;
        t->floor = top_k ? -87.0f : -27.8f; /* below, the mass is 0: only counts see it */
        t->min_e = top_p < 1 ? 0 : min_p;
    }
    histogram_first(t);
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
            uint64_t before_end = total;  /* mass that the histogram knows */
            if (min_p > 0 && top_p < 1) { /* the mass is another one now: of the prefix alone, and without what min_p takes away */
                __syncthreads();
                if (threadIdx.x == 0) t->min_e = min_p, t->cut = end.key;
                histogram_again(t, LEVEL_STEPS, {0, end.key}, 0);
                before_end = s->mass[LEVEL_STEPS][BINS - 1];
                total = before_end + end.rank * weight_of(t, end.key);
            }
            if (total == 0) return ranked_token(best); /* min_p above 1 */
            target = (__umul64hi(total, s->params.u) << 40 | total * s->params.u >> 24) + 1;
            if (target > before_end) { /* among those of the last key */
                const uint64_t weight = weight_of(t, end.key);
                end.rank = (uint32_t)((target - before_end + weight - 1) / weight);
                end.token = NO_TOKEN;
                break;
            }
        }
        end = prefix_end(t, which, target);
        total = end.mass_before + end.rank * weight_of(t, end.key);
    }
    return end.token != NO_TOKEN ? end.token : token_of(t, end.key, end.rank);
}
