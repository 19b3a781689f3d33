/* The scheduler's outside: made, asked, told of new and aborted choices, and checked. Owns all memory of the room. */
#include "base/random.h"
#include "scheduler/internal.h"

#include <stdlib.h>
#include <string.h>

static uint32_t *ids_new(size_t count, size_t each) {
    size_t n;
    CHECK(size_mul(count, each, &n));
    return check_calloc(n ? n : 1, sizeof(uint32_t));
}

static void fill_lists(struct scheduler *s) {
    uint32_t n = s->limits.max_choices;
    for (uint32_t i = n; i-- > 0;) {
        s->prompts[i].next_in_bucket = i + 1 < n ? i + 1 : NONE;
        s->choices[i].next = i + 1 < n ? i + 1 : NONE;
    }
    for (uint32_t i = s->limits.max_sequences; i-- > 0;) s->free_tables[s->n_free_tables++] = i;
    memset(s->buckets, 0xff, s->n_buckets * sizeof *s->buckets);
}

struct scheduler *scheduler_new(const struct scheduler_limits *limits) {
    struct scheduler *s = check_calloc(1, sizeof *s);
    s->limits = *limits;
    CHECK(limits->n_lanes > 0 && limits->max_sequences > 0 && limits->max_choices > 0 && limits->max_choices < NONE / 4 && limits->max_model_len > 0);
    CHECK(limits->max_rows >= limits->max_sequences && limits->max_samples >= limits->max_sequences);
    uint32_t blocks_max = blocks_of(limits->max_model_len), capacity = limits->prefix_cache ? limits->n_blocks / limits->n_lanes : 0;
    block_pool_init(&s->pool, limits->n_blocks, limits->extent_blocks);
    block_tables_init(&s->tables, &s->pool, limits->max_sequences, limits->n_lanes, blocks_max);
    prefix_cache_init(&s->cache, &s->pool, limits->n_lanes, capacity, limits->hash_seed);
    s->prompts = check_calloc(limits->max_choices, sizeof *s->prompts);
    s->choices = check_calloc(limits->max_choices, sizeof *s->choices);
    for (s->n_buckets = 16; s->n_buckets < 2 * limits->max_choices;) s->n_buckets *= 2;
    s->buckets = ids_new(s->n_buckets, 1);
    s->waiting = ids_new(limits->max_choices, 1);
    s->running = ids_new(limits->max_sequences, 1);
    s->free_tables = ids_new(limits->max_sequences, 1);
    s->entries = check_calloc(limits->max_sequences, sizeof *s->entries);
    s->entry_choice = ids_new(limits->max_sequences, 1);
    s->sample_choice = ids_new(limits->max_samples, 1);
    s->order = ids_new(limits->max_sequences, 1);
    s->copy_source = ids_new(limits->max_sequences, limits->n_lanes);
    s->copy_destination = ids_new(limits->max_sequences, limits->n_lanes);
    s->copy_choice = ids_new(limits->max_sequences, limits->n_lanes);
    s->runs = ids_new(blocks_max, 1);
    s->lane_ids = ids_new(limits->n_lanes, 1);
    s->recount = ids_new(limits->n_blocks, 1);
    s->user_count = ids_new(capacity, 1);
    fill_lists(s);
    return s;
}

void scheduler_free(struct scheduler *s) {
    if (!s) return;
    block_pool_done(&s->pool);
    block_tables_done(&s->tables);
    prefix_cache_done(&s->cache);
    void *owned[] = {s->prompts,     s->choices,      s->buckets,       s->waiting, s->running,     s->free_tables,
                     s->entries,     s->entry_choice, s->sample_choice, s->order,   s->copy_source, s->copy_destination,
                     s->copy_choice, s->runs,         s->lane_ids,      s->recount, s->user_count};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
    free(s);
}

/* The last token generated is never computed. */
uint64_t scheduler_peak_blocks(const struct scheduler_limits *limits, uint32_t n_prompt, uint32_t max_new) {
    uint64_t slots = (uint64_t)n_prompt + (max_new > 0 ? max_new - 1 : 0);
    return (slots + BLOCK_TOKENS - 1) / BLOCK_TOKENS * limits->n_lanes;
}

static uint32_t find_prompt(const struct scheduler *s, uint64_t id) {
    uint32_t i = s->buckets[random_mix(id) & (s->n_buckets - 1)];
    while (i != NONE && s->prompts[i].request.id != id) i = s->prompts[i].next_in_bucket;
    return i;
}

bool scheduler_add(struct scheduler *s, const struct scheduler_request *request) {
    CHECK(request->n_candidates > 0 && request->n_candidates <= s->limits.max_samples - s->limits.max_sequences + 1);
    CHECK(request->n_prompt > 0 && (uint64_t)request->n_prompt + request->max_new <= s->limits.max_model_len);
    CHECK(scheduler_peak_blocks(&s->limits, request->n_prompt, request->max_new) <= s->limits.n_blocks);
    CHECK(request->arrival_ns < 1ull << 62 && find_prompt(s, request->id) == NONE);
    if (request->n_candidates > s->limits.max_choices - s->n_choices) return false;
    uint32_t index = s->free_prompt, *bucket = &s->buckets[random_mix(request->id) & (s->n_buckets - 1)];
    struct prompt *prompt = &s->prompts[index];
    s->free_prompt = prompt->next_in_bucket;
    *prompt = (struct prompt){.request = *request,
                              .order = s->next_order++,
                              .rank = (int64_t)request->arrival_ns + (int64_t)request->priority * (1ll << AGE_SHIFT),
                              .first_choice = NONE,
                              .n_live = request->n_candidates,
                              .n_unforked = request->n_candidates - 1,
                              .next_in_bucket = *bucket,
                              .live = true};
    *bucket = index;
    for (uint32_t number = request->n_candidates; number-- > 0;) {
        uint32_t choice = s->free_choice;
        s->free_choice = s->choices[choice].next;
        s->choices[choice] = (struct choice){.state = CHOICE_UNFORKED,
                                             .prompt = index,
                                             .number = number,
                                             .next = prompt->first_choice,
                                             .n_tokens = request->n_prompt,
                                             .table = NONE,
                                             .entry = ENTRY_NONE,
                                             .plan_entry = NONE};
        prompt->first_choice = choice;
    }
    s->n_choices += request->n_candidates;
    queue_wait(s, prompt->first_choice);
    return true;
}

/* The choice that reads the prompt for others is over: the next one takes what it has, in place. */
static void hand_over(struct scheduler *s, uint32_t choice) {
    struct choice *it = &s->choices[choice];
    struct prompt *prompt = prompt_of(s, choice);
    uint32_t heir = it->next; /* the reader is the first of those alive, so the next one is unforked */
    CHECK(heir != NONE && s->choices[heir].state == CHOICE_UNFORKED);
    const struct scheduler_request *request = &prompt->request;
    memcpy(request->tokens[s->choices[heir].number], request->tokens[it->number], request->n_prompt * sizeof(int32_t));
    uint32_t number = it->number;
    it->number = s->choices[heir].number; /* the record stays in its queue under the heir's name */
    s->choices[heir].number = number;
    it->next = s->choices[heir].next;
    s->choices[heir].next = choice;
    prompt->first_choice = heir;
    prompt->n_unforked--;
    choice_end(s, heir);
}

bool scheduler_abort(struct scheduler *s, uint64_t id, uint32_t number) {
    CHECK(!s->planned);
    uint32_t index = find_prompt(s, id);
    if (index == NONE) return false;
    struct prompt *prompt = &s->prompts[index];
    uint32_t choice = prompt->first_choice;
    while (choice != NONE && s->choices[choice].number != number) choice = s->choices[choice].next;
    if (choice == NONE) return false;
    if (s->choices[choice].state == CHOICE_UNFORKED) {
        prompt->n_unforked--;
        choice_end(s, choice);
    } else if (prompt->n_unforked > 0) {
        hand_over(s, choice);
    } else {
        queue_leave(s, choice);
        choice_end(s, choice);
    }
    return true;
}

void scheduler_drop_prefix_cache(struct scheduler *s) {
    while (prefix_cache_evict(&s->cache)) s->stats.prefix_evictions++;
}

void scheduler_stats(const struct scheduler *s, struct scheduler_stats *stats) {
    *stats = s->stats;
    stats->running = s->n_running;
    stats->waiting = s->n_choices - s->n_running;
    stats->blocks_total = s->limits.n_blocks;
    stats->blocks_used = block_pool_used(&s->pool);
    stats->blocks_cached = s->pool.n_cached;
}

static void check_running(const struct scheduler *s) {
    uint32_t capacity = s->cache.capacity;
    memset(s->recount, 0, s->limits.n_blocks * sizeof *s->recount);
    memset(s->user_count, 0, capacity * sizeof *s->user_count);
    for (uint32_t i = 0; i < s->n_running; i++) {
        const struct choice *it = &s->choices[s->running[i]];
        CHECK(it->state == CHOICE_RUNNING && it->n_computed <= it->n_tokens && it->table < s->limits.max_sequences);
        CHECK(i == 0 || choice_older(s, s->running[i - 1], s->running[i]));
        uint32_t runs = it->n_runs;
        for (uint32_t entry = it->entry; entry != ENTRY_NONE; entry = s->cache.entries[entry].parent) {
            CHECK(runs-- > 0);
            s->user_count[entry]++;
            for (uint32_t lane = 0; lane < s->limits.n_lanes; lane++)
                CHECK(table_lane_ids(&s->tables, it->table, lane)[runs] == prefix_entry_ids(&s->cache, entry)[lane]);
        }
        CHECK(runs == 0);
        for (uint32_t lane = 0; lane < s->limits.n_lanes; lane++) {
            uint32_t n = table_lane_blocks(&s->tables, it->table)[lane], filled = table_lane_tokens(&s->tables, it->table)[lane];
            const uint32_t *ids = table_lane_ids(&s->tables, it->table, lane);
            CHECK(filled <= it->n_computed && n >= blocks_of(filled) && (s->planned || n == blocks_of(filled)));
            for (uint32_t b = 0; b < n; b++) {
                s->recount[ids[b]]++;
                /* what is cached or shared is full: nobody writes there any more */
                CHECK((!s->pool.cached[ids[b]] && s->pool.owners[ids[b]] == 1) || (b + 1) * BLOCK_TOKENS <= filled);
            }
        }
    }
}

void scheduler_check(const struct scheduler *s) {
    uint32_t live = 0, prompts = 0;
    check_running(s);
    block_pool_check(&s->pool, s->recount);
    prefix_cache_check(&s->cache, s->user_count);
    CHECK(s->pool.n_free + s->pool.n_cached + block_pool_used(&s->pool) == s->limits.n_blocks);
    CHECK(s->n_running + s->n_free_tables == s->limits.max_sequences);
    for (uint32_t i = 0; i < s->n_waiting; i++) {
        const struct choice *it = &s->choices[s->waiting[i]];
        CHECK(it->state == CHOICE_WAITING && it->n_computed == 0 && it->table == NONE);
    }
    uint32_t unforked = 0;
    for (uint32_t p = 0; p < s->limits.max_choices; p++) {
        const struct prompt *prompt = &s->prompts[p];
        if (!prompt->live) continue;
        prompts++;
        uint32_t n = 0, still = 0;
        for (uint32_t each = prompt->first_choice; each != NONE; each = s->choices[each].next, n++) {
            CHECK(s->choices[each].prompt == p && s->choices[each].state != CHOICE_FREE);
            still += s->choices[each].state == CHOICE_UNFORKED;
        }
        CHECK(n == prompt->n_live && n > 0 && still == prompt->n_unforked && find_prompt(s, prompt->request.id) == p);
        CHECK(still == 0 || still == n - 1);
        live += n;
        unforked += still;
    }
    CHECK(live == s->n_choices && live == s->n_running + s->n_waiting + unforked && prompts <= live);
}
