/* Compaction of lanes: kept slots move forward in order. Lanes are shared among the workers; within one, source blocks are read in order and each row of
 * the layout (layout.h) is squeezed by itself, so that memory is walked block by block and not slot by slot. */
#include <string.h>

#include "base/check.h"
#include "kernels/cpu/cpu.h"

struct compacting {
    struct cpu *cpu;
    const struct compaction *items;
};

/* Up to 32 kept slots of one source block, as far as they go into one destination block: slot from[i] becomes to + i. */
struct run {
    uint32_t n, to;
    uint8_t from[BLOCK_TOKENS];
};

/* One row of 32 elements a block. In place is fine: an element never moves backward. */
static void squeeze_32(const uint32_t *source, uint32_t *destination, const struct run *run) {
    for (uint32_t i = 0; i < run->n; i++) destination[run->to + i] = source[run->from[i]];
}

static void squeeze_64(const uint64_t *source, uint64_t *destination, const struct run *run) {
    for (uint32_t i = 0; i < run->n; i++) destination[run->to + i] = source[run->from[i]];
}

/* V of two-byte elements, [16 pairs][dims][2]: a destination slot takes one half of each element pair. */
static void move_values_16(const uint16_t *source, uint16_t *destination, uint32_t dims, const struct run *run) {
    for (uint32_t i = 0; i < run->n; i++) {
        uint32_t to = run->to + i, from = run->from[i];
        const uint16_t *a = source + (size_t)(from / 2) * dims * 2 + from % 2;
        uint16_t *b = destination + (size_t)(to / 2) * dims * 2 + to % 2;
        for (uint32_t d = 0; d < dims; d++) b[2 * d] = a[2 * d];
    }
}

static void move_values_32(const uint32_t *source, uint32_t *destination, uint32_t dims, const struct run *run) {
    for (uint32_t i = 0; i < run->n; i++) {
        uint32_t to = run->to + i, from = run->from[i];
        const uint32_t *a = source + (size_t)(from / 2) * dims * 2 + from % 2;
        uint32_t *b = destination + (size_t)(to / 2) * dims * 2 + to % 2;
        for (uint32_t d = 0; d < dims; d++) b[2 * d] = a[2 * d];
    }
}

static void move_run(struct cpu *cpu, uint32_t source, uint32_t destination, const struct run *run) {
    const struct kv_shape *shape = &cpu->kv;
    const uint32_t dims = shape->dims;
    const uint8_t *from = cpu->pool + source * shape->bytes;
    uint8_t *to = cpu->pool + destination * shape->bytes;
    const void *from_v = from + shape->v_offset;
    void *to_v = to + shape->v_offset;
    switch (shape->dtype) {
    case KV_F32:
        for (uint32_t row = 0; row < dims / 2; row++)
            squeeze_64((const uint64_t *)(const void *)from + row * BLOCK_TOKENS, (uint64_t *)(void *)to + row * BLOCK_TOKENS, run);
        move_values_32(from_v, to_v, dims, run);
        break;
    case KV_Q8:
        for (uint32_t row = 0; row < dims / 4; row++)
            squeeze_32((const uint32_t *)(const void *)from + row * BLOCK_TOKENS, (uint32_t *)(void *)to + row * BLOCK_TOKENS, run);
        for (uint32_t i = 0; i < run->n; i++) memmove((uint8_t *)to_v + (run->to + i) * dims, (const uint8_t *)from_v + run->from[i] * dims, dims);
        for (uint32_t row = 0; row < 2; row++)
            squeeze_32((const uint32_t *)(const void *)(from + shape->scale_offset) + row * BLOCK_TOKENS,
                       (uint32_t *)(void *)(to + shape->scale_offset) + row * BLOCK_TOKENS, run);
        break;
    default:
        for (uint32_t row = 0; row < dims / 2; row++)
            squeeze_32((const uint32_t *)(const void *)from + row * BLOCK_TOKENS, (uint32_t *)(void *)to + row * BLOCK_TOKENS, run);
        move_values_16(from_v, to_v, dims, run);
    }
    for (uint32_t i = 0; i < run->n; i++) {
        size_t a = (size_t)source * BLOCK_TOKENS + run->from[i], b = (size_t)destination * BLOCK_TOKENS + run->to + i;
        cpu->positions[b] = cpu->positions[a];
        if (cpu->limits.accumulators) cpu->accumulated[b] = cpu->accumulated[a];
    }
}

static void compact_lane(struct cpu *cpu, const struct compaction *item) {
    const uint32_t *keep = host_kept(&cpu->backend, item);
    for (uint32_t i = 0; i < item->n_keep;) {
        uint32_t source = keep[i] / BLOCK_TOKENS, destination = i / BLOCK_TOKENS;
        struct run run = {.to = i % BLOCK_TOKENS};
        for (; i < item->n_keep && keep[i] / BLOCK_TOKENS == source && i / BLOCK_TOKENS == destination; i++) {
            CHECK(keep[i] < item->n_slots && (i == 0 || keep[i] > keep[i - 1]));
            run.from[run.n++] = (uint8_t)(keep[i] % BLOCK_TOKENS);
        }
        bool stays = item->source[source] == item->destination[destination] && run.from[0] == run.to && run.from[run.n - 1] == run.to + run.n - 1;
        if (!stays) move_run(cpu, item->source[source], item->destination[destination], &run);
    }
}

static void stage_compact(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    (void)stage, (void)worker;
    const struct compacting *compacting = context;
    for (uint32_t i = first; i < end; i++) compact_lane(compacting->cpu, &compacting->items[i]);
}

void cpu_compact(struct backend *backend, uint32_t count, const struct compaction *items) {
    struct cpu *cpu = (struct cpu *)backend;
    struct compacting compacting = {cpu, items};
    workers_run(cpu->workers, &compacting, &(struct stage){.run = stage_compact, .n_units = count}, 1);
}
