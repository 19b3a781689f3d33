/* The oracle of scores: one lane, plain arrays, double precision, as the formulas of score.h read. Owns nothing; any thread. Deliberately slow. */
#include "kernels/score.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "kernels/program.h"

static double dot(const float *a, const float *b, uint32_t n) {
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

/* p of one row over the slots it sees, the first `visible` ones; returns how many. */
static uint32_t row_attention(const struct program *program, const struct score_lane *lane, const float *q, int32_t position, double *p) {
    uint32_t visible = 0;
    while (visible < lane->n_slots && lane->positions[visible] <= position) visible++;
    double max = -INFINITY, sum = 0;
    for (uint32_t s = 0; s < visible; s++) {
        p[s] = dot(q, lane->k + (size_t)s * program->head_dim, program->head_dim) * (double)program->attention_scale;
        if (p[s] > max) max = p[s];
    }
    for (uint32_t s = 0; s < visible; s++) sum += p[s] = exp(p[s] - max);
    for (uint32_t s = 0; s < visible; s++) p[s] /= sum;
    return visible;
}

static void score_window(const struct program *program, enum score_kind kind, const struct score_lane *lane, float *scores) {
    uint32_t group = program->n_heads / program->n_kv_heads, d = program->head_dim;
    double *p = check_calloc(lane->n_slots + 1, sizeof *p), *total = check_calloc(lane->n_slots + 1, sizeof *total);
    for (uint32_t h = 0; h < group; h++) {
        memset(total, 0, lane->n_slots * sizeof *total);
        for (uint32_t r = 0; r < lane->n_window; r++) {
            int32_t position = lane->last_position - (int32_t)(lane->n_window - 1 - r);
            uint32_t visible = row_attention(program, lane, lane->q + ((size_t)r * group + h) * d, position, p);
            for (uint32_t s = 0; s < visible; s++) {
                if (kind == SCORE_ATTENTION) total[s] += p[s];
                if (kind == SCORE_SQUARES) total[s] += p[s] * p[s];
                if (kind == SCORE_PERSISTENCE) total[s] += p[s] > 0 && p[s] * visible >= 1;
            }
        }
        for (uint32_t s = 0; s < lane->n_slots; s++) scores[(size_t)h * lane->n_slots + s] = (float)total[s];
    }
    free(p);
    free(total);
}

/* Rotates the leading rope_dims of x by a complex factor a pair: (x + iy)(c + is). */
static void rotate(const struct program *program, const double *cosine, const double *sine, double *x) {
    uint32_t half = program->rope_dims / 2;
    for (uint32_t i = 0; i < half; i++) {
        uint32_t a = program->rope_pairs == ROPE_PAIRS_ADJACENT ? 2 * i : i, b = program->rope_pairs == ROPE_PAIRS_ADJACENT ? 2 * i + 1 : i + half;
        double re = x[a] * cosine[i] - x[b] * sine[i], im = x[a] * sine[i] + x[b] * cosine[i];
        x[a] = re;
        x[b] = im;
    }
}

/* From the rotation at `position` to the mean one over the positions ahead: one factor a pair. The magnitude stays in q as it was. */
static void mean_rotation(const struct program *program, const struct score_lane *lane, int32_t position, double *cosine, double *sine) {
    for (uint32_t i = 0; i < program->rope_dims / 2; i++) {
        cosine[i] = sine[i] = 0;
        for (uint32_t j = 1; j <= lane->ahead; j++) {
            double angle = program->rope_frequency[i] * ((double)lane->last_position + j - position);
            cosine[i] += cos(angle) / lane->ahead;
            sine[i] += sin(angle) / lane->ahead;
        }
    }
}

static void softmax(double *x, uint32_t n) {
    double max = -INFINITY, sum = 0;
    for (uint32_t i = 0; i < n; i++) max = x[i] > max ? x[i] : max;
    for (uint32_t i = 0; i < n; i++) sum += x[i] = exp(x[i] - max);
    for (uint32_t i = 0; i < n; i++) x[i] /= sum;
}

static double dot_mixed(const double *a, const float *b, uint32_t n) {
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) sum += a[i] * (double)b[i];
    return sum;
}

static void score_expected(const struct program *program, const struct score_lane *lane, float *scores) {
    uint32_t group = program->n_heads / program->n_kv_heads, d = program->head_dim, n = lane->n_slots, w = lane->n_window;
    double *cosine = check_calloc(d, sizeof *cosine), *sine = check_calloc(d, sizeof *sine);
    double *rows = check_calloc((size_t)w * d + 1, sizeof *rows), *mean = check_calloc(d, sizeof *mean), *x = check_calloc(n + 1, sizeof *x);
    double scale = (double)program->attention_scale;
    for (uint32_t h = 0; h < group; h++) {
        memset(mean, 0, d * sizeof *mean);
        for (uint32_t r = 0; r < w; r++) {
            double *row = rows + (size_t)r * d;
            for (uint32_t i = 0; i < d; i++) row[i] = (double)lane->q[((size_t)r * group + h) * d + i];
            mean_rotation(program, lane, lane->last_position - (int32_t)(w - 1 - r), cosine, sine);
            rotate(program, cosine, sine, row);
            for (uint32_t i = 0; i < d; i++) mean[i] += row[i] / w;
        }
        for (uint32_t r = 0; r < w; r++)
            for (uint32_t i = 0; i < d; i++) rows[(size_t)r * d + i] -= mean[i];
        for (uint32_t s = 0; s < n; s++) {
            const float *k = lane->k + (size_t)s * d;
            double variance = 0;
            for (uint32_t r = 0; r < w; r++) {
                double z = dot_mixed(rows + (size_t)r * d, k, d);
                variance += z * z / w;
            }
            x[s] = dot_mixed(mean, k, d) * scale + variance * scale * scale / 2;
        }
        softmax(x, n);
        for (uint32_t s = 0; s < n; s++) scores[(size_t)h * n + s] = (float)x[s];
    }
    free(cosine);
    free(sine);
    free(rows);
    free(mean);
    free(x);
}

static void score_keydiff(const struct program *program, const struct score_lane *lane, float *scores) {
    uint32_t d = program->head_dim;
    double *mean = check_calloc(d, sizeof *mean), norm_of_mean = 0;
    for (uint32_t s = 0; s < lane->n_slots; s++) {
        const float *k = lane->k + (size_t)s * d;
        double norm = sqrt(dot(k, k, d));
        for (uint32_t i = 0; norm > 0 && i < d; i++) mean[i] += (double)k[i] / norm / lane->n_slots;
    }
    for (uint32_t i = 0; i < d; i++) norm_of_mean += mean[i] * mean[i];
    norm_of_mean = sqrt(norm_of_mean);
    for (uint32_t s = 0; s < lane->n_slots; s++) {
        const float *k = lane->k + (size_t)s * d;
        double length = sqrt(dot(k, k, d)) * norm_of_mean;
        scores[s] = length > 0 ? (float)(-dot_mixed(mean, k, d) / length) : 0;
    }
    free(mean);
}

void score_lane(const struct program *program, enum score_kind kind, const struct score_lane *lane, float *scores) {
    switch (kind) {
    case SCORE_ATTENTION:
    case SCORE_SQUARES:
    case SCORE_PERSISTENCE: score_window(program, kind, lane, scores); return;
    case SCORE_EXPECTED: score_expected(program, lane, scores); return;
    case SCORE_KEYDIFF: score_keydiff(program, lane, scores); return;
    case SCORE_ACCUMULATED:
        for (uint32_t s = 0; s < lane->n_slots; s++) scores[s] = (float)((double)lane->accumulated[s] / SCORE_ACCUMULATED_ONE);
        return;
    case SCORE_VALUE_NORM:
        for (uint32_t s = 0; s < lane->n_slots; s++) {
            const float *v = lane->v + (size_t)s * program->head_dim;
            scores[s] = (float)sqrt(dot(v, v, program->head_dim));
        }
        return;
    case SCORE_KINDS: break;
    }
    CHECK(!"a score kind");
}
