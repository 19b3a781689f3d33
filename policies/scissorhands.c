/* Scissorhands (arXiv 2305.17118, algorithm 2): the importance of a token persists; s_k = number of queries in a history window for which A[q,k] is at least the mean
 * 1/visible. The history is the window of recent queries; recents are kept. */
#include "policies/table.h"

const struct policy policy_scissorhands = {
    .name = "scissorhands",
    .help = "tokens that recent queries keep finding important",
    .rows = POLICY_ROWS_WINDOW,
    .scorer = SCORER_KERNEL,
    .kernel = SCORE_PERSISTENCE,
    .reduce = REDUCE_MEAN,
    .budget = BUDGET_UNIFORM,
    .granularity = GRANULARITY_SLOT,
    .triggers = TRIGGER_BUDGET | TRIGGER_PRESSURE,
    .protects_window = true,
};
