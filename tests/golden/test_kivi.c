/* KIVI against a numpy transcription of the paper on recorded keys and values (kivi/make_kivi.py): codes, scales and minima exactly, by the reference backend's pool and by every instruction
 * set of the cpu backend; what queries get from the lane by both, f16 residual included. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/check.h"
#include "base/half.h"
#include "kernels/cpu/cpu.h"
#include "kernels/kivi.h"
#include "kernels/reference/kv_pool.h"

enum {
    SLOTS_MAX = 200,
    BLOCKS_MAX = SLOTS_MAX / BLOCK_TOKENS + 1,
    D_MAX = 80,
    GROUPS_MAX = 3,
    HEADS_MAX = 3,
    ROWS_MAX = 8,
    LINE_MAX_BYTES = 1 << 20
};

struct golden {
    uint32_t bits, d, n, heads, n_rows;
    float k[SLOTS_MAX][D_MAX], v[SLOTS_MAX][D_MAX];
    struct {
        uint8_t keys[BLOCK_TOKENS][D_MAX], values[BLOCK_TOKENS][D_MAX];
        struct kivi_scale of_keys[D_MAX], of_values[BLOCK_TOKENS][GROUPS_MAX];
    } blocks[BLOCKS_MAX];
    struct {
        uint32_t position, n_codes;
        float q[HEADS_MAX][D_MAX], out[HEADS_MAX][D_MAX];
    } rows[ROWS_MAX];
};

static char line[LINE_MAX_BYTES], *at;

/* The next word of the line. */
static const char *word(void) {
    const char *begin = at;
    at += strcspn(at, " \n");
    if (*at) *at++ = '\0';
    return begin;
}

static bool next_line(FILE *file, const char *name) {
    if (!fgets(line, sizeof line, file)) return false;
    at = line;
    assert_string_equal(word(), name);
    return true;
}

static uint32_t number(void) { return (uint32_t)strtoul(word(), NULL, 10); }

static void bytes_of(const char *hex, uint8_t *bytes, size_t n) {
    assert_int_equal(strlen(hex), 2 * n);
    for (size_t i = 0; i < n; i++) {
        unsigned byte;
        assert_int_equal(sscanf(hex + 2 * i, "%2x", &byte), 1);
        bytes[i] = (uint8_t)byte;
    }
}

static void halves_of(uint16_t *halves, size_t n) { bytes_of(word(), (uint8_t *)halves, n * sizeof *halves); }

static void rows_of_halves(float (*x)[D_MAX], uint32_t n, uint32_t d) {
    static uint16_t halves[SLOTS_MAX * D_MAX];
    halves_of(halves, (size_t)n * d);
    for (uint32_t i = 0; i < n * d; i++) x[i / d][i % d] = float_from_f16(halves[i]);
}

static void codes_of(uint8_t (*codes)[D_MAX], uint32_t d) {
    const char *digits = word();
    assert_int_equal(strlen(digits), BLOCK_TOKENS * d);
    for (uint32_t i = 0; i < BLOCK_TOKENS * d; i++) {
        char digit[2] = {digits[i], '\0'};
        codes[i / d][i % d] = (uint8_t)strtoul(digit, NULL, 16);
    }
}

static bool read_case(FILE *file, struct golden *g) {
    static uint16_t scales[BLOCK_TOKENS * D_MAX], minima[BLOCK_TOKENS * D_MAX];
    if (!next_line(file, "case")) return false;
    g->bits = number(), g->d = number(), g->n = number(), g->heads = number(), g->n_rows = number();
    assert_true(g->d <= D_MAX && g->n <= SLOTS_MAX && g->heads <= HEADS_MAX && g->n_rows <= ROWS_MAX);
    assert_true(next_line(file, "k"));
    rows_of_halves(g->k, g->n, g->d);
    assert_true(next_line(file, "v"));
    rows_of_halves(g->v, g->n, g->d);
    const uint32_t groups = kivi_value_groups(g->d);
    for (uint32_t b = 0; b < g->n / BLOCK_TOKENS; b++) {
        assert_true(next_line(file, "keys"));
        codes_of(g->blocks[b].keys, g->d);
        halves_of(scales, g->d);
        halves_of(minima, g->d);
        for (uint32_t i = 0; i < g->d; i++) g->blocks[b].of_keys[i] = (struct kivi_scale){scales[i], minima[i]};
        assert_true(next_line(file, "values"));
        codes_of(g->blocks[b].values, g->d);
        halves_of(scales, BLOCK_TOKENS * groups);
        halves_of(minima, BLOCK_TOKENS * groups);
        for (uint32_t i = 0; i < BLOCK_TOKENS * groups; i++)
            g->blocks[b].of_values[i / groups][i % groups] = (struct kivi_scale){scales[i], minima[i]};
    }
    for (uint32_t r = 0; r < g->n_rows; r++) {
        static float out[HEADS_MAX * D_MAX];
        assert_true(next_line(file, "row"));
        g->rows[r].position = number(), g->rows[r].n_codes = number();
        rows_of_halves(g->rows[r].q, g->heads, g->d);
        bytes_of(word(), (uint8_t *)out, (size_t)g->heads * g->d * sizeof *out);
        for (uint32_t i = 0; i < g->heads * g->d; i++) g->rows[r].out[i / g->d][i % g->d] = out[i];
    }
    return true;
}

static enum kv_dtype dtype_of(const struct golden *g) { return g->bits == 4 ? KV_KIVI4 : KV_KIVI2; }

static void expect_out(const struct golden *g, const char *who, uint32_t row, uint32_t head, const float *out) {
    double difference = 0, size = 0;
    for (uint32_t i = 0; i < g->d; i++) {
        difference += pow((double)out[i] - (double)g->rows[row].out[head][i], 2);
        size += pow((double)g->rows[row].out[head][i], 2);
    }
    if (!(difference <= 1e-10 * size))
        fail_msg("%s, %u bits, head_dim %u: output at position %u is off by %g", who, g->bits, g->d, g->rows[row].position, sqrt(difference / size));
}

/* ---- the reference backend ---- */

static void check_pool(const struct golden *g, struct kv_pool *pool, const uint32_t *blocks) {
    for (uint32_t slot = 0; slot < g->n / BLOCK_TOKENS * BLOCK_TOKENS; slot++) {
        const uint32_t b = slot / BLOCK_TOKENS, i = slot % BLOCK_TOKENS;
        float k[D_MAX], v[D_MAX];
        kv_pool_read_k(pool, blocks[b], i, true, k);
        kv_pool_read_v(pool, blocks[b], i, true, v);
        for (uint32_t c = 0; c < g->d; c++) {
            const float key = kivi_number(g->blocks[b].keys[i][c], g->blocks[b].of_keys[c]);
            const float value = kivi_number(g->blocks[b].values[i][c], g->blocks[b].of_values[i][c / KIVI_GROUP]);
            if (k[c] != key || v[c] != value)
                fail_msg("reference, %u bits: slot %u channel %u is %g, %g, not %g, %g", g->bits, slot, c, (double)k[c], (double)v[c], (double)key,
                         (double)value);
        }
    }
}

static void check_pool_rows(const struct golden *g, struct kv_pool *pool, const uint32_t *blocks) {
    for (uint32_t r = 0; r < g->n_rows; r++)
        for (uint32_t h = 0; h < g->heads; h++) {
            const uint32_t position = g->rows[r].position;
            double p[SLOTS_MAX], most = -INFINITY, total = 0, out[D_MAX] = {0};
            float k[D_MAX], v[D_MAX], rounded[D_MAX];
            for (uint32_t pass = 0; pass < 2; pass++) {
                for (uint32_t slot = 0; slot <= position; slot++) {
                    bool codes = kv_pool_reads_codes(pool, blocks, slot / BLOCK_TOKENS, position, (int32_t)position);
                    assert_int_equal(codes, slot / BLOCK_TOKENS < g->rows[r].n_codes);
                    kv_pool_read_k(pool, blocks[slot / BLOCK_TOKENS], slot % BLOCK_TOKENS, codes, k);
                    kv_pool_read_v(pool, blocks[slot / BLOCK_TOKENS], slot % BLOCK_TOKENS, codes, v);
                    if (pass == 0) {
                        p[slot] = 0;
                        for (uint32_t i = 0; i < g->d; i++) p[slot] += (double)g->rows[r].q[h][i] * (double)k[i] / sqrt(g->d);
                        most = fmax(most, p[slot]);
                    } else {
                        double weight = exp(p[slot] - most);
                        total += weight;
                        for (uint32_t i = 0; i < g->d; i++) out[i] += weight * (double)v[i];
                    }
                }
            }
            for (uint32_t i = 0; i < g->d; i++) rounded[i] = (float)(out[i] / total);
            expect_out(g, "reference", r, h, rounded);
        }
}

static void check_reference(const struct golden *g) {
    struct kv_pool pool;
    struct error error;
    uint32_t blocks[BLOCKS_MAX];
    for (uint32_t b = 0; b < BLOCKS_MAX; b++) blocks[b] = BLOCKS_MAX - 1 - b;
    assert_int_equal(kv_pool_init(&pool, g->d, dtype_of(g), BLOCKS_MAX, &error), STATUS_OK);
    for (uint32_t slot = 0; slot < g->n; slot++)
        kv_pool_write(&pool, blocks[slot / BLOCK_TOKENS], slot % BLOCK_TOKENS, g->k[slot], g->v[slot], (int32_t)slot);
    check_pool(g, &pool, blocks);
    check_pool_rows(g, &pool, blocks);
    kv_pool_done(&pool);
}

/* ---- the cpu backend ---- */

/* Code `i` in the order of f16 elements, as layout.h packs them. */
static uint32_t code_at(const struct golden *g, const uint8_t *codes, size_t i) {
    const uint32_t bytes = 4 * g->bits, within = (uint32_t)(i % 32);
    return codes[i / 32 * bytes + within % bytes] >> (within / bytes * g->bits) & ((1u << g->bits) - 1);
}

static void check_block(const struct golden *g, const char *who, const struct kv_shape *shape, const uint8_t *block, uint32_t b) {
    const uint32_t groups = kivi_value_groups(g->d);
    const struct kivi_scale *scales = (const struct kivi_scale *)(const void *)(block + shape->scale_offset);
    assert_int_equal(memcmp(scales, g->blocks[b].of_keys, g->d * sizeof *scales), 0);
    for (uint32_t slot = 0; slot < BLOCK_TOKENS; slot++) {
        assert_int_equal(memcmp(scales + shape->dims + slot * groups, g->blocks[b].of_values[slot], groups * sizeof *scales), 0);
        for (uint32_t i = 0; i < g->d; i++) {
            const uint32_t key = code_at(g, block, (size_t)(i / 2) * 64 + slot * 2 + i % 2);
            const uint32_t value = code_at(g, block + shape->v_offset, ((size_t)(slot / 2) * shape->dims + i) * 2 + slot % 2);
            if (key != g->blocks[b].keys[slot][i] || value != g->blocks[b].values[slot][i])
                fail_msg("%s, %u bits: block %u slot %u channel %u has codes %u and %u, not %u and %u", who, g->bits, b, slot, i, key, value,
                         g->blocks[b].keys[slot][i], g->blocks[b].values[slot][i]);
        }
    }
}

static void check_isa_row(const struct golden *g, const struct cpu_isa *isa, struct attend *attend, uint32_t r) {
    const uint32_t dims = attend->shape->dims, n = g->rows[r].position + 1;
    float *queries = check_calloc((size_t)g->heads * dims, sizeof *queries), *states = check_calloc((size_t)g->heads * (dims + 2), sizeof *states);
    attend->n_queries = g->heads;
    attend->residual.n_codes = g->rows[r].n_codes;
    for (uint32_t h = 0; h < g->heads; h++) {
        for (uint32_t i = 0; i < g->d; i++) queries[h * dims + i] = g->rows[r].q[h][i] / sqrtf((float)g->d);
        attend->query[h] = queries + (size_t)h * dims;
        attend->visible[h] = n;
        states[h * (dims + 2)] = -INFINITY;
    }
    isa->attend(attend, 0, (n + SPLIT_SLOTS - 1) / SPLIT_SLOTS, states, dims + 2);
    for (uint32_t h = 0; h < g->heads; h++) {
        float *state = states + (size_t)h * (dims + 2);
        for (uint32_t i = 0; i < g->d; i++) state[2 + i] /= state[1];
        expect_out(g, isa->name, r, h, state + 2);
    }
    free(queries);
    free(states);
}

static void check_isa(const struct golden *g, const struct cpu_isa *isa) {
    const struct program program = {.head_dim = g->d};
    const struct kv_shape shape = kv_shape_of(&program, dtype_of(g)), raw_shape = kv_shape_of(&program, KV_F16);
    uint8_t *pool = check_calloc(BLOCKS_MAX, shape.bytes), *raw = check_calloc(BLOCKS_MAX, raw_shape.bytes);
    uint8_t *scratch = check_calloc(attend_scratch_bytes(&shape), 1);
    uint32_t blocks[BLOCKS_MAX], places[BLOCKS_MAX];
    for (uint32_t b = 0; b < BLOCKS_MAX; b++) blocks[b] = BLOCKS_MAX - 1 - b, places[blocks[b]] = b;
    for (uint32_t slot = 0; slot < g->n; slot++) {
        uint8_t *f16 = raw + slot / BLOCK_TOKENS * raw_shape.bytes, *codes = pool + blocks[slot / BLOCK_TOKENS] * shape.bytes;
        float k[D_MAX] = {0}, v[D_MAX] = {0};
        memcpy(k, g->k[slot], sizeof g->k[slot]);
        memcpy(v, g->v[slot], sizeof g->v[slot]);
        isa->append(&raw_shape, f16, slot % BLOCK_TOKENS, k, v);
        if (slot % BLOCK_TOKENS < BLOCK_TOKENS - 1) continue;
        isa->close_block(&shape, f16, codes, false);
        check_block(g, isa->name, &shape, codes, slot / BLOCK_TOKENS);
    }
    struct attend attend = {.shape = &shape, .pool = pool, .blocks = blocks, .residual = {.pool = raw, .of = places}, .scratch = scratch};
    for (uint32_t r = 0; r < g->n_rows; r++) check_isa_row(g, isa, &attend, r);
    free(pool);
    free(raw);
    free(scratch);
}

static void test_kivi(void **state) {
    (void)state;
    static struct golden golden;
    uint32_t n_cases = 0, n_rows = 0, n_isas = 0;
    FILE *file = fopen(KVASIR_SOURCE_DIR "/tests/golden/kivi/kivi.txt", "r");
    assert_non_null(file);
    for (; read_case(file, &golden); n_cases++) {
        n_rows += golden.n_rows;
        check_reference(&golden);
        n_isas = 0;
        for (const struct cpu_isa *const *isa = cpu_isas; *isa; isa++)
            if ((*isa)->present()) check_isa(&golden, *isa), n_isas++;
    }
    (void)fclose(file);
    print_message("%u lanes, %u rows, on reference and %u instruction sets\n", n_cases, n_rows, n_isas);
    assert_true(n_cases == 4 && n_rows == 14 && n_isas > 0);
}

/* Bytes of a token with 4,096 of them in the cache, beside the formula: bits + 32 / 32 a number (codes; scale and minimum of 32 numbers), and 96 tokens at most in f16. */
static void test_bytes(void **state) {
    (void)state;
    enum { D = 64, TOKENS = 4096, BLOCKS = TOKENS / BLOCK_TOKENS, RESIDUAL = KIVI_RAW_BLOCKS * BLOCK_TOKENS };
    const struct program program = {.n_layers = 1, .n_heads = 1, .n_kv_heads = 1, .head_dim = D};
    for (int dtype = KV_KIVI4; dtype <= KV_KIVI2; dtype++) {
        const struct kv_shape shape = kv_shape_of(&program, (enum kv_dtype)dtype);
        double formula = 2.0 * D * ((kivi_bits((enum kv_dtype)dtype) + 1) / 8.0 * (TOKENS - RESIDUAL) + 2.0 * RESIDUAL);
        double taken = (double)BLOCKS * (double)cpu_block_bytes(&program, (enum kv_dtype)dtype) + KIVI_RAW_BLOCKS * (double)shape.raw_bytes;
        print_message("%s: %.1f bytes a token and head, formula %.1f, ratio %.3f\n", kv_dtype_name((enum kv_dtype)dtype), taken / TOKENS,
                      formula / TOKENS, taken / formula);
        assert_true(taken <= 1.15 * formula);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_kivi), cmocka_unit_test(test_bytes)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
