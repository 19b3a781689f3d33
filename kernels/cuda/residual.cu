/* KIVI: which blocks have f16 blocks as well, and where (kernels/raw.h), during a step and behind it. The bookkeeping is the host's; kernels read a copy of it, pool.place, to which changes
 * are sent before they run. Other dtypes pass through here without a trace. The engine's thread.
 *
 * The positions that say which blocks a row reads as codes are on the device. The host does without them: it holds the last KIVI_RAW_BLOCKS blocks of every lane, among which all are that
 * the next row reads in f16. Of a sequence that goes on from where its last step left it, only lanes that enter a block are looked at. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/codes.h"
#include "kernels/cuda/services.h"

enum { CHANGES = 1 << 16 }; /* of places, that wait in pinned memory */

struct residual_host {
    struct raw_places raw;
    uint2 *changes_host, *changes_device; /* [CHANGES] block, place; filled in turn */
    uint32_t n_sent;                      /* of them, since the stream was waited for */
    uint32_t n_shared;                    /* places that layers share, of a KV head */
    uint32_t *shared_used;                /* [n_lanes] in the step at hand */
    /* Of each table, as its last step left it. */
    uint32_t *changes; /* [n_tables] batch_sequence.table_changes; 0: nothing is held that could be gone on from */
    uint32_t *end;     /* [n_tables] slots of lane 0 */
    /* Of the step at hand. */
    bool *goes_on;           /* [max_sequences] what the table holds is what it needs */
    struct lane_list *lanes; /* [max_sequences] that are to be looked at: all, or those that enter a block */
    uint8_t *held;           /* [max_sequences][n_lanes] which of the last blocks were held at its beginning, a bit each */
    uint32_t *every_lane;    /* [n_lanes] */
};

/* ---- life ---- */

void residual_lay_out(struct cuda *cuda, struct device_arena *arena) {
    const uint32_t bits = kivi_bits(cuda->limits.kv_dtype), d = cuda->program->head_dim;
    if (bits == 0) return;
    const size_t places = raw_places_needed(cuda->program, &cuda->limits) + (size_t)cuda->program->n_kv_heads * raw_shared_needed(&cuda->limits);
    cuda->pool.bits = bits;
    cuda->pool.raw_bytes = (size_t)2 * BLOCK_TOKENS * d * sizeof(uint16_t);
    cuda->pool.raw = (uint8_t *)device_take(arena, places, cuda->pool.raw_bytes);
    uint2 *changes = (uint2 *)device_take(arena, CHANGES, sizeof(uint2));
    if (!arena->base) return;
    if (!cuda->residual) cuda->residual = (struct residual_host *)check_calloc(1, sizeof *cuda->residual);
    cuda->residual->changes_device = changes;
}

size_t residual_pinned_bytes(const struct cuda *cuda) { return kivi_bits(cuda->limits.kv_dtype) ? CHANGES * sizeof(uint2) : 0; }

enum status residual_open(struct cuda *cuda, struct error *error) {
    if (cuda->pool.bits == 0) return STATUS_OK;
    struct residual_host *own = cuda->residual;
    struct raw_places *raw = &own->raw;
    CUDA_TRY(error, cudaMallocHost((void **)&own->changes_host, residual_pinned_bytes(cuda)));
    const size_t sequences = cuda->limits.max_sequences, lanes = cuda->n_lanes;
    own->n_shared = raw_shared_needed(&cuda->limits);
    own->shared_used = (uint32_t *)check_calloc(lanes, sizeof(uint32_t));
    own->changes = (uint32_t *)check_calloc(cuda->n_tables, sizeof(uint32_t));
    own->end = (uint32_t *)check_calloc(cuda->n_tables, sizeof(uint32_t));
    own->lanes = (struct lane_list *)check_calloc(sequences, sizeof *own->lanes);
    own->every_lane = (uint32_t *)check_calloc(lanes, sizeof(uint32_t));
    for (uint32_t lane = 0; lane < lanes; lane++) own->every_lane[lane] = lane;
    own->goes_on = (bool *)check_calloc(sequences, sizeof(bool));
    own->held = (uint8_t *)check_calloc(sequences * lanes, 1);
    raw->n_blocks = cuda->limits.n_blocks;
    raw->n_places = (uint32_t)raw_places_needed(cuda->program, &cuda->limits);
    raw->n_tables = cuda->n_tables;
    raw->n_lanes = cuda->n_lanes;
    raw->of = (uint32_t *)check_calloc(raw->n_blocks, sizeof(uint32_t));
    raw->places = (struct raw_place *)check_calloc((size_t)raw->n_places + 1, sizeof *raw->places);
    raw->held = (uint32_t *)check_calloc((size_t)raw->n_tables * raw->n_lanes * KIVI_RAW_BLOCKS, sizeof(uint32_t));
    raw->changed = (uint32_t *)check_calloc(raw->n_blocks, sizeof(uint32_t));
    raw->is_changed = (uint8_t *)check_calloc(raw->n_blocks, sizeof(uint8_t));
    raw_init(raw);
    CUDA_TRY(error, cudaMemsetAsync(cuda->pool.place, 0xff, raw->n_blocks * sizeof *cuda->pool.place, cuda->stream)); /* RAW_NONE */
    return STATUS_OK;
}

void residual_close(struct cuda *cuda) {
    struct residual_host *own = cuda->residual;
    if (!own) return;
    struct raw_places *raw = &own->raw;
    (void)cudaFreeHost(own->changes_host);
    void *const all[] = {own->shared_used, own->changes, own->end, own->lanes, own->every_lane, own->goes_on, own->held, raw->of, raw->places, raw->held, raw->changed, raw->is_changed};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    free(own);
    cuda->residual = NULL;
}

struct raw_places *residual_places(struct cuda *cuda) {
    return &cuda->residual->raw;
}

/* ---- what has changed ---- */

enum { SEND_THREADS = 256 };

static __global__ void __launch_bounds__(SEND_THREADS) place_kernel(const uint2 *changes, uint32_t n, uint32_t *place) {
    const uint32_t i = blockIdx.x * SEND_THREADS + threadIdx.x;
    if (i < n) place[changes[i].x] = changes[i].y;
}

void residual_send(struct cuda *cuda) {
    struct residual_host *own = cuda->residual;
    struct raw_places *raw = &own->raw;
    for (uint32_t first = 0, n; first < raw->n_changed; first += n) {
        if (own->n_sent == CHANGES) {
            CUDA_CHECK(cudaStreamSynchronize(cuda->stream));
            own->n_sent = 0;
        }
        uint2 *changes = own->changes_host + own->n_sent, *device = own->changes_device + own->n_sent;
        n = raw->n_changed - first < CHANGES - own->n_sent ? raw->n_changed - first : CHANGES - own->n_sent;
        for (uint32_t i = 0; i < n; i++) {
            const uint32_t block = raw->changed[first + i];
            changes[i] = make_uint2(block, raw->of[block]);
            raw->is_changed[block] = false;
        }
        own->n_sent += n;
        CUDA_CHECK(cudaMemcpyAsync(device, changes, n * sizeof *changes, cudaMemcpyHostToDevice, cuda->stream));
        launch(place_kernel, div_up(n, SEND_THREADS), SEND_THREADS, 0, cuda->stream, device, n, cuda->pool.place);
        CUDA_CHECK(cudaGetLastError());
    }
    raw->n_changed = 0;
}

/* ---- a step ---- */

/* A lane of a sequence in this step: blocks [first, held) were there before, among the last ones; [held, end) are opened; those up to `inner` are not among the last ones after it. */
struct lane_step {
    const uint32_t *blocks;
    uint32_t first, held, end, inner;
};

static uint32_t last_blocks(uint32_t n) { return n > KIVI_RAW_BLOCKS ? n - KIVI_RAW_BLOCKS : 0; }

static struct lane_step lane_of(const struct batch *batch, const struct batch_sequence *sequence, uint32_t lane) {
    const uint32_t before = sequence->lane_tokens[lane], held = blocks_of(before), end = blocks_of(before + sequence->n_rows);
    return {batch->block_ids + sequence->lane_first[lane], last_blocks(held), held, end, last_blocks(end)};
}

static bool has_place(const struct raw_places *raw, uint32_t block) { return raw->of[block] < raw->n_places; }

/* Is what the table holds what its sequence needs? Which of its lanes change what it will hold? */
static void look_at(struct cuda *cuda, const struct batch *batch, uint32_t s) {
    struct residual_host *own = cuda->residual;
    const struct batch_sequence *sequence = &batch->sequences[s];
    const uint32_t table = sequence->table, before = sequence->lane_tokens[0];
    own->goes_on[s] = sequence->table_changes != 0 && own->changes[table] == sequence->table_changes && own->end[table] == before;
    if (!own->goes_on[s] || !tables_entering(cuda, batch, s, &own->lanes[s])) own->lanes[s] = {{own->every_lane, own->every_lane}, {cuda->n_lanes, 0}};
    own->changes[table] = sequence->table_changes;
    own->end[table] = before + sequence->n_rows;
}

/* What is there must not be given away to what is not yet. */
static void hold_lanes(struct cuda *cuda, const struct batch *batch, uint32_t s) {
    struct residual_host *own = cuda->residual;
    for (uint32_t lane = 0; lane < cuda->n_lanes; lane++) {
        const struct lane_step step = lane_of(batch, &batch->sequences[s], lane);
        uint8_t *held = &own->held[(size_t)s * cuda->n_lanes + lane];
        *held = 0;
        for (uint32_t b = step.first; b < step.held; b++) {
            if (!has_place(&own->raw, step.blocks[b])) continue;
            raw_hold(&own->raw, own->raw.of[step.blocks[b]]);
            *held |= (uint8_t)(1u << (b - step.first));
        }
    }
}

/* A lane's last block that is not full and has lost its f16 block (codes.h, is_lost): rows are appended there. */
static void open_lost(struct cuda *cuda, const struct batch *batch, uint32_t s) {
    struct residual_host *own = cuda->residual;
    for (uint32_t lane = 0; lane < cuda->n_lanes; lane++) {
        const struct lane_step step = lane_of(batch, &batch->sequences[s], lane);
        if (batch->sequences[s].lane_tokens[lane] % BLOCK_TOKENS == 0 || has_place(&own->raw, step.blocks[step.held - 1])) continue;
        raw_hold(&own->raw, raw_take(&own->raw, step.blocks[step.held - 1]));
        own->held[(size_t)s * cuda->n_lanes + lane] |= (uint8_t)(1u << (step.held - 1 - step.first));
        residual_send(cuda);
        open_block(cuda, step.blocks[step.held - 1]);
    }
}

/* Blocks inside a chunk may lie in places that all layers use in turn, as a layer's attention is over before the next one's rows are appended. `reserved` places are not for them. */
static void take_lane(struct cuda *cuda, const struct lane_step *step, uint32_t lane, uint64_t reserved) {
    struct residual_host *own = cuda->residual;
    struct raw_places *raw = &own->raw;
    for (uint32_t b = step->held; b < step->end; b++) {
        CHECK(step->blocks[b] < raw->n_blocks);
        if (b >= step->inner || raw->n_idle > reserved) {
            raw_hold(raw, raw_take(raw, step->blocks[b]));
            continue;
        }
        CHECK(own->shared_used[lane] < own->n_shared);
        raw_forget(raw, step->blocks[b]);
        raw_put(raw, step->blocks[b], raw->n_places + lane % cuda->program->n_kv_heads * own->n_shared + own->shared_used[lane]++);
    }
}

/* What the step will look at of these lanes lies anywhere; each would be a cache miss of its own. */
static void expect_lanes(const struct residual_host *own, const struct batch *batch, uint32_t s) {
    const struct lane_list *list = &own->lanes[s];
    for (uint32_t i = 0; i < lane_list_size(list); i++) {
        const uint32_t lane = lane_list_at(list, i);
        const struct lane_step step = lane_of(batch, &batch->sequences[s], lane);
        __builtin_prefetch(&own->raw.held[((size_t)batch->sequences[s].table * own->raw.n_lanes + lane) * KIVI_RAW_BLOCKS], 1);
        for (uint32_t b = step.inner; b < step.end; b++) raw_expect(&own->raw, step.blocks[b]);
    }
}

static void take_places(struct cuda *cuda, const struct batch *batch, uint32_t s, uint64_t reserved) {
    const struct lane_list *list = &cuda->residual->lanes[s];
    for (uint32_t i = 0; i < lane_list_size(list); i++) {
        const uint32_t lane = lane_list_at(list, i);
        const struct lane_step step = lane_of(batch, &batch->sequences[s], lane);
        take_lane(cuda, &step, lane, reserved);
        for (uint32_t b = step.inner; b < step.held; b++) raw_expect_place(&cuda->residual->raw, step.blocks[b]); /* for residual_end */
    }
}

void residual_begin(struct cuda *cuda, const struct batch *batch) {
    struct residual_host *own = cuda->residual;
    if (!own) return;
    const uint64_t reserved = (uint64_t)2 * KIVI_RAW_BLOCKS * batch->n_sequences * cuda->n_lanes; /* all that the step may need for good */
    memset(own->shared_used, 0, cuda->n_lanes * sizeof *own->shared_used);
    for (uint32_t s = 0; s < batch->n_sequences; s++) {
        CHECK(batch->sequences[s].table < cuda->n_tables);
        look_at(cuda, batch, s);
        if (!own->goes_on[s]) hold_lanes(cuda, batch, s);
    }
    for (uint32_t s = 0; s < batch->n_sequences; s++)
        if (!own->goes_on[s]) raw_release_table(&own->raw, batch->sequences[s].table);
    for (uint32_t s = 0; s < batch->n_sequences; s++)
        if (!own->goes_on[s]) open_lost(cuda, batch, s);
    for (uint32_t s = 0; s < batch->n_sequences; s++) {
        if (s == 0) expect_lanes(own, batch, s);
        if (s + 1 < batch->n_sequences) expect_lanes(own, batch, s + 1);
        take_places(cuda, batch, s, reserved);
    }
    residual_send(cuda);
}

/* The table holds the lane's last blocks; what was held for the step alone is let go. */
static void hold_last(struct residual_host *own, uint32_t table, uint32_t lane, const struct lane_step *step, uint32_t held) {
    struct raw_places *raw = &own->raw;
    uint32_t last[KIVI_RAW_BLOCKS], n = 0;
    for (uint32_t b = step->inner; b < step->end; b++)
        if (has_place(raw, step->blocks[b])) {
            raw_hold(raw, raw->of[step->blocks[b]]);
            last[n++] = step->blocks[b];
        }
    raw_release_lane(raw, table, lane);
    raw_hold_lane(raw, table, lane, last, n);
    for (uint32_t i = 0; i < n; i++) raw_release(raw, raw->of[last[i]]);
    for (uint32_t b = step->first; b < step->held; b++)
        if (held >> (b - step->first) & 1) raw_release(raw, raw->of[step->blocks[b]]);
    for (uint32_t b = step->held; b < step->end; b++) {
        if (has_place(raw, step->blocks[b]))
            raw_release(raw, raw->of[step->blocks[b]]);
        else
            raw_put(raw, step->blocks[b], RAW_NONE);
    }
}

void residual_end(struct cuda *cuda, const struct batch *batch) {
    struct residual_host *own = cuda->residual;
    for (uint32_t s = 0; own && s < batch->n_sequences; s++) {
        const struct batch_sequence *sequence = &batch->sequences[s];
        const struct lane_list *list = &own->lanes[s];
        for (uint32_t i = 0; i < lane_list_size(list); i++) {
            const uint32_t lane = lane_list_at(list, i);
            const struct lane_step step = lane_of(batch, sequence, lane);
            if (!own->goes_on[s] || step.held < step.end)
                hold_last(own, sequence->table, lane, &step, own->goes_on[s] ? 0 : own->held[(size_t)s * cuda->n_lanes + lane]);
        }
    }
}

void residual_forget(struct cuda *cuda) {
    if (cuda->residual) memset(cuda->residual->changes, 0, cuda->n_tables * sizeof(uint32_t));
}

bool residual_resumes(struct backend *backend, uint32_t count, const uint32_t *blocks) {
    struct cuda *cuda = cuda_of(backend);
    if (!cuda->residual) return true;
    struct raw_places *raw = &cuda->residual->raw;
    for (uint32_t i = 0; i < count; i++)
        if (!has_place(raw, blocks[i])) return false;
    for (uint32_t i = 0; i < count; i++) (void)raw_take(raw, blocks[i]); /* used now */
    return true;
}

/* ---- copies ---- */

/* Of pairs copied side by side, at most two places each: of the idle ones, those used now are the last to be given away. */
uint32_t residual_pass(const struct cuda *cuda, uint32_t most) {
    if (!cuda->residual) return most;
    const uint32_t half = cuda->residual->raw.n_idle / 2;
    CHECK(half > 0);
    return half < most ? half : most;
}

void residual_copy(struct cuda *cuda, uint32_t count, const uint32_t *source, const uint32_t *destination) {
    for (uint32_t i = 0; cuda->residual && i < count; i++) {
        struct raw_places *raw = &cuda->residual->raw;
        CHECK(source[i] < raw->n_blocks && destination[i] < raw->n_blocks);
        if (source[i] == destination[i]) continue;
        if (!has_place(raw, source[i])) {
            raw_forget(raw, destination[i]);
            continue;
        }
        const uint32_t from = raw_take(raw, source[i]);
        raw_hold(raw, from);
        (void)raw_take(raw, destination[i]);
        raw_release(raw, from);
    }
    if (cuda->residual) residual_send(cuda);
}
