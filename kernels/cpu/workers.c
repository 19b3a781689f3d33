/* See workers.h. Owns the threads other than worker 0.
 *
 * The protocol. Each worker has a word with the range of units [next, end) that are still its own; anybody may take from it by compare-and-swap: the owner from
 * the front, others from the end. Whoever holds a unit keeps its stage open, for a stage ends when as many units are reported done as it has; so a
 * unit that was taken belongs to the current stage, whatever the taker thought when it looked. The worker whose report completes the stage opens the next:
 * first what a unit needs to know (`stage`), then the ranges, then the generation on which idle workers wait. */
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

/* Tens of microseconds: longer than the imbalance of short stages and the pause between two steps, shorter than a time slice. */
enum { SPINS = 2000 };

struct range {
    _Alignas(64) _Atomic uint64_t units; /* next in the low half, end in the high half */
};

struct workers {
    _Alignas(64) _Atomic uint32_t generation; /* of stages; the futex word */
    _Atomic uint32_t sleepers;
    _Alignas(64) _Atomic uint32_t done;     /* units of this stage */
    _Alignas(64) const struct stage *stage; /* written while no unit is out */
    const struct stage *end;
    void *context;
    uint32_t count, started; /* workers; threads there are, worker 0 counted */
    _Atomic bool running, stop;
    struct range ranges[WORKERS_MAX];
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

/* The sleeper announces itself, then looks at the generation (in the kernel); the waker moves the generation, then looks for sleepers. All four are
 * sequentially consistent, so one of them sees the other. */
static void wait_for_change(struct workers *w, uint32_t generation) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&w->generation, memory_order_acquire) != generation) return;
        pause_briefly();
    }
    atomic_fetch_add(&w->sleepers, 1);
    while (atomic_load(&w->generation) == generation) (void)syscall(SYS_futex, &w->generation, FUTEX_WAIT_PRIVATE, generation, NULL, NULL, 0);
    atomic_fetch_sub(&w->sleepers, 1);
}

static void announce(struct workers *w) {
    atomic_fetch_add(&w->generation, 1);
    if (atomic_load(&w->sleepers) > 0) (void)syscall(SYS_futex, &w->generation, FUTEX_WAKE_PRIVATE, WORKERS_MAX, NULL, NULL, 0);
}

static uint64_t pack_range(uint32_t next, uint32_t end) { return (uint64_t)end << 32 | next; }

/* Opens w->stage, or what follows it if that has no units; no unit is out. */
static void open_stage(struct workers *w) {
    while (w->stage < w->end && w->stage->n_units == 0) w->stage++;
    atomic_store_explicit(&w->done, 0, memory_order_relaxed);
    if (w->stage == w->end) {
        atomic_store(&w->running, false);
    } else {
        uint64_t n = w->stage->n_units;
        for (uint32_t i = 0; i < w->count; i++)
            atomic_store_explicit(&w->ranges[i].units, pack_range((uint32_t)(n * i / w->count), (uint32_t)(n * (i + 1) / w->count)),
                                  memory_order_release);
    }
    announce(w);
}

/* Half of what is left in a range, at least one: few visits, small pieces at the end. */
static bool take(struct range *range, bool own, uint32_t *first, uint32_t *end) {
    uint64_t units = atomic_load_explicit(&range->units, memory_order_relaxed);
    for (;;) {
        uint32_t next = (uint32_t)units, last = (uint32_t)(units >> 32);
        if (next >= last) return false;
        uint32_t n = (last - next + 1) / 2;
        *first = own ? next : last - n;
        *end = *first + n;
        uint64_t rest = own ? pack_range(next + n, last) : pack_range(next, last - n);
        if (atomic_compare_exchange_weak_explicit(&range->units, &units, rest, memory_order_acquire, memory_order_relaxed)) return true;
    }
}

static bool take_any(struct workers *w, uint32_t worker, uint32_t *first, uint32_t *end) {
    if (take(&w->ranges[worker], true, first, end)) return true;
    for (uint32_t i = 1; i < w->count; i++)
        if (take(&w->ranges[(worker + i) % w->count], false, first, end)) return true;
    return false;
}

/* Works until the run (worker 0) or the pool (the others) ends. */
static void work(struct workers *w, uint32_t worker) {
    for (;;) {
        uint32_t generation = atomic_load_explicit(&w->generation, memory_order_acquire);
        if (worker == 0 ? !atomic_load(&w->running) : atomic_load(&w->stop)) return;
        uint32_t first, end, n = 0, n_units = 0;
        while (take_any(w, worker, &first, &end)) {
            n_units = w->stage->n_units;
            w->stage->run(w->context, w->stage, first, end, worker);
            n += end - first;
        }
        if (n == 0) {
            wait_for_change(w, generation);
        } else if (atomic_fetch_add_explicit(&w->done, n, memory_order_acq_rel) + n == n_units) {
            w->stage++;
            open_stage(w);
        }
    }
}

uint32_t workers_count(const struct workers *w) { return w->count; }

void workers_run(struct workers *w, void *context, const struct stage *stages, uint32_t n_stages) {
    w->context = context;
    w->stage = stages;
    w->end = stages + n_stages;
    atomic_store(&w->running, true);
    open_stage(w);
    work(w, 0);
}

static void *worker_main(void *place_of) {
    const struct place *place = place_of;
    work(place->workers, place->worker);
    return NULL;
}

enum status workers_start(uint32_t count, struct workers **workers, struct error *error) {
    CHECK(count >= 1 && count <= WORKERS_MAX);
    struct workers *w = aligned_alloc(64, (sizeof *w + 63) / 64 * 64);
    CHECK(w);
    memset(w, 0, sizeof *w);
    w->count = count;
    /* Signals are the business of the threads that were there before. */
    sigset_t all, old;
    (void)sigfillset(&all);
    CHECK(pthread_sigmask(SIG_SETMASK, &all, &old) == 0);
    int failed = 0;
    uint32_t started = 1;
    for (; started < count && !failed; started += !failed) {
        w->places[started] = (struct place){w, started};
        failed = pthread_create(&w->threads[started], NULL, worker_main, &w->places[started]);
        if (!failed) (void)pthread_setname_np(w->threads[started], "kvasir-compute");
    }
    CHECK(pthread_sigmask(SIG_SETMASK, &old, NULL) == 0);
    w->started = started;
    if (!failed) {
        *workers = w;
        return STATUS_OK;
    }
    workers_stop(w);
    return error_set(error, STATUS_NO_MEMORY, "compute thread %u of %u: %s", (unsigned)started + 1, (unsigned)count, strerror(failed));
}

void workers_stop(struct workers *w) {
    if (!w) return;
    atomic_store(&w->stop, true);
    announce(w);
    for (uint32_t i = 1; i < w->started; i++) CHECK(pthread_join(w->threads[i], NULL) == 0);
    free(w);
}
