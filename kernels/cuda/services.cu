/* What the cuda backend does to cached slots between steps: copies and reading; compaction, sinks and scores are in compact.cu, sinks.cu and score.cu. Called by the engine's thread, runs on cuda->stream.
 * Owns the staging of lists and results and the scratch of scores, all sized when the backend opens. Waits for the device only where a result is asked for, or where the lists of earlier
 * calls fill the staging. Does not choose anything. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/services.h"

enum {
    STAGE_BYTES = 4 << 20,
    BACK_BYTES = 4 << 20,
    NUMBERS_BYTES = 32 << 20,
    RANKED_BYTES = 64 << 20, /* of all places together, but for the first */
    WORK_BYTES = 32 << 20,
};

/* ---- life ---- */

static size_t most(size_t a, size_t b) { return a > b ? a : b; }
static size_t least(size_t a, size_t b) { return a < b ? a : b; }

uint32_t services_rank_places(const struct cuda *cuda) {
    const size_t slots = (size_t)cuda->n_lanes * cuda->limits.rank_slots, wanted = most(1, cuda->limits.rank_places);
    if (slots == 0) return 0;
    CHECK(wanted <= RANK_PLACES_MAX);
    return (uint32_t)most(1, least(wanted, RANKED_BYTES / (2 * slots * sizeof(uint32_t))));
}

/* Sizes alone. Whole layers fit at least: some scores are averaged over them. */
static void measure(const struct cuda *cuda, struct score_device *score) {
    const size_t blocks = cuda->lane_blocks ? cuda->lane_blocks : 1, heads = cuda->program->n_kv_heads, layers = cuda->program->n_layers;
    *score = (struct score_device){};
    score->lane_slots = (uint32_t)(blocks * BLOCK_TOKENS);
    score->rank_slots = cuda->limits.rank_slots;
    score->rank_places = services_rank_places(cuda);
    size_t numbers, work, lists = (2 * blocks + score->lane_slots) * sizeof(uint32_t) + 64,
                          layer = heads * (blocks * sizeof(uint32_t) + sizeof(struct lane_job));
    size_t sinks = (size_t)cuda->n_lanes * blocks_of(cuda->limits.sink_slots) * sizeof(uint32_t),
           counts = (size_t)cuda->n_lanes * 4 * sizeof(uint32_t);
    score_sizes(cuda, score->lane_slots, &numbers, &work);
    numbers *= heads, work *= heads;
    score->stage_bytes = aligned_16(most(most(most(lists, layer), most(sinks, counts)), STAGE_BYTES));
    score->back_bytes = most(BACK_BYTES, cuda->n_lanes * sizeof(uint2)); /* counts of all lanes at once */
    score->n_numbers = most(numbers, least(numbers * layers, NUMBERS_BYTES)) / sizeof(float);
    score->work_bytes = most(work, least(work * layers, WORK_BYTES));
}

static void lay_out_ranking(const struct cuda *cuda, struct device_arena *arena, struct score_device *score) {
    const size_t lanes = cuda->n_lanes, slots = lanes * score->rank_slots;
    if (slots == 0) return;
    for (uint32_t place = 0; place < score->rank_places; place++) {
        struct ranked_device *ranked = &score->ranked[place];
        ranked->keys = (uint32_t *)device_take(arena, slots, sizeof *ranked->keys);
        ranked->kept = (uint32_t *)device_take(arena, slots, sizeof *ranked->kept);
        ranked->n_protected = (uint32_t *)device_take(arena, lanes, sizeof *ranked->n_protected);
        if (kivi_bits(cuda->limits.kv_dtype)) ranked->n_joined = (uint32_t *)device_take(arena, lanes, sizeof *ranked->n_joined);
    }
    score->cut_below = (uint32_t *)device_take(arena, lanes, sizeof *score->cut_below);
    score->cut_counted = (uint32_t *)device_take(arena, lanes * 256, sizeof *score->cut_counted);
    score->cut_freed = (uint32_t *)device_take(arena, lanes * 4 * 256, sizeof *score->cut_freed);
}

void services_lay_out(struct cuda *cuda, struct device_arena *arena) {
    struct score_device score;
    measure(cuda, &score);
    score.stage_device = (uint8_t *)device_take(arena, score.stage_bytes, 1);
    score.numbers = (float *)device_take(arena, score.n_numbers, sizeof(float));
    score.work = (uint8_t *)device_take(arena, score.work_bytes, 1);
    lay_out_ranking(cuda, arena, &score);
    if (!arena->base) return;
    if (!cuda->score) cuda->score = (struct score_device *)check_calloc(1, sizeof score);
    *cuda->score = score;
}

static size_t ranked_counts_bytes(const struct cuda *cuda) { return (size_t)services_rank_places(cuda) * cuda->n_lanes * sizeof(uint2); }

static size_t block_host_bytes(const struct cuda *cuda) { return (2 * (size_t)cuda->pool.d + 1) * BLOCK_TOKENS * sizeof(float); }

size_t services_pinned_bytes(const struct cuda *cuda) {
    struct score_device score;
    measure(cuda, &score);
    return score.stage_bytes + score.back_bytes + block_host_bytes(cuda) + ranked_counts_bytes(cuda);
}

enum status services_open(struct cuda *cuda, struct error *error) {
    struct score_device *score = cuda->score;
    CHECK(score && score->lane_slots > 0 &&
          cuda->pool.d % 8 == 0); /* rows of a block are whole units of 8 or 16 bytes, which a thread moves at a time */
    CUDA_TRY(error, cudaMallocHost((void **)&score->stage_host, score->stage_bytes));
    CUDA_TRY(error, cudaMallocHost((void **)&score->back_host, score->back_bytes));
    CUDA_TRY(error, cudaMallocHost((void **)&score->block_host, block_host_bytes(cuda)));
    if (score->rank_places > 0) CUDA_TRY(error, cudaMallocHost((void **)&score->ranked_counts, ranked_counts_bytes(cuda)));
    for (uint32_t place = 0; place < score->rank_places; place++) {
        struct ranked_device *ranked = &score->ranked[place];
        ranked->lane_at = (size_t *)check_calloc(cuda->n_lanes, sizeof *ranked->lane_at);
        ranked->n_slots = (uint32_t *)check_calloc(cuda->n_lanes, sizeof *ranked->n_slots);
        ranked->n_kept = (uint32_t *)check_calloc(cuda->n_lanes, sizeof *ranked->n_kept);
        ranked->counts = score->ranked_counts + (size_t)place * cuda->n_lanes;
    }
    services_pool_changes(cuda);
    return STATUS_OK;
}

void services_close(struct cuda *cuda) {
    struct score_device *score = cuda->score;
    if (!score) return;
    if (score->stage_host) (void)cudaFreeHost(score->stage_host);
    if (score->back_host) (void)cudaFreeHost(score->back_host);
    if (score->block_host) (void)cudaFreeHost(score->block_host);
    if (score->ranked_counts) (void)cudaFreeHost(score->ranked_counts);
    for (uint32_t place = 0; place < score->rank_places; place++) {
        free(score->ranked[place].lane_at);
        free(score->ranked[place].n_slots);
        free(score->ranked[place].n_kept);
    }
    free(score);
    cuda->score = NULL;
}

/* ---- lists there, results back ---- */

void stage_wait(struct cuda *cuda) {
    CUDA_CHECK(cudaStreamSynchronize(cuda->stream));
    cuda->score->stage_used = 0;
}

void *stage_take(struct cuda *cuda, size_t bytes, void *device) {
    struct score_device *score = cuda->score;
    bytes = aligned_16(bytes);
    CHECK(bytes <= score->stage_bytes);
    if (bytes > score->stage_bytes - score->stage_used) stage_wait(cuda);
    size_t at = score->stage_used;
    uint8_t *there = score->stage_device + at;
    memcpy(device, &there, sizeof there); /* whatever it points to there */
    score->stage_used += bytes;
    return score->stage_host + at;
}

void stage_send(struct cuda *cuda, const void *host, size_t bytes) {
    struct score_device *score = cuda->score;
    size_t at = (size_t)((const uint8_t *)host - score->stage_host);
    CHECK(at + bytes <= score->stage_used);
    CUDA_CHECK(cudaMemcpyAsync(score->stage_device + at, host, bytes, cudaMemcpyHostToDevice, cuda->stream));
}

void stage_ids(const struct cuda *cuda, const uint32_t *ids, uint32_t count, uint32_t *to) {
    uint32_t highest = 0;
    for (uint32_t i = 0; i < count; i++) {
        highest = ids[i] > highest ? ids[i] : highest;
        to[i] = ids[i];
    }
    CHECK(count == 0 || highest < cuda->pool.n_blocks);
}

void read_back(struct cuda *cuda, void *host, const void *device, size_t bytes) {
    struct score_device *score = cuda->score;
    for (size_t at = 0; at < bytes; at += score->back_bytes) {
        size_t part = least(bytes - at, score->back_bytes);
        CUDA_CHECK(cudaMemcpyAsync(score->back_host, (const uint8_t *)device + at, part, cudaMemcpyDeviceToHost, cuda->stream));
        stage_wait(cuda);
        memcpy((uint8_t *)host + at, score->back_host, part);
    }
}

/* ---- copies of whole blocks ---- */

/* KIVI: the f16 blocks, and whether the codes are made. */
static __device__ void copy_raw(const struct device_pool &pool, uint32_t from, uint32_t to) {
    if (threadIdx.x == 0) pool.closed[to] = pool.closed[from];
    if (is_lost(pool, to)) return; /* it has none because the other has none */
    const uint4 *in = (const uint4 *)(const void *)raw_of(pool, from);
    uint4 *out = (uint4 *)(void *)raw_of(pool, to);
    for (uint32_t i = threadIdx.x; i < pool.raw_bytes / sizeof(uint4); i += THREADS) out[i] = in[i];
}

/* One pair a block of threads. */
static __global__ void __launch_bounds__(THREADS) copy_kernel(struct device_pool pool, const uint2 *pairs) {
    const size_t from = pairs[blockIdx.x].x, to = pairs[blockIdx.x].y;
    const uint32_t units = (uint32_t)(pool.block_bytes / sizeof(uint4));
    const uint4 *in = (const uint4 *)(pool.kv + from * pool.block_bytes);
    uint4 *out = (uint4 *)(pool.kv + to * pool.block_bytes);
    for (uint32_t i = threadIdx.x; i < units; i += THREADS) out[i] = in[i];
    if (pool.bits) copy_raw(pool, pairs[blockIdx.x].x, pairs[blockIdx.x].y);
    const uint32_t i = threadIdx.x;
    if (i < 2 * BLOCK_TOKENS && pool.scales) pool.scales[to * 2 * BLOCK_TOKENS + i] = pool.scales[from * 2 * BLOCK_TOKENS + i];
    if (i < BLOCK_TOKENS) pool.positions[to * BLOCK_TOKENS + i] = pool.positions[from * BLOCK_TOKENS + i];
    if (i < BLOCK_TOKENS && pool.accumulated) pool.accumulated[to * BLOCK_TOKENS + i] = pool.accumulated[from * BLOCK_TOKENS + i];
}

void cuda_copy_blocks(struct backend *backend, uint32_t count, const uint32_t *source, const uint32_t *destination) {
    struct cuda *cuda = cuda_of(backend);
    services_pool_changes(cuda);
    const uint32_t pass_max = residual_pass(cuda, (uint32_t)(cuda->score->stage_bytes / sizeof(uint2)));
    for (uint32_t first = 0; first < count; first += pass_max) {
        uint32_t n = count - first < pass_max ? count - first : pass_max, used = 0;
        residual_copy(cuda, n, source + first, destination + first);
        uint2 *device, *pairs = (uint2 *)stage_take(cuda, n * sizeof *pairs, &device);
        for (uint32_t i = first; i < first + n; i++) {
            CHECK(source[i] < cuda->pool.n_blocks && destination[i] < cuda->pool.n_blocks);
            if (source[i] != destination[i]) pairs[used++] = make_uint2(source[i], destination[i]);
        }
        if (used == 0) continue;
        stage_send(cuda, pairs, used * sizeof *pairs);
        launch(copy_kernel, used, THREADS, 0, cuda->stream, cuda->pool, device);
        CUDA_CHECK(cudaGetLastError());
    }
}

/* ---- reading ---- */

/* K [BLOCK_TOKENS][d], V the same, positions behind them as they are. */
template <bool TRANSFORMS> static __global__ void read_block_kernel(struct device_pool pool, uint32_t block, float *out) {
    const uint32_t slot = blockIdx.x, i = threadIdx.x;
    const struct block_numbers from = numbers_of(pool, block, pool.bits && (pool.closed[block] || is_lost(pool, block)));
    if constexpr (TRANSFORMS) {
        if (i < WARP) {
            float key[ROW_ELEMENTS];
            read_transformed_key(pool, from, slot, i, key);
            for (uint32_t e = 0; e < ROW_ELEMENTS; e++)
                if (i + e * WARP < pool.d) out[slot * pool.d + i + e * WARP] = key[e];
        }
    }
    if (i < pool.d) {
        if (!TRANSFORMS) out[slot * pool.d + i] = pool_element(pool, from, WHICH_K, slot, i);
        out[(BLOCK_TOKENS + slot) * pool.d + i] = pool_element(pool, from, WHICH_V, slot, i);
    }
    if (i == 0) out[2 * BLOCK_TOKENS * pool.d + slot] = __int_as_float(pool.positions[(size_t)block * BLOCK_TOKENS + slot]);
}

/* The kernel writes pinned memory of the host: one launch and one wait a block. */
void cuda_read_f32(struct backend *backend, uint32_t block, uint32_t slot, float *k, float *v, int32_t *position) {
    struct cuda *cuda = cuda_of(backend);
    struct score_device *score = cuda->score;
    const uint32_t d = cuda->pool.d;
    CHECK(block < cuda->pool.n_blocks && slot < BLOCK_TOKENS);
    if (score->block_read != block) {
        launch(kv_transforms(cuda->pool.dtype) ? read_block_kernel<true> : read_block_kernel<false>, BLOCK_TOKENS, HEAD_DIM_MAX, 0, cuda->stream,
               cuda->pool, block, score->block_host);
        CUDA_CHECK(cudaGetLastError());
        stage_wait(cuda);
        score->block_read = block;
    }
    memcpy(k, score->block_host + (size_t)slot * d, d * sizeof *k);
    memcpy(v, score->block_host + (size_t)(BLOCK_TOKENS + slot) * d, d * sizeof *v);
    memcpy(position, score->block_host + (size_t)2 * BLOCK_TOKENS * d + slot, sizeof *position);
}

void services_pool_changes(struct cuda *cuda) { cuda->score->block_read = BLOCK_NONE_READ; }

static __global__ void __launch_bounds__(THREADS)
    read_positions_kernel(struct device_pool pool, const uint32_t *blocks, uint32_t count, int32_t *out) {
    const uint32_t i = blockIdx.x * (THREADS / BLOCK_TOKENS) + threadIdx.x / BLOCK_TOKENS, slot = threadIdx.x % BLOCK_TOKENS;
    if (i < count) out[(size_t)i * BLOCK_TOKENS + slot] = pool.positions[(size_t)blocks[i] * BLOCK_TOKENS + slot];
}

void cuda_read_positions(struct backend *backend, uint32_t count, const uint32_t *blocks, int32_t *positions) {
    struct cuda *cuda = cuda_of(backend);
    const struct score_device *score = cuda->score;
    const uint32_t pass_max = (uint32_t)least(score->stage_bytes / sizeof *blocks, score->back_bytes / (BLOCK_TOKENS * sizeof *positions));
    for (uint32_t first = 0; first < count; first += pass_max) {
        uint32_t n = count - first < pass_max ? count - first : pass_max;
        uint32_t *device, *ids = (uint32_t *)stage_take(cuda, n * sizeof *ids, &device);
        stage_ids(cuda, blocks + first, n, ids);
        stage_send(cuda, ids, n * sizeof *ids);
        launch(read_positions_kernel, div_up(n, THREADS / BLOCK_TOKENS), THREADS, 0, cuda->stream, cuda->pool, device, n,
                                                                                               (int32_t *)(void *)score->back_host);
        CUDA_CHECK(cudaGetLastError());
        stage_wait(cuda);
        memcpy(positions + (size_t)first * BLOCK_TOKENS, score->back_host, (size_t)n * BLOCK_TOKENS * sizeof *positions);
    }
}
