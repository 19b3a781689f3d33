/* Who waits, who runs, and in which order; what it means to be preempted or over. Owns the two queues and the free lists of choices and prompts.
 * Does not decide when (plan.c, commit.c). */
#include "base/random.h"
#include "scheduler/internal.h"

#include <string.h>

bool choice_older(const struct scheduler *s, uint32_t a, uint32_t b) {
    const struct prompt *pa = prompt_of(s, a), *pb = prompt_of(s, b);
    if (pa->request.arrival_ns != pb->request.arrival_ns) return pa->request.arrival_ns < pb->request.arrival_ns;
    if (pa->order != pb->order) return pa->order < pb->order;
    return s->choices[a].number < s->choices[b].number;
}

bool choice_before(const struct scheduler *s, uint32_t a, uint32_t b) {
    const struct prompt *pa = prompt_of(s, a), *pb = prompt_of(s, b);
    return pa->rank != pb->rank ? pa->rank < pb->rank : choice_older(s, a, b);
}

static bool admitted_before(const struct scheduler *s, uint32_t a, uint32_t b) {
    if (s->choices[a].preempted != s->choices[b].preempted) return s->choices[a].preempted;
    return choice_before(s, a, b);
}

static void insert(uint32_t *list, uint32_t *n, uint32_t at, uint32_t choice) {
    memmove(list + at + 1, list + at, (*n - at) * sizeof *list);
    list[at] = choice;
    (*n)++;
}

static void take_out(uint32_t *list, uint32_t *n, uint32_t choice) {
    uint32_t at = 0;
    while (at < *n && list[at] != choice) at++;
    CHECK(at < *n);
    memmove(list + at, list + at + 1, (*n - at - 1) * sizeof *list);
    (*n)--;
}

void queue_wait(struct scheduler *s, uint32_t choice) {
    uint32_t low = 0, high = s->n_waiting; /* those at [0, low) are admitted after this one */
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (admitted_before(s, choice, s->waiting[middle]))
            low = middle + 1;
        else
            high = middle;
    }
    insert(s->waiting, &s->n_waiting, low, choice);
    s->choices[choice].state = CHOICE_WAITING;
}

void queue_run(struct scheduler *s, uint32_t choice) {
    uint32_t at = s->n_running;
    while (at > 0 && choice_older(s, choice, s->running[at - 1])) at--;
    CHECK(s->n_free_tables > 0);
    struct choice *it = &s->choices[choice];
    insert(s->running, &s->n_running, at, choice);
    it->state = CHOICE_RUNNING;
    it->preempted = false;
    it->sharing = s->limits.prefix_cache;
    it->table = s->free_tables[--s->n_free_tables];
    it->entry = ENTRY_NONE;
    it->n_runs = 0;
    it->n_computed = 0;
    it->cached_tokens = 0;
    it->plan_entry = NONE;
}

/* Copies into blocks that are about to be given back must not be carried out: somebody else may own them by then. */
static void forget_copies(struct scheduler *s, uint32_t choice) {
    uint32_t kept = 0;
    for (uint32_t i = 0; i < s->n_copies; i++) {
        if (s->copy_choice[i] == choice) continue;
        s->copy_source[kept] = s->copy_source[i];
        s->copy_destination[kept] = s->copy_destination[i];
        s->copy_choice[kept++] = s->copy_choice[i];
    }
    s->n_copies = kept;
}

void queue_leave(struct scheduler *s, uint32_t choice) {
    struct choice *it = &s->choices[choice];
    if (it->state == CHOICE_WAITING) take_out(s->waiting, &s->n_waiting, choice);
    if (it->state != CHOICE_RUNNING) return;
    forget_copies(s, choice);
    prefix_leave_chain(s, choice);
    table_clear(&s->tables, it->table);
    s->free_tables[s->n_free_tables++] = it->table;
    it->table = NONE;
    take_out(s->running, &s->n_running, choice);
}

void choice_preempt(struct scheduler *s, uint32_t choice) {
    struct choice *it = &s->choices[choice];
    queue_leave(s, choice);
    it->n_computed = 0;
    it->preempted = true;
    queue_wait(s, choice);
}

static void prompt_end(struct scheduler *s, uint32_t prompt) {
    struct prompt *it = &s->prompts[prompt];
    uint32_t *link = &s->buckets[random_mix(it->request.id) & (s->n_buckets - 1)];
    while (*link != prompt) link = &s->prompts[*link].next_in_bucket;
    *link = it->next_in_bucket;
    it->live = false;
    it->next_in_bucket = s->free_prompt;
    s->free_prompt = prompt;
}

void choice_end(struct scheduler *s, uint32_t choice) {
    struct choice *it = &s->choices[choice];
    struct prompt *prompt = prompt_of(s, choice);
    uint32_t *link = &prompt->first_choice, index = it->prompt;
    while (*link != choice) link = &s->choices[*link].next;
    *link = it->next;
    it->state = CHOICE_FREE;
    it->next = s->free_choice;
    s->free_choice = choice;
    s->n_choices--;
    if (--prompt->n_live == 0) prompt_end(s, index);
}
