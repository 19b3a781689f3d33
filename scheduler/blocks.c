/* Where blocks come from when they are short: the prefix cache first, then a victim. See internal.h. */
#include "scheduler/internal.h"

bool blocks_available(struct scheduler *s, uint64_t count) {
    while (s->pool.n_free < count) {
        if (!prefix_cache_evict(&s->cache)) return false;
        s->stats.prefix_evictions++;
    }
    return true;
}

/* Highest priority number, then the youngest; never the oldest of all. */
uint32_t pick_victim(struct scheduler *s) {
    uint32_t victim = NONE;
    for (uint32_t at = 1; at < s->n_running; at++) {
        uint32_t i = s->running[at];
        if (s->choices[i].state != CHOICE_RUNNING) continue;
        if (victim == NONE || request_of(s, &s->choices[i])->asked.priority >= request_of(s, &s->choices[victim])->asked.priority) victim = i;
    }
    return victim;
}
