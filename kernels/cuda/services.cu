/* What the cuda backend does to cached slots between steps: copies, compaction, reading, shifted sinks; scores are in score.cu. Called by the engine's thread, runs on cuda->stream.
 * Owns the staging of lists and results and the scratch of scores, all sized when the backend opens. Waits for the device only where a result is asked for, or where the lists of earlier
 * calls fill the staging. Does not choose anything. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/services.h"

enum {
    SLICE_UNITS = 8,   /* of a row, to one block of threads */
    THREAD_PIECES = 4, /* in flight a thread */
    STAGE_BYTES = 4 << 20,
    BACK_BYTES = 4 << 20,
    NUMBERS_BYTES = 32 << 20,
    WORK_BYTES = 32 << 20,
};

/* ---- life ---- */

static size_t most(size_t a, size_t b) { return a > b ? a : b; }
static size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* Sizes alone. Whole layers fit at least: some scores are averaged over them. */
static void measure(const struct cuda *cuda, struct score_device *score) {
    const size_t blocks = cuda->lane_blocks ? cuda->lane_blocks : 1, heads = cuda->program->n_kv_heads, layers = cuda->program->n_layers;
    *score = (struct score_device){};
    score->lane_slots = (uint32_t)(blocks * BLOCK_TOKENS);
    score->rank_slots = cuda->limits.rank_slots;
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
    score->keys = (uint32_t *)device_take(arena, slots, sizeof *score->keys);
    score->kept = (uint32_t *)device_take(arena, slots, sizeof *score->kept);
    score->n_protected = (uint32_t *)device_take(arena, lanes, sizeof *score->n_protected);
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

static size_t block_host_bytes(const struct cuda *cuda) { return (2 * (size_t)cuda->pool.d + 1) * BLOCK_TOKENS * sizeof(float); }

size_t services_pinned_bytes(const struct cuda *cuda) {
    struct score_device score;
    measure(cuda, &score);
    return score.stage_bytes + score.back_bytes + block_host_bytes(cuda);
}

enum status services_open(struct cuda *cuda, struct error *error) {
    struct score_device *score = cuda->score;
    CHECK(score && score->lane_slots > 0 && cuda->pool.d % 8 == 0); /* rows of a block are whole units of 8 or 16 bytes, which a thread moves at a time */
    score->lane_at = (size_t *)check_calloc(cuda->n_lanes, sizeof *score->lane_at);
    score->lane_slots_ranked = (uint32_t *)check_calloc(cuda->n_lanes, sizeof *score->lane_slots_ranked);
    score->n_kept = (uint32_t *)check_calloc(cuda->n_lanes, sizeof *score->n_kept);
    CUDA_TRY(error, cudaMallocHost((void **)&score->stage_host, score->stage_bytes));
    CUDA_TRY(error, cudaMallocHost((void **)&score->back_host, score->back_bytes));
    CUDA_TRY(error, cudaMallocHost((void **)&score->block_host, block_host_bytes(cuda)));
    services_pool_changes(cuda);
    return STATUS_OK;
}

void services_close(struct cuda *cuda) {
    struct score_device *score = cuda->score;
    if (!score) return;
    if (score->stage_host) (void)cudaFreeHost(score->stage_host);
    if (score->back_host) (void)cudaFreeHost(score->back_host);
    if (score->block_host) (void)cudaFreeHost(score->block_host);
    free(score->lane_at);
    free(score->lane_slots_ranked);
    free(score->n_kept);
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

/* One pair a block of threads. */
static __global__ void __launch_bounds__(THREADS) copy_kernel(struct device_pool pool, const uint2 *pairs) {
    const size_t from = pairs[blockIdx.x].x, to = pairs[blockIdx.x].y;
    const uint32_t units = (uint32_t)(pool.block_bytes / sizeof(uint4));
    const uint4 *in = (const uint4 *)(pool.kv + from * pool.block_bytes);
    uint4 *out = (uint4 *)(pool.kv + to * pool.block_bytes);
    for (uint32_t i = threadIdx.x; i < units; i += THREADS) out[i] = in[i];
    const uint32_t i = threadIdx.x;
    if (i < 2 * BLOCK_TOKENS && pool.scales) pool.scales[to * 2 * BLOCK_TOKENS + i] = pool.scales[from * 2 * BLOCK_TOKENS + i];
    if (i < BLOCK_TOKENS) pool.positions[to * BLOCK_TOKENS + i] = pool.positions[from * BLOCK_TOKENS + i];
    if (i < BLOCK_TOKENS && pool.accumulated) pool.accumulated[to * BLOCK_TOKENS + i] = pool.accumulated[from * BLOCK_TOKENS + i];
}

void cuda_copy_blocks(struct backend *backend, uint32_t count, const uint32_t *source, const uint32_t *destination) {
    struct cuda *cuda = cuda_of(backend);
    services_pool_changes(cuda);
    const uint32_t pass_max = (uint32_t)(cuda->score->stage_bytes / sizeof(uint2));
    for (uint32_t first = 0; first < count; first += pass_max) {
        uint32_t n = count - first < pass_max ? count - first : pass_max, used = 0;
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

/* ---- compaction ---- */

struct move_item {
    const uint32_t *source, *keep, *destination; /* on the device */
    uint32_t n_keep;
};
struct move_pass {
    struct device_pool pool;
    const struct move_item *items;
    uint32_t row_bytes, slices; /* slices: of a row, up to SLICE_UNITS each */
};

/* Kept slots move forward in order, so a lane may be rewritten as it is read: slot i comes from slot keep[i] >= i. A block of threads takes the slots in tiles; of a tile it reads all,
 * waits for all its threads, writes all. What is written lies before the next tile, what is still to be read in it or after. A slice of the row is a stream of its own, for nothing that
 * one writes is read by another. */
template <typename UNIT>
static __device__ void move_rows(const struct move_pass &pass, const struct move_item &item, uint32_t which, uint32_t slice) {
    const uint32_t *source = item.source, *keep = item.keep, *destination = item.destination;
    const uint32_t first = slice * SLICE_UNITS, left = (uint32_t)(pass.row_bytes / sizeof(UNIT)) - first,
                   width = left < SLICE_UNITS ? left : (uint32_t)SLICE_UNITS;
    const uint32_t tile = THREADS * THREAD_PIECES / width;
    uint8_t *base = pass.pool.kv + (size_t)which * BLOCK_TOKENS * pass.row_bytes + (size_t)first * sizeof(UNIT);
    for (uint32_t begin = 0; begin < item.n_keep; begin += tile) {
        uint8_t *to[THREAD_PIECES];
        UNIT piece[THREAD_PIECES];
#pragma unroll
        for (int i = 0; i < THREAD_PIECES; i++) {
            const uint32_t p = threadIdx.x + (uint32_t)i * THREADS, row = p / width, slot = begin + row,
                           offset = (p - row * width) * (uint32_t)sizeof(UNIT);
            to[i] = NULL;
            if (row >= tile || slot >= item.n_keep) continue;
            const uint32_t old = keep[slot];
            const uint8_t *from = base + source[old / BLOCK_TOKENS] * pass.pool.block_bytes + (old % BLOCK_TOKENS) * pass.row_bytes + offset;
            to[i] = base + destination[slot / BLOCK_TOKENS] * pass.pool.block_bytes + (slot % BLOCK_TOKENS) * pass.row_bytes + offset;
            if (from == to[i])
                to[i] = NULL; /* stays where it is */
            else
                piece[i] = __ldcg((const UNIT *)from);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < THREAD_PIECES; i++)
            if (to[i]) *(UNIT *)to[i] = piece[i];
    }
}

static __device__ void move_metadata(const struct move_pass &pass, const struct move_item &item) {
    const uint32_t *source = item.source, *keep = item.keep, *destination = item.destination;
    const struct device_pool &pool = pass.pool;
    for (uint32_t begin = 0; begin < item.n_keep; begin += THREADS) {
        const uint32_t slot = begin + threadIdx.x;
        const bool mine = slot < item.n_keep;
        size_t from_block = 0, to_block = 0, from = 0, to = 0;
        int32_t position = 0;
        uint64_t accumulated = 0;
        float k_scale = 0, v_scale = 0;
        if (mine) {
            const uint32_t old = keep[slot];
            from_block = source[old / BLOCK_TOKENS], to_block = destination[slot / BLOCK_TOKENS];
            from = old % BLOCK_TOKENS, to = slot % BLOCK_TOKENS;
            position = __ldcg(pool.positions + from_block * BLOCK_TOKENS + from);
            if (pool.accumulated) accumulated = __ldcg((const unsigned long long *)pool.accumulated + from_block * BLOCK_TOKENS + from);
            if (pool.scales) {
                k_scale = __ldcg(pool.scales + from_block * 2 * BLOCK_TOKENS + from);
                v_scale = __ldcg(pool.scales + from_block * 2 * BLOCK_TOKENS + BLOCK_TOKENS + from);
            }
        }
        __syncthreads();
        if (mine) {
            pool.positions[to_block * BLOCK_TOKENS + to] = position;
            if (pool.accumulated) pool.accumulated[to_block * BLOCK_TOKENS + to] = accumulated;
            if (pool.scales) {
                pool.scales[to_block * 2 * BLOCK_TOKENS + to] = k_scale;
                pool.scales[to_block * 2 * BLOCK_TOKENS + BLOCK_TOKENS + to] = v_scale;
            }
        }
    }
}

/* Grid: items x (K's slices, V's slices, metadata). */
template <typename UNIT> static __global__ void __launch_bounds__(THREADS) compact_kernel(const struct move_pass pass) {
    const struct move_item item = pass.items[blockIdx.x];
    if (blockIdx.y == 2 * pass.slices)
        move_metadata(pass, item);
    else
        move_rows<UNIT>(pass, item, blockIdx.y / pass.slices, blockIdx.y % pass.slices);
}

static uint32_t item_words(const struct compaction *item) {
    return blocks_of(item->n_slots) + (item->keep ? item->n_keep : 0) + blocks_of(item->n_keep);
}

/* Lists to `words`, which lie at `device` there; returns how many. */
static uint32_t put_item(const struct cuda *cuda, const struct compaction *item, struct move_item *out, uint32_t *words, const uint32_t *device) {
    const struct score_device *score = cuda->score;
    const uint32_t n_source = blocks_of(item->n_slots), n_destination = blocks_of(item->n_keep);
    *out = (struct move_item){device, NULL, device + n_source, item->n_keep};
    stage_ids(cuda, item->source, n_source, words);
    stage_ids(cuda, item->destination, n_destination, words + n_source);
    if (!item->keep) { /* as cuda_keep left it */
        CHECK(score->rank_slots > 0 && item->lane < cuda->n_lanes && item->n_slots == score->lane_slots_ranked[item->lane] &&
              item->n_keep == score->n_kept[item->lane]);
        out->keep = score->kept + score->lane_at[item->lane];
        return n_source + n_destination;
    }
    uint32_t *keep = words + n_source + n_destination;
    out->keep = device + n_source + n_destination;
    for (uint32_t i = 0; i < item->n_keep; i++) {
        CHECK(item->keep[i] < item->n_slots && (i == 0 || item->keep[i] > item->keep[i - 1]));
        keep[i] = item->keep[i];
    }
    return n_source + n_destination + item->n_keep;
}

void cuda_compact(struct backend *backend, uint32_t count, const struct compaction *items) {
    struct cuda *cuda = cuda_of(backend);
    services_pool_changes(cuda);
    struct move_pass pass = {};
    pass.pool = cuda->pool;
    pass.row_bytes = cuda->pool.d * element_bytes(cuda->pool.dtype);
    const uint32_t unit = pass.row_bytes % sizeof(uint4) ? sizeof(uint2) : sizeof(uint4);
    pass.slices = div_up(pass.row_bytes / unit, SLICE_UNITS);
    for (uint32_t first = 0, end; first < count; first = end) {
        size_t bytes = 0;
        for (end = first; end < count; end++) { /* as many as the staging takes */
            size_t more = sizeof(struct move_item) + item_words(&items[end]) * sizeof(uint32_t);
            if (end > first && bytes + more > cuda->score->stage_bytes) break;
            bytes += more;
        }
        const uint32_t n = end - first;
        struct move_item *device, *out = (struct move_item *)stage_take(cuda, bytes, &device);
        uint32_t *words = (uint32_t *)(void *)(out + n), used = 0;
        for (uint32_t i = 0; i < n; i++)
            used += put_item(cuda, &items[first + i], &out[i], words + used, (const uint32_t *)(const void *)(device + n) + used);
        stage_send(cuda, out, bytes);
        pass.items = device;
        const dim3 grid(n, 2 * pass.slices + 1);
        if (unit == sizeof(uint4))
            launch(compact_kernel<uint4>, grid, THREADS, 0, cuda->stream, pass);
        else
            launch(compact_kernel<uint2>, grid, THREADS, 0, cuda->stream, pass);
        CUDA_CHECK(cudaGetLastError());
    }
}

/* ---- reading ---- */

/* K [BLOCK_TOKENS][d], V the same, positions behind them as they are. */
static __global__ void read_block_kernel(struct device_pool pool, uint32_t block, float *out) {
    const uint32_t slot = blockIdx.x, i = threadIdx.x;
    if (i < pool.d) {
        out[slot * pool.d + i] = pool_element(pool, block, WHICH_K, slot, i);
        out[(BLOCK_TOKENS + slot) * pool.d + i] = pool_element(pool, block, WHICH_V, slot, i);
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
        launch(read_block_kernel, BLOCK_TOKENS, HEAD_DIM_MAX, 0, cuda->stream, cuda->pool, block, score->block_host);
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

/* ---- shifted sinks ---- */

struct turn {
    const double *frequency;
    uint32_t rope_dims;
    bool halves;
};

/* Element i of x after the rotation by `positions`; the rotation alone: what rope_magnitude did to the key when it was cached stays in it. x(j): element j. */
template <typename X> static __device__ float turned(const struct turn &turn, double positions, uint32_t i, const X &x) {
    if (i >= turn.rope_dims) return x(i);
    const uint32_t half = turn.rope_dims / 2, pair = turn.halves ? i % half : i / 2;
    const bool second = turn.halves ? i >= half : i % 2;
    const uint32_t a = turn.halves ? pair : 2 * pair, b = turn.halves ? pair + half : 2 * pair + 1;
    double s, c;
    sincos(positions * turn.frequency[pair], &s, &c);
    const double re = (double)x(a), im = (double)x(b);
    return (float)(second ? re * s + im * c : re * c - im * s);
}

struct shift_pass {
    struct device_pool pool;
    struct turn turn;
    float *plain;        /* [n_lanes][sink_slots][d] of the ring */
    const uint32_t *ids; /* [n_lanes][blocks of n_slots] */
    uint32_t n_lanes, sink_slots, n_slots, n_ids;
    int32_t shift;
    bool first;
};

/* Rounds a key to the pool's dtype; the warp holds element lane + 32 i in x[i]. */
static __device__ void write_key(const struct device_pool &pool, uint32_t block, uint32_t slot, uint32_t lane, const float x[ROW_ELEMENTS]) {
    uint8_t *row = pool.kv + block * pool.block_bytes + (size_t)slot * pool.d * (pool.dtype == KV_Q8 ? 1 : 2);
    float scale = 0;
    if (pool.dtype == KV_Q8) {
        float largest = 0;
        for (uint32_t i = 0; i < ROW_ELEMENTS; i++) largest = lane + i * WARP < pool.d && fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
        for (int other = WARP / 2; other > 0; other /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, other));
        scale = __fdiv_rn(largest, 127);
        if (lane == 0) pool.scales[(size_t)block * 2 * BLOCK_TOKENS + slot] = scale;
    }
    for (uint32_t i = 0; i < ROW_ELEMENTS; i++) {
        const uint32_t at = lane + i * WARP;
        if (at >= pool.d) continue;
        if (pool.dtype == KV_F16) ((__half *)row)[at] = __float2half_rn(x[i]);
        if (pool.dtype == KV_BF16) ((__nv_bfloat16 *)row)[at] = __float2bfloat16_rn(x[i]);
        if (pool.dtype == KV_Q8) {
            float code = scale > 0 && isfinite(scale) && isfinite(x[i]) ? rintf(__fdiv_rn(x[i], scale)) : 0;
            ((int8_t *)row)[at] = (int8_t)fminf(fmaxf(code, -127), 127);
        }
    }
}

/* A warp a sink. */
static __global__ void __launch_bounds__(THREADS) shift_kernel(struct shift_pass pass) {
    const uint32_t row = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP, d = pass.pool.d;
    if (row >= pass.n_lanes * pass.n_slots) return;
    const uint32_t kv_lane = row / pass.n_slots, i = row % pass.n_slots;
    const uint32_t block = pass.ids[(size_t)kv_lane * pass.n_ids + i / BLOCK_TOKENS], slot = i % BLOCK_TOKENS;
    const double position = pass.pool.positions[(size_t)block * BLOCK_TOKENS + slot];
    float *plain = pass.plain + ((size_t)kv_lane * pass.sink_slots + i) * d;
    if (pass.first)
        for (uint32_t at = lane; at < d; at += WARP)
            plain[at] = turned(pass.turn, -position, at, [&](uint32_t j) { return pool_element(pass.pool, block, WHICH_K, slot, j); });
    __syncwarp(); /* the copy is whole, the cached key read */
    float key[ROW_ELEMENTS];
    for (uint32_t e = 0; e < ROW_ELEMENTS; e++)
        key[e] = lane + e * WARP < d ? turned(pass.turn, position + pass.shift, lane + e * WARP, [&](uint32_t j) { return plain[j]; }) : 0;
    write_key(pass.pool, block, slot, lane, key);
}

void cuda_shift_sinks(struct backend *backend, const struct shift_request *request) {
    struct cuda *cuda = cuda_of(backend);
    services_pool_changes(cuda);
    const struct program *program = cuda->program;
    CHECK(request->ring >= 1 && request->ring <= cuda->limits.n_rings && request->n_slots <= cuda->limits.sink_slots);
    if (request->n_slots == 0) return;
    struct shift_pass pass = {};
    pass.pool = cuda->pool;
    pass.turn = (struct turn){cuda->rope_frequency, program->rope_dims, program->rope_pairs == ROPE_PAIRS_HALVES};
    pass.plain = cuda->ring_sinks + (size_t)(request->ring - 1) * cuda->n_lanes * cuda->limits.sink_slots * cuda->pool.d;
    pass.n_lanes = cuda->n_lanes;
    pass.sink_slots = cuda->limits.sink_slots;
    pass.n_slots = request->n_slots;
    pass.n_ids = blocks_of(request->n_slots);
    pass.shift = request->shift;
    pass.first = request->first;
    const size_t bytes = (size_t)pass.n_lanes * pass.n_ids * sizeof(uint32_t);
    uint32_t *ids = (uint32_t *)stage_take(cuda, bytes, &pass.ids);
    for (uint32_t lane = 0; lane < pass.n_lanes; lane++)
        stage_ids(cuda, request->block_ids + request->lane_first[lane], pass.n_ids, ids + (size_t)lane * pass.n_ids);
    stage_send(cuda, ids, bytes);
    launch(shift_kernel, div_up(pass.n_lanes * pass.n_slots, THREADS / WARP), THREADS, 0, cuda->stream, pass);
    CUDA_CHECK(cudaGetLastError());
}
