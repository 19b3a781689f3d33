/* Expected Attention (arXiv 2510.00636, 3): attention that a query drawn from the recent ones would pay on average over the next positions, times the value's norm; heads of a
 * layer share their budget. */
#include "policies/table.h"

const struct policy policy_expected_attention = {
    .name = "expected_attention",
    .help = "what queries still to come are expected to attend to",
    .rows = POLICY_ROWS_WINDOW,
    .scorer = SCORER_KERNEL,
    .kernel = SCORE_EXPECTED,
    .reduce = REDUCE_MEAN,
    .budget = BUDGET_LAYER,
    .granularity = GRANULARITY_SLOT,
    .triggers = TRIGGERS_ALL,
    .always_value = true,
};
