/* Which slots each policy keeps, against a direct numpy transcription of its paper on recorded queries, keys and values (policies/make_policies.py), at one and three query
 * heads a KV head. Scores come from score_lane(), the choice from choose(). */
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
#include "kernels/program.h"
#include "policies/choose.h"
#include "tests/support/array_backend.h"
#include "tests/support/choosing.h"

#define LINE_MAX_BYTES (4u << 20)
#define LANES_MAX 16

struct golden {
    uint32_t layers, heads, group, d, n, window, sinks, recent, kernel, ramp, block, ahead, budget;
    double floor, recovery;
    float *q, *k, *v; /* [lanes][n][group][d], [lanes][n][d] */
    uint8_t *classes;
    uint32_t hit_counts[LANES_MAX];
    char *line;
    FILE *file;
    uint32_t n_policies;
};

static bool next_line(struct golden *g) {
    if (!fgets(g->line, LINE_MAX_BYTES, g->file)) return false;
    g->line[strcspn(g->line, "\n")] = '\0';
    return true;
}

static float *read_halves(struct golden *g, const char *name, size_t count) {
    assert_true(next_line(g));
    size_t skip = strlen(name) + 1;
    assert_int_equal(strncmp(g->line, name, skip - 1), 0);
    assert_int_equal(strlen(g->line), skip + 4 * count);
    float *values = check_calloc(count, sizeof *values);
    for (size_t i = 0; i < count; i++) {
        unsigned low, high;
        assert_int_equal(sscanf(g->line + skip + 4 * i, "%2x%2x", &low, &high), 2);
        values[i] = float_from_f16((uint16_t)(low | high << 8));
    }
    return values;
}

static bool read_case(struct golden *g) {
    if (!next_line(g)) return false;
    assert_int_equal(sscanf(g->line, "case %u %u %u %u %u %u %u %u %u %lf %lf %u %u %u %u", &g->layers, &g->heads, &g->group, &g->d, &g->n,
                            &g->window, &g->sinks, &g->recent, &g->kernel, &g->floor, &g->recovery, &g->ramp, &g->block, &g->ahead, &g->budget),
                     15);
    size_t lanes = (size_t)g->layers * g->heads;
    assert_true(lanes <= LANES_MAX);
    g->q = read_halves(g, "q", lanes * g->n * g->group * g->d);
    g->k = read_halves(g, "k", lanes * g->n * g->d);
    g->v = read_halves(g, "v", lanes * g->n * g->d);
    assert_true(next_line(g));
    g->classes = check_calloc(g->n, 1);
    for (uint32_t i = 0; i < g->n; i++) g->classes[i] = (uint8_t)(g->line[strlen("classes ") + i] - '0');
    assert_true(next_line(g));
    char *cursor = g->line + strlen("hit_counts");
    for (size_t l = 0; l < lanes; l++) g->hit_counts[l] = (uint32_t)strtoul(cursor, &cursor, 10);
    return true;
}

static struct program program_of(const struct golden *g, double *frequency) {
    for (uint32_t i = 0; i < g->d / 2; i++) frequency[i] = pow(10000, -2.0 * i / g->d);
    return (struct program){.n_layers = g->layers,
                            .n_heads = g->heads * g->group,
                            .n_kv_heads = g->heads,
                            .head_dim = g->d,
                            .attention_scale = 1 / sqrtf((float)g->d),
                            .rope_pairs = ROPE_PAIRS_ADJACENT,
                            .rope_dims = g->d,
                            .rope_frequency = frequency,
                            .rope_magnitude = 1};
}

static struct score_lane lane_of(const struct golden *g, uint32_t l, const int32_t *positions, uint32_t window) {
    return (struct score_lane){.n_slots = g->n,
                               .k = g->k + (size_t)l * g->n * g->d,
                               .v = g->v + (size_t)l * g->n * g->d,
                               .positions = positions,
                               .q = g->q + ((size_t)l * g->n + g->n - window) * g->group * g->d,
                               .n_window = window,
                               .last_position = (int32_t)g->n - 1,
                               .ahead = g->ahead};
}

/* What H2O's accumulators hold after every row. */
static uint64_t *accumulate(const struct golden *g, const struct program *program, uint32_t l, const int32_t *positions) {
    uint64_t *sums = check_calloc(g->n, sizeof *sums);
    float *row = check_calloc((size_t)g->n * g->group, sizeof *row);
    struct score_lane lane = lane_of(g, l, positions, g->n);
    score_lane(program, SCORE_ATTENTION, &lane, row);
    for (uint32_t h = 0; h < g->group; h++)
        for (uint32_t s = 0; s < g->n; s++) sums[s] += (uint64_t)llrint((double)row[(size_t)h * g->n + s] * SCORE_ACCUMULATED_ONE);
    free(row);
    return sums;
}

static void check_policy(struct golden *g, const char *name) {
    char plain[64];
    (void)snprintf(plain, sizeof plain, "%.*s", (int)strcspn(name, "+"), name);
    const struct policy *policy = policy_find(plain);
    assert_non_null(policy);
    uint32_t n_lanes = g->layers * g->heads;
    struct policy_options options;
    policy_options_default(&options);
    options.sink_tokens = g->sinks;
    options.recent_tokens = g->recent;
    options.window = policy->rows == POLICY_ROWS_LAST ? 1 : g->window;
    options.pooling = POOLING_MAX;
    options.pooling_kernel = g->kernel;
    options.floor = g->floor;
    options.recovery = g->recovery;
    options.ramp = g->ramp;
    options.value_aware = strchr(name, '+') != NULL;
    double frequency[64];
    struct program program = program_of(g, frequency);
    int32_t *positions = check_calloc(g->n, sizeof *positions); /* token i stands at position i, and has class i */
    for (uint32_t i = 0; i < g->n; i++) positions[i] = (int32_t)i;
    struct choose_lane lanes[LANES_MAX];
    struct array_lane arrays[LANES_MAX];
    for (uint32_t l = 0; l < n_lanes; l++) {
        struct score_lane lane = lane_of(g, l, positions, options.window);
        uint64_t *accumulated = policy->kernel == SCORE_ACCUMULATED ? accumulate(g, &program, l, positions) : NULL;
        lane.accumulated = accumulated;
        float *raw = check_calloc((size_t)g->n * g->group, sizeof *raw), *norms = check_calloc(g->n, sizeof *norms);
        score_lane(&program, policy->kernel, &lane, raw);
        score_lane(&program, SCORE_VALUE_NORM, &lane, norms);
        arrays[l] = (struct array_lane){.n_slots = g->n, .positions = positions, .raw = raw, .norms = norms};
        free(accumulated);
    }
    struct array_backend *array = array_backend_new(g->layers, g->heads, g->group, arrays);
    uint32_t *lists = check_calloc((size_t)n_lanes * g->n, sizeof *lists);
    struct choose_request request = {.policy = policy,
                                     .options = &options,
                                     .n_layers = g->layers,
                                     .n_kv_heads = g->heads,
                                     .block_tokens = g->block,
                                     .budget = g->budget,
                                     .n_window = options.window,
                                     .last_position = (int32_t)g->n - 1,
                                     .tokens = positions,
                                     .classes = g->classes,
                                     .block_ids = array->block_ids,
                                     .lane_first = array->lane_first,
                                     .lane_tokens = array->lane_tokens,
                                     .wants_lists = true,
                                     .lists = lists,
                                     .room = check_calloc(1, choose_room_bytes(g->n, (size_t)n_lanes * g->n))};
    void *scratch = check_calloc(1, choose_scratch_bytes(n_lanes));
    choose_all(&request, &array->backend, 0, lanes, scratch);
    for (uint32_t l = 0; l < n_lanes; l++) {
        assert_true(next_line(g));
        uint32_t k = 0;
        for (uint32_t s = 0; s < g->n; s++) {
            bool kept = k < lanes[l].n_keep && lanes[l].keep[k] == s;
            k += kept;
            if (kept != (g->line[s] == '1'))
                fail_msg("%s, group %u, lane %u: slot %u, the paper %s it", name, g->group, l, s, kept ? "drops" : "keeps");
        }
        if (policy->kernel == SCORE_ATTENTION && policy->rows == POLICY_ROWS_WINDOW) {
            struct score_lane lane = lane_of(g, l, positions, g->window);
            float *persistence = check_calloc((size_t)g->n * g->group, sizeof *persistence);
            double kept = 0, all = 0;
            score_lane(&program, SCORE_PERSISTENCE, &lane, persistence);
            choose_hits(&lanes[l], persistence, g->group, &kept, &all);
            assert_int_equal((uint32_t)all, g->hit_counts[l]);
            assert_true(kept > 0 && kept <= all);
            free(persistence);
        }
        free((void *)(uintptr_t)arrays[l].raw);
        free((void *)(uintptr_t)arrays[l].norms);
    }
    array_backend_free(array);
    free(lists);
    free(scratch);
    free(request.room);
    free(positions);
    g->n_policies++;
}

static void test_policies_keep_what_their_papers_keep(void **state) {
    (void)state;
    struct golden g = {.line = check_calloc(LINE_MAX_BYTES, 1), .file = fopen(KVASIR_SOURCE_DIR "/tests/golden/policies/policies.txt", "r")};
    assert_non_null(g.file);
    uint32_t cases = 0;
    while (read_case(&g)) {
        for (;;) {
            assert_true(next_line(&g));
            if (strcmp(g.line, "end") == 0) break;
            char name[64];
            assert_int_equal(sscanf(g.line, "policy %63s", name), 1);
            check_policy(&g, name);
        }
        free(g.q);
        free(g.k);
        free(g.v);
        free(g.classes);
        cases++;
    }
    assert_int_equal(cases, 2);
    assert_int_equal(g.n_policies, 2 * 13);
    (void)fclose(g.file);
    free(g.line);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_policies_keep_what_their_papers_keep)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
