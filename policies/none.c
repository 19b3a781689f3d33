/* Keeps everything. */
#include "policies/table.h"

const struct policy policy_none = {
    .name = "none",
    .help = "everything: no compression",
    .rows = POLICY_ROWS_NONE,
    .scorer = SCORER_NONE,
};
