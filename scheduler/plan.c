/* Makes the plan of one step: first the rows of sequences that lack one token, then chunks of those catching up, oldest first, then admission, within the step's rows, samples,
 * cost and blocks. Takes blocks, shrinks the prefix cache, preempts. Owns nothing. */
#include "scheduler/internal.h"

/* Samples that are drawn if the choice catches up: one for itself and one for each choice that forks from it. */
static uint32_t samples_of(const struct scheduler *s, uint32_t choice) {
    const struct prompt *prompt = prompt_of(s, choice);
    if (prompt->request.max_new == 0) return 0;
    return s->choices[choice].n_tokens == prompt->request.n_prompt ? 1 + prompt->n_unforked : 1;
}

/* Blocks it will hold when everything known is computed, with one more a lane for each choice that goes on from there. */
static uint64_t blocks_at_peak(const struct scheduler *s, uint32_t choice) {
    uint32_t forks = s->choices[choice].n_tokens == prompt_of(s, choice)->request.n_prompt ? prompt_of(s, choice)->n_unforked : 0;
    return (uint64_t)s->limits.n_lanes * (blocks_of(s->choices[choice].n_tokens) + 1 + forks);
}

static uint32_t rows_missing(const struct choice *it) { return it->n_tokens - it->n_computed; }

static double row_context_us(const struct scheduler *s, const struct choice *it) {
    const uint32_t *tokens = table_lane_tokens(&s->tables, it->table);
    uint64_t slots = 0;
    for (uint32_t lane = 0; lane < s->limits.n_lanes; lane++) slots += tokens[lane];
    return s->limits.cost.per_row_context_us * (double)slots / (double)s->limits.n_lanes;
}

/* Row i of n attends to what is cached and to i + 1 rows of its own step. */
static double rows_cost_us(const struct scheduler *s, double context_us, uint32_t n) {
    double rows = (double)n;
    return rows * (s->limits.cost.per_row_us + context_us) + s->limits.cost.per_row_context_us * rows * (rows + 1) / 2;
}

/* The most rows, at most `most`, that cost no more than budget_us. */
static uint32_t rows_within(const struct scheduler *s, double context_us, uint32_t most, double budget_us) {
    uint32_t low = 0, high = most;
    while (low < high) {
        uint32_t middle = high - (high - low) / 2;
        if (rows_cost_us(s, context_us, middle) <= budget_us)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

/* The most rows, at most `most`, whose blocks are free or can be had from the prefix cache. */
static uint32_t rows_with_blocks(const struct scheduler *s, const struct choice *it, uint32_t most) {
    uint64_t blocks = (uint64_t)s->pool.n_free + s->pool.n_cached;
    uint32_t low = 0, high = most;
    while (low < high) {
        uint32_t middle = high - (high - low) / 2;
        if (table_missing(&s->tables, it->table, middle) <= blocks)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

static void remove_entry(struct scheduler *s, uint32_t choice) {
    struct choice *it = &s->choices[choice];
    if (it->plan_entry == NONE) return;
    struct plan_entry *entry = &s->entries[it->plan_entry];
    s->plan_cost_us -= rows_cost_us(s, row_context_us(s, it), entry->n_rows);
    s->plan.n_rows -= entry->n_rows;
    s->plan.n_samples -= entry->n_samples;
    entry->n_rows = 0; /* left out when the plan is closed */
    it->plan_entry = NONE;
}

/* The last in rank of those running, but never the oldest. NONE: it runs alone. */
static uint32_t choose_victim(const struct scheduler *s) {
    uint32_t victim = NONE;
    for (uint32_t i = 1; i < s->n_running; i++)
        if (victim == NONE || choice_before(s, victim, s->running[i])) victim = s->running[i];
    return victim;
}

/* Lists the blocks of `rows` more rows. false: the choice itself had to give way. */
static bool secure_blocks(struct scheduler *s, uint32_t choice, uint32_t rows) {
    for (;;) {
        uint64_t missing = table_missing(&s->tables, s->choices[choice].table, rows);
        if (blocks_make_free(s, missing)) {
            CHECK(table_append(&s->tables, s->choices[choice].table, rows));
            return true;
        }
        uint32_t victim = choose_victim(s);
        CHECK(victim != NONE); /* alone it fits: scheduler_peak_blocks */
        remove_entry(s, victim);
        choice_preempt(s, victim);
        s->stats.preemptions++;
        s->plan_preempted = true;
        if (victim == choice) return false;
    }
}

static void add_entry(struct scheduler *s, uint32_t choice, uint32_t rows) {
    struct choice *it = &s->choices[choice];
    struct prompt *prompt = prompt_of(s, choice);
    it->plan_entry = s->plan.n_entries++;
    s->entry_choice[it->plan_entry] = choice;
    s->entries[it->plan_entry] = (struct plan_entry){
        .owner = prompt->request.owner,
        .request_id = prompt->request.id,
        .choice = it->number,
        .first_token = it->n_computed,
        .n_rows = rows,
        .n_tokens = it->n_tokens,
        .n_samples = rows == rows_missing(it) ? samples_of(s, choice) : 0,
        .cached_tokens = it->cached_tokens,
        .first_run = !prompt->started,
        .lane_first = table_lane_first(&s->tables, it->table),
        .lane_tokens = table_lane_tokens(&s->tables, it->table),
    };
    s->plan.n_rows += rows;
    s->plan.n_samples += s->entries[it->plan_entry].n_samples;
    s->plan_cost_us += rows_cost_us(s, row_context_us(s, it), rows);
}

/* It lacks one token and draws one sample at most: it runs whatever it costs. */
static bool decodes(const struct scheduler *s, uint32_t choice) { return rows_missing(&s->choices[choice]) == 1 && samples_of(s, choice) <= 1; }

/* A chunk of what it lacks, as the step has room for it. false: the step is full. */
static bool plan_chunk(struct scheduler *s, uint32_t choice) {
    struct choice *it = &s->choices[choice];
    uint32_t missing = rows_missing(it), rows = s->limits.max_rows - s->plan.n_rows;
    if (rows > missing) rows = missing;
    if (rows == missing && s->plan.n_samples + samples_of(s, choice) > s->limits.max_samples) rows--; /* its last row waits for room to sample */
    uint32_t affordable = rows_within(s, row_context_us(s, it), rows, s->limits.step_budget_us - s->plan_cost_us);
    if (!s->plan_chunked && affordable < BLOCK_TOKENS) affordable = BLOCK_TOKENS; /* the first one always gets on */
    if (rows > affordable) rows = affordable;
    if (rows == 0) return s->plan.n_rows < s->limits.max_rows && affordable > 0;
    uint32_t with_blocks = rows_with_blocks(s, it, rows);
    rows = with_blocks ? with_blocks : 1;
    if (!secure_blocks(s, choice, rows)) return true;
    add_entry(s, choice, rows);
    s->plan_chunked = true;
    return true;
}

static uint64_t promised_blocks(const struct scheduler *s, uint32_t choice) {
    if (decodes(s, choice)) return 0;
    uint64_t peak = blocks_at_peak(s, choice), held = table_blocks(&s->tables, s->choices[choice].table);
    return peak > held ? peak - held : 0;
}

/* What stays for a newcomer once those who still read have what they were promised; of a hit, blocks that nobody used stop being spare. */
static bool has_blocks(const struct scheduler *s, uint32_t choice, uint32_t n_runs) {
    if (s->n_running == 0) return true; /* alone it fits */
    uint64_t spare = (uint64_t)s->pool.n_free + s->pool.n_cached, needed = blocks_at_peak(s, choice) + s->limits.watermark_blocks;
    needed -= (uint64_t)n_runs * s->limits.n_lanes;
    for (uint32_t run = 0; run < n_runs; run++) {
        const uint32_t *ids = prefix_entry_ids(&s->cache, s->runs[run]);
        if (s->cache.entries[s->runs[run]].n_users > 0) continue;
        for (uint32_t lane = 0; lane < s->limits.n_lanes; lane++) needed += s->pool.owners[ids[lane]] == 0;
    }
    for (uint32_t i = 0; i < s->n_running; i++) needed += promised_blocks(s, s->running[i]);
    return needed <= spare;
}

static void plan_admissions(struct scheduler *s) {
    while (s->n_waiting > 0 && s->n_running < s->limits.max_sequences && s->plan.n_rows < s->limits.max_rows) {
        uint32_t choice = s->waiting[s->n_waiting - 1];
        double left = s->limits.step_budget_us - s->plan_cost_us;
        if (s->plan_chunked && rows_cost_us(s, 0, 1) > left) return;
        uint32_t n_runs = prefix_lookup(s, choice);
        if (!has_blocks(s, choice, n_runs)) return;
        queue_leave(s, choice);
        queue_run(s, choice);
        prefix_adopt(s, choice, n_runs);
        if (!plan_chunk(s, choice) || s->plan_preempted) return;
    }
}

/* Entries of those preempted after they were planned go; samples get their choices. */
static void close_plan(struct scheduler *s) {
    uint32_t kept = 0, sample = 0;
    for (uint32_t i = 0; i < s->plan.n_entries; i++) {
        if (s->entries[i].n_rows == 0) continue;
        uint32_t choice = s->entry_choice[i];
        struct prompt *prompt = prompt_of(s, choice);
        s->entries[kept] = s->entries[i];
        s->entry_choice[kept] = choice;
        s->choices[choice].plan_entry = kept++;
        prompt->started = true;
        s->stats.chunks += s->entries[kept - 1].n_rows > 1 && s->entries[kept - 1].n_rows < rows_missing(&s->choices[choice]);
        if (s->entries[kept - 1].n_samples == 0) continue;
        for (uint32_t each = prompt->first_choice; each != NONE; each = s->choices[each].next)
            if (each == choice || s->choices[each].state == CHOICE_UNFORKED) s->sample_choice[sample++] = s->choices[each].number;
    }
    CHECK(sample == s->plan.n_samples);
    s->plan.n_entries = kept;
    if (kept == 0) return; /* nothing runs, so the blocks that forks copy from stay as they are */
    s->plan.n_copies = s->n_copies;
    s->n_copies = 0;
    s->planned = true;
    s->stats.steps++;
}

const struct plan *scheduler_plan(struct scheduler *s, uint64_t now_ns) {
    (void)now_ns; /* ages are differences of arrivals: they do not change with time */
    CHECK(!s->planned);
    s->plan = (struct plan){.entries = s->entries,
                            .sample_choice = s->sample_choice,
                            .block_ids = s->tables.ids,
                            .copy_source = s->copy_source,
                            .copy_destination = s->copy_destination};
    s->plan_cost_us = s->limits.cost.fixed_us;
    s->plan_preempted = s->plan_chunked = false;
    uint32_t n = s->n_running;
    for (uint32_t i = 0; i < n; i++) {
        s->order[i] = s->running[i];
        s->choices[s->running[i]].plan_entry = NONE;
    }
    for (uint32_t i = 0; i < n; i++)
        if (s->choices[s->order[i]].state == CHOICE_RUNNING && decodes(s, s->order[i]) && secure_blocks(s, s->order[i], 1))
            add_entry(s, s->order[i], 1);
    for (uint32_t i = 0; i < n; i++)
        if (s->choices[s->order[i]].state == CHOICE_RUNNING && !decodes(s, s->order[i]) && !plan_chunk(s, s->order[i])) break;
    if (!s->plan_preempted) plan_admissions(s);
    close_plan(s);
    return &s->plan;
}
