/* TOVA (arXiv 2401.06104, 3.2): the last query's attention, averaged over the heads of the layer; the lowest go. */
#include "policies/table.h"

const struct policy policy_tova = {
    .name = "tova",
    .help = "what the last query attends to, the same tokens in all heads of a layer",
    .rows = POLICY_ROWS_LAST,
    .scorer = SCORER_KERNEL,
    .kernel = SCORE_ATTENTION,
    .reduce = REDUCE_LAYER,
    .budget = BUDGET_UNIFORM,
    .granularity = GRANULARITY_SLOT,
    .triggers = TRIGGERS_ALL,
};
