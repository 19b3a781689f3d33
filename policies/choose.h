/* From scores to the slots that stay: once for all policies. What a policy says becomes numbers that a backend ranks, cuts and lists by (kernels/select.h); how much each lane keeps is decided
 * here. No allocation: the caller brings the scratch. The thread that calls the backend.
 *
 * Deterministic: equal scores go to the older position, whatever the order of evaluation. NaN counts as the lowest score. */
#pragma once

#include "kernels/backend.h"
#include "policies/policy.h"

/* Result, of one lane. */
struct choose_lane {
    uint32_t n_slots;
    uint32_t n_keep;
    uint32_t first_moved; /* the first of those that stay whose index changes; n_keep if none */
    uint32_t *keep;       /* [n_keep] ascending slot indices; NULL: the list is in the backend (struct compaction.keep), until it ranks again */
};

struct choose_request {
    const struct policy *policy;
    const struct policy_options *options;
    uint32_t n_layers, n_kv_heads;
    uint32_t block_tokens;
    uint32_t budget;                                      /* tokens per lane on average */
    uint32_t ring;                                        /* of the sequence; 0: none */
    uint32_t n_window;                                    /* rows that really scored, <= options->window */
    int32_t last_position;                                /* of the newest token */
    const int32_t *tokens;                                /* by position: needs_classes only */
    const uint8_t *classes;                               /* [n_vocab] by token: enum token_class; NULL: all plain */
    const uint32_t *block_ids, *lane_first, *lane_tokens; /* as in struct batch */
    uint32_t *lists;                                      /* [sum of lane_tokens] room for lists */
    bool wants_lists;                                     /* keep of every lane is wanted here */
};

enum token_class { TOKEN_CLASS_PLAIN, TOKEN_CLASS_SPECIAL, TOKEN_CLASS_PUNCTUATION };

/* Bytes of scratch for a sequence of `n_lanes` lanes with at most `slots_max` slots each and `slots_total` in all. */
size_t choose_scratch_bytes(uint32_t n_lanes, uint32_t slots_max, size_t slots_total);

/* Fills `lanes` [n_layers * n_kv_heads]. A lane that fits its budget keeps all. */
void choose(const struct choose_request *request, struct backend *backend, struct choose_lane *lanes, void *scratch);

/* The share of window attention that the choice kept: over (row, key) pairs with attention >= 1/visible keys, those whose key stays. `persistence`: SCORE_PERSISTENCE of
 * the lane, [group][n_slots]. Adds to *kept and *all. The lane has its list. */
void choose_hits(const struct choose_lane *lane, const float *persistence, uint32_t group, double *kept, double *all);
