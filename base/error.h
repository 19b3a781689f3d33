/* The third kind of failure: the world failed (a file, a socket, memory at start). A function that can meet it returns enum status and
 * writes the words, with the object's name in them, into the caller's struct error; the caller decides where they go.
 * (A bug is CHECK(), "not now" is a bool or a count: base/check.h.) */
#pragma once

enum status {
    STATUS_OK = 0,
    STATUS_INVALID,     /* what was given is wrong: a config key, a model file, an argument */
    STATUS_UNSUPPORTED, /* well-formed, but not something this build serves */
    STATUS_NO_MEMORY,   /* a plan does not fit, or the system refused memory */
    STATUS_IO,          /* reading, writing, binding failed; the text carries strerror */
    STATUS_DEVICE,      /* an accelerator failed */
};

struct error {
    enum status status;
    char text[496]; /* one line, no trailing newline */
};

/* Formats the words (cut to fit, always terminated) and returns `status`, so that `return error_set(...)` reads well. `error` may be NULL. */
enum status error_set(struct error *error, enum status status, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Prefixes the words already there: "where: what". Returns error->status. */
enum status error_prefix(struct error *error, const char *format, ...) __attribute__((format(printf, 2, 3)));

const char *status_name(enum status status);
