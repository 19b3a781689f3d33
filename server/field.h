/* One field of a JSON request: the typed readers that every endpoint's parser shares. Each says by itself what is wrong, with the field's name. Any thread. */
#pragma once

#include "server/completion.h"
#include "server/json_reader.h"

#define REQUEST_NODES_MAX (1u << 21) /* values in one body: 32 MiB of nodes at most */

struct fields {
    struct json_document document;
    struct api_error *error;
};

/* The body as an object, or a 400. fields_done is needed in either case. */
bool fields_read(struct fields *fields, const char *body, size_t length, struct api_error *error);
void fields_done(struct fields *fields);

/* Each: `node` is the value of the field `name`; null leaves *value as it was. false: the error is set. */
bool field_bool(struct fields *fields, const char *name, uint32_t node, bool *value);
bool field_integer(struct fields *fields, const char *name, uint32_t node, int64_t min, int64_t max, int64_t *value);
bool field_number(struct fields *fields, const char *name, uint32_t node, double min, double max, float *value);
/* A token id of the vocabulary. */
bool field_token(struct fields *fields, const char *name, uint32_t node, uint32_t n_vocab, int32_t *token);
/* All elements of an array of token ids. */
bool field_tokens(struct fields *fields, const char *name, uint32_t node, uint32_t n_vocab, struct token_list *list);
/* 400 naming the field. Always false. */
bool field_fail(struct fields *fields, const char *name, const char *format, ...) __attribute__((format(printf, 3, 4)));
const char *field_type_name(const struct json_node *node); /* "a string" */
