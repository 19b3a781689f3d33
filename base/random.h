/* Random numbers as a function of counters: the same key gives the same number on every machine, thread and batch (design: the row contract).
 * Formula: splitmix64's finaliser (Steele, Lea, Flood 2014) applied to a chain of the words. */
#pragma once

#include <stdint.h>

static inline uint64_t random_mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

/* A 64-bit number for (seed, prompt hash or 0, choice, token index). */
static inline uint64_t random_at(uint64_t seed, uint64_t a, uint64_t b, uint64_t c) {
    return random_mix(random_mix(random_mix(random_mix(seed) ^ a) ^ b) ^ c);
}

/* Uniform in [0, 1), 24 bits: exact in float. */
static inline float random_unit(uint64_t bits) { return (float)(bits >> 40) * 0x1p-24f; }

/* A sequential generator for tests and simulations. */
struct random {
    uint64_t state;
};
static inline uint64_t random_next(struct random *random) {
    random->state += 0x9e3779b97f4a7c15ull;
    return random_mix(random->state);
}
/* Uniform in [0, n), n > 0 (bias below 2^-32 for n < 2^32). */
static inline uint32_t random_below(struct random *random, uint32_t n) { return (uint32_t)(((random_next(random) >> 32) * n) >> 32); }
