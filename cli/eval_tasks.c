/* Did one fact survive? Passkey and copy, from the same read prompt for every cell. See eval.h. Main thread. */
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "cli/eval.h"

static const double depths[EVAL_DEPTHS] = {0.1, 0.3, 0.5, 0.7, 0.9};

static uint64_t task_work(const struct eval *eval) { return eval->n_prompt + eval->n_cells * (2 * 64 + EVAL_COPY_ASKED + 3 * eval->n_prompt / 16); }

uint64_t eval_tasks_work(const struct eval *eval) { return (uint64_t)eval->config->eval.tasks * (task_work(eval) + eval->n_prompt); }

static enum status read_base(struct eval *eval, const struct token_list *list, struct error *error) {
    const struct lab_part part = {.sequence = LAB_BASE,
                                  .n_tokens = (uint32_t)list->count,
                                  .tokens = list->tokens,
                                  .ring = LAB_RING_PROMPT,
                                  .accumulate = lab_accumulates(eval->lab)};
    return lab_read(eval->lab, 1, &part, NULL, error);
}

/* LAB_CELL becomes the cell's cache of LAB_BASE, which has read n_tokens. */
static void compress(struct eval *eval, const struct eval_cell *cell, const int32_t *tokens, uint32_t n_tokens, uint64_t seed) {
    if (cell->policy->scorer == SCORER_NONE) {
        lab_fork(eval->lab, LAB_BASE, LAB_CELL);
        return;
    }
    struct kv_plan plan = eval_plan(eval, cell, n_tokens, seed);
    struct compressor_result result;
    lab_compress(eval->lab, LAB_BASE, LAB_CELL, &plan, tokens, false, &result);
}

/* Is the right candidate the most likely one, after LAB_CELL? */
static enum status rank(struct eval *eval, const struct eval_task *task, bool *right, struct error *error) {
    struct lab_row rows[EVAL_CANDIDATES][EVAL_ANSWER_MAX];
    struct lab_part parts[EVAL_CANDIDATES];
    for (uint32_t c = 0; c < EVAL_CANDIDATES; c++) {
        lab_fork(eval->lab, LAB_CELL, LAB_CANDIDATE + c);
        parts[c] = (struct lab_part){.sequence = LAB_CANDIDATE + c,
                                     .n_tokens = (uint32_t)task->answers[c].count - 1,
                                     .tokens = task->answers[c].tokens,
                                     .rows = rows[c],
                                     .targets = task->answers[c].tokens + 1};
    }
    enum status status = lab_read(eval->lab, EVAL_CANDIDATES, parts, NULL, error);
    if (status != STATUS_OK) return status;
    double best = 0;
    uint32_t likeliest = 0;
    for (uint32_t c = 0; c < EVAL_CANDIDATES; c++) {
        double sum = 0;
        for (uint32_t i = 0; i < parts[c].n_tokens; i++) sum += (double)rows[c][i].logprob;
        if (c == 0 || sum > best) best = sum, likeliest = c;
    }
    *right = likeliest == task->right;
    return STATUS_OK;
}

/* Every cell from the state in which LAB_BASE is; `question` is read after the compression (NULL: it was before). */
static enum status ask_passkey(struct eval *eval, const struct eval_task *task, const int32_t *tokens, uint32_t n_tokens,
                               const struct token_list *question, enum eval_kind kind, uint32_t depth, uint64_t seed, struct error *error) {
    enum status status = STATUS_OK;
    for (uint32_t c = 0; c < eval->n_cells && status == STATUS_OK; c++) {
        struct eval_score *score = &eval->cells[c].scores[kind];
        uint32_t mark = lab_mark(eval->lab);
        compress(eval, &eval->cells[c], tokens, n_tokens, seed);
        if (question) {
            const struct lab_part part = {.sequence = LAB_CELL, .n_tokens = (uint32_t)question->count, .tokens = question->tokens};
            status = lab_read(eval->lab, 1, &part, NULL, error);
        }
        bool right = false;
        if (status == STATUS_OK) status = rank(eval, task, &right, error);
        score->right[depth] += right;
        score->asked[depth]++;
        lab_release(eval->lab, mark);
        eval_step_done(eval, 64 + eval->n_prompt / 16);
    }
    return status;
}

static enum status passkey(struct eval *eval, uint64_t seed, uint32_t depth, struct error *error) {
    struct eval_task task;
    enum status status = eval_passkey(model_tokenizer(eval->model), eval->n_prompt, depths[depth], seed, &task, error);
    uint32_t n_context = (uint32_t)task.context.count;
    int32_t *tokens = check_calloc(eval->n_prompt, sizeof *tokens);
    if (status == STATUS_OK) {
        memcpy(tokens, task.context.tokens, n_context * sizeof *tokens);
        memcpy(tokens + n_context, task.question.tokens, task.question.count * sizeof *tokens);
        lab_release(eval->lab, 0);
        lab_clear(eval->lab, LAB_BASE);
        status = read_base(eval, &task.context, error);
    }
    eval_step_done(eval, eval->n_prompt);
    if (status == STATUS_OK) status = ask_passkey(eval, &task, tokens, n_context, &task.question, EVAL_PASSKEY_AFTER, depth, seed, error);
    if (status == STATUS_OK) status = read_base(eval, &task.question, error);
    if (status == STATUS_OK) status = ask_passkey(eval, &task, tokens, eval->n_prompt, NULL, EVAL_PASSKEY, depth, seed, error);
    free(tokens);
    eval_task_done(&task);
    return status;
}

static enum status copy(struct eval *eval, uint64_t seed, uint32_t depth, struct error *error) {
    struct eval_task task;
    uint32_t n_vocab = model_program(eval->model)->n_vocab;
    enum status status = eval_copy(model_tokenizer(eval->model), n_vocab, eval->n_prompt, depths[depth], seed, &task, error);
    if (status == STATUS_OK) {
        lab_release(eval->lab, 0);
        lab_clear(eval->lab, LAB_BASE);
        status = read_base(eval, &task.context, error);
    }
    eval_step_done(eval, eval->n_prompt);
    for (uint32_t c = 0; c < eval->n_cells && status == STATUS_OK; c++) {
        struct eval_score *score = &eval->cells[c].scores[EVAL_COPY];
        struct lab_row rows[EVAL_COPY_ASKED];
        const struct lab_part part = {.sequence = LAB_CELL, .n_tokens = EVAL_COPY_ASKED, .tokens = task.answers[0].tokens, .rows = rows};
        uint32_t mark = lab_mark(eval->lab);
        compress(eval, &eval->cells[c], task.context.tokens, eval->n_prompt, seed);
        status = lab_read(eval->lab, 1, &part, NULL, error);
        for (uint32_t i = 0; i < EVAL_COPY_ASKED && status == STATUS_OK; i++) score->right[depth] += rows[i].token == task.answers[0].tokens[i + 1];
        score->asked[depth] += EVAL_COPY_ASKED;
        lab_release(eval->lab, mark);
        eval_step_done(eval, EVAL_COPY_ASKED + eval->n_prompt / 16);
    }
    eval_task_done(&task);
    return status;
}

enum status eval_tasks(struct eval *eval, uint32_t window, struct error *error) {
    enum status status = STATUS_OK;
    for (uint32_t i = 0; i < eval->config->eval.tasks && status == STATUS_OK; i++) {
        uint64_t index = (uint64_t)window * eval->config->eval.tasks + i;
        uint32_t depth = (uint32_t)(index % EVAL_DEPTHS);
        status = passkey(eval, index, depth, error);
        if (status == STATUS_OK) status = copy(eval, index, depth, error);
    }
    return status;
}
