/* Chooses, for one sequence as it lies in a backend's cache, the slots that stay: ranked and listed by the backend, by what policies/ say. Moving and freeing are the
 * caller's. Owns scratch, sized once by compressor_new; compressor_choose allocates nothing. One thread, the one that calls the backend. */
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
    const struct choose_lane *lanes; /* [n_lanes] until the next call */
    uint64_t n_slots, n_keep;        /* summed */
    const struct head_hits *hits;    /* [n_lanes] until the next call; NULL: not measured */
    double hits_kept, hits_all;      /* summed; 0: not measured */
};

/* Pressure and budget points ask for the plan's target. measure_hits needs a ring. false: everything stays. */
bool compressor_choose(struct compressor *compressor, const struct kv_plan *plan, const struct compressor_sequence *sequence, bool measure_hits,
                       struct compressor_result *result);
