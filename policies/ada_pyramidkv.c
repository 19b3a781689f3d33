/* Ada-KV over PyramidKV's ramp (arXiv 2407.11550, 4). */
#include "policies/table.h"

const struct policy policy_ada_pyramidkv = {
    .name = "ada_pyramidkv",
    .help = "as pyramidkv, heads of a layer share their budget by score",
    .rows = POLICY_ROWS_WINDOW,
    .scorer = SCORER_KERNEL,
    .kernel = SCORE_ATTENTION,
    .reduce = REDUCE_MEAN_POOL,
    .budget = BUDGET_RAMP_LAYER,
    .granularity = GRANULARITY_SLOT,
    .triggers = TRIGGER_PROMPT_END,
    .protects_window = true,
};
