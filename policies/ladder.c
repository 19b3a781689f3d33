/* FastGen's ladder (arXiv 2310.01801, 3.3): per lane the first rung whose keys hold enough of the attention. Inside choose(); owns nothing.
 *
 * Rungs, each on top of the one before: protected and special tokens; punctuation; the 30 % of slots with most attention; the 30 % most recent; all. */
#include <string.h>

#include "policies/chooser.h"

#define RUNG_SHARE 0.3

static bool in_class(const struct choose_request *request, int32_t position, enum token_class class) {
    return request->classes && request->classes[request->tokens[position]] == class;
}

struct rungs {
    const struct choose_request *request;
    const struct choose_lane *lane;
    const uint32_t *keys;     /* [n_slots] */
    const int32_t *positions; /* [n_slots] */
    const float *attention;   /* [n_slots] mean over the query heads of the sum over rows (scores; the value factor is not for recovery) */
    uint8_t *kept;            /* [n_slots] flags */
    uint32_t *scratch;        /* [n_slots] */
};

static double recovered(const struct rungs *rungs) {
    double sum = 0;
    for (uint32_t i = 0; i < rungs->lane->n_slots; i++)
        if (rungs->kept[i]) sum += (double)rungs->attention[i];
    return sum / rungs->request->n_window;
}

static void add_class(const struct rungs *rungs, enum token_class class) {
    for (uint32_t i = 0; i < rungs->lane->n_slots; i++)
        if (rungs->keys[i] == RANK_PROTECTED || in_class(rungs->request, rungs->positions[i], class)) rungs->kept[i] = 1;
}

static void add_heavy(const struct rungs *rungs) {
    uint32_t n = rungs->lane->n_slots, wanted = (uint32_t)(RUNG_SHARE * n), below;
    if (wanted == 0) return;
    uint32_t threshold = select_rank(rungs->keys, n, n - wanted, &below, rungs->scratch);
    for (uint32_t i = 0; i < n && wanted > 0; i++)
        if (rungs->keys[i] > threshold) rungs->kept[i] = 1, wanted--;
    for (uint32_t i = 0; i < n && wanted > 0; i++)
        if (rungs->keys[i] == threshold) rungs->kept[i] = 1, wanted--;
}

static void add_recent(const struct rungs *rungs) {
    uint32_t n = rungs->lane->n_slots;
    for (uint32_t i = n - (uint32_t)(RUNG_SHARE * n); i < n; i++) rungs->kept[i] = 1;
}

static void climb(const struct rungs *rungs) {
    double enough = rungs->request->options->recovery;
    memset(rungs->kept, 0, rungs->lane->n_slots * sizeof *rungs->kept);
    if (enough < 1) {
        add_class(rungs, TOKEN_CLASS_SPECIAL);
        if (recovered(rungs) >= enough) return;
        add_class(rungs, TOKEN_CLASS_PUNCTUATION);
        if (recovered(rungs) >= enough) return;
        add_heavy(rungs);
        if (recovered(rungs) >= enough) return;
        add_recent(rungs);
        if (recovered(rungs) >= enough) return;
    }
    for (uint32_t i = 0; i < rungs->lane->n_slots; i++) rungs->kept[i] = 1;
}

/* Keys and positions of a lane, as the backend ranked it. */
static void read_lane(struct chooser *chooser, uint32_t lane, const float *scores) {
    const struct choose_request *request = &chooser->request;
    const struct rank_request *rank = &chooser->rank;
    uint32_t n = chooser->lanes[lane].n_slots, blocks = (n + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    chooser->backend->ops->read_positions(chooser->backend, blocks, request->block_ids + request->lane_first[lane], chooser->positions);
    for (uint32_t i = 0; i < n; i++) {
        bool stays = chooser->positions[i] < rank->protect_below || chooser->positions[i] > rank->protect_above;
        chooser->keys[i] = stays ? RANK_PROTECTED : select_key(scores[i]);
    }
}

void chooser_ladder(struct chooser *chooser) {
    const struct choose_request *request = &chooser->request;
    const float *scores = chooser->scores;
    uint8_t *kept = chooser->flags;
    uint32_t *list = request->lists;
    for (uint32_t l = 0; l < chooser->n_lanes; l++) {
        struct choose_lane *lane = &chooser->lanes[l];
        uint32_t n = lane->n_slots, n_kept = 0;
        read_lane(chooser, l, scores);
        const struct rungs rungs = {.request = request,
                                    .lane = lane,
                                    .keys = chooser->keys,
                                    .positions = chooser->positions,
                                    .attention = scores,
                                    .kept = kept,
                                    .scratch = list};
        climb(&rungs);
        /* What the ladder left out is lowest of all; the budget then takes from the rest. */
        uint32_t n_protected = 0, joined = 0;
        for (uint32_t i = 0; i < n; i++) {
            if (!kept[i]) chooser->keys[i] = 0;
            n_protected += chooser->keys[i] == RANK_PROTECTED;
        }
        if (chooser->backend->joins_blocks) joined = select_join(chooser->keys, chooser->positions, n, request->last_position + 1, &n_protected);
        for (uint32_t i = 0; i < n; i++) n_kept += i < joined ? chooser->keys[i] > 0 : kept[i];
        uint32_t keep = n_kept < request->budget ? n_kept : request->budget;
        lane->keep = list;
        lane->n_keep = select_keep_joined(chooser->keys, n, n_protected, n - keep, joined, list);
        lane->first_moved = 0;
        while (lane->first_moved < lane->n_keep && list[lane->first_moved] == lane->first_moved) lane->first_moved++;
        list += n;
        scores += n;
    }
}
