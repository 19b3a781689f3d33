/* See quantize.h; the formats are described in kernels/tensor.c. Pure. */
#include "tests/support/quantize.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "base/check.h"
#include "base/half.h"

static float write_f16(uint8_t *bytes, float value) {
    uint16_t half = f16_from_float(value);
    memcpy(bytes, &half, sizeof half);
    return float_from_f16(half);
}

static int nearest(float value, float unit, int low, int high) {
    if (unit == 0) return low <= 0 && 0 <= high ? 0 : low;
    float q = rintf(value / unit);
    return q < (float)low ? low : q > (float)high ? high : (int)q;
}

/* The value of largest magnitude, with its sign. */
static float extreme(const float *x, int count) {
    float most = 0;
    for (int i = 0; i < count; i++)
        if (fabsf(x[i]) > fabsf(most)) most = x[i];
    return most;
}

static void range(const float *x, int count, float *low, float *high) {
    *low = *high = x[0];
    for (int i = 1; i < count; i++) {
        *low = fminf(*low, x[i]);
        *high = fmaxf(*high, x[i]);
    }
}

static void quantize_q8_0(const float *x, uint8_t *block) {
    float d = write_f16(block, fabsf(extreme(x, 32)) / 127);
    for (int i = 0; i < 32; i++) block[2 + i] = (uint8_t)(int8_t)nearest(x[i], d, -127, 127);
}

/* The four 32-element formats of 4 and 5 bits: `q` is unsigned; header, then fifth bits if bits == 5, then nibbles. */
static void pack32(const int *q, int bits, uint8_t *after_header) {
    uint32_t fifth = 0;
    for (int i = 0; i < 32; i++) fifth |= (uint32_t)(q[i] >> 4 & 1) << i;
    if (bits == 5) {
        memcpy(after_header, &fifth, sizeof fifth);
        after_header += sizeof fifth;
    }
    for (int i = 0; i < 16; i++) after_header[i] = (uint8_t)((q[i] & 15) | (q[i + 16] & 15) << 4);
}

static void quantize_symmetric(const float *x, uint8_t *block, int bits) {
    int middle = 1 << (bits - 1), q[32];
    float d = write_f16(block, extreme(x, 32) / (float)-middle);
    for (int i = 0; i < 32; i++) q[i] = nearest(x[i], d, -middle, middle - 1) + middle;
    pack32(q, bits, block + 2);
}

static void quantize_affine(const float *x, uint8_t *block, int bits) {
    int most = (1 << bits) - 1, q[32];
    float low, high;
    range(x, 32, &low, &high);
    float d = write_f16(block, (high - low) / (float)most), m = write_f16(block + 2, low);
    for (int i = 0; i < 32; i++) q[i] = nearest(x[i] - m, d, 0, most);
    pack32(q, bits, block + 4);
}

static void write_scales(const int *scale, const int *min, uint8_t scales[12]) {
    for (int g = 0; g < 4; g++) {
        scales[g] = (uint8_t)(scale[g] | scale[g + 4] >> 4 << 6);
        scales[g + 4] = (uint8_t)(min[g] | min[g + 4] >> 4 << 6);
        scales[g + 8] = (uint8_t)((scale[g + 4] & 15) | (min[g + 4] & 15) << 4);
    }
}

static void quantize_groups(const float *x, uint8_t *block, int bits) {
    int most = (1 << bits) - 1, scale[8], min[8];
    float group_scale[8], group_min[8], scale_max = 0, min_max = 0;
    for (int g = 0; g < 8; g++) {
        float low, high;
        range(x + g * 32, 32, &low, &high);
        group_min[g] = low < 0 ? -low : 0;
        group_scale[g] = (high + group_min[g]) / (float)most;
        scale_max = fmaxf(scale_max, group_scale[g]);
        min_max = fmaxf(min_max, group_min[g]);
    }
    float d = write_f16(block, scale_max / 63), dmin = write_f16(block + 2, min_max / 63);
    for (int g = 0; g < 8; g++) {
        scale[g] = nearest(group_scale[g], d, 0, 63);
        min[g] = nearest(group_min[g], dmin, 0, 63);
    }
    write_scales(scale, min, block + 4);
    uint8_t *fifth = block + 16, *nibbles = bits == 5 ? block + 48 : block + 16;
    memset(block + 16, 0, bits == 5 ? 160 : 128);
    for (int i = 0; i < 256; i++) {
        int g = i / 32;
        int q = nearest(x[i] + dmin * (float)min[g], d * (float)scale[g], 0, most);
        nibbles[g / 2 * 32 + i % 32] |= (uint8_t)((q & 15) << (g % 2 * 4));
        if (bits == 5) fifth[i % 32] |= (uint8_t)((q >> 4) << g);
    }
}

static void quantize_q6_k(const float *x, uint8_t *block) {
    float group_scale[16], scale_max = 0;
    for (int g = 0; g < 16; g++) {
        group_scale[g] = extreme(x + g * 16, 16) / -32;
        scale_max = fmaxf(scale_max, fabsf(group_scale[g]));
    }
    memset(block, 0, 208);
    float d = write_f16(block + 208, scale_max / 127);
    for (int i = 0; i < 256; i++) {
        int scale = nearest(group_scale[i / 16], d, -127, 127);
        block[192 + i / 16] = (uint8_t)(int8_t)scale;
        int q = nearest(x[i], d * (float)scale, -32, 31) + 32, half = i / 128, quarter = i / 32 % 4, lane = i % 32;
        block[half * 64 + quarter % 2 * 32 + lane] |= (uint8_t)((q & 15) << (quarter / 2 * 4));
        block[128 + half * 32 + lane] |= (uint8_t)(q >> 4 << (quarter * 2));
    }
}

static void quantize_block(enum tensor_type type, const float *x, uint8_t *block) {
    switch (type) {
    case TENSOR_F32: memcpy(block, x, sizeof *x); return;
    case TENSOR_F16: (void)write_f16(block, *x); return;
    case TENSOR_BF16: {
        uint16_t half = bf16_from_float(*x);
        memcpy(block, &half, sizeof half);
        return;
    }
    case TENSOR_Q8_0: quantize_q8_0(x, block); return;
    case TENSOR_Q4_0: quantize_symmetric(x, block, 4); return;
    case TENSOR_Q5_0: quantize_symmetric(x, block, 5); return;
    case TENSOR_Q4_1: quantize_affine(x, block, 4); return;
    case TENSOR_Q5_1: quantize_affine(x, block, 5); return;
    case TENSOR_Q4_K: quantize_groups(x, block, 4); return;
    case TENSOR_Q5_K: quantize_groups(x, block, 5); return;
    case TENSOR_Q6_K: quantize_q6_k(x, block); return;
    case TENSOR_TYPES: break;
    }
    CHECK(type < TENSOR_TYPES);
}

void quantize(enum tensor_type type, const float *source, void *destination, size_t count) {
    const struct tensor_type_info *info = tensor_type_info(type);
    CHECK(count % info->block_size == 0);
    uint8_t *block = destination;
    for (size_t done = 0; done < count; done += info->block_size, block += info->block_bytes) quantize_block(type, source + done, block);
}
