/* The running launch, as the files of the host device share it: execution.cpp, shared.cpp, access.cpp. */
#pragma once

#include <vector>

#include "tests/host_device/fiber.h"
#include "tests/host_device/launch.h"

extern "C" {
#include "base/random.h"
}

enum host_waits { WAITS_NOT, WAITS_WARP, WAITS_BLOCK, WAITS_CLUSTER, WAITS_DONE };

/* A copy on its way to shared memory. */
struct host_copy {
    uint8_t *to;
    const uint8_t *from;
    uint32_t bytes, take, group;
};

struct host_thread {
    struct fiber fiber;
    struct host_block *block;
    uint32_t number; /* in its block */
    uint3 index;
    enum host_waits waits;
    struct host_site site;  /* where it waits */
    uint32_t cluster_epoch; /* barriers of the cluster it has waited for */
    uint32_t warp_epoch;    /* meetings of its warp so far */
    uint32_t cluster_phase; /* in which it arrived, if it did */
    bool arrived;
    std::vector<struct host_copy> copies;
    uint32_t groups; /* committed */
};

/* Lanes of a warp that wait for each other; a warp may be in parts. */
struct host_meeting {
    uint32_t mask, arrived; /* arrived 0: nobody */
    struct host_site site;
    void *operands[32];
};
enum { MEETINGS = 4, WARPS_MAX = 32 };

struct host_block {
    uint3 index;
    uint32_t rank, n; /* in its cluster; threads */
    struct host_thread *threads;
    uint8_t *dynamic;
    uint32_t n_done, n_waiting, epoch; /* epoch: barriers passed */
    struct host_site site;             /* of the barrier where some wait */
    int count;
    host_votes votes;
    struct host_meeting meetings[WARPS_MAX][MEETINGS];
};

struct host_running {
    const host_launch_call *call;
    struct host_thread *thread; /* NULL: no kernel runs */
    struct fiber host;
    enum host_order order;
    struct random random;
    uint64_t random_walk;
    struct host_thread *threads;
    uint32_t n_threads, threads_room, n_done;
    std::vector<struct host_block> blocks;
    std::vector<struct host_thread *> ready, order_scratch;
    size_t first_ready;
    std::vector<uint8_t *> stacks;
    uint8_t *dynamic;
    size_t dynamic_stride, dynamic_room;
    uint32_t cluster_arrived, cluster_phase;
};
extern struct host_running host_running;

void host_cluster_leave(struct host_thread *thread);
/* access.cpp: nobody has accessed shared memory yet; accesses that are not the compiler's. */
void host_accesses_begin_block(void);
void host_accesses_settle(void); /* the thread's last access is done */
void host_access_shared(const void *at, size_t bytes, bool write);
void host_access_atomic(const void *at, size_t bytes);
/* names.cpp: of the function at an address. */
void host_name_of(const void *function, char *name, size_t bytes);
