/* What a sequence shares with others through the prefix cache: the runs it takes over when admitted, the runs it leaves there as it computes them.
 * A running sequence is a user of every entry on the path from the root to choice.entry, and holds all their blocks. */
#include "scheduler/internal.h"

/* At least the last known token is computed, and every row from first_needed_row on. */
static uint32_t runs_allowed(const struct scheduler *s, uint32_t choice) {
    uint32_t rows = s->choices[choice].n_tokens - 1, needed = prompt_of(s, choice)->request.first_needed_row;
    return (needed < rows ? needed : rows) / BLOCK_TOKENS;
}

uint32_t prefix_lookup(struct scheduler *s, uint32_t choice) {
    const struct choice *it = &s->choices[choice];
    const struct scheduler_request *request = &prompt_of(s, choice)->request;
    uint32_t allowed = s->limits.prefix_cache ? runs_allowed(s, choice) : 0, n = 0, parent = ENTRY_NONE;
    for (; n < allowed; n++) {
        parent = prefix_cache_find(&s->cache, request->cache_scope, parent, request->tokens[it->number] + (size_t)n * BLOCK_TOKENS);
        if (parent == ENTRY_NONE) break;
        s->runs[n] = parent;
    }
    return n;
}

void prefix_adopt(struct scheduler *s, uint32_t choice, uint32_t n_runs) {
    struct choice *it = &s->choices[choice];
    for (uint32_t run = 0; run < n_runs; run++) {
        const uint32_t *ids = prefix_entry_ids(&s->cache, s->runs[run]);
        prefix_cache_use(&s->cache, s->runs[run]);
        for (uint32_t lane = 0; lane < s->limits.n_lanes; lane++) table_share(&s->tables, it->table, lane, ids[lane]);
        it->entry = s->runs[run];
    }
    table_fill(&s->tables, it->table, n_runs * BLOCK_TOKENS);
    it->n_runs = n_runs;
    it->n_computed = it->cached_tokens = n_runs * BLOCK_TOKENS;
    if (!s->limits.prefix_cache) return;
    s->stats.prefix_queries += it->n_tokens;
    s->stats.prefix_hits += it->cached_tokens;
    s->stats.prefix_partial_hits += n_runs > 0 && n_runs < (it->n_tokens - 1) / BLOCK_TOKENS;
}

/* Another sequence left the same run there first: its blocks hold the same numbers (the row contract), so this sequence takes them over and gives its own back. */
static void take_over(struct scheduler *s, struct choice *it, uint32_t entry) {
    const uint32_t *ids = prefix_entry_ids(&s->cache, entry);
    prefix_cache_use(&s->cache, entry);
    for (uint32_t lane = 0; lane < s->limits.n_lanes; lane++) {
        uint32_t *id = table_lane_ids(&s->tables, it->table, lane) + it->n_runs;
        block_pool_share(&s->pool, ids[lane]);
        block_pool_give(&s->pool, *id);
        *id = ids[lane];
    }
}

void prefix_contribute(struct scheduler *s, uint32_t choice) {
    struct choice *it = &s->choices[choice];
    const struct scheduler_request *request = &prompt_of(s, choice)->request;
    while (it->sharing && (it->n_runs + 1) * BLOCK_TOKENS <= it->n_computed) {
        const int32_t *tokens = request->tokens[it->number] + (size_t)it->n_runs * BLOCK_TOKENS;
        uint32_t entry = prefix_cache_find(&s->cache, request->cache_scope, it->entry, tokens);
        if (entry != ENTRY_NONE) {
            take_over(s, it, entry);
        } else {
            for (uint32_t lane = 0; lane < s->limits.n_lanes; lane++) s->lane_ids[lane] = table_lane_ids(&s->tables, it->table, lane)[it->n_runs];
            entry = prefix_cache_insert(&s->cache, request->cache_scope, it->entry, tokens, s->lane_ids);
            if (entry == ENTRY_NONE) return; /* no room for entries: later */
        }
        it->entry = entry;
        it->n_runs++;
    }
}

void prefix_leave_chain(struct scheduler *s, uint32_t choice) {
    struct choice *it = &s->choices[choice];
    while (it->entry != ENTRY_NONE) {
        uint32_t parent = s->cache.entries[it->entry].parent;
        prefix_cache_leave(&s->cache, it->entry);
        it->entry = parent;
    }
    it->n_runs = 0;
}

bool blocks_make_free(struct scheduler *s, uint64_t n) {
    while (s->pool.n_free < n) {
        if (!prefix_cache_evict(&s->cache)) return false;
        s->stats.prefix_evictions++;
    }
    return true;
}
