/* See kv_pool.h. */
#include "kernels/reference/kv_pool.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/half.h"
#include "kernels/kivi.h"

static size_t element_bytes(enum kv_dtype dtype) {
    switch (dtype) {
    case KV_F32: return 4;
    case KV_F16:
    case KV_BF16:
    case KV_KIVI4:
    case KV_KIVI2: return 2;
    case KV_Q8: return 1;
    case KV_DTYPES: break;
    }
    CHECK(!"a KV dtype");
    return 0;
}

static size_t codes_bytes(uint32_t head_dim) {
    size_t bytes = 2 * BLOCK_TOKENS * head_dim + (head_dim + BLOCK_TOKENS * kivi_value_groups(head_dim)) * sizeof(struct kivi_scale);
    return (bytes + 7) / 8 * 8;
}

size_t kv_pool_block_bytes(uint32_t head_dim, enum kv_dtype dtype) {
    size_t scales = dtype == KV_Q8 ? 2 * sizeof(float) : 0;
    return BLOCK_TOKENS * (2 * head_dim * element_bytes(dtype) + scales + sizeof(uint64_t) + sizeof(int32_t)) +
           (kivi_bits(dtype) ? codes_bytes(head_dim) : 0);
}

enum status kv_pool_init(struct kv_pool *pool, uint32_t head_dim, enum kv_dtype dtype, uint32_t n_blocks, struct error *error) {
    *pool = (struct kv_pool){.dtype = dtype, .head_dim = head_dim, .n_blocks = n_blocks};
    pool->block_bytes = kv_pool_block_bytes(head_dim, dtype);
    pool->row_bytes = head_dim * element_bytes(dtype);
    pool->codes_offset = 2 * BLOCK_TOKENS * pool->row_bytes;
    pool->bytes = calloc(n_blocks, pool->block_bytes);
    pool->closed = calloc(n_blocks, sizeof *pool->closed);
    if (!pool->bytes || !pool->closed)
        return error_set(error, STATUS_NO_MEMORY, "KV pool: %u blocks of %zu bytes", (unsigned)n_blocks, pool->block_bytes);
    return STATUS_OK;
}

void kv_pool_done(struct kv_pool *pool) {
    free(pool->bytes);
    free(pool->closed);
    *pool = (struct kv_pool){0};
}

/* The places of a slot. `which`: 0 K, 1 V. */
static uint8_t *block_at(const struct kv_pool *pool, uint32_t block) {
    CHECK(block < pool->n_blocks);
    return pool->bytes + block * pool->block_bytes;
}

static uint8_t *row_at(const struct kv_pool *pool, uint32_t block, uint32_t slot, int which) {
    CHECK(slot < BLOCK_TOKENS);
    return block_at(pool, block) + ((size_t)which * BLOCK_TOKENS + slot) * pool->row_bytes;
}

static uint8_t *scale_at(const struct kv_pool *pool, uint32_t block, uint32_t slot, int which) {
    return block_at(pool, block) + 2 * BLOCK_TOKENS * pool->row_bytes + ((size_t)which * BLOCK_TOKENS + slot) * sizeof(float);
}

static uint8_t *position_at(const struct kv_pool *pool, uint32_t block, uint32_t slot) {
    return block_at(pool, block) + pool->block_bytes - (BLOCK_TOKENS - slot) * sizeof(int32_t);
}

static uint8_t *accumulated_at(const struct kv_pool *pool, uint32_t block, uint32_t slot) {
    return block_at(pool, block) + pool->block_bytes - BLOCK_TOKENS * sizeof(int32_t) - (BLOCK_TOKENS - slot) * sizeof(uint64_t);
}

/* KIVI's codes of a row, its scales: of K one a channel, of V KIVI_GROUP channels each, slot after slot. */
static uint8_t *codes_at(const struct kv_pool *pool, uint32_t block, uint32_t slot, int which) {
    return block_at(pool, block) + pool->codes_offset + ((size_t)which * BLOCK_TOKENS + slot) * pool->head_dim;
}

static struct kivi_scale *scales_at(const struct kv_pool *pool, uint32_t block, int which) {
    struct kivi_scale *keys = (struct kivi_scale *)(void *)codes_at(pool, block, 0, 2);
    return which ? keys + pool->head_dim : keys;
}

/* q8: the largest magnitude becomes 127. Not finite: nothing of the row is left to keep, and the pool holds finite numbers only. */
static void write_q8(uint8_t *row, uint8_t *scale_out, const float *x, uint32_t n) {
    float largest = 0;
    for (uint32_t d = 0; d < n; d++) largest = fabsf(x[d]) > largest ? fabsf(x[d]) : largest;
    float scale = largest / 127;
    memcpy(scale_out, &scale, sizeof scale);
    for (uint32_t d = 0; d < n; d++) {
        float q = scale > 0 && isfinite(scale) && isfinite(x[d]) ? rintf(x[d] / scale) : 0;
        int8_t code = (int8_t)(q > 127 ? 127 : q < -127 ? -127 : q);
        memcpy(row + d, &code, 1);
    }
}

/* f16: the pool holds finite numbers only, and so are what codes are made of. */
static float within_f16(float x) { return isnan(x) ? 0 : fmaxf(fminf(x, 65504), -65504); }

static void write_row(struct kv_pool *pool, uint32_t block, uint32_t slot, int which, const float *x) {
    uint8_t *row = row_at(pool, block, slot, which);
    if (pool->dtype == KV_F32) memcpy(row, x, pool->row_bytes);
    if (pool->dtype == KV_Q8) write_q8(row, scale_at(pool, block, slot, which), x, pool->head_dim);
    if (pool->dtype == KV_F32 || pool->dtype == KV_Q8) return;
    for (uint32_t d = 0; d < pool->head_dim; d++) {
        uint16_t half = pool->dtype == KV_BF16 ? bf16_from_float(x[d]) : f16_from_float(within_f16(x[d]));
        memcpy(row + d * sizeof half, &half, sizeof half);
    }
}

static void read_row(const struct kv_pool *pool, uint32_t block, uint32_t slot, int which, float *x) {
    const uint8_t *row = row_at(pool, block, slot, which);
    if (pool->dtype == KV_F32) {
        memcpy(x, row, pool->row_bytes);
    } else if (pool->dtype == KV_Q8) {
        float scale;
        memcpy(&scale, scale_at(pool, block, slot, which), sizeof scale);
        for (uint32_t d = 0; d < pool->head_dim; d++) x[d] = scale * (float)(int8_t)row[d];
    } else {
        for (uint32_t d = 0; d < pool->head_dim; d++) {
            uint16_t half;
            memcpy(&half, row + d * sizeof half, sizeof half);
            x[d] = pool->dtype == KV_BF16 ? float_from_bf16(half) : float_from_f16(half);
        }
    }
}

void kv_pool_write(struct kv_pool *pool, uint32_t block, uint32_t slot, const float *k, const float *v, int32_t position) {
    write_row(pool, block, slot, 0, k);
    write_row(pool, block, slot, 1, v);
    memset(accumulated_at(pool, block, slot), 0, sizeof(uint64_t));
    memcpy(position_at(pool, block, slot), &position, sizeof position);
    pool->closed[block] = false;
    if (slot == BLOCK_TOKENS - 1) kv_pool_close(pool, block);
}

void kv_pool_write_k(struct kv_pool *pool, uint32_t block, uint32_t slot, const float *k) { write_row(pool, block, slot, 0, k); }

static void read_codes(const struct kv_pool *pool, uint32_t block, uint32_t slot, int which, float *x) {
    const uint8_t *codes = codes_at(pool, block, slot, which);
    const struct kivi_scale *scales = scales_at(pool, block, which) + (which ? slot * kivi_value_groups(pool->head_dim) : 0);
    for (uint32_t d = 0; d < pool->head_dim; d++) x[d] = kivi_number(codes[d], scales[which ? d / KIVI_GROUP : d]);
}

void kv_pool_read_k(const struct kv_pool *pool, uint32_t block, uint32_t slot, bool codes, float *k) {
    (codes ? read_codes : read_row)(pool, block, slot, 0, k);
}
void kv_pool_read_v(const struct kv_pool *pool, uint32_t block, uint32_t slot, bool codes, float *v) {
    (codes ? read_codes : read_row)(pool, block, slot, 1, v);
}

void kv_pool_close(struct kv_pool *pool, uint32_t block) {
    const uint32_t bits = kivi_bits(pool->dtype), d = pool->head_dim;
    if (bits == 0) return;
    float *rows = check_calloc((size_t)BLOCK_TOKENS * d, sizeof *rows);
    for (uint32_t slot = 0; slot < BLOCK_TOKENS; slot++) read_row(pool, block, slot, 0, rows + (size_t)slot * d);
    for (uint32_t i = 0; i < d; i++)
        scales_at(pool, block, 0)[i] = kivi_quantize(rows + i, d, BLOCK_TOKENS, bits, codes_at(pool, block, 0, 0) + i, d);
    for (uint32_t slot = 0; slot < BLOCK_TOKENS; slot++) {
        struct kivi_scale *scales = scales_at(pool, block, 1) + slot * kivi_value_groups(d);
        read_row(pool, block, slot, 1, rows);
        for (uint32_t i = 0; i < d; i += KIVI_GROUP)
            *scales++ = kivi_quantize(rows + i, 1, d - i < KIVI_GROUP ? d - i : KIVI_GROUP, bits, codes_at(pool, block, slot, 1) + i, 1);
    }
    free(rows);
    pool->closed[block] = true;
}

bool kv_pool_is_closed(const struct kv_pool *pool, uint32_t block) {
    CHECK(block < pool->n_blocks);
    return pool->closed[block];
}

bool kv_pool_reads_codes(const struct kv_pool *pool, const uint32_t *blocks, uint32_t j, uint32_t before, int32_t position) {
    if (kivi_bits(pool->dtype) == 0 || (j + 1) * BLOCK_TOKENS > before) return false;
    return kivi_reads_codes(kv_pool_position(pool, blocks[j], BLOCK_TOKENS - 1), position);
}

uint64_t kv_pool_accumulated(const struct kv_pool *pool, uint32_t block, uint32_t slot) {
    uint64_t sum;
    memcpy(&sum, accumulated_at(pool, block, slot), sizeof sum);
    return sum;
}

void kv_pool_accumulate(struct kv_pool *pool, uint32_t block, uint32_t slot, uint64_t attention) {
    uint64_t sum = kv_pool_accumulated(pool, block, slot) + attention;
    memcpy(accumulated_at(pool, block, slot), &sum, sizeof sum);
}

int32_t kv_pool_position(const struct kv_pool *pool, uint32_t block, uint32_t slot) {
    int32_t position;
    memcpy(&position, position_at(pool, block, slot), sizeof position);
    return position;
}

void kv_pool_copy_block(struct kv_pool *pool, uint32_t source, uint32_t destination) {
    CHECK(source != destination);
    memcpy(block_at(pool, destination), block_at(pool, source), pool->block_bytes);
    pool->closed[destination] = pool->closed[source];
}

void kv_pool_copy_slot(struct kv_pool *pool, uint32_t source, uint32_t source_slot, uint32_t destination, uint32_t destination_slot) {
    if (source == destination && source_slot == destination_slot) return;
    for (int which = 0; which < 2; which++) {
        memcpy(row_at(pool, destination, destination_slot, which), row_at(pool, source, source_slot, which), pool->row_bytes);
        if (pool->dtype == KV_Q8)
            memcpy(scale_at(pool, destination, destination_slot, which), scale_at(pool, source, source_slot, which), sizeof(float));
    }
    pool->closed[destination] = false;
    memcpy(accumulated_at(pool, destination, destination_slot), accumulated_at(pool, source, source_slot), sizeof(uint64_t));
    memcpy(position_at(pool, destination, destination_slot), position_at(pool, source, source_slot), sizeof(int32_t));
}
