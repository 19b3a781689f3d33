/* What eval reads: the user's text, or sentences made up from word lists; windows over it; synthetic tasks with a fact planted in filler text. See eval.h. Everything is a
 * function of its seed. Owns nothing but what it gives out. Main thread. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "cli/eval.h"

#define TEXT_BYTES_MAX (1u << 30)
#define KEY_DIGITS 5

/* ---- sentences ---- */

static const char *const people[] = {"miller",   "captain", "old teacher", "gardener", "young clerk", "baker",  "doctor",    "painter",
                                     "shepherd", "widow",   "merchant",    "porter",   "carpenter",   "sailor", "traveller", "neighbour"};
static const char *const acts[] = {"carried", "found",  "mended",  "sold",     "painted", "hid",     "described", "forgot",
                                   "weighed", "wanted", "counted", "borrowed", "cleaned", "dropped", "admired",   "opened"};
static const char *const things[] = {"a basket of apples",  "the brass lamp",    "two wooden chairs", "a letter from home",
                                     "the blue curtain",    "an iron gate",      "some warm bread",   "a leather saddle",
                                     "the broken clock",    "a bundle of straw", "the map",           "a jar of honey",
                                     "three silver spoons", "the garden door",   "a heavy book",      "the yellow boat"};
static const char *const places[] = {"near the bridge",  "behind the church", "in the market", "on the hill",     "by the river",   "at the inn",
                                     "under the oak",    "across the yard",   "in the cellar", "along the road",  "at the harbour", "in the orchard",
                                     "beside the stove", "outside the town",  "on the stairs", "below the window"};
static const char *const times[] = {"in the morning", "before supper", "that winter", "after the rain",
                                    "on Tuesday",     "late at night", "as always",   "without a word"};
static const char *const ends[] = {
    "Nobody asked why.",           "The weather was mild.",     "It took the whole day.",      "The dog slept by the fire.",
    "There was little to say.",    "A cart passed slowly.",     "The children laughed at it.", "Then the wind turned.",
    "Everyone went home early.",   "The kettle began to sing.", "It cost less than before.",   "The bells rang twice.",
    "No one remembered the name.", "Some said it was luck.",    "The lane was muddy again.",   "The rest can be imagined."};
#define PICK(list, random) (list)[random_below(random, sizeof(list) / sizeof *(list))]

static void append_sentence(struct buffer *text, struct random *random) {
    buffer_printf(text, " The %s %s %s", PICK(people, random), PICK(acts, random), PICK(things, random));
    buffer_printf(text, " %s", PICK(places, random));
    if (random_below(random, 2)) buffer_printf(text, " %s", PICK(times, random));
    buffer_append_text(text, ".");
    if (random_below(random, 3) == 0) buffer_printf(text, " %s", PICK(ends, random));
}

/* Appends at least `min_tokens` tokens of sentences. */
static enum status make_up(const struct tokenizer *tokenizer, size_t min_tokens, struct random *random, struct token_list *list,
                           struct error *error) {
    size_t wanted = list->count + min_tokens;
    enum status status = STATUS_OK;
    while (list->count < wanted && status == STATUS_OK) {
        struct buffer text = {0};
        for (int i = 0; i < 16; i++) append_sentence(&text, random);
        size_t before = list->count;
        status = tokenizer_encode(tokenizer, text.bytes, text.length, false, false, 0, list, error);
        buffer_done(&text);
        if (status == STATUS_OK && list->count == before)
            status = error_set(error, STATUS_UNSUPPORTED, "eval: this model's tokenizer makes no tokens of plain sentences");
    }
    return status;
}

/* ---- text ---- */

static enum status read_text(const char *path, char **bytes, size_t *length, struct error *error) {
    FILE *file = fopen(path, "rb");
    if (!file) return error_set(error, STATUS_IO, "--text: %.300s: %s", path, strerror(errno));
    struct buffer text = {0};
    size_t got = 1;
    while (got > 0 && text.length <= TEXT_BYTES_MAX) {
        got = fread(buffer_reserve(&text, 1u << 16), 1, 1u << 16, file);
        text.length += got;
    }
    bool failed = ferror(file) != 0;
    int number = errno;
    (void)fclose(file);
    *bytes = text.bytes;
    *length = text.length;
    if (!failed && text.length > 0 && text.length <= TEXT_BYTES_MAX) return STATUS_OK;
    buffer_done(&text);
    if (failed) return error_set(error, STATUS_IO, "--text: %.300s: %s", path, strerror(number));
    return error_set(error, STATUS_INVALID, "--text: %.300s: %s", path, *length ? "more than 1 GiB" : "empty");
}

enum status eval_text_open(const char *path, const struct tokenizer *tokenizer, size_t min_tokens, struct eval_text *text, struct error *error) {
    *text = (struct eval_text){.made_up = !path[0], .begins = tokenizer_adds_bos(tokenizer) && tokenizer_bos(tokenizer) != TOKEN_NONE};
    if (text->begins) text->begin = tokenizer_bos(tokenizer);
    if (text->made_up) {
        struct random random = {.state = 1};
        return make_up(tokenizer, min_tokens, &random, &text->list, error);
    }
    char *bytes = NULL;
    size_t length = 0;
    enum status status = read_text(path, &bytes, &length, error);
    if (status != STATUS_OK) return status;
    status = tokenizer_encode(tokenizer, bytes, length, false, false, 0, &text->list, error);
    free(bytes);
    if (status == STATUS_OK && text->list.count < min_tokens)
        status = error_set(error, STATUS_INVALID, "--text: %.200s: %zu tokens; prompt and continuation of one window take %zu", path,
                           text->list.count, min_tokens);
    return status;
}

void eval_text_done(struct eval_text *text) { token_list_done(&text->list); }

size_t eval_window_start(uint32_t i, uint32_t n, size_t span, size_t total) {
    CHECK(i < n && span <= total);
    return n == 1 ? 0 : (size_t)((unsigned __int128)(total - span) * i / (n - 1));
}

bool eval_windows_overlap(uint32_t n, size_t span, size_t total) { return n > 1 && (total - span) / (n - 1) < span; }

void eval_text_take(const struct eval_text *text, size_t start, size_t span, int32_t *tokens, bool begin) {
    CHECK(start <= text->list.count && span <= text->list.count - start);
    memcpy(tokens, text->list.tokens + start, span * sizeof *tokens);
    if (begin && text->begins && span > 0) tokens[0] = text->begin;
}

/* Punctuation: bytes that are neither letters, digits, spaces nor parts of longer characters, alone or after a space. */
static bool is_punctuation(const char *bytes, size_t length) {
    bool any = false;
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)bytes[i];
        bool mark = c > ' ' && c < 0x7f && !(c >= '0' && c <= '9') && !(c >= 'A' && c <= 'Z') && !(c >= 'a' && c <= 'z');
        if (!mark && c != ' ' && c != '\n') return false;
        any |= mark;
    }
    return any;
}

uint8_t *eval_token_classes(const struct tokenizer *tokenizer, uint32_t n_vocab) {
    uint8_t *classes = check_calloc(n_vocab, 1);
    for (uint32_t token = 0; token < n_vocab; token++) {
        size_t length;
        const char *bytes = tokenizer_bytes(tokenizer, (int32_t)token, &length);
        if (tokenizer_is_special(tokenizer, (int32_t)token))
            classes[token] = TOKEN_CLASS_SPECIAL;
        else if (is_punctuation(bytes, length))
            classes[token] = TOKEN_CLASS_PUNCTUATION;
    }
    return classes;
}

/* ---- tasks ---- */

static void put(struct token_list *list, const int32_t *tokens, size_t n) {
    if (n == 0) return;
    CHECK(tokens);
    if (list->count + n > list->capacity) {
        list->capacity = 2 * list->capacity + n;
        list->tokens = check_realloc(list->tokens, list->capacity, sizeof *list->tokens);
    }
    memcpy(list->tokens + list->count, tokens, n * sizeof *tokens);
    list->count += n;
}

static enum status encode(const struct tokenizer *tokenizer, const char *text, struct token_list *list, struct error *error) {
    return tokenizer_encode(tokenizer, text, strlen(text), false, false, 0, list, error);
}

/* n tokens: filler, `fact` at `depth`, filler. */
static enum status bury(const struct tokenizer *tokenizer, const struct token_list *fact, size_t n, double depth, struct random *random,
                        struct token_list *out, struct error *error) {
    struct token_list filler = {0};
    bool begins = tokenizer_adds_bos(tokenizer) && tokenizer_bos(tokenizer) != TOKEN_NONE;
    CHECK(n > fact->count + 1);
    size_t n_filler = n - fact->count - begins;
    enum status status = make_up(tokenizer, n_filler, random, &filler, error);
    if (status == STATUS_OK) {
        int32_t begin = tokenizer_bos(tokenizer);
        size_t before = (size_t)(depth * (double)n_filler);
        if (begins) put(out, &begin, 1);
        put(out, filler.tokens, before);
        put(out, fact->tokens, fact->count);
        put(out, filler.tokens + before, n_filler - before);
    }
    token_list_done(&filler);
    return status;
}

static void random_key(struct random *random, char key[KEY_DIGITS + 1]) {
    for (int i = 0; i < KEY_DIGITS; i++) key[i] = (char)('0' + random_below(random, 10));
    key[0] = (char)(key[0] == '0' ? '1' : key[0]);
    key[KEY_DIGITS] = '\0';
}

/* Ten different keys in `answers`, each after the question's last token; keys whose tokens are more or fewer than the right one's are drawn again. */
static enum status make_candidates(const struct tokenizer *tokenizer, int32_t last, const char *right, struct random *random, struct eval_task *task,
                                   struct error *error) {
    char keys[EVAL_CANDIDATES][KEY_DIGITS + 1];
    task->right = random_below(random, EVAL_CANDIDATES);
    (void)snprintf(keys[0], sizeof keys[0], "%s", right);
    size_t length = 0;
    uint32_t n = 0, draws = 0;
    while (n < EVAL_CANDIDATES) {
        struct token_list list = {0};
        char words[KEY_DIGITS + 2];
        bool fresh = true;
        if (n > 0) random_key(random, keys[n]);
        for (uint32_t i = 0; i < n; i++) fresh &= strcmp(keys[i], keys[n]) != 0;
        (void)snprintf(words, sizeof words, " %s", keys[n]);
        put(&list, &last, 1);
        enum status status = encode(tokenizer, words, &list, error);
        if (n == 0) length = list.count;
        bool fits = status == STATUS_OK && fresh && list.count == length;
        if (fits)
            task->answers[n == 0 ? task->right : n <= task->right ? n - 1 : n] = list;
        else
            token_list_done(&list);
        if (status != STATUS_OK) return status;
        if (length < 2 || length > EVAL_ANSWER_MAX || ++draws > 10000)
            return error_set(error, STATUS_UNSUPPORTED,
                             "eval: this model's tokenizer gives no ten numbers of equally many tokens; --tasks 0 leaves them out");
        n += fits;
    }
    return STATUS_OK;
}

enum status eval_passkey(const struct tokenizer *tokenizer, uint32_t n_prompt, double depth, uint64_t seed, struct eval_task *task,
                         struct error *error) {
    *task = (struct eval_task){0};
    struct random random = {.state = random_at(seed, 1, 0, 0)};
    char key[KEY_DIGITS + 1], words[128];
    random_key(&random, key);
    struct token_list fact = {0};
    (void)snprintf(words, sizeof words, " The pass key is %s. Remember it: %s is the pass key.", key, key);
    enum status status = encode(tokenizer, words, &fact, error);
    if (status == STATUS_OK) status = encode(tokenizer, " What is the pass key? The pass key is", &task->question, error);
    if (status == STATUS_OK && task->question.count + fact.count + 16 > n_prompt)
        status = error_set(error, STATUS_INVALID, "--prompt: %" PRIu32 " tokens are too few for the passkey task", n_prompt);
    if (status == STATUS_OK) {
        int32_t last = task->question.tokens[--task->question.count];
        status = make_candidates(tokenizer, last, key, &random, task, error);
    }
    if (status == STATUS_OK) status = bury(tokenizer, &fact, n_prompt - task->question.count, depth, &random, &task->context, error);
    token_list_done(&fact);
    return status;
}

enum status eval_copy(const struct tokenizer *tokenizer, uint32_t n_vocab, uint32_t n_prompt, double depth, uint64_t seed, struct eval_task *task,
                      struct error *error) {
    *task = (struct eval_task){0};
    struct random random = {.state = random_at(seed, 2, 0, 0)};
    struct token_list fact = {0};
    enum status status = STATUS_OK;
    for (uint32_t draws = 0; fact.count < EVAL_COPY_TOKENS && status == STATUS_OK; draws++) {
        int32_t token = (int32_t)random_below(&random, n_vocab);
        if (!tokenizer_is_special(tokenizer, token) && !tokenizer_is_end(tokenizer, token)) put(&fact, &token, 1);
        if (draws > 10000) status = error_set(error, STATUS_UNSUPPORTED, "eval: this model's vocabulary has hardly an ordinary token");
    }
    if (status == STATUS_OK && EVAL_COPY_TOKENS + EVAL_COPY_GIVEN + 16 > n_prompt)
        status = error_set(error, STATUS_INVALID, "--prompt: %" PRIu32 " tokens are too few for the copy task", n_prompt);
    if (status == STATUS_OK) status = bury(tokenizer, &fact, n_prompt - (EVAL_COPY_GIVEN - 1), depth, &random, &task->context, error);
    if (status == STATUS_OK) {
        put(&task->context, fact.tokens, EVAL_COPY_GIVEN - 1);
        put(&task->answers[0], fact.tokens + EVAL_COPY_GIVEN - 1, EVAL_COPY_ASKED + 1);
    }
    token_list_done(&fact);
    return status;
}

void eval_task_done(struct eval_task *task) {
    token_list_done(&task->context);
    token_list_done(&task->question);
    for (uint32_t i = 0; i < EVAL_CANDIDATES; i++) token_list_done(&task->answers[i]);
}
