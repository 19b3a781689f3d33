/* See metrics.h. Counting; metrics_page.c does the writing. */
#include "server/metrics.h"

#include <string.h>

/* vLLM's buckets, so that existing dashboards' quantiles stay comparable. */
static const double first_token[] = {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560};
static const double between_tokens[] = {.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80};
static const double latency[] = {.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
static const double candidates[] = {1, 2, 5, 10, 20};

#define BOUNDS(list) .bounds = (list), .n_bounds = sizeof(list) / sizeof *(list)

static const int codes[METRIC_CODES] = {200, 204, 400, 401, 403, 404, 405, 408, 413, 414, 429, 431, 499, 500, 501, 503, 504, 0};

void metrics_init(struct metrics *metrics) {
    *metrics = (struct metrics){.histograms = {
                                    [METRIC_TIME_TO_FIRST_TOKEN] = {BOUNDS(first_token)},
                                    [METRIC_INTER_TOKEN] = {BOUNDS(between_tokens)},
                                    [METRIC_END_TO_END] = {BOUNDS(latency)},
                                    [METRIC_QUEUE] = {BOUNDS(latency)},
                                    [METRIC_PREFILL] = {BOUNDS(latency)},
                                    [METRIC_DECODE] = {BOUNDS(latency)},
                                    [METRIC_INFERENCE] = {BOUNDS(latency)},
                                    [METRIC_N] = {BOUNDS(candidates)},
                                }};
}

void metrics_set_context(struct metrics *metrics, uint32_t max_model_len) {
    uint32_t n = 0;
    for (double decade = 1; n + 3 <= HISTOGRAM_BUCKETS_MAX && decade <= max_model_len; decade *= 10)
        for (int i = 0; i < 3; i++) {
            double bound = decade * (i == 0 ? 1 : i == 1 ? 2 : 5);
            if (bound <= max_model_len) metrics->bounds[n++] = bound;
        }
    for (int h = METRIC_PROMPT_TOKENS; h <= METRIC_MAX_TOKENS; h++) {
        metrics->histograms[h].bounds = metrics->bounds;
        metrics->histograms[h].n_bounds = n;
    }
}

void histogram_observe(struct histogram *histogram, double value) {
    uint32_t i = 0;
    while (i < histogram->n_bounds && value > histogram->bounds[i]) i++;
    histogram->counts[i]++;
    histogram->sum += value;
}

void metrics_answer(struct metrics *metrics, uint32_t route, int status) {
    uint32_t code = 0;
    while (codes[code] && codes[code] != status) code++;
    if (route >= METRIC_ROUTES) route = METRIC_ROUTES - 1;
    metrics->answers[route][code]++;
}

int metrics_code(uint32_t index); /* metrics_page.c */
int metrics_code(uint32_t index) { return codes[index]; }
