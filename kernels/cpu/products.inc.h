/* Products of a 16-row strip with up to PRODUCT_ROWS rows of activations, over the vectors of the file that includes this one.
 *
 * Quantised weights: for each block of 32 k the exact integer dot product, then one (or, with a minimum, two) multiply-adds onto the row's one sum, k
 * ascending. Activations of two planes give two dot products, joined as integers before; those of one plane, with one quad's high part, one and an eighth. The number of rows in a tile decides only how often unpacked weights are used: each row's chain of operations is the same in every tile. */

struct unpacked {
    vb quad[8];
    vf d, m;  /* m: minimum, for types that have one */
    vf d_low; /* Q6_K: scale of k < 16; d is that of the rest */
};

/* part: which LANES rows of the strip */
INLINE void unpack_nibbles(const uint8_t *nibbles, int part, struct unpacked *u) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        vb bytes = vb_load(nibbles + 64 * j + 4 * LANES * part);
        u->quad[j] = vb_low(bytes);
        u->quad[j + 4] = vb_high(bytes);
    }
}

INLINE void unpack_fifth(const uint8_t *fifth, int part, struct unpacked *u) {
    vb bits = vb_load(fifth + 4 * LANES * part);
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) u->quad[j] = vb_or_bits(u->quad[j], bits, j - 4, 16);
}

INLINE void unpack_top(const uint8_t *top, int part, struct unpacked *u) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        vb bits = vb_load(top + 64 * h + 4 * LANES * part);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) u->quad[4 * h + i] = vb_or_bits(u->quad[4 * h + i], bits, 2 * i - 4, 48);
    }
}

INLINE vf load_scales(const uint8_t *p, int part) { return vf_load_f16((const uint16_t *)(const void *)p + LANES * part); }

/* Block b of a strip. `type` is a constant wherever this is inlined. */
INLINE void unpack(enum tensor_type type, const uint8_t *strip, uint32_t b, int part, struct unpacked *u) {
    switch (type) {
    case TENSOR_Q4_0:
        strip += (size_t)b * 288;
        u->d = load_scales(strip, part);
        unpack_nibbles(strip + 32, part, u);
        break;
    case TENSOR_Q4_1:
        strip += (size_t)b * 320;
        u->d = load_scales(strip, part);
        u->m = load_scales(strip + 32, part);
        unpack_nibbles(strip + 64, part, u);
        break;
    case TENSOR_Q5_0:
        strip += (size_t)b * 352;
        u->d = load_scales(strip, part);
        unpack_nibbles(strip + 96, part, u);
        unpack_fifth(strip + 32, part, u);
        break;
    case TENSOR_Q5_1:
        strip += (size_t)b * 384;
        u->d = load_scales(strip, part);
        u->m = load_scales(strip + 32, part);
        unpack_nibbles(strip + 128, part, u);
        unpack_fifth(strip + 64, part, u);
        break;
    case TENSOR_Q8_0: strip += (size_t)b * 544; u->d = load_scales(strip, part);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) u->quad[j] = vb_load(strip + 32 + 64 * j + 4 * LANES * part);
        break;
    case TENSOR_Q4_K:
    case TENSOR_Q5_K: {
        const size_t block_bytes = type == TENSOR_Q4_K ? 288 : 352;
        const uint8_t *super = strip + (b / SUPER_BLOCKS) * (64 + SUPER_BLOCKS * block_bytes), *block = super + 64 + (b % SUPER_BLOCKS) * block_bytes;
        u->d = vf_mul(load_scales(super, part), vf_load_u8(block + LANES * part));
        u->m = vf_sub(vf_zero(), vf_mul(load_scales(super + 32, part), vf_load_u8(block + 16 + LANES * part)));
        unpack_nibbles(block + block_bytes - 256, part, u);
        if (type == TENSOR_Q5_K) unpack_fifth(block + 32, part, u);
        break;
    }
    case TENSOR_Q6_K: {
        const uint8_t *super = strip + (b / SUPER_BLOCKS) * (32 + SUPER_BLOCKS * 416), *block = super + 32 + (b % SUPER_BLOCKS) * 416;
        vf d = load_scales(super, part);
        u->d_low = vf_mul(d, vf_load_s8((const int8_t *)block + LANES * part));
        u->d = vf_mul(d, vf_load_s8((const int8_t *)block + 16 + LANES * part));
        unpack_nibbles(block + 160, part, u);
        unpack_top(block + 32, part, u);
        break;
    }
    default: __builtin_unreachable();
    }
}

/* start + the exact products of a block's quants, less their offset, with one plane of activations; of Q6_K with the first half or the second. */
INLINE vi plane_dot(enum tensor_type type, const struct unpacked *u, const struct act_plane *a, const int half, vi start) {
    switch (type) {
    case TENSOR_Q6_K:
        return vi_dot(vi_add(start, vi_offset(half ? a->nsum - a->nsum_low : a->nsum_low, 5)), u->quad + 4 * half, a->q + 16 * half, 4, 6);
    case TENSOR_Q8_0: return vi_dot_signed(start, u->quad, a->q, 8, a->nsum);
    case TENSOR_Q4_0: return vi_dot(vi_add(start, vi_offset(a->nsum, 3)), u->quad, a->q, 8, 4);
    case TENSOR_Q5_0: return vi_dot(vi_add(start, vi_offset(a->nsum, 4)), u->quad, a->q, 8, 5);
    default: return vi_dot(start, u->quad, a->q, 8, type == TENSOR_Q4_1 || type == TENSOR_Q4_K ? 4 : 5);
    }
}

/* 256 times the products with the high part, whose quad differs from row to row: weights of that quad come from memory. The plane's nsum takes the offset of these away too. */
INLINE vi high_dot(enum tensor_type type, const vb *quads, const struct act_block *a, const int half) {
    const vb *quad = quads + a->quad;
    if (type == TENSOR_Q8_0) return vi_times_256(vi_dot_signed(vi_zero(), quad, a->high, 1, 0));
    static const int8_t none[QUAD];
    const int8_t *high = type == TENSOR_Q6_K && (int)(a->quad / 4) != half ? none : a->high;
    return vi_times_256(vi_dot(vi_zero(), quad, high, 1, type == TENSOR_Q6_K ? 6 : 5));
}

/* With both planes below 32 * 128 * (127 * 257) < 2^28. */
INLINE vf block_dot(enum tensor_type type, const struct unpacked *u, const vb *quads, const struct act_block *a, const uint32_t planes,
                    const int half) {
    if (planes == 1) return vf_from_vi(plane_dot(type, u, &a->plane[0], half, high_dot(type, quads, a, half)));
    vi dot = vi_times_256(plane_dot(type, u, &a->plane[0], half, vi_zero()));
    return vf_from_vi(plane_dot(type, u, &a->plane[1], half, dot));
}

/* quads: those of u, in memory. */
INLINE vf product_step(enum tensor_type type, const struct unpacked *u, const vb *quads, const struct act_block *a, const uint32_t planes, vf sum) {
    vf d = vf_set1(a->d);
    if (type == TENSOR_Q6_K) {
        sum = vf_fma(vf_mul(u->d_low, d), block_dot(type, u, quads, a, planes, 0), sum);
        return vf_fma(vf_mul(u->d, d), block_dot(type, u, quads, a, planes, 1), sum);
    }
    sum = vf_fma(vf_mul(u->d, d), block_dot(type, u, quads, a, planes, 0), sum);
    if (type == TENSOR_Q8_0 || type == TENSOR_Q4_0 || type == TENSOR_Q5_0) return sum;
    return vf_fma(u->m, vf_set1(a->s), sum);
}

/* Bytes a block, header included. */
INLINE size_t block_bytes(enum tensor_type type) {
    switch (type) {
    case TENSOR_Q4_0: return 288;
    case TENSOR_Q4_1: return 320;
    case TENSOR_Q5_0: return 352;
    case TENSOR_Q5_1: return 384;
    case TENSOR_Q8_0: return 544;
    case TENSOR_Q4_K: return 296;
    case TENSOR_Q5_K: return 360;
    default: return 420;
    }
}

/* Weights come from memory in one long stream: strips follow each other. Each block of a tile asks for n_lines cache lines from `fetch` on: a tile that is alone reads
 * ahead of itself; where a strip is used by several tiles, they share the next strip. What lies behind the last strip is only named, never read. */
enum { FETCH_AHEAD = 4096 };

INLINE void product_tile(enum tensor_type type, const uint32_t planes, const uint8_t *strip, uint32_t n_blocks, const uint8_t *first, size_t stride,
                         const int n_rows, uintptr_t fetch, const size_t n_lines, float (*y)[STRIP_ROWS]) {
    for (int part = 0; part < STRIP_ROWS / LANES; part++) {
        vf sum[PRODUCT_TILE];
#pragma GCC unroll 12
        for (int r = 0; r < n_rows; r++) sum[r] = vf_zero();
        const uint8_t *at = first;
        for (uint32_t b = 0; b < n_blocks; b++, at += act_block_bytes(planes)) {
            struct unpacked u;
            unpack(type, strip, b, part, &u);
            vb quads[8];
            if (planes == 1)
#pragma GCC unroll 8
                for (int j = 0; j < 8; j++) quads[j] = u.quad[j];
            for (size_t line = 0; line < n_lines; line++) __builtin_prefetch((const void *)(fetch + (b * n_lines + line) * 64));
#pragma GCC unroll 12
            for (int r = 0; r < n_rows; r++)
                sum[r] = product_step(type, &u, quads, (const struct act_block *)(const void *)(at + (size_t)r * stride), planes, sum[r]);
        }
#pragma GCC unroll 12
        for (int r = 0; r < n_rows; r++) vf_store(y[r] + LANES * part, sum[r]);
    }
}

/* One function a number of rows, so that the sums are registers. */
#define PRODUCT_CASE(type, planes, n)                                                                                                                \
    case n:                                                                                                                                          \
        product_tile(type, planes, strip, n_blocks, at, stride, n, next, (block_bytes(type) + 63) / 64, y);                                          \
        return

#if PRODUCT_TILE == 12
#define PRODUCT_CASES(type, planes)                                                                                                                  \
    PRODUCT_CASE(type, planes, 3);                                                                                                                   \
    PRODUCT_CASE(type, planes, 4);                                                                                                                   \
    PRODUCT_CASE(type, planes, 5);                                                                                                                   \
    PRODUCT_CASE(type, planes, 6);                                                                                                                   \
    PRODUCT_CASE(type, planes, 7);                                                                                                                   \
    PRODUCT_CASE(type, planes, 8);                                                                                                                   \
    PRODUCT_CASE(type, planes, 9);                                                                                                                   \
    PRODUCT_CASE(type, planes, 10);                                                                                                                  \
    PRODUCT_CASE(type, planes, 11);                                                                                                                  \
    PRODUCT_CASE(type, planes, 12)
#elif PRODUCT_TILE == 4
#define PRODUCT_CASES(type, planes)                                                                                                                  \
    PRODUCT_CASE(type, planes, 3);                                                                                                                   \
    PRODUCT_CASE(type, planes, 4)
#else
#define PRODUCT_CASES(type, planes)
#endif

#define PRODUCT(type, planes, name)                                                                                                                  \
    static void product_##name(const uint8_t *strip, uint32_t n_blocks, const void *first, size_t stride, uint32_t n_rows, float(*y)[STRIP_ROWS]) {  \
        const uint8_t *at = first;                                                                                                                   \
        uintptr_t next = (uintptr_t)strip + n_blocks * block_bytes(type);                                                                            \
        if (n_rows <= PRODUCT_TILE) next = (uintptr_t)strip + FETCH_AHEAD;                                                                           \
        const uintptr_t end = next + n_blocks * block_bytes(type);                                                                                   \
        for (; n_rows > PRODUCT_TILE; n_rows -= PRODUCT_TILE, at += PRODUCT_TILE * stride, y += PRODUCT_TILE, next += (size_t)n_blocks * 128) {      \
            if (next < end)                                                                                                                          \
                product_tile(type, planes, strip, n_blocks, at, stride, PRODUCT_TILE, next, 2, y);                                                   \
            else                                                                                                                                     \
                product_tile(type, planes, strip, n_blocks, at, stride, PRODUCT_TILE, next, 0, y);                                                   \
        }                                                                                                                                            \
        switch (n_rows) {                                                                                                                            \
            PRODUCT_CASE(type, planes, 1);                                                                                                           \
            PRODUCT_CASE(type, planes, 2);                                                                                                           \
            PRODUCT_CASES(type, planes);                                                                                                             \
        default: return;                                                                                                                             \
        }                                                                                                                                            \
    }

PRODUCT(TENSOR_Q4_0, 1, q4_0)
PRODUCT(TENSOR_Q4_0, 2, q4_0_wide)
PRODUCT(TENSOR_Q4_1, 1, q4_1)
PRODUCT(TENSOR_Q4_1, 2, q4_1_wide)
PRODUCT(TENSOR_Q5_0, 1, q5_0)
PRODUCT(TENSOR_Q5_0, 2, q5_0_wide)
PRODUCT(TENSOR_Q5_1, 1, q5_1)
PRODUCT(TENSOR_Q5_1, 2, q5_1_wide)
PRODUCT(TENSOR_Q8_0, 1, q8_0)
PRODUCT(TENSOR_Q8_0, 2, q8_0_wide)
PRODUCT(TENSOR_Q4_K, 1, q4_k)
PRODUCT(TENSOR_Q4_K, 2, q4_k_wide)
PRODUCT(TENSOR_Q5_K, 1, q5_k)
PRODUCT(TENSOR_Q5_K, 2, q5_k_wide)
PRODUCT(TENSOR_Q6_K, 1, q6_k)
PRODUCT(TENSOR_Q6_K, 2, q6_k_wide)

/* Float weights: four sums a row (k mod 4), so that one row is not bound by the latency of its adds; joined at the end. */
INLINE vf load_weights(enum tensor_type type, const uint8_t *strip, size_t at) {
    if (type == TENSOR_F32) return vf_load((const float *)(const void *)strip + at);
    const uint16_t *halves = (const uint16_t *)(const void *)strip + at;
    return type == TENSOR_F16 ? vf_load_f16(halves) : vf_load_bf16(halves);
}

INLINE void float_tile(enum tensor_type type, const uint8_t *strip, uint32_t n_blocks, const uint8_t *first, size_t stride, const int n_rows,
                       float (*y)[STRIP_ROWS]) {
    for (int part = 0; part < STRIP_ROWS / LANES; part++) {
        vf sum[FLOAT_TILE][4];
#pragma GCC unroll 6
        for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) sum[r][c] = vf_zero();
        for (size_t k = 0; k < (size_t)n_blocks * PANEL_K; k += 4)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) {
                vf w = load_weights(type, strip, (k + (size_t)c) * STRIP_ROWS + (size_t)(LANES * part));
#pragma GCC unroll 6
                for (int r = 0; r < n_rows; r++)
                    sum[r][c] = vf_fma(w, vf_set1(((const float *)(const void *)(first + (size_t)r * stride))[k + (size_t)c]), sum[r][c]);
            }
#pragma GCC unroll 6
        for (int r = 0; r < n_rows; r++) vf_store(y[r] + LANES * part, vf_add(vf_add(sum[r][0], sum[r][1]), vf_add(sum[r][2], sum[r][3])));
    }
}

#define FLOAT_PRODUCT(type, name)                                                                                                                    \
    static void product_##name(const uint8_t *strip, uint32_t n_blocks, const void *first, size_t stride, uint32_t n_rows, float(*y)[STRIP_ROWS]) {  \
        const uint8_t *at = first;                                                                                                                   \
        for (; n_rows >= FLOAT_TILE; n_rows -= FLOAT_TILE, at += FLOAT_TILE * stride, y += FLOAT_TILE)                                               \
            float_tile(type, strip, n_blocks, at, stride, FLOAT_TILE, y);                                                                            \
        for (; n_rows > 0; n_rows--, at += stride, y++) float_tile(type, strip, n_blocks, at, stride, 1, y);                                         \
    }

FLOAT_PRODUCT(TENSOR_F32, f32)
FLOAT_PRODUCT(TENSOR_F16, f16)
FLOAT_PRODUCT(TENSOR_BF16, bf16)

#define PRODUCTS_OF(form)                                                                                                                            \
    {                                                                                                                                                \
        [TENSOR_F32] = product_f32, [TENSOR_F16] = product_f16, [TENSOR_BF16] = product_bf16, [TENSOR_Q8_0] = product_q8_0##form,                    \
        [TENSOR_Q4_0] = product_q4_0##form, [TENSOR_Q4_1] = product_q4_1##form, [TENSOR_Q5_0] = product_q5_0##form,                                  \
        [TENSOR_Q5_1] = product_q5_1##form, [TENSOR_Q4_K] = product_q4_k##form, [TENSOR_Q5_K] = product_q5_k##form,                                  \
        [TENSOR_Q6_K] = product_q6_k##form                                                                                                           \
    }
#define PRODUCTS                                                                                                                                     \
    { PRODUCTS_OF(), PRODUCTS_OF(_wide) }
