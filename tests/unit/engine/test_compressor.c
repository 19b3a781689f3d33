/* Places of the compressor: how many choices may be under way, who must be alone, and that one that is dropped leaves nothing behind. Over a backend of arrays. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/check.h"
#include "base/random.h"
#include "engine/compressor.h"
#include "tests/support/array_backend.h"
#include "tests/support/kv_wish.h"

enum { LAYERS = 2, HEADS = 2, GROUP = 2, LANES = LAYERS * HEADS, SLOTS = 200 };

struct world {
    struct array_lane lanes[LANES];
    int32_t positions[SLOTS];
    float raw[LANES][GROUP * SLOTS], norms[SLOTS];
    struct array_backend *array;
    struct compressor *compressor;
    struct compressor_sequence sequence;
};

static struct world *world_new(void) {
    struct world *w = check_calloc(1, sizeof *w);
    struct random random = {5};
    for (int32_t i = 0; i < SLOTS; i++) w->positions[i] = i, w->norms[i] = 1;
    for (uint32_t l = 0; l < LANES; l++) {
        for (uint32_t i = 0; i < GROUP * SLOTS; i++) w->raw[l][i] = random_unit(random_next(&random));
        w->lanes[l] = (struct array_lane){.n_slots = SLOTS, .positions = w->positions, .raw = w->raw[l], .norms = w->norms};
    }
    w->array = array_backend_new(LAYERS, HEADS, GROUP, w->lanes);
    const struct compressor_limits limits = {.slots_max = SLOTS, .slots_total = LANES * SLOTS};
    w->compressor = compressor_new(&w->array->backend, &w->array->program, &limits);
    w->sequence = (struct compressor_sequence){.ring = 1,
                                               .n_computed = SLOTS,
                                               .n_window = 32,
                                               .tokens = w->positions,
                                               .block_ids = w->array->block_ids,
                                               .lane_first = w->array->lane_first,
                                               .lane_tokens = w->array->lane_tokens};
    return w;
}

static void world_free(struct world *w) {
    compressor_free(w->compressor);
    array_backend_free(w->array);
    free(w);
}

static void test_as_many_as_there_are_places(void **state) {
    (void)state;
    struct world *w = world_new();
    struct kv_plan plans[RANK_PLACES_MAX];
    struct compressor_result result;
    uint64_t alone[RANK_PLACES_MAX];
    uint32_t places[RANK_PLACES_MAX];
    static const char *const policies_taken[] = {"kv_compress", "snapkv", "ada_snapkv", "random"};
    for (uint32_t i = 0; i < RANK_PLACES_MAX; i++) {
        plans[i] = kv_wish_granted(NULL, policies_taken[i % 4], 60 + 12 * i, 0);
        assert_true(compressor_choose(w->compressor, &plans[i], &w->sequence, false, &result));
        alone[i] = result.n_keep;
    }
    for (uint32_t i = 0; i < RANK_PLACES_MAX; i++) places[i] = compressor_begin(w->compressor, &plans[i], &w->sequence, false);
    for (uint32_t i = 0; i < RANK_PLACES_MAX; i++)
        for (uint32_t j = 0; j < i; j++) assert_true(places[i] < RANK_PLACES_MAX && places[i] != places[j]);
    assert_int_equal(compressor_begin(w->compressor, &plans[0], &w->sequence, false), COMPRESSOR_PLACE_NONE);
    compressor_drop(w->compressor, places[3]); /* in the midst of it */
    places[3] = compressor_begin(w->compressor, &plans[3], &w->sequence, false);
    compressor_run(w->compressor);
    for (uint32_t i = RANK_PLACES_MAX; i-- > 0;) {
        assert_true(compressor_take(w->compressor, places[i], &result));
        assert_int_equal(result.place, places[i]);
        assert_int_equal(result.n_slots, LANES * SLOTS);
        assert_int_equal(result.n_keep, alone[i]);
        assert_null(result.lanes[0].keep);
    }
    world_free(w);
}

/* Lists and the ladder's scores have room for one; the others do without. */
static void test_one_has_the_room(void **state) {
    (void)state;
    struct world *w = world_new();
    const struct kv_plan plain = kv_wish_granted(NULL, "snapkv", 64, 0), ladder = kv_wish_granted(NULL, "fastgen", 100, 0);
    struct compressor_result result;
    assert_false(compressor_needs_room(w->compressor, &plain, false));
    assert_true(compressor_needs_room(w->compressor, &plain, true));
    assert_true(compressor_needs_room(w->compressor, &ladder, false));
    const uint32_t measured = compressor_begin(w->compressor, &plain, &w->sequence, true),
                   beside = compressor_begin(w->compressor, &plain, &w->sequence, false);
    assert_true(measured < RANK_PLACES_MAX && beside < RANK_PLACES_MAX);
    assert_int_equal(compressor_begin(w->compressor, &ladder, &w->sequence, false), COMPRESSOR_PLACE_NONE);
    assert_int_equal(compressor_begin(w->compressor, &plain, &w->sequence, true), COMPRESSOR_PLACE_NONE);
    compressor_drop(w->compressor, beside); /* the room is still taken */
    assert_int_equal(compressor_begin(w->compressor, &ladder, &w->sequence, false), COMPRESSOR_PLACE_NONE);
    compressor_run(w->compressor);
    assert_true(compressor_take(w->compressor, measured, &result));
    assert_non_null(result.lanes[0].keep);
    assert_true(result.hits && result.hits_all > 0 && result.hits_kept > 0);
    const uint32_t last = compressor_begin(w->compressor, &ladder, &w->sequence, false);
    assert_true(last < RANK_PLACES_MAX);
    compressor_drop(w->compressor, last);
    assert_true(compressor_choose(w->compressor, &plain, &w->sequence, true, &result)); /* and free again */
    world_free(w);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_as_many_as_there_are_places),
        cmocka_unit_test(test_one_has_the_room),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
