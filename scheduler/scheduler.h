/* Continuous batching over a per-lane paged KV cache: who runs the next step, with how many rows, in which blocks.
 *
 * The scheduler owns every sequence, the waiting and running queues, and (through blockmgr/) the block pool, the block tables and the prefix cache. It speaks in
 * counts and block ids: no floats, no device memory, no text, no clock (time is an argument, used for order and ageing only), no randomness: the same calls give the same plans.
 *
 * A REQUEST is one prompt with n_candidates choices. A SEQUENCE is one choice that has its own table. Choice 0 reads the prompt; in the step that computes the
 * prompt's last row it is sampled once for each choice, and the commit of that step forks choices 1..n-1 from it: full blocks by owner count, the last
 * partial block copied. If choice 0 is aborted before that, the next live choice takes its place, with what it had computed. A fork for which there are no blocks or places becomes a preempted sequence instead (it recomputes, mostly from the prefix cache).
 *
 * A sequence has n_tokens known and n_computed in the cache; the plan hands out the step's cost budget so that the second catches up with the first. No prefill
 * phase, no decode phase. Order: running sequences that lack one token; those catching up, oldest first, in chunks; admission.
 * Priority ages: a level is worth 2^31 ns (2.1 s) of waiting, so that whoever waits long enough is ahead of everything that arrives later.
 * Preempted = blocks given back, n_computed = 0, at the head of the waiting queue with its arrival time. No admission in a step that preempted; the oldest running sequence
 * is never preempted; victims: highest priority number first, then the youngest.
 *
 * One thread. Allocates in scheduler_new only. All arrays a plan points to are the scheduler's and stay until the next scheduler_plan. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

struct scheduler;

/* What a step costs, in microseconds: fixed + per_row * rows + per_row_context * sum over rows of the slots they attend to. Fitted by the engine at start. */
struct step_cost {
    double fixed_us, per_row_us, per_row_context_us;
};

struct scheduler_limits {
    uint32_t n_lanes;
    uint32_t n_blocks;          /* of the pool */
    uint32_t extent_blocks;     /* blocks of one 64 KiB extent, >= 1 */
    uint32_t max_sequences;     /* running at once */
    uint32_t max_choices;       /* live choices in all, waiting ones included: the bound of every queue here */
    uint32_t max_model_len;     /* tokens of one sequence, prompt and generated */
    uint32_t max_rows;          /* rows of one step, >= max_sequences */
    uint32_t max_samples;       /* samples of one step, >= max_sequences */
    struct step_cost cost;
    double step_budget_us;      /* a plan stays under it unless its decode rows alone exceed it; at least one chunk of BLOCK_TOKENS rows always fits in */
    uint32_t watermark_blocks;  /* left free by admission */
    bool prefix_cache;
    uint64_t hash_seed;
};

struct scheduler_request {
    uint64_t id;               /* never reused */
    void *owner;               /* handed back in plan entries */
    uint32_t n_candidates;     /* 1 .. max_samples - max_sequences + 1: a step in which all others decode still has room for them */
    int32_t *const *tokens;    /* [n_candidates], each with room for n_prompt + max_new; [0] holds the prompt. The scheduler copies the prompt on a fork, and reads
                                  ids for the prefix cache; the engine writes each sampled token at index n_tokens before scheduler_commit */
    uint32_t n_prompt, max_new; /* n_prompt >= 1; max_new 0: compute the prompt, sample nothing */
    int32_t priority;          /* lower first; ages */
    uint64_t arrival_ns;
    uint64_t cache_scope;      /* prefix cache entries are shared within a scope only */
    uint32_t first_needed_row; /* rows from here on must be computed, whatever the cache holds (0: no hit; UINT32_MAX: only the last one) */
};

struct plan_entry {
    void *owner;
    uint64_t request_id;
    uint32_t choice;
    uint32_t first_token, n_rows;  /* rows are tokens [first_token, first_token + n_rows) of the choice, at those positions */
    uint32_t n_tokens;             /* known before this step */
    uint32_t n_samples;            /* 0 while catching up; 1; or, in the step that ends the prompt, one for each choice of the request that still lives */
    uint32_t cached_tokens;        /* taken from the prefix cache at the latest admission */
    bool first_run;                /* the request's first rows ever are in this step */
    const uint32_t *lane_first;    /* [n_lanes] index in plan.block_ids of the lane's first block */
    const uint32_t *lane_tokens;   /* [n_lanes] slots filled before this step */
};

struct plan {
    uint32_t n_entries;
    const struct plan_entry *entries;
    uint32_t n_rows, n_samples;
    const uint32_t *sample_choice; /* [n_samples] the choice each sample is for: entry order, choices ascending within an entry */
    const uint32_t *block_ids;     /* the table arena */
    /* Block copies (last partial blocks of forks) to carry out, in this order, before the rows run. A plan without entries has none. */
    uint32_t n_copies;
    const uint32_t *copy_source, *copy_destination;
};

struct scheduler_stats {
    uint32_t running, waiting;                       /* choices */
    uint32_t blocks_total, blocks_used, blocks_cached; /* used: held by a sequence; cached: by the prefix cache only */
    uint64_t preemptions, forks, forks_recomputed, blocks_copied;
    uint64_t prefix_queries, prefix_hits, prefix_partial_hits; /* queries and hits in tokens; partial_hits in admissions */
    uint64_t prefix_evictions;                       /* entries */
    uint64_t chunks;                                 /* entries with n_rows > 1 that did not reach n_tokens */
    uint64_t steps;
};

struct scheduler *scheduler_new(const struct scheduler_limits *limits);
void scheduler_free(struct scheduler *scheduler);

/* The most blocks this request can ever hold at its peak; a request for which this exceeds n_blocks must be refused by the caller. */
uint64_t scheduler_peak_blocks(const struct scheduler_limits *limits, uint32_t n_prompt, uint32_t max_new);

/* false: max_choices reached ("not now"). The request's fields are copied; `tokens` (the array of pointers) and what it points to stay the caller's, until every choice has ended. */
bool scheduler_add(struct scheduler *scheduler, const struct scheduler_request *request);

/* The next step. n_entries == 0: nothing to do until something is added. Every plan that has entries must be committed. */
const struct plan *scheduler_plan(struct scheduler *scheduler, uint64_t now_ns);

/* Closes the step: ended[i] answers sample i of the plan (entry order, choices ascending within an entry): true = that choice is over after this token (stop token).
 * The scheduler itself ends a choice that reached n_prompt + max_new tokens. ended_by_length: the caller knows it by the same count. */
void scheduler_commit(struct scheduler *scheduler, const bool *ended);

/* Between steps, at any state of the choice (waiting, running, not yet forked, preempted): it is over, its blocks are back when this returns.
 * Unknown or ended: ignored, returns false. */
bool scheduler_abort(struct scheduler *scheduler, uint64_t id, uint32_t choice);

/* Gives back what the prefix cache holds (tests, memory pressure). */
void scheduler_drop_prefix_cache(struct scheduler *scheduler);

void scheduler_stats(const struct scheduler *scheduler, struct scheduler_stats *stats);

/* The soundness function of the design: free + used + cached = total, owner counts recounted, no id twice, cached blocks immutable, queues consistent.
 * CHECKs. O(everything): tests, the simulation, and debug builds. */
void scheduler_check(const struct scheduler *scheduler);
