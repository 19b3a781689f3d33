/* Whole answers in OpenAI's forms. Loop thread. */
#pragma once

#include "server/api_error.h"
#include "server/http.h"

/* {"error":{message,type,param,code}} with its status and headers. */
void reply_error(struct exchange *exchange, const struct api_error *error);
/* The object alone, as it also goes into streams. */
void write_error(struct buffer *out, const struct api_error *error);
/* Takes the bytes of `body`. */
void reply_json(struct exchange *exchange, int status, struct buffer *body);
