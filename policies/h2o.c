/* H2O (arXiv 2306.14048, algorithm 1): s_k = sum over ALL past queries of A[q,k]; half of the budget for these heavy hitters, half for recents. Summed over the query heads
 * of a KV head (the released code is for one query head a KV head). */
#include "policies/table.h"

const struct policy policy_h2o = {
    .name = "h2o",
    .help = "heavy hitters of all attention so far, and recents",
    .rows = POLICY_ROWS_ALL,
    .scorer = SCORER_KERNEL,
    .kernel = SCORE_ACCUMULATED,
    .reduce = REDUCE_MEAN,
    .budget = BUDGET_UNIFORM,
    .granularity = GRANULARITY_SLOT,
    .triggers = TRIGGER_BUDGET | TRIGGER_PRESSURE,
    .half_recent = true,
};
