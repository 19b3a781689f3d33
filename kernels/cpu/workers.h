/* The compute threads. A run is a list of stages, each a number of units that may be done in any order by anyone; a stage begins when the last unit of the
 * one before it is done. The thread that calls workers_run is worker 0; the others belong to the pool and wait between runs: a short spin, then a futex, so
 * that an idle server uses no CPU.
 *
 * Every worker begins with its own equal share of a stage's units, always the same one, and takes from the others' ends when it is through. Nobody waits for a worker, only
 * for units: one that the system has put aside, or that has a busy core, does less and delays the others by at most the units it holds. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

enum { WORKERS_MAX = 256 };

struct workers;

struct stage {
    /* Units [first, end). */
    void (*run)(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker);
    uint32_t n_units; /* 0: nothing to do */
    uint32_t index;   /* the caller's */
};

enum status workers_start(uint32_t count, struct workers **workers, struct error *error);
void workers_stop(struct workers *workers); /* NULL is fine */
uint32_t workers_count(const struct workers *workers);

/* Returns when all stages are done. What is written in a stage, or before the call, is seen by every unit of later stages, and after it. */
void workers_run(struct workers *workers, void *context, const struct stage *stages, uint32_t n_stages);

/* One a physical core, within the affinity mask and the cgroup's CPU quota; at least 1. */
uint32_t workers_default_count(void);
