/* Compaction of lanes: kept slots move forward in order. Lanes are shared among the workers; within one, source blocks are read in order, so that
 * memory is walked block by block and not slot by slot; a block's rows are the instruction sets' (compact.inc.h). */
#include "base/check.h"
#include "kernels/cpu/cpu.h"

struct compacting {
    struct cpu *cpu;
    const struct compaction *items;
};

static void move_run(struct cpu *cpu, uint32_t source, uint32_t destination, const struct slot_run *run) {
    const struct kv_shape *shape = &cpu->kv;
    cpu->isa->move_slots(shape, cpu->pool + source * shape->bytes, cpu->pool + destination * shape->bytes, run);
    const size_t from = (size_t)source * BLOCK_TOKENS, to = (size_t)destination * BLOCK_TOKENS + run->to;
    for (uint32_t i = 0; i < run->n; i++) cpu->positions[to + i] = cpu->positions[from + run->from[i]];
    for (uint32_t i = 0; cpu->limits.accumulators && i < run->n; i++) cpu->accumulated[to + i] = cpu->accumulated[from + run->from[i]];
}

static void compact_lane(struct cpu *cpu, const struct compaction *item) {
    const uint32_t *keep = host_kept(&cpu->backend, item);
    for (uint32_t i = 0; i < item->n_keep;) {
        uint32_t source = keep[i] / BLOCK_TOKENS, destination = i / BLOCK_TOKENS;
        struct slot_run run = {.to = i % BLOCK_TOKENS};
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
