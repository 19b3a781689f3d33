/* GGUF files that are whole, broken, cut short or hostile. Each crafted file is one line of a table and has to end in one clear line of error: counts, lengths,
 * offsets, types, dimensions and alignments of the kinds that have broken other readers. Files are copied to memory of exactly their size, so that a sanitizer
 * sees any byte read past the end. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/check.h"
#include "tests/support/gguf_writer.h"

#define HUGE UINT64_MAX
#define NUMBERS 16

/* A file in a line. H: magic, version 3, tensor count, key count; M: magic and a version; 1 2 4 8: a number of that many bytes; s: a string with its length
 * before it; r: text as it is; z: that many zeros; p: zeros up to a multiple of 32. Numbers and texts are taken in order. */
struct crafted {
    const char *name;
    enum status status;
    const char *words; /* part of the error */
    const char *format;
    uint64_t numbers[NUMBERS];
    const char *texts[4];
};

#define BAD STATUS_INVALID
#define NOT STATUS_UNSUPPORTED
#define T4 4     /* u32 */
#define TS 8     /* string */
#define TA 9     /* array */
#define Q8 8, 0  /* tensor type Q8_0 at offset 0 */
#define F32 0, 0 /* tensor type F32 at offset 0 */

/* clang-format off */
static const struct crafted cases[] = {
    /* the header */
    {"no bytes",                 BAD, "not a GGUF file", "", {0}, {0}},
    {"three bytes",              BAD, "not a GGUF file", "r", {0}, {"GGU"}},
    {"another magic",            BAD, "not a GGUF file", "r4888", {3}, {"GGML"}},
    {"magic alone",              BAD, "ends inside", "r", {0}, {"GGUF"}},
    {"half a version",           BAD, "ends inside", "r2", {3}, {"GGUF"}},
    {"version 0",                NOT, "version 0", "M88", {0}, {0}},
    {"version 1",                NOT, "version 1", "M88", {1}, {0}},
    {"version 4",                NOT, "version 4", "M88", {4}, {0}},
    {"version 2^32-1",           NOT, "version", "M88", {UINT32_MAX}, {0}},
    {"big-endian 3",             NOT, "big-endian", "M88", {0x03000000}, {0}},
    {"big-endian 2",             NOT, "big-endian", "M88", {0x02000000}, {0}},
    {"no counts",                BAD, "ends inside", "M", {3}, {0}},
    {"no key count",             BAD, "ends inside", "M8", {3, 0}, {0}},
    {"2^64-1 keys",              BAD, "keys", "H", {0, HUGE}, {0}},
    {"2^63 keys",                BAD, "keys", "H", {0, 1ull << 63}, {0}},
    {"more keys than the limit", BAD, "at most", "H", {0, GGUF_KEYS_MAX + 1}, {0}},
    {"more keys than bytes",     BAD, "do not fit", "Hz", {0, 3, 41}, {0}},
    {"one key, no bytes",        BAD, "do not fit", "H", {0, 1}, {0}},
    {"2^64-1 tensors",           BAD, "tensors", "H", {HUGE, 0}, {0}},
    {"2^61 tensors",             BAD, "tensors", "H", {1ull << 61, 0}, {0}},
    {"more tensors than limit",  BAD, "at most", "H", {GGUF_TENSORS_MAX + 1, 0}, {0}},
    {"more tensors than bytes",  BAD, "do not fit", "Hz", {2, 0, 65}, {0}},
    {"counts overflow together", BAD, "keys", "H", {HUGE, HUGE}, {0}},
    /* keys */
    {"key of 2^64-1 bytes",      BAD, "string of", "H8z", {0, 1, HUGE, 16}, {0}},
    {"key of 2^63 bytes",        BAD, "string of", "H8z", {0, 1, 1ull << 63, 16}, {0}},
    {"key past the end",         BAD, "ends inside", "H8z", {0, 1, 100, 16}, {0}},
    {"key one byte too long",    BAD, "ends inside", "H8z", {0, 1, 17, 16}, {0}},
    {"key longer than allowed",  BAD, "at most 65535", "H8z", {0, 1, 65536, 70000}, {0}},
    {"key without name",         BAD, "no name", "Hs4z", {0, 1, T4, 16}, {""}},
    {"key without type",         BAD, "ends inside", "H8rz", {0, 1, 13, 1}, {"aaaaaaaaaaaaa"}},
    {"value type 13",            BAD, "value type 13", "Hs48", {0, 1, 13, 0}, {"k"}},
    {"value type 2^32-1",        BAD, "value type", "Hs48", {0, 1, UINT32_MAX, 0}, {"k"}},
    {"bool of 2",                BAD, "bool of value 2", "Hs41z", {0, 1, 7, 2, 8}, {"k"}},
    {"number past the end",      BAD, "ends inside", "Hs44", {0, 1, 10, 1}, {"k"}},
    {"text of 2^64-1 bytes",     BAD, "string of", "Hs48", {0, 1, TS, HUGE}, {"k"}},
    {"text past the end",        BAD, "ends inside", "Hs48", {0, 1, TS, 1}, {"k"}},
    {"text larger than allowed", BAD, "at most 16777216", "Hs48", {0, 1, TS, GGUF_STRING_LENGTH_MAX + 1}, {"k"}},
    {"text cut at 2^32",         BAD, "string of", "Hs48z", {0, 1, TS, (1ull << 32) + 4, 4}, {"k"}},
    {"same key twice",           BAD, "appears twice", "Hs44s44", {0, 2, T4, 1, T4, 2}, {"k", "k"}},
    {"same key apart",           BAD, "appears twice", "Hs44s44s44", {0, 3, T4, 1, T4, 2, T4, 3}, {"k", "j", "k"}},
    {"array without type",       BAD, "ends inside", "Hs41", {0, 1, TA, 0}, {"k"}},
    {"array without count",      BAD, "ends inside", "Hs44", {0, 1, TA, T4}, {"k"}},
    {"array of type 13",         BAD, "value type 13", "Hs448", {0, 1, TA, 13, 0}, {"k"}},
    {"array of arrays",          NOT, "array of arrays", "Hs44848", {0, 1, TA, TA, 1, T4, 0}, {"k"}},
    {"array of 2^64-1 numbers",  BAD, "more elements", "Hs448z", {0, 1, TA, T4, HUGE, 64}, {"k"}},
    {"array bytes overflow",     BAD, "more elements", "Hs448z", {0, 1, TA, T4, (1ull << 62) + 1, 64}, {"k"}},
    {"array u64 bytes overflow", BAD, "more elements", "Hs448z", {0, 1, TA, 10, 1ull << 61, 64}, {"k"}},
    {"array one too many",       BAD, "more elements", "Hs448z", {0, 1, TA, T4, 17, 64}, {"k"}},
    {"2^64-1 texts",             BAD, "more elements", "Hs448z", {0, 1, TA, TS, HUGE, 64}, {"k"}},
    {"texts past the end",       BAD, "string of", "Hs4488z", {0, 1, TA, TS, 2, HUGE, 64}, {"k"}},
    {"last text cut",            BAD, "ends inside", "Hs448s8z", {0, 1, TA, TS, 2, 8, 7}, {"k", "abc"}},
    /* alignment */
    {"alignment 0",              BAD, "alignment is 0", "Hs44", {0, 1, T4, 0}, {"general.alignment"}},
    {"alignment 1",              BAD, "alignment is 1", "Hs44", {0, 1, T4, 1}, {"general.alignment"}},
    {"alignment 48",             BAD, "alignment is 48", "Hs44", {0, 1, T4, 48}, {"general.alignment"}},
    {"alignment 8192",           BAD, "alignment is 8192", "Hs44", {0, 1, T4, 8192}, {"general.alignment"}},
    {"alignment 2^31",           BAD, "alignment", "Hs44", {0, 1, T4, 1u << 31}, {"general.alignment"}},
    {"alignment 2^32-1",         BAD, "alignment", "Hs44", {0, 1, T4, UINT32_MAX}, {"general.alignment"}},
    {"alignment of type u64",    BAD, "has type u64", "Hs48", {0, 1, 10, 32}, {"general.alignment"}},
    {"alignment of type text",   BAD, "has type string", "Hs4s", {0, 1, TS}, {"general.alignment", "32"}},
    /* tensors */
    {"tensor name 2^64-1",       BAD, "string of", "H8z", {1, 0, HUGE, 64}, {0}},
    {"tensor name 65",           BAD, "at most 64", "H8z", {1, 0, 65, 200}, {0}},
    {"tensor name past the end", BAD, "ends inside", "H8z", {1, 0, 64, 30}, {0}},
    {"tensor without name",      BAD, "no name", "Hs4848z", {1, 0, 1, 32, F32, 256}, {""}},
    {"no dimensions",            BAD, "dimensions: 0", "Hs448z", {1, 0, 0, F32, 64}, {"t"}},
    {"five dimensions",          BAD, "dimensions: 5", "Hs48888848z", {1, 0, 5, 1, 1, 1, 1, 1, F32, 64}, {"t"}},
    {"2^32-1 dimensions",        BAD, "dimensions", "Hs4z", {1, 0, UINT32_MAX, 64}, {"t"}},
    {"dimension 0",              BAD, "tensor t", "Hs48848pz", {1, 0, 2, 32, 0, F32, 64}, {"t"}},
    {"innermost dimension 0",    BAD, "tensor t", "Hs48848pz", {1, 0, 2, 0, 32, F32, 64}, {"t"}},
    {"dimension 2^64-1",         BAD, "tensor t", "Hs4848pz", {1, 0, 1, HUGE, F32, 64}, {"t"}},
    {"dimension 2^63",           BAD, "tensor t", "Hs4848pz", {1, 0, 1, 1ull << 63, F32, 64}, {"t"}},
    {"product overflows",        BAD, "overflows", "Hs48848pz", {1, 0, 2, 1ull << 32, 1ull << 32, F32, 64}, {"t"}},
    {"product wraps to small",   BAD, "overflows", "Hs48848pz", {1, 0, 2, (1ull << 33) + 32, 1ull << 31, F32, 64}, {"t"}},
    {"four overflow",            BAD, "overflows", "Hs4888848pz", {1, 0, 4, 1 << 16, 1 << 16, 1 << 16, 1 << 16, F32, 64}, {"t"}},
    {"bytes overflow",           BAD, "tensor t", "Hs4848pz", {1, 0, 1, 1ull << 62, F32, 64}, {"t"}},
    {"bytes overflow in blocks", BAD, "tensor t", "Hs4848pz", {1, 0, 1, 1ull << 63, Q8, 64}, {"t"}},
    {"row is no whole block",    BAD, "multiple of Q8_0's block", "Hs4848pz", {1, 0, 1, 33, Q8, 64}, {"t"}},
    {"row shorter than block",   BAD, "multiple of Q4_K's block", "Hs48848pz", {1, 0, 2, 32, 8, 12, 0, 256}, {"t"}},
    {"type 4, withdrawn",        NOT, "type number 4", "Hs4848pz", {1, 0, 1, 32, 4, 0, 64}, {"t"}},
    {"type Q2_K",                NOT, "Q2_K", "Hs4848pz", {1, 0, 1, 256, 10, 0, 256}, {"t"}},
    {"type IQ4_NL",              NOT, "IQ4_NL", "Hs4848pz", {1, 0, 1, 32, 20, 0, 64}, {"t"}},
    {"type I32",                 NOT, "I32", "Hs4848pz", {1, 0, 1, 32, 26, 0, 256}, {"t"}},
    {"type MXFP4",               NOT, "MXFP4", "Hs4848pz", {1, 0, 1, 32, 39, 0, 256}, {"t"}},
    {"type 2^32-1",              NOT, "type number 4294967295", "Hs4848pz", {1, 0, 1, 32, UINT32_MAX, 0, 64}, {"t"}},
    {"no data",                  BAD, "cut short", "Hs4848", {1, 0, 1, 1, F32}, {"t"}},
    {"data one byte short",      BAD, "cut short", "Hs4848pz", {1, 0, 1, 32, F32, 127}, {"t"}},
    {"offset not aligned",       BAD, "not a multiple of the alignment", "Hs4848pz", {1, 0, 1, 4, 0, 16, 64}, {"t"}},
    {"offset past the end",      BAD, "data offset 64", "Hs4848pz", {1, 0, 1, 4, 0, 64, 32}, {"t"}},
    {"offset 2^64-32",           BAD, "data offset", "Hs4848pz", {1, 0, 1, 8, 0, HUGE - 31, 64}, {"t"}},
    {"offset + size wraps",      BAD, "data offset", "Hs4848pz", {1, 0, 1, 64, 0, HUGE - 255, 64}, {"t"}},
    {"same tensor twice",        BAD, "appears twice", "Hs4848s4848pz", {2, 0, 1, 4, 0, 0, 1, 4, 0, 32, 64}, {"t", "t"}},
    {"shared bytes",             BAD, "overlaps", "Hs4848s4848pz", {2, 0, 1, 16, 0, 0, 1, 16, 0, 32, 128}, {"t", "u"}},
    {"same bytes",               BAD, "overlaps", "Hs4848s4848pz", {2, 0, 1, 4, 0, 0, 1, 4, 0, 0, 64}, {"t", "u"}},
    {"one inside another",       BAD, "overlaps", "Hs4848s4848pz", {2, 0, 1, 64, 0, 0, 1, 4, 0, 96, 256}, {"t", "u"}},
    {"info cut in dims",         BAD, "ends inside", "Hs4z", {1, 0, 4, 31}, {"t"}},
};
/* clang-format on */

static void craft(const struct crafted *crafted, struct buffer *out) {
    const uint64_t *number = crafted->numbers;
    const char *const *text = crafted->texts;
    for (const char *format = crafted->format; *format; format++) {
        uint64_t length;
        uint32_t version = 3;
        switch (*format) {
        case 'M':
        case 'H':
            buffer_append(out, "GGUF", 4);
            if (*format == 'M') version = (uint32_t)*number++;
            buffer_append(out, &version, sizeof version);
            if (*format == 'H') buffer_append(out, number, 16), number += 2;
            break;
        case '1':
        case '2':
        case '4':
        case '8': buffer_append(out, number++, (size_t)(*format - '0')); break; /* little-endian: the low bytes come first */
        case 's':
            length = strlen(*text);
            buffer_append(out, &length, sizeof length);
            buffer_append_text(out, *text++);
            break;
        case 'r': buffer_append_text(out, *text++); break;
        case 'z':
            for (length = *number++; length > 0; length--) buffer_append_byte(out, 0);
            break;
        case 'p':
            while (out->length % 32 != 0) buffer_append_byte(out, 0);
            break;
        default: fail_msg("%s: format %c", crafted->name, *format);
        }
    }
}

/* From memory of exactly that size. */
static enum status parse(const char *bytes, size_t length, struct gguf **gguf, void **copy, struct error *error) {
    *copy = malloc(length ? length : 1);
    if (length > 0) memcpy(*copy, bytes, length);
    *gguf = NULL;
    return gguf_parse(*copy, length, "crafted", gguf, error);
}

static void test_crafted_files_end_in_one_line(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct buffer file = {0};
        struct error error = {0};
        struct gguf *gguf;
        void *copy;
        craft(&cases[i], &file);
        enum status status = parse(file.bytes, file.length, &gguf, &copy, &error);
        if (status != cases[i].status)
            fail_msg("%s: %s (%s), expected %s", cases[i].name, status_name(status), error.text, status_name(cases[i].status));
        if (!strstr(error.text, cases[i].words))
            fail_msg("%s: the error is \"%s\", expected \"%s\" in it", cases[i].name, error.text, cases[i].words);
        if (strncmp(error.text, "crafted: ", 9) != 0) fail_msg("%s: \"%s\" does not name the file", cases[i].name, error.text);
        if (strchr(error.text, '\n')) fail_msg("%s: more than a line", cases[i].name);
        assert_null(gguf);
        free(copy);
        buffer_done(&file);
    }
}

static void every_kind_of_value(struct gguf_writer *writer) {
    gguf_writer_bool(writer, "a.bool", true);
    gguf_writer_u16(writer, "a.u16", 65535);
    gguf_writer_u32(writer, "a.u32", UINT32_MAX);
    gguf_writer_i32(writer, "a.i32", -7);
    gguf_writer_u64(writer, "a.u64", UINT64_MAX);
    gguf_writer_f32(writer, "a.f32", 0.5f);
    gguf_writer_string(writer, "a.string", "text");
    gguf_writer_strings(writer, "a.strings", (const char *const[]){"one", "", "three"}, 3);
    gguf_writer_numbers(writer, "a.u32s", GGUF_U32, (const uint32_t[]){1, 2, 3}, 3);
    gguf_writer_numbers(writer, "a.i32s", GGUF_I32, (const int32_t[]){-1, 2}, 2);
    gguf_writer_numbers(writer, "a.f32s", GGUF_F32, (const float[]){1.5f}, 1);
    gguf_writer_numbers(writer, "a.none", GGUF_F32, NULL, 0);
    gguf_writer_tensor(writer, "vector", TENSOR_F32, (const uint64_t[]){3}, 1, (const float[]){1, 2, 3});
    gguf_writer_tensor(writer, "blocks", TENSOR_Q8_0, (const uint64_t[]){64, 2, 1, 3}, 4, NULL);
    gguf_writer_tensor(writer, "k", TENSOR_Q6_K, (const uint64_t[]){256, 2}, 2, NULL);
}

static void check_values(const struct gguf *gguf) {
    bool truth = false;
    uint16_t u16 = 0;
    uint32_t u32 = 0;
    int32_t i32 = 0;
    uint64_t u64 = 0;
    float f32 = 0;
    struct gguf_string string, text = {0};
    struct gguf_array array;
    assert_int_equal(gguf_get_bool(gguf, "a.bool", GGUF_REQUIRED, &truth, NULL), STATUS_OK);
    assert_int_equal(gguf_get_u16(gguf, "a.u16", GGUF_REQUIRED, &u16, NULL), STATUS_OK);
    assert_int_equal(gguf_get_u32(gguf, "a.u32", GGUF_REQUIRED, &u32, NULL), STATUS_OK);
    assert_int_equal(gguf_get_i32(gguf, "a.i32", GGUF_REQUIRED, &i32, NULL), STATUS_OK);
    assert_int_equal(gguf_get_u64(gguf, "a.u64", GGUF_REQUIRED, &u64, NULL), STATUS_OK);
    assert_int_equal(gguf_get_f32(gguf, "a.f32", GGUF_REQUIRED, &f32, NULL), STATUS_OK);
    assert_int_equal(gguf_get_string(gguf, "a.string", GGUF_REQUIRED, &text, NULL), STATUS_OK);
    assert_true(truth && u16 == 65535 && u32 == UINT32_MAX && i32 == -7 && u64 == UINT64_MAX && f32 == 0.5f && gguf_string_equals(text, "text"));
    assert_int_equal(gguf_get_array(gguf, "a.strings", GGUF_REQUIRED, GGUF_STRING, &array, NULL), STATUS_OK);
    assert_int_equal(array.count, 3);
    struct gguf_strings cursor = gguf_strings_begin(&array);
    assert_true(gguf_strings_next(&cursor, &string) && gguf_string_equals(string, "one"));
    assert_true(gguf_strings_next(&cursor, &string) && gguf_string_equals(string, ""));
    assert_true(gguf_strings_next(&cursor, &string) && gguf_string_equals(string, "three"));
    assert_false(gguf_strings_next(&cursor, &string));
    assert_int_equal(gguf_get_array(gguf, "a.u32s", GGUF_REQUIRED, GGUF_U32, &array, NULL), STATUS_OK);
    assert_int_equal(gguf_array_u32(&array, 2), 3);
    assert_int_equal(gguf_get_array(gguf, "a.i32s", GGUF_REQUIRED, GGUF_I32, &array, NULL), STATUS_OK);
    assert_int_equal(gguf_array_i32(&array, 0), -1);
    assert_int_equal(gguf_get_array(gguf, "a.f32s", GGUF_REQUIRED, GGUF_F32, &array, NULL), STATUS_OK);
    assert_true(gguf_array_f32(&array, 0) == 1.5f);
    assert_int_equal(gguf_get_array(gguf, "a.none", GGUF_REQUIRED, GGUF_F32, &array, NULL), STATUS_OK);
    assert_int_equal(array.count, 0);
}

static void test_a_whole_file_is_read_in_both_versions(void **state) {
    (void)state;
    for (uint32_t version = 2; version <= 3; version++) {
        struct gguf_writer writer = {.version = version};
        struct buffer file = {0};
        struct error error = {0};
        struct gguf *gguf;
        void *copy;
        every_kind_of_value(&writer);
        gguf_writer_finish(&writer, &file);
        if (parse(file.bytes, file.length, &gguf, &copy, &error) != STATUS_OK) fail_msg("%s", error.text);
        assert_int_equal(gguf_version(gguf), version);
        check_values(gguf);
        assert_int_equal(gguf_tensor_count(gguf), 3);
        const struct gguf_tensor *blocks = gguf_tensor_find(gguf, "blocks");
        assert_non_null(blocks);
        assert_true(blocks->type == TENSOR_Q8_0 && blocks->n_dims == 4 && blocks->dims[0] == 64 && blocks->dims[3] == 3);
        assert_true(blocks->elements == 384 && blocks->bytes == 12 * 34 && (const char *)blocks->data > (const char *)copy);
        assert_true(memcmp(gguf_tensor_at(gguf, 0)->data, (const float[]){1, 2, 3}, 12) == 0);
        assert_null(gguf_tensor_find(gguf, "block"));
        gguf_close(gguf);
        free(copy);
        buffer_done(&file);
        gguf_writer_done(&writer);
    }
}

static void test_wrong_and_missing_types_are_named(void **state) {
    (void)state;
    struct gguf_writer writer = {0};
    struct buffer file = {0};
    struct error error = {0};
    struct gguf *gguf;
    void *copy;
    every_kind_of_value(&writer);
    gguf_writer_finish(&writer, &file);
    assert_int_equal(parse(file.bytes, file.length, &gguf, &copy, &error), STATUS_OK);
    uint32_t kept = 42;
    struct gguf_array array;
    assert_int_equal(gguf_get_u32(gguf, "a.i32", GGUF_OPTIONAL, &kept, &error), STATUS_INVALID);
    assert_string_equal(error.text, "crafted: key a.i32 has type i32, expected u32");
    assert_int_equal(gguf_get_u32(gguf, "a.strings", GGUF_OPTIONAL, &kept, &error), STATUS_INVALID);
    assert_int_equal(gguf_get_array(gguf, "a.u32", GGUF_OPTIONAL, GGUF_U32, &array, &error), STATUS_INVALID);
    assert_int_equal(gguf_get_array(gguf, "a.u32s", GGUF_OPTIONAL, GGUF_F32, &array, &error), STATUS_INVALID);
    assert_string_equal(error.text, "crafted: key a.u32s has type array of u32, expected array of f32");
    assert_int_equal(gguf_get_u32(gguf, "missing", GGUF_REQUIRED, &kept, &error), STATUS_INVALID);
    assert_string_equal(error.text, "crafted: key missing is missing");
    assert_int_equal(gguf_get_u32(gguf, "missing", GGUF_OPTIONAL, &kept, &error), STATUS_OK);
    assert_int_equal(kept, 42);
    gguf_close(gguf);
    free(copy);
    buffer_done(&file);
    gguf_writer_done(&writer);
}

static void test_every_truncation_is_an_error(void **state) {
    (void)state;
    struct gguf_writer writer = {0};
    struct buffer file = {0};
    every_kind_of_value(&writer);
    gguf_writer_drop_tensor(&writer, "k");
    gguf_writer_tensor(&writer, "last", TENSOR_F32, (const uint64_t[]){8}, 1, NULL); /* no padding after it */
    gguf_writer_finish(&writer, &file);
    for (size_t length = 0; length < file.length; length++) {
        struct error error = {0};
        struct gguf *gguf;
        void *copy;
        if (parse(file.bytes, length, &gguf, &copy, &error) != STATUS_INVALID)
            fail_msg("cut to %zu of %zu bytes: %s", length, file.length, error.text);
        assert_true(error.text[0] != '\0');
        free(copy);
    }
    buffer_done(&file);
    gguf_writer_done(&writer);
}

/* Any single byte changed: an answer either way, and nothing read outside (what a sanitizer sees). */
static void test_every_changed_byte_gets_an_answer(void **state) {
    (void)state;
    struct gguf_writer writer = {0};
    struct buffer file = {0};
    int refused = 0;
    every_kind_of_value(&writer);
    gguf_writer_finish(&writer, &file);
    for (size_t at = 0; at < file.length; at++) {
        for (int change = 1; change < 256; change = change * 2 + 1) {
            struct error error = {0};
            struct gguf *gguf;
            void *copy;
            file.bytes[at] = (char)(file.bytes[at] ^ change);
            if (parse(file.bytes, file.length, &gguf, &copy, &error) != STATUS_OK) {
                refused++;
                assert_true(error.text[0] != '\0' && !strchr(error.text, '\n'));
            }
            file.bytes[at] = (char)(file.bytes[at] ^ change);
            gguf_close(gguf);
            free(copy);
        }
    }
    assert_true(refused > 1000);
    buffer_done(&file);
    gguf_writer_done(&writer);
}

static void test_files_that_are_no_files(void **state) {
    (void)state;
    char folder[] = "/tmp/kvasir-gguf-XXXXXX", path[64];
    struct error error = {0};
    struct gguf *gguf = NULL;
    assert_non_null(mkdtemp(folder));
    assert_int_equal(gguf_open(folder, &gguf, &error), STATUS_INVALID);
    assert_non_null(strstr(error.text, "not a regular file"));
    (void)snprintf(path, sizeof path, "%s/fifo", folder);
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_int_equal(gguf_open(path, &gguf, &error), STATUS_INVALID); /* and does not wait for a writer */
    assert_int_equal(unlink(path), 0);
    (void)snprintf(path, sizeof path, "%s/none", folder);
    assert_int_equal(gguf_open(path, &gguf, &error), STATUS_IO);
    assert_non_null(strstr(error.text, path));
    FILE *empty = fopen(path, "w");
    assert_non_null(empty);
    assert_int_equal(fclose(empty), 0);
    assert_int_equal(gguf_open(path, &gguf, &error), STATUS_INVALID);
    assert_non_null(strstr(error.text, "empty"));
    assert_int_equal(unlink(path), 0);
    assert_int_equal(rmdir(folder), 0);
    assert_null(gguf);
}

static void test_printable(void **state) {
    (void)state;
    char out[8];
    assert_string_equal(gguf_printable((struct gguf_string){"a\nb\x80", 4}, out, sizeof out), "a?b?");
    assert_string_equal(gguf_printable((struct gguf_string){"1234567", 7}, out, sizeof out), "1234567");
    assert_string_equal(gguf_printable((struct gguf_string){"12345678", 8}, out, sizeof out), "1234...");
    assert_string_equal(gguf_printable((struct gguf_string){NULL, 0}, out, sizeof out), "");
}

int main(void) {
    _Static_assert(sizeof cases / sizeof *cases >= 60, "crafted files");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_crafted_files_end_in_one_line),
        cmocka_unit_test(test_a_whole_file_is_read_in_both_versions),
        cmocka_unit_test(test_wrong_and_missing_types_are_named),
        cmocka_unit_test(test_every_truncation_is_an_error),
        cmocka_unit_test(test_every_changed_byte_gets_an_answer),
        cmocka_unit_test(test_files_that_are_no_files),
        cmocka_unit_test(test_printable),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
