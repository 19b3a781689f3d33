/* The JSON writer: commas and nesting, strings of any bytes become valid text that reads back, numbers read back equal. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <float.h>
#include <math.h>

#include "base/half.h"
#include "base/json_writer.h"
#include "base/random.h"

static void expect(const struct buffer *buffer, const char *text) {
    if (buffer->length != strlen(text) || memcmp(buffer->bytes, text, buffer->length) != 0)
        fail_msg("wrote %.*s, expected %s", (int)buffer->length, buffer->bytes, text);
}

static void test_nesting_and_commas(void **state) {
    (void)state;
    struct buffer buffer = {0};
    struct json_writer json;
    json_begin(&json, &buffer);
    json_object(&json);
    json_key(&json, "a");
    json_array(&json);
    json_array(&json);
    json_array_end(&json);
    json_object(&json);
    json_object_end(&json);
    json_integer(&json, INT64_MIN);
    json_unsigned(&json, UINT64_MAX);
    json_bool(&json, true);
    json_bool(&json, false);
    json_null(&json);
    json_array_end(&json);
    json_key(&json, "b\"");
    json_text(&json, "c");
    json_key(&json, "d");
    json_object(&json);
    json_key(&json, "e");
    json_integer(&json, 0);
    json_object_end(&json);
    json_key(&json, "f");
    json_integer(&json, 1);
    json_object_end(&json);
    expect(&buffer, "{\"a\":[[],{},-9223372036854775808,18446744073709551615,true,false,null],\"b\\\"\":\"c\",\"d\":{\"e\":0},\"f\":1}");
    buffer_done(&buffer);
}

static void test_the_deepest_nesting(void **state) {
    (void)state;
    struct buffer buffer = {0};
    struct json_writer json;
    json_begin(&json, &buffer);
    for (int i = 0; i < JSON_WRITER_DEPTH; i++) {
        if (i > 0) json_integer(&json, i);
        json_array(&json);
    }
    for (int i = 0; i < JSON_WRITER_DEPTH; i++) json_array_end(&json);
    assert_int_equal(json.depth, 0);
    assert_memory_equal(buffer.bytes, "[1,[2,[3,[", 10);
    assert_memory_equal(buffer.bytes + buffer.length - JSON_WRITER_DEPTH, "]]]]]]]]]]]]]]]]", JSON_WRITER_DEPTH);
    buffer_done(&buffer);
}

static void write_string(struct buffer *buffer, const char *bytes, size_t length) {
    struct json_writer json;
    buffer->length = 0;
    json_begin(&json, buffer);
    json_string(&json, bytes, length);
}

static void test_escapes(void **state) {
    (void)state;
    struct buffer buffer = {0};
    write_string(&buffer, "a\"b\\c/\n\r\t\b\f\0\x1f\x7f", 14);
    expect(&buffer, "\"a\\\"b\\\\c/\\n\\r\\t\\u0008\\u000c\\u0000\\u001f\\u007f\"");
    write_string(&buffer, "h\xc3\xa9 \xe6\xb0\xb4 \xf0\x9f\x8e\x89", 12);
    expect(&buffer, "\"h\xc3\xa9 \xe6\xb0\xb4 \xf0\x9f\x8e\x89\"");
    write_string(&buffer, "", 0);
    expect(&buffer, "\"\"");
    buffer_done(&buffer);
}

#define REPLACED "\xef\xbf\xbd"

static void test_invalid_utf8_is_replaced(void **state) {
    (void)state;
    static const struct {
        const char *bytes, *text;
    } cases[] = {
        {"\x80", REPLACED},                                        /* a continuation alone */
        {"a\xc3", "a" REPLACED},                                   /* cut */
        {"\xe6\xb0", REPLACED REPLACED},                           /* cut: each byte on its own */
        {"\xf0\x9f\x8e", REPLACED REPLACED REPLACED},              /* */
        {"\xc3z", REPLACED "z"},                                   /* */
        {"\xc0\xaf", REPLACED REPLACED},                           /* overlong / */
        {"\xe0\x80\xaf", REPLACED REPLACED REPLACED},              /* */
        {"\xf0\x80\x80\xaf", REPLACED REPLACED REPLACED REPLACED}, /* */
        {"\xed\xa0\x80", REPLACED REPLACED REPLACED},              /* a surrogate */
        {"\xed\x9f\xbf", "\xed\x9f\xbf"},                          /* the last before them */
        {"\xf4\x90\x80\x80", REPLACED REPLACED REPLACED REPLACED}, /* past U+10FFFF */
        {"\xf4\x8f\xbf\xbf", "\xf4\x8f\xbf\xbf"},                  /* the last of all */
        {"\xff\xfe", REPLACED REPLACED},                           /* */
    };
    struct buffer buffer = {0};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_string(&buffer, cases[i].bytes, strlen(cases[i].bytes));
        char expected[64] = "\"";
        strcat(expected, cases[i].text);
        strcat(expected, "\"");
        expect(&buffer, expected);
    }
    buffer_done(&buffer);
}

/* Reads one string back: escapes to bytes. Returns the length; -1: not JSON. */
static int read_string(const struct buffer *buffer, char *out) {
    int n = 0;
    if (buffer->length < 2 || buffer->bytes[0] != '"' || buffer->bytes[buffer->length - 1] != '"') return -1;
    for (size_t i = 1; i < buffer->length - 1; i++) {
        unsigned char byte = (unsigned char)buffer->bytes[i];
        if (byte < 0x20 || byte == '"') return -1;
        if (byte != '\\') {
            out[n++] = (char)byte;
            continue;
        }
        char kind = buffer->bytes[++i];
        const char *at = strchr("\"\"\\\\n\nr\rt\t", kind);
        if (kind == 'u') {
            char hex[5] = {0};
            memcpy(hex, buffer->bytes + i + 1, 4);
            long code = strtol(hex, NULL, 16);
            if (code > 0x7f) return -1;
            out[n++] = (char)code;
            i += 4;
        } else if (at) {
            out[n++] = at[1];
        } else {
            return -1;
        }
    }
    return n;
}

static void test_random_bytes_become_json(void **state) {
    (void)state;
    struct random random = {6};
    struct buffer buffer = {0};
    for (int i = 0; i < 20000; i++) {
        char bytes[24], expected[80], back[200];
        size_t length = random_below(&random, sizeof bytes + 1);
        uint32_t kind = random_below(&random, 3);
        for (size_t b = 0; b < length; b++) {
            static const unsigned char edges[] = {0xc2, 0xe0, 0xed, 0xf0, 0xf4, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 'x', '"', '\\', 0, 0x1f};
            bytes[b] = (char)(kind == 0   ? random_below(&random, 256)
                              : kind == 1 ? edges[random_below(&random, sizeof edges)]
                                          : random_below(&random, 128));
        }
        int n = 0;
        for (size_t b = 0; b < length;) {
            size_t step = utf8_sequence_length(bytes + b, length - b);
            memcpy(expected + n, step ? bytes + b : REPLACED, step ? step : 3);
            n += step ? (int)step : 3;
            b += step ? step : 1;
        }
        write_string(&buffer, bytes, length);
        assert_true(utf8_valid(buffer.bytes, buffer.length));
        assert_int_equal(read_string(&buffer, back), n);
        assert_memory_equal(back, expected, (size_t)n);
    }
    buffer_done(&buffer);
}

/* utf8_sequence_length against the encoding of every code point. */
static void test_every_code_point(void **state) {
    (void)state;
    for (uint32_t code = 0; code <= 0x11ffff; code++) {
        char bytes[4];
        size_t n;
        if (code < 0x80) {
            n = 1;
            bytes[0] = (char)code;
        } else {
            n = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
            static const unsigned char lead[] = {0, 0, 0xc0, 0xe0, 0xf0};
            bytes[0] = (char)(lead[n] | code >> 6 * (n - 1));
            for (size_t i = 1; i < n; i++) bytes[i] = (char)(0x80 | (code >> 6 * (n - 1 - i) & 0x3f));
        }
        bool valid = code <= 0x10ffff && !(code >= 0xd800 && code <= 0xdfff);
        assert_int_equal(utf8_sequence_length(bytes, n), valid ? n : 0);
        assert_int_equal(utf8_valid(bytes, n), valid);
        if (n > 1) assert_int_equal(utf8_sequence_length(bytes, n - 1), 0);
    }
    assert_int_equal(utf8_sequence_length("", 0), 0);
    assert_true(utf8_valid("", 0));
}

/* The whole text is one JSON number. */
static bool is_number(const struct buffer *buffer) {
    const char *at = buffer->bytes, *end = at + buffer->length;
    at += at < end && *at == '-';
    if (at == end || *at < '0' || *at > '9') return false;
    if (*at == '0' && at + 1 < end && at[1] >= '0' && at[1] <= '9') return false;
    while (at < end && *at >= '0' && *at <= '9') at++;
    if (at < end && *at == '.') {
        at++;
        if (at == end || *at < '0' || *at > '9') return false;
        while (at < end && *at >= '0' && *at <= '9') at++;
    }
    if (at < end && *at == 'e') {
        at++;
        at += at < end && (*at == '-' || *at == '+');
        if (at == end) return false;
        while (at < end && *at >= '0' && *at <= '9') at++;
    }
    return at == end;
}

static void test_numbers_read_back_equal(void **state) {
    (void)state;
    struct random random = {2};
    struct buffer buffer = {0};
    struct json_writer json;
    static const float edges[] = {0, -0.0f, 1, 0.1f, 1e-45f, FLT_MIN, FLT_MAX, -FLT_MAX, 16777216, 1e10f, 123456.78f, -0.001f};
    for (uint32_t i = 0; i < 100000; i++) {
        float value = i < sizeof edges / sizeof *edges ? edges[i] : float_from_bits((uint32_t)random_next(&random));
        double wide = (double)value;
        if (i % 2) {
            uint64_t bits = random_next(&random);
            memcpy(&wide, &bits, sizeof wide);
        }
        if (isfinite(value)) {
            buffer.length = 0;
            json_begin(&json, &buffer);
            json_float(&json, value);
            assert_true(is_number(&buffer));
            buffer_append_byte(&buffer, '\0');
            assert_true(strtof(buffer.bytes, NULL) == value);
            assert_true(buffer.length <= 17);
        }
        if (isfinite(wide)) {
            buffer.length = 0;
            json_begin(&json, &buffer);
            json_double(&json, wide);
            assert_true(is_number(&buffer));
            buffer_append_byte(&buffer, '\0');
            assert_true(strtod(buffer.bytes, NULL) == wide);
        }
    }
    buffer_done(&buffer);
}

static void test_numbers_json_does_not_have(void **state) {
    (void)state;
    struct buffer buffer = {0};
    struct json_writer json;
    json_begin(&json, &buffer);
    json_array(&json);
    json_float(&json, INFINITY);
    json_float(&json, -INFINITY);
    json_float(&json, NAN);
    json_double(&json, (double)INFINITY);
    json_double(&json, -(double)INFINITY);
    json_double(&json, (double)NAN);
    json_float(&json, 0.1f);
    json_array_end(&json);
    expect(&buffer, "[1e+308,-1e+308,null,1e+308,-1e+308,null,0.1]");
    buffer_done(&buffer);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_nesting_and_commas),       cmocka_unit_test(test_the_deepest_nesting),        cmocka_unit_test(test_escapes),
        cmocka_unit_test(test_invalid_utf8_is_replaced), cmocka_unit_test(test_random_bytes_become_json),   cmocka_unit_test(test_every_code_point),
        cmocka_unit_test(test_numbers_read_back_equal),  cmocka_unit_test(test_numbers_json_does_not_have),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
