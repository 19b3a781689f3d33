/* The most multiply-adds a core does with vpmaddubsw, vpmaddwd and vpaddd on unsigned x signed bytes. See bench.h. Any thread of a CPU that has it. */
#include <immintrin.h>

#include "cli/bench.h"

double bench_peak_avx2(uint64_t rounds) {
    enum { CHAINS = 12 }; /* more than latency x throughput */
    __m256i sums[CHAINS], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
    for (int j = 0; j < CHAINS; j++) sums[j] = _mm256_setzero_si256();
    for (uint64_t i = 0; i < rounds; i++) {
        __asm__ volatile("" : "+x"(a), "+x"(b)); /* new numbers as far as the compiler knows: nothing may leave the loop */
#pragma GCC unroll 12
        for (int j = 0; j < CHAINS; j++) sums[j] = _mm256_add_epi32(sums[j], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), a));
    }
    for (int j = 0; j < CHAINS; j++) __asm__ volatile("" ::"x"(sums[j]));
    return (double)rounds * CHAINS * 32;
}
