/* The scheduler's queues: running, oldest first; waiting, of which the head is asked for; requests by id. See internal.h. */
#include <string.h>

#include "base/random.h"
#include "scheduler/internal.h"

bool choice_older(struct scheduler *s, uint32_t a, uint32_t b) {
    const struct request *x = request_of(s, &s->choices[a]), *y = request_of(s, &s->choices[b]);
    if (x->asked.arrival_ns != y->asked.arrival_ns) return x->asked.arrival_ns < y->asked.arrival_ns;
    if (x->serial != y->serial) return x->serial < y->serial;
    return s->choices[a].index < s->choices[b].index;
}

void running_insert(struct scheduler *s, uint32_t choice) {
    CHECK(s->n_running < s->limits.max_sequences);
    uint32_t at = s->n_running++;
    while (at > 0 && choice_older(s, choice, s->running[at - 1])) {
        s->running[at] = s->running[at - 1];
        at--;
    }
    s->running[at] = choice;
}

void running_remove(struct scheduler *s, uint32_t choice) {
    uint32_t at = 0;
    while (at < s->n_running && s->running[at] != choice) at++;
    CHECK(at < s->n_running);
    memmove(s->running + at, s->running + at + 1, (s->n_running - at - 1) * sizeof *s->running);
    s->n_running--;
}

void waiting_insert(struct scheduler *s, uint32_t choice) {
    CHECK(s->n_waiting < s->limits.max_choices);
    s->waiting[s->n_waiting++] = choice;
}

void waiting_remove(struct scheduler *s, uint32_t choice) {
    uint32_t at = 0;
    while (at < s->n_waiting && s->waiting[at] != choice) at++;
    CHECK(at < s->n_waiting);
    s->waiting[at] = s->waiting[--s->n_waiting];
}

/* Priority less a step for every AGE_STEP_NS of waiting: whoever waits long enough comes first. */
static int64_t aged_priority(struct scheduler *s, const struct request *request) {
    uint64_t waited = s->now_ns > request->asked.arrival_ns ? s->now_ns - request->asked.arrival_ns : 0;
    return (int64_t)request->asked.priority - (int64_t)(waited / AGE_STEP_NS);
}

static bool before(struct scheduler *s, uint32_t a, uint32_t b) {
    const struct choice *x = &s->choices[a], *y = &s->choices[b];
    if (x->preempted != y->preempted) return x->preempted; /* the head of the queue is theirs */
    if (!x->preempted) {
        int64_t p = aged_priority(s, request_of(s, x)), q = aged_priority(s, request_of(s, y));
        if (p != q) return p < q;
    }
    return choice_older(s, a, b);
}

uint32_t waiting_head(struct scheduler *s) {
    uint32_t head = NONE;
    for (uint32_t i = 0; i < s->n_waiting; i++) {
        if (s->hold_admission && !s->choices[s->waiting[i]].preempted) continue;
        if (head == NONE || before(s, s->waiting[i], s->waiting[head])) head = i;
    }
    return head;
}

uint32_t request_find(const struct scheduler *s, uint64_t id) {
    uint32_t i = s->buckets[random_mix(id) & (s->n_buckets - 1)];
    while (i != NONE && s->requests[i].asked.id != id) i = s->requests[i].next;
    return i;
}
