/* An answer other than 200: OpenAI's error object and its HTTP status. A value; any thread. */
#pragma once

#include <stdbool.h>

struct api_error {
    int status;       /* 0: none */
    const char *type; /* static */
    const char *code; /* static; NULL: null */
    char param[64];   /* empty: null */
    char message[400];
    unsigned retry_after_s; /* 0: no such header */
    bool no_retry;          /* x-should-retry: false */
};

void api_error_set(struct api_error *error, int status, const char *type, const char *code, const char *param, const char *format, ...)
    __attribute__((format(printf, 6, 7)));
