/* The list of policies, and defaults of their options. Owns nothing; any thread. */
#include "policies/table.h"

#include <math.h>
#include <string.h>

#include "base/check.h"

const struct policy *const policies[] = {
    &policy_none,          &policy_random,       &policy_streaming_llm,
    &policy_h2o,           &policy_scissorhands, &policy_fastgen,
    &policy_snapkv,        &policy_pyramidkv,    &policy_ada_snapkv,
    &policy_ada_pyramidkv, &policy_kv_compress,  &policy_expected_attention,
    &policy_keydiff,       &policy_tova,         NULL,
};

const struct policy *policy_find(const char *name) {
    for (const struct policy *const *policy = policies; *policy; policy++)
        if (strcmp((*policy)->name, name) == 0) return *policy;
    return NULL;
}

uint32_t policy_count(void) { return (uint32_t)(sizeof policies / sizeof *policies) - 1; }

uint32_t policy_index(const struct policy *policy) {
    for (uint32_t i = 0; i < policy_count(); i++)
        if (policies[i] == policy) return i;
    CHECK(!"a policy of the table");
    return 0;
}

const char *policy_names(void) {
    return "none, random, streaming_llm, h2o, scissorhands, fastgen, snapkv, pyramidkv, ada_snapkv, ada_pyramidkv, kv_compress, expected_attention, "
           "keydiff, tova";
}

const char *policy_trigger_name(enum policy_trigger trigger) {
    switch (trigger) {
    case TRIGGER_PROMPT_END: return "prompt_end";
    case TRIGGER_BUDGET: return "budget";
    case TRIGGER_PRESSURE: return "pressure";
    }
    CHECK(!"one trigger");
    return NULL;
}

void policy_options_default(struct policy_options *options) {
    *options = (struct policy_options){.sink_tokens = 4,
                                       .recent_tokens = 32,
                                       .window = 32,
                                       .pooling = POOLING_MAX,
                                       .pooling_kernel = 7,
                                       .floor = 0.2,
                                       .recovery = 0.9,
                                       .ramp = 20,
                                       .ahead = 512};
}

uint32_t policy_target_tokens(const struct policy_target *target, uint32_t seen) {
    if (target->budget_tokens) return target->budget_tokens;
    double tokens = ceil(target->keep_ratio * seen);
    return tokens < 1 ? 1 : (uint32_t)tokens;
}
