/* KIVI's parts by themselves: codes of extreme groups, which block is read as codes, which slots go with which, and the places of the cpu backend's residual against a slow model. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/check.h"
#include "base/random.h"
#include "kernels/kivi.h"
#include "kernels/raw.h"
#include "kernels/select.h"

/* Whatever the numbers, each comes back within half a step, and a step is a fifteenth or a third of the range, rounded to f16. */
static void test_codes(void **state) {
    (void)state;
    struct random random = {5};
    for (uint32_t round = 0; round < 20000; round++) {
        const uint32_t bits = round % 2 ? 4 : 2, n = 1 + random_below(&random, 32);
        const float levels = bits == 4 ? 15 : 3;
        float x[64];
        uint8_t codes[64];
        for (uint32_t i = 0; i < n; i++) {
            uint16_t half = (uint16_t)random_next(&random);
            if ((half & 0x7c00) == 0x7c00) half ^= 0x4000; /* finite */
            switch (round % 5) {
            case 0: half &= 0x83ff; break;                          /* subnormal */
            case 1: half = (uint16_t)(0x3c00 | (half & 15)); break; /* close together */
            case 2: half = half & 1 ? 0x7bff : 0xfbff; break;       /* as far apart as can be */
            default: break;
            }
            x[2 * i] = float_from_f16(half);
        }
        struct kivi_scale scale = kivi_quantize(x, 2, n, bits, codes, 2);
        float low = x[0], high = x[0], step = float_from_f16(scale.scale);
        for (uint32_t i = 0; i < n; i++) low = fminf(low, x[2 * i]), high = fmaxf(high, x[2 * i]);
        assert_true(isfinite(step) && float_from_f16(scale.minimum) == low);
        assert_int_not_equal(f16_from_float(kivi_number((uint8_t)levels, scale)), 0x7c00);
        /* The step's rounding is multiplied by the code; below 2^-24 there is no f16. */
        float bound = (high - low) / levels * (0.5f + levels * 0x1p-11f) + levels * 0x1p-25f;
        for (uint32_t i = 0; i < n; i++) {
            assert_true(codes[2 * i] <= levels);
            if (!(fabsf(kivi_number(codes[2 * i], scale) - x[2 * i]) <= bound))
                fail_msg("round %u: %g became %g; range %g to %g", round, (double)x[2 * i], (double)kivi_number(codes[2 * i], scale), (double)low,
                         (double)high);
        }
    }
}

static void test_residual(void **state) {
    (void)state;
    for (int32_t p = 0; p < 1000; p++) {
        uint32_t read_raw = 0;
        for (int32_t j = 0; 32 * j <= p; j++) {
            bool codes = 32 * (j + 1) <= p && kivi_reads_codes(32 * j + 31, p);
            assert_int_equal(codes, 32 * (j + 1) + 64 <= p);
            read_raw += !codes;
        }
        assert_true(read_raw <= KIVI_RAW_BLOCKS);
    }
}

/* ---- slots that go together ---- */

enum { SLOTS = 300 };

static void test_blocks_stay_or_go(void **state) {
    (void)state;
    struct random random = {11};
    uint32_t rounded = 0;
    for (uint32_t round = 0; round < 20000; round++) {
        uint32_t keys[SLOTS], before[SLOTS], keep[SLOTS], n = random_below(&random, SLOTS + 1), n_protected = 0,
                                                          kinds = 1 + random_below(&random, 40);
        int32_t positions[SLOTS], position = 0;
        bool stays[SLOTS] = {false};
        for (uint32_t i = 0; i < n; i++) {
            positions[i] = position += 1 + (int32_t)(random_below(&random, 10) == 0 ? random_below(&random, 50) : 0);
            keys[i] = random_below(&random, 25) == 0 ? RANK_PROTECTED : 1 + random_below(&random, kinds);
            n_protected += keys[i] == RANK_PROTECTED;
        }
        memcpy(before, keys, n * sizeof *before);
        const int32_t next = position + 1;
        const uint32_t joined = select_join(keys, positions, n, next, &n_protected);
        uint32_t counted = 0;
        assert_true(joined % BLOCK_TOKENS == 0 && joined <= n);
        assert_true(joined + BLOCK_TOKENS > n || positions[joined + BLOCK_TOKENS - 1] + 1 + 64 > next);
        for (uint32_t i = 0; i < n; i++) {
            uint32_t highest = before[i];
            for (uint32_t other = i / BLOCK_TOKENS * BLOCK_TOKENS; i < joined && other < (i / BLOCK_TOKENS + 1) * BLOCK_TOKENS; other++)
                highest = before[other] > highest ? before[other] : highest;
            assert_int_equal(keys[i], highest);
            counted += keys[i] == RANK_PROTECTED;
        }
        assert_int_equal(counted, n_protected);

        const uint32_t evict = n ? random_below(&random, n + 20) : 0, most = n - n_protected, wanted = evict < most ? evict : most;
        const uint32_t n_keep = select_keep_joined(keys, n, n_protected, evict, joined, keep), gone = n - n_keep;
        assert_true(gone >= wanted && gone < wanted + BLOCK_TOKENS && gone <= most);
        rounded += gone > wanted;
        for (uint32_t i = 0; i < n_keep; i++) {
            assert_true(keep[i] < n && (i == 0 || keep[i] > keep[i - 1]));
            stays[keep[i]] = true;
        }
        for (uint32_t i = 0; i < n; i++) {
            if (keys[i] == RANK_PROTECTED) assert_true(stays[i]);
            if (i < joined) assert_int_equal(stays[i], stays[i / BLOCK_TOKENS * BLOCK_TOKENS]);
            for (uint32_t other = 0; !stays[i] && other < n; other++) /* nothing worse was kept, nothing newer that is as bad */
                assert_true(!stays[other] || keys[other] > keys[i] || (keys[other] == keys[i] && other < i));
        }
        for (uint32_t i = 0; i < n_keep && keep[i] < joined; i += BLOCK_TOKENS) assert_true(kivi_whole_block(keep, n_keep, i));
    }
    assert_true(rounded > 1000);
}

/* ---- places ---- */

enum { BLOCKS = 40, PLACES = 20, TABLES = 3, LANES = 2 };

/* What is held stays; of the rest the one used longest ago is given away. */
static void test_places(void **state) {
    (void)state;
    static uint32_t of[BLOCKS], held[TABLES * LANES * KIVI_RAW_BLOCKS];
    static struct raw_place places[PLACES + 1];
    struct raw_places raw = {.n_blocks = BLOCKS, .n_places = PLACES, .n_tables = TABLES, .n_lanes = LANES};
    raw.of = of, raw.places = places, raw.held = held;
    memset(places, 0, sizeof places);
    raw_init(&raw);
    uint64_t used[BLOCKS] = {0}, now = 0; /* 0: has no place */
    uint32_t tables[TABLES][LANES][KIVI_RAW_BLOCKS], n_held[TABLES][LANES] = {0}, given_away = 0;
    struct random random = {3};
    for (uint32_t step = 0; step < 20000; step++) {
        uint32_t b = random_below(&random, BLOCKS), table = random_below(&random, TABLES), with_place = 0, holders[BLOCKS] = {0};
        now++;
        for (uint32_t t = 0; t < TABLES; t++)
            for (uint32_t l = 0; l < LANES; l++)
                for (uint32_t i = 0; i < n_held[t][l]; i++) holders[tables[t][l][i]]++;
        switch (random_below(&random, 8)) {
        case 0:
            if (holders[b] == 0) raw_forget(&raw, b), used[b] = 0;
            break;
        case 1: /* a table moves on */
            raw_release_table(&raw, table);
            for (uint32_t l = 0; l < LANES; l++) {
                for (uint32_t i = 0; i < n_held[table][l]; i++)
                    if (--holders[tables[table][l][i]] == 0) used[tables[table][l][i]] = now * 100 + l * 10 + i;
                n_held[table][l] = 0;
                for (uint32_t i = 0; i < BLOCKS && n_held[table][l] < random_below(&random, KIVI_RAW_BLOCKS + 1); i++)
                    if (used[i] && random_below(&random, 3) == 0) tables[table][l][n_held[table][l]++] = i;
            }
            for (uint32_t l = 0; l < LANES; l++) raw_hold_lane(&raw, table, l, tables[table][l], n_held[table][l]);
            break;
        default: {
            uint32_t n_places = 0, oldest = BLOCKS;
            for (uint32_t i = 0; i < BLOCKS; i++) {
                n_places += used[i] > 0;
                if (used[i] && holders[i] == 0 && (oldest == BLOCKS || used[i] < used[oldest])) oldest = i;
            }
            bool gives_away = used[b] == 0 && n_places == PLACES;
            (void)raw_take(&raw, b);
            if (gives_away) assert_true(of[oldest] == RAW_NONE), used[oldest] = 0, given_away++;
            if (holders[b] == 0) used[b] = now * 100;
        }
        }
        for (uint32_t i = 0; i < BLOCKS; i++) {
            assert_int_equal(of[i] != RAW_NONE, used[i] > 0);
            if (of[i] == RAW_NONE) continue;
            with_place++;
            assert_true(of[i] < PLACES && places[of[i]].block == i);
        }
        uint32_t idle = 0;
        for (uint32_t i = places[PLACES].newer; i != PLACES; i = places[i].newer, idle++)
            assert_true(places[i].holds == 0 && places[places[i].newer].older == i);
        assert_int_equal(idle, raw.n_idle);
        assert_true(with_place <= PLACES);
    }
    assert_true(given_away > 1000);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_codes), cmocka_unit_test(test_residual), cmocka_unit_test(test_blocks_stay_or_go),
                                       cmocka_unit_test(test_places)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
