/* What the machine can do at most, measured in the same run as what is compared with it: reading memory, and multiplying in registers, on as many threads as the
 * backend uses. Owns its threads and its buffer while it runs. Main thread. */
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "base/check.h"
#include "base/clock.h"
#include "cli/bench.h"

#define THREADS_MAX 256u
#define PASSES 8
#define PEAK_ROUNDS 20000000ull

typedef uint64_t line __attribute__((vector_size(64)));

struct worker {
    pthread_t thread;
    pthread_barrier_t *barrier;
    const line *lines;
    size_t n_lines;
    double (*peak)(uint64_t rounds);
    double read_s, peak_s, macs; /* the best pass */
};

static double seconds_since(uint64_t begun_ns) { return (double)(clock_now_ns() - begun_ns) / 1e9; }

static void read_all(const line *lines, size_t n) {
    line a = {0}, b = {0}, c = {0}, d = {0};
    for (size_t i = 0; i + 4 <= n; i += 4) a += lines[i], b += lines[i + 1], c += lines[i + 2], d += lines[i + 3];
    a += b + c + d;
    __asm__ volatile("" ::"m"(a)); /* the sum is wanted */
}

/* All threads at once, pass by pass: the memory is shared, and so is a core's clock. */
static void *work(void *context) {
    struct worker *worker = context;
    worker->read_s = worker->peak_s = 1e9;
    for (int pass = 0; pass < PASSES; pass++) {
        pthread_barrier_wait(worker->barrier);
        uint64_t begun = clock_now_ns();
        read_all(worker->lines, worker->n_lines);
        pthread_barrier_wait(worker->barrier);
        double s = seconds_since(begun);
        if (s < worker->read_s) worker->read_s = s;
    }
    for (int pass = 0; pass < PASSES; pass++) {
        pthread_barrier_wait(worker->barrier);
        uint64_t begun = clock_now_ns();
        worker->macs = worker->peak(PEAK_ROUNDS / PASSES);
        pthread_barrier_wait(worker->barrier);
        double s = seconds_since(begun);
        if (s < worker->peak_s) worker->peak_s = s;
    }
    return NULL;
}

#if defined(__x86_64__)
/* clang 14 has no name for it. Leaf 7, subleaf 1, EAX bit 4; that the system saves the registers is AVX2's own test. */
static bool has_avxvnni(void) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
}
#endif

static double (*best_peak(const char **instruction))(uint64_t) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")) {
        *instruction = "AVX-512 VNNI";
        return bench_peak_avx512;
    }
    if (has_avxvnni()) {
        *instruction = "AVX-VNNI";
        return bench_peak_avxvnni;
    }
    if (__builtin_cpu_supports("avx2")) {
        *instruction = "AVX2";
        return bench_peak_avx2;
    }
#endif
    *instruction = "f32";
    return bench_peak_generic;
}

enum status bench_measure_ceilings(uint32_t threads, uint64_t weight_bytes, struct bench_ceilings *ceilings, struct error *error) {
    if (threads > THREADS_MAX) threads = THREADS_MAX;
    size_t n_lines = (size_t)(weight_bytes / sizeof(line) / threads) + 1, bytes = n_lines * threads * sizeof(line);
    line *lines = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (lines == MAP_FAILED) return error_set(error, STATUS_NO_MEMORY, "bench: no memory to measure reading with");
    (void)madvise(lines, bytes, MADV_HUGEPAGE);
    for (size_t i = 0; i < n_lines * threads; i++) lines[i] = (line){i}; /* pages of its own, not the zero page */
    struct worker *workers = check_calloc(threads, sizeof *workers);
    pthread_barrier_t barrier;
    CHECK(pthread_barrier_init(&barrier, NULL, threads) == 0);
    double (*peak)(uint64_t) = best_peak(&ceilings->instruction);
    for (uint32_t i = 0; i < threads; i++) {
        workers[i] = (struct worker){.barrier = &barrier, .lines = lines + i * n_lines, .n_lines = n_lines, .peak = peak};
        if (i > 0) CHECK(pthread_create(&workers[i].thread, NULL, work, &workers[i]) == 0);
    }
    (void)work(&workers[0]);
    for (uint32_t i = 1; i < threads; i++) CHECK(pthread_join(workers[i].thread, NULL) == 0);
    ceilings->gb_s = (double)bytes / workers[0].read_s / 1e9;
    ceilings->gmac_s = workers[0].macs * threads / workers[0].peak_s / 1e9;
    (void)pthread_barrier_destroy(&barrier);
    free(workers);
    (void)munmap(lines, bytes);
    return STATUS_OK;
}
