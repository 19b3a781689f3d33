/* KIVI on the cpu backend: which blocks of a lane a row reads as codes, where the others lie (raw.h) during a step and behind it, and the closing of filled blocks. Other dtypes pass through
 * here without a trace. The engine's thread, but for count_codes, residual_of and close_lane. */
#include <string.h>

#include "base/check.h"
#include "kernels/cpu/cpu.h"
#include "kernels/kivi.h"

static uint32_t blocks_for(uint32_t slots) { return (slots + BLOCK_TOKENS - 1) / BLOCK_TOKENS; }

/* Blocks are in order of age: the search from the newest on ends after at most three. */
uint32_t count_codes(const struct cpu *cpu, const uint32_t *blocks, uint32_t before, int32_t position) {
    uint32_t n = before / BLOCK_TOKENS;
    while (n > 0 && !kivi_reads_codes(cpu->positions[(size_t)blocks[n - 1] * BLOCK_TOKENS + BLOCK_TOKENS - 1], position)) n--;
    return n;
}

struct residual residual_of(const struct cpu *cpu, const uint32_t *blocks, uint32_t before, int32_t position) {
    if (cpu->kv.raw_bytes == 0) return (struct residual){0};
    return (struct residual){.pool = cpu->raw_pool, .of = cpu->raw.of, .n_codes = count_codes(cpu, blocks, before, position)};
}

struct residual residual_now(const struct cpu *cpu, const uint32_t *blocks, uint32_t n_slots, int32_t last_position) {
    if (cpu->kv.raw_bytes == 0 || n_slots == 0) return (struct residual){0};
    int32_t newest = cpu->positions[(size_t)blocks[(n_slots - 1) / BLOCK_TOKENS] * BLOCK_TOKENS + (n_slots - 1) % BLOCK_TOKENS];
    return residual_of(cpu, blocks, n_slots, (newest > last_position ? newest : last_position) + 1);
}

uint8_t *raw_block(const struct cpu *cpu, uint32_t block) {
    CHECK(cpu->raw.of[block] != RAW_NONE);
    return cpu->raw_pool + (size_t)cpu->raw.of[block] * cpu->kv.raw_bytes;
}

void close_lane(const struct cpu *cpu, const uint32_t *blocks, uint32_t first_slot, uint32_t end_slot) {
    for (uint32_t b = first_slot / BLOCK_TOKENS; b < end_slot / BLOCK_TOKENS; b++)
        cpu->isa->close_block(&cpu->kv, raw_block(cpu, blocks[b]), cpu->pool + (size_t)blocks[b] * cpu->kv.bytes, false);
}

/* A lane of a sequence in this step. The positions of rows to come are known: they follow one another. */
struct lane_step {
    const uint32_t *blocks;
    uint32_t before, end; /* slots before and after the step */
    uint32_t first, held,
        inner; /* blocks from `first` on are read in f16 by some row; `held` of them were there before; those up to `inner` not by the row after the step */
};

static uint32_t codes_after(const struct cpu *cpu, const struct lane_step *lane, int32_t first_position, int32_t next) {
    uint32_t n = lane->end / BLOCK_TOKENS;
    for (; n > 0; n--) {
        uint32_t last = n * BLOCK_TOKENS - 1; /* slot */
        int32_t newest = last >= lane->before ? first_position + (int32_t)(last - lane->before)
                                              : cpu->positions[(size_t)lane->blocks[n - 1] * BLOCK_TOKENS + BLOCK_TOKENS - 1];
        if (kivi_reads_codes(newest, next)) break;
    }
    return n;
}

static struct lane_step lane_of(const struct cpu *cpu, const struct batch_sequence *sequence, uint32_t lane) {
    const int32_t position = cpu->batch->positions[sequence->first_row];
    struct lane_step step = {.blocks = cpu->batch->block_ids + sequence->lane_first[lane], .before = sequence->lane_tokens[lane]};
    step.end = step.before + sequence->n_rows;
    step.first = count_codes(cpu, step.blocks, step.before, position);
    step.held = blocks_for(step.before);
    step.inner = codes_after(cpu, &step, position, position + (int32_t)sequence->n_rows);
    return step;
}

/* Blocks that the step opens: those inside a chunk may lie in places that all layers use in turn, as the stages of a layer are over before the next one's begin. `reserved` places are
 * not for them. */
static void open_blocks(struct cpu *cpu, const struct lane_step *step, uint32_t head, uint64_t reserved, uint32_t *shared) {
    struct raw_places *raw = &cpu->raw;
    for (uint32_t b = step->held; b < blocks_for(step->end); b++) {
        if (b >= step->inner || raw->n_idle > reserved) {
            raw_hold(raw, raw_take(raw, step->blocks[b]));
            continue;
        }
        CHECK(shared[0] < cpu->raw_shared);
        raw_forget(raw, step->blocks[b]);
        raw->of[step->blocks[b]] = raw->n_places + head * cpu->raw_shared + shared[0]++;
    }
}

/* A lane may be cut, or read on from an earlier slot, where its residual is long gone: by measurements, which do not care for the last bits. (An engine goes on where cpu_resumes says so.)
 * What the codes say then stands for it. */
static void restore(struct cpu *cpu, uint32_t block) {
    struct worker_scratch *own = &cpu->workers_scratch[0];
    CHECK(cpu->closed[block]);
    (void)raw_take(&cpu->raw, block);
    for (uint32_t slot = 0; slot < BLOCK_TOKENS; slot++) {
        int32_t position;
        cpu_read_f32(&cpu->backend, block, slot, own->queries, own->states, &position);
        cpu->isa->append(&cpu->raw_shape, raw_block(cpu, block), slot, own->queries, own->states);
    }
}

void residual_begin(struct cpu *cpu) {
    const uint32_t lanes = program_lanes(cpu->program), n_kv = cpu->program->n_kv_heads;
    if (cpu->kv.raw_bytes == 0) return;
    for (uint32_t s = 0; s < cpu->batch->n_sequences; s++) CHECK(!cpu->batch->sequences[s].accumulate || cpu->limits.accumulators);
    for (uint32_t s = 0; s < cpu->batch->n_sequences; s++) /* what is there must not be given away to what is not yet */
        for (uint32_t lane = 0; lane < lanes && cpu->batch->sequences[s].n_rows > 0; lane++) {
            const struct lane_step step = lane_of(cpu, &cpu->batch->sequences[s], lane);
            for (uint32_t b = step.first; b < step.held; b++) {
                if (cpu->raw.of[step.blocks[b]] == RAW_NONE) restore(cpu, step.blocks[b]);
                raw_hold(&cpu->raw, cpu->raw.of[step.blocks[b]]);
            }
        }
    for (uint32_t s = 0; s < cpu->batch->n_sequences; s++)
        if (cpu->batch->sequences[s].n_rows > 0) raw_release_table(&cpu->raw, cpu->batch->sequences[s].table);
    const uint64_t reserved = (uint64_t)2 * KIVI_RAW_BLOCKS * cpu->batch->n_sequences * lanes; /* all that the step may need for good */
    for (uint32_t lane = 0; lane < lanes; lane++) {
        if (lane % n_kv == 0) memset(cpu->raw_used, 0, n_kv * sizeof *cpu->raw_used);
        for (uint32_t s = 0; s < cpu->batch->n_sequences; s++) {
            if (cpu->batch->sequences[s].n_rows == 0) continue;
            const struct lane_step step = lane_of(cpu, &cpu->batch->sequences[s], lane);
            open_blocks(cpu, &step, lane % n_kv, reserved, &cpu->raw_used[lane % n_kv]);
            for (uint32_t b = step.before / BLOCK_TOKENS; b < blocks_for(step.end); b++)
                cpu->closed[step.blocks[b]] = (b + 1) * BLOCK_TOKENS <= step.end;
        }
    }
}

bool cpu_resumes(struct backend *backend, uint32_t count, const uint32_t *blocks) {
    struct cpu *cpu = (struct cpu *)backend;
    if (cpu->kv.raw_bytes == 0) return true;
    for (uint32_t i = 0; i < count; i++)
        if (cpu->raw.of[blocks[i]] == RAW_NONE) return false;
    for (uint32_t i = 0; i < count; i++) (void)raw_take(&cpu->raw, blocks[i]); /* used now */
    return true;
}

void residual_end(struct cpu *cpu) {
    const uint32_t lanes = program_lanes(cpu->program);
    struct raw_places *raw = &cpu->raw;
    if (cpu->kv.raw_bytes == 0) return;
    for (uint32_t s = 0; s < cpu->batch->n_sequences; s++) {
        const struct batch_sequence *sequence = &cpu->batch->sequences[s];
        const int32_t next = sequence->n_rows ? cpu->batch->positions[sequence->first_row] + (int32_t)sequence->n_rows : 0;
        for (uint32_t lane = 0; lane < lanes && sequence->n_rows > 0; lane++) {
            const uint32_t *blocks = cpu->batch->block_ids + sequence->lane_first[lane];
            const uint32_t before = sequence->lane_tokens[lane], end = before + sequence->n_rows;
            const uint32_t first = count_codes(cpu, blocks, before, cpu->batch->positions[sequence->first_row]),
                           inner = count_codes(cpu, blocks, end, next);
            raw_hold_lane(raw, sequence->table, lane, blocks + inner, blocks_for(end) - inner);
            for (uint32_t b = first; b < blocks_for(end); b++) {
                if (raw->of[blocks[b]] < raw->n_places)
                    raw_release(raw, raw->of[blocks[b]]);
                else
                    raw->of[blocks[b]] = RAW_NONE;
            }
        }
    }
}
