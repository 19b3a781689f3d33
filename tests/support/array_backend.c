/* See array_backend.h. */
#include "tests/support/array_backend.h"

#include <stdlib.h>
#include <string.h>

#include "base/check.h"

enum { LANE_BLOCKS = 1 << 16 }; /* block j of lane l has the id l * LANE_BLOCKS + j */

static struct array_backend *of(struct backend *backend) { return (struct array_backend *)(void *)backend; }

static void array_score(struct backend *backend, const struct score_request *request, float *scores) {
    const struct array_backend *array = of(backend);
    const uint32_t group = array->program.n_heads / array->program.n_kv_heads;
    for (uint32_t l = request->first_lane; l < request->first_lane + request->n_lanes; l++) {
        const struct array_lane *lane = &array->lanes[l];
        const float *from = request->kind == SCORE_VALUE_NORM ? lane->norms : lane->raw;
        memcpy(scores + request->offset[l], from, (score_per_query_head(request->kind) ? group : 1) * (size_t)lane->n_slots * sizeof *scores);
    }
}

static void array_read_positions(struct backend *backend, uint32_t count, const uint32_t *blocks, int32_t *positions) {
    const struct array_backend *array = of(backend);
    for (uint32_t i = 0; i < count; i++)
        for (uint32_t slot = 0; slot < BLOCK_TOKENS; slot++) {
            const struct array_lane *lane = &array->lanes[blocks[i] / LANE_BLOCKS];
            uint32_t at = blocks[i] % LANE_BLOCKS * BLOCK_TOKENS + slot;
            positions[i * BLOCK_TOKENS + slot] = at < lane->n_slots ? lane->positions[at] : INT32_MIN; /* undefined past a lane's length */
        }
}

static const struct backend_ops array_ops = {.name = "arrays",
                                             .score = array_score,
                                             .read_positions = array_read_positions,
                                             .rank = host_rank,
                                             .cut = host_cut,
                                             .keep = host_keep,
                                             .settle = host_settle};

struct array_backend *array_backend_new(uint32_t n_layers, uint32_t n_kv_heads, uint32_t group, const struct array_lane *lanes) {
    struct array_backend *array = check_calloc(1, sizeof *array);
    uint32_t n_lanes = n_layers * n_kv_heads, most = 1, n_ids = 0;
    *array = (struct array_backend){.backend = {.ops = &array_ops},
                                    .program = {.n_layers = n_layers, .n_kv_heads = n_kv_heads, .n_heads = n_kv_heads * group},
                                    .lanes = lanes,
                                    .lane_first = check_calloc(n_lanes, sizeof(uint32_t)),
                                    .lane_tokens = check_calloc(n_lanes, sizeof(uint32_t))};
    for (uint32_t l = 0; l < n_lanes; l++) {
        array->lane_first[l] = n_ids;
        array->lane_tokens[l] = lanes[l].n_slots;
        n_ids += (lanes[l].n_slots + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
        most = lanes[l].n_slots > most ? lanes[l].n_slots : most;
    }
    CHECK(n_lanes < UINT32_MAX / LANE_BLOCKS && most <= (uint32_t)LANE_BLOCKS * BLOCK_TOKENS);
    array->block_ids = check_calloc(n_ids + 1, sizeof(uint32_t));
    for (uint32_t l = 0; l < n_lanes; l++)
        for (uint32_t j = 0; j * BLOCK_TOKENS < lanes[l].n_slots; j++) array->block_ids[array->lane_first[l] + j] = l * LANE_BLOCKS + j;
    array->backend.ranking = ranking_new(&array->program, most, RANK_PLACES_MAX);
    array->backend.rank_places = RANK_PLACES_MAX;
    return array;
}

void array_backend_free(struct array_backend *array) {
    if (!array) return;
    ranking_free(array->backend.ranking);
    free(array->block_ids);
    free(array->lane_first);
    free(array->lane_tokens);
    free(array);
}
