/* KeyDiff (arXiv 2504.15364, 3): s_k = -cos(k, mean of the unit keys): distinct keys stay. Needs no query, so it may run while a prompt is being read. */
#include "policies/table.h"

const struct policy policy_keydiff = {
    .name = "keydiff",
    .help = "keys that differ most from the others; looks at no query",
    .rows = POLICY_ROWS_NONE,
    .scorer = SCORER_KERNEL,
    .kernel = SCORE_KEYDIFF,
    .reduce = REDUCE_MEAN,
    .budget = BUDGET_UNIFORM,
    .granularity = GRANULARITY_SLOT,
    .triggers = TRIGGERS_ALL,
};
