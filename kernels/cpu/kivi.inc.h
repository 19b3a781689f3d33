/* KIVI blocks (kernels/kivi.h, layout.h) over the vectors of the file that includes this one: widened to the layout of f32 blocks, whose loops then compute; and filled blocks made codes.
 * Numbers are the same bits on every instruction set. */

enum { KIVI_UNIT = 32 }; /* elements packed together */

/* 32 codes, a byte each. */
INLINE void unpack_unit(uint32_t bits, const uint8_t *packed, uint8_t *codes) {
    const uint64_t mask = bits == 4 ? 0x0f0f0f0f0f0f0f0full : 0x0303030303030303ull;
    const uint32_t words = bits / 2; /* of 8 bytes */
    for (uint32_t w = 0; w < words; w++) {
        uint64_t word;
        memcpy(&word, packed + 8 * w, sizeof word);
        for (uint32_t i = 0; i < 8 / bits; i++) {
            uint64_t eight = word >> (bits * i) & mask;
            memcpy(codes + 8 * (words * i + w), &eight, sizeof eight);
        }
    }
}

INLINE void pack_unit(uint32_t bits, const uint8_t *codes, uint8_t *packed) {
    const uint32_t words = bits / 2;
    for (uint32_t w = 0; w < words; w++) {
        uint64_t word = 0, eight;
        for (uint32_t i = 0; i < 8 / bits; i++) {
            memcpy(&eight, codes + 8 * (words * i + w), sizeof eight);
            word |= eight << (bits * i);
        }
        memcpy(packed + 8 * w, &word, sizeof word);
    }
}

/* A unit of numbers; even and odd ones have scales and minima of their own. */
INLINE void widen_unit(uint32_t bits, const uint8_t *packed, const float scale[2], const float minimum[2], float *out) {
    uint8_t codes[KIVI_UNIT];
    unpack_unit(bits, packed, codes);
    const vf s = vf_set_pair(scale), m = vf_set_pair(minimum);
    for (uint32_t i = 0; i < KIVI_UNIT; i += LANES) vf_store(out + i, vf_add(vf_mul(vf_load_u8(codes + i), s), m));
}

INLINE void widen_halves(const uint8_t *halves, uint32_t n, float *out) {
    for (uint32_t i = 0; i < n; i += LANES) vf_store(out + i, vf_load_f16((const uint16_t *)(const void *)halves + i));
}

INLINE void kivi_widen_keys(uint32_t bits, const struct kv_shape *shape, const uint8_t *block, float *out) {
    const uint16_t *scales = (const uint16_t *)(const void *)(block + shape->scale_offset);
    for (uint32_t pair = 0; pair < shape->dims / 2; pair++, scales += 4) {
        const float scale[2] = {float_from_f16(scales[0]), float_from_f16(scales[2])};
        const float minimum[2] = {float_from_f16(scales[1]), float_from_f16(scales[3])};
        for (uint32_t i = 0; i < 2 * BLOCK_TOKENS; i += KIVI_UNIT)
            widen_unit(bits, block + ((size_t)pair * 2 * BLOCK_TOKENS + i) * bits / 8, scale, minimum, out + (size_t)pair * 2 * BLOCK_TOKENS + i);
    }
}

INLINE void kivi_widen_values(uint32_t bits, const struct kv_shape *shape, const uint8_t *block, float *out) {
    const uint32_t dims = shape->dims, groups = kivi_value_groups(shape->head_dim);
    const uint16_t *scales = (const uint16_t *)(const void *)(block + shape->scale_offset) + 2 * dims;
    for (uint32_t pair = 0; pair < BLOCK_TOKENS / 2; pair++, scales += 4 * groups) {
        float scale[2], minimum[2];
        for (uint32_t dim = 0; dim < dims; dim += KIVI_UNIT / 2) {
            const size_t at = ((size_t)pair * dims + dim) * 2;
            if (dim % KIVI_GROUP == 0)
                for (uint32_t odd = 0; odd < 2; odd++) {
                    const uint16_t *of_group = scales + 2 * (odd * groups + dim / KIVI_GROUP);
                    scale[odd] = float_from_f16(of_group[0]);
                    minimum[odd] = float_from_f16(of_group[1]);
                }
            widen_unit(bits, block + shape->v_offset + at * bits / 8, scale, minimum, out + at);
        }
        for (uint32_t i = 2 * shape->head_dim; i < 2 * dims; i++) out[(size_t)pair * dims * 2 + i] = 0;
    }
}

/* Block b of the lane as rows read it: keys, or values, in the layout of f32 blocks. */
static void kivi_keys(const struct kv_shape *shape, const struct residual *residual, const uint8_t *pool, const uint32_t *blocks, uint32_t b,
                      float *out) {
    const uint8_t *block = pool + (size_t)blocks[b] * shape->bytes;
    if (b >= residual->n_codes)
        widen_halves(residual->pool + (size_t)residual->of[blocks[b]] * shape->raw_bytes, shape->dims * BLOCK_TOKENS, out);
    else if (shape->dtype == KV_KIVI4)
        kivi_widen_keys(4, shape, block, out);
    else
        kivi_widen_keys(2, shape, block, out);
}

static void kivi_values(const struct kv_shape *shape, const struct residual *residual, const uint8_t *pool, const uint32_t *blocks, uint32_t b,
                        float *out) {
    const uint8_t *block = pool + (size_t)blocks[b] * shape->bytes;
    if (b >= residual->n_codes)
        widen_halves(residual->pool + (size_t)residual->of[blocks[b]] * shape->raw_bytes + shape->raw_bytes / 2, shape->dims * BLOCK_TOKENS, out);
    else if (shape->dtype == KV_KIVI4)
        kivi_widen_values(4, shape, block, out);
    else
        kivi_widen_values(2, shape, block, out);
}

/* Rows of numbers as they are packed, their codes. */
static void put_codes(uint32_t bits, const uint8_t *codes, uint32_t n, uint8_t *packed) {
    for (uint32_t i = 0; i < n; i += KIVI_UNIT) {
        if (bits == 4)
            pack_unit(4, codes + i, packed + i / 2);
        else
            pack_unit(2, codes + i, packed + i / 4);
    }
}

static void close_keys(const struct kv_shape *shape, const uint8_t *raw, uint8_t *block) {
    const uint32_t bits = kivi_bits(shape->dtype);
    struct kivi_scale *scales = (struct kivi_scale *)(void *)(block + shape->scale_offset);
    for (uint32_t pair = 0; pair < shape->dims / 2; pair++, scales += 2) {
        float x[2 * BLOCK_TOKENS];
        uint8_t codes[2 * BLOCK_TOKENS];
        widen_halves(raw + (size_t)pair * sizeof(uint16_t) * 2 * BLOCK_TOKENS, 2 * BLOCK_TOKENS, x);
        for (uint32_t odd = 0; odd < 2; odd++) scales[odd] = kivi_quantize(x + odd, 2, BLOCK_TOKENS, bits, codes + odd, 2);
        put_codes(bits, codes, 2 * BLOCK_TOKENS, block + (size_t)pair * 2 * BLOCK_TOKENS * bits / 8);
    }
}

static void close_block(const struct kv_shape *shape, const uint8_t *raw, uint8_t *block, bool keys_alone) {
    const uint32_t bits = kivi_bits(shape->dtype), dims = shape->dims, d = shape->head_dim, groups = kivi_value_groups(d);
    close_keys(shape, raw, block);
    if (keys_alone) return;
    struct kivi_scale *scales = (struct kivi_scale *)(void *)(block + shape->scale_offset) + dims;
    for (uint32_t pair = 0; pair < BLOCK_TOKENS / 2; pair++, scales += 2 * groups) {
        float x[2 * KV_DIMS_MAX];
        uint8_t codes[2 * KV_DIMS_MAX];
        const size_t at = (size_t)pair * dims * 2;
        widen_halves(raw + shape->raw_bytes / 2 + at * sizeof(uint16_t), 2 * dims, x);
        for (uint32_t i = 2 * d; i < 2 * dims; i++) codes[i] = 0;
        for (uint32_t g = 0; g < groups; g++)
            for (uint32_t odd = 0; odd < 2; odd++) {
                uint32_t first = g * KIVI_GROUP, n = d - first < KIVI_GROUP ? d - first : KIVI_GROUP;
                scales[odd * groups + g] = kivi_quantize(x + 2 * first + odd, 2, n, bits, codes + 2 * first + odd, 2);
            }
        put_codes(bits, codes, 2 * dims, block + shape->v_offset + at * bits / 8);
    }
}
