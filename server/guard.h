/* What libmicrohttpd 0.9.75 lets through and must not reach anybody: ambiguous framing (request smuggling), foreign Host and Origin (DNS rebinding, pages of other sites).
 * Pure functions over header fields: no connection, no libmicrohttpd. Loop thread. */
#pragma once

#include <stdbool.h>
#include <stddef.h>

struct guard {
    unsigned content_lengths, transfer_encodings, hosts;
    unsigned long long content_length; /* of the last one, where nothing is wrong */
    bool encoded;        /* a Content-Encoding other than identity: nothing wrong, but nothing that is understood here */
    const char *problem; /* first thing wrong; NULL: none so far */
};

/* One field as it was received; value may be NULL. `value_length` is what the parser counted: an embedded NUL makes it differ from strlen. */
void guard_field(struct guard *guard, const char *name, size_t name_length, const char *value, size_t value_length);
/* After all fields: NULL, or why the request must be refused and the connection closed. */
const char *guard_verdict(const struct guard *guard, bool http_1_1);

/* The same over a whole head as it lies in the socket, before libmicrohttpd reads it: it answers a bad Content-Length or a missing Host by itself, with two heads and HTML, and lets a
 * NUL or an empty name pass. NULL: nothing wrong, or the head is not complete, or these bytes do not begin with a request line (then the guard over the parsed fields decides). */
const char *guard_head(const char *bytes, size_t length);
/* These are all bytes that come, from the first of a request on: they begin one and do not end it. False where that cannot be told. */
bool guard_cut_short(const char *bytes, size_t length);

/* Is the host of a Host field ("name", "name:port", "[::1]:8080") one of localhost, 127.0.0.0/8, [::1], `bound` or the comma list `allowed` ("*": any)? */
bool guard_host_allowed(const char *host, const char *bound, const char *allowed);
/* The same for an Origin field ("http://name:port"). "null" is nobody's. */
bool guard_origin_allowed(const char *origin, const char *bound, const char *allowed);
