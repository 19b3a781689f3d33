/* Every setting, as values. Filled once from (in rising order of precedence) defaults, TOML file, KVASIR_* environment, flags; const afterwards.
 * One table of options (config/options.c) gives keys, flags, environment names, defaults, ranges, --help and deploy/kvasir.toml. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "base/error.h"

#define CONFIG_TEXT 512

struct config {
    /* model */
    char model[CONFIG_TEXT];          /* -m, --model: path of a GGUF file */
    char served_name[CONFIG_TEXT];    /* default: the file's name */
    char chat_template[CONFIG_TEXT];

    /* [server] */
    char host[CONFIG_TEXT];           /* 127.0.0.1 */
    uint16_t port;                    /* 8080; 0: any free one, printed */
    char api_key_file[CONFIG_TEXT];   /* one key a line; '#' comments. Empty: no keys (loopback only) */
    bool insecure_public;             /* allow a public bind without keys */
    char allowed_hosts[CONFIG_TEXT];  /* comma list accepted in Host beside localhost, 127.0.0.1, [::1] and the bind address */
    uint32_t max_connections;
    uint64_t max_body;                /* bytes */
    uint32_t header_timeout_s, body_timeout_s, idle_timeout_s; /* 10, 30, 75 */
    uint32_t first_byte_timeout_s;    /* 15 */
    uint32_t stall_timeout_s;         /* 30: slow reader */
    uint32_t heartbeat_s;             /* 15: SSE comment after silence; 0: off */
    uint32_t request_timeout_s;       /* 600 */
    uint32_t drain_timeout_s;         /* 60 */
    uint32_t max_queue;               /* requests waiting beyond max_sequences: then 503 */
    uint32_t max_requests_per_key;    /* live requests of one key: then 429; 0: off */
    uint32_t max_prompts;             /* prompts of one request, 1024 */
    uint32_t max_choices;             /* prompts x candidates of one request, 128 */
    uint32_t max_logprobs;            /* 20 */
    char log_level[16];               /* error, warn, info, debug */
    bool vllm_names;                  /* metrics.vllm_names */

    /* [engine] */
    char backend[32];                 /* auto, cpu, reference, mock */
    uint32_t device;
    uint32_t threads;                 /* 0: auto */
    char instruction_set[32];         /* auto */
    uint32_t max_model_len;           /* 0: what the model was trained for */
    uint32_t max_sequences;           /* running at once; 0: auto */
    uint32_t max_stream_tokens;       /* streaming_llm's bound instead of the context */
    uint64_t kv_memory;               /* bytes; 0: auto */
    char kv_dtype[16];                /* auto, f32, f16, bf16, q8 */
    bool prefix_cache;
    double step_ms;                   /* a step's cost budget while others decode */
    uint32_t max_rows;                /* rows of one step, 512 */
    double mock_tokens_per_second;
    uint64_t seed;                    /* of requests that bring none; 0: from the system */
};

void config_defaults(struct config *config);

/* For one command ("serve", "bench", ...): reads --config FILE, KVASIR_* and the flags of argv[1..]. Positional arguments are left: their count and first index
 * come back. Unknown flag, key, or value out of range: STATUS_INVALID, words with file, line, key, the allowed range and the nearest known key. `help` is set when --help was asked. */
enum status config_load(struct config *config, int argc, char **argv, int *first_positional, bool *help, struct error *error);
/* A TOML file alone, on top of what *config holds (SIGHUP; check-config). */
enum status config_load_file(struct config *config, const char *path, struct error *error);
/* Rules between options: a public bind without keys, timeouts in order, ... */
enum status config_check(const struct config *config, struct error *error);

void config_print_help(FILE *out, const char *command);
void config_print_example(FILE *out); /* deploy/kvasir.toml, word for word */
void config_print(const struct config *config, FILE *out); /* effective values */
