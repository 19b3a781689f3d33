/* Closing a step: rows are in the cache, tokens are drawn, choices end. See scheduler.h. */
#include <string.h>

#include "scheduler/internal.h"

/* Full runs of a sequence that nothing was evicted from join the prefix cache. */
static void join_prefix_cache(struct scheduler *s, uint32_t i) {
    struct choice *choice = &s->choices[i];
    const struct request *request = request_of(s, choice);
    while (choice->joins && !choice->evicted && (choice->n_runs + 1) * BLOCK_TOKENS <= choice->n_computed) {
        const int32_t *tokens = choice->tokens + (size_t)choice->n_runs * BLOCK_TOKENS;
        uint32_t *ids = s->move_source; /* free between compactions */
        for (uint32_t lane = 0; lane < s->limits.n_lanes; lane++) ids[lane] = table_lane_ids(&s->tables, choice->table, lane)[choice->n_runs];
        uint32_t entry = prefix_cache_insert(&s->cache, request->asked.cache_scope, choice->leaf, tokens, ids);
        if (entry == ENTRY_NONE) { /* another sequence was first: what follows could not be reached from here */
            choice->joins = false;
            return;
        }
        choice->leaf = entry;
        choice->n_runs++;
    }
}

/* A choice that is not the leader has its first token: it is over, or its table comes with the next plan. */
static void first_token(struct scheduler *s, const struct choice *leader, uint32_t i, bool ended) {
    struct choice *choice = &s->choices[i];
    const struct request *request = request_of(s, choice);
    memcpy(choice->tokens, leader->tokens, request->asked.n_prompt * sizeof *choice->tokens);
    choice->n_tokens = request->asked.n_prompt + 1;
    choice->state = CHOICE_FORKING;
    if (ended || choice->n_tokens == choice_limit(request)) choice_end(s, i);
}

static void next_token(struct scheduler *s, uint32_t i, bool ended) {
    struct choice *choice = &s->choices[i];
    if (choice->silent) {
        choice->state = CHOICE_LINGERING;
        return;
    }
    choice->n_tokens++;
    if (ended || choice->n_tokens == choice_limit(request_of(s, choice))) choice_end(s, i);
}

static void end_of_prompt(struct scheduler *s, uint32_t leader, const bool *ended) {
    struct request *request = request_of(s, &s->choices[leader]);
    for (uint32_t i = s->choices[request->first_choice].next; i != NONE; i = s->choices[i].next)
        if (s->choices[i].state == CHOICE_UNFORKED) first_token(s, &s->choices[leader], i, ended[s->choices[i].index]);
    next_token(s, leader, ended[0]);
}

static void end_without_tokens(struct scheduler *s, uint32_t leader) {
    struct request *request = request_of(s, &s->choices[leader]);
    for (uint32_t i = request->first_choice; i != NONE; i = s->choices[i].next)
        if (i != leader && s->choices[i].state == CHOICE_UNFORKED) choice_end(s, i);
    if (!s->choices[leader].silent) choice_end(s, leader);
}

/* A step that was held up by something else moves the ratio by no more than half the way to its double. */
void scheduler_took(struct scheduler *s, double us) {
    CHECK(s->n_planned == 0);
    double *ratio = &s->stats.cost_ratio, measured = s->planned_us > 0 ? us / s->planned_us : *ratio;
    if (!(measured > *ratio / 2)) measured = *ratio / 2;
    if (measured > *ratio * 2) measured = *ratio * 2;
    *ratio += (measured - *ratio) * (measured > *ratio ? 0.5 : 0.125);
    if (*ratio < SCHEDULER_COST_RATIO_MIN) *ratio = SCHEDULER_COST_RATIO_MIN;
    if (*ratio > SCHEDULER_COST_RATIO_MAX) *ratio = SCHEDULER_COST_RATIO_MAX;
}

void plan_advance(struct scheduler *s) {
    struct plan *plan = &s->plans[s->current];
    const uint32_t *choices = plan_choices(s, s->current);
    if (plan->advanced) return;
    plan->advanced = true;
    for (uint32_t e = 0; e < plan->n_entries; e++) {
        if (choices[e] == NONE) continue;
        struct choice *choice = &s->choices[choices[e]];
        table_fill(&s->tables, choice->table, plan->entries[e].n_rows);
        choice->n_computed += plan->entries[e].n_rows;
        s->stats.chunks += plan->entries[e].n_rows > 1 && choice->n_computed < choice->n_tokens;
        join_prefix_cache(s, choices[e]);
    }
}

/* What is drawn for an entry of the plan. */
static void settle(struct scheduler *s, const struct plan_entry *entry, uint32_t i, const bool *ended) {
    const struct choice *choice = &s->choices[i];
    const struct scheduler_request *asked = &request_of(s, choice)->asked;
    uint32_t request = choice->request;
    bool leads = choice->index == 0 && choice->n_tokens == asked->n_prompt && choice->n_computed == choice->n_tokens;
    if (leads && asked->max_new == 0)
        end_without_tokens(s, i);
    else if (leads)
        end_of_prompt(s, i, ended);
    else if (entry->n_samples)
        next_token(s, i, ended[0]);
    request_settle(s, request);
}

/* Who ended with this plan has nothing to look for in the one that runs ahead. */
static void note_over(struct scheduler *s, uint32_t which) {
    struct plan_entry *entries = plan_entries(s, which);
    uint32_t *choices = plan_choices(s, which);
    for (uint32_t e = 0; e < s->plans[which].n_entries; e++) {
        if (s->choices[choices[e]].state == CHOICE_RUNNING) continue;
        entries[e].over = true;
        choices[e] = NONE;
    }
}

void scheduler_commit(struct scheduler *s, const bool *ended) {
    CHECK(s->n_planned > 0);
    const struct plan *plan = &s->plans[s->current];
    const uint32_t *choices = plan_choices(s, s->current);
    plan_advance(s);
    s->stats.steps++;
    for (uint32_t c = 0; c < plan->n_copies; c++) block_pool_give(&s->pool, s->copy_source[c]);
    s->stats.blocks_copied += plan->n_copies;
    uint32_t sample = 0;
    for (uint32_t e = 0; e < plan->n_entries; e++) {
        if (choices[e] != NONE) settle(s, &plan->entries[e], choices[e], ended + sample);
        sample += plan->entries[e].n_samples;
    }
    s->current ^= 1;
    if (--s->n_planned > 0) note_over(s, s->current);
}
