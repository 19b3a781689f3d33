/* The backend that computes nothing: tokens that depend on the history alone, at a given rate, for tests of everything above the backends.
 *
 * In place of K and V, each slot remembers the token, the position and the identity of the whole history it was written for. Every step checks the tables it
 * is given against that, so that a wrong block, a copy forgotten at a fork or a write into a shared block stops the process in the step that does it:
 *   - a slot is written once: as the first of a block, or right after those already filled;
 *   - a lane's last block is filled exactly as far as the table says, all others are full;
 *   - positions ascend within a lane, neighbouring positions continue one history, all lanes agree about each position at block borders;
 *   - some lane holds the position before the step's first row, and the new rows continue that history;
 *   - a block that this step writes is in one table, once;
 *   - what batch_sequence.table and table_changes say is unchanged, is (where limits say how many tables there are).
 * All slots of a step are checked before the first is written. Used by the engine thread; owns its pool of slots. No weights are read. */
#include "kernels/mock/mock.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/check.h"
#include "base/clock.h"
#include "base/random.h"
#include "kernels/backend.h"

struct slot {
    uint64_t chain;
    int32_t token, position;
};

struct block {
    uint32_t filled;
    uint32_t writer; /* index of the sequence that writes it in step `writer_step` */
    uint64_t writer_step;
    struct slot slots[BLOCK_TOKENS];
};

/* What the lanes of one sequence say about a position. */
struct witness {
    uint64_t stamp; /* of the sequence under check; another value: empty */
    uint64_t chain;
    int32_t position;
};

/* Stands for the queries of the last rows and for the unrotated sinks: whose they are. */
struct ring {
    bool used;
    int32_t first_position, last_position; /* rows seen without a gap */
    uint64_t chain;                        /* after the last */
    uint32_t n_sinks;
    uint64_t sink_chain; /* of the last sink when the copy was made */
};

/* What a backend with memory of its own would know of a table. */
struct table {
    uint32_t changes;
    uint64_t step;    /* in which a sequence last named it */
    uint32_t *known;  /* [n_lanes] ids taken over */
    uint32_t *tokens; /* [n_lanes] slots filled */
    uint32_t *ids;    /* [n_lanes][table_blocks] */
};

struct mock {
    struct backend backend;
    uint32_t n_lanes, n_vocab, head_dim, group; /* group: query heads of a KV head */
    struct backend_limits limits;
    struct block *blocks;
    struct witness *witnesses;
    uint32_t witness_mask;
    uint64_t stamp, step;
    struct ring *rings;
    struct table *tables; /* [limits.n_tables] */
    uint32_t *table_ids;  /* of all of them: [n_lanes][2 + table_blocks] each */
    uint64_t *row_chain;  /* [max_rows] */
    int32_t *tokens;      /* [max_rows] of the step, those among them that the step before has drawn */
    float *logits, *scratch;
    float *tap;
    struct flight {
        struct sample_result *results; /* [max_samples] */
        uint32_t n_rows, n_samples;
    } flights[2];             /* in turn */
    uint32_t last, n_flights; /* last: submitted; n_flights: in flight */
    char description[64];
};

uint64_t mock_chain(uint64_t chain, int32_t token, int32_t position) { return random_at(chain, (uint32_t)token, (uint32_t)position, 1); }

void mock_logits(uint64_t chain, uint32_t n_vocab, float *logits) {
    for (uint32_t i = 0; i < n_vocab; i++) logits[i] = -4;
    struct random random = {chain};
    for (uint32_t i = 0; i < 30; i++) {
        uint32_t token = random_below(&random, n_vocab);
        float logit = 12 - 0.5f * (float)i;
        if (logit > logits[token]) logits[token] = logit;
    }
}

static size_t mock_block_bytes(const struct program *program, enum kv_dtype dtype) {
    (void)program, (void)dtype;
    return sizeof(struct block);
}

/* Two witnesses a block at most, at a load of a half. */
static uint32_t witness_count(uint32_t n_blocks) {
    uint32_t count = 64;
    while (count < 4 * (uint64_t)n_blocks && count < 1u << 31) count *= 2;
    return count;
}

/* Of one table. */
static size_t table_id_count(uint32_t n_lanes, const struct backend_limits *limits) { return (size_t)n_lanes * (2 + (size_t)limits->table_blocks); }

static uint32_t mock_memory_plan(const struct program *program, const struct backend_limits *limits, struct memory_line *lines, uint32_t max) {
    uint64_t per_vocab = sizeof(float) * (program->n_vocab + (uint64_t)sampler_scratch_floats(program->n_vocab));
    const struct memory_line all[] = {
        {"scratch", 1, per_vocab, false},
        {"scratch rows", limits->max_rows, sizeof(uint64_t) + sizeof(int32_t), false},
        {"scratch samples", limits->max_samples, 2 * sizeof(struct sample_result), false},
        {"query rings", limits->n_rings, sizeof(struct ring), false},
        {"tables", limits->n_tables, sizeof(struct table) + table_id_count(program_lanes(program), limits) * sizeof(uint32_t), false},
        {"ranking", 1, ranking_bytes(program, limits->rank_slots, limits->rank_places), false},
    };
    uint32_t n = 0;
    for (; n < sizeof all / sizeof *all && n < max; n++) lines[n] = all[n];
    return n;
}

static void mock_close(struct backend *backend) {
    struct mock *mock = (struct mock *)(void *)backend;
    if (!mock) return;
    ranking_free(mock->backend.ranking);
    free(mock->blocks);
    free(mock->witnesses);
    free(mock->rings);
    free(mock->tables);
    free(mock->table_ids);
    free(mock->row_chain);
    free(mock->tokens);
    free(mock->logits);
    free(mock->scratch);
    for (uint32_t i = 0; i < 2; i++) free(mock->flights[i].results);
    free(mock);
}

/* It computes with no weights. */
static enum status mock_supports(const struct program *program, const struct backend_limits *limits, struct error *error) {
    (void)program, (void)limits, (void)error;
    return STATUS_OK;
}

static enum status mock_prepare(const struct program *program, const struct backend_limits *limits, struct backend **backend, struct error *error) {
    if (limits->n_blocks == 0 || limits->n_blocks > 1u << 28)
        return error_set(error, STATUS_INVALID, "mock backend: a pool of %u blocks", (unsigned)limits->n_blocks);
    struct mock *mock = check_calloc(1, sizeof *mock);
    mock->backend.ops = &backend_mock;
    mock->backend.takes_two = true;
    mock->n_lanes = program_lanes(program);
    mock->n_vocab = program->n_vocab;
    mock->head_dim = program->head_dim;
    mock->group = program->n_heads / program->n_kv_heads;
    mock->limits = *limits;
    uint32_t n_witnesses = witness_count(limits->n_blocks);
    mock->witness_mask = n_witnesses - 1;
    mock->blocks = calloc(limits->n_blocks, sizeof *mock->blocks);
    mock->witnesses = calloc(n_witnesses, sizeof *mock->witnesses);
    if (!mock->blocks || !mock->witnesses) {
        mock_close(&mock->backend);
        return error_set(error, STATUS_NO_MEMORY, "mock backend: no memory for %u blocks", (unsigned)limits->n_blocks);
    }
    if (limits->rank_slots > 0) {
        mock->backend.rank_places = limits->rank_places ? limits->rank_places : 1;
        mock->backend.ranking = ranking_new(program, limits->rank_slots, mock->backend.rank_places);
    }
    mock->rings = check_calloc((size_t)limits->n_rings + 1, sizeof *mock->rings);
    mock->tables = check_calloc((size_t)limits->n_tables + 1, sizeof *mock->tables);
    mock->table_ids = check_calloc(limits->n_tables * table_id_count(mock->n_lanes, limits) + 1, sizeof *mock->table_ids);
    for (uint32_t t = 0; t < limits->n_tables; t++) {
        mock->tables[t].known = mock->table_ids + t * table_id_count(mock->n_lanes, limits);
        mock->tables[t].tokens = mock->tables[t].known + mock->n_lanes;
        mock->tables[t].ids = mock->tables[t].tokens + mock->n_lanes;
    }
    mock->row_chain = check_calloc(limits->max_rows, sizeof *mock->row_chain);
    mock->tokens = check_calloc(limits->max_rows, sizeof *mock->tokens);
    for (uint32_t i = 0; i < 2; i++) mock->flights[i].results = check_calloc(limits->max_samples, sizeof *mock->flights[i].results);
    mock->logits = check_calloc(program->n_vocab, sizeof *mock->logits);
    mock->scratch = check_calloc(sampler_scratch_floats(program->n_vocab), sizeof *mock->scratch);
    if (limits->mock_tokens_per_second > 0)
        (void)snprintf(mock->description, sizeof mock->description, "mock, %g rows a second", limits->mock_tokens_per_second);
    else
        (void)snprintf(mock->description, sizeof mock->description, "mock");
    if (limits->progress) limits->progress(limits->progress_context, 1);
    *backend = &mock->backend;
    return STATUS_OK;
}

static const char *mock_describe(const struct backend *backend) { return ((const struct mock *)(const void *)backend)->description; }

/* All lanes of the sequence under check say the same about a position. */
static void agree(struct mock *mock, const struct slot *slot) {
    uint32_t at = (uint32_t)random_mix((uint32_t)slot->position) & mock->witness_mask;
    struct witness *witness = &mock->witnesses[at];
    while (witness->stamp == mock->stamp && witness->position != slot->position) witness = &mock->witnesses[++at & mock->witness_mask];
    if (witness->stamp == mock->stamp) {
        CHECK(witness->chain == slot->chain); /* two lanes hold different histories */
        return;
    }
    *witness = (struct witness){.stamp = mock->stamp, .chain = slot->chain, .position = slot->position};
}

/* `next` follows `last` in a lane (of one block or of two). */
static void check_order(const struct slot *last, const struct slot *next) {
    CHECK(next->position > last->position);
    if (next->position == last->position + 1) CHECK(next->chain == mock_chain(last->chain, next->token, next->position));
}

static const uint32_t *lane_blocks(const struct batch *batch, const struct batch_sequence *sequence, uint32_t lane) {
    return batch->block_ids + sequence->lane_first[lane];
}

/* Takes over the ids that are new by what the sequence says of its table, and compares the others with what was taken over before. */
static void follow_table(struct mock *mock, const struct batch *batch, const struct batch_sequence *sequence) {
    if (mock->limits.n_tables == 0) return;
    CHECK(sequence->table < mock->limits.n_tables);
    struct table *table = &mock->tables[sequence->table];
    CHECK(table->step != mock->step); /* two sequences of this step have it */
    table->step = mock->step;
    bool is_known = sequence->table_changes != 0 && sequence->table_changes == table->changes;
    uint32_t grown = sequence->lane_tokens[0] - table->tokens[0];
    if (!is_known) memset(table->known, 0, mock->n_lanes * sizeof *table->known);
    table->changes = sequence->table_changes;
    for (uint32_t lane = 0; lane < mock->n_lanes; lane++) {
        const uint32_t *ids = lane_blocks(batch, sequence, lane);
        uint32_t needed = (sequence->lane_tokens[lane] + sequence->n_rows + BLOCK_TOKENS - 1) / BLOCK_TOKENS, known = table->known[lane];
        uint32_t *own = table->ids + (size_t)lane * mock->limits.table_blocks;
        CHECK(needed <= mock->limits.table_blocks);
        CHECK(!is_known || sequence->lane_tokens[lane] - table->tokens[lane] == grown); /* one lane was cut */
        table->tokens[lane] = sequence->lane_tokens[lane];
        CHECK(memcmp(own, ids, (known < needed ? known : needed) * sizeof *own) == 0); /* it has changed */
        if (known >= needed) continue;
        memcpy(own + known, ids + known, (needed - known) * sizeof *own);
        table->known[lane] = needed;
    }
}

/* Marks the blocks that sequence s writes, before anything is read. */
static void claim_writes(struct mock *mock, const struct batch *batch, uint32_t s) {
    const struct batch_sequence *sequence = &batch->sequences[s];
    for (uint32_t lane = 0; lane < mock->n_lanes; lane++) {
        const uint32_t *ids = lane_blocks(batch, sequence, lane);
        uint32_t first = sequence->lane_tokens[lane], end = first + sequence->n_rows;
        for (uint32_t b = first / BLOCK_TOKENS; b <= (end - 1) / BLOCK_TOKENS; b++) {
            CHECK(ids[b] < mock->limits.n_blocks);
            struct block *block = &mock->blocks[ids[b]];
            CHECK(block->writer_step != mock->step); /* in two places at once */
            block->writer_step = mock->step;
            block->writer = s;
            CHECK(b != first / BLOCK_TOKENS || first % BLOCK_TOKENS == 0 || block->filled == first % BLOCK_TOKENS);
        }
    }
}

/* Reads what the table says is there; returns the history up to the step's first row. */
static uint64_t check_sequence(struct mock *mock, const struct batch *batch, uint32_t s) {
    const struct batch_sequence *sequence = &batch->sequences[s];
    int32_t position = batch->positions[sequence->first_row];
    uint64_t chain = 0;
    bool found = position == 0;
    mock->stamp++;
    for (uint32_t lane = 0; lane < mock->n_lanes; lane++) {
        const uint32_t *ids = lane_blocks(batch, sequence, lane);
        uint32_t n_slots = sequence->lane_tokens[lane];
        const struct slot *last = NULL;
        for (uint32_t first = 0; first < n_slots; first += BLOCK_TOKENS) {
            CHECK(ids[first / BLOCK_TOKENS] < mock->limits.n_blocks);
            const struct block *block = &mock->blocks[ids[first / BLOCK_TOKENS]];
            uint32_t count = n_slots - first < BLOCK_TOKENS ? n_slots - first : BLOCK_TOKENS;
            CHECK(block->filled == count);                                 /* exactly what this sequence put there */
            CHECK(block->writer_step != mock->step || block->writer == s); /* nobody else writes it now */
            if (last) check_order(last, &block->slots[0]);
            last = &block->slots[count - 1];
            agree(mock, &block->slots[0]);
            agree(mock, last);
        }
        if (!last) continue;
        CHECK(last->position < position);
        if (last->position == position - 1) {
            CHECK(!found || chain == last->chain);
            chain = last->chain;
            found = true;
        }
    }
    CHECK(found); /* the cache ends before the step's first row */
    return chain;
}

/* Rows that continue what the ring holds extend it; others start it anew. */
static void remember_rows(struct mock *mock, const struct batch *batch, const struct batch_sequence *sequence, uint64_t before) {
    if (sequence->ring == 0) return;
    CHECK(sequence->ring <= mock->limits.n_rings);
    struct ring *ring = &mock->rings[sequence->ring];
    uint32_t last_row = sequence->first_row + sequence->n_rows - 1;
    int32_t position = batch->positions[sequence->first_row];
    if (!ring->used || ring->chain != before || ring->last_position != position - 1) *ring = (struct ring){.used = true, .first_position = position};
    ring->last_position = batch->positions[last_row];
    ring->chain = mock->row_chain[last_row];
}

static void append(struct mock *mock, const struct batch *batch, const struct batch_sequence *sequence, uint64_t before) {
    uint64_t chain = before;
    for (uint32_t r = sequence->first_row; r < sequence->first_row + sequence->n_rows; r++) {
        CHECK(r == sequence->first_row || batch->positions[r] == batch->positions[r - 1] + 1);
        CHECK((uint32_t)mock->tokens[r] < mock->n_vocab);
        chain = mock_chain(chain, mock->tokens[r], batch->positions[r]);
        mock->row_chain[r] = chain;
    }
    remember_rows(mock, batch, sequence, before);
    for (uint32_t lane = 0; lane < mock->n_lanes; lane++) {
        const uint32_t *ids = lane_blocks(batch, sequence, lane);
        for (uint32_t i = 0; i < sequence->n_rows; i++) {
            uint32_t slot = sequence->lane_tokens[lane] + i, row = sequence->first_row + i;
            struct block *block = &mock->blocks[ids[slot / BLOCK_TOKENS]];
            block->slots[slot % BLOCK_TOKENS] =
                (struct slot){.chain = mock->row_chain[row], .token = mock->tokens[row], .position = batch->positions[row]};
            block->filled = slot % BLOCK_TOKENS + 1;
        }
    }
}

static void take_tokens(struct mock *mock, const struct batch *batch) {
    const struct flight *before = &mock->flights[mock->last];
    for (uint32_t r = 0; r < batch->n_rows; r++) {
        int32_t token = batch->tokens[r];
        CHECK(token >= 0 || (mock->n_flights == 1 && (uint32_t)(-1 - token) < before->n_samples));
        mock->tokens[r] = token >= 0 ? token : before->results[-1 - token].token;
    }
}

static enum status mock_submit(struct backend *backend, const struct batch *batch, struct error *error) {
    (void)error;
    struct mock *mock = (struct mock *)(void *)backend;
    CHECK(mock->n_flights < 2);
    CHECK(batch->n_rows <= mock->limits.max_rows && batch->n_sequences <= mock->limits.max_sequences && batch->n_samples <= mock->limits.max_samples);
    take_tokens(mock, batch);
    mock->last ^= 1;
    mock->step++;
    struct flight *flight = &mock->flights[mock->last];
    uint32_t rows = 0;
    for (uint32_t s = 0; s < batch->n_sequences; s++) {
        CHECK(batch->sequences[s].first_row == rows && batch->sequences[s].n_rows > 0);
        rows += batch->sequences[s].n_rows;
        CHECK(rows <= batch->n_rows);
        follow_table(mock, batch, &batch->sequences[s]);
        claim_writes(mock, batch, s);
    }
    CHECK(rows == batch->n_rows);
    for (uint32_t s = 0; s < batch->n_sequences; s++) mock->row_chain[batch->sequences[s].first_row] = check_sequence(mock, batch, s);
    for (uint32_t s = 0; s < batch->n_sequences; s++) append(mock, batch, &batch->sequences[s], mock->row_chain[batch->sequences[s].first_row]);

    for (uint32_t i = 0; i < batch->n_samples; i++) {
        const struct sample *sample = &batch->samples[i];
        CHECK(sample->row < batch->n_rows && (i == 0 || sample->row >= batch->samples[i - 1].row));
        CHECK(mock->n_flights == 0 || sample->target >= 0 || !sampling_penalizes(sample->sampling)); /* the history's last token is not there yet */
        mock_logits(mock->row_chain[sample->row], mock->n_vocab, mock->logits);
        if (mock->tap) memcpy(mock->tap + (size_t)i * mock->n_vocab, mock->logits, mock->n_vocab * sizeof(float));
        sampler_sample(sample, mock->logits, mock->n_vocab, mock->scratch, &flight->results[i]);
    }
    mock->tap = NULL;
    flight->n_rows = batch->n_rows;
    flight->n_samples = batch->n_samples;
    mock->n_flights++;
    return STATUS_OK;
}

static enum status mock_sync(struct backend *backend, struct sample_result *results, struct error *error) {
    (void)error;
    struct mock *mock = (struct mock *)(void *)backend;
    CHECK(mock->n_flights > 0);
    const struct flight *flight = &mock->flights[mock->n_flights == 2 ? mock->last ^ 1 : mock->last];
    mock->n_flights--;
    if (mock->limits.mock_tokens_per_second > 0) {
        double seconds = flight->n_rows / mock->limits.mock_tokens_per_second;
        struct timespec left = {.tv_sec = (time_t)seconds, .tv_nsec = (long)((seconds - (double)(time_t)seconds) * 1e9)};
        uint64_t begun = mock->limits.wait_ns ? clock_now_ns() : 0;
        while (nanosleep(&left, &left) != 0) {}
        if (mock->limits.wait_ns) *mock->limits.wait_ns += clock_now_ns() - begun;
    }
    if (flight->n_samples > 0) memcpy(results, flight->results, flight->n_samples * sizeof *results);
    return STATUS_OK;
}

static void mock_copy_blocks(struct backend *backend, uint32_t count, const uint32_t *source, const uint32_t *destination) {
    struct mock *mock = (struct mock *)(void *)backend;
    CHECK(mock->n_flights == 0);
    for (uint32_t i = 0; i < count; i++) {
        CHECK(source[i] < mock->limits.n_blocks && destination[i] < mock->limits.n_blocks && source[i] != destination[i]);
        mock->blocks[destination[i]] = mock->blocks[source[i]];
    }
}

/* A lane's slots must be what one sequence put there, survivors move forward, and no block that is written belongs to two items. */
static void mock_compact(struct backend *backend, uint32_t count, const struct compaction *items) {
    struct mock *mock = (struct mock *)(void *)backend;
    CHECK(mock->n_flights == 0);
    mock->step++;
    for (uint32_t n = 0; n < count; n++)
        for (uint32_t j = 0; j * BLOCK_TOKENS < items[n].n_keep; j++) {
            CHECK(items[n].destination[j] < mock->limits.n_blocks);
            struct block *block = &mock->blocks[items[n].destination[j]];
            CHECK(block->writer_step != mock->step);
            block->writer_step = mock->step;
            block->writer = n;
        }
    for (uint32_t n = 0; n < count; n++) {
        const struct compaction *item = &items[n];
        for (uint32_t j = 0; j * BLOCK_TOKENS < item->n_slots; j++) {
            CHECK(item->source[j] < mock->limits.n_blocks);
            const struct block *block = &mock->blocks[item->source[j]];
            uint32_t filled = item->n_slots - j * BLOCK_TOKENS < BLOCK_TOKENS ? item->n_slots - j * BLOCK_TOKENS : BLOCK_TOKENS;
            CHECK(block->filled == filled);
            CHECK(block->writer_step != mock->step ||
                  (block->writer == n && j * BLOCK_TOKENS < item->n_keep && item->destination[j] == item->source[j]));
            if (j > 0) check_order(&mock->blocks[item->source[j - 1]].slots[BLOCK_TOKENS - 1], &block->slots[0]);
        }
        const uint32_t *keep = host_kept(backend, item);
        for (uint32_t i = 0; i < item->n_keep; i++) {
            uint32_t from = keep[i];
            CHECK(from < item->n_slots && (i == 0 || from > keep[i - 1]));
            struct block *to = &mock->blocks[item->destination[i / BLOCK_TOKENS]];
            to->slots[i % BLOCK_TOKENS] = mock->blocks[item->source[from / BLOCK_TOKENS]].slots[from % BLOCK_TOKENS];
        }
        for (uint32_t j = 0; j * BLOCK_TOKENS < item->n_keep; j++)
            mock->blocks[item->destination[j]].filled =
                item->n_keep - j * BLOCK_TOKENS < BLOCK_TOKENS ? item->n_keep - j * BLOCK_TOKENS : BLOCK_TOKENS;
    }
}

/* A slot of a lane, in a block that is filled as far as the lane's length says. */
static const struct slot *lane_slot(const struct mock *mock, const uint32_t *ids, uint32_t n_slots, uint32_t i) {
    CHECK(i < n_slots && ids[i / BLOCK_TOKENS] < mock->limits.n_blocks);
    const struct block *block = &mock->blocks[ids[i / BLOCK_TOKENS]];
    uint32_t first = i / BLOCK_TOKENS * BLOCK_TOKENS;
    CHECK(block->filled == (n_slots - first < BLOCK_TOKENS ? n_slots - first : BLOCK_TOKENS));
    return &block->slots[i % BLOCK_TOKENS];
}

/* A number in [0, 1) a slot (and query head), of the kind, the lane and the history the slot was written for. The ring must hold the window of this sequence. */
static void mock_score(struct backend *backend, const struct score_request *request, float *scores) {
    const struct mock *mock = (const struct mock *)(void *)backend;
    CHECK(mock->n_flights <= 1); /* one: rank, behind it */
    CHECK(request->first_lane + request->n_lanes <= mock->n_lanes);
    CHECK(request->kind != SCORE_ACCUMULATED || mock->limits.accumulators);
    const struct ring *ring = NULL;
    if (score_per_query_head(request->kind)) {
        CHECK(request->ring >= 1 && request->ring <= mock->limits.n_rings && request->n_window <= mock->limits.ring_rows);
        ring = &mock->rings[request->ring];
        CHECK(ring->used && ring->last_position == request->last_position);
        CHECK((int64_t)request->last_position - request->n_window + 1 >= ring->first_position);
    }
    for (uint32_t lane = request->first_lane; lane < request->first_lane + request->n_lanes; lane++) {
        const uint32_t *ids = request->block_ids + request->lane_first[lane];
        uint32_t n = request->lane_tokens[lane], heads = ring ? mock->group : 1;
        for (uint32_t i = 0; i < n; i++) {
            const struct slot *slot = lane_slot(mock, ids, n, i);
            CHECK(!ring || slot->position != ring->last_position || slot->chain == ring->chain); /* another sequence's queries */
            for (uint32_t head = 0; head < heads; head++)
                scores[request->offset[lane] + (size_t)head * n + i] = random_unit(random_at(slot->chain, (uint64_t)request->kind, lane, head));
        }
    }
}

static void mock_read_positions(struct backend *backend, uint32_t count, const uint32_t *blocks, int32_t *positions) {
    const struct mock *mock = (const struct mock *)(void *)backend;
    for (uint32_t i = 0; i < count; i++) {
        CHECK(blocks[i] < mock->limits.n_blocks);
        for (uint32_t slot = 0; slot < BLOCK_TOKENS; slot++)
            positions[(size_t)i * BLOCK_TOKENS + slot] = mock->blocks[blocks[i]].slots[slot].position;
    }
}

/* There is no key to rotate; what is checked is that the ring's copy is of these sinks. */
static void mock_shift_sinks(struct backend *backend, const struct shift_request *request) {
    struct mock *mock = (struct mock *)(void *)backend;
    CHECK(mock->n_flights == 0);
    CHECK(request->ring >= 1 && request->ring <= mock->limits.n_rings && request->n_slots <= mock->limits.sink_slots);
    struct ring *ring = &mock->rings[request->ring];
    CHECK(ring->used && (request->first || ring->n_sinks == request->n_slots));
    for (uint32_t lane = 0; lane < mock->n_lanes && request->n_slots > 0; lane++) {
        uint32_t last = request->n_slots - 1;
        const uint32_t id = request->block_ids[request->lane_first[lane] + last / BLOCK_TOKENS];
        CHECK(id < mock->limits.n_blocks && last % BLOCK_TOKENS < mock->blocks[id].filled);
        uint64_t chain = mock->blocks[id].slots[last % BLOCK_TOKENS].chain;
        if (request->first && lane == 0) ring->sink_chain = chain;
        CHECK(chain == ring->sink_chain);
    }
    ring->n_sinks = request->n_slots;
}

/* K is the token and V the position, in every dim. */
static void mock_read_f32(struct backend *backend, uint32_t block, uint32_t slot, float *k, float *v, int32_t *position) {
    const struct mock *mock = (const struct mock *)(void *)backend;
    CHECK(block < mock->limits.n_blocks && slot < mock->blocks[block].filled);
    const struct slot *at = &mock->blocks[block].slots[slot];
    for (uint32_t d = 0; d < mock->head_dim; d++) {
        k[d] = (float)at->token;
        v[d] = (float)at->position;
    }
    *position = at->position;
}

static void mock_tap_logits(struct backend *backend, float *destination) { ((struct mock *)(void *)backend)->tap = destination; }

static uint64_t mock_weight_bytes(const struct program *program, const struct backend_limits *limits) {
    (void)program, (void)limits;
    return 0;
}

static double mock_copy_bandwidth(const struct backend_limits *limits) {
    (void)limits;
    return backend_host_copy_bandwidth(1);
}

const struct backend_ops backend_mock = {
    .name = "mock",
    .memory = backend_host_memory,
    .block_bytes = mock_block_bytes,
    .memory_plan = mock_memory_plan,
    .supports = mock_supports,
    .prepare = mock_prepare,
    .close = mock_close,
    .describe = mock_describe,
    .submit = mock_submit,
    .sync = mock_sync,
    .copy_blocks = mock_copy_blocks,
    .resumes = backend_resumes_always,
    .compact = mock_compact,
    .read_f32 = mock_read_f32,
    .score = mock_score,
    .rank = host_rank,
    .cut = host_cut,
    .keep = host_keep,
    .keep_units = host_keep_units,
    .settle = host_settle,
    .read_positions = mock_read_positions,
    .shift_sinks = mock_shift_sinks,
    .tap_logits = mock_tap_logits,
    .makes_weights = true, /* it needs none */
    .weight_bytes = mock_weight_bytes,
    .copy_bandwidth = mock_copy_bandwidth,
};
