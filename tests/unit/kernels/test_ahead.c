/* Two steps in flight, on every backend that takes them and for every KV dtype: what is drawn is what is drawn one step at a time. Sequences of different lengths cross blocks, are sampled in
 * every way, for some dtypes one of them on the host as the backend has no room for its lists; one ends unforeseen, while its next row is under way, and another takes over its table and its blocks.
 * And block tables of lanes that are cut to different lengths and grow: who takes what is new of them draws what who takes all of them draws. And steps that add attention up, and others between
 * them: what is in the slots is what a backend that may not replay a step as it was (its logits are asked for) has there. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <math.h>

#include "base/check.h"
#include "base/random.h"
#include "kernels/backend.h"
#include "tests/support/backends.h"
#include "tests/support/tiny_program.h"

enum {
    LANES = 4,
    LANE_BLOCKS = 6,
    SEQUENCES = 4,
    POOL = SEQUENCES * LANES * LANE_BLOCKS,
    ROWS = 128,
    STEPS = 70,
    LEAVES_AFTER = 20, /* steps, sequence 1; */
    TAKEN_OVER = 30,   /* its place, by another, in this step */
    LONG = 24000,      /* biases: two such lists are more than fit */
    N_VOCAB = 64,
};

struct half {
    int32_t tokens[ROWS], positions[ROWS];
    struct batch_sequence sequences[SEQUENCES];
    struct sample samples[SEQUENCES];
    uint32_t sequence_of[SEQUENCES]; /* of each sample */
    struct batch batch;
};

struct world {
    const struct backend_ops *ops;
    struct backend *backend;
    uint32_t ids[POOL], lane_first[SEQUENCES][LANES], lane_tokens[SEQUENCES][LANES], changes[SEQUENCES];
    uint32_t length[SEQUENCES], n_drawn[SEQUENCES];
    int32_t next[SEQUENCES]; /* to be taken in; < 0: sample -1 - next of the step before draws it */
    struct half halves[2];
    struct sample_result drawn[STEPS][SEQUENCES];
    uint32_t refuses; /* which launches the device does, in turn, of some steps when they are submitted first: the first, or the first two */
    uint32_t n_submitted;
};

static struct logit_bias biases[2][LONG];
static uint32_t
    n_biases; /* LONG: some samples are the host's, who then waits for each step before the next is launched; few: steps wait for nothing */

static const struct sampling *sampling_of(uint32_t sequence) {
    static struct sampling all[SEQUENCES];
    all[0] = (struct sampling){.top_p = 1, .repetition_penalty = 1, .n_top = 3};
    all[1] =
        (struct sampling){.temperature = 1, .top_p = 0.95f, .repetition_penalty = 1, .n_top = -1, .seed = 7, .n_bias = n_biases, .bias = biases[0]};
    all[2] = (struct sampling){
        .temperature = 2, .top_p = 1, .top_k = 30, .repetition_penalty = 1, .n_top = 20, .seed = 9, .n_bias = n_biases, .bias = biases[1]};
    all[3] = (struct sampling){.temperature = 1.5f, .top_p = 1, .min_p = 0.01f, .repetition_penalty = 1, .n_top = -1, .seed = 11};
    return &all[sequence];
}

static void open_world(struct world *world, const struct backend_ops *ops, const struct program *program, enum kv_dtype dtype) {
    struct error error = {.text = ""};
    memset(world, 0, sizeof *world);
    world->ops = ops;
    CHECK(program_lanes(program) == LANES && program->n_vocab == N_VOCAB);
    const struct backend_limits limits = {.kv_dtype = dtype,
                                          .deterministic = true,
                                          .accumulators = true,
                                          .n_blocks = POOL,
                                          .n_tables = SEQUENCES,
                                          .table_blocks = LANE_BLOCKS,
                                          .max_rows = ROWS,
                                          .max_sequences = SEQUENCES,
                                          .max_samples = SEQUENCES,
                                          .threads = 1};
    if (ops->prepare(program, &limits, &world->backend, &error) != STATUS_OK) fail_msg("%s: %s", ops->name, error.text);
    for (uint32_t i = 0; i < POOL; i++) world->ids[i] = i * 37 % POOL;
    for (uint32_t s = 0; s < SEQUENCES; s++) {
        world->changes[s] = 1;
        for (uint32_t lane = 0; lane < LANES; lane++) world->lane_first[s][lane] = (s * LANES + lane) * LANE_BLOCKS;
    }
}

/* The next n_rows rows of `sequence`, of which the last is sampled. */
static void add_rows(struct world *world, struct half *half, uint32_t sequence, uint32_t n_rows) {
    struct batch *batch = &half->batch;
    uint32_t first = batch->n_rows;
    for (uint32_t i = 0; i < n_rows; i++) {
        half->tokens[first + i] = n_rows == 1 ? world->next[sequence] : (int32_t)(random_at(5, sequence, world->length[sequence] + i, 0) % N_VOCAB);
        half->positions[first + i] = (int32_t)(world->length[sequence] + i);
    }
    half->sequences[batch->n_sequences++] = (struct batch_sequence){.first_row = first,
                                                                    .n_rows = n_rows,
                                                                    .table = sequence,
                                                                    .table_changes = world->changes[sequence],
                                                                    .lane_first = world->lane_first[sequence],
                                                                    .lane_tokens = world->lane_tokens[sequence]};
    batch->n_rows += n_rows;
    half->sequence_of[batch->n_samples] = sequence;
    half->samples[batch->n_samples++] = (struct sample){
        .row = batch->n_rows - 1, .sampling = sampling_of(sequence), .choice = sequence, .token_index = world->n_drawn[sequence]++, .target = -1};
}

static struct half *begin(struct world *world, uint32_t step) {
    struct half *half = &world->halves[step % 2];
    half->batch = (struct batch){
        .tokens = half->tokens, .positions = half->positions, .sequences = half->sequences, .block_ids = world->ids, .samples = half->samples};
    return half;
}

void host_refuse_launch(uint32_t which) __attribute__((weak)); /* tests/host_device/launch.h; absent where a device would be */

static void submit(struct world *world, struct half *half) {
    struct error error = {.text = ""};
    if (world->refuses && world->n_submitted % 3 == 1) { /* what brings the step, and the graph */
        host_refuse_launch(1 + world->n_submitted / 3 % world->refuses);
        const enum status status = world->ops->submit(world->backend, &half->batch, &error);
        host_refuse_launch(0);
        assert_int_equal(status, STATUS_DEVICE);
        assert_non_null(strstr(error.text, "too many resources"));
    }
    world->n_submitted++;
    if (world->ops->submit(world->backend, &half->batch, &error) != STATUS_OK) fail_msg("%s", error.text);
    for (uint32_t s = 0; s < half->batch.n_sequences; s++) {
        const struct batch_sequence *sequence = &half->sequences[s];
        world->length[sequence->table] += sequence->n_rows;
        for (uint32_t lane = 0; lane < LANES; lane++) world->lane_tokens[sequence->table][lane] += sequence->n_rows; /* read in submit alone */
        world->next[sequence->table] = -1 - (int32_t)s;
    }
}

static void sync_step(struct world *world, uint32_t step) {
    struct half *half = &world->halves[step % 2];
    struct sample_result results[SEQUENCES];
    struct error error = {.text = ""};
    memset(results, 0xff, sizeof results);
    if (world->ops->sync(world->backend, results, &error) != STATUS_OK) fail_msg("%s", error.text);
    for (uint32_t i = 0; i < half->batch.n_samples; i++) {
        assert_in_range(results[i].token, 0, N_VOCAB - 1);
        world->drawn[step][half->sequence_of[i]] = results[i];
    }
    memset(half->tokens, 0x7f, sizeof half->tokens); /* nobody's any more */
    memset(half->sequences, 0x7f, sizeof half->sequences);
}

static bool has_row(uint32_t sequence, uint32_t step, bool ahead) {
    if (sequence != 1) return true;
    return step < LEAVES_AFTER + (ahead ? 1u : 0u) || step > TAKEN_OVER; /* ahead, it had one more row when it was seen to have ended */
}

/* Prompts in one step, then a row each. Where a step has prompts, nothing is ahead of it, nor it of anything. */
static void run(struct world *world, bool ahead) {
    static const uint32_t prompts[SEQUENCES] = {5, BLOCK_TOKENS - 1, 2 * BLOCK_TOKENS, 20};
    bool in_flight = false;
    for (uint32_t step = 0; step < STEPS; step++) {
        bool reads = step == 0 || step == TAKEN_OVER;
        if (in_flight && reads) sync_step(world, step - 1), in_flight = false;
        for (uint32_t s = 0; s < SEQUENCES && !in_flight; s++) /* what the host knows, it says */
            if (world->next[s] < 0) world->next[s] = world->drawn[step - 1][s].token;
        struct half *half = begin(world, step);
        if (step == TAKEN_OVER) {
            world->length[1] = world->n_drawn[1] = 0;
            world->changes[1]++;
            memset(world->lane_tokens[1], 0, sizeof world->lane_tokens[1]);
        }
        for (uint32_t s = 0; s < SEQUENCES; s++) {
            if (step == 0 || (s == 1 && step == TAKEN_OVER))
                add_rows(world, half, s, prompts[s]);
            else if (has_row(s, step, ahead))
                add_rows(world, half, s, 1);
        }
        submit(world, half);
        if (in_flight) sync_step(world, step - 1);
        in_flight = ahead && !reads;
        if (!in_flight) sync_step(world, step);
    }
    if (in_flight) sync_step(world, STEPS - 1);
    world->ops->close(world->backend);
}

/* Whether the host samples depends on who else is there, as the last row for nothing is: it comes to the same token, and to log-probabilities that differ in the last places. */
static bool is_near(float a, float b) { return fabsf(a - b) <= 1e-5f * (1 + fabsf(a)); }

static bool is_same(const struct sample_result *a, const struct sample_result *b) {
    bool same = a->token == b->token && is_near(a->logprob, b->logprob) && a->n_top == b->n_top;
    for (int32_t i = 0; same && i < a->n_top; i++) same = a->top[i].token == b->top[i].token && is_near(a->top[i].logprob, b->top[i].logprob);
    return same;
}

static void compare(const struct world *plain, const struct world *ahead, const char *name, const char *dtype) {
    for (uint32_t step = 0; step < STEPS; step++)
        for (uint32_t s = 0; s < SEQUENCES; s++) {
            if (!has_row(s, step, false) && step != TAKEN_OVER) continue;
            const struct sample_result *a = &plain->drawn[step][s], *b = &ahead->drawn[step][s];
            if (!is_same(a, b)) fail_msg("%s, %s: step %u, sequence %u: %d and, ahead, %d", name, dtype, step, s, a->token, b->token);
        }
}

static void check_same(const struct backend_ops *ops, const struct program *program, enum kv_dtype dtype) {
    static struct world plain, ahead;
    n_biases = dtype % 2 ? LONG : 3;
    open_world(&plain, ops, program, dtype);
    if (!plain.backend->takes_two) {
        ops->close(plain.backend);
        return;
    }
    open_world(&ahead, ops, program, dtype);
    run(&plain, false);
    run(&ahead, true);
    compare(&plain, &ahead, ops->name, kv_dtype_name(dtype));
    uint32_t n_different = 0;
    for (uint32_t step = 1; step < STEPS; step++)
        for (uint32_t s = 0; s < SEQUENCES; s++) n_different += plain.drawn[step][s].token != plain.drawn[step - 1][s].token;
    assert_true(n_different > STEPS); /* a step that takes in another's token would be seen */
}

/* A step that the device refuses is an error, and leaves all as it was: also the step in flight. */
static void test_refused_steps(void **state) {
    (void)state;
    static struct world plain, refused;
    if (!host_refuse_launch || !test_runs_on(backend_find("cuda"))) skip();
    const struct tiny_shape shape = tiny_shape_default();
    struct program *program = tiny_program_new(&shape);
    static const enum kv_dtype dtypes[] = {KV_F16, KV_KIVI4};
    n_biases = 3;
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++) {
        open_world(&plain, backend_find("cuda"), program, dtypes[i]);
        run(&plain, false);
        for (int ahead = 0; ahead < 2; ahead++) {
            open_world(&refused, backend_find("cuda"), program, dtypes[i]);
            refused.refuses = dtypes[i] == KV_F16 ? 2 : 1; /* what KIVI has between the two ends the process */
            run(&refused, ahead);
            compare(&plain, &refused, ahead ? "ahead" : "one at a time", kv_dtype_name(dtypes[i]));
        }
    }
    tiny_program_free(program);
}

/* ---- lanes of different lengths, one step at a time ---- */

/* Of each lane what is listed for the step to come is there, and nothing behind it. */
static void list_blocks(struct world *world, uint32_t n_rows) {
    for (uint32_t s = 0; s < SEQUENCES; s++)
        for (uint32_t lane = 0; lane < LANES; lane++)
            for (uint32_t b = 0; b < LANE_BLOCKS; b++) {
                uint32_t at = world->lane_first[s][lane] + b, needed = (world->lane_tokens[s][lane] + n_rows + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
                world->ids[at] = b < needed ? at * 37 % POOL : UINT32_MAX;
            }
}

/* Each lane loses its end, to another length than the others. */
static void cut_lanes(struct world *world, uint32_t step) {
    for (uint32_t s = 0; s < SEQUENCES; s++) {
        world->changes[s]++;
        for (uint32_t lane = 0; lane < LANES; lane++) {
            uint32_t *tokens = &world->lane_tokens[s][lane];
            *tokens -= (uint32_t)(random_at(step, s, lane, 0) % (*tokens / 2 + 1));
        }
    }
}

static void run_ragged(struct world *world, bool follows) {
    static const uint32_t prompts[SEQUENCES] = {5, BLOCK_TOKENS - 1, 2 * BLOCK_TOKENS, 20};
    for (uint32_t step = 0; step < STEPS; step++) {
        struct half *half = begin(world, step);
        if (step == 1 || step == TAKEN_OVER) cut_lanes(world, step);
        list_blocks(world, step == 0 ? 2 * BLOCK_TOKENS : 1);
        for (uint32_t s = 0; s < SEQUENCES; s++) {
            if (step > 0) world->next[s] = world->drawn[step - 1][s].token;
            add_rows(world, half, s, step == 0 ? prompts[s] : 1);
            if (!follows) half->sequences[s].table_changes = 0;
        }
        submit(world, half);
        sync_step(world, step);
    }
    world->ops->close(world->backend);
}

/* Who follows the tables by what is new draws as who is told to take all of them at every step. */
static void test_follows_ragged_lanes(void **state) {
    (void)state;
    static struct world anew, follows;
    const struct tiny_shape shape = tiny_shape_default();
    struct program *program = tiny_program_new(&shape);
    n_biases = 0;
    for (const struct backend_ops *const *ops = backends; *ops; ops++) {
        if (!test_runs_on(*ops)) continue;
        open_world(&anew, *ops, program, KV_F16);
        if (!anew.backend->takes_two) { /* it has no tables of its own either, and reads lengths when it runs */
            (*ops)->close(anew.backend);
            continue;
        }
        open_world(&follows, *ops, program, KV_F16);
        run_ragged(&anew, false);
        run_ragged(&follows, true);
        for (uint32_t step = 0; step < STEPS; step++)
            for (uint32_t s = 0; s < SEQUENCES; s++)
                if (!is_same(&anew.drawn[step][s], &follows.drawn[step][s])) fail_msg("%s: step %u, sequence %u", (*ops)->name, step, s);
    }
    tiny_program_free(program);
}

/* ---- accumulated attention, one step at a time ---- */

/* Sequence 2 adds its attention up in one step of three, the others in one of five: in none of the first two with a row each. */
static void run_accumulating(struct world *world, bool tapped, float scores[SEQUENCES][LANES * LANE_BLOCKS * BLOCK_TOKENS]) {
    static const uint32_t prompts[SEQUENCES] = {5, BLOCK_TOKENS - 1, 2 * BLOCK_TOKENS, 20};
    static float logits[SEQUENCES * N_VOCAB];
    size_t offset[LANES];
    for (uint32_t step = 0; step < STEPS; step++) {
        struct half *half = begin(world, step);
        for (uint32_t s = 0; s < SEQUENCES; s++) {
            if (step > 0) world->next[s] = world->drawn[step - 1][s].token;
            add_rows(world, half, s, step == 0 ? prompts[s] : 1);
            half->sequences[s].accumulate = s == 2 ? step % 3 == 0 : step % 5 == 0;
        }
        if (tapped) world->ops->tap_logits(world->backend, logits);
        submit(world, half);
        sync_step(world, step);
    }
    for (uint32_t lane = 0; lane < LANES; lane++) offset[lane] = lane * LANE_BLOCKS * BLOCK_TOKENS;
    for (uint32_t s = 0; s < SEQUENCES; s++) {
        const struct score_request request = {.kind = SCORE_ACCUMULATED,
                                              .n_lanes = LANES,
                                              .block_ids = world->ids,
                                              .lane_first = world->lane_first[s],
                                              .lane_tokens = world->lane_tokens[s],
                                              .offset = offset};
        world->ops->score(world->backend, &request, scores[s]);
    }
    world->ops->close(world->backend);
}

static void test_accumulates_as_launched(void **state) {
    (void)state;
    static struct world replayed, launched;
    static float scores[2][SEQUENCES][LANES * LANE_BLOCKS * BLOCK_TOKENS];
    const struct tiny_shape shape = tiny_shape_default();
    struct program *program = tiny_program_new(&shape);
    n_biases = 0;
    for (const struct backend_ops *const *ops = backends; *ops; ops++) {
        if (!test_runs_on(*ops)) continue;
        memset(scores, 0, sizeof scores);
        open_world(&replayed, *ops, program, KV_F16);
        open_world(&launched, *ops, program, KV_F16);
        run_accumulating(&replayed, false, scores[0]);
        run_accumulating(&launched, true, scores[1]);
        for (uint32_t s = 0; s < SEQUENCES; s++) {
            float sum = 0;
            for (uint32_t i = 0; i < LANES * LANE_BLOCKS * BLOCK_TOKENS; i++) sum += scores[1][s][i];
            assert_true(sum > 1);
            assert_memory_equal(scores[0][s], scores[1][s], sizeof scores[0][s]);
        }
    }
    tiny_program_free(program);
}

static void test_draws_the_same(void **state) {
    (void)state;
    const struct tiny_shape shape = tiny_shape_default();
    struct program *program = tiny_program_new(&shape);
    for (uint32_t i = 0; i < 2 * LONG; i++)
        biases[i / LONG][i % LONG] =
            (struct logit_bias){.token = (int32_t)random_at(1, i, 0, 0) & (N_VOCAB - 1), .bias = (float)(random_at(2, i, 0, 0) % 100) * 1e-4f};
    for (const struct backend_ops *const *ops = backends; *ops; ops++) {
        if (*ops != &backend_mock && !test_runs_on(*ops)) continue;
        for (int dtype = 0; dtype < KV_DTYPES; dtype++)
            if ((*ops)->block_bytes(program, (enum kv_dtype)dtype) > 0) check_same(*ops, program, (enum kv_dtype)dtype);
    }
    tiny_program_free(program);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_draws_the_same), cmocka_unit_test(test_follows_ragged_lanes),
                                       cmocka_unit_test(test_accumulates_as_launched), cmocka_unit_test(test_refused_steps)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
