/* Bodies of requests, any bytes: they become values within their ranges, or one 4xx; and JSON that is accepted has a tree that covers itself. Rooms: server model
 * One input goes to every parser of the HTTP interface. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "base/check.h"
#include "base/json_writer.h"
#include "model/tokenizer_load.h"
#include "server/json_reader.h"
#include "tests/fuzz/completion_limits.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define CONTEXT 200

static void check_error(const struct api_error *error) {
    CHECK(error->status >= 400 && error->status < 500);
    CHECK(error->type && error->message[0]);
    CHECK(memchr(error->message, '\0', sizeof error->message) && memchr(error->param, '\0', sizeof error->param));
}

static void check_completion(const struct completion *completion) {
    const struct sampling *sampling = &completion->sampling;
    CHECK(completion->n_prompts >= 1 && completion->n_prompts <= PROMPTS_MAX);
    CHECK(completion->n >= 1 && completion->best_of >= completion->n && completion->n_prompts * completion->best_of <= CHOICES_MAX);
    CHECK(completion->min_tokens <= completion->max_tokens && completion->logprobs >= -1 && completion->logprobs <= LOGPROBS_MAX);
    CHECK(sampling->temperature >= 0 && sampling->temperature <= 2 && sampling->top_p > 0 && sampling->top_p <= 1 && sampling->top_k >= 0);
    CHECK(sampling->min_p >= 0 && sampling->min_p <= 1 && sampling->repetition_penalty > 0 && isfinite(sampling->repetition_penalty));
    CHECK(fabsf(sampling->presence_penalty) <= 2 && fabsf(sampling->frequency_penalty) <= 2);
    CHECK(completion->n_stops <= STOP_STRINGS_MAX && completion->n_stop_tokens <= COMPLETION_STOP_TOKENS_MAX);
    for (uint32_t i = 0; i < completion->n_stops; i++) {
        CHECK(completion->stops[i].length >= 1 && completion->stops[i].length <= STOP_STRING_BYTES_MAX);
        CHECK(completion->stops[i].bytes >= completion->texts.bytes &&
              completion->stops[i].bytes + completion->stops[i].length <= completion->texts.bytes + completion->texts.length);
    }
    for (uint32_t i = 0; i < sampling->n_bias; i++)
        CHECK(sampling->bias[i].token >= 0 && sampling->bias[i].token < VOCABULARY && !isnan(sampling->bias[i].bias));
    for (uint32_t i = 0; i < completion->n_prompts; i++) {
        const struct token_list *tokens = &completion->prompts[i].tokens;
        CHECK(tokens->count >= 1 && tokens->count + completion->max_tokens <= CONTEXT);
        for (size_t j = 0; j < tokens->count; j++) CHECK(tokens->tokens[j] >= 0 && tokens->tokens[j] < VOCABULARY);
    }
}

/* Children end where their parent ends; every string decodes to valid UTF-8. */
static void check_tree(const struct json_document *document) {
    for (uint32_t i = 0; i < document->n_nodes; i++) {
        const struct json_node *node = &document->nodes[i];
        CHECK(node->next > i && node->next <= document->n_nodes);
        if (node->type == JSON_STRING) {
            struct buffer bytes = {0};
            json_string_append(document, i, &bytes);
            CHECK(utf8_valid(bytes.bytes, bytes.length) && bytes.length <= node->length);
            buffer_done(&bytes);
        }
        if (node->type != JSON_ARRAY && node->type != JSON_OBJECT) continue;
        uint32_t child = i + 1, count = 0;
        for (; child < node->next; child = document->nodes[child].next) count++;
        CHECK(child == node->next && count == (node->type == JSON_ARRAY ? node->length : 2 * node->length));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static struct tokenizer *tokenizer;
    if (!tokenizer) tokenizer = tokenizer_byte_level(VOCABULARY);
    static struct config config;
    config_defaults(&config);
    const struct completion_limits limits = small_completion_limits(tokenizer, CONTEXT, &config);
    const char *body = (const char *)data;
    struct json_document document;
    struct json_failure failure;
    if (json_read(&document, body, size, 10000, &failure))
        check_tree(&document);
    else
        CHECK(failure.what && failure.offset <= size);
    json_document_done(&document);

    struct completion completion;
    struct api_error error = {0};
    if (completion_parse(&completion, body, size, &limits, &error) && completion_tokenize(&completion, &limits, &error))
        check_completion(&completion);
    else
        check_error(&error);
    completion_done(&completion);

    struct tokenize_request request;
    error = (struct api_error){0};
    if (!tokenize_parse(&request, body, size, &limits, &error)) check_error(&error);
    tokenize_request_done(&request);
    error = (struct api_error){0};
    if (!detokenize_parse(&request, body, size, &limits, &error)) check_error(&error);
    tokenize_request_done(&request);
    return 0;
}
