/* The whole forward pass against llama.cpp, teacher-forced over mixed text (llama/text: English, code, Chinese, emoji, a chat): the next-token distributions that
 * `cpu`, `reference` and, where there is a device, `cuda` give for every position, with every KV dtype, against the golden ones (llama/make_llama.py: the same weights as f32).
 *
 * KL(golden || ours) is taken over 33 buckets: the golden file's 32 likeliest tokens and all the rest together. Needs the sample model: KVASIR_TEST_MODEL, or
 * SmolLM2-135M-Instruct.Q4_1.gguf in ${XDG_CACHE_HOME:-~/.cache}/kvasir; its absence is a failure. Deliberately leaves out tokenizer, scheduler and sampling. */
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
#include "model/model.h"
#include "tests/support/backends.h"
#include "tests/support/golden_path.h"

#define TOP 32
#define CHUNK 64 /* rows of one step at most; logits of all of them are compared */
#define MAX_SEQUENCES 16
#define SURE 0.1f /* nats */
#define MAX_TOKENS 2048

struct record {
    uint16_t token[TOP];
    float logprob[TOP], rest;
};

struct golden {
    uint32_t n_sequences, n_positions, n_vocab;
    struct {
        char name[17];
        uint32_t n, first_record;
        int32_t tokens[MAX_TOKENS];
    } sequences[MAX_SEQUENCES];
    struct record *records;
};

static struct golden golden;
static struct model *model;

static void read_exactly(FILE *file, void *bytes, size_t size) {
    if (fread(bytes, 1, size, file) != size) fail_msg("llama.bin ends early");
}

static void read_golden(void) {
    char path[GOLDEN_PATH_MAX];
    FILE *file = fopen(golden_path("llama/llama.bin", path), "rb");
    assert_non_null(file);
    char magic[8];
    uint32_t counts[4], first = 0;
    read_exactly(file, magic, sizeof magic);
    assert_memory_equal(magic, "KVLLAMA1", sizeof magic);
    read_exactly(file, counts, sizeof counts);
    golden.n_sequences = counts[0], golden.n_positions = counts[1], golden.n_vocab = counts[3];
    assert_true(golden.n_sequences <= MAX_SEQUENCES && counts[2] == TOP);
    assert_true(golden.n_positions >= 2000);
    for (uint32_t s = 0; s < golden.n_sequences; s++) {
        read_exactly(file, golden.sequences[s].name, 16);
        read_exactly(file, &golden.sequences[s].n, sizeof(uint32_t));
        assert_true(golden.sequences[s].n <= MAX_TOKENS);
        read_exactly(file, golden.sequences[s].tokens, golden.sequences[s].n * sizeof(int32_t));
        golden.sequences[s].first_record = first;
        first += golden.sequences[s].n;
    }
    assert_int_equal(first, golden.n_positions);
    golden.records = check_calloc(golden.n_positions, sizeof *golden.records);
    read_exactly(file, golden.records, golden.n_positions * sizeof *golden.records);
    assert_int_equal(fgetc(file), EOF);
    (void)fclose(file);
}

static int open_all(void **state) {
    (void)state;
    _Static_assert(sizeof(struct record) == TOP * 6 + 4, "as the file has it");
    read_golden();
    char path[4096];
    const char *named = getenv("KVASIR_TEST_MODEL"), *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    if (named && *named)
        (void)snprintf(path, sizeof path, "%s", named);
    else
        (void)snprintf(path, sizeof path, "%s%s/kvasir/SmolLM2-135M-Instruct.Q4_1.gguf", cache && *cache ? cache : home,
                       cache && *cache ? "" : "/.cache");
    struct error error;
    if (model_open(path, &model, &error) != STATUS_OK) {
        print_error("no sample model (set KVASIR_TEST_MODEL, or let tests/run fetch it): %s\n", error.text);
        return -1;
    }
    assert_int_equal(model_program(model)->n_vocab, golden.n_vocab);
    return 0;
}

static int close_all(void **state) {
    (void)state;
    model_close(model);
    free(golden.records);
    return 0;
}

/* What one backend with one KV dtype made of it. */
struct score {
    uint32_t n, n_same, n_sure, n_sure_same;
    double kl_sum, kl_max;
};

/* Destroys `logits`. */
static void compare_row(const struct record *record, float *logits, uint32_t n_vocab, struct score *score) {
    uint32_t best = 0;
    for (uint32_t i = 1; i < n_vocab; i++)
        if (logits[i] > logits[best]) best = i;
    const double maximum = (double)logits[best];
    double top[TOP], sum = 0, rest = 0;
    for (uint32_t t = 0; t < TOP; t++) {
        top[t] = (double)logits[record->token[t]] - maximum;
        sum += exp(top[t]);
        logits[record->token[t]] = -INFINITY;
    }
    for (uint32_t i = 0; i < n_vocab; i++) rest += exp((double)logits[i] - maximum); /* a NaN anywhere ends up in here */
    sum += rest;
    double kl = exp((double)record->rest) * ((double)record->rest - log(rest / sum));
    for (uint32_t t = 0; t < TOP; t++) kl += exp((double)record->logprob[t]) * ((double)record->logprob[t] - top[t] + log(sum));
    assert_true(isfinite(kl));
    score->n++;
    score->n_same += best == record->token[0];
    bool sure = record->logprob[0] - record->logprob[1] >= SURE;
    score->n_sure += sure;
    score->n_sure_same += sure && best == record->token[0];
    score->kl_sum += kl;
    score->kl_max = fmax(score->kl_max, kl);
}

/* One sequence over a table whose ids are scattered: lane l's j-th block is id (n_blocks - 1 - (j * n_lanes + l)). */
struct table {
    uint32_t n_lanes, blocks_per_lane, n_blocks;
    uint32_t *block_ids, *lane_first, *lane_tokens;
};

static void table_init(struct table *table, uint32_t n_lanes, uint32_t max_tokens) {
    table->n_lanes = n_lanes;
    table->blocks_per_lane = (max_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    table->n_blocks = n_lanes * table->blocks_per_lane;
    table->block_ids = check_calloc(table->n_blocks, sizeof(uint32_t));
    table->lane_first = check_calloc(n_lanes, sizeof(uint32_t));
    table->lane_tokens = check_calloc(n_lanes, sizeof(uint32_t));
    for (uint32_t lane = 0; lane < n_lanes; lane++) {
        table->lane_first[lane] = lane * table->blocks_per_lane;
        for (uint32_t j = 0; j < table->blocks_per_lane; j++)
            table->block_ids[table->lane_first[lane] + j] = table->n_blocks - 1 - (j * n_lanes + lane);
    }
}

static void table_done(struct table *table) {
    free(table->block_ids);
    free(table->lane_first);
    free(table->lane_tokens);
}

static void run_chunk(struct backend *backend, struct table *table, uint32_t s, uint32_t first, uint32_t n_rows, float *logits) {
    static const struct sampling sampling = {.top_p = 1, .repetition_penalty = 1, .n_top = -1};
    int32_t positions[CHUNK];
    struct sample samples[CHUNK];
    static struct sample_result results[CHUNK];
    for (uint32_t i = 0; i < n_rows; i++) {
        positions[i] = (int32_t)(first + i);
        samples[i] = (struct sample){.row = i, .sampling = &sampling, .target = 0, .history = golden.sequences[s].tokens};
    }
    for (uint32_t lane = 0; lane < table->n_lanes; lane++) table->lane_tokens[lane] = first;
    const struct batch_sequence sequence = {.first_row = 0, .n_rows = n_rows, .lane_first = table->lane_first, .lane_tokens = table->lane_tokens};
    const struct batch batch = {.n_rows = n_rows,
                                .n_sequences = 1,
                                .n_samples = n_rows,
                                .tokens = golden.sequences[s].tokens + first,
                                .positions = positions,
                                .sequences = &sequence,
                                .block_ids = table->block_ids,
                                .samples = samples};
    struct error error;
    backend->ops->tap_logits(backend, logits);
    if (backend->ops->submit(backend, &batch, &error) != STATUS_OK || backend->ops->sync(backend, results, &error) != STATUS_OK)
        fail_msg("%s", error.text);
}

struct way {
    const char *backend;
    enum kv_dtype kv_dtype;
    enum weights_mode weights;
    uint32_t chunk;
    uint32_t activation_bits;
};

/* The first `max_tokens` of each text. */
static struct score measure(const struct way *way, uint32_t max_tokens) {
    const struct backend_ops *ops = backend_find(way->backend);
    uint32_t longest = 0;
    for (uint32_t s = 0; s < golden.n_sequences; s++)
        if (golden.sequences[s].n > longest) longest = golden.sequences[s].n;
    if (longest > max_tokens) longest = max_tokens;

    struct table table;
    table_init(&table, program_lanes(model_program(model)), longest);
    struct backend_limits limits = {.kv_dtype = way->kv_dtype,
                                    .weights = way->weights,
                                    .activation_bits = way->activation_bits,
                                    .n_blocks = table.n_blocks,
                                    .n_tables = 1,
                                    .table_blocks = table.blocks_per_lane,
                                    .max_rows = CHUNK,
                                    .max_sequences = 1,
                                    .max_samples = CHUNK};
    struct backend *backend = NULL;
    struct error error;
    if (ops->prepare(model_program(model), &limits, &backend, &error) != STATUS_OK) fail_msg("%s", error.text);
    float *logits = check_calloc((size_t)CHUNK * golden.n_vocab, sizeof *logits);

    struct score score = {0};
    for (uint32_t s = 0; s < golden.n_sequences; s++) {
        uint32_t n = golden.sequences[s].n < max_tokens ? golden.sequences[s].n : max_tokens;
        for (uint32_t first = 0; first < n; first += way->chunk) {
            uint32_t n_rows = n - first < way->chunk ? n - first : way->chunk;
            run_chunk(backend, &table, s, first, n_rows, logits);
            for (uint32_t i = 0; i < n_rows; i++)
                compare_row(&golden.records[golden.sequences[s].first_record + first + i], logits + (size_t)i * golden.n_vocab, golden.n_vocab,
                            &score);
        }
    }
    print_message(
        "%s, kv %s, %s weights, %u rows a step: %u positions, same top-1 %.2f %% (%.2f %% of the %u with a margin of %g), mean KL %.2e, max %.2e\n",
        ops->describe(backend), kv_dtype_name(way->kv_dtype), weights_mode_name(way->weights), way->chunk, score.n, 100.0 * score.n_same / score.n,
        100.0 * score.n_sure_same / score.n_sure, score.n_sure, (double)SURE, score.kl_sum / score.n, score.kl_max);
    free(logits);
    ops->close(backend);
    table_done(&table);
    return score;
}

/* The oracle itself: f32 throughout, so it must agree to rounding. Slow, hence the first tokens only. */
static void test_reference(void **state) {
    (void)state;
    static const struct way way = {"reference", KV_F32, WEIGHTS_AUTO, CHUNK, 0};
    if (!test_runs_on_name(way.backend)) skip();
    struct score score = measure(&way, 24);
    assert_int_equal(score.n, 24 * golden.n_sequences);
    assert_int_equal(score.n_same, score.n);
    assert_true(score.kl_sum / score.n <= 1e-6);
}

/* Activations of 8 bits, with the high parts of the largest, move the top token only where two are all but equally likely. (Without the high parts, and so llama.cpp on the
 * Q4_1 file itself, it is another one at 4 % of these positions, with a mean KL of 3e-3.) */
static void test_cpu(void **state) {
    const struct way *way = *state;
    if (!test_runs_on_name(way->backend)) skip();
    struct score score = measure(way, MAX_TOKENS);
    assert_int_equal(score.n, golden.n_positions);
    assert_true(score.n_sure >= 0.9 * score.n);
    assert_true(score.n_sure_same >= 0.995 * score.n_sure);
    assert_true(score.n_same >= 0.98 * score.n);
    assert_true(score.kl_sum / score.n <= 1e-3);
}

/* With 16 bits nothing of that is left: what differs is the rounding of the cache, and all positions count. */
static void test_cpu_16bit(void **state) {
    const struct way *way = *state;
    if (!test_runs_on_name(way->backend)) skip();
    struct score score = measure(way, MAX_TOKENS);
    assert_int_equal(score.n, golden.n_positions);
    assert_true(score.n_same >= 0.985 * score.n);
    assert_true(score.kl_sum / score.n <= 4e-4);
}

/* Weights and activations in f16 lose little: all positions count, and where the top token is another one, the golden distribution was undecided. bf16 and q8
 * may move some more; q8 as little as on `cpu`, whose keys it has transformed as well. */
static void test_cuda(void **state) {
    const struct way *way = *state;
    if (!test_runs_on_name(way->backend)) skip();
    struct score score = measure(way, MAX_TOKENS);
    bool narrow = way->kv_dtype != KV_F16;
    assert_int_equal(score.n, golden.n_positions);
    assert_true(score.n_same >= 0.98 * score.n);
    assert_true(score.kl_sum / score.n <= (way->kv_dtype == KV_Q8 ? 4e-4 : 3e-3));
    if (narrow)
        assert_true(score.n_sure_same >= 0.995 * score.n_sure);
    else
        assert_int_equal(score.n_sure_same, score.n_sure);
}

int main(void) {
    static struct way cpu[] = {{"cpu", KV_F32, WEIGHTS_AUTO, CHUNK, 8},   {"cpu", KV_F16, WEIGHTS_AUTO, CHUNK, 8},
                               {"cpu", KV_BF16, WEIGHTS_AUTO, CHUNK, 8},  {"cpu", KV_Q8, WEIGHTS_AUTO, CHUNK, 8},
                               {"cpu", KV_F32, WEIGHTS_AUTO, CHUNK, 16},  {"cpu", KV_F16, WEIGHTS_AUTO, CHUNK, 16},
                               {"cpu", KV_BF16, WEIGHTS_AUTO, CHUNK, 16}, {"cpu", KV_Q8, WEIGHTS_AUTO, CHUNK, 16}};
    /* Products of many rows and of few are different ones; so are those of either kind of weights. */
    static struct way cuda[] = {{"cuda", KV_F16, WEIGHTS_F16, CHUNK, 0},    {"cuda", KV_F16, WEIGHTS_F16, 1, 0},
                                {"cuda", KV_F16, WEIGHTS_NATIVE, CHUNK, 0}, {"cuda", KV_F16, WEIGHTS_NATIVE, 1, 0},
                                {"cuda", KV_BF16, WEIGHTS_F16, CHUNK, 0},   {"cuda", KV_Q8, WEIGHTS_F16, CHUNK, 0}};
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reference),
        {"test_cpu_f32", test_cpu, NULL, NULL, &cpu[0]},
        {"test_cpu_f16", test_cpu, NULL, NULL, &cpu[1]},
        {"test_cpu_bf16", test_cpu, NULL, NULL, &cpu[2]},
        {"test_cpu_q8", test_cpu, NULL, NULL, &cpu[3]},
        {"test_cpu_16bit_f32", test_cpu_16bit, NULL, NULL, &cpu[4]},
        {"test_cpu_16bit_f16", test_cpu_16bit, NULL, NULL, &cpu[5]},
        {"test_cpu_16bit_bf16", test_cpu_16bit, NULL, NULL, &cpu[6]},
        {"test_cpu_16bit_q8", test_cpu_16bit, NULL, NULL, &cpu[7]},
        {"test_cuda_f16", test_cuda, NULL, NULL, &cuda[0]},
        {"test_cuda_f16_by_one", test_cuda, NULL, NULL, &cuda[1]},
        {"test_cuda_f16_native", test_cuda, NULL, NULL, &cuda[2]},
        {"test_cuda_f16_native_by_one", test_cuda, NULL, NULL, &cuda[3]},
        {"test_cuda_bf16", test_cuda, NULL, NULL, &cuda[4]},
        {"test_cuda_q8", test_cuda, NULL, NULL, &cuda[5]},
    };
    return cmocka_run_group_tests(tests, open_all, close_all);
}
