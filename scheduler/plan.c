/* The plan: forks that wait, decode rows, chunks of those catching up, admission; and the plan that runs ahead. See scheduler.h for the rules, internal.h for the states. */
#include <math.h>
#include <string.h>

#include "scheduler/internal.h"

struct builder {
    struct scheduler *s;
    struct plan *plan;
    struct plan_entry *entries;
    uint32_t *entry_choice;
    uint32_t rows_left, samples_left;
    double cost_us;
    bool decoding;  /* somebody decodes in this step: chunks are bounded by cost */
    bool one_chunk; /* the first chunk may always have BLOCK_TOKENS rows */
};

/* Samples due when the last known token is computed. */
static uint32_t samples_at_end(struct scheduler *s, const struct choice *choice) {
    const struct request *request = request_of(s, choice);
    if (request->asked.max_new == 0) return 0;
    return choice->n_tokens == request->asked.n_prompt && choice->index == 0 ? request->asked.n_candidates : 1;
}

/* rows * (per_row + per_row_context * the context in their middle). */
static double cost_of(const struct step_cost *cost, uint32_t n_computed, uint32_t n_rows) {
    return n_rows * (cost->per_row_us + cost->per_row_context_us * (n_computed + n_rows / 2.0));
}

/* drawn_by: the sample of the plan before that draws the row's token, one more than are known; NONE: all are known. */
static void add_entry(struct builder *b, uint32_t i, uint32_t n_rows, uint32_t drawn_by) {
    struct scheduler *s = b->s;
    struct choice *choice = &s->choices[i];
    struct request *request = request_of(s, choice);
    uint32_t n_tokens = choice->n_tokens + (drawn_by != NONE);
    bool reaches = choice->n_computed + n_rows == n_tokens;
    struct plan_entry *entry = &b->entries[b->plan->n_entries];
    *entry = (struct plan_entry){.owner = request->asked.owner,
                                 .request_id = request->asked.id,
                                 .choice = choice->index,
                                 .first_token = choice->n_computed,
                                 .n_rows = n_rows,
                                 .n_tokens = n_tokens,
                                 .n_samples = reaches ? samples_at_end(s, choice) : 0,
                                 .cached_tokens = choice->cached_tokens,
                                 .preemptions = choice->n_preemptions,
                                 .first_run = !request->started,
                                 .ring = choice->ring,
                                 .drawn_by = drawn_by,
                                 .table = choice->table,
                                 .table_changes = s->tables.changes[choice->table],
                                 .lane_first = table_lane_first(&s->tables, choice->table),
                                 .lane_tokens = table_lane_tokens(&s->tables, choice->table)};
    b->entry_choice[b->plan->n_entries++] = i;
    request->started = true;
    b->plan->n_rows += n_rows;
    b->plan->n_samples += entry->n_samples;
    b->rows_left -= n_rows;
    b->samples_left -= entry->n_samples;
    b->cost_us += cost_of(&s->limits.cost, choice->n_computed, n_rows);
}

static bool lacks_one(struct scheduler *s, const struct choice *choice) {
    return choice->state == CHOICE_RUNNING && choice->n_tokens - choice->n_computed == 1 && !choice_is_due(s, choice);
}

static bool is_behind(struct scheduler *s, const struct choice *choice) {
    return choice->state == CHOICE_RUNNING && choice->n_tokens - choice->n_computed > 1 && !choice_is_due(s, choice);
}

/* One more row for the oldest comes before everybody else's: it always gets on, whatever the others hold. */
static void reserve_oldest(struct scheduler *s) {
    if (s->n_running == 0 || !is_behind(s, &s->choices[s->running[0]])) return;
    uint32_t table = s->choices[s->running[0]].table;
    while (!blocks_available(s, table_missing(&s->tables, table, 1))) {
        uint32_t victim = pick_victim(s);
        if (victim == NONE) return;
        choice_preempt(s, victim);
    }
    CHECK(table_append(&s->tables, table, 1));
}

/* Blocks for every decode row, preempting as needed. */
static void reserve_decode(struct scheduler *s) {
    reserve_oldest(s);
    for (uint32_t at = 0; at < s->n_running; at++) {
        uint32_t i = s->running[at];
        bool preempted = false;
        if (!lacks_one(s, &s->choices[i])) continue;
        while (s->choices[i].state == CHOICE_RUNNING && !blocks_available(s, table_missing(&s->tables, s->choices[i].table, 1))) {
            uint32_t victim = pick_victim(s);
            if (victim == NONE) break;
            choice_preempt(s, victim);
            preempted = true;
        }
        if (s->choices[i].state == CHOICE_RUNNING) (void)table_append(&s->tables, s->choices[i].table, 1);
        if (!preempted) continue;
        for (at = 0; at < s->n_running && choice_older(s, s->running[at], i); at++) {} /* victims may have stood before */
        if (at == s->n_running || s->running[at] != i) at--;                           /* it is gone itself: the next one stands here */
    }
}

/* A row for a sequence that lacks one. Where the step has no row or no sample left for it, it is noted how long it waits. */
static void plan_row(struct builder *b, uint32_t i) {
    struct scheduler *s = b->s;
    struct choice *choice = &s->choices[i];
    if (!lacks_one(s, choice) || table_missing(&s->tables, choice->table, 1) > 0) return;
    if (b->rows_left == 0 || samples_at_end(s, choice) > b->samples_left) {
        if (choice->skipped_since == 0) choice->skipped_since = s->stats.steps + 1;
        return;
    }
    choice->skipped_since = 0;
    b->decoding = b->decoding || choice->n_tokens > request_of(s, choice)->asked.n_prompt;
    add_entry(b, i, 1, NONE);
}

/* Who was passed over longest goes first, so that a prompt's end that draws many samples does not wait for ever behind rows that draw one each. */
static uint32_t longest_skipped(struct scheduler *s) {
    uint32_t longest = NONE;
    for (uint32_t at = 0; at < s->n_running; at++) {
        const struct choice *choice = &s->choices[s->running[at]];
        if (choice->skipped_since > 0 && (longest == NONE || choice->skipped_since < s->choices[longest].skipped_since)) longest = s->running[at];
    }
    return longest;
}

static void plan_decode(struct builder *b) {
    uint32_t first = longest_skipped(b->s);
    if (first != NONE) plan_row(b, first);
    for (uint32_t at = 0; at < b->s->n_running; at++)
        if (b->s->running[at] != first) plan_row(b, b->s->running[at]);
}

/* The most rows from n_computed on whose cost is left: the root of (per_row + context * n_computed) * rows + context / 2 * rows^2 = left. */
static uint32_t rows_within_cost(const struct builder *b, uint32_t n_computed) {
    const struct step_cost *cost = &b->s->limits.cost;
    if (!b->decoding) return UINT32_MAX;
    double left = b->s->limits.step_budget_us / b->s->stats.cost_ratio - b->cost_us, each = cost->per_row_us + cost->per_row_context_us * n_computed,
           half = cost->per_row_context_us / 2;
    double root = left <= 0 ? 0 : half > 0 ? (sqrt(each * each + 4 * half * left) - each) / (2 * half) : each > 0 ? left / each : UINT32_MAX;
    uint32_t rows = root >= UINT32_MAX ? UINT32_MAX : (uint32_t)root;
    return b->one_chunk && rows < BLOCK_TOKENS ? BLOCK_TOKENS : rows;
}

/* One chunk of a sequence that is behind; nothing if there is no room for a row. */
static void plan_chunk(struct builder *b, uint32_t i) {
    struct scheduler *s = b->s;
    struct choice *choice = &s->choices[i];
    uint32_t rows = choice->n_tokens - choice->n_computed, to_point = choice_next_point(s, choice) - choice->n_computed,
             affordable = rows_within_cost(b, choice->n_computed);
    if (rows > to_point) rows = to_point;
    if (rows > b->rows_left) rows = b->rows_left;
    if (rows > affordable) rows = affordable;
    if (choice->n_computed + rows == choice->n_tokens && samples_at_end(s, choice) > b->samples_left) rows--;
    if (rows == 0) return;
    while (rows > 0 && !blocks_available(s, table_missing(&s->tables, choice->table, rows))) { /* a block a lane less */
        uint32_t room = table_room(&s->tables, choice->table);
        rows = room + (rows - room - 1) / BLOCK_TOKENS * BLOCK_TOKENS;
    }
    if (rows == 0) return; /* younger ones wait for blocks; the oldest has its row reserved */
    CHECK(table_append(&s->tables, choice->table, rows));
    add_entry(b, i, rows, NONE);
    b->one_chunk = false;
}

static void plan_chunks(struct builder *b) {
    struct scheduler *s = b->s;
    for (uint32_t at = 0; at < s->n_running && b->rows_left > 0; at++)
        if (is_behind(s, &s->choices[s->running[at]])) plan_chunk(b, s->running[at]);
}

/* Blocks that sequences still reading will need, and copies of what they share, until they are compressed. */
static uint64_t promised(struct scheduler *s) {
    uint64_t sum = 0;
    for (uint32_t at = 0; at < s->n_running; at++) {
        const struct choice *choice = &s->choices[s->running[at]];
        sum += choice->n_copies;
        if (choice->n_tokens - choice->n_computed <= 1) continue;
        uint64_t needed = (uint64_t)s->limits.n_lanes * blocks_for(choice_peak_tokens(s, choice)), listed = table_blocks(&s->tables, choice->table);
        if (needed > listed) sum += needed - listed;
    }
    return sum;
}

struct hit {
    uint32_t leaf, n_runs;
    uint64_t cached_only; /* blocks of it that nobody owns */
};

/* The hit ends where rows can go on. */
static bool can_resume(struct scheduler *s, const struct hit *hit) {
    uint32_t entry = hit->leaf;
    for (uint32_t run = 0; s->limits.resumes && run < s->limits.resume_runs && entry != ENTRY_NONE; run++, entry = s->cache.entries[entry].parent)
        if (!s->limits.resumes(s->limits.resumes_context, prefix_entry_ids(&s->cache, entry))) return false;
    return true;
}

static uint32_t blocks_unowned(const struct scheduler *s, uint32_t entry) {
    uint32_t n = 0;
    for (uint32_t lane = 0; s->cache.entries[entry].n_users == 0 && lane < s->limits.n_lanes; lane++)
        n += s->pool.owners[prefix_entry_ids(&s->cache, entry)[lane]] == 0;
    return n;
}

static struct hit find_hit(struct scheduler *s, const struct choice *choice) {
    const struct request *request = request_of(s, choice);
    struct hit hit = {.leaf = ENTRY_NONE};
    if (request->asked.private || !s->limits.prefix_cache) return hit;
    /* Rows that somebody needs are computed, at a replay too; and one at least before a point, so that whoever is admitted has a row to run. */
    uint32_t most = choice->n_tokens - 1, point = choice_next_point(s, choice);
    if (request->asked.first_needed_row < most) most = request->asked.first_needed_row;
    if (point - 1 < most) most = point - 1;
    while ((hit.n_runs + 1) * BLOCK_TOKENS <= most) {
        uint32_t entry = prefix_cache_find(&s->cache, request->asked.cache_scope, hit.leaf, choice->tokens + (size_t)hit.n_runs * BLOCK_TOKENS);
        if (entry == ENTRY_NONE) break;
        hit.cached_only += blocks_unowned(s, entry);
        hit.leaf = entry;
        hit.n_runs++;
    }
    while (hit.n_runs > 0 && !can_resume(s, &hit)) {
        hit.cached_only -= blocks_unowned(s, hit.leaf);
        hit.leaf = s->cache.entries[hit.leaf].parent;
        hit.n_runs--;
    }
    return hit;
}

static bool has_points(const struct scheduler_request *asked) {
    return asked->points.reading > 0 || asked->points.prompt_end || asked->points.growing > 0;
}

static void use_chain(struct scheduler *s, uint32_t leaf) {
    for (uint32_t entry = leaf; entry != ENTRY_NONE; entry = s->cache.entries[entry].parent) prefix_cache_use(&s->cache, entry);
}

static void take_hit(struct scheduler *s, struct choice *choice, struct hit hit) {
    use_chain(s, hit.leaf);
    choice->leaf = hit.leaf;
    choice->n_runs = hit.n_runs;
    uint32_t *entries = s->move_source; /* free between compactions */
    for (uint32_t run = hit.n_runs, entry = hit.leaf; run-- > 0; entry = s->cache.entries[entry].parent) entries[run] = entry;
    for (uint32_t lane = 0; lane < s->limits.n_lanes; lane++)
        for (uint32_t run = 0; run < hit.n_runs; run++) table_share(&s->tables, choice->table, lane, prefix_entry_ids(&s->cache, entries[run])[lane]);
    table_fill(&s->tables, choice->table, hit.n_runs * BLOCK_TOKENS);
    choice->n_computed = choice->cached_tokens = hit.n_runs * BLOCK_TOKENS;
    if (!choice->joins) return;
    s->stats.prefix_queries += choice->n_tokens;
    s->stats.prefix_hits += choice->n_computed;
    s->stats.prefix_partial_hits += hit.n_runs > 0 && hit.n_runs < (choice->n_tokens - 1) / BLOCK_TOKENS;
}

static bool admit(struct builder *b) {
    struct scheduler *s = b->s;
    uint32_t head = waiting_head(s);
    if (head == NONE) return false;
    uint32_t i = s->waiting[head];
    struct choice *choice = &s->choices[i];
    struct hit hit = find_hit(s, choice);
    uint64_t needed = (uint64_t)s->limits.n_lanes * blocks_for(choice_peak_tokens(s, choice)), hits = (uint64_t)hit.n_runs * s->limits.n_lanes;
    uint64_t copies = has_points(&request_of(s, choice)->asked) ? hits - hit.cached_only : 0;
    needed = (needed > hits ? needed - hits : 0) + hit.cached_only + copies;
    uint64_t available = (uint64_t)s->pool.n_free + s->pool.n_cached, spoken_for = promised(s) + s->limits.watermark_blocks;
    if (s->n_running > 0 && needed + spoken_for > available) return false; /* alone it always fits: the caller refused what does not */
    if (rows_within_cost(b, hit.n_runs * BLOCK_TOKENS) == 0 || !choice_take_table(s, i)) return false;
    s->stats.admissions_by_compression += s->freed_since_plan > 0 && needed + spoken_for + s->freed_since_plan > available;
    waiting_remove(s, i);
    choice->state = CHOICE_RUNNING;
    choice->joins = s->limits.prefix_cache && !request_of(s, choice)->asked.private;
    take_hit(s, choice, hit);
    choice->n_copies = (uint32_t)copies;
    running_insert(s, i);
    const uint32_t n_entries = b->plan->n_entries;
    if (is_behind(s, choice))
        plan_chunk(b, i);
    else if (lacks_one(s, choice) && samples_at_end(s, choice) <= b->samples_left &&
             blocks_available(s, table_missing(&s->tables, choice->table, 1))) {
        CHECK(table_append(&s->tables, choice->table, 1));
        add_entry(b, i, 1, NONE);
        b->one_chunk = false;
    }
    if (s->limits.resumes && hit.n_runs > 0 && b->plan->n_entries == n_entries) { /* what resumes now need not resume later */
        choice_preempt(s, i);
        return false;
    }
    return true;
}

static bool fork_one(struct scheduler *s, uint32_t from, uint32_t to) {
    const struct choice *leader = &s->choices[from];
    struct choice *choice = &s->choices[to];
    uint32_t partial = 0;
    for (uint32_t lane = 0; lane < s->limits.n_lanes; lane++) partial += table_lane_tokens(&s->tables, leader->table)[lane] % BLOCK_TOKENS != 0;
    if (request_of(s, leader)->asked.private || request_of(s, leader)->asked.rereads || !blocks_available(s, partial) || !choice_take_table(s, to))
        return false;
    for (uint32_t lane = 0; lane < s->limits.n_lanes; lane++) {
        uint32_t tokens = table_lane_tokens(&s->tables, leader->table)[lane], full = tokens / BLOCK_TOKENS;
        const uint32_t *ids = table_lane_ids(&s->tables, leader->table, lane);
        for (uint32_t block = 0; block < full; block++) table_share(&s->tables, choice->table, lane, ids[block]);
        if (tokens % BLOCK_TOKENS) {
            block_pool_share(&s->pool, ids[full]); /* until the copy is done */
            s->copy_source[s->n_copies] = ids[full];
            s->copy_choice[s->n_copies] = to;
            s->copy_destination[s->n_copies++] = table_take(&s->tables, choice->table, lane);
        }
        table_set_tokens(&s->tables, choice->table, lane, tokens);
    }
    choice->state = CHOICE_RUNNING;
    choice->n_computed = leader->n_computed;
    choice->handled_at = leader->handled_at;
    choice_inherit_points(choice, leader);
    choice->evicted = leader->evicted;
    choice->leaf = leader->leaf;
    choice->n_runs = leader->n_runs;
    choice->joins = leader->joins;
    choice->cached_tokens = leader->cached_tokens;
    use_chain(s, choice->leaf);
    running_insert(s, to);
    s->stats.forks++;
    return true;
}

/* Leaders are those in `running` whose request has choices in FORKING. */
void fork_pending(struct scheduler *s) {
    for (uint32_t at = 0; at < s->n_running;) {
        uint32_t leader = s->running[at], request = s->choices[leader].request;
        bool forks = s->choices[leader].index == 0 && s->requests[request].n_dependents > 0 &&
                     s->choices[leader].n_computed >= s->requests[request].asked.n_prompt;
        if (!forks) {
            at++;
            continue;
        }
        CHECK(!choice_is_due(s, &s->choices[leader]));
        for (uint32_t i = s->requests[request].first_choice; i != NONE; i = s->choices[i].next) {
            if (s->choices[i].state != CHOICE_FORKING) continue;
            if (fork_one(s, leader, i))
                s->requests[request].n_dependents--;
            else
                fork_recompute(s, leader, i);
        }
        CHECK(s->requests[request].n_dependents == 0);
        request_settle(s, request);
        at = 0; /* running has changed */
    }
}

/* Forks that were preempted by the plan that made them want no copies. */
static void drop_copies(struct scheduler *s) {
    uint32_t kept = 0;
    for (uint32_t c = 0; c < s->n_copies; c++) {
        if (s->choices[s->copy_choice[c]].state != CHOICE_RUNNING) {
            block_pool_give(&s->pool, s->copy_source[c]);
            continue;
        }
        s->copy_source[kept] = s->copy_source[c];
        s->copy_destination[kept++] = s->copy_destination[c];
    }
    s->n_copies = kept;
}

static struct builder begin(struct scheduler *s, uint32_t which) {
    s->plans[which] = (struct plan){
        .entries = plan_entries(s, which), .block_ids = s->tables.ids, .copy_source = s->copy_source, .copy_destination = s->copy_destination};
    return (struct builder){.s = s,
                            .plan = &s->plans[which],
                            .entries = plan_entries(s, which),
                            .entry_choice = plan_choices(s, which),
                            .rows_left = s->limits.max_rows,
                            .samples_left = s->limits.max_samples,
                            .cost_us = s->limits.cost.fixed_us,
                            .one_chunk = true};
}

const struct plan *scheduler_plan(struct scheduler *s, uint64_t now_ns) {
    CHECK(s->n_planned == 0 && s->due == NONE);
    struct builder b = begin(s, s->current);
    uint64_t preemptions = s->stats.preemptions;
    s->now_ns = now_ns;
    s->n_copies = 0;
    s->is_full = false;
    fork_pending(s);
    reserve_decode(s);
    plan_decode(&b);
    plan_chunks(&b);
    bool preempted = s->stats.preemptions > s->preemptions_before; /* by this plan, or by scheduler_own_first since the one before */
    while (b.rows_left > 0 && (!preempted || s->n_running == 0) && rows_within_cost(&b, 0) > 0)
        if (!admit(&b)) {
            s->is_full = s->stats.preemptions == preemptions && b.one_chunk; /* not for want of cost, nor by giving back what it took */
            break;
        }
    drop_copies(s);
    CHECK(b.plan->n_entries > 0 || s->n_copies == 0); /* a fork that keeps its blocks has a row */
    b.plan->n_copies = s->n_copies;
    s->preemptions_before = s->stats.preemptions;
    s->freed_since_plan = 0;
    s->n_planned = b.plan->n_entries > 0;
    s->planned_us = b.decoding && !b.one_chunk ? b.cost_us : 0;
    return b.plan;
}

/* ---- one step ahead ---- */

/* Of a row that draws its choice's last token nothing follows. */
static bool is_last(struct scheduler *s, const struct plan_entry *entry, uint32_t i) {
    return entry->n_tokens + 1 == choice_limit(request_of(s, &s->choices[i]));
}

/* By the last plan alone. Whoever waits could not be admitted by the last scheduler_plan (is_full), and cannot be now, as long as nobody has ended since. */
static bool may_run_ahead(struct scheduler *s) {
    const struct plan *plan = &s->plans[s->current];
    const uint32_t *choices = plan_choices(s, s->current);
    uint32_t n_running = 0, n_go_on = 0;
    for (uint32_t e = 0; e < plan->n_entries; e++) {
        const struct plan_entry *entry = &plan->entries[e];
        if (choices[e] == NONE) continue;
        const struct choice *choice = &s->choices[choices[e]];
        if (choice->state != CHOICE_RUNNING || choice->silent || entry->n_rows != 1 || entry->n_samples != 1) return false;
        if (entry->first_token < request_of(s, choice)->asked.n_prompt) return false;
        n_running++;
        n_go_on += !is_last(s, entry, choices[e]);
    }
    if (plan->n_copies > 0 || n_running != s->n_running || n_go_on == 0) return false;
    return s->n_waiting == 0 || (s->is_full && n_go_on == plan->n_entries);
}

const struct plan *scheduler_plan_ahead(struct scheduler *s) {
    CHECK(s->n_planned == 1 && s->due == NONE);
    const struct plan *plan = &s->plans[s->current];
    const uint32_t *choices = plan_choices(s, s->current);
    if (!may_run_ahead(s)) return NULL;
    plan_advance(s);
    for (uint32_t e = 0; e < plan->n_entries; e++)
        if (choices[e] != NONE && !is_last(s, &plan->entries[e], choices[e]) && choice_is_due(s, &s->choices[choices[e]])) return NULL;
    struct builder b = begin(s, s->current ^ 1);
    for (uint32_t e = 0; e < plan->n_entries; e++) {
        if (choices[e] == NONE || is_last(s, &plan->entries[e], choices[e])) continue;
        uint32_t table = s->choices[choices[e]].table;
        if (!blocks_available(s, table_missing(&s->tables, table, 1))) return NULL; /* what others got stays listed for their next rows */
        CHECK(table_append(&s->tables, table, 1));
        add_entry(&b, choices[e], 1, e);
    }
    s->n_planned++;
    s->planned_us = 0;
    return b.plan;
}
