/* Which cached slots stay, on the device (kernels/select.h; the oracle is kernels/select.c: the same keys from the same scores, bit for bit, and the same choice from the same keys). Called by
 * the engine's thread between steps, or behind one, runs on cuda->stream. Keys and lists stay in their place of struct score_device from one call to the next; counts are on their way to the host
 * until cuda_settle, which waits once for those of all places. Scores and lists that are asked for are waited for at once: they are large, and for tests and rare policies.
 * Sums of counts are integers, so that their order does not matter. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/services.h"

/* ---- keys ---- */

struct fold_pass {
    struct lane_jobs jobs;
    const float *raw;   /* of a job: [group or 1][n_slots] */
    const float *norms; /* of a job: [n_slots] */
    enum rank_source source;
    enum rank_fold fold;
    enum rank_pooling pooling;
    uint64_t seed;
    uint32_t pooling_kernel, group, value_power, n_kv_heads; /* group: query heads that the kind has numbers for, 1 if it has one a slot */
    bool per_query_head;
    int64_t protect_below, protect_above;
    /* Of the pass's slots, both at the same place: scores become keys. */
    float *scores;
    uint32_t *keys;
    uint32_t *n_protected; /* [n_lanes] */
    uint32_t *n_joined;    /* [n_lanes] KIVI: slots in blocks that the row at next reads as codes, which stay or go together; else NULL */
    int32_t next;
};

/* Slot i of n: in the order of the oracle's sums. */
static __device__ float pooled(const struct fold_pass &pass, const float *in, uint32_t n, uint32_t i) {
    if (pass.pooling == RANK_POOL_NONE || pass.pooling_kernel <= 1) return in[i];
    const uint32_t half = pass.pooling_kernel / 2, first = i < half ? 0 : i - half, last = i + half < n ? i + half : n - 1;
    float sum = 0, max = -3.402823466e+38f;
    for (uint32_t j = first; j <= last; j++) {
        sum = __fadd_rn(sum, in[j]);
        max = in[j] > max ? in[j] : max;
    }
    return pass.pooling == RANK_POOL_MAX ? max : __fdiv_rn(sum, (float)pass.pooling_kernel);
}

/* The mean over the query heads at slot i. */
static __device__ float mean_of(const struct fold_pass &pass, const float *raw, uint32_t n, uint32_t i) {
    float sum = 0;
    for (uint32_t h = 0; h < pass.group; h++) sum = __fadd_rn(sum, raw[(size_t)h * n + i]);
    return __fdiv_rn(sum, (float)pass.group);
}

static __device__ float folded(const struct fold_pass &pass, const float *raw, uint32_t n, uint32_t i) {
    if (!pass.per_query_head) return raw[i];
    if (pass.fold == RANK_FOLD_MEAN) return mean_of(pass, raw, n, i);
    float sum = 0;
    if (pass.fold == RANK_FOLD_SUM_OF_POOLED) {
        for (uint32_t h = 0; h < pass.group; h++) sum = __fadd_rn(sum, pooled(pass, raw + (size_t)h * n, n, i));
        return sum;
    }
    if (pass.pooling == RANK_POOL_NONE || pass.pooling_kernel <= 1) return mean_of(pass, raw, n, i);
    const uint32_t half = pass.pooling_kernel / 2, first = i < half ? 0 : i - half, last = i + half < n ? i + half : n - 1;
    float max = -3.402823466e+38f;
    for (uint32_t j = first; j <= last; j++) {
        const float mean = mean_of(pass, raw, n, j);
        sum = __fadd_rn(sum, mean);
        max = mean > max ? mean : max;
    }
    return pass.pooling == RANK_POOL_MAX ? max : __fdiv_rn(sum, (float)pass.pooling_kernel);
}

/* base/random.h's, which only the host can call. */
static __device__ uint64_t mixed(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}
static __device__ float random_of(uint64_t seed, uint32_t position) {
    const uint64_t bits = mixed(mixed(mixed(mixed(seed) ^ position)));
    return (float)(bits >> 40) * 0x1p-24f;
}

static __device__ inline int32_t position_of(const struct lane_jobs &jobs, const struct lane_job &job, uint32_t slot) {
    return jobs.pool.positions[(size_t)jobs.ids[job.first_id + slot / BLOCK_TOKENS] * BLOCK_TOKENS + slot % BLOCK_TOKENS];
}

static __device__ float score_of(const struct fold_pass &pass, const struct lane_job &job, uint32_t slot) {
    if (pass.source != RANK_SCORES) {
        const int32_t position = position_of(pass.jobs, job, slot);
        return pass.source == RANK_POSITIONS ? (float)position : random_of(pass.seed, (uint32_t)position);
    }
    const float score = folded(pass, pass.raw + job.slots_before * pass.group, job.n_slots, slot);
    if (pass.value_power == 0) return score;
    const float norm = pass.norms[job.slots_before + slot];
    return __fmul_rn(score, pass.value_power == 2 ? __fmul_rn(norm, norm) : norm);
}

/* Slots of a block that is codes get one key, the highest among them (select_join); a warp has a block. */
static __device__ uint32_t joined_key(const struct fold_pass &pass, const struct lane_job &job, uint32_t slot, uint32_t key) {
    const uint32_t end = slot / BLOCK_TOKENS * BLOCK_TOKENS + BLOCK_TOKENS;
    if (end > job.n_slots || !kivi_reads_codes(position_of(pass.jobs, job, end - 1), pass.next)) return key;
    for (int other = WARP / 2; other > 0; other /= 2) key = max(key, __shfl_xor_sync(0xffffffffu, key, other));
    if (slot % BLOCK_TOKENS == 0) atomicAdd(pass.n_joined + job.lane, (uint32_t)BLOCK_TOKENS);
    return key;
}

/* The key of a slot that has this score. All threads of the block, also those behind the lane's last slot. */
static __device__ void put_key(const struct fold_pass &pass, const struct lane_job &job, uint32_t slot, float score) {
    bool stays = false;
    if (slot < job.n_slots) {
        const int32_t position = position_of(pass.jobs, job, slot);
        stays = position < pass.protect_below || position > pass.protect_above;
        uint32_t key = stays ? RANK_PROTECTED : select_key(score);
        if (pass.n_joined) key = joined_key(pass, job, slot, key);
        pass.keys[job.slots_before + slot] = key;
        stays = key == RANK_PROTECTED;
    }
    const int count = __syncthreads_count(stays);
    if (threadIdx.x == 0 && count > 0) atomicAdd(pass.n_protected + job.lane, (uint32_t)count);
}

/* Grid: splits; a thread a slot. KEYS: scores are wanted for keys alone, each slot's for its own. */
template <bool KEYS> static __global__ void __launch_bounds__(THREADS) fold_kernel(const struct fold_pass pass) {
    const struct lane_job job = pass.jobs.job[job_of(pass.jobs, blockIdx.x)];
    const uint32_t slot = (blockIdx.x - job.first_split) * SPLIT_SLOTS + threadIdx.x;
    const float score = slot < job.n_slots ? score_of(pass, job, slot) : 0;
    if constexpr (KEYS)
        put_key(pass, job, slot, score);
    else if (slot < job.n_slots)
        pass.scores[job.slots_before + slot] = score;
}

/* Grid: jobs. The first lane of a layer, where no lane of it is empty and all hold the same positions, averages all of them. */
static __global__ void __launch_bounds__(THREADS) layer_mean_kernel(const struct fold_pass pass) {
    const uint32_t heads = pass.n_kv_heads, at = blockIdx.x;
    const struct lane_job job = pass.jobs.job[at];
    if (job.lane % heads != 0 || at + heads > pass.jobs.n_jobs || pass.jobs.job[at + heads - 1].lane != job.lane + heads - 1) return;
    bool same = true;
    for (uint32_t h = 1; h < heads; h++) {
        const struct lane_job other = pass.jobs.job[at + h];
        if (other.n_slots != job.n_slots) {
            same = false;
            break;
        }
        for (uint32_t i = threadIdx.x; i < job.n_slots; i += THREADS)
            same = same && position_of(pass.jobs, job, i) == position_of(pass.jobs, other, i);
    }
    if (!__syncthreads_and(same)) return;
    float *scores = pass.scores + job.slots_before;
    for (uint32_t i = threadIdx.x; i < job.n_slots; i += THREADS) {
        float sum = 0;
        for (uint32_t h = 0; h < heads; h++) sum = __fadd_rn(sum, scores[(size_t)h * job.n_slots + i]);
        sum = __fdiv_rn(sum, (float)heads);
        for (uint32_t h = 0; h < heads; h++) scores[(size_t)h * job.n_slots + i] = sum;
    }
}

/* Grid: splits; a thread a slot. */
static __global__ void __launch_bounds__(THREADS) key_kernel(const struct fold_pass pass) {
    const struct lane_job job = pass.jobs.job[job_of(pass.jobs, blockIdx.x)];
    const uint32_t slot = (blockIdx.x - job.first_split) * SPLIT_SLOTS + threadIdx.x;
    put_key(pass, job, slot, slot < job.n_slots ? pass.scores[job.slots_before + slot] : 0);
}

/* ---- answers ---- */

static struct ranked_device *ranked_at(struct cuda *cuda, uint32_t place) {
    CHECK(place < cuda->score->rank_places);
    struct ranked_device *ranked = &cuda->score->ranked[place];
    CHECK(ranked->answer == ANSWER_NONE);
    return ranked;
}

static void answers(struct ranked_device *ranked, enum ranked_answer answer, void *to) {
    ranked->answer = answer;
    ranked->to = to;
}

static void take_answer(struct ranked_device *ranked, uint32_t n_lanes) {
    static_assert(sizeof(struct cut_lane) == sizeof(uint2) && sizeof(struct kept_lane) == sizeof(uint2), "two counts a lane");
    if (ranked->answer == ANSWER_PROTECTED) memcpy(ranked->to, ranked->counts, n_lanes * sizeof(uint32_t));
    if (ranked->answer == ANSWER_CUT || ranked->answer == ANSWER_KEPT) memcpy(ranked->to, ranked->counts, n_lanes * sizeof(uint2));
    for (uint32_t lane = 0; ranked->answer == ANSWER_KEPT && lane < n_lanes; lane++)
        ranked->n_kept[lane] = ((const struct kept_lane *)ranked->to)[lane].n_keep;
    ranked->answer = ANSWER_NONE;
}

void cuda_settle(struct backend *backend) {
    struct cuda *cuda = cuda_of(backend);
    struct score_device *score = cuda->score;
    bool any = false;
    for (uint32_t place = 0; place < score->rank_places; place++) any = any || score->ranked[place].answer != ANSWER_NONE;
    if (!any) return;
    stage_wait(cuda);
    for (uint32_t place = 0; place < score->rank_places; place++) take_answer(&score->ranked[place], cuda->n_lanes);
}

/* ---- rank ---- */

static void rank_pass(struct cuda *cuda, const struct ranked_device *ranked, const struct rank_request *request, uint32_t first,
                      const struct pass_plan *plan, float *scores) {
    struct score_device *score = cuda->score;
    const bool scored = request->source == RANK_SCORES, at_once = !request->layer_mean && !scores;
    const struct lane_jobs jobs = stage_pass(cuda, &request->score, first, plan);
    struct fold_pass pass = {};
    pass.jobs = jobs;
    pass.source = request->source, pass.fold = request->fold, pass.pooling = request->pooling;
    pass.seed = request->seed;
    pass.per_query_head = score_per_query_head(request->score.kind);
    pass.pooling_kernel = request->pooling_kernel, pass.group = pass.per_query_head ? cuda->group : 1;
    pass.value_power = request->value_power, pass.n_kv_heads = cuda->program->n_kv_heads;
    pass.protect_below = request->protect_below, pass.protect_above = request->protect_above;
    pass.raw = score->numbers;
    pass.norms = score->numbers + plan->n_slots * pass.group;
    pass.scores = (float *)(void *)(ranked->keys + ranked->lane_at[first]);
    pass.keys = ranked->keys + ranked->lane_at[first];
    pass.n_protected = ranked->n_protected;
    pass.n_joined = ranked->n_joined;
    pass.next = request->score.last_position + 1;
    if (scored) {
        score_pass(cuda, &request->score, &jobs, score->numbers);
        if (request->value_power > 0) {
            struct score_request norms = request->score;
            norms.kind = SCORE_VALUE_NORM;
            score_pass(cuda, &norms, &jobs, score->numbers + plan->n_slots * pass.group);
        }
    }
    launch(at_once ? fold_kernel<true> : fold_kernel<false>, jobs.n_splits, THREADS, 0, cuda->stream, pass);
    if (request->layer_mean) launch(layer_mean_kernel, jobs.n_jobs, THREADS, 0, cuda->stream, pass);
    CUDA_CHECK(cudaGetLastError());
    if (scores) read_back(cuda, scores + ranked->lane_at[first], pass.scores, plan->n_slots * sizeof *scores);
    /* The pass's lists are still there: what waiting set free is written again only by copies that come later on the stream. */
    if (!at_once) launch(key_kernel, jobs.n_splits, THREADS, 0, cuda->stream, pass);
    CUDA_CHECK(cudaGetLastError());
}

void cuda_rank(struct backend *backend, uint32_t place, const struct rank_request *request, uint32_t *n_protected, float *scores) {
    struct cuda *cuda = cuda_of(backend);
    struct ranked_device *ranked = ranked_at(cuda, place);
    const bool scored = request->source == RANK_SCORES;
    const uint32_t per_slot = !scored ? 0 : (score_per_query_head(request->score.kind) ? cuda->group : 1) + (request->value_power > 0);
    const struct work_need need = scored ? score_need(cuda, &request->score) : (struct work_need){0, 0, 0};
    size_t n_slots = 0;
    CHECK(request->value_power <= 2);
    for (uint32_t lane = 0; lane < cuda->n_lanes; lane++) {
        CHECK(request->score.lane_tokens[lane] <= cuda->score->rank_slots);
        ranked->n_slots[lane] = request->score.lane_tokens[lane];
        ranked->lane_at[lane] = n_slots;
        n_slots += request->score.lane_tokens[lane];
    }
    CUDA_CHECK(cudaMemsetAsync(ranked->n_protected, 0, cuda->n_lanes * sizeof *ranked->n_protected, cuda->stream));
    if (ranked->n_joined) CUDA_CHECK(cudaMemsetAsync(ranked->n_joined, 0, cuda->n_lanes * sizeof *ranked->n_joined, cuda->stream));
    const uint32_t each = request->layer_mean ? cuda->program->n_kv_heads : 1;
    for (uint32_t first = 0; first < cuda->n_lanes;) {
        const struct pass_plan plan = plan_pass(cuda, request->score.lane_tokens, first, cuda->n_lanes, each, per_slot, need);
        if (plan.n_jobs > 0) rank_pass(cuda, ranked, request, first, &plan, scores);
        first = plan.end;
    }
    if (!n_protected) return;
    CUDA_CHECK(cudaMemcpyAsync(ranked->counts, ranked->n_protected, cuda->n_lanes * sizeof *n_protected, cudaMemcpyDeviceToHost, cuda->stream));
    answers(ranked, ANSWER_PROTECTED, n_protected);
}

/* ---- counting keys by a byte ---- */

/* A block of threads has a lane. There are fewer lanes than a device has warps at a time, and the longest one decides: as many threads as a block may have. */
enum { CHOICE_THREADS = 1024, CHOICE_WARPS = CHOICE_THREADS / WARP, BYTES = 256, COUNTERS = 8 };

struct ranked_lane {
    const uint32_t *keys;
    uint32_t n_slots;
};

/* Inclusive sums of one number a thread, in the order of the warp's threads. */
static __device__ uint32_t scan_warp(uint32_t x) {
    const uint32_t lane = threadIdx.x % WARP;
    for (uint32_t distance = 1; distance < WARP; distance *= 2) {
        const uint32_t y = __shfl_up_sync(0xffffffffu, x, distance);
        if (lane >= distance) x += y;
    }
    return x;
}

/* The same of all threads; *total: of all. */
static __device__ uint32_t scan_threads(uint32_t x, uint32_t *shared, uint32_t *total) {
    static_assert(CHOICE_WARPS == WARP, "a warp has a thread for each warp's sum");
    const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    x = scan_warp(x);
    __syncthreads(); /* what was read of the sums before */
    if (lane == WARP - 1) shared[warp] = x;
    __syncthreads();
    const uint32_t sums = scan_warp(shared[lane]), before = __shfl_sync(0xffffffffu, sums, (int)((warp + WARP - 1) % WARP));
    *total = __shfl_sync(0xffffffffu, sums, WARP - 1);
    return warp > 0 ? x + before : x;
}

struct byte_counts {
    uint32_t counts[COUNTERS][BYTES]; /* warps take turns: most keys share their high bytes */
    uint32_t sums[CHOICE_WARPS];
};

/* Thread t < BYTES: how many keys of the lane begin with `prefix` (under `mask`) and have a byte <= t at `shift`. Protected keys count only if `all`. */
static __device__ uint32_t count_bytes(const struct ranked_lane &lane, uint32_t prefix, uint32_t mask, int shift, bool all,
                                       struct byte_counts *shared) {
    const uint32_t t = threadIdx.x;
    __syncthreads();
    for (uint32_t i = t; i < COUNTERS * BYTES; i += CHOICE_THREADS) shared->counts[i / BYTES][i % BYTES] = 0;
    __syncthreads();
    for (uint32_t i = t; i < lane.n_slots; i += CHOICE_THREADS) {
        const uint32_t key = lane.keys[i];
        if ((all || key != RANK_PROTECTED) && (key & mask) == prefix) atomicAdd(&shared->counts[t / WARP % COUNTERS][key >> shift & (BYTES - 1)], 1u);
    }
    __syncthreads();
    uint32_t count = 0, total;
    for (uint32_t c = 0; t < BYTES && c < COUNTERS; c++) count += shared->counts[c][t];
    return scan_threads(count, shared->sums, &total);
}

/* ---- cut ---- */

struct cut_pass {
    const uint32_t *keys, *n_protected, *needed; /* needed [groups] */
    const uint2 *lanes;                          /* [n_lanes] where its keys begin, how many */
    uint32_t lanes_each, unit;
    uint32_t *below;      /* [n_lanes] slots below the prefix found so far */
    uint32_t *counted;    /* [n_lanes][256] inclusive counts of the round before */
    uint32_t *freed;      /* [groups][4][256] units that come free with all keys up to a byte, by round; begins at 0 */
    struct cut_lane *out; /* [n_lanes] pinned memory of the host, or on the device */
};

/* Grid: lanes. Round r: takes over the byte that round r - 1 found, counts the next one. Round 4 only takes over. */
static __global__ void __launch_bounds__(CHOICE_THREADS) cut_kernel(const struct cut_pass pass, int round) {
    __shared__ struct byte_counts shared;
    const uint32_t lane = blockIdx.x, group = lane / pass.lanes_each, needed = pass.needed[group], t = threadIdx.x;
    if (needed == 0) {
        if (round == 4 && t == 0) pass.out[lane] = {0, 0};
        return;
    }
    const uint32_t *freed = pass.freed + (size_t)group * 4 * BYTES;
    uint32_t *counted = pass.counted + (size_t)lane * BYTES;
    uint32_t prefix = 0, mask = 0, byte = 0;
    for (int r = 0; r < round; r++) { /* the least byte that frees enough; sums do not fall from byte to byte */
        byte = (uint32_t)__syncthreads_count(t < BYTES && freed[r * BYTES + t] < needed);
        if (byte > BYTES - 1) byte = BYTES - 1;
        prefix |= byte << (24 - 8 * r);
        mask |= (BYTES - 1u) << (24 - 8 * r);
    }
    const uint32_t before = round > 0 && byte > 0 ? counted[byte - 1] : 0, upto = round > 0 ? counted[byte] : 0;
    const uint32_t below = (round > 0 ? pass.below[lane] : 0) + before;
    __syncthreads(); /* all have read the round before */
    if (t == 0) pass.below[lane] = below;
    if (round == 4) {
        if (t == 0) pass.out[lane] = {below, upto - before};
        return;
    }
    const struct ranked_lane ranked = {pass.keys + pass.lanes[lane].x, pass.lanes[lane].y};
    const uint32_t count = count_bytes(ranked, prefix, mask, 24 - 8 * round, false, &shared);
    if (t >= BYTES) return;
    counted[t] = count;
    const uint32_t units = select_units(ranked.n_slots, pass.n_protected[lane], pass.unit, below + count);
    if (units > 0) atomicAdd(pass.freed + ((size_t)group * 4 + (uint32_t)round) * BYTES + t, units);
}

static uint2 *stage_lanes(const struct cuda *cuda, const struct ranked_device *ranked, uint2 *lanes) {
    for (uint32_t lane = 0; lane < cuda->n_lanes; lane++) lanes[lane] = make_uint2((uint32_t)ranked->lane_at[lane], ranked->n_slots[lane]);
    return lanes + cuda->n_lanes;
}

/* What cut and keep_units send: lanes, then `needed` of each group. */
static struct cut_pass begin_cut(struct cuda *cuda, const struct ranked_device *ranked, const struct cut_request *request) {
    const struct score_device *score = cuda->score;
    CHECK(request->lanes_each > 0 && cuda->n_lanes % request->lanes_each == 0 && request->unit > 0);
    const uint32_t groups = cuda->n_lanes / request->lanes_each;
    const size_t bytes = cuda->n_lanes * sizeof(uint2) + groups * sizeof(uint32_t);
    struct cut_pass pass = {};
    uint2 *host = (uint2 *)stage_take(cuda, bytes, &pass.lanes);
    memcpy(stage_lanes(cuda, ranked, host), request->needed, groups * sizeof(uint32_t));
    stage_send(cuda, host, bytes);
    pass.keys = ranked->keys, pass.n_protected = ranked->n_protected;
    pass.needed = (const uint32_t *)(const void *)(pass.lanes + cuda->n_lanes);
    pass.lanes_each = request->lanes_each, pass.unit = request->unit;
    pass.below = score->cut_below, pass.counted = score->cut_counted, pass.freed = score->cut_freed;
    CUDA_CHECK(cudaMemsetAsync(pass.freed, 0, (size_t)groups * 4 * BYTES * sizeof(uint32_t), cuda->stream));
    return pass;
}

static void run_cut(struct cuda *cuda, const struct cut_pass *pass) {
    for (int round = 0; round <= 4; round++) launch(cut_kernel, cuda->n_lanes, CHOICE_THREADS, 0, cuda->stream, *pass, round);
    CUDA_CHECK(cudaGetLastError());
}

void cuda_cut(struct backend *backend, uint32_t place, const struct cut_request *request, struct cut_lane *lanes) {
    struct cuda *cuda = cuda_of(backend);
    struct ranked_device *ranked = ranked_at(cuda, place);
    struct cut_pass pass = begin_cut(cuda, ranked, request);
    pass.out = (struct cut_lane *)(void *)ranked->counts;
    run_cut(cuda, &pass);
    answers(ranked, ANSWER_CUT, lanes);
}

/* ---- keep ---- */

struct keep_pass {
    const uint32_t *keys, *n_protected, *evict;
    const uint32_t *n_joined; /* NULL: none */
    const uint2 *lanes;
    uint32_t *kept;
    struct kept_lane *out; /* [n_lanes] pinned memory of the host */
};

/* The key of ascending rank `rank` (< n), how many are below it and how many equal. */
static __device__ uint32_t key_of_rank(const struct ranked_lane &lane, uint32_t rank, uint32_t *below, uint32_t *equal, struct byte_counts *shared) {
    __shared__ uint32_t cumulative[BYTES];
    uint32_t prefix = 0, mask = 0;
    *below = *equal = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        const uint32_t count = count_bytes(lane, prefix, mask, shift, true, shared);
        const uint32_t byte = (uint32_t)__syncthreads_count(threadIdx.x < BYTES && *below + count <= rank);
        if (threadIdx.x < BYTES) cumulative[threadIdx.x] = count;
        __syncthreads();
        const uint32_t before = byte > 0 ? cumulative[byte - 1] : 0;
        *below += before;
        *equal = cumulative[byte] - before;
        prefix |= byte << shift;
        mask |= (BYTES - 1u) << shift;
        __syncthreads();
    }
    return prefix;
}

/* KIVI: of the slots at the threshold the first equal_kept stay, and of those in joined blocks whole blocks: if one cannot, nothing behind it stays either (select_keep_joined). */
static __device__ uint32_t whole_blocks_kept(const struct ranked_lane &lane, uint32_t threshold, uint32_t equal_kept, uint32_t joined) {
    uint32_t n = 0; /* such slots in joined blocks */
    for (uint32_t begin = 0; begin < joined; begin += CHOICE_THREADS) {
        const uint32_t slot = begin + threadIdx.x;
        n += (uint32_t)__syncthreads_count(slot < joined && lane.keys[slot] == threshold);
    }
    return equal_kept < n ? equal_kept / BLOCK_TOKENS * BLOCK_TOKENS : equal_kept;
}

/* Grid: lanes. */
static __global__ void __launch_bounds__(CHOICE_THREADS) keep_kernel(const struct keep_pass pass) {
    __shared__ struct byte_counts shared;
    __shared__ uint32_t first_gone;
    const uint32_t lane = blockIdx.x, t = threadIdx.x;
    const struct ranked_lane ranked = {pass.keys + pass.lanes[lane].x, pass.lanes[lane].y};
    const uint32_t n = ranked.n_slots, evictable = n - pass.n_protected[lane], evict = pass.evict[lane] < evictable ? pass.evict[lane] : evictable;
    uint32_t *kept = pass.kept + pass.lanes[lane].x, threshold = 0, equal_kept = 0, n_above = 0, n_equal = 0;
    if (t == 0) first_gone = n;
    if (evict > 0) {
        uint32_t below, equal;
        threshold = key_of_rank(ranked, evict - 1, &below, &equal, &shared);
        equal_kept = equal - (evict - below); /* the older ones */
        if (pass.n_joined) equal_kept = whole_blocks_kept(ranked, threshold, equal_kept, pass.n_joined[lane]);
    }
    __syncthreads();
    for (uint32_t begin = 0; begin < n; begin += CHOICE_THREADS) {
        const uint32_t slot = begin + t;
        const bool mine = slot < n;
        const uint32_t key = mine ? ranked.keys[slot] : 0;
        const bool above = mine && (evict == 0 || key > threshold), equals = mine && evict > 0 && key == threshold;
        static_assert(CHOICE_THREADS < 1 << 16, "both counts in one sum, a half each");
        const uint32_t own = (uint32_t)above | (uint32_t)equals << 16;
        uint32_t total;
        const uint32_t before = scan_threads(own, shared.sums, &total) - own, equal_before = n_equal + (before >> 16);
        const bool stays = above || (equals && equal_before < equal_kept);
        if (stays) kept[n_above + (before & 0xffff) + min(equal_before, equal_kept)] = slot;
        const uint32_t gone = __ballot_sync(0xffffffffu, mine && !stays);
        if (t % WARP == 0 && gone) atomicMin(&first_gone, slot + (uint32_t)__ffs((int)gone) - 1);
        n_above += total & 0xffff;
        n_equal += total >> 16;
    }
    __syncthreads();
    const uint32_t n_keep = n_above + min(n_equal, equal_kept);
    if (t == 0) pass.out[lane] = {n_keep, first_gone < n_keep ? first_gone : n_keep};
}

static void run_keep(struct cuda *cuda, struct ranked_device *ranked, const uint2 *lanes_there, const uint32_t *evict_there, struct kept_lane *lanes,
                     uint32_t *keep) {
    struct keep_pass pass = {};
    pass.keys = ranked->keys, pass.n_protected = ranked->n_protected, pass.evict = evict_there;
    pass.lanes = lanes_there;
    pass.kept = ranked->kept;
    pass.n_joined = ranked->n_joined;
    pass.out = (struct kept_lane *)(void *)ranked->counts;
    launch(keep_kernel, cuda->n_lanes, CHOICE_THREADS, 0, cuda->stream, pass);
    CUDA_CHECK(cudaGetLastError());
    answers(ranked, ANSWER_KEPT, lanes);
    if (!keep) return;
    const uint32_t last = cuda->n_lanes - 1;
    read_back(cuda, keep, ranked->kept, (ranked->lane_at[last] + ranked->n_slots[last]) * sizeof *keep);
    take_answer(ranked, cuda->n_lanes); /* it is there too */
}

void cuda_keep(struct backend *backend, uint32_t place, const uint32_t *evict, struct kept_lane *lanes, uint32_t *keep) {
    struct cuda *cuda = cuda_of(backend);
    struct ranked_device *ranked = ranked_at(cuda, place);
    const size_t bytes = cuda->n_lanes * (sizeof(uint2) + sizeof(uint32_t));
    const uint2 *lanes_there;
    uint2 *host = (uint2 *)stage_take(cuda, bytes, &lanes_there);
    memcpy(stage_lanes(cuda, ranked, host), evict, cuda->n_lanes * sizeof(uint32_t));
    stage_send(cuda, host, bytes);
    run_keep(cuda, ranked, lanes_there, (const uint32_t *)(const void *)(lanes_there + cuda->n_lanes), lanes, keep);
}

/* ---- units of all lanes together ---- */

struct deal_pass {
    const struct cut_lane *cut; /* [n_lanes] */
    const uint2 *lanes;         /* [n_lanes] */
    uint32_t n_lanes, unit, needed;
    uint32_t *evict; /* [n_lanes] */
};

/* Units that a lane frees at keys below the cut's, and with those at it. */
static __device__ inline uint2 units_of(const struct deal_pass &pass, uint32_t lane) {
    const struct cut_lane cut = pass.cut[lane];
    const uint32_t n = pass.lanes[lane].y;
    return make_uint2(select_units(n, 0, pass.unit, cut.below), select_units(n, 0, pass.unit, cut.below + cut.equal));
}

/* Of all threads: the sum of one number each. */
static __device__ uint32_t sum_threads(uint32_t x, uint32_t *shared) {
    uint32_t total;
    (void)scan_threads(x, shared, &total);
    return total;
}

/* One block. Of the units that cost exactly the cut's key, those that are missing: the j-th ones of all lanes before the next, lanes in order (select.c, deal). */
static __global__ void __launch_bounds__(CHOICE_THREADS) deal_kernel(const struct deal_pass pass) {
    __shared__ uint32_t sums[CHOICE_WARPS];
    const uint32_t t = threadIdx.x;
    uint32_t below = 0, upto = 0, most = 0;
    for (uint32_t lane = t; lane < pass.n_lanes; lane += CHOICE_THREADS) {
        const uint2 units = units_of(pass, lane);
        below += units.x;
        upto += units.y;
        most = max(most, units.y);
    }
    below = sum_threads(below, sums);
    upto = sum_threads(upto, sums);
    const uint32_t left = min(pass.needed - below, upto - below);
    /* All units up to `level` of every lane, the greatest for which there are enough; then one more of the first lanes that have it. Most often one unit costs that much, or all that do go. */
    uint32_t level = UINT32_MAX, dealt = left;
    if (left < upto - below) {
        uint32_t low = 0, high = 0; /* low: enough */
        for (high = 1; __syncthreads_or(most >= high); high *= 2) {}
        dealt = 0;
        while (high - low > 1) {
            const uint32_t middle = low + (high - low) / 2;
            uint32_t count = 0;
            for (uint32_t lane = t; lane < pass.n_lanes; lane += CHOICE_THREADS) {
                const uint2 units = units_of(pass, lane);
                count += max(min(units.y, middle), units.x) - units.x;
            }
            count = sum_threads(count, sums);
            if (count <= left)
                low = middle, dealt = count;
            else
                high = middle;
        }
        level = low;
    }
    for (uint32_t begin = 0; begin < pass.n_lanes; begin += CHOICE_THREADS) {
        const uint32_t lane = begin + t;
        const bool mine = lane < pass.n_lanes;
        const uint2 units = mine ? units_of(pass, lane) : make_uint2(0, 0);
        const bool more = mine && units.x <= level && level < units.y;
        uint32_t total;
        const uint32_t before = scan_threads(more, sums, &total) - more;
        if (mine)
            pass.evict[lane] = select_evictions(pass.lanes[lane].y, pass.unit, max(min(units.y, level), units.x) + (more && dealt + before < left));
        dealt = min(dealt + total, left);
    }
}

void cuda_keep_units(struct backend *backend, uint32_t place, const struct unit_request *request, struct kept_lane *lanes, uint32_t *keep) {
    struct cuda *cuda = cuda_of(backend);
    struct ranked_device *ranked = ranked_at(cuda, place);
    const struct cut_request whole = {.lanes_each = cuda->n_lanes, .unit = request->unit, .needed = &request->needed};
    struct cut_pass cut = begin_cut(cuda, ranked, &whole);
    cut.out = cuda->score->cut;
    run_cut(cuda, &cut);
    struct deal_pass deal = {};
    deal.cut = cut.out, deal.lanes = cut.lanes, deal.n_lanes = cuda->n_lanes;
    deal.unit = request->unit, deal.needed = request->needed;
    deal.evict = cuda->score->dealt;
    launch(deal_kernel, 1, CHOICE_THREADS, 0, cuda->stream, deal);
    run_keep(cuda, ranked, cut.lanes, deal.evict, lanes, keep);
}
