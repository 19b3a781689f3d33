/* The KV pool of the cpu backend: its layout (layout.h) and the services between steps. The engine's thread. */
#include <string.h>

#include "base/check.h"
#include "base/half.h"
#include "kernels/cpu/cpu.h"

struct kv_shape kv_shape_of(const struct program *program, enum kv_dtype dtype) {
    struct kv_shape shape = {.dtype = dtype, .head_dim = program->head_dim, .dims = (program->head_dim + KV_PAD - 1) / KV_PAD * KV_PAD};
    size_t element = dtype == KV_F32 ? 4 : dtype == KV_Q8 ? 1 : 2;
    shape.v_offset = (size_t)BLOCK_TOKENS * shape.dims * element;
    shape.scale_offset = 2 * shape.v_offset;
    shape.bytes = shape.scale_offset + (dtype == KV_Q8 ? 2 * BLOCK_TOKENS * sizeof(float) : 0);
    return shape;
}

size_t cpu_block_bytes(const struct program *program, enum kv_dtype dtype) {
    return kv_shape_of(program, dtype).bytes + BLOCK_TOKENS * sizeof(int32_t);
}

void cpu_copy_blocks(struct backend *backend, uint32_t count, const uint32_t *source, const uint32_t *destination) {
    struct cpu *cpu = (struct cpu *)backend;
    for (uint32_t i = 0; i < count; i++) {
        CHECK(source[i] < cpu->limits.n_blocks && destination[i] < cpu->limits.n_blocks);
        if (source[i] == destination[i]) continue;
        memcpy(cpu->pool + destination[i] * cpu->kv.bytes, cpu->pool + source[i] * cpu->kv.bytes, cpu->kv.bytes);
        memcpy(cpu->positions + (size_t)destination[i] * BLOCK_TOKENS, cpu->positions + (size_t)source[i] * BLOCK_TOKENS, BLOCK_TOKENS * sizeof(int32_t));
    }
}

static float element(enum kv_dtype dtype, const uint8_t *base, size_t at) {
    if (dtype == KV_F32) {
        float x;
        memcpy(&x, base + at * 4, sizeof x);
        return x;
    }
    uint16_t half;
    memcpy(&half, base + at * 2, sizeof half);
    return dtype == KV_F16 ? float_from_f16(half) : float_from_bf16(half);
}

void cpu_read_f32(struct backend *backend, uint32_t block, uint32_t slot, float *k, float *v, int32_t *position) {
    struct cpu *cpu = (struct cpu *)backend;
    CHECK(block < cpu->limits.n_blocks && slot < BLOCK_TOKENS);
    const struct kv_shape *shape = &cpu->kv;
    const uint8_t *bytes = cpu->pool + block * shape->bytes, *values = bytes + shape->v_offset;
    const float *scales = (const float *)(const void *)(bytes + shape->scale_offset);
    for (uint32_t i = 0; i < shape->head_dim; i++) {
        if (shape->dtype == KV_Q8) {
            k[i] = scales[slot] * (float)(bytes[(size_t)(i / 4) * 128 + slot * 4 + i % 4] - 128);
            v[i] = scales[BLOCK_TOKENS + slot] * (float)(int8_t)values[(size_t)slot * shape->dims + i];
        } else {
            k[i] = element(shape->dtype, bytes, (size_t)(i / 2) * 64 + slot * 2 + i % 2);
            v[i] = element(shape->dtype, values, ((size_t)(slot / 2) * shape->dims + i) * 2 + slot % 2);
        }
    }
    *position = cpu->positions[(size_t)block * BLOCK_TOKENS + slot];
}
