/* What the parts of choose() share. Inside policies/ only. */
#pragma once

#include "policies/choose.h"

#define CHOOSER_PROTECTED UINT32_MAX /* the key of a slot that always stays; no other slot has it */
#define CHOOSER_HEADS_MAX 1024

struct chooser_lane {
    float *scores;  /* [n_slots] */
    uint32_t *keys; /* [n_slots] the same, as integers in the same order */
    uint32_t n_slots, n_protected;
};

struct radix_counts {
    uint32_t below; /* keys below the prefix found so far */
    uint32_t counts[256];
};

struct chooser {
    struct choose_request request;
    struct choose_lane *results; /* [n_lanes] the caller's */
    uint32_t n_lanes;
    struct chooser_lane *lanes;
    struct radix_counts *counts; /* [n_lanes] */
    uint32_t *budgets;           /* [n_lanes] slots to keep */
    float *floats[2];            /* [most slots of a lane] */
    uint8_t *flags;              /* [most slots of a lane] */
};

uint32_t chooser_rank(const uint32_t *keys, uint32_t n, uint32_t rank, uint32_t *below);
void chooser_keep(const struct chooser_lane *mine, uint32_t evict, struct choose_lane *lane);
void chooser_budgets(struct chooser *chooser); /* budget.c: fills budgets */
void chooser_blocks(struct chooser *chooser);  /* blocks.c */
void chooser_ladder(struct chooser *chooser);  /* ladder.c */
