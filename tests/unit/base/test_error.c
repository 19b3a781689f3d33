/* Words of errors: always terminated, cut to fit, prefixed in place. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/error.h"

static void test_set(void **state) {
    (void)state;
    struct error error;
    memset(&error, 0x7e, sizeof error);
    assert_int_equal(error_set(&error, STATUS_IO, "%s: line %d", "a.toml", 7), STATUS_IO);
    assert_int_equal(error.status, STATUS_IO);
    assert_string_equal(error.text, "a.toml: line 7");
    assert_int_equal(error_set(NULL, STATUS_DEVICE, "nobody reads this"), STATUS_DEVICE);
}

static void test_long_words_are_cut(void **state) {
    (void)state;
    char longest[2 * sizeof(((struct error *)0)->text)];
    memset(longest, 'w', sizeof longest - 1);
    longest[sizeof longest - 1] = '\0';
    struct error error;
    memset(&error, 0x7e, sizeof error);
    (void)error_set(&error, STATUS_INVALID, "%s", longest);
    assert_int_equal(strlen(error.text), sizeof error.text - 1);
    assert_int_equal(error_prefix(&error, "file"), STATUS_INVALID);
    assert_int_equal(strlen(error.text), sizeof error.text - 1);
    assert_memory_equal(error.text, "file: www", 9);
    assert_int_equal(error_prefix(&error, "%s", longest), STATUS_INVALID);
    assert_int_equal(strlen(error.text), sizeof error.text - 1);
    assert_memory_equal(error.text, longest, sizeof error.text - 1);
}

/* Every length of what was there around the edge. */
static void test_prefix_at_the_edge(void **state) {
    (void)state;
    for (size_t length = 470; length < sizeof(((struct error *)0)->text); length++) {
        struct error error;
        memset(&error, 0x7e, sizeof error);
        (void)error_set(&error, STATUS_UNSUPPORTED, "%*s", (int)length, "x");
        assert_int_equal(error_prefix(&error, "%d", 12345), STATUS_UNSUPPORTED);
        size_t expected = length + 7 < sizeof error.text ? length + 7 : sizeof error.text - 1;
        assert_int_equal(strlen(error.text), expected);
        assert_memory_equal(error.text, "12345: ", 7);
    }
}

static void test_names(void **state) {
    (void)state;
    for (int a = STATUS_OK; a <= STATUS_DEVICE; a++)
        for (int b = STATUS_OK; b < a; b++) assert_string_not_equal(status_name((enum status)a), status_name((enum status)b));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_set),
        cmocka_unit_test(test_long_words_are_cut),
        cmocka_unit_test(test_prefix_at_the_edge),
        cmocka_unit_test(test_names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
