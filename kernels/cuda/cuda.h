/* What the files of the CUDA backend share. One stream, one device, the engine's thread; kernels find every size that changes from step to step in device memory, so that a captured
 * graph of a step stays right.
 *
 *   backend.cu    life, memory plan;  device.cu  which devices there are;  cublas.cu  cuBLASLt, loaded
 *   step.cu       the step: staging, launches, graphs;  tables.cu  block tables on the device
 *   supported.cu  what is refused
 *   weights.cu    tensors to the device; products.cu  their products
 *   rows.cu       what is done row by row: embedding, norms, rope + append (+ rings), activation
 *   hadamard.h    q8: what keys are cached under
 *   codes.h       KIVI: how codes lie; close.cu  filled blocks become codes; residual.cu  which blocks are kept in f16 as well
 *   attention.cu  attention over per-lane tables, accumulated attention
 *   services.cu   copies, reading; compact.cu  compaction; sinks.cu  shifted sinks; score.cu, score_window.cu  scores of cached slots; rank.cu  which of them stay
 *   sample.cu     from logits to tokens
 *   ptx.h         what is no C++: instructions and launches
 *
 * Names: a row is one token of a sequence; group = query heads of a KV head; d = head_dim; lane = layer * n_kv_heads + KV head. */
#pragma once

extern "C" {
#include "base/block.h"
#include "base/check.h"
#include "base/error.h"
#include "kernels/backend.h"
#include "kernels/raw.h"
}

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/cuda/ptx.h"

enum {
    SPLIT_SLOTS = 256, /* attention cuts a lane at multiples of this (row contract); each split starts anew, splits merge in ascending order */
    PIECE_SLOTS = 64,  /* within a split the softmax runs on from piece to piece */
    TILE_QUERIES = 16, /* packed queries (row, head of the group) of one matrix tile */
    SKINNY_ROWS = 16,  /* products of up to so many rows are ours, larger ones cuBLAS's */
    HEAD_DIM_MAX = 128,
    SHARED_BYTES_LEAST = 99 << 10, /* dynamic shared memory that a block can be given on every device, the least on 8.6 and 8.9; static and dynamic without asking: SHARED_BYTES_UNASKED */
    SHARED_BYTES_UNASKED = 48 << 10,
    WORKSPACE_BYTES = 32 << 20, /* struct cuda's workspace */
    WIDENED_BYTES = 32 << 20,   /* and `widened`: it stays in the L2 cache until it is multiplied with */
};

/* Rows of a matrix that lie together. `type` is F16 (row-major), or the file's, laid out as native.h says. */
struct matrix_part {
    enum tensor_type type;
    uint32_t first_row, rows;
    void *data;
};

/* A weight matrix on the device: out[row] = W in[row]. One part, or, where not all is of one type, one for each tensor whose rows it has. */
struct matrix {
    enum tensor_type type; /* F16 if all parts are, else that of the first which is not */
    uint32_t rows, cols;
    uint32_t n_parts;
    struct matrix_part parts[3];
};

struct device_layer {
    struct matrix qkv;     /* rows: q, then k, then v */
    struct matrix o;
    struct matrix gate_up; /* rows: gate, then up */
    struct matrix down;
    float *attention_norm, *mlp_norm; /* [n_embd] */
    float *qkv_bias;                  /* as qkv's rows; NULL: none */
    float *q_norm, *k_norm;           /* [d]; NULL: none */
};

/* The KV pool: block b is K [BLOCK_TOKENS][d], then V the same, at kv + b * block_bytes. 16-bit elements, or int8 with a scale for each slot's K and V, K transformed (hadamard.h). Of KIVI dtypes kv holds codes
 * (codes.h), and the f16 blocks of the residual lie apart. */
struct device_pool {
    enum kv_dtype dtype; /* all but KV_F32 */
    uint32_t d, n_blocks;
    size_t block_bytes;    /* K and V */
    uint8_t *kv;
    float *scales;         /* q8: [n_blocks][2][BLOCK_TOKENS], K's then V's; else NULL */
    int32_t *positions;    /* [n_blocks][BLOCK_TOKENS] */
    uint64_t *accumulated; /* [n_blocks][BLOCK_TOKENS] fixed point (kernels/score.h); NULL unless limits.accumulators */
    /* KIVI dtypes; else NULL and 0 */
    uint32_t bits;     /* of a code */
    uint8_t *raw;      /* [places] blocks as those of KV_F16, of raw_bytes each */
    size_t raw_bytes;
    uint32_t *place;   /* [n_blocks] the block's f16 block, or RAW_NONE (kernels/raw.h) */
    uint8_t *closed;   /* [n_blocks] bool: the codes are those of all its slots */
};

/* ---- one step, as kernels read it: one buffer, filled in pinned memory, from which the step's first kernel takes it ---- */

struct step_header {
    uint32_t n_rows, n_sequences, n_decode, n_tiles, n_head_rows, n_samples, any_accumulates;
    uint32_t flight; /* where answers go: struct cuda's flights */
};
struct step_sequence {
    uint32_t first_row, n_rows;
    uint32_t table;      /* of struct cuda's tables */
    uint32_t ring;       /* 0: none, else 1.. */
    uint32_t accumulate; /* bool */
    uint32_t advance;    /* rows that every lane grew by since its length was last sent */
};
/* 16 packed queries or more of a sequence that has more than fit into one tile: queries [first, first + count) of its n_rows * group, query i being row i / group, head i % group. */
struct prefill_tile {
    uint32_t sequence, first_query;
};

/* The same places on both sides: view.host (pinned) and view.device. Sizes in brackets are capacities. */
struct step_view {
    struct step_header *header;
    int32_t *tokens, *positions;      /* [max_rows]; a token < 0: -1 - i, of drawn[i] */
    uint32_t *row_sequence;           /* [max_rows] */
    struct step_sequence *sequences;  /* [max_sequences] */
    uint32_t *lane_tokens;            /* device alone: [max_sequences][n_lanes] slots filled before this step */
    uint32_t *decode;                 /* [max_sequences] sequences with n_rows * group <= TILE_QUERIES, by index */
    struct prefill_tile *tiles;       /* [max_tiles] of the others; PREFILL_QUERIES queries each */
    uint32_t *head_rows;              /* [max_samples] distinct rows whose logits are wanted */
    uint32_t *sample_head_row;        /* [max_samples] index in head_rows */
};
enum { PREFILL_QUERIES = 64 }; /* of one prefill_tile */

/* A word of struct cuda's tables, or of the lengths behind them. */
struct table_write {
    uint32_t at, value;
};

/* What the host has written down for a step, and where it belongs on the device. In pieces of 16 bytes, of which the last one of each part may have anything behind what was written. */
struct delivery {
    const uint4 *staging, *sampling; /* pinned, as are the writes, two a piece */
    const struct table_write *writes;
    uint4 *staging_to, *sampling_to;
    uint32_t *tables;
    uint32_t n_staging, n_sampling; /* pieces */
    uint32_t n_writes;
};

/* Lanes of a sequence, in no order: of two lists, one behind the other. */
struct lane_list {
    const uint32_t *lanes[2];
    uint32_t n[2];
};
static inline uint32_t lane_list_size(const struct lane_list *list) { return list->n[0] + list->n[1]; }
static inline uint32_t lane_list_at(const struct lane_list *list, uint32_t i) { return i < list->n[0] ? list->lanes[0][i] : list->lanes[1][i - list->n[0]]; }

/* What the host knows when it launches, rounded up where a graph is shared: grids are made from this, kernels then look at the header. */
struct step_shape {
    uint32_t rows, sequences, decode, tiles, head_rows, samples;
    uint32_t first_head_row, first_sample; /* of a step with more head rows than `logits` holds, the part being run: head_rows and samples count from there. Else 0 */
    bool accumulates;
};

struct tables_host;     /* tables.cu */
struct step_device;     /* step.cu */
struct sampling_device; /* sample.cu */
struct score_device;    /* services.h */
struct product_device;  /* products.cu */
struct attention_device; /* attention.cu */
struct residual_host;    /* residual.cu */

/* Two steps may be in flight: what the host writes before one, and reads after it, is there for both, and they take turns. The device has it once, as copies, kernels and graphs follow one
 * another on the stream. */
enum { FLIGHTS = 2 };
struct step_flight {
    struct step_view host; /* in `staging` */
    void *staging;         /* pinned */
    cudaEvent_t done;      /* all of the step is */
    const struct batch *batch;
};

struct cuda {
    struct backend backend;
    const struct program *program;
    struct backend_limits limits;
    int device;
    cudaDeviceProp properties;
    cudaStream_t stream;
    char description[160];
    bool deterministic;

    /* sizes */
    uint32_t n_lanes, group, n_q, n_kv; /* n_q = n_heads * d, n_kv = n_kv_heads * d */
    uint32_t n_tables, lane_blocks;     /* tables: [n_tables][n_lanes][lane_blocks] */
    uint32_t max_tiles, rows_padded; /* rows_padded: max_rows rounded up to 64 */

    /* weights */
    struct device_layer *layers; /* host array */
    struct matrix embedding;     /* rows n_vocab; the head's own where tied */
    struct matrix head;
    float *head_norm;
    double *rope_frequency; /* [rope_dims / 2] on the device */
    uint8_t *workspace;     /* [WORKSPACE_BYTES] of the products; before the first step, weights pass through it */
    __half *widened;        /* [WIDENED_BYTES]: native weights as f16, some rows at a time; NULL: all are f16 */

    struct device_pool pool;
    uint32_t *tables; /* block ids on the device */
    struct tables_host *tables_host; /* what of them is already there */

    /* rings; queries in the 16-bit type that attention computes with: bf16 for KV_BF16, else f16; of q8 transformed, as they meet the keys (hadamard.h) */
    uint16_t *ring_queries; /* [n_rings][n_layers][ring_rows][n_q], position p at p % ring_rows */
    float *ring_sinks;      /* [n_rings][n_lanes][sink_slots][d] */

    /* activations: [max_rows rounded up to 64][...] */
    float *x;         /* n_embd: the residual stream */
    __half *h;        /* n_embd: normed */
    float2 *rope;     /* rope_dims / 2: cos and sin of the row's position, magnitude included */
    float *qkv;       /* n_q + 2 n_kv */
    uint16_t *q;      /* n_q: rotated, and all else, as in rings */
    __half *a;        /* n_q: attention's result */
    __half *gate_up;  /* 2 n_ff */
    __half *g;        /* n_ff */
    float *row_max, *row_sum; /* n_heads: of the softmax of each query (max in units of log2 after scaling, as attention.cu has it); filled when header.any_accumulates */
    __half *head_h;   /* [max head rows][n_embd] */
    float *logits;    /* [max head rows][n_vocab] */
    uint32_t max_head_rows;

    struct step_view host, dev; /* host: that of flights[flight] */
    void *staging_device;
    size_t staging_bytes;
    struct step_flight flights[FLIGHTS];
    uint32_t flight, n_flights; /* flight: of the step submitted last, or being submitted; n_flights: in flight */
    int32_t *drawn;             /* [max_samples] on the device: tokens of the last step's samples, those aside that the host samples */

    struct step_device *step;
    struct sampling_device *sampling;
    struct score_device *score;
    struct product_device *products;
    struct attention_device *attention;
    struct residual_host *residual; /* NULL: no KIVI dtype */

    float *tap;
};

static inline struct cuda *cuda_of(struct backend *backend) { return (struct cuda *)(void *)backend; }

/* A failed call becomes an error that names what was done; the first argument is a struct error * (may be NULL). Evaluates to enum status. */
enum status cuda_status(struct error *error, cudaError_t result, const char *what);
#define CUDA_TRY(error, call)                                            \
    do {                                                                 \
        enum status status_ = cuda_status((error), (call), #call);       \
        if (status_ != STATUS_OK) return status_;                        \
    } while (0)
/* In services, which cannot fail, and where a device has stopped working: ends the process with a message and exit status 1. */
void cuda_check(cudaError_t result, const char *what, const char *file, int line);
#define CUDA_CHECK(call) cuda_check((call), #call, __FILE__, __LINE__)

/* Device memory, counted. An arena without a base only counts: lay out twice, as the cpu backend does. 256-byte aligned. */
struct device_arena {
    uint8_t *base;
    size_t used;
};
static inline void *device_take(struct device_arena *arena, size_t count, size_t bytes_each) {
    arena->used = (arena->used + 255) / 256 * 256;
    void *at = arena->base ? arena->base + arena->used : NULL;
    arena->used += count * bytes_each;
    return at;
}

static inline bool kv_computes_bf16(enum kv_dtype dtype) { return dtype == KV_BF16; }
static inline uint32_t div_up(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

/* ---- device.cu ---- */
/* The compute capability, times 10, that the code was compiled for which a device runs: the newest in this program that it can run; 0: none is. What code for 9.0 does and 8.0's does not
 * (ptx.h: clusters, launches that overlap) is up to this and not to the device, which may run 8.0's where a build has no other. */
static inline int cuda_code_of(const cudaDeviceProp *properties) {
    const int compiled_for[] = {__CUDA_ARCH_LIST__}, own = properties->major * 10 + properties->minor; /* times 100 */
    int newest = 0;
    for (size_t i = 0; i < sizeof compiled_for / sizeof *compiled_for; i++)
        if (compiled_for[i] / 10 <= own && compiled_for[i] / 10 > newest) newest = compiled_for[i] / 10;
    return newest;
}
/* STATUS_UNSUPPORTED: there is none with this number, it cannot do what is needed, or cuBLASLt is not there. */
enum status cuda_find_device(uint32_t device, cudaDeviceProp *properties, struct error *error);
enum status cuda_memory(uint32_t device, uint64_t *available_bytes, uint64_t *total_bytes, struct error *error); /* backend_ops.memory */

/* ---- tables.cu ---- */
static inline size_t ids_of_tables(const struct cuda *cuda) { return (size_t)cuda->n_tables * cuda->n_lanes * cuda->lane_blocks; } /* lengths lie behind them */
void tables_lay_out(struct cuda *cuda, struct device_arena *arena);
size_t tables_pinned_bytes(void); /* of the host's memory, that tables_open will take */
enum status tables_open(struct cuda *cuda, struct error *error);
void tables_close(struct cuda *cuda);
/* The step's sequences to host.sequences; what the device lacks of their tables to pinned memory of the flight. */
enum status tables_stage(struct cuda *cuda, const struct batch *batch, struct error *error);
/* Its part of what is to be delivered: what was staged since the last time. */
void tables_deliver(struct cuda *cuda, struct delivery *delivery);
/* After tables_stage, of the step's sequence s: the lanes that enter a block with its rows. false: the step's tables have no versions, and it is not known. */
bool tables_entering(const struct cuda *cuda, const struct batch *batch, uint32_t s, struct lane_list *entering);
/* Nothing is known to be on the device. After the stream has been waited for. */
void tables_forget(struct cuda *cuda);

/* ---- step.cu: struct backend_ops entries ---- */
enum status step_open(struct cuda *cuda, struct error *error);
void step_close(struct cuda *cuda);
/* Launches what takes it to the device, on the stream. */
void deliver(struct cuda *cuda, const struct delivery *delivery);
enum status cuda_submit(struct backend *backend, const struct batch *batch, struct error *error);
enum status cuda_sync(struct backend *backend, struct sample_result *results, struct error *error);
void cuda_tap_logits(struct backend *backend, float *destination);

/* ---- supported.cu ---- */
/* STATUS_UNSUPPORTED: the program's shape, or limits that are too large. After `cuda` has its sizes. */
enum status cuda_supported(const struct cuda *cuda, struct error *error);

/* ---- weights.cu ---- */
/* Bytes on the device of all weights, with 16-bit and with native types; which of both `auto` takes. */
size_t weights_bytes(const struct program *program, bool native);
/* Lays out cuda->layers, embedding, head, norms in `arena` (counting or not), by cuda->limits and, where those leave it open, the memory in cuda->properties. */
void weights_lay_out(struct cuda *cuda, struct device_arena *arena);
/* Copies or makes them. Progress as limits.progress. After products_lay_out: they pass through the workspace. */
enum status weights_load(struct cuda *cuda, struct error *error);
/* Bytes of a matrix on the device. */
size_t weights_matrix_bytes(const struct matrix *matrix);
/* x[row] = embedding[token] for rows < header.n_rows, widened to f32. */
void weights_embed(struct cuda *cuda, const struct step_shape *shape);

/* ---- products.cu ---- */
enum product_out {
    PRODUCT_F32,
    PRODUCT_F16,    /* beyond +-65504: that where the product is ours, infinite where it is cuBLAS's. Who reads it clamps */
    PRODUCT_ADD_F32 /* out += */
};
void products_lay_out(struct cuda *cuda, struct device_arena *arena); /* workspace, widened; after weights_lay_out */
enum status products_open(struct cuda *cuda, struct error *error);
void products_close(struct cuda *cuda);
/* What product() with so many rows has to look up, for all matrices, outside of a capture. Runs each once on whatever the activations hold, and overwrites them: cuBLAS
 * loads its kernels when they first run. */
void products_warm(struct cuda *cuda, uint32_t rows);
/* out[rows][w->rows] from in[rows][w->cols], launched on the stream. rows: host number, <= max_rows rounded up to 64; buffers have room for rows rounded up to 64. A row's result does
 * not depend on `rows` up to SKINNY_ROWS, nor ever with cuda->deterministic. */
void product(struct cuda *cuda, const struct matrix *w, const __half *in, uint32_t rows, void *out, enum product_out kind);

/* ---- rows.cu ---- */
/* out[i] = f16 of rmsnorm(x[i]) * norm, for the step's rows. */
void rows_norm(struct cuda *cuda, const struct step_shape *shape, const float *norm, __half *out);
/* head_h[i] = that of row head_rows[first_head_row + i]. */
void rows_norm_head(struct cuda *cuda, const struct step_shape *shape);
/* Angles of the step's positions. */
void rows_rope(struct cuda *cuda, const struct step_shape *shape);
/* qkv (+ bias, q/k norms, rope) to q, pool and rings. */
void rows_append(struct cuda *cuda, uint32_t layer, const struct step_shape *shape);
/* g = silu(gate) * up, saturating. */
void rows_activate(struct cuda *cuda, const struct step_shape *shape);

/* ---- attention.cu ---- */
void attention_lay_out(struct cuda *cuda, struct device_arena *arena); /* partials, unit sums */
enum status attention_open(struct cuda *cuda, struct error *error);
void attention_close(struct cuda *cuda);
void attention_plan(struct cuda *cuda, const struct step_shape *shape);                 /* once a step, after the delivery: cuts the work of all layers */
void attention_run(struct cuda *cuda, uint32_t layer, const struct step_shape *shape);  /* q, pool -> a (and row_max, row_sum, accumulators) */

/* ---- close.cu: KIVI ---- */
/* Codes for the blocks that the step fills: of one layer's lanes, or of all (layer UINT32_MAX). */
void close_step(struct cuda *cuda, uint32_t layer, const struct step_shape *shape);
/* A block's f16 block, which has its place, from its codes. */
void open_block(struct cuda *cuda, uint32_t block);

/* ---- residual.cu: KIVI; of other dtypes nothing happens ---- */
void residual_lay_out(struct cuda *cuda, struct device_arena *arena);
size_t residual_pinned_bytes(const struct cuda *cuda);
enum status residual_open(struct cuda *cuda, struct error *error);
void residual_close(struct cuda *cuda);
/* Around a step's launches: every f16 block that a row reads or fills has its place, there too; then, those that the next row will read are held. */
void residual_begin(struct cuda *cuda, const struct batch *batch);
void residual_end(struct cuda *cuda, const struct batch *batch);
/* Nothing is known to be held as it should be: after a step that failed. */
void residual_forget(struct cuda *cuda);
struct raw_places *residual_places(struct cuda *cuda); /* for compaction, which sends what it changed: */
void residual_send(struct cuda *cuda);                 /* what has changed of the places, on the stream */
/* Places for copies of blocks that have one, there too; at most residual_pass of `most` pairs, which are then copied side by side. */
uint32_t residual_pass(const struct cuda *cuda, uint32_t most);
void residual_copy(struct cuda *cuda, uint32_t count, const uint32_t *source, const uint32_t *destination);
bool residual_resumes(struct backend *backend, uint32_t count, const uint32_t *blocks); /* backend_ops.resumes */

/* ---- services.cu, compact.cu, sinks.cu, score.cu, rank.cu: struct backend_ops entries ---- */
void services_lay_out(struct cuda *cuda, struct device_arena *arena);
size_t services_pinned_bytes(const struct cuda *cuda);
enum status services_open(struct cuda *cuda, struct error *error);
void services_close(struct cuda *cuda);
uint32_t services_rank_places(const struct cuda *cuda); /* in which sequences are ranked, by the limits */
/* What was read of the pool is out of date. */
void services_pool_changes(struct cuda *cuda);
void cuda_copy_blocks(struct backend *backend, uint32_t count, const uint32_t *source, const uint32_t *destination);
void cuda_compact(struct backend *backend, uint32_t count, const struct compaction *items);
void cuda_read_f32(struct backend *backend, uint32_t block, uint32_t slot, float *k, float *v, int32_t *position);
void cuda_score(struct backend *backend, const struct score_request *request, float *scores);
void cuda_rank(struct backend *backend, uint32_t place, const struct rank_request *request, uint32_t *n_protected, float *scores);
void cuda_cut(struct backend *backend, uint32_t place, const struct cut_request *request, struct cut_lane *lanes);
void cuda_keep(struct backend *backend, uint32_t place, const uint32_t *evict, struct kept_lane *lanes, uint32_t *keep);
void cuda_keep_units(struct backend *backend, uint32_t place, const struct unit_request *request, struct kept_lane *lanes, uint32_t *keep);
void cuda_settle(struct backend *backend);
void cuda_read_positions(struct backend *backend, uint32_t count, const uint32_t *blocks, int32_t *positions);
void cuda_shift_sinks(struct backend *backend, const struct shift_request *request);

/* ---- sample.cu ---- */
void sampling_lay_out(struct cuda *cuda, struct device_arena *arena);
size_t sampling_pinned_bytes(const struct cuda *cuda);
enum status sampling_open(struct cuda *cuda, struct error *error);
void sampling_close(struct cuda *cuda);
/* Host side of a step, that of cuda->flight: parameters, biases, bans, histories into pinned memory, which is its part of what is to be delivered, before the other launches. */
void sampling_stage(struct cuda *cuda, const struct batch *batch, struct delivery *delivery);
/* logits [head rows][n_vocab] -> results of samples [first_sample, first_sample + samples) (row of logits: sample_head_row[i] - first_head_row), on the stream, into
 * pinned memory: there when the stream has been waited for. Logits are left as they are. */
void sampling_run(struct cuda *cuda, const struct step_shape *shape);
/* Before another step is launched: what the host samples of the last one, whose rows are in `logits` still. Waits for that step if there is anything. */
void sampling_finish(struct cuda *cuda);
/* Of sample i of that step, after sampling_finish: the token, if the host sampled it; else -1: it is in cuda->drawn. */
int32_t sampling_host_token(const struct cuda *cuda, uint32_t flight, uint32_t i);
/* After that step was waited for. */
void sampling_collect(struct cuda *cuda, uint32_t flight, const struct batch *batch, struct sample_result *results);

/* ---- measure.cu ---- */
double cuda_copy_bandwidth(const struct backend_limits *limits); /* struct backend_ops entry */
/* For the entry weight_bytes: once `cuda` has been laid out, if only to count. */
uint64_t cuda_laid_out_weight_bytes(const struct cuda *cuda);
