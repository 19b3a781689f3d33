/* See phase_cases.h. Used by the thread that runs the test. */
#include "tests/support/phase_cases.h"

#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/random.h"

/* clang-format off */
#define RUN(h, r) {.history = h, .rows = r}
#define DECODE_SHORT RUN(0, 1), RUN(1, 1), RUN(BLOCK_TOKENS - 1, 1), RUN(BLOCK_TOKENS, 1), RUN(BLOCK_TOKENS + 1, 1)
#define DECODE_SPLITS RUN(255, 1), RUN(256, 1), RUN(257, 1)
#define CHUNKS RUN(0, 40), RUN(31, 33), RUN(257, 1), RUN(70, 1), RUN(62, 5)
#define RAGGED {300, 3, true, {0, 1, BLOCK_TOKENS - 1, BLOCK_TOKENS + 1}, 0}, {290, 2, true, {257, 256, 255, BLOCK_TOKENS}, 0}, \
               {140, 35, true, {140, 3, 96, 0}, 0}
#define DROPPED {130, 4, false, {0}, 2}, {64, 1, true, {64, 50, 33, 40}, 1}
/* Cut where blocks of KIVI dtypes may be: at the end of one that is codes, anywhere behind them. */
#define RAGGED_BLOCKS {300, 3, true, {288, 256, 64, 0}, 0}, {290, 2, true, {257, 256, 255, BLOCK_TOKENS}, 0}, {140, 35, true, {140, 128, 96, 64}, 0}, \
                      {200, 100, true, {196, 160, 32, 131}, 0}
#define SMALL RUN(9, 1), RUN(0, 20), RUN(63, 3)

const struct phase_case phase_cases[] = {
    /* name             type         layers embd heads kv  dim  ff  vocab */
    {"decode, short",   TENSOR_F32,  2, 128, 4, 2,  32, 192,  64, 0, {DECODE_SHORT}},
    {"decode, splits",  TENSOR_F32,  2, 128, 4, 2,  32, 192,  64, 0, {DECODE_SPLITS}},
    {"chunks and rows", TENSOR_F32,  2, 128, 4, 2,  32, 192,  64, 0, {CHUNKS}},
    {"97 rows",         TENSOR_Q4_1, 2, 128, 6, 2,  64, 192,  64, 0, {RUN(20, 97)}},
    {"chunk to split",  TENSOR_F32,  2, 128, 4, 2,  32, 192,  64, 0, {RUN(250, 12), RUN(511, 3)}},
    {"ragged lanes",    TENSOR_F32,  2, 128, 4, 2,  32, 192,  64, 0, {RAGGED}},
    {"ragged, group 3", TENSOR_Q8_0, 2, 192, 9, 3,  64, 256, 100, 0, {RAGGED}},
    {"ragged by blocks", TENSOR_F32, 2, 128, 4, 2,  64, 192,  64, 0, {RAGGED_BLOCKS}},
    {"dropped blocks",  TENSOR_F32,  2, 128, 4, 2,  32, 192,  64, 0, {DROPPED}},
    {"group 1",         TENSOR_F32,  2, 128, 2, 2,  64, 128,  64, 0, {CHUNKS}},
    {"group 2",         TENSOR_F16,  2, 128, 4, 2,  64, 128,  64, 0, {CHUNKS}},
    {"group 3",         TENSOR_Q4_0, 2, 128, 6, 2,  64, 128,  64, 0, {CHUNKS}},
    {"group 4",         TENSOR_Q8_0, 2, 128, 8, 2, 128, 128,  64, 0, {SMALL}},
    {"one KV head",     TENSOR_F32,  3,  64, 4, 1,  32,  64,  64, 0, {CHUNKS}},
    {"wide head",       TENSOR_F32,  1, 128, 2, 1, 128, 128,  64, 0, {DECODE_SPLITS}},
    {"odd sizes",       TENSOR_F32,  2,  72, 3, 3,  20, 100,  37, 0, {CHUNKS}},
    {"biases",          TENSOR_Q8_0, 2, 128, 4, 2,  32, 192,  64, PHASE_BIASES | PHASE_HALVES, {SMALL}},
    {"q and k norms",   TENSOR_Q8_0, 2, 128, 4, 2,  32, 192,  64, PHASE_QK_NORMS | PHASE_HALVES, {SMALL}},
    {"rope in halves",  TENSOR_F32,  2, 128, 4, 2,  32, 192,  64, PHASE_HALVES, {SMALL}},
    {"rope scaled",     TENSOR_F32,  2, 128, 4, 2,  32, 192,  64, PHASE_ROPE_SCALED, {RUN(300, 2), RUN(0, 9)}},
    {"rope, part",      TENSOR_F32,  2, 128, 4, 2,  32, 192,  64, PHASE_ROPE_PART, {SMALL}},
    {"rope, part, halves", TENSOR_F32, 2, 128, 4, 2, 32, 192, 64, PHASE_ROPE_PART | PHASE_HALVES, {SMALL}},
    {"tied head",       TENSOR_Q4_1, 2, 128, 4, 2,  32, 192,  99, PHASE_TIED, {SMALL}},
    {"F32",             TENSOR_F32,  1, 256, 4, 2,  64, 256,  70, 0, {SMALL}},
    {"F16",             TENSOR_F16,  1, 256, 4, 2,  64, 256,  70, 0, {SMALL}},
    {"BF16",            TENSOR_BF16, 1, 256, 4, 2,  64, 256,  70, 0, {SMALL}},
    {"Q8_0",            TENSOR_Q8_0, 1, 256, 4, 2,  64, 256,  70, 0, {SMALL}},
    {"Q4_0",            TENSOR_Q4_0, 1, 256, 4, 2,  64, 256,  70, 0, {SMALL}},
    {"Q4_1",            TENSOR_Q4_1, 1, 256, 4, 2,  64, 256,  70, 0, {SMALL}},
    {"Q5_0",            TENSOR_Q5_0, 1, 256, 4, 2,  64, 256,  70, 0, {SMALL}},
    {"Q5_1",            TENSOR_Q5_1, 1, 256, 4, 2,  64, 256,  70, 0, {SMALL}},
    {"Q4_K",            TENSOR_Q4_K, 1, 256, 4, 2,  64, 256,  70, 0, {SMALL}},
    {"Q5_K",            TENSOR_Q5_K, 1, 256, 4, 2,  64, 256,  70, 0, {SMALL}},
    {"Q6_K",            TENSOR_Q6_K, 1, 256, 4, 2,  64, 256,  70, 0, {SMALL}},
    {"mixed, odd addresses", TENSOR_F32, 2, 256, 4, 2, 64, 512, 70, PHASE_MIXED_TYPES | PHASE_MISALIGNED, {SMALL}},
};
/* clang-format on */
const uint32_t n_phase_cases = sizeof phase_cases / sizeof *phase_cases;

struct tiny_shape phase_case_shape(const struct phase_case *c) {
    return (struct tiny_shape){
        .seed = 1,
        .n_layers = c->n_layers,
        .n_embd = c->n_embd,
        .n_heads = c->n_heads,
        .n_kv_heads = c->n_kv_heads,
        .head_dim = c->head_dim,
        .n_ff = c->n_ff,
        .n_vocab = c->n_vocab,
        .type = c->type,
        .mixed_types = c->flags & PHASE_MIXED_TYPES,
        .rope_pairs = c->flags & PHASE_HALVES ? ROPE_PAIRS_HALVES : ROPE_PAIRS_ADJACENT,
        .rope_dims = c->flags & PHASE_ROPE_PART ? c->head_dim / 2 : 0,
        .rope_scaled = c->flags & PHASE_ROPE_SCALED,
        .biases = c->flags & PHASE_BIASES,
        .qk_norms = c->flags & PHASE_QK_NORMS,
        .tied_head = c->flags & PHASE_TIED,
        .misaligned = c->flags & PHASE_MISALIGNED,
    };
}

uint32_t phase_case_sequences(const struct phase_case *c) {
    uint32_t n = 0;
    while (n < PHASE_SEQUENCES && c->sequences[n].rows > 0) n++;
    return n;
}

uint32_t phase_case_rows(const struct phase_case *c) {
    uint32_t rows = 0;
    for (uint32_t s = 0; s < PHASE_SEQUENCES; s++) rows += c->sequences[s].rows;
    return rows;
}

int32_t phase_case_token(const struct phase_case *c, uint32_t sequence, uint32_t position) {
    return (int32_t)(random_at(7, 0, sequence, position) % c->n_vocab);
}

struct world_sequence {
    uint32_t position;    /* of the next row */
    uint32_t changes;     /* of its block ids: as batch_sequence.table_changes */
    uint32_t *lane_first; /* [n_lanes] */
    uint32_t *lane_tokens, *lane_tokens_at_start;
};

struct phase_world {
    const struct phase_case *phase_case;
    const struct program *program;
    struct backend *backend;
    uint32_t n_lanes, max_rows;
    struct world_sequence sequences[PHASE_SEQUENCES];
    uint32_t *block_ids;
    float *logits, *tapped; /* [rows of the case][n_vocab], [max_rows][n_vocab] */
    /* One batch. */
    int32_t *tokens, *positions;
    struct sample *samples;
    struct sample_result *results;
};

static uint32_t blocks_of(uint32_t slots) { return (slots + BLOCK_TOKENS - 1) / BLOCK_TOKENS; }

/* Blocks of a lane lie anywhere in the pool. */
static uint32_t make_tables(struct phase_world *world) {
    const struct phase_case *c = world->phase_case;
    uint32_t n_blocks = 0, next = 0;
    for (uint32_t s = 0; s < phase_case_sequences(c); s++) n_blocks += world->n_lanes * blocks_of(c->sequences[s].history + c->sequences[s].rows);
    world->block_ids = check_calloc(n_blocks, sizeof *world->block_ids);
    for (uint32_t i = 0; i < n_blocks; i++) world->block_ids[i] = i;
    struct random random = {n_blocks};
    for (uint32_t i = n_blocks; i-- > 1;) {
        uint32_t other = random_below(&random, i + 1), id = world->block_ids[i];
        world->block_ids[i] = world->block_ids[other];
        world->block_ids[other] = id;
    }
    for (uint32_t s = 0; s < phase_case_sequences(c); s++) {
        struct world_sequence *sequence = &world->sequences[s];
        sequence->changes = 1;
        sequence->lane_first = check_calloc(world->n_lanes, sizeof *sequence->lane_first);
        sequence->lane_tokens = check_calloc(world->n_lanes, sizeof *sequence->lane_tokens);
        sequence->lane_tokens_at_start = check_calloc(world->n_lanes, sizeof *sequence->lane_tokens_at_start);
        for (uint32_t lane = 0; lane < world->n_lanes; lane++, next += blocks_of(c->sequences[s].history + c->sequences[s].rows))
            sequence->lane_first[lane] = next;
    }
    return n_blocks;
}

/* Rows of any of the world's sequences from where they stand; logits of every row to `logits`, if that is wanted. */
static void run_rows(struct phase_world *world, const struct phase_part *parts, uint32_t n_parts, float *logits) {
    static const struct sampling greedy = {.top_p = 1, .repetition_penalty = 1, .n_top = -1};
    struct batch_sequence sequences[PHASE_SEQUENCES] = {0};
    uint32_t rows = 0;
    CHECK(n_parts <= PHASE_SEQUENCES);
    for (uint32_t i = 0; i < n_parts; i++) {
        struct world_sequence *sequence = &world->sequences[parts[i].sequence];
        sequences[i] = (struct batch_sequence){.first_row = rows,
                                               .n_rows = parts[i].n_rows,
                                               .table = parts[i].sequence,
                                               .table_changes = sequence->changes,
                                               .lane_first = sequence->lane_first,
                                               .lane_tokens = sequence->lane_tokens};
        for (uint32_t r = 0; r < parts[i].n_rows; r++, rows++) {
            CHECK(rows < world->max_rows);
            world->positions[rows] = (int32_t)(sequence->position + r);
            world->tokens[rows] = phase_case_token(world->phase_case, parts[i].sequence, sequence->position + r);
            world->samples[rows] = (struct sample){.row = rows, .sampling = &greedy, .target = -1};
        }
    }
    const struct batch batch = {
        .n_rows = rows,
        .n_sequences = n_parts,
        .n_samples = logits ? rows : 0,
        .tokens = world->tokens,
        .positions = world->positions,
        .sequences = sequences,
        .block_ids = world->block_ids,
        .samples = world->samples,
    };
    const struct backend_ops *ops = world->backend->ops;
    struct error error = {0};
    ops->tap_logits(world->backend, logits);
    CHECK(ops->submit(world->backend, &batch, &error) == STATUS_OK);
    CHECK(ops->sync(world->backend, world->results, &error) == STATUS_OK);
    for (uint32_t i = 0; i < n_parts; i++) {
        struct world_sequence *sequence = &world->sequences[parts[i].sequence];
        sequence->position += parts[i].n_rows;
        for (uint32_t lane = 0; lane < world->n_lanes; lane++) sequence->lane_tokens[lane] += parts[i].n_rows;
    }
}

static void read_history(struct phase_world *world, uint32_t s, uint32_t chunk) {
    const struct phase_sequence *plan = &world->phase_case->sequences[s];
    struct world_sequence *sequence = &world->sequences[s];
    while (sequence->position < plan->history) {
        uint32_t left = plan->history - sequence->position;
        run_rows(world, &(struct phase_part){s, left < chunk ? left : chunk}, 1, NULL);
    }
    for (uint32_t lane = 0; lane < world->n_lanes; lane++) {
        if (plan->ragged && sequence->lane_tokens[lane] > plan->lanes[lane % PHASE_LANES])
            sequence->lane_tokens[lane] = plan->lanes[lane % PHASE_LANES];
        for (uint32_t i = 0; i < plan->dropped && lane % 2 == 1 && sequence->lane_tokens[lane] >= BLOCK_TOKENS; i++) {
            sequence->lane_first[lane]++;
            sequence->lane_tokens[lane] -= BLOCK_TOKENS;
        }
        sequence->lane_tokens_at_start[lane] = sequence->lane_tokens[lane];
    }
    if (plan->ragged || plan->dropped) sequence->changes++;
}

static uint32_t longest_lane(const struct phase_case *c) {
    uint32_t blocks = 0;
    for (uint32_t s = 0; s < phase_case_sequences(c); s++) {
        uint32_t here = blocks_of(c->sequences[s].history + c->sequences[s].rows);
        blocks = here > blocks ? here : blocks;
    }
    return blocks;
}

enum status phase_world_new(const struct phase_case *phase_case, const struct program *program, const struct backend_ops *ops,
                            const struct phase_world_options *options, struct phase_world **world_out, struct error *error) {
    struct phase_world *world = check_calloc(1, sizeof *world);
    world->phase_case = phase_case;
    world->program = program;
    world->n_lanes = program_lanes(program);
    world->max_rows = phase_case_rows(phase_case) > 128 ? phase_case_rows(phase_case) : 128;
    uint32_t n_blocks = make_tables(world);
    const struct backend_limits limits = {
        .kv_dtype = options->kv_dtype,
        .weights = options->weights,
        .activation_bits = options->activation_bits,
        .deterministic = options->deterministic,
        .n_blocks = n_blocks,
        .n_tables = 8 * PHASE_SEQUENCES, /* room for blocks of KIVI dtypes in full precision that no engine would look for: a world is rewound, lanes are cut anywhere */
        .table_blocks = longest_lane(phase_case),
        .max_rows = world->max_rows,
        .max_sequences = PHASE_SEQUENCES,
        .max_samples = world->max_rows,
        .threads = options->threads,
        .instruction_set = options->instruction_set,
    };
    world->logits = check_calloc((size_t)phase_case_rows(phase_case) * program->n_vocab, sizeof *world->logits);
    world->tapped = check_calloc((size_t)world->max_rows * program->n_vocab, sizeof *world->tapped);
    world->tokens = check_calloc(world->max_rows, sizeof *world->tokens);
    world->positions = check_calloc(world->max_rows, sizeof *world->positions);
    world->samples = check_calloc(world->max_rows, sizeof *world->samples);
    world->results = check_calloc(world->max_rows, sizeof *world->results);
    enum status status = ops->prepare(program, &limits, &world->backend, error);
    if (status != STATUS_OK) {
        phase_world_free(world);
        return status;
    }
    uint32_t chunk = options->history_chunk > 0 && options->history_chunk < world->max_rows ? options->history_chunk : world->max_rows;
    for (uint32_t s = 0; s < phase_case_sequences(phase_case); s++) read_history(world, s, chunk);
    *world_out = world;
    return STATUS_OK;
}

void phase_world_free(struct phase_world *world) {
    if (!world) return;
    if (world->backend) world->backend->ops->close(world->backend);
    for (uint32_t s = 0; s < PHASE_SEQUENCES; s++) {
        free(world->sequences[s].lane_first);
        free(world->sequences[s].lane_tokens);
        free(world->sequences[s].lane_tokens_at_start);
    }
    free(world->block_ids);
    free(world->logits);
    free(world->tapped);
    free(world->tokens);
    free(world->positions);
    free(world->samples);
    free(world->results);
    free(world);
}

/* Where the logits of a sequence's row are. */
static float *logits_of(const struct phase_world *world, uint32_t sequence, uint32_t row) {
    size_t at = row;
    for (uint32_t s = 0; s < sequence; s++) at += world->phase_case->sequences[s].rows;
    return world->logits + at * world->program->n_vocab;
}

void phase_world_step(struct phase_world *world, const struct phase_part *parts, uint32_t n_parts) {
    uint32_t first[PHASE_SEQUENCES] = {0};
    for (uint32_t i = 0; i < n_parts; i++) {
        CHECK(parts[i].n_rows > 0 && parts[i].n_rows <= phase_world_rows_left(world, parts[i].sequence));
        first[i] = world->sequences[parts[i].sequence].position - world->phase_case->sequences[parts[i].sequence].history;
    }
    run_rows(world, parts, n_parts, world->tapped);
    const float *from = world->tapped;
    for (uint32_t i = 0; i < n_parts; i++) {
        size_t count = (size_t)parts[i].n_rows * world->program->n_vocab;
        memcpy(logits_of(world, parts[i].sequence, first[i]), from, count * sizeof *from);
        from += count;
    }
}

void phase_world_run(struct phase_world *world) {
    struct phase_part parts[PHASE_SEQUENCES];
    uint32_t n = phase_case_sequences(world->phase_case);
    for (uint32_t s = 0; s < n; s++) parts[s] = (struct phase_part){s, phase_world_rows_left(world, s)};
    phase_world_step(world, parts, n);
}

void phase_world_rewind(struct phase_world *world) {
    for (uint32_t s = 0; s < phase_case_sequences(world->phase_case); s++) {
        struct world_sequence *sequence = &world->sequences[s];
        sequence->position = world->phase_case->sequences[s].history;
        memcpy(sequence->lane_tokens, sequence->lane_tokens_at_start, world->n_lanes * sizeof *sequence->lane_tokens);
    }
}

const float *phase_world_logits(const struct phase_world *world, uint32_t sequence, uint32_t row) { return logits_of(world, sequence, row); }

uint32_t phase_world_rows_left(const struct phase_world *world, uint32_t sequence) {
    const struct phase_sequence *plan = &world->phase_case->sequences[sequence];
    return plan->history + plan->rows - world->sequences[sequence].position;
}

struct backend *phase_world_backend(struct phase_world *world) {
    return world->backend;
}

uint32_t phase_world_block(const struct phase_world *world, uint32_t sequence, uint32_t lane, uint32_t block) {
    return world->block_ids[world->sequences[sequence].lane_first[lane] + block];
}

uint32_t phase_world_lane_tokens(const struct phase_world *world, uint32_t sequence, uint32_t lane) {
    return world->sequences[sequence].lane_tokens[lane];
}
