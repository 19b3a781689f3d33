/* Counters and histograms of the loop thread, and the page that shows them with the engine's. kvasir_* names pass promtool; vLLM's names stand beside them on a switch.
 * Loop thread only: no locks, no atomics. */
#pragma once

#include "engine/engine.h"
#include "server/http.h"

#define HISTOGRAM_BUCKETS_MAX 24

struct histogram {
    const double *bounds; /* ascending, without +Inf */
    uint32_t n_bounds;
    uint64_t counts[HISTOGRAM_BUCKETS_MAX + 1]; /* not cumulative; the last is +Inf */
    double sum;
};
void histogram_observe(struct histogram *histogram, double value);

enum metric_histogram {
    METRIC_TIME_TO_FIRST_TOKEN,
    METRIC_INTER_TOKEN,
    METRIC_END_TO_END,
    METRIC_QUEUE,
    METRIC_PREFILL,
    METRIC_DECODE,
    METRIC_INFERENCE,
    METRIC_PROMPT_TOKENS,
    METRIC_GENERATION_TOKENS,
    METRIC_MAX_TOKENS,
    METRIC_N,
    METRIC_HISTOGRAMS,
};

enum metric_finish { METRIC_STOP, METRIC_LENGTH, METRIC_ABORT, METRIC_ERROR, METRIC_FINISHES };

#define METRIC_ROUTES 16
#define METRIC_CODES 20

struct metrics {
    struct histogram histograms[METRIC_HISTOGRAMS];
    uint64_t finishes[METRIC_FINISHES];
    uint64_t prompt_tokens, cached_tokens, generation_tokens; /* as usage counts them */
    uint64_t answers[METRIC_ROUTES][METRIC_CODES];
    uint64_t rejected_queue, rejected_key, rejected_not_ready, client_gone, timeouts;
    double bounds[48]; /* 1-2-5 series up to max_model_len */
};

void metrics_init(struct metrics *metrics);
/* The model is known: before anything was observed in the histograms of tokens. */
void metrics_set_context(struct metrics *metrics, uint32_t max_model_len);
void metrics_answer(struct metrics *metrics, uint32_t route, int status);

/* Everything the page says beside the counters. */
struct metrics_view {
    const char *model_name, *version, *backend, *architecture, *kv_dtype;
    const char *const *route_names; /* [n_routes + 1]; the last is for paths without a route */
    uint32_t n_routes;
    bool ready, vllm_names, prefix_cache;
    uint32_t running, waiting; /* choices, as clients see them */
    uint32_t connections;
    uint32_t block_tokens;
    uint64_t parameters;
    struct engine_stats engine; /* zero while loading */
    double start_time;          /* unix seconds */
};
void metrics_page(struct buffer *out, const struct metrics *metrics, const struct metrics_view *view);
