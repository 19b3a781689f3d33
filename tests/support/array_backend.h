/* A backend of arrays: scores and positions of one sequence are what a test says; ranking, cutting and listing are those of every backend that computes on the host. Everything else is missing. */
#pragma once

#include "kernels/backend.h"
#include "kernels/program.h"

struct array_lane {
    uint32_t n_slots;
    const int32_t *positions; /* [n_slots] ascending */
    const float *raw;         /* [group][n_slots] of kinds per query head, else [n_slots] */
    const float *norms;       /* [n_slots] SCORE_VALUE_NORM */
};

struct array_backend {
    struct backend backend;
    struct program program;
    const struct array_lane *lanes;
    uint32_t *block_ids, *lane_first, *lane_tokens; /* the sequence's tables */
};

/* `lanes` [n_layers * n_kv_heads] stays the caller's and must outlive the backend; n_slots is read here, the rest when scores are asked for. */
struct array_backend *array_backend_new(uint32_t n_layers, uint32_t n_kv_heads, uint32_t group, const struct array_lane *lanes);
void array_backend_free(struct array_backend *array); /* NULL is fine */
