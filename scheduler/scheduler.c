/* Making, adding, aborting, counting: scheduler.h's verbs around the plan. See internal.h for the states. */
#include <stdlib.h>
#include <string.h>

#include "base/random.h"
#include "scheduler/internal.h"

uint32_t scheduler_table_blocks(const struct scheduler_limits *limits) { return blocks_for(limits->max_model_len) + 1; }

static uint32_t cache_capacity(const struct scheduler_limits *limits) { return limits->prefix_cache ? limits->n_blocks / limits->n_lanes : 0; }

static uint32_t bucket_count(const struct scheduler_limits *limits) {
    uint32_t n = 16;
    while (n < limits->max_choices) n *= 2;
    return n;
}

/* The scheduler's own arrays, each once: field, and how many. */
/* clang-format off */
#define ARRAYS(ARRAY) \
    ARRAY(requests, limits->max_choices) \
    ARRAY(choices, limits->max_choices) \
    ARRAY(running, limits->max_sequences) \
    ARRAY(waiting, limits->max_choices) \
    ARRAY(free_tables, limits->max_sequences) \
    ARRAY(free_rings, limits->n_rings) \
    ARRAY(copy_source, limits->max_sequences, limits->n_lanes) \
    ARRAY(copy_destination, limits->max_sequences, limits->n_lanes) \
    ARRAY(copy_choice, limits->max_sequences, limits->n_lanes) \
    ARRAY(entries, limits->max_sequences, 2) \
    ARRAY(entry_choice, limits->max_sequences, 2) \
    ARRAY(moves, limits->n_lanes) \
    ARRAY(move_source, limits->n_lanes, scheduler_table_blocks(limits)) \
    ARRAY(move_destination, limits->n_lanes, scheduler_table_blocks(limits)) \
    ARRAY(buckets, bucket_count(limits))
/* clang-format on */
#define COUNT(...) COUNT_OF(__VA_ARGS__, 1, )
#define COUNT_OF(a, b, ...) ((size_t)(a) * (b))

struct scheduler *scheduler_new(const struct scheduler_limits *limits) {
    struct scheduler *s = check_calloc(1, sizeof *s);
    s->limits = *limits;
    s->stats.cost_ratio = 1;
    CHECK(limits->max_choices >= 1 && limits->max_sequences >= 1 && limits->max_rows >= 1 && limits->max_samples >= 1 && limits->n_lanes >= 1);
    s->blocks_max = scheduler_table_blocks(limits);
    block_pool_init(&s->pool, limits->n_blocks, limits->extent_blocks);
    block_tables_init(&s->tables, &s->pool, limits->max_sequences, limits->n_lanes, s->blocks_max);
    prefix_cache_init(&s->cache, &s->pool, limits->n_lanes, cache_capacity(limits), limits->hash_seed);
#define ALLOCATE(field, ...) s->field = check_calloc(COUNT(__VA_ARGS__), sizeof *s->field);
    ARRAYS(ALLOCATE)
    s->n_buckets = bucket_count(limits);
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
#define FREE(field, ...) free(s->field);
    ARRAYS(FREE)
    free(s);
}

uint64_t scheduler_bytes(const struct scheduler_limits *limits) {
    uint64_t bytes = sizeof(struct scheduler) + block_pool_bytes(limits->n_blocks, limits->extent_blocks) +
                     block_tables_bytes(limits->max_sequences, limits->n_lanes, scheduler_table_blocks(limits)) +
                     prefix_cache_bytes(limits->n_lanes, cache_capacity(limits), limits->n_blocks);
#define ADD(field, ...) bytes += (uint64_t)COUNT(__VA_ARGS__) * sizeof *((struct scheduler *)0)->field;
    ARRAYS(ADD)
    return bytes;
}

uint64_t scheduler_peak_blocks(const struct scheduler_limits *limits, uint32_t n_prompt, uint32_t max_new) {
    uint64_t computed = (uint64_t)n_prompt + (max_new > 0 ? max_new - 1 : 0); /* the last token is never computed */
    return limits->n_lanes * ((computed + BLOCK_TOKENS - 1) / BLOCK_TOKENS);
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
    s->is_full = false;
    return true;
}

/* A choice that is not over for the caller, or NONE. */
static uint32_t live_choice(const struct scheduler *s, uint64_t id, uint32_t index) {
    uint32_t request = request_find(s, id);
    if (request == NONE) return NONE;
    uint32_t i = s->requests[request].first_choice;
    while (i != NONE && s->choices[i].index != index) i = s->choices[i].next;
    if (i == NONE || s->choices[i].silent || s->choices[i].state == CHOICE_OVER || s->choices[i].state == CHOICE_LINGERING) return NONE;
    return i;
}

bool scheduler_abort(struct scheduler *s, uint64_t id, uint32_t index) {
    uint32_t i = live_choice(s, id, index);
    if (i == NONE) return false;
    CHECK(s->n_planned == 0 && s->due == NONE);
    uint32_t request = s->choices[i].request;
    choice_end(s, i);
    request_settle(s, request);
    return true;
}

uint32_t scheduler_preemptions(const struct scheduler *s, uint64_t id, uint32_t index) {
    uint32_t i = live_choice(s, id, index);
    return i == NONE ? 0 : s->choices[i].n_preemptions;
}

bool scheduler_lanes(const struct scheduler *s, uint64_t id, uint32_t index, const uint32_t **lane_tokens, uint32_t *n_computed) {
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

/* One that is not over, and those that wait for it to read the prompt. */
static void count_choice(const struct scheduler *s, uint32_t i, uint32_t *own, uint32_t *dependents) {
    const struct choice *choice = &s->choices[i];
    *own += !choice->silent && choice->state != CHOICE_LINGERING;
    if (choice->index == 0) *dependents += s->requests[choice->request].n_dependents;
}

uint32_t scheduler_blocks_used(const struct scheduler *s) { return block_pool_used(&s->pool); }

void scheduler_stats(const struct scheduler *s, struct scheduler_stats *stats) {
    *stats = s->stats;
    stats->running = stats->waiting = 0;
    for (uint32_t i = 0; i < s->n_running; i++) count_choice(s, s->running[i], &stats->running, &stats->waiting);
    for (uint32_t i = 0; i < s->n_waiting; i++) count_choice(s, s->waiting[i], &stats->waiting, &stats->waiting);
    stats->blocks_total = s->pool.n_blocks;
    stats->blocks_used = block_pool_used(&s->pool);
    stats->blocks_cached = s->pool.n_cached;
}
