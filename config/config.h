/* Every setting, as values. Filled once from (in rising order of precedence) defaults, TOML file, KVASIR_* environment, flags; const afterwards.
 * One table of options (config/options.c) gives keys, flags, environment names, defaults, ranges, --help and deploy/kvasir.toml. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "base/error.h"

#define CONFIG_TEXT 512
#define CONFIG_WORDS 128
#define CONFIG_OPTIONS_MAX 96

/* Where a value came from, in rising order of precedence. */
enum config_source { CONFIG_SOURCE_DEFAULT, CONFIG_SOURCE_FILE, CONFIG_SOURCE_ENVIRONMENT, CONFIG_SOURCE_FLAG, CONFIG_SOURCE_ARGUMENT };

struct config {
    /* model */
    char model[CONFIG_TEXT];       /* -m, --model: path of a GGUF file */
    char served_name[CONFIG_TEXT]; /* default: the file's name */

    /* [server] */
    char host[CONFIG_TEXT];          /* 127.0.0.1 */
    uint16_t port;                   /* 8080; 0: any free one, printed */
    char api_key_file[CONFIG_TEXT];  /* one key a line; '#' comments. Empty: no keys (loopback only) */
    bool insecure_public;            /* allow a public bind without keys */
    char allowed_hosts[CONFIG_TEXT]; /* comma list accepted in Host beside localhost, 127.0.0.1, [::1] and the bind address */
    uint32_t max_connections;
    uint64_t max_body;                                         /* bytes */
    uint32_t header_timeout_s, body_timeout_s, idle_timeout_s; /* 10, 30, 75 */
    uint32_t first_byte_timeout_s;                             /* 15 */
    uint32_t stall_timeout_s;                                  /* 30: slow reader */
    uint32_t heartbeat_s;                                      /* 15: SSE comment after silence; 0: off */
    uint32_t request_timeout_s;                                /* 600 */
    uint32_t drain_timeout_s;                                  /* 60 */
    uint32_t max_queue;                                        /* requests waiting beyond max_sequences: then 503 */
    uint32_t max_requests_per_key;                             /* live requests of one key: then 429; 0: off */
    uint32_t max_prompts;                                      /* prompts of one request, 1024 */
    uint32_t max_choices;                                      /* prompts x candidates of one request, 128 */
    uint32_t max_logprobs;                                     /* 20 */
    char log_level[16];                                        /* error, warn, info, debug */
    bool vllm_names;                                           /* metrics.vllm_names */

    /* [engine] */
    char backend[32]; /* auto, cuda, cpu, reference, mock */
    uint32_t device;
    char weights[16]; /* auto, f16, native: cuda alone */
    char activations[16]; /* 8bit, 16bit: cpu alone */
    bool deterministic;
    uint32_t threads;           /* 0: auto */
    char instruction_set[32];   /* auto */
    uint32_t max_model_len;     /* 0: what the model was trained for */
    uint32_t max_sequences;     /* running at once; 0: auto */
    uint32_t max_stream_tokens; /* streaming_llm's bound instead of the context */
    uint64_t kv_memory;         /* bytes; 0: auto */
    char kv_dtype[16];          /* auto, f32, f16, bf16, q8, kivi4, kivi2 */
    bool prefix_cache;
    bool run_ahead;
    double step_ms;    /* a step's cost budget while others decode */
    uint32_t max_rows; /* rows of one step, 512 */
    double mock_tokens_per_second;
    uint64_t seed; /* of requests that bring none; 0: from the system */

    /* [compression] */
    char compression_policy[32];   /* none; a name of policies/ (checked by the engine, which knows them) */
    char compression_triggers[64]; /* comma list of prompt_end, budget, pressure; empty: the policy's own */
    double keep_ratio;             /* of the tokens seen, when budget_tokens is 0 */
    uint32_t budget_tokens;        /* a lane, on average; 0: by keep_ratio */
    uint32_t sink_tokens, recent_tokens, window;
    char pooling[16];        /* max, average, none */
    uint32_t pooling_kernel; /* odd */
    uint32_t interval;       /* tokens between two compressions of a growing sequence */
    double floor, recovery;
    bool value_aware, compress_while_reading;
    double pressure_high, pressure_low; /* of the pool */
    char allowed_policies[CONFIG_TEXT]; /* that requests may ask for; empty: all */
    uint32_t min_budget;                /* of requests; 0: sink_tokens + recent_tokens */
    bool may_disable;                   /* requests may ask for none */

    /* flags of one command alone, neither in the file nor in the environment */
    struct {
        char prompts[CONFIG_WORDS]; /* "512,2048" */
        char batches[CONFIG_WORDS];
        uint32_t generate, context, rounds;
        uint32_t requests;          /* through the engine, all at once; 0: off, the backend is driven directly */
        char policies[CONFIG_TEXT]; /* of requests, one after the other: "none,kv_compress" */
        char keep[CONFIG_WORDS];    /* "0.125,0.015625": each policy but none at each */
        bool json, phases, ragged;
        char dummy[CONFIG_WORDS]; /* shape of random weights in place of a model; empty: none */
    } bench;
    struct {
        char text[CONFIG_TEXT];     /* file; empty: made up */
        char policies[CONFIG_TEXT]; /* comma list; empty: all */
        char keep[CONFIG_WORDS];    /* "0.5,0.25" */
        uint32_t windows, prompt;   /* prompt: tokens; 0: auto */
        uint32_t tasks;             /* of each kind, beside each window */
        uint32_t stream;            /* tokens; 0: off */
        uint32_t streams;
        bool json;
        char svg[CONFIG_TEXT];    /* file; empty: none */
        char dummy[CONFIG_WORDS]; /* as bench's */
    } eval;
    bool print_example, print_manual; /* check-config */

    char config_file[CONFIG_TEXT];      /* what --config named; empty: none */
    uint8_t source[CONFIG_OPTIONS_MAX]; /* enum config_source of each row of the table */
    uint32_t line[CONFIG_OPTIONS_MAX];  /* of the file, where the source is CONFIG_SOURCE_FILE */
};

void config_defaults(struct config *config);

/* For one command ("serve", "bench", ...; argv[0] is its name): defaults, then --config FILE (or KVASIR_CONFIG), KVASIR_*, and the flags of argv[1..].
 * Positional arguments are moved behind the flags: they are argv[*first_positional .. argc). Everything after "--" is positional.
 * Unknown flag, key, or value out of range: STATUS_INVALID, words with file, line, key, the allowed range and the nearest known key. *help is set when --help was
 * asked (nothing else is looked at then). */
enum status config_load(struct config *config, int argc, char **argv, int *first_positional, bool *help, struct error *error);
/* A TOML file alone, on top of what *config holds. Values that came from the environment or a flag stay; what an earlier file set and this one does not goes back to
 * its default. On failure *config is as it was. */
enum status config_load_file(struct config *config, const char *path, struct error *error);
/* SIGHUP: `next` becomes `now` with the file (now->config_file) read again and checked. Only limits, timeouts, keys, hosts and the log level may change while serving: other
 * changes are left as they were and their keys listed, comma-separated, in `refused` (empty: none). Without a file `next` equals `now`, and where it is a pipe, which was read once and for
 * all: then `refused` says so. */
enum status config_reload(const struct config *now, struct config *next, char *refused, size_t refused_size, struct error *error);
/* Puts "file:line: " before an error that names keys ("server.host"), the place of the first one that stands in the file; without one, or with it there already, nothing is changed. */
void config_locate(const struct config *config, struct error *error);
/* Where the value of `key` came from, before an error that speaks of the value alone: "kvasir.toml:1: model: ", "KVASIR_MODEL: ", "--model: ", else "model: ". */
void config_locate_value(const struct config *config, const char *key, struct error *error);
/* Rules between options: a public bind without keys, timeouts in order, ... */
enum status config_check(const struct config *config, struct error *error);
/* Names like KVASIR_PROT that stand in the environment and mean nothing, comma-separated: for a warning. Their count. */
size_t config_unknown_environment(char *names, size_t size);

/* The options that `command` looks at, with defaults and ranges; for a command that is not known, all of them. */
void config_print_help(FILE *out, const char *command);
void config_print_example(FILE *out);                      /* deploy/kvasir.toml, word for word */
void config_print_manual(FILE *out);                       /* the OPTIONS section of the manual page, for man */
void config_print(const struct config *config, FILE *out); /* effective values as TOML, each with where it came from */
