/* One table of what a backend must get right and do fast: tiny programs x batches over caches of awkward lengths. Correctness tests and speed measurements walk
 * the same table, on every backend, so that nothing is fast only where it was never checked.
 *
 * A world is one case on one backend: its cache filled with the case's history, ready for the case's rows, which may be run in any chunks and batches and run again. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "kernels/backend.h"
#include "tests/support/tiny_program.h"

#define PHASE_SEQUENCES 6
#define PHASE_LANES 4

struct phase_sequence {
    uint32_t history, rows; /* tokens in the cache before, tokens to run */
    bool ragged;            /* after the history, lane l is cut to lanes[l % PHASE_LANES] slots (at most what it has) */
    uint32_t lanes[PHASE_LANES];
    uint32_t dropped; /* leading blocks that odd lanes lose: their ids leave the table */
};

enum phase_flags {
    PHASE_BIASES = 1,
    PHASE_QK_NORMS = 2,
    PHASE_HALVES = 4, /* rope pairs (i, i + d/2) */
    PHASE_ROPE_SCALED = 8,
    PHASE_ROPE_PART = 16, /* half of the dims rotate */
    PHASE_TIED = 32,
    PHASE_MIXED_TYPES = 64,
    PHASE_MISALIGNED = 128,
};

struct phase_case {
    const char *name;
    enum tensor_type type;
    uint32_t n_layers, n_embd, n_heads, n_kv_heads, head_dim, n_ff, n_vocab;
    unsigned flags;
    struct phase_sequence sequences[PHASE_SEQUENCES]; /* those with rows > 0 */
};

extern const struct phase_case phase_cases[];
extern const uint32_t n_phase_cases;

struct tiny_shape phase_case_shape(const struct phase_case *phase_case);
uint32_t phase_case_sequences(const struct phase_case *phase_case);
uint32_t phase_case_rows(const struct phase_case *phase_case); /* of all sequences */
int32_t phase_case_token(const struct phase_case *phase_case, uint32_t sequence, uint32_t position);

struct phase_world_options {
    enum kv_dtype kv_dtype;
    const char *instruction_set; /* NULL: the backend's choice */
    uint32_t threads;
    uint32_t history_chunk; /* rows of one step while the history is read; 0: as many as fit */
    enum weights_mode weights;
    uint32_t activation_bits;
    bool deterministic;
};

struct phase_world;
/* What prepare says, if it is not OK. `program` must outlive the world. */
enum status phase_world_new(const struct phase_case *phase_case, const struct program *program, const struct backend_ops *ops,
                            const struct phase_world_options *options, struct phase_world **world, struct error *error);
void phase_world_free(struct phase_world *world);

struct phase_part {
    uint32_t sequence, n_rows;
};
/* One step: the next n_rows rows of each of these (different) sequences, in this order. Their logits are kept. */
void phase_world_step(struct phase_world *world, const struct phase_part *parts, uint32_t n_parts);
/* All rows in one step. */
void phase_world_run(struct phase_world *world);
/* Back to the history: what the rows appended is forgotten. */
void phase_world_rewind(struct phase_world *world);
/* [n_vocab] */
const float *phase_world_logits(const struct phase_world *world, uint32_t sequence, uint32_t row);
uint32_t phase_world_rows_left(const struct phase_world *world, uint32_t sequence);
struct backend *phase_world_backend(struct phase_world *world);
/* Block id of the lane's block, from the table as it stands; and the lane's slots. */
uint32_t phase_world_block(const struct phase_world *world, uint32_t sequence, uint32_t lane, uint32_t block);
uint32_t phase_world_lane_tokens(const struct phase_world *world, uint32_t sequence, uint32_t lane);
