/* Private state of the cpu backend, shared by its own files: cpu.c (life), step.c and its phases (a step), kv.c (the pool and its services). */
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/cpu/pack.h"
#include "kernels/raw.h"
#include "kernels/cpu/workers.h"

enum {
    PRIVATE_ROWS = 4, /* up to so many rows every worker normalises for itself: cheaper than a barrier */
    PANEL_ROWS = 192, /* rows of activations that stay in a core's cache while the strips pass */
    HEAD_ROWS = 32,   /* rows whose logits exist at a time */
    HEAD_STRIPS = 16, /* of the output head, a unit */
    STAGES_A_LAYER = 11,
    PARTIAL_FLOATS = 2 << 20,
    KEPT_SLOTS = 4096, /* of a lane whose weights a worker keeps for ATTEND_QUERIES queries: with the keys they stay in a core's cache */
    KEPT_SPLITS = 32768 / SPLIT_SLOTS, /* a single query may have that many */
};

struct layer {
    struct panel q, k, v, o, gate, up, down;
    const float *attention_norm, *mlp_norm;
    const float *bias[3];         /* NULL: none */
    const float *q_norm, *k_norm; /* NULL: none */
};

/* What one worker alone writes. */
struct worker_scratch {
    struct act act;                 /* PRIVATE_ROWS rows of n_embd */
    uint64_t norm;                  /* what `act` holds */
    float *row;                     /* one row of any width, padded */
    float *head;                    /* [dims]: one vector on its way */
    float *queries;                 /* [ATTEND_QUERIES][dims] */
    float *states;                  /* [ATTEND_QUERIES][2 + dims] */
    uint8_t *attend;                /* attend_scratch_bytes */
    float *kept;                    /* [ATTEND_QUERIES * KEPT_SLOTS] */
    float *kept_maxima;             /* [KEPT_SPLITS][ATTEND_QUERIES] */
    float *keys;                    /* [32 * dims]: a block widened, */
    uint8_t *raw;                   /* KIVI_RAW_BLOCKS f16 blocks */
    float *sums;                    /* [16 * dims] */
    float *moments;                 /* and [1 + ring_rows][dims]: for scores that look at keys alone, and expected ones */
    float *logits;                  /* [n_vocab]: the copy that sampling may spoil */
    float *sampler;                 /* sampler_scratch_floats */
    const struct stage *best_stage; /* of which product, in which step (cpu->stages_before), `best` is */
    uint64_t best_step;
    float *best;          /* [HEAD_ROWS]: highest logit of the strips this worker multiplied, */
    uint32_t *best_token; /* and whose it is; lowest token among equals */
};

/* Memory that prepare takes from the system in one piece. */
struct arena {
    uint8_t *base;
    size_t size, used;
};

struct cpu {
    struct backend backend; /* first */
    const struct program *program;
    const struct cpu_isa *isa;
    struct backend_limits limits;
    struct workers *workers;
    char description[96];

    struct arena weights, pool_arena, rings, scratch;
    struct layer *layers;
    const float *head_norm;
    struct panel head;
    struct tensor embedding; /* rows as the file has them; absent if tied: then they come out of `head` */

    struct kv_shape kv;
    uint8_t *pool;                 /* [n_blocks] blocks */
    int32_t *positions;            /* [n_blocks][BLOCK_TOKENS] */
    _Atomic uint64_t *accumulated; /* [n_blocks][BLOCK_TOKENS]: fixed point (kernels/score.h) */
    /* KIVI alone (residual.c): f16 blocks of the residual, behind them those that the KV heads of a layer share inside chunks. */
    struct kv_shape raw_shape; /* of one */
    uint8_t *raw_pool;         /* [raw.n_places + n_kv_heads * raw_shared] */
    struct raw_places raw;
    uint32_t raw_shared;
    uint32_t *raw_used; /* [n_kv_heads] of them, in the layer that is being planned */
    uint8_t *closed;    /* [n_blocks] its codes are those of its slots */
    /* Of each ring: queries of the last rows, position p at p % ring_rows, rotated, not scaled; unrotated keys of the sinks. f16 beside a pool of narrow types. */
    bool narrow_rings;
    void *ring_queries; /* [n_rings][n_layers][ring_rows][n_heads * head_dim], f16 or f32 */
    float *ring_sinks;  /* [n_rings][n_lanes][sink_slots][head_dim] */
    double *turns;      /* [ring_rows][rope_dims/2][cosine, sine]: of a score request, what takes each row to where queries will stand on average */

    /* Activations of a step */
    float *x;    /* [max_rows][n_embd]: the residual stream */
    float *rope; /* [max_rows][cosine, sine][rope_dims]: isa.h */
    float *qkv;  /* [max_rows][q, k, v] */
    size_t qkv_stride;
    struct act h, a, g, z; /* normed; attention's output; gated; rows of the head */
    float *logits;         /* [HEAD_ROWS][logits_stride] */
    size_t logits_stride;
    uint32_t *head_rows;    /* distinct rows that a sample names */
    uint32_t *sample_row;   /* [max_samples]: index in head_rows */
    bool *plain;            /* [max_samples], as head_rows: rows of which only the highest logit is asked: no logits are written */
    uint32_t *first_tile;   /* [max_sequences + 1]: query tiles before each sequence's, for one KV head */
    uint32_t *row_sequence; /* [max_rows] */
    struct worker_scratch *workers_scratch;

    float *partials;       /* [PARTIAL_FLOATS]: states of single splits, where a lane is shared among workers */
    struct stage *stages;  /* of a step, */
    uint8_t *stage_phases; /* and the enum phase_kind that each belongs to */

    /* The step at hand */
    const struct batch *batch;
    struct sample_result *results;
    uint32_t n_stages;
    uint32_t n_head_rows;
    uint32_t n_splits;      /* > 0: units of attention are single splits of a tile, this many each, merged in a stage of their own */
    bool fused_append;      /* each (sequence, KV head) is one unit, which appends before it attends */
    uint64_t stages_before; /* stages before this step, and 1: tells a worker whether what it keeps is of this stage */
    float *tap;
};

/* Planes of quantised activations (layout.h). */
static inline uint32_t act_planes(const struct backend_limits *limits) { return limits->activation_bits == 16 ? 2 : 1; }

void cpu_step(struct cpu *cpu);

/* kv.c */
struct kv_shape kv_shape_of(const struct program *program, enum kv_dtype dtype);
void cpu_copy_blocks(struct backend *backend, uint32_t count, const uint32_t *source, const uint32_t *destination);
void cpu_read_f32(struct backend *backend, uint32_t block, uint32_t slot, float *k, float *v, int32_t *position);
size_t cpu_block_bytes(const struct program *program, enum kv_dtype dtype);
void cpu_read_positions(struct backend *backend, uint32_t count, const uint32_t *blocks, int32_t *positions);
void cpu_compact(struct backend *backend, uint32_t count, const struct compaction *items);
void cpu_shift_sinks(struct backend *backend, const struct shift_request *request);
/* residual.c: KIVI */
/* Blocks of the lane that a row at `position`, with `before` slots of the lane before its own, reads as codes: the first ones. */
uint32_t count_codes(const struct cpu *cpu, const uint32_t *blocks, uint32_t before, int32_t position);
struct residual residual_of(const struct cpu *cpu, const uint32_t *blocks, uint32_t before, int32_t position); /* zeros: no KIVI dtype */
/* For a score: as the row after the newest token reads the lane, even if the rows that score are older. */
struct residual residual_now(const struct cpu *cpu, const uint32_t *blocks, uint32_t n_slots, int32_t last_position);
uint8_t *raw_block(const struct cpu *cpu, uint32_t block);
/* Codes for the blocks that slots [first_slot, end_slot) fill. */
void close_lane(const struct cpu *cpu, const uint32_t *blocks, uint32_t first_slot, uint32_t end_slot);
bool cpu_resumes(struct backend *backend, uint32_t count, const uint32_t *blocks);
/* Around a step's stages: every f16 block that a row reads or fills has its place; then, that the next row will read. */
void residual_begin(struct cpu *cpu);
void residual_end(struct cpu *cpu);
/* score.c */
/* Lets the worker keep the weights of the tile, if they have room. */
void keep_weights(struct worker_scratch *own, struct attend *attend);
/* The weights of one split after attend, kept or made again. `factor` is what kept->factor points at. */
struct kept_split weights_of(const struct cpu *cpu, struct worker_scratch *own, const struct attend *attend, uint32_t split, const float *states,
                             size_t stride, float factor[ATTEND_QUERIES]);
void cpu_score(struct backend *backend, const struct score_request *request, float *scores);

/* Stages of a step (workers.h); `index` is the layer, in the head's stages the first row. */
typedef void stage_function(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker);
/* step.c */
void put_row(struct cpu *cpu, const struct act *act, uint32_t row, const float *values, uint32_t n);
/* y = one strip of the matrix times n_rows rows from `row` on. */
void multiply_strip(const struct cpu *cpu, const struct panel *panel, uint32_t strip, const struct act *act, uint32_t row, uint32_t n_rows,
                    float (*y)[STRIP_ROWS]);
/* attend.c */
stage_function stage_append, stage_close, stage_attend, stage_merge;
/* Decides how attention is divided; returns its number of units. Sets fused_append and n_splits. */
uint32_t plan_attention(struct cpu *cpu);
/* head.c */
stage_function stage_head_norm, stage_head_product, stage_sample;
uint32_t head_units(const struct cpu *cpu);
uint32_t samples_of_chunk(const struct cpu *cpu, uint32_t first_row, uint32_t *first_sample);
