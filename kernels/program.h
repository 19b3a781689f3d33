/* A model's forward pass as data: the const array of phases that model/ compiles once and every backend walks.
 *
 *   EMBED, then for each layer ATTN_IN, ATTN, ATTN_OUT, MLP_IN, MLP_OUT, then HEAD.
 *
 * A row is one token of one sequence. With x the residual stream [rows, n_embd]:
 *   EMBED     x = embedding[token]
 *   ATTN_IN   h = rmsnorm(x, norm);  q = Wq h (+bq), k = Wk h (+bk), v = Wv h (+bv);  q, k = rmsnorm per head if q_norm/k_norm are present
 *   ATTN      rope(q, position), rope(k, position);  append k, v rounded to the KV dtype;  a = softmax(q.k * attention_scale) v, per query head,
 *             over the slots of its KV head's lane: those before this step and those of this sequence's rows up to and including itself
 *   ATTN_OUT  x += Wo a
 *   MLP_IN    h = rmsnorm(x, norm);  g = silu(Wgate h) * (Wup h)
 *   MLP_OUT   x += Wdown g
 *   HEAD      logits = Whead rmsnorm(x, norm), only for rows that a sample asks for
 *
 * Everything here is const after load and read freely by every thread. */
#pragma once

#include <stdint.h>

#include "kernels/tensor.h"

enum phase_kind { PHASE_EMBED, PHASE_ATTN_IN, PHASE_ATTN, PHASE_ATTN_OUT, PHASE_MLP_IN, PHASE_MLP_OUT, PHASE_HEAD, PHASE_KINDS };

const char *phase_kind_name(enum phase_kind kind);

enum { WEIGHT_Q = 0, WEIGHT_K = 1, WEIGHT_V = 2, WEIGHT_GATE = 0, WEIGHT_UP = 1, WEIGHT_ONLY = 0 };

struct phase {
    enum phase_kind kind;
    uint32_t layer;
    struct tensor norm;           /* f32 [cols = n_embd]: ATTN_IN, MLP_IN, HEAD */
    struct tensor weight[3];      /* ATTN_IN: q, k, v; MLP_IN: gate, up; EMBED, ATTN_OUT, MLP_OUT, HEAD: [WEIGHT_ONLY] */
    struct tensor bias[3];        /* ATTN_IN of qwen2: f32 vectors; else absent */
    struct tensor q_norm, k_norm; /* ATTN_IN of qwen3: f32 [head_dim]; else absent */
};

enum rope_pairs {
    ROPE_PAIRS_ADJACENT, /* dims (2i, 2i+1): llama family in GGUF order */
    ROPE_PAIRS_HALVES,   /* dims (i, i + head_dim/2): qwen family (NEOX) */
};

struct program {
    const struct phase *phases;
    uint32_t n_phases;

    uint32_t n_layers, n_embd, n_heads, n_kv_heads, head_dim, n_ff, n_vocab;
    uint32_t context_train; /* tokens the model was trained for */
    float norm_epsilon;
    float attention_scale; /* 1/sqrt(head_dim) */

    enum rope_pairs rope_pairs;
    uint32_t rope_dims;            /* leading dims of a head that rotate; the rest pass through */
    const double *rope_frequency;  /* [rope_dims/2], radians a position: base^(-2i/rope_dims), llama-3 scaling already applied */
    float rope_magnitude;          /* cos and sin are multiplied by it (yarn); 1 */

    bool tied_head;                /* HEAD's weight is EMBED's tensor */
    uint64_t random_seed;          /* 0: tensors hold data. Else there is none, and the backend makes every weight itself: matrices uniform with a standard deviation of 1/sqrt(cols),
                                      norms 1, biases 0; a pure function of (seed, matrix, index). tensor.data is not NULL where there is a tensor, and must not be read.
                                      Backends that cannot (backend_ops.makes_weights) refuse in prepare */
};

/* lane = layer * n_kv_heads + kv_head: one KV head of one layer. */
static inline uint32_t program_lanes(const struct program *program) { return program->n_layers * program->n_kv_heads; }
