/* What the cuda backend does to cached slots between steps (services.cu), alone on a device: copies, compaction, reading, shifted sinks, every byte of the pool against plain host loops. See
 * services_world.h. */
#include "tests/gpu/services_world.h"

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
    float k[HEAD_DIM_MAX], v[HEAD_DIM_MAX], key[HEAD_DIM_MAX];
    const float slack = world->shape.dtype == KV_Q8 ? 1e-5f : 0; /* of sums of up to 128 numbers of up to 3 */
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
        key_of(world, block, slot, key);
        for (uint32_t j = 0; j < d; j++)
            if (!(fabsf(k[j] - key[j]) <= slack) || v[j] != element_of(world, block, WHICH_V, slot, j) ||
                position != world->positions[(size_t)block * BLOCK_TOKENS + slot]) {
                WRONG("read %s d %u: block %u slot %u dim %u: %g %g", kv_dtype_name(world->shape.dtype), d, block, slot, j, (double)k[j],
                      (double)v[j]);
                break;
            }
    }
    free(positions);
}

static double rotated(const struct world *world, double positions, uint32_t i, const float *x) {
    const uint32_t rope = world->shape.rope_dims, half = rope / 2;
    if (i >= rope) return x[i];
    const uint32_t pair = world->shape.halves ? i % half : i / 2, a = world->shape.halves ? pair : 2 * pair,
                   b = world->shape.halves ? pair + half : 2 * pair + 1;
    const double angle = positions * world->frequency[pair];
    return i == a ? x[a] * cos(angle) - x[b] * sin(angle) : x[a] * sin(angle) + x[b] * cos(angle);
}

/* The sinks stand where one rotation of the first keys puts them; all else is untouched. Of q8, by half a step of the largest number that is cached. */
static void check_shifts(struct world *world) {
    const int32_t shifts[] = {1, 70, 100000, 0};
    const double step = world->shape.dtype == KV_F16 ? 0x1p-10 : world->shape.dtype == KV_BF16 ? 0x1p-7 : 0.51 / 127;
    const uint32_t n_slots = 35, d = world->shape.d, n_lanes = world->cuda.n_lanes;
    float *before = (float *)malloc((size_t)n_lanes * n_slots * d * sizeof(float));
    uint32_t *lane_first = (uint32_t *)malloc(n_lanes * sizeof(uint32_t));
    CHECK(2 * n_lanes <= world->shape.n_blocks);
    for (uint32_t lane = 0; lane < n_lanes; lane++) {
        lane_first[lane] = 2 * lane;
        for (uint32_t i = 0; i < n_slots; i++) {
            world->positions[(size_t)world->ids[2 * lane + i / BLOCK_TOKENS] * BLOCK_TOKENS + i % BLOCK_TOKENS] = (int32_t)i;
            key_of(world, world->ids[2 * lane + i / BLOCK_TOKENS], i % BLOCK_TOKENS, before + ((size_t)lane * n_slots + i) * d);
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
                float there[HEAD_DIM_MAX], expected[HEAD_DIM_MAX];
                double largest = 0, worst = 0;
                for (uint32_t j = 0; j < d; j++) there[j] = (float)rotated(world, shifts[n], j, x);
                transform(world, there, expected);
                for (uint32_t j = 0; j < d; j++) {
                    largest = fmax(largest, fabs((double)expected[j]));
                    worst = fmax(worst, fabs((double)element_of(world, block, WHICH_K, slot, j) - (double)expected[j]));
                }
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

static void check(struct world *world) {
    check_reading(world);
    check_copies(world);
    check_compaction(world, 64);
    check_shifts(world);
}

/* ---- speed ---- */

/* A sequence of the 8B shape at the end of its prompt: one slot in eight stays, chosen at random. */
static void bench(void) {
    enum { KEPT = 750 };
    static struct world world;
    static uint32_t lane_first[LANES_8B], keep[LANES_8B][KEPT];
    static struct compaction items[LANES_8B];
    const double rate = open_8b(&world, lane_first), slot_bytes = 2 * 128 * 2 + 12;
    for (uint32_t lane = 0; lane < LANES_8B; lane++) {
        const uint32_t *ids = world.ids + lane_first[lane];
        uint32_t n = 0;
        for (uint32_t i = 0; i < SLOTS_8B && n < KEPT; i++)
            if (random_below(&world.random, SLOTS_8B - i) < KEPT - n) keep[lane][n++] = i;
        items[lane] = (struct compaction){.source = ids, .n_slots = SLOTS_8B, .keep = keep[lane], .n_keep = n, .destination = ids, .lane = lane};
    }
    struct backend *backend = &world.cuda.backend;
    measure("compact 256 lanes x 6000 slots to 750", 2.0 * (double)LANES_8B * (double)KEPT * slot_bytes, rate, world.cuda.stream,
            [&] { cuda_compact(backend, LANES_8B, items); });
    measure("copy 2048 blocks", 2.0 * 2048 * 32 * slot_bytes, rate, world.cuda.stream,
            [&] { cuda_copy_blocks(backend, 2048, world.ids, world.ids + 4096); });
    world_close(&world);
}

int main(int argc, char **argv) { return run_program(argc, argv, check, bench); }
