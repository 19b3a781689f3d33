/* Choices as OpenAI's text_completion objects: whole answers and the chunks of a stream. Straight into a buffer. Pure; loop thread. */
#pragma once

#include "base/json_writer.h"
#include "server/api_error.h"
#include "server/choice.h"

/* What all objects of one request share. */
struct answer_head {
    const char *id, *model, *fingerprint;
    int64_t created; /* unix seconds */
    const struct completion *completion;
    const struct tokenizer *tokenizer;
};

struct usage {
    uint64_t prompt_tokens, completion_tokens, cached_tokens;
};

/* What kv.report asked for, summed over the requests of all prompts. */
struct kv_answer {
    const char *policy;
    struct kv_report report;
    uint32_t head_median;
    uint64_t bytes;
    uint32_t n_layers, n_kv_heads;
    const struct head_hits *hits; /* [n_layers][n_kv_heads]; NULL: not measured */
};

void write_answer_begin(struct json_writer *json, const struct answer_head *head, struct buffer *out); /* up to and with "choices":[ */
void write_answer_choice(struct json_writer *json, const struct answer_head *head, uint32_t index, const struct choice *choice,
                         const struct piece *piece);
void write_answer_end(struct json_writer *json, const struct answer_head *head, const struct usage *usage,
                      const struct kv_answer *kv); /* either may be NULL */

/* "data: {...}\n\n" with one choice. `first`: this choice's first chunk. usage: NULL, or what continuous_usage_stats asks for. */
void write_chunk(struct buffer *out, const struct answer_head *head, uint32_t index, const struct choice *choice, const struct piece *piece,
                 bool first, const struct usage *usage);
void write_last_chunk(struct buffer *out, const struct answer_head *head, const struct usage *usage, const struct kv_answer *kv); /* choices: [] */
void write_error_chunk(struct buffer *out, const struct api_error *error);
void write_done(struct buffer *out);      /* data: [DONE] */
void write_heartbeat(struct buffer *out); /* a comment */
