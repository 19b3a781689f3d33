/* What a request gets of KV-cache compression: the operator's settings and limits, the request's wishes, made one plan. Pure; any thread. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "config/config.h"
#include "policies/policy.h"

/* The "kv" object of a request, as it stands there. */
struct kv_wish {
    char policy[32];        /* empty: the operator's */
    uint32_t budget_tokens; /* 0: not given */
    double keep_ratio;      /* 0: not given */
    uint32_t protect_tokens;
    bool report;
};

/* What is done for one request. Const while it lives. */
struct kv_plan {
    const struct policy *policy; /* never NULL; "none": the rest is unused */
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

/* The next token index > `computed` at which the sequence is compressed (end of prompt, multiples of the interval after it; every `read_interval` tokens of the prompt
 * when compressed while reading), or UINT32_MAX: never again. A function of indices alone, so that chunks, steps and recomputation cannot change it. */
uint32_t compression_next_point(const struct kv_plan *plan, uint32_t computed, uint32_t n_prompt, uint32_t read_interval);
