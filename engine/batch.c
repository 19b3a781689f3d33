/* A plan made numbers: rows, tables and samples as a backend wants them. Owns the arrays, all allocated at start. Engine thread. It runs nothing and ends nobody. */
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "engine/internal.h"

void batch_builder_init(struct batch_builder *builder, uint32_t max_rows, uint32_t max_sequences, uint32_t max_samples, uint32_t max_draws) {
    *builder = (struct batch_builder){
        .tokens = check_calloc(max_rows, sizeof *builder->tokens),
        .positions = check_calloc(max_rows, sizeof *builder->positions),
        .sequences = check_calloc(max_sequences, sizeof *builder->sequences),
        .samples = check_calloc(max_samples, sizeof *builder->samples),
        .results = check_calloc(max_samples, sizeof *builder->results),
        .draws = check_calloc(max_draws, sizeof *builder->draws),
        .first_target = check_calloc(max_sequences, sizeof *builder->first_target),
        .n_targets = check_calloc(max_sequences, sizeof *builder->n_targets),
        .ended = check_calloc(max_draws, sizeof *builder->ended),
        .finishes = check_calloc(max_draws, sizeof *builder->finishes),
        .max_rows = max_rows,
        .max_sequences = max_sequences,
        .max_samples = max_samples,
        .max_draws = max_draws,
    };
}

void batch_builder_done(struct batch_builder *builder) {
    free(builder->tokens);
    free(builder->positions);
    free(builder->sequences);
    free(builder->samples);
    free(builder->results);
    free(builder->draws);
    free(builder->first_target);
    free(builder->n_targets);
    free(builder->ended);
    free(builder->finishes);
    *builder = (struct batch_builder){0};
}

static struct sample *next_sample(struct batch_builder *builder) {
    CHECK(builder->batch.n_samples < builder->max_samples);
    return &builder->samples[builder->batch.n_samples++];
}

/* Log-probabilities of the prompt: the row of token i answers for token i + 1. Those already delivered (a preempted sequence reads its prompt again) are not asked twice. */
static void add_targets(struct batch_builder *builder, const struct plan_entry *entry, uint32_t first_row, uint32_t index) {
    const struct request *request = entry->owner;
    builder->first_target[index] = builder->batch.n_samples;
    builder->n_targets[index] = 0;
    if (!request->prompt_results) return;
    const int32_t *tokens = request->tokens[entry->choice];
    uint32_t end = entry->first_token + entry->n_rows;
    for (uint32_t i = entry->first_token; i < end && i + 1 < request->n_prompt; i++) {
        if (i + 1 < request->state->prompt_results_next) continue;
        CHECK(i + 1 == request->state->prompt_results_next + builder->n_targets[index]); /* no row that somebody needs was skipped */
        *next_sample(builder) = (struct sample){.row = first_row + i - entry->first_token,
                                                .sampling = &request->sampling,
                                                .choice = entry->choice,
                                                .target = tokens[i + 1],
                                                .history = tokens,
                                                .n_prompt = request->n_prompt,
                                                .n_history = i + 1};
        builder->n_targets[index]++;
    }
}

static void add_draw(struct batch_builder *builder, const struct requests *requests, const struct plan_entry *entry, uint32_t index, uint32_t row,
                     uint32_t choice) {
    struct request *request = entry->owner;
    const struct choice_state *state = requests_choice(requests, request->state, choice);
    uint32_t n_generated = state->n_generated + (entry->drawn_by != UINT32_MAX);
    CHECK(builder->n_draws < builder->max_draws);
    builder->penalizes = builder->penalizes || sampling_penalizes(&request->sampling);
    builder->draws[builder->n_draws++] =
        (struct draw){.state = request->state, .choice = choice, .n_tokens = entry->n_tokens, .result = builder->batch.n_samples, .entry = index};
    /* A choice that is about to fork has no tokens of its own yet: its history is that of the one that read the prompt. */
    *next_sample(builder) = (struct sample){.row = row,
                                            .sampling = &request->sampling,
                                            .choice = choice,
                                            .token_index = n_generated,
                                            .ban = n_generated < request->min_new,
                                            .target = -1,
                                            .history = request->tokens[entry->choice],
                                            .n_prompt = request->n_prompt,
                                            .n_history = entry->n_tokens};
}

static void add_draws(struct batch_builder *builder, const struct requests *requests, const struct plan_entry *entry, uint32_t index, uint32_t row) {
    const struct request *request = entry->owner;
    uint32_t before = builder->n_draws;
    if (entry->n_samples == 0) return;
    if (entry->n_tokens > request->n_prompt) {
        add_draw(builder, requests, entry, index, row, entry->choice);
    } else {
        /* The prompt ends: one token for each choice, or for each that still lives. */
        bool all = entry->n_samples == request->n_candidates;
        for (uint32_t c = 0; c < request->n_candidates; c++)
            if (all || !requests_choice(requests, request->state, c)->over) add_draw(builder, requests, entry, index, row, c);
    }
    CHECK(builder->n_draws - before == entry->n_samples);
}

static void add_tokens(struct batch_builder *builder, const struct batch_builder *before, const struct plan_entry *entry, uint32_t row) {
    const struct request *request = entry->owner;
    if (entry->drawn_by == UINT32_MAX) {
        memcpy(builder->tokens + row, request->tokens[entry->choice] + entry->first_token, entry->n_rows * sizeof *builder->tokens);
        return;
    }
    const struct draw *draw = &before->draws[entry->drawn_by];
    CHECK(entry->drawn_by < before->n_draws && draw->state == request->state && draw->choice == entry->choice &&
          draw->n_tokens == entry->first_token);
    builder->tokens[row] = -1 - (int32_t)draw->result;
}

void batch_build(struct batch_builder *builder, const struct batch_builder *before, const struct requests *requests, const struct plan *plan) {
    struct batch *batch = &builder->batch;
    CHECK(plan->n_rows <= builder->max_rows && plan->n_entries <= builder->max_sequences);
    *batch = (struct batch){.tokens = builder->tokens,
                            .positions = builder->positions,
                            .sequences = builder->sequences,
                            .samples = builder->samples,
                            .block_ids = plan->block_ids,
                            .n_sequences = plan->n_entries};
    builder->n_draws = 0;
    builder->penalizes = false;
    for (uint32_t e = 0; e < plan->n_entries; e++) {
        const struct plan_entry *entry = &plan->entries[e];
        const struct request *request = entry->owner;
        uint32_t row = batch->n_rows;
        CHECK(entry->n_rows > 0 && entry->n_rows <= builder->max_rows - row);
        builder->sequences[e] = (struct batch_sequence){.first_row = row,
                                                        .n_rows = entry->n_rows,
                                                        .table = entry->table,
                                                        .table_changes = entry->table_changes,
                                                        .lane_first = entry->lane_first,
                                                        .lane_tokens = entry->lane_tokens,
                                                        .ring = entry->ring,
                                                        .accumulate = compression_is_on(&request->kv) && request->kv.policy->rows == POLICY_ROWS_ALL};
        add_tokens(builder, before, entry, row);
        for (uint32_t i = 0; i < entry->n_rows; i++) builder->positions[row + i] = (int32_t)(entry->first_token + i);
        batch->n_rows += entry->n_rows;
        add_targets(builder, entry, row, e);
        add_draws(builder, requests, entry, e, batch->n_rows - 1);
    }
    CHECK(batch->n_rows == plan->n_rows && builder->n_draws == plan->n_samples);
}
