/* Bodies of requests, good and bad: what each becomes, or which field is named. Then the strict JSON reader against cJSON. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cjson/cJSON.h>
#include <cmocka.h>

#include "base/check.h"
#include "base/random.h"
#include "model/tokenizer_load.h"
#include "server/field.h"

#define VOCABULARY 300
#define CONTEXT 100

static struct tokenizer *tokenizer;
static struct completion_limits limits;

static int setup(void **state) {
    (void)state;
    tokenizer = tokenizer_byte_level(VOCABULARY);
    static struct config config;
    config_defaults(&config);
    limits = (struct completion_limits){.served_name = "m",
                                        .tokenizer = tokenizer,
                                        .max_model_len = CONTEXT,
                                        .max_stream_tokens = 10 * CONTEXT,
                                        .max_prompts = 8,
                                        .max_choices = 16,
                                        .max_logprobs = 20,
                                        .compression = &config};
    return 0;
}
static int teardown(void **state) {
    (void)state;
    tokenizer_close(tokenizer);
    return 0;
}

static bool parse(struct completion *completion, const char *body, size_t length, struct api_error *error) {
    *error = (struct api_error){0};
    return completion_parse(completion, body, length, &limits, error) && completion_tokenize(completion, &limits, error);
}

/* ---- bad ---- */

struct bad {
    const char *body, *param, *code; /* NULL: null */
    int status;                      /* 0: 400 */
};

static const struct bad bad[] = {
    /* not JSON, not an object */
    {"", NULL, "invalid_json", 0},
    {"{\"prompt\":\"a\",\"kv\":1}", "kv", NULL, 0},
    {"{\"prompt\":\"a\",\"kv\":[]}", "kv", NULL, 0},
    {"{\"prompt\":\"a\",\"kv\":{\"policy\":\"snap\"}}", "kv.policy", NULL, 0},
    {"{\"prompt\":\"a\",\"kv\":{\"policy\":\"\"}}", "kv.policy", NULL, 0},
    {"{\"prompt\":\"a\",\"kv\":{\"policy\":3}}", "kv.policy", NULL, 0},
    {"{\"prompt\":\"a\",\"kv\":{\"policy\":\"snapkv\",\"budget_tokens\":35}}", "kv.budget_tokens", NULL, 0},
    {"{\"prompt\":\"a\",\"kv\":{\"policy\":\"snapkv\",\"budget_tokens\":0}}", "kv.budget_tokens", NULL, 0},
    {"{\"prompt\":\"a\",\"kv\":{\"policy\":\"snapkv\",\"budget_tokens\":\"64\"}}", "kv.budget_tokens", NULL, 0},
    {"{\"prompt\":\"a\",\"kv\":{\"policy\":\"snapkv\",\"keep_ratio\":0}}", "kv.keep_ratio", NULL, 0},
    {"{\"prompt\":\"a\",\"kv\":{\"policy\":\"snapkv\",\"keep_ratio\":1.01}}", "kv.keep_ratio", NULL, 0},
    {"{\"prompt\":\"a\",\"kv\":{\"policy\":\"snapkv\",\"keep_ratio\":1e999}}", "kv.keep_ratio", NULL, 0},
    {"{\"prompt\":\"a\",\"kv\":{\"policy\":\"snapkv\",\"keep_ratio\":0.5,\"budget_tokens\":64}}", "kv.keep_ratio", NULL, 0},
    {"{\"prompt\":\"a\",\"kv\":{\"policy\":\"snapkv\",\"budget_tokens\":64,\"protect_tokens\":-1}}", "kv.protect_tokens", NULL, 0},
    {"{\"prompt\":\"a\",\"kv\":{\"policy\":\"snapkv\",\"budget_tokens\":64,\"protect_tokens\":50}}", "kv.protect_tokens", NULL, 0},
    {"{\"prompt\":\"a\",\"kv\":{\"report\":1}}", "kv.report", NULL, 0},
    {"{\"prompt\":\"a\",\"kv\":{\"polcy\":\"tova\"}}", "kv.polcy", NULL, 0},
    {"   ", NULL, "invalid_json", 0},
    {"{", NULL, "invalid_json", 0},
    {"[]", NULL, "invalid_json", 0},
    {"null", NULL, "invalid_json", 0},
    {"\"prompt\"", NULL, "invalid_json", 0},
    {"1", NULL, "invalid_json", 0},
    {"{}x", NULL, "invalid_json", 0},
    {"{\"prompt\":\"a\"}{}", NULL, "invalid_json", 0},
    {"{\"prompt\":\"a\",}", NULL, "invalid_json", 0},
    {"{prompt:\"a\"}", NULL, "invalid_json", 0},
    {"{'prompt':'a'}", NULL, "invalid_json", 0},
    {"{\"prompt\" \"a\"}", "prompt", "invalid_json", 0},
    {"{\"prompt\":\"a", "prompt", "invalid_json", 0},
    {"{\"prompt\":\"a\nb\"}", "prompt", "invalid_json", 0},
    {"{\"prompt\":\"\\x\"}", "prompt", "invalid_json", 0},
    {"{\"prompt\":\"\\ud800\"}", "prompt", "invalid_json", 0},
    {"{\"prompt\":\"\\udc00\\ud800\"}", "prompt", "invalid_json", 0},
    {"{\"prompt\":\"\\u12g4\"}", "prompt", "invalid_json", 0},
    {"{\"prompt\":\"\xff\"}", "prompt", "invalid_json", 0},
    {"{\"prompt\":\"a\",\"stop\":[\"b\",\"\xc3(\"]}", "stop", "invalid_json", 0},
    {"{\"prompt\":\"a\",\"\xe2\x82\":1}", NULL, "invalid_json", 0},
    {"{\"prompt\":\"a\"}\xff", NULL, "invalid_json", 0},
    {"\xff", NULL, "invalid_json", 0},
    {"{\"prompt\":\"\xc0\x80\"}", "prompt", "invalid_json", 0},
    {"{\"prompt\":\"\xed\xa0\x80\"}", "prompt", "invalid_json", 0},
    {"{\"prompt\":\"a\",\"prompt\":\"b\"}", "prompt", "invalid_json", 0},
    {"{\"prompt\":\"a\",\"temperature\":NaN}", "temperature", "invalid_json", 0},
    {"{\"prompt\":\"a\",\"temperature\":Infinity}", "temperature", "invalid_json", 0},
    {"{\"prompt\":\"a\",\"temperature\":-Infinity}", "temperature", "invalid_json", 0},
    {"{\"prompt\":\"a\",\"temperature\":01}", "temperature", "invalid_json", 0},
    {"{\"prompt\":\"a\",\"temperature\":1.}", "temperature", "invalid_json", 0},
    {"{\"prompt\":\"a\",\"temperature\":.5}", "temperature", "invalid_json", 0},
    {"{\"prompt\":\"a\",\"temperature\":+1}", "temperature", "invalid_json", 0},
    {"{\"prompt\":\"a\",\"temperature\":0x1}", "temperature", "invalid_json", 0},
    {"{\"prompt\":\"a\",\"temperature\":1e}", "temperature", "invalid_json", 0},
    {"{\"prompt\":\"a\",\"echo\":True}", "echo", "invalid_json", 0},
    {"{\"prompt\":\"a\",\"echo\":undefined}", "echo", "invalid_json", 0},
    {"{\"prompt\":[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]}", "prompt", "invalid_json", 0},
    /* model, prompt */
    {"{\"model\":\"other\",\"prompt\":\"a\"}", "model", "model_not_found", 404},
    {"{\"model\":\"\",\"prompt\":\"a\"}", "model", "model_not_found", 404},
    {"{\"model\":1,\"prompt\":\"a\"}", "model", NULL, 0},
    {"{\"model\":[\"m\"],\"prompt\":\"a\"}", "model", NULL, 0},
    {"{}", "prompt", NULL, 0},
    {"{\"prompt\":\"\"}", "prompt", NULL, 0},
    {"{\"prompt\":[]}", "prompt", NULL, 0},
    {"{\"prompt\":[\"\"]}", "prompt", NULL, 0},
    {"{\"prompt\":[\"a\",\"\"]}", "prompt", NULL, 0},
    {"{\"prompt\":[[]]}", "prompt", NULL, 0},
    {"{\"prompt\":[[1],[]]}", "prompt", NULL, 0},
    {"{\"prompt\":1}", "prompt", NULL, 0},
    {"{\"prompt\":true}", "prompt", NULL, 0},
    {"{\"prompt\":{\"a\":1}}", "prompt", NULL, 0},
    {"{\"prompt\":[null]}", "prompt", NULL, 0},
    {"{\"prompt\":[{}]}", "prompt", NULL, 0},
    {"{\"prompt\":[\"a\",1]}", "prompt", NULL, 0},
    {"{\"prompt\":[1,\"a\"]}", "prompt", NULL, 0},
    {"{\"prompt\":[[1],\"a\"]}", "prompt", NULL, 0},
    {"{\"prompt\":[[1],2]}", "prompt", NULL, 0},
    {"{\"prompt\":[[[1]]]}", "prompt", NULL, 0},
    {"{\"prompt\":[-1]}", "prompt", NULL, 0},
    {"{\"prompt\":[300]}", "prompt", NULL, 0},
    {"{\"prompt\":[1.5]}", "prompt", NULL, 0},
    {"{\"prompt\":[1e300]}", "prompt", NULL, 0},
    {"{\"prompt\":[4294967297]}", "prompt", NULL, 0},
    {"{\"prompt\":[18446744073709551616]}", "prompt", NULL, 0},
    {"{\"prompt\":[\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\"]}", "prompt", NULL, 0},
    /* stop */
    {"{\"prompt\":\"a\",\"stop\":\"\"}", "stop", NULL, 0},
    {"{\"prompt\":\"a\",\"stop\":[\"x\",\"\"]}", "stop", NULL, 0},
    {"{\"prompt\":\"a\",\"stop\":1}", "stop", NULL, 0},
    {"{\"prompt\":\"a\",\"stop\":{}}", "stop", NULL, 0},
    {"{\"prompt\":\"a\",\"stop\":[1]}", "stop", NULL, 0},
    {"{\"prompt\":\"a\",\"stop\":[[\"x\"]]}", "stop", NULL, 0},
    {"{\"prompt\":\"a\",\"stop\":[null]}", "stop", NULL, 0},
    {"{\"prompt\":\"a\",\"stop\":[\"1\",\"2\",\"3\",\"4\",\"5\",\"6\",\"7\",\"8\",\"9\",\"0\",\"1\",\"2\",\"3\",\"4\",\"5\",\"6\",\"7\"]}", "stop",
     NULL, 0},
    {"{\"prompt\":\"a\",\"stop_token_ids\":5}", "stop_token_ids", NULL, 0},
    {"{\"prompt\":\"a\",\"stop_token_ids\":[-1]}", "stop_token_ids", NULL, 0},
    {"{\"prompt\":\"a\",\"stop_token_ids\":[300]}", "stop_token_ids", NULL, 0},
    {"{\"prompt\":\"a\",\"stop_token_ids\":[\"1\"]}", "stop_token_ids", NULL, 0},
    {"{\"prompt\":\"a\",\"stop_token_ids\":[null]}", "stop_token_ids", NULL, 0},
    /* logit_bias */
    {"{\"prompt\":\"a\",\"logit_bias\":5}", "logit_bias", NULL, 0},
    {"{\"prompt\":\"a\",\"logit_bias\":\"x\"}", "logit_bias", NULL, 0},
    {"{\"prompt\":\"a\",\"logit_bias\":{\"x\":1}}", "logit_bias", NULL, 0},
    {"{\"prompt\":\"a\",\"logit_bias\":{\"\":1}}", "logit_bias", NULL, 0},
    {"{\"prompt\":\"a\",\"logit_bias\":{\"-1\":1}}", "logit_bias", NULL, 0},
    {"{\"prompt\":\"a\",\"logit_bias\":{\"1.0\":1}}", "logit_bias", NULL, 0},
    {"{\"prompt\":\"a\",\"logit_bias\":{\"300\":1}}", "logit_bias", NULL, 0},
    {"{\"prompt\":\"a\",\"logit_bias\":{\"99999999999\":1}}", "logit_bias", NULL, 0},
    {"{\"prompt\":\"a\",\"logit_bias\":{\"5\":101}}", "logit_bias", NULL, 0},
    {"{\"prompt\":\"a\",\"logit_bias\":{\"5\":-100.5}}", "logit_bias", NULL, 0},
    {"{\"prompt\":\"a\",\"logit_bias\":{\"5\":1e999}}", "logit_bias", NULL, 0},
    {"{\"prompt\":\"a\",\"logit_bias\":{\"5\":\"1\"}}", "logit_bias", NULL, 0},
    {"{\"prompt\":\"a\",\"logit_bias\":{\"5\":null}}", "logit_bias", NULL, 0},
    {"{\"prompt\":\"a\",\"logit_bias\":{\"5\":true}}", "logit_bias", NULL, 0},
    {"{\"prompt\":\"a\",\"logit_bias\":{\"5\":1,\"5\":2}}", "logit_bias", NULL, 0},
    {"{\"prompt\":\"a\",\"logit_bias\":[5,1]}", "logit_bias", NULL, 0},
    {"{\"prompt\":\"a\",\"logit_bias\":[[5]]}", "logit_bias", NULL, 0},
    {"{\"prompt\":\"a\",\"logit_bias\":[[5,1,2]]}", "logit_bias", NULL, 0},
    {"{\"prompt\":\"a\",\"logit_bias\":[[\"5\",1]]}", "logit_bias", NULL, 0},
    {"{\"prompt\":\"a\",\"logit_bias\":[[5,[1]]]}", "logit_bias", NULL, 0},
    {"{\"prompt\":\"a\",\"logit_bias\":[[300,1]]}", "logit_bias", NULL, 0},
    /* between fields */
    {"{\"prompt\":\"a\",\"n\":2,\"best_of\":1}", "best_of", NULL, 0},
    {"{\"prompt\":\"a\",\"best_of\":2,\"stream\":true}", "best_of", NULL, 0},
    {"{\"prompt\":\"a\",\"stream_options\":{}}", "stream_options", NULL, 0},
    {"{\"prompt\":\"a\",\"stream\":false,\"stream_options\":{\"include_usage\":true}}", "stream_options", NULL, 0},
    {"{\"prompt\":\"a\",\"stream\":true,\"stream_options\":{\"include_usage\":1}}", "stream_options.include_usage", NULL, 0},
    {"{\"prompt\":\"a\",\"stream\":true,\"stream_options\":{\"continuous_usage_stats\":\"yes\"}}", "stream_options.continuous_usage_stats", NULL, 0},
    {"{\"prompt\":\"a\",\"stream\":true,\"stream_options\":[]}", "stream_options", NULL, 0},
    {"{\"prompt\":\"a\",\"stream\":true,\"stream_options\":true}", "stream_options", NULL, 0},
    {"{\"prompt\":\"a\",\"min_tokens\":17}", "min_tokens", NULL, 0},
    {"{\"prompt\":\"a\",\"min_tokens\":5,\"max_tokens\":4}", "min_tokens", NULL, 0},
    {"{\"prompt\":[\"a\",\"b\",\"c\"],\"n\":6}", "n", NULL, 0},
    {"{\"prompt\":[\"a\",\"b\",\"c\"],\"best_of\":6}", "best_of", NULL, 0},
    {"{\"prompt\":[\"a\",\"b\",\"c\"],\"n\":2,\"best_of\":6}", "best_of", NULL, 0},
    {"{\"prompt\":[\"a\",\"b\",\"c\"],\"n\":6,\"best_of\":6}", "n", NULL, 0},
    {"{\"prompt\":\"a\",\"suffix\":\"x\"}", "suffix", NULL, 0},
    {"{\"prompt\":\"a\",\"suffix\":1}", "suffix", NULL, 0},
    {"{\"prompt\":\"a\",\"cache_salt\":\"\"}", "cache_salt", NULL, 0},
    {"{\"prompt\":\"a\",\"cache_salt\":7}", "cache_salt", NULL, 0},
    {"{\"prompt\":\"a\",\"truncate_prompt_tokens\":0}", "truncate_prompt_tokens", NULL, 0},
    {"{\"prompt\":\"a\",\"top_p\":0}", "top_p", NULL, 0},
    {"{\"prompt\":\"a\",\"repetition_penalty\":0}", "repetition_penalty", NULL, 0},
    {"{\"prompt\":\"a\",\"repetition_penalty\":1e-60}", "repetition_penalty", NULL, 0},
    /* context */
    {"{\"prompt\":\"a\",\"max_tokens\":100}", "max_tokens", "context_length_exceeded", 0}, /* which no prompt would make fit */
    {"{\"prompt\":\"a\",\"max_tokens\":2147483647}", "max_tokens", "context_length_exceeded", 0},
    {"{\"prompt\":\"aa\",\"max_tokens\":99}", "prompt", "context_length_exceeded", 0},
    {"{\"prompt\":\"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\"}", "prompt",
     "context_length_exceeded", 0},
    {"{\"prompt\":\"a\",\"max_tokens\":99,\"truncate_prompt_tokens\":5,\"prompt2\":0,\"n\":1,\"min_tokens\":100}", "min_tokens", NULL, 0},
};

static void expect_bad(const char *body, const char *param, const char *code, int status) {
    struct completion completion;
    struct api_error error;
    /* A copy without a terminator: reading on is a sanitizer's finding. */
    size_t length = strlen(body);
    char *copy = malloc(length ? length : 1);
    assert_non_null(copy);
    memcpy(copy, body, length);
    if (parse(&completion, copy, length, &error)) fail_msg("accepted: %s", body);
    if (error.status != status || strcmp(error.param, param ? param : "") != 0 || !!code != !!error.code || (code && strcmp(code, error.code) != 0))
        fail_msg("%s\n gives %d param=%s code=%s: %s", body, error.status, error.param, error.code ? error.code : "null", error.message);
    assert_true(strlen(error.message) > 5);
    completion_done(&completion);
    free(copy);
}

static void test_bad(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) expect_bad(bad[i].body, bad[i].param, bad[i].code, bad[i].status ? bad[i].status : 400);
}

/* Every typed field with every value that is not one of its: too small, too large, of another type. */
static void test_bad_values(void **state) {
    (void)state;
    static const struct {
        const char *field, *kind, *low, *high;
    } fields[] = {
        {"max_tokens", "integer", "-1", "2147483648"},
        {"min_tokens", "integer", "-1", "2147483648"},
        {"n", "integer", "0", "17"},
        {"best_of", "integer", "0", "17"},
        {"logprobs", "integer", "-1", "21"},
        {"top_k", "integer", "-2", "2147483648"},
        {"seed", "integer", "-9223372036854775809", "9223372036854775808"},
        {"priority", "integer", "-2147483649", "2147483648"},
        {"truncate_prompt_tokens", "integer", "-2", "2147483648"},
        {"temperature", "number", "-0.001", "2.001"},
        {"top_p", "number", "-0.1", "1.0001"},
        {"min_p", "number", "-0.1", "1.1"},
        {"presence_penalty", "number", "-2.1", "2.1"},
        {"frequency_penalty", "number", "-2.1", "2.1"},
        {"repetition_penalty", "number", "-1", "1e7"},
        {"echo", "bool", "0", "1"},
        {"stream", "bool", "0", "1"},
        {"ignore_eos", "bool", "0", "1"},
        {"include_stop_str_in_output", "bool", "0", "1"},
        {"skip_special_tokens", "bool", "0", "1"},
        {"add_special_tokens", "bool", "0", "1"},
        {"return_tokens_as_token_ids", "bool", "0", "1"},
        {"return_token_ids", "bool", "0", "1"},
    };
    static const char *const others[] = {"\"1\"", "\"\"", "[]", "[1]", "{}", "{\"a\":1}", "1e999", "-1e999", "\"true\"", "\"NaN\""};
    char body[200];
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        const char *values[16] = {fields[i].low, fields[i].high};
        size_t n = 2;
        for (size_t j = 0; j < sizeof others / sizeof *others; j++) values[n++] = others[j];
        if (strcmp(fields[i].kind, "bool") != 0) values[n++] = "true";
        if (strcmp(fields[i].kind, "integer") == 0) values[n++] = "0.5";
        for (size_t j = 0; j < n; j++) {
            (void)snprintf(body, sizeof body, "{\"prompt\":\"a\",\"%s\":%s}", fields[i].field, values[j]);
            expect_bad(body, fields[i].field, NULL, 400);
        }
        (void)snprintf(body, sizeof body, "{\"prompt\":\"a\",\"%s\":null}", fields[i].field); /* and null is the default */
        struct completion completion;
        struct api_error error;
        if (!parse(&completion, body, strlen(body), &error)) fail_msg("%s: %s", body, error.message);
        completion_done(&completion);
    }
}

/* A field under its name and once more with a letter of it escaped: one of the two would be forgotten, and what both append to has room for one. */
static void test_two_spellings(void **state) {
    (void)state;
    static const char *const fields[][2] = {{"prompt", "[[1,2],[3]]"},
                                            {"stop", "[\"a\",\"b\",\"c\",\"d\"]"},
                                            {"stop_token_ids", "[1,2,3]"},
                                            {"logit_bias", "{\"1\":1}"},
                                            {"max_tokens", "1"},
                                            {"stream", "false"},
                                            {"kv", "{}"},
                                            {"cache_salt", "\"a\""}};
    char body[400];
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        const char *name = fields[i][0], *value = fields[i][1];
        (void)snprintf(body, sizeof body, "{%s\"%s\":%s,\"\\u%04x%s\":%s}", i ? "\"prompt\":\"a\"," : "", name, value, (unsigned)name[0], name + 1,
                       value);
        expect_bad(body, name, NULL, 400);
    }
    struct tokenize_request request;
    struct api_error error = {0};
    static const char tokens[] = "{\"tokens\":[1],\"toke\\u006es\":[1,2,3,4,5,6,7,8,9]}";
    assert_false(detokenize_parse(&request, tokens, sizeof tokens - 1, &limits, &error));
    assert_string_equal(error.param, "tokens");
    tokenize_request_done(&request);
}

/* ---- good ---- */

static struct completion good(const char *body) {
    struct completion completion;
    struct api_error error;
    if (!parse(&completion, body, strlen(body), &error)) fail_msg("%s: %s", body, error.message);
    return completion;
}

static void test_defaults(void **state) {
    (void)state;
    static const char *const bodies[] = {
        "{\"prompt\":\"ab\"}",
        " {\"model\":\"m\",\"prompt\":\"ab\"}\r\n\t ",
        "{\"model\":null,\"prompt\":\"\\u0061\\u0062\",\"max_tokens\":null,\"temperature\":null,\"top_p\":null,\"n\":null,\"best_of\":null,\"echo\":"
        "null,"
        "\"logprobs\":null,\"logit_bias\":null,\"stop\":null,\"stream\":null,\"stream_options\":null,\"presence_penalty\":null,\"frequency_penalty\":"
        "null,"
        "\"seed\":null,\"suffix\":null,\"user\":null,\"top_k\":null,\"min_p\":null,\"repetition_penalty\":null,\"stop_token_ids\":null,\"cache_"
        "salt\":null}",
        "{\"prompt\":[\"ab\"],\"logit_bias\":{},\"stop\":[],\"suffix\":\"\",\"stop_token_ids\":[],\"top_k\":-1,\"unknown\":{\"a\":[1,{}]}}",
        "{\"prompt\":[97,98],\"max_tokens\":16.0,\"n\":1e0}",
        "{\"prompt\":[[97,98]],\"temperature\":1}",
    };
    for (size_t i = 0; i < sizeof bodies / sizeof *bodies; i++) {
        struct completion c = good(bodies[i]);
        assert_int_equal(c.n_prompts, 1);
        assert_int_equal(c.prompts[0].tokens.count, 2);
        assert_int_equal(c.prompts[0].tokens.tokens[0], 'a');
        assert_int_equal(c.prompts[0].tokens.tokens[1], 'b');
        assert_int_equal(c.max_tokens, 16);
        assert_int_equal(c.min_tokens, 0);
        assert_int_equal(c.n, 1);
        assert_int_equal(c.best_of, 1);
        assert_int_equal(c.logprobs, -1);
        assert_int_equal(c.n_stops, 0);
        assert_int_equal(c.n_stop_tokens, 0);
        assert_int_equal(c.sampling.n_bias, 0);
        assert_true(c.sampling.temperature == 1 && c.sampling.top_p == 1 && c.sampling.min_p == 0 && c.sampling.repetition_penalty == 1);
        assert_int_equal(c.sampling.top_k, 0);
        assert_false(c.stream || c.echo || c.seed_given || c.ignore_eos || c.include_usage);
        assert_true(c.skip_special && c.add_special);
        completion_done(&c);
    }
}

static void test_values(void **state) {
    (void)state;
    struct completion c = good(
        "{\"prompt\":[\"a\",\"bc\"],\"n\":2,\"best_of\":3,\"max_tokens\":5,\"min_tokens\":2,\"temperature\":0,\"top_p\":0.25,\"top_k\":7,\"min_p\":0."
        "5,"
        "\"presence_penalty\":-2,\"frequency_penalty\":2,\"repetition_penalty\":1.5,\"seed\":-9223372036854775808,\"logprobs\":0,\"echo\":true,"
        "\"stop\":[\"x\\ny\",\"\\ud83d\\ude00\"],\"stop_token_ids\":[1,2],\"logit_bias\":{\"5\":-100,\"6\":1.5},\"priority\":-3,\"cache_salt\":\"s\","
        "\"ignore_eos\":true,\"top_a\":1,\"mirostat\":2}");
    assert_int_equal(c.n_prompts, 2);
    assert_int_equal(c.prompts[1].tokens.count, 2);
    assert_int_equal(c.n, 2);
    assert_int_equal(c.best_of, 3);
    assert_int_equal(c.max_tokens, 5);
    assert_int_equal(c.min_tokens, 2);
    assert_true(c.sampling.temperature == 0 && c.sampling.top_p == 0.25f && c.sampling.min_p == 0.5f && c.sampling.repetition_penalty == 1.5f);
    assert_true(c.sampling.presence_penalty == -2 && c.sampling.frequency_penalty == 2);
    assert_int_equal(c.sampling.top_k, 7);
    assert_true(c.seed_given && (int64_t)c.sampling.seed == INT64_MIN);
    assert_int_equal(c.logprobs, 0);
    assert_int_equal(c.n_stops, 2);
    assert_memory_equal(c.stops[0].bytes, "x\ny", 3);
    assert_int_equal(c.stops[1].length, 4);
    assert_memory_equal(c.stops[1].bytes, "\xf0\x9f\x98\x80", 4);
    assert_int_equal(c.n_stop_tokens, 2);
    assert_int_equal(c.sampling.n_bias, 2);
    assert_int_equal(c.bias[0].token, 5);
    assert_true(c.bias[0].bias == -100 && c.bias[1].bias == 1.5f && c.sampling.bias == c.bias);
    assert_int_equal(c.priority, -3);
    assert_true(c.has_salt && c.ignore_eos && c.echo);
    assert_string_equal(c.ignored, "top_a,mirostat");
    completion_done(&c);
    c = good("{\"prompt\":\"a\",\"logit_bias\":[[7,false],[8,2]],\"seed\":9007199254740993,\"stop\":\"end\",\"stream\":true,\"stream_options\":{"
             "\"include_usage\":true,"
             "\"include_obfuscation\":false,\"continuous_usage_stats\":true},\"temperature\":1e-9}");
    assert_true(isinf(c.bias[0].bias) && c.bias[0].bias < 0 && c.bias[1].bias == 2);
    assert_true((int64_t)c.sampling.seed == 9007199254740993); /* not through a double */
    assert_true(c.stream && c.include_usage && c.continuous_usage);
    assert_true(c.sampling.temperature > 0 && c.sampling.temperature < 0.01f);
    completion_done(&c);
    c = good("{\"prompt\":null}"); /* the byte vocabulary has no BOS: the end of the last document begins one */
    assert_int_equal(c.prompts[0].tokens.count, 1);
    assert_int_equal(c.prompts[0].tokens.tokens[0], tokenizer_eos(tokenizer));
    completion_done(&c);
    c = good("{\"prompt\":\"\\u0000\\\"\\\\\\/\\b\\f\\n\\r\\t\\u20ac\"}");
    static const char decoded[] = "\0\"\\/\b\f\n\r\t\xe2\x82\xac";
    assert_int_equal(c.prompts[0].tokens.count, sizeof decoded - 1);
    for (size_t i = 0; i < sizeof decoded - 1; i++) assert_int_equal(c.prompts[0].tokens.tokens[i], (unsigned char)decoded[i]);
    completion_done(&c);
}

static void test_context(void **state) {
    (void)state;
    char body[400];
    /* 16 tokens that nobody asked for do not push a prompt out of the context */
    (void)snprintf(body, sizeof body, "{\"prompt\":\"%099d\"}", 1);
    struct completion c = good(body);
    assert_int_equal(c.max_tokens, 1);
    completion_done(&c);
    (void)snprintf(body, sizeof body, "{\"prompt\":\"%0100d\",\"max_tokens\":0}", 1); /* scored only: fits exactly */
    c = good(body);
    assert_int_equal(c.prompts[0].tokens.count, 100);
    completion_done(&c);
    (void)snprintf(body, sizeof body, "{\"prompt\":\"%0200d\",\"max_tokens\":10,\"truncate_prompt_tokens\":-1}", 7);
    c = good(body);
    assert_int_equal(c.prompts[0].tokens.count, 90);
    assert_int_equal(c.prompts[0].tokens.tokens[89], '7'); /* the end stays */
    completion_done(&c);
    struct api_error error;
    (void)snprintf(body, sizeof body, "{\"prompt\":\"%0200d\",\"max_tokens\":10}", 7);
    assert_false(parse(&c, body, strlen(body), &error));
    assert_non_null(strstr(error.message, "maximum context length is 100 tokens"));
    assert_non_null(strstr(error.message, "requested 210 tokens (200 in the prompt, 10 for the completion)"));
    completion_done(&c);
}

/* A stream goes on beyond the context, its prompt does not, and who is refused is told which limit it was. */
static void test_stream_context(void **state) {
    (void)state;
    static const char kv[] = "\"kv\":{\"policy\":\"streaming_llm\",\"budget_tokens\":64}}";
    char body[400];
    struct completion c;
    struct api_error error;
    limits.max_model_len = 200;
    (void)snprintf(body, sizeof body, "{\"prompt\":\"%0200d\",\"max_tokens\":800,%s", 7, kv);
    c = good(body);
    completion_done(&c);
    (void)snprintf(body, sizeof body, "{\"prompt\":\"%0200d\",\"max_tokens\":801,%s", 7, kv);
    assert_false(parse(&c, body, strlen(body), &error));
    assert_non_null(strstr(error.message, "maximum context length is 1000 tokens"));
    completion_done(&c);
    (void)snprintf(body, sizeof body, "{\"prompt\":\"%0201d\",\"max_tokens\":10,%s", 7, kv);
    assert_false(parse(&c, body, strlen(body), &error));
    assert_non_null(strstr(error.message, "maximum context length is 200 tokens"));
    completion_done(&c);
    limits.max_model_len = CONTEXT;
}

/* ---- JSON ---- */

static bool same_value(const struct json_document *document, uint32_t node, const cJSON *other) {
    const struct json_node *json = &document->nodes[node];
    switch ((enum json_type)json->type) {
    case JSON_NULL: return cJSON_IsNull(other);
    case JSON_FALSE: return cJSON_IsFalse(other);
    case JSON_TRUE: return cJSON_IsTrue(other);
    case JSON_NUMBER: {
        double value;
        if (!cJSON_IsNumber(other)) return false;
        if (!json_number(document, node, &value)) return isinf(other->valuedouble); /* ours is finite or nothing */
        return value == other->valuedouble;
    }
    case JSON_STRING: return cJSON_IsString(other) && json_string_equals(document, node, other->valuestring);
    case JSON_ARRAY:
    case JSON_OBJECT: {
        bool object = json->type == JSON_OBJECT;
        uint32_t child = node + 1, count = 0;
        if (object ? !cJSON_IsObject(other) : !cJSON_IsArray(other)) return false;
        const cJSON *item;
        cJSON_ArrayForEach(item, other) {
            if (child >= json->next) return false;
            if (object && !json_string_equals(document, child++, item->string)) return false;
            if (!same_value(document, child, item)) return false;
            child = document->nodes[child].next;
            count++;
        }
        return child == json->next && count == json->length;
    }
    }
    return false;
}

static void random_value(struct random *random, struct buffer *out, int depth) {
    static const char *const atoms[] = {
        "null", "true", "false", "0", "-1", "1.5e-3", "12345678901", "0.1", "\"\"", "\"x\"", "\"\\u00e9\\n\\\"\"", "\"\xe2\x82\xac\"", "1E+2", "-0"};
    uint32_t kind = random_below(random, depth > 5 ? 6 : 10);
    if (kind < 6) {
        buffer_append_text(out, atoms[random_below(random, sizeof atoms / sizeof *atoms)]);
        return;
    }
    bool object = kind >= 8;
    uint32_t n = random_below(random, 5);
    buffer_append_byte(out, object ? '{' : '[');
    for (uint32_t i = 0; i < n; i++) {
        if (i) buffer_append_text(out, random_below(random, 2) ? "," : " ,\n");
        if (object) buffer_printf(out, "\"k%u\" : ", i);
        random_value(random, out, depth + 1);
    }
    buffer_append_byte(out, object ? '}' : ']');
}

/* What both accept means the same; what is damaged and ours accepts, cJSON accepts and reads alike. */
static void test_json_against_cjson(void **state) {
    (void)state;
    struct random random = {20261};
    uint32_t accepted = 0, refused = 0;
    for (int round = 0; round < 20000; round++) {
        struct buffer text = {0};
        random_value(&random, &text, 0);
        bool damaged = random_below(&random, 3) == 0;
        if (damaged) {
            static const char bytes[] = "{}[],:\"\\0-e.\xff \n1u";
            uint32_t at = random_below(&random, (uint32_t)text.length);
            text.bytes[at] = bytes[random_below(&random, sizeof bytes - 1)];
        }
        struct json_document document;
        struct json_failure failure;
        buffer_append_byte(&text, '\0');
        bool good_text = json_read(&document, text.bytes, text.length - 1, 1u << 20, &failure);
        if (!damaged && !good_text) fail_msg("refused (%s at %zu): %s", failure.what, failure.offset, text.bytes);
        if (good_text) {
            cJSON *other = cJSON_Parse(text.bytes);
            if (!other || !same_value(&document, 0, other)) fail_msg("read differently: %s", text.bytes);
            cJSON_Delete(other);
            accepted++;
        } else {
            refused++;
        }
        json_document_done(&document);
        buffer_done(&text);
    }
    assert_true(accepted > 10000 && refused > 2000);
}

static void test_json_bounds(void **state) {
    (void)state;
    struct json_document document;
    struct json_failure failure;
    size_t length = 1u << 20;
    char *text = check_calloc(length, 1);
    memset(text, '[', length); /* no recursion, no memory */
    assert_false(json_read(&document, text, length, 1u << 20, &failure));
    assert_string_equal(failure.what, "nested too deeply");
    for (size_t i = 1; i < length; i++) text[i] = i % 2 ? '1' : ',';
    text[length - 1] = ']';
    assert_false(json_read(&document, text, length, 1000, &failure));
    assert_string_equal(failure.what, "too many values");
    assert_null(document.nodes);
    free(text);
    char deep[2 * JSON_DEPTH_MAX + 3];
    for (int extra = 0; extra < 2; extra++) {
        size_t depth = JSON_DEPTH_MAX + (size_t)extra;
        memset(deep, '[', depth);
        memset(deep + depth, ']', depth);
        assert_int_equal(json_read(&document, deep, 2 * depth, 1000, &failure), !extra);
        json_document_done(&document);
    }
}

/* Wrong bytes are found before anything else is read, and yet it is said where they stand. */
static void test_json_utf8(void **state) {
    (void)state;
    static const struct {
        const char *text, *key;
        size_t offset;
    } cases[] = {{"\xff", "", 0},
                 {"{\"a\": \"\xc3\xa9\xc3\"}", "a", 9},
                 {"{\"a\": 1, \"b\": [\"\xed\xa0\x80\"]}", "b", 16},
                 {"{\"a\": 1} \x80", "", 9},
                 {"{\"a\": -\x80", "a", 7}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct json_document document;
        struct json_failure failure;
        assert_false(json_read(&document, cases[i].text, strlen(cases[i].text), 1000, &failure));
        assert_null(document.nodes);
        assert_string_equal(failure.key, cases[i].key);
        if (failure.offset != cases[i].offset || strcmp(failure.what, "not valid UTF-8") != 0)
            fail_msg("case %zu: at %zu: %s", i, failure.offset, failure.what);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bad),
        cmocka_unit_test(test_bad_values),
        cmocka_unit_test(test_two_spellings),
        cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_values),
        cmocka_unit_test(test_context),
        cmocka_unit_test(test_json_bounds),
        cmocka_unit_test(test_json_utf8),
        cmocka_unit_test(test_stream_context),
        cmocka_unit_test(test_json_against_cjson),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
