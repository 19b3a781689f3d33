/* Weights that stay in the file's types: how they lie on the device, and eight of them at a time as f16. Shared by weights.cu, which packs them, and products.cu, which
 * multiplies with them. Nothing here is owned; device code but for the sizes.
 *
 * A matrix is cut into tiles of 16 rows by 64 columns, the rows of tiles one after the other. Lane l = 4 g + t of a warp takes rows g and g + 8 ("low" and "high") of a
 * tile, columns 8 t ... 8 t + 7 of each 32-column half: the places of mma.m16n8k16 as products.cu uses it. A tile is
 *   quants   what the 32 lanes read, 16 bytes each in one go (FORM_8: twice, a half each; FORM_6: and 8 more bytes of high bits)
 *   scales   f16, of each group of columns and row: (FORM_4, 8, 6) of low in half 0, high in half 0, low in half 1, high in half 1; FORM_4_OFFSET: pairs (scale, offset) in that
 *            order. FORM_6 has groups of 16 columns, so that lanes 4 g + {0, 1} and 4 g + {2, 3} read others.
 * Rows and columns past the matrix have scale 0. In the 32 bits of 8 nibbles, pair p = 0 ... 3 of neighbouring columns has its first at bit 4 p, its second at bit
 * 16 + 4 p: (word >> 4 p & 0x000f000f) is two 16-bit integers, which an exponent above turns into f16.
 *
 * The value is f16(scale * q [+ offset]), rounded once. Q4_0, Q8_0: exactly what f16 weights are. Q4_1: but for the last bit where tensor_dequantize's rounding to f32 comes to lie
 * between two f16. Q4_K, Q6_K: scale (and offset) of a group are rounded to f16 before, which costs at most a unit of the last place more. */
#pragma once

#include "kernels/cuda/cuda.h"

enum {
    NATIVE_ROWS = 16, /* of a tile */
    NATIVE_COLS = 64,
};

enum native_form { FORM_F16, FORM_4, FORM_4_OFFSET, FORM_8, FORM_6 }; /* FORM_F16: not of this kind */

static inline enum native_form native_form_of(enum tensor_type type) {
    switch (type) {
    case TENSOR_Q4_0: return FORM_4;
    case TENSOR_Q4_1:
    case TENSOR_Q4_K: return FORM_4_OFFSET;
    case TENSOR_Q8_0: return FORM_8;
    case TENSOR_Q6_K: return FORM_6;
    default: return FORM_F16;
    }
}

/* Bytes: of a lane's quants, of its scales, of all scales of a tile. */
static __host__ __device__ constexpr uint32_t native_quant_bytes(enum native_form form) { return form == FORM_8 ? 32 : form == FORM_6 ? 24 : 16; }
static __host__ __device__ constexpr uint32_t native_scale_bytes(enum native_form form) { return form == FORM_4_OFFSET ? 16 : 8; }
static __host__ __device__ constexpr uint32_t native_tile_bytes(enum native_form form) {
    return 32 * native_quant_bytes(form) + (form == FORM_6 ? 16 : 8) * native_scale_bytes(form);
}

static inline size_t native_bytes(enum native_form form, uint32_t rows, uint32_t cols) {
    return (size_t)div_up(rows, NATIVE_ROWS) * div_up(cols, NATIVE_COLS) * native_tile_bytes(form);
}

/* Where in a tile lane l reads: its 16 bytes of quants (FORM_8: of half 0; half 1's are 512 further), its 8 bytes of high bits, its scales. */
static __host__ __device__ constexpr uint32_t native_quants_at(uint32_t lane) { return lane * 16; }
static __host__ __device__ constexpr uint32_t native_high_bits_at(uint32_t lane) { return 512 + lane * 8; }
static __host__ __device__ constexpr uint32_t native_scales_at(enum native_form form, uint32_t lane) {
    return 32 * native_quant_bytes(form) + (form == FORM_6 ? lane / 2 : lane / 4) * native_scale_bytes(form);
}

/* What a lane holds of a tile. */
template <enum native_form FORM> struct native_lane {
    uint32_t quants[native_quant_bytes(FORM) / 4];
    uint32_t scales[native_scale_bytes(FORM) / 4];
};

static __device__ __forceinline__ __half2 half2_of(uint32_t bits) {
    __half2 h;
    memcpy(&h, &bits, sizeof h);
    return h;
}
static __device__ __forceinline__ uint32_t bits_of(__half2 h) {
    uint32_t bits;
    memcpy(&bits, &h, sizeof bits);
    return bits;
}

static const uint32_t EXPONENTS = 0x64006400; /* two f16 of 1024, whose last bit is 1: integers below 1024 go into the mantissa */

/* Two integers under EXPONENTS, less `offset`, exactly. */
static __device__ __forceinline__ __half2 integers(uint32_t mantissas, float offset) {
    return __hsub2(half2_of(mantissas), __float2half2_rn(1024 + offset));
}

/* The four pairs of a word of nibbles, less `offset`. */
static __device__ __forceinline__ void nibble_pairs(uint32_t word, float offset, __half2 (&pairs)[4]) {
    const __half2 sixteenth = __float2half2_rn(1.0f / 16), shifted = __float2half2_rn(-64 - offset);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        pairs[2 * i] = integers(masked_into<0x000f000f>(EXPONENTS, word), offset);
        pairs[2 * i + 1] = __hfma2(half2_of(masked_into<0x00f000f0>(EXPONENTS, word)), sixteenth, shifted); /* (1024 + 16 q) / 16 - 64 */
        word >>= 8;
    }
}

/* The 8 weights of the low or high row in half 0 or 1: pairs of columns in ascending order. */
template <enum native_form FORM> static __device__ __forceinline__ uint4 native_widen(const native_lane<FORM> &lane, int half, int high) {
    __half2 pairs[4];
    if constexpr (FORM == FORM_4) nibble_pairs(lane.quants[half * 2 + high], 8, pairs);
    if constexpr (FORM == FORM_4_OFFSET) nibble_pairs(lane.quants[half * 2 + high], 0, pairs);
    if constexpr (FORM == FORM_8) {
#pragma unroll
        for (int i = 0; i < 4; i++) /* bytes 2 i and 2 i + 1, of q + 128, below those of EXPONENTS */
            pairs[i] = integers(__byte_perm(lane.quants[half * 4 + high * 2 + i / 2], EXPONENTS, i % 2 ? 0x5352 : 0x5150), 128);
    }
    if constexpr (FORM == FORM_6) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int down = 2 * i + 8 * high - 4; /* the two high bits to bits 4 and 5 */
            uint32_t bits = lane.quants[4 + half], top = down < 0 ? bits << -down : bits >> (down < 0 ? 0 : down);
            pairs[i] = integers(masked_into<0x000f000f>(masked_into<0x00300030>(EXPONENTS, top), lane.quants[half * 2 + high] >> (4 * i)), 32);
        }
    }
    uint4 v;
    if constexpr (FORM == FORM_4_OFFSET) {
        __half2 both = half2_of(lane.scales[half * 2 + high]), scale = __low2half2(both), offset = __high2half2(both);
        v = make_uint4(bits_of(__hfma2(pairs[0], scale, offset)), bits_of(__hfma2(pairs[1], scale, offset)),
                       bits_of(__hfma2(pairs[2], scale, offset)), bits_of(__hfma2(pairs[3], scale, offset)));
    } else {
        __half2 both = half2_of(lane.scales[half]), scale = high ? __high2half2(both) : __low2half2(both);
        v = make_uint4(bits_of(__hmul2(pairs[0], scale)), bits_of(__hmul2(pairs[1], scale)), bits_of(__hmul2(pairs[2], scale)),
                       bits_of(__hmul2(pairs[3], scale)));
    }
    return v;
}

/* A lane's part of a tile in global memory. */
template <enum native_form FORM> static __device__ __forceinline__ void native_read(native_lane<FORM> &to, const uint8_t *tile, uint32_t lane) {
    memcpy(to.quants, __builtin_assume_aligned(tile + native_quants_at(lane), 16), 16);
    if constexpr (FORM == FORM_8) memcpy(to.quants + 4, __builtin_assume_aligned(tile + 512 + native_quants_at(lane), 16), 16);
    if constexpr (FORM == FORM_6) memcpy(to.quants + 4, __builtin_assume_aligned(tile + native_high_bits_at(lane), 8), 8);
    memcpy(to.scales, __builtin_assume_aligned(tile + native_scales_at(FORM, lane), 8), native_scale_bytes(FORM));
}
