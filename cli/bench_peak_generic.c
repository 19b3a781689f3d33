/* The most multiply-adds a core does on what every x86-64 has: f32 multiply and add. See bench.h. Any thread. */
#include "cli/bench.h"

typedef float lanes __attribute__((vector_size(16)));

double bench_peak_generic(uint64_t rounds) {
    lanes sums[8] = {{0}};
    lanes a = {1.0f, 0.5f, 0.25f, 0.125f}, b = {0x1p-20f, 0x1p-21f, 0x1p-22f, 0x1p-23f};
    for (uint64_t i = 0; i < rounds; i++) {
        __asm__ volatile("" : "+x"(a), "+x"(b)); /* new numbers as far as the compiler knows: nothing may leave the loop */
        for (int j = 0; j < 8; j++) sums[j] += a * b;
    }
    for (int j = 0; j < 8; j++) __asm__ volatile("" ::"x"(sums[j]));
    return (double)rounds * 8 * 4;
}
