/* Conversions of 16-bit floats for the stand-ins of the toolkit's headers. */
#pragma once

#include <cuda_runtime.h>

static inline float host_half_to_float(uint16_t half) {
    /* The exponent's bias differs by 112, which a multiplication adds, subnormals included. */
    const float size = host_bits<float>((uint32_t)(half & 0x7fff) << 13) * 0x1p112f;
    const uint32_t special = (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    return host_bits<float>(host_bits<uint32_t>(size) | special | (uint32_t)(half & 0x8000) << 16);
}

/* To the nearest, ties to even; beyond the range infinite. */
static inline uint16_t host_half_from(double x) {
    const uint64_t bits = host_bits<uint64_t>(x);
    const uint16_t sign = (uint16_t)(bits >> 48 & 0x8000);
    const int exponent = (int)(bits >> 52 & 2047) - 1023;
    if (x != x) return 0x7fff;
    if (exponent > 15) return (uint16_t)(sign | 0x7c00);
    if (exponent < -25) return sign;
    /* In units of the last place: 2^(exponent - 10), of subnormals 2^-24. */
    const int unit = exponent < -14 ? -24 : exponent - 10;
    const uint64_t mantissa = (bits & 0xfffffffffffffull) | 0x10000000000000ull;
    const int dropped = 52 - exponent + unit;
    const uint64_t kept = mantissa >> dropped, rest = mantissa & ((1ull << dropped) - 1), half = 1ull << (dropped - 1);
    const uint64_t rounded = kept + (rest > half || (rest == half && (kept & 1)));
    return (uint16_t)(sign | (exponent < -14 ? rounded : ((uint64_t)(exponent + 15) << 10) + (rounded - 1024)));
}

/* a + b with an odd last bit where it is not exact: rounding it once more gives what rounding the exact sum would. */
static inline double host_sum_to_odd(double a, double b) {
    const double sum = a + b, of_b = sum - a, error = (a - (sum - of_b)) + (b - of_b);
    uint64_t bits = host_bits<uint64_t>(sum);
    if (error == 0 || error != error || (bits & 1)) return sum;
    bits += (error > 0) == (sum > 0) ? 1 : -1;
    return host_bits<double>(bits);
}
