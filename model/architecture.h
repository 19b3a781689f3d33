/* What a model file says about its architecture, as checked numbers, and the table of how architectures differ. One forward pass serves them all
 * (kernels/program.h); an architecture is a row of the table. Inside model/ only. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "kernels/program.h"
#include "model/gguf.h"

/* Bounds on hyper-parameters: far above any published dense model, low enough that products of them fit 64 bits and scratch sizes stay sane. */
#define MODEL_LAYERS_MAX 1024u
#define MODEL_EMBD_MAX 65536u
#define MODEL_HEADS_MAX 1024u
#define MODEL_HEAD_DIM_MAX 512u
#define MODEL_FF_MAX 1048576u
#define MODEL_VOCAB_MAX 4194304u
#define MODEL_CONTEXT_MAX 16777216u

enum weight_presence { WEIGHT_ABSENT, WEIGHT_OPTIONAL, WEIGHT_REQUIRED };

struct architecture {
    const char *name; /* general.architecture */
    enum rope_pairs rope_pairs;
    enum weight_presence qkv_bias;
    enum weight_presence qk_norm;
    enum weight_presence rope_factors; /* rope_freqs.weight: llama 3's frequency scaling as a table of divisors */
};

enum rope_scaling { ROPE_SCALING_NONE, ROPE_SCALING_LINEAR, ROPE_SCALING_YARN };

struct rope_parameters {
    uint32_t dims;
    double base;
    enum rope_scaling scaling;
    double factor;             /* linear, yarn: context is stretched that many times; 1 otherwise */
    uint32_t original_context; /* yarn */
    double beta_fast, beta_slow;
    double magnitude; /* before yarn's own */
};

struct hyper_parameters {
    const struct architecture *architecture;
    uint32_t n_layers, n_embd, n_heads, n_kv_heads, head_dim, n_ff, n_vocab;
    uint32_t context_train;  /* not above the sliding window: within it, full attention and the window's are the same */
    uint32_t sliding_window; /* 0: none */
    float norm_epsilon;
    struct rope_parameters rope;
};

/* NULL: unknown. */
const struct architecture *architecture_find(const char *name);
/* Reads and checks every hyper-parameter. The error names the key, what was found, what is supported. */
enum status architecture_read(const struct gguf *gguf, struct hyper_parameters *parameters, struct error *error);

/* frequency[dims/2] in radians a position, and the factor on cos and sin. factors: NULL or [dims/2] divisors.
 * base^(-2i/dims) (RoPE, arXiv 2104.09864, 3.2.2); linear: divided by factor (position interpolation, arXiv 2306.15595);
 * yarn: per dimension a blend of both, by how many turns it makes in the original context (arXiv 2309.00071, 3.2 and 3.4). */
void rope_frequencies(const struct rope_parameters *rope, const float *factors, double *frequency, float *magnitude);
