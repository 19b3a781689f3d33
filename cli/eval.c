/* kvasir eval: quality and memory of compression policies on the user's own model and text. What is measured, and how, stands in eval.h; here are the options, the list of
 * cells, and the order of things. Main thread. */
#include "cli/eval.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "cli/cli.h"
#include "kernels/kivi.h"

#define PROMPT_AUTO 1024u
#define SPAN_EXTRA 64u /* slots for a question and an answer */

/* ---- options ---- */

static enum status read_keep(const char *text, double *keep, uint32_t *n, struct error *error) {
    *n = 0;
    for (const char *at = text; *at;) {
        char *end;
        double value = strtod(at, &end);
        bool number = end != at && (*at == '.' || (*at >= '0' && *at <= '9'));
        if (!number || !(value > 0 && value <= 1) || (*end != ',' && *end != '\0') || (*end == ',' && end[1] == '\0'))
            return error_set(error, STATUS_INVALID, "--keep: \"%.60s\": numbers above 0 and at most 1 with commas between belong here", text);
        if (*n == EVAL_KEEP_MAX) return error_set(error, STATUS_INVALID, "--keep: more than %d numbers", EVAL_KEEP_MAX);
        keep[(*n)++] = value;
        at = *end ? end + 1 : end;
    }
    return *n ? STATUS_OK : error_set(error, STATUS_INVALID, "--keep: no number given");
}

static void add_cells(struct eval *eval, const struct policy *policy) {
    for (uint32_t k = 0; k < eval->n_keep; k++) eval->cells[eval->n_cells++] = (struct eval_cell){.policy = policy, .keep = eval->keep[k]};
}

/* One row for the full cache, then a row for each policy and share. */
static enum status make_cells(struct eval *eval, struct error *error) {
    bool asked[64] = {false};
    CHECK(policy_count() <= sizeof asked / sizeof *asked && 1 + policy_count() * EVAL_KEEP_MAX <= EVAL_CELLS_MAX);
    eval->cells[0] = (struct eval_cell){.policy = policies[0], .keep = 1};
    eval->n_cells = 1;
    const char *list = eval->config->eval.policies;
    for (uint32_t i = 1; !list[0] && i < policy_count(); i++) add_cells(eval, policies[i]);
    for (const char *at = list; *at;) {
        at += strspn(at, ", ");
        size_t word = strcspn(at, ", ");
        char name[64];
        (void)snprintf(name, sizeof name, "%.*s", (int)word, at);
        const struct policy *policy = word ? policy_find(name) : policies[0];
        if (!policy || word >= sizeof name) return error_set(error, STATUS_INVALID, "--policies: \"%s\" is none of %s", name, policy_names());
        if (policy->scorer != SCORER_NONE && !asked[policy_index(policy)]) add_cells(eval, policy);
        asked[policy_index(policy)] = true;
        at += word;
    }
    return STATUS_OK;
}

static enum status choose_prompt(struct eval *eval, struct error *error) {
    int64_t context = model_program(eval->model)->context_train, most = context - EVAL_GOLD;
    uint32_t asked = eval->config->eval.prompt;
    eval->n_prompt = asked ? asked : most < PROMPT_AUTO ? (uint32_t)(most < 0 ? 0 : most) : PROMPT_AUTO;
    if (eval->n_prompt < EVAL_PROMPT_MIN)
        return error_set(error, STATUS_INVALID, "--prompt: %" PRIu32 " tokens; %u are the least to measure anything on", eval->n_prompt,
                         EVAL_PROMPT_MIN);
    if (eval->n_prompt > most)
        return error_set(error, STATUS_INVALID,
                         "--prompt: %" PRIu32 " tokens and the %u that follow are more than the context the model was trained for, %" PRId64,
                         eval->n_prompt, EVAL_GOLD, context);
    return STATUS_OK;
}

static enum status open_model(struct eval *eval, struct error *error) {
    const struct config *config = eval->config;
    if (!config->eval.dummy[0]) return cli_open_model(config, &eval->model, error);
    return cli_open_dummy(config, config->eval.dummy, &eval->model, error);
}

/* ---- what the text must hold, and the memory ---- */

static enum status open_text(struct eval *eval, struct error *error) {
    const struct config *config = eval->config;
    size_t span = eval->n_prompt + EVAL_GOLD + 1, wanted = config->eval.windows ? span : 0;
    if (!config->eval.text[0]) { /* made up: as much as is read */
        wanted = span * config->eval.windows;
        size_t streams = (size_t)config->eval.stream * config->eval.streams;
        if (streams >= wanted) wanted = streams + 1;
    } else if (config->eval.stream && wanted < 2) {
        wanted = 2;
    }
    enum status status = eval_text_open(config->eval.text, model_tokenizer(eval->model), wanted, &eval->text, error);
    if (status != STATUS_OK) return status;
    size_t total = eval->text.list.count;
    if (config->eval.windows) eval->overlap = eval_windows_overlap(config->eval.windows, span, total);
    eval->n_stream = config->eval.stream;
    if (eval->n_stream >= total) eval->n_stream = (uint32_t)(total - 1);
    eval->n_streams = eval->n_stream == total - 1 ? 1 : config->eval.streams; /* all of the text is one stream */
    return STATUS_OK;
}

static enum status open_lab(struct eval *eval, struct error *error) {
    struct lab_size size = {.max_tokens = eval->n_prompt + EVAL_GOLD + SPAN_EXTRA};
    uint32_t stream_tokens = EVAL_STREAM_BUDGET + 4 * BLOCK_TOKENS + eval->config->sink_tokens + eval->config->recent_tokens;
    if (eval->n_stream && size.max_tokens < stream_tokens) size.max_tokens = stream_tokens;
    for (uint32_t c = 0; c < eval->n_cells; c++) size.accumulate |= eval->cells[c].policy->rows == POLICY_ROWS_ALL;
    eval->classes = eval_token_classes(model_tokenizer(eval->model), model_program(eval->model)->n_vocab);
    struct progress progress;
    progress_begin(&progress, "loading");
    enum status status = lab_open(eval->config, eval->model, &size, eval->classes, progress_report, &progress, &eval->lab, error);
    if (status == STATUS_OK && kivi_bits(lab_kv_dtype(eval->lab))) {
        struct config exact = *eval->config;
        (void)snprintf(exact.kv_dtype, sizeof exact.kv_dtype, "f16");
        size.accumulate = false;
        status = lab_open(&exact, eval->model, &size, eval->classes, progress_report, &progress, &eval->exact, error);
    }
    progress_end(&progress);
    return status;
}

static void allocate(struct eval *eval) {
    const struct program *program = model_program(eval->model);
    size_t windows = eval->config->eval.windows + 1u;
    for (uint32_t c = 0; c < eval->n_cells; c++) {
        struct eval_cell *cell = &eval->cells[c];
        cell->kl = check_calloc(windows * EVAL_GOLD, sizeof *cell->kl);
        cell->window_kl = check_calloc(windows, sizeof *cell->window_kl);
        cell->kept = check_calloc(program_lanes(program), sizeof *cell->kept);
        cell->hits = check_calloc(program_lanes(program), sizeof *cell->hits);
        cell->attention_error = check_calloc((size_t)program->n_layers * program->n_heads, sizeof *cell->attention_error);
    }
    eval->stream = check_calloc(eval->n_stream / EVAL_STREAM_WINDOW + 1u, sizeof *eval->stream);
}

static void done(struct eval *eval) {
    lab_close(eval->exact);
    lab_close(eval->lab);
    eval_text_done(&eval->text);
    model_close(eval->model);
    free(eval->classes);
    free(eval->stream);
    for (uint32_t c = 0; c < eval->n_cells; c++) {
        free(eval->cells[c].kl);
        free(eval->cells[c].window_kl);
        free(eval->cells[c].kept);
        free(eval->cells[c].hits);
        free(eval->cells[c].attention_error);
    }
    free(eval);
}

/* ---- shared by the measurements ---- */

/* Blocks a lane, on average. */
static uint32_t budget_blocks(double keep, uint32_t n_tokens) {
    uint32_t all = (n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    double blocks = nearbyint(keep * n_tokens / BLOCK_TOKENS);
    return keep >= 1 || blocks >= all ? all : blocks < 1 ? 1 : (uint32_t)blocks;
}

struct kv_plan eval_plan(const struct eval *eval, const struct eval_cell *cell, uint32_t n_tokens, uint64_t seed) {
    struct config config = *eval->config;
    config.allowed_policies[0] = '\0'; /* limits of a server's requests */
    config.may_disable = true;
    config.min_budget = 0;
    config.seed = random_at(eval->config->seed, 3, seed, 0);
    struct kv_wish wish = {.keep_ratio = 1};
    (void)snprintf(wish.policy, sizeof wish.policy, "%s", cell->policy->name);
    struct kv_plan plan;
    const char *field;
    CHECK(compression_plan(&config, &wish, &plan, &field, NULL));
    plan.target = (struct policy_target){.budget_tokens = budget_blocks(cell->keep, n_tokens) * BLOCK_TOKENS};
    return plan;
}

void eval_step_done(struct eval *eval, uint64_t work) {
    eval->work_done += work;
    progress_report(eval->progress, (double)eval->work_done / (double)(eval->work_all ? eval->work_all : 1));
}

static bool depth_counts(const struct eval *eval, enum eval_kind kind, uint32_t depth) {
    const struct eval_score *full = &eval->cells[0].scores[kind];
    return full->asked[depth] > 0 && full->right[depth] >= EVAL_COUNTS * full->asked[depth];
}

uint32_t eval_depths_counted(const struct eval *eval, enum eval_kind kind) {
    uint32_t n = 0;
    for (uint32_t d = 0; d < EVAL_DEPTHS; d++) n += depth_counts(eval, kind, d);
    return n;
}

bool eval_accuracy(const struct eval *eval, const struct eval_cell *cell, enum eval_kind kind, double *accuracy, uint32_t *n) {
    uint32_t right = 0;
    *n = 0;
    for (uint32_t d = 0; d < EVAL_DEPTHS; d++)
        if (depth_counts(eval, kind, d)) right += cell->scores[kind].right[d], *n += cell->scores[kind].asked[d];
    *accuracy = *n ? (double)right / *n : 0;
    return *n > 0;
}

double eval_hit_rate(const struct head_hits *hits) { return hits->all > 0 ? hits->kept / hits->all : 1; }

struct eval_interval eval_difference(const struct eval *eval, const struct eval_cell *a, const struct eval_cell *b) {
    return eval_bootstrap(a->window_kl, b->window_kl, eval->config->eval.windows, EVAL_RESAMPLES, 1);
}

/* ---- the command ---- */

static enum status measure(struct eval *eval, struct error *error) {
    struct progress progress;
    progress_begin(&progress, "measuring");
    eval->progress = &progress;
    enum status status = eval_windows(eval, error);
    if (status == STATUS_OK && eval->n_stream) status = eval_stream(eval, error);
    progress_end(&progress);
    return status;
}

/* Better said before minutes of measuring than after. */
static enum status check_svg(const struct config *config, struct error *error) {
    const char *path = config->eval.svg;
    if (!config->eval.windows) return error_set(error, STATUS_INVALID, "--svg: 0 windows leave nothing to draw");
    FILE *file = fopen(path, "ab");
    if (!file) return error_set(error, STATUS_IO, "--svg: %.300s: %s", path, strerror(errno));
    (void)fclose(file);
    return STATUS_OK;
}

static enum status prepare(struct eval *eval, struct error *error) {
    const struct config *config = eval->config;
    enum status status = config_check(config, error);
    if (status == STATUS_OK) status = read_keep(config->eval.keep, eval->keep, &eval->n_keep, error);
    if (status == STATUS_OK) status = make_cells(eval, error);
    if (status == STATUS_OK && !config->eval.windows && !config->eval.stream)
        status = error_set(error, STATUS_INVALID, "--windows: 0 without --stream leaves nothing to measure");
    if (status == STATUS_OK && config->eval.streams > 1 && !config->eval.stream)
        status = error_set(error, STATUS_INVALID, "--streams: %" PRIu32 " without --stream, which says how long they are", config->eval.streams);
    if (status == STATUS_OK && config->eval.svg[0]) status = check_svg(config, error);
    if (status == STATUS_OK) status = open_model(eval, error);
    if (status == STATUS_OK) status = choose_prompt(eval, error);
    if (status == STATUS_OK) status = open_text(eval, error);
    if (status == STATUS_OK) cli_warn_backend(config);
    if (status == STATUS_OK) status = open_lab(eval, error);
    if (status == STATUS_OK) allocate(eval);
    return status;
}

int command_eval(const struct config *config, const char *argument) {
    (void)argument;
    struct eval *eval = check_calloc(1, sizeof *eval);
    struct error error;
    eval->config = config;
    enum status status = prepare(eval, &error);
    if (status == STATUS_OK) status = measure(eval, &error);
    if (status == STATUS_OK && config->eval.svg[0]) status = eval_write_svg(eval, config->eval.svg, &error);
    if (status == STATUS_OK) config->eval.json ? eval_print_json(eval, stdout) : eval_print_table(eval, stdout);
    done(eval);
    return status == STATUS_OK ? CLI_OK : cli_fail(&error);
}
