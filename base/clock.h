/* Monotonic time. The scheduler never reads it: time is an argument there. Kernels read it only to say how long phases took, when asked. */
#pragma once

#include <stdint.h>
#include <time.h>

static inline uint64_t clock_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}
