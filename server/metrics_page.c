/* The page of metrics.h in Prometheus' text format 0.0.4. Base units, HELP and TYPE once a family, counters end in _total (promtool check metrics). Loop thread. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "server/metrics.h"

int metrics_code(uint32_t index);

struct page {
    struct buffer *out;
    char labels[700]; /* model_name="..." */
};

/* A label's value: backslash, quote and newline escaped. */
static void escape(char *out, size_t size, const char *text) {
    size_t used = 0;
    for (; *text && used + 2 < size; text++) {
        if (*text == '\\' || *text == '"' || *text == '\n') out[used++] = '\\';
        out[used++] = *text == '\n' ? 'n' : *text;
    }
    out[used] = '\0';
}

static void number(struct buffer *out, double value) {
    char text[40];
    for (int digits = 6; digits <= 17; digits++) {
        (void)snprintf(text, sizeof text, "%.*g", digits, value);
        if (strtod(text, NULL) == value) break;
    }
    buffer_append_text(out, text);
}

static void head(struct page *page, const char *name, const char *type, const char *help) {
    buffer_printf(page->out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

/* One sample; `more` are labels beside the model's ("" or `,state="used"`). */
static void sample(struct page *page, const char *name, const char *more, double value) {
    buffer_printf(page->out, "%s{%s%s} ", name, page->labels, more);
    number(page->out, value);
    buffer_append_byte(page->out, '\n');
}

static void single(struct page *page, const char *name, const char *type, const char *help, double value) {
    head(page, name, type, help);
    sample(page, name, "", value);
}

static void histogram(struct page *page, const char *name, const char *help, const struct histogram *histogram) {
    uint64_t total = 0;
    head(page, name, "histogram", help);
    for (uint32_t i = 0; i <= histogram->n_bounds; i++) {
        total += histogram->counts[i];
        buffer_printf(page->out, "%s_bucket{%s,le=\"", name, page->labels);
        if (i < histogram->n_bounds)
            number(page->out, histogram->bounds[i]);
        else
            buffer_append_text(page->out, "+Inf");
        buffer_printf(page->out, "\"} %" PRIu64 "\n", total);
    }
    buffer_printf(page->out, "%s_sum{%s} ", name, page->labels);
    number(page->out, histogram->sum);
    buffer_printf(page->out, "\n%s_count{%s} %" PRIu64 "\n", name, page->labels, total);
}

static const double rows_bounds[] = {1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384};

static struct histogram rows_histogram(const struct engine_stats *engine) {
    struct histogram rows = {.bounds = rows_bounds, .n_bounds = sizeof rows_bounds / sizeof *rows_bounds, .sum = (double)engine->step_rows_sum};
    memcpy(rows.counts, engine->step_rows_bucket, sizeof engine->step_rows_bucket);
    return rows;
}

static double usage(const struct engine_stats *engine) {
    return engine->blocks_total ? (double)engine->blocks_used / (double)engine->blocks_total : 0;
}

static const char *const finish_names[METRIC_FINISHES] = {"stop", "length", "abort", "error"};

/* One table for both sets of names: what differs is the prefix and a few words. */
static const struct {
    const char *name, *help;
    enum metric_histogram histogram;
} histograms[] = {
    {"time_to_first_token_seconds", "Time from a request's arrival to its first token.", METRIC_TIME_TO_FIRST_TOKEN},
    {"inter_token_latency_seconds", "Time between two tokens of one choice.", METRIC_INTER_TOKEN},
    {"e2e_request_latency_seconds", "Time from a request's arrival to the end of its answer.", METRIC_END_TO_END},
    {"request_queue_time_seconds", "Time a request waited before its first step.", METRIC_QUEUE},
    {"request_prefill_time_seconds", "Time from a request's first step to its first token.", METRIC_PREFILL},
    {"request_decode_time_seconds", "Time from a request's first token to its last.", METRIC_DECODE},
    {"request_inference_time_seconds", "Time from a request's first step to its last token.", METRIC_INFERENCE},
    {"request_prompt_tokens", "Tokens of a prompt.", METRIC_PROMPT_TOKENS},
    {"request_generation_tokens", "Tokens generated for a choice.", METRIC_GENERATION_TOKENS},
    {"request_params_max_tokens", "max_tokens as asked for.", METRIC_MAX_TOKENS},
    {"request_params_n", "n as asked for.", METRIC_N},
};

static void all_histograms(struct page *page, const char *prefix, const struct metrics *metrics, const struct metrics_view *view) {
    char name[96];
    for (size_t i = 0; i < sizeof histograms / sizeof *histograms; i++) {
        (void)snprintf(name, sizeof name, "%s%s", prefix, histograms[i].name);
        histogram(page, name, histograms[i].help, &metrics->histograms[histograms[i].histogram]);
    }
    struct histogram rows = rows_histogram(&view->engine);
    /* vLLM's name ends in _total although it is a histogram. */
    (void)snprintf(name, sizeof name, "%siteration_tokens%s", prefix, strchr(prefix, ':') ? "_total" : "");
    histogram(page, name, "Tokens computed in one step.", &rows);
}

static void successes(struct page *page, const char *name, const struct metrics *metrics) {
    head(page, name, "counter", "Choices that ended, by how.");
    for (int i = 0; i < METRIC_FINISHES; i++) {
        char label[48];
        (void)snprintf(label, sizeof label, ",finished_reason=\"%s\"", finish_names[i]);
        sample(page, name, label, (double)metrics->finishes[i]);
    }
}

static void info(struct page *page, const char *name, const struct metrics_view *view) {
    char labels[256];
    head(page, name, "gauge", "The KV cache: tokens a block of one head, blocks of the pool.");
    (void)snprintf(labels, sizeof labels, ",block_size=\"%u\",num_gpu_blocks=\"%" PRIu64 "\",cache_dtype=\"%s\",enable_prefix_caching=\"%s\"",
                   view->block_tokens, view->engine.blocks_total, view->kv_dtype, view->prefix_cache ? "True" : "False");
    sample(page, name, labels, 1);
}

static void engine_metrics(struct page *page, const struct metrics_view *view) {
    const struct engine_stats *engine = &view->engine;
    single(page, "kvasir_requests_running", "gauge", "Choices that hold blocks of the KV cache.", view->running);
    single(page, "kvasir_requests_waiting", "gauge", "Choices that wait for room.", view->waiting);
    head(page, "kvasir_kv_cache_blocks", "gauge", "Blocks of the KV cache: all, held by a sequence, held by the prefix cache only.");
    sample(page, "kvasir_kv_cache_blocks", ",state=\"total\"", (double)engine->blocks_total);
    sample(page, "kvasir_kv_cache_blocks", ",state=\"used\"", (double)engine->blocks_used);
    sample(page, "kvasir_kv_cache_blocks", ",state=\"cached\"", (double)engine->blocks_cached);
    single(page, "kvasir_kv_cache_bytes", "gauge", "Memory of the KV cache.", (double)engine->blocks_total * (double)engine->block_bytes);
    single(page, "kvasir_kv_cache_usage_ratio", "gauge", "Used blocks of all, 0 to 1.", usage(engine));
    info(page, "kvasir_cache_config_info", view);
    single(page, "kvasir_prefix_cache_queries_total", "counter", "Prompt tokens looked up in the prefix cache.", (double)engine->prefix_queries);
    single(page, "kvasir_prefix_cache_hits_total", "counter", "Prompt tokens found in the prefix cache.", (double)engine->prefix_hits);
    single(page, "kvasir_prefix_cache_partial_hits_total", "counter", "Admissions that found a part of their prompt.",
           (double)engine->prefix_partial_hits);
    single(page, "kvasir_prefix_cache_evictions_total", "counter", "Entries that left the prefix cache for room.", (double)engine->prefix_evictions);
    single(page, "kvasir_preemptions_total", "counter", "Times a running choice gave its blocks back and was computed again.",
           (double)engine->preemptions);
    single(page, "kvasir_forks_total", "counter", "Candidates that shared the blocks of their prompt's first.", (double)engine->forks);
    single(page, "kvasir_blocks_copied_total", "counter", "Blocks copied for a fork.", (double)engine->blocks_copied);
    single(page, "kvasir_prompt_chunks_total", "counter", "Chunks in which prompts were read.", (double)engine->chunks);
    single(page, "kvasir_steps_total", "counter", "Steps of the engine.", (double)engine->steps);
    single(page, "kvasir_steps_ahead_total", "counter", "Steps that began before the results of the one before were read.",
           (double)engine->steps_ahead);
    single(page, "kvasir_step_busy_seconds_total", "counter", "Time in steps.", (double)engine->busy_ns / 1e9);
    single(page, "kvasir_step_cost_ratio", "gauge",
           "Time of steps that read prompts beside running streams over what was expected of them at the start; chunks follow it.",
           engine->cost_ratio);
    single(page, "kvasir_schedule_seconds_total", "counter", "Time in planning and building batches.", (double)engine->schedule_ns / 1e9);
    single(page, "kvasir_computed_prompt_tokens_total", "counter", "Prompt rows computed; cached ones are not.", (double)engine->prompt_tokens);
    single(page, "kvasir_computed_generation_tokens_total", "counter", "Tokens sampled, those that a stop string dropped among them.",
           (double)engine->generation_tokens);
}

static void compression_metrics(struct page *page, const struct metrics_view *view) {
    const struct engine_stats *engine = &view->engine;
    char labels[96];
    head(page, "kvasir_compressions_total", "counter", "Sequences whose KV cache was cut, by policy and by what set it off.");
    for (uint32_t p = 1; p < policy_count() && p < ENGINE_POLICIES_MAX; p++)
        for (uint32_t t = 0; t < TRIGGER_KINDS; t++) {
            if (!(policies[p]->triggers & 1u << t) && engine->compressions[p][t] == 0) continue;
            (void)snprintf(labels, sizeof labels, ",policy=\"%s\",trigger=\"%s\"", policies[p]->name,
                           policy_trigger_name((enum policy_trigger)(1u << t)));
            sample(page, "kvasir_compressions_total", labels, (double)engine->compressions[p][t]);
        }
    single(page, "kvasir_compression_seconds_total", "counter", "Time between steps in scoring, choosing and moving.", (double)engine->compression_ns / 1e9);
    single(page, "kvasir_kv_slots_kept_total", "counter", "Cached tokens of a head that compressions kept.", (double)engine->slots_kept);
    single(page, "kvasir_kv_slots_evicted_total", "counter", "Cached tokens of a head that compressions evicted.", (double)engine->slots_evicted);
    single(page, "kvasir_kv_blocks_freed_total", "counter", "Blocks that compressions gave back.", (double)engine->kv_blocks_freed);
    single(page, "kvasir_kv_bytes_saved_total", "counter", "Memory of those blocks.", (double)engine->kv_blocks_freed * (double)engine->block_bytes);
    uint64_t seen = engine->slots_kept + engine->slots_evicted;
    single(page, "kvasir_kv_compression_ratio", "gauge", "Cached tokens before compressions over those after, since the start; 1: nothing evicted.",
           engine->slots_kept ? (double)seen / (double)engine->slots_kept : 1);
    single(page, "kvasir_admissions_by_compression_total", "counter",
           "Admissions for which the free blocks would not have sufficed without those that the same step's compression freed.",
           (double)engine->admissions_by_compression);
    head(page, "kvasir_kv_layer_slots_kept_total", "counter",
         "Cached tokens of a head that compressions kept, by layer; the last layer shown stands for all above.");
    for (uint32_t layer = 0; layer < engine->n_layers && layer < ENGINE_LAYERS_MAX; layer++) {
        (void)snprintf(labels, sizeof labels, ",layer=\"%u\"", layer);
        sample(page, "kvasir_kv_layer_slots_kept_total", labels, (double)engine->layer_kept[layer]);
    }
    head(page, "kvasir_kv_layer_hits_total", "counter",
         "Pairs of a row and a key with at least an even share of its attention, when a request with a report was compressed: all, and those whose "
         "key was kept, by layer.");
    for (uint32_t layer = 0; layer < engine->n_layers && layer < ENGINE_LAYERS_MAX; layer++) {
        (void)snprintf(labels, sizeof labels, ",layer=\"%u\",key=\"kept\"", layer);
        sample(page, "kvasir_kv_layer_hits_total", labels, (double)engine->layer_hits_kept[layer]);
        (void)snprintf(labels, sizeof labels, ",layer=\"%u\",key=\"evicted\"", layer);
        sample(page, "kvasir_kv_layer_hits_total", labels, (double)(engine->layer_hits[layer] - engine->layer_hits_kept[layer]));
    }
}

static void request_metrics(struct page *page, const struct metrics *metrics, const struct metrics_view *view) {
    single(page, "kvasir_prompt_tokens_total", "counter", "Prompt tokens of requests, cached ones among them.", (double)metrics->prompt_tokens);
    single(page, "kvasir_prompt_tokens_cached_total", "counter", "Prompt tokens that came from the prefix cache.", (double)metrics->cached_tokens);
    single(page, "kvasir_generation_tokens_total", "counter", "Tokens generated.", (double)metrics->generation_tokens);
    successes(page, "kvasir_request_success_total", metrics);
    single(page, "kvasir_requests_aborted_total", "counter", "Choices ended before their time: client gone, deadline, shutdown.",
           (double)metrics->finishes[METRIC_ABORT]);
    head(page, "kvasir_requests_rejected_total", "counter", "Requests refused before they began, by why.");
    sample(page, "kvasir_requests_rejected_total", ",reason=\"queue_full\"", (double)metrics->rejected_queue);
    sample(page, "kvasir_requests_rejected_total", ",reason=\"key_limit\"", (double)metrics->rejected_key);
    sample(page, "kvasir_requests_rejected_total", ",reason=\"not_ready\"", (double)metrics->rejected_not_ready);
    single(page, "kvasir_clients_gone_total", "counter", "Requests whose client left before the end of the answer.", (double)metrics->client_gone);
    single(page, "kvasir_request_timeouts_total", "counter", "Requests that lived longer than request_timeout.", (double)metrics->timeouts);
    head(page, "kvasir_requests_total", "counter", "HTTP answers by endpoint and status.");
    for (uint32_t route = 0; route < METRIC_ROUTES; route++)
        for (uint32_t code = 0; code < METRIC_CODES; code++) {
            char labels[96];
            if (metrics->answers[route][code] == 0) continue;
            (void)snprintf(labels, sizeof labels, ",endpoint=\"%s\",code=\"%d\"", view->route_names[route < view->n_routes ? route : view->n_routes],
                           metrics_code(code));
            sample(page, "kvasir_requests_total", labels, (double)metrics->answers[route][code]);
        }
    all_histograms(page, "kvasir_", metrics, view);
}

static void process_metrics(struct page *page, const struct metrics_view *view) {
    char labels[200], words[96];
    unsigned long pages = 0;
    FILE *file = fopen("/proc/self/statm", "re");
    if (file) {
        if (fgets(words, sizeof words, file)) pages = strtoul(words + strcspn(words, " "), NULL, 10); /* "all resident ..." */
        (void)fclose(file);
    }
    head(page, "kvasir_build_info", "gauge", "The version and what computes.");
    escape(words, sizeof words, view->backend);
    (void)snprintf(labels, sizeof labels, ",version=\"%s\",backend=\"%s\"", view->version, words);
    sample(page, "kvasir_build_info", labels, 1);
    head(page, "kvasir_model_info", "gauge", "The model.");
    (void)snprintf(labels, sizeof labels, ",architecture=\"%s\",parameters=\"%" PRIu64 "\"", view->architecture, view->parameters);
    sample(page, "kvasir_model_info", labels, 1);
    single(page, "kvasir_ready", "gauge", "1 while requests are taken; 0 while loading and draining.", view->ready);
    single(page, "kvasir_connections", "gauge", "Open HTTP connections.", view->connections);
    buffer_append_text(
        page->out,
        "# HELP process_resident_memory_bytes Resident memory.\n# TYPE process_resident_memory_bytes gauge\nprocess_resident_memory_bytes ");
    number(page->out, (double)pages * (double)sysconf(_SC_PAGESIZE));
    buffer_append_text(page->out,
                       "\n# HELP process_start_time_seconds When the process started, in unix seconds.\n# TYPE process_start_time_seconds gauge\n"
                       "process_start_time_seconds ");
    number(page->out, view->start_time);
    buffer_append_byte(page->out, '\n');
}

static void vllm_metrics(struct page *page, const struct metrics *metrics, const struct metrics_view *view) {
    size_t used = strlen(page->labels);
    (void)snprintf(page->labels + used, sizeof page->labels - used, ",engine=\"0\"");
    single(page, "vllm:num_requests_running", "gauge", "Choices that hold blocks of the KV cache.", view->running);
    single(page, "vllm:num_requests_waiting", "gauge", "Choices that wait for room.", view->waiting);
    single(page, "vllm:kv_cache_usage_perc", "gauge", "Used blocks of all, 0 to 1.", usage(&view->engine));
    single(page, "vllm:gpu_cache_usage_perc", "gauge", "The name of kv_cache_usage_perc before vLLM 0.11.", usage(&view->engine));
    info(page, "vllm:cache_config_info", view);
    single(page, "vllm:num_preemptions_total", "counter", "Times a running choice was computed again.", (double)view->engine.preemptions);
    single(page, "vllm:prompt_tokens_total", "counter", "Prompt tokens.", (double)metrics->prompt_tokens);
    single(page, "vllm:generation_tokens_total", "counter", "Tokens generated.", (double)metrics->generation_tokens);
    single(page, "vllm:prefix_cache_queries_total", "counter", "Prompt tokens looked up in the prefix cache.", (double)view->engine.prefix_queries);
    single(page, "vllm:prefix_cache_hits_total", "counter", "Prompt tokens found in the prefix cache.", (double)view->engine.prefix_hits);
    single(page, "vllm:gpu_prefix_cache_queries_total", "counter", "The name before vLLM 0.11.", (double)view->engine.prefix_queries);
    single(page, "vllm:gpu_prefix_cache_hits_total", "counter", "The name before vLLM 0.11.", (double)view->engine.prefix_hits);
    successes(page, "vllm:request_success_total", metrics);
    all_histograms(page, "vllm:", metrics, view);
    histogram(page, "vllm:request_max_num_generation_tokens", "Tokens generated for a choice, at most.",
              &metrics->histograms[METRIC_GENERATION_TOKENS]);
    page->labels[used] = '\0';
}

void metrics_page(struct buffer *out, const struct metrics *metrics, const struct metrics_view *view) {
    struct page page = {.out = out};
    char name[600];
    escape(name, sizeof name, view->model_name);
    (void)snprintf(page.labels, sizeof page.labels, "model_name=\"%s\"", name);
    engine_metrics(&page, view);
    compression_metrics(&page, view);
    request_metrics(&page, metrics, view);
    process_metrics(&page, view);
    if (view->vllm_names) vllm_metrics(&page, metrics, view);
}
