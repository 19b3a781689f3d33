/* The inner loops of the cpu backend as one const table an instruction set, chosen once at start.
 * Every function is pure in the row contract's sense: what it writes for a row depends on that row alone, whatever rows share the call. */
#pragma once

#include <stdbool.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels/cpu/layout.h"
#include "kernels/score.h"

enum { PRODUCT_ROWS = 12 /* rows one product call takes at most */, ATTEND_QUERIES = 24 /* queries of one attend call */ };

/* y[row][0..15] of one strip. `first` points at the first row's blocks (quantised types; of as many planes as the function is for) or values (float types); stride in bytes. */
typedef void product_function(const uint8_t *strip, uint32_t n_blocks, const void *first, size_t stride, uint32_t n_rows, float (*y)[STRIP_ROWS]);

/* Query vectors of one KV head against one lane. State of query i: state[i * state_stride]: maximum, sum, then dims of unnormalised output. */
struct attend {
    const struct kv_shape *shape;
    const uint8_t *pool;
    const uint32_t *blocks;      /* the lane's table */
    const uint32_t *next_blocks; /* of the lane that this worker comes to next: fetched ahead */
    uint32_t n_next_blocks;
    struct residual residual;           /* KIVI: the same for all queries of the call */
    uint32_t n_queries;                 /* <= ATTEND_QUERIES */
    const float *query[ATTEND_QUERIES]; /* [dims], scaled; transformed as keys are (layout.h) */
    uint32_t visible[ATTEND_QUERIES];   /* slots query i sees: ascending in i, >= 1 */
    uint8_t *scratch;                   /* attend_scratch_bytes */
    bool sums_only;                     /* maxima and sums, no output */
    /* Where weights exp(score - maximum of the split) are kept, 0 where a query does not see: [n_queries][kept_stride], slot by slot up to whole blocks of what the last
     * query sees. NULL: nowhere. */
    float *kept;
    size_t kept_stride;
    float *kept_maxima; /* [splits][ATTEND_QUERIES] */
};

/* Weights of one split, of n queries whose totals are the same: every `step`-th of the kept ones. p = weight * factor. */
struct kept_split {
    const float *weights;
    size_t stride;
    const float *factor;     /* [n * step] exp(maximum of the split - maximum of the row) / sum of the row */
    const uint32_t *visible; /* [n * step] */
    uint32_t n, step;
    uint32_t n_slots; /* of the split that the last query sees */
};

/* A lane whose keys or values are looked at one block at a time, widened. */
struct lane_view {
    const struct kv_shape *shape;
    const uint8_t *pool;
    const uint32_t *blocks;
    struct residual residual; /* KIVI */
    uint32_t n_slots;
    float *keys;     /* [32 * dims]: one block */
    float *sums;     /* [16 * dims] */
    uint8_t *attend; /* attend_scratch_bytes */
};

/* Up to 32 slots of one block, as far as they go into one other block: slot from[i], ascending, becomes slot to + i <= from[i]. */
struct slot_run {
    uint32_t n, to;
    uint8_t from[BLOCK_TOKENS];
};

/* Highest logit of each row of the strips seen, and in which strip. */
struct best_logits {
    float value[STRIP_ROWS];
    uint32_t strip[STRIP_ROWS];
};

static inline void best_logits_clear(struct best_logits *best) {
    for (int i = 0; i < STRIP_ROWS; i++) best->value[i] = -__builtin_inff(), best->strip[i] = 0;
}

struct cpu_isa {
    const char *name;
    const char *text; /* what the CPU must have, for messages */
    bool (*present)(void);
    product_function *product[ACT_PLANES][TENSOR_TYPES]; /* [planes - 1] */
    /* out = x * rsqrt(mean x^2 + epsilon) * weight */
    void (*norm)(const float *x, const float *weight, uint32_t n, float epsilon, float *out);
    void (*quantize)(const float *x, uint32_t n_blocks, uint32_t planes, struct act_block *first);
    /* One block of each of n_rows rows. stride in bytes. */
    void (*quantize_column)(const float (*x)[PANEL_K], uint32_t n_rows, uint32_t planes, struct act_block *first, size_t stride);
    /* out = silu(gate) * up: 16 columns, into half of 32. */
    void (*silu)(const float (*gate)[STRIP_ROWS], const float (*up)[STRIP_ROWS], uint32_t n_rows, float (*out)[PANEL_K]);
    /* The first n results of a strip for n_rows rows: stored, with a bias or without (NULL); added. stride in floats. */
    void (*put_strip)(const float (*y)[STRIP_ROWS], uint32_t n_rows, uint32_t n, const float *bias, float *out, size_t stride);
    void (*add_strip)(const float (*y)[STRIP_ROWS], uint32_t n_rows, uint32_t n, float *x, size_t stride);
    /* Rotary positions of the first n dims; tables [n] as step.c makes them. */
    void (*rotate)(const float *x, uint32_t n, bool halves, const float *cosine, const float *sine, float *restrict out);
    /* The Walsh-Hadamard transform of each run of `size` values, the largest power of two that divides n (a multiple of KV_PAD), orthonormal: its own inverse. */
    void (*hadamard)(float *restrict x, uint32_t n);
    /* Writes one slot of a block. Values are made finite first, so that a slot nobody may see is harmless.
     * v NULL: the key alone. */
    void (*append)(const struct kv_shape *shape, uint8_t *block, uint32_t slot, const float *k, const float *v);
    /* KIVI: makes codes of a filled f16 block; of its keys alone, if so wanted. */
    void (*close_block)(const struct kv_shape *shape, const uint8_t *raw, uint8_t *block, bool keys_alone);
    /* Splits [first, end) of 256 slots, folded into the states in ascending order. A state begins as {-inf, 0, 0...}. */
    void (*attend)(const struct attend *attend, uint32_t first_split, uint32_t end_split, float *state, size_t state_stride);
    /* The same weights as attend keeps, of one split alone, from `kept` on. */
    void (*weights)(const struct attend *attend, uint32_t split);
    /* factor[q] for the queries of a split, from its maxima and the states after attend. */
    void (*factors)(const struct attend *attend, const float *maxima, const float *state, size_t state_stride, float factor[ATTEND_QUERIES]);
    /* Scores that are sums over rows (kernels/score.h: SCORE_ATTENTION, _SQUARES, _PERSISTENCE): added to total[n_slots], rows in order. */
    void (*fold)(enum score_kind kind, const struct kept_split *split, float *total);
    /* sums[n_slots rounded up to a block] += the sum over the rows of p in fixed point. */
    void (*accumulate)(const struct kept_split *split, uint64_t *sums);
    /* queries [1 + n][dims], transformed as keys are: the mean, then each row less the mean. scores [n_slots] */
    void (*expected)(const struct lane_view *lane, const float *queries, uint32_t n, float scale, float *scores);
    void (*keydiff)(const struct lane_view *lane, float *scores);
    void (*value_norms)(const struct lane_view *lane, float *scores);
    /* out = halves * scale */
    void (*widen_f16)(const uint16_t *halves, uint32_t n, float scale, float *out);
    void (*narrow_f16)(const float *x, uint32_t n, uint16_t *halves);
    /* K, V and scales of the run's slots from one block to another, or within one. */
    void (*move_slots)(const struct kv_shape *shape, const uint8_t *source, uint8_t *destination, const struct slot_run *run);
    /* Folds the state of the next split(s) into `state`. */
    void (*merge)(float *state, const float *next, uint32_t dims);
    /* Takes the logits of one more strip into the running maximum; the earlier strip stays where they are equal, NaN is passed over. */
    void (*track)(const float logits[STRIP_ROWS], uint32_t strip, struct best_logits *best);
};

/* Scores and weights of a split, one output and one quantised query each; KIVI: then one block of keys and the values of a split, widened. */
static inline size_t attend_scratch_queries(uint32_t dims) { return ATTEND_QUERIES * ((size_t)SPLIT_SLOTS * 8 + (size_t)dims * 8 + 64); }
static inline size_t attend_scratch_bytes(const struct kv_shape *shape) {
    return attend_scratch_queries(shape->dims) + (shape->raw_bytes ? (BLOCK_TOKENS + SPLIT_SLOTS) * (size_t)shape->dims * sizeof(float) : 0);
}

extern const struct cpu_isa cpu_isa_generic;
#if defined(__x86_64__)
/* Not every compiler that this is built with knows the name for __builtin_cpu_supports (clang 14 does not): leaf 1, ECX bit 29. */
static inline bool cpu_has_f16c(void) {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}
extern const struct cpu_isa cpu_isa_avx2, cpu_isa_avxvnni, cpu_isa_avx512, cpu_isa_avx512bf16;
#endif
/* Worst first, NULL-terminated. */
extern const struct cpu_isa *const cpu_isas[];
const struct cpu_isa *cpu_isa_best(void); /* of those this machine has */
