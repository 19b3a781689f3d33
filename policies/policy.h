/* What each method of KV-cache compression says: which rows it looks at, how a slot is scored, how many slots a lane keeps, when it makes sense. A policy is a const
 * table; it owns nothing, allocates nothing and knows no block pool. Choosing is done once for all policies (choose.h), moving and freeing by others.
 *
 * Words: a lane is one KV head of one layer; its slots are its cached tokens in order of position. Scores: higher stays. Every function here is pure; any thread. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "kernels/score.h"

/* What the forward pass must leave behind for the score. */
enum policy_rows {
    POLICY_ROWS_NONE,   /* positions or keys alone */
    POLICY_ROWS_WINDOW, /* the last `window` query rows (a ring) */
    POLICY_ROWS_LAST,   /* the last one */
    POLICY_ROWS_ALL,    /* attention accumulated over every row: no prefix cache hits */
};

/* Where scores come from. */
enum policy_scorer {
    SCORER_NONE,     /* nothing is ever evicted */
    SCORER_POSITION, /* newer is better: recents */
    SCORER_RANDOM,   /* of (seed, position) */
    SCORER_KERNEL,   /* `kernel` of kernels/score.h, one number a slot or one a slot and query head */
};

/* Between the kernel's numbers per query head and one score a slot. */
enum policy_reduce {
    REDUCE_MEAN_POOL, /* mean over the query heads, then pooling over neighbours */
    REDUCE_POOL_SUM,  /* pooling, then the sum over the query heads (KV-Compress) */
    REDUCE_MEAN,      /* mean over the query heads */
    REDUCE_LAYER,     /* mean over the query heads and over the lanes of the layer: the lanes of a layer keep the same tokens */
};

enum policy_budget {
    BUDGET_UNIFORM, /* the same for each lane */
    BUDGET_RAMP,    /* falls from the first layer to the last, the same average (PyramidKV) */
    BUDGET_LAYER,   /* pooled over the lanes of a layer, with a floor (Ada-KV) */
    BUDGET_RAMP_LAYER,
    BUDGET_BLOCKS, /* pooled over all lanes, in whole blocks (KV-Compress) */
    BUDGET_LADDER, /* per lane the cheapest rule that recovers enough attention (FastGen) */
};

enum policy_granularity { GRANULARITY_SLOT, GRANULARITY_BLOCK };

enum policy_trigger { TRIGGER_PROMPT_END = 1, TRIGGER_BUDGET = 2, TRIGGER_PRESSURE = 4 };
#define TRIGGERS_ALL (TRIGGER_PROMPT_END | TRIGGER_BUDGET | TRIGGER_PRESSURE)
#define TRIGGER_KINDS 3

struct policy {
    const char *name; /* as configured */
    const char *help; /* one line: what it keeps */
    enum policy_rows rows;
    enum policy_scorer scorer;
    enum score_kind kernel;
    enum policy_reduce reduce;
    enum policy_budget budget;
    enum policy_granularity granularity;
    unsigned triggers;    /* that make sense */
    bool protects_window; /* the rows that score are kept too */
    bool half_recent;     /* half of the budget is for recents */
    bool always_value;    /* the value factor belongs to the formula */
    bool shifts_sinks;    /* sinks follow the recents in RoPE's eyes, so that distances stay within what the model was trained on */
    bool needs_classes;   /* token classes */
};

/* In the order of the manual; NULL-terminated. policies[0] is "none". */
extern const struct policy *const policies[];
const struct policy *policy_find(const char *name); /* NULL: unknown */
uint32_t policy_count(void);
uint32_t policy_index(const struct policy *policy);
const char *policy_names(void);                               /* "none, random, ...", for words */
const char *policy_trigger_name(enum policy_trigger trigger); /* "prompt_end", "budget", "pressure" */

enum pooling { POOLING_NONE, POOLING_AVERAGE, POOLING_MAX };

#define POLICY_WINDOW_MAX 64

/* The numbers of [compression], checked. */
struct policy_options {
    uint32_t sink_tokens;    /* first positions, always kept */
    uint32_t recent_tokens;  /* last positions, always kept */
    uint32_t protect_tokens; /* of a request: the first positions, always kept */
    uint32_t window;         /* query rows that score, 1..POLICY_WINDOW_MAX */
    enum pooling pooling;
    uint32_t pooling_kernel; /* odd */
    double floor;            /* Ada-KV: share of the uniform budget that each lane keeps */
    double recovery;         /* FastGen: attention to recover */
    uint32_t ramp;           /* PyramidKV: beta */
    uint32_t ahead;          /* Expected Attention: coming positions to average over */
    bool value_aware;        /* multiply attention scores by the size of the value */
    uint64_t seed;           /* random */
};
void policy_options_default(struct policy_options *options);

/* A budget as it is asked for: one of the two. */
struct policy_target {
    uint32_t budget_tokens; /* average per lane; 0: by ratio */
    double keep_ratio;      /* (0, 1] of the tokens seen */
};
/* Tokens per lane to keep once `seen` have been. >= 1. */
uint32_t policy_target_tokens(const struct policy_target *target, uint32_t seen);
