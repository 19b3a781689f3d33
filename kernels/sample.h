/* From logits to a token: one function for every backend that samples on the host, the oracle of those that do not.
 *
 * Order (vLLM's): logit_bias -> min_tokens bans -> repetition, presence, frequency penalties -> [logprobs are taken of log_softmax of the RAW logits, before
 * all of this, as OpenAI-compatible servers do] -> temperature -> top_k -> top_p -> min_p -> draw. temperature == 0 is greedy: the highest adjusted logit,
 * ties to the lower token id.
 * The draw is a function of (seed, choice, token_index) only: u = random_unit(random_at(seed, 0, choice, token_index)), then the inverse of the cumulative
 * distribution over the surviving tokens in descending probability (ties: lower id first). */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SAMPLE_TOP_MAX 20 /* logprobs a token, at most */

struct logit_bias {
    int32_t token;
    float bias;
};

/* Const while a request lives; the loop thread owns it (struct request), kernels read it. */
struct sampling {
    float temperature;        /* 0: greedy */
    float top_p;              /* (0, 1]; 1: off */
    float min_p;              /* [0, 1]; 0: off */
    int32_t top_k;            /* 0: off */
    float repetition_penalty; /* > 0; 1: off. Over prompt and generated tokens */
    float presence_penalty;   /* over generated tokens */
    float frequency_penalty;
    uint64_t seed;
    int32_t n_top;            /* alternatives to report with each token, 0..SAMPLE_TOP_MAX; -1: no logprobs at all */
    uint32_t n_bias;
    const struct logit_bias *bias;
    uint32_t n_banned;        /* tokens (EOS, stop ids) that may not be drawn while `ban` is set in the sample item */
    const int32_t *banned;
};

/* Does what is drawn depend on `history` of the sample? */
static inline bool sampling_penalizes(const struct sampling *s) {
    return s->repetition_penalty != 1 || s->presence_penalty != 0 || s->frequency_penalty != 0;
}

struct sample_result {
    int32_t token;
    float logprob; /* of `token`, log_softmax of the raw logits; 0 if n_top < 0 */
    int32_t n_top;
    struct {
        int32_t token;
        float logprob;
    } top[SAMPLE_TOP_MAX]; /* descending, ties: lower id first */
};

/* What a batch asks of one row's logits. */
struct sample {
    uint32_t row;                    /* in the batch; several samples may name one row */
    const struct sampling *sampling;
    uint32_t choice;                 /* candidate, for the random number */
    uint32_t token_index;            /* generated tokens before this one, for the random number */
    bool ban;                        /* min_tokens not reached: sampling->banned may not be drawn */
    int32_t target;                  /* >= 0: nothing is drawn; report this token's logprob (prompt logprobs). -1: draw */
    const int32_t *history;          /* prompt then generated tokens, for penalties */
    uint32_t n_prompt, n_history;
};

/* Scratch of one thread: sampler_scratch_floats(n_vocab) floats. Never allocates. */
size_t sampler_scratch_floats(uint32_t n_vocab);
/* `logits` [n_vocab] is destroyed. Logits may hold anything (NaN is treated as -inf; if nothing finite is left, token 0 with logprob -inf). */
void sampler_sample(const struct sample *sample, float *logits, uint32_t n_vocab, float *scratch, struct sample_result *result);
