/* See execution.h. One launch runs at a time, on whichever OS thread waits for its stream (runtime.cpp holds the lock).
 *
 * A cluster's blocks, or one block, are the threads that exist at a time; each is a fiber that runs until it meets others. Those that can run are kept in a list from which the order takes: at an
 * end of it (a thread, and then its warp, runs as far ahead of the others as barriers let it) or anywhere.
 *
 * Not modelled: warps of which some lanes run ahead within an instruction, memory that is seen late by other blocks (atomics and fences take effect at once), launches that begin before the one before
 * has ended, static __shared__ memory of clusters (one copy: CHECKed where accesses are). */
#include "tests/host_device/execution_state.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

extern "C" {
#include "base/check.h"
#include "base/random.h"
}

struct host_index host_index;

struct host_running host_running;

#if defined(__SANITIZE_ADDRESS__)
enum { STACK_BYTES = 512 << 10 };
#else
enum { STACK_BYTES = 128 << 10 };
#endif

bool host_in_kernel(void) { return host_running.thread != NULL; }

void host_fail(const char *format, ...) {
    const struct host_running *run = &host_running;
    va_list arguments;
    va_start(arguments, format);
    (void)fflush(stdout);
    (void)fprintf(stderr, "host device: ");
    if (run->thread) {
        char name[512];
        host_name_of(run->call->kernel, name, sizeof name);
        const uint3 block = run->thread->block->index, thread = run->thread->index;
        (void)fprintf(stderr, "%s, block (%u, %u, %u), thread (%u, %u, %u): ", name, block.x, block.y, block.z, thread.x, thread.y, thread.z);
    }
    (void)vfprintf(stderr, format, arguments);
    (void)fprintf(stderr, "\n");
    va_end(arguments);
    abort();
}

/* ---- whose turn it is ---- */

/* Threads that can run, to the list. */
static void make_ready(struct host_thread **threads, uint32_t n) {
    struct host_running *run = &host_running;
    const bool upwards = run->order == ORDER_DESCENDING || run->order == ORDER_LOCKSTEP; /* the others are taken from the end */
    for (uint32_t i = 0; i < n; i++) run->ready.push_back(threads[upwards ? i : n - 1 - i]);
}

static struct host_thread *take_ready(void) {
    struct host_running *run = &host_running;
    std::vector<struct host_thread *> &ready = run->ready;
    if (run->first_ready == ready.size()) return NULL;
    struct host_thread *taken;
    if (run->order == ORDER_LOCKSTEP) {
        taken = ready[run->first_ready++];
        if (run->first_ready == ready.size()) {
            ready.clear();
            run->first_ready = 0;
        }
        return taken;
    }
    if (run->order == ORDER_RANDOM) std::swap(ready[random_below(&run->random, (uint32_t)ready.size())], ready.back());
    taken = ready.back();
    ready.pop_back();
    return taken;
}

static void report_stuck(void) {
    const struct host_running *run = &host_running;
    uint32_t shown = 0;
    for (uint32_t i = 0; i < run->n_threads; i++) {
        const struct host_thread *t = &run->threads[i];
        if (t->waits == WAITS_NOT || t->waits == WAITS_DONE || shown++ >= 8) continue;
        (void)fprintf(stderr, "host device: block (%u, %u, %u), thread (%u, %u, %u) waits at %s, %s:%d\n", t->block->index.x, t->block->index.y,
                      t->block->index.z, t->index.x, t->index.y, t->index.z, t->site.what, t->site.file, t->site.line);
    }
    host_fail("nobody can run any more: threads wait for others that wait elsewhere or have returned");
}

/* The running thread waits, or has returned: the next one's turn. */
static void run_next(void) {
    struct host_running *run = &host_running;
    host_accesses_settle();
    struct host_thread *from = run->thread, *to = take_ready();
    if (to == from) return;
    const bool last = from->waits == WAITS_DONE;
    if (!to && run->n_done < run->n_threads) report_stuck();
    run->thread = to;
    if (to) {
        threadIdx = to->index;
        blockIdx = to->block->index;
    }
    fiber_switch(&from->fiber, to ? &to->fiber : &run->host, last);
}

static bool same_site(const struct host_site *a, const struct host_site *b) {
    return a->line == b->line && (a->what == b->what || strcmp(a->what, b->what) == 0) && (a->file == b->file || strcmp(a->file, b->file) == 0);
}

/* The running thread goes, or returns, while others of its warp wait for it. */
static void check_not_awaited(const struct host_thread *t, const char *what, const char *file, int line) {
    for (const struct host_meeting *m = t->block->meetings[t->number / 32]; m < t->block->meetings[t->number / 32] + MEETINGS; m++)
        if (m->arrived && m->mask >> t->number % 32 & 1)
            host_fail("is at %s, %s:%d, while others of its warp wait for it at %s, %s:%d, with mask %08x", what, file, line, m->site.what,
                      m->site.file, m->site.line, m->mask);
}

static void thread_main(void) {
    fiber_entered();
    host_running.call->run(host_running.call->context);
    struct host_thread *t = host_running.thread;
    struct host_block *block = t->block;
    t->waits = WAITS_DONE;
    t->site = {"its end", "", 0};
    block->n_done++;
    host_running.n_done++;
    check_not_awaited(t, "its end", "", 0);
    if (block->n_waiting > 0) host_fail("returns, while others of the block wait at %s, %s:%d", block->site.what, block->site.file, block->site.line);
    host_cluster_leave(t);
    run_next();
    CHECK(!"a thread that has returned");
}

/* ---- a launch ---- */

static void begin_block(struct host_block *block, const host_launch_call *call, uint32_t number, uint32_t rank) {
    struct host_running *run = &host_running;
    const uint32_t n = call->block.x * call->block.y * call->block.z;
    memset((void *)block, 0, sizeof *block);
    block->index = {number % call->grid.x, number / call->grid.x % call->grid.y, number / call->grid.x / call->grid.y};
    block->rank = rank;
    block->n = n;
    block->threads = run->threads + rank * n;
    block->dynamic = run->dynamic + rank * run->dynamic_stride;
    memset(block->dynamic, run->order == ORDER_RANDOM ? (int)random_below(&run->random, 256) : 0xff,
           call->shared_bytes); /* NaN in every type of float */
    for (uint32_t i = 0; i < n; i++) {
        struct host_thread *t = &block->threads[i];
        const uint32_t slot = rank * n + i;
        while (run->stacks.size() <= slot) run->stacks.push_back(fiber_stack_new(STACK_BYTES));
        t->block = block;
        t->number = i;
        t->index = {i % call->block.x, i / call->block.x % call->block.y, i / call->block.x / call->block.y};
        t->waits = WAITS_NOT;
        t->warp_epoch = 0;
        t->cluster_epoch = 0;
        t->cluster_phase = 0;
        t->arrived = false;
        t->copies.clear();
        t->groups = 0;
        fiber_start(&t->fiber, run->stacks[slot], STACK_BYTES, slot % 61 * 64, thread_main);
    }
}

static void run_cluster(const host_launch_call *call, uint32_t first) {
    struct host_running *run = &host_running;
    const uint32_t n = call->block.x * call->block.y * call->block.z;
    run->n_done = run->cluster_arrived = run->cluster_phase = 0;
    run->n_threads = n * call->cluster;
    for (uint32_t rank = 0; rank < call->cluster; rank++) begin_block(&run->blocks[rank], call, first + rank, rank);
    host_accesses_begin_block();
    run->order_scratch.resize(run->n_threads);
    for (uint32_t i = 0; i < run->n_threads; i++) run->order_scratch[i] = &run->threads[i];
    make_ready(run->order_scratch.data(), run->n_threads);
    struct host_thread *to = take_ready();
    run->thread = to;
    threadIdx = to->index;
    blockIdx = to->block->index;
    fiber_switch(&run->host, &to->fiber, false);
    CHECK(!run->thread && run->n_done == run->n_threads);
}

static void make_room(const host_launch_call *call) {
    struct host_running *run = &host_running;
    const uint32_t threads = call->block.x * call->block.y * call->block.z * call->cluster;
    if (run->threads_room < threads) {
        delete[] run->threads;
        run->threads = new struct host_thread[threads];
        run->threads_room = threads;
    }
    run->blocks.resize(call->cluster);
    run->dynamic_stride = (call->shared_bytes + 1023) / 1024 * 1024 + 1024;
    if (run->dynamic_room < run->dynamic_stride * call->cluster) {
        free(run->dynamic);
        run->dynamic_room = run->dynamic_stride * call->cluster;
        run->dynamic = (uint8_t *)aligned_alloc(1024, run->dynamic_room);
        CHECK(run->dynamic);
    }
}

void host_run(const host_launch_call *call) {
    struct host_running *run = &host_running;
    const uint32_t clusters = call->grid.x * call->grid.y * call->grid.z / call->cluster;
    CHECK(!run->thread);
    run->order = host_options()->order;
    if (run->random.state == 0) run->random.state = host_options()->seed + 1;
    run->call = call;
    blockDim = call->block;
    gridDim = call->grid;
    make_room(call);
    for (uint32_t i = 0; i < clusters; i++) {
        const uint32_t turned = run->order == ORDER_RANDOM ? (uint32_t)((i + run->random_walk) % clusters) : i;
        const uint32_t at = run->order == ORDER_DESCENDING || (run->order == ORDER_RANDOM && run->random_walk >> 63) ? clusters - 1 - turned : turned;
        run_cluster(call, at * call->cluster);
    }
    run->random_walk = random_next(&run->random);
    run->call = NULL;
}

/* ---- meeting ---- */

host_votes host_block_barrier(struct host_site site, bool vote) {
    struct host_running *run = &host_running;
    struct host_thread *t = run->thread;
    struct host_block *block = t->block;
    if (block->n_done > 0)
        host_fail("waits at %s, %s:%d, which %u threads of the block will never reach: they have returned", site.what, site.file, site.line,
                  block->n_done);
    if (block->n_waiting == 0) {
        block->site = site;
        block->count = 0;
    } else if (!same_site(&block->site, &site)) {
        host_fail("waits at %s, %s:%d, others of its block at %s, %s:%d", site.what, site.file, site.line, block->site.what, block->site.file,
                  block->site.line);
    }
    check_not_awaited(t, site.what, site.file, site.line);
    block->count += vote;
    t->site = site;
    t->waits = WAITS_BLOCK;
    if (++block->n_waiting == block->n) {
        block->votes = {block->count, block->count > 0, block->count == (int)block->n};
        block->n_waiting = 0;
        block->epoch++;
        run->order_scratch.resize(block->n);
        for (uint32_t i = 0; i < block->n; i++) {
            block->threads[i].waits = WAITS_NOT;
            run->order_scratch[i] = &block->threads[i];
        }
        make_ready(run->order_scratch.data(), block->n);
    }
    run_next();
    return block->votes;
}

uint32_t host_lane(void) { return host_running.thread->number % 32; }

/* Where the lanes of `mask` meet: who is to be there cannot wait elsewhere. */
static struct host_meeting *meeting_of(struct host_thread *t, const struct host_site *site, uint32_t mask) {
    struct host_meeting *found = NULL, *meetings = t->block->meetings[t->number / 32];
    for (struct host_meeting *m = meetings; m < meetings + MEETINGS; m++) {
        if (!m->arrived && !found) found = m;
        if (!m->arrived || !(m->mask & mask)) continue;
        if (m->mask != mask || !same_site(&m->site, site))
            host_fail("meets its warp at %s, %s:%d, with mask %08x; others are at %s, %s:%d, with mask %08x", site->what, site->file, site->line,
                      mask, m->site.what, m->site.file, m->site.line, m->mask);
        return m;
    }
    if (!found) host_fail("%s, %s:%d: a warp in more than %d parts", site->what, site->file, site->line, MEETINGS);
    const uint32_t first = t->number / 32 * 32;
    for (uint32_t lane = 0; lane < 32; lane++) {
        if (!(mask >> lane & 1)) continue;
        const struct host_thread *other = first + lane < t->block->n ? &t->block->threads[first + lane] : NULL;
        if (!other || other->waits != WAITS_NOT)
            host_fail("%s, %s:%d: lane %u of the mask %08x will not come: it is at %s, %s:%d", site->what, site->file, site->line, lane, mask,
                      other ? other->site.what : "no thread", other ? other->site.file : "", other ? other->site.line : 0);
    }
    *found = (struct host_meeting){mask, 0, *site, {}};
    return found;
}

void host_warp_meet(struct host_site site, uint32_t mask, void *operand, host_combine *combine) {
    struct host_running *run = &host_running;
    struct host_thread *t = run->thread, *warp = t->block->threads + t->number / 32 * 32, *met[32];
    const uint32_t lane = t->number % 32;
    if (!(mask >> lane & 1)) host_fail("%s, %s:%d: the mask %08x does not name the lane itself, %u", site.what, site.file, site.line, mask, lane);
    struct host_meeting *meeting = meeting_of(t, &site, mask);
    t->site = site;
    t->waits = WAITS_WARP;
    meeting->operands[lane] = operand;
    meeting->arrived |= 1u << lane;
    if (meeting->arrived == mask) {
        uint32_t n_met = 0;
        combine(meeting->operands, mask);
        meeting->arrived = 0;
        for (uint32_t i = 0; i < 32; i++) {
            if (!(mask >> i & 1)) continue;
            met[n_met++] = &warp[i];
            warp[i].waits = WAITS_NOT;
            warp[i].warp_epoch++;
        }
        make_ready(met, n_met);
    }
    run_next();
}

/* ---- clusters ---- */

uint32_t host_capability(void) {
    const struct host_options *options = host_options();
    return options->compiled_for ? min(options->compiled_for, options->capability) : options->capability;
}

/* All who have not returned have arrived. */
static void cluster_proceed(void) {
    struct host_running *run = &host_running;
    if (run->cluster_arrived == 0 || run->cluster_arrived + run->n_done < run->n_threads) return;
    run->cluster_arrived = 0;
    run->cluster_phase++;
    run->order_scratch.clear();
    for (uint32_t i = 0; i < run->n_threads; i++) {
        struct host_thread *t = &run->threads[i];
        if (t->waits != WAITS_CLUSTER) continue;
        t->waits = WAITS_NOT;
        run->order_scratch.push_back(t);
    }
    make_ready(run->order_scratch.data(), (uint32_t)run->order_scratch.size());
}

void host_cluster_leave(struct host_thread *t) {
    if (t->arrived && t->cluster_phase == host_running.cluster_phase) host_running.cluster_arrived--; /* counted as returned */
    cluster_proceed();
}

void host_cluster_arrive(void) {
    struct host_running *run = &host_running;
    struct host_thread *t = run->thread;
    if (t->arrived) host_fail("arrives at the cluster's barrier a second time before it has waited");
    t->arrived = true;
    t->cluster_phase = run->cluster_phase;
    run->cluster_arrived++;
    cluster_proceed();
}

void host_cluster_wait(struct host_site site) {
    struct host_running *run = &host_running;
    struct host_thread *t = run->thread;
    if (!t->arrived) host_fail("%s, %s:%d: waits at the cluster's barrier without having arrived", site.what, site.file, site.line);
    t->arrived = false;
    t->cluster_epoch++;
    if (t->cluster_phase != run->cluster_phase) return;
    t->site = site;
    t->waits = WAITS_CLUSTER;
    run_next();
}

void *host_of_rank(void *place, uint32_t rank) {
    const struct host_running *run = &host_running;
    const struct host_block *own = run->thread->block;
    const uintptr_t offset = (uintptr_t)place - (uintptr_t)own->dynamic;
    if (rank >= run->call->cluster) host_fail("asks for shared memory of block %u of a cluster of %u", rank, run->call->cluster);
    if (offset >= run->call->shared_bytes) host_fail("asks another block for what is not in dynamic shared memory");
    if (run->blocks[rank].n_done == run->blocks[rank].n) host_fail("asks for shared memory of block %u of the cluster, which has returned", rank);
    return run->blocks[rank].dynamic + offset;
}
