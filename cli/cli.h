/* What the commands share: their table, how a failure is said, where the model comes from, the progress bar. Everything here runs on the main thread unless said. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "base/error.h"
#include "config/config.h"
#include "kernels/backend.h"
#include "model/model.h"

/* Exit codes. CLI_BAD_SETUP: configuration or model; a supervisor must not start it again (deploy/kvasir.service). */
enum { CLI_OK = 0, CLI_FAILED = 1, CLI_BAD_SETUP = 2 };

struct command {
    const char *name;
    const char *arguments; /* "[MODEL]" */
    const char *summary;
    bool takes_model;                                              /* one positional argument is the model, like -m */
    int (*run)(const struct config *config, const char *argument); /* argument: the positional one of commands that take no model; NULL: none */
};
extern const struct command commands[];
size_t commands_count(void);

int command_serve(const struct config *config, const char *argument);
int command_bench(const struct config *config, const char *argument);
int command_eval(const struct config *config, const char *argument);
int command_inspect(const struct config *config, const char *argument);
int command_check_config(const struct config *config, const char *argument);

/* "kvasir: words" on one line of stderr, whatever bytes the words hold; returns the exit code for the status. */
int cli_fail(const struct error *error);
/* STATUS_INVALID "model: ..." if config names none. What is wrong with the file begins with where it was named: "kvasir.toml:1: model: ", "KVASIR_MODEL: ", "--model: ". */
enum status cli_open_model(const struct config *config, struct model **model, struct error *error);
/* Random weights of this shape in memory, if they fit, with a line of progress; STATUS_INVALID where config names a model too. */
enum status cli_open_dummy(const struct config *config, const char *shape, struct model **model, struct error *error);
/* STATUS_NO_MEMORY, with the sum, unless `bytes` of weights and a backend's copy of them fit into `available` bytes. */
enum status cli_dummy_fits(const char *shape, uint64_t bytes, uint64_t available, struct error *error);
void cli_warn_environment(void);
/* Logs what the configuration asks of the backend and will not get, where results are right all the same. What a backend cannot do at all is refused (cli_choose_backend), and what others do
 * anyhow (engine.deterministic, 16-bit activations, native weights) is not said. After the backend was found. */
void cli_warn_backend(const struct config *config);

/* For commands that put sequences on a backend without an engine: what the configuration chooses. */
struct cli_backend {
    const struct backend_ops *ops;
    struct backend_limits limits; /* what of it the configuration decides: kv_dtype, device, threads, ...; sizes are the caller's */
    size_t block_bytes;
    uint64_t memory_bytes; /* that there are where its pool lies, */
    bool on_host;          /* which is this machine's own memory */
};
enum status cli_choose_backend(const struct config *config, const struct program *program, struct cli_backend *chosen, struct error *error);

/* The whole manual page (deploy/kvasir.1): names and exit codes from here, options from the table. */
void manual_print(FILE *out);

/* One line that shows how far something is: a bar on a terminal, a log line now and then elsewhere. `report` may be called from any one thread at a time. */
struct progress {
    const char *what;
    bool terminal;
    int shown; /* percent; -1: nothing yet */
    uint64_t begun_ns;
    uint64_t next_ns; /* when the next line is due */
};
void progress_begin(struct progress *progress, const char *what);
void progress_report(void *progress, double fraction);
void progress_end(struct progress *progress);
