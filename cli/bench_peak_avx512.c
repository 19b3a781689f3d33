/* The most multiply-adds a core does with vpdpbusd on unsigned x signed bytes. See bench.h. Any thread of a CPU that has it. */
#include <immintrin.h>

#include "cli/bench.h"

double bench_peak_avx512(uint64_t rounds) {
    enum { CHAINS = 12 }; /* more than latency x throughput */
    __m512i sums[CHAINS], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
    for (int j = 0; j < CHAINS; j++) sums[j] = _mm512_setzero_si512();
    for (uint64_t i = 0; i < rounds; i++) {
        __asm__ volatile("" : "+v"(a), "+v"(b)); /* new numbers as far as the compiler knows: nothing may leave the loop */
#pragma GCC unroll 12
        for (int j = 0; j < CHAINS; j++) sums[j] = _mm512_dpbusd_epi32(sums[j], a, b);
    }
    for (int j = 0; j < CHAINS; j++) __asm__ volatile("" ::"v"(sums[j]));
    return (double)rounds * CHAINS * 64;
}
