/* Attention: memory, the plan of a step, launches. The kernels are in attention_decode.cu, attention_prefill.cu and attention_accumulate.cu; attention.h says what they compute.
 *
 * The plan cuts each layer's decode work, (sequence, KV head, split) in this order, into one part a CTA of about equal cost, from lengths in device memory. Once a step, for all layers.
 *
 * Partials. A lane that one CTA has from its first to its last split needs none. Of a lane that is cut, the first CTA leaves one and the others one a split: never more than splits of such
 * lanes. Their number is known once the cuts are, so they are packed; what is reserved is enough for most models and limits. Where it is not (very long lanes, and so many of them that each
 * CTA has many splits of one), cuts inside a lane move towards its end, which costs balance and nothing else.
 *
 * Used by the engine's thread. */
#include "kernels/cuda/attention.h"

#include <stdlib.h>

constexpr uint32_t SPLIT_BLOCKS = SPLIT_SLOTS / BLOCK_TOKENS;
constexpr uint32_t SPLIT_OVERHEAD = 1; /* of a split, in blocks read */
constexpr uint32_t STAGES_MAX = 4;
constexpr size_t PARTIAL_BYTES_MAX = (size_t)64 << 20;
constexpr uint32_t CTA_QUERIES_MIN = 2 * TILE_QUERIES; /* room for partials that any CTA's part can be made to fit */

/* ---- the plan ---- */

struct plan_args {
    const struct step_header *header;
    const struct step_sequence *sequences;
    const uint32_t *decode, *lane_tokens;
    struct attention_lane *lanes;
    uint32_t *costs;
    struct attention_cut *cuts;
    uint32_t max_lanes, n_kv_heads, n_lanes, group, ctas, partial_queries;
    /* KIVI */
    const int32_t *positions, *row_positions; /* the pool's, and the rows' */
    const uint32_t *tables;
    uint32_t lane_blocks;
};

/* The sum of the values of the threads before this one; *total: of all. sums: [33] shared. */
ATTENTION_INLINE uint64_t sum_before(uint64_t value, uint64_t *sums, uint64_t *total) {
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64_t sum = value;
    for (uint32_t step = 1; step < 32; step *= 2) {
        uint64_t below = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += below;
    }
    __syncthreads(); /* the sums before were read */
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        uint64_t of_warp = sums[lane], all = of_warp;
        for (uint32_t step = 1; step < 32; step *= 2) {
            uint64_t below = __shfl_up_sync(0xffffffffu, all, step);
            if (lane >= step) all += below;
        }
        sums[lane] = all - of_warp;
        if (lane == 31) sums[32] = all;
    }
    __syncthreads();
    *total = sums[32];
    return sums[warp] + sum - value;
}

ATTENTION_INLINE uint32_t planned_splits(const struct attention_lane *lane) { return lane->n_rows ? splits_of(lane->before + lane->n_rows) : 0; }

/* The first split that begins at `target` or after it, as (lane, split). costs: [n + 1], costs[n] > target. */
ATTENTION_INLINE uint2 find_cut(const struct attention_lane *lanes, const uint32_t *costs, uint32_t n, uint32_t target) {
    uint32_t low = 0, high = n; /* costs[low] <= target < costs[high] */
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (costs[middle] <= target)
            low = middle;
        else
            high = middle;
    }
    uint32_t each = SPLIT_BLOCKS + SPLIT_OVERHEAD, split = (target - costs[low] + each - 1) / each;
    return split < planned_splits(&lanes[low]) ? make_uint2(low, split) : make_uint2(low + 1, 0);
}

/* Partials (one a query) that the part from `from` to `to` writes: of the lane it takes over, then of the lane it leaves. */
struct part_partials {
    uint32_t run, head;
};
ATTENTION_INLINE struct part_partials partials_of(const struct attention_lane *lanes, uint32_t group, uint2 from, uint2 to) {
    struct part_partials n = {0, 0};
    if (from.y > 0) n.run = ((to.x == from.x ? to.y : planned_splits(&lanes[from.x])) - from.y) * lanes[from.x].n_rows * group;
    if (to.y > 0 && (from.x < to.x || from.y == 0)) n.head = lanes[to.x].n_rows * group;
    return n;
}

/* What the first and the last row of a lane read as codes. Blocks that the step itself fills are not among that: up to TILE_QUERIES rows are too near to one another. */
ATTENTION_INLINE void plan_codes(const struct plan_args &args, struct attention_lane *lane, uint32_t kv_lane) {
    static_assert(TILE_QUERIES <= KIVI_RESIDUAL, "no row of a tile reads as codes what another of it fills");
    const uint32_t *blocks = args.tables + ((size_t)lane->table * args.n_lanes + kv_lane) * args.lane_blocks;
    lane->codes_first = codes_before(args.positions, blocks, lane->before, args.row_positions[lane->first_row]);
    lane->codes_last = codes_before(args.positions, blocks, lane->before, args.row_positions[lane->first_row + lane->n_rows - 1]);
}

template <bool CODES> static __global__ void __launch_bounds__(PLAN_THREADS) plan(const __grid_constant__ struct plan_args args) {
    __shared__ uint64_t sums[33];
    __shared__ uint2 cuts[CTAS_MAX + 1];
    uint32_t layer = blockIdx.x, n = args.header->n_decode * args.n_kv_heads, me = threadIdx.x;
    struct attention_lane *lanes = args.lanes + (size_t)layer * args.max_lanes;
    uint32_t *costs = args.costs + (size_t)layer * (args.max_lanes + 1);

    uint32_t cost = 0, splits = 0; /* of the lanes so far */
    for (uint32_t first = 0; first < n; first += PLAN_THREADS) {
        uint32_t at = first + me;
        uint64_t value = 0;
        if (at < n) {
            uint32_t index = args.decode[at / args.n_kv_heads];
            const struct step_sequence sequence = args.sequences[index];
            uint32_t before = args.lane_tokens[(size_t)index * args.n_lanes + layer * args.n_kv_heads + at % args.n_kv_heads];
            struct attention_lane lane = {sequence.table, before, sequence.first_row, sequence.n_rows, 0, 0, 0, 0};
            if constexpr (CODES)
                if (lane.n_rows) plan_codes(args, &lane, layer * args.n_kv_heads + at % args.n_kv_heads);
            lanes[at] = lane;
            uint32_t of_lane = planned_splits(&lane), blocks = of_lane ? (before + sequence.n_rows + BLOCK_TOKENS - 1) / BLOCK_TOKENS : 0;
            value = (uint64_t)of_lane << 32 | (blocks + of_lane * SPLIT_OVERHEAD);
        }
        uint64_t total, below = sum_before(value, sums, &total);
        if (at < n) costs[at] = cost + (uint32_t)below;
        cost += (uint32_t)total;
        splits += (uint32_t)(total >> 32);
    }
    if (me == 0) costs[n] = cost;
    __syncthreads();

    uint32_t used = min(args.ctas, splits);
    uint2 cut = make_uint2(n, 0);
    if (me < used) cut = find_cut(lanes, costs, n, (uint32_t)((uint64_t)cost * me / used));
    struct part_partials partials = {0, 0};
    uint64_t partial, total;
    for (int round = 0; round < 2; round++) {
        cuts[me] = cut;
        __syncthreads();
        if (me < args.ctas) partials = partials_of(lanes, args.group, cut, cuts[me + 1]);
        partial = sum_before(partials.run + partials.head, sums, &total);
        if (total <= args.partial_queries || round == 1) break;
        /* Nobody may leave more of the lane it takes over than its share has room for, beside the beginning of another. */
        if (cut.y > 0) {
            uint32_t room = (args.partial_queries / args.ctas - TILE_QUERIES) / (lanes[cut.x].n_rows * args.group),
                     of_lane = planned_splits(&lanes[cut.x]);
            if (of_lane - cut.y > room) cut.y = of_lane - room;
        }
    }
    if (me > args.ctas) return;
    struct attention_cut out = {cut.x, cut.y, (uint32_t)partial, 0};
    args.cuts[(size_t)layer * (CTAS_MAX + 1) + me] = out;
    if (me < args.ctas && partials.head > 0) {
        struct attention_lane *left = &lanes[cuts[me + 1].x];
        left->partial = (uint32_t)partial + partials.run;
        left->n_head = cuts[me + 1].y;
    }
}

/* ---- the interface ---- */

static uint32_t partial_queries(const struct cuda *cuda) {
    size_t splits = (size_t)cuda->limits.max_sequences * cuda->program->n_kv_heads * div_up(cuda->lane_blocks, SPLIT_BLOCKS);
    size_t most = PARTIAL_BYTES_MAX / (cuda->program->head_dim * sizeof(float) + sizeof(float2));
    return (uint32_t)(splits < most / TILE_QUERIES ? splits * TILE_QUERIES : most);
}

void attention_lay_out(struct cuda *cuda, struct device_arena *arena) {
    const struct program *p = cuda->program;
    struct attention_device counted = {}, *device = &counted;
    if (arena->base) {
        if (!cuda->attention) cuda->attention = (struct attention_device *)check_calloc(1, sizeof *cuda->attention);
        device = cuda->attention;
    }
    device->max_lanes = cuda->limits.max_sequences * p->n_kv_heads;
    device->partial_queries = partial_queries(cuda);
    device->lanes = (struct attention_lane *)device_take(arena, (size_t)p->n_layers * device->max_lanes, sizeof *device->lanes);
    device->costs = (uint32_t *)device_take(arena, (size_t)p->n_layers * (device->max_lanes + 1), sizeof *device->costs);
    device->cuts = (struct attention_cut *)device_take(arena, (size_t)p->n_layers * (CTAS_MAX + 1), sizeof *device->cuts);
    device->arrived = (uint32_t *)device_take(arena, device->max_lanes, sizeof *device->arrived);
    device->partial_o = (float *)device_take(arena, (size_t)device->partial_queries * p->head_dim, sizeof *device->partial_o);
    device->partial_ml = (float2 *)device_take(arena, device->partial_queries, sizeof *device->partial_ml);
}

static enum status allow_shared(attention_kernel kernel, size_t bytes, struct error *error) {
    CUDA_TRY(error, cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    CUDA_TRY(error, cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    return STATUS_OK;
}

/* CTAs an SM and pieces a CTA: as many pieces in flight as can be; of equals, more CTAs. */
static enum status choose_stages(struct cuda *cuda, struct error *error) {
    struct attention_device *device = cuda->attention;
    int best = 0;
    for (uint32_t stages = 2; stages <= STAGES_MAX; stages++) {
        size_t bytes = attention_decode_shared(cuda->pool.dtype, device->dims, stages);
        if (bytes > cuda->properties.sharedMemPerBlockOptin) break;
        enum status status = allow_shared(device->decode, bytes, error);
        if (status != STATUS_OK) return status;
        int ctas = 0;
        CUDA_TRY(error, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, device->decode, ATTENTION_THREADS, bytes));
        /* KIVI turns codes into numbers most of the time, which more warps hide more of; the others wait for copies, of which more pieces in flight make more. */
        int worth = cuda->pool.bits ? ctas * (int)STAGES_MAX + (int)stages : ctas * (int)(stages - 1);
        if (ctas == 0 || worth <= best) continue;
        best = worth;
        device->stages = stages;
        device->decode_shared = bytes;
        device->ctas = (uint32_t)(ctas * cuda->properties.multiProcessorCount);
    }
    if (best == 0) return error_set(error, STATUS_UNSUPPORTED, "cuda attention: device %d has too little shared memory", cuda->device);
    if (device->ctas > CTAS_MAX) device->ctas = CTAS_MAX;
    return allow_shared(device->decode, device->decode_shared, error);
}

enum status attention_open(struct cuda *cuda, struct error *error) {
    const struct program *p = cuda->program;
    struct attention_device *device = cuda->attention;
    CHECK(device && p->n_heads == cuda->group * p->n_kv_heads);
    enum kv_dtype dtype = cuda->pool.dtype;
    device->dims = p->head_dim <= 64 ? 64 : 128;
    device->decode = attention_decode_kernel(dtype, device->dims);
    device->prefill = attention_prefill_kernel(dtype, device->dims);
    device->accumulate = attention_accumulate_kernel(dtype, device->dims);
    device->prefill_shared = attention_prefill_shared(dtype, device->dims);
    device->accumulate_shared = attention_accumulate_shared(dtype, device->dims);
    device->accumulate_ctas = div_up((uint32_t)cuda->properties.multiProcessorCount * 4, p->n_kv_heads);
    enum status status = choose_stages(cuda, error);
    if (status == STATUS_OK) status = allow_shared(device->prefill, device->prefill_shared, error);
    if (status == STATUS_OK) status = allow_shared(device->accumulate, device->accumulate_shared, error);
    if (status != STATUS_OK) return status;
    size_t splits = (size_t)device->max_lanes * div_up(cuda->lane_blocks, SPLIT_BLOCKS);
    CHECK(device->partial_queries >= splits * TILE_QUERIES || device->partial_queries / device->ctas >= CTA_QUERIES_MIN);
    CUDA_TRY(error, cudaMemsetAsync(device->arrived, 0, device->max_lanes * sizeof *device->arrived, cuda->stream));
    return STATUS_OK;
}

void attention_close(struct cuda *cuda) {
    free(cuda->attention);
    cuda->attention = NULL;
}

void attention_plan(struct cuda *cuda, const struct step_shape *shape) {
    struct attention_device *device = cuda->attention;
    if (shape->decode == 0) return;
    CHECK(shape->decode <= cuda->limits.max_sequences);
    struct plan_args args = {
        .header = cuda->dev.header,
        .sequences = cuda->dev.sequences,
        .decode = cuda->dev.decode,
        .lane_tokens = cuda->dev.lane_tokens,
        .lanes = device->lanes,
        .costs = device->costs,
        .cuts = device->cuts,
        .max_lanes = device->max_lanes,
        .n_kv_heads = cuda->program->n_kv_heads,
        .n_lanes = cuda->n_lanes,
        .group = cuda->group,
        .ctas = device->ctas,
        .partial_queries = device->partial_queries,
        .positions = cuda->pool.positions,
        .row_positions = cuda->dev.positions,
        .tables = cuda->tables,
        .lane_blocks = cuda->lane_blocks,
    };
    launch(cuda->pool.bits ? plan<true> : plan<false>, cuda->program->n_layers, PLAN_THREADS, 0, cuda->stream, args);
    CUDA_CHECK(cudaGetLastError());
}

static struct attention_args arguments(const struct cuda *cuda, uint32_t layer) {
    const struct attention_device *device = cuda->attention;
    const struct program *p = cuda->program;
    return {
        .kv = cuda->pool.kv,
        .scales = cuda->pool.scales,
        .tables = cuda->tables,
        .q = cuda->q,
        .a = cuda->a,
        .row_max = cuda->row_max,
        .row_sum = cuda->row_sum,
        .accumulated = cuda->pool.accumulated,
        .header = cuda->dev.header,
        .sequences = cuda->dev.sequences,
        .lane_tokens = cuda->dev.lane_tokens,
        .tiles = cuda->dev.tiles,
        .lanes = device->lanes + (size_t)layer * device->max_lanes,
        .cuts = device->cuts + (size_t)layer * (CTAS_MAX + 1),
        .partial_o = device->partial_o,
        .partial_ml = device->partial_ml,
        .arrived = device->arrived,
        .block_bytes = cuda->pool.block_bytes,
        .scale_log2 = (float)((double)p->attention_scale * 1.4426950408889634),
        .layer = layer,
        .d = p->head_dim,
        .row_bytes = p->head_dim * (cuda->pool.dtype == KV_Q8 ? 1u : 2u),
        .n_kv_heads = p->n_kv_heads,
        .n_heads = p->n_heads,
        .group = cuda->group,
        .n_q = cuda->n_q,
        .n_lanes = cuda->n_lanes,
        .lane_blocks = cuda->lane_blocks,
        .stages = device->stages,
        .raw = cuda->pool.raw,
        .place = cuda->pool.place,
        .positions = cuda->pool.positions,
        .row_positions = cuda->dev.positions,
        .raw_bytes = cuda->pool.raw_bytes,
    };
}

void attention_run(struct cuda *cuda, uint32_t layer, const struct step_shape *shape) {
    const struct attention_device *device = cuda->attention;
    const struct program *p = cuda->program;
    CHECK(layer < p->n_layers && shape->tiles <= cuda->max_tiles);
    struct attention_args args = arguments(cuda, layer);
    if (shape->decode > 0) launch(device->decode, device->ctas, ATTENTION_THREADS, device->decode_shared, cuda->stream, args);
    if (shape->tiles > 0) launch(device->prefill, dim3(p->n_kv_heads, shape->tiles), ATTENTION_THREADS, device->prefill_shared, cuda->stream, args);
    if (shape->accumulates) {
        CHECK(cuda->limits.accumulators);
        launch(device->accumulate, dim3(device->accumulate_ctas, p->n_kv_heads), ATTENTION_THREADS, device->accumulate_shared, cuda->stream, args);
    }
    CUDA_CHECK(cudaGetLastError());
}
