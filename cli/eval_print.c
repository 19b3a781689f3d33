/* What eval measured, as a table or as one JSON object. Reads only; main thread. */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/json_writer.h"
#include "cli/eval.h"
#include "cli/version.h"

/* What a row says, from sums. */
struct row {
    double blocks, kl_mean, kl_p99, same_top1, ppl_ratio, hit_rate, hit_rate_min, attention_error;
    double tasks[EVAL_KINDS];
    bool has_tasks[EVAL_KINDS];
};

static struct row row_of(const struct eval *eval, const struct eval_cell *cell) {
    const struct eval_cell *full = &eval->cells[0];
    const struct program *program = model_program(eval->model);
    double rows = (double)cell->n_rows;
    struct row row = {.blocks = cell->blocks / cell->n_windows,
                      .kl_mean = eval_mean(cell->window_kl, cell->n_windows),
                      .same_top1 = (double)cell->same_top / rows,
                      .ppl_ratio = exp(cell->nll / rows - (eval->exact ? eval->exact_nll : full->nll) / (double)full->n_rows),
                      .hit_rate_min = 1};
    struct head_hits all = {0};
    for (uint32_t l = 0; l < program_lanes(program); l++) {
        all.kept += cell->hits[l].kept;
        all.all += cell->hits[l].all;
        row.hit_rate_min = fmin(row.hit_rate_min, eval_hit_rate(&cell->hits[l]));
    }
    row.hit_rate = eval_hit_rate(&all);
    double *sorted = check_calloc(cell->n_rows, sizeof *sorted);
    memcpy(sorted, cell->kl, cell->n_rows * sizeof *sorted);
    row.kl_p99 = eval_quantile(sorted, cell->n_rows, 0.99);
    free(sorted);
    size_t heads = (size_t)program->n_layers * program->n_heads;
    if (cell->n_attention) row.attention_error = eval_mean(cell->attention_error, heads) / cell->n_attention;
    for (int kind = 0; kind < EVAL_KINDS; kind++) {
        uint32_t n;
        row.has_tasks[kind] = eval_accuracy(eval, cell, (enum eval_kind)kind, &row.tasks[kind], &n);
    }
    return row;
}

/* Calls `visit` for kv_compress against each other policy at each share, if it is among the cells. */
static void each_difference(const struct eval *eval, void (*visit)(void *, const struct eval *, const struct eval_cell *, const struct eval_cell *),
                            void *context) {
    for (uint32_t a = 1; a < eval->n_cells && eval->config->eval.windows > 0; a++) {
        if (strcmp(eval->cells[a].policy->name, "kv_compress") != 0) continue;
        for (uint32_t b = 1; b < eval->n_cells; b++)
            if (eval->cells[b].policy != eval->cells[a].policy && eval->cells[b].keep == eval->cells[a].keep)
                visit(context, eval, &eval->cells[a], &eval->cells[b]);
    }
}

static const char *const kind_names[EVAL_KINDS] = {"passkey", "passkey_after", "copy"};

/* ---- the table ---- */

static void print_percent(FILE *out, bool known, double share) {
    if (known)
        fprintf(out, " %6.1f %% |", 100 * share);
    else
        fprintf(out, "        - |");
}

static void print_row(FILE *out, const struct eval *eval, const struct eval_cell *cell) {
    struct row row = row_of(eval, cell);
    fprintf(out, "| %-18s | %6g | %8.1f | %8.5f | %8.4f | %6.2f %% | %9.4f |", cell->policy->name, cell->keep, row.blocks, row.kl_mean, row.kl_p99,
            100 * row.same_top1, row.ppl_ratio);
    for (int kind = 0; kind < EVAL_KINDS; kind++) print_percent(out, row.has_tasks[kind], row.tasks[kind]);
    fprintf(out, " %6.1f %% | %6.1f %% | %8.4f |\n", 100 * row.hit_rate, 100 * row.hit_rate_min, row.attention_error);
}

static void print_difference(void *context, const struct eval *eval, const struct eval_cell *a, const struct eval_cell *b) {
    struct eval_interval interval = eval_difference(eval, a, b);
    uint32_t n_windows = eval->config->eval.windows; /* one has no spread */
    fprintf(context, "| %-18s | %6g | %+9.5f | %+9.5f to %+9.5f | %-15s |\n", b->policy->name, a->keep, interval.mean, interval.low, interval.high,
            n_windows < 2       ? "one window"
            : interval.high < 0 ? "kv_compress"
            : interval.low > 0  ? b->policy->name
                                : "not told apart");
}

static void print_rows(const struct eval *eval, FILE *out) {
    const struct eval_cell *full = &eval->cells[0];
    fprintf(out, "| policy             |   keep |   blocks |  KL mean |   KL p99 | same top | PPL ratio |  passkey |    after |     copy | hit rate "
                 "| low head | attn err |\n"
                 "| ------------------ | -----: | -------: | -------: | -------: | -------: | --------: | -------: | -------: | -------: | -------: "
                 "| -------: | -------: |\n");
    for (uint32_t c = 0; c < eval->n_cells; c++) print_row(out, eval, &eval->cells[c]);
    fprintf(out,
            "\nKL (nats) of the full cache's next-token distribution from the compressed cache's, over the %u tokens after each prompt; same top: "
            "the same most likely "
            "token;\nPPL ratio: of the text's own tokens; blocks: of %" PRIu32
            " tokens of one head, mean over windows; hit rate: attention pairs of the last prompt "
            "rows that were kept; low head: the same of the KV head where it is lowest;\nattn err: relative error of a head's output for the same "
            "query, mean over heads.\n",
            EVAL_GOLD, (uint32_t)BLOCK_TOKENS);
    if (eval->exact) fprintf(out, "KL, same top and PPL ratio: against a full cache in f16, on every row.\n");
    if (eval->config->eval.tasks == 0) return;
    fprintf(out, "Tasks count at depths where the full cache is right in %.0f %% or more:", 100 * EVAL_COUNTS);
    for (int kind = 0; kind < EVAL_KINDS; kind++) {
        double accuracy;
        uint32_t n;
        (void)eval_accuracy(eval, full, (enum eval_kind)kind, &accuracy, &n);
        fprintf(out, "%s %s %" PRIu32 " of %d depths (n = %" PRIu32 ")", kind ? ";" : "", kind_names[kind],
                eval_depths_counted(eval, (enum eval_kind)kind), EVAL_DEPTHS, n);
    }
    fprintf(out, ".\nafter: the passkey's question comes after the compression.\n");
}

static void nothing(void *context, const struct eval *eval, const struct eval_cell *a, const struct eval_cell *b) {
    (void)eval, (void)a, (void)b;
    *(bool *)context = true;
}

static void print_differences(const struct eval *eval, FILE *out) {
    bool any = false;
    each_difference(eval, nothing, &any);
    if (!any) return;
    fprintf(out,
            "\nKL mean of kv_compress less that of each policy at the same share, 95 %% interval (paired bootstrap over %" PRIu32
            " window%s, %u resamples):\n\n"
            "| against            |   keep |      mean |   95 %% interval          | lower           |\n"
            "| ------------------ | -----: | --------: | -----------------------: | --------------- |\n",
            eval->config->eval.windows, eval->config->eval.windows == 1 ? "" : "s", EVAL_RESAMPLES);
    each_difference(eval, print_difference, out);
}

static void print_stream(const struct eval *eval, FILE *out) {
    if (!eval->n_stream_windows) return;
    bool many = eval->n_streams > 1;
    fprintf(out, "\nstreaming_llm over %" PRIu32 " tokens%s, %u tokens a head", eval->n_stream,
            eval->n_stream < eval->config->eval.stream ? " (all that the text has)" : "", EVAL_STREAM_BUDGET);
    if (many) fprintf(out, "; %" PRIu32 " streams that begin evenly over the text", eval->n_streams);
    fprintf(out,
            ":\n\n|   from |     to | perplexity | begun anew | by the first two |%s\n| -----: | -----: | ---------: | ---------: | ---------------: "
            "|%s\n",
            many ? "   one stream alone |" : "", many ? " -----------------: |" : "");
    for (uint32_t i = 0; i < eval->n_stream_windows; i++) {
        const struct eval_stream_window *window = &eval->stream[i];
        fprintf(out, "| %6" PRIu32 " | %6" PRIu32 " | %10.3f | %10.3f | %+14.1f %% |", window->from, window->to, eval_stream_ppl(eval, window),
                eval_stream_ppl_anew(eval, window), 100 * (eval_stream_against_first(eval, window) - 1));
        if (many) fprintf(out, " %8.3f..%8.3f |", window->least, window->most);
        fputc('\n', out);
    }
    fprintf(out,
            "\nbegun anew: the same tokens by a stream that began %u tokens before them; what differs is the stream's length, not the text.\n"
            "by the first two: perplexity by that of the first two windows together; what differs is the text too.\n",
            EVAL_STREAM_BUDGET);
}

void eval_print_table(const struct eval *eval, FILE *out) {
    const struct config *config = eval->config;
    fprintf(out, "%s, %s, KV %s, commit %s\n", model_name(eval->model), lab_describe(eval->lab), kv_dtype_name(lab_kv_dtype(eval->lab)),
            version_commit());
    if (eval->text.made_up)
        fprintf(out, "No --text was given: the text is made up of simple sentences. Its numbers compare policies with each other, not with numbers "
                     "on real text.\n");
    else
        fprintf(out, "Text: %s, %zu tokens.\n", config->eval.text, eval->text.list.count);
    if (config->eval.windows) {
        fprintf(out, "%" PRIu32 " window%s of %" PRIu32 " tokens and the %u after%s.\n\n", config->eval.windows, config->eval.windows == 1 ? "" : "s",
                eval->n_prompt, EVAL_GOLD, eval->overlap ? "; the text is short: they overlap, evenly" : "");
        print_rows(eval, out);
        print_differences(eval, out);
    }
    print_stream(eval, out);
}

/* ---- JSON ---- */

static void key_unsigned(struct json_writer *json, const char *key, uint64_t value) {
    json_key(json, key);
    json_unsigned(json, value);
}

static void key_text(struct json_writer *json, const char *key, const char *text) {
    json_key(json, key);
    json_text(json, text);
}

static void key_double(struct json_writer *json, const char *key, double value) {
    json_key(json, key);
    json_double(json, value);
}

static void key_bool(struct json_writer *json, const char *key, bool value) {
    json_key(json, key);
    json_bool(json, value);
}

/* [layers][heads]: means over n. */
static void write_grid(struct json_writer *json, const char *key, const double *sums, uint32_t layers, uint32_t heads, uint32_t n) {
    json_key(json, key);
    json_array(json);
    for (uint32_t layer = 0; layer < layers; layer++) {
        json_array(json);
        for (uint32_t head = 0; head < heads; head++) json_float(json, n ? (float)(sums[layer * heads + head] / n) : 0);
        json_array_end(json);
    }
    json_array_end(json);
}

static void write_hit_rates(struct json_writer *json, const struct eval_cell *cell, uint32_t layers, uint32_t heads) {
    json_key(json, "hit_rate_heads");
    json_array(json);
    for (uint32_t layer = 0; layer < layers; layer++) {
        json_array(json);
        for (uint32_t head = 0; head < heads; head++) json_float(json, (float)eval_hit_rate(&cell->hits[layer * heads + head]));
        json_array_end(json);
    }
    json_array_end(json);
}

static void write_row(struct json_writer *json, const struct eval *eval, const struct eval_cell *cell) {
    const struct program *program = model_program(eval->model);
    struct row row = row_of(eval, cell);
    json_object(json);
    key_text(json, "policy", cell->policy->name);
    key_double(json, "keep", cell->keep);
    key_double(json, "blocks", row.blocks);
    key_double(json, "bytes", row.blocks * (double)lab_block_bytes(eval->lab));
    key_double(json, "kl_mean", row.kl_mean);
    key_double(json, "kl_p99", row.kl_p99);
    key_double(json, "same_top1", row.same_top1);
    key_double(json, "ppl_ratio", row.ppl_ratio);
    for (int kind = 0; kind < EVAL_KINDS; kind++) {
        json_key(json, kind_names[kind]);
        if (row.has_tasks[kind])
            json_double(json, row.tasks[kind]);
        else
            json_null(json);
    }
    key_double(json, "hit_rate", row.hit_rate);
    write_hit_rates(json, cell, program->n_layers, program->n_kv_heads);
    key_double(json, "attention_error", row.attention_error);
    write_grid(json, "attention_error_heads", cell->attention_error, program->n_layers, program->n_heads, cell->n_attention);
    write_grid(json, "kept", cell->kept, program->n_layers, program->n_kv_heads, cell->n_windows);
    json_object_end(json);
}

static void write_difference(void *context, const struct eval *eval, const struct eval_cell *a, const struct eval_cell *b) {
    struct json_writer *json = context;
    struct eval_interval interval = eval_difference(eval, a, b);
    json_object(json);
    key_text(json, "policy", a->policy->name);
    key_text(json, "against", b->policy->name);
    key_double(json, "keep", a->keep);
    key_double(json, "mean", interval.mean);
    key_double(json, "low", interval.low);
    key_double(json, "high", interval.high);
    json_object_end(json);
}

static void write_tasks(struct json_writer *json, const struct eval *eval) {
    json_key(json, "tasks");
    json_object(json);
    for (int kind = 0; kind < EVAL_KINDS; kind++) {
        double accuracy;
        uint32_t n;
        (void)eval_accuracy(eval, &eval->cells[0], (enum eval_kind)kind, &accuracy, &n);
        json_key(json, kind_names[kind]);
        json_object(json);
        key_unsigned(json, "depths", EVAL_DEPTHS);
        key_unsigned(json, "depths_counted", eval_depths_counted(eval, (enum eval_kind)kind));
        key_unsigned(json, "n", n);
        json_object_end(json);
    }
    json_object_end(json);
}

static void write_stream(struct json_writer *json, const struct eval *eval) {
    key_unsigned(json, "streams", eval->n_streams);
    json_key(json, "stream");
    json_array(json);
    for (uint32_t i = 0; i < eval->n_stream_windows; i++) {
        json_object(json);
        key_unsigned(json, "from", eval->stream[i].from);
        key_unsigned(json, "to", eval->stream[i].to);
        key_double(json, "ppl", eval_stream_ppl(eval, &eval->stream[i]));
        key_double(json, "ppl_anew", eval_stream_ppl_anew(eval, &eval->stream[i]));
        key_double(json, "by_first_two", eval_stream_against_first(eval, &eval->stream[i]));
        key_double(json, "ppl_least", eval->stream[i].least);
        key_double(json, "ppl_most", eval->stream[i].most);
        json_object_end(json);
    }
    json_array_end(json);
}

void eval_print_json(const struct eval *eval, FILE *out) {
    const struct config *config = eval->config;
    struct buffer text = {0};
    struct json_writer json;
    json_begin(&json, &text);
    json_object(&json);
    key_text(&json, "model", model_name(eval->model));
    key_text(&json, "commit", version_commit());
    key_text(&json, "backend", lab_describe(eval->lab));
    key_text(&json, "kv_dtype", kv_dtype_name(lab_kv_dtype(eval->lab)));
    key_text(&json, "against", kv_dtype_name(lab_kv_dtype(eval->exact ? eval->exact : eval->lab)));
    key_text(&json, "text", eval->text.made_up ? "made up" : config->eval.text);
    key_unsigned(&json, "text_tokens", eval->text.list.count);
    key_unsigned(&json, "windows", config->eval.windows);
    key_bool(&json, "windows_overlap", eval->overlap);
    key_unsigned(&json, "prompt", eval->n_prompt);
    key_unsigned(&json, "continuation", EVAL_GOLD);
    key_unsigned(&json, "block_tokens", BLOCK_TOKENS);
    json_key(&json, "rows");
    json_array(&json);
    for (uint32_t c = 0; c < eval->n_cells && config->eval.windows > 0; c++) write_row(&json, eval, &eval->cells[c]);
    json_array_end(&json);
    json_key(&json, "differences");
    json_array(&json);
    each_difference(eval, write_difference, &json);
    json_array_end(&json);
    write_tasks(&json, eval);
    if (config->eval.stream) write_stream(&json, eval);
    json_object_end(&json);
    buffer_append_byte(&text, '\n');
    (void)fwrite(text.bytes, 1, text.length, out);
    buffer_done(&text);
}
