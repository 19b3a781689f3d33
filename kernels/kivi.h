/* KIVI (Liu et al. 2024, arXiv 2402.02750) as the KV dtypes kivi4 and kivi2: how numbers become codes, and which row reads which block as codes. Pure; shared by all backends, so that codes
 * are the same bits everywhere. Where codes lie is each backend's own business.
 *
 * A group of numbers is kept as codes of 4 or 2 bits with one scale and one minimum, both f16: x = code * scale + minimum. Keys, after rotation: a group is one channel over the BLOCK_TOKENS
 * slots of a block, so that channels with large values cost the others nothing (section 3.2, "per channel"). Values: a group is KIVI_GROUP channels of one slot ("per token"), the last one
 * shorter where head_dim is no multiple.
 *
 * What is quantised is the f16 number that full precision keeps. The residual: a row reads a block as codes if the block is full and its newest token lies KIVI_RESIDUAL or more before the
 * row's own, else in f16. In a lane that lost nothing, position p reads block j as codes iff 32 (j + 1) + 64 <= p; in one that was compacted, ages decide likewise, since blocks are in
 * order of age. A function of positions alone: chunks, batches and what is shared cannot change it. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/block.h"
#include "base/half.h"
#include "kernels/backend.h"
#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

#ifdef __CUDACC__
#define KIVI_INLINE static inline __host__ __device__
#else
#define KIVI_INLINE static inline
#endif

#define KIVI_RESIDUAL 64
#define KIVI_GROUP 32u     /* channels of a value that share a scale, as in all of the paper's settings */
#define KIVI_NUMBER_END 65520.f /* numbers lie below: what rounds to f16's infinity begins here */
#define KIVI_RAW_BLOCKS 3u /* of a lane, at most, are read in f16 by the next row: it and KIVI_RESIDUAL slots before it span no more */

KIVI_INLINE uint32_t kivi_bits(enum kv_dtype dtype) { return dtype == KV_KIVI4 ? 4 : dtype == KV_KIVI2 ? 2 : 0; } /* 0: not KIVI */
KIVI_INLINE uint32_t kivi_value_groups(uint32_t head_dim) { return (head_dim + KIVI_GROUP - 1) / KIVI_GROUP; }

/* Does the row at `position` read as codes a full block whose last slot holds position `newest`? */
KIVI_INLINE bool kivi_reads_codes(int32_t newest, int32_t position) { return (int64_t)newest + 1 + KIVI_RESIDUAL <= position; }

struct kivi_scale {
    uint16_t scale, minimum; /* f16 */
};

/* f16 on a device by its own conversions, which are the same ones. */
#ifdef __CUDA_ARCH__
KIVI_INLINE float kivi_widen(uint16_t half) { return __half2float(__ushort_as_half(half)); }
KIVI_INLINE uint16_t kivi_narrow(float x) { return __half_as_ushort(__float2half_rn(x)); }
#else
KIVI_INLINE float kivi_widen(uint16_t half) { return float_from_f16(half); }
KIVI_INLINE uint16_t kivi_narrow(float x) { return f16_from_float(x); }
#endif

/* Codes of x[0], x[stride], ... (n finite f16 numbers, widened), one a byte, to codes[0], codes[code_stride], ... */
KIVI_INLINE struct kivi_scale kivi_quantize(const float *x, size_t stride, uint32_t n, uint32_t bits, uint8_t *codes, size_t code_stride) {
    const float levels = (float)((1u << bits) - 1);
    float low = x[0], high = x[0];
    for (uint32_t i = 1; i < n; i++) {
        low = x[i * stride] < low ? x[i * stride] : low;
        high = x[i * stride] > high ? x[i * stride] : high;
    }
    struct kivi_scale made = {kivi_narrow((high - low) / levels), kivi_narrow(low)};
    /* What was rounded up could take the largest number beyond f16, in which devices have them; one scale lower it is at most `high`. */
    if (levels * kivi_widen(made.scale) + low >= KIVI_NUMBER_END) made.scale--;
    const float scale = kivi_widen(made.scale);
    for (uint32_t i = 0; i < n; i++) {
        float code = scale > 0 ? (x[i * stride] - low) / scale : 0;
        code = code > levels ? levels : code;
        codes[i * code_stride] = (uint8_t)((code + 0x1.8p23f) - 0x1.8p23f); /* nearest, ties to even */
    }
    return made;
}

/* The product is exact, so that one rounding is left whether or not it is fused. */
KIVI_INLINE float kivi_number(uint8_t code, struct kivi_scale scale) { return (float)code * kivi_widen(scale.scale) + kivi_widen(scale.minimum); }

/* keep[i] and the 31 behind it are one whole block that becomes a whole block: what a compaction must do to blocks that are codes, whose slots share scales. */
KIVI_INLINE bool kivi_whole_block(const uint32_t *keep, uint32_t n_keep, uint32_t i) {
    return i % BLOCK_TOKENS == 0 && keep[i] % BLOCK_TOKENS == 0 && n_keep - i >= BLOCK_TOKENS &&
           keep[i + BLOCK_TOKENS - 1] == keep[i] + BLOCK_TOKENS - 1;
}
