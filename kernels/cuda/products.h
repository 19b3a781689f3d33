/* What the files of the products share: one call, the matrix instruction and how its operands are laid out, the two kernels of our own.
 *
 *   products.cu  which of the three ways a product goes; cuBLASLt; native weights widened
 *   skinny.cu    up to SKINNY_ROWS rows: as fast as W can be read
 *   broad.cu     any number of rows, the same bits as skinny.cu: for `deterministic`, and where cuBLASLt has no algorithm
 *
 * The order of additions of both of ours is a function of W's columns alone, which is what makes a row's result independent of its neighbours: the columns are cut into
 * steps of 64; sum i of 8 adds steps i, i + 8, i + 16, ... one after the other in f32 (four mma.m16n8k16 a step, `multiply` below); the eight sums are added in order of i. */
#pragma once

#include "kernels/cuda/native.h"

enum {
    SUMS = 8,  /* of an element: skinny.cu's warps */
    STEP = 64, /* columns: 128 bytes of a row, a cache line */
};
static_assert(STEP == (int)NATIVE_COLS, "a tile of native weights is a step");

/* out[row][0 ... n) from in[row][0 ... k), k a multiple of 8. */
struct product_call {
    enum native_form form;
    const void *w; /* [n][k], or tiles of it */
    const __half *in;
    void *out;
    uint32_t n, k, rows;
    uint32_t out_stride; /* elements from row to row */
    enum product_out kind;
};

/* products.cu. Times what cuBLASLt proposes, and broad.cu, on these calls of one shape, and keeps the fastest: for a few dozen rows the first proposal is often not. Their
 * results are written, PRODUCT_ADD_F32's several times. */
void products_tune(struct cuda *cuda, const struct product_call *calls, uint32_t count);
/* skinny.cu. rows <= SKINNY_ROWS. */
struct skinny_device;
enum status skinny_open(const struct cuda *cuda, struct skinny_device **skinny, struct error *error);
void skinny_run(const struct cuda *cuda, const struct skinny_device *skinny, const struct product_call *call);
/* broad.cu. FORM_F16 alone. */
enum status broad_open(struct error *error);
void broad_run(const struct cuda *cuda, const struct product_call *call);

/* 16 bytes of a row, zeros where not `inside`. Weights are read once a step and get no place in L1; activations, which every block of a unit reads, do. */
static __device__ __forceinline__ void copy_weights(uint32_t to, const void *from, bool inside) { copy_16(to, from, inside ? 16 : 0); }
static __device__ __forceinline__ void copy_activations(uint32_t to, const void *from, bool inside) { copy_16_kept(to, from, inside ? 16 : 0); }

/* Half a step, 32 columns: `low` and `high` are columns 8 t ... 8 t + 7 of rows g and g + 8 of W, `b` the same of activation row g. Which columns a fragment's places stand
 * for is free as long as A and B agree: each lane's own eight, so that it reads 16 bytes in one go. */
static __device__ __forceinline__ void multiply(float (&c)[4], const uint4 &low, const uint4 &high, const uint4 &b) {
    multiply_f16(c, low.x, high.x, low.y, high.y, b.x, b.y);
    multiply_f16(c, low.z, high.z, low.w, high.w, b.z, b.w);
}

static __device__ __forceinline__ void store(const struct product_call &call, uint32_t row, uint32_t out, float value) {
    size_t at = (size_t)row * call.out_stride + out;
    if (call.kind == PRODUCT_F16)
        ((__half *)call.out)[at] = __float2half_rn(fminf(fmaxf(value, -65504.0f), 65504.0f));
    else if (call.kind == PRODUCT_F32)
        ((float *)call.out)[at] = value;
    else
        ((float *)call.out)[at] += value;
}
