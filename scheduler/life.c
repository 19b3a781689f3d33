/* How a choice loses its table, is preempted, ends; how a request ends. See internal.h. */
#include <string.h>

#include "base/random.h"
#include "scheduler/internal.h"

void choice_leave_chain(struct scheduler *s, uint32_t i) {
    struct choice *choice = &s->choices[i];
    for (uint32_t entry = choice->leaf; entry != ENTRY_NONE;) {
        uint32_t parent = s->cache.entries[entry].parent;
        prefix_cache_leave(&s->cache, entry);
        entry = parent;
    }
    choice->leaf = ENTRY_NONE;
    choice->n_runs = 0;
    choice->joins = false;
}

bool choice_take_table(struct scheduler *s, uint32_t i) {
    struct choice *choice = &s->choices[i];
    bool needs_ring = request_of(s, choice)->asked.needs_ring;
    CHECK(choice->table == NONE && choice->ring == 0);
    if (s->n_free_tables == 0 || (needs_ring && s->n_free_rings == 0)) return false;
    choice->table = s->free_tables[--s->n_free_tables];
    if (needs_ring) choice->ring = s->free_rings[--s->n_free_rings];
    return true;
}

void choice_give_table(struct scheduler *s, uint32_t i) {
    struct choice *choice = &s->choices[i];
    CHECK(choice->table != NONE);
    choice_leave_chain(s, i);
    table_clear(&s->tables, choice->table);
    s->free_tables[s->n_free_tables++] = choice->table;
    choice->table = NONE;
    if (choice->ring) s->free_rings[s->n_free_rings++] = choice->ring;
    choice->ring = 0;
    choice->n_computed = 0;
    choice->handled_at = NONE;
    choice->evicted = false;
    choice->skipped_since = 0;
    choice->n_copies = 0;
}

void choice_inherit_points(struct choice *choice, const struct choice *leader) {
    choice->seen_max = leader->seen_max;
    choice->compacted_step = leader->compacted_step;
    choice->n_pressed = leader->n_pressed;
    memcpy(choice->pressed_at, leader->pressed_at, sizeof choice->pressed_at);
}

void fork_recompute(struct scheduler *s, uint32_t leader, uint32_t i) {
    struct choice *choice = &s->choices[i];
    CHECK(choice->state == CHOICE_FORKING);
    request_of(s, choice)->n_dependents--;
    choice_inherit_points(choice, &s->choices[leader]);
    choice->state = CHOICE_WAITING;
    choice->preempted = true;
    waiting_insert(s, i);
    s->stats.forks_recomputed++;
}

/* A leader that loses its table before its forks got theirs leaves them to read the prompt themselves. */
static void leave_forks(struct scheduler *s, uint32_t i) {
    const struct request *request = request_of(s, &s->choices[i]);
    if (s->choices[i].index > 0 || request->n_dependents == 0) return;
    for (uint32_t fork = request->first_choice; fork != NONE; fork = s->choices[fork].next)
        if (s->choices[fork].state == CHOICE_FORKING) fork_recompute(s, i, fork);
}

void choice_preempt(struct scheduler *s, uint32_t i) {
    struct choice *choice = &s->choices[i];
    CHECK(choice->state == CHOICE_RUNNING || choice->state == CHOICE_LINGERING);
    leave_forks(s, i);
    running_remove(s, i);
    choice_give_table(s, i);
    choice->state = CHOICE_WAITING;
    choice->preempted = true;
    waiting_insert(s, i);
    choice->n_preemptions++;
    s->stats.preemptions++;
    request_settle(s, choice->request);
}

/* Does anybody wait for this choice to read the prompt, or to be forked from? */
static bool is_needed(struct scheduler *s, const struct choice *choice) { return choice->index == 0 && request_of(s, choice)->n_dependents > 0; }

void choice_end(struct scheduler *s, uint32_t i) {
    struct choice *choice = &s->choices[i];
    struct request *request = request_of(s, choice);
    request->n_live--;
    switch (choice->state) {
    case CHOICE_UNFORKED:
    case CHOICE_FORKING:
        request->n_dependents--;
        choice->state = CHOICE_OVER;
        return;
    case CHOICE_WAITING:
        if (is_needed(s, choice)) {
            choice->silent = true;
            return;
        }
        waiting_remove(s, i);
        choice->state = CHOICE_OVER;
        return;
    case CHOICE_RUNNING:
        if (is_needed(s, choice)) {
            choice->silent = true;
            if (choice->n_computed >= request->asked.n_prompt) choice->state = CHOICE_LINGERING;
            return;
        }
        running_remove(s, i);
        choice_give_table(s, i);
        choice->state = CHOICE_OVER;
        return;
    case CHOICE_LINGERING:
    case CHOICE_OVER: break;
    }
    CHECK(!"a choice that is not over");
}

static void request_free(struct scheduler *s, uint32_t i) {
    struct request *request = &s->requests[i];
    for (uint32_t c = request->first_choice; c != NONE;) {
        uint32_t next = s->choices[c].next;
        CHECK(s->choices[c].state == CHOICE_OVER && s->choices[c].table == NONE);
        s->choices[c].next = s->free_choice;
        s->free_choice = c;
        s->n_choices--;
        c = next;
    }
    uint32_t *link = &s->buckets[random_mix(request->asked.id) & (s->n_buckets - 1)];
    while (*link != i) link = &s->requests[*link].next;
    *link = request->next;
    request->next = s->free_request;
    s->free_request = i;
}

void request_settle(struct scheduler *s, uint32_t i) {
    struct request *request = &s->requests[i];
    struct choice *leader = &s->choices[request->first_choice];
    if (request->n_dependents == 0 && leader->silent && leader->state != CHOICE_OVER) {
        if (leader->state == CHOICE_WAITING)
            waiting_remove(s, request->first_choice);
        else {
            running_remove(s, request->first_choice);
            choice_give_table(s, request->first_choice);
        }
        leader->state = CHOICE_OVER;
    }
    if (request->n_live == 0 && leader->state == CHOICE_OVER) request_free(s, i);
}
