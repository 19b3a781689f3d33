/* See field.h. */
#include "server/field.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"

bool fields_read(struct fields *fields, const char *body, size_t length, struct api_error *error) {
    struct json_failure failure;
    *fields = (struct fields){.error = error};
    if (!json_read(&fields->document, body, length, REQUEST_NODES_MAX, &failure)) {
        if (failure.key[0])
            api_error_set(error, 400, "invalid_request_error", "invalid_json", failure.key, "The body is not valid JSON: at byte %zu, in %s: %s.",
                          failure.offset, failure.key, failure.what);
        else
            api_error_set(error, 400, "invalid_request_error", "invalid_json", NULL, "The body is not valid JSON: at byte %zu: %s.", failure.offset,
                          failure.what);
        return false;
    }
    if (fields->document.nodes[0].type != JSON_OBJECT) {
        api_error_set(error, 400, "invalid_request_error", "invalid_json", NULL, "The body must be a JSON object, not %s.",
                      field_type_name(&fields->document.nodes[0]));
        return false;
    }
    return true;
}

void fields_done(struct fields *fields) { json_document_done(&fields->document); }

const char *field_type_name(const struct json_node *node) {
    switch ((enum json_type)node->type) {
    case JSON_NULL: return "null";
    case JSON_FALSE:
    case JSON_TRUE: return "a boolean";
    case JSON_NUMBER: return "a number";
    case JSON_STRING: return "a string";
    case JSON_ARRAY: return "an array";
    case JSON_OBJECT: return "an object";
    }
    return "something else";
}

bool field_fail(struct fields *fields, const char *name, const char *format, ...) {
    char message[sizeof fields->error->message];
    va_list args;
    va_start(args, format);
    (void)vsnprintf(message, sizeof message, format, args);
    va_end(args);
    api_error_set(fields->error, 400, "invalid_request_error", NULL, name, "%s", message);
    return false;
}

bool field_bool(struct fields *fields, const char *name, uint32_t node, bool *value) {
    const struct json_node *json = &fields->document.nodes[node];
    if (json->type == JSON_NULL) return true;
    if (json->type != JSON_TRUE && json->type != JSON_FALSE)
        return field_fail(fields, name, "%s must be true or false, not %s.", name, field_type_name(json));
    *value = json->type == JSON_TRUE;
    return true;
}

bool field_integer(struct fields *fields, const char *name, uint32_t node, int64_t min, int64_t max, int64_t *value) {
    const struct json_node *json = &fields->document.nodes[node];
    int64_t number;
    if (json->type == JSON_NULL) return true;
    if (json->type != JSON_NUMBER) return field_fail(fields, name, "%s must be an integer, not %s.", name, field_type_name(json));
    if (!json_int64(&fields->document, node, &number) || number < min || number > max) {
        const char *text = fields->document.text + json->start;
        return field_fail(fields, name, "%s must be an integer from %" PRId64 " to %" PRId64 ", not %.*s.", name, min, max,
                          json->length < 40 ? (int)json->length : 40, text);
    }
    *value = number;
    return true;
}

bool field_number(struct fields *fields, const char *name, uint32_t node, double min, double max, float *value) {
    const struct json_node *json = &fields->document.nodes[node];
    double number;
    if (json->type == JSON_NULL) return true;
    if (json->type != JSON_NUMBER) return field_fail(fields, name, "%s must be a number, not %s.", name, field_type_name(json));
    if (!json_number(&fields->document, node, &number) || number < min || number > max) {
        const char *text = fields->document.text + json->start;
        return field_fail(fields, name, "%s must be a number from %g to %g, not %.*s.", name, min, max, json->length < 40 ? (int)json->length : 40,
                          text);
    }
    *value = (float)number;
    return true;
}

bool field_token(struct fields *fields, const char *name, uint32_t node, uint32_t n_vocab, int32_t *token) {
    int64_t number;
    const struct json_node *json = &fields->document.nodes[node];
    if (json->type != JSON_NUMBER || !json_int64(&fields->document, node, &number))
        return field_fail(fields, name, "%s: a token id must be an integer, not %s.", name,
                          json->type == JSON_NUMBER ? "a fraction or a number beyond any vocabulary" : field_type_name(json));
    if (number < 0 || number >= n_vocab)
        return field_fail(fields, name, "%s: token id %" PRId64 " is outside the vocabulary (0 to %u).", name, number, n_vocab - 1);
    *token = (int32_t)number;
    return true;
}

bool field_tokens(struct fields *fields, const char *name, uint32_t node, uint32_t n_vocab, struct token_list *list) {
    const struct json_node *nodes = fields->document.nodes;
    size_t count = list->count + nodes[node].length;
    if (count > list->capacity) {
        list->tokens = check_realloc(list->tokens, count, sizeof *list->tokens);
        list->capacity = count;
    }
    for (uint32_t child = node + 1; child < nodes[node].next; child = nodes[child].next)
        if (!field_token(fields, name, child, n_vocab, &list->tokens[list->count++])) return false;
    return true;
}
