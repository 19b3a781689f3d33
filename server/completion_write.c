/* See completion_write.h. */
#include "server/completion_write.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "server/reply.h"

/* JSON has no infinities; this is what vLLM prints, and clients know it. */
static float printable(float logprob) { return isnan(logprob) || logprob < -9999.0f ? -9999.0f : logprob; }

/* A token that is no text by itself, such as a part of a character, goes by its bytes, as OpenAI has it: bytes:\\xe2\\x80. */
static void bytes_name(struct json_writer *json, const char *bytes, size_t length) {
    struct buffer name = {0};
    buffer_append_text(&name, "bytes:");
    for (size_t i = 0; i < length; i++) buffer_printf(&name, "\\x%02x", (unsigned)(unsigned char)bytes[i]);
    json_string(json, name.bytes, name.length);
    buffer_done(&name);
}

static void token_text(struct json_writer *json, const struct answer_head *head, int32_t token, bool key) {
    size_t length;
    const char *bytes = tokenizer_bytes(head->tokenizer, token, &length);
    if (head->completion->tokens_as_ids) {
        char name[32];
        (void)snprintf(name, sizeof name, "token_id:%" PRId32, token);
        json_text(json, name);
    } else if (utf8_valid(bytes, length)) {
        json_string(json, bytes, length);
    } else {
        bytes_name(json, bytes, length);
    }
    if (!key) return;
    /* A string as a key: the writer takes keys terminated, and a token may hold a zero byte. */
    buffer_append_byte(json->out, ':');
    json->comma[json->depth] = false;
}

/* Do two tokens print alike? */
static bool same_text(const struct answer_head *head, int32_t a, int32_t b) {
    size_t a_length, b_length;
    const char *a_bytes = tokenizer_bytes(head->tokenizer, a, &a_length), *b_bytes = tokenizer_bytes(head->tokenizer, b, &b_length);
    if (a == b) return true;
    if (head->completion->tokens_as_ids) return false;
    return a_length == b_length && memcmp(a_bytes, b_bytes, a_length) == 0;
}

/* The alternatives and the token itself, by text. Of two with one text the more probable stays: a key stands once. */
static void top_map(struct json_writer *json, const struct answer_head *head, const struct record *record) {
    const struct record_top *top = (const void *)(record + 1);
    int32_t most = head->completion->logprobs < record->n_top ? head->completion->logprobs : record->n_top;
    bool own = false;
    json_object(json);
    for (int32_t i = 0; i < most; i++) {
        bool seen = false;
        for (int32_t j = 0; j < i && !seen; j++) seen = same_text(head, top[i].token, top[j].token);
        if (same_text(head, top[i].token, record->token)) own = true;
        if (seen) continue;
        token_text(json, head, top[i].token, true);
        /* The sampled token's number is printed from one place, so that clients may compare the two for equality. */
        json_float(json, printable(top[i].token == record->token ? record->logprob : top[i].logprob));
    }
    if (!own) {
        token_text(json, head, record->token, true);
        json_float(json, printable(record->logprob));
    }
    json_object_end(json);
}

static void write_logprobs(struct json_writer *json, const struct answer_head *head, const struct piece *piece) {
    const struct record *record;
    json_key(json, "logprobs");
    if (head->completion->logprobs < 0) {
        json_null(json);
        return;
    }
    json_object(json);
    json_key(json, "tokens");
    json_array(json);
    for (size_t at = 0; (record = piece_next(&piece->records, &at));) token_text(json, head, record->token, false);
    json_array_end(json);
    json_key(json, "token_logprobs");
    json_array(json);
    for (size_t at = 0; (record = piece_next(&piece->records, &at));) {
        if (record->no_logprob)
            json_null(json);
        else
            json_float(json, printable(record->logprob));
    }
    json_array_end(json);
    json_key(json, "top_logprobs");
    json_array(json);
    for (size_t at = 0; (record = piece_next(&piece->records, &at));) {
        if (record->no_logprob)
            json_null(json);
        else
            top_map(json, head, record);
    }
    json_array_end(json);
    json_key(json, "text_offset");
    json_array(json);
    for (size_t at = 0; (record = piece_next(&piece->records, &at));) json_unsigned(json, record->offset);
    json_array_end(json);
    json_object_end(json);
}

static void write_usage(struct json_writer *json, const struct usage *usage) {
    json_object(json);
    json_key(json, "prompt_tokens");
    json_unsigned(json, usage->prompt_tokens);
    json_key(json, "completion_tokens");
    json_unsigned(json, usage->completion_tokens);
    json_key(json, "total_tokens");
    json_unsigned(json, usage->prompt_tokens + usage->completion_tokens);
    json_key(json, "prompt_tokens_details");
    json_object(json);
    json_key(json, "cached_tokens");
    json_unsigned(json, usage->cached_tokens);
    json_object_end(json);
    json_object_end(json);
}

static void stop_reason(struct json_writer *json, const struct choice *choice) {
    json_key(json, "stop_reason");
    if (choice->closed && choice->stop.matched >= 0)
        json_string(json, choice->stop.strings[choice->stop.matched].bytes, choice->stop.strings[choice->stop.matched].length);
    else if (choice->closed && choice->stop_token != TOKEN_NONE)
        json_integer(json, choice->stop_token);
    else
        json_null(json);
}

/* Ids of the answer's own tokens: behind those of an echoed prompt, of which there are n_prompt if it was echoed with logprobs. */
static void token_ids(struct json_writer *json, const struct answer_head *head, const struct choice *choice, const struct piece *piece,
                      bool with_prompt) {
    const struct token_list *prompt = &head->completion->prompts[choice->prompt].tokens;
    const struct record *record;
    size_t skip = with_prompt && head->completion->echo && head->completion->logprobs >= 0 ? prompt->count : 0;
    json_key(json, "token_ids");
    json_array(json);
    for (size_t at = 0, i = 0; (record = piece_next(&piece->records, &at)); i++)
        if (i >= skip) json_integer(json, record->token);
    json_array_end(json);
    if (!with_prompt) return;
    json_key(json, "prompt_token_ids");
    json_array(json);
    for (size_t i = 0; i < prompt->count; i++) json_integer(json, prompt->tokens[i]);
    json_array_end(json);
}

static void write_choice(struct json_writer *json, const struct answer_head *head, uint32_t index, const struct choice *choice,
                         const struct piece *piece, bool first) {
    json_object(json);
    json_key(json, "index");
    json_unsigned(json, index);
    json_key(json, "text");
    json_string(json, piece->text.bytes, piece->text.length);
    write_logprobs(json, head, piece);
    json_key(json, "finish_reason");
    if (choice->closed)
        json_text(json, choice->finish_reason);
    else
        json_null(json);
    stop_reason(json, choice);
    if (head->completion->return_token_ids) token_ids(json, head, choice, piece, first);
    json_object_end(json);
}

void write_answer_begin(struct json_writer *json, const struct answer_head *head, struct buffer *out) {
    json_begin(json, out);
    json_object(json);
    json_key(json, "id");
    json_text(json, head->id);
    json_key(json, "object");
    json_text(json, "text_completion");
    json_key(json, "created");
    json_integer(json, head->created);
    json_key(json, "model");
    json_text(json, head->model);
    json_key(json, "choices");
    json_array(json);
}

void write_answer_choice(struct json_writer *json, const struct answer_head *head, uint32_t index, const struct choice *choice,
                         const struct piece *piece) {
    write_choice(json, head, index, choice, piece, true);
}

/* [layers][heads]: each one's own rate; null for one without pairs. */
static void write_head_rates(struct json_writer *json, const struct kv_answer *kv) {
    json_array(json);
    for (uint32_t layer = 0; layer < kv->n_layers; layer++) {
        json_array(json);
        for (uint32_t head = 0; head < kv->n_kv_heads; head++) {
            const struct head_hits *hits = &kv->hits[layer * kv->n_kv_heads + head];
            if (hits->all > 0)
                json_float(json, (float)(hits->kept / hits->all));
            else
                json_null(json);
        }
        json_array_end(json);
    }
    json_array_end(json);
}

static void write_kv(struct json_writer *json, const struct kv_answer *kv) {
    const struct kv_report *report = &kv->report;
    const struct {
        const char *key;
        uint64_t value;
    } counts[] = {{"tokens_seen", report->tokens_seen},
                  {"slots_kept", report->slots_kept},
                  {"slots_evicted", report->slots_evicted},
                  {"blocks", report->blocks},
                  {"bytes", kv->bytes}};
    json_object(json);
    json_key(json, "policy");
    json_text(json, kv->policy);
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        json_key(json, counts[i].key);
        json_unsigned(json, counts[i].value);
    }
    json_key(json, "heads");
    json_object(json);
    json_key(json, "min");
    json_unsigned(json, report->head_min);
    json_key(json, "median");
    json_unsigned(json, kv->head_median);
    json_key(json, "max");
    json_unsigned(json, report->head_max);
    json_object_end(json);
    json_key(json, "hit_rate");
    if (report->hits_all > 0)
        json_double(json, report->hits_kept / report->hits_all);
    else
        json_null(json);
    json_key(json, "hit_rate_heads");
    if (kv->hits)
        write_head_rates(json, kv);
    else
        json_null(json);
    json_key(json, "pressure_compressions");
    json_unsigned(json, report->pressure_compressions);
    json_object_end(json);
}

void write_answer_end(struct json_writer *json, const struct answer_head *head, const struct usage *usage, const struct kv_answer *kv) {
    json_array_end(json);
    if (kv) {
        json_key(json, "kv");
        write_kv(json, kv);
    }
    if (usage) {
        json_key(json, "usage");
        write_usage(json, usage);
    }
    json_key(json, "system_fingerprint");
    json_text(json, head->fingerprint);
    json_object_end(json);
}

/* ---- SSE ---- */

void write_chunk(struct buffer *out, const struct answer_head *head, uint32_t index, const struct choice *choice, const struct piece *piece,
                 bool first, const struct usage *usage) {
    struct json_writer json;
    buffer_append_text(out, "data: ");
    write_answer_begin(&json, head, out);
    write_choice(&json, head, index, choice, piece, first);
    write_answer_end(&json, head, usage, NULL);
    buffer_append_text(out, "\n\n");
}

void write_last_chunk(struct buffer *out, const struct answer_head *head, const struct usage *usage, const struct kv_answer *kv) {
    struct json_writer json;
    buffer_append_text(out, "data: ");
    write_answer_begin(&json, head, out);
    write_answer_end(&json, head, usage, kv);
    buffer_append_text(out, "\n\n");
}

void write_error_chunk(struct buffer *out, const struct api_error *error) {
    buffer_append_text(out, "data: ");
    write_error(out, error);
    buffer_append_text(out, "\n\n");
}

void write_done(struct buffer *out) { buffer_append_text(out, "data: [DONE]\n\n"); }

void write_heartbeat(struct buffer *out) { buffer_append_text(out, ":\n\n"); }
