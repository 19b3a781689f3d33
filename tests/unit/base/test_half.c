/* f16 and bf16: every one of the 65,536 values out and back, every rounding border between neighbours, and agreement with the CPU where it has the instructions. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <math.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "base/half.h"
#include "base/random.h"

struct format {
    const char *name;
    int exponent_bits, mantissa_bits;
    float (*widen)(uint16_t);
    uint16_t (*narrow)(float);
};

static const struct format formats[] = {
    {"f16", 5, 10, float_from_f16, f16_from_float},
    {"bf16", 8, 7, float_from_bf16, bf16_from_float},
};

/* The value by the definition of the format: sign, exponent with its bias, implied one. */
static double value_of(const struct format *format, uint16_t bits) {
    int bias = (1 << (format->exponent_bits - 1)) - 1, top = (1 << format->exponent_bits) - 1;
    int exponent = bits >> format->mantissa_bits & top, mantissa = bits & ((1 << format->mantissa_bits) - 1);
    double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == top) return mantissa ? (double)NAN : sign * (double)INFINITY;
    if (exponent == 0) return sign * ldexp(mantissa, 1 - bias - format->mantissa_bits);
    return sign * ldexp((1 << format->mantissa_bits) + mantissa, exponent - bias - format->mantissa_bits);
}

static void test_every_value(void **state) {
    (void)state;
    for (size_t f = 0; f < 2; f++)
        for (uint32_t bits = 0; bits < 65536; bits++) {
            double value = value_of(&formats[f], (uint16_t)bits);
            float widened = formats[f].widen((uint16_t)bits);
            uint16_t back = formats[f].narrow(widened);
            if (isnan(value)) {
                assert_true(isnan(widened));
                assert_true(isnan(value_of(&formats[f], back)));
                assert_int_equal(back & 0x8000, bits & 0x8000);
                continue;
            }
            assert_true((double)widened == value);
            assert_int_equal(signbit(widened) != 0, bits >> 15);
            assert_int_equal(back, bits);
        }
}

/* Between neighbours a < b: up to the middle a, from the middle b, and the middle itself to the even one of the two. The neighbour of the largest is the
 * infinity, as if the next power of two were there. */
static void test_every_border(void **state) {
    (void)state;
    for (size_t f = 0; f < 2; f++) {
        const struct format *format = &formats[f];
        uint32_t infinity = (uint32_t)((1 << format->exponent_bits) - 1) << format->mantissa_bits;
        for (uint32_t a = 0; a < infinity; a++) {
            double low = value_of(format, (uint16_t)a), high = value_of(format, (uint16_t)(a + 1));
            if (a + 1 == infinity) high = ldexp(1, (1 << (format->exponent_bits - 1)));
            float middle = (float)((low + high) / 2);
            if ((double)middle != (low + high) / 2 || isinf(middle)) continue; /* below the smallest float there is no middle */
            for (uint32_t sign = 0; sign < 2; sign++) {
                float s = sign ? -1 : 1;
                uint32_t bit = sign << 15;
                assert_int_equal(format->narrow(s * middle), bit | (a % 2 ? a + 1 : a));
                assert_int_equal(format->narrow(s * nextafterf(middle, INFINITY)), bit | (a + 1));
                assert_int_equal(format->narrow(s * nextafterf(middle, 0)), bit | a);
            }
        }
        assert_int_equal(format->narrow(INFINITY), infinity);
        assert_int_equal(format->narrow(-INFINITY), infinity | 0x8000);
    }
    assert_int_equal(f16_from_float(65519.996f), 0x7bff);
    assert_int_equal(f16_from_float(65520), 0x7c00);
    assert_int_equal(f16_from_float(3.4e38f), 0x7c00);
    assert_int_equal(f16_from_float(1e-30f), 0);
    assert_int_equal(bf16_from_float(3.4e38f), 0x7f80);
}

/* A NaN whose payload lies in the bits that are cut off must not become an infinity. */
static void test_nan_payloads(void **state) {
    (void)state;
    for (size_t f = 0; f < 2; f++)
        for (int bit = 0; bit < 23; bit++) {
            assert_true(isnan(formats[f].widen(formats[f].narrow(float_from_bits(0x7f800000u | 1u << bit)))));
            assert_true(isnan(formats[f].widen(formats[f].narrow(float_from_bits(0xff800000u | 1u << bit)))));
        }
}

#if defined(__x86_64__)
__attribute__((target("f16c"))) static uint16_t cpu_narrow(float value) { return (uint16_t)_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
__attribute__((target("f16c"))) static float cpu_widen(uint16_t half) { return _cvtsh_ss(half); }

static void test_f16_agrees_with_the_cpu(void **state) {
    (void)state;
    if (!__builtin_cpu_supports("f16c")) skip();
    for (uint32_t bits = 0; bits < 65536; bits++)
        if ((bits & 0x7fff) <= 0x7c00) assert_int_equal(float_bits(cpu_widen((uint16_t)bits)), float_bits(float_from_f16((uint16_t)bits)));
    struct random random = {1};
    for (int i = 0; i < 2000000; i++) {
        float value = float_from_bits((uint32_t)random_next(&random));
        if (i % 2) value = (random_unit(random_next(&random)) - 0.5f) * ldexpf(1, (int)random_below(&random, 45) - 28);
        if (!isnan(value)) assert_int_equal(cpu_narrow(value), f16_from_float(value));
    }
}
#endif

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_value),
        cmocka_unit_test(test_every_border),
        cmocka_unit_test(test_nan_payloads),
#if defined(__x86_64__)
        cmocka_unit_test(test_f16_agrees_with_the_cpu),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
