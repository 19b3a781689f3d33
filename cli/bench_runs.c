/* What `bench --requests` measured, printed run by run, so that one that is cut short has told what it knows. Reads only; main thread. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "cli/bench_json.h"
#include "cli/version.h"

struct bench_runs_printer {
    const struct bench_report *report;
    FILE *out;
    struct buffer text; /* JSON that is not out yet */
    struct json_writer json;
};

static void print_head(const struct bench_report *report, FILE *out) {
    char cpu[128];
    bench_cpu_name(cpu, sizeof cpu);
    fprintf(out, "%s, %s, %s, commit %s\n\n", model_name(report->model), cpu, report->backend, version_commit());
    fprintf(out, "| policy             |     keep | requests         |  KV MiB | rings MiB | out t/s |  wall s | read s | decode s | of bound | "
                 "compress s | batch |  max | preempted | host us |   ahead | "
                 "x none | of steps' |\n"
                 "| ------------------ | -------: | ---------------- | ------: | --------: | ------: | ------: | -----: | -------: | -------: | "
                 "---------: | ----: | ---: | --------: | ------: | ------: | "
                 "-----: | --------: |\n");
}

static void print_run(const struct bench_run *run, FILE *out) {
    char keep[16] = "all", shape[48], bound[16] = "", ratio[16] = "", of_steps[16] = "";
    if (run->keep > 0) (void)snprintf(keep, sizeof keep, "%g", run->keep);
    (void)snprintf(shape, sizeof shape, "%" PRIu32 " x %" PRIu32 "+%" PRIu32, run->requests, run->n_prompt, run->n_gen);
    if (run->decode_bound_s > 0 && run->decode_s > 0) (void)snprintf(bound, sizeof bound, "%.1f %%", 100 * run->decode_bound_s / run->decode_s);
    if (run->ratio > 0) (void)snprintf(ratio, sizeof ratio, "%.2f", run->ratio);
    if (run->ratio_of_steps > 0) (void)snprintf(of_steps, sizeof of_steps, "%.1f %%", 100 * run->ratio / run->ratio_of_steps);
    fprintf(out,
            "| %-18s | %8s | %-16s | %7.1f | %9.1f | %7.1f | %7.2f | %6.2f | %8.2f | %8s | %10.3f | %5.1f | %4" PRIu64 " | %9" PRIu64
            " | %7.1f | %5.1f %% | %6s | %9s |\n",
            run->policy, keep, shape, (double)run->pool_bytes / 0x1p20, (double)run->ring_bytes / 0x1p20, run->output_tok_s, run->wall_s,
            run->reading_s, run->decode_s, bound, run->compression_s, run->batch_mean, run->batch_max, run->preemptions, run->host_us,
            run->steps ? 100.0 * (double)run->steps_ahead / (double)run->steps : 0, ratio, of_steps);
}

static void print_legend(const struct bench_report *report, FILE *out) {
    fprintf(out,
            "\nout t/s: tokens of the answers over the whole time. read s: steps in which some prompt is read; decode s: the others, of whose "
            "sequences batch is the mean and max the most. of "
            "bound: the time in which the copy bandwidth measured in this run, %.1f GB/s (read + written), moves what those steps read: the weights "
            "without the input embedding, %.1f MB each, and "
            "K and V in whole blocks. x none: out t/s over that of none; of steps': that, over what read s + decode s of both allow. host us: of a "
            "step, all but waiting for the device, or doing "
            "its work; of steps that began before the results of the one before (ahead), the device hides it.\n",
            report->copy_bandwidth / 1e9, report->weight_bytes / 1e6);
}

static void write_run(struct json_writer *json, const struct bench_run *run) {
    double steps_s = run->reading_s + run->decode_s + run->compression_s;
    json_object(json);
    json_key_text(json, "policy", run->policy);
    json_key_double(json, "keep", run->keep > 0 ? run->keep : 1);
    json_key_unsigned(json, "requests", run->requests);
    json_key_unsigned(json, "n_prompt", run->n_prompt);
    json_key_unsigned(json, "n_gen", run->n_gen);
    json_key_unsigned(json, "kv_limit_bytes", run->kv_limit);
    json_key_unsigned(json, "pool_bytes", run->pool_bytes);
    json_key_unsigned(json, "ring_bytes", run->ring_bytes);
    json_key_unsigned(json, "max_sequences", run->max_sequences);
    json_key_double(json, "wall_s", run->wall_s);
    json_key_unsigned(json, "output_tokens", run->output_tokens);
    json_key_double(json, "output_tok_s", run->output_tok_s);
    json_key_double(json, "reading_s", run->reading_s);
    json_key_double(json, "decode_s", run->decode_s);
    json_key_double(json, "decode_bound_s", run->decode_bound_s);
    json_key_double(json, "of_bound", run->decode_s > 0 ? run->decode_bound_s / run->decode_s : 0);
    json_key_double(json, "compression_s", run->compression_s);
    json_key_double(json, "compression_share", steps_s > 0 ? run->compression_s / steps_s : 0);
    json_key_unsigned(json, "compressions", run->compressions);
    json_key_unsigned(json, "compressions_behind", run->compressions_behind); /* whose choice began behind a step */
    json_key_double(json, "slots_kept", run->slots_kept);
    json_key_unsigned(json, "steps", run->steps);
    json_key_unsigned(json, "steps_ahead", run->steps_ahead);
    json_key_unsigned(json, "decode_steps", run->decode_steps);
    json_key_double(json, "batch_mean", run->batch_mean);
    json_key_unsigned(json, "batch_max", run->batch_max);
    json_key_unsigned(json, "preemptions", run->preemptions);
    json_key_double(json, "host_us", run->host_us);
    json_key_double(json, "decode_host_us", run->decode_host_us);
    json_key_double(json, "ratio", run->ratio);
    json_key_double(json, "ratio_of_steps", run->ratio_of_steps);
    json_key_double(json, "of_steps", run->ratio_of_steps > 0 ? run->ratio / run->ratio_of_steps : 0);
    json_object_end(json);
}

static void flush(struct bench_runs_printer *printer) {
    if (printer->report->config->bench.json) {
        (void)fwrite(printer->text.bytes, 1, printer->text.length, printer->out);
        buffer_consume(&printer->text, printer->text.length);
    }
    (void)fflush(printer->out);
}

struct bench_runs_printer *bench_runs_begin(const struct bench_report *report, FILE *out) {
    struct bench_runs_printer *printer = check_calloc(1, sizeof *printer);
    *printer = (struct bench_runs_printer){.report = report, .out = out};
    if (!report->config->bench.json) {
        print_head(report, out);
        return printer;
    }
    json_begin(&printer->json, &printer->text);
    json_object(&printer->json);
    bench_json_head(&printer->json, report);
    json_key_double(&printer->json, "weight_bytes", report->weight_bytes);
    json_key(&printer->json, "runs");
    json_array(&printer->json);
    return printer;
}

void bench_runs_add(struct bench_runs_printer *printer, const struct bench_run *run) {
    if (printer->report->config->bench.json)
        write_run(&printer->json, run);
    else
        print_run(run, printer->out);
    flush(printer);
}

void bench_runs_end(struct bench_runs_printer *printer) {
    if (!printer) return;
    if (printer->report->config->bench.json) {
        json_array_end(&printer->json);
        json_object_end(&printer->json);
        buffer_append_byte(&printer->text, '\n');
    } else {
        print_legend(printer->report, printer->out);
    }
    flush(printer);
    buffer_done(&printer->text);
    free(printer);
}
