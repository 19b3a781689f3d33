/* What CUDA C++ has no name for: instructions written as PTX, one function each, and how a launch and dynamic shared memory are written down. Device code but for launch().
 * Owns nothing. All inline PTX of the backend is here: tests/host_device/ has a file of the same name with the same functions in plain C++, which stands in for this one where the
 * kernels run on the host. */
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>
#include <type_traits>

#define PTX_INLINE static __device__ __forceinline__

/* kernel<<<grid, block, shared_bytes, stream>>>(arguments...). As there, what went wrong is cudaGetLastError()'s. */
template <class... Parameters>
static inline void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                          std::type_identity_t<Parameters>... arguments) {
    kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
}

/* ---- shared memory ---- */

/* The launch's dynamic shared memory. A file sees it as one type throughout. */
template <class T> PTX_INLINE T *dynamic_shared(void) {
    extern __shared__ __align__(128) T dynamic_shared_memory[];
    return dynamic_shared_memory;
}

/* As the instructions below take it. */
PTX_INLINE uint32_t shared_address(const void *at) { return (uint32_t)__cvta_generic_to_shared(at); }

PTX_INLINE uint4 shared_at(uint32_t at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
}
PTX_INLINE uint2 shared_8_at(uint32_t at) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
    return v;
}

/* ---- copies from global to shared memory, on their own: not through registers, whose loads are waited for all at once, but in the order of their groups ---- */

/* So many bytes, of which the first `take` are read and the others become 0. copy_16, what is read once: no place in L1. copy_16_kept, what other blocks read too. */
PTX_INLINE void copy_16(uint32_t to, const void *from, uint32_t take) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(take) : "memory");
}
PTX_INLINE void copy_16_kept(uint32_t to, const void *from, uint32_t take) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(take) : "memory");
}
PTX_INLINE void copy_8(uint32_t to, const void *from) { asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory"); }
PTX_INLINE void copy_4(uint32_t to, const void *from, uint32_t take) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(take) : "memory");
}
/* What the thread asked for since the last one becomes a group; all but the last PENDING groups are there. */
PTX_INLINE void copies_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> PTX_INLINE void copies_wait(void) { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

/* ---- matrices ---- */

/* Matrices of 8 x 8 16-bit elements: thread 8 i + r has the address of row r of matrix i; of each, thread t gets elements 2 (t % 4) and the next of row t / 4 (trans: of column t / 4). */
PTX_INLINE void load_matrices_4(uint32_t r[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
PTX_INLINE void load_matrices_4_trans(uint32_t r[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
PTX_INLINE void load_matrices_2(uint32_t r[2], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
}
PTX_INLINE void load_matrices_2_trans(uint32_t r[2], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
}

/* c += A B for 16 x 16 by 16 x 8, sums in f32. With g = lane / 4 and t = lane % 4: a0 = A[g][2t, 2t+1], a1 = A[g+8][the same], a2 = A[g][2t+8, 2t+9], a3 = A[g+8][those];
 * b0 = B[2t, 2t+1][g], b1 = B[2t+8, 2t+9][g]; c = C[g][2t], C[g][2t+1], C[g+8][2t], C[g+8][2t+1] (PTX, "Matrix fragments for mma.m16n8k16"). */
PTX_INLINE void multiply_f16(float c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
PTX_INLINE void multiply_bf16(float c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* ---- arithmetic ---- */

/* 2^x within 2 units of the last place; what would be subnormal is 0. */
PTX_INLINE float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* (bits & MASK) | base: one instruction, of which the compiler would make two. */
template <uint32_t MASK> PTX_INLINE uint32_t masked_into(uint32_t base, uint32_t bits) {
    asm("lop3.b32 %0, %1, %2, %0, 0xea;" : "+r"(base) : "r"(bits), "n"(MASK));
    return base;
}

/* ---- blocks and launches that know of one another (compute capability 9.0) ---- */

/* Where a launch may overlap the end of the one before, what that has written is there after this; before 9.0 it is there anyway. */
PTX_INLINE void wait_for_previous(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
PTX_INLINE void let_next_begin(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* A barrier of the cluster's blocks in two halves; before 9.0, where a cluster is one block, the block's. */
PTX_INLINE void cluster_arrive(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
PTX_INLINE void cluster_wait(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

/* The same place in the shared memory of the cluster's block `rank`. */
template <typename T> PTX_INLINE T *of_rank(T *place, uint32_t rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint64_t mapped;
    asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(place), "r"(rank));
    return (T *)mapped;
#else
    (void)rank;
    return place;
#endif
}
