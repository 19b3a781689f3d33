/* What libmicrohttpd 0.9.75 lets through and must not reach anybody: ambiguous framing (request smuggling), foreign Host and Origin (DNS rebinding, pages of other sites).
 * Pure functions over header fields: no connection, no libmicrohttpd. Loop thread. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct guard {
    unsigned content_lengths, transfer_encodings, hosts;
    unsigned long long content_length; /* of the last one, where nothing is wrong */
    unsigned cookies;                  /* at most: as libmicrohttpd divides them */
    bool encoded;                      /* a Content-Encoding other than identity: nothing wrong, but nothing that is understood here */
    bool close, keep_alive;            /* what Connection says */
    const char *problem;               /* first thing wrong; NULL: none so far */
};

/* One field as it was received; value may be NULL. `value_length` is what the parser counted: an embedded NUL makes it differ from strlen. */
void guard_field(struct guard *guard, const char *name, size_t name_length, const char *value, size_t value_length);
/* After all fields: NULL, or why the request must be refused and the connection closed. */
const char *guard_verdict(const struct guard *guard, bool http_1_1);

/* ---- bytes as they come from the socket, on their way to libmicrohttpd: what that refuses by itself it answers in HTML, some of it with two heads; a NUL or an empty name it lets pass ---- */

/* Less than what fits into the memory that libmicrohttpd has for a connection, so that it never has to say so. */
#define GUARD_LINE_MAX 8192u  /* bytes of a request line */
#define GUARD_HEAD_MAX 16384u /* of a request line and its fields */
#define GUARD_FIELDS_MAX 128u
#define GUARD_PARTS_MAX 128u  /* arguments of a query and cookies, which it lists one by one */
#define GUARD_EMPTY_MAX 1024u /* bytes of empty lines in front of a request */
#define GUARD_CHUNK_MAX 1024u /* of the line that begins a chunk; the last one's with all fields behind it */

struct guard_refusal {
    int status;
    const char *code, *problem; /* static */
};

/* What is certainly wrong with a request that begins here: its line, its fields, the size of its head, as far as all that is here. More bytes than GUARD_HEAD_MAX without the end of the head
 * are always wrong. false: nothing wrong, or too little is there to say so. */
bool guard_bytes(const char *bytes, size_t length, struct guard_refusal *refusal);
/* Those in front of a request are nobody's (RFC 9112 2.2): their bytes. */
size_t guard_empty_lines(const char *bytes, size_t length);

struct guard_framing {
    bool chunked;
    uint64_t length; /* of the body, where it does not come in chunks */
};
/* Where the head of a request that begins here ends, empty lines in front of it counted, and what follows it; 0: it is not all here. Only of what guard_bytes lets pass. */
size_t guard_head(const char *bytes, size_t length, struct guard_framing *framing);

/* A chunked body (RFC 9112 7.1) in pieces. All zero: before its first byte. */
struct guard_chunks {
    uint64_t size; /* of the chunk: read so far, or left */
    uint8_t state;
    uint16_t length; /* bytes of the line, of the last chunk with all fields behind it */
    bool digits;     /* there were some; of a trailer field: its colon */
    bool empty;      /* the line that ends now has nothing in it */
};
enum guard_chunked { GUARD_CHUNKS_GO_ON, GUARD_CHUNKS_END, GUARD_CHUNKS_BROKEN /* and why */ };
/* *used: bytes that are of the body. Not to be called again after anything but GO_ON. */
enum guard_chunked guard_chunks(struct guard_chunks *chunks, const char *bytes, size_t length, size_t *used, struct guard_refusal *refusal);

/* Is the host of a Host field ("name", "name:port", "[::1]:8080") one of localhost, 127.0.0.0/8, [::1], `bound` or the comma list `allowed` ("*": any)? */
bool guard_host_allowed(const char *host, const char *bound, const char *allowed);
/* The same for an Origin field ("http://name:port"). "null" is nobody's. */
bool guard_origin_allowed(const char *origin, const char *bound, const char *allowed);
