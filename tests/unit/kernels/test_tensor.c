/* Tensor types: widening is bit-equal to PyPI gguf's (tests/golden/quants), and the tests' own quantisers stay within the error their formats allow. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <math.h>

#include "base/check.h"
#include "base/half.h"
#include "base/random.h"
#include "kernels/tensor.h"
#include "tests/support/quantize.h"
#include "tests/support/tiny_program.h"

static enum tensor_type find_type(const char *name) {
    for (int type = 0; type < TENSOR_TYPES; type++)
        if (strcmp(tensor_type_info((enum tensor_type)type)->name, name) == 0) return (enum tensor_type)type;
    fail_msg("golden file has an unknown type %s", name);
    return TENSOR_TYPES;
}

static uint32_t hex_number(const char *digits, int count) {
    char text[9] = {0};
    memcpy(text, digits, (size_t)count);
    return (uint32_t)strtoul(text, NULL, 16);
}

static void test_widening_equals_the_golden_file(void **state) {
    (void)state;
    FILE *file = fopen(KVASIR_SOURCE_DIR "/tests/golden/quants/quants.txt", "r");
    assert_non_null(file);
    static char name[16], bytes_hex[16384], values_hex[16384];
    int types_seen = 0;
    while (fscanf(file, "%15s %16383s %16383s", name, bytes_hex, values_hex) == 3) {
        enum tensor_type type = find_type(name);
        const struct tensor_type_info *info = tensor_type_info(type);
        size_t n_bytes = strlen(bytes_hex) / 2, count = strlen(values_hex) / 8;
        assert_int_equal(n_bytes * info->block_size, count * info->block_bytes);
        assert_true(count > 0);
        /* One byte off any alignment, and nothing past the end: ASan sees an over-read. */
        uint8_t *bytes = check_calloc(n_bytes + 1, 1);
        float *values = check_calloc(count, sizeof *values);
        for (size_t i = 0; i < n_bytes; i++) bytes[1 + i] = (uint8_t)hex_number(bytes_hex + 2 * i, 2);
        tensor_dequantize(type, bytes + 1, values, count);
        for (size_t i = 0; i < count; i++)
            if (float_bits(values[i]) != hex_number(values_hex + 8 * i, 8))
                fail_msg("%s element %zu: %a, expected %a", name, i, (double)values[i], (double)float_from_bits(hex_number(values_hex + 8 * i, 8)));
        free(bytes);
        free(values);
        types_seen++;
    }
    assert_int_equal(types_seen, TENSOR_TYPES);
    (void)fclose(file);
}

/* Half a quantisation step of the block's range, and slack for scales that were rounded themselves. */
static void test_quantisers_stay_close(void **state) {
    (void)state;
    static const float allowed[TENSOR_TYPES] = {
        [TENSOR_F32] = 0,       [TENSOR_F16] = 0.0005f, [TENSOR_BF16] = 0.004f, [TENSOR_Q8_0] = 0.005f, [TENSOR_Q4_0] = 0.13f, [TENSOR_Q4_1] = 0.07f,
        [TENSOR_Q5_0] = 0.065f, [TENSOR_Q5_1] = 0.035f, [TENSOR_Q4_K] = 0.09f,  [TENSOR_Q5_K] = 0.05f,  [TENSOR_Q6_K] = 0.04f,
    };
    struct random random = {7};
    for (int t = 0; t < TENSOR_TYPES; t++) {
        enum tensor_type type = (enum tensor_type)t;
        float source[512], back[512];
        uint8_t bytes[2048];
        for (int i = 0; i < 512; i++) source[i] = 2 * random_unit(random_next(&random)) - 1;
        quantize(type, source, bytes, 512);
        tensor_dequantize(type, bytes, back, 512);
        for (int i = 0; i < 512; i++)
            if (fabsf(source[i] - back[i]) > allowed[t])
                fail_msg("%s: %g came back as %g", tensor_type_info(type)->name, (double)source[i], (double)back[i]);
        memset(source, 0, sizeof source);
        quantize(type, source, bytes, 512);
        tensor_dequantize(type, bytes, back, 512);
        for (int i = 0; i < 512; i++) assert_true(back[i] == 0);
    }
}

static void test_sizes_and_rows(void **state) {
    (void)state;
    struct tiny_shape shape = tiny_shape_default();
    shape.n_embd = 256;
    shape.n_ff = 512;
    shape.mixed_types = shape.misaligned = true;
    struct program *program = tiny_program_new(&shape);
    const struct tensor *embedding = &program->phases[0].weight[WEIGHT_ONLY];
    assert_int_equal(program->n_phases, 12);
    assert_int_equal(tensor_bytes(embedding), embedding->rows * tensor_row_bytes(embedding));
    float row[256], again[256];
    tensor_row_f32(embedding, 5, row);
    tensor_dequantize(embedding->type, (const uint8_t *)embedding->data + 5 * tensor_row_bytes(embedding), again, 256);
    assert_memory_equal(row, again, sizeof row);
    tiny_program_free(program);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_widening_equals_the_golden_file),
        cmocka_unit_test(test_quantisers_stay_close),
        cmocka_unit_test(test_sizes_and_rows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
