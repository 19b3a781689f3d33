/* A whole body to the engine's requests: parsed and tokenized (long ones on a worker), charged against every limit, submitted; or refused, now or never.
 * Loop thread, but for parse. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/random.h"
#include "server/serving.h"

/* ---- parse ---- */

static void parse(struct serving *serving) {
    struct completion *completion = &serving->completion;
    serving->parsed =
        completion_parse(completion, serving->body.bytes ? serving->body.bytes : "", serving->body.length, &serving->limits, &serving->error) &&
        completion_tokenize(completion, &serving->limits, &serving->error);
    buffer_done(&serving->body);
}

static void parse_work(uv_work_t *work) { parse(work->data); }

/* ---- what the engine needs ---- */

static int compare_tokens(const void *a, const void *b) {
    int32_t left = *(const int32_t *)a, right = *(const int32_t *)b;
    return (left > right) - (left < right);
}

/* The model's own ends and the request's. */
static void collect_stop_tokens(struct serving *serving) {
    const struct completion *completion = &serving->completion;
    const struct tokenizer *tokenizer = serving->server->model.tokenizer;
    uint32_t n_ends = completion->ignore_eos ? 0 : tokenizer_end_tokens(tokenizer, NULL, 0), n = 0;
    serving->stop_tokens = check_calloc((size_t)n_ends + completion->n_stop_tokens + 1, sizeof *serving->stop_tokens);
    if (n_ends) (void)tokenizer_end_tokens(tokenizer, serving->stop_tokens, n_ends);
    if (completion->n_stop_tokens)
        memcpy(serving->stop_tokens + n_ends, completion->stop_tokens, completion->n_stop_tokens * sizeof *completion->stop_tokens);
    uint32_t all = n_ends + completion->n_stop_tokens;
    qsort(serving->stop_tokens, all, sizeof *serving->stop_tokens, compare_tokens);
    for (uint32_t i = 0; i < all; i++)
        if (n == 0 || serving->stop_tokens[i] != serving->stop_tokens[n - 1]) serving->stop_tokens[n++] = serving->stop_tokens[i];
    serving->n_stop_tokens = n;
}

/* Prefixes are shared within a key, and with a salt within that salt: a hit must not tell one caller what another asked. */
static uint64_t cache_scope(const struct serving *serving) {
    uint8_t bytes[2 * SHA256_BYTES] = {0}, digest[SHA256_BYTES];
    uint64_t scope;
    const struct completion *completion = &serving->completion;
    if (serving->key == KEY_NONE && !completion->has_salt) return 0;
    if (serving->key != KEY_NONE) memcpy(bytes, serving->server->keys.keys[serving->key].digest, SHA256_BYTES);
    if (completion->has_salt) memcpy(bytes + SHA256_BYTES, completion->salt, SHA256_BYTES);
    sha256(bytes, sizeof bytes, digest);
    memcpy(&scope, digest, sizeof scope);
    return scope ? scope : 1;
}

static size_t n_heads_of(const struct server *server) {
    const struct memory_plan *limits = engine_limits(server->model.engine);
    return (size_t)limits->n_layers * limits->n_kv_heads;
}

static void make_job(struct serving *serving, uint32_t prompt, uint64_t now) {
    struct server *server = serving->server;
    const struct completion *completion = &serving->completion;
    const struct token_list *tokens = &completion->prompts[prompt].tokens;
    struct job *job = &serving->jobs[prompt];
    size_t room = tokens->count + completion->max_tokens;
    job->serving = serving;
    job->tokens = check_calloc(completion->best_of, sizeof *job->tokens);
    for (uint32_t j = 0; j < completion->best_of; j++) job->tokens[j] = check_calloc(room, sizeof **job->tokens);
    memcpy(job->tokens[0], tokens->tokens, tokens->count * sizeof *tokens->tokens);
    if (completion->echo && completion->logprobs >= 0) job->results = check_calloc(tokens->count, sizeof *job->results);
    job->sampling = completion->sampling;
    job->sampling.n_top = completion->logprobs;
    if (completion->best_of > completion->n && completion->logprobs < 0) job->sampling.n_top = 0; /* ranked by it */
    if (!completion->seed_given)
        job->sampling.seed = server->config.seed ? server->config.seed : random_mix(server->seed ^ random_mix(server->next_request));
    job->sampling.n_banned = serving->n_stop_tokens;
    job->sampling.banned = serving->stop_tokens;
    job->request = (struct request){
        .id = server->next_request++,
        .n_candidates = completion->best_of,
        .n_prompt = (uint32_t)tokens->count,
        .max_new = completion->max_tokens,
        .min_new = completion->min_tokens,
        .tokens = job->tokens,
        .sampling = job->sampling,
        .n_stop_tokens = serving->n_stop_tokens,
        .stop_tokens = serving->stop_tokens,
        .priority = completion->priority,
        .arrival_ns = now,
        .cache_scope = cache_scope(serving),
        .prompt_results = job->results,
        .kv = completion->kv,
        .measure_hits = serving->head_hits,
        .head_hits = serving->head_hits,
        .head_slots = serving->head_slots ? serving->head_slots + (size_t)prompt * completion->best_of * n_heads_of(server) : NULL,
        .owner = job,
    };
}

/* ---- admission ---- */

/* Room for the log-probabilities of echoed prompts. */
static bool charge_results(struct serving *serving, struct api_error *error) {
    const struct completion *completion = &serving->completion;
    size_t bytes = 0;
    if (!completion->echo || completion->logprobs < 0) return true;
    for (uint32_t i = 0; i < completion->n_prompts; i++) bytes += completion->prompts[i].tokens.count * sizeof(struct sample_result);
    if (bytes > PROMPT_RESULT_BYTES_MAX) {
        api_error_set(error, 400, "invalid_request_error", NULL, "prompt", "echo with logprobs is limited to %zu prompt tokens a request.",
                      PROMPT_RESULT_BYTES_MAX / sizeof(struct sample_result));
        return false;
    }
    if (serving->server->prompt_result_bytes + bytes > PROMPT_RESULT_BYTES_MAX) {
        api_error_set(error, 503, "server_error", "overloaded", NULL, "Too many requests with echo and logprobs at once.");
        error->retry_after_s = 2;
        return false;
    }
    serving->result_bytes = bytes;
    serving->server->prompt_result_bytes += bytes;
    return true;
}

/* Only where the cache was sized for prompts that are compressed while they are read. */
static bool cache_can_hold(struct serving *serving, struct api_error *error) {
    const struct completion *completion = &serving->completion;
    for (uint32_t i = 0; i < completion->n_prompts; i++) {
        uint32_t n_prompt = (uint32_t)completion->prompts[i].tokens.count;
        if (engine_can_hold(serving->server->model.engine, &completion->kv, n_prompt, completion->max_tokens)) continue;
        api_error_set(
            error, 400, "invalid_request_error", "context_length_exceeded", "prompt",
            "The cache does not hold %u tokens of one sequence under the policy %s; ask for fewer, or for a policy that compresses while reading.",
            n_prompt + completion->max_tokens, completion->kv.policy->name);
        return false;
    }
    return true;
}

static bool submit_all(struct serving *serving) {
    struct server *server = serving->server;
    const struct completion *completion = &serving->completion;
    serving->n_choices = completion->n_prompts * completion->best_of;
    serving->choices = check_calloc(serving->n_choices, sizeof *serving->choices);
    serving->pieces = check_calloc(completion->stream ? 1 : serving->n_choices, sizeof *serving->pieces);
    serving->jobs = check_calloc(completion->n_prompts, sizeof *serving->jobs);
    for (uint32_t i = 0; i < serving->n_choices; i++)
        choice_init(&serving->choices[i], completion, server->model.tokenizer, i / completion->best_of, i % completion->best_of);
    serving->n_unclosed = serving->n_choices;
    server->n_live += serving->n_choices;
    uint64_t now = clock_now_ns();
    if (completion->kv_wish.report) {
        size_t n_heads = n_heads_of(server);
        serving->head_slots = check_calloc(serving->n_choices * n_heads, sizeof *serving->head_slots);
        if (compression_needs_ring(&completion->kv)) serving->head_hits = check_calloc(n_heads, sizeof *serving->head_hits);
    }
    for (uint32_t p = 0; p < completion->n_prompts; p++) make_job(serving, p, now);
    for (uint32_t p = 0; p < completion->n_prompts; p++) {
        if (!engine_submit(server->model.engine, &serving->jobs[p].request)) return false;
        serving->n_unended += completion->best_of;
    }
    return true;
}

static void count_request(struct serving *serving) {
    struct metrics *metrics = &serving->server->metrics;
    const struct completion *completion = &serving->completion;
    for (uint32_t i = 0; i < completion->n_prompts; i++) {
        metrics->prompt_tokens += completion->prompts[i].tokens.count;
        histogram_observe(&metrics->histograms[METRIC_PROMPT_TOKENS], (double)completion->prompts[i].tokens.count);
    }
    histogram_observe(&metrics->histograms[METRIC_MAX_TOKENS], completion->max_tokens);
    histogram_observe(&metrics->histograms[METRIC_N], completion->n);
}

static void admit(struct serving *serving) {
    struct server *server = serving->server;
    struct api_error error = {0};
    if (serving->completion.ignored[0]) log_debug("request %s: ignored fields: %s", serving->id, serving->completion.ignored);
    if (!serving->parsed) {
        serving_fail(serving, &serving->error);
        return;
    }
    if (!server_takes_requests(server, &error) || !cache_can_hold(serving, &error) || !charge_results(serving, &error)) {
        serving_fail(serving, &error);
        return;
    }
    collect_stop_tokens(serving);
    if (!submit_all(serving)) {
        server->metrics.rejected_queue++;
        serving->rejected = true;
        api_error_set(&error, 503, "server_error", "queue_full", NULL, "Too many requests are waiting. Try again later.");
        error.retry_after_s = 1;
        serving_fail(serving, &error);
        return;
    }
    count_request(serving);
}

static void parse_done(uv_work_t *work, int status) {
    struct serving *serving = work->data;
    struct server *server = serving->server;
    (void)status;
    serving->working = false;
    if (serving->exchange) admit(serving);
    serving_release(serving);
    http_pump(server->http);
}

/* The key's own limit. */
static bool count_key(struct server *server, struct serving *serving, struct api_error *error) {
    if (serving->key == KEY_NONE) return true;
    struct key *key = &server->keys.keys[serving->key];
    if (server->config.max_requests_per_key && key->live >= server->config.max_requests_per_key) {
        server->metrics.rejected_key++;
        api_error_set(error, 429, "rate_limit_error", "rate_limit_exceeded", NULL, "This key has %u requests in flight; at most %u are allowed.",
                      key->live, server->config.max_requests_per_key);
        error->retry_after_s = 1;
        return false;
    }
    key->live++;
    serving->key_counted = true;
    return true;
}

void serving_start(struct server *server, struct exchange *exchange) {
    struct serving *serving = check_calloc(1, sizeof *serving);
    struct api_error error = {0};
    const char *id = exchange_request_id(exchange);
    uv_timeval64_t wall;
    (void)uv_gettimeofday(&wall);
    serving->server = server;
    serving->exchange = exchange;
    serving->key = exchange_key(exchange);
    serving->started_ns = exchange_started_ns(exchange);
    serving->deadline_ns = serving->started_ns + server->config.request_timeout_s * 1000000000ull;
    serving->first_byte_ns = clock_now_ns() + server->config.first_byte_timeout_s * 1000000000ull;
    serving->created = wall.tv_sec;
    serving->limits = server_limits(server);
    (void)snprintf(serving->id, sizeof serving->id, "%s%s", strncmp(id, "cmpl-", 5) == 0 ? "" : "cmpl-", id);
    serving->next = server->servings;
    if (serving->next) serving->next->previous = serving;
    server->servings = serving;
    server->n_servings++;
    exchange_own(exchange, &serving_owner, serving);
    if (!count_key(server, serving, &error)) {
        serving_fail(serving, &error);
        return;
    }
    serving->body = *exchange_body(exchange);
    *exchange_body(exchange) = (struct buffer){0};
    if (serving->body.length < WORKER_BYTES) {
        parse(serving);
        admit(serving);
        return;
    }
    serving->working = true;
    serving->work.data = serving;
    CHECK(uv_queue_work(&server->loop, &serving->work, parse_work, parse_done) == 0);
}
