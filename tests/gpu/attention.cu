/* Attention on a device against a plain loop in double, and against itself: a row's result is the same bits whichever kernel, tile, cut and neighbours it had.
 *   attention [--check] [--bench] [--only TEXT] [--stages N]     without either: both
 * --check-few: small heads alone, and a size of KIVI's, for a device that is slow (tests/host_device).
 * --only TEXT: sizes whose names begin with it.
 * --stages: pieces of the decode kernel's ring in --bench, in place of what attention_open chose.
 * Exit status 1 if a result is wrong. Needs nothing but kernels/cuda/attention*.cu, close.h and base/. */
#include "tests/gpu/attention_bench.cuh"
#include "tests/gpu/attention_codes.cuh"
#include "tests/gpu/attention_world.cuh"

static unsigned failures;
static bool few;

enum { LAYERS = 2, LAYER = 1, HEADS = 2 };

struct check {
    struct world world;
    struct geometry geometry;
    struct entry *entries; /* one a sequence, with its own rows */
    uint32_t n, rows;
    uint8_t *kv;
    float *scales;
    struct checked_codes codes;
    uint16_t *q;
    uint16_t *whole, *other; /* results: [rows][n_q] */
    char name[96];
};

/* Widths that end before, at and after blocks, pieces and splits; then with several rows. */
static const struct {
    uint32_t before, n_rows;
    bool ragged; /* the other head's lane is of another length */
} sequences_to_check[] = {
    {0, 1, false},  {1, 1, false},   {31, 1, false},  {32, 1, false},  {33, 1, true},   {62, 1, false},  {63, 1, false},
    {64, 1, false}, {127, 1, false}, {254, 1, false}, {255, 1, false}, {256, 1, false}, {257, 1, true},  {511, 1, false},
    {700, 1, true}, {1100, 1, true}, {0, 2, false},   {255, 2, true},  {62, 4, false},  {510, 3, true},  {1000, 16, true},
    {0, 40, false}, {31, 33, true},  {20, 97, false}, {250, 20, true}, {400, 5, true},  {500, 70, true}, {2400, 4, false},
};
enum { N_CHECKED = sizeof sequences_to_check / sizeof *sequences_to_check, LONG_LANE = N_CHECKED - 1, LANE_BLOCKS = 80 };

static float unit(struct random *random) { return random_unit(random_next(random)) * 2 - 1; }

/* About normal, standard deviation 1. */
static float normal(struct random *random) { return (unit(random) + unit(random) + unit(random)); }

static uint32_t block_of(const struct check *c, uint32_t table, uint32_t lane, uint32_t slot) {
    const struct cuda *cuda = &c->world.cuda;
    return c->world.tables[((size_t)table * cuda->n_lanes + lane) * cuda->lane_blocks + slot / BLOCK_TOKENS];
}
static size_t block_bytes_of(const struct check *c) {
    return c->world.cuda.pool.bits ? c->world.cuda.pool.raw_bytes : c->world.cuda.pool.block_bytes;
} /* as c->kv has them */
static size_t element_of(const struct check *c, uint32_t block, uint32_t v, uint32_t slot) {
    return block * block_bytes_of(c) + ((size_t)v * BLOCK_TOKENS + slot % BLOCK_TOKENS) * c->geometry.d * (c->geometry.dtype == KV_Q8 ? 1 : 2);
}

static void write_slot(struct check *c, uint32_t table, uint32_t lane, uint32_t slot, struct random *random) {
    uint32_t block = block_of(c, table, lane, slot);
    for (uint32_t v = 0; v < 2; v++) {
        uint8_t *at = c->kv + element_of(c, block, v, slot);
        float size = v ? 1 : 2; /* keys: scores that differ by some units */
        if (c->geometry.dtype == KV_Q8)
            c->scales[((size_t)block * 2 + v) * BLOCK_TOKENS + slot % BLOCK_TOKENS] = size * (0.5f + random_unit(random_next(random))) * 3 / 127;
        for (uint32_t i = 0; i < c->geometry.d; i++) {
            float x = normal(random) * size;
            uint16_t half = c->geometry.dtype == KV_BF16 ? bf16_from_float(x) : f16_from_float(x);
            int8_t code = (int8_t)((int)random_below(random, 255) - 127);
            if (c->geometry.dtype == KV_Q8)
                memcpy(at + i, &code, 1);
            else
                memcpy(at + 2 * i, &half, 2);
        }
    }
}

/* As row `row` of a sequence reads it. */
static double kv_at(const struct check *c, const struct entry *e, uint32_t row, uint32_t lane, uint32_t v, uint32_t slot, uint32_t i) {
    const uint32_t *blocks = &c->world.tables[((size_t)e->table * c->world.cuda.n_lanes + lane) * c->world.cuda.lane_blocks],
                   block = blocks[slot / BLOCK_TOKENS];
    if (c->world.cuda.pool.bits && row_reads_codes(&c->codes, blocks, slot / BLOCK_TOKENS, e->before[lane], row))
        return c->codes.numbers[(((size_t)block * 2 + v) * BLOCK_TOKENS + slot % BLOCK_TOKENS) * c->geometry.d + i];
    const uint8_t *at = c->kv + element_of(c, block, v, slot);
    if (c->geometry.dtype == KV_Q8) return (double)(int8_t)at[i] * (double)c->scales[((size_t)block * 2 + v) * BLOCK_TOKENS + slot % BLOCK_TOKENS];
    uint16_t half;
    memcpy(&half, at + 2 * i, 2);
    return c->geometry.dtype == KV_BF16 ? float_from_bf16(half) : float_from_f16(half);
}

static void check_open(struct check *c, const struct geometry *geometry, struct random *random) {
    memset(c, 0, sizeof *c);
    c->geometry = *geometry;
    c->geometry.n_layers = LAYERS;
    c->geometry.n_kv_heads = HEADS;
    c->geometry.max_sequences = N_CHECKED;
    c->geometry.lane_blocks = LANE_BLOCKS;
    c->geometry.accumulators = true;
    for (uint32_t i = 0; i < N_CHECKED; i++) c->rows += sequences_to_check[i].n_rows;
    c->geometry.max_rows = c->rows;
    name_of(geometry, c->name, sizeof c->name);
    world_open(&c->world, &c->geometry, random);
    struct cuda *cuda = &c->world.cuda;
    size_t kv_bytes = cuda->pool.n_blocks * block_bytes_of(c), scales = (size_t)cuda->pool.n_blocks * 2 * BLOCK_TOKENS;
    c->kv = (uint8_t *)check_calloc(kv_bytes, 1);
    memset(c->kv, 0xff, kv_bytes); /* NaN in both 16-bit types: what is not written must not matter */
    c->scales = (float *)check_calloc(scales, sizeof *c->scales);
    memset(c->scales, 0xff, scales * sizeof *c->scales);
    if (cuda->pool.bits) {
        c->codes.positions = (int32_t *)check_calloc((size_t)cuda->pool.n_blocks * BLOCK_TOKENS, sizeof(int32_t));
        c->codes.numbers = (float *)check_calloc(kv_bytes / sizeof(uint16_t), sizeof(float));
        c->codes.full = (uint32_t *)check_calloc(cuda->pool.n_blocks, sizeof(uint32_t));
    }
    int32_t *row_positions = (int32_t *)check_calloc(c->rows, sizeof *row_positions);
    c->entries = (struct entry *)check_calloc(N_CHECKED, sizeof *c->entries);
    c->n = N_CHECKED;
    for (uint32_t i = 0, row = 0; i < N_CHECKED; i++) {
        uint32_t *before = (uint32_t *)check_calloc(cuda->n_lanes, sizeof *before), n_rows = sequences_to_check[i].n_rows;
        for (uint32_t lane = 0; lane < cuda->n_lanes; lane++) {
            before[lane] = sequences_to_check[i].before;
            if (sequences_to_check[i].ragged && lane % HEADS > 0) before[lane] = random_below(random, LANE_BLOCKS * BLOCK_TOKENS - n_rows);
            if (lane / HEADS != LAYER) continue;
            for (uint32_t slot = 0; slot < before[lane] + n_rows; slot++) write_slot(c, i, lane, slot, random);
            if (cuda->pool.bits)
                place_lane(&c->codes, &c->world.tables[((size_t)i * cuda->n_lanes + lane) * cuda->lane_blocks], before[lane], before[lane] + n_rows,
                           i % 2, random);
        }
        for (uint32_t r = 0; r < n_rows; r++) row_positions[row + r] = NEXT_POSITION + (int32_t)r;
        c->entries[i] = {i, row, n_rows, before, n_rows * geometry->group > TILE_QUERIES, false};
        row += n_rows;
    }
    size_t n_q = (size_t)c->rows * cuda->n_q;
    c->q = (uint16_t *)check_calloc(n_q, sizeof *c->q);
    for (size_t i = 0; i < n_q; i++) {
        float x = normal(random);
        c->q[i] = geometry->dtype == KV_BF16 ? bf16_from_float(x) : f16_from_float(x);
    }
    uint32_t wrong_codes = cuda->pool.bits ? make_codes(&c->world, &c->codes, c->kv) : 0;
    if (wrong_codes > 0) printf("WRONG %s: %u of the codes of %u blocks\n", c->name, wrong_codes, c->codes.n_full), failures++;
    if (cuda->pool.bits == 0) CUDA_CHECK(cudaMemcpy(cuda->pool.kv, c->kv, kv_bytes, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(cuda->dev.positions, row_positions, c->rows * sizeof *row_positions, cudaMemcpyHostToDevice));
    free(row_positions);
    if (cuda->pool.scales) CUDA_CHECK(cudaMemcpy(cuda->pool.scales, c->scales, scales * sizeof *c->scales, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(cuda->q, c->q, n_q * sizeof *c->q, cudaMemcpyHostToDevice));
    c->whole = (uint16_t *)check_calloc(n_q, sizeof *c->whole);
    c->other = (uint16_t *)check_calloc(n_q, sizeof *c->other);
}

static void check_close(struct check *c) {
    world_close(&c->world);
    for (uint32_t i = 0; i < c->n; i++) free((void *)c->entries[i].before);
    free(c->entries);
    free(c->kv);
    free(c->scales);
    free(c->codes.positions);
    free(c->codes.numbers);
    free(c->codes.full);
    free(c->q);
    free(c->whole);
    free(c->other);
}

static void run(struct check *c, const struct entry *entries, uint32_t n, uint16_t *results) {
    struct cuda *cuda = &c->world.cuda;
    size_t a = (size_t)c->rows * cuda->n_q * 2, sums = (size_t)c->rows * cuda->program->n_heads * sizeof(float);
    CUDA_CHECK(cudaMemset(cuda->a, 0xff, a));
    CUDA_CHECK(cudaMemset(cuda->row_max, 0xff, sums));
    CUDA_CHECK(cudaMemset(cuda->row_sum, 0xff, sums));
    struct step_shape shape = stage(&c->world, entries, n);
    shape.decode = cuda->limits.max_sequences; /* as a graph that is shared has it: more than there is */
    shape.tiles = shape.tiles + 2 < cuda->max_tiles ? shape.tiles + 2 : cuda->max_tiles;
    attention_plan(cuda, &shape);
    attention_run(cuda, LAYER, &shape);
    CUDA_CHECK(cudaStreamSynchronize(cuda->stream));
    CUDA_CHECK(cudaMemcpy(results, cuda->a, a, cudaMemcpyDeviceToHost));
}

/* The slots a query sees, and p of each. */
static uint32_t plain_softmax(const struct check *c, const struct entry *e, uint32_t row, uint32_t head, double *p) {
    const struct cuda *cuda = &c->world.cuda;
    uint32_t d = c->geometry.d, lane = LAYER * HEADS + head / c->geometry.group, visible = e->before[lane] + row + 1;
    const uint16_t *q = c->q + ((size_t)e->row + row) * cuda->n_q + (size_t)head * d;
    double max = -INFINITY, sum = 0;
    for (uint32_t s = 0; s < visible; s++) {
        double dot = 0;
        for (uint32_t i = 0; i < d; i++)
            dot += (double)(c->geometry.dtype == KV_BF16 ? float_from_bf16(q[i]) : float_from_f16(q[i])) * kv_at(c, e, row, lane, 0, s, i);
        p[s] = dot * (double)cuda->program->attention_scale;
        max = p[s] > max ? p[s] : max;
    }
    for (uint32_t s = 0; s < visible; s++) sum += p[s] = exp(p[s] - max);
    for (uint32_t s = 0; s < visible; s++) p[s] /= sum;
    return visible;
}

static void wrong(const struct check *c, const char *what, const struct entry *e, uint32_t row, uint32_t head, double expected, double got) {
    if (failures++ < 20)
        printf("WRONG %s, %s: table %u before %u rows %u: row %u head %u: expected %.6g, got %.6g\n", c->name, what, e->table,
               e->before[LAYER * HEADS + head / c->geometry.group], e->n_rows, row, head, expected, got);
}

/* p is rounded to 11 or 8 bits, and weights average that out; the result to 11. */
static double tolerance(const struct check *c) { return c->geometry.dtype == KV_BF16 ? 1e-2 : 2.5e-3; }

static double check_against_double(struct check *c) {
    double p[LANE_BLOCKS * BLOCK_TOKENS], worst = 0;
    uint32_t d = c->geometry.d, n_heads = c->geometry.group * HEADS;
    for (const struct entry *e = c->entries; e < c->entries + c->n; e++) {
        for (uint32_t row = 0; row<e->n_rows; row += e->n_rows> 8 && row + 4 < e->n_rows ? 3 : 1) {
            for (uint32_t head = 0; head < n_heads; head++) {
                uint32_t lane = LAYER * HEADS + head / c->geometry.group, visible = plain_softmax(c, e, row, head, p);
                for (uint32_t i = 0; i < d; i++) {
                    double expected = 0;
                    for (uint32_t s = 0; s < visible; s++) expected += p[s] * kv_at(c, e, row, lane, 1, s, i);
                    double got = float_from_f16(c->whole[((size_t)e->row + row) * c->world.cuda.n_q + (size_t)head * d + i]),
                           off = fabs(got - expected) / (1 + fabs(expected));
                    if (!(off <= tolerance(c))) { /* not: NaN */
                        wrong(c, "result", e, row, head, expected, got);
                        break;
                    }
                    worst = off > worst ? off : worst;
                }
            }
        }
    }
    return worst;
}

/* The rows of `entries` in both results. */
static void compare_bits(const struct check *c, const char *what, const struct entry *entries, uint32_t n) {
    uint32_t d = c->geometry.d, n_heads = c->geometry.group * HEADS;
    for (const struct entry *e = entries; e < entries + n; e++) {
        for (uint32_t row = 0; row < e->n_rows; row++) {
            for (uint32_t head = 0; head < n_heads; head++) {
                size_t at = ((size_t)e->row + row) * n_heads + head;
                for (uint32_t i = 0; i < d; i++) {
                    uint16_t a = c->whole[at * d + i], b = c->other[at * d + i];
                    if (a == b) continue;
                    wrong(c, what, e, row, head, float_from_f16(a), float_from_f16(b));
                    break;
                }
            }
        }
    }
}

/* Rows [first, first + n_rows) of a sequence. The lengths are in `before` [n_lanes]. */
static struct entry part_of(const struct check *c, const struct entry *e, uint32_t first, uint32_t n_rows, uint32_t *before) {
    for (uint32_t lane = 0; lane < c->world.cuda.n_lanes; lane++) before[lane] = e->before[lane] + first;
    return {e->table, e->row + first, n_rows, before, n_rows * c->geometry.group > TILE_QUERIES, e->accumulate};
}

static void check_row_contract(struct check *c) {
    struct entry changed[N_CHECKED];
    uint32_t before[LAYERS * HEADS], group = c->geometry.group;
    for (uint32_t i = 0; i < c->n; i++) {
        changed[i] = c->entries[c->n - 1 - i];
        changed[i].prefill = true;
    }
    run(c, changed, c->n, c->other);
    compare_bits(c, "all as prefill, in other order", changed, c->n);
    for (uint32_t i = 0; i < c->n; i++) {
        run(c, &c->entries[i], 1, c->other);
        compare_bits(c, "alone", &c->entries[i], 1);
        uint32_t n_rows = c->entries[i].n_rows;
        for (uint32_t row = 0; n_rows > 1 && group <= TILE_QUERIES && row<n_rows; row += n_rows> 8 ? 7 : 1) {
            struct entry one = part_of(c, &c->entries[i], row, 1, before);
            run(c, &one, 1, c->other);
            compare_bits(c, "a row of several, alone", &one, 1);
        }
        if (n_rows > 8) { /* tiles that begin elsewhere */
            struct entry rest = part_of(c, &c->entries[i], 5, n_rows - 5, before);
            run(c, &rest, 1, c->other);
            compare_bits(c, "without its first rows", &rest, 1);
        }
    }
}

static void copy_cuts(const struct cuda *cuda, struct attention_cut *cuts) {
    CUDA_CHECK(cudaMemcpy(cuts, cuda->attention->cuts + (size_t)LAYER * (CTAS_MAX + 1), (CTAS_MAX + 1) * sizeof *cuts, cudaMemcpyDeviceToHost));
}

/* Other numbers of CTAs cut lanes elsewhere; too little room for partials moves the cuts. */
static void check_cuts(struct check *c) {
    struct attention_device *device = c->world.cuda.attention;
    uint32_t ctas = device->ctas, room = device->partial_queries;
    static struct attention_cut cuts[2][CTAS_MAX + 1];
    struct entry decode[N_CHECKED];
    uint32_t n = 0;
    for (uint32_t i = 0; i < c->n; i++)
        if (!c->entries[i].prefill) decode[n++] = c->entries[i];
    if (n == 0) return;
    static const uint32_t fewer[] = {1, 2, 3, 5, 16, 31};
    for (size_t i = 0; i < sizeof fewer / sizeof *fewer; i++) {
        device->ctas = fewer[i] < ctas ? fewer[i] : ctas;
        run(c, decode, n, c->other);
        compare_bits(c, "with few CTAs", decode, n);
    }
    /* One long lane and its neighbour, of as many queries as a tile has: three CTAs would leave more than their share of partials. */
    const struct entry *one = &c->entries[LONG_LANE];
    if (!one->prefill && one->n_rows * c->geometry.group == TILE_QUERIES) {
        device->ctas = 3;
        run(c, one, 1, c->other);
        copy_cuts(&c->world.cuda, cuts[0]);
        device->partial_queries = device->ctas * 2 * TILE_QUERIES;
        run(c, one, 1, c->other);
        copy_cuts(&c->world.cuda, cuts[1]);
        compare_bits(c, "with little room for partials", one, 1);
        if (memcmp(cuts[0], cuts[1], (device->ctas + 1) * sizeof *cuts[0]) == 0) {
            printf("WRONG %s: little room for partials did not move a cut\n", c->name);
            failures++;
        }
        device->partial_queries = room;
    }
    device->ctas = ctas;
}

static uint64_t *read_accumulated(const struct check *c) {
    size_t slots = (size_t)c->world.cuda.pool.n_blocks * BLOCK_TOKENS;
    uint64_t *sums = (uint64_t *)check_calloc(slots, sizeof *sums);
    CUDA_CHECK(cudaMemcpy(sums, c->world.cuda.pool.accumulated, slots * sizeof *sums, cudaMemcpyDeviceToHost));
    return sums;
}

/* What the slots of two sequences get, one decoded or short and one long, against double and in chunks. The first third of the sequences does not accumulate and stays as it was. */
static void check_accumulation(struct check *c) {
    struct cuda *cuda = &c->world.cuda;
    size_t slots = (size_t)cuda->pool.n_blocks * BLOCK_TOKENS;
    for (uint32_t i = 0; i < c->n; i++) c->entries[i].accumulate = i >= c->n / 3;
    CUDA_CHECK(cudaMemset(cuda->pool.accumulated, 0, slots * sizeof(uint64_t)));
    run(c, c->entries, c->n, c->other);
    compare_bits(c, "while others accumulate", c->entries, c->n);
    uint64_t *whole = read_accumulated(c);

    double *expected = (double *)check_calloc(slots, sizeof *expected), p[LANE_BLOCKS * BLOCK_TOKENS];
    for (const struct entry *e = c->entries + c->n / 3; e < c->entries + c->n; e++) {
        for (uint32_t row = 0; row < e->n_rows; row++) {
            for (uint32_t head = 0; head < c->geometry.group * HEADS; head++) {
                uint32_t lane = LAYER * HEADS + head / c->geometry.group, visible = plain_softmax(c, e, row, head, p);
                for (uint32_t s = 0; s < visible; s++) expected[(size_t)block_of(c, e->table, lane, s) * BLOCK_TOKENS + s % BLOCK_TOKENS] += p[s];
            }
        }
    }
    for (size_t i = 0; i < slots; i++) {
        double got = (double)whole[i] / SCORE_ACCUMULATED_ONE;
        if (fabs(got - expected[i]) > 5e-3 * (expected[i] + 1e-3) && failures++ < 20)
            printf("WRONG %s, accumulated: place %zu: expected %.6g, got %.6g\n", c->name, i, expected[i], got);
    }

    CUDA_CHECK(cudaMemset(cuda->pool.accumulated, 0, slots * sizeof(uint64_t)));
    uint32_t before[LAYERS * HEADS];
    for (uint32_t i = 0; i < c->n; i++) {
        for (uint32_t row = 0, n_rows; row < c->entries[i].n_rows; row += n_rows) {
            n_rows = c->entries[i].n_rows - row < 11 ? c->entries[i].n_rows - row : 11;
            struct entry chunk = part_of(c, &c->entries[i], row, n_rows, before);
            run(c, &chunk, 1, c->other);
        }
    }
    uint64_t *chunks = read_accumulated(c);
    for (size_t i = 0; i < slots; i++)
        if (whole[i] != chunks[i] && failures++ < 20)
            printf("WRONG %s, accumulated in chunks: place %zu: %llx, not %llx\n", c->name, i, (unsigned long long)chunks[i],
                   (unsigned long long)whole[i]);
    for (uint32_t i = 0; i < c->n; i++) c->entries[i].accumulate = false;
    free(whole);
    free(chunks);
    free(expected);
}

static void check_one(const struct geometry *geometry, struct random *random) {
    struct check *c = (struct check *)check_calloc(1, sizeof *c);
    unsigned before = failures;
    check_open(c, geometry, random);
    run(c, c->entries, c->n, c->whole);
    double worst = check_against_double(c);
    check_row_contract(c);
    if (geometry->group <= TILE_QUERIES) check_cuts(c);
    check_accumulation(c);
    printf("%-28s %u stages, %u CTAs: worst difference %.2e of %.2e%s\n", c->name, c->world.cuda.attention->stages, c->world.cuda.attention->ctas,
           worst, tolerance(c), failures > before ? "  WRONG" : "");
    fflush(stdout);
    check_close(c);
    free(c);
}

/* What the row contract rests on (attention.h): places in a product and zeros do not matter. A warp each; out[warp][4 a thread]. */
template <int KV> static __global__ void probe(const uint16_t *rows, const uint16_t *columns, const float *start, float *out) {
    uint32_t lane = threadIdx.x, a[4], zero[4] = {0, 0, 0, 0}, shift = blockIdx.x;
    /* Row r of this warp's product is row (r + shift) % 16 of the input, column n is (n + shift) % 8: each element is there once a warp, elsewhere. */
    for (int i = 0; i < 4; i++) a[i] = *(const uint32_t *)(rows + ((lane / 4 + i % 2 * 8 + shift) % 16) * 16 + lane % 4 * 2 + i / 2 * 8);
    const uint16_t *column = columns + (lane / 4 + shift) % 8 * 16 + lane % 4 * 2;
    uint32_t b0 = *(const uint32_t *)column, b1 = *(const uint32_t *)(column + 8);
    float c[4], unchanged[4];
    for (int i = 0; i < 4; i++) c[i] = unchanged[i] = start[(lane / 4 + i / 2 * 8 + shift) % 16 * 8 + (lane % 4 * 2 + i % 2 + shift) % 8];
    multiply<KV>(c, a, b0, b1);
    multiply<KV>(unchanged, zero, b0, b1);
    for (int i = 0; i < 4; i++) {
        uint32_t at = (lane / 4 + i / 2 * 8 + shift) % 16 * 8 + (lane % 4 * 2 + i % 2 + shift) % 8;
        out[(size_t)(2 * blockIdx.x) * 128 + at] = c[i];
        out[(size_t)(2 * blockIdx.x + 1) * 128 + at] = unchanged[i];
    }
}

template <int KV> static void check_probe(const char *name, struct random *random) {
    enum { SHIFTS = 16 };
    uint16_t rows[16 * 16], columns[8 * 16];
    float start[128], out[SHIFTS][2][128];
    void *device[4];
    size_t sizes[4] = {sizeof rows, sizeof columns, sizeof start, sizeof out};
    for (int i = 0; i < 4; i++) CUDA_CHECK(cudaMalloc(&device[i], sizes[i]));
    unsigned before = failures;
    for (int round = 0; round < 50; round++) {
        for (int i = 0; i < 256; i++) rows[i] = KV == KV_BF16 ? bf16_from_float(normal(random)) : f16_from_float(normal(random));
        for (int i = 0; i < 128; i++) {
            float x = normal(random) * (i % 3 ? 1 : 10000); /* large ones, beside accumulators far below */
            columns[i] = KV == KV_BF16 ? bf16_from_float(x) : f16_from_float(x);
            start[i] = ldexpf(normal(random), -(int)random_below(random, 60));
        }
        CUDA_CHECK(cudaMemcpy(device[0], rows, sizeof rows, cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaMemcpy(device[1], columns, sizeof columns, cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaMemcpy(device[2], start, sizeof start, cudaMemcpyHostToDevice));
        launch(probe<KV>, SHIFTS, 32, 0, 0, (uint16_t *)device[0], (uint16_t *)device[1], (float *)device[2], (float *)device[3]);
        CUDA_CHECK(cudaGetLastError());
        CUDA_CHECK(cudaMemcpy(out, device[3], sizeof out, cudaMemcpyDeviceToHost));
        for (int shift = 0; shift < SHIFTS; shift++) {
            for (int i = 0; i < 128; i++) {
                if (float_bits(out[shift][0][i]) != float_bits(out[0][0][i]) && failures++ < 20)
                    printf("WRONG %s product: element %d at shift %d: %.9g, not %.9g\n", name, i, shift, (double)out[shift][0][i],
                           (double)out[0][0][i]);
                if (float_bits(out[shift][1][i]) != float_bits(start[i]) && failures++ < 20)
                    printf("WRONG %s product with zeros: element %d: %.9g became %.9g\n", name, i, (double)start[i], (double)out[shift][1][i]);
            }
        }
    }
    printf("%-28s products: places and zeros do not matter%s\n", name, failures > before ? ": WRONG" : "");
    for (int i = 0; i < 4; i++) CUDA_CHECK(cudaFree(device[i]));
}

static void check_all(void) {
    struct random random = {20};
    check_probe<KV_F16>("f16", &random);
    check_probe<KV_BF16>("bf16", &random);
    static const struct {
        uint32_t d, group;
    } sizes[] = {{128, 4}, {64, 3}, {128, 1}, {64, 8}, {16, 4}, {32, 2}, {80, 4}, {20, 1}, {96, 16}, {128, 20}, {72, 2}, {120, 4}};
    static const enum kv_dtype dtypes[] = {KV_F16, KV_BF16, KV_Q8, KV_KIVI4, KV_KIVI2};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        for (size_t j = 0; j < sizeof dtypes / sizeof *dtypes; j++) {
            const bool kivi_few = dtypes[j] == KV_KIVI4 && sizes[i].d == 64 && sizes[i].group == 3; /* the smallest whose pieces are whole codes */
            if (few && !kivi_few && (sizes[i].d > 20 || sizes[i].d % 8 != j * 2)) continue;
            struct geometry geometry = {};
            geometry.dtype = dtypes[j];
            geometry.d = sizes[i].d;
            geometry.group = sizes[i].group;
            if (kivi_bits(geometry.dtype) && geometry.d % 8 != 0) continue; /* supported.cu */
            if (!is_wanted(&geometry)) continue;
            check_one(&geometry, &random);
        }
    }
}

int main(int argc, char **argv) {
    bool check = false, bench = false;
    uint32_t stages = 0;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--check") == 0)
            check = true;
        else if (strcmp(argv[i], "--check-few") == 0)
            check = few = true;
        else if (strcmp(argv[i], "--bench") == 0)
            bench = true;
        else if (strcmp(argv[i], "--only") == 0 && i + 1 < argc)
            only = argv[++i];
        else if (strcmp(argv[i], "--stages") == 0 && i + 1 < argc && atoi(argv[i + 1]) >= 2 && atoi(argv[i + 1]) <= 4)
            stages = (uint32_t)atoi(argv[++i]);
        else {
            fprintf(stderr, "usage: %s [--check | --check-few] [--bench] [--only TEXT] [--stages 2..4]\n", argv[0]);
            return 2;
        }
    }
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("SKIP: no CUDA device\n");
        return 77;
    }
    if (check || !bench) check_all();
    if (failures == 0 && (bench || !check)) bench_all(stages);
    if (failures) printf("%u WRONG\n", failures);
    return failures ? 1 : 0;
}
