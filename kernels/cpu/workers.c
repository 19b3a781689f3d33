/* See workers.h. Owns the threads other than worker 0. */
#include "kernels/cpu/workers.h"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/check.h"

/* About 50 us of pauses: longer than any phase's imbalance on an undisturbed machine, shorter than a time slice lost to another process. */
enum { SPINS = 3000 };

struct workers {
    _Alignas(64) _Atomic uint32_t generation; /* of the barrier; the futex word */
    _Alignas(64) _Atomic uint32_t arrived;
    _Atomic uint32_t sleepers;
    _Alignas(64) _Atomic uint32_t next; /* workers_take */
    _Alignas(64) uint32_t count;
    bool stop;
    void (*work)(void *context, uint32_t worker);
    void *context;
    pthread_t threads[WORKERS_MAX];
    struct place {
        struct workers *workers;
        uint32_t worker;
    } places[WORKERS_MAX];
};

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Dekker: the sleeper announces itself, then looks at the generation (in the kernel); the last to arrive moves the generation, then looks for sleepers.
 * Sequential consistency of the four makes one of them see the other. */
static void wait_for_next(struct workers *w, uint32_t generation) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&w->generation, memory_order_acquire) != generation) return;
        pause_briefly();
    }
    atomic_fetch_add(&w->sleepers, 1);
    while (atomic_load(&w->generation) == generation) (void)syscall(SYS_futex, &w->generation, FUTEX_WAIT_PRIVATE, generation, NULL, NULL, 0);
    atomic_fetch_sub(&w->sleepers, 1);
}

void workers_barrier(struct workers *w) {
    if (w->count == 1) {
        atomic_store_explicit(&w->next, 0, memory_order_relaxed);
        return;
    }
    uint32_t generation = atomic_load_explicit(&w->generation, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&w->arrived, 1, memory_order_acq_rel) + 1 < w->count) {
        wait_for_next(w, generation);
        return;
    }
    atomic_store_explicit(&w->arrived, 0, memory_order_relaxed);
    atomic_store_explicit(&w->next, 0, memory_order_relaxed);
    atomic_store(&w->generation, generation + 1);
    if (atomic_load(&w->sleepers)) (void)syscall(SYS_futex, &w->generation, FUTEX_WAKE_PRIVATE, WORKERS_MAX, NULL, NULL, 0);
}

uint32_t workers_take(struct workers *w, uint32_t n) { return atomic_fetch_add_explicit(&w->next, n, memory_order_relaxed); }

uint32_t workers_count(const struct workers *w) { return w->count; }

static void *worker_main(void *place_of) {
    const struct place *place = place_of;
    struct workers *w = place->workers;
    for (;;) {
        workers_barrier(w);
        if (w->stop) return NULL;
        w->work(w->context, place->worker);
        workers_barrier(w);
    }
}

void workers_run(struct workers *w, void (*work)(void *context, uint32_t worker), void *context) {
    w->work = work;
    w->context = context;
    workers_barrier(w);
    work(context, 0);
    workers_barrier(w);
}

enum status workers_start(uint32_t count, struct workers **workers, struct error *error) {
    CHECK(count >= 1 && count <= WORKERS_MAX);
    struct workers *w = aligned_alloc(64, (sizeof *w + 63) / 64 * 64);
    CHECK(w);
    memset(w, 0, sizeof *w);
    w->count = count;
    /* Signals are the business of the threads that were there before. */
    sigset_t all, old;
    sigfillset(&all);
    CHECK(pthread_sigmask(SIG_SETMASK, &all, &old) == 0);
    uint32_t started = 1;
    int failed = 0;
    for (; started < count; started++) {
        w->places[started] = (struct place){w, started};
        failed = pthread_create(&w->threads[started], NULL, worker_main, &w->places[started]);
        if (failed) break;
        (void)pthread_setname_np(w->threads[started], "kvasir-compute");
    }
    CHECK(pthread_sigmask(SIG_SETMASK, &old, NULL) == 0);
    *workers = w;
    if (!failed) return STATUS_OK;
    /* Those that run wait for `count` to arrive: stand in for those that do not. */
    w->stop = true;
    for (uint32_t missing = started; missing < count; missing++) atomic_fetch_add(&w->arrived, 1);
    workers_barrier(w);
    for (uint32_t i = 1; i < started; i++) CHECK(pthread_join(w->threads[i], NULL) == 0);
    free(w);
    *workers = NULL;
    return error_set(error, STATUS_NO_MEMORY, "compute thread %u of %u: %s", started, count, strerror(failed));
}

void workers_stop(struct workers *w) {
    if (!w) return;
    w->stop = true;
    workers_barrier(w);
    for (uint32_t i = 1; i < w->count; i++) CHECK(pthread_join(w->threads[i], NULL) == 0);
    free(w);
}
