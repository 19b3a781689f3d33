/* One streamed completion as a client sees it: connect, send the request, take the answer apart (HTTP/1.1, chunked or until the end of the connection; SSE), and note
 * when each piece of text arrived. Speaks to any server with OpenAI's /v1/completions that takes token ids as a prompt.
 *
 * Owned by one thread; the socket does not block. Deliberately no JSON reader: of an event only two members matter, and the client shares cores with the server it measures. */
#pragma once

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/buffer.h"

#define STREAM_ERROR 160

enum stream_state { STREAM_WAITS, STREAM_SENDS, STREAM_READS, STREAM_DONE, STREAM_FAILED };

/* What every request of a run has in common. */
struct stream_settings {
    struct sockaddr_in address;
    uint32_t id_low, id_high; /* token ids of prompts, low <= id < high */
    uint64_t seed;
    const char *model; /* NULL: none named */
    const char *extra; /* further members of the body, without braces; NULL: none */
};

struct stream {
    uint64_t number;
    uint32_t n_prompt, n_new;
    enum stream_state state;
    int socket; /* -1: none */
    struct buffer request;
    size_t sent;
    /* The answer, as far as it is understood. */
    struct buffer head, line, chunk_line;
    bool have_head, chunked;
    int status;
    uint64_t chunk_left;
    int chunk_state;
    /* Times of the monotonic clock, nanoseconds. */
    uint64_t submit_ns, end_ns;
    uint64_t *event_ns; /* [n_events] of the pieces of text */
    uint32_t n_events, event_room;
    uint32_t n_tokens; /* as the server counts them; 0: it has not said */
    char error[STREAM_ERROR];
};

/* The prompt's ids are a function of (seed, number): no two prompts of a run begin alike. */
void stream_prepare(struct stream *stream, const struct stream_settings *settings, uint64_t number, uint32_t n_prompt, uint32_t n_new);
/* Connects; the caller watches `socket` for reading and writing. On failure the state says so. */
void stream_start(struct stream *stream, const struct stream_settings *settings);
/* The socket is ready: does all that can be done now. Ends in STREAM_DONE or STREAM_FAILED some time. */
void stream_continue(struct stream *stream);
/* Takes in bytes of the answer that arrived at `now_ns`. stream_continue does this; apart from it so that a test can cut an answer anywhere. */
void stream_feed(struct stream *stream, const char *bytes, size_t length, uint64_t now_ns);
/* Closes the socket and keeps the times. */
void stream_close(struct stream *stream);
void stream_free(struct stream *stream);
