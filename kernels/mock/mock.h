/* What the mock backend computes, for oracles above it: the token that follows a history is a pure function of that history, so a test can say what any request
 * must answer without running anything. Pure; any thread. */
#pragma once

#include <stdint.h>

/* The history's identity after one more token. Before the first token it is 0. */
uint64_t mock_chain(uint64_t chain, int32_t token, int32_t position);

/* The logits [n_vocab] after the history: about 30 tokens stand out, half a logit apart; the others are equal. */
void mock_logits(uint64_t chain, uint32_t n_vocab, float *logits);
