/* An endless stream: text read under streaming_llm at a fixed budget, whole blocks dropped at fixed points, the sinks moved along. Positions grow past what the model was trained
 * for; distances do not. See eval.h. Main thread.
 *
 * Some pages are harder than others. So each window is read a second time, by a stream that began only one budget before it: what the two differ by is what the length of the
 * stream has done. And there may be several streams, whose windows lie on different pages. */
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
    return eval->n_streams * (2ull * eval->n_stream + (uint64_t)(eval->n_stream / EVAL_STREAM_WINDOW) * EVAL_STREAM_BUDGET);
}

static uint64_t tokens_of(const struct eval *eval, const struct eval_stream_window *window) {
    return (uint64_t)eval->n_streams * (window->to - window->from);
}

double eval_stream_ppl(const struct eval *eval, const struct eval_stream_window *window) {
    return exp(window->nll / (double)tokens_of(eval, window));
}

double eval_stream_ppl_anew(const struct eval *eval, const struct eval_stream_window *window) {
    return exp(window->nll_anew / (double)tokens_of(eval, window));
}

double eval_stream_against_first(const struct eval *eval, const struct eval_stream_window *window) {
    double nll = 0;
    uint64_t n = 0;
    for (uint32_t i = 0; i < 2 && i < eval->n_stream_windows; i++) {
        nll += eval->stream[i].nll;
        n += tokens_of(eval, &eval->stream[i]);
    }
    return eval_stream_ppl(eval, window) / exp(nll / (double)n);
}

/* One stream from token `start` of the text on, whole, and then each of its windows by a stream of its own. */
static enum status read_stream(struct eval *eval, uint32_t start, struct error *error) {
    struct stream stream = begin_at(eval, start);
    double nll;
    for (uint32_t i = 0; i < eval->n_stream_windows; i++) {
        struct eval_stream_window *window = &eval->stream[i];
        enum status status = read_to(&stream, start + window->to, &nll, error);
        if (status != STATUS_OK) return status;
        double ppl = exp(nll / (window->to - window->from));
        window->nll += nll;
        window->least = fmin(window->least, ppl);
        window->most = fmax(window->most, ppl);
    }
    for (uint32_t i = 0; i < eval->n_stream_windows; i++) {
        struct eval_stream_window *window = &eval->stream[i];
        stream = begin_at(eval, start + (window->from > EVAL_STREAM_BUDGET ? window->from - EVAL_STREAM_BUDGET : 0));
        enum status status = read_to(&stream, start + window->from, &nll, error);
        if (status == STATUS_OK) status = read_to(&stream, start + window->to, &nll, error);
        if (status != STATUS_OK) return status;
        window->nll_anew += nll;
    }
    return STATUS_OK;
}

enum status eval_stream(struct eval *eval, struct error *error) {
    for (uint32_t from = 0; from < eval->n_stream; from += EVAL_STREAM_WINDOW) {
        uint32_t left = eval->n_stream - from, n = left < EVAL_STREAM_WINDOW ? left : EVAL_STREAM_WINDOW;
        eval->stream[eval->n_stream_windows++] = (struct eval_stream_window){.from = from, .to = from + n, .least = INFINITY};
    }
    enum status status = STATUS_OK;
    for (uint32_t i = 0; i < eval->n_streams && status == STATUS_OK; i++)
        status = read_stream(eval, (uint32_t)eval_window_start(i, eval->n_streams, eval->n_stream + 1u, eval->text.list.count), error);
    return status;
}
