/* What `kvasir bench` measures, and how.
 *
 * A row is driven through the backend directly (kernels/backend.h) with block tables of the bench's own: exactly the named number of sequences at exactly the named
 * context, every step the same, which a run through the scheduler cannot promise. What is timed is what a step costs from a filled-in batch to
 * sampled tokens: the whole forward pass and greedy sampling, and the building of the batch, but not the scheduler, the mailboxes or HTTP.
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

/* Nanoseconds spent in each kind of phase since the last call, if the driver was opened to time them (bench.phases). */
void bench_driver_take_phases(struct bench_driver *driver, uint64_t ns[PHASE_KINDS]);
uint32_t bench_driver_max_rows(const struct bench_driver *driver);
uint32_t bench_driver_threads(const struct bench_driver *driver);
double bench_driver_slot_bytes(const struct bench_driver *driver); /* K and V of one lane's slot, as cached */

/* ---- bench_phases.c: the forward pass by phases ---- */
struct bench_phase_row {
    enum phase_kind kind;
    double us;          /* all layers together; the median of the rounds */
    double macs, bytes; /* multiply-adds; bytes that must be read: weights as the file stores them once a step, keys and values once a step */
    double gmac_s, gb_s, of_ceiling; /* of_ceiling: of the nearer of the two ceilings, 0..1 */
};
struct bench_ceilings {
    double gmac_s; /* of the widest integer dot product this CPU has, from registers */
    double gb_s;   /* read from a buffer as large as the model's weights */
    const char *instruction;
};
struct bench_phases {
    const char *test; /* "pp": one whole prompt; "tg": one step */
    uint32_t batch, n_prompt, n_gen, context;
    struct bench_phase_row rows[PHASE_KINDS];
};
/* The driver was opened to time phases. Of sequence 0, or of the first `batch` ones, which have `context` tokens in the cache and room for n_gen more. */
enum status bench_phases_prompt(struct bench_driver *driver, const struct program *program, uint32_t n_prompt, uint32_t rounds,
                                struct bench_phases *phases, struct error *error);
enum status bench_phases_generation(struct bench_driver *driver, const struct program *program, uint32_t batch, uint32_t context, uint32_t n_gen,
                                    uint32_t rounds, struct bench_phases *phases, struct error *error);
void bench_phases_rate(struct bench_phases *phases, const struct bench_ceilings *ceilings);

/* ---- bench_ceiling.c ---- */
enum status bench_measure_ceilings(uint32_t threads, uint64_t weight_bytes, struct bench_ceilings *ceilings, struct error *error);
/* bench_peak*.c: runs `rounds` rounds of independent integer dot products in registers; returns multiply-adds done. */
double bench_peak_generic(uint64_t rounds);
double bench_peak_avx2(uint64_t rounds);
double bench_peak_avxvnni(uint64_t rounds);
double bench_peak_avx512(uint64_t rounds);

/* ---- bench_print.c ---- */
struct bench_report {
    const struct config *config;
    const struct model *model;
    const char *backend; /* bench_driver_describe */
    enum kv_dtype kv_dtype;
    uint32_t threads;
    uint32_t n_rows;
    const struct bench_row *rows;
    uint32_t n_phases; /* 0: --phases was not asked */
    const struct bench_phases *phases;
    struct bench_ceilings ceilings;
};
void bench_print_table(const struct bench_report *report, FILE *out); /* llama-bench's columns, as a Markdown table */
void bench_print_json(const struct bench_report *report, FILE *out);
