/* What blocks cost the host at Llama-3.1-8B's shape, over scheduler/ and blockmgr/ alone: decode steps, and cutting sequences to 1/8. On a GPU the device is idle meanwhile.
 *
 *   blocks_overhead [LOAD [STEPS]]      one of the loads below, all of them if none is named; so many steps, of which the first half is not measured
 *
 * 256 lanes (32 layers x 8 KV heads) of 16 KiB blocks, four to an extent. Sequences come, grow together, are cut in ragged lanes and go, so that after the steps of each load that are not
 * measured ids lie as after a long life. Prompts share nothing. Steps run ahead as in the engine: one is the plan of the next and the commit of the last. Microseconds: the median,
 * the 10th and 90th percentile, the mean of
 * the lower 95 in 100. The checksum is of the ids listed at the end: equal as long as the same calls hand out the same blocks. Main thread. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/block.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/random.h"
#include "scheduler/scheduler.h"

enum { LANES = 256, EXTENT_BLOCKS = 4, MODEL_LEN = 8192, SAMPLES = 1 << 16 };

struct load {
    const char *name, *what;
    uint32_t n_sequences, n_blocks;
    uint32_t prompt[2], generated[2]; /* from, to */
    bool cuts;                        /* to 1/8 at the prompt's end, and every BLOCK_TOKENS tokens from there on */
    bool cached;                      /* the prefix cache is on; each prompt is a scope of its own */
    uint32_t steps;
};

static const struct load loads[] = {
    {"uniform",
     "batch 256, all lanes alike: 8 sequences a step need a block in each lane",
     256,
     2560 << 10,
     {100, 1000},
     {100, 1000},
     false,
     false,
     8000},
    {"ragged",
     "batch 256, lanes cut to 1/8: each sequence needs blocks in some lanes at each step",
     256,
     1280 << 10,
     {500, 4000},
     {100, 1000},
     true,
     false,
     8000},
    {"pool", "prompts of 6,000 and 500 tokens in a pool of 5 GB, cut to 1/8", 96, 320 << 10, {6000, 6000}, {500, 500}, true, false, 8000},
    {"cached", "the same with the prefix cache", 96, 320 << 10, {6000, 6000}, {500, 500}, true, true, 8000},
};

/* One kind of call. */
struct timing {
    uint32_t n;
    double us[SAMPLES];
    uint64_t blocks;
};

struct bench {
    const struct load *load;
    struct scheduler *scheduler;
    struct random random;
    uint64_t next_id;
    int32_t *tokens; /* of every sequence: nobody reads them */
    uint32_t n_keep[LANES], first[LANES];
    bool measuring;
    struct timing decode, read, compact, compacted, again, again_compacted; /* `read`: steps in which somebody reads a prompt */
};

static void note(const struct bench *bench, struct timing *timing, uint64_t begin, uint64_t end, uint64_t blocks) {
    if (!bench->measuring || timing->n == SAMPLES) return;
    timing->us[timing->n++] = (double)(end - begin) / 1000;
    timing->blocks += blocks;
}

static uint32_t between(struct bench *bench, const uint32_t range[2]) { return range[0] + random_below(&bench->random, range[1] - range[0] + 1); }

static void keep_busy(struct bench *bench) {
    struct scheduler_stats stats;
    scheduler_stats(bench->scheduler, &stats);
    for (uint32_t n = stats.running + stats.waiting; n < bench->load->n_sequences; n++) {
        bench->next_id++;
        struct scheduler_request request = {.id = bench->next_id,
                                            .n_candidates = 1,
                                            .tokens = &bench->tokens,
                                            .n_prompt = between(bench, bench->load->prompt),
                                            .max_new = between(bench, bench->load->generated),
                                            .arrival_ns = bench->next_id,
                                            .cache_scope = bench->next_id,
                                            .first_needed_row = UINT32_MAX};
        if (bench->next_id <= bench->load->n_sequences)
            request.max_new = 1 + random_below(&bench->random, request.max_new); /* they don't all end together */
        if (bench->load->cuts) {
            request.points = (struct scheduler_points){.prompt_end = true, .growing = BLOCK_TOKENS};
            request.peak_tokens = MODEL_LEN / 8;
        }
        CHECK(scheduler_add(bench->scheduler, &request));
    }
}

/* Each lane keeps a share of 1/8 of what was seen, from a quarter of that to nearly twice as much; which slots leave begins somewhere among those kept. */
static void cut(struct bench *bench, const struct scheduler_due *due) {
    for (uint32_t lane = 0; lane < LANES; lane++) {
        uint32_t eighths = 2 + (uint32_t)(random_at(1, due->request_id, lane, 0) % 13), keep = due->n_computed / 8 * eighths / 8;
        bench->n_keep[lane] = keep < due->lane_tokens[lane] ? keep : due->lane_tokens[lane];
        bench->first[lane] = random_below(&bench->random, bench->n_keep[lane] + 1);
    }
    bool at_end = due->n_computed == due->n_prompt;
    uint32_t used = scheduler_blocks_used(bench->scheduler);
    uint64_t begin = clock_now_ns();
    CHECK(scheduler_compact(bench->scheduler, due, bench->n_keep, bench->first));
    uint64_t middle = clock_now_ns();
    scheduler_compacted(bench->scheduler, due);
    uint64_t end = clock_now_ns();
    uint32_t freed = used - scheduler_blocks_used(bench->scheduler);
    note(bench, at_end ? &bench->compact : &bench->again, begin, middle, freed);
    note(bench, at_end ? &bench->compacted : &bench->again_compacted, middle, end, freed);
}

static void between_steps(struct bench *bench) {
    struct scheduler_due due;
    while (scheduler_next_due(bench->scheduler, &due)) cut(bench, &due);
}

static void run(struct bench *bench, uint32_t n_steps) {
    static const bool ended[LANES * 2];
    keep_busy(bench);
    CHECK(scheduler_plan(bench->scheduler, 0)->n_entries > 0);
    for (uint32_t step = 0; step < n_steps; step++) {
        bench->measuring = step >= n_steps / 2;
        keep_busy(bench);
        uint32_t used = scheduler_blocks_used(bench->scheduler);
        uint64_t begin = clock_now_ns();
        const struct plan *next = scheduler_plan_ahead(bench->scheduler);
        uint32_t taken = scheduler_blocks_used(bench->scheduler) - used;
        scheduler_commit(bench->scheduler, ended);
        uint64_t spent = clock_now_ns() - begin;
        if (!next) {
            between_steps(bench);
            used = scheduler_blocks_used(bench->scheduler);
            begin = clock_now_ns();
            next = scheduler_plan(bench->scheduler, 0);
            spent += clock_now_ns() - begin;
            taken += scheduler_blocks_used(bench->scheduler) - used;
        }
        CHECK(next->n_entries > 0);
        note(bench, next->n_rows == next->n_entries ? &bench->decode : &bench->read, 0, spent, taken);
    }
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print(const char *what, struct timing *timing) {
    if (timing->n == 0) return;
    double sum = 0;
    qsort(timing->us, timing->n, sizeof *timing->us, compare);
    uint32_t n = timing->n - timing->n / 20; /* the machine may do something else now and then */
    for (uint32_t i = 0; i < n; i++) sum += timing->us[i];
    printf("  %-34s %6u %10.1f %9.1f %9.1f %9.1f %9.1f\n", what, timing->n, (double)timing->blocks / timing->n, timing->us[timing->n / 2],
           timing->us[timing->n / 10], timing->us[(uint64_t)timing->n * 9 / 10], sum / n);
}

static uint64_t checksum(struct bench *bench) {
    uint64_t sum = 0;
    static const bool ended[LANES * 2];
    scheduler_commit(bench->scheduler, ended);
    between_steps(bench);
    const struct plan *plan = scheduler_plan(bench->scheduler, 0);
    CHECK(plan->n_entries > 0);
    for (uint32_t e = 0; e < plan->n_entries; e++)
        for (uint32_t lane = 0; lane < LANES; lane++)
            for (uint32_t b = 0; b < plan->entries[e].lane_tokens[lane] / BLOCK_TOKENS; b++)
                sum = random_mix(sum ^ plan->block_ids[plan->entries[e].lane_first[lane] + b]);
    scheduler_commit(bench->scheduler, ended);
    return sum;
}

static void measure(const struct load *load, uint32_t n_steps) {
    struct scheduler_limits limits = {.n_lanes = LANES,
                                      .n_blocks = load->n_blocks,
                                      .extent_blocks = EXTENT_BLOCKS,
                                      .max_sequences = load->n_sequences,
                                      .max_choices = load->n_sequences,
                                      .max_model_len = MODEL_LEN,
                                      .max_rows = 8192,
                                      .max_samples = load->n_sequences,
                                      .cost = {.fixed_us = 5000, .per_row_us = 20},
                                      .step_budget_us = 50000,
                                      .watermark_blocks = load->n_blocks / 50,
                                      .prefix_cache = load->cached};
    struct bench *bench = check_calloc(1, sizeof *bench);
    *bench = (struct bench){.load = load, .scheduler = scheduler_new(&limits), .random = {1}, .tokens = check_calloc(2 * MODEL_LEN, sizeof(int32_t))};
    run(bench, n_steps);
    struct scheduler_stats stats;
    scheduler_stats(bench->scheduler, &stats);
    printf("%s: %s\n", load->name, load->what);
    printf("  %u of %u blocks used by %u sequences, %" PRIu64 " preemptions, checksum %016" PRIx64 "\n", stats.blocks_used, stats.blocks_total,
           stats.running, stats.preemptions, checksum(bench));
    printf("  %-34s %6s %10s %9s %9s %9s %9s\n", "", "calls", "blocks", "median", "10 %", "90 %", "mean 95 %");
    print("step, all decode", &bench->decode);
    print("step, somebody reads", &bench->read);
    print("prompt's end: scheduler_compact", &bench->compact);
    print("prompt's end: scheduler_compacted", &bench->compacted);
    print("later: scheduler_compact", &bench->again);
    print("later: scheduler_compacted", &bench->again_compacted);
    scheduler_check(bench->scheduler);
    scheduler_free(bench->scheduler);
    free(bench->tokens);
    free(bench);
}

int main(int argc, char **argv) {
    bool found = false;
    for (size_t i = 0; i < sizeof loads / sizeof *loads; i++) {
        if (argc > 1 && strcmp(argv[1], loads[i].name) != 0) continue;
        measure(&loads[i], argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 10) : loads[i].steps);
        found = true;
    }
    if (!found) (void)fprintf(stderr, "blocks_overhead: no load %s\n", argv[1]);
    return !found;
}
