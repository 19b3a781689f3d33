/* From logits to a token (sample.h), for every backend that samples on the host. Pure: no state, no allocation, any thread with its own scratch.
 *
 * top_k, top_p, min_p and the draw itself all keep a prefix of the tokens in descending order, so one function serves three of them: the shortest prefix whose
 * weight (a count or probability mass) reaches a target. It finds the crossing by radix selection over the distance to the best logit and sorts only the few that
 * share the crossing's bits. Probability mass is an integer (2^40 for the best token): sums are exact, so the result does not depend on the order of summation.
 *
 * exp is computed here, not by libm: libm's answers differ between versions and processors, and a seed must mean the same token everywhere. */
#include "kernels/sample.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "base/check.h"
#include "base/half.h"
#include "base/random.h"

#define DIGITS 2048 /* of a radix selection over the bits of a float: 11, then 10, then 10 bits */
#define SORT_MAX 64

struct candidate {
    float x; /* (adjusted logit - the best one) / temperature: <= 0 */
    float e; /* exp(x) */
    int32_t token;
};

/* Candidates, and the raw logits kept for the logprob of what is drawn. */
size_t sampler_scratch_floats(uint32_t n_vocab) { return (size_t)n_vocab * (sizeof(struct candidate) / sizeof(float) + 1); }

/* NaN is no candidate, and an overflow is the best one, but a number. */
static float clean(float x) {
    if (!(x <= FLT_MAX)) return x > FLT_MAX ? FLT_MAX : -INFINITY;
    return x;
}

/* exp(x) for x <= 0, within 2 units in the last place down to 2^-126, then 0. Cody-Waite reduction by ln 2 in two parts, Taylor to the seventh power on |r| <= 0.35. */
static float exp_negative(float x) {
    if (!(x > -87.0f)) return 0;
    float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the integer lies in the low bits */
    float n = shifted - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1;
    p = p * r + 1;
    return p * float_from_bits((uint32_t)((int32_t)n + 127) << 23);
}

static uint64_t mass(float e) { return (uint64_t)(e * 0x1p40f); }

/* Returns the best value; -INFINITY: there is none. */
static float clean_all(float *logits, uint32_t n) {
    float best = -INFINITY;
    bool finite = false;
    for (uint32_t i = 0; i < n; i++) {
        finite |= isfinite(logits[i]) != 0;
        logits[i] = clean(logits[i]);
        best = logits[i] > best ? logits[i] : best;
    }
    return finite ? best : -INFINITY;
}

/* log of the sum of exp(logit), relative to `best`. Four sums, so that additions overlap; always the same four. */
static double log_sum(const float *logits, uint32_t n, float best) {
    double sum[4] = {0};
    uint32_t i = 0;
    for (; i + 4 <= n; i += 4)
        for (uint32_t j = 0; j < 4; j++) sum[j] += (double)exp_negative(logits[i + j] - best);
    for (; i < n; i++) sum[i % 4] += (double)exp_negative(logits[i] - best);
    return log((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

static float logprob_of(float logit, float best, double log_total) { return (float)((double)logit - (double)best - log_total); }

static void report_top(const float *logits, uint32_t n, float best, double log_total, int32_t want, struct sample_result *result) {
    int32_t count = 0;
    float logit[SAMPLE_TOP_MAX];
    for (uint32_t i = 0; i < n; i++) {
        if (logits[i] == -INFINITY || (count == want && !(logits[i] > logit[count - 1]))) continue;
        int32_t at = count < want ? count++ : count - 1;
        for (; at > 0 && logits[i] > logit[at - 1]; at--) {
            logit[at] = logit[at - 1];
            result->top[at] = result->top[at - 1];
        }
        logit[at] = logits[i];
        result->top[at].token = (int32_t)i;
    }
    for (int32_t i = 0; i < count; i++) result->top[i].logprob = logprob_of(logit[i], best, log_total);
    result->n_top = count;
}

/* Presence, frequency and repetition: each token once, however often it occurs. marks[token] = generated occurrences * 2 + occurs at all. */
static void penalize(const struct sample *sample, float *logits, uint32_t n, uint32_t *marks) {
    const struct sampling *s = sample->sampling;
    if (!sampling_penalizes(s)) return;
    memset(marks, 0, n * sizeof *marks);
    for (uint32_t i = 0; i < sample->n_history; i++) {
        uint32_t token = (uint32_t)sample->history[i];
        if (token < n) marks[token] = (marks[token] | 1) + (i >= sample->n_prompt ? 2 : 0);
    }
    for (uint32_t i = 0; i < sample->n_history; i++) {
        uint32_t token = (uint32_t)sample->history[i];
        if (token >= n || marks[token] == 0) continue;
        float x = logits[token];
        x = x > 0 ? x / s->repetition_penalty : x * s->repetition_penalty;
        uint32_t generated = marks[token] / 2;
        if (generated > 0) {
            x -= s->presence_penalty;
            x -= s->frequency_penalty * (float)generated;
        }
        logits[token] = clean(x);
        marks[token] = 0;
    }
}

static void adjust(const struct sample *sample, float *logits, uint32_t n, uint32_t *marks) {
    const struct sampling *s = sample->sampling;
    for (uint32_t i = 0; i < s->n_bias; i++)
        if ((uint32_t)s->bias[i].token < n) logits[s->bias[i].token] = clean(logits[s->bias[i].token] + s->bias[i].bias);
    for (uint32_t i = 0; sample->ban && i < s->n_banned; i++)
        if ((uint32_t)s->banned[i] < n) logits[s->banned[i]] = -INFINITY;
    penalize(sample, logits, n, marks);
}

/* The order of everything here: higher first, then the lower token. */
static bool before(const struct candidate *a, const struct candidate *b) { return a->x != b->x ? a->x > b->x : a->token < b->token; }

static void sift_down(struct candidate *c, uint32_t at, uint32_t n) {
    struct candidate moved = c[at];
    for (;;) {
        uint32_t child = 2 * at + 1;
        if (child >= n) break;
        if (child + 1 < n && before(&c[child], &c[child + 1])) child++;
        if (!before(&moved, &c[child])) break;
        c[at] = c[child];
        at = child;
    }
    c[at] = moved;
}

/* Heap sort: no allocation, and no input makes it slow. */
static void sort(struct candidate *c, uint32_t n) {
    for (uint32_t i = n / 2; i-- > 0;) sift_down(c, i, n);
    for (uint32_t i = n; i-- > 1;) {
        struct candidate last = c[i];
        c[i] = c[0];
        c[0] = last;
        sift_down(c, 0, i);
    }
}

static uint64_t weight_of(const struct candidate *c, bool by_mass) { return by_mass ? mass(c->e) : 1; }

/* Ascending with the distance to the best: the bits of a float that is not negative order as the float does. */
static uint32_t digit_of(const struct candidate *c, int shift) { return float_bits(fabsf(c->x)) >> shift & (DIGITS - 1); }

/* Keeps the shortest prefix (in descending order) whose weight is at least `target`, or all if nothing is. Returns its length, > 0 if n > 0. The last of the
 * prefix is left at its end; the others in no order. */
static uint32_t keep_prefix(struct candidate *c, uint32_t n, uint64_t target, bool by_mass) {
    uint64_t reached = 0;
    uint32_t first = 0, end = n; /* [0, first) belong to the prefix and weigh `reached`; it ends within [first, end) */
    for (int shift = 20; shift >= 0 && end - first > SORT_MAX; shift -= 10) {
        uint64_t weight[DIGITS] = {0};
        for (uint32_t i = first; i < end; i++) weight[digit_of(&c[i], shift)] += weight_of(&c[i], by_mass);
        uint32_t crossing = 0;
        while (crossing < DIGITS - 1 && reached + weight[crossing] < target) reached += weight[crossing++];
        uint32_t kept = first;
        for (uint32_t i = first; i < end; i++)
            if (digit_of(&c[i], shift) <= crossing) c[kept++] = c[i];
        end = kept;
        for (uint32_t i = first; i < end; i++)
            if (digit_of(&c[i], shift) < crossing) {
                struct candidate swapped = c[first];
                c[first++] = c[i];
                c[i] = swapped;
            }
    }
    sort(c + first, end - first);
    while (first < end && reached < target) reached += weight_of(&c[first++], by_mass);
    return first > 0 ? first : 1;
}

static uint64_t total_mass(const struct candidate *c, uint32_t n) {
    uint64_t total = 0;
    for (uint32_t i = 0; i < n; i++) total += mass(c[i].e);
    return total;
}

static uint32_t gather(const float *logits, uint32_t n, float best, float temperature, struct candidate *c) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < n; i++) {
        float x = (logits[i] - best) / temperature;
        c[count] = (struct candidate){.x = x, .token = (int32_t)i};
        count += x > -87.0f; /* below, the mass is 0 and nothing here can see it */
    }
    return count;
}

static int32_t draw(const struct sample *sample, const float *logits, uint32_t n_vocab, float best, struct candidate *c) {
    const struct sampling *s = sample->sampling;
    uint32_t n = gather(logits, n_vocab, best, s->temperature, c);
    if (s->top_k > 0 && (uint32_t)s->top_k < n) n = keep_prefix(c, n, (uint32_t)s->top_k, false);
    for (uint32_t i = 0; i < n; i++) c[i].e = exp_negative(c[i].x);
    if (s->top_p < 1) n = keep_prefix(c, n, (uint64_t)ceil((double)s->top_p * (double)total_mass(c, n)), true);
    if (s->min_p > 0) {
        uint32_t kept = 0;
        for (uint32_t i = 0; i < n; i++)
            if (c[i].e >= s->min_p) c[kept++] = c[i];
        n = kept; /* the best has e = 1 */
    }
    float u = random_unit(random_at(sample->sampling->seed, 0, sample->choice, sample->token_index));
    uint64_t drawn = (uint64_t)(((unsigned __int128)total_mass(c, n) * (uint64_t)(u * 0x1p24f)) >> 24);
    return c[keep_prefix(c, n, drawn + 1, true) - 1].token;
}

static uint32_t first_at(const float *logits, float value) {
    uint32_t i = 0;
    while (logits[i] != value) i++;
    return i;
}

void sampler_sample(const struct sample *sample, float *logits, uint32_t n_vocab, float *scratch, struct sample_result *result) {
    const struct sampling *s = sample->sampling;
    CHECK(n_vocab > 0 && n_vocab < 1u << 23 && s->n_top <= SAMPLE_TOP_MAX && sample->target < (int64_t)n_vocab);
    struct candidate *candidates = (struct candidate *)(void *)scratch;
    float *raw = scratch + (size_t)n_vocab * (sizeof(struct candidate) / sizeof(float));
    *result = (struct sample_result){.token = sample->target >= 0 ? sample->target : 0};

    bool report = s->n_top >= 0 || sample->target >= 0;
    float best_raw = clean_all(logits, n_vocab);
    double log_total = 0;
    if (report) result->logprob = -INFINITY;
    if (best_raw == -INFINITY) {
        result->logprob = -INFINITY;
        return;
    }
    if (report) {
        log_total = log_sum(logits, n_vocab, best_raw);
        if (s->n_top > 0) report_top(logits, n_vocab, best_raw, log_total, s->n_top, result);
        memcpy(raw, logits, n_vocab * sizeof *raw);
    }
    if (sample->target < 0) {
        adjust(sample, logits, n_vocab, (uint32_t *)(void *)scratch);
        float best = -INFINITY;
        for (uint32_t i = 0; i < n_vocab; i++) best = logits[i] > best ? logits[i] : best;
        if (best == -INFINITY) {
            result->logprob = -INFINITY;
            return;
        }
        if (s->temperature == 0)
            result->token = (int32_t)first_at(logits, best);
        else
            result->token = draw(sample, logits, n_vocab, best, candidates);
    }
    if (report) result->logprob = logprob_of(raw[result->token], best_raw, log_total);
}
