/* From raw scores to the slots that stay: once for all policies. Pure, no allocation: the caller brings the scratch. Any thread.
 *
 * Deterministic: equal scores go to the older position, whatever the order of evaluation. NaN counts as the lowest score. */
#pragma once

#include "policies/policy.h"

/* One lane as it lies in the cache. */
struct choose_lane {
    uint32_t n_slots;
    const int32_t *positions; /* [n_slots], ascending */
    const float *raw;         /* kernel scores: [group][n_slots] where the kind is per query head, else [n_slots]; unused by other scorers */
    const float *value_norms; /* [n_slots], or NULL: no value factor */
    /* Result: */
    uint32_t *keep; /* [n_slots] ascending slot indices */
    uint32_t n_keep;
};

struct choose_request {
    const struct policy *policy;
    const struct policy_options *options;
    uint32_t n_layers, n_kv_heads, group; /* group: query heads a KV head */
    uint32_t block_tokens;
    uint32_t budget;        /* tokens per lane on average */
    uint32_t n_window;      /* rows that really scored, <= options->window */
    int32_t last_position;  /* of the newest token */
    const int32_t *tokens;  /* by position: needs_classes only */
    const uint8_t *classes; /* [n_vocab] by token: enum token_class; NULL: all plain */
};

enum token_class { TOKEN_CLASS_PLAIN, TOKEN_CLASS_SPECIAL, TOKEN_CLASS_PUNCTUATION };

/* Bytes of scratch for a sequence of `n_lanes` lanes with at most `slots_max` slots each and `slots_total` in all. */
size_t choose_scratch_bytes(uint32_t n_lanes, uint32_t slots_max, size_t slots_total);

/* Fills keep and n_keep of every lane. `lanes` [n_layers * n_kv_heads]. A lane that fits its budget keeps all. */
void choose(const struct choose_request *request, struct choose_lane *lanes, void *scratch);

/* The same in steps, for callers that have the raw scores of some layers at a time: begin, every layer once in any order, end. raw and value_norms of a layer's lanes need to stay
 * only during its choose_layer. false from choose_begin: everything stays, keep and n_keep are filled, and no more steps are needed. */
struct chooser;
bool choose_begin(const struct choose_request *request, struct choose_lane *lanes, void *scratch, struct chooser **chooser);
void choose_layer(struct chooser *chooser, uint32_t layer);
void choose_end(struct chooser *chooser);

/* The share of window attention that the choice kept: over (row, key) pairs with attention >= 1/visible keys, those whose key stays. `persistence`: SCORE_PERSISTENCE of
 * the lane, [group][n_slots]. Adds to *kept and *all. */
void choose_hits(const struct choose_lane *lane, const float *persistence, uint32_t group, double *kept, double *all);
