/* The mock backend: what it answers depends on the history alone, the oracle in mock.h says what that is, and each of the mistakes it watches for stops the
 * process (in a child). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <math.h>

#include "base/check.h"
#include "base/clock.h"
#include "kernels/backend.h"
#include "kernels/mock/mock.h"
#include "tests/support/stops.h"
#include "tests/support/tiny_program.h"

enum { LANES = 4, POOL = 64, LANE_BLOCKS = 4, SEQUENCES = 3, VOCAB = 64 };

/* Sequence s, lane l begins at table entry (s * LANES + l) * LANE_BLOCKS; the ids there are the same numbers. 48 blocks; the others are spare. */
struct fixture {
    struct program *program;
    struct backend *backend;
    uint32_t ids[POOL];
    uint32_t lane_first[SEQUENCES][LANES], lane_tokens[SEQUENCES][LANES];
    int32_t position[SEQUENCES];
};

static struct fixture new_fixture(double rate) {
    const struct tiny_shape shape = tiny_shape_default();
    struct fixture f = {.program = tiny_program_new(&shape)};
    const struct backend_limits limits = {.n_blocks = POOL,
                                          .max_rows = 256,
                                          .max_sequences = SEQUENCES,
                                          .max_samples = 256,
                                          .n_rings = 2,
                                          .ring_rows = 16,
                                          .sink_slots = 32,
                                          .mock_tokens_per_second = rate};
    struct error error = {0};
    assert_int_equal(backend_mock.prepare(f.program, &limits, &f.backend, &error), STATUS_OK);
    for (uint32_t i = 0; i < POOL; i++) f.ids[i] = i;
    for (uint32_t s = 0; s < SEQUENCES; s++)
        for (uint32_t lane = 0; lane < LANES; lane++) f.lane_first[s][lane] = (s * LANES + lane) * LANE_BLOCKS;
    return f;
}

static void done(struct fixture *f) {
    backend_mock.close(f->backend);
    tiny_program_free(f->program);
}

static int32_t token_at(uint32_t s, int32_t position) { return (int32_t)(((uint32_t)position * 7 + s * 13) % VOCAB); }

static uint64_t history(uint32_t s, int32_t length) {
    uint64_t chain = 0;
    for (int32_t i = 0; i < length; i++) chain = mock_chain(chain, token_at(s, i), i);
    return chain;
}

/* The next rows[s] rows of each sequence (0: not in the batch), one sample for each sequence's last row. */
static void step(struct fixture *f, const uint32_t *rows, const struct sampling *sampling, struct sample_result *results) {
    static const struct sampling greedy = {.top_p = 1, .repetition_penalty = 1, .n_top = 3};
    struct batch_sequence sequences[SEQUENCES];
    struct sample samples[SEQUENCES];
    int32_t tokens[256], positions[256];
    struct batch batch = {.tokens = tokens, .positions = positions, .sequences = sequences, .block_ids = f->ids, .samples = samples};
    for (uint32_t s = 0; s < SEQUENCES; s++) {
        if (rows[s] == 0) continue;
        sequences[batch.n_sequences++] = (struct batch_sequence){
            .first_row = batch.n_rows, .n_rows = rows[s], .lane_first = f->lane_first[s], .lane_tokens = f->lane_tokens[s], .ring = s == 0 ? 1 : 0};
        for (uint32_t i = 0; i < rows[s]; i++, batch.n_rows++) {
            tokens[batch.n_rows] = token_at(s, f->position[s] + (int32_t)i);
            positions[batch.n_rows] = f->position[s] + (int32_t)i;
        }
        samples[batch.n_samples++] = (struct sample){.row = batch.n_rows - 1, .sampling = sampling ? sampling : &greedy, .target = -1};
    }
    struct error error = {0};
    assert_int_equal(backend_mock.submit(f->backend, &batch, &error), STATUS_OK);
    assert_int_equal(backend_mock.sync(f->backend, results, &error), STATUS_OK);
    for (uint32_t s = 0; s < SEQUENCES; s++) {
        f->position[s] += (int32_t)rows[s];
        for (uint32_t lane = 0; lane < LANES; lane++) f->lane_tokens[s][lane] += rows[s];
    }
}

static void test_answers_follow_the_history(void **state) {
    (void)state;
    struct fixture f = new_fixture(0);
    static const uint32_t rows[][SEQUENCES] = {{40, 1, 0}, {1, 31, 33}, {23, 1, 1}, {0, 1, 40}, {1, 0, 0}, {1, 64, 1}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct sample_result results[SEQUENCES];
        step(&f, rows[i], NULL, results);
        uint32_t at = 0;
        for (uint32_t s = 0; s < SEQUENCES; s++) {
            if (rows[i][s] == 0) continue;
            float logits[VOCAB];
            mock_logits(history(s, f.position[s]), VOCAB, logits);
            int32_t best = 0;
            for (int32_t t = 0; t < VOCAB; t++)
                if (logits[t] > logits[best]) best = t;
            assert_int_equal(results[at].token, best);
            assert_int_equal(results[at].n_top, 3);
            assert_int_equal(results[at].top[0].token, best);
            assert_true(results[at].logprob < 0 && results[at].logprob > -3);
            at++;
        }
    }
    done(&f);
}

static void test_sampling_fields_are_honoured(void **state) {
    (void)state;
    struct fixture f = new_fixture(0);
    const struct logit_bias bias = {5, 100};
    const struct sampling biased = {.top_p = 1, .repetition_penalty = 1, .n_top = -1, .n_bias = 1, .bias = &bias};
    struct sample_result results[SEQUENCES];
    step(&f, (const uint32_t[]){3, 0, 2}, &biased, results);
    assert_int_equal(results[0].token, 5);
    assert_int_equal(results[1].token, 5);
    done(&f);
}

/* A fork as the scheduler does it: full blocks shared, the last partial one copied. Both go on. */
static void fork_sequence(struct fixture *f, uint32_t from, uint32_t to) {
    for (uint32_t lane = 0; lane < LANES; lane++) {
        uint32_t full = f->lane_tokens[from][lane] / BLOCK_TOKENS;
        for (uint32_t b = 0; b < full; b++) f->ids[f->lane_first[to][lane] + b] = f->ids[f->lane_first[from][lane] + b];
        f->lane_tokens[to][lane] = f->lane_tokens[from][lane];
    }
    f->position[to] = f->position[from];
}

static void copy_last_blocks(struct fixture *f, uint32_t from, uint32_t to) {
    for (uint32_t lane = 0; lane < LANES; lane++) {
        uint32_t last = f->lane_tokens[from][lane] / BLOCK_TOKENS;
        backend_mock.copy_blocks(f->backend, 1, &f->ids[f->lane_first[from][lane] + last], &f->ids[f->lane_first[to][lane] + last]);
    }
}

static void test_a_fork_goes_on(void **state) {
    (void)state;
    struct fixture f = new_fixture(0);
    struct sample_result results[SEQUENCES];
    step(&f, (const uint32_t[]){40, 0, 0}, NULL, results);
    fork_sequence(&f, 0, 1);
    copy_last_blocks(&f, 0, 1);
    step(&f, (const uint32_t[]){1, 1, 0}, NULL, results);
    step(&f, (const uint32_t[]){30, 2, 0}, NULL, results);
    done(&f);
}

static void compact(struct fixture *f, uint32_t s, uint32_t lane, const uint32_t *keep, uint32_t n_keep) {
    const uint32_t *ids = &f->ids[f->lane_first[s][lane]];
    backend_mock.compact(f->backend, 1,
                         &(struct compaction){.source = ids, .n_slots = f->lane_tokens[s][lane], .keep = keep, .n_keep = n_keep, .destination = ids});
    f->lane_tokens[s][lane] = n_keep;
}

/* Lanes that keep different slots, and one that loses a block: the answer is that of the whole history. */
static void test_compression_does_not_change_the_answer(void **state) {
    (void)state;
    struct fixture f = new_fixture(0), g = new_fixture(0);
    struct sample_result results[SEQUENCES], plain[SEQUENCES];
    step(&f, (const uint32_t[]){90, 0, 0}, NULL, results);
    step(&g, (const uint32_t[]){90, 0, 0}, NULL, plain);
    const uint32_t keep[] = {0, 1, 30, 31, 32, 64, 70, 88, 89};
    compact(&f, 0, 0, keep, 9);
    compact(&f, 0, 2, keep + 7, 2);
    f.lane_first[0][1]++;
    f.lane_tokens[0][1] -= BLOCK_TOKENS;
    for (int i = 0; i < 3; i++) {
        step(&f, (const uint32_t[]){1, 0, 0}, NULL, results);
        step(&g, (const uint32_t[]){1, 0, 0}, NULL, plain);
        assert_int_equal(results[0].token, plain[0].token);
    }
    float scores[4 * 128];
    const size_t offset[LANES] = {0, 200, 300, 400};
    backend_mock.score(f.backend,
                       &(struct score_request){.kind = SCORE_KEYDIFF,
                                               .n_lanes = 1,
                                               .block_ids = f.ids,
                                               .lane_first = f.lane_first[0],
                                               .lane_tokens = f.lane_tokens[0],
                                               .offset = offset},
                       scores);
    for (int i = 0; i < 12; i++) assert_true(scores[i] >= 0 && scores[i] < 1);
    done(&f);
    done(&g);
}

/* ---- mistakes ---- */

static void wrong_block(struct fixture *f) { f->ids[f->lane_first[0][1]] = f->ids[f->lane_first[1][1]]; }
static void swapped_blocks(struct fixture *f) {
    uint32_t *ids = &f->ids[f->lane_first[0][3]], first = ids[0];
    ids[0] = ids[1];
    ids[1] = first;
}
static void block_past_the_pool(struct fixture *f) { f->ids[f->lane_first[0][0]] = POOL; }
static void lane_too_short(struct fixture *f) { f->lane_tokens[0][2]--; }
static void lane_too_long(struct fixture *f) { f->lane_tokens[0][2]++; }
static void position_skipped(struct fixture *f) { f->position[0]++; }
static void position_repeated(struct fixture *f) { f->position[0]--; }
static void fork_without_copy(struct fixture *f) { fork_sequence(f, 0, 1); }
static void fork_into_the_shared_block(struct fixture *f) {
    fork_sequence(f, 0, 1);
    for (uint32_t lane = 0; lane < LANES; lane++) f->ids[f->lane_first[1][lane] + 1] = f->ids[f->lane_first[0][lane] + 1];
}
static void copy_of_the_wrong_block(struct fixture *f) {
    fork_sequence(f, 0, 1);
    copy_last_blocks(f, 0, 1);
    uint32_t source = f->ids[f->lane_first[2][0]], destination = f->ids[f->lane_first[1][0] + 1];
    backend_mock.copy_blocks(f->backend, 1, &source, &destination);
}
static void new_block_is_held_by_another(struct fixture *f) { /* sequence 0 fills its second block and takes one of sequence 1 as its third */
    struct sample_result results[SEQUENCES];
    step(f, (const uint32_t[]){24, 0, 0}, NULL, results);
    f->ids[f->lane_first[0][0] + 2] = f->ids[f->lane_first[1][0]];
}
static void shared_block_written_earlier(struct fixture *f) {
    fork_sequence(f, 0, 1);
    for (uint32_t lane = 0; lane < LANES; lane++) f->ids[f->lane_first[1][lane] + 1] = f->ids[f->lane_first[0][lane] + 1];
    struct sample_result results[SEQUENCES];
    step(f, (const uint32_t[]){0, 1, 0}, NULL, results); /* the child writes the slot; the parent finds it written */
}
static void compaction_not_told(struct fixture *f) {
    const uint32_t keep[] = {1, 38, 39};
    uint32_t before = f->lane_tokens[0][0];
    compact(f, 0, 0, keep, 3);
    f->lane_tokens[0][0] = before;
}
static void survivors_out_of_order(struct fixture *f) {
    const uint32_t keep[] = {2, 1};
    compact(f, 0, 0, keep, 2);
}
static void compaction_into_two_places(struct fixture *f) {
    const uint32_t keep[] = {0, 39};
    const struct compaction item = {.source = &f->ids[f->lane_first[0][0]], .n_slots = 40, .keep = keep, .n_keep = 2, .destination = &f->ids[50]};
    backend_mock.compact(f->backend, 2, (const struct compaction[]){item, item});
}
static void score_with_a_foreign_ring(struct fixture *f) {
    float scores[128];
    const size_t offset[LANES] = {0};
    backend_mock.score(f->backend,
                       &(struct score_request){.kind = SCORE_ATTENTION,
                                               .ring = 1,
                                               .last_position = 34,
                                               .n_window = 8,
                                               .n_lanes = 1,
                                               .block_ids = f->ids,
                                               .lane_first = f->lane_first[1],
                                               .lane_tokens = f->lane_tokens[1],
                                               .offset = offset},
                       scores);
}
static void sinks_never_copied(struct fixture *f) {
    backend_mock.shift_sinks(f->backend,
                             &(struct shift_request){.ring = 1, .n_slots = 4, .shift = 3, .block_ids = f->ids, .lane_first = f->lane_first[0]});
}

typedef void mistake(struct fixture *f);

/* The mistake, and two more steps. */
static void make(const void *context) {
    mistake *const made = *(mistake *const *)context;
    struct fixture f = new_fixture(0);
    struct sample_result results[SEQUENCES];
    step(&f, (const uint32_t[]){40, 0, 0}, NULL, results);
    if (made != fork_without_copy && made != fork_into_the_shared_block && made != copy_of_the_wrong_block && made != shared_block_written_earlier)
        step(&f, (const uint32_t[]){0, 35, 0}, NULL, results);
    step(&f, (const uint32_t[]){0, 0, 9}, NULL, results);
    if (made) made(&f);
    step(&f, (const uint32_t[]){1, 1, 1}, NULL, results);
    step(&f, (const uint32_t[]){1, 1, 1}, NULL, results);
}

static void test_mistakes_are_found(void **state) {
    (void)state;
    static const struct {
        const char *name;
        mistake *made;
    } mistakes[] = {
        {"wrong block", wrong_block},
        {"swapped blocks", swapped_blocks},
        {"block past the pool", block_past_the_pool},
        {"lane too short", lane_too_short},
        {"lane too long", lane_too_long},
        {"position skipped", position_skipped},
        {"position repeated", position_repeated},
        {"fork without copy", fork_without_copy},
        {"fork into the shared block", fork_into_the_shared_block},
        {"copy of the wrong block", copy_of_the_wrong_block},
        {"new block is held by another", new_block_is_held_by_another},
        {"shared block written earlier", shared_block_written_earlier},
        {"compaction not told", compaction_not_told},
        {"survivors out of order", survivors_out_of_order},
        {"compaction into two places", compaction_into_two_places},
        {"score with a foreign ring", score_with_a_foreign_ring},
        {"sinks never copied", sinks_never_copied},
    };
    mistake *const none = NULL;
    assert_false(stops(make, &none)); /* the same steps without a mistake */
    for (size_t i = 0; i < sizeof mistakes / sizeof *mistakes; i++)
        if (!stops(make, &mistakes[i].made)) fail_msg("not found: %s", mistakes[i].name);
}

/* A step of n rows takes at least n / rate seconds; no upper bound is promised by the machine. */
static void test_rate(void **state) {
    (void)state;
    struct fixture f = new_fixture(1000);
    struct sample_result results[SEQUENCES];
    uint64_t start = clock_now_ns();
    step(&f, (const uint32_t[]){20, 0, 10}, NULL, results);
    assert_true(clock_now_ns() - start >= 30000000);
    done(&f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_answers_follow_the_history),
        cmocka_unit_test(test_sampling_fields_are_honoured),
        cmocka_unit_test(test_a_fork_goes_on),
        cmocka_unit_test(test_compression_does_not_change_the_answer),
        cmocka_unit_test(test_mistakes_are_found),
        cmocka_unit_test(test_rate),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
