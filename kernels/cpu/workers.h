/* The compute threads and their barrier. The thread that calls workers_run is worker 0; the others belong to the pool and wait between runs: a short spin,
 * then a futex, so that an idle server uses no CPU and a preempted worker is not waited for in a hot loop. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

enum { WORKERS_MAX = 256 };

struct workers;

enum status workers_start(uint32_t count, struct workers **workers, struct error *error);
void workers_stop(struct workers *workers); /* NULL is fine */
uint32_t workers_count(const struct workers *workers);

/* Runs work(context, worker) on every worker, returns when all are through. What worker 0 wrote before is seen by all, what they wrote is seen after. */
void workers_run(struct workers *workers, void (*work)(void *context, uint32_t worker), void *context);
/* Within a run: returns when all workers have called it; the same ordering. Resets the counter of workers_take. */
void workers_barrier(struct workers *workers);
/* Within a phase (between barriers): the next `n` of a common count, first one returned. */
uint32_t workers_take(struct workers *workers, uint32_t n);

/* One a physical core, within the affinity mask and the cgroup's CPU quota; at least 1. */
uint32_t workers_default_count(void);
