/* The KV pool of the cpu backend: its layout (layout.h) and the services between steps. The engine's thread. */
#include <math.h>
#include <string.h>

#include "base/check.h"
#include "base/half.h"
#include "kernels/cpu/cpu.h"
#include "kernels/kivi.h"

struct kv_shape kv_shape_of(const struct program *program, enum kv_dtype dtype) {
    struct kv_shape shape = {.dtype = dtype, .head_dim = program->head_dim, .dims = (program->head_dim + KV_PAD - 1) / KV_PAD * KV_PAD};
    const uint32_t bits = kivi_bits(dtype);
    if (bits > 0) {
        shape.v_offset = (size_t)BLOCK_TOKENS * shape.dims * bits / 8;
        shape.scale_offset = 2 * shape.v_offset;
        shape.bytes = shape.scale_offset + (shape.dims + BLOCK_TOKENS * kivi_value_groups(shape.head_dim)) * sizeof(struct kivi_scale);
        shape.raw_bytes = kv_shape_of(program, KV_F16).bytes;
        return shape;
    }
    size_t element = dtype == KV_F32 ? 4 : dtype == KV_Q8 ? 1 : 2;
    shape.v_offset = (size_t)BLOCK_TOKENS * shape.dims * element;
    shape.scale_offset = 2 * shape.v_offset;
    shape.bytes = shape.scale_offset + (dtype == KV_Q8 ? 2 * BLOCK_TOKENS * sizeof(float) : 0);
    return shape;
}

size_t cpu_block_bytes(const struct program *program, enum kv_dtype dtype) {
    const struct kv_shape shape = kv_shape_of(program, dtype);
    const size_t bytes = shape.bytes + BLOCK_TOKENS * sizeof(int32_t);
    return bytes + (shape.raw_bytes ? sizeof(uint32_t) + sizeof(uint8_t) : BLOCK_TOKENS * sizeof(uint64_t)); /* residual.c's two marks */
}

/* The residual's part of a block's copy. */
static void copy_raw(struct cpu *cpu, uint32_t source, uint32_t destination) {
    const uint32_t from = cpu->raw.of[source];
    cpu->closed[destination] = cpu->closed[source];
    if (from == RAW_NONE) {
        raw_forget(&cpu->raw, destination);
        return;
    }
    raw_hold(&cpu->raw, from);
    uint32_t to = raw_take(&cpu->raw, destination);
    raw_release(&cpu->raw, from);
    memcpy(cpu->raw_pool + to * cpu->kv.raw_bytes, cpu->raw_pool + from * cpu->kv.raw_bytes, cpu->kv.raw_bytes);
}

void cpu_copy_blocks(struct backend *backend, uint32_t count, const uint32_t *source, const uint32_t *destination) {
    struct cpu *cpu = (struct cpu *)backend;
    for (uint32_t i = 0; i < count; i++) {
        CHECK(source[i] < cpu->limits.n_blocks && destination[i] < cpu->limits.n_blocks);
        if (source[i] == destination[i]) continue;
        if (cpu->kv.raw_bytes) copy_raw(cpu, source[i], destination[i]);
        memcpy(cpu->pool + destination[i] * cpu->kv.bytes, cpu->pool + source[i] * cpu->kv.bytes, cpu->kv.bytes);
        for (size_t slot = 0; slot < BLOCK_TOKENS && cpu->limits.accumulators; slot++)
            cpu->accumulated[(size_t)destination[i] * BLOCK_TOKENS + slot] = cpu->accumulated[(size_t)source[i] * BLOCK_TOKENS + slot];
        memcpy(cpu->positions + (size_t)destination[i] * BLOCK_TOKENS, cpu->positions + (size_t)source[i] * BLOCK_TOKENS,
               BLOCK_TOKENS * sizeof(int32_t));
    }
}

/* Element `at` of the codes, of K or V; its scale. */
static float coded(const struct kv_shape *shape, const uint8_t *codes, size_t at, const uint8_t *scales, size_t group) {
    const uint32_t bits = kivi_bits(shape->dtype), bytes = 4 * bits; /* of 32 codes */
    const uint8_t *unit = codes + at / 32 * bytes;
    struct kivi_scale scale;
    memcpy(&scale, scales + group * sizeof scale, sizeof scale);
    return kivi_number((uint8_t)(unit[at % bytes] >> (at % 32 / bytes * bits) & ((1u << bits) - 1)), scale);
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
    const uint8_t *bytes = cpu->pool + block * shape->bytes;
    const bool codes = shape->raw_bytes && cpu->closed[block];
    if (shape->raw_bytes && !codes) {
        shape = &cpu->raw_shape;
        bytes = raw_block(cpu, block);
    }
    const uint8_t *values = bytes + shape->v_offset;
    const float *scales = (const float *)(const void *)(bytes + shape->scale_offset);
    if (kv_transforms(shape)) {
        float key[KV_DIMS_MAX];
        for (uint32_t i = 0; i < shape->dims; i++) key[i] = scales[slot] * (float)(bytes[(size_t)(i / 4) * 128 + slot * 4 + i % 4] - 128);
        cpu->isa->hadamard(key, shape->dims);
        memcpy(k, key, shape->head_dim * sizeof *k);
    }
    for (uint32_t i = 0; i < shape->head_dim; i++) {
        const size_t key = (size_t)(i / 2) * 64 + slot * 2 + i % 2, value = ((size_t)(slot / 2) * shape->dims + i) * 2 + slot % 2;
        if (codes) {
            k[i] = coded(shape, bytes, key, bytes + shape->scale_offset, i);
            v[i] = coded(shape, values, value, bytes + shape->scale_offset, shape->dims + slot * kivi_value_groups(shape->head_dim) + i / KIVI_GROUP);
        } else if (shape->dtype == KV_Q8) {
            v[i] = scales[BLOCK_TOKENS + slot] * (float)(int8_t)values[(size_t)slot * shape->dims + i];
        } else {
            k[i] = element(shape->dtype, bytes, key);
            v[i] = element(shape->dtype, values, value);
        }
    }
    *position = cpu->positions[(size_t)block * BLOCK_TOKENS + slot];
}

void cpu_read_positions(struct backend *backend, uint32_t count, const uint32_t *blocks, int32_t *positions) {
    const struct cpu *cpu = (const struct cpu *)backend;
    for (uint32_t i = 0; i < count; i++) {
        CHECK(blocks[i] < cpu->limits.n_blocks);
        memcpy(positions + (size_t)i * BLOCK_TOKENS, cpu->positions + (size_t)blocks[i] * BLOCK_TOKENS, BLOCK_TOKENS * sizeof *positions);
    }
}

/* The rotation alone: what rope_magnitude did to the key when it was cached stays in it. */
static void rotate(const struct program *p, double positions, float *x) {
    uint32_t half = p->rope_dims / 2;
    bool halves = p->rope_pairs == ROPE_PAIRS_HALVES;
    for (uint32_t i = 0; i < half; i++) {
        double c = cos(positions * p->rope_frequency[i]), s = sin(positions * p->rope_frequency[i]);
        float *first = &x[halves ? i : 2 * i], *second = &x[halves ? i + half : 2 * i + 1];
        double a = (double)*first, b = (double)*second;
        *first = (float)(a * c - b * s);
        *second = (float)(a * s + b * c);
    }
}

struct shift {
    struct cpu *cpu;
    const struct shift_request *request;
};

static void shift_lane(struct cpu *cpu, const struct shift_request *request, uint32_t lane, struct worker_scratch *own) {
    const struct program *p = cpu->program;
    const uint32_t d = p->head_dim;
    float *sinks = cpu->ring_sinks + ((size_t)(request->ring - 1) * program_lanes(p) + lane) * cpu->limits.sink_slots * d;
    for (uint32_t i = 0; i < request->n_slots; i++, sinks += d) {
        uint32_t block = request->block_ids[request->lane_first[lane] + i / BLOCK_TOKENS], slot = i % BLOCK_TOKENS;
        int32_t position;
        if (request->first) {
            cpu_read_f32(&cpu->backend, block, slot, sinks, own->row, &position);
            rotate(p, -(double)position, sinks);
        } else {
            position = cpu->positions[(size_t)block * BLOCK_TOKENS + slot];
        }
        memcpy(own->queries, sinks, d * sizeof *sinks);
        rotate(p, (double)position + request->shift, own->queries);
        if (cpu->kv.raw_bytes == 0) {
            cpu->isa->append(&cpu->kv, cpu->pool + block * cpu->kv.bytes, slot, own->queries, NULL);
            continue;
        }
        /* As an f16 block, wherever that lies: its codes are made anew. */
        uint8_t *raw = cpu->raw.of[block] != RAW_NONE ? raw_block(cpu, block) : own->raw;
        cpu->isa->append(&cpu->raw_shape, raw, slot, own->queries, NULL);
        if (slot == BLOCK_TOKENS - 1) cpu->isa->close_block(&cpu->kv, raw, cpu->pool + block * cpu->kv.bytes, true);
    }
}

static void stage_shift(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    (void)stage;
    const struct shift *shift = context;
    for (uint32_t lane = first; lane < end; lane++) shift_lane(shift->cpu, shift->request, lane, &shift->cpu->workers_scratch[worker]);
}

void cpu_shift_sinks(struct backend *backend, const struct shift_request *request) {
    struct cpu *cpu = (struct cpu *)backend;
    CHECK(request->ring >= 1 && request->ring <= cpu->limits.n_rings && request->n_slots <= cpu->limits.sink_slots);
    CHECK(cpu->kv.raw_bytes == 0 || request->n_slots % BLOCK_TOKENS == 0);
    struct shift shift = {cpu, request};
    workers_run(cpu->workers, &shift, &(struct stage){.run = stage_shift, .n_units = program_lanes(cpu->program)}, 1);
}
