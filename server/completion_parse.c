/* See completion.h. One row a field: adding one is adding a row and its reader. Owns nothing but what it puts into the struct completion. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "server/field.h"
#include "server/sha256.h"

struct parse {
    struct fields fields;
    struct completion *completion;
    const struct completion_limits *limits;
    bool model_unknown, have_prompt, have_stream_options;
    size_t stop_starts[STOP_STRINGS_MAX]; /* in `texts`, which may still move: pointers are made at the end */
};

static const struct json_node *node_at(const struct parse *parse, uint32_t node) { return &parse->fields.document.nodes[node]; }

/* ---- text ---- */

/* Appends a string to `texts`; where it begins. */
static size_t keep_text(struct parse *parse, uint32_t node, size_t *length) {
    struct buffer *texts = &parse->completion->texts;
    size_t start = texts->length;
    json_string_append(&parse->fields.document, node, texts);
    *length = texts->length - start;
    return start;
}

static bool read_model(struct parse *parse, const char *name, uint32_t node) {
    const struct json_node *json = node_at(parse, node);
    if (json->type == JSON_NULL) return true;
    if (json->type != JSON_STRING) return field_fail(&parse->fields, name, "model must be a string, not %s.", field_type_name(json));
    if (!json_string_equals(&parse->fields.document, node, parse->limits->served_name)) {
        struct buffer asked = {0};
        json_string_append(&parse->fields.document, node, &asked);
        api_error_set(parse->fields.error, 404, "invalid_request_error", "model_not_found", name,
                      "The model '%.*s' does not exist; this server has '%s'.", asked.length < 80 ? (int)asked.length : 80,
                      asked.length ? asked.bytes : "", parse->limits->served_name);
        buffer_done(&asked);
        parse->model_unknown = true; /* said only if nothing else is wrong */
    }
    return true;
}

static bool add_prompt(struct parse *parse, const char *name, uint32_t node, struct completion_prompt *prompt) {
    const struct json_node *json = node_at(parse, node);
    uint32_t n_vocab = tokenizer_vocabulary(parse->limits->tokenizer);
    if (json->length == 0) return field_fail(&parse->fields, name, "prompt must not be empty.");
    if (json->type == JSON_STRING) {
        prompt->is_text = true;
        prompt->text = keep_text(parse, node, &prompt->text_length);
        return true;
    }
    return field_tokens(&parse->fields, name, node, n_vocab, &prompt->tokens);
}

/* A string, an array of strings, an array of ids, an array of arrays of ids. */
static bool read_prompt(struct parse *parse, const char *name, uint32_t node) {
    const struct json_node *json = node_at(parse, node);
    struct completion *completion = parse->completion;
    parse->have_prompt = true;
    if (json->type == JSON_NULL) { /* OpenAI: the beginning of a document */
        int32_t first = tokenizer_bos(parse->limits->tokenizer);
        if (first == TOKEN_NONE) first = tokenizer_eos(parse->limits->tokenizer);
        if (first == TOKEN_NONE) return field_fail(&parse->fields, name, "This model has no token to begin a document with: prompt is needed.");
        completion->prompts = check_calloc(1, sizeof *completion->prompts);
        completion->n_prompts = 1;
        completion->prompts[0].tokens.tokens = check_calloc(1, sizeof(int32_t));
        completion->prompts[0].tokens.capacity = completion->prompts[0].tokens.count = 1;
        completion->prompts[0].tokens.tokens[0] = first;
        return true;
    }
    if (json->type != JSON_STRING && json->type != JSON_ARRAY)
        return field_fail(&parse->fields, name, "prompt must be a string, an array of strings, or token ids, not %s.", field_type_name(json));
    if (json->length == 0) return field_fail(&parse->fields, name, "prompt must not be empty.");
    uint8_t first = json->type == JSON_ARRAY ? node_at(parse, node + 1)->type : JSON_STRING;
    bool many = json->type == JSON_ARRAY && first != JSON_NUMBER;
    uint32_t count = many ? json->length : 1;
    if (many && first != JSON_STRING && first != JSON_ARRAY)
        return field_fail(&parse->fields, name, "prompt must hold strings or token ids, not %s.", field_type_name(node_at(parse, node + 1)));
    if (count > parse->limits->max_prompts)
        return field_fail(&parse->fields, name, "prompt has %u entries; at most %u are allowed.", count, parse->limits->max_prompts);
    completion->prompts = check_calloc(count, sizeof *completion->prompts);
    completion->n_prompts = count;
    if (!many) return add_prompt(parse, name, node, &completion->prompts[0]);
    uint32_t child = node + 1;
    for (uint32_t i = 0; i < count; i++, child = node_at(parse, child)->next) {
        if (node_at(parse, child)->type != first)
            return field_fail(&parse->fields, name, "prompt mixes %s and %s.", field_type_name(node_at(parse, node + 1)),
                              field_type_name(node_at(parse, child)));
        if (!add_prompt(parse, name, child, &completion->prompts[i])) return false;
    }
    return true;
}

static bool add_stop(struct parse *parse, const char *name, uint32_t node) {
    const struct json_node *json = node_at(parse, node);
    struct completion *completion = parse->completion;
    size_t length;
    if (json->type != JSON_STRING) return field_fail(&parse->fields, name, "stop must hold strings, not %s.", field_type_name(json));
    size_t start = keep_text(parse, node, &length);
    if (length == 0) return field_fail(&parse->fields, name, "stop must not hold an empty string.");
    if (length > STOP_STRING_BYTES_MAX)
        return field_fail(&parse->fields, name, "a stop string has at most %d bytes, not %zu.", STOP_STRING_BYTES_MAX, length);
    parse->stop_starts[completion->n_stops] = start;
    completion->stops[completion->n_stops++].length = length;
    return true;
}

static bool read_stop(struct parse *parse, const char *name, uint32_t node) {
    const struct json_node *json = node_at(parse, node);
    if (json->type == JSON_NULL) return true;
    if (json->type == JSON_STRING) return add_stop(parse, name, node);
    if (json->type != JSON_ARRAY)
        return field_fail(&parse->fields, name, "stop must be a string or an array of strings, not %s.", field_type_name(json));
    if (json->length > STOP_STRINGS_MAX)
        return field_fail(&parse->fields, name, "stop has %u strings; at most %d are allowed.", json->length, STOP_STRINGS_MAX);
    for (uint32_t child = node + 1; child < json->next; child = node_at(parse, child)->next)
        if (!add_stop(parse, name, child)) return false;
    return true;
}

static bool read_suffix(struct parse *parse, const char *name, uint32_t node) {
    const struct json_node *json = node_at(parse, node);
    if (json->type == JSON_NULL || (json->type == JSON_STRING && json->length == 0)) return true;
    return field_fail(&parse->fields, name, "suffix is not supported: this server does not insert text.");
}

static bool read_salt(struct parse *parse, const char *name, uint32_t node) {
    const struct json_node *json = node_at(parse, node);
    if (json->type == JSON_NULL) return true;
    if (json->type != JSON_STRING || json->length == 0 || json->length > 1024)
        return field_fail(&parse->fields, name, "cache_salt must be a string of 1 to 1024 bytes.");
    struct buffer salt = {0};
    json_string_append(&parse->fields.document, node, &salt);
    sha256(salt.bytes, salt.length, parse->completion->salt);
    buffer_done(&salt);
    parse->completion->has_salt = true;
    return true;
}

/* ---- tokens ---- */

static bool read_stop_tokens(struct parse *parse, const char *name, uint32_t node) {
    const struct json_node *json = node_at(parse, node);
    struct completion *completion = parse->completion;
    if (json->type == JSON_NULL) return true;
    if (json->type != JSON_ARRAY)
        return field_fail(&parse->fields, name, "stop_token_ids must be an array of token ids, not %s.", field_type_name(json));
    if (json->length > COMPLETION_STOP_TOKENS_MAX)
        return field_fail(&parse->fields, name, "stop_token_ids has %u ids; at most %d are allowed.", json->length, COMPLETION_STOP_TOKENS_MAX);
    for (uint32_t child = node + 1; child < json->next; child = node_at(parse, child)->next)
        if (!field_token(&parse->fields, name, child, tokenizer_vocabulary(parse->limits->tokenizer),
                         &completion->stop_tokens[completion->n_stop_tokens++]))
            return false;
    return true;
}

static bool add_bias(struct parse *parse, const char *name, int64_t token, uint32_t value_node) {
    struct completion *completion = parse->completion;
    uint32_t n_vocab = tokenizer_vocabulary(parse->limits->tokenizer);
    struct logit_bias *bias = &completion->bias[completion->sampling.n_bias];
    const struct json_node *value = node_at(parse, value_node);
    if (token < 0 || token >= n_vocab)
        return field_fail(&parse->fields, name, "logit_bias: token id %" PRId64 " is outside the vocabulary (0 to %u).", token, n_vocab - 1);
    for (uint32_t i = 0; i < completion->sampling.n_bias; i++)
        if (completion->bias[i].token == (int32_t)token)
            return field_fail(&parse->fields, name, "logit_bias: token id %" PRId64 " stands twice.", token);
    bias->token = (int32_t)token;
    if (value->type == JSON_FALSE) /* llama.cpp: never */
        bias->bias = -INFINITY;
    else if (value->type == JSON_NULL)
        return field_fail(&parse->fields, name, "logit_bias: the bias of token %" PRId64 " must be a number, not null.", token);
    else if (!field_number(&parse->fields, name, value_node, -100, 100, &bias->bias))
        return false;
    completion->sampling.n_bias++;
    return true;
}

/* The whole string is a decimal token id. */
static bool parse_id(const char *text, size_t length, int64_t *token) {
    *token = 0;
    if (length == 0 || length > 10) return false;
    for (size_t i = 0; i < length; i++) {
        if (text[i] < '0' || text[i] > '9') return false;
        *token = *token * 10 + (text[i] - '0');
    }
    return true;
}

static bool read_bias(struct parse *parse, const char *name, uint32_t node) {
    const struct json_node *json = node_at(parse, node);
    if (json->type == JSON_NULL) return true;
    if (json->type != JSON_OBJECT && json->type != JSON_ARRAY)
        return field_fail(&parse->fields, name, "logit_bias must be an object of token id to bias, not %s.", field_type_name(json));
    if (json->length > COMPLETION_BIAS_MAX)
        return field_fail(&parse->fields, name, "logit_bias has %u entries; at most %d are allowed.", json->length, COMPLETION_BIAS_MAX);
    if (json->length == 0) return true;
    parse->completion->bias = check_calloc(json->length, sizeof *parse->completion->bias);
    for (uint32_t child = node + 1; child < json->next;) {
        const struct json_node *entry = node_at(parse, child);
        int64_t token;
        uint32_t value;
        if (json->type == JSON_OBJECT) {
            if (!parse_id(parse->fields.document.text + entry->start, entry->length, &token))
                return field_fail(&parse->fields, name, "logit_bias: a key must be a token id in decimal digits.");
            value = child + 1;
            child = node_at(parse, value)->next;
        } else {
            if (entry->type != JSON_ARRAY || entry->length != 2 || !json_int64(&parse->fields.document, child + 1, &token))
                return field_fail(&parse->fields, name, "logit_bias: an entry of the array must be [token id, bias].");
            value = node_at(parse, child + 1)->next;
            child = entry->next;
        }
        if (!add_bias(parse, name, token, value)) return false;
    }
    return true;
}

/* ---- stream_options ---- */

static bool read_stream_options(struct parse *parse, const char *name, uint32_t node) {
    const struct json_node *json = node_at(parse, node);
    if (json->type == JSON_NULL) return true;
    if (json->type != JSON_OBJECT) return field_fail(&parse->fields, name, "stream_options must be an object, not %s.", field_type_name(json));
    parse->have_stream_options = true;
    for (uint32_t key = node + 1; key < json->next; key = node_at(parse, key + 1)->next) {
        bool ok = true;
        if (json_string_equals(&parse->fields.document, key, "include_usage"))
            ok = field_bool(&parse->fields, "stream_options.include_usage", key + 1, &parse->completion->include_usage);
        else if (json_string_equals(&parse->fields.document, key, "continuous_usage_stats"))
            ok = field_bool(&parse->fields, "stream_options.continuous_usage_stats", key + 1, &parse->completion->continuous_usage);
        if (!ok) return false;
    }
    return true;
}

/* ---- numbers ---- */

static bool to_count(struct parse *parse, const char *name, uint32_t node, int64_t min, int64_t max, uint32_t *value) {
    int64_t number = *value;
    if (!field_integer(&parse->fields, name, node, min, max, &number)) return false;
    *value = (uint32_t)number;
    return true;
}

static bool read_max_tokens(struct parse *parse, const char *name, uint32_t node) {
    parse->completion->max_tokens_given = node_at(parse, node)->type != JSON_NULL;
    return to_count(parse, name, node, 0, INT32_MAX, &parse->completion->max_tokens);
}
static bool read_min_tokens(struct parse *parse, const char *name, uint32_t node) {
    return to_count(parse, name, node, 0, INT32_MAX, &parse->completion->min_tokens);
}
static bool read_n(struct parse *parse, const char *name, uint32_t node) {
    return to_count(parse, name, node, 1, parse->limits->max_choices, &parse->completion->n);
}
static bool read_best_of(struct parse *parse, const char *name, uint32_t node) {
    return to_count(parse, name, node, 1, parse->limits->max_choices, &parse->completion->best_of);
}
static bool read_logprobs(struct parse *parse, const char *name, uint32_t node) {
    int64_t number = -1;
    if (!field_integer(&parse->fields, name, node, 0, parse->limits->max_logprobs, &number)) return false;
    parse->completion->logprobs = (int32_t)number;
    return true;
}
static bool read_top_k(struct parse *parse, const char *name, uint32_t node) {
    int64_t number = 0;
    if (!field_integer(&parse->fields, name, node, -1, INT32_MAX, &number)) return false;
    parse->completion->sampling.top_k = number < 0 ? 0 : (int32_t)number;
    return true;
}
static bool read_seed(struct parse *parse, const char *name, uint32_t node) {
    int64_t number = 0;
    if (!field_integer(&parse->fields, name, node, INT64_MIN, INT64_MAX, &number)) return false;
    parse->completion->seed_given = node_at(parse, node)->type != JSON_NULL;
    parse->completion->sampling.seed = (uint64_t)number;
    return true;
}
static bool read_priority(struct parse *parse, const char *name, uint32_t node) {
    int64_t number = 0;
    if (!field_integer(&parse->fields, name, node, INT32_MIN, INT32_MAX, &number)) return false;
    parse->completion->priority = (int32_t)number;
    return true;
}
static bool read_truncate(struct parse *parse, const char *name, uint32_t node) {
    if (!field_integer(&parse->fields, name, node, -1, INT32_MAX, &parse->completion->truncate_prompt)) return false;
    if (node_at(parse, node)->type != JSON_NULL && parse->completion->truncate_prompt == 0)
        return field_fail(&parse->fields, name, "truncate_prompt_tokens must be -1 or at least 1, not 0.");
    return true;
}
static bool read_temperature(struct parse *parse, const char *name, uint32_t node) {
    float *temperature = &parse->completion->sampling.temperature;
    if (!field_number(&parse->fields, name, node, 0, 2, temperature)) return false;
    if (*temperature > 0 && *temperature < 1e-3f) *temperature = 1e-3f; /* logits divided by less overflow */
    return true;
}
static bool read_top_p(struct parse *parse, const char *name, uint32_t node) {
    float *top_p = &parse->completion->sampling.top_p;
    if (!field_number(&parse->fields, name, node, 0, 1, top_p)) return false;
    return *top_p > 0 || field_fail(&parse->fields, name, "top_p must be greater than 0 and at most 1.");
}
static bool read_min_p(struct parse *parse, const char *name, uint32_t node) {
    return field_number(&parse->fields, name, node, 0, 1, &parse->completion->sampling.min_p);
}
static bool read_repetition(struct parse *parse, const char *name, uint32_t node) {
    float *penalty = &parse->completion->sampling.repetition_penalty;
    if (!field_number(&parse->fields, name, node, 0, 1e6, penalty)) return false;
    return *penalty > 0 || field_fail(&parse->fields, name, "repetition_penalty must be greater than 0.");
}
static bool read_presence(struct parse *parse, const char *name, uint32_t node) {
    return field_number(&parse->fields, name, node, -2, 2, &parse->completion->sampling.presence_penalty);
}
static bool read_frequency(struct parse *parse, const char *name, uint32_t node) {
    return field_number(&parse->fields, name, node, -2, 2, &parse->completion->sampling.frequency_penalty);
}

/* ---- what is not known ---- */

#define CLEAN_NAME_BYTES 33

/* The name is the client's: only what is harmless in a log line. */
static void clean_name(const char *key, size_t length, char name[CLEAN_NAME_BYTES]) {
    size_t n = 0;
    for (size_t i = 0; i < length && n < CLEAN_NAME_BYTES - 1; i++)
        name[n++] =
            (key[i] >= '0' && key[i] <= '9') || (key[i] >= 'a' && key[i] <= 'z') || (key[i] >= 'A' && key[i] <= 'Z') || key[i] == '_' ? key[i] : '?';
    name[n] = '\0';
}

static void note_ignored(struct completion *completion, const char *key, size_t length) {
    size_t used = strlen(completion->ignored);
    char name[CLEAN_NAME_BYTES];
    clean_name(key, length, name);
    (void)snprintf(completion->ignored + used, sizeof completion->ignored - used, "%s%s", used ? "," : "", name);
}

/* ---- kv: compression ---- */

static bool read_kv_field(struct parse *parse, uint32_t key) {
    const struct json_document *document = &parse->fields.document;
    struct kv_wish *wish = &parse->completion->kv_wish;
    if (json_string_equals(document, key, "policy")) {
        const struct json_node *json = node_at(parse, key + 1);
        if (json->type == JSON_NULL) return true;
        if (json->type != JSON_STRING) return field_fail(&parse->fields, "kv.policy", "kv.policy must be a string, not %s.", field_type_name(json));
        struct buffer name = {0};
        json_string_append(document, key + 1, &name);
        size_t length = name.length < sizeof wish->policy - 1 ? name.length : sizeof wish->policy - 1;
        for (size_t i = 0; i < length; i++)
            if (name.bytes[i] == '\0') name.bytes[i] = '?'; /* would end the name before its end */
        if (length) memcpy(wish->policy, name.bytes, length);
        wish->policy[length] = '\0';
        buffer_done(&name);
        return length > 0 || field_fail(&parse->fields, "kv.policy", "kv.policy must not be empty; there are %s.", policy_names());
    }
    if (json_string_equals(document, key, "budget_tokens")) return to_count(parse, "kv.budget_tokens", key + 1, 1, INT32_MAX, &wish->budget_tokens);
    if (json_string_equals(document, key, "protect_tokens"))
        return to_count(parse, "kv.protect_tokens", key + 1, 0, INT32_MAX, &wish->protect_tokens);
    if (json_string_equals(document, key, "report")) return field_bool(&parse->fields, "kv.report", key + 1, &wish->report);
    if (json_string_equals(document, key, "keep_ratio")) {
        float ratio = 0;
        if (!field_number(&parse->fields, "kv.keep_ratio", key + 1, 0, 1, &ratio)) return false;
        if (ratio <= 0 && node_at(parse, key + 1)->type != JSON_NULL)
            return field_fail(&parse->fields, "kv.keep_ratio", "kv.keep_ratio must be greater than 0 and at most 1.");
        wish->keep_ratio = (double)ratio;
        return true;
    }
    /* The object is this server's own: a misspelt wish must not pass for one that was granted. */
    char name[3 + CLEAN_NAME_BYTES] = "kv.";
    clean_name(document->text + node_at(parse, key)->start, node_at(parse, key)->length, name + 3);
    return field_fail(&parse->fields, name, "%s is not known; there are kv.policy, budget_tokens, keep_ratio, protect_tokens, report.", name);
}

static bool read_kv(struct parse *parse, const char *name, uint32_t node) {
    const struct json_node *json = node_at(parse, node);
    if (json->type == JSON_NULL) return true;
    if (json->type != JSON_OBJECT) return field_fail(&parse->fields, name, "kv must be an object, not %s.", field_type_name(json));
    for (uint32_t key = node + 1; key < json->next; key = node_at(parse, key + 1)->next)
        if (!read_kv_field(parse, key)) return false;
    return true;
}

/* ---- the table ---- */

#define FLAG(field) .flag = offsetof(struct completion, field) + 1
static const struct {
    const char *name;
    bool (*read)(struct parse *parse, const char *name, uint32_t node);
    size_t flag; /* a bool's offset + 1; 0: `read` */
} fields[] = {
    {"model", read_model, 0},
    {"prompt", read_prompt, 0},
    {"max_tokens", read_max_tokens, 0},
    {"temperature", read_temperature, 0},
    {"top_p", read_top_p, 0},
    {"n", read_n, 0},
    {"best_of", read_best_of, 0},
    {"echo", FLAG(echo)},
    {"logprobs", read_logprobs, 0},
    {"logit_bias", read_bias, 0},
    {"stop", read_stop, 0},
    {"stream", FLAG(stream)},
    {"stream_options", read_stream_options, 0},
    {"presence_penalty", read_presence, 0},
    {"frequency_penalty", read_frequency, 0},
    {"repetition_penalty", read_repetition, 0},
    {"seed", read_seed, 0},
    {"suffix", read_suffix, 0},
    {"top_k", read_top_k, 0},
    {"min_p", read_min_p, 0},
    {"ignore_eos", FLAG(ignore_eos)},
    {"min_tokens", read_min_tokens, 0},
    {"stop_token_ids", read_stop_tokens, 0},
    {"include_stop_str_in_output", FLAG(keep_stop)},
    {"skip_special_tokens", FLAG(skip_special)},
    {"add_special_tokens", FLAG(add_special)},
    {"truncate_prompt_tokens", read_truncate, 0},
    {"return_tokens_as_token_ids", FLAG(tokens_as_ids)},
    {"return_token_ids", FLAG(return_token_ids)},
    {"priority", read_priority, 0},
    {"cache_salt", read_salt, 0},
    {"kv", read_kv, 0},
};

_Static_assert(sizeof fields / sizeof *fields <= 64, "read_fields keeps a bit of each");

static bool read_fields(struct parse *parse) {
    const struct json_document *document = &parse->fields.document;
    uint64_t seen = 0;
    for (uint32_t key = 1; key < document->n_nodes; key = document->nodes[key + 1].next) {
        size_t i = 0, count = sizeof fields / sizeof *fields;
        while (i < count && !json_string_equals(document, key, fields[i].name)) i++;
        if (i == count) {
            note_ignored(parse->completion, document->text + document->nodes[key].start, document->nodes[key].length);
            continue;
        }
        /* The same key twice is no JSON of ours, but two spellings of one ("stop", "s\u0074op") are found only here; the readers rely on it. */
        if (seen >> i & 1) return field_fail(&parse->fields, fields[i].name, "%s stands twice.", fields[i].name);
        seen |= UINT64_C(1) << i;
        bool ok = fields[i].flag ? field_bool(&parse->fields, fields[i].name, key + 1, (bool *)((char *)parse->completion + fields[i].flag - 1))
                                 : fields[i].read(parse, fields[i].name, key + 1);
        if (!ok) return false;
    }
    return true;
}

/* Rules between fields. */
static bool check_together(struct parse *parse) {
    struct completion *completion = parse->completion;
    struct fields *read = &parse->fields;
    uint64_t limit = parse->limits->max_model_len > COMPLETION_TOKENS_MAX ? parse->limits->max_model_len : COMPLETION_TOKENS_MAX;
    if (!parse->have_prompt) return field_fail(read, "prompt", "prompt is needed.");
    if (completion->best_of == 0) completion->best_of = completion->n;
    if (completion->best_of < completion->n)
        return field_fail(read, "best_of", "best_of (%u) must be at least n (%u).", completion->best_of, completion->n);
    if (completion->stream && completion->best_of > completion->n) return field_fail(read, "best_of", "best_of greater than n cannot be streamed.");
    if (parse->have_stream_options && !completion->stream) return field_fail(read, "stream_options", "stream_options needs stream: true.");
    if (completion->min_tokens > completion->max_tokens)
        return field_fail(read, "min_tokens", "min_tokens (%u) must be at most max_tokens (%u).", completion->min_tokens, completion->max_tokens);
    const char *field = "kv";
    struct error why;
    if (!compression_plan(parse->limits->compression, &completion->kv_wish, &completion->kv, &field, &why))
        return field_fail(read, field, "%s: %s.", field, why.text);
    uint64_t choices = (uint64_t)completion->n_prompts * completion->best_of;
    const char *multiplied = completion->best_of > completion->n ? "best_of" : completion->n > 1 ? "n" : "prompt";
    if (choices > parse->limits->max_choices)
        return field_fail(read, multiplied, "%u prompts x %u candidates are %" PRIu64 " choices; at most %u are allowed.", completion->n_prompts,
                          completion->best_of, choices, parse->limits->max_choices);
    if (completion->max_tokens_given && completion->max_tokens <= parse->limits->max_model_len && choices * completion->max_tokens > limit)
        return field_fail(read, "max_tokens", "%" PRIu64 " choices x %u tokens are more than the %" PRIu64 " tokens one request may ask for.",
                          choices, completion->max_tokens, limit);
    return true;
}

bool completion_parse(struct completion *completion, const char *body, size_t length, const struct completion_limits *limits,
                      struct api_error *error) {
    *completion = (struct completion){.n = 1,
                                      .max_tokens = 16,
                                      .logprobs = -1,
                                      .skip_special = true,
                                      .add_special = true,
                                      .sampling = {.temperature = 1, .top_p = 1, .repetition_penalty = 1, .n_top = -1}};
    struct parse parse = {.completion = completion, .limits = limits};
    struct api_error unknown = {0};
    bool good = fields_read(&parse.fields, body, length, error);
    if (good) good = read_fields(&parse);
    if (good && parse.model_unknown) unknown = *error;
    if (good) good = check_together(&parse);
    if (good && parse.model_unknown) {
        *error = unknown;
        good = false;
    }
    fields_done(&parse.fields);
    for (uint32_t i = 0; i < completion->n_stops; i++) completion->stops[i].bytes = completion->texts.bytes + parse.stop_starts[i];
    completion->sampling.bias = completion->bias;
    return good;
}

void completion_done(struct completion *completion) {
    for (uint32_t i = 0; i < completion->n_prompts; i++) token_list_done(&completion->prompts[i].tokens);
    free(completion->prompts);
    free(completion->bias);
    buffer_done(&completion->texts);
    completion->prompts = NULL;
    completion->bias = NULL;
    completion->n_prompts = 0;
}
