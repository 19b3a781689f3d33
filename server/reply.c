/* See reply.h. */
#include "server/reply.h"

#include <stdarg.h>
#include <stdio.h>

#include "base/json_writer.h"

void api_error_set(struct api_error *error, int status, const char *type, const char *code, const char *param, const char *format, ...) {
    va_list args;
    *error = (struct api_error){.status = status, .type = type, .code = code};
    (void)snprintf(error->param, sizeof error->param, "%s", param ? param : "");
    va_start(args, format);
    (void)vsnprintf(error->message, sizeof error->message, format, args);
    va_end(args);
}

void write_error(struct buffer *out, const struct api_error *error) {
    struct json_writer json;
    json_begin(&json, out);
    json_object(&json);
    json_key(&json, "error");
    json_object(&json);
    json_key(&json, "message");
    json_text(&json, error->message);
    json_key(&json, "type");
    json_text(&json, error->type);
    json_key(&json, "param");
    if (error->param[0])
        json_text(&json, error->param);
    else
        json_null(&json);
    json_key(&json, "code");
    if (error->code)
        json_text(&json, error->code);
    else
        json_null(&json);
    json_object_end(&json);
    json_object_end(&json);
}

void reply_error(struct exchange *exchange, const struct api_error *error) {
    struct buffer body = {0};
    char seconds[16];
    write_error(&body, error);
    if (error->retry_after_s) {
        (void)snprintf(seconds, sizeof seconds, "%u", error->retry_after_s);
        exchange_add_header(exchange, "Retry-After", seconds);
    }
    if (error->no_retry) exchange_add_header(exchange, "x-should-retry", "false");
    if (error->status == 401) exchange_add_header(exchange, "WWW-Authenticate", "Bearer");
    reply_json(exchange, error->status, &body);
}

void reply_json(struct exchange *exchange, int status, struct buffer *body) {
    buffer_append_byte(body, '\n');
    exchange_reply(exchange, status, "application/json", body);
}
