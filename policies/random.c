/* Scores are random, a function of (seed, position): what any other policy has to beat. */
#include "policies/table.h"

const struct policy policy_random = {
    .name = "random",
    .help = "random tokens: the baseline that any other policy has to beat",
    .rows = POLICY_ROWS_NONE,
    .scorer = SCORER_RANDOM,
    .budget = BUDGET_UNIFORM,
    .granularity = GRANULARITY_SLOT,
    .triggers = TRIGGERS_ALL,
};
