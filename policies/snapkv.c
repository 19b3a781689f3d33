/* SnapKV (arXiv 2404.14469, 4.1): attention of the last w queries of the prompt, summed, pooled over neighbours; top budget - w and the window itself. Per KV head: the mean
 * over its query heads before pooling. */
#include "policies/table.h"

const struct policy policy_snapkv = {
    .name = "snapkv",
    .help = "what the end of the prompt attends to, the same number in each head",
    .rows = POLICY_ROWS_WINDOW,
    .scorer = SCORER_KERNEL,
    .kernel = SCORE_ATTENTION,
    .reduce = REDUCE_MEAN_POOL,
    .budget = BUDGET_UNIFORM,
    .granularity = GRANULARITY_SLOT,
    .triggers = TRIGGER_PROMPT_END,
    .protects_window = true,
};
