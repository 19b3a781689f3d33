/* What a step costs on this machine: fixed + rows + rows x context, fitted from a few timed steps through the backend, which also warm it up. Once, at start, before the
 * engine thread runs; bounded in time. Overwrites blocks of the pool: nothing may live there yet. */
#pragma once

#include "kernels/backend.h"
#include "scheduler/scheduler.h"

/* One measured step: rows that attend to `context` slots each on average. */
struct step_time {
    double rows, context, us;
};

/* Least cost model through: one row; a chunk at the beginning; chunks further on. All coefficients are >= 0, and per_row_us > 0. times[0] is the single row. */
struct step_cost step_cost_solve(const struct step_time *times, uint32_t n_times);

/* Does the time that this backend's steps take mean anything? Not that of reference, which is for comparing, nor that of mock, which has none. */
bool step_cost_is_measured(const struct backend *backend, const struct backend_limits *limits);

/* `limits` as prepare was given. Backends whose time means nothing get constants. */
enum status step_cost_fit(struct backend *backend, const struct program *program, const struct backend_limits *limits, uint32_t max_model_len,
                          struct step_cost *cost, struct error *error);
