/* What `kvasir eval` measures, and how.
 *
 * A cell is a policy at a share of the cache (keep). Every cell of a window starts from the same cache: the prompt is read once, its last queries stay in a ring, and each cell
 * is compressed from there into blocks of its own. The EVAL_GOLD tokens that really follow are then given to the model over the compressed cache and over the full one,
 * and the two distributions of the next token are compared row by row. Nothing is compressed again during these rows.
 *
 * Where the cache is of a KIVI dtype, the distributions compared with are those of a full cache in f16, read beside it: the row of the full cache then says what the dtype costs by itself.
 *
 * Equal memory: a share r of a prompt of P tokens is a budget of round(r P / BLOCK_TOKENS) blocks a lane on average, for every policy. What a policy really took is reported.
 *
 * Synthetic tasks ask whether one fact survived. Each is compressed one token before its answer begins, so that nothing of the answer comes from the full cache:
 *   passkey        a five-digit number in filler text; ten candidates, the most likely one is the answer. The question ends the compressed prompt: policies that
 *                  look at the last queries see it
 *   passkey_after  the same, the question is asked after the compression
 *   copy           random tokens in filler text, the first EVAL_COPY_GIVEN of them again at its end; how many of the following EVAL_COPY_ASKED are right
 * A task counts only at depths at which the full cache succeeds in at least EVAL_COUNTS of the examples.
 *
 * Everything runs on the main thread, which is the backend's worker 0. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "base/error.h"
#include "base/random.h"
#include "config/config.h"
#include "engine/compressor.h"
#include "kernels/backend.h"
#include "model/model.h"

#define EVAL_GOLD 256u
#define EVAL_KEEP_MAX 16
#define EVAL_CELLS_MAX 256
#define EVAL_DEPTHS 5
#define EVAL_COUNTS 0.9
#define EVAL_CANDIDATES 10u
#define EVAL_ANSWER_MAX 24u /* tokens of a candidate; of five digits and a space */
#define EVAL_COPY_TOKENS 64u
#define EVAL_COPY_GIVEN 8u
#define EVAL_COPY_ASKED 32u
#define EVAL_STREAM_BUDGET 1024u
#define EVAL_STREAM_WINDOW 4096u
#define EVAL_RESAMPLES 2000u
#define EVAL_PROMPT_MIN 128u

/* ---- eval_lab.c: sequences with block tables of their own over one backend ---- */
struct lab;

enum { LAB_BASE, LAB_FULL, LAB_CELL, LAB_CANDIDATE, LAB_SEQUENCES = LAB_CANDIDATE + EVAL_CANDIDATES };
enum { LAB_NO_RING, LAB_RING_PROMPT, LAB_RING_GOLD, LAB_RING_SINKS, LAB_RINGS = LAB_RING_SINKS };

struct lab_size {
    uint32_t max_tokens; /* slots of one lane */
    bool accumulate;     /* a policy wants the attention of all rows */
};
/* classes: [n_vocab] enum token_class, kept by the caller; NULL: none. */
enum status lab_open(const struct config *config, const struct model *model, const struct lab_size *size, const uint8_t *classes,
                     void (*report)(void *, double), void *context, struct lab **lab, struct error *error);
void lab_close(struct lab *lab); /* NULL is fine */
const char *lab_describe(const struct lab *lab);
enum kv_dtype lab_kv_dtype(const struct lab *lab);
bool lab_accumulates(const struct lab *lab);
size_t lab_block_bytes(const struct lab *lab);
const uint32_t *lab_lane_tokens(const struct lab *lab, uint32_t sequence); /* [n_lanes] */
uint32_t lab_blocks(const struct lab *lab, uint32_t sequence);             /* that hold its slots */

/* Blocks are taken one after the other and given back all at once: those taken after the mark. Sequences that hold such blocks must not be used afterwards. */
uint32_t lab_mark(const struct lab *lab);
void lab_release(struct lab *lab, uint32_t mark);
void lab_clear(struct lab *lab, uint32_t sequence);
/* `child` becomes `parent`: full blocks are shared, the last one of each lane is copied. */
void lab_fork(struct lab *lab, uint32_t parent, uint32_t child);

struct lab_row {
    int32_t token; /* the target, or the most likely one */
    float logprob; /* of the target */
};
struct lab_part {
    uint32_t sequence, n_tokens;
    const int32_t *tokens;
    uint32_t ring; /* LAB_NO_RING: none */
    bool accumulate;
    struct lab_row *rows;   /* [n_tokens] results; NULL: nothing is sampled */
    const int32_t *targets; /* [n_tokens]; NULL: the most likely token */
};
/* Appends the parts' tokens to their sequences, as many steps as it takes. logits: [rows of all parts that sample][n_vocab], in order; NULL: not wanted. */
enum status lab_read(struct lab *lab, uint32_t n_parts, const struct lab_part *parts, float *logits, struct error *error);

/* `cell` becomes what `plan` keeps of `base`, whose tokens are `tokens` and whose last queries are in LAB_RING_PROMPT. */
void lab_compress(struct lab *lab, uint32_t base, uint32_t cell, const struct kv_plan *plan, const int32_t *tokens, bool measure_hits,
                  struct compressor_result *result);
/* Drops in place what `plan`, of a policy that drops whole blocks and shifts sinks, says; `shifted`: tokens dropped so far. */
void lab_stream_drop(struct lab *lab, uint32_t sequence, const struct kv_plan *plan, uint32_t *shifted);
/* o [n_layers * n_heads][head_dim]: what each query head of row `position` in `ring` gets from the lanes of `sequence`. */
void lab_attention(struct lab *lab, uint32_t sequence, uint32_t ring, int32_t position, float *o);

/* ---- eval_text.c: what is read ---- */
struct eval_text {
    struct token_list list;
    bool made_up;
    bool begins; /* what the model reads begins with the token `begin` in place of the text's */
    int32_t begin;
};
/* The file, or sentences that are made up until there are min_tokens. */
enum status eval_text_open(const char *path, const struct tokenizer *tokenizer, size_t min_tokens, struct eval_text *text, struct error *error);
void eval_text_done(struct eval_text *text);
/* Where window i of n begins, for windows of `span` tokens spread evenly over `total` >= span. */
size_t eval_window_start(uint32_t i, uint32_t n, size_t span, size_t total);
bool eval_windows_overlap(uint32_t n, size_t span, size_t total);
/* Copies `span` tokens from `start`. begin: they are the first that the model reads. */
void eval_text_take(const struct eval_text *text, size_t start, size_t span, int32_t *tokens, bool begin);
/* [n_vocab] enum token_class, to free(). */
uint8_t *eval_token_classes(const struct tokenizer *tokenizer, uint32_t n_vocab);

struct eval_task {
    struct token_list context;                  /* filler with the fact in it, n_context tokens exactly */
    struct token_list question;                 /* passkey: without its last token */
    struct token_list answers[EVAL_CANDIDATES]; /* passkey: the question's last token and a candidate; all of one length */
    uint32_t right;                             /* which of them */
};
/* `depth` 0..1: where in the context the fact stands. */
enum status eval_passkey(const struct tokenizer *tokenizer, uint32_t n_prompt, double depth, uint64_t seed, struct eval_task *task,
                         struct error *error);
/* context: ends with the copied tokens but the last; answers[0]: that one and EVAL_COPY_ASKED more. */
enum status eval_copy(const struct tokenizer *tokenizer, uint32_t n_vocab, uint32_t n_prompt, double depth, uint64_t seed, struct eval_task *task,
                      struct error *error);
void eval_task_done(struct eval_task *task);

/* ---- eval_statistics.c ---- */
/* The p-quantile (0..1) of values [n], n > 0, by rank ceil(p n); sorts them. */
double eval_quantile(double *values, size_t n, double p);
double eval_mean(const double *values, size_t n);
struct eval_interval {
    double mean, low, high;
};
/* Paired bootstrap (Efron and Tibshirani 1993, 13.3, percentiles) of the mean of a[i] - b[i], n > 0 pairs drawn with replacement, 95 %. The same seed gives the same interval. */
struct eval_interval eval_bootstrap(const double *a, const double *b, size_t n, uint32_t resamples, uint64_t seed);

/* The distributions of the full cache, row by row. */
struct eval_reference {
    uint32_t n_rows, n_vocab;
    float *logits, *p; /* [n_rows][n_vocab] */
    double *log_z;     /* [n_rows] */
    int32_t *top;      /* [n_rows] */
    double *nll;       /* [n_rows] */
};
void eval_reference_init(struct eval_reference *reference, uint32_t n_rows, uint32_t n_vocab);
void eval_reference_done(struct eval_reference *reference);
/* From reference->logits. targets [n_rows]. */
void eval_reference_set(struct eval_reference *reference, const int32_t *targets);
struct eval_row {
    double kl; /* of the full cache's distribution from this one, nats; exactly 0 for equal logits */
    double nll;
    bool same_top;
};
struct eval_row eval_compare(const struct eval_reference *reference, uint32_t row, const float *logits, int32_t target);

/* ---- eval.c ---- */
struct eval_score {
    uint32_t right[EVAL_DEPTHS], asked[EVAL_DEPTHS];
};
enum eval_kind { EVAL_PASSKEY, EVAL_PASSKEY_AFTER, EVAL_COPY, EVAL_KINDS };

struct eval_cell {
    const struct policy *policy;
    double keep;
    double *kl;        /* [windows][EVAL_GOLD] */
    double *window_kl; /* [windows] their means */
    uint64_t n_rows, same_top;
    double nll; /* summed over n_rows */
    uint32_t n_windows;
    double blocks;           /* summed over windows */
    double *kept;            /* [n_lanes] slots, summed over windows */
    struct head_hits *hits;  /* [n_lanes] summed over windows */
    double *attention_error; /* [n_layers * n_heads] summed over n_attention */
    uint32_t n_attention;
    struct eval_score scores[EVAL_KINDS];
};

/* The same window of all streams. */
struct eval_stream_window {
    uint32_t from, to;  /* tokens of a stream */
    double nll;         /* summed over them and the streams */
    double nll_anew;    /* of the same tokens, by streams that began EVAL_STREAM_BUDGET tokens before them */
    double least, most; /* perplexity of one stream */
};

struct eval {
    const struct config *config;
    struct model *model;
    struct lab *lab;
    struct lab *
        exact; /* kivi4 and kivi2: the same model over an f16 cache, whose distributions all cells are compared with, that of the full cache too; else NULL */
    double exact_nll; /* of cells[0].n_rows */
    struct eval_text text;
    uint8_t *classes;
    uint32_t n_prompt, n_keep, n_cells;
    double keep[EVAL_KEEP_MAX];
    struct eval_cell cells[EVAL_CELLS_MAX]; /* cells[0]: the full cache */
    bool overlap;
    uint32_t n_stream, n_streams, n_stream_windows; /* tokens of a stream, streams, windows of a stream */
    struct eval_stream_window *stream;
    uint64_t work_done, work_all; /* for the progress bar */
    struct progress *progress;
};
/* Perplexity over the tokens of all streams; anew: of the same tokens by streams that are short; and by that of the first two windows together, when no stream has grown long. */
double eval_stream_ppl(const struct eval *eval, const struct eval_stream_window *window);
double eval_stream_ppl_anew(const struct eval *eval, const struct eval_stream_window *window);
double eval_stream_against_first(const struct eval *eval, const struct eval_stream_window *window);
/* The plan of a cell for a prompt of n tokens. */
struct kv_plan eval_plan(const struct eval *eval, const struct eval_cell *cell, uint32_t n_tokens, uint64_t seed);
void eval_step_done(struct eval *eval, uint64_t work);

/* Accuracy over the depths that count; false: none does. n: examples of one cell that counted. */
bool eval_accuracy(const struct eval *eval, const struct eval_cell *cell, enum eval_kind kind, double *accuracy, uint32_t *n);
uint32_t eval_depths_counted(const struct eval *eval, enum eval_kind kind);
/* Of the pairs that count as hits, the share whose key the head kept; 1 where it has none. */
double eval_hit_rate(const struct head_hits *hits);
/* Mean KL of a less that of b, over windows. */
struct eval_interval eval_difference(const struct eval *eval, const struct eval_cell *a, const struct eval_cell *b);

/* ---- eval_window.c, eval_tasks.c, eval_stream.c: measuring ---- */
enum status eval_windows(struct eval *eval, struct error *error);
enum status eval_tasks(struct eval *eval, uint32_t window, struct error *error);
enum status eval_stream(struct eval *eval, struct error *error);
/* Work of one window's tasks, and of the stream, in eval_step_done's units. */
uint64_t eval_tasks_work(const struct eval *eval);
uint64_t eval_stream_work(const struct eval *eval);

/* ---- eval_print.c, eval_svg.c ---- */
void eval_print_table(const struct eval *eval, FILE *out);
void eval_print_json(const struct eval *eval, FILE *out);
enum status eval_write_svg(const struct eval *eval, const char *path, struct error *error);
