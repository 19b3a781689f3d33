/* What bench measured, as a Markdown table in llama-bench's columns or as one JSON object. Reads only; main thread. */
#include <inttypes.h>
#include <string.h>

#include "cli/bench_json.h"
#include "cli/cli.h"
#include "cli/version.h"

/* "AMD EPYC 9R45": the first model name of /proc/cpuinfo. */
void bench_cpu_name(char *name, size_t size) {
    snprintf(name, size, "unknown");
    FILE *file = fopen("/proc/cpuinfo", "r");
    char line[256];
    while (file && fgets(line, sizeof line, file)) {
        if (strncmp(line, "model name", 10) != 0) continue;
        const char *value = strchr(line, ':');
        if (!value) continue;
        value += strspn(value, ": \t");
        snprintf(name, size, "%.*s", (int)strcspn(value, "\n"), value);
        break;
    }
    if (file) (void)fclose(file);
}

/* "pp512", "tg128 @ d128" */
static void test_name(const struct bench_row *row, char *name, size_t size) {
    if (row->n_prompt)
        snprintf(name, size, "%s%" PRIu32, row->test, row->n_prompt);
    else
        snprintf(name, size, "%s%" PRIu32 " @ d%" PRIu32, row->test, row->n_gen, row->context);
}

static void print_phases(const struct bench_report *report, const struct bench_phases *phases, FILE *out) {
    char test[32];
    struct bench_row row = {.test = phases->test, .n_prompt = phases->n_prompt, .n_gen = phases->n_gen, .context = phases->context};
    double total = 0;
    test_name(&row, test, sizeof test);
    fprintf(out, "\n%s, batch %" PRIu32 ", microseconds of %s; ceilings %.0f GMAC/s (%s), %.1f GB/s\n\n", test, phases->batch,
            phases->n_prompt ? "the prompt" : "a step", report->ceilings.gmac_s, report->ceilings.instruction, report->ceilings.gb_s);
    fprintf(out, "| phase     |         us |   GMAC/s |     GB/s | of ceiling |\n| --------- | ---------: | -------: | -------: | ---------: |\n");
    for (int kind = 0; kind < PHASE_KINDS; kind++) {
        const struct bench_phase_row *phase = &phases->rows[kind];
        total += phase->us;
        fprintf(out, "| %-9s | %10.1f | %8.1f | %8.1f | %8.0f %% |\n", phase_kind_name(phase->kind), phase->us, phase->gmac_s, phase->gb_s,
                100 * phase->of_ceiling);
    }
    fprintf(out, "| all       | %10.1f |          |          |            |\n", total);
}

static void print_bound(const struct bench_report *report, FILE *out) {
    fprintf(out,
            "bound: a step that does no more than read once, at the copy bandwidth measured in this run, %.1f GB/s (read + written), the weights "
            "without the input "
            "embedding and K and V of the context%s:\n",
            report->copy_bandwidth / 1e9, report->config->bench.ragged ? " that each head still has" : "");
    for (uint32_t i = 0; i < report->n_rows; i++) {
        const struct bench_row *row = &report->rows[i];
        if (row->n_gen) fprintf(out, "  batch %" PRIu32 ": %.1f MB + %.1f MB\n", row->batch, row->weight_bytes / 1e6, row->kv_bytes / 1e6);
    }
    fprintf(out, "host us: of a step, all but waiting for the device%s%s.\n", report->on_host ? ", or doing its work" : "",
            report->runs_ahead ? "; meanwhile it computes the step before, as all but the first of a round run ahead" : "");
}

void bench_print_table(const struct bench_report *report, FILE *out) {
    char cpu[128];
    bool decodes = false;
    bench_cpu_name(cpu, sizeof cpu);
    fprintf(out, "%s, %s, KV %s, commit %s\n\n", cpu, report->backend, kv_dtype_name(report->kv_dtype), version_commit());
    fprintf(out, "| model                          |       size |     params | batch | test             |        t/s |   t/s (min) |   t/s (max) | "
                 "bound t/s | of bound | host us |\n"
                 "| ------------------------------ | ---------: | ---------: | ----: | ---------------- | ---------: | ----------: | ----------: | "
                 "--------: | -------: | ------: |\n");
    for (uint32_t i = 0; i < report->n_rows; i++) {
        const struct bench_row *row = &report->rows[i];
        char test[32];
        test_name(row, test, sizeof test);
        fprintf(out, "| %-30.30s | %6.1f MiB | %8.1f M | %5" PRIu32 " | %-16s | %10.2f | %11.2f | %11.2f |", model_name(report->model),
                (double)model_bytes(report->model) / 0x1p20, (double)model_parameters(report->model) / 1e6, row->batch, test, row->tok_s,
                row->tok_s_min, row->tok_s_max);
        if (row->bound_tok_s > 0)
            fprintf(out, " %9.0f | %6.1f %% | %7.1f |\n", row->bound_tok_s, 100 * row->tok_s / row->bound_tok_s, row->host_us);
        else
            fprintf(out, "           |          |         |\n");
        decodes = decodes || row->n_gen > 0;
    }
    for (uint32_t i = 0; i < report->n_phases; i++) print_phases(report, &report->phases[i], out);
    fprintf(out, "\nt/s: the median of %" PRIu32 " rounds, greedy sampling included; each sequence has random tokens of its own.\n",
            report->config->bench.rounds);
    if (decodes) print_bound(report, out);
}

static void write_row(struct json_writer *json, const struct bench_row *row) {
    json_object(json);
    json_key_text(json, "test", row->test);
    json_key_unsigned(json, "batch", row->batch);
    json_key_unsigned(json, "n_prompt", row->n_prompt);
    json_key_unsigned(json, "n_gen", row->n_gen);
    json_key_unsigned(json, "context", row->context);
    json_key_double(json, "tok_s", row->tok_s);
    json_key_double(json, "tok_s_min", row->tok_s_min);
    json_key_double(json, "tok_s_max", row->tok_s_max);
    json_key_unsigned(json, "rounds", row->rounds);
    if (row->n_gen) {
        json_key_double(json, "weight_bytes", row->weight_bytes);
        json_key_double(json, "kv_bytes", row->kv_bytes);
        json_key_double(json, "bound_tok_s", row->bound_tok_s);
        json_key_double(json, "of_bound", row->bound_tok_s > 0 ? row->tok_s / row->bound_tok_s : 0);
        json_key_double(json, "host_us", row->host_us);
        json_key_unsigned(json, "steps_ahead", row->steps_ahead);
    }
    json_object_end(json);
}

static void write_phases(struct json_writer *json, const struct bench_report *report) {
    json_key(json, "ceilings");
    json_object(json);
    json_key_double(json, "gmac_s", report->ceilings.gmac_s);
    json_key_double(json, "gb_s", report->ceilings.gb_s);
    json_key_text(json, "instruction", report->ceilings.instruction);
    json_object_end(json);
    json_key(json, "phases");
    json_array(json);
    for (uint32_t i = 0; i < report->n_phases * PHASE_KINDS; i++) {
        const struct bench_phases *phases = &report->phases[i / PHASE_KINDS];
        const struct bench_phase_row *row = &phases->rows[i % PHASE_KINDS];
        json_object(json);
        json_key_text(json, "test", phases->test);
        json_key_unsigned(json, "batch", phases->batch);
        json_key_unsigned(json, "n_prompt", phases->n_prompt);
        json_key_unsigned(json, "n_gen", phases->n_gen);
        json_key_unsigned(json, "context", phases->context);
        json_key_text(json, "phase", phase_kind_name(row->kind));
        json_key_double(json, "us", row->us);
        json_key_double(json, "gmac_s", row->gmac_s);
        json_key_double(json, "gb_s", row->gb_s);
        json_key_double(json, "of_ceiling", row->of_ceiling);
        json_object_end(json);
    }
    json_array_end(json);
}

void bench_json_head(struct json_writer *json, const struct bench_report *report) {
    char cpu[128];
    bench_cpu_name(cpu, sizeof cpu);
    json_key_text(json, "model", model_name(report->model));
    json_key_unsigned(json, "threads", report->threads);
    json_key_text(json, "commit", version_commit());
    json_key_text(json, "cpu", cpu);
    json_key_text(json, "backend", report->backend);
    json_key_text(json, "kv_dtype", kv_dtype_name(report->kv_dtype));
    json_key_double(json, "copy_gb_s", report->copy_bandwidth / 1e9);
}

void bench_print_json(const struct bench_report *report, FILE *out) {
    struct buffer text = {0};
    struct json_writer json;
    json_begin(&json, &text);
    json_object(&json);
    bench_json_head(&json, report);
    json_key(&json, "rows");
    json_array(&json);
    for (uint32_t i = 0; i < report->n_rows; i++) write_row(&json, &report->rows[i]);
    json_array_end(&json);
    if (report->n_phases) write_phases(&json, report);
    json_object_end(&json);
    buffer_append_byte(&text, '\n');
    (void)fwrite(text.bytes, 1, text.length, out);
    buffer_done(&text);
}
