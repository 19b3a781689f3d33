/* PyramidKV (arXiv 2406.02069, 3.2): SnapKV's scores; budgets fall linearly from the first layer to the last, by beta, at the same average. */
#include "policies/table.h"

const struct policy policy_pyramidkv = {
    .name = "pyramidkv",
    .help = "as snapkv, more in early layers than in late ones",
    .rows = POLICY_ROWS_WINDOW,
    .scorer = SCORER_KERNEL,
    .kernel = SCORE_ATTENTION,
    .reduce = REDUCE_MEAN_POOL,
    .budget = BUDGET_RAMP,
    .granularity = GRANULARITY_SLOT,
    .triggers = TRIGGER_PROMPT_END,
    .protects_window = true,
};
