/* Stands in for the toolkit's header on the host: 16-bit floats, each operation rounded once, to even, as device code's are. */
#pragma once

#include "tests/host_device/half.h"

struct __half {
    uint16_t bits;
};
struct __align__(4) __half2 {
    __half x, y;
};

static inline float __half2float(__half h) { return host_half_to_float(h.bits); }
static inline __half __float2half_rn(float x) { return {host_half_from(x)}; }
static inline __half __float2half(float x) { return __float2half_rn(x); }
static inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
static inline unsigned short __half_as_ushort(__half h) { return h.bits; }

static inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
static inline __half2 __half2half2(__half x) { return {x, x}; }
static inline __half2 __low2half2(__half2 h) { return {h.x, h.x}; }
static inline __half2 __high2half2(__half2 h) { return {h.y, h.y}; }
static inline __half __low2half(__half2 h) { return h.x; }
static inline __half __high2half(__half2 h) { return h.y; }
static inline float __low2float(__half2 h) { return __half2float(h.x); }
static inline float __high2float(__half2 h) { return __half2float(h.y); }
static inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
static inline __half2 __float2half2_rn(float x) { return __floats2half2_rn(x, x); }
static inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }

/* Sums, differences and products of two are exact in double, and so are rounded once. */
static inline __half __hadd(__half a, __half b) { return {host_half_from((double)__half2float(a) + (double)__half2float(b))}; }
static inline __half __hsub(__half a, __half b) { return {host_half_from((double)__half2float(a) - (double)__half2float(b))}; }
static inline __half __hmul(__half a, __half b) { return {host_half_from((double)__half2float(a) * (double)__half2float(b))}; }
static inline __half __hfma(__half a, __half b, __half c) {
    return {host_half_from(host_sum_to_odd((double)__half2float(a) * (double)__half2float(b), (double)__half2float(c)))};
}
/* A NaN gives way to a number. */
static inline __half __hmin(__half a, __half b) { return __half2float(a) <= __half2float(b) || __half2float(b) != __half2float(b) ? a : b; }
static inline __half2 __hadd2(__half2 a, __half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
static inline __half2 __hsub2(__half2 a, __half2 b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }
static inline __half2 __hmul2(__half2 a, __half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
static inline __half2 __hmin2(__half2 a, __half2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }
static inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
