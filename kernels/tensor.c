/* The table of tensor types and their widening to f32, block by block, as ggml defines the formats. Owns nothing; pure; any thread.
 * It deliberately does not multiply: every product's oracle is this widening and a plain loop.
 *
 * Blocks are little-endian bytes. d, m, dmin are f16; "low half first" means that quant i of the first half of the elements is the low nibble of
 * byte i and quant i of the second half its high nibble.
 *   Q8_0 d, int8[32]                     x = d q
 *   Q4_0 d, nibbles[16]                  x = d (q - 8)             low half first
 *   Q4_1 d, m, nibbles[16]               x = d q + m
 *   Q5_0 d, fifth bits u32, nibbles[16]  x = d (q - 16)            bit i of the u32 is element i's fifth bit
 *   Q5_1 d, m, fifth bits, nibbles[16]   x = d q + m
 *   Q4_K d, dmin, scales[12], nibbles[128]                 256 elements, 8 groups of 32: x = (d scale_g) q - (dmin min_g)
 *   Q5_K d, dmin, scales[12], fifth bits[32], nibbles[128]  the same with 5-bit q
 *   Q6_K low nibbles[128], two high bits[64], int8 scales[16], d   256 elements, 16 groups of 16: x = (d scale_g) (q - 32) */
#include "kernels/tensor.h"

#include <string.h>

#include "base/check.h"
#include "base/half.h"

/* clang-format off */
static const struct tensor_type_info types[TENSOR_TYPES] = {
    [TENSOR_F32]  = {"F32",    1,   4},
    [TENSOR_F16]  = {"F16",    1,   2},
    [TENSOR_BF16] = {"BF16",   1,   2},
    [TENSOR_Q8_0] = {"Q8_0",  32,  34},
    [TENSOR_Q4_0] = {"Q4_0",  32,  18},
    [TENSOR_Q4_1] = {"Q4_1",  32,  20},
    [TENSOR_Q5_0] = {"Q5_0",  32,  22},
    [TENSOR_Q5_1] = {"Q5_1",  32,  24},
    [TENSOR_Q4_K] = {"Q4_K", 256, 144},
    [TENSOR_Q5_K] = {"Q5_K", 256, 176},
    [TENSOR_Q6_K] = {"Q6_K", 256, 210},
};
/* clang-format on */

const struct tensor_type_info *tensor_type_info(enum tensor_type type) {
    CHECK((unsigned)type < TENSOR_TYPES);
    return &types[type];
}

size_t tensor_row_bytes(const struct tensor *tensor) {
    const struct tensor_type_info *info = tensor_type_info(tensor->type);
    CHECK(tensor->cols % info->block_size == 0);
    return (size_t)(tensor->cols / info->block_size) * info->block_bytes;
}

size_t tensor_bytes(const struct tensor *tensor) {
    size_t bytes;
    CHECK(size_mul(tensor->rows, tensor_row_bytes(tensor), &bytes));
    return bytes;
}

static uint16_t read_u16(const uint8_t *bytes) { return (uint16_t)(bytes[0] | bytes[1] << 8); }

static uint32_t read_u32(const uint8_t *bytes) {
    return (uint32_t)bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

static float read_f16(const uint8_t *bytes) { return float_from_f16(read_u16(bytes)); }

/* One block each: source bytes to block_size floats. */
static void widen_f32(const uint8_t *source, float *x) { memcpy(x, source, sizeof *x); }
static void widen_f16(const uint8_t *source, float *x) { *x = read_f16(source); }
static void widen_bf16(const uint8_t *source, float *x) { *x = float_from_bf16(read_u16(source)); }

static void widen_q8_0(const uint8_t *source, float *x) {
    float d = read_f16(source);
    for (int i = 0; i < 32; i++) x[i] = d * (float)(int8_t)source[2 + i];
}

static void widen_q4_0(const uint8_t *source, float *x) {
    float d = read_f16(source);
    for (int i = 0; i < 16; i++) {
        x[i] = d * (float)((source[2 + i] & 15) - 8);
        x[i + 16] = d * (float)((source[2 + i] >> 4) - 8);
    }
}

static void widen_q4_1(const uint8_t *source, float *x) {
    float d = read_f16(source), m = read_f16(source + 2);
    for (int i = 0; i < 16; i++) {
        x[i] = d * (float)(source[4 + i] & 15) + m;
        x[i + 16] = d * (float)(source[4 + i] >> 4) + m;
    }
}

/* Element i's 5-bit quant, from the fifth bits and the nibbles. */
static int quant5(uint32_t fifth, const uint8_t *nibbles, int i) {
    int low = i < 16 ? nibbles[i] & 15 : nibbles[i - 16] >> 4;
    return low | (int)(fifth >> i & 1u) << 4;
}

static void widen_q5_0(const uint8_t *source, float *x) {
    float d = read_f16(source);
    uint32_t fifth = read_u32(source + 2);
    for (int i = 0; i < 32; i++) x[i] = d * (float)(quant5(fifth, source + 6, i) - 16);
}

static void widen_q5_1(const uint8_t *source, float *x) {
    float d = read_f16(source), m = read_f16(source + 2);
    uint32_t fifth = read_u32(source + 4);
    for (int i = 0; i < 32; i++) x[i] = d * (float)quant5(fifth, source + 8, i) + m;
}

/* 6-bit scale and minimum of group g. Groups 0-3 have theirs in the low six bits of bytes g and g + 4; groups 4-7 keep four bits in byte g + 4 (scale low nibble,
 * minimum high) and two in the top of bytes g - 4 and g. */
static void scale_and_min(const uint8_t scales[12], int g, int *scale, int *min) {
    if (g < 4) {
        *scale = scales[g] & 63;
        *min = scales[g + 4] & 63;
    } else {
        *scale = (scales[g + 4] & 15) | (scales[g - 4] >> 6) << 4;
        *min = scales[g + 4] >> 4 | (scales[g] >> 6) << 4;
    }
}

/* fifth == NULL: 4-bit quants. Groups come in pairs that share 32 bytes of nibbles: the even group has the low ones. Bit g of fifth[i] is element i of group g. */
static void widen_groups(const uint8_t *source, const uint8_t *fifth, const uint8_t *nibbles, float *x) {
    float d = read_f16(source), dmin = read_f16(source + 2);
    for (int g = 0; g < 8; g++) {
        int scale, min;
        scale_and_min(source + 4, g, &scale, &min);
        float group_d = d * (float)scale, group_min = dmin * (float)min;
        for (int i = 0; i < 32; i++) {
            int q = nibbles[g / 2 * 32 + i] >> (g % 2 * 4) & 15;
            if (fifth) q |= (fifth[i] >> g & 1) << 4;
            x[g * 32 + i] = group_d * (float)q - group_min;
        }
    }
}

static void widen_q4_k(const uint8_t *source, float *x) { widen_groups(source, NULL, source + 16, x); }
static void widen_q5_k(const uint8_t *source, float *x) { widen_groups(source, source + 16, source + 48, x); }

/* Halves of 128 elements, each in four quarters of 32: quarters 0 and 2 share 32 bytes of nibbles (low, high), 1 and 3 the next 32; quarter j has its two high
 * bits at bit 2j of the half's 32 bytes. */
static void widen_q6_k(const uint8_t *source, float *x) {
    const uint8_t *low = source, *high = source + 128, *scales = source + 192;
    float d = read_f16(source + 208);
    for (int i = 0; i < 256; i++) {
        int half = i / 128, quarter = i / 32 % 4, lane = i % 32;
        int nibble = low[half * 64 + quarter % 2 * 32 + lane] >> (quarter / 2 * 4) & 15;
        int top = high[half * 32 + lane] >> (quarter * 2) & 3;
        x[i] = d * (float)(int8_t)scales[i / 16] * (float)((nibble | top << 4) - 32);
    }
}

typedef void widen(const uint8_t *source, float *x);

static widen *const wideners[TENSOR_TYPES] = {
    [TENSOR_F32] = widen_f32,   [TENSOR_F16] = widen_f16,   [TENSOR_BF16] = widen_bf16, [TENSOR_Q8_0] = widen_q8_0,
    [TENSOR_Q4_0] = widen_q4_0, [TENSOR_Q4_1] = widen_q4_1, [TENSOR_Q5_0] = widen_q5_0, [TENSOR_Q5_1] = widen_q5_1,
    [TENSOR_Q4_K] = widen_q4_k, [TENSOR_Q5_K] = widen_q5_k, [TENSOR_Q6_K] = widen_q6_k,
};

void tensor_dequantize(enum tensor_type type, const void *source, float *destination, size_t count) {
    const struct tensor_type_info *info = tensor_type_info(type);
    CHECK(count % info->block_size == 0);
    if (type == TENSOR_F32) { /* a block an element: too slow for the one type that needs no widening */
        memcpy(destination, source, count * sizeof *destination);
        return;
    }
    const uint8_t *block = source;
    for (size_t done = 0; done < count; done += info->block_size, block += info->block_bytes) wideners[type](block, destination + done);
}

void tensor_row_f32(const struct tensor *tensor, uint32_t row, float *destination) {
    CHECK(tensor->data && row < tensor->rows);
    tensor_dequantize(tensor->type, (const uint8_t *)tensor->data + row * tensor_row_bytes(tensor), destination, tensor->cols);
}
