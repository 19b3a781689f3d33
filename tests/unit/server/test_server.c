/* What the server answers: routes, completions, streams, limits, keys. The whole of it in this process, over real sockets, on a fake engine. How connections and the daemon itself
 * begin, break and end is in test_connections.c; what needs a model or many processes is in tests/http. */
#include "daemon.h"

static void test_routes(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(NULL);
    expect(daemon->port, "GET", "/health", NULL, NULL, 200, "{\"status\":\"ok\"}");
    expect(daemon->port, "GET", "/version", NULL, NULL, 200, "\"version\":\"");
    expect(daemon->port, "GET", "/v1/models", NULL, NULL, 200, "\"max_model_len\":4096");
    expect(daemon->port, "GET", "/v1/models/fake", NULL, NULL, 200, "\"root\":\"fake\"");
    expect(daemon->port, "GET", "/v1/models/other", NULL, NULL, 404, "model_not_found");
    expect(daemon->port, "GET", "/nowhere", NULL, NULL, 404, "\"code\":\"not_found\"");
    expect(daemon->port, "POST", "/v1/completionsx", NULL, "{}", 404, "\"error\"");
    expect(daemon->port, "GET", "/v1/completions", NULL, NULL, 405, "Allow: POST, OPTIONS");
    expect(daemon->port, "DELETE", "/health", NULL, NULL, 405, "Allow: GET, HEAD, OPTIONS");
    expect(daemon->port, "OPTIONS", "/v1/completions", NULL, NULL, 204, "Allow: POST");
    struct answer head = ask(daemon->port, "HEAD", "/health", NULL, NULL);
    assert_int_equal(head.status, 200);
    assert_string_equal(head.body, "");
    answer_done(&head);
    expect(daemon->port, "GET", "/health", "Host: evil.example\r\n", NULL, 400, "more than one Host");
    expect(daemon->port, "GET", "/health", "x-request-id: abc-1\"<\r\n", NULL, 200, "x-request-id: abc-1\r\n");
    expect(daemon->port, "GET", "/health", "Origin: http://evil.example\r\n", NULL, 403, "host_not_allowed");
    expect(daemon->port, "GET", "/health", "Origin: http://localhost:3000\r\n", NULL, 200, NULL);
    expect(daemon->port, "POST", "/tokenize", NULL, "{\"prompt\":\"ab\",\"return_token_strs\":true}", 200,
           "{\"count\":2,\"max_model_len\":4096,\"tokens\":[97,98],\"token_strs\":[\"a\",\"b\"]}");
    expect(daemon->port, "POST", "/tokenize", NULL, "{\"content\":\"\"}", 200, "\"tokens\":[]");
    expect(daemon->port, "POST", "/tokenize", NULL, "{}", 400, "\"param\":\"prompt\"");
    expect(daemon->port, "POST", "/detokenize", NULL, "{\"tokens\":[97,98]}", 200, "{\"prompt\":\"ab\",\"content\":\"ab\"}");
    expect(daemon->port, "POST", "/detokenize", NULL, "{\"tokens\":[97,300]}", 400, "\"param\":\"tokens\"");
    daemon_end(daemon);
}

static void test_completion(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(NULL);
    struct answer answer = complete(daemon->port, "{\"prompt\":\"hello \",\"max_tokens\":8}");
    assert_int_equal(answer.status, 200);
    assert_has(answer, "\"object\":\"text_completion\"");
    assert_has(answer, "\"model\":\"fake\"");
    assert_has(answer, "\"index\":0,\"text\":\"hello he\",\"logprobs\":null,\"finish_reason\":\"length\",\"stop_reason\":null");
    assert_has(answer, "\"usage\":{\"prompt_tokens\":6,\"completion_tokens\":8,\"total_tokens\":14,\"prompt_tokens_details\":{\"cached_tokens\":0}}");
    assert_has(answer, "Content-Type: application/json");
    answer_done(&answer);
    /* EOS (byte 4 of the script), stop strings, n, several prompts, echo */
    answer = complete(daemon->port, "{\"prompt\":\"abc\\u0004\",\"max_tokens\":50}");
    assert_has(answer, "\"text\":\"abc\",\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":null");
    assert_has(answer, "\"completion_tokens\":4");
    answer_done(&answer);
    answer = complete(daemon->port, "{\"prompt\":\"abcdef\",\"max_tokens\":50,\"stop\":[\"xx\",\"de\"]}");
    assert_has(answer, "\"text\":\"abc\",\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":\"de\"");
    assert_has(answer, "\"completion_tokens\":5");
    answer_done(&answer);
    answer = complete(daemon->port, "{\"prompt\":\"abcdef\",\"max_tokens\":50,\"stop\":\"de\",\"include_stop_str_in_output\":true}");
    assert_has(answer, "\"text\":\"abcde\"");
    answer_done(&answer);
    answer = complete(daemon->port, "{\"prompt\":\"abcdef\",\"max_tokens\":50,\"stop\":\"de\",\"min_tokens\":5}");
    assert_has(answer, "\"text\":\"abcdefabc\"");
    answer_done(&answer);
    answer = complete(daemon->port, "{\"prompt\":[\"ab\",\"xyz\"],\"max_tokens\":3,\"n\":2}");
    assert_has(answer, "\"index\":0,\"text\":\"aba\"");
    assert_has(answer, "\"index\":1,\"text\":\"bab\"");
    assert_has(answer, "\"index\":2,\"text\":\"xyz\"");
    assert_has(answer, "\"index\":3,\"text\":\"yzx\"");
    assert_has(answer, "\"prompt_tokens\":5,\"completion_tokens\":12,\"total_tokens\":17");
    answer_done(&answer);
    answer = complete(daemon->port, "{\"prompt\":[[97,98],[99]],\"max_tokens\":1,\"echo\":true}");
    assert_has(answer, "\"index\":0,\"text\":\"aba\"");
    assert_has(answer, "\"index\":1,\"text\":\"cc\"");
    answer_done(&answer);
    answer = complete(daemon->port, "{\"prompt\":\"ab\",\"max_tokens\":0,\"echo\":true}");
    assert_has(answer, "\"text\":\"ab\",\"logprobs\":null,\"finish_reason\":\"length\"");
    assert_has(answer, "\"completion_tokens\":0");
    answer_done(&answer);
    answer = complete(daemon->port, "{\"prompt\":\"\",\"max_tokens\":1}");
    assert_int_equal(answer.status, 400);
    assert_has(answer, "\"param\":\"prompt\"");
    answer_done(&answer);
    answer = complete(daemon->port, "{\"prompt\":\"abc\",\"max_tokens\":4096}");
    assert_int_equal(answer.status, 400);
    assert_has(answer, "\"code\":\"context_length_exceeded\"");
    assert_has(answer, "4096 tokens. However, you requested 4099 tokens (3 in the prompt, 4096 for the completion)");
    answer_done(&answer);
    daemon_end(daemon);
}

static void test_logprobs(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(NULL);
    struct answer answer = complete(daemon->port, "{\"prompt\":\"a\\u00e9b\",\"max_tokens\":3,\"logprobs\":2,\"echo\":true}");
    /* 4 prompt tokens (two bytes of the accent), 3 new ones: a, and the two bytes again */
    assert_has(answer, "\"text\":\"a\303\251ba\303\251\"");
    assert_has(answer, "\"tokens\":[\"a\",\"bytes:\\\\xc3\",\"bytes:\\\\xa9\",\"b\",\"a\",\"bytes:\\\\xc3\",\"bytes:\\\\xa9\"]");
    /* The second most likely token is the next byte: two halves of a character each have their own key. */
    assert_has(answer, "{\"bytes:\\\\xc3\":-0.85,\"bytes:\\\\xc4\":-1.85}");
    assert_has(answer, "\"token_logprobs\":[null,-0.85,-0.35,-0.25,-0.85,-0.85,-0.35]");
    assert_has(answer, "\"text_offset\":[0,1,1,2,3,4,4]");
    assert_has(answer, "\"top_logprobs\":[null,");
    answer_done(&answer);
    answer = complete(daemon->port, "{\"prompt\":\"ab\",\"max_tokens\":1,\"logprobs\":0}");
    assert_has(answer, "\"top_logprobs\":[{\"a\":-0.85}]");
    answer_done(&answer);
    answer =
        complete(daemon->port, "{\"prompt\":\"ab\",\"max_tokens\":1,\"logprobs\":1,\"return_tokens_as_token_ids\":true,\"return_token_ids\":true}");
    assert_has(answer, "\"tokens\":[\"token_id:97\"]");
    assert_has(answer, "\"top_logprobs\":[{\"token_id:97\":-0.85}]");
    assert_has(answer, "\"token_ids\":[97],\"prompt_token_ids\":[97,98]");
    answer_done(&answer);
    /* best_of: the candidates are rotations of the prompt; the one of the likelier first token wins */
    answer = complete(daemon->port, "{\"prompt\":\"ab\",\"max_tokens\":1,\"best_of\":2}");
    assert_has(answer, "\"text\":\"b\"");
    assert_has(answer, "\"completion_tokens\":1");
    answer_done(&answer);
    daemon_end(daemon);
}

static void test_stream(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(NULL);
    struct answer answer =
        complete(daemon->port, "{\"prompt\":\"abc\",\"max_tokens\":3,\"stream\":true,\"stream_options\":{\"include_usage\":true}}");
    assert_int_equal(answer.status, 200);
    assert_has(answer, "Content-Type: text/event-stream");
    assert_has(answer, "Cache-Control: no-cache");
    assert_has(answer, "Transfer-Encoding: chunked");
    assert_has(answer, "data: {\"id\":\"cmpl-");
    assert_has(answer, "\"text\":\"a\",\"logprobs\":null,\"finish_reason\":null");
    assert_has(answer, "\"text\":\"c\",\"logprobs\":null,\"finish_reason\":\"length\"");
    assert_has(answer, "\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":3,");
    assert_has(answer, "data: [DONE]\n\n");
    answer_done(&answer);
    answer = complete(daemon->port, "{\"prompt\":\"abc\",\"max_tokens\":3,\"stream\":true}");
    assert_has_not(answer, "\"usage\"");
    answer_done(&answer);
    /* Hold-back: "ab" could become the stop "abX" each time round, and never does */
    answer = complete(daemon->port, "{\"prompt\":\"abc\",\"max_tokens\":4,\"stream\":true,\"stop\":\"abX\"}");
    assert_has_not(answer, "\"text\":\"a\",\"logprobs\":null,\"finish_reason\":null");
    assert_has(answer, "\"text\":\"abc\"");
    assert_has(answer, "\"text\":\"a\",\"logprobs\":null,\"finish_reason\":\"length\"");
    answer_done(&answer);
    answer = complete(daemon->port, "{\"prompt\":\"a\\u00e9\",\"max_tokens\":3,\"stream\":true}");
    assert_has(answer, "\"text\":\"\303\251\"");
    assert_has_not(answer, "\357\277\275");
    answer_done(&answer);
    /* An error before the first token is an HTTP error */
    FAKE_SET(daemon->engine, fail, "device lost");
    answer = complete(daemon->port, "{\"prompt\":\"abc\",\"max_tokens\":3,\"stream\":true}");
    assert_int_equal(answer.status, 500);
    assert_has(answer, "engine_error");
    assert_has_not(answer, "device lost");
    answer_done(&answer);
    FAKE_SET(daemon->engine, fail, NULL);
    expect(daemon->port, "GET", "/health", NULL, NULL, 200, NULL);
    daemon_end(daemon);
}

static void first_byte(struct config *config) { config->first_byte_timeout_s = 1; }

static void test_late_error(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(first_byte);
    FAKE_SET(daemon->engine, held, true);
    int fd = dial(daemon->port);
    const char *body = "{\"prompt\":\"abc\",\"max_tokens\":3,\"stream\":true}";
    send_request(fd, "POST", COMPLETIONS, "Connection: close\r\n", body);
    /* No token comes: the 200 goes out all the same after first_byte_timeout */
    struct buffer head = receive(fd, "\r\n\r\n");
    assert_int_equal(strncmp(head.bytes, "HTTP/1.1 200", 12), 0);
    FAKE_SET(daemon->engine, fail, "device lost");
    FAKE_SET(daemon->engine, held, false);
    struct buffer rest = receive(fd, NULL);
    assert_non_null(strstr(rest.bytes, "data: {\"error\":{\"message\":"));
    assert_non_null(strstr(rest.bytes, "data: [DONE]\n\n"));
    buffer_done(&head);
    buffer_done(&rest);
    (void)close(fd);
    daemon_end(daemon);
}

static void test_queue_full(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(NULL);
    FAKE_SET(daemon->engine, max_requests, 1);
    FAKE_SET(daemon->engine, held, true);
    /* The second prompt finds no room: the first is taken back. */
    int fd = dial(daemon->port);
    const char *body = "{\"prompt\":[\"a\",\"b\"]}";
    send_request(fd, "POST", COMPLETIONS, "Connection: close\r\n", body);
    struct buffer answer = receive(fd, NULL);
    assert_int_equal(strncmp(answer.bytes, "HTTP/1.1 503", 12), 0);
    assert_non_null(strstr(answer.bytes, "Retry-After: 1"));
    buffer_done(&answer);
    (void)close(fd);
    FAKE_SET(daemon->engine, max_requests, 64);
    FAKE_SET(daemon->engine, held, false);
    until_metric(daemon->port, "kvasir_requests_waiting", 0);
    struct answer good = complete(daemon->port, "{\"prompt\":\"abc\",\"max_tokens\":1}");
    assert_int_equal(good.status, 200);
    answer_done(&good);
    daemon_end(daemon);
}

static void test_long_body(void **state) {
    (void)state;
    struct daemon *daemon = daemon_ready(NULL);
    /* Long enough for a worker: 8,000 ids that are too many, and 3,000 that fit */
    struct buffer body = {0};
    buffer_append_text(&body, "{\"max_tokens\":1,\"echo\":false,\"prompt\":[");
    for (int i = 0; i < 8000; i++) buffer_append_text(&body, i ? ",100" : "100");
    buffer_append_text(&body, "]}");
    buffer_append_byte(&body, '\0');
    struct answer answer = complete(daemon->port, body.bytes);
    assert_int_equal(answer.status, 400);
    assert_has(answer, "(8000 in the prompt, 1 for the completion)");
    answer_done(&answer);
    body.length = 0;
    buffer_append_text(&body, "{\"max_tokens\":1,\"truncate_prompt_tokens\":3000,\"prompt\":\"");
    for (int i = 0; i < 30000; i++) buffer_append_byte(&body, 'x');
    buffer_append_text(&body, "\"}");
    buffer_append_byte(&body, '\0');
    answer = complete(daemon->port, body.bytes);
    assert_int_equal(answer.status, 200);
    assert_has(answer, "\"prompt_tokens\":3000");
    answer_done(&answer);
    buffer_done(&body);
    daemon_end(daemon);
}

static char key_file[] = "/tmp/kvasir-test-keys-XXXXXX";
static void with_keys(struct config *config) {
    (void)snprintf(config->api_key_file, sizeof config->api_key_file, "%s", key_file);
    config->max_requests_per_key = 1;
}

static void write_keys(const char *text) {
    FILE *file = fopen(key_file, "w");
    assert_non_null(file);
    assert_true(fputs(text, file) >= 0);
    assert_int_equal(fclose(file), 0);
}

static void test_keys(void **state) {
    (void)state;
    int fd = mkstemp(key_file);
    assert_true(fd >= 0);
    (void)close(fd);
    write_keys("# ours\n  secret-1  \nsecret-2\n");
    struct daemon *daemon = daemon_ready(with_keys);
    expect(daemon->port, "GET", "/health", NULL, NULL, 200, NULL);
    expect(daemon->port, "GET", "/v1/models", NULL, NULL, 401, "invalid_api_key");
    expect(daemon->port, "GET", "/nowhere", NULL, NULL, 401, NULL);
    expect(daemon->port, "GET", "/v1/models", "Authorization: Bearer secret-3\r\n", NULL, 401, "WWW-Authenticate: Bearer");
    expect(daemon->port, "GET", "/v1/models", "Authorization: Bearer secret-1\r\n", NULL, 200, NULL);
    expect(daemon->port, "GET", "/v1/models", "X-Api-Key: secret-2\r\n", NULL, 200, NULL);
    expect(daemon->port, "POST", "/v1/completions", "Authorization: Bearer wrong\r\n", "{\"prompt\":\"a\"}", 401, NULL);
    /* The limit of one key is its own */
    FAKE_SET(daemon->engine, held, true);
    fd = dial(daemon->port);
    send_request(fd, "POST", COMPLETIONS, "X-Api-Key: secret-1\r\n", "{\"prompt\":\"a\"}");
    until_metric(daemon->port, "kvasir_requests_waiting", 1);
    expect(daemon->port, "POST", "/v1/completions", "X-Api-Key: secret-1\r\n", "{\"prompt\":\"a\"}", 429, "Retry-After: 1");
    FAKE_SET(daemon->engine, held, false);
    until_metric(daemon->port, "kvasir_requests_waiting", 0);
    until_metric(daemon->port, "kvasir_requests_running", 0);
    expect(daemon->port, "POST", "/v1/completions", "X-Api-Key: secret-1\r\n", "{\"prompt\":\"a\"}", 200, NULL);
    (void)close(fd);
    daemon_end(daemon);
    assert_int_equal(unlink(key_file), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_routes),     cmocka_unit_test(test_completion), cmocka_unit_test(test_logprobs),  cmocka_unit_test(test_stream),
        cmocka_unit_test(test_late_error), cmocka_unit_test(test_queue_full), cmocka_unit_test(test_long_body), cmocka_unit_test(test_keys),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
