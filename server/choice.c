/* See choice.h. */
#include "server/choice.h"

#include <math.h>
#include <string.h>

#include "base/check.h"
#include "base/clock.h"
#include "base/json_writer.h"

uint64_t count_characters(const char *bytes, size_t length) {
    uint64_t count = 0;
    for (size_t i = 0; i < length; count++) {
        size_t n = utf8_sequence_length(bytes + i, length - i);
        i += n ? n : 1;
    }
    return count;
}

void piece_clear(struct piece *piece) {
    piece->text.length = piece->records.length = 0;
    piece->n_records = 0;
}

void piece_done(struct piece *piece) {
    buffer_done(&piece->text);
    buffer_done(&piece->records);
}

static void append_record(struct buffer *records, const struct sample_result *sample, bool no_logprob, uint64_t offset) {
    struct record record = {
        .token = sample->token, .logprob = sample->logprob, .n_top = no_logprob ? 0 : sample->n_top, .no_logprob = no_logprob, .offset = offset};
    buffer_append(records, &record, sizeof record);
    for (int32_t i = 0; i < record.n_top; i++) {
        struct record_top top = {sample->top[i].token, sample->top[i].logprob};
        buffer_append(records, &top, sizeof top);
    }
}

const struct record *piece_next(const struct buffer *records, size_t *at) {
    if (*at == records->length) return NULL;
    /* Records are multiples of 8 bytes in memory from realloc: aligned. */
    const struct record *record = (const void *)(records->bytes + *at);
    *at += sizeof *record + (record->n_top > 0 ? (size_t)record->n_top * sizeof(struct record_top) : 0);
    return record;
}

void choice_init(struct choice *choice, const struct completion *completion, const struct tokenizer *tokenizer, uint32_t prompt, uint32_t candidate) {
    *choice = (struct choice){.completion = completion, .tokenizer = tokenizer, .prompt = prompt, .candidate = candidate, .stop_token = TOKEN_NONE};
    stop_match_init(&choice->stop, completion->stops, completion->n_stops, completion->keep_stop);
}

void choice_done(struct choice *choice) {
    buffer_done(&choice->records);
    stop_match_done(&choice->stop);
}

void choice_take(struct choice *choice, const struct event *event) {
    uint64_t now = clock_now_ns();
    if (!choice->seen) choice->cached = event->cached_tokens;
    choice->seen = true;
    if (event->has_token) {
        if (choice->n_events == 0) choice->first_ns = now;
        choice->last_ns = now;
        choice->n_events++;
        if (choice->record_at == choice->records.length) choice->record_at = choice->records.length = 0;
        if (!choice->closed) append_record(&choice->records, &event->sample, false, 0);
    }
    if (event->finish == FINISH_NONE) return;
    choice->ended = true;
    choice->finish = event->finish;
    choice->preemptions = event->preemptions;
    choice->scheduled_ns = event->scheduled_ns;
}

/* ---- echo ---- */

void choice_echo(struct choice *choice, const struct sample_result *results, struct piece *piece) {
    const struct completion *completion = choice->completion;
    const struct completion_prompt *prompt = &completion->prompts[choice->prompt];
    struct detokenizer detokenizer = {0};
    struct buffer text = {0};
    choice->echoed = true;
    /* A prompt given as text comes back as it was, so special tokens written in it are text; only the BOS that was added is not. */
    bool skip = prompt->is_text ? false : completion->skip_special;
    size_t whole = completion->truncate_prompt ? SIZE_MAX : 0;
    uint64_t characters = 0;
    for (size_t i = 0; i < prompt->tokens.count; i++) {
        int32_t token = prompt->tokens.tokens[i];
        bool added = i == 0 && prompt->is_text && completion->add_special && token == tokenizer_bos(choice->tokenizer) &&
                     tokenizer_adds_bos(choice->tokenizer);
        if (completion->logprobs >= 0) {
            struct sample_result none = {.token = token, .n_top = 0};
            append_record(&piece->records, results && i > 0 ? &results[i] : &none, !results || i == 0, characters);
            piece->n_records++;
        }
        size_t before = text.length;
        detokenizer_put(&detokenizer, choice->tokenizer, token, skip || added, &text);
        if (text.length > before) characters += count_characters(text.bytes + before, text.length - before);
    }
    detokenizer_finish(&detokenizer, &text);
    if (prompt->is_text && whole == 0) {
        text.length = 0;
        buffer_append(&text, completion->texts.bytes + prompt->text, prompt->text_length);
    }
    buffer_append(&piece->text, text.bytes, text.length);
    choice->characters = count_characters(text.bytes, text.length);
    buffer_done(&text);
}

/* ---- tokens ---- */

bool choice_ready(const struct choice *choice) { return !choice->closed && (choice->record_at < choice->records.length || choice->ended); }

static bool is_asked_stop(const struct completion *completion, int32_t token) {
    for (uint32_t i = 0; i < completion->n_stop_tokens; i++)
        if (completion->stop_tokens[i] == token) return true;
    return false;
}

static void close_choice(struct choice *choice, const char *reason) {
    choice->closed = true;
    choice->finish_reason = reason;
    buffer_done(&choice->records);
    choice->record_at = 0;
}

/* Bytes that became visible by themselves; `out` is what may go to the client. true: a stop string ended the text. */
static bool put_text(struct choice *choice, const struct buffer *fresh, struct buffer *out) {
    if (choice->n_tokens <= choice->completion->min_tokens) { /* stops are mute: no match may begin here */
        stop_match_flush(&choice->stop, out);
        buffer_append(out, fresh->bytes, fresh->length);
        return false;
    }
    return stop_match_put(&choice->stop, fresh->bytes, fresh->length, out);
}

static void end(struct choice *choice, struct piece *piece) {
    struct buffer rest = {0};
    detokenizer_finish(&choice->detokenizer, &rest);
    bool stopped = put_text(choice, &rest, &piece->text);
    buffer_done(&rest);
    if (!stopped) stop_match_flush(&choice->stop, &piece->text);
    close_choice(choice, stopped || choice->finish == FINISH_STOP ? "stop" : "length");
}

void choice_next(struct choice *choice, struct piece *piece) {
    const struct completion *completion = choice->completion;
    CHECK(!choice->closed);
    const struct record *record = piece_next(&choice->records, &choice->record_at);
    if (record) {
        bool last = choice->ended && choice->record_at == choice->records.length;
        bool stop_token = last && choice->finish == FINISH_STOP;
        struct buffer fresh = {0};
        choice->n_tokens++;
        choice->logprob_sum += (double)record->logprob;
        if (completion->logprobs >= 0) {
            size_t bytes = sizeof *record + (record->n_top > 0 ? (size_t)record->n_top * sizeof(struct record_top) : 0), at = piece->records.length;
            buffer_append(&piece->records, record, bytes);
            ((struct record *)(void *)(piece->records.bytes + at))->offset = choice->characters;
        }
        /* Token ids are wanted for return_token_ids too. */
        if (completion->logprobs < 0 && completion->return_token_ids) {
            struct record bare = {.token = record->token, .n_top = -1};
            buffer_append(&piece->records, &bare, sizeof bare);
        }
        piece->n_records++;
        if (stop_token && is_asked_stop(completion, record->token)) choice->stop_token = record->token;
        if (!stop_token || completion->keep_stop)
            detokenizer_put(&choice->detokenizer, choice->tokenizer, record->token, completion->skip_special, &fresh);
        choice->characters += count_characters(fresh.bytes, fresh.length);
        bool stopped = put_text(choice, &fresh, &piece->text);
        buffer_done(&fresh);
        if (stopped) {
            close_choice(choice, "stop");
            return;
        }
    }
    if (choice->ended && choice->record_at == choice->records.length) end(choice, piece);
}

double choice_mean_logprob(const struct choice *choice) { return choice->n_tokens ? choice->logprob_sum / choice->n_tokens : -INFINITY; }
