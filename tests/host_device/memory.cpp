/* The host device's memory: pages of their own for each allocation, with one that faults behind it; under AddressSanitizer what is left of the last page counts as outside too. Nothing of it is at an
 * address that the host's own allocations have. Pinned memory is the host's, remembered. Any thread. */
#include "tests/host_device/launch.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <map>
#include <mutex>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, bytes) ((void)(at), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes) ((void)(at), (void)(bytes))
#endif

enum { PAGE = 4096, POISONED = 1 << 20 /* larger ones begin as zeros: filling them would take longer than the tests */ };

static std::mutex lock;
static std::map<uintptr_t, size_t> device, pinned; /* allocations: where, bytes */
static size_t device_used;
static uintptr_t last_begin; /* of the allocation that was found last: the next one asked for is mostly in it */
static size_t last_bytes;

static size_t pages_of(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

cudaError_t cudaMalloc(void **at, size_t bytes) {
    const std::lock_guard<std::mutex> locked(lock);
    cudaDeviceProp properties;
    (void)cudaGetDeviceProperties(&properties, 0);
    if (bytes == 0) {
        *at = NULL;
        return cudaSuccess;
    }
    void *pages = MAP_FAILED;
    if (bytes <= properties.totalGlobalMem - device_used)
        pages = mmap(NULL, pages_of(bytes) + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) {
        host_set_error(cudaErrorMemoryAllocation);
        return cudaErrorMemoryAllocation;
    }
    (void)mprotect((uint8_t *)pages + pages_of(bytes), PAGE, PROT_NONE);
    if (bytes <= POISONED) memset(pages, 0xff, bytes); /* NaN in every type of float */
    ASAN_POISON_MEMORY_REGION((uint8_t *)pages + bytes, pages_of(bytes) - bytes);
    device[(uintptr_t)pages] = bytes;
    device_used += bytes;
    *at = pages;
    return cudaSuccess;
}

cudaError_t cudaFree(void *at) {
    if (!at) return cudaSuccess;
    (void)cudaDeviceSynchronize();
    const std::lock_guard<std::mutex> locked(lock);
    const auto found = device.find((uintptr_t)at);
    if (found == device.end()) {
        host_set_error(cudaErrorInvalidValue);
        return cudaErrorInvalidValue;
    }
    ASAN_UNPOISON_MEMORY_REGION(at, pages_of(found->second));
    (void)munmap(at, pages_of(found->second) + PAGE);
    device_used -= found->second;
    device.erase(found);
    last_bytes = 0;
    return cudaSuccess;
}

static size_t bytes_from(const std::map<uintptr_t, size_t> &allocations, uintptr_t at) {
    auto after = allocations.upper_bound(at);
    if (after == allocations.begin()) return 0;
    --after;
    const size_t offset = at - after->first;
    return offset < after->second ? after->second - offset : 0;
}

size_t host_device_bytes_from(const void *at) {
    const std::lock_guard<std::mutex> locked(lock);
    if ((uintptr_t)at - last_begin < last_bytes) return last_bytes - ((uintptr_t)at - last_begin);
    auto after = device.upper_bound((uintptr_t)at);
    if (after == device.begin()) return 0;
    --after;
    if ((uintptr_t)at - after->first >= after->second) return 0;
    last_begin = after->first;
    last_bytes = after->second;
    return last_bytes - ((uintptr_t)at - last_begin);
}

size_t host_pinned_bytes_from(const void *at) {
    const std::lock_guard<std::mutex> locked(lock);
    return bytes_from(pinned, (uintptr_t)at);
}

size_t host_device_bytes_used(void) {
    const std::lock_guard<std::mutex> locked(lock);
    return device_used;
}

void host_device_fill(void *to, int value, size_t bytes) {
    uint8_t *at = (uint8_t *)to, *end = at + bytes;
    uint8_t *first = (uint8_t *)(((uintptr_t)at + PAGE - 1) / PAGE * PAGE), *last = (uint8_t *)((uintptr_t)end / PAGE * PAGE);
    if (value != 0 || first >= last) {
        memset(at, value, bytes);
        return;
    }
    memset(at, 0, (size_t)(first - at));
    memset(last, 0, (size_t)(end - last));
    (void)madvise(first, (size_t)(last - first), MADV_DONTNEED); /* pages that nobody has are zeros */
}

cudaError_t cudaHostAlloc(void **at, size_t bytes, unsigned) {
    *at = aligned_alloc(PAGE, pages_of(bytes ? bytes : 1));
    if (!*at) return cudaErrorMemoryAllocation;
    const std::lock_guard<std::mutex> locked(lock);
    pinned[(uintptr_t)*at] = bytes;
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *at) {
    if (!at) return cudaSuccess;
    (void)cudaDeviceSynchronize();
    const std::lock_guard<std::mutex> locked(lock);
    if (pinned.erase((uintptr_t)at) == 0) return cudaErrorInvalidValue;
    free(at);
    return cudaSuccess;
}
