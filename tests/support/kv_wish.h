/* What a request gets of compression that asks for this, where the operator grants it. */
#pragma once

#include <stdio.h>
#include <string.h>

#include "base/check.h"
#include "config/config.h"
#include "engine/compression.h"

/* config NULL: what comes without a configuration. ratio: instead of a budget, which then is 0. */
static inline struct kv_plan kv_wish_granted(const struct config *config, const char *policy, uint32_t budget, double ratio) {
    struct kv_wish wish = {.budget_tokens = budget, .keep_ratio = ratio};
    struct config defaults;
    struct kv_plan plan;
    struct error error = {0};
    const char *field = NULL;
    config_defaults(&defaults);
    (void)snprintf(wish.policy, sizeof wish.policy, "%s", policy);
    if (!compression_plan(config ? config : &defaults, &wish, &plan, &field, &error)) {
        (void)fprintf(stderr, "%s: %s\n", field, error.text);
        CHECK(!"a wish that is granted");
    }
    return plan;
}
