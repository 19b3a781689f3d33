/* Limits of a server that takes small requests, for the targets that read bodies. */
#pragma once

#include "server/completion.h"

#define VOCABULARY 300
enum { PROMPTS_MAX = 8, CHOICES_MAX = 16, LOGPROBS_MAX = 20 };

static inline struct completion_limits small_completion_limits(struct tokenizer *tokenizer, uint32_t context, const struct config *config) {
    return (struct completion_limits){.served_name = "m",
                                      .tokenizer = tokenizer,
                                      .max_model_len = context,
                                      .max_stream_tokens = context,
                                      .max_prompts = PROMPTS_MAX,
                                      .max_choices = CHOICES_MAX,
                                      .max_logprobs = LOGPROBS_MAX,
                                      .compression = config};
}
