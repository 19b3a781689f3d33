/* One window of text after the other: the prompt is read once, every cell starts from its cache, and the tokens that really follow tell how far the cell's distribution is from
 * the full cache's. See eval.h. Main thread. */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "cli/eval.h"

/* Attention outputs are compared for these rows of the continuation, in one window of ATTENTION_EVERY: it is a mean over heads and rows, and each row costs a walk over the cache. */
#define ATTENTION_ROWS 2u
#define ATTENTION_STEP 32u
#define ATTENTION_EVERY 4u

struct window {
    struct eval *eval;
    uint32_t index;
    int32_t *tokens; /* [n_prompt + EVAL_GOLD + 1] */
    const int32_t *gold, *targets;
    struct eval_reference reference;
    float *logits; /* [EVAL_GOLD][n_vocab] */
    struct lab_row rows[EVAL_GOLD];
    float *o_full, *o; /* [ATTENTION_ROWS][n_layers * n_heads][head_dim], [n_layers * n_heads][head_dim] */
};

static uint64_t cell_work(const struct eval *eval) { return EVAL_GOLD + eval->n_prompt / 16; }
static uint64_t window_work(const struct eval *eval) {
    return (eval->exact ? 2 : 1) * (eval->n_prompt + cell_work(eval)) + (eval->n_cells - 1) * cell_work(eval);
}

static void open_window(struct window *window, struct eval *eval) {
    const struct program *program = model_program(eval->model);
    size_t outputs = (size_t)program->n_layers * program->n_heads * program->head_dim;
    *window = (struct window){.eval = eval};
    window->tokens = check_calloc(eval->n_prompt + EVAL_GOLD + 1u, sizeof *window->tokens);
    window->gold = window->tokens + eval->n_prompt;
    window->targets = window->gold + 1;
    eval_reference_init(&window->reference, EVAL_GOLD, program->n_vocab);
    window->logits = check_calloc((size_t)EVAL_GOLD * program->n_vocab, sizeof *window->logits);
    window->o_full = check_calloc(ATTENTION_ROWS * outputs, sizeof *window->o_full);
    window->o = check_calloc(outputs, sizeof *window->o);
}

static void close_window(struct window *window) {
    free(window->tokens);
    eval_reference_done(&window->reference);
    free(window->logits);
    free(window->o_full);
    free(window->o);
}

static int32_t attention_position(const struct window *window, uint32_t row) {
    return (int32_t)(window->eval->n_prompt + EVAL_GOLD - 1 - row * ATTENTION_STEP);
}

static bool compares_attention(const struct window *window) { return window->index % ATTENTION_EVERY == 0; }

static enum status read_gold(struct window *window, struct lab *lab, uint32_t sequence, uint32_t ring, float *logits, struct error *error) {
    const struct lab_part part = {
        .sequence = sequence, .n_tokens = EVAL_GOLD, .tokens = window->gold, .ring = ring, .rows = window->rows, .targets = window->targets};
    return lab_read(lab, 1, &part, logits, error);
}

/* What the cell's logits of the continuation say, against the reference. */
static void compare_rows(struct window *window, struct eval_cell *cell) {
    double *kl = cell->kl + (size_t)window->index * EVAL_GOLD;
    for (uint32_t row = 0; row < EVAL_GOLD; row++) {
        struct eval_row compared =
            eval_compare(&window->reference, row, window->logits + (size_t)row * window->reference.n_vocab, window->targets[row]);
        kl[row] = compared.kl;
        cell->nll += compared.nll;
        cell->same_top += compared.same_top;
    }
    cell->n_rows += EVAL_GOLD;
    cell->window_kl[window->index] = eval_mean(kl, EVAL_GOLD);
}

/* The reference, where it is not the full cache itself. */
static enum status read_exact(struct window *window, struct error *error) {
    struct eval *eval = window->eval;
    const struct lab_part prompt = {.sequence = LAB_BASE, .n_tokens = eval->n_prompt, .tokens = window->tokens};
    lab_release(eval->exact, 0);
    lab_clear(eval->exact, LAB_BASE);
    enum status status = lab_read(eval->exact, 1, &prompt, NULL, error);
    if (status == STATUS_OK) status = read_gold(window, eval->exact, LAB_BASE, LAB_NO_RING, window->reference.logits, error);
    if (status != STATUS_OK) return status;
    eval_reference_set(&window->reference, window->targets);
    for (uint32_t row = 0; row < EVAL_GOLD; row++) eval->exact_nll += window->reference.nll[row];
    return STATUS_OK;
}

/* The row of the full cache. Leaves the prompt's blocks taken, the rest given back, and the continuation's queries in their ring. */
static enum status read_full(struct window *window, struct error *error) {
    struct eval *eval = window->eval;
    struct eval_cell *cell = &eval->cells[0];
    const struct program *program = model_program(eval->model);
    size_t outputs = (size_t)program->n_layers * program->n_heads * program->head_dim;
    uint32_t mark = lab_mark(eval->lab);
    lab_fork(eval->lab, LAB_BASE, LAB_FULL);
    enum status status = read_gold(window, eval->lab, LAB_FULL, LAB_RING_GOLD, eval->exact ? window->logits : window->reference.logits, error);
    if (status == STATUS_OK && eval->exact) status = read_exact(window, error);
    if (status != STATUS_OK) return status;
    if (eval->exact) {
        compare_rows(window, cell);
    } else {
        eval_reference_set(&window->reference, window->targets);
        for (uint32_t row = 0; row < EVAL_GOLD; row++) cell->nll += window->reference.nll[row];
        cell->n_rows += EVAL_GOLD;
        cell->same_top += EVAL_GOLD;
    }
    cell->n_windows++;
    cell->blocks += lab_blocks(eval->lab, LAB_BASE);
    for (uint32_t l = 0; l < program_lanes(program); l++) cell->kept[l] += lab_lane_tokens(eval->lab, LAB_BASE)[l]; /* every hit with it */
    for (uint32_t row = 0; compares_attention(window) && row < ATTENTION_ROWS; row++, cell->n_attention++)
        lab_attention(eval->lab, LAB_FULL, LAB_RING_GOLD, attention_position(window, row), window->o_full + row * outputs);
    lab_release(eval->lab, mark);
    return STATUS_OK;
}

/* |o_full - o| / |o_full| per query head, for the same queries. */
static void compare_attention(struct window *window, struct eval_cell *cell) {
    const struct program *program = model_program(window->eval->model);
    uint32_t heads = program->n_layers * program->n_heads, d = program->head_dim;
    for (uint32_t row = 0; row < ATTENTION_ROWS; row++, cell->n_attention++) {
        lab_attention(window->eval->lab, LAB_CELL, LAB_RING_GOLD, attention_position(window, row), window->o);
        for (uint32_t h = 0; h < heads; h++) {
            const float *full = window->o_full + ((size_t)row * heads + h) * d, *o = window->o + (size_t)h * d;
            double difference = 0, size = 0;
            for (uint32_t i = 0; i < d; i++) {
                difference += ((double)full[i] - (double)o[i]) * ((double)full[i] - (double)o[i]);
                size += (double)full[i] * (double)full[i];
            }
            cell->attention_error[h] += size > 0 ? sqrt(difference / size) : 0;
        }
    }
}

static enum status measure_cell(struct window *window, struct eval_cell *cell, struct error *error) {
    struct eval *eval = window->eval;
    struct kv_plan plan = eval_plan(eval, cell, eval->n_prompt, window->index);
    struct compressor_result result;
    uint32_t mark = lab_mark(eval->lab);
    lab_compress(eval->lab, LAB_BASE, LAB_CELL, &plan, window->tokens, true, &result);
    cell->n_windows++;
    cell->blocks += lab_blocks(eval->lab, LAB_CELL);
    for (uint32_t l = 0; l < program_lanes(model_program(eval->model)); l++) {
        cell->kept[l] += result.lanes[l].n_keep;
        cell->hits[l].kept += result.hits[l].kept;
        cell->hits[l].all += result.hits[l].all;
    }
    enum status status = read_gold(window, eval->lab, LAB_CELL, LAB_NO_RING, window->logits, error);
    if (status != STATUS_OK) return status;
    compare_rows(window, cell);
    if (compares_attention(window)) compare_attention(window, cell);
    lab_release(eval->lab, mark);
    eval_step_done(eval, cell_work(eval));
    return STATUS_OK;
}

static enum status measure_window(struct window *window, struct error *error) {
    struct eval *eval = window->eval;
    size_t span = eval->n_prompt + EVAL_GOLD + 1;
    eval_text_take(&eval->text, eval_window_start(window->index, eval->config->eval.windows, span, eval->text.list.count), span, window->tokens,
                   true);
    lab_release(eval->lab, 0);
    lab_clear(eval->lab, LAB_BASE);
    const struct lab_part prompt = {.sequence = LAB_BASE,
                                    .n_tokens = eval->n_prompt,
                                    .tokens = window->tokens,
                                    .ring = LAB_RING_PROMPT,
                                    .accumulate = lab_accumulates(eval->lab)};
    enum status status = lab_read(eval->lab, 1, &prompt, NULL, error);
    if (status == STATUS_OK) status = read_full(window, error);
    eval_step_done(eval, (eval->exact ? 2 : 1) * (eval->n_prompt + cell_work(eval)));
    for (uint32_t c = 1; c < eval->n_cells && status == STATUS_OK; c++) status = measure_cell(window, &eval->cells[c], error);
    return status;
}

enum status eval_windows(struct eval *eval, struct error *error) {
    uint32_t windows = eval->config->eval.windows;
    eval->work_all = windows * (window_work(eval) + eval_tasks_work(eval)) + eval_stream_work(eval);
    if (windows == 0) return STATUS_OK;
    struct window window;
    open_window(&window, eval);
    enum status status = STATUS_OK;
    for (uint32_t i = 0; i < windows && status == STATUS_OK; i++) {
        window.index = i;
        status = measure_window(&window, error);
        if (status == STATUS_OK) status = eval_tasks(eval, i, error);
    }
    close_window(&window);
    return status;
}
