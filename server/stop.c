/* See stop.h. */
#include "server/stop.h"

#include <string.h>

#include "base/check.h"

void stop_match_init(struct stop_match *stop, const struct stop_string *strings, uint32_t n_strings, bool keep) {
    *stop = (struct stop_match){.strings = strings, .n_strings = n_strings, .keep = keep, .matched = -1};
}

void stop_match_done(struct stop_match *stop) { buffer_done(&stop->held); }

/* The earliest end of a match in text[0..length), and which string; SIZE_MAX: none. */
static size_t first_end(const struct stop_match *stop, const char *text, size_t length, int *which) {
    size_t end = SIZE_MAX;
    for (uint32_t i = 0; i < stop->n_strings; i++) {
        const struct stop_string *string = &stop->strings[i];
        const char *found = memmem(text, length, string->bytes, string->length);
        if (!found) continue;
        size_t this_end = (size_t)(found - text) + string->length;
        if (this_end < end || (this_end == end && string->length > stop->strings[*which].length)) {
            end = this_end;
            *which = (int)i;
        }
    }
    return end;
}

/* Length of the longest suffix of the text that is a proper prefix of a stop string: it could still become a match. */
static size_t pending(const struct stop_match *stop, const char *text, size_t length) {
    size_t longest = 0;
    for (uint32_t i = 0; i < stop->n_strings; i++) {
        size_t most = stop->strings[i].length - 1 < length ? stop->strings[i].length - 1 : length;
        for (size_t n = most; n > longest; n--)
            if (memcmp(text + length - n, stop->strings[i].bytes, n) == 0) {
                longest = n;
                break;
            }
    }
    return longest;
}

bool stop_match_put(struct stop_match *stop, const char *bytes, size_t length, struct buffer *out) {
    CHECK(stop->matched < 0);
    if (stop->n_strings == 0) {
        buffer_append(out, bytes, length);
        return false;
    }
    if (length == 0) return false;
    buffer_append(&stop->held, bytes, length);
    int which = 0;
    size_t end = first_end(stop, stop->held.bytes, stop->held.length, &which);
    if (end != SIZE_MAX) {
        stop->matched = which;
        buffer_append(out, stop->held.bytes, stop->keep ? end : end - stop->strings[which].length);
        stop->held.length = 0;
        return true;
    }
    size_t free_bytes = stop->held.length - pending(stop, stop->held.bytes, stop->held.length);
    buffer_append(out, stop->held.bytes, free_bytes);
    buffer_consume(&stop->held, free_bytes);
    return false;
}

void stop_match_flush(struct stop_match *stop, struct buffer *out) {
    buffer_append(out, stop->held.bytes, stop->held.length);
    stop->held.length = 0;
}
