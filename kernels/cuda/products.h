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

/* 16 bytes from global to shared memory, on their own; zeros where not `inside`. Not through registers: a thread's loads into registers are waited for all at once, copies in the
 * order of their groups. Weights are read once a step and get no place in L1; activations, which every block of a unit reads, do. */
static __device__ __forceinline__ void copy_weights(uint32_t to, const void *from, bool inside) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
static __device__ __forceinline__ void copy_8_bytes(uint32_t to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}
static __device__ __forceinline__ void copy_activations(uint32_t to, const void *from, bool inside) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
static __device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> static __device__ __forceinline__ void wait_for_groups() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
static __device__ __forceinline__ uint4 shared_at(uint32_t at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
}
static __device__ __forceinline__ uint2 shared_8_at(uint32_t at) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
    return v;
}

/* c += A B for 16 x 16 of f16 by 16 x 8. With g = lane / 4 and t = lane % 4: a0 = A[g][2t, 2t+1], a1 = A[g+8][the same], a2 = A[g][2t+8, 2t+9], a3 = A[g+8][those];
 * b0 = B[2t, 2t+1][g], b1 = B[2t+8, 2t+9][g]; c = C[g][2t], C[g][2t+1], C[g+8][2t], C[g+8][2t+1] (PTX, "Matrix fragments for mma.m16n8k16"). */
static __device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* Half a step, 32 columns: `low` and `high` are columns 8 t ... 8 t + 7 of rows g and g + 8 of W, `b` the same of activation row g. Which columns a fragment's places stand
 * for is free as long as A and B agree: each lane's own eight, so that it reads 16 bytes in one go. */
static __device__ __forceinline__ void multiply(float (&c)[4], const uint4 &low, const uint4 &high, const uint4 &b) {
    mma(c, low.x, high.x, low.y, high.y, b.x, b.y);
    mma(c, low.z, high.z, low.w, high.w, b.z, b.w);
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
