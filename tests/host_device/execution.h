/* How a kernel runs on the host, as kernels see it: a thread of a block is a fiber, and whatever threads wait for each other at is a rendezvous, which checks who is there. Blocks run one
 * after the other, those of a cluster together. Between two rendezvous one thread at a time runs, in an order that the environment chooses (options.h): a kernel whose result depends on it lacks a
 * barrier. What is wrong ends the process with the kernel, block, thread and place in words. */
#pragma once

#include <stdint.h>

/* The running thread's. */
struct host_index {
    uint3 thread, block;
    dim3 block_size, grid_size;
};
extern struct host_index host_index;
[[maybe_unused]] static uint3 &threadIdx = host_index.thread, &blockIdx = host_index.block;
[[maybe_unused]] static dim3 &blockDim = host_index.block_size, &gridDim = host_index.grid_size;

/* Where a rendezvous stands in the source: all who meet must come from one place. */
struct host_site {
    const char *what, *file;
    int line;
};
#define HOST_SITE_PARAMETERS const char *file = __builtin_FILE(), int line = __builtin_LINE()

/* The bug of a kernel: never returns. */
[[noreturn]] void host_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

struct host_votes {
    int count;
    bool any, all;
};
/* All threads of the block; none may have returned. */
host_votes host_block_barrier(struct host_site site, bool vote);
/* The lanes of `mask`, each with an operand of its own; the last to come combines them (operands[lane], NULL where the mask has none). */
typedef void host_combine(void *const operands[32], uint32_t mask);
void host_warp_meet(struct host_site site, uint32_t mask, void *operand, host_combine *combine);
uint32_t host_lane(void);

void host_cluster_arrive(void);
void host_cluster_wait(struct host_site site);
/* `place`, of the running block's dynamic shared memory, in that of block `rank` of the cluster. */
void *host_of_rank(void *place, uint32_t rank);
/* That the running code was compiled for (__CUDA_ARCH__ / 10), as far as it matters; 9.0 and later: 90. */
uint32_t host_capability(void);

/* Dynamic shared memory of the block; 32-bit addresses of it, and back, `bytes` of them being within. */
void *host_dynamic_shared(void);
uint32_t host_shared_address(const void *at);
void *host_shared_at(uint32_t address, uint32_t bytes, const char *what);

/* Copies that are on their way: to `to`, which holds rubbish until the thread waits for the group. */
void host_copy_ask(uint32_t to, const void *from, uint32_t bytes, uint32_t take);
void host_copy_commit(void);
void host_copy_wait(uint32_t pending);

static inline void __syncthreads(HOST_SITE_PARAMETERS) { (void)host_block_barrier({"__syncthreads", file, line}, false); }
static inline int __syncthreads_count(int vote, HOST_SITE_PARAMETERS) { return host_block_barrier({"__syncthreads_count", file, line}, vote).count; }
static inline int __syncthreads_or(int vote, HOST_SITE_PARAMETERS) { return host_block_barrier({"__syncthreads_or", file, line}, vote).any; }
static inline int __syncthreads_and(int vote, HOST_SITE_PARAMETERS) { return host_block_barrier({"__syncthreads_and", file, line}, vote).all; }
