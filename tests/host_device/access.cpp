/* Every access of a kernel, looked at: the files of kernels/cuda are compiled with the instrumentation of -fsanitize=thread, whose calls end here and not in its runtime (CMakeLists.txt; not under
 * AddressSanitizer, which has its own). What is noticed:
 *   - a read or write outside of device memory, of the block's shared memory, of pinned memory and of the thread's own stack; one that is not aligned; host code that follows a device pointer;
 *   - shared memory that is read before anybody wrote it;
 *   - two accesses to the same four bytes of shared memory by two threads, one of them a write, with no barrier between: none of the block, none of the warp where both are of one, none of the
 *     cluster. Whether the order of this run happened to hide it does not matter. Two that write the same may.
 * Not looked at: memcpy() of a size that the compiler does not know, races in global memory. */
#include "tests/host_device/execution_state.h"

#include <stdlib.h>
#include <sys/mman.h>

extern "C" {
#include "base/check.h"
extern char __executable_start[], __data_start[], _end[]; /* the linker's: the program, its variables */
}

/* What is known of four bytes of shared memory, since the cluster began. */
struct cell_access {
    uint32_t cluster_epoch, epoch, warp_epoch;
    uint16_t thread;
    uint8_t many; /* reads: MANY_... of threads that it stands for */
    bool any, atomic;
};
enum { MANY_NONE, MANY_LANES, MANY_WARPS, MANY_BLOCKS };
struct cell {
    uint32_t generation;
    struct cell_access write, read;
};

static struct cell *dynamic_cells, *static_cells;
static size_t n_dynamic_cells;
static uint32_t generation;

static struct cell *cells_new(size_t n) {
    void *at = mmap(NULL, n * sizeof(struct cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(at != MAP_FAILED);
    return (struct cell *)at;
}

void host_accesses_begin_block(void) {
    const size_t n = host_running.dynamic_room / 4 + 1;
    generation++;
    if (!static_cells) static_cells = cells_new((size_t)(_end - __data_start) / 4 + 2);
    if (n <= n_dynamic_cells) return;
    if (dynamic_cells) (void)munmap(dynamic_cells, n_dynamic_cells * sizeof(struct cell));
    dynamic_cells = cells_new(n);
    n_dynamic_cells = n;
}

/* ---- races ---- */

/* All that `a` stands for happened before what thread t does now. */
static bool is_before(const struct cell_access *a, const struct host_thread *t) {
    const struct host_running *run = &host_running;
    if (!a->any || a->cluster_epoch != t->cluster_epoch) return true;
    if (a->many == MANY_BLOCKS) return false;
    const struct host_thread *other = &run->threads[a->thread];
    if (other->block != t->block) return false;
    if (a->epoch != t->block->epoch) return true;
    if (a->many == MANY_WARPS || other->number / 32 != t->number / 32) return false;
    if (a->warp_epoch != t->warp_epoch) return true;
    return a->many == MANY_NONE && other == t;
}

static struct cell_access access_by(const struct host_thread *t, bool atomic) {
    return {t->cluster_epoch, t->block->epoch, t->warp_epoch, (uint16_t)(t - host_running.threads), MANY_NONE, true, atomic};
}

/* One read more. What it is after need not be remembered: a write that is after this one is after that too. */
static void add_read(struct cell_access *reads, const struct host_thread *t) {
    const struct cell_access mine = access_by(t, false);
    if (is_before(reads, t)) {
        *reads = mine;
        return;
    }
    const struct host_thread *other = &host_running.threads[reads->thread];
    const uint8_t many = reads->many == MANY_BLOCKS || other->block != t->block              ? MANY_BLOCKS
                         : reads->many == MANY_WARPS || other->number / 32 != t->number / 32 ? MANY_WARPS
                                                                                             : MANY_LANES;
    *reads = mine;
    reads->many = many;
}

/* For messages: where in the program. */
static long long code_offset(const void *code) { return (long long)((const char *)code - __executable_start); }

static void fail_race(const char *what, const char *before, const struct cell_access *a, const void *at, const void *code) {
    const struct host_thread *other = &host_running.threads[a->thread];
    host_fail("%s shared memory at %p that thread %u of block (%u, %u, %u)%s %s, with no barrier between (code at +0x%llx: addr2line -Cfie PROGRAM)",
              what, at, other->number, other->block->index.x, other->block->index.y, other->block->index.z, a->many ? ", and others," : "", before,
              code_offset(code));
}

/* Two threads may write the same: a write over another's is allowed if nothing changes, which is known once it is done. */
static struct {
    const uint32_t *at;
    uint32_t before;
    struct cell_access by;
    const void *code;
} overwritten[8]; /* of one access; what is beyond is not looked after */
static uint32_t n_overwritten;

void host_accesses_settle(void) {
    const uint32_t n = n_overwritten;
    n_overwritten = 0;
    for (uint32_t i = 0; i < n; i++)
        if (*overwritten[i].at != overwritten[i].before)
            fail_race("has written something else to", "wrote", &overwritten[i].by, overwritten[i].at, overwritten[i].code);
}

static void look_at_cell(struct cell *cell, const uint32_t *at, bool write, bool atomic, const void *code) {
    const struct host_thread *t = host_running.thread;
    if (cell->generation != generation) *cell = {generation, {}, {}};
    if (!(atomic && cell->write.atomic) && !is_before(&cell->write, t)) {
        if (!write || atomic) fail_race(write ? "changes" : "reads", "wrote", &cell->write, at, code);
        if (n_overwritten < sizeof overwritten / sizeof *overwritten) overwritten[n_overwritten++] = {at, *at, cell->write, code};
    }
    if (!write) {
        add_read(&cell->read, t);
        return;
    }
    if (!is_before(&cell->read, t)) fail_race("writes", "read", &cell->read, at, code);
    cell->write = access_by(t, atomic);
}

/* first: a multiple of 4, where the cells begin. Of an access that is partly to what was written the rest may be a structure's padding. */
static void look_at_cells(struct cell *cells, uintptr_t first, const void *at, size_t bytes, bool write, bool atomic, const void *code) {
    const size_t begin = ((uintptr_t)at - first) / 4, end = ((uintptr_t)at - first + bytes + 3) / 4;
    bool written = write && !atomic;
    for (size_t i = begin; i < end; i++) {
        written = written || (cells[i].generation == generation && cells[i].write.any);
        look_at_cell(&cells[i], (const uint32_t *)first + i, write, atomic, code);
    }
    if (!written) host_fail("reads shared memory at %p that nobody has written (code at +0x%llx: addr2line -Cfie PROGRAM)", at, code_offset(code));
}

/* ---- where an access goes ---- */

static void look_in_kernel(const void *at, size_t bytes, bool write, bool atomic, const void *code) {
    const struct host_running *run = &host_running;
    const uintptr_t place = (uintptr_t)at, dynamic = place - (uintptr_t)run->dynamic;
    host_accesses_settle();
    if (place - (uintptr_t)run->thread->fiber.stack < run->thread->fiber.bytes) return;
    if (dynamic < run->dynamic_stride * run->call->cluster) {
        if (dynamic % run->dynamic_stride + bytes > run->call->shared_bytes)
            host_fail("%s %zu bytes at byte %zu of %zu of dynamic shared memory (code at +0x%llx)", write ? "writes" : "reads", bytes,
                      dynamic % run->dynamic_stride, run->call->shared_bytes, code_offset(code));
        look_at_cells(dynamic_cells, (uintptr_t)run->dynamic, at, bytes, write, atomic, code);
        return;
    }
    if (place - (uintptr_t)__data_start < (uintptr_t)(_end - __data_start)) {
        if (place - (uintptr_t)&host_index < sizeof host_index) return;
        if (run->call->cluster > 1)
            host_fail("uses static __shared__ memory, or a variable of the host, in a cluster, whose blocks would share it here");
        look_at_cells(static_cells, (uintptr_t)__data_start & ~(uintptr_t)3, at, bytes, write, atomic, code);
        return;
    }
    const bool is_parameter = place - (uintptr_t)run->call->context < run->call->context_bytes;
    if (!write && (is_parameter || place - (uintptr_t)__executable_start < (uintptr_t)(__data_start - __executable_start)))
        return; /* or a constant */
    if (host_device_bytes_from(at) >= bytes || host_pinned_bytes_from(at) >= bytes) return;
    host_fail("%s %zu bytes at %p, which is outside of every allocation of the device (code at +0x%llx: addr2line -Cfie PROGRAM)",
              write ? "writes" : "reads", bytes, at, code_offset(code));
}

static void look(const void *at, size_t bytes, bool write, const void *code) {
    if (!host_running.thread) {
        if (host_device_bytes_from(at) > 0)
            host_fail("host code %s the device's memory (code at +0x%llx: addr2line -Cfie PROGRAM)", write ? "writes to" : "reads",
                      code_offset(code));
        return;
    }
    look_in_kernel(at, bytes, write, false, code);
}

/* Two stores of 8 bytes may come as one of 16; loads and stores of a uint4 that is not aligned fault on the host too. */
static void look_aligned(const void *at, size_t bytes, bool write, const void *code) {
    if ((uintptr_t)at % (bytes < 8 ? bytes : 8) != 0 && host_running.thread)
        host_fail("%s %zu bytes at %p, which is not a multiple of it (code at +0x%llx: addr2line -Cfie PROGRAM)", write ? "writes" : "reads", bytes,
                  at, code_offset(code));
    look(at, bytes, write, code);
}

void host_access_shared(const void *at, size_t bytes, bool write) { look_in_kernel(at, bytes, write, false, __builtin_return_address(0)); }
void host_access_atomic(const void *at, size_t bytes) { look_in_kernel(at, bytes, true, true, __builtin_return_address(0)); }

/* ---- what the compiler calls ---- */

/* Most accesses are to the thread's own stack. */
static inline bool is_own(const void *at) {
    const struct host_thread *t = host_running.thread;
    return t && (uintptr_t)at - (uintptr_t)t->fiber.stack < t->fiber.bytes;
}

#define HOOKS(bytes)                                                                                                                                 \
    void __tsan_read##bytes(void *at) {                                                                                                              \
        if (!is_own(at)) look_aligned(at, bytes, false, __builtin_return_address(0));                                                                \
    }                                                                                                                                                \
    void __tsan_write##bytes(void *at) {                                                                                                             \
        if (!is_own(at)) look_aligned(at, bytes, true, __builtin_return_address(0));                                                                 \
    }                                                                                                                                                \
    void __tsan_unaligned_read##bytes(void *at) {                                                                                                    \
        if (!is_own(at)) look(at, bytes, false, __builtin_return_address(0));                                                                        \
    }                                                                                                                                                \
    void __tsan_unaligned_write##bytes(void *at) {                                                                                                   \
        if (!is_own(at)) look(at, bytes, true, __builtin_return_address(0));                                                                         \
    }

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void *at, size_t bytes) { look(at, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void *at, size_t bytes) { look(at, bytes, true, __builtin_return_address(0)); }
void __tsan_init(void) {}
}
