/* Making, adding, aborting, counting: scheduler.h's verbs around the plan. See internal.h for the states. */
#include <stdlib.h>
#include <string.h>

#include "base/random.h"
#include "scheduler/internal.h"

struct scheduler *scheduler_new(const struct scheduler_limits *limits) {
    struct scheduler *s = check_calloc(1, sizeof *s);
    s->limits = *limits;
    CHECK(limits->max_choices >= 1 && limits->max_sequences >= 1 && limits->max_rows >= 1 && limits->max_samples >= 1 && limits->n_lanes >= 1);
    s->blocks_max = blocks_for(limits->max_model_len) + 1;
    size_t lane_blocks = (size_t)limits->n_lanes * s->blocks_max;
    block_pool_init(&s->pool, limits->n_blocks, limits->extent_blocks);
    block_tables_init(&s->tables, &s->pool, limits->max_sequences, limits->n_lanes, s->blocks_max);
    prefix_cache_init(&s->cache, &s->pool, limits->n_lanes, limits->prefix_cache ? limits->n_blocks / limits->n_lanes : 0, limits->hash_seed);
    s->requests = check_calloc(limits->max_choices, sizeof *s->requests);
    s->choices = check_calloc(limits->max_choices, sizeof *s->choices);
    s->running = check_calloc(limits->max_sequences, sizeof *s->running);
    s->waiting = check_calloc(limits->max_choices, sizeof *s->waiting);
    s->free_tables = check_calloc(limits->max_sequences, sizeof *s->free_tables);
    s->free_rings = check_calloc(limits->n_rings ? limits->n_rings : 1, sizeof *s->free_rings);
    s->copy_source = check_calloc((size_t)limits->max_sequences * limits->n_lanes, sizeof *s->copy_source);
    s->copy_destination = check_calloc((size_t)limits->max_sequences * limits->n_lanes, sizeof *s->copy_destination);
    s->entries = check_calloc(limits->max_sequences, sizeof *s->entries);
    s->entry_choice = check_calloc(limits->max_sequences, sizeof *s->entry_choice);
    s->moves = check_calloc(limits->n_lanes, sizeof *s->moves);
    s->move_source = check_calloc(lane_blocks, sizeof *s->move_source);
    s->move_destination = check_calloc(lane_blocks, sizeof *s->move_destination);
    for (s->n_buckets = 16; s->n_buckets < limits->max_choices;) s->n_buckets *= 2;
    s->buckets = check_calloc(s->n_buckets, sizeof *s->buckets);
    memset(s->buckets, 0xff, s->n_buckets * sizeof *s->buckets);
    s->free_request = s->free_choice = s->due = NONE;
    for (uint32_t i = limits->max_choices; i-- > 0;) {
        s->requests[i].next = s->free_request;
        s->choices[i].next = s->free_choice;
        s->free_request = s->free_choice = i;
    }
    for (uint32_t i = 0; i < limits->max_sequences; i++) s->free_tables[s->n_free_tables++] = limits->max_sequences - 1 - i;
    for (uint32_t ring = limits->n_rings; ring > 0; ring--) s->free_rings[s->n_free_rings++] = ring;
    return s;
}

void scheduler_free(struct scheduler *s) {
    if (!s) return;
    prefix_cache_done(&s->cache);
    block_tables_done(&s->tables);
    block_pool_done(&s->pool);
    free(s->requests);
    free(s->choices);
    free(s->running);
    free(s->waiting);
    free(s->free_tables);
    free(s->free_rings);
    free(s->copy_source);
    free(s->copy_destination);
    free(s->entries);
    free(s->entry_choice);
    free(s->moves);
    free(s->move_source);
    free(s->move_destination);
    free(s->buckets);
    free(s);
}

uint64_t scheduler_bytes(const struct scheduler_limits *limits) {
    uint64_t blocks_max = blocks_for(limits->max_model_len) + 1;
    return block_tables_bytes(limits->max_sequences, limits->n_lanes, (uint32_t)blocks_max) +
           prefix_cache_bytes(limits->n_lanes, limits->prefix_cache ? limits->n_blocks / limits->n_lanes : 0, limits->n_blocks) +
           (uint64_t)limits->n_blocks * (sizeof(uint32_t) + 1) +
           (uint64_t)(limits->n_blocks / limits->extent_blocks + 1) * sizeof(struct block_extent) +
           (uint64_t)limits->max_choices * (sizeof(struct request) + sizeof(struct choice) + 4 * sizeof(uint32_t)) +
           (uint64_t)limits->max_sequences * limits->n_lanes * 2 * sizeof(uint32_t) + limits->n_lanes * blocks_max * 2 * sizeof(uint32_t);
}

uint64_t scheduler_peak_blocks(const struct scheduler_limits *limits, uint32_t n_prompt, uint32_t max_new) {
    return (uint64_t)limits->n_lanes * blocks_for(n_prompt + max_new);
}

static uint32_t add_choice(struct scheduler *s, uint32_t request, uint32_t index) {
    uint32_t i = s->free_choice;
    struct choice *choice = &s->choices[i];
    s->free_choice = choice->next;
    s->n_choices++;
    *choice = (struct choice){.request = request,
                              .index = index,
                              .next = NONE,
                              .state = index ? CHOICE_UNFORKED : CHOICE_WAITING,
                              .table = NONE,
                              .n_tokens = s->requests[request].asked.n_prompt,
                              .handled_at = NONE,
                              .leaf = ENTRY_NONE,
                              .tokens = s->requests[request].asked.tokens[index]};
    return i;
}

bool scheduler_add(struct scheduler *s, const struct scheduler_request *asked) {
    CHECK(asked->n_candidates >= 1 && asked->n_prompt >= 1 && asked->n_candidates <= s->limits.max_samples);
    bool bounded = asked->private && asked->peak_tokens > 0; /* lanes stay short however long the sequence gets */
    CHECK(asked->n_prompt <= s->limits.max_model_len && asked->max_new <= (bounded ? INT32_MAX : s->limits.max_model_len) - asked->n_prompt);
    CHECK(!asked->needs_ring || s->limits.n_rings > 0);
    if (asked->n_candidates > s->limits.max_choices - s->n_choices) return false;
    uint32_t i = s->free_request;
    struct request *request = &s->requests[i];
    s->free_request = request->next;
    uint32_t *bucket = &s->buckets[random_mix(asked->id) & (s->n_buckets - 1)];
    *request = (struct request){
        .asked = *asked, .n_live = asked->n_candidates, .n_dependents = asked->n_candidates - 1, .serial = s->next_serial++, .next = *bucket};
    *bucket = i;
    uint32_t last = NONE;
    for (uint32_t index = 0; index < asked->n_candidates; index++) {
        uint32_t choice = add_choice(s, i, index);
        if (last == NONE)
            request->first_choice = choice;
        else
            s->choices[last].next = choice;
        last = choice;
    }
    waiting_insert(s, request->first_choice);
    return true;
}

bool scheduler_abort(struct scheduler *s, uint64_t id, uint32_t index) {
    CHECK(!s->planned);
    uint32_t request = request_find(s, id);
    if (request == NONE) return false;
    uint32_t i = s->requests[request].first_choice;
    while (i != NONE && s->choices[i].index != index) i = s->choices[i].next;
    if (i == NONE || s->choices[i].silent || s->choices[i].state == CHOICE_OVER || s->choices[i].state == CHOICE_LINGERING) return false;
    choice_end(s, i);
    request_settle(s, request);
    return true;
}

bool scheduler_lanes(const struct scheduler *scheduler, uint64_t id, uint32_t index, const uint32_t **lane_tokens, uint32_t *n_computed) {
    struct scheduler *s = (struct scheduler *)(uintptr_t)scheduler;
    uint32_t request = request_find(s, id);
    if (request == NONE) return false;
    for (uint32_t i = s->requests[request].first_choice; i != NONE; i = s->choices[i].next) {
        if (s->choices[i].index != index || s->choices[i].table == NONE) continue;
        *lane_tokens = table_lane_tokens(&s->tables, s->choices[i].table);
        *n_computed = s->choices[i].n_computed;
        return true;
    }
    return false;
}

void scheduler_drop_prefix_cache(struct scheduler *s) { prefix_cache_clear_idle(&s->cache); }

void scheduler_hold_admission(struct scheduler *s, bool hold) { s->hold_admission = hold; }

void scheduler_stats(const struct scheduler *s, struct scheduler_stats *stats) {
    *stats = s->stats;
    stats->running = s->n_running;
    stats->waiting = s->n_waiting;
    for (uint32_t i = 0; i < s->n_running; i++)
        stats->running -= s->choices[s->running[i]].silent || s->choices[s->running[i]].state != CHOICE_RUNNING;
    for (uint32_t i = 0; i < s->n_waiting; i++) { /* choices that wait for this one to read their prompt */
        const struct choice *choice = &s->choices[s->waiting[i]];
        stats->waiting -= choice->silent;
        if (choice->index == 0) stats->waiting += s->requests[choice->request].n_dependents;
    }
    stats->blocks_total = s->pool.n_blocks;
    stats->blocks_used = block_pool_used(&s->pool);
    stats->blocks_cached = s->pool.n_cached;
}
