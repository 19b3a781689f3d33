/* Scores of cached slots on the device (kernels/score.h; the oracle is kernels/score.c): passes over lanes, and what looks at keys or values alone; windows of queries are in
 * score_window.cu. Called by the engine's thread between steps, runs on cuda->stream. Owns nothing: scratch is struct score_device's. Every sum runs in an order that depends on the lane
 * alone. Does not fold heads or choose. */
#include "kernels/cuda/services.h"

/* ---- keys or values alone ---- */

static __device__ inline float reduce_warp(float x) {
    for (int other = WARP / 2; other > 0; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
    return x;
}

/* A row of K or V, element lane + 32 i in x[i]; returns the sum of squares. Keys of q8 are transformed, which changes neither lengths nor angles between them. */
template <bool CODES>
static __device__ inline float load_row(const struct device_pool &pool, const struct block_numbers &from, int which, uint32_t slot, uint32_t lane,
                                        float x[ROW_ELEMENTS]) {
    float sum = 0;
#pragma unroll
    for (uint32_t i = 0; i < ROW_ELEMENTS; i++) {
        x[i] = lane + i * WARP < pool.d ? pool_element<CODES>(pool, from, which, slot, lane + i * WARP) : 0;
        sum = fmaf(x[i], x[i], sum);
    }
    return reduce_warp(sum);
}

struct plain_pass {
    struct lane_jobs jobs;
    float *partials; /* [n_splits][d]: sums of unit keys */
    float *means;    /* [n_jobs][d + 4]: their mean, then its length */
    float *numbers;
};

/* Grid: splits. */
template <bool CODES> static __global__ void __launch_bounds__(THREADS) unit_keys_kernel(const struct plain_pass pass) {
    __shared__ float sums[WARPS][HEAD_DIM_MAX];
    const struct device_pool &pool = pass.jobs.pool;
    const struct lane_job job = pass.jobs.job[job_of(pass.jobs, blockIdx.x)];
    const uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, index = (blockIdx.x - job.first_split) * WARPS + warp;
    const uint32_t first = index * BLOCK_TOKENS, n = first >= job.n_slots                 ? 0
                                                     : job.n_slots - first < BLOCK_TOKENS ? job.n_slots - first
                                                                                          : BLOCK_TOKENS;
    const struct block_numbers from = n ? numbers_of_job(pass.jobs, job, index) : (struct block_numbers){};
    float sum[ROW_ELEMENTS] = {};
#pragma unroll 4
    for (uint32_t slot = 0; slot < n; slot++) {
        float x[ROW_ELEMENTS];
        const float length = sqrtf(load_row<CODES>(pool, from, WHICH_K, slot, lane, x));
        for (uint32_t i = 0; i < ROW_ELEMENTS; i++) sum[i] += length > 0 ? x[i] / length : 0;
    }
    for (uint32_t i = 0; i < ROW_ELEMENTS; i++) sums[warp][lane + i * WARP] = sum[i];
    __syncthreads();
    if (threadIdx.x >= pool.d) return;
    float total = 0;
    for (int w = 0; w < WARPS; w++) total += sums[w][threadIdx.x];
    pass.partials[(size_t)blockIdx.x * pool.d + threadIdx.x] = total;
}

/* Grid: jobs; a thread a dim. */
static __global__ void __launch_bounds__(HEAD_DIM_MAX) mean_key_kernel(const struct plain_pass pass) {
    __shared__ double squares[HEAD_DIM_MAX];
    const struct lane_job job = pass.jobs.job[blockIdx.x];
    const uint32_t d = pass.jobs.pool.d, i = threadIdx.x;
    float *mean = pass.means + (size_t)blockIdx.x * (d + 4);
    double sum = 0;
    for (uint32_t split = 0; i < d && split < splits_of(job.n_slots); split++)
        sum += (double)pass.partials[(size_t)(job.first_split + split) * d + i];
    sum /= job.n_slots;
    squares[i] = i < d ? sum * sum : 0;
    if (i < d) mean[i] = (float)sum;
    __syncthreads();
    if (i > 0) return;
    double length = 0;
    for (int j = 0; j < HEAD_DIM_MAX; j++) length += squares[j];
    mean[d] = (float)sqrt(length);
}

/* Grid: splits; a warp a block. */
template <bool CODES> static __global__ void __launch_bounds__(THREADS) plain_kernel(const struct plain_pass pass, enum score_kind kind) {
    const struct device_pool &pool = pass.jobs.pool;
    const uint32_t job_index = job_of(pass.jobs, blockIdx.x);
    const struct lane_job job = pass.jobs.job[job_index];
    const uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, index = (blockIdx.x - job.first_split) * WARPS + warp;
    const uint32_t first = index * BLOCK_TOKENS;
    if (first >= job.n_slots) return;
    const uint32_t n = job.n_slots - first < BLOCK_TOKENS ? job.n_slots - first : BLOCK_TOKENS, block = pass.jobs.ids[job.first_id + index];
    float *out = pass.numbers + job.slots_before + first, mine = 0;
    if (kind == SCORE_ACCUMULATED) {
        if (lane < n) out[lane] = (float)((double)pool.accumulated[(size_t)block * BLOCK_TOKENS + lane] / SCORE_ACCUMULATED_ONE);
        return;
    }
    const struct block_numbers from = numbers_of_job(pass.jobs, job, index);
    const float *mean = pass.means + (size_t)job_index * (pool.d + 4);
    float m[ROW_ELEMENTS] = {}, mean_length = 0;
    if (kind == SCORE_KEYDIFF) {
        for (uint32_t i = 0; i < ROW_ELEMENTS; i++) m[i] = lane + i * WARP < pool.d ? mean[lane + i * WARP] : 0;
        mean_length = mean[pool.d];
    }
#pragma unroll 4
    for (uint32_t slot = 0; slot < n; slot++) {
        float x[ROW_ELEMENTS], dot = 0, length = sqrtf(load_row<CODES>(pool, from, kind == SCORE_KEYDIFF ? WHICH_K : WHICH_V, slot, lane, x));
        if (kind == SCORE_KEYDIFF) {
            for (uint32_t i = 0; i < ROW_ELEMENTS; i++) dot = fmaf(x[i], m[i], dot);
            dot = reduce_warp(dot);
            length *= mean_length;
            length = length > 0 ? -dot / length : 0;
        }
        if (lane == slot) mine = length;
    }
    if (lane < n) out[lane] = mine;
}

/* ---- the host's side ---- */

static struct work_need need_of(const struct cuda *cuda, enum score_kind kind, uint32_t n_window) {
    const size_t d = cuda->program->head_dim;
    if (score_per_query_head(kind)) return window_need(cuda, kind, n_window);
    if (kind == SCORE_KEYDIFF) return (struct work_need){0, (d + 4) * sizeof(float), d * sizeof(float)};
    return (struct work_need){0, 0, 0};
}

void score_sizes(const struct cuda *cuda, uint32_t lane_slots, size_t *least_numbers, size_t *least_work) {
    *least_numbers = ((size_t)cuda->group + 1) * lane_slots * sizeof(float); /* and the values' lengths */
    *least_work = 0;
    for (int kind = 0; kind < SCORE_KINDS; kind++) {
        struct work_need need = need_of(cuda, (enum score_kind)kind, cuda->limits.ring_rows);
        size_t bytes = need.fixed + need.per_job + need.per_split * splits_of(lane_slots);
        if (bytes > *least_work) *least_work = bytes;
    }
}

static void plain_score(struct cuda *cuda, const struct score_request *request, const struct lane_jobs *jobs, float *numbers) {
    const struct work_need need = need_of(cuda, request->kind, request->n_window);
    struct plain_pass pass = {};
    pass.jobs = *jobs;
    pass.numbers = numbers;
    pass.means = (float *)(void *)cuda->score->work;
    pass.partials = (float *)(void *)(cuda->score->work + jobs->n_jobs * need.per_job);
    const bool codes = cuda->pool.bits > 0;
    if (request->kind == SCORE_KEYDIFF) {
        launch(codes ? unit_keys_kernel<true> : unit_keys_kernel<false>, jobs->n_splits, THREADS, 0, cuda->stream, pass);
        launch(mean_key_kernel, jobs->n_jobs, HEAD_DIM_MAX, 0, cuda->stream, pass);
    }
    launch(codes ? plain_kernel<true> : plain_kernel<false>, jobs->n_splits, THREADS, 0, cuda->stream, pass, request->kind);
    CUDA_CHECK(cudaGetLastError());
}

struct work_need score_need(const struct cuda *cuda, const struct score_request *request) {
    CHECK(request->kind < SCORE_KINDS && (request->kind != SCORE_ACCUMULATED || cuda->pool.accumulated));
    if (score_per_query_head(request->kind)) {
        CHECK(request->ring >= 1 && request->ring <= cuda->limits.n_rings && request->n_window <= cuda->limits.ring_rows);
        CHECK((int64_t)request->last_position + 1 >= (int64_t)request->n_window);
    }
    return need_of(cuda, request->kind, request->n_window);
}

struct pass_plan plan_pass(const struct cuda *cuda, const uint32_t *lane_tokens, uint32_t first, uint32_t end, uint32_t lanes_each, uint32_t per_slot,
                           struct work_need need) {
    const struct score_device *score = cuda->score;
    struct pass_plan plan = {}, more = {};
    for (uint32_t lane = first; lane < end; lane++) {
        const uint32_t n = lane_tokens[lane];
        CHECK(n <= score->lane_slots);
        more.n_jobs += n > 0;
        more.n_splits += splits_of(n);
        more.n_ids += blocks_of(n);
        more.n_slots += n;
        more.end = lane + 1;
        const bool fits = more.n_slots * per_slot <= score->n_numbers &&
                          need.fixed + more.n_jobs * need.per_job + more.n_splits * need.per_split <= score->work_bytes &&
                          more.n_jobs * sizeof(struct lane_job) + more.n_ids * sizeof(uint32_t) <= score->stage_bytes;
        if (!fits) break;
        if ((lane + 1 - first) % lanes_each == 0) plan = more;
    }
    CHECK(plan.end > first);
    return plan;
}

struct lane_jobs stage_pass(struct cuda *cuda, const struct score_request *request, uint32_t first, const struct pass_plan *plan) {
    const size_t bytes = plan->n_jobs * sizeof(struct lane_job) + plan->n_ids * sizeof(uint32_t);
    struct lane_job *device, *job = (struct lane_job *)stage_take(cuda, bytes, &device);
    uint32_t *ids = (uint32_t *)(void *)(job + plan->n_jobs), n_ids = 0, n_splits = 0;
    struct lane_jobs jobs = {.pool = cuda->pool,
                             .job = device,
                             .ids = (const uint32_t *)(const void *)(device + plan->n_jobs),
                             .n_jobs = plan->n_jobs,
                             .n_splits = plan->n_splits,
                             .last_position = request->last_position};
    size_t n_slots = 0;
    for (uint32_t lane = first; lane < plan->end; lane++) {
        const uint32_t n = request->lane_tokens[lane];
        if (n == 0) continue;
        *job++ = (struct lane_job){.lane = lane, .n_slots = n, .first_id = n_ids, .first_split = n_splits, .slots_before = n_slots};
        stage_ids(cuda, request->block_ids + request->lane_first[lane], blocks_of(n), ids + n_ids);
        n_ids += blocks_of(n);
        n_splits += splits_of(n);
        n_slots += n;
    }
    stage_send(cuda, job - plan->n_jobs, bytes);
    return jobs;
}

void score_pass(struct cuda *cuda, const struct score_request *request, const struct lane_jobs *jobs, float *numbers) {
    if (score_per_query_head(request->kind))
        window_score(cuda, request, jobs, numbers);
    else
        plain_score(cuda, request, jobs, numbers);
}

/* Lanes that lie one after another in `scores` come in one piece. */
static void return_pass(struct cuda *cuda, const struct score_request *request, uint32_t first, uint32_t end, uint32_t per_slot, float *scores) {
    size_t from = 0;
    for (uint32_t lane = first; lane < end;) {
        const size_t to = request->offset[lane];
        size_t n = 0;
        while (lane < end && request->offset[lane] == to + n) n += (size_t)request->lane_tokens[lane++] * per_slot;
        if (n > 0) read_back(cuda, scores + to, cuda->score->numbers + from, n * sizeof *scores);
        from += n;
    }
}

void cuda_score(struct backend *backend, const struct score_request *request, float *scores) {
    struct cuda *cuda = cuda_of(backend);
    const uint32_t per_slot = score_per_query_head(request->kind) ? cuda->group : 1;
    const struct work_need need = score_need(cuda, request);
    CHECK(request->n_lanes <= cuda->n_lanes && request->first_lane <= cuda->n_lanes - request->n_lanes);
    for (uint32_t first = request->first_lane, last = first + request->n_lanes; first < last;) {
        const struct pass_plan plan = plan_pass(cuda, request->lane_tokens, first, last, 1, per_slot, need);
        if (plan.n_jobs > 0) {
            const struct lane_jobs jobs = stage_pass(cuda, request, first, &plan);
            score_pass(cuda, request, &jobs, cuda->score->numbers);
            return_pass(cuda, request, first, plan.end, per_slot, scores);
        }
        first = plan.end;
    }
}
