/* The soundness function: everything recounted from what holds it. O(everything). See scheduler.h. */
#include <stdlib.h>

#include "scheduler/internal.h"

static void check_choice(const struct scheduler *s, uint32_t i, uint32_t *owners, uint32_t *users) {
    const struct choice *choice = &s->choices[i];
    const struct request *request = &s->requests[choice->request];
    bool has_table = choice->state == CHOICE_RUNNING || choice->state == CHOICE_LINGERING;
    CHECK(has_table == (choice->table != NONE));
    CHECK(choice->n_computed <= choice->n_tokens && choice->n_tokens <= choice_limit(request));
    if (!has_table) {
        CHECK(choice->n_computed == 0 || choice->state == CHOICE_OVER);
        CHECK(choice->leaf == ENTRY_NONE);
        return;
    }
    for (uint32_t lane = 0; lane < s->limits.n_lanes; lane++) {
        uint32_t tokens = table_lane_tokens(&s->tables, choice->table)[lane], blocks = table_lane_blocks(&s->tables, choice->table)[lane];
        const uint32_t *ids = table_lane_ids(&s->tables, choice->table, lane);
        CHECK(blocks >= blocks_for(tokens) && blocks <= s->blocks_max);
        CHECK(tokens <= choice->n_computed && (choice->evicted || tokens == choice->n_computed));
        for (uint32_t block = 0; block < blocks; block++) owners[ids[block]]++;
        /* A cached block is immutable: it lies wholly before the end of its lane. */
        for (uint32_t block = tokens / BLOCK_TOKENS; block < blocks; block++) CHECK(!s->pool.cached[ids[block]] && s->pool.owners[ids[block]] == 1);
    }
    table_check(&s->tables, choice->table);
    uint32_t run = choice->n_runs;
    for (uint32_t entry = choice->leaf; entry != ENTRY_NONE; entry = s->cache.entries[entry].parent) {
        CHECK(run-- > 0);
        users[entry]++;
    }
    CHECK(run == 0);
}

void scheduler_check(const struct scheduler *s) {
    /* Between steps; one may run ahead. */
    CHECK(s->n_planned == 0 || (s->n_planned == 1 && s->plans[s->current].n_copies == 0 && !s->plans[s->current].advanced));
    uint32_t *owners = check_calloc(s->pool.n_blocks, sizeof *owners), *users = check_calloc(s->cache.capacity, sizeof *users);
    uint8_t *seen = check_calloc(s->limits.max_choices, 1);
    uint32_t n_choices = 0, n_tables = 0, n_rings = 0;
    for (uint32_t at = 0; at < s->n_running; at++) {
        CHECK(s->choices[s->running[at]].state == CHOICE_RUNNING || s->choices[s->running[at]].state == CHOICE_LINGERING);
        CHECK(!seen[s->running[at]]++);
        CHECK(at == 0 || choice_older((struct scheduler *)(uintptr_t)s, s->running[at - 1], s->running[at]));
    }
    for (uint32_t at = 0; at < s->n_waiting; at++) {
        CHECK(s->choices[s->waiting[at]].state == CHOICE_WAITING);
        CHECK(!seen[s->waiting[at]]++);
    }
    for (uint32_t bucket = 0; bucket < s->n_buckets; bucket++)
        for (uint32_t r = s->buckets[bucket]; r != NONE; r = s->requests[r].next) {
            const struct request *request = &s->requests[r];
            uint32_t live = 0, dependents = 0;
            for (uint32_t i = request->first_choice; i != NONE; i = s->choices[i].next, n_choices++) {
                const struct choice *choice = &s->choices[i];
                CHECK(choice->request == r);
                bool queued = choice->state == CHOICE_RUNNING || choice->state == CHOICE_LINGERING || choice->state == CHOICE_WAITING;
                CHECK(queued == (seen[i] == 1));
                live += choice->state != CHOICE_OVER && !choice->silent;
                dependents += choice->state == CHOICE_UNFORKED || choice->state == CHOICE_FORKING;
                n_tables += choice->table != NONE;
                n_rings += choice->ring != 0;
                CHECK((choice->ring != 0) == (choice->table != NONE && request->asked.needs_ring));
                check_choice(s, i, owners, users);
            }
            CHECK(live == request->n_live && dependents == request->n_dependents);
        }
    CHECK(n_choices == s->n_choices && n_tables + s->n_free_tables == s->limits.max_sequences && n_rings + s->n_free_rings == s->limits.n_rings);
    block_pool_check(&s->pool, owners);
    prefix_cache_check(&s->cache, users);
    free(owners);
    free(users);
    free(seen);
}
