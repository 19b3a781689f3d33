/* Vectors of 16 lanes: AVX-512 F/BW/DQ/VL with VNNI. Included once by each translation unit that is compiled for it. */
#include <immintrin.h>

#define LANES 16
#define PRODUCT_TILE 12 /* rows of an integer product whose sums stay in registers */
#define FLOAT_TILE 6    /* rows of a float product, four sums each */
#define WIDEN_QUERIES 4 /* queries of a widening attention loop, 2 * 16 / LANES sums each */

typedef __m512 vf;
typedef __m512i vi;
typedef __m512i vb; /* 4 * LANES bytes */

#define INLINE static inline __attribute__((always_inline, unused))

INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
INLINE vf vf_set1(float x) { return _mm512_set1_ps(x); }
INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vf_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); } /* b where a is NaN */
INLINE vf vf_abs(vf a) { return _mm512_abs_ps(a); }
INLINE float vf_reduce_add(vf a) { return _mm512_reduce_add_ps(a); }
INLINE float vf_reduce_max(vf a) { return _mm512_reduce_max_ps(a); }
INLINE vf vf_from_vi(vi a) { return _mm512_cvtepi32_ps(a); }
INLINE vf vf_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
INLINE vf vf_load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}
INLINE vf vf_load_u8(const uint8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p))); }
INLINE vf vf_load_s8(const int8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p))); }
/* The first n lanes of a, the rest of other. */
INLINE vf vf_first(vf a, vf other, int n) { return n >= LANES ? a : _mm512_mask_blend_ps((__mmask16)((1u << n) - 1), other, a); }
/* Two floats, repeated: p[0] p[1] p[0] p[1] ... */
INLINE vf vf_set_pair(const float *p) {
    double pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return _mm512_castpd_ps(_mm512_set1_pd(pair));
}
/* a0+a1, a2+a3, ..., b0+b1, ...: even and odd lanes brought together. */
INLINE vf vf_add_pairs(vf a, vf b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return _mm512_add_ps(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
}
/* p * 2^n for whole n; 0 far below. */
INLINE vf vf_scale(vf p, vf n) { return _mm512_scalef_ps(p, n); }
INLINE vf vf_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* 16 floats, none above 127 in magnitude, to bytes, nearest even (NaN: -128). */
INLINE __m128i bytes_of(vf a) { return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a)); }
INLINE void vf_store_s8(int8_t *p, vf a) { _mm_storeu_si128((void *)p, bytes_of(a)); }
/* 16 halves to nearest even. */
INLINE void vf_store_f16(uint16_t *p, vf x) { _mm256_storeu_si256((void *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
INLINE __m512 quad_maxima(__m512 a) {
    a = _mm512_max_ps(_mm512_abs_ps(a), _mm512_setzero_ps());
    a = _mm512_max_ps(a, _mm512_permute_ps(a, 0xb1));
    return _mm512_max_ps(a, _mm512_permute_ps(a, 0x4e));
}
/* Lane by lane the highest two of a and b, and then of those and others' highest two. */
struct two {
    __m512 first, second;
};
INLINE struct two highest_two(struct two a, struct two b) {
    return (struct two){_mm512_max_ps(a.first, b.first), _mm512_max_ps(_mm512_min_ps(a.first, b.first), _mm512_max_ps(a.second, b.second))};
}
/* Of 32 floats the quad that has the largest magnitude (the first such), that, and the largest of the others; NaN counts as 0. */
INLINE uint32_t highest_quad(const float *x, float *most, float *rest) {
    __m512 low = quad_maxima(_mm512_loadu_ps(x)), high = quad_maxima(_mm512_loadu_ps(x + 16));
    struct two all = {_mm512_max_ps(low, high), _mm512_min_ps(low, high)};
    all = highest_two(all, (struct two){_mm512_shuffle_f32x4(all.first, all.first, 0x4e), _mm512_shuffle_f32x4(all.second, all.second, 0x4e)});
    all = highest_two(all, (struct two){_mm512_shuffle_f32x4(all.first, all.first, 0xb1), _mm512_shuffle_f32x4(all.second, all.second, 0xb1)});
    *most = _mm512_cvtss_f32(all.first);
    *rest = _mm512_cvtss_f32(all.second);
    uint32_t equal = _mm512_cmp_ps_mask(low, all.first, _CMP_EQ_OQ) | (uint32_t)_mm512_cmp_ps_mask(high, all.first, _CMP_EQ_OQ) << 16;
    return (uint32_t)__builtin_ctz(equal) / 4;
}
/* 32 floats times `scale`, then -127 or more, to bytes, 127 what is above; the sums of the first and the last 16. */
INLINE void quantize_32(const float *x, vf scale, int8_t *q, int32_t *low, int32_t *high) {
    __m256i bytes = _mm256_set_m128i(bytes_of(_mm512_mul_ps(_mm512_loadu_ps(x + 16), scale)), bytes_of(_mm512_mul_ps(_mm512_loadu_ps(x), scale)));
    _mm256_storeu_si256((void *)q, bytes);
    __m256i sum = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes), _mm256_set1_epi16(1));
    sum = _mm256_add_epi32(sum, _mm256_shuffle_epi32(sum, 0x4e));
    sum = _mm256_add_epi32(sum, _mm256_shuffle_epi32(sum, 0xb1));
    *low = _mm_cvtsi128_si32(_mm256_castsi256_si128(sum));
    *high = _mm_cvtsi128_si32(_mm256_extracti128_si256(sum, 1));
}

INLINE vi vi_zero(void) { return _mm512_setzero_si512(); }
INLINE vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
INLINE vi vi_times_256(vi a) { return _mm512_slli_epi32(a, 8); }
INLINE vb vb_load(const uint8_t *p) { return _mm512_loadu_si512(p); }
INLINE vb vb_low(vb a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
INLINE vb vb_high(vb a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
/* bits & mask of (a shifted right by n, or left by -n), or'ed into q. n is a constant. */
INLINE vb vb_or_bits(vb q, vb a, int n, int mask) {
    vb shifted = n >= 0 ? _mm512_srli_epi16(a, n) : _mm512_slli_epi16(a, -n);
    return _mm512_ternarylogic_epi64(q, shifted, _mm512_set1_epi8((char)mask), 0xf8); /* q | (shifted & mask) */
}
/* start + the exact products of n quads with 4n activations; quads unsigned, of `bits` bits. Eight in two chains: in one, what waits for the one before it fills the scheduler, and
 * fewer rows are under way at once (1.88 to 1.72 ns a block and row on Zen 5). */
INLINE vi vi_dot(vi start, const vb *quads, const int8_t *a, const int n, int bits) {
    (void)bits;
    vi halves[2] = {_mm512_setzero_si512(), start};
#pragma GCC unroll 8
    for (int j = 0; j < n; j++) {
        int32_t four;
        __builtin_memcpy(&four, a + 4 * j, sizeof four);
        vi *sum = &halves[n < 8 || j >= n / 2];
        *sum = _mm512_dpbusd_epi32(*sum, quads[j], _mm512_set1_epi32(four));
    }
    return n < 8 ? halves[1] : _mm512_add_epi32(halves[0], halves[1]);
}
/* start + the products of signed values that are stored + 128. nsum: minus the sum of the 4n activations, and of others whose products start has without one. */
INLINE vi vi_dot_signed(vi start, const vb *quads, const int8_t *a, const int n, int32_t nsum) {
    return vi_dot(_mm512_add_epi32(start, _mm512_slli_epi32(_mm512_set1_epi32(nsum), 7)), quads, a, n, 8);
}
/* nsum * 2^shift in every lane */
INLINE vi vi_offset(int32_t nsum, int shift) { return _mm512_slli_epi32(_mm512_set1_epi32(nsum), (unsigned)shift); }
