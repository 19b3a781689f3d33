/* The one interface of everything that computes. A backend owns the weights in its own layout, the KV pool with its slot metadata, and scratch; all of it is
 * allocated in prepare. Numbers at addresses: it knows rows, lanes and blocks, never requests, policies or the scheduler.
 *
 * Threads: prepare, submit, sync, the KV services and close are called by one thread (the engine's). Workers a backend starts are its own.
 * Row contract (design 11): a row's results depend on that row and its context alone, bit for bit on `reference` and on each `cpu` instruction set.
 *
 * KV pool: block b holds BLOCK_TOKENS slots of K and V of one lane. The layout inside is the backend's. Each slot also carries the sequence position
 * of the token that filled it (int32). */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/block.h"
#include "base/error.h"
#include "kernels/program.h"
#include "kernels/sample.h"
#include "kernels/score.h"
#include "kernels/select.h"

enum kv_dtype { KV_F32, KV_F16, KV_BF16, KV_Q8, KV_KIVI4, KV_KIVI2, KV_DTYPES }; /* the last two: kernels/kivi.h */
const char *kv_dtype_name(enum kv_dtype dtype); /* "f32", "f16", "bf16", "q8", "kivi4", "kivi2" */
bool kv_dtype_parse(const char *name, enum kv_dtype *dtype);

/* How a backend with memory of its own keeps the weights: dequantised to f16, or in the types of the file. AUTO: f16 unless that takes too much of its memory (weights_choice). */
enum weights_mode { WEIGHTS_AUTO, WEIGHTS_F16, WEIGHTS_NATIVE };

struct backend_limits {
    enum kv_dtype kv_dtype;
    uint32_t device;         /* of backends that have several */
    enum weights_mode weights; /* of backends with memory of their own */
    uint32_t activation_bits;  /* cpu: 8 or 16 (0: 8) of activations where weights are quantised. Others have no such choice */
    bool deterministic;      /* the row contract holds at any cost; the others hold it always */
    uint32_t n_blocks;       /* of the pool */
    uint32_t n_tables, table_blocks; /* what the sequences of batches name: batch_sequence.table < n_tables, table_blocks ids a lane at most. n_tables 0: max_sequences, n_blocks */
    uint32_t max_rows;       /* rows of one batch */
    uint32_t max_sequences;  /* sequences of one batch */
    uint32_t max_samples;    /* samples of one batch */
    uint32_t threads;        /* compute workers, the engine thread among them; 0: one a physical core within the affinity mask and the cgroup's quota */
    const char *instruction_set; /* cpu: "generic", "avx2", "avxvnni", "avx512", "avx512bf16"; NULL: the best this machine has */
    bool drop_source_pages;  /* weights are a file mapping: give pages back (madvise) once repacked */
    uint32_t n_rings;        /* query rings; 0: nothing scores by attention */
    uint32_t ring_rows;      /* query rows a ring holds */
    uint32_t sink_slots;     /* slots a lane whose keys shift_sinks may move, a multiple of BLOCK_TOKENS; 0: none. Each ring holds their unrotated copy */
    bool accumulators;       /* slots carry accumulated attention */
    uint32_t rank_slots;     /* slots a lane of which rank() may be asked; 0: it is not */
    uint32_t rank_places;    /* sequences that would be ranked at a time, <= RANK_PLACES_MAX (0: one). A backend has no more than pay (struct backend) */
    double mock_tokens_per_second; /* mock only: rate of each step's rows; 0: as fast as it goes */
    void (*progress)(void *context, double fraction); /* during prepare; may be NULL */
    void *progress_context;
    uint64_t *phase_ns;      /* [PHASE_KINDS]: each step adds the nanoseconds from the end of the phase before to the end of this one, as the engine thread sees them.
                                NULL: the clock is not read. For `bench --phases` */
    uint64_t *wait_ns;       /* each step adds the nanoseconds in which the engine thread waited for the device, or itself did the device's work: what is left is the host's
                                cost of the step. NULL: the clock is not read */
};

/* One sequence's part of a batch. Its rows are contiguous, positions ascending. */
struct batch_sequence {
    uint32_t first_row, n_rows;
    /* Whose block ids these are, so that a backend with memory of its own need not take all of them at every step. No two sequences of a batch have the same table. */
    uint32_t table;
    uint32_t table_changes; /* differs from that of an earlier step with the same table, unless the ids listed then are still the first ones listed, lane by lane, and lane_tokens of all
                               lanes differ from those of then by the same number. 0: unknown, everything is taken anew, by the next step with this table too */
    const uint32_t *lane_first;   /* [n_lanes]: index in batch.block_ids of the lane's first block id */
    const uint32_t *lane_tokens;  /* [n_lanes]: slots filled BEFORE this step; this step appends n_rows more to every lane. Blocks for them are in the table */
    uint32_t ring;   /* 0: none. 1..n_rings: ATTN leaves the queries (post-RoPE, as attention used them, widened exactly from the type they are kept in) of the last
                        ring_rows rows there; the row of position p replaces that of p - ring_rows */
    bool accumulate; /* each row adds its attention to the accumulators of the slots it sees (kernels/score.h). A slot that is appended starts at 0 */
};

struct batch {
    uint32_t n_rows, n_sequences, n_samples;
    const int32_t *tokens;     /* [n_rows] 0 <= token < n_vocab (checked by the engine); or, while the step before is in flight, -1 - i: the token that its sample i draws */
    const int32_t *positions;  /* [n_rows] sequence position, for RoPE */
    const struct batch_sequence *sequences;
    const uint32_t *block_ids; /* the table arena */
    const struct sample *samples; /* ascending row */
};

struct shift_request {
    uint32_t ring;
    bool first;
    uint32_t n_slots;           /* <= limits.sink_slots */
    int32_t shift;
    const uint32_t *block_ids;  /* the table arena */
    const uint32_t *lane_first; /* [n_lanes] */
};

struct memory_line {
    const char *what; /* "weights" (all of them and nothing else), "KV block", "scratch" */
    uint64_t count, bytes_each;
    bool host; /* in the host's memory, whatever the backend's own is */
};

/* Compaction of one lane: the slots `keep` names move forward, in order, with K, V and position. Slot keep[i] of the source becomes slot i of the destination.
 * destination[j] is source[j] (in place) or a block that is no source of this call; what it holds past n_keep is unspecified. Source blocks that are not
 * destinations are left as they are: they may be shared. Of the KIVI dtypes a block that the next row would read as codes stays whole or goes whole (rank and keep see to it), and the
 * lane's last slot is the newest token of its sequence. */
struct compaction {
    const uint32_t *source; /* [blocks of n_slots] the lane's block ids, in order */
    uint32_t n_slots;
    const uint32_t *keep;   /* [n_keep] ascending, < n_slots; NULL: what the backend's last keep or keep_units left in `place` of `lane`, of which n_slots and n_keep are those numbers */
    uint32_t n_keep;
    const uint32_t *destination; /* [blocks of n_keep] */
    uint32_t place, lane;        /* where keep is NULL */
};

struct backend; /* each backend's own struct begins with this: */

/* Every entry is present in every backend. */
struct backend_ops {
    const char *name; /* "cuda", "cpu", "reference", "mock" */

    /* The memory that pool, weights and scratch on `device` take from. *total_bytes 0: the host's, of which nothing more is said. Both may be NULL: is there such a device at all?
     * STATUS_UNSUPPORTED: there is not, and why. Any thread. */
    enum status (*memory)(uint32_t device, uint64_t *available_bytes, uint64_t *total_bytes, struct error *error);

    /* Bytes of one block of one lane: K, V, and scales if any; metadata (positions) included; of KIVI dtypes, where it counts, not of necessity accumulated attention, which is kept with
     * them only where limits.accumulators ask for it (backend_block_bytes adds it). 0: this backend does not keep KV in this type. */
    size_t (*block_bytes)(const struct program *program, enum kv_dtype dtype);
    /* What prepare will allocate beside the pool, line by line; returns the number of lines (<= max). limits->n_blocks is not read, nor is a device asked, but for WEIGHTS_AUTO. */
    uint32_t (*memory_plan)(const struct program *program, const struct backend_limits *limits, struct memory_line *lines, uint32_t max);

    /* What prepare refuses because of what program and limits are, without a look at a device or at memory: STATUS_UNSUPPORTED or STATUS_INVALID, and why. Any thread. */
    enum status (*supports)(const struct program *program, const struct backend_limits *limits, struct error *error);
    enum status (*prepare)(const struct program *program, const struct backend_limits *limits, struct backend **backend, struct error *error);
    void (*close)(struct backend *backend); /* NULL is fine */
    /* One line for the log and `bench`: "cpu avx512bf16, 2 threads". Valid while the backend lives. */
    const char *(*describe)(const struct backend *backend);

    /* Runs one step. `batch` and its arrays must stay until sync returns; what its sequences point to (table arena, lane_first, lane_tokens) is read in submit alone where
     * backend.takes_two. There a second step may be submitted before the first one's sync; it runs after it. If that fails, the first is still in flight. */
    enum status (*submit)(struct backend *backend, const struct batch *batch, struct error *error);
    /* Waits for the older step in flight; results[i] answers batch.samples[i]. If it fails, a second one is still in flight. */
    enum status (*sync)(struct backend *backend, struct sample_result *results, struct error *error);

    /* KV services, while no step is in flight (but see rank). */
    /* Whole blocks: block destination[i] becomes a copy of block source[i] (K, V, metadata). */
    void (*copy_blocks)(struct backend *backend, uint32_t count, const uint32_t *source, const uint32_t *destination);
    /* Could rows go on right behind these blocks, each the last or the last but one of its lane? KIVI dtypes: if it still has them in full precision, which it then does until the next submit,
     * whatever is submitted. All others: true. */
    bool (*resumes)(struct backend *backend, uint32_t count, const uint32_t *blocks);
    /* Each item is one lane; no item's destination is another item's source or destination. */
    void (*compact)(struct backend *backend, uint32_t count, const struct compaction *items);
    /* Slot `slot` of `block`, widened: k and v [head_dim] (keys as cached: rotated); of a block that was filled what its codes say, if it has any. For tests and eval. */
    void (*read_f32)(struct backend *backend, uint32_t block, uint32_t slot, float *k, float *v, int32_t *position);
    /* Scores of cached slots (kernels/score.h). Bit-identical whatever the chunks and batches in which the rows ran. */
    void (*score)(struct backend *backend, const struct score_request *request, float *scores);
    /* Which slots of a sequence stay (kernels/select.h), in `place` < backend.rank_places. What these four fill is there after settle, before which no other call is made of that place but one
     * behind a rank that fills nothing; requests and their arrays are read at once. Where backend.takes_two they may also be called behind a step in flight, of a sequence as that step leaves it.
     * rank makes a key of every slot of every lane: n_protected [n_lanes] (NULL: not wanted) of them always stay; scores (NULL: not wanted) lane after lane, as they are before protection. */
    void (*rank)(struct backend *backend, uint32_t place, const struct rank_request *request, uint32_t *n_protected, float *scores);
    void (*cut)(struct backend *backend, uint32_t place, const struct cut_request *request, struct cut_lane *lanes); /* lanes [n_lanes] */
    /* Of each lane the `evict` lowest go, or all that may. lanes [n_lanes]; keep (NULL: the lists stay in the backend): the list of lane l begins where its slots would if lanes lay one after
     * another. */
    void (*keep)(struct backend *backend, uint32_t place, const uint32_t *evict, struct kept_lane *lanes, uint32_t *keep);
    /* Of all lanes together so many units go. lanes and keep as keep fills them. */
    void (*keep_units)(struct backend *backend, uint32_t place, const struct unit_request *request, struct kept_lane *lanes, uint32_t *keep);
    /* Waits for what these have yet to fill, in all places. */
    void (*settle)(struct backend *backend);
    /* positions [count * BLOCK_TOKENS]: what the slots of these blocks hold; undefined past a lane's length. */
    void (*read_positions)(struct backend *backend, uint32_t count, const uint32_t *blocks, int32_t *positions);
    /* The keys of the first request->n_slots slots of every lane are rotated to position + shift, from an unrotated copy in the ring. first: the copy is made now, from the
     * cached keys, which stand at their own positions. Angles in double. Positions in the metadata stay. Those blocks must be this sequence's alone. KIVI dtypes: whole blocks,
     * full ones; the copy is that of their codes. */
    void (*shift_sinks)(struct backend *backend, const struct shift_request *request);
    /* The logits of the last batch's sampled rows are not kept, except here: copies row-chunked logits of sample i of the NEXT submit into
     * destination[i * n_vocab] (NULL: stop). For tests, golden gates and eval. */
    void (*tap_logits)(struct backend *backend, float *destination);

    /* For measuring. */
    bool makes_weights; /* prepare takes a program with a random_seed */
    /* Bytes of weights, as prepare will lay them out, that every step reads: all but the input embedding, of which a step reads single rows. 0: none. */
    uint64_t (*weight_bytes)(const struct program *program, const struct backend_limits *limits);
    /* Bytes a second, read and written together, at which large buffers are copied within the memory that pool and weights take from, the best of several passes; by as many
     * threads as `limits` give this backend. 0: not to be had. Takes memory of its own for the time. Any thread, while nothing else runs there. */
    double (*copy_bandwidth)(const struct backend_limits *limits);
};

struct backend {
    const struct backend_ops *ops;
    struct ranking *ranking; /* of backends that compute on the host (kernels/select.h); NULL: limits.rank_slots is 0 */
    uint32_t rank_places; /* 0: limits.rank_slots is 0 */
    bool takes_two;    /* steps: one may run ahead of the host. It then draws by nothing the host has yet to see: no sample of it penalizes (sampling_penalizes) */
    bool joins_blocks; /* a KIVI dtype: slots of a block that the next row reads as codes stay or go together (select_join) */
};

/* NULL-terminated. A build without CUDA is a full build. */
extern const struct backend_ops *const backends[];
const struct backend_ops *backend_find(const char *name); /* NULL: unknown */
/* The same, and "auto": the best one that has this device on this machine; where none has, the best one that has any first device, whose `memory` says what is wrong with this one. */
const struct backend_ops *backend_choose(const char *name, uint32_t device);
enum status backend_absent(const char *name, struct error *error); /* what is to be said where that is NULL */
/* The KV dtype "auto" stands for: bf16 where the instruction set (NULL: the best this machine has) computes with it, else f16. */
enum kv_dtype backend_kv_dtype(const struct backend_ops *ops, const char *instruction_set);
bool backend_resumes_always(struct backend *backend, uint32_t count, const uint32_t *blocks);
/* ops->block_bytes with all that a pool with these limits keeps of a block. */
size_t backend_block_bytes(const struct backend_ops *ops, const struct program *program, enum kv_dtype dtype, bool accumulators);
/* backend_ops.copy_bandwidth of those that compute where this program runs, with `threads` workers. */
double backend_host_copy_bandwidth(uint32_t threads);
/* What prepare says to a program with a random_seed, where makes_weights is false; STATUS_OK to all others. */
enum status backend_needs_data(const struct backend_ops *ops, const struct program *program, struct error *error);
/* backend_ops.memory of those that compute where this program runs: there is device 0 alone. */
enum status backend_host_memory(uint32_t device, uint64_t *available_bytes, uint64_t *total_bytes, struct error *error);
/* What WEIGHTS_AUTO stands for on a device with `total_bytes`, of which f16 weights would take `f16_bytes`. */
enum weights_mode weights_choice(uint64_t f16_bytes, uint64_t total_bytes);
bool weights_mode_parse(const char *name, enum weights_mode *mode); /* "auto", "f16", "native" */
const char *weights_mode_name(enum weights_mode mode);
bool activation_bits_parse(const char *name, uint32_t *bits); /* "8bit", "16bit" */

extern const struct backend_ops backend_cuda; /* in a build with CUDA (KVASIR_HAVE_CUDA) */
extern const struct backend_ops backend_cpu, backend_reference, backend_mock;
