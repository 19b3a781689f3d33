/* Stop strings over a text that arrives in pieces: gives out what can no longer become part of a match, holds the rest, and ends at the first match. Streaming in any pieces
 * gives the same text as a search in the whole: the match that ENDS first wins; of those that end together, the longest (it begins first).
 * Owned by one choice; the strings are the request's. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/buffer.h"

#define STOP_STRINGS_MAX 4 /* as OpenAI allows */
#define STOP_STRING_BYTES_MAX 1024

struct stop_string {
    const char *bytes;
    size_t length; /* 1..STOP_STRING_BYTES_MAX */
};

struct stop_match {
    const struct stop_string *strings;
    uint32_t n_strings;
    bool keep;   /* include_stop_str_in_output */
    int matched; /* index of the string that ended the text; -1: none yet */
    struct buffer held;
};

void stop_match_init(struct stop_match *stop, const struct stop_string *strings, uint32_t n_strings, bool keep);
void stop_match_done(struct stop_match *stop);
/* true: a match; `out` got the text before it (and the string itself with `keep`), and nothing more may be put. */
bool stop_match_put(struct stop_match *stop, const char *bytes, size_t length, struct buffer *out);
/* The text ends, or bytes follow that must not match: what is held goes out. */
void stop_match_flush(struct stop_match *stop, struct buffer *out);
