/* What the files of the host device share, and kernels do not see. */
#pragma once

#include <cuda_runtime.h>

#include <memory>

#include "tests/host_device/options.h"

struct host_launch_call {
    const void *kernel;
    dim3 grid, block;
    uint32_t cluster; /* blocks; 1: none */
    size_t shared_bytes;
    void (*run)(const void *context); /* of a thread */
    const void *context;
    size_t context_bytes;
    std::shared_ptr<void> owner; /* of the context */
};
/* execution.cpp: all blocks, to their end. */
void host_run(const host_launch_call *call);
/* A kernel is running. */
bool host_in_kernel(void);

/* runtime.cpp: to the stream's queue, or the graph that it is captured to. */
cudaError_t host_enqueue(cudaStream_t stream, std::function<void()> what);
void host_set_error(cudaError_t error);
extern "C" void host_lose_device(void);              /* from now on it has stopped working */
extern "C" void host_refuse_launch(uint32_t which); /* 1: the next launch, of a kernel or a graph, 2: the one after it, ...; a device has no room for it */
void host_time_less(void);              /* what runs now counts half in cudaEventElapsedTime() */

/* memory.cpp. Bytes of an allocation from `at` on; 0: `at` is in none. */
size_t host_device_bytes_from(const void *at);
size_t host_pinned_bytes_from(const void *at);
size_t host_device_bytes_used(void);
/* Sets a range of the device; whole pages that become 0 cost nothing. */
void host_device_fill(void *to, int value, size_t bytes);

enum {
    SHARED_WINDOW = 1024
}; /* the 32-bit address of a block's first byte of dynamic shared memory: the first KiB is the system's, and 0 is nobody's */
