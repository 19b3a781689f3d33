/* A GGUF block's elements on the device, one at a time: the formats and the arithmetic of kernels/tensor.c. Device code for weights.cu, which passes over each weight once;
 * nothing here is fast. Owns nothing. */
#pragma once

#include "kernels/cuda/cuda.h"

struct block_format {
    enum tensor_type type;
    uint32_t size, bytes;
};

static inline struct block_format block_format_of(enum tensor_type type) {
    const struct tensor_type_info *info = tensor_type_info(type);
    return {type, info->block_size, info->block_bytes};
}

static __device__ uint32_t u16_at(const uint8_t *bytes) { return bytes[0] | (uint32_t)bytes[1] << 8; }
static __device__ uint32_t u32_at(const uint8_t *bytes) { return u16_at(bytes) | u16_at(bytes + 2) << 16; }
static __device__ float f16_at(const uint8_t *bytes) { return __half2float(__ushort_as_half((unsigned short)u16_at(bytes))); }
static __device__ void set_f16(uint8_t *bytes, float value) {
    unsigned short bits = __half_as_ushort(__float2half_rn(value));
    bytes[0] = (uint8_t)bits;
    bytes[1] = (uint8_t)(bits >> 8);
}

/* An element is scale * quant (+ offset), each operation rounded to f32. `quant` is as stored less the type's `zero`. */
struct block_element {
    float scale, offset;
    int quant, zero;
    bool has_offset;
};

/* The nibble of element i of 32, low half first; its fifth bit. */
static __device__ int nibble_at(const uint8_t *nibbles, uint32_t i) { return nibbles[i % 16] >> (i / 16 * 4) & 15; }
static __device__ int fifth_at(const uint8_t *bits, uint32_t i) { return (int)(u32_at(bits) >> i & 1) << 4; }

static __device__ struct block_element group_element(const uint8_t *block, const uint8_t *fifth, const uint8_t *nibbles, uint32_t i) {
    const uint8_t *scales = block + 4;
    uint32_t g = i / 32, lane = i % 32;
    int scale, min;
    if (g < 4) {
        scale = scales[g] & 63;
        min = scales[g + 4] & 63;
    } else {
        scale = (scales[g + 4] & 15) | (scales[g - 4] >> 6) << 4;
        min = scales[g + 4] >> 4 | (scales[g] >> 6) << 4;
    }
    int q = nibbles[g / 2 * 32 + lane] >> (g % 2 * 4) & 15;
    if (fifth) q |= (fifth[lane] >> g & 1) << 4;
    return {__fmul_rn(f16_at(block), (float)scale), -__fmul_rn(f16_at(block + 2), (float)min), q, 0, true};
}

static __device__ struct block_element q6_k_element(const uint8_t *block, uint32_t i) {
    uint32_t half = i / 128, quarter = i / 32 % 4, lane = i % 32;
    int nibble = block[half * 64 + quarter % 2 * 32 + lane] >> (quarter / 2 * 4) & 15;
    int top = block[128 + half * 32 + lane] >> (quarter * 2) & 3;
    return {__fmul_rn(f16_at(block + 208), (float)(int8_t)block[192 + i / 16]), 0, (nibble | top << 4) - 32, 32, false};
}

/* Of a quantised type. */
static __device__ struct block_element element_at(enum tensor_type type, const uint8_t *block, uint32_t i) {
    switch (type) {
    case TENSOR_Q8_0: return {f16_at(block), 0, (int8_t)block[2 + i], 128, false};
    case TENSOR_Q4_0: return {f16_at(block), 0, nibble_at(block + 2, i) - 8, 8, false};
    case TENSOR_Q4_1: return {f16_at(block), f16_at(block + 2), nibble_at(block + 4, i), 0, true};
    case TENSOR_Q5_0: return {f16_at(block), 0, (nibble_at(block + 6, i) | fifth_at(block + 2, i)) - 16, 16, false};
    case TENSOR_Q5_1: return {f16_at(block), f16_at(block + 2), nibble_at(block + 8, i) | fifth_at(block + 4, i), 0, true};
    case TENSOR_Q4_K: return group_element(block, NULL, block + 16, i);
    case TENSOR_Q5_K: return group_element(block, block + 16, block + 48, i);
    case TENSOR_Q6_K: return q6_k_element(block, i);
    default: return {};
    }
}

/* tensor_dequantize's value of element i of a block, bit for bit. */
static __device__ float widen_element(enum tensor_type type, const uint8_t *block, uint32_t i) {
    if (type == TENSOR_F32) return __uint_as_float(u32_at(block));
    if (type == TENSOR_F16) return f16_at(block);
    if (type == TENSOR_BF16) return __uint_as_float(u16_at(block) << 16);
    struct block_element e = element_at(type, block, i);
    float x = __fmul_rn(e.scale, (float)e.quant);
    return e.has_offset ? __fadd_rn(x, e.offset) : x; /* x + 0 would lose a negative zero */
}

/* Half a unit or more beyond f16's largest number, which rounding would make infinite; or no number: what comes of it is made finite on its way (rows.cu), and would pass for an answer. */
static __device__ bool beyond_f16(float x) { return !(fabsf(x) < 65520.0f); }
