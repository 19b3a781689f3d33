/* What services.cu and score.cu share: room for lists on their way to the device and for results on their way back, scratch of scores, and how a cached element is read. */
#pragma once

#include "kernels/cuda/codes.h"
#include "kernels/cuda/hadamard.h"

#define BLOCK_NONE_READ UINT32_MAX

/* What rank, cut and keep have yet to fill on the host: counts that lie in the place's pinned memory once the stream has been waited for. */
enum ranked_answer { ANSWER_NONE, ANSWER_PROTECTED, ANSWER_CUT, ANSWER_KEPT };

/* Of the sequence that was ranked last in a place (rank.cu). */
struct ranked_device {
    uint32_t *keys, *kept;      /* on the device, [n_lanes * rank_slots]: keys and lists, lane after lane */
    uint32_t *n_protected;      /* on the device, [n_lanes] */
    uint32_t *n_joined;         /* KIVI: on the device, [n_lanes] slots in blocks that stay or go whole; else NULL */
    size_t *lane_at;            /* [n_lanes] where a lane's keys begin */
    uint32_t *n_slots, *n_kept; /* [n_lanes] */
    uint2 *counts;              /* pinned, [n_lanes] */
    enum ranked_answer answer;
    void *to; /* where the answer goes: [n_lanes] of its kind */
};

struct score_device {
    uint32_t lane_slots; /* most slots of a lane */
    /* Lists: filled in pinned memory, copied to the same offset on the device. What was taken stays until the stream has been waited for. */
    uint8_t *stage_host, *stage_device;
    size_t stage_bytes, stage_used;
    uint8_t *back_host; /* pinned; results */
    size_t back_bytes;
    float *block_host; /* pinned; one block as cuda_read_f32 gave it: who reads slots reads neighbours */
    uint32_t block_read; /* which; BLOCK_NONE_READ: none, or the pool has changed since */
    /* Scratch on the device, in the order of the stream. */
    float *numbers; /* scores of some lanes at a time */
    size_t n_numbers;
    uint8_t *work; /* what their kernels leave to one another */
    size_t work_bytes;
    /* Ranking; NULL and no place where limits.rank_slots is 0. */
    uint32_t rank_slots, rank_places;
    struct ranked_device ranked[RANK_PLACES_MAX];
    uint2 *ranked_counts;  /* pinned, [rank_places][n_lanes] */
    uint32_t *cut_below;   /* on the device, [n_lanes]: of one cut at a time, in the order of the stream */
    uint32_t *cut_counted; /* on the device, [n_lanes][256] */
    uint32_t *cut_freed;   /* on the device, [n_lanes][4][256] */
};

/* Room for `bytes` of lists, from its start on the host; their place on the device in *device. At most score->stage_bytes. */
void *stage_take(struct cuda *cuda, size_t bytes, void *device);
/* On the stream: what was written at `host`, as stage_take gave it, goes to the device. */
void stage_send(struct cuda *cuda, const void *host, size_t bytes);
void stage_wait(struct cuda *cuda); /* for the stream */
/* After everything before on the stream: `bytes` from the device to `host`, any memory. Waits. */
void read_back(struct cuda *cuda, void *host, const void *device, size_t bytes);

/* Copies `count` ids to `to`, all of the pool. */
void stage_ids(const struct cuda *cuda, const uint32_t *ids, uint32_t count, uint32_t *to);

static inline uint32_t blocks_of(uint32_t slots) { return div_up(slots, BLOCK_TOKENS); }
static inline __host__ __device__ uint32_t splits_of(uint32_t slots) { return (slots + SPLIT_SLOTS - 1) / SPLIT_SLOTS; }
static inline size_t aligned_16(size_t bytes) { return (bytes + 15) / 16 * 16; }
static __host__ __device__ inline uint32_t element_bytes(enum kv_dtype dtype) { return dtype == KV_Q8 ? 1 : 2; }

/* One lane of a pass: lanes are scored some at a time, as many as the scratch holds, cut into splits of SPLIT_SLOTS slots. */
struct lane_job {
    uint32_t lane, n_slots;
    uint32_t first_id;    /* in the pass's ids */
    uint32_t first_split; /* in the pass */
    size_t slots_before;  /* in the pass: its numbers begin at so many times what a slot has */
};
struct lane_jobs {
    struct device_pool pool;
    const struct lane_job *job; /* none is empty */
    const uint32_t *ids;
    uint32_t n_jobs, n_splits;
    int32_t last_position; /* of the request */
};

/* Bytes of score->work that a pass takes; each a multiple of 16. */
struct work_need {
    size_t fixed, per_job, per_split;
};
/* Of what is scored; checks what is asked for. */
struct work_need score_need(const struct cuda *cuda, const struct score_request *request);

/* Lanes [first, end) of one pass, and what they take. */
struct pass_plan {
    uint32_t end, n_jobs, n_splits;
    size_t n_ids, n_slots;
};
/* As many lanes from `first` on, a multiple of lanes_each, as staging and scratch take with `per_slot` numbers a slot. */
struct pass_plan plan_pass(const struct cuda *cuda, const uint32_t *lane_tokens, uint32_t first, uint32_t end, uint32_t lanes_each, uint32_t per_slot,
                           struct work_need need);
/* The pass's lanes and block ids, by the request's tables. */
struct lane_jobs stage_pass(struct cuda *cuda, const struct score_request *request, uint32_t first, const struct pass_plan *plan);
/* Scores of the pass's lanes to `numbers`, launched on the stream. */
void score_pass(struct cuda *cuda, const struct score_request *request, const struct lane_jobs *jobs, float *numbers);

/* score_window.cu: kinds per query head, from the ring; launched on the stream. */
struct work_need window_need(const struct cuda *cuda, enum score_kind kind, uint32_t n_window);
void window_score(struct cuda *cuda, const struct score_request *request, const struct lane_jobs *jobs, float *numbers);

/* score.cu: bytes of `numbers` and `work` that the longest lane needs, at least, and that all lanes at once would take. */
void score_sizes(const struct cuda *cuda, uint32_t lane_slots, size_t *least_numbers, size_t *least_work);

enum {
    WARP = 32,
    WARPS = SPLIT_SLOTS / BLOCK_TOKENS, /* a warp takes one block of a split */
    THREADS = WARPS * 32,
};

/* The job that split `split` of the pass belongs to. */
static __device__ inline uint32_t job_of(const struct lane_jobs &jobs, uint32_t split) {
    uint32_t low = 0, high = jobs.n_jobs;
    while (high - low > 1) {
        const uint32_t middle = (low + high) / 2;
        if (jobs.job[middle].first_split <= split)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* Where a block's numbers are read from. */
struct block_numbers {
    uint32_t block;
    const uint8_t *at;
    bool coded;
};
/* coded: of KIVI dtypes, from its codes. */
static __device__ inline struct block_numbers numbers_of(const struct device_pool &pool, uint32_t block, bool coded) {
    return {block, pool.bits && !coded ? raw_of(pool, block) : pool.kv + block * pool.block_bytes, pool.bits && coded};
}

/* Of block `index` of a job's lane. KIVI: as the row after the newest token reads the lane, even if the rows that score are older. */
static __device__ inline struct block_numbers numbers_of_job(const struct lane_jobs &jobs, const struct lane_job &job, uint32_t index) {
    const uint32_t *ids = jobs.ids + job.first_id, block = ids[index];
    if (jobs.pool.bits == 0) return numbers_of(jobs.pool, block, false);
    const uint32_t last = job.n_slots - 1;
    const int32_t newest = jobs.pool.positions[(size_t)ids[last / BLOCK_TOKENS] * BLOCK_TOKENS + last % BLOCK_TOKENS], next = max(newest, jobs.last_position) + 1;
    const bool full = (index + 1) * BLOCK_TOKENS <= job.n_slots;
    return numbers_of(jobs.pool, block, is_lost(jobs.pool, block) || (full && kivi_reads_codes(jobs.pool.positions[(size_t)block * BLOCK_TOKENS + BLOCK_TOKENS - 1], next)));
}

/* Element i of a slot's K or V as it lies (keys of q8 transformed), widened exactly. CODES false: the dtype is no KIVI one. */
template <bool CODES = true>
static __device__ inline float pool_element(const struct device_pool &pool, const struct block_numbers &from, int which, uint32_t slot, uint32_t i) {
    size_t at = (size_t)(which * BLOCK_TOKENS + slot) * pool.d + i;
    if (CODES && from.coded) {
        const uint32_t dims = codes_dims(pool.d);
        return code_number(pool.bits, dims, from.at + (which == WHICH_K ? 0 : codes_side_bytes(pool.bits, dims)), which, slot, i);
    }
    if (pool.dtype == KV_BF16) return __bfloat162float(((const __nv_bfloat16 *)from.at)[at]);
    if (pool.dtype != KV_Q8) return __half2float(((const __half *)from.at)[at]);
    return pool.scales[(size_t)from.block * 2 * BLOCK_TOKENS + which * BLOCK_TOKENS + slot] * (float)((const int8_t *)from.at)[at];
}

/* A slot's key as it was before it was cached, of a dtype that transforms keys; element lane + 32 i in x[i]. All of the warp. */
static __device__ inline void read_transformed_key(const struct device_pool &pool, const struct block_numbers &from, uint32_t slot, uint32_t lane,
                                                   float x[ROW_ELEMENTS]) {
#pragma unroll
    for (uint32_t i = 0; i < ROW_ELEMENTS; i++) x[i] = lane + i * WARP < pool.d ? pool_element<false>(pool, from, WHICH_K, slot, lane + i * WARP) : 0;
    hadamard(x, pool.d, lane);
}
