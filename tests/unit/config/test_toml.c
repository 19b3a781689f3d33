/* The shim over toml++: what is reported, in which order, at which place; what is refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/check.h"
#include "config/toml.h"

struct record {
    char text[4096];
    size_t used;
    int stop_after;
};

static bool note(void *context, const struct toml_value *value) {
    struct record *record = context;
    int written =
        snprintf(record->text + record->used, sizeof record->text - record->used, "%u:%u %s=", value->key_line, value->key_column, value->key);
    record->used += (size_t)written;
    size_t room = sizeof record->text - record->used;
    char *at = record->text + record->used;
    switch (value->kind) {
    case TOML_KIND_STRING: written = snprintf(at, room, "'%s'(%zu)\n", value->text, value->text_length); break;
    case TOML_KIND_INTEGER: written = snprintf(at, room, "%lld\n", (long long)value->integer); break;
    case TOML_KIND_FLOAT: written = snprintf(at, room, "%g\n", value->number); break;
    case TOML_KIND_BOOL: written = snprintf(at, room, "%s\n", value->boolean ? "true" : "false"); break;
    case TOML_KIND_DATE: written = snprintf(at, room, "date\n"); break;
    case TOML_KIND_ARRAY: written = snprintf(at, room, "[%s]\n", value->text ? value->text : "mixed"); break;
    case TOML_KIND_TABLE: written = snprintf(at, room, "table\n"); break;
    }
    record->used += (size_t)written;
    return --record->stop_after != 0;
}

static enum toml_outcome walk(const char *text, struct record *record, struct toml_failure *failure) {
    memset(record, 0, sizeof *record);
    return toml_walk(text, strlen(text), note, record, failure);
}

static void test_values_in_order(void **state) {
    (void)state;
    struct record record;
    struct toml_failure failure;
    assert_int_equal(walk("z = \"a\"\na = 1\n[server]\nport = 0x10\nb = true\n  f = 1.5\nd = 1979-05-27\nl = [\"x\", 'y']\nm = [1, "
                          "\"y\"]\n[server.deep]\nq.r = -3\n",
                          &record, &failure),
                     TOML_READ);
    assert_string_equal(record.text,
                        "1:1 z='a'(1)\n2:1 a=1\n3:2 server=table\n4:1 server.port=16\n5:1 server.b=true\n6:3 server.f=1.5\n7:1 server.d=date\n"
                        "8:1 server.l=[x,y]\n9:1 server.m=[mixed]\n10:9 server.deep=table\n11:1 server.deep.q=table\n11:3 server.deep.q.r=-3\n");
}

static void test_quoted_keys_cannot_pass_for_dotted_ones(void **state) {
    (void)state;
    struct record record;
    struct toml_failure failure;
    assert_int_equal(walk("\"server.port\" = 1\n\"\" = 2\n\"a\\n\\\"b\" = 3\n", &record, &failure), TOML_READ);
    assert_string_equal(record.text, "1:1 \"server.port\"=1\n2:1 \"\"=2\n3:1 \"a\\x0a\\\"b\"=3\n");
}

static void test_strings_keep_their_length(void **state) {
    (void)state;
    struct record record;
    struct toml_failure failure;
    assert_int_equal(walk("a = \"x\\u0000y\"\n", &record, &failure), TOML_READ);
    assert_string_equal(record.text, "1:1 a='x'(3)\n");
}

static void test_the_visitor_can_stop(void **state) {
    (void)state;
    struct record record = {.stop_after = 2};
    struct toml_failure failure;
    static const char text[] = "a = 1\nb = 2\nc = 3\n";
    assert_int_equal(toml_walk(text, strlen(text), note, &record, &failure), TOML_STOPPED);
    assert_string_equal(record.text, "1:1 a=1\n2:1 b=2\n");
}

static void test_broken_documents(void **state) {
    (void)state;
    static const struct {
        const char *text;
        uint32_t line;
        const char *says;
    } cases[] = {
        {"a = 1\na = 2\n", 2, "redefine"},
        {"a.b = 1\na = 2\n", 2, "redefine"},
        {"[a]\n[a]\n", 2, "redefine"},
        {"x = 1\na = \"\xff\"\n", 2, "utf-8"},
        {"a = \"open\n", 1, "string"},
        {"a = \n", 1, "value"},
        {"a\n", 1, "="},
        {"a = 99999999999999999999\n", 1, "integer"},
        {"a = [1, 2\n", 1, "array"},
        {"x = 1\nengin\xef\xb1\xbfs = 1\n", 2, "='"},
        {"a = \"\"\"\xc3\xa9\n\\\"\"\"\"\"\"\xc3\xa9\n", 2, "whitespace"},
        {"a = \xc2\xa0 1\n", 1, "value"},
        {"a = 19'e\xd2\x99\n", 1, "saw"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct record record;
        struct toml_failure failure = {.text = ""};
        assert_int_equal(walk(cases[i].text, &record, &failure), TOML_BROKEN);
        if (!strstr(failure.text, cases[i].says)) fail_msg("case %zu says: %s", i, failure.text);
        if (failure.line < cases[i].line) fail_msg("case %zu: line %u", i, failure.line);
        assert_null(strchr(failure.text, '\n'));
        assert_int_equal(record.used, 0);
    }
}

static void test_strings_and_comments_hold_any_letter(void **state) {
    (void)state;
    struct record record;
    struct toml_failure failure = {.text = ""};
    static const char text[] = "\xef\xbb\xbf# \xc3\xa9\n\"\xc3\xa9\" = '\xc3\xa9' # '\xc3\xa9\nb = \"\\\"\xc3\xa9\"\n"
                               "c = \"\"\"\\\"\n\"\"\xc3\xa9\"\"\"\"\"\nf = \"\"\"\\\n\xef\xb6\xbf \xe3\x80\x80\"\"\"\nd = '''\n''\xc3\xa9'''''\n";
    assert_int_equal(walk(text, &record, &failure), TOML_READ);
    assert_string_equal(failure.text, "");
}

static void test_hostile_sizes_are_refused_not_survived_by_luck(void **state) {
    (void)state;
    struct toml_failure failure;
    struct record record = {.stop_after = 1};
    size_t size = TOML_BYTES_MAX + 1;
    char *text = check_calloc(size, 1);
    memset(text, '#', size);
    assert_int_equal(toml_walk(text, size, note, &record, &failure), TOML_BROKEN);
    for (size_t i = 0; i + 1 < size; i += 2) text[i] = 'a', text[i + 1] = '.'; /* half a million levels */
    assert_int_equal(toml_walk(text, size - 1, note, &record, &failure), TOML_BROKEN);
    size_t used = (size_t)snprintf(text, size, "a = ");
    memset(text + used, '[', size - used);
    assert_int_equal(toml_walk(text, size - 1, note, &record, &failure), TOML_BROKEN);
    used = 0; /* as many levels as are allowed */
    for (int i = 0; i < TOML_DOTS_MAX; i++) used += (size_t)snprintf(text + used, size - used, "a.");
    used += (size_t)snprintf(text + used, size - used, "a = 1\n");
    assert_int_equal(toml_walk(text, used, note, &record, &failure), TOML_STOPPED);
    free(text);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_values_in_order),
        cmocka_unit_test(test_quoted_keys_cannot_pass_for_dotted_ones),
        cmocka_unit_test(test_strings_keep_their_length),
        cmocka_unit_test(test_the_visitor_can_stop),
        cmocka_unit_test(test_broken_documents),
        cmocka_unit_test(test_strings_and_comments_hold_any_letter),
        cmocka_unit_test(test_hostile_sizes_are_refused_not_survived_by_luck),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
