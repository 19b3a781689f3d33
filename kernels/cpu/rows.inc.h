/* Operations along rows: norm, quantisation, activation, rotation, exponential, and what is done with a strip's results; over the vectors of the file that
 * includes this one. */

/* e^x for x <= 0 (and a little above): 2^n times a polynomial on [-ln2/2, ln2/2], about 1 ulp; 0 below -87. */
INLINE vf vf_exp(vf x) {
    x = vf_max(x, vf_set1(-100));
    vf n = vf_round(vf_mul(x, vf_set1(1.44269504f)));
    vf r = vf_fma(n, vf_set1(-0.693359375f), x);
    r = vf_fma(n, vf_set1(2.12194440e-4f), r);
    vf p = vf_set1(1.9875691500e-4f);
    p = vf_fma(p, r, vf_set1(1.3981999507e-3f));
    p = vf_fma(p, r, vf_set1(8.3334519073e-3f));
    p = vf_fma(p, r, vf_set1(4.1665795894e-2f));
    p = vf_fma(p, r, vf_set1(1.6666665459e-1f));
    p = vf_fma(p, r, vf_set1(5.0000001201e-1f));
    p = vf_fma(p, vf_mul(r, r), vf_add(r, vf_set1(1)));
    return vf_scale(p, n);
}

static void norm(const float *x, const float *weight, uint32_t n, float epsilon, float *out) {
    vf sum[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
    uint32_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
#pragma GCC unroll 4
        for (uint32_t c = 0; c < 4; c++) {
            vf v = vf_load(x + i + LANES * c);
            sum[c] = vf_fma(v, v, sum[c]);
        }
    float tail = 0;
    for (; i < n; i++) tail += x[i] * x[i];
    float squares = vf_reduce_add(vf_add(vf_add(sum[0], sum[1]), vf_add(sum[2], sum[3]))) + tail;
    float scale = 1.0f / __builtin_sqrtf(squares / (float)n + epsilon);
    vf s = vf_set1(scale);
    for (i = 0; i + LANES <= n; i += LANES) vf_store(out + i, vf_mul(vf_mul(vf_load(x + i), s), vf_load(weight + i)));
    for (; i < n; i++) out[i] = x[i] * scale * weight[i];
}

/* What quants q leave of `scaled`, in 256ths of their step: half a step at most, of which the last 256th is given up. */
INLINE vf rest_of(vf scaled, const int8_t *q) { return vf_max(vf_mul(vf_sub(scaled, vf_load_s8(q)), vf_set1(256)), vf_set1(-127)); }

INLINE void quantize_rest(const float *x, vf inverse, const int8_t *q, struct act_plane *plane, int32_t *sum) {
    float rest[PANEL_K];
    for (int i = 0; i < PANEL_K; i += LANES) vf_store(rest + i, rest_of(vf_mul(vf_load(x + i), inverse), q + i));
    int32_t low, high;
    quantize_32(rest, vf_set1(1), plane->q, &low, &high);
    plane->nsum = -(low + high);
    plane->nsum_low = -low;
    *sum = low + high;
}

/* One plane, and 8 more bits for the quad of the largest (struct act_block). */
INLINE void quantize_with_high(const float *x, struct act_block *block) {
    enum { AT = PANEL_K - QUAD };
    static const float one_quad[AT + PANEL_K] = {[AT] = 1.0f / 256, 1.0f / 256, 1.0f / 256, 1.0f / 256};
    float most, rest, high[PANEL_K], low[PANEL_K];
    block->quad = highest_quad(x, &most, &rest);
    const float *chosen = one_quad + AT - QUAD * block->quad;
    /* Below this the inverse overflows; such values are zero beside anything else. */
    bool small = !(most > 1e-32f);
    float d = rest * (1.0f / 127), reach = most * (1.0f / (127 * 257));
    d = small ? 0 : d > reach ? d : reach;
    vf inverse = vf_set1(small ? 0 : 1 / d);
    for (int i = 0; i < PANEL_K; i += LANES) {
        vf scaled = vf_max(vf_mul(vf_load(x + i), inverse), vf_set1(-127 * 257)); /* no NaN from here on */
        vf coarse = vf_round(vf_mul(scaled, vf_load(chosen + i)));
        vf_store(high + i, coarse);
        vf_store(low + i, vf_max(vf_fma(coarse, vf_set1(-256), scaled), vf_set1(-127)));
    }
    int32_t low_sum, high_sum, coarse_sum = 0;
    quantize_32(low, vf_set1(1), block->plane[0].q, &low_sum, &high_sum);
    for (uint32_t i = 0; i < QUAD; i++) {
        int32_t coarse = (int32_t)high[QUAD * block->quad + i];
        block->high[i] = (int8_t)coarse;
        coarse_sum += coarse;
    }
    const int32_t sum = low_sum + high_sum + 256 * coarse_sum;
    block->plane[0].nsum = -sum;
    block->plane[0].nsum_low = -(low_sum + (block->quad < 4 ? 256 * coarse_sum : 0));
    block->d = d;
    block->s = d * (float)sum;
}

INLINE void quantize_wide(const float *x, struct act_block *block) {
    vf highest = vf_zero();
    for (int i = 0; i < PANEL_K; i += LANES) highest = vf_max(vf_abs(vf_load(x + i)), highest);
    float most = vf_reduce_max(highest);
    /* Below this the inverse overflows; such values are zero beside anything else. */
    bool small = !(most > 1e-34f);
    float d = small ? 0 : most * (1.0f / 127), inverse = small ? 0 : 127.0f / most;
    int32_t low, high;
    quantize_32(x, vf_set1(inverse), block->plane[0].q, &low, &high);
    block->plane[0].nsum = -(low + high);
    block->plane[0].nsum_low = -low;
    int32_t rest;
    quantize_rest(x, vf_set1(inverse), block->plane[0].q, &block->plane[1], &rest);
    block->d = d * (1.0f / 256);
    block->s = block->d * (float)(256 * (low + high) + rest);
}

/* n blocks, each `from` floats and `to` bytes after the one before. */
INLINE void quantize_blocks(const float *x, size_t from, uint32_t n, const uint32_t planes, struct act_block *first, size_t to) {
    uint8_t *at = (uint8_t *)first;
    for (uint32_t i = 0; i < n; i++) {
        struct act_block *block = (struct act_block *)(void *)(at + i * to);
        if (planes == 2)
            quantize_wide(x + i * from, block);
        else
            quantize_with_high(x + i * from, block);
    }
}

static void quantize_column(const float (*x)[PANEL_K], uint32_t n_rows, uint32_t planes, struct act_block *first, size_t stride) {
    if (planes == 2)
        quantize_blocks(x[0], PANEL_K, n_rows, 2, first, stride);
    else
        quantize_blocks(x[0], PANEL_K, n_rows, 1, first, stride);
}

static void quantize(const float *x, uint32_t n_blocks, uint32_t planes, struct act_block *first) {
    quantize_column((const float(*)[PANEL_K])(const void *)x, n_blocks, planes, first, act_block_bytes(planes));
}

INLINE vf silu_vector(vf gate, vf up) {
    /* gate / (1 + e^-gate), with the exponential of a negative number on either side */
    vf e = vf_exp(vf_sub(vf_zero(), vf_abs(gate)));
    vf one = vf_set1(1), denominator = vf_add(one, e);
    vf positive = vf_max(gate, vf_zero()), negative = vf_sub(gate, positive);
    vf value = vf_div(vf_fma(negative, e, positive), denominator);
    return vf_mul(value, up);
}

static void silu(const float (*gate)[STRIP_ROWS], const float (*up)[STRIP_ROWS], uint32_t n_rows, float (*out)[PANEL_K]) {
    for (uint32_t r = 0; r < n_rows; r++)
        for (int i = 0; i < STRIP_ROWS; i += LANES) vf_store(out[r] + i, silu_vector(vf_load(gate[r] + i), vf_load(up[r] + i)));
}

static void put_strip(const float (*y)[STRIP_ROWS], uint32_t n_rows, uint32_t n, const float *bias, float *out, size_t stride) {
    if (n < STRIP_ROWS) {
        for (uint32_t r = 0; r < n_rows; r++)
            for (uint32_t i = 0; i < n; i++) out[r * stride + i] = bias ? y[r][i] + bias[i] : y[r][i];
        return;
    }
    for (uint32_t r = 0; r < n_rows; r++, out += stride)
        for (int i = 0; i < STRIP_ROWS; i += LANES) vf_store(out + i, bias ? vf_add(vf_load(y[r] + i), vf_load(bias + i)) : vf_load(y[r] + i));
}

static void add_strip(const float (*y)[STRIP_ROWS], uint32_t n_rows, uint32_t n, float *x, size_t stride) {
    if (n < STRIP_ROWS) {
        for (uint32_t r = 0; r < n_rows; r++)
            for (uint32_t i = 0; i < n; i++) x[r * stride + i] += y[r][i];
        return;
    }
    for (uint32_t r = 0; r < n_rows; r++, x += stride)
        for (int i = 0; i < STRIP_ROWS; i += LANES) vf_store(x + i, vf_add(vf_load(x + i), vf_load(y[r] + i)));
}

/* out = x cosine + (partner of x) sine: the partner of a dim is its neighbour, or the one half the vector away; sine carries the sign. */
static void rotate(const float *x, uint32_t n, bool halves, const float *cosine, const float *sine, float *restrict out) {
    if (halves) {
        const uint32_t half = n / 2;
        for (uint32_t i = 0; i < half; i++) out[i] = x[i] * cosine[i] + x[i + half] * sine[i];
        for (uint32_t i = half; i < n; i++) out[i] = x[i] * cosine[i] + x[i - half] * sine[i];
    } else {
        for (uint32_t i = 0; i < n; i += 2) {
            out[i] = x[i] * cosine[i] + x[i + 1] * sine[i];
            out[i + 1] = x[i + 1] * cosine[i + 1] + x[i] * sine[i + 1];
        }
    }
}

INLINE void hadamard_level(float *x, uint32_t n, const uint32_t step) {
    for (uint32_t first = 0; first < n; first += 2 * step)
        for (uint32_t i = first; i < first + step; i++) {
            float a = x[i], b = x[i + step];
            x[i] = a + b;
            x[i + step] = a - b;
        }
}

static void hadamard(float *restrict x, uint32_t n) {
    const uint32_t size = n & (0u - n);
    hadamard_level(x, n, 1); /* constants: the compiler makes shuffles of the narrow ones */
    hadamard_level(x, n, 2);
    hadamard_level(x, n, 4);
    hadamard_level(x, n, 8);
    for (uint32_t step = KV_PAD; step < size; step *= 2) hadamard_level(x, n, step);
    const float scale = 1 / __builtin_sqrtf((float)size);
    for (uint32_t i = 0; i < n; i++) x[i] *= scale;
}

static void track(const float logits[STRIP_ROWS], uint32_t strip, struct best_logits *best) {
    for (int i = 0; i < STRIP_ROWS; i++) {
        bool higher = logits[i] > best->value[i];
        best->value[i] = higher ? logits[i] : best->value[i];
        best->strip[i] = higher ? strip : best->strip[i];
    }
}
