/* Compression's side of the scheduler: where sequences stop, and what happens to their lanes' blocks. See scheduler.h. */
#include <string.h>

#include "scheduler/internal.h"

#define LANES_AHEAD 16 /* lanes' lists of blocks lie far apart: the next ones' are asked for so far ahead */

static void nearest(uint32_t *point, uint64_t candidate, uint32_t least) {
    if (candidate >= least && candidate < *point) *point = (uint32_t)candidate;
}

uint32_t choice_next_point(struct scheduler *s, const struct choice *choice) {
    const struct scheduler_points *points = &request_of(s, choice)->asked.points;
    uint32_t n_prompt = request_of(s, choice)->asked.n_prompt, point = NONE;
    uint32_t least =
        choice->n_computed + (choice->n_computed == choice->handled_at || choice->n_computed == 0); /* a point here counts until it is dealt with */
    if (points->reading) {
        uint64_t next = ((uint64_t)least + points->reading - 1) / points->reading * points->reading;
        if (next < n_prompt) nearest(&point, next, least);
    }
    if (points->prompt_end) nearest(&point, n_prompt, least);
    if (points->growing) {
        uint64_t steps = least <= n_prompt ? 1 : ((uint64_t)least - n_prompt + points->growing - 1) / points->growing;
        nearest(&point, n_prompt + steps * points->growing, least);
    }
    for (uint32_t i = 0; i < choice->n_pressed; i++) nearest(&point, choice->pressed_at[i], least);
    return point;
}

bool choice_is_due(struct scheduler *s, const struct choice *choice) {
    return choice->n_computed > 0 && choice_next_point(s, choice) == choice->n_computed;
}

uint32_t choice_peak_tokens(struct scheduler *s, const struct choice *choice) {
    const struct scheduler_request *asked = &request_of(s, choice)->asked;
    uint32_t all = choice->n_tokens + 1;
    if (asked->peak_tokens == 0) return all;
    uint32_t held = asked->peak_tokens;
    if (asked->points.reading)
        held += asked->points.reading;
    else if (held < asked->n_prompt)
        held = asked->n_prompt;
    /* Lanes differ: their blocks are at most one a lane more than the average needs. */
    held += BLOCK_TOKENS;
    return held < all ? held : all;
}

static bool was_pressed(const struct choice *choice) {
    for (uint32_t i = 0; i < choice->n_pressed; i++)
        if (choice->pressed_at[i] == choice->n_computed) return true;
    return false;
}

static void describe_due(struct scheduler *s, const struct choice *choice, struct scheduler_due *due) {
    const struct scheduler_request *asked = &request_of(s, choice)->asked;
    *due = (struct scheduler_due){.owner = asked->owner,
                                  .request_id = asked->id,
                                  .choice = choice->index,
                                  .n_computed = choice->n_computed,
                                  .n_prompt = asked->n_prompt,
                                  .ring = choice->ring,
                                  .pressure = was_pressed(choice),
                                  .block_ids = s->tables.ids,
                                  .lane_first = table_lane_first(&s->tables, choice->table),
                                  .lane_tokens = table_lane_tokens(&s->tables, choice->table)};
}

bool scheduler_next_due(struct scheduler *s, struct scheduler_due *due) {
    CHECK(s->n_planned == 0 && s->due == NONE);
    for (uint32_t at = 0; at < s->n_running; at++) {
        struct choice *choice = &s->choices[s->running[at]];
        if (!choice_is_due(s, choice)) continue;
        describe_due(s, choice, due);
        s->due = s->running[at];
        return true;
    }
    return false;
}

/* Of a step in flight, whose rows are counted: it draws the choice's last token. (Who is not in it has a row less than tokens, and who waits for forks has got his.) */
static bool ends_with_step(struct scheduler *s, const struct choice *choice) {
    return choice->n_computed == choice->n_tokens && choice->n_tokens + 1 == choice_limit(request_of(s, choice));
}

uint32_t scheduler_list_due(struct scheduler *s, struct scheduler_due *due, uint32_t max) {
    CHECK(s->n_planned <= 1 && s->due == NONE);
    const bool in_flight = s->n_planned > 0;
    uint32_t n = 0;
    if (in_flight) plan_advance(s);
    for (uint32_t at = 0; at < s->n_running && n < max; at++) {
        const struct choice *choice = &s->choices[s->running[at]];
        if (choice_is_due(s, choice) && !(in_flight && ends_with_step(s, choice))) describe_due(s, choice, &due[n++]);
    }
    return n;
}

static struct choice *due_choice(struct scheduler *s) {
    CHECK(s->due != NONE);
    return &s->choices[s->due];
}

static void handled(struct scheduler *s) {
    struct choice *choice = due_choice(s);
    if (was_pressed(choice)) choice->compacted_step = s->stats.steps + 1; /* whatever came of it, it is the others' turn */
    choice->handled_at = choice->n_computed;
    choice->n_copies = 0;
    s->due = NONE;
}

static void count_compaction(struct scheduler *s, struct choice *choice, uint32_t used_before) {
    uint32_t freed = used_before - block_pool_used(&s->pool);
    s->stats.compactions++;
    s->stats.replays += choice->n_computed <= choice->seen_max;
    s->stats.pressure_compactions += was_pressed(choice);
    if (choice->n_computed > choice->seen_max) choice->seen_max = choice->n_computed;
    choice->compacted_step = s->stats.steps + 1;
    s->stats.blocks_freed += freed;
    s->freed_since_plan += freed;
}

/* The block becomes writable: it leaves the prefix cache, or (shared with another sequence) is not. */
static bool steal(struct scheduler *s, uint32_t id) {
    if (s->pool.owners[id] > 1) return false;
    if (s->pool.cached[id]) {
        uint32_t before = s->cache.n_entries;
        prefix_cache_remove(&s->cache, s->cache.entry_of[id]);
        s->stats.prefix_steals += before - s->cache.n_entries;
    }
    return true;
}

/* Blocks [*first, *end) of the lane are written by a compaction. */
static void written_blocks(const struct scheduler *s, uint32_t table, uint32_t lane, uint32_t n_keep, uint32_t first_evicted, uint32_t *first,
                           uint32_t *end) {
    uint32_t tokens = table_lane_tokens(&s->tables, table)[lane];
    CHECK(n_keep <= tokens && first_evicted <= n_keep);
    *end = blocks_for(n_keep);
    *first = n_keep == tokens ? *end : first_evicted / BLOCK_TOKENS; /* the last block takes the next row, even if the end alone is cut */
}

/* Of the blocks that a compaction writes, those that are not this sequence's alone. */
struct not_own {
    uint64_t shared, cached; /* `cached` may count shared ones too; where none are shared, all that there are, of whomever */
};

static struct not_own written_not_own(const struct scheduler *s, uint32_t table, const uint32_t *n_keep, const uint32_t *first_evicted) {
    struct not_own n = {0};
    if (s->pool.n_shared == 0) return (struct not_own){.cached = s->cache.n_entries};
    for (uint32_t lane = 0; lane < s->limits.n_lanes; lane++) {
        uint32_t first, end;
        written_blocks(s, table, lane, n_keep[lane], first_evicted[lane], &first, &end);
        const uint32_t *ids = table_lane_ids(&s->tables, table, lane);
        for (uint32_t b = first; b < end; b++) {
            n.shared += s->pool.owners[ids[b]] > 1;
            n.cached += s->pool.cached[ids[b]];
        }
    }
    return n;
}

/* The due sequence lets go of everything and comes again. */
static void give_way(struct scheduler *s) {
    uint32_t i = s->due;
    s->due = NONE;
    choice_preempt(s, i);
}

/* Room for the copies of what others share. Whoever is preempted for it may have been one of them. What is kept must not depend on how full the pool is: a lane is never left as it
 * was for want of blocks. */
static bool make_room(struct scheduler *s, const uint32_t *n_keep, const uint32_t *first_evicted, struct not_own *not_own) {
    for (;;) {
        *not_own = written_not_own(s, due_choice(s)->table, n_keep, first_evicted);
        if (blocks_available(s, not_own->shared)) return true;
        uint32_t victim = pick_victim(s);
        if (victim == NONE || victim == s->due) {
            give_way(s);
            return false;
        }
        choice_preempt(s, victim);
    }
}

/* What is written of the lane becomes this sequence's alone. */
static void own_lane(struct scheduler *s, uint32_t table, uint32_t lane, uint32_t first_evicted, struct scheduler_lane_move *move) {
    uint32_t first, end, *destination = s->move_destination + (size_t)lane * s->blocks_max;
    written_blocks(s, table, lane, move->n_keep, first_evicted, &first, &end);
    for (uint32_t b = first; b < end; b++) {
        if (steal(s, move->source[b])) continue;
        if (move->destination == move->source) memcpy(destination, move->source, end * sizeof *destination);
        move->destination = destination;
        destination[b] = block_pool_take(&s->pool, b ? destination[b - 1] : BLOCK_NONE);
        s->stats.compaction_copies++;
    }
}

const struct scheduler_lane_move *scheduler_compact(struct scheduler *s, const struct scheduler_due *due, const uint32_t *n_keep,
                                                    const uint32_t *first_evicted) {
    struct choice *choice = due_choice(s);
    struct not_own not_own;
    CHECK(due->n_computed == choice->n_computed);
    if (!make_room(s, n_keep, first_evicted, &not_own)) return NULL;
    choice_leave_chain(s, s->due);
    choice->evicted = true;
    const uint32_t *tokens = table_lane_tokens(&s->tables, choice->table);
    const bool alone = not_own.shared + not_own.cached == 0;
    for (uint32_t lane = 0, ahead = LANES_AHEAD; lane < s->limits.n_lanes; lane++, ahead++) {
        if (!alone && ahead < s->limits.n_lanes)
            __builtin_prefetch(table_lane_ids(&s->tables, choice->table, ahead) + first_evicted[ahead] / BLOCK_TOKENS);
        CHECK(n_keep[lane] <= tokens[lane] && first_evicted[lane] <= n_keep[lane]);
        const uint32_t *ids = table_lane_ids(&s->tables, choice->table, lane); /* they stay until scheduler_compacted */
        s->moves[lane] =
            (struct scheduler_lane_move){.moves = n_keep[lane] < tokens[lane], .source = ids, .destination = ids, .n_keep = n_keep[lane]};
        if (!alone) own_lane(s, choice->table, lane, first_evicted[lane], &s->moves[lane]);
    }
    return s->moves;
}

void scheduler_compacted(struct scheduler *s, const struct scheduler_due *due) {
    struct choice *choice = due_choice(s);
    CHECK(due->n_computed == choice->n_computed);
    uint32_t before = block_pool_used(&s->pool);
    for (uint32_t lane = 0; lane < s->limits.n_lanes; lane++) {
        const struct scheduler_lane_move *move = &s->moves[lane];
        if (lane + LANES_AHEAD < s->limits.n_lanes) __builtin_prefetch(move[LANES_AHEAD].source + blocks_for(move[LANES_AHEAD].n_keep));
        if (!move->moves) continue;
        for (uint32_t b = 0; move->destination != move->source && b < blocks_for(move->n_keep); b++)
            if (move->source[b] != move->destination[b]) table_replace_by(&s->tables, choice->table, lane, b, move->destination[b]);
        table_truncate(&s->tables, choice->table, lane, move->n_keep);
    }
    count_compaction(s, choice, before);
    handled(s);
}

void scheduler_dropped(struct scheduler *s, const struct scheduler_due *due, const uint32_t *first, const uint32_t *count) {
    struct choice *choice = due_choice(s);
    CHECK(due->n_computed == choice->n_computed);
    uint32_t before = block_pool_used(&s->pool);
    choice_leave_chain(s, s->due);
    choice->evicted = true;
    for (uint32_t lane = 0; lane < s->limits.n_lanes; lane++) {
        if (count[lane] == 0) continue;
        table_drop(&s->tables, choice->table, lane, first[lane], count[lane]);
        s->stats.compaction_drops += count[lane];
    }
    count_compaction(s, choice, before);
    handled(s);
}

void scheduler_kept(struct scheduler *s, const struct scheduler_due *due) {
    CHECK(due->n_computed == due_choice(s)->n_computed);
    handled(s);
}

/* Of the first `count` blocks of every lane, those that another sequence holds too. */
static uint64_t shared_blocks(struct scheduler *s, const struct choice *choice, uint32_t count) {
    uint64_t shared = 0;
    for (uint32_t lane = 0; lane < s->limits.n_lanes; lane++)
        for (uint32_t b = 0; b < count && b < table_lane_blocks(&s->tables, choice->table)[lane]; b++)
            shared += s->pool.owners[table_lane_ids(&s->tables, choice->table, lane)[b]] > 1;
    return shared;
}

bool scheduler_own_first(struct scheduler *s, const struct scheduler_due *due, uint32_t count, uint32_t *n, const uint32_t **source,
                         const uint32_t **destination) {
    struct choice *choice = due_choice(s);
    CHECK(due->n_computed == choice->n_computed);
    choice_leave_chain(s, s->due);
    choice->evicted = true; /* what will be written there is no longer what the prefix cache means */
    *n = 0;
    *source = s->move_source;
    *destination = s->move_destination;
    while (!blocks_available(s, shared_blocks(s, choice, count))) {
        uint32_t victim = pick_victim(s);
        if (victim != NONE && victim != s->due) {
            choice_preempt(s, victim);
            continue;
        }
        give_way(s);
        return false;
    }
    for (uint32_t lane = 0; lane < s->limits.n_lanes; lane++)
        for (uint32_t b = 0; b < count && b < table_lane_blocks(&s->tables, choice->table)[lane]; b++) {
            uint32_t id = table_lane_ids(&s->tables, choice->table, lane)[b];
            if (steal(s, id)) continue;
            s->move_source[*n] = id;
            s->move_destination[(*n)++] = table_replace(&s->tables, choice->table, lane, b);
            s->stats.compaction_copies++;
        }
    return true;
}

bool scheduler_press(struct scheduler *s, bool (*may)(void *context, void *owner), void *context) {
    CHECK(s->n_planned == 0 && s->due == NONE);
    struct choice *longest = NULL;
    for (uint32_t at = 0; at < s->n_running; at++) {
        struct choice *choice = &s->choices[s->running[at]];
        const struct request *request = request_of(s, choice);
        if (choice->state != CHOICE_RUNNING || choice->n_computed < request->asked.n_prompt || choice->handled_at == choice->n_computed ||
            choice_is_due(s, choice))
            continue;
        if (choice->n_pressed == PRESSURE_POINTS_MAX || !may(context, request->asked.owner)) continue;
        if (!longest || choice->compacted_step < longest->compacted_step) longest = choice;
    }
    if (!longest) return false;
    longest->pressed_at[longest->n_pressed++] = longest->n_computed;
    return true;
}
