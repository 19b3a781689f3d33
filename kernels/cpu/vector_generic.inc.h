/* Vectors of 4 lanes in plain C (the compiler's vector extension; SSE2, NEON or scalar, whatever the target has). For machines no other file knows,
 * and as a second opinion on those. No fused multiply-add: where the CPU has none it would be a library call. */
#include <math.h>
#include <string.h>

#include "base/half.h"

#define LANES 4
#define PRODUCT_TILE 2
#define FLOAT_TILE 1
#define WIDEN_QUERIES 1

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint8_t vb __attribute__((vector_size(16)));

#define INLINE static inline __attribute__((always_inline, unused))

INLINE vf vf_set1(float x) { return (vf){x, x, x, x}; }
INLINE vf vf_zero(void) { return vf_set1(0); }
INLINE vf vf_load(const float *p) {
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE void vf_store(float *p, vf x) { memcpy(p, &x, sizeof x); }
INLINE vf vf_add(vf a, vf b) { return a + b; }
INLINE vf vf_sub(vf a, vf b) { return a - b; }
INLINE vf vf_mul(vf a, vf b) { return a * b; }
INLINE vf vf_div(vf a, vf b) { return a / b; }
INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf vf_max(vf a, vf b) { return (vf)(((vi)a & (a > b)) | ((vi)b & ~(a > b))); } /* b where a is NaN */
INLINE vf vf_abs(vf a) { return (vf)((vi)a & 0x7fffffff); }
INLINE float vf_reduce_add(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
INLINE float vf_reduce_max(vf a) {
    vf b = vf_max(a, (vf){a[2], a[3], a[0], a[1]});
    return b[0] > b[1] ? b[0] : b[1];
}
INLINE vf vf_from_vi(vi a) { return __builtin_convertvector(a, vf); }
INLINE vf vf_load_f16(const uint16_t *p) { return (vf){float_from_f16(p[0]), float_from_f16(p[1]), float_from_f16(p[2]), float_from_f16(p[3])}; }
INLINE vf vf_load_bf16(const uint16_t *p) { return (vf)((vi){p[0], p[1], p[2], p[3]} << 16); }
INLINE vf vf_load_u8(const uint8_t *p) { return vf_from_vi((vi){p[0], p[1], p[2], p[3]}); }
INLINE vf vf_load_s8(const int8_t *p) { return vf_from_vi((vi){p[0], p[1], p[2], p[3]}); }
/* The first n lanes of a, the rest of other. */
INLINE vf vf_first(vf a, vf other, int n) {
    vi keep = (vi){0, 1, 2, 3} < (vi){n, n, n, n};
    return (vf)(((vi)a & keep) | ((vi)other & ~keep));
}
/* Two floats, repeated: p[0] p[1] p[0] p[1] ... */
INLINE vf vf_set_pair(const float *p) { return (vf){p[0], p[1], p[0], p[1]}; }
/* a0+a1, a2+a3, ..., b0+b1, ...: even and odd lanes brought together. */
INLINE vf vf_add_pairs(vf a, vf b) { return (vf){a[0], a[2], b[0], b[2]} + (vf){a[1], a[3], b[1], b[3]}; }
/* Nearest even for |a| < 2^22; NaN stays. */
INLINE vf vf_round(vf a) { return (a + 0x1.8p23f) - 0x1.8p23f; }
/* p * 2^n for whole n in -126..127; 0 below. */
INLINE vf vf_scale(vf p, vf n) {
    vi keep = n >= -126.0f;
    vf bounded = (vf)((vi)n & keep);
    vi exponent = (__builtin_convertvector(bounded, vi) + 127) << 23;
    return (vf)((vi)(p * (vf)exponent) & keep);
}
/* Rounded to nearest even, clamped to -127..127 (NaN: -127), one byte a lane. */
INLINE void vf_store_s8(int8_t *p, vf a) {
    for (int i = 0; i < LANES; i++) {
        float x = a[i] > -127 ? a[i] : -127;
        x = x < 127 ? x : 127;
        p[i] = (int8_t)((x + 0x1.8p23f) - 0x1.8p23f);
    }
}
/* Of 32 floats the quad that has the largest magnitude (the first such), that, and the largest of the others; NaN counts as 0. */
INLINE uint32_t highest_quad(const float *x, float *most, float *rest) {
    uint32_t quad = 0;
    *most = *rest = 0;
    for (uint32_t i = 0; i < 8; i++) {
        float m = vf_reduce_max(vf_max(vf_abs(vf_load(x + 4 * i)), vf_zero()));
        float less = m > *most ? *most : m;
        if (m > *most) *most = m, quad = i;
        *rest = less > *rest ? less : *rest;
    }
    return quad;
}
/* 32 floats times `scale`, then -127 or more, to bytes, 127 what is above; the sums of the first and the last 16. */
INLINE void quantize_32(const float *x, vf scale, int8_t *q, int32_t *low, int32_t *high) {
    for (int i = 0; i < 32; i += LANES) vf_store_s8(q + i, vf_load(x + i) * scale);
    *low = *high = 0;
    for (int i = 0; i < 16; i++) *low += q[i], *high += q[16 + i];
}
INLINE void vf_store_f16(uint16_t *p, vf x) {
    for (int i = 0; i < LANES; i++) p[i] = f16_from_float(x[i]);
}

INLINE vi vi_set1(int32_t x) { return (vi){x, x, x, x}; }
INLINE vi vi_zero(void) { return vi_set1(0); }
INLINE vi vi_add(vi a, vi b) { return a + b; }
INLINE vi vi_times_256(vi a) { return a * 256; }
INLINE vb vb_load(const uint8_t *p) {
    vb x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE vb vb_low(vb a) { return a & 15; }
INLINE vb vb_high(vb a) { return a >> 4; }
/* bits & mask of (a shifted right by n, or left by -n), or'ed into q. */
INLINE vb vb_or_bits(vb q, vb a, int n, int mask) { return q | ((n >= 0 ? a >> n : a << -n) & (uint8_t)mask); }
/* start + the exact products of n quads with 4n activations; quads unsigned, of `bits` bits. */
INLINE vi vi_dot(vi start, const vb *quads, const int8_t *a, const int n, int bits) {
    (void)bits;
    for (int j = 0; j < n; j++)
        for (int c = 0; c < 4; c++) start += (vi){quads[j][c], quads[j][4 + c], quads[j][8 + c], quads[j][12 + c]} * (int32_t)a[4 * j + c];
    return start;
}
/* start + the products of signed values that are stored + 128. nsum: minus the sum of the 4n activations, and of others whose products start has without one. */
INLINE vi vi_dot_signed(vi start, const vb *quads, const int8_t *a, const int n, int32_t nsum) {
    return vi_dot(start + vi_set1(nsum * 128), quads, a, n, 8);
}
/* nsum * 2^shift in every lane */
INLINE vi vi_offset(int32_t nsum, int shift) { return vi_set1(nsum * (1 << shift)); }
