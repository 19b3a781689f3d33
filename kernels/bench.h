/* Micro-benchmarks of the phases of a backend, for `kvasir bench --phases`: each beside a ceiling that was measured in the same run, since a machine's
 * bandwidth and clock drift. One thread (the caller's); a backend's own workers take part. Nothing else should run meanwhile. */
#pragma once

#include "kernels/backend.h"

struct bench_phase {
    char name[64];       /* "Q4_1 1536x576, 8 rows" */
    double seconds;      /* of one sweep, the median; of a ceiling the best */
    double gmac_s, gb_s; /* multiply-adds of the weights or cache; bytes read of them */
    double percent;      /* of `ceiling` */
    const char *ceiling; /* which one bounds it: "int8 products", "read bandwidth" */
};

/* Measures every different matrix of the program at 1, 8, 32 and 192 rows, over as many layers as the step would walk. `backend`: prepared by cpu.
 * Returns the number of lines written (<= max): first the ceilings themselves. */
uint32_t cpu_bench_phases(struct backend *backend, struct bench_phase *lines, uint32_t max);
