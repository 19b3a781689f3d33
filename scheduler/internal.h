/* What the parts of the scheduler share. Inside scheduler/ only. */
#pragma once

#include "base/block.h"
#include "base/check.h"
#include "blockmgr/block_pool.h"
#include "blockmgr/block_table.h"
#include "blockmgr/prefix_cache.h"
#include "scheduler/scheduler.h"

#define NONE UINT32_MAX
#define PRESSURE_POINTS_MAX 16u   /* of one sequence; then it is no longer pressed */
#define AGE_STEP_NS 1000000000ull /* so much waiting counts as one step of priority */

/*   WAITING   in the queue: not started, or preempted             holds nothing
 *   RUNNING   has a table
 *   UNFORKED  waits for the request's leader to read the prompt   holds nothing
 *   FORKING   its first token is drawn, its table comes with the next plan   holds nothing
 *   LINGERING over, but its table is still to be forked from
 *   OVER */
enum choice_state { CHOICE_WAITING, CHOICE_RUNNING, CHOICE_UNFORKED, CHOICE_FORKING, CHOICE_LINGERING, CHOICE_OVER };

struct choice {
    uint32_t request, index; /* candidate */
    uint32_t next;           /* of the request, or in the free list */
    enum choice_state state;
    bool silent;    /* over for the caller, but it reads the prompt for the others */
    bool preempted; /* has run before, or would have as a fork */
    bool evicted;   /* a slot of the table was evicted: it no longer matches the prefix cache */
    uint32_t table; /* NONE: none */
    uint32_t ring;  /* 0: none */
    uint32_t n_tokens, n_computed;
    uint32_t handled_at; /* n_computed of the last point dealt with; NONE: none in this life of the table */
    uint32_t seen_max;   /* the highest n_computed ever compressed at: below it a compaction is a replay */
    uint32_t n_pressed, pressed_at[PRESSURE_POINTS_MAX];
    uint64_t compacted_step; /* step of the last compaction, or of a pressing that evicted nothing */
    uint64_t skipped_since;  /* the first of the steps in a row that had no row or sample left for it; 0: none */
    uint32_t n_preemptions;
    uint32_t leaf, n_runs; /* prefix cache: deepest entry used, and how many runs that is */
    bool joins;            /* goes on inserting */
    uint32_t cached_tokens;
    uint32_t n_copies; /* blocks reserved for the first compaction: those of the hit that others own */
    int32_t *tokens;
};

struct request {
    struct scheduler_request asked;
    uint32_t first_choice; /* the leader, candidate 0 */
    uint32_t n_live;       /* choices not over for the caller */
    uint32_t n_dependents; /* UNFORKED or FORKING */
    bool started;
    uint64_t serial; /* order of arrival among equals */
    uint32_t next;   /* in its bucket, or in the free list */
};

struct pending_copy {
    uint32_t source, destination;
};

struct scheduler {
    struct scheduler_limits limits;
    struct block_pool pool;
    struct block_tables tables;
    struct prefix_cache cache;

    struct request *requests; /* [max_choices] */
    struct choice *choices;   /* [max_choices] */
    uint32_t free_request, free_choice, n_choices;
    uint32_t *buckets; /* [n_buckets] requests by id */
    uint32_t n_buckets;
    uint64_t next_serial;

    uint32_t *running; /* choices with a table that are planned, oldest first */
    uint32_t n_running;
    uint32_t *waiting; /* unordered */
    uint32_t n_waiting;
    uint32_t *free_tables, n_free_tables;
    uint32_t *free_rings, n_free_rings;

    uint32_t *copy_source, *copy_destination; /* [max_sequences * n_lanes] of the plan; each source has one more owner until the commit */
    uint32_t *copy_choice;                    /* [max_sequences * n_lanes] the fork it is for */
    uint32_t n_copies;
    /* Plans in turn: plans[current] is the last one, or the older of two; each has its half of the arrays. */
    struct plan plans[2];
    struct plan_entry *entries;  /* [2 * max_sequences] */
    uint32_t *entry_choice;      /* [2 * max_sequences]; NONE: over */
    uint32_t current, n_planned; /* n_planned: plans with entries that wait for their commit */
    bool is_full;                /* the last scheduler_plan left nobody waiting whom it could have admitted */
    uint64_t now_ns;
    uint64_t preemptions_before; /* stats.preemptions at the end of the last plan */
    double planned_us;           /* what the model says of the last plan; 0: it was no step in which some read while others decode */

    struct scheduler_lane_move *moves;        /* [n_lanes] */
    uint32_t *move_source, *move_destination; /* [n_lanes * blocks_max] */
    uint32_t blocks_max;
    uint32_t due; /* the choice that scheduler_next_due gave; NONE */
    bool hold_admission;
    uint64_t freed_since_plan;
    struct scheduler_stats stats;
};

static inline struct request *request_of(struct scheduler *s, const struct choice *choice) { return &s->requests[choice->request]; }
static inline struct plan_entry *plan_entries(struct scheduler *s, uint32_t which) { return s->entries + (size_t)which * s->limits.max_sequences; }
static inline uint32_t *plan_choices(struct scheduler *s, uint32_t which) { return s->entry_choice + (size_t)which * s->limits.max_sequences; }
static inline uint32_t choice_limit(const struct request *request) { return request->asked.n_prompt + request->asked.max_new; }
static inline uint32_t blocks_for(uint32_t tokens) { return tokens / BLOCK_TOKENS + (tokens % BLOCK_TOKENS != 0); }

/* queue.c */
bool choice_older(struct scheduler *s, uint32_t a, uint32_t b);
void running_insert(struct scheduler *s, uint32_t choice);
void running_remove(struct scheduler *s, uint32_t choice);
void waiting_insert(struct scheduler *s, uint32_t choice);
void waiting_remove(struct scheduler *s, uint32_t choice);
uint32_t waiting_head(struct scheduler *s); /* index in waiting, or NONE */
uint32_t request_find(const struct scheduler *s, uint64_t id);

/* life.c */
bool choice_take_table(struct scheduler *s, uint32_t choice); /* and a ring where the request needs one; false: there is none */
void choice_give_table(struct scheduler *s, uint32_t choice); /* blocks and prefix chain go back */
void choice_leave_chain(struct scheduler *s, uint32_t choice);
void choice_preempt(struct scheduler *s, uint32_t choice);
void fork_recompute(struct scheduler *s, uint32_t leader, uint32_t choice);     /* a choice in FORKING becomes a preempted one */
void choice_inherit_points(struct choice *choice, const struct choice *leader); /* what was compressed where, and what was pressed */
void choice_end(struct scheduler *s, uint32_t choice);                          /* over for the caller, whatever its state */
void request_settle(struct scheduler *s, uint32_t request); /* lets go of a leader that nobody needs, and of the request when all is over */

/* blocks.c */
bool blocks_available(struct scheduler *s, uint64_t count); /* evicts from the prefix cache as needed */
uint32_t pick_victim(struct scheduler *s);                  /* NONE: nobody may be preempted */

/* compact.c */
uint32_t choice_next_point(struct scheduler *s, const struct choice *choice); /* > n_computed, or n_computed itself if it waits there; NONE */
bool choice_is_due(struct scheduler *s, const struct choice *choice);
uint32_t choice_peak_tokens(struct scheduler *s,
                            const struct choice *choice); /* slots a lane holds at most until all known tokens are computed and one more */

/* plan.c */
void fork_pending(struct scheduler *s);

/* commit.c */
void plan_advance(struct scheduler *s); /* the rows of plans[current] are in the cache: unless that was done */
