/* The HTTP daemon: a libuv loop that drives libmicrohttpd, OpenAI's API on one side, the engine's mailboxes on the other.
 *
 * server_run is the calling thread's whole life: it binds, answers /health with 503 while `start` runs on a thread of its own, serves, and returns after SIGTERM or SIGINT
 * (drained) or when `start` failed. It installs handlers for SIGTERM, SIGINT (drain; a second one: at once) and SIGHUP (reload), and ignores SIGPIPE.
 * One server a process at a time. */
#pragma once

#include <stdint.h>

#include "base/error.h"
#include "config/config.h"
#include "engine/engine.h"
#include "model/tokenizer.h"

/* What `start` gives. Everything must live until server_run returned, except the engine: the server stops it (engine_stop). */
struct server_model {
    struct engine *engine;
    const struct tokenizer *tokenizer;
    char served_name[CONFIG_TEXT]; /* what /v1/models says and requests ask for */
    char root[CONFIG_TEXT];        /* where it came from, as /v1/models shows it: a name, not a path of this machine */
    char architecture[32];         /* "llama" */
    uint64_t parameters;
};

struct server_setup {
    const struct config *config; /* copied; reloads change the copy */

    /* Loads the model and starts the engine with these hooks (wake is the server's; progress says how far the load is, 0..1, from any thread, and may be wrapped).
     * Runs on its own thread, once. On failure nothing is left behind, and server_run returns this status and these words. */
    enum status (*start)(void *context, const struct engine_hooks *hooks, struct server_model *model, struct error *error);
    /* On the loop thread: the socket is bound, and url ("http://127.0.0.1:8080") is where; the model is loaded and requests are taken. NULL: not needed. */
    void (*listening)(void *context, const char *url);
    void (*ready)(void *context, const char *url);
    void *context;
};

/* STATUS_OK: served and drained. STATUS_INVALID, ...: `start`'s own, the key file, or the address. */
enum status server_run(const struct server_setup *setup, struct error *error);
