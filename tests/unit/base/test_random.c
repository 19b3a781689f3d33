/* Random numbers are a function of their key: fixed values, no visible dependence between neighbouring keys, uniform units and bounds. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/random.h"

/* splitmix64 from seed 0, published with the algorithm: the sequence is part of the promise that a seed means the same answer after an upgrade. */
static void test_known_sequence(void **state) {
    (void)state;
    struct random random = {0};
    random.state -= 0x9e3779b97f4a7c15ull; /* random_mix adds the constant once more */
    static const uint64_t expected[] = {0xe220a8397b1dcdafull, 0x6e789e6aa1b965f4ull, 0x06c45d188009454full, 0xf88bb8a8724c81ecull};
    for (int i = 0; i < 4; i++) assert_int_equal(random_next(&random), expected[i]);
}

static int bits_of(uint64_t x) { return __builtin_popcountll(x); }

/* Each word of the key counts: flipping any bit of it changes about half of the bits of the number. */
static void test_every_bit_of_the_key_counts(void **state) {
    (void)state;
    for (int word = 0; word < 4; word++)
        for (int bit = 0; bit < 64; bit++) {
            int changed = 0;
            for (uint64_t n = 0; n < 64; n++) {
                uint64_t key[4] = {n, n * 3, 5, n + 1};
                uint64_t before = random_at(key[0], key[1], key[2], key[3]);
                key[word] ^= 1ull << bit;
                changed += bits_of(before ^ random_at(key[0], key[1], key[2], key[3]));
            }
            assert_in_range(changed, 64 * 32 - 200, 64 * 32 + 200); /* 4096 coins: deviation 32 */
        }
}

static void test_units(void **state) {
    (void)state;
    assert_true(random_unit(0) == 0);
    assert_true(random_unit(UINT64_MAX) < 1);
    assert_true(random_unit(UINT64_MAX) == 1 - 0x1p-24f);
    uint32_t seen[16] = {0};
    for (uint64_t i = 0; i < 160000; i++) seen[(int)(random_unit(random_at(1, 0, 0, i)) * 16)]++;
    double chi = 0;
    for (int i = 0; i < 16; i++) chi += (seen[i] - 10000.0) * (seen[i] - 10000.0) / 10000;
    assert_true(chi > 1 && chi < 45); /* 15 degrees of freedom */
}

static void test_below(void **state) {
    (void)state;
    struct random random = {42};
    for (uint32_t n = 1; n < 40; n++) {
        uint32_t seen[40] = {0};
        for (uint32_t i = 0; i < 100 * n; i++) {
            uint32_t x = random_below(&random, n);
            assert_true(x < n);
            seen[x]++;
        }
        for (uint32_t i = 0; i < n; i++) assert_in_range(seen[i], 40, 160);
    }
    for (int i = 0; i < 1000; i++) assert_true(random_below(&random, UINT32_MAX) < UINT32_MAX);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_known_sequence),
        cmocka_unit_test(test_every_bit_of_the_key_counts),
        cmocka_unit_test(test_units),
        cmocka_unit_test(test_below),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
