/* The transform that q8's keys are cached under. One dim of a key is often many times the others, and a scale a slot that reaches it rounds them away; under the Walsh-Hadamard transform each
 * dim is shared among all, so that a scale loses as little of each. (As Ashkboos et al. do with keys in QuaRot, 2024, and as the cpu backend does.)
 *
 * It is orthogonal, so a transformed query and a transformed key have the product that they had before, and a key the length. So of KV_Q8, in this backend:
 *   transformed   keys in the pool (rows.cu writes them, sinks.cu those that it moves); queries where they wait for attention and in rings, f16 of the transformed ones
 *   as ever       values; what cuda_read_f32 gives; the copy of sinks, which is rotated; what expected attention rotates (score_window.cu), until it meets keys
 * Kernels that take products of queries and keys, or of keys and sums of keys, or move slots, need not know.
 *
 * A run of `size` dims at a time is transformed, the largest power of two that divides d: a head of 128, 64 or 32 dims as one, of 96 in thirds, of 80 in fifths. Device code; owns nothing. */
#pragma once

#include "kernels/cuda/cuda.h"

enum { ROW_ELEMENTS = HEAD_DIM_MAX / 32 }; /* of a row, to one thread of a warp: elements lane + 32 i */

static inline bool kv_transforms(enum kv_dtype dtype) { return dtype == KV_Q8; }

static __device__ __forceinline__ void hadamard_pair(float *first, float *second) {
    const float a = *first, b = *second;
    *first = a + b;
    *second = a - b;
}

/* A warp's row of d elements, orthonormal: its own inverse. All of the warp. Elements from d on do not matter, and are anything afterwards. */
static __device__ __forceinline__ void hadamard(float x[ROW_ELEMENTS], uint32_t d, uint32_t lane) {
    static_assert(ROW_ELEMENTS == 4, "pairs of elements");
    const uint32_t size = d & (0u - d);
    for (uint32_t step = 1; step < 32 && step < size; step *= 2)
#pragma unroll
        for (uint32_t i = 0; i < ROW_ELEMENTS; i++) {
            const float other = __shfl_xor_sync(0xffffffffu, x[i], (int)step);
            x[i] = lane & step ? other - x[i] : x[i] + other;
        }
    if (size > 32) {
        hadamard_pair(&x[0], &x[1]);
        hadamard_pair(&x[2], &x[3]);
    }
    if (size > 64) {
        hadamard_pair(&x[0], &x[2]);
        hadamard_pair(&x[1], &x[3]);
    }
    const float scale = 1 / sqrtf((float)size);
#pragma unroll
    for (uint32_t i = 0; i < ROW_ELEMENTS; i++) x[i] *= scale;
}
