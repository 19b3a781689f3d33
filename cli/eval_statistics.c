/* Numbers of eval that need no model: quantiles, the paired bootstrap, and the comparison of two distributions of the next token. See eval.h. Any thread. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "cli/eval.h"

static int ascending(const void *a, const void *b) {
    const double *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

double eval_quantile(double *values, size_t n, double p) {
    CHECK(n > 0 && p >= 0 && p <= 1);
    qsort(values, n, sizeof *values, ascending);
    double rank = ceil(p * (double)n);
    return values[rank < 1 ? 0 : rank > (double)n ? n - 1 : (size_t)rank - 1];
}

double eval_mean(const double *values, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += values[i];
    return n ? sum / (double)n : 0;
}

struct eval_interval eval_bootstrap(const double *a, const double *b, size_t n, uint32_t resamples, uint64_t seed) {
    CHECK(n > 0 && n <= UINT32_MAX && resamples > 0);
    double *difference = check_calloc(n, sizeof *difference), *means = check_calloc(resamples, sizeof *means);
    for (size_t i = 0; i < n; i++) difference[i] = a[i] - b[i];
    struct random random = {.state = seed};
    for (uint32_t r = 0; r < resamples; r++) {
        double sum = 0;
        for (size_t i = 0; i < n; i++) sum += difference[random_below(&random, (uint32_t)n)];
        means[r] = sum / (double)n;
    }
    struct eval_interval interval = {
        .mean = eval_mean(difference, n), .low = eval_quantile(means, resamples, 0.025), .high = eval_quantile(means, resamples, 0.975)};
    free(difference);
    free(means);
    return interval;
}

/* ---- distributions ---- */

void eval_reference_init(struct eval_reference *reference, uint32_t n_rows, uint32_t n_vocab) {
    size_t n = n_rows;
    *reference = (struct eval_reference){.n_rows = n_rows, .n_vocab = n_vocab};
    reference->logits = check_calloc(n * n_vocab, sizeof *reference->logits);
    reference->p = check_calloc(n * n_vocab, sizeof *reference->p);
    reference->log_z = check_calloc(n, sizeof *reference->log_z);
    reference->top = check_calloc(n, sizeof *reference->top);
    reference->nll = check_calloc(n, sizeof *reference->nll);
}

void eval_reference_done(struct eval_reference *reference) {
    free(reference->logits);
    free(reference->p);
    free(reference->log_z);
    free(reference->top);
    free(reference->nll);
}

/* log sum exp; *top: the first of the highest. */
static double log_sum(const float *logits, uint32_t n, int32_t *top) {
    uint32_t best = 0;
    for (uint32_t i = 1; i < n; i++)
        if (logits[i] > logits[best]) best = i;
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) sum += (double)expf(logits[i] - logits[best]);
    *top = (int32_t)best;
    return (double)logits[best] + log(sum);
}

void eval_reference_set(struct eval_reference *reference, const int32_t *targets) {
    for (uint32_t row = 0; row < reference->n_rows; row++) {
        const float *logits = reference->logits + (size_t)row * reference->n_vocab;
        float *p = reference->p + (size_t)row * reference->n_vocab, log_z;
        reference->log_z[row] = log_sum(logits, reference->n_vocab, &reference->top[row]);
        log_z = (float)reference->log_z[row];
        for (uint32_t i = 0; i < reference->n_vocab; i++) p[i] = expf(logits[i] - log_z);
        reference->nll[row] = reference->log_z[row] - (double)logits[targets[row]];
    }
}

struct eval_row eval_compare(const struct eval_reference *reference, uint32_t row, const float *logits, int32_t target) {
    const float *full = reference->logits + (size_t)row * reference->n_vocab, *p = reference->p + (size_t)row * reference->n_vocab;
    int32_t top;
    double log_z = log_sum(logits, reference->n_vocab, &top);
    /* sum p (log p - log q) with log p = full - log Zp, log q = logits - log Zq. p is rounded to float: the constant part is taken out of the sum, so that the error of its mass
     * is not multiplied by it. */
    double shift = log_z - reference->log_z[row], sum = 0;
    for (uint32_t i = 0; i < reference->n_vocab; i++) sum += (double)p[i] * ((double)full[i] - (double)logits[i] + shift);
    return (struct eval_row){.kl = sum > 0 ? sum : 0, .nll = log_z - (double)logits[target], .same_top = top == reference->top[row]};
}
