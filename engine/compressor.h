/* Chooses, for sequences as they lie in a backend's cache, the slots that stay: ranked and listed by the backend, by what policies/ say. Moving and freeing are the
 * caller's. Owns scratch, sized once by compressor_new; nothing else allocates. One thread, the one that calls the backend.
 *
 * Several choices may be under way, each in a place from compressor_begin until compressor_take or compressor_drop; they wait for the backend together. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/compression.h"
#include "kernels/backend.h"
#include "policies/choose.h"

struct compressor;

struct compressor_limits {
    uint32_t slots_max;     /* of one lane */
    uint32_t slots_total;   /* of all lanes of a sequence; <= lanes * slots_max */
    const uint8_t *classes; /* [n_vocab] enum token_class of each token, or NULL */
    bool lists;             /* the lanes of every result have their lists here; else they may be in the backend (choose.h) */
};

/* Bytes it will allocate. */
uint64_t compressor_bytes(const struct program *program, const struct compressor_limits *limits);
struct compressor *compressor_new(struct backend *backend, const struct program *program, const struct compressor_limits *limits);
void compressor_free(struct compressor *compressor); /* NULL is fine */

struct compressor_sequence {
    uint32_t ring;                                        /* 0: none was kept */
    uint32_t n_computed;                                  /* tokens seen; the newest has position n_computed - 1 */
    uint32_t n_window;                                    /* rows that score, all of them in the ring */
    const int32_t *tokens;                                /* [n_computed], for classes */
    const uint32_t *block_ids, *lane_first, *lane_tokens; /* as in struct batch */
};

struct compressor_result {
    const struct choose_lane *lanes; /* [n_lanes] until a choice is begun in the same place */
    uint32_t place;                  /* for struct compaction, where the lanes have no lists */
    uint64_t n_slots, n_keep;        /* summed */
    const struct head_hits *hits;    /* [n_lanes] until the next call; NULL: not measured */
    double hits_kept, hits_all;      /* summed; 0: not measured */
};

/* At once, while no other choice is under way. Pressure and budget points ask for the plan's target. measure_hits needs a ring. false: everything stays. */
bool compressor_choose(struct compressor *compressor, const struct kv_plan *plan, const struct compressor_sequence *sequence, bool measure_hits,
                       struct compressor_result *result);

/* A choice that takes the one room for lists and scores, which others do without: of such there is one at a time. */
bool compressor_needs_room(const struct compressor *compressor, const struct kv_plan *plan, bool measure_hits);
#define COMPRESSOR_PLACE_NONE UINT32_MAX
/* Where the backend takes two steps, also behind one in flight, for a sequence as that leaves it. `plan` and what it names stay until the choice is taken or dropped; of `sequence`, the tables do, and
 * where room is needed all of it. Returns its place; COMPRESSOR_PLACE_NONE: all are taken, or the room is. */
uint32_t compressor_begin(struct compressor *compressor, const struct kv_plan *plan, const struct compressor_sequence *sequence, bool measure_hits);
/* All that were begun, to their ends. No step is in flight. */
void compressor_run(struct compressor *compressor);
/* What was chosen, after compressor_run; the place is free. false: everything stays. */
bool compressor_take(struct compressor *compressor, uint32_t place, struct compressor_result *result);
void compressor_drop(struct compressor *compressor, uint32_t place);
