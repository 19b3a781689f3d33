/* KV-Compress (arXiv 2410.00161, 3): squared attention of the last w queries, pooled, summed over the query heads of a KV head; the blocks that cost least are freed, over all
 * layers and heads of the sequence. */
#include "policies/table.h"

const struct policy policy_kv_compress = {
    .name = "kv_compress",
    .help = "squared attention, all heads of all layers share one budget of whole blocks",
    .rows = POLICY_ROWS_WINDOW,
    .scorer = SCORER_KERNEL,
    .kernel = SCORE_SQUARES,
    .reduce = REDUCE_POOL_SUM,
    .budget = BUDGET_BLOCKS,
    .granularity = GRANULARITY_SLOT,
    .triggers = TRIGGERS_ALL,
    .protects_window = true,
};
