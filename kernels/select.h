/* Which of a sequence's cached slots stay, as numbers: slots get rank keys made from scores, cuts find the key below which enough of them lie, and what is left is listed. Which scores, how
 * much of what: policies/ business.
 *
 * Three calls for a sequence: rank, then cuts as many as wanted, then keep. Several sequences may be under way, each in a place of its own (struct backend.rank_places): what the calls leave
 * behind there, the lists among it, lasts until the next rank of that place. Every choice is deterministic: of equal keys the older slot stays. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <string.h>

#include "base/block.h"
#include "kernels/score.h"

#ifdef __CUDACC__
#define SELECT_INLINE static inline __host__ __device__
#else
#define SELECT_INLINE static inline
#endif

#define RANK_PLACES_MAX 8u
#define RANK_PROTECTED UINT32_MAX /* the key of a slot that always stays; no other slot has it */

enum rank_source {
    RANK_SCORES,    /* of `score`, folded */
    RANK_POSITIONS, /* newer is better */
    RANK_RANDOM,    /* a number in [0, 1) of (seed, position) */
};
/* From scores per query head to one a slot. Kinds that have one a slot are taken as they are. */
enum rank_fold {
    RANK_FOLD_MEAN,          /* over the query heads */
    RANK_FOLD_MEAN_POOLED,   /* that, pooled */
    RANK_FOLD_SUM_OF_POOLED, /* each query head pooled, then summed */
};
/* Over pooling_kernel (odd) neighbours. Average: neighbours that are not there count as zeros. */
enum rank_pooling { RANK_POOL_NONE, RANK_POOL_AVERAGE, RANK_POOL_MAX };

struct rank_request {
    enum rank_source source;
    uint64_t seed;
    struct score_request score; /* the tables always; what is scored, of RANK_SCORES. All lanes: first_lane, n_lanes and offset are not looked at */
    enum rank_fold fold;
    enum rank_pooling pooling;
    uint32_t pooling_kernel;
    uint32_t value_power;  /* 0, 1 or 2: the score times the value's length to this power */
    bool layer_mean;       /* lanes of a layer that hold the same positions get the mean of their scores */
    int64_t protect_below; /* positions below it stay, */
    int64_t protect_above; /* and those above this one */
};

/* For groups of lanes_each lanes (one after another), the least key at which the lanes of group g together can free `needed[g]` units or more;
 * a key above all others where they cannot. */
struct cut_request {
    uint32_t lanes_each;
    uint32_t unit;          /* slots: 1, or those of a block (select_units) */
    const uint32_t *needed; /* [n_lanes / lanes_each]; 0: nothing is asked of this group, its counts are 0 */
};
/* Of a lane: slots below the group's key and at it. Protected slots are in neither. */
struct cut_lane {
    uint32_t below, equal;
};

struct kept_lane {
    uint32_t n_keep;
    uint32_t first_moved; /* the first of those that stay whose index changes, n_keep if none */
};

/* Units that the lowest `count` evictable slots of a lane can free: the last unit may hold fewer slots than the others, and goes first. */
SELECT_INLINE uint32_t select_units(uint32_t n_slots, uint32_t n_protected, uint32_t unit, uint32_t count) {
    uint32_t tail = n_slots ? (n_slots - 1) % unit + 1 : 0;
    if (count > n_slots - n_protected) count = n_slots - n_protected;
    return tail == 0 || count < tail ? 0 : (count - tail) / unit + 1;
}
/* Slots to evict so that so many units come free. */
SELECT_INLINE uint32_t select_evictions(uint32_t n_slots, uint32_t unit, uint32_t units) {
    return units ? (units - 1) * unit + (n_slots - 1) % unit + 1 : 0;
}

/* Order of floats as order of integers, NaN the lowest. */
SELECT_INLINE uint32_t select_key(float score) {
    if (score != score) return 0;
    uint32_t bits, key;
    memcpy(&bits, &score, sizeof bits);
    key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return key == RANK_PROTECTED ? key - 1 : key;
}

/* ---- on the host ---- */

/* The key of ascending rank `rank` (0-based, < n) and how many are strictly below it. scratch [n] */
uint32_t select_rank(const uint32_t *keys, uint32_t n, uint32_t rank, uint32_t *below, uint32_t *scratch);
/* All but the `evict` lowest of those that may go: their indices, ascending, and their number. */
uint32_t select_keep(const uint32_t *keys, uint32_t n, uint32_t n_protected, uint32_t evict, uint32_t *keep);

/* Of KIVI dtypes (kernels/kivi.h): the slots of each block that the row at `next` will read as codes get one key, the highest among them, so that they stay or go together. Returns how
 * many slots that are, the first ones of the lane; *n_protected becomes how many of all are protected now. */
uint32_t select_join(uint32_t *keys, const int32_t *positions, uint32_t n, int32_t next, uint32_t *n_protected);
/* As select_keep; of the first `joined` slots blocks stay or go whole: up to BLOCK_TOKENS - 1 slots more may go, never fewer. */
uint32_t select_keep_joined(const uint32_t *keys, uint32_t n, uint32_t n_protected, uint32_t evict, uint32_t joined, uint32_t *keep);

/* State of the three calls in backends that compute on the host. Owned by the backend. */
#define RANK_HEADS_MAX 1024 /* KV heads of a layer */
struct backend;
struct backend_limits;
struct compaction;
struct program;
struct ranking;
uint64_t ranking_bytes(const struct program *program, uint32_t lane_slots, uint32_t n_places); /* 0 for 0 slots */
struct ranking *ranking_new(const struct program *program, uint32_t lane_slots, uint32_t n_places);
void ranking_free(struct ranking *ranking); /* NULL is fine */

/* struct backend_ops' entries, over backend->ranking, ops->score and ops->read_positions. Results are there at once. */
void host_rank(struct backend *backend, uint32_t place, const struct rank_request *request, uint32_t *n_protected, float *scores);
void host_cut(struct backend *backend, uint32_t place, const struct cut_request *request, struct cut_lane *lanes);
void host_keep(struct backend *backend, uint32_t place, const uint32_t *evict, struct kept_lane *lanes, uint32_t *keep);
void host_settle(struct backend *backend);
/* The item's list: its own, or what host_keep left of its lane. */
const uint32_t *host_kept(const struct backend *backend, const struct compaction *item);
