/* Private state of the cpu backend, shared by its own files: cpu.c (life), step.c and its phases (a step), kv.c (the pool and its services). */
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/cpu/pack.h"
#include "kernels/cpu/workers.h"

enum {
    PRIVATE_ROWS = 4, /* up to so many rows every worker normalises for itself: cheaper than a barrier */
    PANEL_ROWS = 192, /* rows of activations that stay in a core's cache while the strips pass */
    HEAD_ROWS = 32,   /* rows whose logits exist at a time */
};

struct layer {
    struct panel q, k, v, o, gate, up, down;
    const float *attention_norm, *mlp_norm;
    const float *bias[3];          /* NULL: none */
    const float *q_norm, *k_norm;  /* NULL: none */
};

/* What one worker alone writes. */
struct worker_scratch {
    struct act act;        /* PRIVATE_ROWS rows of n_embd */
    float *row;            /* one row of any width, padded */
    float *queries;        /* [ATTEND_QUERIES][dims] */
    float *states;         /* [ATTEND_QUERIES][2 + dims] */
    uint8_t *attend;       /* attend_scratch_bytes */
    float *logits;         /* [n_vocab]: the copy that sampling may spoil */
    float *sampler;        /* sampler_scratch_floats */
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

    struct arena weights, pool_arena, scratch;
    struct layer *layers;
    const float *head_norm;
    struct panel head;
    struct tensor embedding; /* rows as the file has them; absent if tied: then they come out of `head` */

    struct kv_shape kv;
    uint8_t *pool;      /* [n_blocks] blocks */
    int32_t *positions; /* [n_blocks][BLOCK_TOKENS] */

    /* Activations of a step */
    float *x;     /* [max_rows][n_embd]: the residual stream */
    float *rope;  /* [max_rows][rope_dims/2][cos, sin] */
    float *qkv;   /* [max_rows][q, k, v] */
    size_t qkv_stride;
    struct act h, a, g, z; /* normed; attention's output; gated; rows of the head */
    float *logits;         /* [HEAD_ROWS][logits_stride] */
    size_t logits_stride;
    uint32_t *head_rows;   /* distinct rows that a sample names */
    uint32_t *sample_row;  /* [max_samples]: index in head_rows */
    uint32_t *first_tile;  /* [max_sequences + 1]: query tiles before each sequence's, for one KV head */
    uint32_t *row_sequence;/* [max_rows] */
    struct worker_scratch *workers_scratch;

    /* The step at hand */
    const struct batch *batch;
    struct sample_result *results;
    uint32_t n_head_rows;
    bool fused_append; /* each (sequence, KV head) is one unit, which appends before it attends */
    float *tap;
};

void cpu_step(struct cpu *cpu);

/* kv.c */
struct kv_shape kv_shape_of(const struct program *program, enum kv_dtype dtype);
void cpu_copy_blocks(struct backend *backend, uint32_t count, const uint32_t *source, const uint32_t *destination);
void cpu_read_f32(struct backend *backend, uint32_t block, uint32_t slot, float *k, float *v, int32_t *position);
size_t cpu_block_bytes(const struct program *program, enum kv_dtype dtype);

/* attend.c, phases.c */
void phase_attention(struct cpu *cpu, uint32_t layer, uint32_t worker);
void phase_head(struct cpu *cpu, uint32_t worker);

/* Units [next, end) of one worker: a fixed equal share, or whatever nobody has taken yet. */
struct share {
    uint32_t next, end, n;
    bool dynamic;
};
struct share share_of(struct cpu *cpu, uint32_t n_units, bool dynamic, uint32_t worker);
bool share_next(struct cpu *cpu, struct share *share, uint32_t *unit);
