/* The engine thread and its step, from letters to events. Nothing here allocates. It decides nothing about who runs (scheduler/), what a token is (kernels/), or what a client sees (server/).
 *
 * One step may run ahead: once a step is submitted, the next is planned, built and submitted for the same sequences, whose tokens the first has yet to draw (scheduler_plan_ahead,
 * backend.takes_two); then the first is waited for, committed and posted, while the device goes on with the second. Letters wait until no step is under way, so all else
 * (aborts, admission, compression, block copies) happens between steps, as if there were no such thing: whoever ends with the first step alone has a row for nothing in the second.
 *
 * Why the outbox never overflows: a step starts only while so few events wait that, with all of its own, and of the one under way, a terminal event for every live choice still fits. A choice is
 * live, for the loop's count in engine_submit, until the loop has taken the last event of its request. So tokens + terminal events <= capacity, at all times. */
#include "engine/engine.h"

#include <string.h>

#include "base/check.h"
#include "base/clock.h"
#include "engine/internal.h"
#include "kernels/kivi.h"

/* ---- events: engine thread ---- */

static void write_sample(struct sample_result *to, const struct sample_result *from) {
    CHECK(from->n_top <= SAMPLE_TOP_MAX);
    to->token = from->token;
    to->logprob = from->logprob;
    to->n_top = from->n_top;
    for (int32_t i = 0; i < from->n_top; i++) to->top[i] = from->top[i];
}

/* The choice ends with this event, and the request with that of its last. */
static void close_choice(struct engine *engine, struct request_state *state, struct choice_state *choice, const char *words, struct posted *posted) {
    struct event *event = &posted->event;
    size_t length = strnlen(words, sizeof event->error - 1);
    memcpy(event->error, words, length);
    event->error[length] = 0;
    event->preemptions = choice->preemptions;
    event->scheduled_ns = state->scheduled_ns;
    choice->over = true;
    if (--state->n_open > 0) return;
    posted->released = state->request;
    requests_remove(&engine->requests, state);
}

/* The choice's next event, with a token unless `sample` is NULL. It is written where the loop reads it, for there is one for every token. A terminal one closes the choice; nothing of
 * the request is touched after that of the last: it is the loop's. */
static void post(struct engine *engine, struct request_state *state, uint32_t choice, enum finish finish, const struct sample_result *sample,
                 const char *words) {
    const struct request *request = state->request;
    struct choice_state *mine = requests_choice(&engine->requests, state, choice);
    struct posted *posted = mailbox_blank(&engine->outbox);
    CHECK(posted && !mine->over);
    struct event *event = &posted->event;
    posted->released = NULL;
    event->id = request->id;
    event->owner = request->owner;
    event->choice = choice;
    event->finish = finish;
    event->has_token = sample != NULL;
    event->cached_tokens = mine->announced ? 0 : state->cached_tokens;
    event->preemptions = 0;
    event->scheduled_ns = 0;
    mine->announced = true;
    if (sample) write_sample(&event->sample, sample);
    if (finish != FINISH_NONE) close_choice(engine, state, mine, words, posted);
    mailbox_put_blank(&engine->outbox);
    engine->must_wake = true;
}

static void post_error(struct engine *engine, struct request_state *state, uint32_t choice, const char *words) {
    post(engine, state, choice, FINISH_ERROR, NULL, words);
}

/* Applies to one choice or all; a request whose last choice ends is gone, so whether it goes on is known before. */
static void for_choices(struct engine *engine, struct request_state *state, uint32_t choice,
                        void (*end)(struct engine *, struct request_state *, uint32_t, const char *), const char *words) {
    uint32_t first = choice == ENGINE_ALL_CHOICES ? 0 : choice, last = choice == ENGINE_ALL_CHOICES ? state->request->n_candidates : choice + 1;
    uint32_t n_open = state->n_open;
    for (uint32_t c = first; c < last && n_open > 0; c++) {
        if (requests_choice(&engine->requests, state, c)->over) continue;
        n_open--;
        end(engine, state, c, words);
    }
}

/* A choice that waits since it was preempted had no row since then: only the scheduler knows. */
static void leave_scheduler(struct engine *engine, const struct request_state *state, uint32_t choice) {
    struct choice_state *mine = requests_choice(&engine->requests, state, choice);
    uint32_t preemptions = scheduler_preemptions(engine->scheduler, state->request->id, choice);
    if (preemptions > mine->preemptions) mine->preemptions = preemptions;
    (void)scheduler_abort(engine->scheduler, state->request->id, choice);
}

static void abort_choice(struct engine *engine, struct request_state *state, uint32_t choice, const char *words) {
    const uint32_t *lane_tokens;
    uint32_t n_computed;
    (void)words;
    /* A stop string ends a choice by an abort: it has something to report too. */
    if (scheduler_lanes(engine->scheduler, state->request->id, choice, &lane_tokens, &n_computed))
        compress_report(engine, state->request, lane_tokens, 0, n_computed);
    leave_scheduler(engine, state, choice);
    post(engine, state, choice, FINISH_ABORTED, NULL, "");
}

static void fail_choice(struct engine *engine, struct request_state *state, uint32_t choice, const char *words) {
    leave_scheduler(engine, state, choice);
    post_error(engine, state, choice, words);
}

/* ---- inbox ---- */

static bool tokens_known(const struct engine *engine, const struct request *request) {
    for (uint32_t i = 0; i < request->n_prompt; i++)
        if (request->tokens[0][i] < 0 || (uint32_t)request->tokens[0][i] >= engine->n_vocab) return false;
    return true;
}

/* What a lane holds at most once the prompt is compressed, in the scheduler's terms: 0 is no bound. */
static uint32_t peak_tokens(const struct kv_plan *kv) {
    uint32_t most = compression_tokens_max(kv);
    return most == UINT32_MAX ? 0 : most;
}

/* Keys that are turned, and attention that is added up in the slots, are one sequence's alone, from the first row on. */
static bool has_own_blocks(const struct kv_plan *kv) {
    return compression_is_on(kv) && (kv->policy->shifts_sinks || kv->policy->rows == POLICY_ROWS_ALL);
}

/* A fork may wait for its first row longer than the backend keeps the residual for it. */
static bool must_reread(const struct engine *engine) { return kivi_bits(engine->plan.kv_dtype) > 0; }

static void take_submit(struct engine *engine, struct request *request) {
    struct request_state *state = requests_add(&engine->requests, request);
    if (!tokens_known(engine, request)) {
        for_choices(engine, state, ENGINE_ALL_CHOICES, post_error, "the prompt has a token id outside the vocabulary");
        return;
    }
    const struct scheduler_request asked = {.id = request->id,
                                            .owner = request,
                                            .n_candidates = request->n_candidates,
                                            .tokens = request->tokens,
                                            .n_prompt = request->n_prompt,
                                            .max_new = request->max_new,
                                            .priority = request->priority,
                                            .arrival_ns = request->arrival_ns,
                                            .cache_scope = request->cache_scope,
                                            .points = compression_points(&request->kv),
                                            .peak_tokens = peak_tokens(&request->kv),
                                            .needs_ring = compression_needs_ring(&request->kv),
                                            .private = has_own_blocks(&request->kv),
                                            .rereads = must_reread(engine),
                                            .first_needed_row = request->prompt_results ? 0 : compression_first_row(&request->kv, request->n_prompt)};
    CHECK(scheduler_add(engine->scheduler, &asked)); /* engine_submit counts to the same bound */
}

static void drain_inbox(struct engine *engine) {
    struct letter letter;
    while (mailbox_take(&engine->inbox, &letter)) {
        if (letter.kind == LETTER_SUBMIT) {
            take_submit(engine, letter.request);
            continue;
        }
        struct request_state *state = requests_find(&engine->requests, letter.id);
        if (state && (letter.choice == ENGINE_ALL_CHOICES || letter.choice < state->request->n_candidates))
            for_choices(engine, state, letter.choice, abort_choice, NULL);
    }
}

/* ---- the step ---- */

/* What the plan says about each sequence's life, before it runs. */
static void note_entries(struct engine *engine, const struct plan *plan, uint64_t now) {
    for (uint32_t e = 0; e < plan->n_entries; e++) {
        const struct plan_entry *entry = &plan->entries[e];
        struct request *request = entry->owner;
        struct request_state *state = request->state;
        struct choice_state *choice = requests_choice(&engine->requests, state, entry->choice);
        if (entry->first_run) state->scheduled_ns = now;
        if (entry->choice == 0 && choice->n_generated == 0) state->cached_tokens = entry->cached_tokens;
        choice->preemptions = entry->preemptions;
        uint32_t end = entry->first_token + entry->n_rows;
        if (end > request->n_prompt) end = request->n_prompt;
        if (entry->first_token < request->n_prompt) engine->stats.prompt_tokens += end - entry->first_token;
    }
}

static void count_rows(struct engine_stats *stats, uint32_t n_rows) {
    static const uint32_t bounds[] = {1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384};
    uint32_t b = 0;
    while (b < sizeof bounds / sizeof *bounds && n_rows > bounds[b]) b++;
    stats->step_rows_bucket[b]++;
    stats->step_rows_sum += n_rows;
}

/* Every entry one token behind the prompt: nobody reads. */
static bool only_decodes(const struct plan *plan) {
    if (plan->n_rows != plan->n_entries) return false;
    for (uint32_t e = 0; e < plan->n_entries; e++) {
        const struct plan_entry *entry = &plan->entries[e];
        const struct request *request = entry->owner;
        if (entry->first_token < request->n_prompt || entry->n_samples == 0) return false;
    }
    return true;
}

static void count_time(struct engine *engine, bool decodes, uint32_t n_rows, uint32_t blocks_used, uint64_t elapsed_ns) {
    struct engine_stats *stats = &engine->stats;
    uint64_t waited = stats->wait_ns - engine->counted_wait_ns;
    engine->counted_wait_ns = stats->wait_ns;
    stats->busy_ns += elapsed_ns;
    if (!decodes) {
        stats->reading_steps++;
        stats->reading_ns += elapsed_ns;
        return;
    }
    stats->decode_steps++;
    stats->decode_ns += elapsed_ns;
    stats->decode_wait_ns += waited;
    stats->decode_rows += n_rows;
    if (n_rows > stats->decode_rows_max) stats->decode_rows_max = n_rows;
    stats->decode_blocks += blocks_used;
}

/* Its choice ended with the step before, while this one ran ahead. The request may be gone: neither state nor owner is looked at. */
static bool is_for_nothing(const struct flight *flight, const struct draw *draw) { return flight->plan->entries[draw->entry].over; }

static enum finish finish_of(const struct request *request, const struct choice_state *choice, int32_t token) {
    uint32_t n_generated = choice->n_generated + 1;
    if (choice->n_generated >= request->min_new)
        for (uint32_t i = 0; i < request->n_stop_tokens; i++)
            if (request->stop_tokens[i] == token) return FINISH_STOP;
    return n_generated >= request->max_new ? FINISH_LENGTH : FINISH_NONE;
}

static void report_end(struct engine *engine, const struct plan *plan, const struct plan_entry *entry) {
    compress_report(engine, entry->owner, entry->lane_tokens, plan->advanced ? 0 : entry->n_rows, entry->first_token + entry->n_rows);
}

/* Results to where they belong: prompt log-probabilities, tokens, who is over. */
static void take_results(struct engine *engine, struct flight *flight) {
    const struct plan *plan = flight->plan;
    struct batch_builder *builder = &flight->builder;
    for (uint32_t e = 0; e < plan->n_entries; e++) {
        struct request *request = plan->entries[e].owner;
        if (builder->n_targets[e] == 0) continue;
        memcpy(&request->prompt_results[request->state->prompt_results_next], &builder->results[builder->first_target[e]],
               builder->n_targets[e] * sizeof *builder->results);
        request->state->prompt_results_next += builder->n_targets[e];
    }
    for (uint32_t i = 0; i < builder->n_draws; i++) {
        const struct draw *draw = &builder->draws[i];
        builder->finishes[i] = FINISH_NONE;
        builder->ended[i] = true;
        if (is_for_nothing(flight, draw)) {
            engine->stats.rows_for_nothing++;
            continue;
        }
        struct request *request = draw->state->request;
        struct choice_state *choice = requests_choice(&engine->requests, draw->state, draw->choice);
        int32_t token = builder->results[draw->result].token;
        CHECK(token >= 0 && (uint32_t)token < engine->n_vocab);
        if (choice->over) continue; /* aborted before it forked */
        request->tokens[draw->choice][draw->n_tokens] = token;
        builder->finishes[i] = finish_of(request, choice, token);
        builder->ended[i] = builder->finishes[i] == FINISH_STOP;
        if (builder->finishes[i] != FINISH_NONE) report_end(engine, plan, &plan->entries[draw->entry]);
        choice->n_generated++;
    }
}

/* A prompt that is read and wants nothing more. */
static bool is_finished_prompt(const struct plan_entry *entry) {
    /* Of all that reach their last token it alone asks for no sample. The request itself is not looked at: an entry before may have ended it, and then it is the loop's. */
    return entry->n_samples == 0 && entry->first_token + entry->n_rows == entry->n_tokens;
}

static void report_prompts(struct engine *engine, const struct plan *plan) {
    for (uint32_t e = 0; e < plan->n_entries; e++)
        if (is_finished_prompt(&plan->entries[e])) report_end(engine, plan, &plan->entries[e]);
}

static void post_finished_prompts(struct engine *engine, const struct plan *plan) {
    for (uint32_t e = 0; e < plan->n_entries; e++) {
        const struct plan_entry *entry = &plan->entries[e];
        if (!is_finished_prompt(entry)) continue;
        struct request_state *state = ((struct request *)entry->owner)->state;
        for (uint32_t c = 0, n = state->n_open; n > 0; c++)
            if (!requests_choice(&engine->requests, state, c)->over) {
                n--;
                post(engine, state, c, FINISH_LENGTH, NULL, "");
            }
    }
}

static void post_results(struct engine *engine, const struct flight *flight) {
    const struct batch_builder *builder = &flight->builder;
    for (uint32_t i = 0; i < builder->n_draws; i++) {
        const struct draw *draw = &builder->draws[i];
        if (builder->ended[i] && builder->finishes[i] != FINISH_STOP) continue; /* was over before */
        engine->stats.generation_tokens++;
        post(engine, draw->state, draw->choice, builder->finishes[i], &builder->results[draw->result], "");
    }
    if (!flight->decodes) post_finished_prompts(engine, flight->plan);
}

/* The backend failed: what it left in the blocks of this step is unknown. The choices that ran end, all of a request whose prompt was being read, and the prefix cache lets go of
 * everything, as it may have taken over such blocks. */
static void fail_step(struct engine *engine, struct flight *flight) {
    const struct plan *plan = flight->plan;
    struct batch_builder *builder = &flight->builder;
    for (uint32_t i = 0; i < builder->n_draws; i++) {
        const struct draw *draw = &builder->draws[i];
        builder->ended[i] = true;
        if (is_for_nothing(flight, draw)) continue;
        if (!requests_choice(&engine->requests, draw->state, draw->choice)->over) draw->state->request->tokens[draw->choice][draw->n_tokens] = 0;
    }
    scheduler_commit(engine->scheduler, builder->ended);
    for (uint32_t e = 0; e < plan->n_entries; e++) {
        const struct plan_entry *entry = &plan->entries[e];
        struct request_state *state = requests_find(&engine->requests, entry->request_id); /* NULL: ended with an entry before */
        if (state)
            for_choices(engine, state, entry->n_tokens > state->request->n_prompt ? entry->choice : ENGINE_ALL_CHOICES, fail_choice,
                        flight->error.text);
    }
    scheduler_drop_prefix_cache(engine->scheduler);
}

static bool outbox_has_room(struct engine *engine, uint32_t n_events) {
    return mailbox_room(&engine->outbox) >= (size_t)engine->plan.max_choices + n_events;
}

/* `before`: the step that its tokens are drawn by, if it runs ahead; else NULL. */
static void build(struct engine *engine, struct flight *flight, const struct flight *before, const struct plan *plan) {
    flight->plan = plan;
    batch_build(&flight->builder, before ? &before->builder : NULL, &engine->requests, plan);
    count_rows(&engine->stats, plan->n_rows);
    flight->decodes = only_decodes(plan); /* while the requests are the engine's */
    flight->n_rows = plan->n_rows;
    flight->blocks_used = scheduler_blocks_used(engine->scheduler);
    flight->error = (struct error){.text = ""};
}

static void submit(struct engine *engine, struct flight *flight) {
    flight->status = engine->backend->ops->submit(engine->backend, &flight->builder.batch, &flight->error);
}

/* false: there is nothing to do. */
static bool begin_step(struct engine *engine) {
    struct flight *flight = &engine->flights[engine->current];
    compress_step(engine);
    uint64_t start = engine->counted_ns = clock_now_ns();
    const struct plan *plan = scheduler_plan(engine->scheduler, start);
    if (plan->n_copies > 0) engine->backend->ops->copy_blocks(engine->backend, plan->n_copies, plan->copy_source, plan->copy_destination);
    if (plan->n_entries == 0) return false;
    if (engine->rested) engine->stats.decode_rows_max = 0;
    note_entries(engine, plan, start);
    build(engine, flight, NULL, plan);
    flight->schedule_ns = clock_now_ns() - start;
    submit(engine, flight);
    return true;
}

/* What a step ahead could not wait for: letters, the end, a place for its events, the pressure that compress_step relieves, a history whose last token is yet to be drawn. The rest is
 * the scheduler's to say. */
static bool may_run_ahead(struct engine *engine, const struct flight *before) {
    return engine->runs_ahead && before->status == STATUS_OK && before->decodes && !before->builder.penalizes &&
           mailbox_waiting(&engine->inbox) == 0 && !atomic_load(&engine->stop) && engine->requests.n_pressed == 0 && !engine->compress.pressing &&
           outbox_has_room(engine, 2 * before->builder.n_draws);
}

static void run_ahead(struct engine *engine) {
    const struct flight *before = &engine->flights[engine->current];
    struct flight *flight = &engine->flights[engine->current ^ 1];
    if (!may_run_ahead(engine, before)) return;
    uint64_t start = clock_now_ns();
    const struct plan *plan = scheduler_plan_ahead(engine->scheduler);
    if (plan) build(engine, flight, before, plan);
    flight->schedule_ns = clock_now_ns() - start;
    if (!plan) {
        engine->stats.schedule_ns += flight->schedule_ns;
        return;
    }
    submit(engine, flight);
    engine->stats.steps_ahead++;
    engine->is_ahead = true;
}

/* What the device can do behind the step in flight: the next one, or else the choices that compression will ask for. */
static void go_ahead(struct engine *engine) {
    run_ahead(engine);
    if (engine->runs_ahead && !engine->is_ahead && engine->flights[engine->current].status == STATUS_OK) compress_behind(engine);
}

static void end_step(struct engine *engine) {
    struct flight *flight = &engine->flights[engine->current];
    if (flight->status == STATUS_OK) flight->status = engine->backend->ops->sync(engine->backend, flight->builder.results, &flight->error);
    uint64_t synced = clock_now_ns();
    if (flight->status == STATUS_OK) {
        take_results(engine, flight);
        if (!flight->decodes) report_prompts(engine, flight->plan);
        scheduler_commit(engine->scheduler, flight->builder.ended);
        post_results(engine, flight);
    } else {
        fail_step(engine, flight);
    }
    uint64_t end = clock_now_ns(), elapsed = end - engine->counted_ns;
    engine->counted_ns = end;
    flight->schedule_ns += end - synced;
    engine->stats.schedule_ns += flight->schedule_ns;
    if (flight->decodes && flight->schedule_ns > engine->stats.schedule_ns_max) engine->stats.schedule_ns_max = flight->schedule_ns;
    engine->rested = !engine->requests.oldest;
    count_time(engine, flight->decodes, flight->n_rows, flight->blocks_used, elapsed);
    /* A step with another one behind it reads no prompt: nothing is learnt from it. */
    if (engine->times_steps && flight->status == STATUS_OK && !engine->is_ahead) scheduler_took(engine->scheduler, (double)elapsed / 1000);
}

/* false: there is nothing to do. */
static bool step(struct engine *engine) {
    if (!engine->is_ahead && !begin_step(engine)) return false;
    engine->is_ahead = false;
    go_ahead(engine);
    end_step(engine);
    engine->current ^= 1;
    return true;
}

/* ---- the thread ---- */

void engine_publish(struct engine *engine) {
    struct engine_stats *stats = &engine->stats;
    struct scheduler_stats now;
    scheduler_stats(engine->scheduler, &now);
    stats->running = now.running;
    stats->waiting = now.waiting;
    stats->blocks_total = now.blocks_total;
    stats->blocks_used = now.blocks_used;
    stats->blocks_cached = now.blocks_cached;
    stats->block_bytes = engine->plan.block_bytes;
    stats->steps = now.steps;
    stats->preemptions = now.preemptions;
    stats->forks = now.forks;
    stats->blocks_copied = now.blocks_copied;
    stats->chunks = now.chunks;
    stats->cost_ratio = now.cost_ratio;
    stats->prefix_queries = now.prefix_queries;
    stats->prefix_hits = now.prefix_hits;
    stats->prefix_partial_hits = now.prefix_partial_hits;
    stats->prefix_evictions = now.prefix_evictions;
    stats->kv_blocks_freed = now.blocks_freed;
    stats->admissions_by_compression = now.admissions_by_compression;
    publisher_write(&engine->publisher, stats);
}

/* Until a letter comes, the engine is stopped, or (if that is what it waits for) events were taken. */
static void sleep_until_rung(struct engine *engine, bool wants_room) {
    uint32_t ticket = bell_begin(&engine->bell, wants_room);
    bool news = mailbox_waiting(&engine->inbox) > 0 || atomic_load(&engine->stop) || (wants_room && outbox_has_room(engine, engine->sizes.draws));
    if (!news) bell_wait(&engine->bell, ticket);
    atomic_store_explicit(&engine->progress_ns, clock_now_ns(), memory_order_relaxed);
    bell_end(&engine->bell);
}

void engine_serve(struct engine *engine) {
    for (bool stop = false; !stop;) {
        if (!engine->is_ahead) {
            stop = atomic_load(&engine->stop); /* before the inbox: what was submitted before the stop is seen */
            drain_inbox(engine);
            while (stop && engine->requests.oldest) for_choices(engine, engine->requests.oldest, ENGINE_ALL_CHOICES, abort_choice, NULL);
        }
        bool has_room = engine->is_ahead || outbox_has_room(engine, engine->sizes.draws), stepped = !stop && has_room && step(engine);
        engine_publish(engine);
        atomic_store_explicit(&engine->progress_ns, clock_now_ns(), memory_order_relaxed);
        if (engine->must_wake && engine->hooks.wake) engine->hooks.wake(engine->hooks.context);
        engine->must_wake = false;
        if (!stepped && !stop) sleep_until_rung(engine, !has_room);
    }
}
