/* See completion.h. A parsed request's prompts become tokens, and what they and the answers take together is held to the limits. Any thread. Deliberately knows nothing of JSON. */
#include <inttypes.h>
#include <string.h>

#include "server/completion.h"

/* Prompt and answer together. A sequence whose cache stays short may go on beyond the context; its prompt may not. */
static uint32_t tokens_max(const struct completion *completion, const struct completion_limits *limits) {
    return compression_is_endless(&completion->kv, limits->max_model_len) && limits->max_stream_tokens > limits->max_model_len
               ? limits->max_stream_tokens
               : limits->max_model_len;
}

static bool too_long(const struct completion *completion, size_t n_prompt, const struct completion_limits *limits, struct api_error *error) {
    bool any = completion->max_tokens < tokens_max(completion, limits); /* a prompt would fit */
    api_error_set(
        error, 400, "invalid_request_error", "context_length_exceeded", any ? "prompt" : "max_tokens",
        "This model's maximum context length is %u tokens. However, you requested %zu tokens (%zu in the prompt, %u for the completion). Please "
        "shorten the prompt or the completion.",
        n_prompt > limits->max_model_len ? limits->max_model_len : tokens_max(completion, limits), n_prompt + completion->max_tokens, n_prompt,
        completion->max_tokens);
    return false;
}

static void truncate_front(struct token_list *tokens, size_t keep) {
    if (tokens->count <= keep) return;
    memmove(tokens->tokens, tokens->tokens + (tokens->count - keep), keep * sizeof *tokens->tokens);
    tokens->count = keep;
}

static bool tokenize_one(struct completion *completion, struct completion_prompt *prompt, const struct completion_limits *limits,
                         struct api_error *error) {
    struct error why;
    if (prompt->is_text && tokenizer_encode(limits->tokenizer, completion->texts.bytes + prompt->text, prompt->text_length, completion->add_special,
                                            true, 0, &prompt->tokens, &why) != STATUS_OK) {
        api_error_set(error, 400, "invalid_request_error", NULL, "prompt", "The prompt cannot be tokenized: %s.", why.text);
        return false;
    }
    if (completion->truncate_prompt > 0) truncate_front(&prompt->tokens, (size_t)completion->truncate_prompt);
    if (completion->truncate_prompt < 0 && completion->max_tokens < limits->max_model_len)
        truncate_front(&prompt->tokens, limits->max_model_len - completion->max_tokens);
    if (prompt->tokens.count == 0) {
        api_error_set(error, 400, "invalid_request_error", NULL, "prompt", "prompt must not be empty: it has no tokens.");
        return false;
    }
    return true;
}

bool completion_tokenize(struct completion *completion, const struct completion_limits *limits, struct api_error *error) {
    uint64_t total = 0, limit = limits->max_model_len > COMPLETION_TOKENS_MAX ? limits->max_model_len : COMPLETION_TOKENS_MAX;
    size_t longest = 0;
    for (uint32_t i = 0; i < completion->n_prompts; i++) {
        if (!tokenize_one(completion, &completion->prompts[i], limits, error)) return false;
        size_t count = completion->prompts[i].tokens.count;
        if (count > longest) longest = count;
        total += count;
    }
    /* Nobody asked for 16 tokens: what fits will do. */
    if (!completion->max_tokens_given && longest < limits->max_model_len && longest + completion->max_tokens > limits->max_model_len &&
        completion->min_tokens <= limits->max_model_len - longest)
        completion->max_tokens = limits->max_model_len - (uint32_t)longest;
    if (longest > limits->max_model_len || longest + completion->max_tokens > tokens_max(completion, limits))
        return too_long(completion, longest, limits, error);
    total = (total + (uint64_t)completion->n_prompts * completion->max_tokens) * completion->best_of;
    if (total > limit) {
        api_error_set(error, 400, "invalid_request_error", NULL, "prompt",
                      "The request asks for %" PRIu64 " tokens over all choices, prompts included; at most %" PRIu64 " are allowed.", total, limit);
        return false;
    }
    return true;
}
