/* An endless stream: text read under streaming_llm at a fixed budget, whole blocks dropped at fixed points, the sinks moved along. Positions grow past what the model was trained
 * for; distances do not. See eval.h. Main thread.
 *
 * Some pages are harder than others. So each window is read a second time, by a stream that began only one budget before it: what the two differ by is what the length of the
 * stream has done. */
#include <math.h>

#include "base/check.h"
#include "cli/eval.h"

#define CHUNK BLOCK_TOKENS /* tokens between two drops, and of one step */
_Static_assert(EVAL_STREAM_WINDOW % CHUNK == 0 && EVAL_STREAM_BUDGET % CHUNK == 0, "windows begin at a drop");

struct stream {
    struct eval *eval;
    struct kv_plan plan;
    uint32_t first;   /* token of the text */
    uint32_t done;    /* tokens of the text, as if all before were read */
    uint32_t shifted; /* tokens dropped */
};

static struct stream begin_at(struct eval *eval, uint32_t token) {
    const struct eval_cell cell = {.policy = policy_find("streaming_llm"), .keep = 1};
    CHECK(cell.policy);
    lab_release(eval->lab, 0);
    lab_clear(eval->lab, LAB_BASE);
    struct stream stream = {.eval = eval, .plan = eval_plan(eval, &cell, EVAL_STREAM_BUDGET, 0), .first = token, .done = token};
    CHECK(stream.plan.target.budget_tokens == EVAL_STREAM_BUDGET);
    return stream;
}

/* Reads up to token `to`; *nll: of the tokens that follow those read. */
static enum status read_to(struct stream *stream, uint32_t to, double *nll, struct error *error) {
    struct eval *eval = stream->eval;
    const int32_t *tokens = eval->text.list.tokens;
    *nll = 0;
    while (stream->done < to) {
        uint32_t left = to - stream->done, n = left < CHUNK ? left : CHUNK;
        struct lab_row rows[CHUNK];
        int32_t chunk[CHUNK];
        eval_text_take(&eval->text, stream->done, n, chunk, stream->done == stream->first);
        const struct lab_part part = {.sequence = LAB_BASE, .n_tokens = n, .tokens = chunk, .rows = rows, .targets = tokens + stream->done + 1};
        enum status status = lab_read(eval->lab, 1, &part, NULL, error);
        if (status != STATUS_OK) return status;
        for (uint32_t i = 0; i < n; i++) *nll -= (double)rows[i].logprob;
        stream->done += n;
        lab_stream_drop(eval->lab, LAB_BASE, &stream->plan, &stream->shifted);
        eval_step_done(eval, n);
    }
    return STATUS_OK;
}

uint64_t eval_stream_work(const struct eval *eval) {
    return 2ull * eval->n_stream + (uint64_t)(eval->n_stream / EVAL_STREAM_WINDOW) * EVAL_STREAM_BUDGET;
}

enum status eval_stream(struct eval *eval, struct error *error) {
    struct stream stream = begin_at(eval, 0);
    double nll;
    for (uint32_t from = 0; from < eval->n_stream; from += EVAL_STREAM_WINDOW) {
        uint32_t left = eval->n_stream - from, n = left < EVAL_STREAM_WINDOW ? left : EVAL_STREAM_WINDOW;
        enum status status = read_to(&stream, from + n, &nll, error);
        if (status != STATUS_OK) return status;
        eval->stream[eval->n_stream_windows++] = (struct eval_stream_window){.from = from, .to = from + n, .ppl = exp(nll / n)};
    }
    for (uint32_t i = 0; i < eval->n_stream_windows; i++) {
        struct eval_stream_window *window = &eval->stream[i];
        stream = begin_at(eval, window->from > EVAL_STREAM_BUDGET ? window->from - EVAL_STREAM_BUDGET : 0);
        enum status status = read_to(&stream, window->from, &nll, error);
        if (status == STATUS_OK) status = read_to(&stream, window->to, &nll, error);
        if (status != STATUS_OK) return status;
        window->ppl_anew = exp(nll / (window->to - window->from));
    }
    return STATUS_OK;
}
