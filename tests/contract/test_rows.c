/* The row contract through the whole engine: 32 requests sent together, with chunked prompts, prefix hits, forks and preemptions, say token for token (and log-probability for
 * log-probability, bit for bit) what each says alone. For every instruction set this machine has, every KV dtype, one and two threads; and where there is a device, on it.
 *
 *   test_rows tiny     a model of random weights, all combinations
 *   test_rows sample   the real shapes, on vector paths if there are any, together on two threads: the sample model (KVASIR_TEST_MODEL, or where tests/run puts it)
 *
 * A run counts only if its counters show that the hard paths were taken. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>

#include <cmocka.h>

#include "kernels/kivi.h"
#include "tests/support/backends.h"
#include "tests/support/engine_client.h"

enum { JOBS = 32, NEW_MAX = 96, CANDIDATES = 2, TOGETHER_ROWS = 48, PROMPT_MAX = 256 };

struct answer {
    uint32_t n_tokens;
    int32_t tokens[NEW_MAX];
    float logprobs[NEW_MAX];
};

struct answers {
    struct answer of[JOBS][CANDIDATES];
    struct sample_result prompt[PROMPT_MAX]; /* of the one job that asks */
};

static struct model *model;
static bool is_sample;
static struct answers alone, together;

/* ---- the requests ---- */

/* Many tokens after short prompts outgrow the pool. The sample model has shorter ones, and a smaller pool. */
static uint32_t n_new(uint32_t i) { return is_sample ? 24 + i % 3 * 8 : 64 + i % 3 * 16; }
static uint32_t model_len(void) { return is_sample ? 160 : PROMPT_MAX + NEW_MAX; }

/* Every fourth prompt is long and its own; the others begin with one of two texts, up to a point that differs, in or at the edge of a block. */
static uint32_t make_prompt(uint32_t i, int32_t *prompt) {
    uint32_t n_ids = is_sample ? 40000 : 256;
    struct random own = {1000 + i}, text = {i % 2};
    bool is_long = i % 8 == 3;
    uint32_t most = is_sample ? 30 : 70, shared = is_long ? 0 : (is_sample ? 32 : 64) + i % 4 * 11, n = shared + 5 + i * 3 % most;
    if (is_long) n = (is_sample ? 100 : 150) + i;
    for (uint32_t t = 0; t < n; t++) {
        int32_t common = (int32_t)random_below(&text, n_ids), mine = (int32_t)random_below(&own, n_ids);
        prompt[t] = t < shared ? common : mine;
    }
    return n;
}

enum { ECHO_JOB = 11 };

static struct job *make_job(uint32_t i) {
    int32_t prompt[PROMPT_MAX];
    uint32_t n_prompt = make_prompt(i, prompt);
    CHECK(n_prompt <= PROMPT_MAX);
    struct job *job = job_new(prompt, n_prompt, n_new(i), i % 5 == 1 ? CANDIDATES : 1);
    struct sampling *sampling = &job->request.sampling;
    sampling->n_top = 1;
    if (i % 2) sampling->temperature = 0.9f, sampling->seed = 77 + i, sampling->top_p = i % 3 ? 1 : 0.9f;
    if (i % 6 == 4) sampling->repetition_penalty = 1.2f, sampling->frequency_penalty = 0.3f;
    if (i == ECHO_JOB) job->request.prompt_results = check_calloc(n_prompt, sizeof *job->request.prompt_results);
    job->request.arrival_ns = 1 + i;
    return job;
}

/* ---- a run ---- */

static uint32_t number_of(const struct job *job) { return (uint32_t)(job->request.arrival_ns - 1); }

static void record(void *context, struct job *job, const struct event *event) {
    struct answers *answers = context;
    struct answer *answer = &answers->of[number_of(job)][event->choice];
    if (event->finish == FINISH_ERROR || event->finish == FINISH_ABORTED) fail_msg("request %u: %s", number_of(job), event->error);
    CHECK(event->has_token && answer->n_tokens < NEW_MAX);
    answer->tokens[answer->n_tokens] = event->sample.token;
    answer->logprobs[answer->n_tokens++] = event->sample.logprob;
}

struct setting {
    const char *backend, *instruction_set;
    enum kv_dtype kv_dtype;
    uint32_t threads;
    const char *activations;
};

/* false: this machine does not have the instruction set. */
static bool open_client(struct client *client, struct setting setting, bool crowded, struct answers *answers) {
    struct config config;
    struct error error;
    config_defaults(&config);
    (void)snprintf(config.backend, sizeof config.backend, "%s", setting.backend);
    config.deterministic = true;
    (void)snprintf(config.instruction_set, sizeof config.instruction_set, "%s", setting.instruction_set);
    (void)snprintf(config.kv_dtype, sizeof config.kv_dtype, "%s", kv_dtype_name(setting.kv_dtype));
    const struct program *program = model_program(model);
    config.threads = setting.threads;
    (void)snprintf(config.activations, sizeof config.activations, "%s", setting.activations);
    config.max_model_len = model_len();
    config.max_sequences = crowded ? 12 : 2;
    config.max_rows = crowded ? TOGETHER_ROWS : 512;
    config.prefix_cache = crowded;
    config.run_ahead = crowded; /* alone, one step at a time: the others must say the same */
    config.step_ms = 10000; /* chunks are cut by max_rows, not by what this machine can do in a while */
    config.kv_memory = (uint64_t)backend_block_bytes(backend_find(setting.backend), program, setting.kv_dtype, true) * program_lanes(program) *
                       (model_len() / BLOCK_TOKENS) * 2;
    memset(answers, 0, sizeof *answers);
    struct engine_hooks hooks = client_init(client);
    client->on_event = record;
    client->context = answers;
    enum status status = engine_start(&config, model, &hooks, &client->engine, &error);
    if (status == STATUS_OK) return true;
    if (strstr(error.text, "instruction set") == NULL) fail_msg("%s", error.text);
    return false;
}

static void finish_job(struct job *job, struct answers *answers) {
    if (job->request.prompt_results) memcpy(answers->prompt, job->request.prompt_results, job->request.n_prompt * sizeof *answers->prompt);
    job_free(job);
}

static bool run_alone(struct setting setting) {
    struct client client;
    if (!open_client(&client, setting, false, &alone)) return false;
    for (uint32_t i = 0; i < JOBS; i++) {
        struct job *job = make_job(i);
        CHECK(client_submit(&client, job));
        client_run(&client, 0);
        finish_job(job, &alone);
    }
    struct engine_stats stats = client_settled(&client);
    assert_int_equal(stats.preemptions + stats.prefix_hits, 0);
    client_done(&client);
    return true;
}

static void run_together(struct setting setting) {
    struct client client;
    struct job *jobs[JOBS];
    CHECK(open_client(&client, setting, true, &together));
    for (uint32_t i = 0; i < JOBS; i++) CHECK(client_submit(&client, jobs[i] = make_job(i)));
    client_run(&client, 0);
    bool three_chunks = false; /* more rows to compute than two steps can have */
    for (uint32_t i = 0; i < JOBS; i++) {
        three_chunks = three_chunks || jobs[i]->request.n_prompt > jobs[i]->choices[0].cached + 2 * TOGETHER_ROWS;
        finish_job(jobs[i], &together);
    }
    struct engine_stats stats = client_settled(&client);
    print_message("  %s %s, kv %s, %s activations, %u threads: %u preemptions, %u partial prefix hits, %u forks, %u chunks, %u steps, %u of them ahead\n",
                  setting.backend, setting.instruction_set, kv_dtype_name(setting.kv_dtype), setting.activations, setting.threads,
                  (unsigned)stats.preemptions, (unsigned)stats.prefix_partial_hits, (unsigned)stats.forks, (unsigned)stats.chunks,
                  (unsigned)stats.steps, (unsigned)stats.steps_ahead);
    assert_int_equal(stats.steps_ahead > 0, client.engine->runs_ahead);
    assert_true(stats.preemptions >= 8);
    assert_true(stats.prefix_partial_hits >= 8);
    if (kivi_bits(setting.kv_dtype))
        assert_int_equal(stats.forks, 0); /* they read the prompt again */
    else
        assert_true(stats.forks >= 1);
    assert_true(three_chunks && stats.chunks >= 2);
    client_done(&client);
}

static void compare(struct setting setting) {
    for (uint32_t i = 0; i < JOBS; i++)
        for (uint32_t c = 0; c < CANDIDATES; c++) {
            const struct answer *a = &alone.of[i][c], *b = &together.of[i][c];
            assert_int_equal(a->n_tokens, b->n_tokens);
            for (uint32_t t = 0; t < a->n_tokens; t++)
                if (a->tokens[t] != b->tokens[t] || memcmp(&a->logprobs[t], &b->logprobs[t], sizeof(float)) != 0)
                    fail_msg("%s %s, kv %s, %s activations, %u threads: request %u, choice %u, token %u: alone %d (%.9g), together %d (%.9g)",
                             setting.backend, setting.instruction_set, kv_dtype_name(setting.kv_dtype), setting.activations, setting.threads, i, c, t,
                             a->tokens[t], (double)a->logprobs[t], b->tokens[t], (double)b->logprobs[t]);
        }
    assert_memory_equal(alone.prompt, together.prompt, sizeof alone.prompt);
    bool differ = false; /* random candidates do not all say the same, or nothing was tested */
    for (uint32_t i = 1; i < JOBS; i += 10) differ = differ || memcmp(&alone.of[i][0], &alone.of[i][1], sizeof alone.of[i][0]) != 0;
    assert_true(differ);
}

/* ---- the settings ---- */

/* Alone on one thread against together on one and two, or on two alone. */
static bool check_set(struct setting setting, uint32_t first_threads) {
    if (!run_alone(setting)) return false;
    for (setting.threads = first_threads; setting.threads <= 2; setting.threads++) {
        run_together(setting);
        compare(setting);
    }
    return true;
}

static uint32_t check_cpu(enum kv_dtype kv_dtype) {
    static const char *const sets[] = {"avx512bf16", "avx512", "avxvnni", "avx2", "generic"};
    uint32_t n_present = 0;
    if (!test_runs_on_name("cpu")) return 0;
    for (uint32_t s = 0; s < sizeof sets / sizeof *sets; s++) {
        struct setting setting = {.backend = "cpu", .instruction_set = sets[s], .kv_dtype = kv_dtype, .threads = 1, .activations = "8bit"};
        if (is_sample && n_present > 0 && strcmp(sets[s], "generic") == 0) continue; /* plain C takes minutes here: the tiny model covers it */
        if (!check_set(setting, is_sample ? 2 : 1)) continue;                        /* together on one thread too is the tiny model's */
        setting.activations = "16bit";                                               /* so is every set with these */
        if (!is_sample || n_present == 0) assert_true(check_set(setting, 2));
        n_present++;
    }
    assert_true(n_present >= 1);
    return n_present;
}

static uint32_t check_device(enum kv_dtype kv_dtype) {
    struct setting setting = {.backend = "cuda", .instruction_set = "auto", .kv_dtype = kv_dtype, .threads = 1, .activations = "8bit"};
    if (!test_runs_on_name(setting.backend) || backend_find(setting.backend)->block_bytes(model_program(model), kv_dtype) == 0) return 0;
    assert_true(run_alone(setting));
    run_together(setting);
    compare(setting);
    return 1;
}

static void check_dtype(enum kv_dtype kv_dtype) {
    if (check_cpu(kv_dtype) + check_device(kv_dtype) == 0) skip();
}

static void test_f32(void **state) { (void)state, check_dtype(KV_F32); }
static void test_f16(void **state) { (void)state, check_dtype(KV_F16); }
static void test_bf16(void **state) { (void)state, check_dtype(KV_BF16); }
static void test_q8(void **state) { (void)state, check_dtype(KV_Q8); }
static void test_kivi4(void **state) { (void)state, check_dtype(KV_KIVI4); }
static void test_kivi2(void **state) { (void)state, check_dtype(KV_KIVI2); }

static bool open_sample(struct error *error) {
    const char *named = getenv("KVASIR_TEST_MODEL"), *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    char path[4096];
    if (named && *named)
        (void)snprintf(path, sizeof path, "%s", named);
    else if (cache && *cache)
        (void)snprintf(path, sizeof path, "%s/kvasir/SmolLM2-135M-Instruct.Q4_1.gguf", cache);
    else
        (void)snprintf(path, sizeof path, "%s/.cache/kvasir/SmolLM2-135M-Instruct.Q4_1.gguf", home ? home : "");
    return model_open(path, &model, error) == STATUS_OK;
}

int main(int argc, char **argv) {
    struct error error;
    is_sample = argc > 1 && strcmp(argv[1], "sample") == 0;
    bool opened = is_sample ? open_sample(&error) : model_dummy("tiny", 3, &model, &error) == STATUS_OK;
    if (!opened) {
        (void)fprintf(stderr, "no model to test with: %s\nRun tests/run, which fetches it, or name one in KVASIR_TEST_MODEL.\n", error.text);
        return 1;
    }
    const struct CMUnitTest breadth[] = {cmocka_unit_test(test_f32), cmocka_unit_test(test_f16),   cmocka_unit_test(test_bf16),
                                         cmocka_unit_test(test_q8),  cmocka_unit_test(test_kivi4), cmocka_unit_test(test_kivi2)};
    const struct CMUnitTest depth[] = {cmocka_unit_test(test_f16), cmocka_unit_test(test_q8), cmocka_unit_test(test_kivi4)};
    int failed = is_sample ? cmocka_run_group_tests_name("sample", depth, NULL, NULL) : cmocka_run_group_tests_name("tiny", breadth, NULL, NULL);
    model_close(model);
    return failed;
}
