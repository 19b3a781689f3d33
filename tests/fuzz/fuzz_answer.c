/* A request and the tokens that a model might answer it with, any bytes: the answer is valid JSON, the stream is the answer in pieces. Rooms: server model
 * The request's JSON, up to the first zero byte or 0xff; behind it the tokens, a byte each (vocabulary: tokenizer_byte_level), so that texts hold broken UTF-8, halves of stop strings and zero
 * bytes wherever they hurt. The last token ends the answer: by EOS where the length of the input is odd. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "base/check.h"
#include "model/tokenizer_load.h"
#include "server/completion_write.h"
#include "server/json_reader.h"
#include "tests/fuzz/completion_limits.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define CONTEXT 400
#define TOKENS_MAX 300

static struct config config;
static struct tokenizer *tokenizer;

static uint32_t member(const struct json_document *json, uint32_t object, const char *name) {
    CHECK(json->nodes[object].type == JSON_OBJECT);
    uint32_t key = object + 1;
    while (key < json->nodes[object].next && !json_string_equals(json, key, name)) key = json->nodes[key + 1].next;
    CHECK(key < json->nodes[object].next);
    return key + 1;
}

/* The choice's node. */
static uint32_t read_answer(struct json_document *json, const char *text, size_t length) {
    struct json_failure failure;
    CHECK(json_read(json, text, length, UINT32_MAX, &failure));
    uint32_t choices = member(json, 0, "choices");
    CHECK(json->nodes[choices].type == JSON_ARRAY && json->nodes[choices].length == 1);
    return choices + 1;
}

/* Four arrays of one length, offsets that never fall. Returns how many tokens they speak of. */
static uint32_t check_logprobs(const struct json_document *json, uint32_t logprobs, uint64_t *offset) {
    static const char *const names[] = {"tokens", "token_logprobs", "top_logprobs", "text_offset"};
    uint32_t count = json->nodes[member(json, logprobs, names[0])].length;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) CHECK(json->nodes[member(json, logprobs, names[i])].length == count);
    uint32_t offsets = member(json, logprobs, names[3]);
    for (uint32_t node = offsets + 1; node < json->nodes[offsets].next; node++) {
        int64_t at;
        CHECK(json_int64(json, node, &at) && (uint64_t)at >= *offset);
        *offset = (uint64_t)at;
    }
    return count;
}

struct said { /* of one choice, from one answer or all chunks */
    struct buffer text, reason;
    uint64_t offset;
    uint32_t n_logprobs, n_ids;
};

static void said_done(struct said *said) {
    buffer_done(&said->text);
    buffer_done(&said->reason);
}

static void hear(const char *text, size_t length, const struct completion *completion, struct said *said) {
    struct json_document json;
    uint32_t choice = read_answer(&json, text, length);
    json_string_append(&json, member(&json, choice, "text"), &said->text);
    uint32_t reason = member(&json, choice, "finish_reason"), logprobs = member(&json, choice, "logprobs");
    if (json.nodes[reason].type == JSON_STRING) json_string_append(&json, reason, &said->reason);
    CHECK((json.nodes[logprobs].type == JSON_OBJECT) == (completion->logprobs >= 0));
    if (completion->logprobs >= 0) said->n_logprobs += check_logprobs(&json, logprobs, &said->offset);
    if (completion->return_token_ids) said->n_ids += json.nodes[member(&json, choice, "token_ids")].length;
    json_document_done(&json);
}

static void take(struct choice *choice, const uint8_t *tokens, uint32_t i, uint32_t count, bool stopped) {
    struct event event = {.has_token = true, .sample = {.token = tokens[i], .logprob = tokens[i] ? -(float)tokens[i] : -INFINITY, .n_top = -1}};
    const struct completion *completion = choice->completion;
    if (completion->logprobs >= 0) event.sample.n_top = completion->logprobs;
    for (int32_t t = 0; t < event.sample.n_top; t++)
        event.sample.top[t].token = (tokens[i] + 37 * t) % VOCABULARY, event.sample.top[t].logprob = -(float)t;
    if (i + 1 == count) {
        event.finish = stopped ? FINISH_STOP : FINISH_LENGTH;
        if (stopped) event.sample.token = completion->n_stop_tokens ? completion->stop_tokens[0] : tokenizer_eos(tokenizer);
    }
    choice_take(choice, &event);
}

/* Whole: all tokens have come before the first is looked at. Else each is said as it comes. */
static uint32_t play(const struct completion *completion, const uint8_t *tokens, uint32_t count, bool stopped, bool whole, struct said *said) {
    const struct answer_head head = {.id = "cmpl-1", .model = "m", .fingerprint = "f", .completion = completion, .tokenizer = tokenizer};
    const struct usage usage = {.prompt_tokens = 1, .completion_tokens = count};
    struct choice choice;
    struct piece piece = {0};
    struct buffer out = {0};
    struct json_writer json;
    choice_init(&choice, completion, tokenizer, 0, 0);
    for (uint32_t i = 0; i < count && !choice.closed; i++) {
        take(&choice, tokens, i, count, stopped);
        if (whole && i + 1 < count) continue;
        while (choice_ready(&choice)) {
            bool first = choice.n_tokens == 0;
            if (!whole) piece_clear(&piece);
            if (completion->echo && !choice.echoed) choice_echo(&choice, NULL, &piece);
            choice_next(&choice, &piece);
            if (whole) continue;
            out.length = 0;
            write_chunk(&out, &head, 0, &choice, &piece, first, completion->continuous_usage ? &usage : NULL);
            CHECK(out.length > 8 && memcmp(out.bytes, "data: ", 6) == 0 && memchr(out.bytes, '\n', out.length) == out.bytes + out.length - 2);
            hear(out.bytes + 6, out.length - 8, completion, said);
        }
    }
    CHECK(choice.closed && choice.finish_reason);
    if (whole) {
        write_answer_begin(&json, &head, &out);
        write_answer_choice(&json, &head, 0, &choice, &piece);
        write_answer_end(&json, &head, &usage, NULL);
        hear(out.bytes, out.length, completion, said);
    }
    uint32_t n_tokens = choice.n_tokens;
    choice_done(&choice);
    piece_done(&piece);
    buffer_done(&out);
    return n_tokens;
}

static bool same(const struct buffer *a, const struct buffer *b) {
    return a->length == b->length && (a->length == 0 || memcmp(a->bytes, b->bytes, a->length) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!tokenizer) {
        tokenizer = tokenizer_byte_level(VOCABULARY);
        config_defaults(&config);
    }
    const struct completion_limits limits = small_completion_limits(tokenizer, CONTEXT, &config);
    size_t body = 0;
    while (body < size && data[body] != 0 && data[body] != 0xff) body++;
    size_t left = body < size ? size - body - 1 : 0;
    uint32_t count = left < TOKENS_MAX ? (uint32_t)left : TOKENS_MAX;
    struct completion completion;
    struct api_error error = {0};
    if (completion_parse(&completion, (const char *)data, body, &limits, &error) && completion_tokenize(&completion, &limits, &error) && count > 0) {
        const uint8_t *tokens = data + body + 1;
        struct said whole = {0}, streamed = {0};
        uint32_t n_tokens = play(&completion, tokens, count, size % 2, true, &whole);
        CHECK(play(&completion, tokens, count, size % 2, false, &streamed) == n_tokens && n_tokens <= count);
        CHECK(same(&whole.text, &streamed.text) && same(&whole.reason, &streamed.reason) && whole.reason.length > 0);
        CHECK(whole.n_logprobs == streamed.n_logprobs && whole.n_ids == streamed.n_ids);
        if (completion.logprobs >= 0) CHECK(whole.n_logprobs == n_tokens + (completion.echo ? completion.prompts[0].tokens.count : 0));
        if (completion.return_token_ids) CHECK(whole.n_ids == n_tokens);
        said_done(&whole);
        said_done(&streamed);
    }
    completion_done(&completion);
    return 0;
}
