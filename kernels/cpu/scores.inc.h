/* Scores of cached slots (kernels/score.h) over the vectors of the file that includes this one: what is made of kept attention weights, and what looks at keys or
 * values alone. Sums run in a fixed order that depends on the lane only. */

static void factors(const struct attend *a, const float *maxima, const float *state, size_t state_stride, float factor[ATTEND_QUERIES]) {
    float change[ATTEND_QUERIES] = {0};
    for (uint32_t q = 0; q < a->n_queries; q++) change[q] = maxima[q] - state[q * state_stride];
    for (uint32_t q = 0; q < ATTEND_QUERIES; q += LANES) {
        float part[LANES] = {0};
        uint32_t n = ATTEND_QUERIES - q < LANES ? ATTEND_QUERIES - q : LANES;
        memcpy(part, change + q, n * sizeof *part);
        vf_store(part, vf_exp(vf_load(part)));
        memcpy(factor + q, part, n * sizeof *part);
    }
    for (uint32_t q = 0; q < a->n_queries; q++) factor[q] /= state[q * state_stride + 1];
}

INLINE void fold_kind(const enum score_kind kind, const struct kept_split *split, float *total) {
    for (uint32_t slot = 0; slot < split->n_slots; slot += BLOCK_TOKENS) {
        const uint32_t count = split->n_slots - slot < BLOCK_TOKENS ? split->n_slots - slot : BLOCK_TOKENS;
        float sum[BLOCK_TOKENS] = {0};
        memcpy(sum, total + slot, count * sizeof *sum);
        for (uint32_t q = 0; q < split->n * split->step; q += split->step) {
            const float *weights = split->weights + q * split->stride + slot, factor = split->factor[q], least = 1.0f / (float)split->visible[q];
            for (uint32_t i = 0; i < BLOCK_TOKENS; i++) {
                float p = weights[i] * factor;
                sum[i] += kind == SCORE_ATTENTION ? p : kind == SCORE_SQUARES ? p * p : p > 0 && p >= least ? 1.0f : 0.0f;
            }
        }
        memcpy(total + slot, sum, count * sizeof *sum);
    }
}

static void fold(enum score_kind kind, const struct kept_split *split, float *total) {
    switch (kind) {
    case SCORE_ATTENTION: fold_kind(SCORE_ATTENTION, split, total); break;
    case SCORE_SQUARES: fold_kind(SCORE_SQUARES, split, total); break;
    default: fold_kind(SCORE_PERSISTENCE, split, total); break;
    }
}

/* llrint(p * 2^32) without a conversion to integers, which not every instruction set has for vectors: p * 2^32 + 2^52 has units in its last place, so its bits are
 * those of 2^52 and the rounded number. Eight slots at a time, which the compiler makes vectors of. */
static void accumulate(const struct kept_split *split, uint64_t *sums) {
    enum { WIDTH = 8 };
    const double offset = 0x1p52;
    uint64_t offset_bits;
    memcpy(&offset_bits, &offset, sizeof offset_bits);
    for (uint32_t slot = 0; slot < split->n_slots; slot += WIDTH) {
        uint64_t sum[WIDTH];
        for (uint32_t i = 0; i < WIDTH; i++) sum[i] = sums[slot + i] - split->n * offset_bits;
        for (uint32_t q = 0; q < split->n * split->step; q += split->step) {
            const float *weights = split->weights + q * split->stride + slot, factor = split->factor[q];
            double shifted[WIDTH];
            uint64_t bits[WIDTH];
            for (uint32_t i = 0; i < WIDTH; i++) shifted[i] = (double)(weights[i] * factor) * SCORE_ACCUMULATED_ONE + offset;
            memcpy(bits, shifted, sizeof bits);
            for (uint32_t i = 0; i < WIDTH; i++) sum[i] += bits[i];
        }
        memcpy(sums + slot, sum, sizeof sum);
    }
}

/* Keys of block b as [dims/2][32][2] floats, exactly as cached; of q8 still transformed, which leaves lengths and products as they are. */
static const float *block_keys(const struct lane_view *lane, uint32_t b) {
    const struct kv_shape *shape = lane->shape;
    const uint8_t *block = lane->pool + (size_t)lane->blocks[b] * shape->bytes;
    const uint32_t n = shape->dims * BLOCK_TOKENS;
    float *out = lane->keys;
    switch (shape->dtype) {
    case KV_F32: return (const float *)(const void *)block;
    case KV_F16:
        for (uint32_t i = 0; i < n; i += LANES) vf_store(out + i, load_element(KV_F16, block, i));
        break;
    case KV_BF16:
        for (uint32_t i = 0; i < n; i += LANES) vf_store(out + i, load_element(KV_BF16, block, i));
        break;
    case KV_KIVI4:
    case KV_KIVI2: kivi_keys(shape, &lane->residual, lane->pool, lane->blocks, b, out); break;
    default: {
        const float *scales = (const float *)(const void *)(block + shape->scale_offset);
        for (uint32_t quad = 0; quad < shape->dims / 4; quad++)
            for (uint32_t slot = 0; slot < BLOCK_TOKENS; slot++) {
                const uint8_t *bytes = block + (size_t)quad * 4 * BLOCK_TOKENS + 4 * slot;
                float *low = out + (size_t)quad * 4 * BLOCK_TOKENS + 2 * slot, *high = low + 2 * BLOCK_TOKENS;
                for (int i = 0; i < 2; i++) {
                    low[i] = scales[slot] * (float)(bytes[i] - 128);
                    high[i] = scales[slot] * (float)(bytes[2 + i] - 128);
                }
            }
    }
    }
    return out;
}

/* Products of the 32 slots with n query vectors: s->scores [n][SPLIT_SLOTS]. */
static void block_products(const struct split *s, const float *keys) {
    widen_scores_block(KV_F32, s, (const uint8_t *)(const void *)keys, 0, (struct fetch){0});
}

/* In place; n >= 1. The last vector is filled up with what counts for nothing. */
static void softmax(float *x, uint32_t n) {
    float tail[LANES];
    const uint32_t whole = n / LANES * LANES;
    for (uint32_t i = 0; i < LANES; i++) tail[i] = whole + i < n ? x[whole + i] : NO_SCORE;
    vf highest = vf_load(tail);
    for (uint32_t i = 0; i < whole; i += LANES) highest = vf_max(vf_load(x + i), highest);
    vf most = vf_set1(vf_reduce_max(highest)), sum = vf_zero();
    for (uint32_t i = 0; i < whole; i += LANES) {
        vf weight = vf_exp(vf_sub(vf_load(x + i), most));
        vf_store(x + i, weight);
        sum = vf_add(sum, weight);
    }
    vf last = vf_first(vf_exp(vf_sub(vf_load(tail), most)), vf_zero(), (int)(n - whole));
    vf inverse = vf_set1(1.0f / vf_reduce_add(vf_add(sum, last)));
    for (uint32_t i = 0; i < whole; i += LANES) vf_store(x + i, vf_mul(vf_load(x + i), inverse));
    vf_store(tail, vf_mul(last, inverse));
    for (uint32_t i = whole; i < n; i++) x[i] = tail[i - whole];
}

static void expected(const struct lane_view *lane, const float *queries, uint32_t n, float scale, float *out) {
    const uint32_t dims = lane->shape->dims, n_slots = lane->n_slots;
    struct attend a = {.shape = lane->shape};
    struct split s = {.a = &a, .scores = (float *)(void *)lane->attend};
    for (uint32_t slot = 0; slot < n_slots; slot += BLOCK_TOKENS) {
        const float *keys = block_keys(lane, slot / BLOCK_TOKENS);
        float mean[BLOCK_TOKENS], squares[BLOCK_TOKENS] = {0};
        for (uint32_t first = 0; first <= n; first += ATTEND_QUERIES) {
            s.n_queries = n + 1 - first < ATTEND_QUERIES ? n + 1 - first : ATTEND_QUERIES;
            for (uint32_t q = 0; q < s.n_queries; q++) a.query[q] = queries + (size_t)(first + q) * dims;
            block_products(&s, keys);
            if (first == 0) memcpy(mean, s.scores, sizeof mean);
            for (uint32_t q = first == 0; q < s.n_queries; q++)
                for (uint32_t i = 0; i < BLOCK_TOKENS; i++)
                    squares[i] += s.scores[(size_t)q * SPLIT_SLOTS + i] * s.scores[(size_t)q * SPLIT_SLOTS + i];
        }
        for (uint32_t i = 0; i < BLOCK_TOKENS && slot + i < n_slots; i++)
            out[slot + i] = mean[i] * scale + squares[i] / (float)(n > 0 ? n : 1) * (scale * scale / 2);
    }
    softmax(out, n_slots);
}

static void keydiff(const struct lane_view *lane, float *out) {
    const uint32_t dims = lane->shape->dims, n_slots = lane->n_slots;
    float *sums = lane->sums, *mean = sums + (size_t)dims / 2 * LANES, length = 0;
    for (uint32_t i = 0; i < dims / 2 * LANES; i++) sums[i] = 0;
    for (uint32_t slot = 0; slot < n_slots; slot += BLOCK_TOKENS) { /* sums of unit keys; lengths into `out` */
        const float *keys = block_keys(lane, slot / BLOCK_TOKENS);
        float squares[2 * BLOCK_TOKENS] = {0}, inverse[2 * BLOCK_TOKENS] = {0};
        for (uint32_t pair = 0; pair < dims / 2; pair++)
            for (uint32_t i = 0; i < 2 * BLOCK_TOKENS; i++)
                squares[i] += keys[(size_t)pair * 2 * BLOCK_TOKENS + i] * keys[(size_t)pair * 2 * BLOCK_TOKENS + i];
        for (uint32_t i = 0; i < BLOCK_TOKENS && slot + i < n_slots; i++) {
            float norm = out[slot + i] = __builtin_sqrtf(squares[2 * i] + squares[2 * i + 1]);
            inverse[2 * i] = inverse[2 * i + 1] = norm > 0 ? 1 / norm : 0;
        }
        for (uint32_t pair = 0; pair < dims / 2; pair++) {
            vf sum = vf_load(sums + pair * LANES);
            for (uint32_t i = 0; i < 2 * BLOCK_TOKENS; i += LANES)
                sum = vf_fma(vf_load(keys + (size_t)pair * 2 * BLOCK_TOKENS + i), vf_load(inverse + i), sum);
            vf_store(sums + pair * LANES, sum);
        }
    }
    for (uint32_t pair = 0; pair < dims / 2; pair++) {
        mean[2 * pair] = mean[2 * pair + 1] = 0;
        for (uint32_t i = 0; i < LANES; i++) mean[2 * pair + i % 2] += sums[pair * LANES + i];
    }
    for (uint32_t i = 0; i < dims; i++) length += mean[i] * mean[i];
    length = __builtin_sqrtf(length);
    struct attend a = {.shape = lane->shape, .query = {mean}};
    struct split s = {.a = &a, .scores = (float *)(void *)lane->attend, .n_queries = 1};
    for (uint32_t slot = 0; slot < n_slots; slot += BLOCK_TOKENS) {
        block_products(&s, block_keys(lane, slot / BLOCK_TOKENS));
        for (uint32_t i = 0; i < BLOCK_TOKENS && slot + i < n_slots; i++) {
            float both = out[slot + i] * length;
            out[slot + i] = both > 0 ? -s.scores[i] / both : 0;
        }
    }
}

INLINE void value_squares(enum kv_dtype dtype, const uint8_t *values, uint32_t dims, float *squares) {
    for (uint32_t pair = 0; pair < BLOCK_TOKENS / 2; pair++) {
        vf sum[2] = {vf_zero(), vf_zero()};
        for (uint32_t i = 0; i < 2 * dims; i += 2 * LANES)
            for (uint32_t j = 0; j < 2; j++) {
                vf x = load_element(dtype, values, (size_t)pair * dims * 2 + i + j * LANES);
                sum[j] = vf_fma(x, x, sum[j]);
            }
        float lanes[LANES], both[2] = {0, 0};
        vf_store(lanes, vf_add(sum[0], sum[1]));
        for (uint32_t i = 0; i < LANES; i++) both[i % 2] += lanes[i];
        squares[2 * pair] = both[0];
        squares[2 * pair + 1] = both[1];
    }
}

static void value_norms(const struct lane_view *lane, float *out) {
    const struct kv_shape *shape = lane->shape;
    for (uint32_t slot = 0; slot < lane->n_slots; slot += BLOCK_TOKENS) {
        const uint8_t *block = lane->pool + (size_t)lane->blocks[slot / BLOCK_TOKENS] * shape->bytes, *values = block + shape->v_offset;
        const float *scales = (const float *)(const void *)(block + shape->scale_offset) + BLOCK_TOKENS;
        float squares[BLOCK_TOKENS];
        switch (shape->dtype) {
        case KV_F32: value_squares(KV_F32, values, shape->dims, squares); break;
        case KV_F16: value_squares(KV_F16, values, shape->dims, squares); break;
        case KV_BF16: value_squares(KV_BF16, values, shape->dims, squares); break;
        case KV_KIVI4:
        case KV_KIVI2:
            kivi_values(shape, &lane->residual, lane->pool, lane->blocks, slot / BLOCK_TOKENS, lane->keys);
            value_squares(KV_F32, (const uint8_t *)lane->keys, shape->dims, squares);
            break;
        default:
            for (uint32_t i = 0; i < BLOCK_TOKENS; i++) {
                int32_t sum = 0; /* of at most 1,024 squares of bytes */
                const int8_t *quants = (const int8_t *)values + (size_t)i * shape->dims;
                for (uint32_t d = 0; d < shape->dims; d++) sum += quants[d] * quants[d];
                squares[i] = (float)sum * scales[i] * scales[i];
            }
        }
        for (uint32_t i = 0; i < BLOCK_TOKENS && slot + i < lane->n_slots; i++) out[slot + i] = __builtin_sqrtf(squares[i]);
    }
}

static void widen_f16(const uint16_t *halves, uint32_t n, float scale, float *out) {
    uint32_t i = 0;
    for (; i + LANES <= n; i += LANES) vf_store(out + i, vf_mul(vf_load_f16(halves + i), vf_set1(scale)));
    for (; i < n; i++) out[i] = float_from_f16(halves[i]) * scale;
}

static void narrow_f16(const float *x, uint32_t n, uint16_t *halves) {
    uint32_t i = 0;
    for (; i + LANES <= n; i += LANES) vf_store_f16(halves + i, vf_load(x + i));
    for (; i < n; i++) halves[i] = f16_from_float(x[i]);
}
