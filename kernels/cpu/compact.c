/* Compaction of lanes: kept slots move forward in order. Lanes are shared among the workers; within one, source blocks are read in order, so that
 * memory is walked block by block and not slot by slot; a block's rows are the instruction sets' (compact.inc.h). */
#include <string.h>

#include "base/check.h"
#include "kernels/cpu/cpu.h"
#include "kernels/kivi.h"

struct compacting {
    struct cpu *cpu;
    const struct compaction *items;
};

/* Positions and accumulated attention. */
static void move_marks(struct cpu *cpu, uint32_t source, uint32_t destination, const struct slot_run *run) {
    const size_t from = (size_t)source * BLOCK_TOKENS, to = (size_t)destination * BLOCK_TOKENS + run->to;
    for (uint32_t i = 0; i < run->n; i++) cpu->positions[to + i] = cpu->positions[from + run->from[i]];
    for (uint32_t i = 0; cpu->limits.accumulators && i < run->n; i++) cpu->accumulated[to + i] = cpu->accumulated[from + run->from[i]];
}

static void move_run(struct cpu *cpu, uint32_t source, uint32_t destination, const struct slot_run *run) {
    cpu->isa->move_slots(&cpu->kv, cpu->pool + source * cpu->kv.bytes, cpu->pool + destination * cpu->kv.bytes, run);
    move_marks(cpu, source, destination, run);
}

/* KIVI: leading slots of the lane that lie in blocks which the next row reads as codes. They move by whole blocks; the others are f16 blocks' and stay such. */
static uint32_t coded_slots(const struct cpu *cpu, const struct compaction *item) {
    if (cpu->kv.raw_bytes == 0 || item->n_slots == 0) return 0;
    const uint32_t last = item->n_slots - 1;
    int32_t newest = cpu->positions[(size_t)item->source[last / BLOCK_TOKENS] * BLOCK_TOKENS + last % BLOCK_TOKENS];
    return count_codes(cpu, item->source, item->n_slots, newest + 1) * BLOCK_TOKENS;
}

static void move_block(struct cpu *cpu, uint32_t source, uint32_t destination) {
    struct slot_run all = {.n = BLOCK_TOKENS};
    if (source == destination) return;
    raw_forget(&cpu->raw, destination);
    for (uint32_t i = 0; i < BLOCK_TOKENS; i++) all.from[i] = (uint8_t)i;
    memcpy(cpu->pool + destination * cpu->kv.bytes, cpu->pool + source * cpu->kv.bytes, cpu->kv.bytes);
    move_marks(cpu, source, destination, &all);
}

static uint32_t move_coded(struct cpu *cpu, const struct compaction *item, const uint32_t *keep, uint32_t coded) {
    uint32_t i = 0;
    for (; i < item->n_keep && keep[i] < coded; i += BLOCK_TOKENS) {
        CHECK(kivi_whole_block(keep, item->n_keep, i));
        move_block(cpu, item->source[keep[i] / BLOCK_TOKENS], item->destination[i / BLOCK_TOKENS]);
    }
    return i;
}

/* The next kept slots, from *i on, that lie in one source block and go into one destination block. */
static struct slot_run next_run(const struct compaction *item, const uint32_t *keep, uint32_t *i) {
    uint32_t source = keep[*i] / BLOCK_TOKENS, destination = *i / BLOCK_TOKENS;
    struct slot_run run = {.to = *i % BLOCK_TOKENS};
    for (; *i < item->n_keep && keep[*i] / BLOCK_TOKENS == source && *i / BLOCK_TOKENS == destination; ++*i) {
        CHECK(keep[*i] < item->n_slots && (*i == 0 || keep[*i] > keep[*i - 1]));
        run.from[run.n++] = (uint8_t)(keep[*i] % BLOCK_TOKENS);
    }
    return run;
}

static void compact_lane(struct cpu *cpu, const struct compaction *item) {
    const uint32_t *keep = host_kept(&cpu->backend, item);
    for (uint32_t i = 0; i < item->n_keep;) {
        uint32_t source = keep[i] / BLOCK_TOKENS, destination = i / BLOCK_TOKENS;
        struct slot_run run = next_run(item, keep, &i);
        bool stays = item->source[source] == item->destination[destination] && run.from[0] == run.to && run.from[run.n - 1] == run.to + run.n - 1;
        if (!stays) move_run(cpu, item->source[source], item->destination[destination], &run);
    }
}

static void stage_compact(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    (void)stage, (void)worker;
    const struct compacting *compacting = context;
    for (uint32_t i = first; i < end; i++) compact_lane(compacting->cpu, &compacting->items[i]);
}

/* The residual's numbers to where they cannot be overwritten, and places for its destinations. */
static void move_places(struct cpu *cpu, const struct compaction *item, uint32_t first_source, uint32_t first_destination, uint8_t *numbers) {
    const uint32_t n_sources = (item->n_slots + BLOCK_TOKENS - 1) / BLOCK_TOKENS - first_source;
    CHECK(n_sources <= KIVI_RAW_BLOCKS);
    for (uint32_t k = 0; k < n_sources; k++)
        memcpy(numbers + k * cpu->kv.raw_bytes, raw_block(cpu, item->source[first_source + k]), cpu->kv.raw_bytes);
    for (uint32_t b = first_destination; b * BLOCK_TOKENS < item->n_keep; b++) (void)raw_take(&cpu->raw, item->destination[b]);
}

/* KIVI: on the engine's thread, since places are handed about. Of the residual there are three blocks a lane at most. */
static void compact_kivi(struct cpu *cpu, const struct compaction *item) {
    const uint32_t *keep = host_kept(&cpu->backend, item), coded = coded_slots(cpu, item), first = move_coded(cpu, item, keep, coded);
    uint8_t *numbers = cpu->workers_scratch[0].raw;
    move_places(cpu, item, coded / BLOCK_TOKENS, first / BLOCK_TOKENS, numbers);
    for (uint32_t i = first; i < item->n_keep;) {
        const uint32_t source = keep[i] / BLOCK_TOKENS, destination = item->destination[i / BLOCK_TOKENS];
        const struct slot_run run = next_run(item, keep, &i);
        cpu->isa->move_slots(&cpu->raw_shape, numbers + (source - coded / BLOCK_TOKENS) * cpu->kv.raw_bytes, raw_block(cpu, destination), &run);
        move_marks(cpu, item->source[source], destination, &run);
    }
    for (uint32_t b = 0; b * BLOCK_TOKENS < item->n_keep; b++) cpu->closed[item->destination[b]] = (b + 1) * BLOCK_TOKENS <= item->n_keep;
    for (uint32_t b = first / BLOCK_TOKENS; b < item->n_keep / BLOCK_TOKENS; b++)
        if (keep[(b + 1) * BLOCK_TOKENS - 1] != (b + 1) * BLOCK_TOKENS - 1 || item->source[b] != item->destination[b])
            close_lane(cpu, item->destination, b * BLOCK_TOKENS, (b + 1) * BLOCK_TOKENS);
}

/* What is read keeps its place while others are given away: it was just used. */
static void use_sources(struct cpu *cpu, const struct compaction *item) {
    for (uint32_t slot = coded_slots(cpu, item); slot < item->n_slots; slot += BLOCK_TOKENS) {
        CHECK(cpu->raw.of[item->source[slot / BLOCK_TOKENS]] != RAW_NONE);
        (void)raw_take(&cpu->raw, item->source[slot / BLOCK_TOKENS]);
    }
}

void cpu_compact(struct backend *backend, uint32_t count, const struct compaction *items) {
    struct cpu *cpu = (struct cpu *)backend;
    struct compacting compacting = {cpu, items};
    for (uint32_t i = 0; cpu->kv.raw_bytes && i < count; i++) use_sources(cpu, &items[i]);
    for (uint32_t i = 0; cpu->kv.raw_bytes && i < count; i++) compact_kivi(cpu, &items[i]);
    if (cpu->kv.raw_bytes == 0) workers_run(cpu->workers, &compacting, &(struct stage){.run = stage_compact, .n_units = count}, 1);
}
