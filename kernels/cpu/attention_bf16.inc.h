/* Attention over bf16 K and V with pair dot products (AVX512_BF16). Two sums a (query, slot): even and odd dim pairs; one a (query, dim), slots ascending. */

/* Rounds 16 weights to bf16, stores them, gives back what was stored. */
INLINE vf store_rounded(uint16_t *p, vf x) {
    __m256i rounded = (__m256i)_mm512_cvtneps_pbh(x);
    _mm256_storeu_si256((void *)p, rounded);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
}

INLINE __m512bh pair_of(const uint16_t *p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

/* n queries over the 32 slots of a block. queries: bf16 [query][dims] */
INLINE void bf16_scores_tile(const struct split *s, const uint16_t *k, uint32_t b, uint32_t first, const uint32_t n, struct fetch *fetch,
                             const uint32_t lines) {
    const uint32_t dims = s->a->shape->dims;
    const uint16_t *queries = (const uint16_t *)(const void *)s->quants + (size_t)first * dims;
    __m512 sum[6][2][2];
#pragma GCC unroll 6
    for (uint32_t q = 0; q < n; q++) sum[q][0][0] = sum[q][0][1] = sum[q][1][0] = sum[q][1][1] = _mm512_setzero_ps();
    for (uint32_t d = 0; d < dims; d += 4) {
        fetch_lines(fetch, lines);
#pragma GCC unroll 2
        for (uint32_t odd = 0; odd < 2; odd++) {
            __m512bh k0 = (__m512bh)_mm512_loadu_si512(k + (size_t)(d / 2 + odd) * 64);
            __m512bh k1 = (__m512bh)_mm512_loadu_si512(k + (size_t)(d / 2 + odd) * 64 + 32);
#pragma GCC unroll 6
            for (uint32_t q = 0; q < n; q++) {
                __m512bh pair = pair_of(queries + (size_t)q * dims + d + 2 * odd);
                sum[q][0][odd] = _mm512_dpbf16_ps(sum[q][0][odd], k0, pair);
                sum[q][1][odd] = _mm512_dpbf16_ps(sum[q][1][odd], k1, pair);
            }
        }
    }
#pragma GCC unroll 6
    for (uint32_t q = 0; q < n; q++) {
        float *scores = s->scores + (size_t)(first + q) * SPLIT_SLOTS + b * BLOCK_TOKENS;
        _mm512_storeu_ps(scores, _mm512_add_ps(sum[q][0][0], sum[q][0][1]));
        _mm512_storeu_ps(scores + 16, _mm512_add_ps(sum[q][1][0], sum[q][1][1]));
    }
}

static void bf16_scores(const struct split *s) {
    const uint32_t dims = s->a->shape->dims;
    for (uint32_t q = 0; q < s->n_queries; q++)
        for (uint32_t i = 0; i < dims; i += 16)
            _mm256_storeu_si256((void *)(s->quants + ((size_t)q * dims + i) * 2), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(s->a->query[q] + i)));
    for (uint32_t b = 0; b < s->n_blocks; b++) {
        const uint16_t *k = (const uint16_t *)(const void *)split_block(s, b);
        struct fetch fetch = fetch_with_scores(s, b);
        uint32_t q = 0;
        for (; q + 6 <= s->n_queries; q += 6) bf16_scores_tile(s, k, b, q, 6, &fetch, 2);
        if (q + 3 <= s->n_queries) bf16_scores_tile(s, k, b, q, 3, &fetch, 8), q += 3;
        for (; q < s->n_queries; q++) bf16_scores_tile(s, k, b, q, 1, &fetch, 8);
    }
}

/* n queries, n_vectors * 16 dims from `dim`. */
INLINE void bf16_values_tile(const struct split *s, uint32_t dim, const uint32_t n_vectors, uint32_t first, const uint32_t n) {
    const uint32_t dims = s->a->shape->dims;
    __m512 sum[6][4];
#pragma GCC unroll 6
    for (uint32_t q = 0; q < n; q++)
#pragma GCC unroll 4
        for (uint32_t v = 0; v < n_vectors; v++) sum[q][v] = _mm512_setzero_ps();
    for (uint32_t b = 0; b < s->n_blocks; b++) {
        const uint16_t *values = (const uint16_t *)(const void *)(split_block(s, b) + s->a->shape->v_offset) + (size_t)dim * 2;
        const uint16_t *weights = s->pairs + (size_t)first * SPLIT_SLOTS + b * BLOCK_TOKENS;
        struct fetch fetch = n < 6 && first == 0 ? fetch_with_values(s, b, dim, n_vectors * 16) : (struct fetch){0};
        for (uint32_t pair = 0; pair < BLOCK_TOKENS / 2; pair++) {
            if (n < 6) fetch_lines(&fetch, 4);
            __m512bh value[4];
#pragma GCC unroll 4
            for (uint32_t v = 0; v < n_vectors; v++) value[v] = (__m512bh)_mm512_loadu_si512(values + (size_t)pair * dims * 2 + v * 32);
#pragma GCC unroll 6
            for (uint32_t q = 0; q < n; q++) {
                __m512bh weight = pair_of(weights + (size_t)q * SPLIT_SLOTS + 2 * pair);
#pragma GCC unroll 4
                for (uint32_t v = 0; v < n_vectors; v++) sum[q][v] = _mm512_dpbf16_ps(sum[q][v], value[v], weight);
            }
        }
    }
#pragma GCC unroll 6
    for (uint32_t q = 0; q < n; q++)
#pragma GCC unroll 4
        for (uint32_t v = 0; v < n_vectors; v++) _mm512_storeu_ps(split_out(s, first + q) + dim + v * 16, sum[q][v]);
}

INLINE void bf16_values_queries(const struct split *s, uint32_t dim, const uint32_t n_vectors) {
    uint32_t q = 0;
    for (; q + 6 <= s->n_queries; q += 6) bf16_values_tile(s, dim, n_vectors, q, 6);
    if (q + 3 <= s->n_queries) bf16_values_tile(s, dim, n_vectors, q, 3), q += 3;
    for (; q < s->n_queries; q++) bf16_values_tile(s, dim, n_vectors, q, 1);
}

static void bf16_values(const struct split *s) {
    uint32_t dim = 0;
    for (; dim + 64 <= s->a->shape->dims; dim += 64) bf16_values_queries(s, dim, 4);
    for (; dim < s->a->shape->dims; dim += 16) bf16_values_queries(s, dim, 1);
}
