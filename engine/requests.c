/* Who lives: requests and their choices, by id and in order of arrival. Owns the states, all allocated at start. Engine thread. It knows nothing of steps or events. */
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/random.h"
#include "engine/internal.h"

static uint32_t table_size(uint32_t max_choices) {
    uint32_t size = 16;
    while (size < 2 * (uint64_t)max_choices) size *= 2;
    return size;
}

/* The table is at most four places a choice. */
uint64_t requests_bytes_per_choice(void) { return sizeof(struct request_state) + sizeof(struct choice_state) + 5 * sizeof(struct request_state *); }

void requests_init(struct requests *requests, uint32_t max_choices) {
    uint32_t size = table_size(max_choices);
    *requests = (struct requests){
        .max_choices = max_choices,
        .states = check_calloc(max_choices, sizeof *requests->states),
        .free_states = check_calloc(max_choices, sizeof(struct request_state *)),
        .n_free = max_choices,
        .choices = check_calloc(max_choices, sizeof *requests->choices),
        .table = check_calloc(size, sizeof(struct request_state *)),
        .table_mask = size - 1,
    };
    for (uint32_t i = 0; i < max_choices; i++) requests->free_states[i] = &requests->states[max_choices - 1 - i];
}

void requests_done(struct requests *requests) {
    free(requests->states);
    free(requests->free_states);
    free(requests->choices);
    free(requests->table);
    *requests = (struct requests){0};
}

static uint32_t home(const struct requests *requests, uint64_t id) { return (uint32_t)random_mix(id) & requests->table_mask; }

/* Where the id is, or the empty place where it would go. */
static uint32_t place(const struct requests *requests, uint64_t id) {
    uint32_t at = home(requests, id);
    while (requests->table[at] && requests->table[at]->request->id != id) at = (at + 1) & requests->table_mask;
    return at;
}

struct request_state *requests_find(const struct requests *requests, uint64_t id) {
    return requests->table[place(requests, id)];
}

/* Closes the gaps that ended requests left, in order of arrival, which is the order of the ranges. */
static void close_gaps(struct requests *requests) {
    uint32_t end = 0;
    for (struct request_state *state = requests->oldest; state; state = state->newer) {
        uint32_t n = state->request->n_candidates;
        memmove(&requests->choices[end], &requests->choices[state->first_choice], n * sizeof *requests->choices);
        state->first_choice = end;
        end += n;
    }
    requests->choices_end = end;
}

struct request_state *requests_add(struct requests *requests, struct request *request) {
    uint32_t n = request->n_candidates, at = place(requests, request->id);
    CHECK(!requests->table[at]); /* ids are never reused */
    if (requests->max_choices - requests->choices_end < n) close_gaps(requests);
    CHECK(requests->n_free > 0 && requests->max_choices - requests->choices_end >= n);
    struct request_state *state = requests->free_states[--requests->n_free];
    *state = (struct request_state){
        .request = request, .first_choice = requests->choices_end, .n_open = n, .prompt_results_next = 1, .older = requests->newest};
    memset(&requests->choices[state->first_choice], 0, n * sizeof *requests->choices);
    requests->choices_end += n;
    if (requests->newest)
        requests->newest->newer = state;
    else
        requests->oldest = state;
    requests->newest = state;
    requests->table[at] = state;
    requests->n_compressed += compression_is_on(&request->kv);
    requests->n_pressed += compression_is_on(&request->kv) && request->kv.triggers & TRIGGER_PRESSURE;
    request->state = state;
    return state;
}

void requests_remove(struct requests *requests, struct request_state *state) {
    uint32_t mask = requests->table_mask, hole = place(requests, state->request->id);
    CHECK(requests->table[hole] == state);
    const struct kv_plan *kv = &state->request->kv;
    requests->n_compressed -= compression_is_on(kv);
    requests->n_pressed -= compression_is_on(kv) && kv->triggers & TRIGGER_PRESSURE;
    /* Those behind the hole move up, unless that would carry them before their home. */
    for (uint32_t at = (hole + 1) & mask; requests->table[at]; at = (at + 1) & mask) {
        uint32_t wanted = home(requests, requests->table[at]->request->id);
        if (((at - wanted) & mask) < ((at - hole) & mask)) continue;
        requests->table[hole] = requests->table[at];
        hole = at;
    }
    requests->table[hole] = NULL;
    if (state->older)
        state->older->newer = state->newer;
    else
        requests->oldest = state->newer;
    if (state->newer)
        state->newer->older = state->older;
    else
        requests->newest = state->older;
    if (!requests->oldest) requests->choices_end = 0;
    requests->free_states[requests->n_free++] = state;
}
