/* Names of phases, for logs and tests. Pure; any thread. */
#include "kernels/program.h"

#include "base/check.h"

const char *phase_kind_name(enum phase_kind kind) {
    static const char *const names[PHASE_KINDS] = {
        [PHASE_EMBED] = "EMBED",   [PHASE_ATTN_IN] = "ATTN_IN", [PHASE_ATTN] = "ATTN", [PHASE_ATTN_OUT] = "ATTN_OUT",
        [PHASE_MLP_IN] = "MLP_IN", [PHASE_MLP_OUT] = "MLP_OUT", [PHASE_HEAD] = "HEAD",
    };
    CHECK((unsigned)kind < PHASE_KINDS);
    return names[kind];
}
