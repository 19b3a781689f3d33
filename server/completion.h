/* A request for /v1/completions (and /tokenize, /detokenize) as values: every field typed, ranged and defaulted, every product capped, before anything is expanded.
 * Pure: text and limits in, values or one failure out; no clock, no sockets, no engine. Any thread (long bodies: a worker). */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/buffer.h"
#include "engine/engine.h"
#include "model/tokenizer.h"
#include "server/api_error.h"
#include "server/stop.h"

#define COMPLETION_STOP_TOKENS_MAX 128
#define COMPLETION_BIAS_MAX 1024
#define COMPLETION_TOKENS_MAX (4u << 20) /* choices x (prompt + answer) of one request, unless a single sequence is longer */

/* What the parser needs to know of the world; copied, so that a reload changes nothing under a worker. */
struct completion_limits {
    const char *served_name;
    const struct tokenizer *tokenizer;
    uint32_t max_model_len, max_stream_tokens, max_prompts, max_choices, max_logprobs;
    const struct config *compression; /* its [compression] part alone is read, which no reload changes; outlives the request */
};

struct completion_prompt {
    size_t text, text_length; /* in `texts`; of a prompt given as text */
    bool is_text;
    struct token_list tokens; /* given, or made by completion_tokenize */
};

struct completion {
    struct buffer texts; /* prompt and stop strings, decoded */
    struct completion_prompt *prompts;
    uint32_t n_prompts;

    uint32_t n, best_of; /* choices shown and candidates made, per prompt */
    uint32_t max_tokens, min_tokens;
    bool max_tokens_given;
    bool echo, stream, include_usage, continuous_usage;
    bool ignore_eos, keep_stop, skip_special, add_special, tokens_as_ids, return_token_ids;
    int32_t logprobs;        /* -1: none */
    int64_t truncate_prompt; /* 0: no; -1: to what fits; else keep the last so many */
    int32_t priority;
    struct kv_wish kv_wish; /* "kv": what is asked of compression, */
    struct kv_plan kv;      /* and what is granted */
    bool seed_given;
    struct sampling sampling; /* n_top, banned and (without seed_given) seed are filled by the caller */
    struct logit_bias *bias;
    struct stop_string stops[STOP_STRINGS_MAX]; /* bytes point into `texts` */
    uint32_t n_stops;
    int32_t stop_tokens[COMPLETION_STOP_TOKENS_MAX];
    uint32_t n_stop_tokens;
    uint8_t salt[32]; /* digest of cache_salt */
    bool has_salt;
    char ignored[160]; /* unknown fields, comma-separated, for the debug log */
};

/* false: *error holds a 4xx. completion_done is needed in either case. */
bool completion_parse(struct completion *completion, const char *body, size_t length, const struct completion_limits *limits,
                      struct api_error *error);
/* Prompts to token ids, truncation, and the check against the context. After it every prompt has 1 <= count and count + max_tokens <= max_model_len. */
bool completion_tokenize(struct completion *completion, const struct completion_limits *limits, struct api_error *error);
void completion_done(struct completion *completion);

/* /tokenize {prompt|content, add_special_tokens|add_special, parse_special, return_token_strs|with_pieces} and /detokenize {tokens}. */
struct tokenize_request {
    struct buffer text;
    struct token_list tokens; /* of /detokenize */
    bool add_special, parse_special, pieces;
};
bool tokenize_parse(struct tokenize_request *request, const char *body, size_t length, const struct completion_limits *limits,
                    struct api_error *error);
bool detokenize_parse(struct tokenize_request *request, const char *body, size_t length, const struct completion_limits *limits,
                      struct api_error *error);
void tokenize_request_done(struct tokenize_request *request);
