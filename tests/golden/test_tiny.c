/* The reference backend's logits against numpy's, within 1e-3 of the largest: tiny models of every architecture and tensor type, and the sample model
 * (tests/support/sample_model.h). Where there is a device, its backend's too, with both kinds of weights, within 1e-2: it computes with f16.
 * Files: tests/golden/tiny, made by the script beside them. */
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
#include "kernels/backend.h"
#include "model/compile.h"
#include "tests/support/backends.h"
#include "tests/support/golden_path.h"
#include "tests/support/sample_model.h"

#define TOKENS_MAX 64
#define LINE_MAX_BYTES 65536

/* What computes, and how near it must be. */
struct way {
    const char *backend;
    enum kv_dtype kv_dtype;
    enum weights_mode weights;
    double tolerance; /* of the largest logit */
};
static const struct way ways[] = {
    {"reference", KV_F32, WEIGHTS_AUTO, 1e-3}, {"cuda", KV_F16, WEIGHTS_F16, 1e-2}, {"cuda", KV_F16, WEIGHTS_NATIVE, 1e-2}};
enum { N_WAYS = sizeof ways / sizeof *ways };
static const struct way *way;

/* A model, and the logits of all rows of a sequence. */
struct run {
    struct gguf *gguf;
    struct hyper_parameters parameters;
    struct program *program;
    int32_t tokens[TOKENS_MAX];
    uint32_t n_tokens;
    float *logits; /* [n_tokens][n_vocab] */
};

static void open_run(struct run *run, const char *path) {
    struct error error = {0};
    *run = (struct run){0};
    if (gguf_open(path, &run->gguf, &error) != STATUS_OK || architecture_read(run->gguf, &run->parameters, &error) != STATUS_OK ||
        program_compile_gguf(&run->parameters, run->gguf, &run->program, &error) != STATUS_OK)
        fail_msg("%s", error.text);
    run->logits = check_calloc((size_t)TOKENS_MAX * run->program->n_vocab, sizeof *run->logits);
}

static void close_run(struct run *run) {
    free(run->logits);
    program_free(run->program);
    gguf_close(run->gguf);
}

/* Rows first..first + count - 1, after those before them. */
static void step(struct backend *backend, struct run *run, uint32_t first, uint32_t count, const uint32_t *block_ids, const uint32_t *lane_first) {
    static const struct sampling greedy = {.top_p = 1, .repetition_penalty = 1, .n_top = -1};
    uint32_t n_lanes = run->program->n_layers * run->program->n_kv_heads;
    uint32_t *lane_tokens = check_calloc(n_lanes, sizeof *lane_tokens);
    int32_t positions[TOKENS_MAX];
    struct sample samples[TOKENS_MAX];
    struct sample_result results[TOKENS_MAX];
    for (uint32_t lane = 0; lane < n_lanes; lane++) lane_tokens[lane] = first;
    for (uint32_t i = 0; i < count; i++) {
        positions[i] = (int32_t)(first + i);
        samples[i] = (struct sample){.row = i, .sampling = &greedy, .target = 0};
    }
    struct batch_sequence sequence = {.n_rows = count, .lane_first = lane_first, .lane_tokens = lane_tokens};
    struct batch batch = {.n_rows = count,
                          .n_sequences = 1,
                          .n_samples = count,
                          .tokens = run->tokens + first,
                          .positions = positions,
                          .sequences = &sequence,
                          .block_ids = block_ids,
                          .samples = samples};
    struct error error = {0};
    backend->ops->tap_logits(backend, run->logits + (size_t)first * run->program->n_vocab);
    if (backend->ops->submit(backend, &batch, &error) != STATUS_OK || backend->ops->sync(backend, results, &error) != STATUS_OK)
        fail_msg("%s", error.text);
    free(lane_tokens);
}

/* The sequence in chunks of at most `chunk` rows. */
static void compute(struct run *run, uint32_t chunk) {
    uint32_t n_lanes = run->program->n_layers * run->program->n_kv_heads, blocks = (TOKENS_MAX + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    struct backend_limits limits = {.kv_dtype = way->kv_dtype,
                                    .weights = way->weights,
                                    .n_blocks = n_lanes * blocks,
                                    .max_rows = TOKENS_MAX,
                                    .max_sequences = 1,
                                    .max_samples = TOKENS_MAX,
                                    .threads = 1};
    const struct backend_ops *ops = backend_find(way->backend);
    assert_non_null(ops);
    struct backend *backend = NULL;
    struct error error = {0};
    if (ops->prepare(run->program, &limits, &backend, &error) != STATUS_OK) fail_msg("%s", error.text);
    uint32_t *block_ids = check_calloc(limits.n_blocks, sizeof *block_ids), *lane_first = check_calloc(n_lanes, sizeof *lane_first);
    for (uint32_t i = 0; i < limits.n_blocks; i++) block_ids[i] = limits.n_blocks - 1 - i;
    for (uint32_t lane = 0; lane < n_lanes; lane++) lane_first[lane] = lane * blocks;
    for (uint32_t first = 0; first < run->n_tokens; first += chunk)
        step(backend, run, first, run->n_tokens - first < chunk ? run->n_tokens - first : chunk, block_ids, lane_first);
    ops->close(backend);
    free(block_ids);
    free(lane_first);
}

static void read_tokens(struct run *run, char *rest) {
    run->n_tokens = 0;
    for (char *word; (word = strtok_r(NULL, " \n", &rest)); run->n_tokens++) {
        assert_true(run->n_tokens < TOKENS_MAX);
        run->tokens[run->n_tokens] = (int32_t)strtol(word, NULL, 10);
    }
}

/* Every stride-th logit of a row against the rest of the line. */
static void compare_row(const struct run *run, const char *name, uint32_t row, uint32_t stride, char *rest) {
    uint32_t n_vocab = run->program->n_vocab, count = 0;
    const float *logits = run->logits + (size_t)row * n_vocab;
    double largest = 0, worst = 0;
    for (char *word; (word = strtok_r(NULL, " \n", &rest)); count++) {
        assert_true(count * stride < n_vocab);
        double expected = strtod(word, NULL), difference = fabs(expected - (double)logits[count * stride]);
        largest = fmax(largest, fabs(expected));
        worst = difference <= worst ? worst : difference; /* a NaN stays */
    }
    assert_int_equal(count, (n_vocab + stride - 1) / stride);
    assert_true(largest > 0.5);
    if (!(worst <= way->tolerance * largest))
        fail_msg("%s, %s weights, %s: row %u: off by %g, the largest logit is %g", way->backend, weights_mode_name(way->weights), name, row, worst,
                 largest);
}

static void check_tiny(uint32_t chunk) {
    char name[64] = "", relative[80], path[GOLDEN_PATH_MAX];
    FILE *file = fopen(golden_path("tiny/logits.txt", path), "r");
    assert_non_null(file);
    static char line[LINE_MAX_BYTES];
    struct run run = {0};
    int models = 0, rows = 0;
    while (fgets(line, sizeof line, file)) {
        char *rest = NULL, *kind = strtok_r(line, " \n", &rest), *word = strtok_r(NULL, " \n", &rest);
        assert_non_null(word);
        if (strcmp(kind, "row") == 0) {
            uint32_t row = (uint32_t)strtoul(word, NULL, 10);
            assert_true(row < run.n_tokens);
            compare_row(&run, name, row, 1, rest);
            rows++;
            continue;
        }
        close_run(&run);
        (void)snprintf(name, sizeof name, "%s", word);
        (void)snprintf(relative, sizeof relative, "tiny/%s", name);
        open_run(&run, golden_path(relative, path));
        read_tokens(&run, rest);
        compute(&run, chunk);
        models++;
    }
    close_run(&run);
    (void)fclose(file);
    assert_int_equal(models, 9);
    assert_int_equal(rows, 9 * 6);
}

static void each_way(void (*check)(uint32_t), uint32_t chunk) {
    uint32_t n = 0;
    for (way = ways; way < ways + N_WAYS; way++) {
        if (!test_runs_on_name(way->backend)) continue;
        check(chunk);
        n++;
    }
    if (n == 0) skip();
}

static void test_tiny_models_at_once(void **state) {
    (void)state;
    each_way(check_tiny, TOKENS_MAX);
}

static void test_tiny_models_in_chunks(void **state) {
    (void)state;
    each_way(check_tiny, 7);
}

static void test_tiny_models_token_by_token(void **state) {
    (void)state;
    each_way(check_tiny, 1);
}

/* Together the files have every tensor type. */
static void test_every_tensor_type_is_there(void **state) {
    (void)state;
    static const char *const names[] = {"llama-f32", "llama-f16", "llama-bf16", "mistral-q8_0", "llama-q4",
                                        "qwen2-q5",  "qwen2-f16", "qwen3-q8_0", "llama-k"};
    bool seen[TENSOR_TYPES] = {false};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char relative[80], path[GOLDEN_PATH_MAX];
        struct gguf *gguf = NULL;
        (void)snprintf(relative, sizeof relative, "tiny/%s.gguf", names[i]);
        assert_int_equal(gguf_open(golden_path(relative, path), &gguf, NULL), STATUS_OK);
        for (size_t t = 0; t < gguf_tensor_count(gguf); t++) seen[gguf_tensor_at(gguf, t)->type] = true;
        gguf_close(gguf);
    }
    for (int type = 0; type < TENSOR_TYPES; type++)
        if (!seen[type]) fail_msg("no tiny model has a tensor of type %s", tensor_type_info((enum tensor_type)type)->name);
}

static void check_top(const struct run *run, char *rest) {
    uint32_t n_vocab = run->program->n_vocab;
    const float *logits = run->logits + (size_t)(run->n_tokens - 1) * n_vocab;
    uint32_t highest = 0;
    for (uint32_t i = 1; i < n_vocab; i++) highest = logits[i] > logits[highest] ? i : highest;
    for (int place = 0; place < 5; place++) {
        char *word = strtok_r(NULL, " \n", &rest), *colon = word ? strchr(word, ':') : NULL;
        assert_non_null(colon);
        uint32_t token = (uint32_t)strtoul(word, NULL, 10);
        double expected = strtod(colon + 1, NULL);
        assert_true(token < n_vocab);
        if (place == 0) assert_int_equal(token, highest);
        if (!(fabs(expected - (double)logits[token]) <= way->tolerance * fabs(expected)))
            fail_msg("token %u: %g, expected %g", token, (double)logits[token], expected);
    }
}

static void check_sample(uint32_t chunk) {
    char path[4096];
    static char line[LINE_MAX_BYTES];
    struct run run;
    assert_non_null(sample_model_path(path, sizeof path));
    open_run(&run, path);
    char golden[GOLDEN_PATH_MAX];
    FILE *file = fopen(golden_path("tiny/sample.txt", golden), "r");
    assert_non_null(file);
    int prompts = 0, tops = 0;
    while (fgets(line, sizeof line, file)) {
        char *rest = NULL, *kind = strtok_r(line, " \n", &rest);
        if (strcmp(kind, "sample") == 0) {
            read_tokens(&run, rest);
            compute(&run, chunk);
            prompts++;
        } else if (strcmp(kind, "logits") == 0) {
            compare_row(&run, path, run.n_tokens - 1, 64, rest);
        } else {
            check_top(&run, rest);
            tops++;
        }
    }
    (void)fclose(file);
    assert_int_equal(prompts, 4);
    assert_int_equal(tops, 4);
    close_run(&run);
}

static void test_sample_model(void **state) {
    (void)state;
    each_way(check_sample, TOKENS_MAX);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_tensor_type_is_there), cmocka_unit_test(test_tiny_models_at_once), cmocka_unit_test(test_tiny_models_in_chunks),
        cmocka_unit_test(test_tiny_models_token_by_token), cmocka_unit_test(test_sample_model),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
