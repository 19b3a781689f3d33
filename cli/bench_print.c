/* What bench measured, as a Markdown table in llama-bench's columns or as one JSON object. Reads only; main thread. */
#include <inttypes.h>
#include <string.h>

#include "base/json_writer.h"
#include "cli/bench.h"
#include "cli/cli.h"
#include "cli/version.h"

/* "AMD EPYC 9R45": the first model name of /proc/cpuinfo. */
static void cpu_name(char *name, size_t size) {
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

void bench_print_table(const struct bench_report *report, FILE *out) {
    char cpu[128];
    cpu_name(cpu, sizeof cpu);
    fprintf(out, "%s, %s, KV %s, commit %s\n\n", cpu, report->backend, kv_dtype_name(report->kv_dtype), version_commit());
    fprintf(out,
            "| model                          |       size |     params | batch | test             |        t/s |   t/s (min) |   t/s (max) |\n"
            "| ------------------------------ | ---------: | ---------: | ----: | ---------------- | ---------: | ----------: | ----------: |\n");
    for (uint32_t i = 0; i < report->n_rows; i++) {
        const struct bench_row *row = &report->rows[i];
        char test[32];
        test_name(row, test, sizeof test);
        fprintf(out, "| %-30.30s | %6.1f MiB | %8.1f M | %5" PRIu32 " | %-16s | %10.2f | %11.2f | %11.2f |\n", model_name(report->model),
                (double)model_bytes(report->model) / 0x1p20, (double)model_parameters(report->model) / 1e6, row->batch, test, row->tok_s,
                row->tok_s_min, row->tok_s_max);
    }
    for (uint32_t i = 0; i < report->n_phases; i++) print_phases(report, &report->phases[i], out);
    fprintf(out, "\nt/s: the median of %" PRIu32 " rounds, greedy sampling included; each sequence has random tokens of its own.\n",
            report->config->bench.rounds);
}

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

static void write_row(struct json_writer *json, const struct bench_row *row) {
    json_object(json);
    key_text(json, "test", row->test);
    key_unsigned(json, "batch", row->batch);
    key_unsigned(json, "n_prompt", row->n_prompt);
    key_unsigned(json, "n_gen", row->n_gen);
    key_unsigned(json, "context", row->context);
    key_double(json, "tok_s", row->tok_s);
    key_double(json, "tok_s_min", row->tok_s_min);
    key_double(json, "tok_s_max", row->tok_s_max);
    key_unsigned(json, "rounds", row->rounds);
    json_object_end(json);
}

static void write_phases(struct json_writer *json, const struct bench_report *report) {
    json_key(json, "ceilings");
    json_object(json);
    key_double(json, "gmac_s", report->ceilings.gmac_s);
    key_double(json, "gb_s", report->ceilings.gb_s);
    key_text(json, "instruction", report->ceilings.instruction);
    json_object_end(json);
    json_key(json, "phases");
    json_array(json);
    for (uint32_t i = 0; i < report->n_phases * PHASE_KINDS; i++) {
        const struct bench_phases *phases = &report->phases[i / PHASE_KINDS];
        const struct bench_phase_row *row = &phases->rows[i % PHASE_KINDS];
        json_object(json);
        key_text(json, "test", phases->test);
        key_unsigned(json, "batch", phases->batch);
        key_unsigned(json, "n_prompt", phases->n_prompt);
        key_unsigned(json, "n_gen", phases->n_gen);
        key_unsigned(json, "context", phases->context);
        key_text(json, "phase", phase_kind_name(row->kind));
        key_double(json, "us", row->us);
        key_double(json, "gmac_s", row->gmac_s);
        key_double(json, "gb_s", row->gb_s);
        key_double(json, "of_ceiling", row->of_ceiling);
        json_object_end(json);
    }
    json_array_end(json);
}

void bench_print_json(const struct bench_report *report, FILE *out) {
    char cpu[128];
    cpu_name(cpu, sizeof cpu);
    struct buffer text = {0};
    struct json_writer json;
    json_begin(&json, &text);
    json_object(&json);
    key_text(&json, "model", model_name(report->model));
    key_unsigned(&json, "threads", report->threads);
    key_text(&json, "commit", version_commit());
    key_text(&json, "cpu", cpu);
    key_text(&json, "backend", report->backend);
    key_text(&json, "kv_dtype", kv_dtype_name(report->kv_dtype));
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
