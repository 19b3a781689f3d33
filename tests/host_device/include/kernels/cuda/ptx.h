/* kernels/cuda/ptx.h where the kernels run on the host: the same functions with the same contracts, which are described there. */
#pragma once

#include <cuda_runtime.h>

#define PTX_INLINE static __device__ inline

template <class... Parameters>
static inline void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                          std::type_identity_t<Parameters>... arguments) {
    const cudaLaunchConfig_t config = {grid, block, shared_bytes, stream, nullptr, 0};
    (void)cudaLaunchKernelEx(&config, kernel, arguments...);
}

/* ---- shared memory ---- */

template <class T> PTX_INLINE T *dynamic_shared(void) { return (T *)host_dynamic_shared(); }
PTX_INLINE uint32_t shared_address(const void *at) { return host_shared_address(at); }
PTX_INLINE uint4 shared_at(uint32_t at) { return *(const uint4 *)host_shared_at(at, 16, "a read of 16 bytes"); }
PTX_INLINE uint2 shared_8_at(uint32_t at) { return *(const uint2 *)host_shared_at(at, 8, "a read of 8 bytes"); }

/* ---- copies from global to shared memory ---- */

PTX_INLINE void copy_16(uint32_t to, const void *from, uint32_t take) { host_copy_ask(to, from, 16, take); }
PTX_INLINE void copy_16_kept(uint32_t to, const void *from, uint32_t take) { host_copy_ask(to, from, 16, take); }
PTX_INLINE void copy_8(uint32_t to, const void *from) { host_copy_ask(to, from, 8, 8); }
PTX_INLINE void copy_4(uint32_t to, const void *from, uint32_t take) { host_copy_ask(to, from, 4, take); }
PTX_INLINE void copies_commit(void) { host_copy_commit(); }
template <int PENDING> PTX_INLINE void copies_wait(void) { host_copy_wait(PENDING); }

/* ---- matrices: matrices.cpp ---- */

struct host_matrices {
    uint32_t at, count;
    bool transposed;
    uint32_t *r;
};
struct host_product {
    float *c;
    uint32_t a[4], b[2];
};
host_combine host_load_matrices, host_multiply_f16, host_multiply_bf16;

#define HOST_LOAD(name, count, transposed)                                                                                                           \
    PTX_INLINE void name(uint32_t r[count], uint32_t at, HOST_SITE_PARAMETERS) {                                                                     \
        struct host_matrices matrices = {at, count, transposed, r};                                                                                  \
        host_warp_meet({#name, file, line}, 0xffffffffu, &matrices, host_load_matrices);                                                             \
    }
HOST_LOAD(load_matrices_4, 4, false)
HOST_LOAD(load_matrices_4_trans, 4, true)
HOST_LOAD(load_matrices_2, 2, false)
HOST_LOAD(load_matrices_2_trans, 2, true)
#undef HOST_LOAD

PTX_INLINE void multiply_f16(float c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, HOST_SITE_PARAMETERS) {
    struct host_product product = {c, {a0, a1, a2, a3}, {b0, b1}};
    host_warp_meet({"multiply_f16", file, line}, 0xffffffffu, &product, host_multiply_f16);
}
PTX_INLINE void multiply_bf16(float c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, HOST_SITE_PARAMETERS) {
    struct host_product product = {c, {a0, a1, a2, a3}, {b0, b1}};
    host_warp_meet({"multiply_bf16", file, line}, 0xffffffffu, &product, host_multiply_bf16);
}

/* ---- arithmetic ---- */

PTX_INLINE float power_of_2(float x) { return x < -126 ? 0 : exp2f(x); }
template <uint32_t MASK> PTX_INLINE uint32_t masked_into(uint32_t base, uint32_t bits) { return (bits & MASK) | base; }

/* ---- blocks and launches that know of one another ---- */

/* A launch here begins when the one before has ended. */
PTX_INLINE void wait_for_previous(void) {}
PTX_INLINE void let_next_begin(void) {}

PTX_INLINE void cluster_arrive(void) {
    if (host_capability() >= 90) host_cluster_arrive();
}
PTX_INLINE void cluster_wait(HOST_SITE_PARAMETERS) {
    if (host_capability() >= 90)
        host_cluster_wait({"cluster_wait", file, line});
    else
        __syncthreads(file, line);
}
template <typename T> PTX_INLINE T *of_rank(T *place, uint32_t rank) {
    return host_capability() >= 90 ? (T *)host_of_rank((void *)place, rank) : place;
}
