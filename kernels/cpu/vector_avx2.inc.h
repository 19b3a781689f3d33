/* Vectors of 8 lanes: AVX2 with FMA and F16C, and AVX-VNNI where AVX_VNNI is defined. Included once by each translation unit that is compiled for it. */
#include <immintrin.h>

#define LANES 8
#define PRODUCT_TILE 4
#define FLOAT_TILE 2
#define WIDEN_QUERIES 2

typedef __m256 vf;
typedef __m256i vi;
typedef __m256i vb; /* 4 * LANES bytes */

#define INLINE static inline __attribute__((always_inline, unused))

INLINE vf vf_zero(void) { return _mm256_setzero_ps(); }
INLINE vf vf_set1(float x) { return _mm256_set1_ps(x); }
INLINE vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void vf_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
INLINE vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
INLINE vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); } /* b where a is NaN */
INLINE vf vf_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
INLINE float vf_reduce_add(vf a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
INLINE float vf_reduce_max(vf a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
INLINE vf vf_from_vi(vi a) { return _mm256_cvtepi32_ps(a); }
INLINE vf vf_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
INLINE vf vf_load_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}
INLINE vf vf_load_u8(const uint8_t *p) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p))); }
INLINE vf vf_load_s8(const int8_t *p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p))); }
/* The first n lanes of a, the rest of other. */
INLINE vf vf_first(vf a, vf other, int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_blendv_ps(other, a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane)));
}
/* Two floats, repeated: p[0] p[1] p[0] p[1] ... */
INLINE vf vf_set_pair(const float *p) {
    double pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return _mm256_castpd_ps(_mm256_set1_pd(pair));
}
/* a0+a1, a2+a3, ..., b0+b1, ...: even and odd lanes brought together. */
INLINE vf vf_add_pairs(vf a, vf b) {
    __m256 x = _mm256_hadd_ps(a, b); /* a01 a23 b01 b23 | a45 a67 b45 b67 */
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8));
}
INLINE vf vf_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* p * 2^n for whole n in -126..127; 0 below. */
INLINE vf vf_scale(vf p, vf n) {
    __m256 keep = _mm256_cmp_ps(n, _mm256_set1_ps(-126), _CMP_GE_OQ);
    __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(keep, _mm256_mul_ps(p, _mm256_castsi256_ps(exponent)));
}
/* 8 floats, none above 127 in magnitude, to bytes, nearest even (NaN: -128). */
INLINE void vf_store_s8(int8_t *p, vf a) {
    __m256i x = _mm256_cvtps_epi32(a);
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64((void *)p, _mm_packs_epi16(words, words));
}
/* 8 halves to nearest even. */
INLINE void vf_store_f16(uint16_t *p, vf x) { _mm_storeu_si128((void *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
INLINE __m256 quad_maxima(__m256 a) {
    a = _mm256_max_ps(vf_abs(a), _mm256_setzero_ps());
    a = _mm256_max_ps(a, _mm256_permute_ps(a, 0xb1));
    return _mm256_max_ps(a, _mm256_permute_ps(a, 0x4e));
}
/* Lane by lane the highest two of a's two and b's two. */
struct two {
    __m256 first, second;
};
INLINE struct two highest_two(struct two a, struct two b) {
    return (struct two){_mm256_max_ps(a.first, b.first), _mm256_max_ps(_mm256_min_ps(a.first, b.first), _mm256_max_ps(a.second, b.second))};
}
/* Of 32 floats the quad that has the largest magnitude (the first such), that, and the largest of the others; NaN counts as 0. */
INLINE uint32_t highest_quad(const float *x, float *most, float *rest) {
    __m256 of[4];
    for (int i = 0; i < 4; i++) of[i] = quad_maxima(_mm256_loadu_ps(x + 8 * i));
    struct two all = highest_two((struct two){_mm256_max_ps(of[0], of[1]), _mm256_min_ps(of[0], of[1])},
                                 (struct two){_mm256_max_ps(of[2], of[3]), _mm256_min_ps(of[2], of[3])});
    all = highest_two(all, (struct two){_mm256_permute2f128_ps(all.first, all.first, 1), _mm256_permute2f128_ps(all.second, all.second, 1)});
    *most = _mm256_cvtss_f32(all.first);
    *rest = _mm256_cvtss_f32(all.second);
    uint32_t equal = 0;
    for (int i = 0; i < 4; i++) equal |= (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(of[i], all.first, _CMP_EQ_OQ)) << (8 * i);
    return (uint32_t)__builtin_ctz(equal) / 4;
}
/* 32 floats times `scale`, then -127 or more, to bytes, 127 what is above; the sums of the first and the last 16. */
INLINE void quantize_32(const float *x, vf scale, int8_t *q, int32_t *low, int32_t *high) {
    __m256i a = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), scale)),
                                   _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8), scale)));
    __m256i b = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 16), scale)),
                                   _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 24), scale)));
    /* packs works within 128-bit halves: fours come out as 0 2 4 6 1 3 5 7 */
    __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((void *)q, bytes);
    __m256i sum = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes), _mm256_set1_epi16(1));
    sum = _mm256_add_epi32(sum, _mm256_shuffle_epi32(sum, 0x4e));
    sum = _mm256_add_epi32(sum, _mm256_shuffle_epi32(sum, 0xb1));
    *low = _mm_cvtsi128_si32(_mm256_castsi256_si128(sum));
    *high = _mm_cvtsi128_si32(_mm256_extracti128_si256(sum, 1));
}

INLINE vi vi_zero(void) { return _mm256_setzero_si256(); }
INLINE vi vi_set1(int32_t x) { return _mm256_set1_epi32(x); }
INLINE vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
INLINE vi vi_times_256(vi a) { return _mm256_slli_epi32(a, 8); }
INLINE vb vb_load(const uint8_t *p) { return _mm256_loadu_si256((const void *)p); }
INLINE vb vb_low(vb a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
INLINE vb vb_high(vb a) { return _mm256_and_si256(_mm256_srli_epi16(a, 4), _mm256_set1_epi8(15)); }
/* bits & mask of (a shifted right by n, or left by -n), or'ed into q. n is a constant. */
INLINE vb vb_or_bits(vb q, vb a, int n, int mask) {
    vb shifted = n >= 0 ? _mm256_srli_epi16(a, n) : _mm256_slli_epi16(a, -n);
    return _mm256_or_si256(q, _mm256_and_si256(shifted, _mm256_set1_epi8((char)mask)));
}
INLINE vb four_of(const int8_t *a) {
    int32_t four;
    __builtin_memcpy(&four, a, sizeof four);
    return _mm256_set1_epi32(four);
}
/* start + the exact products of n quads with 4n activations; quads unsigned, of `bits` bits. Without VNNI, products of pairs are added in 16 bits: of 2^bits - 1 times 127
 * twice, as many as fit below 32768 before they are widened. */
INLINE vi vi_dot(vi start, const vb *quads, const int8_t *a, const int n, int bits) {
#ifdef AVX_VNNI
    (void)bits;
#pragma GCC unroll 8
    for (int j = 0; j < n; j++) start = _mm256_dpbusd_avx_epi32(start, quads[j], four_of(a + 4 * j));
#else
    const int group = bits == 4 ? 8 : bits == 5 ? 4 : 2;
#pragma GCC unroll 8
    for (int first = 0; first < n; first += group) {
        __m256i sum = _mm256_maddubs_epi16(quads[first], four_of(a + 4 * first));
#pragma GCC unroll 8
        for (int j = first + 1; j < (first + group < n ? first + group : n); j++)
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(quads[j], four_of(a + 4 * j)));
        start = _mm256_add_epi32(start, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
    }
#endif
    return start;
}
/* start + the products of signed values that are stored + 128. nsum: minus the sum of the 4n activations, and of others whose products start has without one. Without VNNI the sign moves to the activation: 128 * 127 twice is
 * still below 32768, which 255 * 127 twice is not. */
INLINE vi vi_dot_signed(vi start, const vb *quads, const int8_t *a, const int n, int32_t nsum) {
#ifdef AVX_VNNI
    return vi_dot(_mm256_add_epi32(start, _mm256_slli_epi32(_mm256_set1_epi32(nsum), 7)), quads, a, n, 8);
#else
    (void)nsum;
    __m256i total = start;
#pragma GCC unroll 8
    for (int j = 0; j < n; j++) {
        __m256i value = _mm256_xor_si256(quads[j], _mm256_set1_epi8((char)0x80));
        __m256i sum = _mm256_maddubs_epi16(_mm256_abs_epi8(value), _mm256_sign_epi8(four_of(a + 4 * j), value));
        total = _mm256_add_epi32(total, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
    }
    return total;
#endif
}
/* nsum * 2^shift in every lane */
INLINE vi vi_offset(int32_t nsum, int shift) { return _mm256_slli_epi32(_mm256_set1_epi32(nsum), shift); }
