/* One choice of an answer: the engine's raw events in, text, logprob entries and the finish out. Tokens wait as records of 24 bytes (plus 8 an alternative) and become text only when
 * somebody is there to take it. What ends the text is decided here: a stop string, or the engine's finish.
 * Owned by the request it belongs to; loop thread. */
#pragma once

#include "engine/engine.h"
#include "server/completion.h"

/* A token with what is said about it. Followed by n_top pairs {token, logprob} in a buffer of records. */
struct record {
    int32_t token;
    float logprob;
    int32_t n_top;       /* -1: no logprobs */
    uint32_t no_logprob; /* the first token of an echoed prompt: null */
    uint64_t offset;     /* characters of the returned text before it */
};
struct record_top {
    int32_t token;
    float logprob;
};

/* What came of one or more tokens: the text of a chunk, or of a whole answer. */
struct piece {
    struct buffer text;
    struct buffer records; /* struct record + pairs, in order */
    uint32_t n_records;
};
void piece_clear(struct piece *piece);
void piece_done(struct piece *piece);
/* The record at *at, moving it on; NULL at the end. The pairs lie behind it. */
const struct record *piece_next(const struct buffer *records, size_t *at);

struct choice {
    const struct completion *completion;
    const struct tokenizer *tokenizer;
    uint32_t prompt, candidate;
    /* Engine's side. */
    struct buffer records;
    size_t record_at;
    bool seen, ended; /* an event came; its terminal event was taken */
    enum finish finish;
    uint32_t cached, preemptions, n_events; /* n_events: tokens that came */
    uint64_t scheduled_ns, first_ns, last_ns;
    /* Client's side. */
    struct detokenizer detokenizer;
    struct stop_match stop;
    bool echoed, closed;       /* closed: the client has seen, or is about to see, its end */
    const char *finish_reason; /* "stop", "length"; once closed */
    int32_t stop_token;        /* the stop_token_ids entry that ended it, or TOKEN_NONE */
    uint32_t n_tokens;         /* counted: up to the one that completed a stop string */
    double logprob_sum;
    uint64_t characters; /* of the returned text so far */
};

void choice_init(struct choice *choice, const struct completion *completion, const struct tokenizer *tokenizer, uint32_t prompt, uint32_t candidate);
void choice_done(struct choice *choice);
/* An event of the engine. */
void choice_take(struct choice *choice, const struct event *event);
/* The echoed prompt, with what `results` (of the prompt's tokens; NULL: no logprobs) say. */
void choice_echo(struct choice *choice, const struct sample_result *results, struct piece *piece);
/* Is there anything choice_next would do? */
bool choice_ready(const struct choice *choice);
/* Turns one more token into text, or ends the choice. */
void choice_next(struct choice *choice, struct piece *piece);
double choice_mean_logprob(const struct choice *choice);

/* Characters as a client counts them in the JSON it gets: code points, and one for each byte that is part of none. */
uint64_t count_characters(const char *bytes, size_t length);
