/* What the parts of choose() share. Inside policies/ only. */
#pragma once

#include "policies/choose.h"

/* What the backend was asked for last. */
enum chooser_stage { CHOOSER_RANKED, CHOOSER_CUT, CHOOSER_LISTED };

struct chooser {
    struct choose_request request;
    struct backend *backend;
    uint32_t place;
    enum chooser_stage stage;
    struct rank_request rank;
    struct choose_lane *lanes; /* [n_lanes] the caller's */
    uint32_t n_lanes;
    uint32_t *n_protected;   /* [n_lanes]; not of BUDGET_BLOCKS */
    uint32_t *budgets;       /* [n_lanes] slots to keep */
    uint32_t *evict;         /* [n_lanes] slots to let go */
    uint32_t *layer_budgets; /* [n_layers] beyond what is protected */
    uint32_t *needed;        /* [n_lanes] of a cut */
    struct cut_lane *cut;    /* [n_lanes] */
    struct kept_lane *kept;  /* [n_lanes] */
    /* The ladder's, in request.room: */
    float *scores;      /* [slots of all lanes] */
    uint32_t *keys;     /* [most slots of a lane] */
    int32_t *positions; /* [the same, whole blocks] */
    uint8_t *flags;     /* [most slots of a lane] */
};

static inline uint32_t chooser_evictable(const struct chooser *chooser, uint32_t lane) {
    return chooser->lanes[lane].n_slots - chooser->n_protected[lane];
}

bool chooser_budgets(struct chooser *chooser);     /* budget.c: fills budgets; false: it asked for a cut, */
void chooser_budgets_cut(struct chooser *chooser); /* which this fills them by */
void chooser_blocks(struct chooser *chooser);      /* blocks.c: asks for a cut, behind the ranking, */
void chooser_blocks_cut(struct chooser *chooser);  /* by which this fills evict */
void chooser_ladder(struct chooser *chooser);      /* ladder.c: fills lanes */
