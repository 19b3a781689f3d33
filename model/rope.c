/* Rotary frequencies from a model's parameters. Pure; in double, because position x frequency is taken modulo a turn far from zero. */
#include <math.h>

#include "model/architecture.h"

/* The (fractional) index of the dimension pair that makes `turns` turns within the original context. */
static double dimension_of_turns(const struct rope_parameters *rope, double turns) {
    return rope->dims * log(rope->original_context / (turns * 2 * M_PI)) / (2 * log(rope->base));
}

/* How much of the unscaled frequency pair `i` keeps: 1 for fast pairs (many turns in the original context), 0 for slow ones. */
static double yarn_keep(const struct rope_parameters *rope, uint32_t i) {
    double first = fmax(0, floor(dimension_of_turns(rope, rope->beta_fast)));
    double last = fmin(rope->dims - 1, ceil(dimension_of_turns(rope, rope->beta_slow)));
    double ramp = (i - first) / fmax(0.001, last - first);
    return 1 - fmin(1, fmax(0, ramp));
}

void rope_frequencies(const struct rope_parameters *rope, const float *factors, double *frequency, float *magnitude) {
    for (uint32_t i = 0; i < rope->dims / 2; i++) {
        double unscaled = pow(rope->base, -2.0 * i / rope->dims);
        if (factors) unscaled /= (double)factors[i];
        double keep = rope->scaling == ROPE_SCALING_YARN ? yarn_keep(rope, i) : 0;
        frequency[i] = unscaled * keep + unscaled / rope->factor * (1 - keep);
    }
    *magnitude = (float)(rope->magnitude * (rope->scaling == ROPE_SCALING_YARN ? 1 + 0.1 * log(rope->factor) : 1));
}
