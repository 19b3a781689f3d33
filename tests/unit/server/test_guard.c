/* The guard over bytes and fields: what is refused before libmicrohttpd reads it, whose Host and Origin are answered. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/buffer.h"
#include "server/guard.h"

static void test_hosts(void **state) {
    (void)state;
    static const char *const good[] = {"localhost", "LocalHost:8080", "localhost.",  "127.0.0.1",       "127.0.0.1:1", "127.9.8.7",
                                       "[::1]",     "[::1]:99999",    "api.example", "API.EXAMPLE:443", "10.0.0.5:80", "b.example"};
    static const char *const wrong[] = {"",
                                        ":80",
                                        "evil.example",
                                        "localhost.evil.example",
                                        "127.0.0.1.evil.example",
                                        "127.0.0.1@evil.example",
                                        "localhost:80x",
                                        "localhost:999999",
                                        "[::1",
                                        "[::2]",
                                        "127.1",
                                        "1127.0.0.1",
                                        "xapi.example",
                                        "localhost, api.example",
                                        "localhost/"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        if (!guard_host_allowed(good[i], "10.0.0.5", " api.example , b.example")) fail_msg("refused: %s", good[i]);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        if (guard_host_allowed(wrong[i], "10.0.0.5", " api.example , b.example")) fail_msg("accepted: %s", wrong[i]);
    assert_true(guard_host_allowed("whatever.example:1", "", "*"));
    assert_true(guard_host_allowed("[fe80::1]:80", "fe80::1", ""));
    assert_false(guard_host_allowed("[b.example]", "", "b.example")); /* a name is no address */
    assert_false(guard_host_allowed("[localhost]", "", "localhost"));
    assert_true(guard_origin_allowed("http://localhost:3000", "", ""));
    assert_false(guard_origin_allowed("http://evil.example", "", ""));
    assert_false(guard_origin_allowed("null", "", ""));
}

static void test_heads(void **state) {
    (void)state;
    static const char *const good[] = {
        "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET / HTTP/1.0\r\n\r\n",
        "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 9223372036854775807\r\n\r\nrest: \x01\r\n",
        "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\tchunked\r\nX-Empty:\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n", /* not complete: nothing is said yet */
    };
    static const char *const wrong[] = {
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX y: z\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX : z\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\n: z\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nnonsense\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\n folded: x\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: \r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1 1\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\ncontent-length: 1\r\nContent-Length: 1\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n",
        "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\t\r\n\r\n", /* libmicrohttpd takes none with a blank behind it */
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1 \r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked \r\n\r\n",
        "GET / HTTP/1.2\r\nHost: a\r\nX y: z\r\n\r\n", /* read as 1.1 */
        "GET / HTTP/1.1\r\nnonsense\r\n",              /* not complete, and wrong already */
        "GET / HTTP/1.1\r\nHost: a\r\n folded: x\r\nY",
    };
    struct guard_refusal refusal;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        if (guard_bytes(good[i], strlen(good[i]), &refusal)) fail_msg("refused (%s): %s", refusal.problem, good[i]);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        if (!guard_bytes(wrong[i], strlen(wrong[i]), &refusal)) fail_msg("accepted: %s", wrong[i]);
        assert_int_equal(refusal.status, 400);
        assert_string_equal(refusal.code, "bad_framing");
    }
    assert_true(guard_bytes("GET / HTTP/1.1\r\nHost: a\r\nX: \0\r\n\r\n", 33, &refusal));
}

/* 0: let pass. */
static int guarded(const char *bytes, size_t length) {
    struct guard_refusal refusal;
    if (!guard_bytes(bytes, length, &refusal)) return 0;
    assert_non_null(refusal.code);
    assert_non_null(refusal.problem);
    return refusal.status;
}

static void test_request_lines(void **state) {
    (void)state;
    static const struct {
        int status;
        const char *line;
    } cases[] = {
        {0, "GET / HTTP/1.1"},
        {0, "OPTIONS * HTTP/1.0"},
        {0, "GET http://a/x?y HTTP/1.1"},
        {0, "GET /\xc3\xa9 HTTP/1.1"},
        {0, "M-SEARCH / HTTP/1.7"},
        {400, "GET"},
        {400, "GET /"},
        {400, "GET / HTTP/1"},
        {400, "GET / HTTP/1.1 x"},
        {400, "GET / HTTP/1.10"},
        {400, "GET / http/1.1"},
        {400, "GET  / HTTP/1.1"},
        {400, "GET HTTP/1.1"},
        {400, " GET / HTTP/1.1"},
        {400, "GET /a b HTTP/1.1"},
        {400, "GET /a\tb HTTP/1.1"},
        {400, "G(T / HTTP/1.1"},
        {400, "\x16\x03\x01"},
        {505, "GET / HTTP/9.9"},
        {505, "PRI * HTTP/2.0"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char head[100];
        (void)snprintf(head, sizeof head, "\r\n\n%s\r\nHost: a\r\n\r\n", cases[i].line);
        for (size_t length = 0; head[length]; length++) /* no part of a good one is refused */
            if (cases[i].status == 0 && guarded(head, length)) fail_msg("refused after %zu bytes: %s", length, head);
        int got = guarded(head, strlen(head));
        if (got != cases[i].status) fail_msg("%d instead of %d: %s", got, cases[i].status, cases[i].line);
    }
}

/* Who speaks TLS waits for an answer, not for the end of a line. */
static void test_tls(void **state) {
    (void)state;
    struct guard_refusal refusal;
    assert_true(guard_bytes("\x16", 1, &refusal));
    assert_true(guard_bytes("\x16\x03\x01\x02", 4, &refusal));
    assert_int_equal(refusal.status, 400);
    assert_non_null(strstr(refusal.problem, "TLS"));
    assert_false(guard_bytes("G", 1, &refusal));
    assert_false(guard_bytes("", 0, &refusal));
}

/* A head of `length` bytes in all, the empty line not among them, with `fields` fields or as many as it takes. */
static char *make_head(size_t length, size_t fields) {
    struct buffer head = {0};
    buffer_append_text(&head, "GET / HTTP/1.1\r\nHost: a\r\n");
    for (size_t i = 1; i < fields; i++) buffer_append_text(&head, "X: y\r\n");
    if (head.length + 6 < length) {
        buffer_append_text(&head, "Y: ");
        while (head.length + 2 < length) buffer_append_byte(&head, 'y');
        buffer_append_text(&head, "\r\n");
    }
    buffer_append_text(&head, "\r\n");
    buffer_append_byte(&head, '\0');
    return head.bytes;
}

static void test_sizes_of_heads(void **state) {
    (void)state;
    char *fits = make_head(GUARD_HEAD_MAX - 2, 0), *large = make_head(GUARD_HEAD_MAX - 1, 0), *many = make_head(0, GUARD_FIELDS_MAX + 1);
    assert_int_equal(guarded(fits, strlen(fits)), 0);
    assert_int_equal(guarded(fits, strlen(fits) - 2), 0);
    assert_int_equal(guarded(large, strlen(large)), 431);
    assert_int_equal(guarded(large, strlen(large) - 1), 0); /* the end may still be another byte away, but not more */
    assert_int_equal(guarded(many, strlen(many)), 431);
    many[strlen(many) - 8] = '\0'; /* the last field has no end: it does not count yet */
    assert_int_equal(guarded(many, strlen(many)), 0);
    memset(large, 'a', GUARD_LINE_MAX + 1);
    assert_int_equal(guarded(large, GUARD_LINE_MAX), 0);
    assert_int_equal(guarded(large, GUARD_LINE_MAX + 1), 414);
    free(fits);
    free(large);
    free(many);
}

static void test_chunks(void **state) {
    (void)state;
    static const struct {
        int status;
        const char *body;
    } cases[] = {
        {0, "5\r\nabcde\r\n0\r\n\r\n"},
        {0, "5;a=\"b\"\r\nabcde\r\nA;\r\n0123456789\r\n00\r\nTrailer: x\r\n\r\nGET"},
        {0, "00000000000000000000000005\nabcde\n0\n\n"},
        {0, "ffffffffff\r\nabc"},
        {400, "zz\r\nabc"},
        {400, "-5\r\nabcde\r\n"},
        {400, "+5\r\nabcde\r\n"},
        {400, "0x5\r\nabcde\r\n"},
        {400, "5 5\r\nabcde\r\n"},
        {400, "5\rx\nabcde\r\n"},
        {400, "\r\nabc\r\n0\r\n\r\n"},
        {400, "5\r\nabcdeXX0\r\n\r\n"},
        {400, "5\r\nabcde\rX0\r\n\r\n"},
        {400, "5\r\nabcde\r\n\r\n0\r\n\r\n"},
        {400, "5 \r\nabcde\r\n0\r\n\r\n"},
        {400, "5;a\rb\nabcde\r\n0\r\n\r\n"},
        {400, "0\r\nno colon\r\n\r\n"},
        {400, "0\r\n folded: x\r\n\r\n"},
        {400, "0\r\nX: a\rb\r\n\r\n"},
        {400, "0\r\nX: y\r\n\rGET"},
        {413, "ffffffffffffffff\r\nabc"},
        {413, "10000000000000000000\r\nabc"},
        {413, "7fffffffffffffff\r\nabc"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct guard_chunks chunks = {0};
        struct guard_refusal refusal = {0};
        size_t used;
        enum guard_chunked outcome = guard_chunks(&chunks, cases[i].body, strlen(cases[i].body), &used, &refusal);
        int got = outcome == GUARD_CHUNKS_BROKEN ? refusal.status : 0;
        if (got != cases[i].status) fail_msg("%d instead of %d: %s", got, cases[i].status, cases[i].body);
    }
}

/* In any pieces it is the same body, and its end is found to the byte. */
static void test_chunks_in_pieces(void **state) {
    (void)state;
    static const char body[] = "5;a=\"b\"\r\nab\r\n0\r\nA\n0123456789\r\n00\r\nTrailer: x\r\nY:\n\r\n", behind[] = "GET / HTTP/1.1\r\n";
    char bytes[sizeof body + sizeof behind];
    (void)snprintf(bytes, sizeof bytes, "%s%s", body, behind);
    for (size_t cut = 0; cut < sizeof body - 1; cut++) {
        for (size_t step = 1; step < 8; step++) {
            struct guard_chunks chunks = {0};
            struct guard_refusal refusal;
            size_t at = 0, used;
            assert_int_equal(guard_chunks(&chunks, bytes, cut, &used, &refusal), GUARD_CHUNKS_GO_ON);
            assert_int_equal(used, cut);
            enum guard_chunked outcome = GUARD_CHUNKS_GO_ON;
            for (at = cut; outcome == GUARD_CHUNKS_GO_ON; at += used) {
                assert_true(at < sizeof body - 1);
                size_t left = strlen(bytes) - at;
                outcome = guard_chunks(&chunks, bytes + at, step < left ? step : left, &used, &refusal);
            }
            assert_int_equal(outcome, GUARD_CHUNKS_END);
            assert_int_equal(at, sizeof body - 1);
        }
    }
}

static void test_ends_of_heads(void **state) {
    (void)state;
    static const char head[] = "\n\r\nPOST / HTTP/1.1\r\nHost: a\nContent-Length: 2\r\n\r\n{}";
    struct guard_framing framing;
    for (size_t length = 0; length < sizeof head; length++)
        assert_int_equal(guard_head(head, length, &framing), length < sizeof head - 3 ? 0 : sizeof head - 3);
    assert_true(!framing.chunked && framing.length == 2);
    assert_int_equal(guard_empty_lines(head, sizeof head - 1), 3);
    assert_int_equal(guard_empty_lines("\r", 1), 0); /* what follows decides */
    static const char chunked[] = "POST / HTTP/1.1\r\nHost: a\r\ntransfer-encoding: Chunked\r\n\r\n", none[] = "GET / HTTP/1.1\r\nHost: a\r\n\r\n5";
    assert_true(guard_head(chunked, sizeof chunked - 1, &framing) == sizeof chunked - 1 && framing.chunked);
    assert_true(guard_head(none, sizeof none - 1, &framing) == sizeof none - 2 && !framing.chunked && framing.length == 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_chunks_in_pieces),
        cmocka_unit_test(test_ends_of_heads),
        cmocka_unit_test(test_hosts),
        cmocka_unit_test(test_heads),
        cmocka_unit_test(test_request_lines),
        cmocka_unit_test(test_tls),
        cmocka_unit_test(test_sizes_of_heads),
        cmocka_unit_test(test_chunks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
