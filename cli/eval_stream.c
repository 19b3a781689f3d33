/* An endless stream: text read under streaming_llm at a fixed budget, whole blocks dropped at fixed points, the sinks moved along. Positions grow past what the model was trained
 * for; distances do not. See eval.h. Main thread. */
#include <math.h>

#include "base/check.h"
#include "cli/eval.h"

#define CHUNK BLOCK_TOKENS /* tokens between two drops, and of one step */

enum status eval_stream(struct eval *eval, struct error *error) {
    const struct eval_cell cell = {.policy = policy_find("streaming_llm"), .keep = 1};
    struct kv_plan plan = eval_plan(eval, &cell, EVAL_STREAM_BUDGET, 0);
    const int32_t *tokens = eval->text.list.tokens;
    uint32_t shifted = 0, n_windows = 0, rows_of_window = 0;
    double nll = 0;
    CHECK(cell.policy && plan.target.budget_tokens == EVAL_STREAM_BUDGET);
    lab_release(eval->lab, 0);
    lab_clear(eval->lab, LAB_BASE);
    for (uint32_t done = 0; done < eval->n_stream;) {
        uint32_t left = eval->n_stream - done, n = left < CHUNK ? left : CHUNK;
        struct lab_row rows[CHUNK];
        const struct lab_part part = {.sequence = LAB_BASE, .n_tokens = n, .tokens = tokens + done, .rows = rows, .targets = tokens + done + 1};
        enum status status = lab_read(eval->lab, 1, &part, NULL, error);
        if (status != STATUS_OK) return status;
        for (uint32_t i = 0; i < n; i++) nll -= (double)rows[i].logprob;
        done += n;
        rows_of_window += n;
        lab_stream_drop(eval->lab, LAB_BASE, &plan, &shifted);
        eval_step_done(eval, n);
        if (done % EVAL_STREAM_WINDOW != 0 && done < eval->n_stream) continue;
        eval->stream[n_windows++] = (struct eval_stream_window){.from = done - rows_of_window, .to = done, .ppl = exp(nll / rows_of_window)};
        nll = 0;
        rows_of_window = 0;
    }
    eval->n_stream_windows = n_windows;
    return STATUS_OK;
}
