/* FastGen (arXiv 2310.01801, 3.2-3.3): per head the first rung of a ladder (special tokens; and punctuation; and 30 % heavy hitters; and 30 % most recent; all) whose kept keys
 * hold at least `recovery` of the attention. Profiled on the last window's rows instead of the full n x n matrix. A budget is an upper bound applied after the ladder. */
#include "policies/table.h"

const struct policy policy_fastgen = {
    .name = "fastgen",
    .help = "per head the cheapest rule that recovers most of its attention",
    .rows = POLICY_ROWS_WINDOW,
    .scorer = SCORER_KERNEL,
    .kernel = SCORE_ATTENTION,
    .reduce = REDUCE_MEAN,
    .budget = BUDGET_LADDER,
    .granularity = GRANULARITY_SLOT,
    .triggers = TRIGGER_PROMPT_END | TRIGGER_BUDGET,
    .needs_classes = true,
};
