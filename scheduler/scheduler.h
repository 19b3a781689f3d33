/* Continuous batching over a per-lane paged KV cache: who runs the next step, with how many rows, in which blocks.
 *
 * The scheduler owns every sequence, the waiting and running queues, and (through blockmgr/) the block pool, the block tables and the prefix cache. It speaks in
 * counts and block ids: no floats, no device memory, no text, no clock (time is an argument, used for order, ageing and the cost of steps only), no randomness: the same calls give the same plans.
 *
 * A REQUEST is one prompt with n_candidates choices. A SEQUENCE is one choice that has its own table. Choice 0 reads the prompt; in the step that computes the
 * prompt's last row it is sampled n_candidates times, and the commit of that step forks choices 1..n-1 from it: full blocks by owner count, the last
 * partial block copied. A fork for which there are no blocks or places becomes a preempted sequence instead (it recomputes, mostly from the prefix cache).
 *
 * A sequence has n_tokens known and n_computed in the cache; the plan hands out the step's cost budget so that the second catches up with the first. No prefill
 * phase, no decode phase. Order: running sequences that lack one token; those catching up, oldest first, in chunks; admission.
 * Preempted = blocks given back, n_computed = 0, at the head of the waiting queue with its arrival time. No admission in a step that preempted; the oldest running sequence
 * is never preempted; victims: highest priority number first, then the youngest. Who lacks one token and gets no row, as rows or samples of the step have run out, goes
 * before all others in a later step: whoever was passed over longest, one a step.
 *
 * Compression: a sequence stops at token indices fixed by its request (scheduler_points) until the caller has dealt with it (scheduler_due .. scheduler_compacted or
 * scheduler_dropped): lanes get shorter, whole blocks come free, and the plan that follows admits with them. A preempted sequence reads up to the same points again. Sequence position
 * (n_computed) and lane lengths are separate counters everywhere.
 *
 * One step may run ahead of the host: while a plan is carried out, scheduler_plan_ahead gives the next one, for the same sequences, whose tokens that step will only have drawn by the time
 * they are needed. It counts the rows of the first as filled at once, which needs no results; scheduler_commit, which does, then ends whom it ends. Whoever has a row in the second plan
 * nevertheless has it in a block of his own that is not full, which no other reads: his blocks go back at once, and whoever gets them writes them in a later step.
 *
 * One thread. Allocates in scheduler_new only. All arrays a plan points to are the scheduler's and stay until the second scheduler_plan or scheduler_plan_ahead after it. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
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
    uint32_t max_rows;          /* rows of one step */
    uint32_t max_samples;       /* samples of one step */
    struct step_cost cost;
    double step_budget_us;      /* bounds the chunks of a step in which somebody decodes: it stays under it unless its single rows alone exceed it; one chunk of BLOCK_TOKENS
                                   rows always fits in. Where nobody decodes, nobody is held up: chunks are bounded by max_rows alone */
    uint32_t watermark_blocks;  /* left free by admission */
    uint32_t n_rings;           /* query rings that sequences may hold (kernels/); ids 1..n_rings */
    bool prefix_cache;
    uint64_t hash_seed;
    /* Can rows go on behind the block of each lane in ids [n_lanes], and behind `resume_runs - 1` more before it? Asked for each of them before a hit ends there, which otherwise is shorter.
     * NULL: always. Called in scheduler_plan; whoever it was true for has rows in that plan. */
    bool (*resumes)(void *context, const uint32_t *ids);
    void *resumes_context;
    uint32_t resume_runs;
};

/* Token indices at which a sequence is compressed, as functions of n_computed. */
struct scheduler_points {
    uint32_t reading;   /* multiples of it while the prompt is read; 0: none */
    bool prompt_end;    /* once the prompt is computed */
    uint32_t growing;   /* every so many tokens after the prompt; 0: none */
};

struct scheduler_request {
    uint64_t id;               /* never reused */
    void *owner;               /* handed back in plan entries */
    uint32_t n_candidates;
    int32_t *const *tokens;    /* [n_candidates], each with room for n_prompt + max_new; [0] holds the prompt. The scheduler copies the prompt on a fork, and reads
                                  ids for the prefix cache; the engine writes each sampled token at index n_tokens before scheduler_commit */
    uint32_t n_prompt, max_new; /* n_prompt >= 1; max_new 0: compute the prompt, sample nothing */
    int32_t priority;          /* lower first; ages */
    uint64_t arrival_ns;
    uint64_t cache_scope;      /* prefix cache entries are shared within a scope only */
    struct scheduler_points points;
    uint32_t peak_tokens;      /* the most slots a lane holds on average, once the prompt is compressed, or from the start if points.reading; 0: no bound */
    bool needs_ring;           /* holds a query ring while it has blocks; not admitted without one */
    bool private;              /* its blocks are never shared: neither with the prefix cache nor by forks, which read the prompt themselves; with peak_tokens its length is not bound by max_model_len */
    bool rereads;              /* no forks: choices but the first read the prompt themselves, from the prefix cache as far as it goes */
    uint32_t first_needed_row; /* rows from here on must be computed, whatever the cache holds, at a replay too (0: no hit; UINT32_MAX: only the last one) */
};

struct plan_entry {
    void *owner;
    uint64_t request_id;
    uint32_t choice;
    uint32_t first_token, n_rows;  /* rows are tokens [first_token, first_token + n_rows) of the choice, at those positions */
    uint32_t n_tokens;             /* known before this step */
    uint32_t n_samples;            /* 0 while catching up; 1; or n_candidates in the step that ends the prompt of choice 0 */
    uint32_t cached_tokens;        /* taken from the prefix cache at the latest admission */
    uint32_t preemptions;          /* of this choice, so far */
    bool first_run;                /* the request's first rows ever are in this step */
    uint32_t ring;                 /* 0: none */
    uint32_t drawn_by;             /* in a plan of scheduler_plan_ahead: the sample of the plan before that draws its only row's token; else UINT32_MAX */
    bool over;                     /* likewise: the choice ended with the plan before. Its row is for nothing, its sample nobody's, and `owner` may be gone */
    uint32_t table, table_changes; /* table < max_sequences. Where both are those of an earlier plan, the ids listed then are still the first ones listed, and all lanes have
                                      grown by the same number of slots; changes is never 0 */
    const uint32_t *lane_first;    /* [n_lanes] index in plan.block_ids of the lane's first block */
    const uint32_t *lane_tokens;   /* [n_lanes] slots filled before this step */
};

struct plan {
    uint32_t n_entries;
    const struct plan_entry *entries;
    uint32_t n_rows, n_samples;
    const uint32_t *block_ids;     /* the table arena */
    /* Block copies (last partial blocks of forks) to carry out before the rows run. None in a plan without entries. */
    uint32_t n_copies;
    const uint32_t *copy_source, *copy_destination;
    bool advanced; /* its rows are counted as filled already: lane_tokens of its entries have them */
};

struct scheduler_stats {
    uint32_t running, waiting;                       /* choices; waiting: all others, those included that wait for their prompt to be read */
    uint32_t blocks_total, blocks_used, blocks_cached; /* used: held by a sequence; cached: by the prefix cache only */
    uint64_t preemptions, forks, forks_recomputed, blocks_copied;
    uint64_t prefix_queries, prefix_hits, prefix_partial_hits; /* queries and hits in tokens; partial_hits in admissions */
    uint64_t prefix_evictions;                       /* entries */
    uint64_t prefix_steals;                          /* entries that left the cache because their owner was compressed */
    uint64_t compaction_copies;                      /* shared blocks that a compaction could not write in place */
    uint64_t compaction_drops;                       /* whole blocks dropped without moving data */
    uint64_t compactions, replays;                   /* sequences compressed; of them, at a point passed before a preemption */
    uint64_t pressure_compactions;
    uint64_t blocks_freed;                           /* by compression */
    uint64_t admissions_by_compression;              /* for which the blocks freed since the plan before were needed */
    uint64_t chunks;                                 /* entries with n_rows > 1 that did not reach n_tokens */
    uint64_t steps;
    double cost_ratio;                               /* of what steps take to what the model says, as far as measured; 1: as it says */
};

struct scheduler *scheduler_new(const struct scheduler_limits *limits);
void scheduler_free(struct scheduler *scheduler);
/* What scheduler_new allocates: tables, prefix cache, queues. */
uint64_t scheduler_bytes(const struct scheduler_limits *limits);
/* Ids that a lane of a table lists at most. There are max_sequences tables. */
uint32_t scheduler_table_blocks(const struct scheduler_limits *limits);

/* The most blocks one choice of this request can ever hold, nothing evicted; a request for which this exceeds n_blocks must be refused by the caller. */
uint64_t scheduler_peak_blocks(const struct scheduler_limits *limits, uint32_t n_prompt, uint32_t max_new);

/* false: max_choices reached ("not now"). The request's fields are copied; `tokens` (the array of pointers) and what it points to stay the caller's, until every choice has ended. */
bool scheduler_add(struct scheduler *scheduler, const struct scheduler_request *request);

/* The next step. n_entries == 0: nothing to do until something is added (or admission no longer held, or what is due dealt with). Every plan that has entries must be committed. */
const struct plan *scheduler_plan(struct scheduler *scheduler, uint64_t now_ns);

/* The step after the last plan, before that is committed: one row for each of its sequences, but for those that the last plan ends by their length. NULL: it may not run ahead, or would be
 * empty; nothing is lost by asking. It may where the last plan has one row and one sample for every running sequence, past its prompt, and no copies; where nobody is due after it; where
 * blocks for the next rows are there; and where nobody waits who could be admitted. It is committed after the last plan, which must be committed before anything is planned after it.
 * Until it is committed, nothing may be aborted, compressed, pressed or planned but by this. */
const struct plan *scheduler_plan_ahead(struct scheduler *scheduler);

/* Closes the step, the older of two: ended[i] answers sample i of the plan (entry order, choices ascending within an entry): true = that choice is over after this token (stop token).
 * The scheduler itself ends a choice that reached n_prompt + max_new tokens. ended_by_length: the caller knows it by the same count. Of entries that are over it is not looked at. */
void scheduler_commit(struct scheduler *scheduler, const bool *ended);

/* How long the step that was just committed took. Where prompts were read in it beside sequences that decode, the plans to come count on the ratio between that and the model's
 * estimate, within SCHEDULER_COST_RATIO_MIN and _MAX, quick to rise and slow to fall, so that such steps stay near step_budget_us. Never called, as where time means nothing, the
 * model is taken at its word. */
#define SCHEDULER_COST_RATIO_MIN 0.5
#define SCHEDULER_COST_RATIO_MAX 8.0
void scheduler_took(struct scheduler *scheduler, double us);

/* Between steps, at any state of the choice (waiting, running, not yet forked, preempted): it is over, its blocks are back when this returns.
 * Unknown or ended: ignored, returns false. */
bool scheduler_abort(struct scheduler *scheduler, uint64_t id, uint32_t choice);
/* How often a choice has been preempted; 0: unknown or ended. */
uint32_t scheduler_preemptions(const struct scheduler *scheduler, uint64_t id, uint32_t choice);

/* Compression, between steps and before the next plan. */
struct scheduler_due {
    void *owner;
    uint64_t request_id;
    uint32_t choice;
    uint32_t n_computed, n_prompt, ring;
    bool pressure;               /* not at a point of its own: scheduler_press asked for it, now or before it was preempted */
    const uint32_t *block_ids;   /* the table arena */
    const uint32_t *lane_first, *lane_tokens; /* as in plan_entry */
};
/* The next sequence that waits at a point, oldest first; false: none. It must be dealt with by exactly one of the next three. All that are due must be before the next plan: those
 * that are not have no row in it, and a prompt's end that is to fork must not be left (CHECKed). */
bool scheduler_next_due(struct scheduler *scheduler, struct scheduler_due *due);
/* Who that will give, or, while a plan is carried out, who will be due when it is committed, if it does not end him: the first `max` of them, in the order in which they will be dealt with. Returns how
 * many. Like scheduler_plan_ahead it counts the rows of the plan as filled at once. Nothing need follow from it. */
uint32_t scheduler_list_due(struct scheduler *scheduler, struct scheduler_due *due, uint32_t max);

/* What a compaction moves, lane by lane. */
struct scheduler_lane_move {
    bool moves;                  /* false: the lane stays as it is: nothing to evict */
    const uint32_t *source;      /* ids of the lane's blocks, in order */
    const uint32_t *destination; /* [blocks of n_keep slots]: equal to the leading source ids, or fresh where those are shared: then slots of it before the first evicted one move too */
    uint32_t n_keep;
};
/* The caller keeps n_keep[lane] slots of each lane, the first one evicted being first_evicted[lane] (lane_tokens if none is). Blocks from there on are written, now or by the rows to
 * come: those that only the prefix cache holds beside this sequence leave it, those that another sequence holds are replaced by fresh ones, for which others are preempted if need be.
 * Returns [n_lanes] moves, valid until scheduler_compacted; NULL: not enough blocks, the sequence has been preempted and is no longer due. */
const struct scheduler_lane_move *scheduler_compact(struct scheduler *scheduler, const struct scheduler_due *due, const uint32_t *n_keep, const uint32_t *first_evicted);
/* The moves have been carried out: lanes are cut, blocks given back. */
void scheduler_compacted(struct scheduler *scheduler, const struct scheduler_due *due);
/* Whole blocks [first[lane], first[lane] + count[lane]) of each lane leave; no data moves. */
void scheduler_dropped(struct scheduler *scheduler, const struct scheduler_due *due, const uint32_t *first, const uint32_t *count);
/* Nothing is evicted at this point. */
void scheduler_kept(struct scheduler *scheduler, const struct scheduler_due *due);

/* Makes the first `count` blocks of every lane of a due sequence its own, so that they may be written: *n copies from source to destination must be carried out at once. Where blocks
 * are short, victims are preempted as in a plan, and the plan that follows admits nobody. false: the victim is this sequence; it is no longer due. */
bool scheduler_own_first(struct scheduler *scheduler, const struct scheduler_due *due, uint32_t count, uint32_t *n, const uint32_t **source, const uint32_t **destination);

/* Pressure: the running sequence that was compressed longest ago among those for which may(context, owner) is true, and that is not due, becomes due. It will be compressed at the same token index again
 * if it has to be recomputed. false: there is none. */
bool scheduler_press(struct scheduler *scheduler, bool (*may)(void *context, void *owner), void *context);
/* While set, nothing new is admitted (preempted sequences are). */
void scheduler_hold_admission(struct scheduler *scheduler, bool hold);

/* Between steps: how a choice that holds blocks stands. false: it holds none. */
bool scheduler_lanes(const struct scheduler *scheduler, uint64_t id, uint32_t choice, const uint32_t **lane_tokens, uint32_t *n_computed);

/* Gives back what the prefix cache holds (tests, memory pressure). */
void scheduler_drop_prefix_cache(struct scheduler *scheduler);

void scheduler_stats(const struct scheduler *scheduler, struct scheduler_stats *stats);
uint32_t scheduler_blocks_used(const struct scheduler *scheduler); /* that of the stats, alone */

/* The soundness function of the design: free + used + cached = total, owner counts recounted, no id twice, cached blocks immutable, queues consistent.
 * CHECKs. O(everything): tests, the simulation, and debug builds. */
void scheduler_check(const struct scheduler *scheduler);
