/* The services of the cuda backend between steps (services.cu, score.cu, rank.cu), alone on a device, over a pool, rings and tables made here.
 *
 *   gpu_services --check   every service against plain host loops, every dtype and many shapes; scores against the oracle (kernels/score.c), the choice
 *                           against the host's (kernels/select.c). The first differences are printed; exit 1.
 *   gpu_services --bench   one line a case: median time, bytes moved, GB/s, percent of what copies on the device reach in this run
 *
 * Inputs are random, what is written was poisoned before. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

extern "C" {
#include "base/half.h"
#include "base/random.h"
#include "tests/support/array_backend.h"
}
#include "kernels/cuda/services.h"

enum { POISON = 0xa5, LINES_MAX = 10 };
static uint32_t n_wrong;

#define WRONG(...)                                                                                                                                   \
    do {                                                                                                                                             \
        if (n_wrong++ < LINES_MAX) printf("wrong: " __VA_ARGS__), puts("");                                                                          \
    } while (0)

struct shape {
    enum kv_dtype dtype;
    uint32_t d, group, n_layers, n_kv_heads, n_blocks, lane_blocks, ring_rows;
    bool halves;
    uint32_t rope_dims;
};

/* A backend with all that the services need, and a host's copy of its pool and rings. */
struct world {
    struct shape shape;
    struct program program;
    double frequency[HEAD_DIM_MAX / 2];
    struct cuda cuda;
    void *arena;
    struct random random;
    size_t kv_bytes, scale_count, slot_count, ring_count, sink_count;
    uint8_t *kv;
    float *scales, *sinks;
    int32_t *positions;
    uint64_t *accumulated;
    uint16_t *ring;
    uint32_t *ids; /* the pool in a random order */
};

static float normal(struct random *random) { /* nearly: the sum of four */
    float sum = -2;
    for (int i = 0; i < 4; i++) sum += random_unit(random_next(random));
    return sum * 1.7f;
}

static void *there(const void *host, size_t bytes) {
    void *device;
    CUDA_CHECK(cudaMalloc(&device, bytes ? bytes : 16));
    if (host) CUDA_CHECK(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice));
    return device;
}

static uint16_t narrow(enum kv_dtype dtype, float x) { return dtype == KV_BF16 ? bf16_from_float(x) : f16_from_float(x); }
static float widen(enum kv_dtype dtype, uint16_t x) { return dtype == KV_BF16 ? float_from_bf16(x) : float_from_f16(x); }

static void fill(struct world *world) {
    const struct shape *shape = &world->shape;
    struct random *random = &world->random;
    if (shape->dtype == KV_Q8)
        for (size_t i = 0; i < world->kv_bytes; i++) world->kv[i] = (uint8_t)(int8_t)((int)random_below(random, 255) - 127);
    else
        for (size_t i = 0; i < world->kv_bytes / 2; i++) ((uint16_t *)(void *)world->kv)[i] = narrow(shape->dtype, normal(random));
    for (size_t i = 0; i < world->scale_count; i++) world->scales[i] = (0.5f + random_unit(random_next(random))) / 60;
    for (size_t i = 0; i < world->slot_count; i++) {
        world->positions[i] = (int32_t)random_below(random, 1u << 30);
        world->accumulated[i] = random_next(random) >> 20;
    }
    for (size_t i = 0; i < world->ring_count; i++) world->ring[i] = narrow(shape->dtype, 2 * normal(random));
    for (uint32_t i = 0; i < shape->n_blocks; i++) world->ids[i] = i;
    for (uint32_t i = shape->n_blocks; i-- > 1;) {
        uint32_t j = random_below(random, i + 1), id = world->ids[i];
        world->ids[i] = world->ids[j], world->ids[j] = id;
    }
}

static void upload(struct world *world) {
    struct device_pool *pool = &world->cuda.pool;
    CUDA_CHECK(cudaMemcpy(pool->kv, world->kv, world->kv_bytes, cudaMemcpyHostToDevice));
    if (pool->scales) CUDA_CHECK(cudaMemcpy(pool->scales, world->scales, world->scale_count * sizeof(float), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(pool->positions, world->positions, world->slot_count * sizeof(int32_t), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(pool->accumulated, world->accumulated, world->slot_count * sizeof(uint64_t), cudaMemcpyHostToDevice));
}

static void world_open(struct world *world, const struct shape *shape) {
    memset(world, 0, sizeof *world);
    world->shape = *shape;
    world->random.state = shape->d * 31u + shape->dtype * 7u + shape->group;
    struct program *program = &world->program;
    program->n_layers = shape->n_layers, program->n_kv_heads = shape->n_kv_heads, program->n_heads = shape->n_kv_heads * shape->group;
    program->head_dim = shape->d, program->attention_scale = 1.0f / sqrtf((float)shape->d);
    program->rope_pairs = shape->halves ? ROPE_PAIRS_HALVES : ROPE_PAIRS_ADJACENT, program->rope_dims = shape->rope_dims;
    program->rope_frequency = world->frequency, program->rope_magnitude = 1;
    for (uint32_t i = 0; i < shape->rope_dims / 2; i++) world->frequency[i] = pow(10000.0, -2.0 * i / shape->rope_dims);

    struct cuda *cuda = &world->cuda;
    cuda->program = program;
    cuda->limits.n_blocks = shape->n_blocks, cuda->limits.n_rings = 2, cuda->limits.ring_rows = shape->ring_rows;
    cuda->limits.sink_slots = 2 * BLOCK_TOKENS, cuda->limits.accumulators = true, cuda->limits.kv_dtype = shape->dtype;
    cuda->limits.rank_slots = shape->lane_blocks * BLOCK_TOKENS;
    cuda->n_lanes = shape->n_layers * shape->n_kv_heads, cuda->group = shape->group;
    cuda->n_q = program->n_heads * shape->d, cuda->n_kv = program->n_kv_heads * shape->d, cuda->lane_blocks = shape->lane_blocks;
    CUDA_CHECK(cudaStreamCreate(&cuda->stream));

    size_t block_bytes = (size_t)2 * BLOCK_TOKENS * shape->d * element_bytes(shape->dtype);
    world->kv_bytes = block_bytes * shape->n_blocks, world->slot_count = (size_t)shape->n_blocks * BLOCK_TOKENS;
    world->scale_count = shape->dtype == KV_Q8 ? 2 * world->slot_count : 0;
    world->ring_count = (size_t)2 * shape->n_layers * shape->ring_rows * cuda->n_q;
    world->sink_count = (size_t)2 * cuda->n_lanes * cuda->limits.sink_slots * shape->d;
    world->kv = (uint8_t *)check_calloc(world->kv_bytes, 1), world->scales = (float *)check_calloc(world->scale_count + 1, sizeof(float));
    world->positions = (int32_t *)check_calloc(world->slot_count, sizeof(int32_t));
    world->accumulated = (uint64_t *)check_calloc(world->slot_count, sizeof(uint64_t));
    world->ring = (uint16_t *)check_calloc(world->ring_count, sizeof(uint16_t)),
    world->ids = (uint32_t *)check_calloc(shape->n_blocks, sizeof(uint32_t));
    fill(world);
    struct device_pool *pool = &cuda->pool;
    pool->dtype = shape->dtype, pool->d = shape->d, pool->n_blocks = shape->n_blocks, pool->block_bytes = block_bytes;
    pool->kv = (uint8_t *)there(NULL, world->kv_bytes), pool->positions = (int32_t *)there(NULL, world->slot_count * sizeof(int32_t));
    pool->accumulated = (uint64_t *)there(NULL, world->slot_count * sizeof(uint64_t));
    if (world->scale_count) pool->scales = (float *)there(NULL, world->scale_count * sizeof(float));
    upload(world);
    cuda->ring_queries = (uint16_t *)there(world->ring, world->ring_count * sizeof(uint16_t));
    cuda->ring_sinks = (float *)there(NULL, world->sink_count * sizeof(float));
    cuda->rope_frequency = (double *)there(world->frequency, sizeof world->frequency);

    struct device_arena arena = {};
    services_lay_out(cuda, &arena);
    world->arena = there(NULL, arena.used);
    CUDA_CHECK(cudaMemset(world->arena, POISON, arena.used));
    arena.base = (uint8_t *)world->arena, arena.used = 0;
    services_lay_out(cuda, &arena);
    struct error error = {};
    if (services_open(cuda, &error) != STATUS_OK) printf("%s\n", error.text), exit(1);
}

static void world_close(struct world *world) {
    struct cuda *cuda = &world->cuda;
    services_close(cuda);
    void *device[] = {world->arena,           cuda->pool.kv,      cuda->pool.scales, cuda->pool.positions,
                      cuda->pool.accumulated, cuda->ring_queries, cuda->ring_sinks,  cuda->rope_frequency};
    for (void *memory : device) CUDA_CHECK(cudaFree(memory));
    CUDA_CHECK(cudaStreamDestroy(cuda->stream));
    free(world->kv), free(world->scales), free(world->positions), free(world->accumulated), free(world->ring), free(world->ids);
}

/* ---- the pool, on the host ---- */

static uint8_t *row_of(const struct world *world, uint32_t block, int which, uint32_t slot) {
    const struct device_pool *pool = &world->cuda.pool;
    return world->kv + block * pool->block_bytes + (size_t)(which * BLOCK_TOKENS + slot) * pool->d * element_bytes(pool->dtype);
}

static float element_of(const struct world *world, uint32_t block, int which, uint32_t slot, uint32_t i) {
    const uint8_t *row = row_of(world, block, which, slot);
    if (world->shape.dtype == KV_Q8) return world->scales[(size_t)(2 * block + which) * BLOCK_TOKENS + slot] * (float)(int8_t)row[i];
    uint16_t bits;
    memcpy(&bits, row + 2 * i, 2);
    return widen(world->shape.dtype, bits);
}

static void move_slot(struct world *world, uint32_t from_block, uint32_t from, uint32_t to_block, uint32_t to) {
    for (int which = 0; which < 2; which++) {
        memmove(row_of(world, to_block, which, to), row_of(world, from_block, which, from), world->shape.d * element_bytes(world->shape.dtype));
        if (world->scale_count)
            world->scales[(size_t)(2 * to_block + which) * BLOCK_TOKENS + to] = world->scales[(size_t)(2 * from_block + which) * BLOCK_TOKENS + from];
    }
    world->positions[(size_t)to_block * BLOCK_TOKENS + to] = world->positions[(size_t)from_block * BLOCK_TOKENS + from];
    world->accumulated[(size_t)to_block * BLOCK_TOKENS + to] = world->accumulated[(size_t)from_block * BLOCK_TOKENS + from];
}

static void compare_bytes(const struct world *world, const char *what, const char *of, const void *host, const void *device, size_t bytes,
                          size_t a_block) {
    if (bytes == 0) return;
    uint8_t *got = (uint8_t *)malloc(bytes);
    CUDA_CHECK(cudaMemcpy(got, device, bytes, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < bytes; i++)
        if (got[i] != ((const uint8_t *)host)[i]) {
            WRONG("%s %s d %u: %s of block %zu differ from byte %zu on", what, kv_dtype_name(world->shape.dtype), world->shape.d, of, i / a_block,
                  i % a_block);
            break;
        }
    free(got);
}

/* Every byte of the device's pool is the host's. */
static void compare_pool(const struct world *world, const char *what) {
    const struct device_pool *pool = &world->cuda.pool;
    CUDA_CHECK(cudaStreamSynchronize(world->cuda.stream));
    compare_bytes(world, what, "K and V", world->kv, pool->kv, world->kv_bytes, pool->block_bytes);
    compare_bytes(world, what, "scales", world->scales, pool->scales, world->scale_count * sizeof(float), 2 * BLOCK_TOKENS * sizeof(float));
    compare_bytes(world, what, "positions", world->positions, pool->positions, world->slot_count * sizeof(int32_t), BLOCK_TOKENS * sizeof(int32_t));
    compare_bytes(world, what, "accumulated", world->accumulated, pool->accumulated, world->slot_count * sizeof(uint64_t),
                  BLOCK_TOKENS * sizeof(uint64_t));
}

/* ---- checks ---- */

static void check_copies(struct world *world) {
    const uint32_t n = world->shape.n_blocks / 2;
    cuda_copy_blocks(&world->cuda.backend, n, world->ids, world->ids + n);
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t slot = 0; slot < BLOCK_TOKENS; slot++) move_slot(world, world->ids[i], slot, world->ids[n + i], slot);
    compare_pool(world, "copy");
}

/* Some lanes at once: in place, fresh and mixed; survivors none, few, most, all, in runs. */
static void check_compaction(struct world *world, uint32_t rounds) {
    enum { ITEMS = 5 };
    struct random *random = &world->random;
    const uint32_t lane_slots = world->shape.lane_blocks * BLOCK_TOKENS;
    uint32_t *keep = (uint32_t *)malloc(ITEMS * lane_slots * sizeof *keep),
             *destination = (uint32_t *)malloc(ITEMS * world->shape.lane_blocks * sizeof *destination);
    for (uint32_t round = 0; round < rounds; round++) {
        struct compaction items[ITEMS];
        uint32_t n_items = 1 + random_below(random, ITEMS), next = 0, spare = world->shape.n_blocks;
        for (uint32_t i = 0; i < n_items; i++) {
            uint32_t n = random_below(random, 4) ? random_below(random, lane_slots + 1) : random_below(random, 3) * 32, way = random_below(random, 5),
                     count = 0;
            uint32_t *mine = keep + i * lane_slots, *to = destination + i * world->shape.lane_blocks, mixed = random_below(random, 3);
            bool inside = false;
            for (uint32_t slot = 0; slot < n; slot++) {
                if (random_below(random, 20) == 0) inside = !inside;
                bool eighth = random_below(random, 8) == 0;
                if (way == 0 || (way == 1 && eighth) || (way == 2 && !eighth) || (way == 3 && inside)) mine[count++] = slot;
            }
            items[i] = (struct compaction){.source = world->ids + next, .n_slots = n, .keep = mine, .n_keep = count, .destination = to, .lane = 0};
            next += blocks_of(n);
            for (uint32_t b = 0; b < blocks_of(count); b++)
                to[b] = mixed == 0 || (mixed == 1 && random_below(random, 2)) ? items[i].source[b] : world->ids[--spare];
        }
        CHECK(next <= spare);
        cuda_compact(&world->cuda.backend, n_items, items);
        for (uint32_t i = 0; i < n_items; i++)
            for (uint32_t slot = 0; slot < items[i].n_keep; slot++) {
                uint32_t old = items[i].keep[slot];
                move_slot(world, items[i].source[old / BLOCK_TOKENS], old % BLOCK_TOKENS, items[i].destination[slot / BLOCK_TOKENS],
                          slot % BLOCK_TOKENS);
            }
        if (round % 8 == 7 || round + 1 == rounds) compare_pool(world, "compact");
    }
    free(keep), free(destination);
}

static void check_reading(struct world *world) {
    const uint32_t d = world->shape.d, n = world->shape.n_blocks;
    int32_t *positions = (int32_t *)malloc(world->slot_count * sizeof *positions), position;
    float k[HEAD_DIM_MAX], v[HEAD_DIM_MAX];
    memset(positions, POISON, world->slot_count * sizeof *positions);
    cuda_read_positions(&world->cuda.backend, n, world->ids, positions);
    for (size_t i = 0; i < world->slot_count; i++)
        if (positions[i] != world->positions[(size_t)world->ids[i / BLOCK_TOKENS] * BLOCK_TOKENS + i % BLOCK_TOKENS]) {
            WRONG("positions: slot %zu is %d", i, positions[i]);
            break;
        }
    for (uint32_t i = 0; i < 100; i++) {
        uint32_t block = random_below(&world->random, n), slot = random_below(&world->random, BLOCK_TOKENS);
        memset(k, POISON, sizeof k), memset(v, POISON, sizeof v);
        cuda_read_f32(&world->cuda.backend, block, slot, k, v, &position);
        for (uint32_t j = 0; j < d; j++)
            if (k[j] != element_of(world, block, WHICH_K, slot, j) || v[j] != element_of(world, block, WHICH_V, slot, j) ||
                position != world->positions[(size_t)block * BLOCK_TOKENS + slot]) {
                WRONG("read %s d %u: block %u slot %u dim %u: %g %g", kv_dtype_name(world->shape.dtype), d, block, slot, j, (double)k[j],
                      (double)v[j]);
                break;
            }
    }
    free(positions);
}

/* Tables of one sequence over ids; positions ascend from lane to lane with other gaps, so that rows of the window see different numbers of slots, and some see none. */
struct tables {
    uint32_t *lane_first, *lane_tokens;
    size_t *offset;
    int32_t last_position;
};

static const uint32_t lengths[] = {0, 1, 31, 33, 255, 256, 257, 1500, 512, 512};
enum { LENGTHS = sizeof lengths / sizeof *lengths };

static void make_tables(struct world *world, struct tables *tables) {
    const uint32_t n_lanes = world->cuda.n_lanes;
    tables->lane_first = (uint32_t *)check_calloc(n_lanes, sizeof(uint32_t)),
    tables->lane_tokens = (uint32_t *)check_calloc(n_lanes, sizeof(uint32_t));
    tables->offset = (size_t *)check_calloc(n_lanes, sizeof(size_t));
    tables->last_position = 5000;
    uint32_t next = 0;
    for (uint32_t lane = 0; lane < n_lanes; lane++) {
        const uint32_t n = lengths[lane % LENGTHS], early = random_below(&world->random, 60);
        tables->lane_first[lane] = next, tables->lane_tokens[lane] = n;
        int32_t position = tables->last_position - (int32_t)early + 1;
        for (uint32_t slot = n; slot-- > 0;) { /* from the newest: runs and gaps */
            position -= 1 + (int32_t)(random_below(&world->random, 8) == 0 ? random_below(&world->random, 5) : 0);
            world->positions[(size_t)world->ids[next + slot / BLOCK_TOKENS] * BLOCK_TOKENS + slot % BLOCK_TOKENS] = position;
        }
        CHECK(position >= 0);
        next += blocks_of(n);
    }
    CHECK(next <= world->shape.n_blocks);
    upload(world);
}

static void free_tables(struct tables *tables) { free(tables->lane_first), free(tables->lane_tokens), free(tables->offset); }

static void true_scores(const struct world *world, const struct tables *tables, const struct score_request *request, uint32_t lane, float *scores) {
    const uint32_t n = tables->lane_tokens[lane], d = world->shape.d, group = world->shape.group, n_q = world->cuda.n_q,
                   *ids = world->ids + tables->lane_first[lane];
    float *k = (float *)check_calloc((size_t)n * d + 1, 4), *v = (float *)check_calloc((size_t)n * d + 1, 4),
          *q = (float *)check_calloc((size_t)request->n_window * n_q + 1, 4);
    int32_t *positions = (int32_t *)check_calloc(n + 1, 4);
    uint64_t *accumulated = (uint64_t *)check_calloc(n + 1, 8);
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t block = ids[i / BLOCK_TOKENS], slot = i % BLOCK_TOKENS;
        for (uint32_t j = 0; j < d; j++)
            k[i * d + j] = element_of(world, block, WHICH_K, slot, j), v[i * d + j] = element_of(world, block, WHICH_V, slot, j);
        positions[i] = world->positions[(size_t)block * BLOCK_TOKENS + slot],
        accumulated[i] = world->accumulated[(size_t)block * BLOCK_TOKENS + slot];
    }
    for (uint32_t r = 0; r < request->n_window; r++) {
        uint32_t position = (uint32_t)request->last_position - (request->n_window - 1 - r);
        size_t row = (((size_t)(request->ring - 1) * world->shape.n_layers + lane / world->shape.n_kv_heads) * world->shape.ring_rows +
                      position % world->shape.ring_rows) *
                     n_q;
        for (uint32_t j = 0; j < group * d; j++)
            q[r * group * d + j] = widen(world->shape.dtype, world->ring[row + lane % world->shape.n_kv_heads * group * d + j]);
    }
    const struct score_lane plain = {.n_slots = n,
                                     .k = k,
                                     .v = v,
                                     .positions = positions,
                                     .accumulated = accumulated,
                                     .q = q,
                                     .n_window = request->n_window,
                                     .last_position = request->last_position,
                                     .ahead = request->ahead};
    score_lane(&world->program, request->kind, &plain, scores);
    free(k), free(v), free(q), free(positions), free(accumulated);
}

/* Squared error against squared size, per lane. The device has the oracle's inputs bit for bit, so what is left is its arithmetic; a count may tip at the border. */
static double bound_of(enum score_kind kind) { return kind == SCORE_PERSISTENCE ? 2e-3 : kind == SCORE_EXPECTED ? 1e-6 : 1e-9; }

static void check_kind(struct world *world, const struct tables *tables, struct score_request request, float *scores, float *again, float *truth) {
    const uint32_t per_slot = score_per_query_head(request.kind) ? world->shape.group : 1;
    size_t count = 0;
    for (uint32_t lane = 0; lane < world->cuda.n_lanes; lane++) tables->offset[lane] = count, count += (size_t)tables->lane_tokens[lane] * per_slot;
    memset(scores, POISON, count * sizeof *scores), memset(again, POISON, count * sizeof *again);
    request.first_lane = 0, request.n_lanes = world->cuda.n_lanes;
    cuda_score(&world->cuda.backend, &request, scores);
    for (uint32_t lane = 0; lane < world->cuda.n_lanes; lane += 3) { /* other passes, the same numbers */
        request.first_lane = lane, request.n_lanes = world->cuda.n_lanes - lane < 3 ? world->cuda.n_lanes - lane : 3;
        cuda_score(&world->cuda.backend, &request, again);
    }
    if (memcmp(scores, again, count * sizeof *scores) != 0) WRONG("scores of kind %d depend on the lanes beside", request.kind);
    for (uint32_t lane = 0; lane < world->cuda.n_lanes; lane++) {
        const size_t n = (size_t)tables->lane_tokens[lane] * per_slot;
        const float *mine = scores + tables->offset[lane];
        true_scores(world, tables, &request, lane, truth);
        double error = 0, size = 1e-30, worst = 0;
        size_t at = 0;
        for (size_t i = 0; i < n; i++) {
            double e = fabs((double)mine[i] - (double)truth[i]);
            if (!(e <= worst)) worst = e, at = i;
            error += e * e, size += (double)truth[i] * (double)truth[i];
        }
        if (n > 0 && !(error / size < bound_of(request.kind)))
            WRONG("score kind %d %s d %u group %u window %u lane %u of %u slots: error %g; the worst at head %zu slot %zu: %g, expected %g",
                  request.kind, kv_dtype_name(world->shape.dtype), world->shape.d, world->shape.group, request.n_window, lane,
                  tables->lane_tokens[lane], error / size, at / tables->lane_tokens[lane], at % tables->lane_tokens[lane], (double)mine[at],
                  (double)truth[at]);
    }
}

static void check_scores(struct world *world) {
    struct tables tables;
    make_tables(world, &tables);
    size_t most = 0;
    for (uint32_t lane = 0; lane < world->cuda.n_lanes; lane++) most += (size_t)tables.lane_tokens[lane] * world->shape.group;
    float *scores = (float *)malloc(most * sizeof(float)), *again = (float *)malloc(most * sizeof(float)),
          *truth = (float *)malloc(most * sizeof(float));
    const uint32_t windows[] = {1, 33, world->shape.ring_rows};
    for (uint32_t window : windows)
        for (int kind = 0; kind < SCORE_KINDS; kind++) {
            struct score_request request = {};
            request.kind = (enum score_kind)kind, request.ring = 2, request.last_position = tables.last_position, request.n_window = window,
            request.ahead = 64;
            request.block_ids = world->ids, request.lane_first = tables.lane_first, request.lane_tokens = tables.lane_tokens,
            request.offset = tables.offset;
            check_kind(world, &tables, request, scores, again, truth);
        }
    free(scores), free(again), free(truth);
    free_tables(&tables);
}

/* Lists of the same choice on both sides, then a compaction by those that stayed on the device. */
static void check_choice(struct world *world, const struct tables *tables, struct array_backend *array, const char *what) {
    const uint32_t n_lanes = world->cuda.n_lanes, each[] = {1, world->shape.n_kv_heads, n_lanes}, units[] = {1, BLOCK_TOKENS};
    struct cut_lane *cut = (struct cut_lane *)check_calloc(2 * n_lanes, sizeof *cut), *host_cut_lanes = cut + n_lanes;
    struct kept_lane *kept = (struct kept_lane *)check_calloc(2 * n_lanes, sizeof *kept), *host_kept_lanes = kept + n_lanes;
    uint32_t *numbers = (uint32_t *)check_calloc(n_lanes, sizeof *numbers);
    size_t slots = 0;
    for (uint32_t lane = 0; lane < n_lanes; lane++) slots += tables->lane_tokens[lane];
    uint32_t *lists = (uint32_t *)check_calloc(2 * slots, sizeof *lists), *host_lists = lists + slots;
    for (uint32_t lanes_each : each)
        for (uint32_t unit : units) {
            const struct cut_request request = {.lanes_each = lanes_each, .unit = unit, .needed = numbers};
            for (uint32_t g = 0; g < n_lanes / lanes_each; g++) numbers[g] = random_below(&world->random, 800 * lanes_each / unit + 2);
            cuda_cut(&world->cuda.backend, &request, cut);
            host_cut(&array->backend, &request, host_cut_lanes);
            for (uint32_t lane = 0; lane < n_lanes; lane++)
                if (cut[lane].below != host_cut_lanes[lane].below || cut[lane].equal != host_cut_lanes[lane].equal) {
                    WRONG("%s: cut of %u lanes by %u: lane %u has %u below, %u equal; expected %u, %u", what, lanes_each, unit, lane, cut[lane].below,
                          cut[lane].equal, host_cut_lanes[lane].below, host_cut_lanes[lane].equal);
                    break;
                }
        }
    for (uint32_t lane = 0; lane < n_lanes; lane++) numbers[lane] = random_below(&world->random, tables->lane_tokens[lane] + 2);
    cuda_keep(&world->cuda.backend, numbers, kept, lists);
    host_keep(&array->backend, numbers, host_kept_lanes, host_lists);
    struct compaction *items = (struct compaction *)check_calloc(n_lanes, sizeof *items);
    size_t at = 0;
    for (uint32_t lane = 0; lane < n_lanes; at += tables->lane_tokens[lane++]) {
        if (kept[lane].n_keep != host_kept_lanes[lane].n_keep || kept[lane].first_moved != host_kept_lanes[lane].first_moved ||
            memcmp(lists + at, host_lists + at, kept[lane].n_keep * sizeof *lists) != 0)
            WRONG("%s: lane %u keeps %u, first moved %u; expected %u, %u", what, lane, kept[lane].n_keep, kept[lane].first_moved,
                  host_kept_lanes[lane].n_keep, host_kept_lanes[lane].first_moved);
        uint32_t *ids = world->ids + tables->lane_first[lane];
        items[lane] = (struct compaction){
            .source = ids, .n_slots = tables->lane_tokens[lane], .keep = NULL, .n_keep = kept[lane].n_keep, .destination = ids, .lane = lane};
    }
    cuda_compact(&world->cuda.backend, n_lanes, items);
    at = 0;
    for (uint32_t lane = 0; lane < n_lanes; at += tables->lane_tokens[lane++])
        for (uint32_t slot = 0; slot < kept[lane].n_keep; slot++) {
            const uint32_t old = host_lists[at + slot], *ids = items[lane].source;
            move_slot(world, ids[old / BLOCK_TOKENS], old % BLOCK_TOKENS, ids[slot / BLOCK_TOKENS], slot % BLOCK_TOKENS);
        }
    compare_pool(world, what);
    free(cut), free(kept), free(numbers), free(lists), free(items);
}

static void check_ranking(struct world *world) {
    static const enum score_kind kinds[] = {SCORE_SQUARES, SCORE_ATTENTION, SCORE_EXPECTED, SCORE_KEYDIFF, SCORE_ACCUMULATED};
    const uint32_t n_lanes = world->cuda.n_lanes, group = world->shape.group;
    for (uint32_t round = 0; round < 7; round++) {
        struct tables tables;
        make_tables(world, &tables);
        struct rank_request request = {};
        request.source = round < 5 ? RANK_SCORES : round == 5 ? RANK_POSITIONS : RANK_RANDOM, request.seed = round;
        request.fold = round == 0 ? RANK_FOLD_SUM_OF_POOLED : round == 1 ? RANK_FOLD_MEAN_POOLED : RANK_FOLD_MEAN;
        request.pooling = round % 2 ? RANK_POOL_AVERAGE : RANK_POOL_MAX, request.pooling_kernel = 7, request.value_power = round < 3 ? 2 - round : 0;
        request.layer_mean = round == 2, request.protect_below = 4, request.protect_above = tables.last_position - 80;
        struct score_request *score = &request.score;
        score->kind = kinds[round < 5 ? round : 0], score->ring = 2, score->last_position = tables.last_position, score->n_window = 32,
        score->ahead = 64;
        score->block_ids = world->ids, score->lane_first = tables.lane_first, score->lane_tokens = tables.lane_tokens;
        /* What the device scores, and where it lies, for the host to choose by. */
        struct array_lane *lanes = (struct array_lane *)check_calloc(n_lanes, sizeof *lanes);
        size_t slots = 0;
        for (uint32_t lane = 0; lane < n_lanes; lane++) slots += tables.lane_tokens[lane];
        float *raw = (float *)check_calloc(slots * (group + 3), sizeof *raw), *norms = raw + slots * group, *mine = norms + slots,
              *host = mine + slots;
        int32_t *positions = (int32_t *)check_calloc(slots, sizeof *positions);
        for (int values = 0; values < 2; values++) {
            struct score_request plain = *score;
            plain.kind = values ? SCORE_VALUE_NORM : score->kind, plain.n_lanes = n_lanes, plain.offset = tables.offset;
            size_t at = 0;
            for (uint32_t lane = 0; lane < n_lanes; lane++) {
                tables.offset[lane] = at;
                if (values)
                    lanes[lane].norms = norms + at;
                else
                    lanes[lane].raw = raw + at;
                at += (size_t)tables.lane_tokens[lane] * (score_per_query_head(plain.kind) ? group : 1);
            }
            cuda_score(&world->cuda.backend, &plain, values ? norms : raw);
        }
        size_t at = 0;
        for (uint32_t lane = 0; lane < n_lanes; lane++) {
            lanes[lane].n_slots = tables.lane_tokens[lane], lanes[lane].positions = positions + at;
            for (uint32_t slot = 0; slot < tables.lane_tokens[lane]; slot++)
                positions[at++] =
                    world->positions[(size_t)world->ids[tables.lane_first[lane] + slot / BLOCK_TOKENS] * BLOCK_TOKENS + slot % BLOCK_TOKENS];
        }
        struct array_backend *array = array_backend_new(world->shape.n_layers, world->shape.n_kv_heads, group, lanes);
        struct rank_request plain = request;
        plain.score.block_ids = array->block_ids, plain.score.lane_first = array->lane_first, plain.score.lane_tokens = array->lane_tokens;
        uint32_t *protected_slots = (uint32_t *)check_calloc(2 * n_lanes, sizeof *protected_slots);
        char what[96];
        (void)snprintf(what, sizeof what, "choice %u, %s d %u group %u", round, kv_dtype_name(world->shape.dtype), world->shape.d, group);
        cuda_rank(&world->cuda.backend, &request, protected_slots, round % 2 ? mine : NULL);
        host_rank(&array->backend, &plain, protected_slots + n_lanes, host);
        if (memcmp(protected_slots, protected_slots + n_lanes, n_lanes * sizeof *protected_slots) != 0) WRONG("%s: other slots are protected", what);
        for (size_t i = 0; round % 2 && i < slots; i++)
            if (memcmp(&mine[i], &host[i], sizeof *mine) != 0) {
                WRONG("%s: slot %zu of all: %.9g, expected %.9g", what, i, (double)mine[i], (double)host[i]);
                break;
            }
        check_choice(world, &tables, array, what);
        array_backend_free(array);
        free(lanes), free(raw), free(positions), free(protected_slots);
        free_tables(&tables);
    }
}

static double rotated(const struct world *world, double positions, uint32_t i, const float *x) {
    const uint32_t rope = world->shape.rope_dims, half = rope / 2;
    if (i >= rope) return x[i];
    const uint32_t pair = world->shape.halves ? i % half : i / 2, a = world->shape.halves ? pair : 2 * pair,
                   b = world->shape.halves ? pair + half : 2 * pair + 1;
    const double angle = positions * world->frequency[pair];
    return i == a ? x[a] * cos(angle) - x[b] * sin(angle) : x[a] * sin(angle) + x[b] * cos(angle);
}

/* The sinks stand where one rotation of the first keys puts them; all else is untouched. */
static void check_shifts(struct world *world) {
    const int32_t shifts[] = {1, 70, 100000, 0};
    const double step = world->shape.dtype == KV_F16 ? 0x1p-10 : world->shape.dtype == KV_BF16 ? 0x1p-7 : 1.5 / 127;
    const uint32_t n_slots = 35, d = world->shape.d, n_lanes = world->cuda.n_lanes;
    float *before = (float *)malloc((size_t)n_lanes * n_slots * d * sizeof(float));
    uint32_t *lane_first = (uint32_t *)malloc(n_lanes * sizeof(uint32_t));
    CHECK(2 * n_lanes <= world->shape.n_blocks);
    for (uint32_t lane = 0; lane < n_lanes; lane++) {
        lane_first[lane] = 2 * lane;
        for (uint32_t i = 0; i < n_slots; i++) {
            world->positions[(size_t)world->ids[2 * lane + i / BLOCK_TOKENS] * BLOCK_TOKENS + i % BLOCK_TOKENS] = (int32_t)i;
            for (uint32_t j = 0; j < d; j++)
                before[((size_t)lane * n_slots + i) * d + j] =
                    element_of(world, world->ids[2 * lane + i / BLOCK_TOKENS], WHICH_K, i % BLOCK_TOKENS, j);
        }
    }
    upload(world);
    for (size_t n = 0; n < sizeof shifts / sizeof *shifts; n++) {
        struct shift_request request = {};
        request.ring = 2, request.first = n == 0, request.n_slots = n_slots, request.shift = shifts[n], request.block_ids = world->ids,
        request.lane_first = lane_first;
        cuda_shift_sinks(&world->cuda.backend, &request);
        CUDA_CHECK(cudaStreamSynchronize(world->cuda.stream));
        uint8_t *old = (uint8_t *)malloc(world->kv_bytes);
        memcpy(old, world->kv, world->kv_bytes);
        CUDA_CHECK(cudaMemcpy(world->kv, world->cuda.pool.kv, world->kv_bytes, cudaMemcpyDeviceToHost));
        if (world->scale_count)
            CUDA_CHECK(cudaMemcpy(world->scales, world->cuda.pool.scales, world->scale_count * sizeof(float), cudaMemcpyDeviceToHost));
        for (uint32_t lane = 0; lane < n_lanes; lane++)
            for (uint32_t i = 0; i < n_slots; i++) {
                const float *x = before + ((size_t)lane * n_slots + i) * d;
                const uint32_t block = world->ids[2 * lane + i / BLOCK_TOKENS], slot = i % BLOCK_TOKENS;
                double largest = 0, worst = 0;
                for (uint32_t j = 0; j < d; j++) largest = fmax(largest, fabs(rotated(world, shifts[n], j, x)));
                for (uint32_t j = 0; j < d; j++)
                    worst = fmax(worst, fabs((double)element_of(world, block, WHICH_K, slot, j) - rotated(world, shifts[n], j, x)));
                if (!(worst <= step * largest))
                    WRONG("shift %d %s d %u lane %u slot %u: off by %g of %g", shifts[n], kv_dtype_name(world->shape.dtype), d, lane, i, worst,
                          largest);
                memcpy(old + (row_of(world, block, WHICH_K, slot) - world->kv), row_of(world, block, WHICH_K, slot),
                       d * element_bytes(world->shape.dtype));
            }
        if (memcmp(old, world->kv, world->kv_bytes) != 0) WRONG("shift %d: more than the sinks' keys was written", shifts[n]);
        free(old);
    }
    free(before), free(lane_first);
}

static int check(void) {
    static const struct { uint32_t d, group; } sizes[] = {{8, 2}, {32, 2}, {40, 2}, {64, 3}, {80, 1}, {96, 5}, {128, 4}, {128, 8}};
    static const enum kv_dtype dtypes[] = {KV_F16, KV_BF16, KV_Q8};
    static struct world world;
    for (const auto &size : sizes)
        for (enum kv_dtype dtype : dtypes) {
            struct shape shape = {};
            shape.dtype = dtype, shape.d = size.d, shape.group = size.group, shape.n_layers = 5, shape.n_kv_heads = 2, shape.n_blocks = 520,
            shape.lane_blocks = 50;
            shape.ring_rows = 40, shape.halves = size.d % 64 == 0, shape.rope_dims = size.d == 64 ? 32 : size.d;
            world_open(&world, &shape);
            const uint32_t before = n_wrong;
            check_reading(&world);
            check_copies(&world);
            check_compaction(&world, 64);
            check_scores(&world);
            check_ranking(&world);
            check_shifts(&world);
            printf("%-4s d %3u group %u: %s\n", kv_dtype_name(dtype), size.d, size.group, n_wrong == before ? "ok" : "WRONG");
            world_close(&world);
        }
    return n_wrong > 0;
}

/* ---- speed ---- */

static int compare_doubles(const void *a, const void *b) {
    return *(const double *)a < *(const double *)b ? -1 : *(const double *)a > *(const double *)b;
}

static double seconds(void) {
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

enum { RUNS = 15 };

/* Median time from the call to the end of the device's work, and of the device's part alone. */
template <typename F> static void measure(const char *what, double bytes, double copy_rate, cudaStream_t stream, const F &run) {
    double whole[RUNS], part[RUNS];
    cudaEvent_t begin, end;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    run();
    for (int i = 0; i < RUNS; i++) {
        CUDA_CHECK(cudaStreamSynchronize(stream));
        double start = seconds();
        CUDA_CHECK(cudaEventRecord(begin, stream));
        run();
        CUDA_CHECK(cudaEventRecord(end, stream));
        CUDA_CHECK(cudaStreamSynchronize(stream));
        whole[i] = seconds() - start;
        float ms;
        CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
        part[i] = ms * 1e-3;
    }
    qsort(whole, RUNS, sizeof *whole, compare_doubles);
    qsort(part, RUNS, sizeof *part, compare_doubles);
    printf("%-44s %9.1f us (device's clock %9.1f us)  %8.1f MB  %7.1f GB/s  %5.1f %% of copies\n", what, whole[RUNS / 2] * 1e6, part[RUNS / 2] * 1e6,
           bytes * 1e-6, bytes / part[RUNS / 2] * 1e-9, copy_rate > 0 ? 100 * bytes / part[RUNS / 2] / copy_rate : 100);
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
}

static double copy_rate(cudaStream_t stream) {
    const size_t bytes = (size_t)1 << 30;
    void *a = there(NULL, bytes), *b = there(NULL, bytes);
    cudaEvent_t begin, end;
    double best = 0;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    for (int i = 0; i < RUNS; i++) {
        float ms;
        CUDA_CHECK(cudaEventRecord(begin, stream));
        CUDA_CHECK(cudaMemcpyAsync(b, a, bytes, cudaMemcpyDeviceToDevice, stream));
        CUDA_CHECK(cudaEventRecord(end, stream));
        CUDA_CHECK(cudaStreamSynchronize(stream));
        CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (2.0 * bytes / (ms * 1e-3) > best) best = 2.0 * bytes / (ms * 1e-3);
    }
    CUDA_CHECK(cudaFree(a));
    CUDA_CHECK(cudaFree(b));
    printf("copies on the device: %.1f GB/s read and written\n", best * 1e-9);
    return best;
}

/* All that kv_compress asks of a sequence whose lanes hold `slots` each and shall hold `kept` on average. */
static void bench_choice(struct world *world, const uint32_t *lane_first, const uint32_t *lane_tokens, uint32_t slots, uint32_t kept, double rate) {
    struct cuda *cuda = &world->cuda;
    const uint32_t n_lanes = cuda->n_lanes, needed = n_lanes * (blocks_of(slots) - kept / BLOCK_TOKENS);
    struct rank_request rank = {};
    rank.fold = RANK_FOLD_SUM_OF_POOLED, rank.pooling = RANK_POOL_MAX, rank.pooling_kernel = 7, rank.protect_below = 4,
    rank.protect_above = (int64_t)slots - 33;
    rank.score.kind = SCORE_SQUARES, rank.score.ring = 1, rank.score.last_position = (int32_t)slots - 1, rank.score.n_window = 32;
    rank.score.block_ids = world->ids, rank.score.lane_first = lane_first, rank.score.lane_tokens = lane_tokens;
    uint32_t *protected_slots = (uint32_t *)check_calloc(n_lanes, 4), *evict = (uint32_t *)check_calloc(n_lanes, 4);
    struct cut_lane *cut = (struct cut_lane *)check_calloc(n_lanes, sizeof *cut);
    struct kept_lane *lanes = (struct kept_lane *)check_calloc(n_lanes, sizeof *lanes);
    struct compaction *items = (struct compaction *)check_calloc(n_lanes, sizeof *items);
    const struct cut_request request = {.lanes_each = n_lanes, .unit = BLOCK_TOKENS, .needed = &needed};
    char what[64];
    (void)snprintf(what, sizeof what, "rank %u x %u: squares, window 32", n_lanes, slots);
    measure(what, (double)n_lanes * slots * 512, rate, cuda->stream, [&] { cuda_rank(&cuda->backend, &rank, protected_slots, NULL); });
    measure("cut: whole blocks over all lanes", (double)n_lanes * slots * 16, rate, cuda->stream, [&] { cuda_cut(&cuda->backend, &request, cut); });
    for (uint32_t lane = 0; lane < n_lanes; lane++)
        evict[lane] = select_evictions(slots, BLOCK_TOKENS, select_units(slots, protected_slots[lane], BLOCK_TOKENS, cut[lane].below));
    measure("keep", (double)n_lanes * slots * 20, rate, cuda->stream, [&] { cuda_keep(&cuda->backend, evict, lanes, NULL); });
    uint64_t moved = 0;
    for (uint32_t lane = 0; lane < n_lanes; lane++) {
        const uint32_t *ids = world->ids + lane_first[lane];
        items[lane] =
            (struct compaction){.source = ids, .n_slots = slots, .keep = NULL, .n_keep = lanes[lane].n_keep, .destination = ids, .lane = lane};
        moved += lanes[lane].n_keep - lanes[lane].first_moved;
    }
    measure("compact by these lists", 2.0 * (double)moved * (512 + 12), rate, cuda->stream, [&] { cuda_compact(&cuda->backend, n_lanes, items); });
    free(protected_slots), free(evict), free(cut), free(lanes), free(items);
}

/* A sequence of the 8B shape at the end of its prompt: 256 lanes of 6,000 slots. */
static int bench(void) {
    enum { SLOTS = 6000, KEPT = 750 };
    static struct world world;
    struct shape shape = {};
    shape.dtype = KV_F16, shape.d = 128, shape.group = 4, shape.n_layers = 32, shape.n_kv_heads = 8, shape.lane_blocks = 190,
    shape.n_blocks = 256 * 190;
    shape.ring_rows = 32, shape.rope_dims = 128;
    world_open(&world, &shape);
    struct cuda *cuda = &world.cuda;
    const uint32_t n_lanes = cuda->n_lanes;
    const double rate = copy_rate(cuda->stream);
    uint32_t *keep = (uint32_t *)malloc((size_t)n_lanes * SLOTS * sizeof *keep), *lane_first = (uint32_t *)malloc(n_lanes * 4),
             *lane_tokens = (uint32_t *)malloc(n_lanes * 4);
    size_t *offset = (size_t *)malloc(n_lanes * sizeof *offset);
    struct compaction *items = (struct compaction *)malloc(n_lanes * sizeof *items);
    float *scores = (float *)malloc((size_t)n_lanes * SLOTS * shape.group * sizeof(float));
    for (uint32_t lane = 0; lane < n_lanes; lane++) {
        lane_first[lane] = lane * shape.lane_blocks, lane_tokens[lane] = SLOTS;
        uint32_t n = 0;
        for (uint32_t i = 0; i < SLOTS; i++) {
            if (random_below(&world.random, SLOTS - i) < KEPT - n) keep[(size_t)lane * SLOTS + n++] = i;
            world.positions[(size_t)world.ids[lane_first[lane] + i / BLOCK_TOKENS] * BLOCK_TOKENS + i % BLOCK_TOKENS] = (int32_t)i;
        }
        items[lane] = (struct compaction){.source = world.ids + lane_first[lane],
                                          .n_slots = SLOTS,
                                          .keep = keep + (size_t)lane * SLOTS,
                                          .n_keep = n,
                                          .destination = world.ids + lane_first[lane],
                                          .lane = lane};
    }
    upload(&world);
    const double slot = 2 * 128 * 2, meta = 12;
    measure("compact 256 lanes x 6000 slots to 750", 2.0 * n_lanes * (double)KEPT * (slot + meta), rate, cuda->stream,
            [&] { cuda_compact(&cuda->backend, n_lanes, items); });
    measure("copy 2048 blocks", 2.0 * 2048 * 32 * (slot + meta), rate, cuda->stream,
            [&] { cuda_copy_blocks(&cuda->backend, 2048, world.ids, world.ids + 4096); });
    static const struct {
        enum score_kind kind;
        const char *name;
        double row_bytes;
    } kinds[] = {{SCORE_SQUARES, "score: squares, window 32", 2 * 128 * 2},
                 {SCORE_EXPECTED, "score: expected, window 32", 128 * 2},
                 {SCORE_KEYDIFF, "score: keydiff", 2 * 128 * 2},
                 {SCORE_VALUE_NORM, "score: value norms", 128 * 2},
                 {SCORE_ACCUMULATED, "score: accumulated", 8}};
    for (const auto &kind : kinds) {
        const uint32_t per_slot = score_per_query_head(kind.kind) ? shape.group : 1;
        for (uint32_t lane = 0; lane < n_lanes; lane++) offset[lane] = (size_t)lane * SLOTS * per_slot;
        struct score_request request = {};
        request.kind = kind.kind, request.ring = 1, request.last_position = SLOTS - 1, request.n_window = 32, request.ahead = 512,
        request.n_lanes = n_lanes;
        request.block_ids = world.ids, request.lane_first = lane_first, request.lane_tokens = lane_tokens, request.offset = offset;
        measure(kind.name, (double)n_lanes * (double)SLOTS * kind.row_bytes, rate, cuda->stream,
                [&] { cuda_score(&cuda->backend, &request, scores); });
    }
    bench_choice(&world, lane_first, lane_tokens, SLOTS, KEPT / BLOCK_TOKENS * BLOCK_TOKENS, rate);
    for (uint32_t lane = 0; lane < n_lanes; lane++) lane_tokens[lane] = 768 + 16;
    bench_choice(&world, lane_first, lane_tokens, 768 + 16, 768, rate);
    free(keep), free(lane_first), free(lane_tokens), free(offset), free(items), free(scores);
    world_close(&world);
    return 0;
}

int main(int argc, char **argv) {
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || n == 0) return puts("skipped: no CUDA device"), 77;
    if (argc == 2 && strcmp(argv[1], "--bench") == 0) return bench();
    if (argc == 2 && strcmp(argv[1], "--check") == 0) return check();
    return fprintf(stderr, "usage: gpu_services --check | --bench\n"), 2;
}
