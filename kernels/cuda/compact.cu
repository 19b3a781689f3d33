/* Compaction on the device: kept slots of lanes move forward in order. Called by the engine's thread between steps, runs on cuda->stream. Owns nothing. */
#include "kernels/cuda/close.h"
#include "kernels/cuda/services.h"

enum {
    SLICE_UNITS = 8,   /* of a row, to one block of threads */
    THREAD_PIECES = 4, /* in flight a thread */
};

/* KIVI: slots of a lane that lie in blocks which the next row reads as codes; how many of those are kept, whole blocks of them; of these blocks, the first that does not stay where it is. */
struct coded_part {
    uint32_t slots, kept, still;
    uint32_t broken; /* bool: a block is neither kept whole nor gone whole */
};
struct move_item {
    const uint32_t *source, *keep, *destination; /* on the device */
    uint32_t n_keep, n_slots;
    struct coded_part coded; /* made there */
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
    const uint32_t n_source = blocks_of(item->n_slots), n_destination = blocks_of(item->n_keep);
    *out = (struct move_item){device, NULL, device + n_source, item->n_keep, item->n_slots, {}};
    stage_ids(cuda, item->source, n_source, words);
    stage_ids(cuda, item->destination, n_destination, words + n_source);
    if (!item->keep) { /* as cuda_keep left it */
        CHECK(item->place < cuda->score->rank_places && item->lane < cuda->n_lanes);
        const struct ranked_device *ranked = &cuda->score->ranked[item->place];
        CHECK(item->n_slots == ranked->n_slots[item->lane] && item->n_keep == ranked->n_kept[item->lane]);
        out->keep = ranked->kept + ranked->lane_at[item->lane];
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

/* ---- KIVI: blocks that are codes move whole, the others' slots from f16 block to f16 block; what these fill becomes codes ---- */

/* Grid: items. */
static __global__ void __launch_bounds__(THREADS) coded_kernel(const struct device_pool pool, struct move_item *items, struct coded_part *out) {
    __shared__ struct coded_part part;
    const struct move_item item = items[blockIdx.x];
    if (threadIdx.x == 0) {
        uint32_t coded = 0, low = 0, high = item.n_keep;
        if (item.n_slots > 0) {
            const uint32_t last = item.n_slots - 1;
            const int32_t newest = pool.positions[(size_t)item.source[last / BLOCK_TOKENS] * BLOCK_TOKENS + last % BLOCK_TOKENS];
            coded = codes_before(pool.positions, item.source, item.n_slots, newest + 1) * BLOCK_TOKENS;
        }
        while (low < high) {
            const uint32_t middle = (low + high) / 2;
            if (item.keep[middle] < coded)
                low = middle + 1;
            else
                high = middle;
        }
        part = {coded, low, low / BLOCK_TOKENS, low % BLOCK_TOKENS != 0};
    }
    __syncthreads();
    for (uint32_t b = threadIdx.x; b < part.kept / BLOCK_TOKENS; b += THREADS) {
        if (!kivi_whole_block(item.keep, item.n_keep, b * BLOCK_TOKENS)) part.broken = true;
        if (item.keep[b * BLOCK_TOKENS] != b * BLOCK_TOKENS) atomicMin(&part.still, b);
    }
    __syncthreads();
    if (threadIdx.x == 0) items[blockIdx.x].coded = out[blockIdx.x] = part;
}

/* As move_rows, with blocks for slots. */
static __device__ void move_codes(const struct move_pass &pass, const struct move_item &item, uint32_t slice) {
    const uint32_t first = slice * SLICE_UNITS, left = (uint32_t)(pass.pool.block_bytes / sizeof(uint4)) - first,
                   width = left < SLICE_UNITS ? left : (uint32_t)SLICE_UNITS;
    const uint32_t tile = THREADS / width, row = threadIdx.x / width, unit = first + threadIdx.x % width;
    for (uint32_t begin = 0; begin < item.coded.kept / BLOCK_TOKENS; begin += tile) {
        const uint32_t b = begin + row;
        const bool mine = row < tile && b < item.coded.kept / BLOCK_TOKENS;
        uint32_t from = 0, to = 0;
        uint4 piece = {};
        if (mine) {
            from = item.source[item.keep[b * BLOCK_TOKENS] / BLOCK_TOKENS], to = item.destination[b];
            piece = __ldcg((const uint4 *)(const void *)(pass.pool.kv + from * pass.pool.block_bytes) + unit);
        }
        __syncthreads();
        if (mine && from != to) ((uint4 *)(void *)(pass.pool.kv + to * pass.pool.block_bytes))[unit] = piece;
        if (mine && unit == 0) pass.pool.closed[to] = true;
    }
}

/* K or V of the slots in f16 blocks, of which there are KIVI_RAW_BLOCKS at most: all are read before any is written. */
static __device__ void move_raw(const struct move_pass &pass, const struct move_item &item, uint32_t which, uint32_t slice) {
    const uint32_t first = slice * SLICE_UNITS, left = pass.row_bytes / (uint32_t)sizeof(uint4) - first,
                   width = left < SLICE_UNITS ? left : (uint32_t)SLICE_UNITS;
    const uint32_t n = item.n_keep - item.coded.kept;
    const size_t side = (size_t)which * BLOCK_TOKENS * pass.row_bytes + (size_t)first * sizeof(uint4);
    static_assert(THREADS * THREAD_PIECES / SLICE_UNITS >= KIVI_RAW_BLOCKS * BLOCK_TOKENS, "one tile");
    uint4 *to[THREAD_PIECES], piece[THREAD_PIECES];
#pragma unroll
    for (int i = 0; i < THREAD_PIECES; i++) {
        const uint32_t p = threadIdx.x + (uint32_t)i * THREADS, slot = item.coded.kept + p / width, offset = p % width * (uint32_t)sizeof(uint4);
        to[i] = NULL;
        if (p / width >= n) continue;
        const uint32_t old = item.keep[slot];
        to[i] = (uint4 *)(void *)(raw_of(pass.pool, item.destination[slot / BLOCK_TOKENS]) + side + slot % BLOCK_TOKENS * pass.row_bytes + offset);
        piece[i] = __ldcg(
            (const uint4 *)(const void *)(raw_of(pass.pool, item.source[old / BLOCK_TOKENS]) + side + old % BLOCK_TOKENS * pass.row_bytes + offset));
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < THREAD_PIECES; i++)
        if (to[i]) *to[i] = piece[i];
}

/* Grid: items x (K's slices, V's slices, metadata, slices of codes). */
static __global__ void __launch_bounds__(THREADS) compact_codes_kernel(const struct move_pass pass) {
    const struct move_item item = pass.items[blockIdx.x];
    if (blockIdx.y < 2 * pass.slices)
        move_raw(pass, item, blockIdx.y / pass.slices, blockIdx.y % pass.slices);
    else if (blockIdx.y == 2 * pass.slices)
        move_metadata(pass, item);
    else
        move_codes(pass, item, blockIdx.y - 2 * pass.slices - 1);
}

/* Grid: items x KIVI_RAW_BLOCKS. */
static __global__ void __launch_bounds__(CLOSE_THREADS) close_items_kernel(const struct move_pass pass) {
    __shared__ uint8_t codes[BLOCK_TOKENS * HEAD_DIM_MAX];
    const struct move_item item = pass.items[blockIdx.x];
    const uint32_t b = item.coded.kept / BLOCK_TOKENS + blockIdx.y;
    if ((b + 1) * BLOCK_TOKENS <= item.n_keep)
        close_block(pass.pool, item.destination[b], codes);
    else if (b * BLOCK_TOKENS < item.n_keep && threadIdx.x == 0)
        pass.pool.closed[item.destination[b]] = false;
}

/* The f16 blocks that an item moves from, which no others may take. */
static void use_sources(struct cuda *cuda, const struct compaction *item, const struct coded_part *part) {
    struct raw_places *raw = residual_places(cuda);
    CHECK(!part->broken && blocks_of(item->n_slots) - part->slots / BLOCK_TOKENS <= KIVI_RAW_BLOCKS);
    for (uint32_t b = part->slots / BLOCK_TOKENS; b < blocks_of(item->n_slots); b++) {
        const bool lost = raw->of[item->source[b]] == RAW_NONE; /* codes.h, is_lost */
        (void)raw_take(raw, item->source[b]);
        if (!lost) continue;
        residual_send(cuda);
        open_block(cuda, item->source[b]);
    }
}

static void take_destinations(struct cuda *cuda, const struct compaction *item, const struct coded_part *part) {
    struct raw_places *raw = residual_places(cuda);
    for (uint32_t b = 0; b < part->kept / BLOCK_TOKENS; b++)
        if (b >= part->still || item->destination[b] != item->source[b]) raw_forget(raw, item->destination[b]);
    for (uint32_t b = part->kept / BLOCK_TOKENS; b < blocks_of(item->n_keep); b++) (void)raw_take(raw, item->destination[b]);
}

/* `n` items, whose lists are on the device. How much of each lane is codes is known there. */
static void compact_codes(struct cuda *cuda, const struct move_pass *pass, struct move_item *device, uint32_t n, const struct compaction *items) {
    struct coded_part *parts = (struct coded_part *)(void *)cuda->score->back_host;
    launch(coded_kernel, n, THREADS, 0, cuda->stream, cuda->pool, device, parts);
    CUDA_CHECK(cudaGetLastError());
    CUDA_CHECK(cudaStreamSynchronize(cuda->stream)); /* and the lists stay where they are */
    for (uint32_t i = 0; i < n; i++) use_sources(cuda, &items[i], &parts[i]);
    for (uint32_t i = 0; i < n; i++) take_destinations(cuda, &items[i], &parts[i]);
    residual_send(cuda);
    const uint32_t slices = div_up((uint32_t)(cuda->pool.block_bytes / sizeof(uint4)), SLICE_UNITS);
    launch(compact_codes_kernel, dim3(n, 2 * pass->slices + 1 + slices), THREADS, 0, cuda->stream, *pass);
    launch(close_items_kernel, dim3(n, KIVI_RAW_BLOCKS), CLOSE_THREADS, 0, cuda->stream, *pass);
    CUDA_CHECK(cudaGetLastError());
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
            if (end > first && (bytes + more > cuda->score->stage_bytes || (end - first + 1) * sizeof(struct coded_part) > cuda->score->back_bytes))
                break;
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
        if (cuda->pool.bits)
            compact_codes(cuda, &pass, device, n, items + first);
        else if (unit == sizeof(uint4))
            launch(compact_kernel<uint4>, grid, THREADS, 0, cuda->stream, pass);
        else
            launch(compact_kernel<uint2>, grid, THREADS, 0, cuda->stream, pass);
        CUDA_CHECK(cudaGetLastError());
    }
}
