/* Ada-KV (arXiv 2407.11550, algorithms 1 and 2): SnapKV's scores; within a layer a head keeps as many as it has among the layer's best, with a floor. */
#include "policies/table.h"

const struct policy policy_ada_snapkv = {
    .name = "ada_snapkv",
    .help = "as snapkv, heads of a layer share their budget by score",
    .rows = POLICY_ROWS_WINDOW,
    .scorer = SCORER_KERNEL,
    .kernel = SCORE_ATTENTION,
    .reduce = REDUCE_MEAN_POOL,
    .budget = BUDGET_LAYER,
    .granularity = GRANULARITY_SLOT,
    .triggers = TRIGGER_PROMPT_END,
    .protects_window = true,
};
