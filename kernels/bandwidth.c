/* How fast the host copies memory: what backends that compute here are measured against. Owns its threads and buffers while it runs. Any thread, while nothing else computes. */
#include <string.h>
#include <sys/mman.h>

#include "base/clock.h"
#include "kernels/backend.h"
#include "kernels/cpu/workers.h"

#ifdef KVASIR_SANITIZED /* what is measured there is the sanitizer, which takes seconds for more */
enum { PASSES = 5, PIECES = 16 };
#else
enum { PASSES = 5, PIECES = 256 };
#endif
#define PIECE_BYTES ((size_t)512 << 10)
#define BUFFER_BYTES (PIECES * PIECE_BYTES) /* 128 MiB, and as much again to copy to */

struct copying {
    const uint8_t *source;
    uint8_t *destination;
};

static void stage_copy(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    (void)stage, (void)worker;
    const struct copying *copying = context;
    for (uint32_t piece = first; piece < end; piece++)
        memcpy(copying->destination + piece * PIECE_BYTES, copying->source + piece * PIECE_BYTES, PIECE_BYTES);
}

/* Pages of its own for every worker, not the zero page for all of them. */
static void stage_fill(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    (void)stage, (void)worker;
    const struct copying *copying = context;
    for (uint32_t piece = first; piece < end; piece++) {
        memset((uint8_t *)(uintptr_t)copying->source + piece * PIECE_BYTES, (int)piece + 1, PIECE_BYTES);
        memset(copying->destination + piece * PIECE_BYTES, 0xff, PIECE_BYTES);
    }
}

double backend_host_copy_bandwidth(uint32_t threads) {
    struct workers *workers;
    uint8_t *memory = mmap(NULL, 2 * BUFFER_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return 0;
    if (workers_start(threads, &workers, NULL) != STATUS_OK) {
        (void)munmap(memory, 2 * BUFFER_BYTES);
        return 0;
    }
    (void)madvise(memory, 2 * BUFFER_BYTES, MADV_HUGEPAGE);
    struct copying copying = {.source = memory, .destination = memory + BUFFER_BYTES};
    workers_run(workers, &copying, &(struct stage){.run = stage_fill, .n_units = PIECES}, 1);
    double best = 0;
    for (int pass = 0; pass < PASSES; pass++) {
        uint64_t begun = clock_now_ns();
        workers_run(workers, &copying, &(struct stage){.run = stage_copy, .n_units = PIECES}, 1);
        uint64_t elapsed = clock_now_ns() - begun;
        double rate = 2.0 * BUFFER_BYTES * 1e9 / (double)(elapsed ? elapsed : 1);
        if (rate > best) best = rate;
    }
    workers_stop(workers);
    (void)munmap(memory, 2 * BUFFER_BYTES);
    return best;
}
