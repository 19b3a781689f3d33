/* How the host device behaves, from the environment: KVASIR_HOST_DEVICE="word word ...".
 *   ascending descending random lockstep   which of the threads that can run does: the lowest, the highest, any, or all in turn. Blocks begin in the same order
 *   seed=N                                 of random
 *   7.5 8.0 8.6 8.9                        the compute capability: before 9.0 no clusters, and less shared memory. Else 9.0
 *   for=80 for=90                          the program's kernels were compiled for that alone, and newer devices run what that made of them. Else for 8.0 and for 9.0
 *   second                                 the device is the second of two; the first has no memory left, not even for a context
 *   first=7.5                              that first one is of this compute capability
 *   eager                                  what is put on a stream is done at once; else as late as waiting for it allows
 *   idle                                   kernels and products are not run, and all else is done at once: what the host does is all that takes time (tests/bench/host-cost) */
#pragma once

#include <stdint.h>

enum host_order { ORDER_ASCENDING, ORDER_DESCENDING, ORDER_RANDOM, ORDER_LOCKSTEP };
struct host_options {
    enum host_order order;
    uint64_t seed;
    uint32_t capability, first, compiled_for; /* first: 0: the same; compiled_for: 0: for both */
    bool eager, idle, second;
};
const struct host_options *host_options(void);
