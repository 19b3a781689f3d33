/* The host device's memory: pages of their own for each allocation, with one that faults behind it; under AddressSanitizer what is left of the last page counts as outside too. Nothing of it is at an
 * address that the host's own allocations have. Pinned memory is the host's, remembered. Any thread. */
#include "tests/host_device/launch.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
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

/* Allocations that were found last, by a thread: nearly all that it asks for is in one of them. Out of date when something has been freed since. */
enum { FOUND = 4 };
static std::atomic<uint64_t> frees;
static thread_local struct {
    uint64_t frees;
    struct {
        uintptr_t begin;
        size_t bytes;
    } last[FOUND];
    uint32_t next;
} found;

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
    if (bytes <= POISONED && !host_options()->idle) memset(pages, 0xff, bytes); /* NaN in every type of float */
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
    const auto allocation = device.find((uintptr_t)at);
    if (allocation == device.end()) {
        host_set_error(cudaErrorInvalidValue);
        return cudaErrorInvalidValue;
    }
    ASAN_UNPOISON_MEMORY_REGION(at, pages_of(allocation->second));
    (void)munmap(at, pages_of(allocation->second) + PAGE);
    device_used -= allocation->second;
    device.erase(allocation);
    frees++;
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
    const uintptr_t place = (uintptr_t)at;
    if (found.frees != frees) found = {frees, {}, 0};
    for (const auto &last : found.last)
        if (place - last.begin < last.bytes) return last.bytes - (place - last.begin);
    const std::lock_guard<std::mutex> locked(lock);
    const size_t bytes = bytes_from(device, place);
    if (bytes == 0) return 0;
    const auto allocation = *--device.upper_bound(place);
    found.last[found.next++ % FOUND] = {allocation.first, allocation.second};
    return bytes;
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
