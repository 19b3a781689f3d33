/* Replays millions of steps of scheduler, block pool, block tables and prefix cache with random geometry, load, aborts and compression, and checks everything after each step.
 *
 * The model of a backend: a slot of a block holds the hash of the history of the token that filled it (lane included). Every row checks that all slots its table names hold
 * exactly what this choice should have there. It also keeps copies of the tables, to which each plan adds what table_changes says is new, and compares them. The next token is a function of the history, so recomputation, forks and shared prefixes cannot change what a choice says.
 * In two seeds of three, steps run ahead where the scheduler allows it: their rows are written before the step before is committed, and what that one draws is shown to the scheduler with its commit.
 * Behind half of the others it is asked who will be due, which must be who is due after the commit, but for those who ended with it.
 *
 *   simulation            the seeds that make a million steps; fails unless every hard path was taken a thousand times
 *   simulation --seed N   one seed, with its counters
 *   simulation --time     what a step costs at 64 sequences x 90 lanes */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/random.h"
#include "scheduler/internal.h"

#define LANES_MAX 8
#define TABLES_MAX 32
#define BLOCKS_MAX 256
#define LEN_MAX 160
#define CANDIDATES_MAX 4
#define REQUESTS_MAX 48
#define DUE_MAX TABLES_MAX
#define STEPS_TO_END 60000u /* bound within which every request ends */

#ifdef KVASIR_SANITIZED
#define STEPS_WANTED 60000u
#define TIMES_WANTED 20u
#else
#define STEPS_WANTED 1000000u
#define TIMES_WANTED 1000u
#endif

struct kept { /* what a lane of a choice should hold */
    uint32_t n;
    uint16_t position[LEN_MAX];
};

struct sim_choice {
    int32_t tokens[LEN_MAX];
    int32_t known[LEN_MAX]; /* what the scheduler may read: tokens, once they are committed */
    uint32_t n_tokens;
    uint64_t hashes[LEN_MAX + 1]; /* of the first tokens: [i] of i of them, up to n_hashed */
    uint32_t n_hashed;
    bool ended, has_table;
    struct kept lanes[LANES_MAX];
};

struct sim_request {
    bool live;
    uint64_t id, added_step;
    uint32_t n_prompt, max_new, n_candidates, n_ended;
    bool compressed, drops;
    int32_t *pointers[CANDIDATES_MAX];
    struct sim_choice choices[CANDIDATES_MAX];
};

/* What a backend with memory of its own knows of a table. */
struct table_copy {
    uint32_t changes, n[LANES_MAX], ids[LANES_MAX][LEN_MAX / BLOCK_TOKENS + 2], tokens[LANES_MAX];
};

/* A step from its rows to its commit. */
struct flight {
    const struct plan *plan;
    bool last[256]; /* of its samples: a choice's last token by its own will */
};

struct counters {
    uint64_t steps, requests, aborts[5], pool_full, ids_known, ids_new, ahead, ahead_full, ahead_again, for_nothing, foretold, foretold_for_nothing;
    struct scheduler_stats sum;
};

struct sim {
    uint64_t seed;
    struct random random, took, ahead, behind;
    struct scheduler_limits limits;
    struct scheduler *scheduler;
    struct sim_request requests[REQUESTS_MAX];
    uint64_t next_id, step;
    uint64_t slots[BLOCKS_MAX][BLOCK_TOKENS];
    struct table_copy tables[TABLES_MAX];
    struct flight flights[2]; /* [0]: the older */
    bool is_ahead;            /* flights[0] has run and waits for its commit */
    uint32_t
        unfit; /* the choice at the head of those that wait, when a step ran ahead; NONE: nobody waited, or something has come since that could help him */
    bool pressing;
    /* Who will be due after flights[0], as the scheduler says while it is under way. */
    struct scheduler_due foretold[DUE_MAX];
    uint32_t n_foretold, foretold_max; /* foretold_max: it was asked for so many; 0: it was not asked */
};

static struct counters counters;

static _Noreturn void failed(const struct sim *sim, const char *what) {
    fprintf(stderr, "simulation: %s (seed %" PRIu64 ", step %" PRIu64 "); replay with --seed %" PRIu64 "\n", what, sim->seed, sim->step, sim->seed);
    abort();
}
#define EXPECT(condition, what) ((condition) ? (void)0 : failed(sim, what))

static void put_token(struct sim_choice *choice, uint32_t at, int32_t token) {
    choice->tokens[at] = token;
    if (choice->n_hashed > at) choice->n_hashed = at;
}

static uint64_t history_hash(struct sim_choice *choice, uint32_t count) {
    choice->hashes[0] = 1;
    for (uint32_t *n = &choice->n_hashed; *n < count; ++*n)
        choice->hashes[*n + 1] = random_mix(choice->hashes[*n] ^ (uint64_t)(uint32_t)choice->tokens[*n]);
    return choice->hashes[count];
}

static uint64_t slot_value(struct sim_choice *choice, uint32_t position, uint32_t lane) {
    return history_hash(choice, position + 1) ^ random_mix(lane);
}

static int32_t next_token(struct sim_choice *choice, uint32_t candidate, uint32_t n_tokens) {
    return (int32_t)(random_mix(history_hash(choice, n_tokens) ^ candidate) >> 32 & 3);
}

static bool is_last(struct sim_choice *choice, uint32_t n_tokens) { return history_hash(choice, n_tokens) % 61 == 0; }

/* A backend that could go on from three blocks of four. */
static bool resumes(void *context, const uint32_t *ids) {
    const struct sim *sim = context;
    return random_mix(sim->seed ^ ids[0]) % 4 != 0;
}

static void draw_limits(struct sim *sim) {
    struct random *r = &sim->random;
    uint32_t lanes = 1 + random_below(r, LANES_MAX), model_len = 16 + random_below(r, LEN_MAX - 16);
    uint32_t least = lanes * ((model_len + BLOCK_TOKENS - 1) / BLOCK_TOKENS);
    uint32_t blocks = least + random_below(r, random_below(r, 2) ? BLOCKS_MAX - least + 1 : least + 1);
    if (blocks < 8) blocks = 8;
    sim->limits = (struct scheduler_limits){.n_lanes = lanes,
                                            .n_blocks = blocks > BLOCKS_MAX ? BLOCKS_MAX : blocks,
                                            .extent_blocks = 1u << random_below(r, 4),
                                            .max_sequences = 1 + random_below(r, TABLES_MAX),
                                            .max_choices = REQUESTS_MAX + random_below(r, 64),
                                            .max_model_len = model_len,
                                            .max_rows = 4 + random_below(r, 120),
                                            .max_samples = CANDIDATES_MAX + random_below(r, 32),
                                            .cost = {.fixed_us = 10, .per_row_us = 1, .per_row_context_us = 0.01},
                                            .step_budget_us = 20 + random_below(r, 200),
                                            .watermark_blocks = random_below(r, 1 + blocks / 20),
                                            .n_rings = 1 + random_below(r, 8),
                                            .prefix_cache = random_below(r, 4) != 0,
                                            .hash_seed = sim->seed};
    if (sim->seed % 3 == 0) {
        sim->limits.resumes = resumes;
        sim->limits.resumes_context = sim;
        sim->limits.resume_runs = 2;
    }
}

static void add_request(struct sim *sim) {
    struct random *r = &sim->random;
    struct sim_request *request = NULL;
    for (uint32_t i = 0; i < REQUESTS_MAX && !request; i++)
        if (!sim->requests[i].live) request = &sim->requests[i];
    if (!request) return;
    memset(request, 0, sizeof *request);
    request->live = true;
    request->id = ++sim->next_id;
    request->added_step = sim->step;
    request->n_prompt = 1 + random_below(r, sim->limits.max_model_len);
    uint32_t room = sim->limits.max_model_len - request->n_prompt;
    request->max_new = random_below(r, room + 1);
    request->n_candidates = random_below(r, 3) ? 1 : 1 + random_below(r, CANDIDATES_MAX);
    uint32_t family = random_below(r, 4), own_from = random_below(r, request->n_prompt + 1); /* prompts of a family begin alike */
    for (uint32_t i = 0; i < request->n_prompt; i++)
        request->choices[0].known[i] = request->choices[0].tokens[i] =
            (int32_t)(random_mix(i < own_from ? family * 1000 + i : request->id * 1000 + i) & 3);
    for (uint32_t c = 0; c < request->n_candidates; c++) {
        for (uint32_t i = c ? 0 : request->n_prompt; i < LEN_MAX; i++) request->choices[c].known[i] = -1;
        request->pointers[c] = request->choices[c].known;
        request->choices[c].n_tokens = request->n_prompt;
    }
    struct scheduler_request asked = {.id = request->id,
                                      .owner = request,
                                      .n_candidates = request->n_candidates,
                                      .tokens = request->pointers,
                                      .n_prompt = request->n_prompt,
                                      .max_new = request->max_new,
                                      .priority = (int32_t)random_below(r, 3) - 1,
                                      .arrival_ns = sim->step * 1000000,
                                      .cache_scope = random_below(r, 8) == 0,
                                      .rereads = sim->limits.resumes,
                                      .first_needed_row = random_below(r, 6) == 0 ? random_below(r, request->n_prompt) : UINT32_MAX};
    request->compressed = random_below(r, 2);
    if (request->compressed) {
        request->drops = random_below(r, 4) == 0;
        asked.points = (struct scheduler_points){
            .prompt_end = random_below(r, 4) != 0, .growing = 1 + random_below(r, 24), .reading = random_below(r, 4) ? 0 : 8 + random_below(r, 64)};
        asked.peak_tokens = asked.points.reading ? 0 : 8 + random_below(r, 64);
        asked.private = request->drops;
        asked.needs_ring = random_below(r, 2);
    }
    if (!scheduler_add(sim->scheduler, &asked)) {
        request->live = false;
        return;
    }
    counters.requests++;
    sim->unfit = NONE;
}

static void settle(struct sim_request *request) {
    if (request->n_ended == request->n_candidates) request->live = false;
}

static const struct choice *inner_choice(const struct sim *sim, const struct sim_request *request, uint32_t index) {
    struct scheduler *s = sim->scheduler;
    uint32_t i = s->requests[request_find(s, request->id)].first_choice;
    while (s->choices[i].index != index) i = s->choices[i].next;
    return &s->choices[i];
}

/* A table from which nothing was evicted holds every position; one that was evicted from holds what this model remembers. */
static void know_lanes(struct sim *sim, struct sim_request *request, uint32_t index, uint32_t n_computed, const uint32_t *lane_tokens) {
    struct sim_choice *choice = &request->choices[index];
    bool evicted = inner_choice(sim, request, index)->evicted;
    for (uint32_t lane = 0; lane < sim->limits.n_lanes; lane++) {
        struct kept *kept = &choice->lanes[lane];
        EXPECT(lane_tokens[lane] == (evicted ? kept->n : n_computed), "a lane of another length");
        for (uint32_t i = 0; !evicted && i < n_computed; i++) kept->position[i] = (uint16_t)i;
        kept->n = lane_tokens[lane];
    }
}

enum abort_kind { ABORT_WAITING, ABORT_READING, ABORT_DECODING, ABORT_UNFORKED, ABORT_PREEMPTED, ABORT_KINDS };

static enum abort_kind kind_of(const struct choice *inner) {
    if (inner->state == CHOICE_WAITING) return inner->preempted ? ABORT_PREEMPTED : ABORT_WAITING;
    if (inner->state == CHOICE_RUNNING) return inner->n_computed + 1 < inner->n_tokens ? ABORT_READING : ABORT_DECODING;
    return ABORT_UNFORKED;
}

/* Aborts a choice in the state that was asked for, if one is found at the first tries. */
static void abort_some(struct sim *sim) {
    static const enum abort_kind order[] = {ABORT_READING, ABORT_PREEMPTED, ABORT_READING, ABORT_PREEMPTED,
                                            ABORT_WAITING, ABORT_DECODING,  ABORT_UNFORKED}; /* the rare ones are sought more */
    enum abort_kind wanted = order[random_below(&sim->random, sizeof order / sizeof *order)];
    for (uint32_t tries = 0; tries < 128; tries++) {
        struct sim_request *request = &sim->requests[random_below(&sim->random, REQUESTS_MAX)];
        uint32_t index = random_below(&sim->random, CANDIDATES_MAX);
        if (!request->live) {
            EXPECT(!scheduler_abort(sim->scheduler, request->id, index), "an abort of what has ended was taken");
            continue;
        }
        if (index >= request->n_candidates || request->choices[index].ended || kind_of(inner_choice(sim, request, index)) != wanted) continue;
        EXPECT(scheduler_abort(sim->scheduler, request->id, index), "an abort of a live choice was refused");
        counters.aborts[wanted]++;
        sim->unfit = NONE;
        request->choices[index].ended = true;
        request->n_ended++;
        settle(request);
        return;
    }
}

/* Which slots stay: a function of the request, the point and the lane, so that a replay keeps the same. */
static uint32_t keep_some(const struct sim_request *request, uint32_t n_computed, uint32_t lane, const struct kept *lane_now, uint32_t *keep) {
    uint32_t n = 0;
    uint64_t level = random_mix(request->id * 131 + n_computed) % 4;
    if (lane_now->n > 8 && random_mix(request->id * 137 + n_computed) % 8 == 0) { /* only the end is cut */
        for (; n < lane_now->n / 2; n++) keep[n] = n;
        return n;
    }
    for (uint32_t i = 0; i < lane_now->n; i++) {
        uint64_t draw = random_mix(request->id ^ (uint64_t)n_computed << 20 ^ (uint64_t)lane << 40 ^ lane_now->position[i]);
        bool sink_or_recent = lane_now->position[i] < level || lane_now->position[i] + 2u >= n_computed;
        if (sink_or_recent || draw % 4 < level || lane_now->n < 8) keep[n++] = i;
    }
    return n;
}

static void compress(struct sim *sim, const struct scheduler_due *due) {
    struct sim_request *request = due->owner;
    struct sim_choice *choice = &request->choices[due->choice];
    uint32_t keep[LANES_MAX][LEN_MAX], n_keep[LANES_MAX], first[LANES_MAX], count[LANES_MAX];
    EXPECT(due->n_computed <= choice->n_tokens && due->request_id == request->id, "a due choice that is not");
    know_lanes(sim, request, due->choice, due->n_computed, due->lane_tokens);
    if (!due->pressure && random_mix(request->id ^ due->n_computed) % 16 == 0) {
        scheduler_kept(sim->scheduler, due);
        return;
    }
    if (request->drops) {
        for (uint32_t lane = 0; lane < sim->limits.n_lanes; lane++) {
            uint32_t full = due->lane_tokens[lane] / BLOCK_TOKENS;
            first[lane] = 1;
            count[lane] = full > 2 ? 1 : 0;
            if (!count[lane]) continue;
            memmove(choice->lanes[lane].position + BLOCK_TOKENS, choice->lanes[lane].position + 2 * BLOCK_TOKENS,
                    (choice->lanes[lane].n - 2 * BLOCK_TOKENS) * sizeof *choice->lanes[lane].position);
            choice->lanes[lane].n -= BLOCK_TOKENS;
        }
        if (random_below(&sim->random, 2)) {
            uint32_t n;
            const uint32_t *source, *destination;
            if (!scheduler_own_first(sim->scheduler, due, 1, &n, &source, &destination)) {
                for (uint32_t lane = 0; lane < sim->limits.n_lanes; lane++) choice->lanes[lane].n = 0;
                return;
            }
            for (uint32_t i = 0; i < n; i++) memcpy(sim->slots[destination[i]], sim->slots[source[i]], sizeof sim->slots[0]);
        }
        scheduler_dropped(sim->scheduler, due, first, count);
        return;
    }
    for (uint32_t lane = 0; lane < sim->limits.n_lanes; lane++) {
        n_keep[lane] = keep_some(request, due->n_computed, lane, &choice->lanes[lane], keep[lane]);
        first[lane] = 0;
        while (first[lane] < n_keep[lane] && keep[lane][first[lane]] == first[lane]) first[lane]++;
    }
    const struct scheduler_lane_move *moves = scheduler_compact(sim->scheduler, due, n_keep, first);
    if (!moves) { /* preempted */
        for (uint32_t lane = 0; lane < sim->limits.n_lanes; lane++) choice->lanes[lane].n = 0;
        return;
    }
    for (uint32_t lane = 0; lane < sim->limits.n_lanes; lane++) {
        if (!moves[lane].moves) continue;
        for (uint32_t i = first[lane]; i < n_keep[lane]; i++) {
            uint32_t from = keep[lane][i];
            sim->slots[moves[lane].destination[i / BLOCK_TOKENS]][i % BLOCK_TOKENS] =
                sim->slots[moves[lane].source[from / BLOCK_TOKENS]][from % BLOCK_TOKENS];
            choice->lanes[lane].position[i] = choice->lanes[lane].position[from];
        }
        for (uint32_t b = first[lane] / BLOCK_TOKENS; b < (n_keep[lane] + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
             b++) /* the unmoved head of a fresh block comes along */
            if (moves[lane].destination[b] != moves[lane].source[b] && b * BLOCK_TOKENS < first[lane])
                memcpy(sim->slots[moves[lane].destination[b]], sim->slots[moves[lane].source[b]],
                       (first[lane] - b * BLOCK_TOKENS) * sizeof(uint64_t));
        choice->lanes[lane].n = n_keep[lane];
    }
    scheduler_compacted(sim->scheduler, due);
}

static bool may_press(void *context, void *owner) {
    (void)context;
    return ((struct sim_request *)owner)->compressed;
}

static void note_waiting(const struct sim *sim, bool waits[REQUESTS_MAX][CANDIDATES_MAX]) {
    for (uint32_t r = 0; r < REQUESTS_MAX; r++)
        for (uint32_t c = 0; c < CANDIDATES_MAX; c++) {
            const struct sim_request *request = &sim->requests[r];
            waits[r][c] = request->live && c < request->n_candidates && inner_choice(sim, request, c)->state == CHOICE_WAITING;
        }
}

/* Who waited before a plan that preempted waits after it, unless nobody else was left to run. */
static void check_nobody_admitted(const struct sim *sim, const struct plan *plan, bool waits[REQUESTS_MAX][CANDIDATES_MAX]) {
    uint32_t n_admitted = 0;
    for (uint32_t r = 0; r < REQUESTS_MAX; r++)
        for (uint32_t c = 0; c < CANDIDATES_MAX; c++) n_admitted += waits[r][c] && inner_choice(sim, &sim->requests[r], c)->state == CHOICE_RUNNING;
    EXPECT(n_admitted == 0 || n_admitted == plan->n_entries, "an admission in a step that preempted");
}

/* A choice that the plan forked has what its leader has now. */
static void know_forks(struct sim *sim) {
    for (uint32_t r = 0; r < REQUESTS_MAX; r++)
        for (uint32_t c = 1; sim->requests[r].live && c < sim->requests[r].n_candidates; c++) {
            struct sim_choice *choice = &sim->requests[r].choices[c];
            if (choice->has_table || choice->ended || inner_choice(sim, &sim->requests[r], c)->table == NONE) continue;
            memcpy(choice->lanes, sim->requests[r].choices[0].lanes, sizeof choice->lanes);
            choice->has_table = true;
        }
}

static void check_table(struct sim *sim, const struct plan *plan, const struct plan_entry *entry, struct sim_choice *choice) {
    know_lanes(sim, entry->owner, entry->choice, entry->first_token, entry->lane_tokens);
    for (uint32_t lane = 0; lane < sim->limits.n_lanes; lane++) {
        const struct kept *kept = &choice->lanes[lane];
        for (uint32_t i = 0; i < kept->n; i++) {
            uint32_t block = plan->block_ids[entry->lane_first[lane] + i / BLOCK_TOKENS];
            EXPECT(sim->slots[block][i % BLOCK_TOKENS] == slot_value(choice, kept->position[i], lane), "a slot holds what is not this choice's");
        }
    }
}

static void follow_table(struct sim *sim, const struct plan *plan, const struct plan_entry *entry) {
    EXPECT(entry->table < sim->limits.max_sequences && entry->table_changes != 0, "a table that is none");
    struct table_copy *copy = &sim->tables[entry->table];
    bool known = copy->changes == entry->table_changes;
    uint32_t grown = entry->lane_tokens[0] - copy->tokens[0];
    for (uint32_t lane = 0; lane < sim->limits.n_lanes; lane++) {
        const uint32_t *ids = plan->block_ids + entry->lane_first[lane];
        uint32_t needed = (entry->lane_tokens[lane] + entry->n_rows + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
        if (known) EXPECT(entry->lane_tokens[lane] - copy->tokens[lane] == grown, "lanes have not grown alike");
        copy->tokens[lane] = entry->lane_tokens[lane];
        if (!known) copy->n[lane] = 0;
        for (uint32_t b = 0; b < needed; b++) {
            if (b < copy->n[lane]) {
                EXPECT(copy->ids[lane][b] == ids[b], "an id that was listed has changed");
                counters.ids_known++;
                continue;
            }
            copy->ids[lane][copy->n[lane]++] = ids[b];
            counters.ids_new++;
        }
    }
    copy->changes = entry->table_changes;
}

static void run_rows(struct sim *sim, const struct plan *plan, const struct plan_entry *entry, struct sim_choice *choice) {
    for (uint32_t lane = 0; lane < sim->limits.n_lanes; lane++) {
        struct kept *kept = &choice->lanes[lane];
        for (uint32_t row = 0; row < entry->n_rows; row++) {
            uint32_t slot = kept->n++, block = plan->block_ids[entry->lane_first[lane] + slot / BLOCK_TOKENS];
            uint32_t owners = sim->scheduler->pool.owners[block];
            for (uint32_t c = 0; c < plan->n_copies; c++) owners -= plan->copy_source[c] == block; /* held for a copy that is done by now */
            EXPECT(owners == 1 && !sim->scheduler->pool.cached[block], "a row is written to a block that others read");
            kept->position[slot] = (uint16_t)(entry->first_token + row);
            sim->slots[block][slot % BLOCK_TOKENS] = slot_value(choice, entry->first_token + row, lane);
        }
    }
}

/* Draws a choice's token after n_tokens of them; true: that is its last by its own will. */
static bool draw_token(struct sim *sim, struct sim_request *request, uint32_t candidate, uint32_t n_tokens) {
    struct sim_choice *choice = &request->choices[candidate];
    if (choice->ended) return false;
    if (candidate > 0 && n_tokens == request->n_prompt)
        for (uint32_t i = 0; i < n_tokens; i++) put_token(choice, i, request->choices[0].tokens[i]);
    EXPECT(n_tokens < request->n_prompt + request->max_new, "a token too many");
    put_token(choice, n_tokens, next_token(choice, candidate, n_tokens));
    return is_last(choice, n_tokens + 1);
}

/* The scheduler may read it now. */
static void know_token(struct sim *sim, struct sim_request *request, uint32_t candidate, bool last) {
    struct sim_choice *choice = &request->choices[candidate];
    if (choice->ended) return;
    choice->known[choice->n_tokens] = choice->tokens[choice->n_tokens];
    choice->n_tokens++;
    if (!last && choice->n_tokens < request->n_prompt + request->max_new) return;
    choice->ended = true;
    request->n_ended++;
    sim->unfit = NONE;
}

/* What a device does with a plan. */
static void run_plan(struct sim *sim, struct flight *flight, const struct plan *plan) {
    uint32_t n_samples = 0, n_rows = 0;
    flight->plan = plan;
    for (uint32_t i = 0; i < plan->n_copies; i++)
        memcpy(sim->slots[plan->copy_destination[i]], sim->slots[plan->copy_source[i]], sizeof sim->slots[0]);
    for (uint32_t e = 0; e < plan->n_entries; e++)
        check_table(sim, plan, &plan->entries[e], &((struct sim_request *)plan->entries[e].owner)->choices[plan->entries[e].choice]);
    for (uint32_t e = 0; e < plan->n_entries; e++) follow_table(sim, plan, &plan->entries[e]);
    for (uint32_t e = 0; e < plan->n_entries; e++) {
        const struct plan_entry *entry = &plan->entries[e];
        struct sim_request *request = entry->owner;
        struct sim_choice *choice = &request->choices[entry->choice];
        bool ahead = entry->drawn_by != UINT32_MAX;
        EXPECT(request->live || request->n_ended == request->n_candidates, "an entry of a request that is over");
        EXPECT(entry->n_tokens == choice->n_tokens + ahead, "a token that is neither known nor drawn");
        EXPECT(entry->n_rows >= 1 && entry->first_token + entry->n_rows <= entry->n_tokens, "rows beyond what is known");
        run_rows(sim, plan, entry, choice);
        n_rows += entry->n_rows;
        if (entry->n_samples > 1)
            for (uint32_t c = 1; c < request->n_candidates; c++) flight->last[n_samples + c] = draw_token(sim, request, c, entry->n_tokens);
        if (entry->n_samples) flight->last[n_samples] = draw_token(sim, request, entry->choice, entry->n_tokens);
        n_samples += entry->n_samples;
    }
    EXPECT(n_rows == plan->n_rows && n_rows <= sim->limits.max_rows && n_samples == plan->n_samples && n_samples <= sim->limits.max_samples,
           "a plan out of bounds");
}

/* What the host does with its results. */
static void commit_plan(struct sim *sim, struct flight *flight) {
    const struct plan *plan = flight->plan;
    uint32_t n_samples = 0;
    for (uint32_t e = 0; e < plan->n_entries; n_samples += plan->entries[e++].n_samples) {
        const struct plan_entry *entry = &plan->entries[e];
        struct sim_request *request = entry->owner;
        if (entry->over) {
            EXPECT(entry->drawn_by != UINT32_MAX && request->choices[entry->choice].ended, "an entry that is not over");
            flight->last[n_samples] = random_below(&sim->ahead, 2); /* nobody's */
            counters.for_nothing++;
            continue;
        }
        if (entry->n_samples > 1)
            for (uint32_t c = 1; c < request->n_candidates; c++) know_token(sim, request, c, flight->last[n_samples + c]);
        if (entry->n_samples) know_token(sim, request, entry->choice, flight->last[n_samples]);
        if (request->max_new == 0 && entry->first_token + entry->n_rows == request->n_prompt) /* nothing to say: over with its prompt */
            for (uint32_t c = 0; c < request->n_candidates; c++)
                if (!request->choices[c].ended) request->choices[c].ended = ++request->n_ended > 0;
    }
    scheduler_commit(sim->scheduler, flight->last);
    for (uint32_t i = 0; i < REQUESTS_MAX; i++)
        if (sim->requests[i].live) settle(&sim->requests[i]);
}

static void check_world(struct sim *sim) {
    scheduler_check(sim->scheduler);
    struct scheduler_stats stats;
    scheduler_stats(sim->scheduler, &stats);
    bool any = false;
    for (uint32_t i = 0; i < REQUESTS_MAX; i++) {
        any = any || sim->requests[i].live;
        if (sim->requests[i].live) EXPECT(sim->step - sim->requests[i].added_step < STEPS_TO_END, "a request does not end");
    }
    if (!any && sim->scheduler->n_running == 0)
        EXPECT(stats.blocks_used == 0 && stats.running == 0 && stats.waiting == 0, "idle, but blocks are used");
    counters.pool_full += stats.blocks_used + stats.blocks_cached == stats.blocks_total;
}

/* Between steps, none being ahead; false: there was nothing to do. */
static bool begin_step(struct sim *sim, bool load) {
    struct random *r = &sim->random;
    if (load && random_below(r, 4) == 0) add_request(sim);
    if (random_below(r, 6) == 0) abort_some(sim);
    if (random_below(r, 2000) == 0) scheduler_drop_prefix_cache(sim->scheduler);
    if (random_below(r, 16) == 0) (void)scheduler_press(sim->scheduler, may_press, NULL);
    struct scheduler_stats before, after;
    scheduler_stats(sim->scheduler, &before);
    struct scheduler_due due;
    for (; scheduler_next_due(sim->scheduler, &due); sim->unfit = NONE) compress(sim, &due);
    bool waits[REQUESTS_MAX][CANDIDATES_MAX];
    note_waiting(sim, waits);
    const struct plan *plan = scheduler_plan(sim->scheduler, sim->step * 1000000);
    scheduler_stats(sim->scheduler, &after);
    if (after.preemptions > before.preemptions) check_nobody_admitted(sim, plan, waits);
    EXPECT(sim->unfit == NONE || after.preemptions > before.preemptions || sim->scheduler->choices[sim->unfit].state != CHOICE_RUNNING,
           "somebody who could have run waited behind steps ahead");
    sim->unfit = NONE;
    EXPECT(plan->n_entries > 0 || after.running + after.waiting == 0, "a plan without entries, but somebody waits");
    know_forks(sim);
    if (plan->n_entries > 0) run_plan(sim, &sim->flights[0], plan);
    return plan->n_entries > 0;
}

/* The step after flights[0], whose draws the scheduler does not know. */
static bool run_ahead(struct sim *sim) {
    const struct plan *before = sim->flights[0].plan, *plan = scheduler_plan_ahead(sim->scheduler);
    struct scheduler_stats stats;
    scheduler_stats(sim->scheduler, &stats);
    if (!plan) return false;
    EXPECT(plan->n_entries > 0 && plan->n_copies == 0 && plan->n_rows == plan->n_entries && plan->n_samples == plan->n_entries,
           "more than a row each, ahead");
    for (uint32_t e = 0; e < plan->n_entries; e++) {
        const struct plan_entry *entry = &plan->entries[e], *drawer = &before->entries[entry->drawn_by];
        EXPECT(entry->drawn_by < before->n_entries && drawer->owner == entry->owner && drawer->choice == entry->choice,
               "a token that another choice draws");
        EXPECT(!choice_is_due(sim->scheduler, inner_choice(sim, entry->owner, entry->choice)), "a row beyond a point, ahead");
    }
    run_plan(sim, &sim->flights[1], plan);
    counters.ahead++;
    counters.ahead_full += stats.waiting > 0;
    sim->unfit = waiting_head(sim->scheduler) == NONE ? NONE : sim->scheduler->waiting[waiting_head(sim->scheduler)];
    counters.ahead_again += before->entries[0].drawn_by != UINT32_MAX;
    return true;
}

static void foretell(struct sim *sim) {
    sim->foretold_max = random_below(&sim->behind, 2) ? 0 : random_below(&sim->behind, 2) ? DUE_MAX : 1 + random_below(&sim->behind, 3);
    sim->n_foretold = sim->foretold_max ? scheduler_list_due(sim->scheduler, sim->foretold, sim->foretold_max) : 0;
}

static bool is_same_due(const struct scheduler_due *a, const struct scheduler_due *b) {
    return a->owner == b->owner && a->request_id == b->request_id && a->choice == b->choice && a->n_computed == b->n_computed &&
           a->n_prompt == b->n_prompt && a->ring == b->ring && a->pressure == b->pressure && a->block_ids == b->block_ids &&
           a->lane_first == b->lane_first && a->lane_tokens == b->lane_tokens;
}

static void check_foretold(struct sim *sim) {
    struct scheduler_due due[DUE_MAX];
    if (sim->foretold_max == 0) return;
    const uint32_t n = scheduler_list_due(sim->scheduler, due, DUE_MAX);
    uint32_t n_found = 0;
    for (uint32_t f = 0; f < sim->n_foretold; f++) { /* in the order in which they are dealt with */
        const struct scheduler_due *foretold = &sim->foretold[f];
        const struct sim_request *request = foretold->owner;
        bool found = n_found < n && is_same_due(foretold, &due[n_found]);
        EXPECT(found || !request->live || request->id != foretold->request_id || request->choices[foretold->choice].ended,
               "somebody was to be due, who neither is nor has ended");
        n_found += found;
    }
    EXPECT(n_found == n || sim->n_foretold == sim->foretold_max, "somebody is due of whom it was not said");
    counters.foretold += n_found;
    counters.foretold_for_nothing += sim->n_foretold - n_found;
}

static bool step(struct sim *sim, bool load) {
    sim->step++;
    bool ran = sim->is_ahead || begin_step(sim, load);
    if (ran) {
        sim->is_ahead = sim->seed % 3 != 1 && random_below(&sim->ahead, 8) != 0 && run_ahead(sim);
        sim->foretold_max = 0;
        if (!sim->is_ahead) foretell(sim);
        commit_plan(sim, &sim->flights[0]);
        check_foretold(sim);
        if (sim->is_ahead)
            sim->flights[0] = sim->flights[1];
        else if (sim->seed % 2)
            scheduler_took(sim->scheduler, (double)random_below(&sim->took, 1000)); /* whatever steps take, every request ends */
    }
    check_world(sim);
    counters.steps++;
    return ran;
}

static void add_stats(const struct scheduler_stats *stats) {
    uint64_t *to = &counters.sum.preemptions;
    const uint64_t *from = &stats->preemptions;
    for (; from <= &stats->steps; from++, to++) *to += *from;
}

static void run_seed(uint64_t seed, uint32_t n_steps) {
    struct sim *sim = check_calloc(1, sizeof *sim);
    sim->seed = seed;
    sim->random.state = seed;
    sim->took.state = ~seed;
    sim->ahead.state = seed << 32;
    sim->behind.state = ~seed << 32;
    sim->unfit = NONE;
    draw_limits(sim);
    sim->scheduler = scheduler_new(&sim->limits);
    for (uint32_t i = 0; i < n_steps; i++) (void)step(sim, true);
    uint32_t idle = 0;
    for (uint32_t left = STEPS_TO_END; idle < 3; left--) {
        EXPECT(left > 0, "the load does not drain");
        idle = step(sim, false) ? 0 : idle + 1;
    }
    for (uint32_t i = 0; i < REQUESTS_MAX; i++) EXPECT(!sim->requests[i].live, "idle, but a request lives");
    struct scheduler_stats stats;
    scheduler_drop_prefix_cache(sim->scheduler);
    scheduler_stats(sim->scheduler, &stats);
    EXPECT(stats.blocks_used == 0 && stats.blocks_cached == 0, "blocks are lost");
    add_stats(&stats);
    scheduler_free(sim->scheduler);
    free(sim);
}

static bool enough(const char *what, uint64_t count) {
    printf("  %-36s %10" PRIu64 "%s\n", what, count, count < TIMES_WANTED ? "  too few" : "");
    return count >= TIMES_WANTED;
}

static bool report(void) {
    const struct scheduler_stats *s = &counters.sum;
    printf("%" PRIu64 " steps, %" PRIu64 " requests\n", counters.steps, counters.requests);
    bool all = enough("preemptions", s->preemptions);
    all &= enough("forks", s->forks);
    all &= enough("forks recomputed", s->forks_recomputed);
    all &= enough("blocks copied for forks", s->blocks_copied);
    all &= enough("prefix hits (tokens)", s->prefix_hits);
    all &= enough("partial prefix hits", s->prefix_partial_hits);
    all &= enough("prefix evictions", s->prefix_evictions);
    all &= enough("chunks", s->chunks);
    all &= enough("pool full", counters.pool_full);
    all &= enough("aborts, waiting", counters.aborts[ABORT_WAITING]);
    all &= enough("aborts, reading", counters.aborts[ABORT_READING]);
    all &= enough("aborts, decoding", counters.aborts[ABORT_DECODING]);
    all &= enough("aborts, not yet forked", counters.aborts[ABORT_UNFORKED]);
    all &= enough("aborts, preempted", counters.aborts[ABORT_PREEMPTED]);
    all &= enough("compactions", s->compactions);
    all &= enough("compaction steals", s->prefix_steals);
    all &= enough("compaction copies", s->compaction_copies);
    all &= enough("blocks dropped", s->compaction_drops);
    all &= enough("replays", s->replays);
    all &= enough("pressure compactions", s->pressure_compactions);
    all &= enough("admissions by compression", s->admissions_by_compression);
    all &= enough("block ids known before", counters.ids_known);
    all &= enough("block ids new", counters.ids_new);
    all &= enough("steps ahead", counters.ahead);
    all &= enough("steps ahead of one ahead", counters.ahead_again);
    all &= enough("steps ahead while others wait", counters.ahead_full);
    all &= enough("rows ahead for nothing", counters.for_nothing);
    all &= enough("due, as was said before", counters.foretold);
    all &= enough("ended instead of being due", counters.foretold_for_nothing);
    return all;
}

/* 64 sequences of 90 lanes that all decode: what plan and commit cost, and what they cost in the steps in which every lane needs a block. */
static void time_steps(void) {
    struct scheduler_limits limits = {.n_lanes = 90,
                                      .n_blocks = 64 * 90 * 40,
                                      .extent_blocks = 8,
                                      .max_sequences = 64,
                                      .max_choices = 64,
                                      .max_model_len = 1200,
                                      .max_rows = 64 * 128, /* all prompts in one step, so that all cross into new blocks together */
                                      .max_samples = 64,
                                      .cost = {.per_row_us = 1},
                                      .step_budget_us = 1e9,
                                      .prefix_cache = true,
                                      .hash_seed = 1};
    struct scheduler *s = scheduler_new(&limits);
    int32_t *tokens = check_calloc((size_t)64 * 1200, sizeof *tokens), *pointers[64];
    bool ended[64] = {false};
    for (uint32_t i = 0; i < 64; i++) {
        pointers[i] = tokens + (size_t)i * 1200;
        pointers[i][0] = (int32_t)i;
        struct scheduler_request asked = {
            .id = i + 1, .n_candidates = 1, .tokens = &pointers[i], .n_prompt = 128, .max_new = 1000, .first_needed_row = UINT32_MAX};
        CHECK(scheduler_add(s, &asked));
    }
    double sum = 0, max = 0, crossing = 0;
    uint32_t n = 0, n_crossing = 0;
    for (uint32_t i = 0; i < 1000; i++) {
        uint64_t begin = clock_now_ns();
        const struct plan *plan = scheduler_plan(s, 0);
        bool decode = plan->n_rows == 64;
        if (plan->n_entries == 0) break;
        bool crosses = decode;
        for (uint32_t e = 0; e < plan->n_entries; e++) crosses = crosses && plan->entries[e].lane_tokens[0] % BLOCK_TOKENS == 0;
        scheduler_commit(s, ended);
        double us = (double)(clock_now_ns() - begin) / 1e3;
        if (!decode) continue;
        sum += us;
        n++;
        if (us > max) max = us;
        if (crosses) crossing += us, n_crossing++;
    }
    printf("plan + commit, 64 sequences x 90 lanes: mean %.1f us, all lanes crossing a block %.1f us, max %.1f us (%u steps)\n", sum / n,
           crossing / n_crossing, max, n);
    free(tokens);
    scheduler_free(s);
}

int main(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "--time") == 0) {
        time_steps();
        return 0;
    }
    if (argc == 3 && strcmp(argv[1], "--seed") == 0) {
        run_seed(strtoull(argv[2], NULL, 10), 3000);
        (void)report();
        return 0;
    }
    for (uint64_t seed = 1; counters.steps < STEPS_WANTED; seed++) run_seed(seed, 3000);
    bool all = report();
    printf("%s\n", all ? "1 passed, 0 failed" : "0 passed, 1 failed");
    return all ? 0 : 1;
}
