/* Private state of the engine, shared by its own files: engine.c (the step, the thread), start.c (life, calls), requests.c (who lives), batch.c (a plan made numbers), publish.c (what other threads read).
 * Tests use engine_start_on to put a backend of their own below the engine. */
#pragma once

#include <pthread.h>
#include <stdatomic.h>

#include "base/mailbox.h"
#include "engine/compressor.h"
#include "engine/engine.h"
#include "scheduler/scheduler.h"

/* ---- who lives: engine thread ---- */

struct choice_state {
    uint32_t n_generated;
    uint32_t preemptions;
    bool over;      /* its terminal event is posted */
    bool announced; /* its first event is posted */
};

struct request_state {
    struct request *request;
    uint64_t scheduled_ns;
    uint32_t cached_tokens;
    uint32_t first_choice;        /* in requests.choices: n_candidates of them */
    uint32_t n_open;              /* choices without a terminal event */
    uint32_t compressed_to;       /* the highest token index at which it was compressed: below, a compression is a replay */
    uint32_t prompt_results_next; /* prompt_results below are written and belong to the loop once an event was posted: never written again */
    struct request_state *older, *newer;
};

/* Every live request, by id and in order of arrival. Sized once. */
struct requests {
    uint32_t max_choices;
    struct request_state *states; /* [max_choices] */
    struct request_state **free_states;
    uint32_t n_free;
    struct choice_state *choices; /* [max_choices]: ranges in order of arrival, moved together when the end is reached */
    uint32_t choices_end;
    struct request_state **table; /* [table_mask + 1] open addressing by id; NULL: empty */
    uint32_t table_mask;
    struct request_state *oldest, *newest;
    uint32_t n_compressed, n_pressed; /* live requests with a policy; with the pressure trigger */
};

uint64_t requests_bytes_per_choice(void);
void requests_init(struct requests *requests, uint32_t max_choices);
void requests_done(struct requests *requests);
/* There must be room: the sum of n_candidates of all live requests is <= max_choices. Sets request->state. */
struct request_state *requests_add(struct requests *requests, struct request *request);
void requests_remove(struct requests *requests, struct request_state *state);
struct request_state *requests_find(const struct requests *requests, uint64_t id); /* NULL: none */
static inline struct choice_state *requests_choice(const struct requests *requests, const struct request_state *state, uint32_t choice) {
    return &requests->choices[state->first_choice + choice];
}

/* ---- a plan made numbers: engine thread ---- */

/* One sample that is drawn; sample i of the plan is draw i. */
struct draw {
    struct request_state *state;
    uint32_t choice, n_tokens; /* where the token goes: tokens[choice][n_tokens] */
    uint32_t result;           /* its index in the batch's samples */
    uint32_t entry;            /* of the plan */
};

struct batch_builder {
    struct batch batch;
    int32_t *tokens, *positions;        /* [max_rows] */
    struct batch_sequence *sequences;   /* [max_sequences] */
    struct sample *samples;             /* [max_samples] */
    struct sample_result *results;      /* [max_samples] */
    struct draw *draws;                 /* [max_draws] */
    uint32_t *first_target, *n_targets; /* [max_sequences]: prompt log-probabilities of each entry, in samples */
    bool *ended;                        /* [max_draws] */
    enum finish *finishes;              /* [max_draws] */
    uint32_t n_draws;
    bool penalizes; /* a draw looks at tokens drawn before */
    uint32_t max_rows, max_sequences, max_samples, max_draws;
};

void batch_builder_init(struct batch_builder *builder, uint32_t max_rows, uint32_t max_sequences, uint32_t max_samples, uint32_t max_draws);
void batch_builder_done(struct batch_builder *builder);
/* before: what the plan's tokens are drawn by, where it is one of scheduler_plan_ahead; else not looked at. */
void batch_build(struct batch_builder *builder, const struct batch_builder *before, const struct requests *requests, const struct plan *plan);

/* A step from its plan to its events. */
struct flight {
    const struct plan *plan;
    struct batch_builder builder;
    bool decodes;         /* every sequence takes in one token of its answer */
    uint64_t schedule_ns; /* planning and building it, and taking its results */
    uint32_t n_rows, blocks_used;
    enum status status; /* of its submit, then of its sync */
    struct error error;
};

/* ---- compression: engine thread ---- */

/* A choice that was begun, and for whom. */
struct begun {
    uint32_t place; /* of the compressor */
    uint64_t request_id;
    uint32_t choice, n_computed;
    bool behind; /* before its step was over */
};

struct compress {
    struct compressor *compressor;
    struct begun begun[RANK_PLACES_MAX];
    uint32_t n_begun;
    uint32_t n_lanes, n_kv_heads, n_layers, sink_slots;
    double pressure_high, pressure_low;
    bool pressing;            /* above the low mark since the high one was reached */
    uint8_t *classes;         /* [n_vocab] */
    uint32_t *n_keep, *first; /* [n_lanes] */
    struct compaction *items; /* [n_lanes] */
};

uint64_t compress_bytes(const struct memory_plan *plan, const struct program *program);
void compress_init(struct compress *compress, struct backend *backend, const struct config *config, const struct model *model,
                   const struct memory_plan *plan);
void compress_done(struct compress *compress);
/* Between two steps, before the plan. */
void compress_step(struct engine *engine);
/* Behind a step in flight, where the backend allows it: choices begin for those who will be due after it, so that the device need not wait until the host asks. */
void compress_behind(struct engine *engine);
/* A choice ends with lanes of lane_tokens + n_rows slots, having seen n_seen tokens: into the request's report. */
void compress_report(struct engine *engine, struct request *request, const uint32_t *lane_tokens, uint32_t n_rows, uint32_t n_seen);

/* ---- sizes that follow from the plan ---- */

struct engine_sizes {
    uint32_t draws;   /* of a step */
    uint32_t samples; /* draws and prompt log-probabilities */
    uint32_t inbox, outbox;
};
struct engine_sizes engine_sizes(const struct memory_plan *plan, const struct config *config);
/* But for the step cost and the hash seed. */
void engine_scheduler_limits(const struct memory_plan *plan, const struct config *config, uint32_t n_lanes, struct scheduler_limits *limits);
void engine_backend_limits(const struct memory_plan *plan, const struct config *config, struct backend_limits *limits);
enum status engine_plan_memory_on(const struct backend_ops *ops, const struct config *config, const struct model *model, uint64_t available_bytes,
                                  struct memory_plan *plan, struct error *error);

/* ---- what other threads read ---- */

#define STATS_WORDS ((sizeof(struct engine_stats) + 7) / 8)

/* A sequence lock whose words are atomics: one writer, any readers. */
struct publisher {
    _Atomic uint32_t sequence;
    _Atomic uint64_t words[STATS_WORDS];
};
void publisher_write(struct publisher *publisher, const struct engine_stats *stats);
void publisher_read(const struct publisher *publisher, struct engine_stats *stats);

/* The engine thread sleeps on a word that everybody who has news for it changes. */
struct bell {
    _Atomic uint32_t word; /* BELL_ASLEEP | BELL_WANTS_ROOM | count */
};
enum { BELL_ASLEEP = 1, BELL_WANTS_ROOM = 2, BELL_COUNT = 4 };
/* After what it announces was stored. */
void bell_ring(struct bell *bell);
/* Rings if the sleeper waits for room in the outbox. */
void bell_ring_room(struct bell *bell);
/* Announces the sleep; then the caller looks once more, and either waits on `ticket` or not, and wakes in any case. */
uint32_t bell_begin(struct bell *bell, bool wants_room);
void bell_wait(struct bell *bell, uint32_t ticket);
void bell_end(struct bell *bell);

enum letter_kind { LETTER_SUBMIT, LETTER_ABORT };
struct letter {
    enum letter_kind kind;
    struct request *request;
    uint64_t id;
    uint32_t choice;
};
struct posted {
    struct request *released; /* with a request's last event: it, whose choices count against max_choices until the loop has taken it; else NULL */
    struct event event;
};

struct engine {
    struct memory_plan plan;
    struct engine_sizes sizes;
    struct engine_hooks hooks;
    struct backend *backend;
    uint32_t n_vocab;
    char description[160];

    /* Loop thread */
    uint32_t live_choices, leaving_choices; /* the latter of the former */

    /* Shared */
    struct mailbox inbox, outbox;
    struct bell bell;
    struct publisher publisher;
    _Atomic bool stop;
    _Atomic uint64_t progress_ns; /* the last step's end, or the last waking */

    /* Engine thread */
    pthread_t thread;
    struct scheduler *scheduler;
    struct requests requests;
    struct flight flights[2];
    uint32_t current; /* of flights: the step that ends next, or ended last */
    bool is_ahead;    /* flights[current] is under way, as it ran ahead */
    bool runs_ahead;  /* steps may: backend and configuration allow it */
    struct compress compress;
    struct engine_stats stats;
    uint64_t counted_ns;        /* until when time is in stats.busy_ns, while steps run */
    uint64_t counted_wait_ns;   /* of stats.wait_ns, what is counted by kind */
    bool rested;         /* the last step left no request */
    bool must_wake;      /* events were posted since the last wake */
    bool times_steps;    /* they take what a step takes: the scheduler hears of it */
};

/* engine_start below `ops` rather than the backend that the config names. */
enum status engine_start_on(const struct backend_ops *ops, const struct config *config, const struct model *model, const struct engine_hooks *hooks,
                            struct engine **engine, struct error *error);

/* The engine thread's life, from the first letter to engine_stop. */
void engine_serve(struct engine *engine);
void engine_publish(struct engine *engine);
