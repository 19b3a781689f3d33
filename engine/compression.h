/* What a request gets of KV-cache compression: the operator's settings and limits, the request's wishes, made one plan. Pure; any thread. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/block.h"
#include "base/error.h"
#include "config/config.h"
#include "policies/policy.h"
#include "scheduler/scheduler.h"

/* The "kv" object of a request, as it stands there. */
struct kv_wish {
    char policy[32];        /* empty: the operator's */
    uint32_t budget_tokens; /* 0: not given */
    double keep_ratio;      /* 0: not given */
    uint32_t protect_tokens;
    bool report;
};

/* Of one head of KV, window rows times the query heads that share it: pairs of a row and a cached key with at least an even share of the row's attention, and those of them
 * whose key was kept. Hit rate = kept / all. */
struct head_hits {
    double kept, all; /* whole numbers */
};

/* What is done for one request. Const while it lives. */
struct kv_plan {
    const struct policy *policy; /* NULL or "none": the rest is unused */
    struct policy_options options;
    struct policy_target target;
    unsigned triggers; /* of enum policy_trigger */
    uint32_t interval; /* tokens between two compressions after the prompt */
    bool while_reading;
};

/* Rules of [compression] that need the table of policies: unknown names, triggers that make no sense for the policy, limits that contradict each other. */
enum status compression_check(const struct config *config, struct error *error);

/* false: the wish cannot be granted; *field names the offending field ("kv.policy", "kv.budget_tokens", "kv.keep_ratio", "kv.protect_tokens"), the error says what is allowed. */
bool compression_plan(const struct config *config, const struct kv_wish *wish, struct kv_plan *plan, const char **field, struct error *error);

/* The most tokens a lane can hold on average once the prompt is read: what admission counts beyond the prompt. UINT32_MAX: no bound (no compression, or by ratio). */
uint32_t compression_tokens_max(const struct kv_plan *plan);

/* May the sequence be longer than max_model_len? If its sinks follow the recents and no lane ever holds more than max_model_len slots, between two compressions too. */
bool compression_is_endless(const struct kv_plan *plan, uint32_t max_model_len);

/* The token indices at which the sequence is compressed: end of prompt, multiples of the interval after it, every COMPRESSION_READING tokens of the prompt when compressed while
 * reading. Functions of indices alone, so that chunks, steps and recomputation cannot change them. */
#define COMPRESSION_READING (4 * BLOCK_TOKENS)
struct scheduler_points compression_points(const struct kv_plan *plan);
/* Prompt rows from here on are needed by the score, whatever the prefix cache holds (UINT32_MAX: none but the last). */
uint32_t compression_first_row(const struct kv_plan *plan, uint32_t n_prompt);
/* Rows that score at a point: of the window those that belong to the prompt at its end, after it those since. */
uint32_t compression_window(const struct kv_plan *plan, uint32_t n_computed, uint32_t n_prompt);
static inline bool compression_is_on(const struct kv_plan *plan) { return plan->policy && plan->policy->scorer != SCORER_NONE; }
static inline bool compression_needs_ring(const struct kv_plan *plan) {
    return compression_is_on(plan) &&
           (plan->policy->rows == POLICY_ROWS_WINDOW || plan->policy->rows == POLICY_ROWS_LAST || plan->policy->shifts_sinks);
}
/* May some request have this policy? What the engine must have state for. */
bool compression_may_use(const struct config *config, const struct policy *policy);
