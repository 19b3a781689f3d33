/* Closes a step: what was computed is in the cache now, sampled tokens become known, choices end or fork. Owns nothing. */
#include "scheduler/internal.h"

#include <string.h>

/* A choice goes on from the same table: full blocks are shared, the block that is still being filled is copied in the next plan. Nothing of it is evicted. */
static void share_table(struct scheduler *s, uint32_t from, uint32_t to) {
    const struct choice *parent = &s->choices[from];
    struct choice *child = &s->choices[to];
    queue_run(s, to);
    for (uint32_t entry = parent->entry; entry != ENTRY_NONE; entry = s->cache.entries[entry].parent) prefix_cache_use(&s->cache, entry);
    child->entry = parent->entry;
    child->n_runs = parent->n_runs;
    child->sharing = parent->sharing;
    child->n_computed = parent->n_computed;
    child->cached_tokens = parent->cached_tokens;
    const uint32_t *tokens = table_lane_tokens(&s->tables, parent->table);
    for (uint32_t lane = 0; lane < s->limits.n_lanes; lane++) {
        const uint32_t *ids = table_lane_ids(&s->tables, parent->table, lane);
        for (uint32_t i = 0; i < tokens[lane] / BLOCK_TOKENS; i++) table_share(&s->tables, child->table, lane, ids[i]);
    }
    uint32_t full = parent->n_computed / BLOCK_TOKENS * BLOCK_TOKENS, rest = parent->n_computed - full;
    table_fill(&s->tables, child->table, full);
    if (rest == 0) return;
    CHECK(table_append(&s->tables, child->table, rest));
    table_fill(&s->tables, child->table, rest);
    for (uint32_t lane = 0; lane < s->limits.n_lanes; lane++) {
        uint32_t at = full / BLOCK_TOKENS, i = s->n_copies++;
        s->copy_source[i] = table_lane_ids(&s->tables, parent->table, lane)[at];
        s->copy_destination[i] = table_lane_ids(&s->tables, child->table, lane)[at];
        s->copy_choice[i] = to;
    }
    s->stats.blocks_copied += s->limits.n_lanes;
}

static void fork_choice(struct scheduler *s, uint32_t from, uint32_t to) {
    const struct scheduler_request *request = &prompt_of(s, from)->request;
    struct choice *child = &s->choices[to];
    memcpy(request->tokens[child->number], request->tokens[s->choices[from].number], request->n_prompt * sizeof(int32_t));
    child->n_tokens = request->n_prompt + 1; /* the caller wrote its first token */
    uint32_t copies = s->choices[from].n_computed % BLOCK_TOKENS ? s->limits.n_lanes : 0;
    if (s->n_running < s->limits.max_sequences && blocks_make_free(s, copies)) {
        share_table(s, from, to);
        s->stats.forks++;
        return;
    }
    child->n_computed = 0;
    child->preempted = true;
    queue_wait(s, to);
    s->stats.forks_recomputed++;
}

static void end_running(struct scheduler *s, uint32_t choice) {
    queue_leave(s, choice);
    choice_end(s, choice);
}

/* A prompt was read and no token is wanted: all its choices are over. */
static void end_unsampled(struct scheduler *s, uint32_t choice) {
    struct prompt *prompt = prompt_of(s, choice);
    for (uint32_t each = prompt->first_choice, next; each != NONE; each = next) {
        next = s->choices[each].next;
        if (each == choice) continue;
        prompt->n_unforked--;
        choice_end(s, each);
    }
    end_running(s, choice);
}

static void commit_samples(struct scheduler *s, uint32_t choice, const bool *ended) {
    struct prompt *prompt = prompt_of(s, choice);
    struct choice *it = &s->choices[choice];
    bool own_end = false;
    uint32_t sample = 0, n_prompt = prompt->request.n_prompt, max_new = prompt->request.max_new;
    for (uint32_t each = prompt->first_choice, next; each != NONE; each = next) {
        next = s->choices[each].next;
        if (each == choice) {
            own_end = ended[sample++];
        } else if (s->choices[each].state == CHOICE_UNFORKED) {
            prompt->n_unforked--;
            if (ended[sample++] || max_new == 1)
                choice_end(s, each);
            else
                fork_choice(s, choice, each);
        }
    }
    it->n_tokens++;
    if (own_end || it->n_tokens - n_prompt >= max_new) end_running(s, choice);
}

void scheduler_commit(struct scheduler *s, const bool *ended) {
    CHECK(s->planned);
    s->planned = false;
    for (uint32_t i = 0, sample = 0; i < s->plan.n_entries; i++) {
        const struct plan_entry *entry = &s->entries[i];
        uint32_t choice = s->entry_choice[i], n_samples = entry->n_samples;
        struct choice *it = &s->choices[choice];
        table_fill(&s->tables, it->table, entry->n_rows);
        it->n_computed += entry->n_rows;
        prefix_contribute(s, choice);
        if (n_samples > 0)
            commit_samples(s, choice, ended + sample);
        else if (it->n_computed == it->n_tokens)
            end_unsampled(s, choice);
        sample += n_samples;
    }
    s->plan.n_entries = s->plan.n_copies = 0;
}
