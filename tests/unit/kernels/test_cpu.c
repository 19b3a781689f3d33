/* The cpu backend from the inside: packing, products, workers. What it computes as a whole is test_backends.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <math.h>
#include <stdatomic.h>

#include "base/check.h"
#include "base/random.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/pack.h"
#include "kernels/cpu/workers.h"
#include "tests/support/quantize.h"
#include "tests/support/tiny_program.h"

#ifdef __SANITIZE_THREAD__ /* products are one thread's, with nothing to race: some numbers of rows instead of each */
enum { MOST_ROWS = 97, ROWS_STEP = 16 };
#else
enum { MOST_ROWS = 97, ROWS_STEP = 1 };
#endif

struct matrix {
    struct tensor tensor;
    uint8_t *bytes; /* what to free */
};

/* Random blocks; `worst`: every weight at an end of its range. At an odd address, as a file may place it. */
static struct matrix matrix_new(enum tensor_type type, uint32_t rows, uint32_t cols, bool worst, uint64_t seed) {
    struct matrix m = {.tensor = {.type = type, .rows = rows, .cols = cols}};
    struct random random = {seed};
    size_t row_bytes = tensor_row_bytes(&m.tensor);
    m.bytes = check_calloc(rows * row_bytes + 1, 1);
    float *row = check_calloc(cols, sizeof *row);
    for (uint32_t r = 0; r < rows; r++) {
        for (uint32_t c = 0; c < cols; c++) {
            row[c] = 2 * random_unit(random_next(&random)) - 1;
            if (worst) row[c] = row[c] > 0 ? 1 : -1;
        }
        quantize(type, row, m.bytes + 1 + r * row_bytes, cols);
    }
    free(row);
    m.tensor.data = m.bytes + 1;
    return m;
}

static struct panel pack_all(const struct tensor *tensor) {
    struct panel panel = panel_of(tensor);
    panel.data = aligned_alloc(64, (panel_bytes(&panel) + 63) / 64 * 64);
    CHECK(panel.data);
    panel_pack(&panel, tensor, 0, panel.n_strips);
    return panel;
}

static void test_rows_come_back_out_of_panels(void **state) {
    (void)state;
    for (int type = 0; type < TENSOR_TYPES; type++) {
        const uint32_t rows = 37, cols = tensor_type_info((enum tensor_type)type)->block_size == 1 ? 45 : 512;
        struct matrix m = matrix_new((enum tensor_type)type, rows, cols, false, 7);
        struct panel panel = pack_all(&m.tensor);
        float expected[512], found[512];
        for (uint32_t r = 0; r < rows; r++) {
            tensor_row_f32(&m.tensor, r, expected);
            panel_row_f32(&panel, r, found);
            for (uint32_t c = 0; c < cols; c++)
                if (expected[c] != found[c])
                    fail_msg("%s row %u column %u: %g, not %g", tensor_type_info((enum tensor_type)type)->name, r, c, (double)found[c],
                             (double)expected[c]);
        }
        free(panel.data);
        free(m.bytes);
    }
}

/* Rows of activations in both forms; `worst`: all at an end of the range, or as far from the first plane's steps as they can be, so that the second is at an end of its; with
 * one plane a quad of each block, another one in every row, at the end of the range of its high part as well. */
static struct act rows_new(const struct cpu_isa *isa, uint32_t cols, uint32_t planes, bool worst, uint64_t seed) {
    struct act rows = {.planes = planes, .value_stride = (cols + PANEL_K - 1) / PANEL_K * PANEL_K};
    struct random random = {seed};
    rows.row_bytes = rows.value_stride / PANEL_K * act_block_bytes(planes);
    rows.values = check_calloc((size_t)MOST_ROWS * rows.value_stride, sizeof(float));
    rows.blocks = check_calloc(MOST_ROWS, rows.row_bytes);
    for (uint32_t r = 0; r < MOST_ROWS; r++) {
        float *values = rows.values + r * rows.value_stride;
        for (uint32_t c = 0; c < cols; c++) {
            float x = 2 * random_unit(random_next(&random)) - 1, size = c % PANEL_K && r % 2 ? 126.499f / 127 : 1;
            values[c] = worst ? size * (r % 3 == 0 ? 1 : r % 3 == 1 ? -1 : x > 0 ? 1 : -1) : x;
            if (planes == 1 && c % PANEL_K / QUAD == (r + c / PANEL_K) % 8) values[c] *= worst ? 257 : 30;
        }
        isa->quantize(values, (uint32_t)rows.value_stride / PANEL_K, planes, act_block_at(&rows, r, 0));
    }
    return rows;
}

static void rows_free(struct act *rows) {
    free(rows->values);
    free(rows->blocks);
}

/* What a product sees: d q, with the high part of one quad, or d (256 q + q'). */
static int32_t steps_of(const struct act_block *block, uint32_t planes, size_t i) {
    if (planes == 2) return 256 * block->plane[0].q[i] + block->plane[1].q[i];
    return block->plane[0].q[i] + (i / QUAD == block->quad ? 256 * block->high[i % QUAD] : 0);
}

static double activation_of(const struct act_block *block, uint32_t planes, size_t i) { return (double)block->d * steps_of(block, planes, i); }

static double activation(const struct act *rows, bool floats, uint32_t r, uint32_t c) {
    return floats ? (double)rows->values[r * rows->value_stride + c] : activation_of(act_block_at(rows, r, c / PANEL_K), rows->planes, c % PANEL_K);
}

static void multiply(const struct cpu_isa *isa, const struct panel *panel, uint32_t strip, const struct act *rows, uint32_t first, uint32_t n,
                     float (*y)[STRIP_ROWS]) {
    bool floats = panel_is_float(panel->type);
    const void *from = floats ? (const void *)(rows->values + first * rows->value_stride) : (const void *)act_block_at(rows, first, 0);
    size_t stride = floats ? rows->value_stride * sizeof(float) : rows->row_bytes;
    isa->product[rows->planes - 1][panel->type](panel->data + strip * panel->strip_bytes, panel->n_blocks, from, stride, n, y);
}

/* Against the widened weights in double: what is left is rounding. A saturated pair would be off by far more. */
static void check_product(const struct cpu_isa *isa, enum tensor_type type, uint32_t planes, bool worst) {
    const uint32_t n_rows = 37, cols = tensor_type_info(type)->block_size == 1 ? 77 : 512;
    struct matrix m = matrix_new(type, n_rows, cols, worst, 11);
    struct panel panel = pack_all(&m.tensor);
    struct act rows = rows_new(isa, cols, planes, worst, 13);
    static float single[MOST_ROWS][STRIP_ROWS], many[MOST_ROWS][STRIP_ROWS];
    float weights[512];
    for (uint32_t strip = 0; strip < panel.n_strips; strip++) {
        for (uint32_t r = 0; r < MOST_ROWS; r++) multiply(isa, &panel, strip, &rows, r, 1, single + r);
        for (uint32_t n = 1; n <= MOST_ROWS; n += ROWS_STEP) {
            memset(many, 0xff, sizeof many);
            multiply(isa, &panel, strip, &rows, 0, n, many);
            if (memcmp(single, many, n * sizeof *many) != 0)
                fail_msg("%s %s, %u planes: a row of %u differs from itself alone", isa->name, tensor_type_info(type)->name, planes, n);
        }
        for (uint32_t i = 0; i < STRIP_ROWS; i++) {
            uint32_t output = strip * STRIP_ROWS + i;
            if (output < n_rows) tensor_row_f32(&m.tensor, output, weights);
            for (uint32_t r = 0; r < MOST_ROWS; r++) {
                double sum = 0, size = 0;
                for (uint32_t c = 0; c < cols && output < n_rows; c++) {
                    double a = activation(&rows, panel_is_float(type), r, c);
                    sum += (double)weights[c] * a;
                    size += 3 * fabs(a);
                }
                /* Weights are within 1, so minimum and scaled quant, which may cancel, are within 3 together. Some 34 roundings of 2^-24 on the way. */
                if (!(fabs((double)single[r][i] - sum) <= 2e-6 * size))
                    fail_msg("%s %s, %u planes, row %u output %u: %g, not %g", isa->name, tensor_type_info(type)->name, planes, r, output,
                             (double)single[r][i], sum);
            }
        }
    }
    rows_free(&rows);
    free(panel.data);
    free(m.bytes);
}

static void test_products(void **state) {
    (void)state;
    for (const struct cpu_isa *const *isa = cpu_isas; *isa; isa++) {
        if (!(*isa)->present()) {
            print_message("not on this machine: %s\n", (*isa)->name);
            continue;
        }
        for (int type = 0; type < TENSOR_TYPES; type++)
            for (uint32_t planes = 1; planes <= ACT_PLANES; planes++) {
                check_product(*isa, (enum tensor_type)type, planes, false);
                check_product(*isa, (enum tensor_type)type, planes, true);
            }
    }
}

union any_block {
    struct act_block block;
    uint8_t bytes[sizeof(struct act_block) + ACT_PLANES * sizeof(struct act_plane)];
};

/* Q8_0 quants of -128, which a file may hold though no quantiser makes them: 128 x 127 twice must not saturate either. */
static void test_lowest_quant(void **state) {
    (void)state;
    uint8_t source[34];
    const uint16_t one = 0x3c00;
    memcpy(source, &one, 2);
    memset(source + 2, 0x80, 32);
    struct tensor tensor = {.type = TENSOR_Q8_0, .rows = 1, .cols = 32, .data = source};
    struct panel panel = pack_all(&tensor);
    for (const struct cpu_isa *const *isa = cpu_isas; *isa; isa++) {
        if (!(*isa)->present()) continue;
        union any_block any;
        float x[32], y[1][STRIP_ROWS];
        for (int round = 0; round < 8; round++) { /* 126.499: the second plane is at its end too; 257 times as much in a quad: so is its high part */
            const int sign = round & 1 ? 1 : -1;
            const uint32_t planes = round & 2 ? 2 : 1;
            for (int i = 0; i < 32; i++)
                x[i] = (float)sign * (round & 4 && i > 0 ? 126.499f : 127) * (planes == 1 && round & 4 && i / 4 == 6 ? 257 : 1);
            (*isa)->quantize(x, 1, planes, &any.block);
            (*isa)->product[planes - 1][TENSOR_Q8_0](panel.data, 1, &any.block, 0, 1, y);
            double sum = 0;
            for (size_t i = 0; i < 32; i++) sum += activation_of(&any.block, planes, i);
            assert_true(fabs((double)y[0][0] + 128.0 * sum) < 1e-6 * 128.0 * fabs(sum));
        }
    }
    free(panel.data);
}

static void test_quantised_activations(void **state) {
    (void)state;
    struct random random = {17};
    for (const struct cpu_isa *const *isa = cpu_isas; *isa; isa++) {
        if (!(*isa)->present()) continue;
        for (int round = 0; round < 200; round++) {
            float x[PANEL_K], most = 0;
            const float size = powf(10, (float)(round % 60 - 30));
            for (int i = 0; i < PANEL_K; i++) {
                x[i] = round == 0 ? 0 : size * (2 * random_unit(random_next(&random)) - 1);
                most = fmaxf(most, fabsf(x[i]));
            }
            if (round % 7 == 3) x[5] = most * (62.5f / 127); /* between two steps of the first plane: the second ends at 127 of 128 */
            /* One value, or a quad of them, far above the rest: within reach of the high part, and beyond. */
            static const float factors[] = {1, 1.5f, 2, 3, 50, 256, 257, 400, 1e6f};
            const uint32_t high = (uint32_t)round % PANEL_K;
            for (uint32_t i = high / QUAD * QUAD; round % 3 && i < high / QUAD * QUAD + QUAD; i++)
                if (round % 3 == 2 || i == high) x[i] *= factors[(size_t)round / 3 % (sizeof factors / sizeof *factors)];
            most = 0;
            for (int i = 0; i < PANEL_K; i++) most = fmaxf(most, fabsf(x[i]));
            for (uint32_t planes = 1; planes <= ACT_PLANES; planes++) {
                union any_block any;
                const struct act_block *block = &any.block;
                int32_t sum = 0;
                (*isa)->quantize(x, 1, planes, &any.block);
                /* Half a step, and where there are two parts what the lower one cannot hold (-128); two products are rounded on the way. With one plane the step is as small as the
                 * other quads' largest, and the reach of the highest, allow; zero is what is too small to divide by. */
                float rest = 0;
                for (uint32_t i = 0; i < PANEL_K; i++)
                    if (i / QUAD != block->quad) rest = fmaxf(rest, fabsf(x[i]));
                double step = (double)most / 127 / 256;
                if (planes == 1) step = most > 1e-32f ? fmax((double)rest / 127, (double)most / (127 * 257)) : 2 * (double)most;
                for (uint32_t p = 0; p < planes; p++) {
                    int32_t all = 0, low = 0;
                    for (size_t i = 0; i < PANEL_K; i++) {
                        assert_true(block->plane[p].q[i] >= -127 && block->plane[p].q[i] <= 127);
                        all += block->plane[p].q[i];
                        if (i < 16) low += block->plane[p].q[i];
                    }
                    for (uint32_t i = 0; planes == 1 && i < QUAD; i++) {
                        assert_true(block->high[i] >= -127 && block->high[i] <= 127);
                        all += 256 * block->high[i];
                        if (block->quad < 4) low += 256 * block->high[i];
                    }
                    assert_int_equal(block->plane[p].nsum, -all);
                    assert_int_equal(block->plane[p].nsum_low, -low);
                    sum = 256 * sum + all;
                }
                for (size_t i = 0; i < PANEL_K; i++) {
                    const double bound = planes == 2 || i / QUAD == block->quad ? 1.01 : 0.501;
                    if (!(fabs(activation_of(block, planes, i) - (double)x[i]) <= bound * step))
                        fail_msg("%s, %u planes, round %d: %g became %g, in steps of %g", (*isa)->name, planes, round, (double)x[i],
                                 activation_of(block, planes, i), step);
                }
                assert_true(block->s == block->d * (float)sum);
            }
        }
    }
}

/* Each unit of each stage is done once, after all of the stage before. */
struct count {
    _Atomic uint32_t done[64];
    const struct stage *stages;
    _Atomic uint32_t early;
    _Atomic uint32_t units[64][300];
};

static void count_units(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    struct count *count = context;
    (void)worker;
    for (uint32_t i = 0; i < stage->index; i++)
        if (atomic_load_explicit(&count->done[i], memory_order_relaxed) != count->stages[i].n_units) atomic_fetch_add(&count->early, 1);
    for (uint32_t unit = first; unit < end; unit++) atomic_fetch_add_explicit(&count->units[stage->index][unit], 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&count->done[stage->index], end - first, memory_order_relaxed);
}

static void test_workers(void **state) {
    (void)state;
    struct random random = {23};
    static const uint32_t sizes[] = {1, 2, 3, 7};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        struct workers *workers;
        struct error error;
        assert_int_equal(workers_start(sizes[s], &workers, &error), STATUS_OK);
        assert_int_equal(workers_count(workers), sizes[s]);
        struct count *count = check_calloc(1, sizeof *count);
        for (int round = 0; round < 100; round++) {
            struct stage stages[64];
            uint32_t n = random_below(&random, 65);
            memset(count, 0, sizeof *count);
            count->stages = stages;
            for (uint32_t i = 0; i < n; i++)
                stages[i] = (struct stage){
                    .run = count_units, .n_units = random_below(&random, 2) ? random_below(&random, 4) : random_below(&random, 300), .index = i};
            workers_run(workers, count, stages, n);
            assert_int_equal(count->early, 0);
            for (uint32_t i = 0; i < n; i++)
                for (uint32_t unit = 0; unit < 300; unit++) assert_int_equal(count->units[i][unit], unit < stages[i].n_units ? 1 : 0);
        }
        free(count);
        workers_stop(workers);
    }
    assert_true(workers_default_count() >= 1);
}

/* Lanes too long for their weights to be kept have them made again, split by split: the same bits, or scores would depend on the length of the lane and accumulated
 * attention on how rows were batched. */
static void test_weights_made_again(void **state) {
    (void)state;
    enum { DIM = 48, SLOTS = 3 * SPLIT_SLOTS - 70, BLOCKS = (SLOTS + BLOCK_TOKENS - 1) / BLOCK_TOKENS, STRIDE = 3 * SPLIT_SLOTS };
    const struct program program = {.head_dim = DIM};
    static float kept[ATTEND_QUERIES * STRIDE], again[ATTEND_QUERIES * SPLIT_SLOTS], queries[ATTEND_QUERIES][DIM];
    static float states[ATTEND_QUERIES * (DIM + 2)];
    float maxima[3 * ATTEND_QUERIES], maxima_again[ATTEND_QUERIES], factor[ATTEND_QUERIES];
    struct random random = {29};
    uint32_t blocks[BLOCKS], places[BLOCKS];
    for (uint32_t b = 0; b < BLOCKS; b++) blocks[b] = BLOCKS - 1 - b, places[b] = b;
    for (uint32_t q = 0; q < ATTEND_QUERIES; q++)
        for (uint32_t i = 0; i < DIM; i++) queries[q][i] = 2 * random_unit(random_next(&random)) - 1;
    for (const struct cpu_isa *const *isa = cpu_isas; *isa; isa++) {
        if (!(*isa)->present()) continue;
        for (int dtype = 0; dtype < KV_DTYPES; dtype++) {
            const struct kv_shape shape = kv_shape_of(&program, (enum kv_dtype)dtype), raw_shape = kv_shape_of(&program, KV_F16);
            uint8_t *scratch = check_calloc(attend_scratch_bytes(&shape), 1);
            uint8_t *pool = check_calloc(BLOCKS, shape.bytes), *raw = check_calloc(BLOCKS, raw_shape.bytes);
            for (uint32_t slot = 0; slot < SLOTS; slot++) {
                float k[DIM], v[DIM];
                for (int i = 0; i < DIM; i++) k[i] = 2 * random_unit(random_next(&random)) - 1, v[i] = 2 * random_unit(random_next(&random)) - 1;
                uint32_t block = blocks[slot / BLOCK_TOKENS];
                bool kivi = shape.raw_bytes > 0;
                (*isa)->append(kivi ? &raw_shape : &shape, kivi ? raw + block * raw_shape.bytes : pool + block * shape.bytes, slot % BLOCK_TOKENS, k,
                               v);
                if (kivi && slot % BLOCK_TOKENS == BLOCK_TOKENS - 1)
                    (*isa)->close_block(&shape, raw + block * raw_shape.bytes, pool + block * shape.bytes, false);
            }
            struct attend attend = {.shape = &shape, .pool = pool, .blocks = blocks, .n_queries = ATTEND_QUERIES, .scratch = scratch};
            attend.residual = (struct residual){.pool = raw, .of = places, .n_codes = BLOCKS - 3};
            attend.kept = kept, attend.kept_stride = STRIDE, attend.kept_maxima = maxima;
            memset(states, 0, sizeof states);
            for (uint32_t q = 0; q < ATTEND_QUERIES; q++) { /* the first see one split, the last all */
                attend.query[q] = queries[q];
                attend.visible[q] = SLOTS - (ATTEND_QUERIES - 1 - q) * 27;
                states[q * (DIM + 2)] = -INFINITY;
            }
            (*isa)->attend(&attend, 0, 3, states, DIM + 2);
            attend.kept = again, attend.kept_stride = SPLIT_SLOTS, attend.kept_maxima = maxima_again;
            double sums[ATTEND_QUERIES] = {0};
            for (uint32_t split = 0; split < 3; split++) {
                (*isa)->weights(&attend, split);
                (*isa)->factors(&attend, maxima_again, states, DIM + 2, factor);
                assert_memory_equal(maxima_again, maxima + split * ATTEND_QUERIES, sizeof maxima_again);
                for (uint32_t q = 0; q < ATTEND_QUERIES; q++) {
                    uint32_t n = SLOTS - split * SPLIT_SLOTS < SPLIT_SLOTS ? SLOTS - split * SPLIT_SLOTS : SPLIT_SLOTS;
                    const float *row = again + q * SPLIT_SLOTS;
                    if (memcmp(row, kept + q * STRIDE + split * SPLIT_SLOTS, n * sizeof *row) != 0)
                        fail_msg("%s %s: weights of query %u differ", (*isa)->name, kv_dtype_name((enum kv_dtype)dtype), q);
                    for (uint32_t i = 0; i < n; i++) {
                        sums[q] += (double)row[i] * (double)factor[q];
                        if (split * SPLIT_SLOTS + i >= attend.visible[q]) assert_true(row[i] == 0);
                    }
                }
            }
            for (uint32_t q = 0; q < ATTEND_QUERIES; q++) assert_true(fabs(sums[q] - 1) < 1e-5);
            free(pool);
            free(raw);
            free(scratch);
        }
    }
}

/* The transform is its own inverse, keeps products, and is that of each run of the largest power of two. */
static void test_hadamard(void **state) {
    (void)state;
    static const uint32_t sizes[] = {16, 32, 48, 64, 80, 96, 128, 1024};
    struct random random = {31};
    for (const struct cpu_isa *const *isa = cpu_isas; *isa; isa++) {
        if (!(*isa)->present()) continue;
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
            const uint32_t n = sizes[s], run = n & (0u - n);
            float x[1024], y[1024];
            double most = 0;
            for (uint32_t i = 0; i < n; i++) x[i] = y[i] = 2 * random_unit(random_next(&random)) - 1;
            (*isa)->hadamard(y, n);
            for (uint32_t i = 0; i < n; i++) { /* row i of the matrix: signs by the parity of common bits */
                double sum = 0;
                for (uint32_t j = 0; j < run; j++) sum += (__builtin_popcount(i % run & j) % 2 ? -1 : 1) * (double)x[i / run * run + j];
                most = fmax(most, fabs(sum / sqrt(run) - (double)y[i]));
            }
            (*isa)->hadamard(y, n);
            for (uint32_t i = 0; i < n; i++) most = fmax(most, fabs((double)x[i] - (double)y[i]));
            if (!(most < 2e-6)) fail_msg("%s, %u values: off by %g", (*isa)->name, n, most);
        }
    }
}

/* q8 attention against double over the quants as they lie in the pool: what is left is the rounding of queries. One dim of the keys is far larger than the others. */
static double q8_error(const struct cpu_isa *isa) {
    enum { DIM = 48, SLOTS = SPLIT_SLOTS - 21, BLOCKS = SPLIT_SLOTS / BLOCK_TOKENS };
    const struct program program = {.head_dim = DIM};
    const struct kv_shape shape = kv_shape_of(&program, KV_Q8);
    struct random random = {37};
    uint8_t *pool = check_calloc(BLOCKS, shape.bytes), *scratch = check_calloc(attend_scratch_bytes(&shape), 1);
    uint32_t blocks[BLOCKS];
    float queries[5][DIM], states[5][2 + DIM] = {{0}};
    for (uint32_t b = 0; b < BLOCKS; b++) blocks[b] = BLOCKS - 1 - b;
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        float k[DIM], v[DIM];
        for (int i = 0; i < DIM; i++) k[i] = 2 * random_unit(random_next(&random)) - 1, v[i] = 2 * random_unit(random_next(&random)) - 1;
        k[7] *= 20;
        isa->append(&shape, pool + blocks[slot / BLOCK_TOKENS] * shape.bytes, slot % BLOCK_TOKENS, k, v);
    }
    struct attend attend = {.shape = &shape, .pool = pool, .blocks = blocks, .n_queries = 5, .scratch = scratch};
    for (uint32_t q = 0; q < 5; q++) {
        for (uint32_t i = 0; i < DIM; i++) queries[q][i] = 2 * random_unit(random_next(&random)) - 1;
        isa->hadamard(queries[q], DIM);
        attend.query[q] = queries[q];
        attend.visible[q] = SLOTS - 4 + q;
        states[q][0] = -INFINITY;
    }
    isa->attend(&attend, 0, 1, states[0], 2 + DIM);
    double worst = 0;
    for (uint32_t q = 0; q < 5; q++) {
        double weights[SLOTS], sum = 0, out[DIM] = {0};
        for (uint32_t slot = 0; slot < attend.visible[q]; slot++) {
            const uint8_t *block = pool + blocks[slot / BLOCK_TOKENS] * shape.bytes;
            const float *scales = (const float *)(const void *)(block + shape.scale_offset);
            uint32_t at = slot % BLOCK_TOKENS;
            double score = 0;
            for (uint32_t i = 0; i < DIM; i++) score += (double)queries[q][i] * (block[i / 4 * 128 + at * 4 + i % 4] - 128) * (double)scales[at];
            sum += weights[slot] = exp(score);
            for (uint32_t i = 0; i < DIM; i++)
                out[i] += weights[slot] * (int8_t)block[shape.v_offset + (size_t)at * DIM + i] * (double)scales[BLOCK_TOKENS + at];
        }
        for (uint32_t i = 0; i < DIM; i++) worst = fmax(worst, fabs(out[i] / sum - (double)(states[q][2 + i] / states[q][1])));
    }
    free(scratch);
    free(pool);
    return worst;
}

static void test_q8_queries(void **state) {
    (void)state;
    for (const struct cpu_isa *const *isa = cpu_isas; *isa; isa++) {
        if (!(*isa)->present()) continue;
        double error = q8_error(*isa);
        if (!(error < 5e-4)) fail_msg("%s: off by %g", (*isa)->name, error);
    }
}

static uint64_t planned_scratch(const struct program *program, uint32_t activation_bits) {
    const struct backend_limits limits = {
        .kv_dtype = KV_F16, .activation_bits = activation_bits, .max_rows = 100, .max_sequences = 4, .max_samples = 4, .threads = 1};
    struct memory_line lines[8];
    uint32_t n = backend_cpu.memory_plan(program, &limits, lines, 8);
    for (uint32_t i = 0; i < n; i++)
        if (strcmp(lines[i].what, "scratch") == 0) return lines[i].count * lines[i].bytes_each;
    fail_msg("no scratch");
    return 0;
}

/* The second plane is in the plan: of all rows three buffers, of the head's rows and of a worker's own one each. */
static void test_memory_plan(void **state) {
    (void)state;
    struct tiny_shape shape = tiny_shape_default();
    shape.type = TENSOR_Q8_0;
    struct program *program = tiny_program_new(&shape);
    const uint64_t columns = program->n_embd + program->n_heads * program->head_dim + program->n_ff;
    const uint64_t blocks = (100 * columns + (HEAD_ROWS + PRIVATE_ROWS) * program->n_embd) / PANEL_K, more = blocks * sizeof(struct act_plane);
    uint64_t narrow = planned_scratch(program, 8), wide = planned_scratch(program, 16);
    assert_int_equal(narrow, planned_scratch(program, 0));
    assert_in_range(wide - narrow, more - 5 * 64, more + 5 * 64); /* buffers begin on cache lines */
    tiny_program_free(program);
}

/* "auto" is the dtype of the best instruction set present, the last one in the list. */
static void test_kv_dtype(void **state) {
    (void)state;
    const struct cpu_isa *best = NULL;
    for (const struct cpu_isa *const *isa = cpu_isas; *isa; isa++)
        if ((*isa)->present()) best = *isa;
    assert_ptr_equal(cpu_isa_best(), best);
    assert_int_equal(backend_kv_dtype(&backend_cpu, NULL), backend_kv_dtype(&backend_cpu, best->name));
    assert_int_equal(backend_kv_dtype(&backend_cpu, NULL), strcmp(best->name, "avx512bf16") == 0 ? KV_BF16 : KV_F16);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows_come_back_out_of_panels),
        cmocka_unit_test(test_products),
        cmocka_unit_test(test_lowest_quant),
        cmocka_unit_test(test_quantised_activations),
        cmocka_unit_test(test_workers),
        cmocka_unit_test(test_weights_made_again),
        cmocka_unit_test(test_hadamard),
        cmocka_unit_test(test_q8_queries),
        cmocka_unit_test(test_memory_plan),
        cmocka_unit_test(test_kv_dtype),
    };
    return cmocka_run_group_tests_name("cpu", tests, NULL, NULL);
}
