/* What this backend cannot do is said before anything is taken, and before it is laid out for good: from shapes and limits alone, no device is asked. Owns nothing; any thread.
 *
 * Everything behind it CHECKs what is refused here. */
#include "kernels/cuda/codes.h"

enum {
    VECTOR = 8,           /* f16 of 16 bytes: what a thread reads of a row in one go */
    GRID_Y_MAX = 65535,   /* blocks of a launch in its second dimension */
    VOCAB_MAX = 1 << 23,  /* a token fits beside its logit */
};

#define ELSEWHERE "; the cpu backend (--backend cpu) takes any"

static enum status check_shape(const struct program *p, struct error *error) {
    if (p->head_dim % VECTOR != 0 || p->head_dim > HEAD_DIM_MAX)
        return error_set(error, STATUS_UNSUPPORTED, "cuda backend: heads of %u dims; multiples of %d up to %d are supported" ELSEWHERE, p->head_dim,
                         VECTOR, HEAD_DIM_MAX);
    if (p->n_embd % VECTOR != 0)
        return error_set(error, STATUS_UNSUPPORTED, "cuda backend: embeddings of %u dims; multiples of %d are supported" ELSEWHERE, p->n_embd,
                         VECTOR);
    if (p->n_ff % VECTOR != 0)
        return error_set(error, STATUS_UNSUPPORTED, "cuda backend: an MLP of %u dims; multiples of %d are supported" ELSEWHERE, p->n_ff, VECTOR);
    if (p->n_vocab >= VOCAB_MAX) return error_set(error, STATUS_UNSUPPORTED, "cuda backend: a vocabulary of %u tokens; fewer than %d are supported", p->n_vocab, VOCAB_MAX);
    return STATUS_OK;
}

/* Numbers that kernels count in 32 bits, and sizes of launches. */
static enum status check_limits(const struct cuda *cuda, struct error *error) {
    const struct backend_limits *limits = &cuda->limits;
    const uint64_t lanes = cuda->n_lanes, lists = (uint64_t)limits->max_sequences * cuda->program->n_kv_heads * div_up(cuda->lane_blocks, SPLIT_SLOTS / BLOCK_TOKENS);
    const uint64_t tiles = ((uint64_t)limits->max_rows * cuda->group + PREFILL_QUERIES - 1) / PREFILL_QUERIES + limits->max_sequences;
    if (limits->max_rows > GRID_Y_MAX || tiles > GRID_Y_MAX)
        return error_set(error, STATUS_UNSUPPORTED, "cuda backend: engine.max_rows %u, with %u query heads a KV head and %u sequences, is more than a launch takes; a lower one is needed", limits->max_rows,
                         cuda->group, limits->max_sequences);
    if ((uint64_t)cuda->n_tables * lanes > UINT32_MAX / ((uint64_t)cuda->lane_blocks + 1))
        return error_set(error, STATUS_UNSUPPORTED, "cuda backend: block tables of %u sequences, %u lanes, %u blocks exceed 2^32 entries; engine.max_model_len or engine.max_sequences must be lower",
                         cuda->n_tables, cuda->n_lanes, cuda->lane_blocks);
    if (lanes * limits->rank_slots > UINT32_MAX)
        return error_set(error, STATUS_UNSUPPORTED, "cuda backend: %u lanes of %u tokens are more than 2^32 slots of one sequence; engine.max_model_len must be lower", cuda->n_lanes, limits->rank_slots);
    if (kivi_bits(limits->kv_dtype) && raw_places_needed(cuda->program, limits) > UINT32_MAX / 2)
        return error_set(error, STATUS_UNSUPPORTED, "cuda backend: the f16 blocks of %u lanes of %u sequences are more than can be counted; engine.max_sequences must be lower", cuda->n_lanes,
                         limits->max_sequences);
    if (cuda->lane_blocks > UINT32_MAX / 2 / BLOCK_TOKENS || lists > UINT32_MAX / (SPLIT_SLOTS / BLOCK_TOKENS + 1))
        return error_set(error, STATUS_UNSUPPORTED, "cuda backend: attention cannot count %u sequences of %u blocks a lane; engine.max_model_len or engine.max_sequences must be lower", limits->max_sequences,
                         cuda->lane_blocks);
    return STATUS_OK;
}

enum status cuda_supported(const struct cuda *cuda, struct error *error) {
    const enum kv_dtype dtype = cuda->limits.kv_dtype;
    if (dtype == KV_F32 || dtype >= KV_DTYPES)
        return error_set(error, STATUS_UNSUPPORTED, "cuda backend: KV dtype %s; f16, bf16, q8, kivi4 and kivi2 are supported", kv_dtype_name(dtype));
    const enum status status = check_shape(cuda->program, error);
    return status == STATUS_OK ? check_limits(cuda, error) : status;
}
