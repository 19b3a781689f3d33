/* Sequences with block tables of their own over one backend: see eval.h. Owns the backend, the tables, the compressor and the batch arrays. Main thread (the backend's
 * worker 0). Deliberately knows no text and no measure. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "cli/cli.h"
#include "cli/eval.h"

#define SCRATCH_BLOCKS 24u /* of a lane: the tails that the full cache, a cell and the candidates have to themselves, beside two whole lanes */

struct sequence {
    uint32_t *ids;         /* [n_lanes][lane_blocks]; of lane l, held[l] are blocks */
    uint32_t *lane_first;  /* [n_lanes] */
    uint32_t *lane_tokens; /* [n_lanes] */
    uint32_t *held;        /* [n_lanes] */
    uint32_t position;     /* of the next token */
};

struct lab {
    struct backend *backend;
    const struct program *program;
    struct compressor *compressor;
    enum kv_dtype kv_dtype;
    bool accumulates;
    uint32_t n_lanes, lane_blocks, n_blocks, next_block, max_rows;
    uint32_t *block_ids; /* the table arena: [LAB_SEQUENCES][n_lanes][lane_blocks] */
    uint32_t *numbers;   /* lane_first, lane_tokens, held of all sequences */
    struct sequence sequences[LAB_SEQUENCES];

    int32_t *tokens, *positions; /* [max_rows] */
    struct sample *samples;
    struct sample_result *results;
    struct batch_sequence batch_sequences[LAB_SEQUENCES];
    struct sampling greedy;
    struct compaction *items; /* [n_lanes] */
    uint32_t *copies[2];      /* [n_lanes] source and destination blocks of a fork */
    float *weights;           /* [n_lanes][group][max_tokens] of lab_attention */
    size_t *offset;           /* [n_lanes] */
    float *k, *v;             /* [head_dim] */
};

static uint32_t blocks_for(uint32_t tokens) { return (tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS; }

static void allocate(struct lab *lab, uint32_t max_tokens) {
    const struct program *program = lab->program;
    size_t lanes = lab->n_lanes, rows = lab->max_rows;
    lab->block_ids = check_calloc(LAB_SEQUENCES * lanes * lab->lane_blocks, sizeof *lab->block_ids);
    lab->numbers = check_calloc(LAB_SEQUENCES * 3 * lanes, sizeof *lab->numbers);
    for (uint32_t s = 0; s < LAB_SEQUENCES; s++) {
        struct sequence *sequence = &lab->sequences[s];
        uint32_t *numbers = lab->numbers + s * 3 * lanes;
        *sequence = (struct sequence){
            .ids = lab->block_ids + s * lanes * lab->lane_blocks, .lane_first = numbers, .lane_tokens = numbers + lanes, .held = numbers + 2 * lanes};
        for (uint32_t l = 0; l < lanes; l++) sequence->lane_first[l] = (uint32_t)((s * lanes + l) * lab->lane_blocks);
    }
    lab->tokens = check_calloc(rows, sizeof *lab->tokens);
    lab->positions = check_calloc(rows, sizeof *lab->positions);
    lab->samples = check_calloc(rows, sizeof *lab->samples);
    lab->results = check_calloc(rows, sizeof *lab->results);
    lab->items = check_calloc(lanes, sizeof *lab->items);
    for (int i = 0; i < 2; i++) lab->copies[i] = check_calloc(lanes, sizeof *lab->copies[i]);
    lab->weights = check_calloc((size_t)program->n_layers * program->n_heads * max_tokens, sizeof *lab->weights);
    lab->offset = check_calloc(lanes, sizeof *lab->offset);
    lab->k = check_calloc(program->head_dim, sizeof *lab->k);
    lab->v = check_calloc(program->head_dim, sizeof *lab->v);
    lab->greedy = (struct sampling){.temperature = 0, .top_p = 1, .repetition_penalty = 1, .n_top = 0};
}

enum status lab_open(const struct config *config, const struct model *model, const struct lab_size *size, const uint8_t *classes,
                     void (*report)(void *, double), void *context, struct lab **result, struct error *error) {
    const struct program *program = model_program(model);
    struct cli_backend chosen;
    enum status status = cli_choose_backend(config, program, &chosen, error);
    if (status != STATUS_OK) return status;
    uint32_t lanes = program_lanes(program), lane_blocks = blocks_for(size->max_tokens) + 1;
    uint64_t total = (uint64_t)lanes * (2ull * lane_blocks + SCRATCH_BLOCKS + 2 * EVAL_CANDIDATES);
    if (total > UINT32_MAX / 2 || (uint64_t)lanes * size->max_tokens > UINT32_MAX || total * chosen.block_bytes > chosen.memory_bytes)
        return error_set(error, STATUS_NO_MEMORY,
                         "eval: the caches of prompts of %" PRIu32 " tokens do not fit into the memory there is: %.1f of %.1f MiB", size->max_tokens,
                         (double)(total * chosen.block_bytes) / 0x1p20, (double)chosen.memory_bytes / 0x1p20);
    struct backend_limits limits = chosen.limits;
    limits.n_blocks = (uint32_t)total;
    limits.n_tables = LAB_SEQUENCES;
    limits.table_blocks = lane_blocks;
    limits.max_rows = config->max_rows;
    limits.max_sequences = LAB_SEQUENCES;
    limits.max_samples = config->max_rows;
    limits.n_rings = LAB_RINGS;
    limits.ring_rows = POLICY_WINDOW_MAX;
    limits.sink_slots = blocks_for(config->sink_tokens) * BLOCK_TOKENS;
    limits.accumulators = size->accumulate;
    limits.rank_slots = size->max_tokens;
    limits.progress = report;
    limits.progress_context = context;
    struct lab *lab = check_calloc(1, sizeof *lab);
    status = chosen.ops->prepare(program, &limits, &lab->backend, error);
    if (status != STATUS_OK) {
        free(lab);
        return status;
    }
    lab->program = program;
    lab->kv_dtype = limits.kv_dtype;
    lab->accumulates = size->accumulate;
    lab->n_lanes = lanes;
    lab->lane_blocks = lane_blocks;
    lab->n_blocks = (uint32_t)total;
    lab->max_rows = config->max_rows;
    allocate(lab, size->max_tokens);
    const struct compressor_limits compressor = {
        .slots_max = size->max_tokens, .slots_total = lanes * size->max_tokens, .classes = classes, .lists = true};
    lab->compressor = compressor_new(lab->backend, program, &compressor);
    *result = lab;
    return STATUS_OK;
}

void lab_close(struct lab *lab) {
    if (!lab) return;
    compressor_free(lab->compressor);
    lab->backend->ops->close(lab->backend);
    free(lab->block_ids);
    free(lab->numbers);
    free(lab->tokens);
    free(lab->positions);
    free(lab->samples);
    free(lab->results);
    free(lab->items);
    for (int i = 0; i < 2; i++) free(lab->copies[i]);
    free(lab->weights);
    free(lab->offset);
    free(lab->k);
    free(lab->v);
    free(lab);
}

const char *lab_describe(const struct lab *lab) { return lab->backend->ops->describe(lab->backend); }
enum kv_dtype lab_kv_dtype(const struct lab *lab) { return lab->kv_dtype; }
bool lab_accumulates(const struct lab *lab) { return lab->accumulates; }
size_t lab_block_bytes(const struct lab *lab) { return lab->backend->ops->block_bytes(lab->program, lab->kv_dtype); }
const uint32_t *lab_lane_tokens(const struct lab *lab, uint32_t sequence) { return lab->sequences[sequence].lane_tokens; }

uint32_t lab_blocks(const struct lab *lab, uint32_t sequence) {
    uint32_t blocks = 0;
    for (uint32_t l = 0; l < lab->n_lanes; l++) blocks += blocks_for(lab->sequences[sequence].lane_tokens[l]);
    return blocks;
}

/* ---- blocks ---- */

uint32_t lab_mark(const struct lab *lab) { return lab->next_block; }

void lab_release(struct lab *lab, uint32_t mark) {
    CHECK(mark <= lab->next_block);
    lab->next_block = mark;
}

void lab_clear(struct lab *lab, uint32_t sequence) {
    memset(lab->sequences[sequence].lane_tokens, 0, lab->n_lanes * sizeof(uint32_t));
    memset(lab->sequences[sequence].held, 0, lab->n_lanes * sizeof(uint32_t));
    lab->sequences[sequence].position = 0;
}

static void hold(struct lab *lab, struct sequence *sequence, uint32_t lane, uint32_t n_blocks) {
    CHECK(n_blocks <= lab->lane_blocks);
    while (sequence->held[lane] < n_blocks) {
        CHECK(lab->next_block < lab->n_blocks);
        sequence->ids[(size_t)lane * lab->lane_blocks + sequence->held[lane]++] = lab->next_block++;
    }
}

void lab_fork(struct lab *lab, uint32_t parent, uint32_t child) {
    const struct sequence *from = &lab->sequences[parent];
    struct sequence *to = &lab->sequences[child];
    uint32_t n = 0;
    for (uint32_t l = 0; l < lab->n_lanes; l++) {
        const uint32_t *source = from->ids + (size_t)l * lab->lane_blocks;
        uint32_t *ids = to->ids + (size_t)l * lab->lane_blocks, full = from->lane_tokens[l] / BLOCK_TOKENS;
        memcpy(ids, source, full * sizeof *ids);
        to->held[l] = full;
        to->lane_tokens[l] = from->lane_tokens[l];
        if (from->lane_tokens[l] % BLOCK_TOKENS == 0) continue;
        hold(lab, to, l, full + 1);
        lab->copies[0][n] = source[full];
        lab->copies[1][n++] = ids[full];
    }
    to->position = from->position;
    lab->backend->ops->copy_blocks(lab->backend, n, lab->copies[0], lab->copies[1]);
}

/* ---- steps ---- */

/* Rows [done, done + n) of a part go behind those the batch already has. */
static void add_rows(struct lab *lab, struct batch *batch, const struct lab_part *part, uint32_t done, uint32_t n) {
    struct sequence *sequence = &lab->sequences[part->sequence];
    uint32_t first = batch->n_rows;
    for (uint32_t l = 0; l < lab->n_lanes; l++) hold(lab, sequence, l, blocks_for(sequence->lane_tokens[l] + n));
    memcpy(lab->tokens + first, part->tokens + done, n * sizeof *lab->tokens);
    for (uint32_t i = 0; i < n; i++) {
        lab->positions[first + i] = (int32_t)(sequence->position + i);
        if (part->rows)
            lab->samples[batch->n_samples++] =
                (struct sample){.row = first + i, .sampling = &lab->greedy, .target = part->targets ? part->targets[done + i] : -1};
    }
    lab->batch_sequences[batch->n_sequences++] = (struct batch_sequence){.first_row = first,
                                                                         .n_rows = n,
                                                                         .table = part->sequence,
                                                                         .lane_first = sequence->lane_first,
                                                                         .lane_tokens = sequence->lane_tokens,
                                                                         .ring = part->ring,
                                                                         .accumulate = part->accumulate};
    batch->n_rows += n;
}

static void take_results(struct lab *lab, const struct lab_part *part, uint32_t done, uint32_t n, uint32_t *sample) {
    struct sequence *sequence = &lab->sequences[part->sequence];
    for (uint32_t l = 0; l < lab->n_lanes; l++) sequence->lane_tokens[l] += n;
    sequence->position += n;
    for (uint32_t i = 0; part->rows && i < n; i++, (*sample)++)
        part->rows[done + i] = (struct lab_row){.token = lab->results[*sample].token, .logprob = lab->results[*sample].logprob};
}

enum status lab_read(struct lab *lab, uint32_t n_parts, const struct lab_part *parts, float *logits, struct error *error) {
    const struct backend_ops *ops = lab->backend->ops;
    uint32_t part = 0, done = 0;
    for (uint32_t p = 0; p < n_parts; p++) /* lanes lie together where their length is known beforehand */
        for (uint32_t l = 0; l < lab->n_lanes; l++) {
            struct sequence *sequence = &lab->sequences[parts[p].sequence];
            hold(lab, sequence, l, blocks_for(sequence->lane_tokens[l] + parts[p].n_tokens));
        }
    while (part < n_parts) {
        struct batch batch = {.tokens = lab->tokens,
                              .positions = lab->positions,
                              .sequences = lab->batch_sequences,
                              .block_ids = lab->block_ids,
                              .samples = lab->samples};
        uint32_t counts[LAB_SEQUENCES], starts[LAB_SEQUENCES], first_part = part;
        while (part < n_parts && batch.n_rows < lab->max_rows && batch.n_sequences < LAB_SEQUENCES) {
            uint32_t left = parts[part].n_tokens - done, room = lab->max_rows - batch.n_rows, n = left < room ? left : room;
            starts[part - first_part] = done;
            counts[part - first_part] = n;
            if (n > 0) add_rows(lab, &batch, &parts[part], done, n);
            done += n;
            if (done < parts[part].n_tokens) break;
            part++;
            done = 0;
        }
        uint32_t last_part = done > 0 ? part + 1 : part, sample = 0;
        if (batch.n_rows == 0) continue;
        if (logits) ops->tap_logits(lab->backend, logits);
        enum status status = ops->submit(lab->backend, &batch, error);
        if (status == STATUS_OK) status = ops->sync(lab->backend, lab->results, error);
        if (status != STATUS_OK) return status;
        if (logits) logits += (size_t)batch.n_samples * lab->program->n_vocab;
        for (uint32_t p = first_part; p < last_part; p++) take_results(lab, &parts[p], starts[p - first_part], counts[p - first_part], &sample);
    }
    return STATUS_OK;
}

/* ---- compression ---- */

/* At the end of the prompt: all that was read counts as one. */
static struct compressor_sequence describe(const struct lab *lab, const struct sequence *sequence, const struct kv_plan *plan, const int32_t *tokens,
                                           uint32_t ring) {
    return (struct compressor_sequence){.ring = ring,
                                        .n_computed = sequence->position,
                                        .n_window = compression_window(plan, sequence->position, sequence->position),
                                        .tokens = tokens,
                                        .block_ids = lab->block_ids,
                                        .lane_first = sequence->lane_first,
                                        .lane_tokens = sequence->lane_tokens};
}

static void shift(struct lab *lab, const struct sequence *sequence, uint32_t n_slots, bool first, uint32_t evicted) {
    const struct shift_request request = {.ring = LAB_RING_SINKS,
                                          .first = first,
                                          .n_slots = n_slots,
                                          .shift = (int32_t)evicted,
                                          .block_ids = lab->block_ids,
                                          .lane_first = sequence->lane_first};
    lab->backend->ops->shift_sinks(lab->backend, &request);
}

/* Slots at the front of a lane from which whole blocks were dropped that stand at their own index. */
static uint32_t pinned_slots(const struct choose_lane *lane) {
    uint32_t n = 0;
    while (n < lane->n_keep && lane->keep[n] == n) n++;
    return n;
}

void lab_compress(struct lab *lab, uint32_t base, uint32_t cell, const struct kv_plan *plan, const int32_t *tokens, bool measure_hits,
                  struct compressor_result *result) {
    const struct sequence *from = &lab->sequences[base];
    struct sequence *to = &lab->sequences[cell];
    struct compressor_sequence sequence = describe(lab, from, plan, tokens, LAB_RING_PROMPT);
    (void)compressor_choose(lab->compressor, plan, &sequence, measure_hits, result);
    lab_clear(lab, cell);
    to->position = from->position;
    for (uint32_t l = 0; l < lab->n_lanes; l++) {
        const struct choose_lane *lane = &result->lanes[l];
        hold(lab, to, l, blocks_for(lane->n_keep));
        to->lane_tokens[l] = lane->n_keep;
        lab->items[l] = (struct compaction){.source = from->ids + (size_t)l * lab->lane_blocks,
                                            .n_slots = lane->n_slots,
                                            .keep = lane->keep,
                                            .n_keep = lane->n_keep,
                                            .destination = to->ids + (size_t)l * lab->lane_blocks};
    }
    lab->backend->ops->compact(lab->backend, lab->n_lanes, lab->items);
    uint32_t evicted = result->lanes[0].n_slots - result->lanes[0].n_keep;
    if (plan->policy->shifts_sinks && evicted > 0) shift(lab, to, pinned_slots(&result->lanes[0]), true, evicted);
}

void lab_stream_drop(struct lab *lab, uint32_t sequence, const struct kv_plan *plan, uint32_t *shifted) {
    struct sequence *mine = &lab->sequences[sequence];
    struct compressor_sequence described = describe(lab, mine, plan, NULL, LAB_NO_RING);
    struct compressor_result result;
    if (!compressor_choose(lab->compressor, plan, &described, false, &result)) return;
    uint32_t pinned = pinned_slots(&result.lanes[0]), dropped = result.lanes[0].n_slots - result.lanes[0].n_keep;
    CHECK(plan->policy->granularity == GRANULARITY_BLOCK && pinned % BLOCK_TOKENS == 0 && dropped % BLOCK_TOKENS == 0);
    uint32_t at = pinned / BLOCK_TOKENS, n = dropped / BLOCK_TOKENS;
    for (uint32_t l = 0; l < lab->n_lanes; l++) {
        uint32_t *ids = mine->ids + (size_t)l * lab->lane_blocks, spare[64];
        CHECK(n <= sizeof spare / sizeof *spare && result.lanes[l].n_keep + dropped == mine->lane_tokens[l]);
        memcpy(spare, ids + at, n * sizeof *ids); /* they serve again behind the newest block */
        memmove(ids + at, ids + at + n, (mine->held[l] - at - n) * sizeof *ids);
        memcpy(ids + mine->held[l] - n, spare, n * sizeof *ids);
        mine->lane_tokens[l] -= dropped;
    }
    bool first = *shifted == 0;
    *shifted += dropped;
    shift(lab, mine, pinned, first, *shifted);
}

void lab_attention(struct lab *lab, uint32_t sequence, uint32_t ring, int32_t position, float *o) {
    const struct program *p = lab->program;
    const struct sequence *mine = &lab->sequences[sequence];
    uint32_t group = p->n_heads / p->n_kv_heads, d = p->head_dim;
    size_t used = 0;
    for (uint32_t l = 0; l < lab->n_lanes; l++) {
        lab->offset[l] = used;
        used += (size_t)group * mine->lane_tokens[l];
    }
    /* One row's SCORE_ATTENTION is its softmax. */
    const struct score_request request = {.kind = SCORE_ATTENTION,
                                          .ring = ring,
                                          .last_position = position,
                                          .n_window = 1,
                                          .n_lanes = lab->n_lanes,
                                          .block_ids = lab->block_ids,
                                          .lane_first = mine->lane_first,
                                          .lane_tokens = mine->lane_tokens,
                                          .offset = lab->offset};
    lab->backend->ops->score(lab->backend, &request, lab->weights);
    memset(o, 0, (size_t)lab->n_lanes * group * d * sizeof *o);
    for (uint32_t l = 0; l < lab->n_lanes; l++) {
        const uint32_t *ids = mine->ids + (size_t)l * lab->lane_blocks;
        for (uint32_t i = 0; i < mine->lane_tokens[l]; i++) {
            int32_t slot_position;
            lab->backend->ops->read_f32(lab->backend, ids[i / BLOCK_TOKENS], i % BLOCK_TOKENS, lab->k, lab->v, &slot_position);
            for (uint32_t h = 0; h < group; h++) {
                float weight = lab->weights[lab->offset[l] + (size_t)h * mine->lane_tokens[l] + i], *out = o + ((size_t)l * group + h) * d;
                for (uint32_t j = 0; j < d; j++) out[j] += weight * lab->v[j];
            }
        }
    }
}
