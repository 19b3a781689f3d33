/* What `kvasir bench` measures, and how.
 *
 * A row is driven through the backend directly (kernels/backend.h) with block tables of the bench's own: exactly the named number of sequences at exactly the named
 * context, every step the same, which a run through the scheduler cannot promise. What is timed is what a step costs from a filled-in batch to
 * sampled tokens: the whole forward pass and greedy sampling, and the building of the batch, but not the scheduler, the mailboxes or HTTP. Their cost is measured apart
 * (engine_overhead), and end to end by the load client of tests/bench.
 *
 * Honest by construction: every sequence has its own random tokens; there is no prefix cache at this level; keys and values are those the model computed for these
 * tokens; blocks are placed as the pool places them, in extents of 64 KiB, lanes and sequences interleaved; each row has one untimed round before it. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "base/error.h"
#include "config/config.h"
#include "kernels/backend.h"
#include "model/model.h"

#define BENCH_LIST_MAX 32

struct progress; /* cli/cli.h */

struct bench_list {
    uint32_t count;
    uint32_t values[BENCH_LIST_MAX];
};
/* "1,8,32", each min..max; `flag` begins the error. */
enum status bench_list_parse(const char *text, const char *flag, uint32_t min, uint32_t max, struct bench_list *list, struct error *error);

struct bench_row {
    const char *test; /* "pp", "tg" */
    uint32_t batch, n_prompt, n_gen, context, rounds;
    double tok_s, tok_s_min, tok_s_max; /* median of the rounds */
};

/* ---- bench_driver.c: sequences with tables of their own over one backend ---- */
struct bench_driver;

struct bench_size {
    uint32_t max_sequences; /* of one batch */
    uint32_t max_tokens;    /* of one sequence */
    uint32_t max_rows;      /* of one step */
};
enum status bench_driver_open(const struct config *config, const struct model *model, const struct bench_size *size, struct progress *progress,
                              struct bench_driver **driver, struct error *error);
void bench_driver_close(struct bench_driver *driver); /* NULL is fine */
const char *bench_driver_describe(const struct bench_driver *driver);
enum kv_dtype bench_driver_kv_dtype(const struct bench_driver *driver);
/* Sequence `sequence` forgets all but its first `n_tokens`. */
void bench_driver_truncate(struct bench_driver *driver, uint32_t sequence, uint32_t n_tokens);
/* Reads `n_tokens` random tokens (of this sequence and seed alone) into one sequence, in chunks of max_rows; samples one token after the last. */
enum status bench_driver_prompt(struct bench_driver *driver, uint32_t sequence, uint32_t n_tokens, uint64_t seed, struct error *error);
/* One step of the first `batch` sequences: each takes in its last sampled token and samples the next. */
enum status bench_driver_generate(struct bench_driver *driver, uint32_t batch, struct error *error);

/* ---- bench_print.c ---- */
struct bench_report {
    const struct config *config;
    const struct model *model;
    const char *backend; /* bench_driver_describe */
    enum kv_dtype kv_dtype;
    uint32_t n_rows;
    const struct bench_row *rows;
};
void bench_print_table(const struct bench_report *report, FILE *out); /* llama-bench's columns, as a Markdown table */
void bench_print_json(const struct bench_report *report, FILE *out);
