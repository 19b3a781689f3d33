/* See options.h. THE table, and the ways to find a row of it. Owns nothing; any thread. Deliberately parses nothing: value.c does. */
#include "config/options.h"

#include <ctype.h>
#include <string.h>

#define FIELD(name) offsetof(struct config, name), sizeof(((struct config *)0)->name)
#define EVERY (COMMAND_SERVE | COMMAND_BENCH | COMMAND_EVAL | COMMAND_INSPECT | COMMAND_CHECK)
#define SERVE (COMMAND_SERVE | COMMAND_CHECK)
#define RUN (COMMAND_SERVE | COMMAND_BENCH | COMMAND_EVAL | COMMAND_CHECK)
#define CHOICE (COMMAND_SERVE | COMMAND_BENCH | COMMAND_EVAL | COMMAND_CHECK) /* what a policy keeps */
#define WHEN (COMMAND_SERVE | COMMAND_BENCH | COMMAND_CHECK)                  /* and when */
#define PLAN (COMMAND_SERVE | COMMAND_BENCH | COMMAND_INSPECT | COMMAND_CHECK)
#define LENGTH (COMMAND_SERVE | COMMAND_INSPECT | COMMAND_CHECK)
#define TEBIBYTE 1099511627776.0

// clang-format off
const struct option_info options[] = {
    {.key = "model", .flag = 'm', .type = OPTION_TEXT, FIELD(model), .initial = "", .argument = "FILE", .commands = RUN,
     .help = "the model: a GGUF file"},
    {.key = "served_name", .type = OPTION_TEXT, FIELD(served_name), .initial = "", .argument = "NAME", .commands = SERVE,
     .help = "the name clients ask for; empty: the file's name without .gguf"},

    {.key = "server.host", .type = OPTION_TEXT, FIELD(host), .initial = "127.0.0.1", .argument = "ADDRESS", .commands = SERVE,
     .help = "address to listen on. Other than loopback needs api_key_file"},
    {.key = "server.port", .type = OPTION_PORT, FIELD(port), .initial = "8080", .min = 0, .max = 65535, .argument = "N", .commands = SERVE,
     .help = "port to listen on; 0: any free one, which is printed"},
    {.key = "server.api_key_file", .type = OPTION_TEXT, FIELD(api_key_file), .initial = "", .argument = "FILE", .reload = true, .commands = SERVE,
     .help = "file with one API key a line, # begins a comment; empty: no keys, loopback only"},
    {.key = "server.insecure_public", .type = OPTION_BOOL, FIELD(insecure_public), .initial = "false", .commands = SERVE,
     .help = "allow an address other than loopback without keys (behind a proxy that asks for them)"},
    {.key = "server.allowed_hosts", .type = OPTION_LIST, FIELD(allowed_hosts), .initial = "", .argument = "NAMES", .reload = true, .commands = SERVE,
     .help = "names accepted in Host beside localhost, 127.0.0.1, [::1] and the address listened on, comma-separated"},
    {.key = "server.max_connections", .type = OPTION_COUNT, FIELD(max_connections), .initial = "4096", .min = 8, .max = 100000, .argument = "N", .commands = SERVE,
     .help = "open connections; more wait in the kernel"},
    {.key = "server.max_body", .type = OPTION_SIZE, FIELD(max_body), .initial = "8MiB", .min = 1024, .max = 1073741824, .argument = "SIZE", .reload = true, .commands = SERVE,
     .help = "bytes of one request's body; more: 413"},
    {.key = "server.header_timeout", .type = OPTION_DURATION, FIELD(header_timeout_s), .initial = "10s", .min = 1, .max = 3600, .argument = "TIME", .reload = true, .commands = SERVE,
     .help = "time for a request's headers to arrive"},
    {.key = "server.body_timeout", .type = OPTION_DURATION, FIELD(body_timeout_s), .initial = "30s", .min = 1, .max = 3600, .argument = "TIME", .reload = true, .commands = SERVE,
     .help = "time for a request's body to arrive"},
    {.key = "server.idle_timeout", .type = OPTION_DURATION, FIELD(idle_timeout_s), .initial = "75s", .min = 1, .max = 86400, .argument = "TIME", .reload = true, .commands = SERVE,
     .help = "how long a connection may stay open between requests"},
    {.key = "server.first_byte_timeout", .type = OPTION_DURATION, FIELD(first_byte_timeout_s), .initial = "15s", .min = 1, .max = 3600, .argument = "TIME", .reload = true, .commands = SERVE,
     .help = "a stream's 200 goes out with its first token or after this time; before it a failure is an HTTP error"},
    {.key = "server.stall_timeout", .type = OPTION_DURATION, FIELD(stall_timeout_s), .initial = "30s", .min = 1, .max = 3600, .argument = "TIME", .reload = true, .commands = SERVE,
     .help = "a client that reads nothing for so long is cut off"},
    {.key = "server.heartbeat", .type = OPTION_DURATION, FIELD(heartbeat_s), .initial = "15s", .min = 0, .max = 3600, .zero = "off", .argument = "TIME", .reload = true, .commands = SERVE,
     .help = "a comment is sent in a stream after so much silence, so that proxies notice a client that left"},
    {.key = "server.request_timeout", .type = OPTION_DURATION, FIELD(request_timeout_s), .initial = "10m", .min = 1, .max = 604800, .argument = "TIME", .reload = true, .commands = SERVE,
     .help = "a request that lives longer is ended"},
    {.key = "server.drain_timeout", .type = OPTION_DURATION, FIELD(drain_timeout_s), .initial = "60s", .min = 0, .max = 86400, .argument = "TIME", .reload = true, .commands = SERVE,
     .help = "after SIGTERM: time for running requests to finish"},
    {.key = "server.max_queue", .type = OPTION_COUNT, FIELD(max_queue), .initial = "1024", .min = 0, .max = 65536, .argument = "N", .commands = SERVE,
     .help = "choices waiting beyond max_sequences; more: 503 with Retry-After"},
    {.key = "server.max_requests_per_key", .type = OPTION_COUNT, FIELD(max_requests_per_key), .initial = "off", .min = 0, .max = 65536, .zero = "off", .argument = "N", .reload = true, .commands = SERVE,
     .help = "live requests of one API key; more: 429 with Retry-After"},
    {.key = "server.max_prompts", .type = OPTION_COUNT, FIELD(max_prompts), .initial = "1024", .min = 1, .max = 65536, .argument = "N", .reload = true, .commands = SERVE,
     .help = "prompts of one request"},
    {.key = "server.max_choices", .type = OPTION_COUNT, FIELD(max_choices), .initial = "128", .min = 1, .max = 4096, .argument = "N", .commands = SERVE,
     .help = "prompts x candidates (n, best_of) of one request"},
    {.key = "server.max_logprobs", .type = OPTION_COUNT, FIELD(max_logprobs), .initial = "20", .min = 0, .max = 20, .argument = "N", .reload = true, .commands = SERVE,
     .help = "alternatives a request may ask for with each token"},
    {.key = "server.log_level", .type = OPTION_ENUM, FIELD(log_level), .initial = "info", .choices = "error, warn, info, debug", .argument = "LEVEL", .reload = true, .commands = SERVE,
     .help = "what is logged. Prompts never are"},

    {.key = "metrics.vllm_names", .type = OPTION_BOOL, FIELD(vllm_names), .initial = "false", .reload = true, .commands = SERVE,
     .help = "add vLLM's metric names to /metrics, for dashboards and autoscalers that read them"},

    {.key = "engine.backend", .type = OPTION_ENUM, FIELD(backend), .initial = "auto", .choices = "auto, cuda, cpu, reference, mock", .argument = "NAME", .commands = EVERY,
     .help = "what computes; auto: cuda where the build has it and the machine a device, else cpu. reference is slow and exact; mock invents tokens, for tests"},
    {.key = "engine.device", .type = OPTION_COUNT, FIELD(device), .initial = "0", .min = 0, .max = 63, .argument = "N", .commands = EVERY,
     .help = "which accelerator, as the system counts them; 0 alone for backends that use none"},
    {.key = "engine.weights", .type = OPTION_ENUM, FIELD(weights), .initial = "auto", .choices = "auto, f16, native", .argument = "TYPE", .commands = EVERY,
     .help = "cuda: how weights are kept on the device, widened to f16 or in the file's types; auto: f16, native where f16 would take more than 40 % of the device's memory. Other backends read the file's types"},
    {.key = "engine.activations", .type = OPTION_ENUM, FIELD(activations), .initial = "8bit", .choices = "8bit, 16bit", .argument = "BITS", .commands = EVERY,
     .help = "cpu: numbers that quantised weights are multiplied with; 16bit is nearer to the model in full precision, and slower. Other backends do not round to so few"},
    {.key = "engine.deterministic", .type = OPTION_BOOL, FIELD(deterministic), .initial = "false", .commands = EVERY,
     .help = "cuda: the same logits for a row whatever runs beside it, at some cost; other backends always do this"},
    {.key = "engine.threads", .flag = 't', .type = OPTION_COUNT, FIELD(threads), .initial = "auto", .min = 0, .max = 1024, .zero = "auto", .argument = "N", .commands = EVERY,
     .help = "threads that compute; auto: one a physical core, within the affinity mask and the cgroup's quota"},
    {.key = "engine.instruction_set", .type = OPTION_ENUM, FIELD(instruction_set), .initial = "auto", .choices = "auto, generic, avx2, avxvnni, avx512, avx512bf16", .argument = "NAME", .commands = EVERY,
     .help = "instructions the cpu backend uses; auto: the best this machine has"},
    {.key = "engine.max_model_len", .type = OPTION_COUNT, FIELD(max_model_len), .initial = "auto", .min = 0, .max = 16777216, .zero = "auto", .argument = "TOKENS", .commands = LENGTH,
     .help = "longest prompt + answer; auto: what the model was trained for, less if memory is short"},
    {.key = "engine.max_sequences", .type = OPTION_COUNT, FIELD(max_sequences), .initial = "auto", .min = 0, .max = 4096, .zero = "auto", .argument = "N", .commands = PLAN,
     .help = "sequences that run at once"},
    {.key = "engine.max_stream_tokens", .type = OPTION_COUNT, FIELD(max_stream_tokens), .initial = "1048576", .min = 1, .max = 2147483647, .argument = "TOKENS", .commands = LENGTH,
     .help = "with streaming_llm: bound of prompt + answer in place of max_model_len"},
    {.key = "engine.kv_memory", .type = OPTION_SIZE, FIELD(kv_memory), .initial = "auto", .min = 0, .max = 1024 * TEBIBYTE, .zero = "auto", .argument = "SIZE", .commands = PLAN,
     .help = "memory of the KV cache; auto: from what is free on the device, or here within the cgroup's limit"},
    {.key = "engine.kv_dtype", .type = OPTION_ENUM, FIELD(kv_dtype), .initial = "auto", .choices = "auto, f32, f16, bf16, q8, kivi4, kivi2", .argument = "TYPE", .commands = EVERY,
     .help = "how cached keys and values are stored; auto: bf16 where the CPU computes with it, else f16; kivi4, kivi2: 4 or 2 bits; cuda has no f32"},
    {.key = "engine.prefix_cache", .type = OPTION_BOOL, FIELD(prefix_cache), .initial = "true", .commands = SERVE,
     .help = "keep the KV blocks of finished prompts for requests that begin alike"},
    {.key = "engine.run_ahead", .type = OPTION_BOOL, FIELD(run_ahead), .initial = "true", .commands = SERVE | COMMAND_BENCH,
     .help = "cuda, while sequences only decode: the next step begins before this one's tokens are read; an answer that ends unforeseen has cost a row"},
    {.key = "engine.step_ms", .type = OPTION_FLOAT, FIELD(step_ms), .initial = "25", .min = 0.1, .max = 60000, .argument = "MS", .commands = SERVE,
     .help = "cost of one step while others decode, in milliseconds: long prompts are read in chunks that fit"},
    {.key = "engine.max_rows", .type = OPTION_COUNT, FIELD(max_rows), .initial = "512", .min = 1, .max = 65536, .argument = "N", .commands = EVERY,
     .help = "rows (tokens) of one step"},
    {.key = "engine.mock_tokens_per_second", .type = OPTION_FLOAT, FIELD(mock_tokens_per_second), .initial = "0", .min = 0, .max = 1e9, .argument = "RATE", .commands = SERVE,
     .help = "mock backend: rows a second; 0: as fast as it goes"},
    {.key = "engine.seed", .type = OPTION_NUMBER, FIELD(seed), .initial = "auto", .min = 0, .max = 9007199254740992.0, .zero = "auto", .argument = "N", .commands = SERVE,
     .help = "seed of requests that bring none; auto: from the system"},

    {.key = "compression.policy", .type = OPTION_TEXT, FIELD(compression_policy), .initial = "none", .argument = "NAME", .commands = SERVE,
     .help = "what is evicted from the KV cache of requests that do not say: none, random, streaming_llm, h2o, scissorhands, fastgen, snapkv, pyramidkv, ada_snapkv, ada_pyramidkv, kv_compress, expected_attention, keydiff, tova"},
    {.key = "compression.triggers", .type = OPTION_LIST, FIELD(compression_triggers), .initial = "", .argument = "NAMES", .commands = WHEN,
     .help = "when it is compressed: prompt_end, budget, pressure, comma-separated; empty: what the policy's paper does"},
    {.key = "compression.keep_ratio", .type = OPTION_FLOAT, FIELD(keep_ratio), .initial = "0.5", .min = 0.001, .max = 1, .argument = "RATIO", .commands = SERVE,
     .help = "share of the tokens seen that a head keeps, where budget_tokens is off"},
    {.key = "compression.budget_tokens", .type = OPTION_COUNT, FIELD(budget_tokens), .initial = "off", .min = 0, .max = 16777216, .zero = "off", .argument = "TOKENS", .commands = SERVE,
     .help = "tokens that a head keeps, on average over all heads"},
    {.key = "compression.sink_tokens", .type = OPTION_COUNT, FIELD(sink_tokens), .initial = "4", .min = 0, .max = 1024, .argument = "TOKENS", .commands = CHOICE,
     .help = "first tokens of a sequence, never evicted"},
    {.key = "compression.recent_tokens", .type = OPTION_COUNT, FIELD(recent_tokens), .initial = "32", .min = 1, .max = 65536, .argument = "TOKENS", .commands = CHOICE,
     .help = "last tokens of a sequence, never evicted"},
    {.key = "compression.window", .type = OPTION_COUNT, FIELD(window), .initial = "32", .min = 1, .max = 64, .argument = "ROWS", .commands = CHOICE,
     .help = "last queries whose attention scores"},
    {.key = "compression.pooling", .type = OPTION_ENUM, FIELD(pooling), .initial = "max", .choices = "max, average, none", .argument = "KIND", .commands = CHOICE,
     .help = "how scores spread to neighbouring tokens, for policies that pool"},
    {.key = "compression.pooling_kernel", .type = OPTION_COUNT, FIELD(pooling_kernel), .initial = "7", .min = 1, .max = 63, .argument = "TOKENS", .commands = CHOICE,
     .help = "width of the pooling, odd"},
    {.key = "compression.interval", .type = OPTION_COUNT, FIELD(interval), .initial = "32", .min = 1, .max = 65536, .argument = "TOKENS", .commands = WHEN,
     .help = "tokens that a sequence grows by between two compressions"},
    {.key = "compression.floor", .type = OPTION_FLOAT, FIELD(floor), .initial = "0.2", .min = 0, .max = 1, .argument = "SHARE", .commands = CHOICE,
     .help = "share of the uniform budget that each head keeps, for policies that share budgets within a layer"},
    {.key = "compression.recovery", .type = OPTION_FLOAT, FIELD(recovery), .initial = "0.9", .min = 0, .max = 1, .argument = "SHARE", .commands = CHOICE,
     .help = "attention that fastgen's choice must recover"},
    {.key = "compression.value_aware", .type = OPTION_BOOL, FIELD(value_aware), .initial = "false", .commands = CHOICE,
     .help = "weigh attention scores with the size of the value"},
    {.key = "compression.compress_while_reading", .type = OPTION_BOOL, FIELD(compress_while_reading), .initial = "false", .commands = SERVE,
     .help = "compress a prompt while it is being read, with policies that look at no query: prompts longer than the cache"},
    {.key = "compression.pressure_high", .type = OPTION_FLOAT, FIELD(pressure_high), .initial = "0.95", .min = 0.1, .max = 1, .argument = "SHARE", .commands = SERVE,
     .help = "share of the pool in use at which the pressure trigger begins to compress"},
    {.key = "compression.pressure_low", .type = OPTION_FLOAT, FIELD(pressure_low), .initial = "0.85", .min = 0, .max = 1, .argument = "SHARE", .commands = SERVE,
     .help = "share of the pool in use at which it stops"},
    {.key = "compression.allowed_policies", .type = OPTION_LIST, FIELD(allowed_policies), .initial = "", .argument = "NAMES", .commands = SERVE,
     .help = "policies that a request may ask for, comma-separated; empty: all"},
    {.key = "compression.min_budget", .type = OPTION_COUNT, FIELD(min_budget), .initial = "auto", .min = 0, .max = 16777216, .zero = "auto", .argument = "TOKENS", .commands = SERVE,
     .help = "least budget that a request may ask for; auto: sink_tokens + recent_tokens"},
    {.key = "compression.may_disable", .type = OPTION_BOOL, FIELD(may_disable), .initial = "true", .commands = SERVE,
     .help = "requests may ask for no compression"},
};
// clang-format on

_Static_assert(sizeof options / sizeof *options <= CONFIG_OPTIONS_MAX, "struct config remembers where each value came from");

size_t options_count(void) { return sizeof options / sizeof *options; }

// clang-format off
const struct option_info command_options[] = {
    {.key = "bench.prompt", .flag = 'p', .type = OPTION_LIST, FIELD(bench.prompts), .initial = "512,2048", .argument = "TOKENS,...", .commands = COMMAND_BENCH,
     .help = "lengths of prompts to read; 0: none"},
    {.key = "bench.generate", .flag = 'n', .type = OPTION_COUNT, FIELD(bench.generate), .initial = "128", .min = 0, .max = 1048576, .argument = "TOKENS", .commands = COMMAND_BENCH,
     .help = "tokens to generate in each sequence; 0: none"},
    {.key = "bench.batch", .flag = 'b', .type = OPTION_LIST, FIELD(bench.batches), .initial = "1,2,4,8,16,32,64", .argument = "N,...", .commands = COMMAND_BENCH,
     .help = "sequences that generate at once"},
    {.key = "bench.context", .flag = 'd', .type = OPTION_COUNT, FIELD(bench.context), .initial = "128", .min = 0, .max = 16777216, .argument = "TOKENS", .commands = COMMAND_BENCH,
     .help = "tokens in each sequence's cache when generation starts"},
    {.key = "bench.ragged", .type = OPTION_BOOL, FIELD(bench.ragged), .initial = "false", .commands = COMMAND_BENCH,
     .help = "each KV head has lost some of that context, another share each, as compression leaves it"},
    {.key = "bench.requests", .type = OPTION_COUNT, FIELD(bench.requests), .initial = "off", .min = 0, .max = 4096, .zero = "off", .argument = "N", .commands = COMMAND_BENCH,
     .help = "instead of all that: throughput of so many requests sent at once, each a prompt of --prompt and an answer of --generate tokens, scheduled as serve does"},
    {.key = "bench.policies", .type = OPTION_LIST, FIELD(bench.policies), .initial = "none", .argument = "NAMES", .commands = COMMAND_BENCH,
     .help = "with --requests: compression policies to compare, one after the other"},
    {.key = "bench.keep", .type = OPTION_LIST, FIELD(bench.keep), .initial = "0.5", .argument = "RATIO,...", .commands = COMMAND_BENCH,
     .help = "with --requests: shares of the tokens seen that each of these policies keeps"},
    {.key = "bench.rounds", .flag = 'r', .type = OPTION_COUNT, FIELD(bench.rounds), .initial = "5", .min = 1, .max = 1000, .argument = "N", .commands = COMMAND_BENCH,
     .help = "times each row is measured, after one that is not; the median is shown"},
    {.key = "bench.json", .type = OPTION_BOOL, FIELD(bench.json), .initial = "false", .commands = COMMAND_BENCH,
     .help = "print one JSON object and nothing else"},
    {.key = "bench.phases", .type = OPTION_BOOL, FIELD(bench.phases), .initial = "false", .commands = COMMAND_BENCH,
     .help = "measure the phases of the forward pass one by one, against what memory and cores can do at most"},
    {.key = "bench.dummy", .type = OPTION_TEXT, FIELD(bench.dummy), .initial = "", .argument = "SHAPE", .commands = COMMAND_BENCH,
     .help = "random weights of this shape in place of a model"},
    {.key = "eval.text", .type = OPTION_TEXT, FIELD(eval.text), .initial = "", .argument = "FILE", .commands = COMMAND_EVAL,
     .help = "text that the model reads; empty: sentences that eval makes up"},
    {.key = "eval.policies", .type = OPTION_LIST, FIELD(eval.policies), .initial = "", .argument = "NAMES", .commands = COMMAND_EVAL,
     .help = "policies to compare, comma-separated; empty: all"},
    {.key = "eval.keep", .type = OPTION_LIST, FIELD(eval.keep), .initial = "0.5,0.25", .argument = "RATIO,...", .commands = COMMAND_EVAL,
     .help = "shares of the prompt's KV cache that stay, rounded to whole blocks"},
    {.key = "eval.windows", .type = OPTION_COUNT, FIELD(eval.windows), .initial = "4", .min = 0, .max = 100000, .argument = "N", .commands = COMMAND_EVAL,
     .help = "pieces of the text to measure, spread evenly over it, each with synthetic tasks beside it; 0: none"},
    {.key = "eval.prompt", .type = OPTION_COUNT, FIELD(eval.prompt), .initial = "auto", .min = 0, .max = 16777216, .zero = "auto", .argument = "TOKENS", .commands = COMMAND_EVAL,
     .help = "tokens read before the cache is compressed, at least 128; auto: 1024, less if the model's context is short"},
    {.key = "eval.tasks", .type = OPTION_COUNT, FIELD(eval.tasks), .initial = "2", .min = 0, .max = 1000, .argument = "N", .commands = COMMAND_EVAL,
     .help = "synthetic tasks of each kind beside each window; 0: none"},
    {.key = "eval.stream", .type = OPTION_COUNT, FIELD(eval.stream), .initial = "off", .min = 0, .max = 2147483647, .zero = "off", .argument = "TOKENS", .commands = COMMAND_EVAL,
     .help = "read that many tokens of the text in one stream as well, under streaming_llm with 1024 tokens a head"},
    {.key = "eval.streams", .type = OPTION_COUNT, FIELD(eval.streams), .initial = "1", .min = 1, .max = 1000, .argument = "N", .commands = COMMAND_EVAL,
     .help = "streams that begin evenly over the text: what is told of a window is of all of them, so that a hard page counts for less"},
    {.key = "eval.json", .type = OPTION_BOOL, FIELD(eval.json), .initial = "false", .commands = COMMAND_EVAL,
     .help = "print one JSON object and nothing else"},
    {.key = "eval.svg", .type = OPTION_TEXT, FIELD(eval.svg), .initial = "", .argument = "FILE", .commands = COMMAND_EVAL,
     .help = "draw quality against memory, and what kv_compress keeps in each head"},
    {.key = "eval.dummy", .type = OPTION_TEXT, FIELD(eval.dummy), .initial = "", .argument = "SHAPE", .commands = COMMAND_EVAL,
     .help = "random weights of this shape in place of a model"},
    {.key = "check-config.print_example", .type = OPTION_BOOL, FIELD(print_example), .initial = "false", .commands = COMMAND_CHECK,
     .help = "print a file with every setting and its default, and check nothing"},
    {.key = "check-config.print_manual", .type = OPTION_BOOL, FIELD(print_manual), .initial = "false", .commands = COMMAND_CHECK,
     .help = "print the manual page, and check nothing"},
};
// clang-format on

size_t command_options_count(void) { return sizeof command_options / sizeof *command_options; }

int option_command(const char *name) {
    static const struct {
        const char *name;
        int bit;
    } commands[] = {
        {"serve", COMMAND_SERVE}, {"bench", COMMAND_BENCH}, {"eval", COMMAND_EVAL}, {"inspect", COMMAND_INSPECT}, {"check-config", COMMAND_CHECK}};
    for (size_t i = 0; name && i < sizeof commands / sizeof *commands; i++)
        if (strcmp(name, commands[i].name) == 0) return commands[i].bit;
    return ~0;
}

/* Both tables, one after the other; NULL at the end. */
static const struct option_info *option_at(size_t index) {
    if (index < options_count()) return &options[index];
    index -= options_count();
    return index < command_options_count() ? &command_options[index] : NULL;
}

const char *option_leaf(const struct option_info *option) {
    const char *dot = strrchr(option->key, '.');
    return dot ? dot + 1 : option->key;
}

void option_flag_name(const struct option_info *option, char *name, size_t size) {
    (void)snprintf(name, size, "--%s", option_leaf(option));
    for (char *c = name; *c; c++)
        if (*c == '_') *c = '-';
}

void option_environment_name(const struct option_info *option, char *name, size_t size) {
    (void)snprintf(name, size, "KVASIR_%s", option_leaf(option));
    for (char *c = name; *c; c++) *c = (char)toupper((unsigned char)*c);
}

const struct option_info *option_by_key(const char *key) {
    for (size_t i = 0; i < options_count(); i++)
        if (strcmp(options[i].key, key) == 0) return &options[i];
    return NULL;
}

const struct option_info *option_by_flag(const char *name, size_t length, int commands) {
    const struct option_info *option, *other = NULL;
    for (size_t i = 0; (option = option_at(i)) != NULL; i++) {
        char flag[64];
        option_flag_name(option, flag, sizeof flag);
        if (strlen(flag + 2) != length || memcmp(flag + 2, name, length) != 0) continue;
        if (option->commands & commands) return option;
        if (!other) other = option;
    }
    return other;
}

const struct option_info *option_by_letter(char letter, int commands) {
    const struct option_info *option, *other = NULL;
    for (size_t i = 0; (option = option_at(i)) != NULL; i++) {
        if (!letter || option->flag != letter) continue;
        if (option->commands & commands) return option;
        if (!other) other = option;
    }
    return other;
}

#define WORD_MAX 63

/* Optimal string alignment (Damerau-Levenshtein without overlaps), three rows. */
unsigned edit_distance(const char *a, const char *b) {
    size_t n = strlen(a), m = strlen(b);
    if (n > WORD_MAX || m > WORD_MAX) return (unsigned)(n > m ? n : m);
    unsigned before[WORD_MAX + 1] = {0}, last[WORD_MAX + 1] = {0}, now[WORD_MAX + 1] = {0};
    for (size_t j = 0; j <= m; j++) last[j] = (unsigned)j;
    for (size_t i = 1; i <= n; i++) {
        now[0] = (unsigned)i;
        for (size_t j = 1; j <= m; j++) {
            unsigned best = last[j - 1] + (a[i - 1] != b[j - 1]);
            if (last[j] + 1 < best) best = last[j] + 1;
            if (now[j - 1] + 1 < best) best = now[j - 1] + 1;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && before[j - 2] + 1 < best) best = before[j - 2] + 1;
            now[j] = best;
        }
        memcpy(before, last, sizeof before);
        memcpy(last, now, sizeof last);
    }
    return last[m];
}

static void form_name(const struct option_info *option, enum option_form form, char *name, size_t size) {
    switch (form) {
    case OPTION_FORM_KEY: (void)snprintf(name, size, "%s", option->key); break;
    case OPTION_FORM_FLAG: option_flag_name(option, name, size); break;
    case OPTION_FORM_ENVIRONMENT: option_environment_name(option, name, size); break;
    }
}

void option_suggest(const char *name, enum option_form form, char *words, size_t size) {
    unsigned nearest = UINT32_MAX;
    char suggestion[64] = "";
    words[0] = '\0';
    const char *leaf = strrchr(name, '.');
    const struct option_info *option;
    size_t count = options_count() + (form == OPTION_FORM_FLAG ? command_options_count() : 0);
    for (size_t i = 0; i < count && (option = option_at(i)) != NULL; i++) {
        char known[64];
        form_name(option, form, known, sizeof known);
        unsigned distance = edit_distance(name, known);
        /* The right name in the wrong table is the likeliest slip of all. */
        if (form == OPTION_FORM_KEY && strcmp(option_leaf(option), leaf ? leaf + 1 : name) == 0) distance = 0;
        if (distance < nearest) {
            nearest = distance;
            memcpy(suggestion, known, sizeof suggestion);
        }
        char *dot = strchr(known, '.');
        if (form != OPTION_FORM_KEY || leaf || !dot) continue;
        *dot = '\0'; /* perhaps a table is meant */
        distance = edit_distance(name, known);
        if (distance < nearest) {
            nearest = distance;
            memcpy(suggestion, known, sizeof suggestion);
        }
    }
    size_t length = strlen(form == OPTION_FORM_KEY && leaf ? leaf + 1 : name);
    if (nearest <= 1 + length / 3) (void)snprintf(words, size, " (did you mean \"%s\"?)", suggestion);
}
