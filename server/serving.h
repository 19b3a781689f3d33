/* One request for a completion in flight: what admission.c begins and serving.c ends. Lives until the exchange has ended AND the engine has given the last choice's terminal event.
 * Loop thread; while `working` the worker has `body`, `limits`, `completion` and `error`. */
#pragma once

#include "server/internal.h"

struct job { /* one prompt: one request of the engine's */
    struct request request;
    struct sampling sampling;
    struct sample_result *results;
    int32_t **tokens;
    struct serving *serving;
};

struct serving {
    struct serving *next, *previous, *next_dirty;
    struct server *server;
    struct exchange *exchange; /* NULL: nobody waits for the answer any more */
    struct buffer body;
    uv_work_t work;
    bool working;
    bool answered; /* a status has been decided */
    bool ended;    /* so has everything that follows it */
    bool failed, done_sent, heartbeat;
    bool rejected; /* it never began: its choices are not counted as aborted */
    bool dirty;    /* events came in this batch */
    struct completion_limits limits;
    struct completion completion;
    struct api_error error;
    bool parsed;            /* like completion and error the worker's while `working`: apart from the flags that the loop reads meanwhile */
    struct job *jobs;       /* [n_prompts] */
    struct choice *choices; /* [n_prompts * best_of] */
    struct piece *pieces; /* whole answers: [n_choices], rendered as tokens come, since a stop string must be seen at once; streams: [1], the chunk */
    int32_t *stop_tokens;
    uint32_t n_stop_tokens, n_unended, n_unclosed, n_choices, next_choice;
    size_t result_bytes;
    struct head_hits *head_hits; /* of all its prompts, the engine's until all have ended; NULL: not asked */
    uint32_t *head_slots;        /* [n_choices][heads], likewise */
    uint32_t key;
    bool key_counted;
    uint64_t started_ns, deadline_ns, first_byte_ns, written_ns, first_token_ns;
    int64_t created;
    char id[REQUEST_ID_MAX + 8];
};

void serving_fail(struct serving *serving, const struct api_error *error);
/* Frees it if nothing holds it any more. */
void serving_release(struct serving *serving);
/* Every choice's loop side was counted live: begins the wait for the engine. */
extern const struct exchange_owner serving_owner;
