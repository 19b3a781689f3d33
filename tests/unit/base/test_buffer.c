/* The buffer: bytes go in at the end and out at the front, whatever the sizes. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/buffer.h"
#include "base/random.h"

static void test_appends(void **state) {
    (void)state;
    struct buffer buffer = {0};
    buffer_append(&buffer, "", 0);
    buffer_append(&buffer, NULL, 0);
    buffer_consume(&buffer, 0);
    assert_int_equal(buffer.length, 0);
    buffer_append_text(&buffer, "abc");
    buffer_append_byte(&buffer, '\0');
    buffer_append(&buffer, "d\0e", 3);
    buffer_printf(&buffer, "%s-%d", "fg", -7);
    assert_int_equal(buffer.length, 12);
    assert_memory_equal(buffer.bytes, "abc\0d\0efg--7", 12);
    buffer_done(&buffer);
    assert_null(buffer.bytes);
    assert_int_equal(buffer.length + buffer.capacity, 0);
    buffer_done(&buffer);
}

/* printf text that fits exactly, is one short, or is longer than any buffer so far. */
static void test_printf_sizes(void **state) {
    (void)state;
    char text[3000];
    memset(text, 'x', sizeof text);
    for (int length = 0; length < 2990; length += length < 300 ? 1 : 97) {
        struct buffer buffer = {0};
        buffer_append_byte(&buffer, '<');
        buffer_printf(&buffer, "%.*s", length, text);
        buffer_append_byte(&buffer, '>');
        assert_int_equal(buffer.length, length + 2);
        assert_memory_equal(buffer.bytes + 1, text, (size_t)length);
        assert_int_equal(buffer.bytes[length + 1], '>');
        buffer_done(&buffer);
    }
}

static void test_reserve_does_not_change_the_length(void **state) {
    (void)state;
    struct buffer buffer = {0};
    buffer_append_text(&buffer, "ab");
    char *room = buffer_reserve(&buffer, 1000);
    assert_int_equal(buffer.length, 2);
    assert_true(buffer.capacity >= 1002);
    assert_ptr_equal(room, buffer.bytes + 2);
    memset(room, 'c', 1000);
    buffer.length += 1000;
    assert_memory_equal(buffer.bytes, "abcc", 4);
    buffer_done(&buffer);
}

/* Against a plain array: a counter stream is appended and consumed in random pieces. */
static void test_a_stream(void **state) {
    (void)state;
    struct random random = {4};
    struct buffer buffer = {0};
    uint32_t put = 0, taken = 0;
    for (int step = 0; step < 20000; step++) {
        uint8_t piece[40];
        uint32_t n = random_below(&random, 41);
        for (uint32_t i = 0; i < n; i++) piece[i] = (uint8_t)((put + i) * 7 >> 3);
        buffer_append(&buffer, piece, n);
        put += n;
        uint32_t out = random_below(&random, (uint32_t)buffer.length + 1);
        for (uint32_t i = 0; i < out; i++) assert_int_equal((uint8_t)buffer.bytes[i], (uint8_t)((taken + i) * 7 >> 3));
        buffer_consume(&buffer, out);
        taken += out;
        assert_int_equal(buffer.length, put - taken);
    }
    buffer_done(&buffer);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_appends),
        cmocka_unit_test(test_printf_sizes),
        cmocka_unit_test(test_reserve_does_not_change_the_length),
        cmocka_unit_test(test_a_stream),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
