/* The load client's reading of answers: whatever the network cuts where, the same events at the same times, and nothing that a text says is taken for more than text. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/bench/stream.h"

#define EVENT(text) "data: {\"id\":\"x\",\"choices\":[{\"index\":0,\"text\":\"" text "\",\"finish_reason\":null}]}\n\n"
#define USAGE "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":3,\"total_tokens\":8}}\n\n"
#define DONE "data: [DONE]\n\n"

/* Five events, of which one has no text, one only looks as if it said more, and one counts tokens; a comment; an end. */
static const char *const lines[] = {
    EVENT("a"), EVENT(""), ": still here\n\n", EVENT("b \\\"text\\\":\\\"\\\",\\\"completion_tokens\\\":99"), EVENT("c"), USAGE, DONE};
#define LINES (sizeof lines / sizeof *lines)

static void reading(struct stream *stream) { *stream = (struct stream){.socket = -1, .n_new = 3, .state = STREAM_READS}; }

/* The whole answer as bytes: a chunk a line, or plain. */
static struct buffer answer(bool chunked) {
    struct buffer out = {0};
    buffer_append_text(&out, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n");
    buffer_append_text(&out, chunked ? "Transfer-Encoding: Chunked\r\n\r\n" : "Connection: close\r\n\r\n");
    for (size_t i = 0; i < LINES; i++) {
        if (chunked) buffer_printf(&out, "%zX\r\n", strlen(lines[i]));
        buffer_append_text(&out, lines[i]);
        if (chunked) buffer_append_text(&out, "\r\n");
    }
    if (chunked) buffer_append_text(&out, "0\r\n\r\n");
    return out;
}

static void check_answer(const struct stream *stream) {
    assert_int_equal(stream->state, STREAM_DONE);
    assert_int_equal(stream->status, 200);
    assert_int_equal(stream->n_events, 3);
    assert_int_equal(stream->n_tokens, 3);
}

static void cut_anywhere(void **state) {
    (void)state;
    for (int chunked = 0; chunked < 2; chunked++) {
        struct buffer bytes = answer(chunked);
        for (size_t cut = 0; cut <= bytes.length; cut++) {
            struct stream stream;
            reading(&stream);
            stream_feed(&stream, bytes.bytes, cut, 1);
            stream_feed(&stream, bytes.bytes + cut, bytes.length - cut, 2);
            check_answer(&stream);
            for (uint32_t i = 1; i < stream.n_events; i++) assert_true(stream.event_ns[i - 1] <= stream.event_ns[i]);
            stream_free(&stream);
        }
        buffer_done(&bytes);
    }
}

static void byte_by_byte_each_event_has_its_time(void **state) {
    (void)state;
    struct buffer bytes = answer(true);
    struct stream stream;
    reading(&stream);
    for (size_t i = 0; i < bytes.length; i++) stream_feed(&stream, bytes.bytes + i, 1, i);
    check_answer(&stream);
    /* An event is there when the newline behind it is: the first of two. */
    static const size_t of_line[] = {0, 3, 4};
    for (uint32_t e = 0; e < 3; e++) {
        size_t before = 0;
        for (size_t i = 0; i < of_line[e]; i++)
            before += strlen(lines[i]) + 4 + (strlen(lines[i]) > 15 ? 2 : 1); /* CR LF twice, and the size in hex */
        char head[256];
        size_t head_length = (size_t)(strstr(memcpy(head, bytes.bytes, sizeof head), "\r\n\r\n") - head) + 4;
        size_t line = head_length + before + 2 + (strlen(lines[of_line[e]]) > 15 ? 2 : 1) + strlen(lines[of_line[e]]) - 2;
        assert_int_equal(stream.event_ns[e], line);
    }
    stream_free(&stream);
    buffer_done(&bytes);
}

static void refused(const char *bytes) {
    struct stream stream;
    reading(&stream);
    stream_feed(&stream, bytes, strlen(bytes), 1);
    assert_int_equal(stream.state, STREAM_FAILED);
    assert_true(stream.error[0] != '\0');
    stream_free(&stream);
}

static void answers_that_are_none(void **state) {
    (void)state;
    refused("SMTP\r\n\r\n");
    refused("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnot a number\r\n");
    refused("HTTP/1.1 200 OK\r\n\r\ndata: {\"error\":{\"message\":\"the engine failed\"}}\n\n");
    char *long_head = calloc(1, 20000);
    memset(long_head, 'x', 19999);
    refused(long_head);
    free(long_head);
}

static void an_error_is_no_stream(void **state) {
    (void)state;
    const char *bytes = "HTTP/1.1 404 Not Found\r\n\r\n{\"error\":{\"message\":\"no such model\"}}\n" EVENT("a") DONE;
    struct stream stream;
    reading(&stream);
    stream_feed(&stream, bytes, strlen(bytes), 1);
    assert_int_equal(stream.status, 404);
    assert_int_equal(stream.n_events, 0);
    assert_int_equal(stream.state, STREAM_READS); /* until the server closes */
    stream_free(&stream);
}

static void prompts_are_distinct_and_repeatable(void **state) {
    (void)state;
    struct stream_settings settings = {.id_low = 10, .id_high = 1000, .seed = 7, .model = "m", .extra = "\"kv\":{\"policy\":\"none\"}"};
    struct stream a, b, again;
    stream_prepare(&a, &settings, 0, 40, 5);
    stream_prepare(&b, &settings, 1, 40, 5);
    stream_prepare(&again, &settings, 0, 40, 5);
    assert_int_equal(a.request.length, again.request.length);
    assert_memory_equal(a.request.bytes, again.request.bytes, a.request.length);
    assert_true(a.request.length != b.request.length || memcmp(a.request.bytes, b.request.bytes, a.request.length) != 0);
    buffer_append_byte(&a.request, '\0');
    const char *body = strstr(a.request.bytes, "\r\n\r\n") + 4;
    size_t commas = 0, declared = 0;
    for (const char *c = strchr(body, '['); *c != ']'; c++) commas += *c == ',';
    assert_int_equal(commas, 39);
    assert_non_null(strstr(body, "\"model\":\"m\",\"kv\":{\"policy\":\"none\"}}"));
    assert_int_equal(sscanf(strstr(a.request.bytes, "Content-Length: "), "Content-Length: %zu", &declared), 1);
    assert_int_equal(declared, strlen(body));
    stream_free(&a);
    stream_free(&b);
    stream_free(&again);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(cut_anywhere),          cmocka_unit_test(byte_by_byte_each_event_has_its_time), cmocka_unit_test(answers_that_are_none),
        cmocka_unit_test(an_error_is_no_stream), cmocka_unit_test(prompts_are_distinct_and_repeatable),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
