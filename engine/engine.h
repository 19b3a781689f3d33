/* The engine thread: everything below HTTP and JSON. Requests go in, events come out, through two single-producer single-consumer mailboxes; no locks on the token path.
 *
 * Threads: engine_start, engine_stop: any one thread, not concurrently. engine_submit, engine_abort, engine_poll: the loop thread. engine_stats, engine_alive: any.
 * wake(context) is called on the engine thread, at most once a step, when events wait; it must only signal (uv_async_send).
 *
 * One step: drain inbox -> compress what is due -> plan -> block copies -> submit -> sync -> commit -> post. While sequences only decode, the next step is planned and submitted before the sync
 * (config.run_ahead). Idle, the thread sleeps until the inbox is written.
 *
 * Ownership: a struct request belongs to the loop until engine_submit returned true, then to the engine until the loop took the terminal event of its last choice, then to the
 * loop again, which frees it. Every choice gets exactly one terminal event (finish != FINISH_NONE), aborted ones too. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "base/error.h"
#include "config/config.h"
#include "engine/compression.h"
#include "kernels/backend.h"
#include "kernels/sample.h"
#include "model/model.h"

struct engine;

enum finish {
    FINISH_NONE,
    FINISH_STOP,    /* EOS or a stop token; that token is in the event */
    FINISH_LENGTH,  /* max_new reached */
    FINISH_ABORTED, /* engine_abort; no token in the event */
    FINISH_ERROR,   /* the backend failed; no token */
};

/* What compression did to a request: summed over lanes and choices, as each choice stood at its end. */
struct kv_report {
    uint64_t tokens_seen, slots_kept, slots_evicted, blocks;
    uint32_t head_min, head_max; /* slots of a head: least and most of all choices */
    uint32_t n_choices;          /* that have ended, and of which it speaks */
    double hits_kept, hits_all;  /* hit rate = kept / all; all = 0: not measured */
    uint32_t pressure_compressions;
};

struct request {
    /* Written by the loop before submit, const afterwards. */
    uint64_t id;           /* 64-bit, never reused */
    uint32_t n_candidates; /* >= 1 */
    uint32_t n_prompt, max_new;
    uint32_t min_new; /* stop tokens are banned before that many generated tokens */
    int32_t *
        *tokens; /* [n_candidates], each with room for n_prompt + max_new ids; the prompt in [0]. The engine writes, nobody reads before the end */
    struct sampling sampling; /* .banned = the stop tokens, for min_new */
    uint32_t n_stop_tokens;
    const int32_t *stop_tokens; /* EOS among them unless ignore_eos */
    int32_t priority;
    uint64_t arrival_ns;
    uint64_t cache_scope;
    /* echo with logprobs: [n_prompt]; entry i is written with the log-probability of prompt token i given those before it (entry 0 is left alone) before the first event. NULL: not asked */
    struct sample_result *prompt_results;
    struct kv_plan kv;           /* compression; policy "none": everything stays */
    bool measure_hits;           /* fill hits_kept and hits_all of the report */
    struct head_hits *head_hits; /* [n_layers * n_kv_heads] with measure_hits: of each head, added before the last terminal event. NULL: not asked */
    uint32_t *head_slots;        /* [n_candidates][n_layers * n_kv_heads] of those that ended, one after another. NULL: not asked */
    void *owner;                 /* the loop's own; the engine only hands it back */

    /* Written by the engine before the last terminal event. */
    struct kv_report kv_report;

    /* The engine's own. */
    struct request_state *state;
    bool open, leaving; /* the calls', on the loop thread: submitted, and its last event was not taken; all of it was told to end */
};

struct event {
    uint64_t id;
    void *owner;
    uint32_t choice;
    enum finish finish;
    bool has_token;
    uint32_t cached_tokens; /* with a choice's first event; else 0 */
    uint32_t preemptions;   /* of this choice, with its terminal event; else 0 */
    uint64_t scheduled_ns;  /* with the terminal event: clock at the request's first step; 0 if it never ran */
    /* What is not asked for is not written: */
    struct sample_result sample; /* has_token: as far as its n_top goes */
    char error[96];              /* with the terminal event: empty but for FINISH_ERROR */
};

#define ENGINE_POLICIES_MAX 16
#define ENGINE_LAYERS_MAX 64

struct engine_stats {
    uint32_t running, waiting; /* choices */
    uint64_t blocks_total, blocks_used, blocks_cached;
    uint64_t block_bytes;
    uint64_t steps, preemptions, forks, blocks_copied, chunks;
    uint64_t steps_ahead,
        rows_for_nothing; /* steps submitted before the results of the one before were there; rows of them whose choice ended with that one */
    uint64_t prefix_queries, prefix_hits, prefix_partial_hits, prefix_evictions; /* tokens, tokens, admissions, entries */
    uint64_t prompt_tokens, generation_tokens;                                   /* computed prompt rows (cached ones not counted); sampled tokens */
    uint64_t step_rows_bucket[14]; /* histogram le 1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384 +Inf (not cumulative) */
    uint64_t step_rows_sum;
    uint64_t busy_ns, schedule_ns; /* in steps; in scheduler and batch building */
    uint64_t schedule_ns_max;      /* of one step in which nobody read */
    uint64_t wait_ns;              /* in steps, waiting for the device or doing its work (backend_limits.wait_ns) */
    /* Steps in which every sequence took in one token of its answer, and all others, which read some prompt, or a sequence again that had been preempted: busy_ns is the sum of both. */
    uint64_t decode_steps, decode_ns, reading_steps, reading_ns;
    uint64_t decode_wait_ns; /* of wait_ns, in steps of the first kind */
    double cost_ratio;                   /* of what steps in which some read while others decode take to what was fitted at start */
    uint64_t decode_rows, decode_blocks; /* of decode steps: sequences, blocks in use, each summed over the steps */
    uint64_t decode_rows_max;            /* most sequences of one of them, since a step last left no request */
    /* Compression */
    uint64_t compressions[ENGINE_POLICIES_MAX][TRIGGER_KINDS]; /* by policy_index() and bit of the trigger */
    uint64_t slots_kept, slots_evicted, kv_blocks_freed, compression_ns;
    uint64_t choices_dropped;     /* that were begun likewise for nothing: the sequence ended with that step, or gave way to another's compaction */
    uint64_t compressions_behind; /* whose choice began behind the step before; what is left of it when that is over is in compression_ns, which counts between steps alone */
    uint64_t layer_kept[ENGINE_LAYERS_MAX]; /* slots kept by compressions, layer by layer; the last one stands for all above */
    uint64_t layer_hits_kept[ENGINE_LAYERS_MAX], layer_hits[ENGINE_LAYERS_MAX]; /* struct head_hits, of requests that had them measured */
    uint64_t admissions_by_compression;
    uint32_t n_layers;
};

/* What everything large will take, from config, model, free memory (the host's, within the cgroup limit, and the device's). Printed at start; each line count x bytes. */
struct memory_plan {
    uint32_t max_model_len, max_stream_tokens, max_sequences, max_rows;
    uint32_t wanted_sequences;               /* max_sequences before it was lowered */
    uint32_t queue_choices, max_choices;     /* choices that may live: that were not told to end (the sequences and the queue); in all */
    uint32_t n_layers, n_kv_heads;           /* of the model: a lane for each */
    uint32_t n_rings, ring_rows, sink_slots; /* for compression */
    bool accumulators;
    uint32_t n_blocks, extent_blocks;
    size_t block_bytes;
    enum kv_dtype kv_dtype;
    uint32_t n_lines;
    struct memory_line lines[32];
    uint64_t total_bytes, available_bytes; /* of the host: all lines, unless the backend has memory of its own; then those marked `host` */
    bool has_device;                       /* it has: */
    uint64_t device_bytes, device_available_bytes;
    enum weights_mode weights; /* never AUTO where has_device */
    struct weights_plan {
        uint64_t bytes, kv_tokens; /* of weights; slots that they leave / lanes */
    } weights_plans[3];            /* by enum weights_mode; has_device alone */
    uint64_t kv_tokens;            /* slots of the pool / lanes */
    char lowered[160];             /* what was lowered to make it fit; empty: nothing */
};
enum status engine_plan_memory(const struct config *config, const struct model *model, struct memory_plan *plan, struct error *error);
void memory_plan_print(const struct memory_plan *plan, FILE *out);

struct engine_hooks {
    void (*wake)(void *context);
    void *context;
    void (*progress)(void *context, double fraction); /* during start; NULL: none */
    void *progress_context;
};

/* Allocates everything, repacks the weights, fits the step cost, starts the thread. `model` must outlive the engine. */
enum status engine_start(const struct config *config, const struct model *model, const struct engine_hooks *hooks, struct engine **engine,
                         struct error *error);
/* Aborts what lives (each choice still gets its terminal event, to be polled before), joins the thread, frees. NULL is fine. */
void engine_stop(struct engine *engine);

/* The most tokens, prompt and answer, that a request with this plan may have: max_model_len, or max_stream_tokens for one whose sinks shift. */
uint32_t engine_tokens_max(const struct engine *engine, const struct kv_plan *kv);
/* Could a request of this length ever run? Not where the pool was sized for compressing while reading and this one does not. */
bool engine_can_hold(const struct engine *engine, const struct kv_plan *kv, uint32_t n_prompt, uint32_t max_new);
/* false: no room in the queue ("not now"); the request stays the loop's. Prompt + max_new must be <= engine_tokens_max, the prompt <= max_model_len, and engine_can_hold it: CHECKed.
 * Who was told to end (engine_abort of all choices) has left the queue, be it that the engine has yet to hear of it. */
bool engine_submit(struct engine *engine, struct request *request);
#define ENGINE_ALL_CHOICES UINT32_MAX
/* Always accepted. Not submitted, no such choice, or ended: ignored. */
void engine_abort(struct engine *engine, struct request *request, uint32_t choice);
/* false: nothing there. */
bool engine_poll(struct engine *engine, struct event *event);

void engine_stats(const struct engine *engine, struct engine_stats *stats);
const struct memory_plan *engine_limits(const struct engine *engine);
const char *engine_describe(const struct engine *engine); /* backend, threads, kv dtype */
/* The proof of life behind /health and the watchdog: true if the engine is idle, or finished a step within `stall_ns`. Asleep with a full inbox is not idle. */
bool engine_alive(const struct engine *engine, uint64_t now_ns, uint64_t stall_ns);
