/* StreamingLLM (arXiv 2309.17453, 3.2): attention sinks and recents, re-indexed so that positions stay within the cache. Here whole blocks in the middle are
 * dropped and the sinks are shifted behind the recents instead: RoPE sees differences only. */
#include "policies/table.h"

const struct policy policy_streaming_llm = {
    .name = "streaming_llm",
    .help = "the first tokens and the most recent ones; endless streams",
    .rows = POLICY_ROWS_NONE,
    .scorer = SCORER_POSITION,
    .budget = BUDGET_UNIFORM,
    .granularity = GRANULARITY_BLOCK,
    .triggers = TRIGGER_BUDGET,
    .shifts_sinks = true,
};
