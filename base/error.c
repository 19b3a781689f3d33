/* See error.h. Owns nothing; any thread. */
#include "base/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum status error_set(struct error *error, enum status status, const char *format, ...) {
    if (error) {
        va_list args;
        va_start(args, format);
        error->status = status;
        (void)vsnprintf(error->text, sizeof error->text, format, args);
        va_end(args);
    }
    return status;
}

enum status error_prefix(struct error *error, const char *format, ...) {
    if (!error) return STATUS_INVALID;
    char text[sizeof error->text];
    va_list args;
    va_start(args, format);
    int written = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    size_t used = written < 0 ? 0 : (size_t)written;
    const char *parts[] = {": ", error->text};
    for (int i = 0; i < 2; i++)
        for (const char *from = parts[i]; *from && used + 1 < sizeof text; from++) text[used++] = *from;
    text[used < sizeof text ? used : sizeof text - 1] = '\0';
    memcpy(error->text, text, sizeof text);
    return error->status;
}

const char *status_name(enum status status) {
    switch (status) {
    case STATUS_OK: return "ok";
    case STATUS_INVALID: return "invalid";
    case STATUS_UNSUPPORTED: return "unsupported";
    case STATUS_NO_MEMORY: return "no memory";
    case STATUS_IO: return "input/output";
    case STATUS_DEVICE: return "device";
    }
    return "unknown";
}
