/* What `kvasir bench` measures, and how.
 *
 * A row is driven through the backend directly (kernels/backend.h) with block tables of the bench's own: exactly the named number of sequences at exactly the named
 * context, every step the same, which a run through the scheduler cannot promise. What is timed is what a step costs from a filled-in batch to
 * sampled tokens: the whole forward pass and greedy sampling, and the building of the batch, but not the scheduler, the mailboxes or HTTP.
 *
 * Beside a row of generation stands its bound: the time in which the memory's copy bandwidth, measured in the same run, moves the bytes that a step must read.
 *
 * --requests measures what that leaves out: many requests at once through the whole engine (bench_requests.c), under one compression policy after the other.
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
    /* tg: what a step in the middle of a round must read, weights and cached K and V, and how long that takes at the copy bandwidth, at least. 0: not known */
    double weight_bytes, kv_bytes, bound_tok_s;
    uint32_t steps_ahead; /* tg: of a round, steps that were submitted before the one before was waited for */
    double host_us;       /* tg: of a step, all but waiting for the device, or doing its work; the mean of the rounds */
};

/* ---- bench_driver.c: sequences with tables of their own over one backend ---- */
struct bench_driver;

struct bench_size {
    uint32_t max_sequences; /* of one batch */
    uint32_t max_tokens;    /* of one sequence */
    uint32_t max_rows;      /* of one step */
};
enum status bench_driver_open(const struct config *config, const struct model *model, const struct bench_size *size, struct bench_driver **driver,
                              struct error *error);
void bench_driver_close(struct bench_driver *driver); /* NULL is fine */
const char *bench_driver_describe(const struct bench_driver *driver);
enum kv_dtype bench_driver_kv_dtype(const struct bench_driver *driver);
/* Sequence `sequence` forgets all but its first `n_tokens`. */
void bench_driver_truncate(struct bench_driver *driver, uint32_t sequence, uint32_t n_tokens);
/* Reads `n_tokens` random tokens (of this sequence and seed alone) into one sequence, in chunks of max_rows; samples one token after the last. */
enum status bench_driver_prompt(struct bench_driver *driver, uint32_t sequence, uint32_t n_tokens, uint64_t seed, struct error *error);
/* n_tokens steps of the first `batch` sequences: each takes in its last sampled token and samples the next. A step is submitted before the one before is waited for, where config and backend
 * allow it (config.run_ahead). */
enum status bench_driver_generate(struct bench_driver *driver, uint32_t batch, uint32_t n_tokens, struct error *error);
bool bench_driver_runs_ahead(const struct bench_driver *driver);

/* Every lane of the sequence loses its last slots, a random share of up to 15/16 each (of this sequence and seed alone): until truncated below them, or cut again. */
void bench_driver_cut(struct bench_driver *driver, uint32_t sequence, uint64_t seed);
/* Slots in all lanes of the first `batch` sequences. */
uint64_t bench_driver_slots(const struct bench_driver *driver, uint32_t batch);
/* Microseconds of a step of generation that the engine thread neither waited nor did the device's work; the mean since the last call. */
double bench_driver_take_host_us(struct bench_driver *driver);
bool bench_driver_on_host(const struct bench_driver *driver);          /* weights and pool lie in this machine's own memory */
double bench_driver_copy_bandwidth(const struct bench_driver *driver); /* as backend_ops has both, measured when it was opened */
uint64_t bench_driver_weight_bytes(const struct bench_driver *driver);

/* Nanoseconds spent in each kind of phase since the last call, if the driver was opened to time them (bench.phases). */
void bench_driver_take_phases(struct bench_driver *driver, uint64_t ns[PHASE_KINDS]);
uint32_t bench_driver_max_rows(const struct bench_driver *driver);
/* From "cpu avx512bf16, 2 threads": what the backend made of "auto"; 1 where nothing is said. */
uint32_t bench_threads_of(const char *description);
uint32_t bench_driver_threads(const struct bench_driver *driver);
double bench_driver_slot_bytes(const struct bench_driver *driver);
/* K and V of one lane's slot, with their scales, as cached. */
double bench_slot_bytes(const struct program *program, enum kv_dtype dtype);

/* ---- bench_phases.c: the forward pass by phases ---- */
struct bench_phase_row {
    enum phase_kind kind;
    double us;          /* all layers together; the median of the rounds */
    double macs, bytes; /* multiply-adds; bytes that must be read: weights as the file stores them once a step, keys and values once a step */
    double gmac_s, gb_s, of_ceiling; /* of_ceiling: of the nearer of the two ceilings, 0..1 */
};
struct bench_ceilings {
    double gmac_s; /* of the widest integer dot product this CPU has, from registers; 0: not measured, as for all devices */
    double gb_s;   /* read from a buffer as large as the model's weights; of a device: the copy bandwidth */
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

/* ---- bench_requests.c: throughput through the engine ---- */
#define BENCH_RUNS_MAX 64
struct bench_run {
    char policy[32];
    double keep; /* share of the tokens seen; 0: all, policy none */
    uint32_t requests, n_prompt, n_gen;

    char engine[192];                          /* engine_describe */
    uint64_t kv_limit, pool_bytes, ring_bytes; /* limit (0: auto) = pool + query rings */
    uint32_t max_sequences;
    double wall_s, output_tok_s;
    uint64_t output_tokens, steps, steps_ahead, decode_steps, preemptions, compressions, compressions_behind;
    double reading_s, decode_s,
        compression_s; /* in steps that read some prompt (answers go on in them); in steps that only decode; compressing, between steps */
    double host_us;    /* of a step, all but waiting for the device or doing its work; compression not in it */
    double decode_host_us; /* the same of the steps that only decode: those that read launch more, kernel by kernel, while the device works */
    double batch_mean; /* sequences in a step that only decodes */
    uint64_t batch_max;
    uint64_t decode_blocks; /* in use, summed over the steps that only decode */
    double slots_kept;      /* share of slots of all sequences that were there at their end */

    /* bench_requests_compare */
    double decode_bound_s; /* what decode_s would be at the copy bandwidth; 0: not known */
    double ratio,
        ratio_of_steps; /* to the run before under `none` with the same prompts: of output tokens a second; of what the times of both's steps would give. 0: there is none */
};
struct bench_runs {
    uint32_t count;
    struct bench_run runs[BENCH_RUNS_MAX];
};
/* Every prompt length under every policy at every share. */
enum status bench_requests_arms(const struct config *config, const struct bench_list *prompts, struct bench_runs *runs, struct error *error);
enum status bench_requests_run(const struct config *config, const struct model *model, struct bench_run *run, struct error *error);
/* Of run i, after it and those before have run. Bytes of weights that a step reads, bytes of a lane's slot; blocks are counted whole. */
void bench_requests_compare(struct bench_runs *runs, uint32_t i, double copy_bandwidth, double weight_bytes, double slot_bytes);

/* ---- bench_print.c ---- */
struct bench_report {
    const struct config *config;
    const struct model *model;
    const char *backend; /* bench_driver_describe */
    enum kv_dtype kv_dtype;
    uint32_t threads;
    double copy_bandwidth; /* bytes a second, read and written */
    bool on_host, runs_ahead;
    uint32_t n_rows;
    const struct bench_row *rows;
    uint32_t n_phases; /* 0: --phases was not asked */
    const struct bench_phases *phases;
    struct bench_ceilings ceilings;
    double weight_bytes; /* --requests: of a step */
};
/* Runs as they end, as a Markdown table and what its columns mean, or as the one JSON object: what was measured is out before the next one begins. */
struct bench_runs_printer;
struct bench_runs_printer *bench_runs_begin(const struct bench_report *report, FILE *out);
void bench_runs_add(struct bench_runs_printer *printer, const struct bench_run *run);
void bench_runs_end(struct bench_runs_printer *printer);              /* frees; NULL is fine */
void bench_print_table(const struct bench_report *report, FILE *out); /* llama-bench's columns, as a Markdown table */
void bench_print_json(const struct bench_report *report, FILE *out);
