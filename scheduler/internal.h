/* What the scheduler's files share: its prompts, choices and queues. Inside scheduler/ only. Owner: the one thread that calls scheduler.h. */
#pragma once

#include "base/block.h"
#include "base/check.h"
#include "blockmgr/block_pool.h"
#include "blockmgr/block_table.h"
#include "blockmgr/prefix_cache.h"
#include "scheduler/scheduler.h"

#define NONE UINT32_MAX
#define AGE_SHIFT 31 /* one level of priority is worth 2^31 ns (2.1 s) of waiting; int32 << 31 and arrivals below 2^62 ns cannot overflow */

enum choice_state {
    CHOICE_FREE,
    CHOICE_UNFORKED, /* waits for the first live choice of its prompt to read it */
    CHOICE_WAITING,  /* in the queue, new or preempted */
    CHOICE_RUNNING,  /* has a table */
};

struct prompt {
    struct scheduler_request request;
    uint64_t order;        /* of scheduler_add: breaks ties of arrival */
    int64_t rank;          /* aged priority: smaller first */
    uint32_t first_choice; /* live choices, ascending; through choice.next */
    uint32_t n_live, n_unforked;
    uint32_t next_in_bucket; /* also the list of free prompts */
    bool live, started;
};

struct choice {
    enum choice_state state;
    uint32_t prompt, number;
    uint32_t next;       /* of the prompt; also the list of free choices */
    bool preempted;      /* WAITING: at the head of the queue */
    bool sharing;        /* its runs may enter the prefix cache */
    uint32_t n_tokens;   /* known */
    uint32_t n_computed; /* in the cache; the sequence position of the next row */
    uint32_t table;      /* RUNNING */
    uint32_t entry;      /* RUNNING: the last prefix cache entry it uses (its parents are used too), or ENTRY_NONE */
    uint32_t n_runs;     /* entries on that chain */
    uint32_t cached_tokens;
    uint32_t plan_entry; /* in the plan being made, or NONE */
};

struct scheduler {
    struct scheduler_limits limits;
    struct block_pool pool;
    struct block_tables tables;
    struct prefix_cache cache;

    struct prompt *prompts; /* [max_choices] */
    struct choice *choices; /* [max_choices] */
    uint32_t free_prompt, free_choice, n_choices;
    uint32_t *buckets; /* prompts by id */
    uint32_t n_buckets;
    uint64_t next_order;

    uint32_t *waiting; /* [max_choices] choices; the next to be admitted is the LAST */
    uint32_t n_waiting;
    uint32_t *running; /* [max_sequences] choices, oldest first */
    uint32_t n_running;
    uint32_t *free_tables; /* [max_sequences] */
    uint32_t n_free_tables;

    struct plan plan;
    struct plan_entry *entries; /* [max_sequences] */
    uint32_t *entry_choice;     /* [max_sequences] */
    uint32_t *sample_choice;    /* [max_samples] numbers */
    uint32_t *order;            /* [max_sequences] scratch */
    double plan_cost_us;
    bool planned, plan_preempted, plan_chunked;

    uint32_t *copy_source, *copy_destination, *copy_choice,
        n_copies;         /* [max_sequences * n_lanes] of forks, not yet carried out; copy_choice: the fork */
    uint32_t *runs;       /* [blocks of max_model_len] scratch: entries of a hit */
    uint32_t *lane_ids;   /* [n_lanes] scratch */
    uint32_t *recount;    /* [n_blocks] scratch of scheduler_check */
    uint32_t *user_count; /* [cache capacity] likewise */
    struct scheduler_stats stats;
};

static inline uint32_t blocks_of(uint32_t tokens) { return tokens / BLOCK_TOKENS + (tokens % BLOCK_TOKENS != 0); }
static inline struct prompt *prompt_of(const struct scheduler *s, uint32_t choice) { return &s->prompts[s->choices[choice].prompt]; }

/* queue.c */
bool choice_older(const struct scheduler *s, uint32_t a, uint32_t b);
bool choice_before(const struct scheduler *s, uint32_t a, uint32_t b); /* in rank, then age: who is served first and preempted last */
void queue_wait(struct scheduler *s, uint32_t choice);
void queue_run(struct scheduler *s, uint32_t choice);   /* takes a table; one must be free */
void queue_leave(struct scheduler *s, uint32_t choice); /* out of whichever queue it stands in; a running one gives all its blocks back */
void choice_preempt(struct scheduler *s, uint32_t choice);
void choice_end(struct scheduler *s, uint32_t choice); /* not in a queue any more */

/* prefix.c */
uint32_t prefix_lookup(struct scheduler *s, uint32_t choice);             /* runs of a hit, in s->runs */
void prefix_adopt(struct scheduler *s, uint32_t choice, uint32_t n_runs); /* a running choice with an empty table takes them over */
void prefix_contribute(struct scheduler *s, uint32_t choice);             /* full runs since the last call enter the cache */
void prefix_leave_chain(struct scheduler *s, uint32_t choice);
bool blocks_make_free(struct scheduler *s, uint64_t n); /* by shrinking the prefix cache; false: less than n are free even so */
