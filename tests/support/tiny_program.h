/* Small programs with random weights, for tests of backends and of what is above them: every shape, tensor type and optional tensor a program can have.
 * The same shape (seed included) gives the same bytes everywhere. Activations stay near 1 and the output depends on the whole context. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "kernels/program.h"

enum { TINY_OUTLIER_DIM = 5 };

struct tiny_shape {
    uint64_t seed;
    uint32_t n_layers, n_embd, n_heads, n_kv_heads, head_dim, n_ff, n_vocab; /* n_embd need not be n_heads * head_dim */
    enum tensor_type type; /* of every matrix; its block size divides n_embd, n_heads * head_dim and n_ff */
    bool mixed_types;      /* instead: each matrix takes the next type whose block size divides its columns */
    enum rope_pairs rope_pairs;
    uint32_t rope_dims; /* 0: head_dim */
    bool rope_scaled;   /* llama-3 scaling of the frequencies (factor 8, low 1, high 4, original context 64) */
    bool biases;        /* qwen2 */
    float key_outlier;  /* with biases: that of one dim of every key, TINY_OUTLIER_DIM; 0: like the others */
    bool qk_norms;      /* qwen3 */
    bool tied_head;
    bool misaligned; /* tensors at odd addresses, as a file may place them */
};

/* 2 layers, 4 heads on 2 KV heads of 32, f32, 64 tokens: what a test takes when the shape is not its subject. */
struct tiny_shape tiny_shape_default(void);

/* The program and its weights are one object. The weights lie in a shared memory file, so that a backend which drops source pages loses nothing. */
struct program *tiny_program_new(const struct tiny_shape *shape);
void tiny_program_free(struct program *program); /* NULL is fine */
