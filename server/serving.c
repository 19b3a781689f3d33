/* One request for a completion, from its body to its answer: parse (a worker for long bodies), admission, the engine's events, the answer or the stream, and every way of ending
 * early. Owns a struct serving until the exchange has ended AND the engine has given the last choice's terminal event. Loop thread, but for parse_work.
 * Text and stops are choice.c's, JSON is completion_write.c's. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/random.h"
#include "server/serving.h"

#define CHUNK_BYTES 32768 /* produce stops after so much: other streams get their turn */

static struct answer_head head_of(const struct serving *serving) {
    return (struct answer_head){.id = serving->id,
                                .model = serving->server->model.served_name,
                                .fingerprint = serving->server->fingerprint,
                                .created = serving->created,
                                .completion = &serving->completion,
                                .tokenizer = serving->server->model.tokenizer};
}

/* ---- the end ---- */

/* The key may ask for something else: its answer is given, be it that the engine has yet to hear of it (a stop string, a timeout). */
static void uncount_key(struct serving *serving) {
    if (serving->key_counted) serving->server->keys.keys[serving->key].live--;
    serving->key_counted = false;
}

void serving_release(struct serving *serving) {
    struct server *server = serving->server;
    if (serving->exchange || serving->working || serving->n_unended) return;
    if (serving->previous)
        serving->previous->next = serving->next;
    else
        server->servings = serving->next;
    if (serving->next) serving->next->previous = serving->previous;
    server->n_servings--;
    uncount_key(serving);
    server->prompt_result_bytes -= serving->result_bytes;
    for (uint32_t i = 0; i < serving->n_choices; i++) choice_done(&serving->choices[i]);
    for (uint32_t i = 0; serving->jobs && i < serving->completion.n_prompts; i++) {
        struct job *job = &serving->jobs[i];
        for (uint32_t j = 0; job->tokens && j < serving->completion.best_of; j++) free(job->tokens[j]);
        free(job->tokens);
        free(job->results);
    }
    free(serving->jobs);
    free(serving->choices);
    free(serving->stop_tokens);
    free(serving->head_hits);
    free(serving->head_slots);
    for (uint32_t i = 0; serving->pieces && i < (serving->completion.stream ? 1 : serving->n_choices); i++) piece_done(&serving->pieces[i]);
    free(serving->pieces);
    completion_done(&serving->completion);
    buffer_done(&serving->body);
    free(serving);
}

/* The client has seen, or will not see, this choice's end: it counts as live no more. */
static void unclose(struct serving *serving, struct choice *choice) {
    struct server *server = serving->server;
    struct metrics *metrics = &server->metrics;
    serving->n_unclosed--;
    server->n_live--;
    uint64_t now = clock_now_ns();
    if (choice->finish_reason) {
        metrics->finishes[choice->finish_reason[0] == 's' ? METRIC_STOP : METRIC_LENGTH]++;
        histogram_observe(&metrics->histograms[METRIC_END_TO_END], (double)(now - serving->started_ns) / 1e9);
        histogram_observe(&metrics->histograms[METRIC_GENERATION_TOKENS], choice->n_tokens);
    } else if (!serving->rejected) {
        metrics->finishes[choice->finish == FINISH_ERROR ? METRIC_ERROR : METRIC_ABORT]++;
    }
}

/* Ends what the engine still does for this request: it waits for nothing more, and counts against the queue no more. */
static void abort_jobs(struct serving *serving) {
    for (uint32_t i = 0; serving->jobs && i < serving->completion.n_prompts; i++)
        engine_abort(serving->server->model.engine, &serving->jobs[i].request, ENGINE_ALL_CHOICES);
}

static void abort_choices(struct serving *serving) {
    for (uint32_t i = 0; i < serving->n_choices; i++) {
        struct choice *choice = &serving->choices[i];
        if (choice->closed) continue;
        choice->closed = true;
        unclose(serving, choice);
    }
    abort_jobs(serving);
}

/* For the access log. */
static void note(struct serving *serving) {
    uint64_t prompt = 0, generated = 0, cached = 0, preemptions = 0;
    char words[320], finish[16] = "-";
    if (!serving->parsed || !serving->exchange) return;
    for (uint32_t i = 0; i < serving->completion.n_prompts; i++) prompt += serving->completion.prompts[i].tokens.count;
    for (uint32_t i = 0; i < serving->n_choices; i++) {
        const struct choice *choice = &serving->choices[i];
        generated += choice->n_events;
        preemptions += choice->preemptions;
        if (choice->candidate == 0) cached += choice->cached;
        (void)snprintf(finish, sizeof finish, "%s",
                       choice->finish_reason            ? choice->finish_reason
                       : choice->finish == FINISH_ERROR ? "error"
                                                        : "abort");
    }
    uint64_t now = clock_now_ns();
    double first = serving->first_token_ns ? (double)(serving->first_token_ns - serving->started_ns) / 1e6 : 0;
    double decode = serving->first_token_ns ? (double)(now - serving->first_token_ns) / 1e9 : 0;
    (void)snprintf(words, sizeof words,
                   "prompt=%" PRIu64 " cached=%" PRIu64 " tokens=%" PRIu64 " choices=%u ttft_ms=%.1f tok_s=%.1f preemptions=%" PRIu64 " finish=%s",
                   prompt, cached, generated, serving->n_choices, first, decode > 0 ? (double)generated / decode : 0.0, preemptions, finish);
    exchange_note(serving->exchange, words);
}

static void on_gone(void *owner) {
    struct serving *serving = owner;
    note(serving);
    serving->exchange = NULL;
    if (!serving->ended) serving->server->metrics.client_gone++;
    abort_choices(serving);
    serving_release(serving);
}

static void on_complete(void *owner) {
    struct serving *serving = owner;
    serving->exchange = NULL;
    serving_release(serving);
}

/* An answer other than the one that was asked for. Before the 200: an HTTP error; after it: an event. */
void serving_fail(struct serving *serving, const struct api_error *error) {
    struct exchange *exchange = serving->exchange;
    note(serving);
    abort_choices(serving);
    if (!exchange || serving->ended) return;
    serving->ended = true;
    uncount_key(serving);
    if (serving->answered) {
        serving->failed = true;
        serving->error = *error;
        exchange_wake(exchange);
        return;
    }
    serving->answered = true;
    reply_error(exchange, error);
}

/* ---- the answer ---- */

static struct usage usage_of(const struct serving *serving, bool shown_only) {
    struct usage usage = {0};
    for (uint32_t i = 0; i < serving->completion.n_prompts; i++) usage.prompt_tokens += serving->completion.prompts[i].tokens.count;
    for (uint32_t i = 0; i < serving->n_choices; i++) {
        const struct choice *choice = &serving->choices[i];
        if (choice->candidate == 0) usage.cached_tokens += choice->cached;
        if (!shown_only) usage.completion_tokens += choice->n_tokens;
    }
    return usage;
}

static void echo(struct serving *serving, struct choice *choice, struct piece *piece) {
    const struct job *job = &serving->jobs[choice->prompt];
    if (serving->completion.echo && !choice->echoed) choice_echo(choice, job->results, piece);
}

/* A candidate among those of its prompt. */
struct shown {
    struct choice *choice;
    struct piece *piece;
};

static int by_mean(const void *a, const void *b) {
    const struct shown *left = a, *right = b;
    double x = choice_mean_logprob(left->choice), y = choice_mean_logprob(right->choice);
    if (x != y) return x > y ? -1 : 1;
    return (left->choice > right->choice) - (left->choice < right->choice); /* the earlier candidate */
}

/* Every choice is said, and (if a report is asked for, which the engine completes with its last event) the engine is done. */
static bool is_complete(const struct serving *serving) {
    return serving->n_unclosed == 0 && (serving->n_unended == 0 || !serving->completion.kv_wish.report);
}

/* How many heads of all choices have at most so many slots. */
static uint64_t heads_up_to(const struct serving *serving, uint32_t n_heads, uint32_t slots) {
    uint64_t n = 0;
    for (uint32_t p = 0; p < serving->completion.n_prompts; p++) {
        const struct request *request = &serving->jobs[p].request;
        for (size_t i = 0; i < (size_t)request->kv_report.n_choices * n_heads; i++) n += request->head_slots[i] <= slots;
    }
    return n;
}

/* The least count that more than half of the heads do not exceed. */
static uint32_t median_of(const struct serving *serving, uint32_t n_heads, const struct kv_report *report) {
    uint64_t all = heads_up_to(serving, n_heads, report->head_max);
    uint32_t low = report->head_min, high = report->head_max;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (heads_up_to(serving, n_heads, middle) > all / 2)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

static const struct kv_answer *kv_of(const struct serving *serving, struct kv_answer *answer) {
    if (!serving->completion.kv_wish.report) return NULL;
    *answer = (struct kv_answer){.policy = serving->completion.kv.policy->name};
    struct kv_report *sum = &answer->report;
    for (uint32_t p = 0; p < serving->completion.n_prompts; p++) {
        const struct kv_report *one = &serving->jobs[p].request.kv_report;
        if (one->n_choices && (sum->n_choices == 0 || one->head_min < sum->head_min)) sum->head_min = one->head_min;
        if (one->head_max > sum->head_max) sum->head_max = one->head_max;
        sum->n_choices += one->n_choices;
        sum->tokens_seen += one->tokens_seen;
        sum->slots_kept += one->slots_kept;
        sum->slots_evicted += one->slots_evicted;
        sum->blocks += one->blocks;
        sum->hits_kept += one->hits_kept;
        sum->hits_all += one->hits_all;
        sum->pressure_compressions += one->pressure_compressions;
    }
    const struct memory_plan *limits = engine_limits(serving->server->model.engine);
    answer->bytes = sum->blocks * limits->block_bytes;
    answer->head_median = median_of(serving, limits->n_layers * limits->n_kv_heads, sum);
    if (sum->hits_all > 0) answer->hits = serving->head_hits;
    answer->n_layers = limits->n_layers;
    answer->n_kv_heads = limits->n_kv_heads;
    return answer;
}

static void answer_whole(struct serving *serving) {
    const struct completion *completion = &serving->completion;
    struct answer_head head = head_of(serving);
    struct buffer body = {0};
    struct json_writer json;
    struct usage usage = usage_of(serving, true);
    struct shown *order = check_calloc(completion->best_of, sizeof *order);
    write_answer_begin(&json, &head, &body);
    for (uint32_t p = 0; p < completion->n_prompts; p++) {
        for (uint32_t j = 0; j < completion->best_of; j++)
            order[j] = (struct shown){&serving->choices[p * completion->best_of + j], &serving->pieces[p * completion->best_of + j]};
        if (completion->best_of > completion->n) qsort(order, completion->best_of, sizeof *order, by_mean);
        for (uint32_t j = 0; j < completion->n; j++) {
            write_answer_choice(&json, &head, p * completion->n + j, order[j].choice, order[j].piece);
            usage.completion_tokens += order[j].choice->n_tokens;
        }
    }
    struct kv_answer kv;
    write_answer_end(&json, &head, &usage, kv_of(serving, &kv));
    free(order);
    note(serving);
    serving->answered = serving->ended = true;
    uncount_key(serving);
    reply_json(serving->exchange, 200, &body);
}

/* ---- streams ---- */

static void close_if_done(struct serving *serving, struct choice *choice) {
    if (!choice->closed) return;
    unclose(serving, choice);
    if (serving->n_unclosed == 0)
        abort_jobs(serving);
    else if (!choice->ended)
        engine_abort(serving->server->model.engine, &serving->jobs[choice->prompt].request, choice->candidate);
}

/* Counted as usage counts: what a stop string dropped is not. */
static void advance(struct serving *serving, struct choice *choice, struct piece *piece) {
    uint32_t before = choice->n_tokens;
    choice_next(choice, piece);
    serving->server->metrics.generation_tokens += choice->n_tokens - before;
}

/* One token as one chunk, unless nothing of it can be said yet. */
static void produce_token(struct serving *serving, struct choice *choice, struct buffer *out) {
    struct answer_head head = head_of(serving);
    struct piece *piece = &serving->pieces[0];
    const struct completion *completion = &serving->completion;
    bool first = choice->n_tokens == 0;
    piece_clear(piece);
    echo(serving, choice, piece);
    advance(serving, choice, piece);
    close_if_done(serving, choice);
    bool silent = piece->text.length == 0 && !choice->closed && completion->logprobs < 0 && !completion->return_token_ids;
    if (silent) return;
    struct usage usage;
    if (completion->continuous_usage) usage = usage_of(serving, false);
    write_chunk(out, &head, choice->prompt * completion->n + choice->candidate, choice, piece, first, completion->continuous_usage ? &usage : NULL);
}

static enum produced produce(void *owner, struct buffer *out) {
    struct serving *serving = owner;
    if (serving->done_sent) return PRODUCED_END;
    for (uint32_t i = 0; i < serving->n_choices && !serving->failed && out->length < CHUNK_BYTES; i++) {
        struct choice *choice = &serving->choices[(serving->next_choice + i) % serving->n_choices];
        while (choice_ready(choice) && out->length < CHUNK_BYTES) produce_token(serving, choice, out);
    }
    if (serving->n_choices) serving->next_choice = (serving->next_choice + 1) % serving->n_choices;
    if (serving->failed) {
        write_error_chunk(out, &serving->error);
    } else if (is_complete(serving)) {
        struct answer_head head = head_of(serving);
        struct usage usage = usage_of(serving, false);
        struct kv_answer kv;
        if (serving->completion.include_usage || serving->completion.kv_wish.report)
            write_last_chunk(out, &head, serving->completion.include_usage ? &usage : NULL, kv_of(serving, &kv));
    }
    if (serving->failed || is_complete(serving)) {
        note(serving);
        serving->ended = serving->done_sent = true;
        uncount_key(serving);
        write_done(out);
    } else if (out->length == 0 && serving->heartbeat) {
        write_heartbeat(out);
    }
    serving->heartbeat = false;
    if (out->length) serving->written_ns = clock_now_ns();
    return out->length ? PRODUCED : PRODUCED_NONE;
}

const struct exchange_owner serving_owner = {.gone = on_gone, .produce = produce, .complete = on_complete};

static void begin_stream(struct serving *serving) {
    if (serving->answered || !serving->exchange) return;
    serving->answered = true;
    serving->written_ns = clock_now_ns();
    exchange_stream(serving->exchange, "text/event-stream");
}

/* ---- the engine's events ---- */

static void observe(struct serving *serving, struct choice *choice, const struct event *event, uint64_t last_ns) {
    struct metrics *metrics = &serving->server->metrics;
    if (event->has_token) {
        if (choice->n_events == 1) {
            if (!serving->first_token_ns) serving->first_token_ns = choice->first_ns;
            histogram_observe(&metrics->histograms[METRIC_TIME_TO_FIRST_TOKEN], (double)(choice->first_ns - serving->started_ns) / 1e9);
        } else {
            histogram_observe(&metrics->histograms[METRIC_INTER_TOKEN], (double)(choice->last_ns - last_ns) / 1e9);
        }
    }
    if (event->finish == FINISH_NONE || !event->scheduled_ns) return;
    uint64_t arrival = serving->jobs[choice->prompt].request.arrival_ns;
    histogram_observe(&metrics->histograms[METRIC_QUEUE], event->scheduled_ns > arrival ? (double)(event->scheduled_ns - arrival) / 1e9 : 0);
    if (choice->n_events == 0 || choice->first_ns < event->scheduled_ns) return;
    histogram_observe(&metrics->histograms[METRIC_PREFILL], (double)(choice->first_ns - event->scheduled_ns) / 1e9);
    histogram_observe(&metrics->histograms[METRIC_DECODE], (double)(choice->last_ns - choice->first_ns) / 1e9);
    histogram_observe(&metrics->histograms[METRIC_INFERENCE], (double)(choice->last_ns - event->scheduled_ns) / 1e9);
}

static void engine_gave_up(struct serving *serving) {
    struct api_error error;
    api_error_set(&error, 503, "server_error", "aborted", NULL, "The request was ended by the server.");
    error.retry_after_s = 1;
    serving_fail(serving, &error);
}

static void engine_failed(struct serving *serving, const struct event *event) {
    struct api_error error;
    log_error("request %s: %s", serving->id, event->error);
    api_error_set(&error, 500, "server_error", "engine_error", NULL, "The engine failed while working on this request.");
    serving_fail(serving, &error);
}

static void take_event(const struct event *event, struct serving **dirty) {
    struct job *job = event->owner;
    struct serving *serving = job->serving;
    CHECK(event->choice < serving->completion.best_of);
    struct choice *choice = &serving->choices[(uint32_t)(job - serving->jobs) * serving->completion.best_of + event->choice];
    uint64_t last_ns = choice->last_ns;
    CHECK(!choice->ended);
    if (!choice->seen && choice->candidate == 0) serving->server->metrics.cached_tokens += event->cached_tokens;
    choice_take(choice, event);
    observe(serving, choice, event, last_ns);
    if (choice->ended) serving->n_unended--;
    if (serving->exchange && !serving->ended && !choice->closed) {
        if (event->finish == FINISH_ERROR) engine_failed(serving, event);
        if (event->finish == FINISH_ABORTED) engine_gave_up(serving);
    }
    if (serving->dirty) return;
    serving->dirty = true;
    serving->next_dirty = *dirty;
    *dirty = serving;
}

/* Renders what came, and answers once every choice is closed. */
static void progress_whole(struct serving *serving) {
    for (uint32_t i = 0; i < serving->n_choices; i++) {
        struct choice *choice = &serving->choices[i];
        if (!choice_ready(choice)) continue;
        echo(serving, choice, &serving->pieces[i]);
        while (choice_ready(choice)) advance(serving, choice, &serving->pieces[i]);
        close_if_done(serving, choice);
    }
    if (is_complete(serving)) answer_whole(serving);
}

void serving_poll(struct server *server) {
    struct serving *dirty = NULL;
    struct event event;
    if (!server->model.engine) return;
    while (engine_poll(server->model.engine, &event)) take_event(&event, &dirty);
    if (!dirty) return;
    /* One wake-up a stream, however many of its choices spoke. */
    for (struct serving *serving = dirty, *next; serving; serving = next) {
        next = serving->next_dirty;
        serving->dirty = false;
        if (serving->exchange && !serving->ended) {
            if (!serving->completion.stream) {
                progress_whole(serving);
            } else {
                begin_stream(serving);
                exchange_wake(serving->exchange);
            }
        }
        serving_release(serving);
    }
    http_pump(server->http);
}

/* ---- time ---- */

static void timed_out(struct serving *serving) {
    struct api_error error;
    serving->server->metrics.timeouts++;
    api_error_set(&error, 504, "server_error", "request_timeout", NULL, "The request lived longer than %u s.",
                  serving->server->config.request_timeout_s);
    error.no_retry = true;
    serving_fail(serving, &error);
}

void serving_tick(struct server *server, uint64_t now) {
    uint64_t heartbeat = server->config.heartbeat_s * 1000000000ull;
    bool pump = false;
    for (struct serving *serving = server->servings, *next; serving; serving = next) {
        next = serving->next;
        if (!serving->exchange || serving->working || serving->ended) continue;
        if (now >= serving->deadline_ns) {
            timed_out(serving);
            pump = true;
        } else if (serving->completion.stream && !serving->answered && now >= serving->first_byte_ns) {
            begin_stream(serving);
            pump = true;
        } else if (serving->completion.stream && serving->answered && heartbeat && now - serving->written_ns >= heartbeat) {
            serving->heartbeat = true;
            serving->written_ns = now;
            exchange_wake(serving->exchange);
            pump = true;
        }
    }
    if (pump) http_pump(server->http);
}

void serving_abort_all(struct server *server) {
    struct api_error error;
    api_error_set(&error, 503, "server_error", "shutting_down", NULL, "The server is shutting down.");
    error.retry_after_s = 5;
    for (struct serving *serving = server->servings, *next; serving; serving = next) {
        next = serving->next;
        if (serving->exchange && !serving->working && !serving->ended) serving_fail(serving, &error);
    }
    http_pump(server->http);
}
