/* See completion.h: the bodies of /tokenize and /detokenize. Both vLLM's and llama.cpp's names are taken. */
#include <string.h>

#include "server/field.h"

static bool read_text(struct fields *fields, const char *name, uint32_t node, struct buffer *text) {
    const struct json_node *json = &fields->document.nodes[node];
    if (json->type != JSON_STRING) return field_fail(fields, name, "%s must be a string, not %s.", name, field_type_name(json));
    text->length = 0;
    json_string_append(&fields->document, node, text);
    return true;
}

bool tokenize_parse(struct tokenize_request *request, const char *body, size_t length, const struct completion_limits *limits,
                    struct api_error *error) {
    (void)limits;
    struct fields fields;
    *request = (struct tokenize_request){.add_special = true, .parse_special = true};
    const char *text_name = NULL;
    bool good = fields_read(&fields, body, length, error);
    const struct json_document *document = &fields.document;
    /* `content` is llama.cpp's request: there the default is add_special = false. */
    for (uint32_t key = 1; good && key < document->n_nodes; key = document->nodes[key + 1].next)
        if (json_string_equals(document, key, "content")) request->add_special = false;
    for (uint32_t key = 1; good && key < document->n_nodes; key = document->nodes[key + 1].next) {
        const char *name = NULL;
        if (json_string_equals(document, key, "prompt")) name = "prompt";
        if (json_string_equals(document, key, "content")) name = "content";
        if (name) {
            if (text_name) good = field_fail(&fields, name, "prompt and content mean the same: one of them is enough.");
            text_name = name;
            if (good) good = read_text(&fields, name, key + 1, &request->text);
        } else if (json_string_equals(document, key, "add_special_tokens")) {
            good = field_bool(&fields, "add_special_tokens", key + 1, &request->add_special);
        } else if (json_string_equals(document, key, "add_special")) {
            good = field_bool(&fields, "add_special", key + 1, &request->add_special);
        } else if (json_string_equals(document, key, "parse_special")) {
            good = field_bool(&fields, "parse_special", key + 1, &request->parse_special);
        } else if (json_string_equals(document, key, "return_token_strs")) {
            good = field_bool(&fields, "return_token_strs", key + 1, &request->pieces);
        } else if (json_string_equals(document, key, "with_pieces")) {
            good = field_bool(&fields, "with_pieces", key + 1, &request->pieces);
        }
    }
    if (good && !text_name) good = field_fail(&fields, "prompt", "prompt is needed.");
    fields_done(&fields);
    return good;
}

bool detokenize_parse(struct tokenize_request *request, const char *body, size_t length, const struct completion_limits *limits,
                      struct api_error *error) {
    struct fields fields;
    bool found = false;
    *request = (struct tokenize_request){0};
    bool good = fields_read(&fields, body, length, error);
    const struct json_document *document = &fields.document;
    for (uint32_t key = 1; good && key < document->n_nodes; key = document->nodes[key + 1].next) {
        if (!json_string_equals(document, key, "tokens")) continue;
        const struct json_node *value = &document->nodes[key + 1];
        if (found) /* in two spellings */
            good = field_fail(&fields, "tokens", "tokens stands twice.");
        else if (value->type != JSON_ARRAY)
            good = field_fail(&fields, "tokens", "tokens must be an array of token ids, not %s.", field_type_name(value));
        else
            good = field_tokens(&fields, "tokens", key + 1, tokenizer_vocabulary(limits->tokenizer), &request->tokens);
        found = true;
    }
    if (good && !found) good = field_fail(&fields, "tokens", "tokens is needed.");
    fields_done(&fields);
    return good;
}

void tokenize_request_done(struct tokenize_request *request) {
    buffer_done(&request->text);
    token_list_done(&request->tokens);
}
