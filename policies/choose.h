/* From scores to the slots that stay: once for all policies. What a policy says becomes numbers that a backend ranks, cuts and lists by (kernels/select.h); how much each lane keeps is decided
 * here. No allocation: the caller brings the scratch. The thread that calls the backend.
 *
 * A choice is begun, and goes on each time that the backend has settled what it asked for, until its lanes are filled; so that several sequences' choices, each in a place of the backend, wait
 * together, and one can be begun behind a step in flight.
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
    uint32_t *keep;       /* [n_keep] ascending slot indices; NULL: the list is in the backend (struct compaction.keep), until it ranks in that place again */
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
    bool wants_lists;                                     /* keep of every lane is wanted here */
    /* Where choose_needs_room says so, the choice's alone until its lanes are used; else NULL: */
    uint32_t *lists; /* [sum of lane_tokens] room for lists */
    void *room;      /* of choose_room_bytes */
};

enum token_class { TOKEN_CLASS_PLAIN, TOKEN_CLASS_SPECIAL, TOKEN_CLASS_PUNCTUATION };

bool choose_needs_room(const struct policy *policy, bool wants_lists);
/* Bytes of `room` for a sequence with at most `slots_max` slots a lane and `slots_total` in all. */
size_t choose_room_bytes(uint32_t slots_max, size_t slots_total);
/* Bytes of scratch for a sequence of `n_lanes` lanes. */
size_t choose_scratch_bytes(uint32_t n_lanes);

/* Fills `lanes` [n_layers * n_kv_heads]; a lane that fits its budget keeps all. NULL: they are filled. Else the choice, which lies in scratch: it goes on when backend->ops->settle has been called.
 * `lanes`, `scratch` and what the request points to, but for the tables, which are read here (by the ladder also later), stay until then. It may be forgotten instead at any time. */
struct chooser;
struct chooser *choose_begin(const struct choose_request *request, struct backend *backend, uint32_t place, struct choose_lane *lanes, void *scratch);
/* false: the lanes are filled. true: it waits for settle again. */
bool choose_go_on(struct chooser *chooser);

/* The share of window attention that the choice kept: over (row, key) pairs with attention >= 1/visible keys, those whose key stays. `persistence`: SCORE_PERSISTENCE of
 * the lane, [group][n_slots]. Adds to *kept and *all. The lane has its list. */
void choose_hits(const struct choose_lane *lane, const float *persistence, uint32_t group, double *kept, double *all);
