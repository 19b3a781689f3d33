/* What is done row by row between the products: norms, rotation, appending to the pool, activation. Sums go over the threads of a block in a fixed order, so a row's bits depend on
 * that row alone. */
#include "kernels/cuda/codes.h"
#include "kernels/cuda/hadamard.h"

#include <math.h>

enum { NORM_THREADS = 256, HEADS_A_BLOCK = 4, ACTIVATE_THREADS = 256, ROPE_THREADS = 128 };

static __device__ float warp_sum(float x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

static __device__ float warp_max(float x) {
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, step));
    return x;
}

/* Finite whatever comes: a value beyond the type's range is its largest, a NaN is 0. */
static __device__ __half half_finite(float x) { return __float2half_rn(x != x ? 0.0f : fminf(fmaxf(x, -65504.0f), 65504.0f)); }

static __device__ uint16_t narrow(float x, bool bf16) {
    if (!bf16) return __half_as_ushort(half_finite(x));
    return __bfloat16_as_ushort(__float2bfloat16_rn(x != x ? 0.0f : fminf(fmaxf(x, -3.38e38f), 3.38e38f)));
}

static __global__ void __launch_bounds__(NORM_THREADS) norm_kernel(const float *in, const uint32_t *map, const uint32_t *n, uint32_t first, uint32_t width, float epsilon,
                                                                   const float *norm, __half *out) {
    __shared__ float sums[NORM_THREADS / 32];
    const uint32_t i = blockIdx.x;
    if (first + i >= *n) return;
    const float *x = in + (size_t)(map ? map[first + i] : i) * width;
    float squares = 0;
    for (uint32_t c = threadIdx.x; c < width; c += NORM_THREADS) squares += x[c] * x[c];
    squares = warp_sum(squares);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
    __syncthreads();
    float total = 0;
    for (int w = 0; w < NORM_THREADS / 32; w++) total += sums[w];
    const float scale = 1.0f / sqrtf(total / (float)width + epsilon);
    for (uint32_t c = threadIdx.x; c < width; c += NORM_THREADS) out[(size_t)i * width + c] = half_finite(x[c] * scale * norm[c]);
}

void rows_norm(struct cuda *cuda, const struct step_shape *shape, const float *norm, __half *out) {
    launch(norm_kernel, shape->rows, NORM_THREADS, 0, cuda->stream, cuda->x, NULL, &cuda->dev.header->n_rows, 0, cuda->program->n_embd, cuda->program->norm_epsilon, norm, out);
}

void rows_norm_head(struct cuda *cuda, const struct step_shape *shape) {
    launch(norm_kernel, shape->head_rows, NORM_THREADS, 0, cuda->stream, cuda->x, cuda->dev.head_rows, &cuda->dev.header->n_head_rows, shape->first_head_row, cuda->program->n_embd,
                                                                   cuda->program->norm_epsilon, cuda->head_norm, cuda->head_h);
}

static __global__ void rope_kernel(const struct step_header *header, const int32_t *positions, const double *frequency, uint32_t pairs, double magnitude, float2 *rope) {
    const uint32_t at = blockIdx.x * ROPE_THREADS + threadIdx.x, row = at / pairs;
    if (row >= header->n_rows) return;
    double s, c;
    sincos((double)positions[row] * frequency[at % pairs], &s, &c);
    rope[at] = make_float2((float)(c * magnitude), (float)(s * magnitude));
}

void rows_rope(struct cuda *cuda, const struct step_shape *shape) {
    const uint32_t pairs = cuda->program->rope_dims / 2;
    if (pairs == 0) return;
    launch(rope_kernel, div_up(shape->rows * pairs, ROPE_THREADS), ROPE_THREADS, 0, cuda->stream, cuda->dev.header, cuda->dev.positions, cuda->rope_frequency, pairs,
                                                                                            (double)cuda->program->rope_magnitude, cuda->rope);
}

struct append {
    const struct step_header *header;
    const int32_t *positions;
    const uint32_t *row_sequence, *lane_tokens, *tables;
    const struct step_sequence *sequences;
    const float *qkv, *bias, *q_norm, *k_norm;
    const float2 *rope;
    uint16_t *q, *ring_queries;
    struct device_pool pool;
    uint32_t layer, n_layers, n_lanes, n_heads, n_kv_heads, d, n_q, n_kv, pairs, ring_rows, lane_blocks;
    float epsilon;
    bool adjacent;
};

/* Where the row's key and value of this KV head go. */
static __device__ void place(const struct append &p, const struct step_sequence &sequence, uint32_t s, uint32_t row, uint32_t kv_head, uint32_t *block, uint32_t *slot) {
    const uint32_t lane = p.layer * p.n_kv_heads + kv_head;
    const uint32_t at = p.lane_tokens[(size_t)s * p.n_lanes + lane] + row - sequence.first_row;
    *block = p.tables[((size_t)sequence.table * p.n_lanes + lane) * p.lane_blocks + at / BLOCK_TOKENS];
    *slot = at % BLOCK_TOKENS;
}

/* One warp, one head's vector in shared memory: into the pool, rounded to its type. which: 0 K, 1 V. */
static __device__ void store_slot(const struct device_pool &pool, uint32_t block, uint32_t slot, int which, const float *x, uint32_t lane) {
    const size_t element = pool.dtype == KV_Q8 ? 1 : 2;
    uint8_t *to = (pool.bits ? raw_of(pool, block) : pool.kv + block * pool.block_bytes) + ((size_t)which * BLOCK_TOKENS + slot) * pool.d * element;
    if (pool.dtype != KV_Q8) {
        for (uint32_t i = lane; i < pool.d; i += 32) ((uint16_t *)to)[i] = narrow(x[i], pool.dtype == KV_BF16);
        return;
    }
    float largest = 0;
    for (uint32_t i = lane; i < pool.d; i += 32) largest = fmaxf(largest, fabsf(x[i])); /* fmaxf passes a NaN over */
    largest = warp_max(largest);
    const float scale = largest / 127;
    const bool usable = scale > 0 && isfinite(scale);
    for (uint32_t i = lane; i < pool.d; i += 32) {
        const float code = usable && isfinite(x[i]) ? fminf(fmaxf(rintf(x[i] / scale), -127.0f), 127.0f) : 0;
        ((int8_t *)to)[i] = (int8_t)code;
    }
    if (lane == 0) pool.scales[((size_t)block * 2 + (size_t)which) * BLOCK_TOKENS + slot] = isfinite(scale) ? scale : 0;
}

/* One warp, one head's vector in shared memory. A thread reads and writes the elements that it has afterwards. One that is not finite must not spread: a NaN is 0, and sums of all
 * dims are finite. */
static __device__ void transform(float *x, uint32_t d, uint32_t lane) {
    float own[ROW_ELEMENTS];
#pragma unroll
    for (uint32_t i = 0; i < ROW_ELEMENTS; i++) {
        const float value = lane + 32 * i < d ? x[lane + 32 * i] : 0;
        own[i] = value == value ? fminf(fmaxf(value, -1e35f), 1e35f) : 0;
    }
    hadamard(own, d, lane);
#pragma unroll
    for (uint32_t i = 0; i < ROW_ELEMENTS; i++)
        if (lane + 32 * i < d) x[lane + 32 * i] = own[i];
}

/* TRANSFORMS: of dtypes that do (hadamard.h). */
template <bool TRANSFORMS> static __global__ void __launch_bounds__(32 * HEADS_A_BLOCK) append_kernel(const struct append p) {
    __shared__ float heads[HEADS_A_BLOCK][HEAD_DIM_MAX];
    const uint32_t row = blockIdx.x, lane = threadIdx.x % 32, head = blockIdx.y * HEADS_A_BLOCK + threadIdx.x / 32;
    if (row >= p.header->n_rows || head >= p.n_heads + 2 * p.n_kv_heads) return;
    float *x = heads[threadIdx.x / 32];
    const bool is_q = head < p.n_heads, is_k = !is_q && head < p.n_heads + p.n_kv_heads;
    const float *in = p.qkv + (size_t)row * (p.n_q + 2 * p.n_kv) + (size_t)head * p.d, *bias = p.bias ? p.bias + (size_t)head * p.d : NULL;
    const float *norm = is_q ? p.q_norm : is_k ? p.k_norm : NULL;
    float squares = 0;
    for (uint32_t i = lane; i < p.d; i += 32) {
        x[i] = in[i] + (bias ? bias[i] : 0);
        squares += x[i] * x[i];
    }
    if (norm) {
        const float scale = 1.0f / sqrtf(warp_sum(squares) / (float)p.d + p.epsilon);
        for (uint32_t i = lane; i < p.d; i += 32) x[i] = x[i] * scale * norm[i];
    }
    __syncwarp();
    if (is_q || is_k)
        for (uint32_t i = lane; i < p.pairs; i += 32) {
            const float2 turn = p.rope[(size_t)row * p.pairs + i];
            const uint32_t first = p.adjacent ? 2 * i : i, second = p.adjacent ? 2 * i + 1 : i + p.pairs;
            const float a = x[first], b = x[second];
            x[first] = a * turn.x - b * turn.y;
            x[second] = a * turn.y + b * turn.x;
        }
    __syncwarp();
    if constexpr (TRANSFORMS)
        if (is_q || is_k) transform(x, p.d, lane);
    const uint32_t s = p.row_sequence[row];
    const struct step_sequence sequence = p.sequences[s];
    if (is_q) {
        const uint32_t end = sequence.first_row + sequence.n_rows;
        const bool kept = sequence.ring > 0 && end - row <= p.ring_rows;
        const size_t at = kept ? (((size_t)(sequence.ring - 1) * p.n_layers + p.layer) * p.ring_rows + (uint32_t)p.positions[row] % p.ring_rows) * p.n_q + (size_t)head * p.d : 0;
        for (uint32_t i = lane; i < p.d; i += 32) {
            const uint16_t value = narrow(x[i], p.pool.dtype == KV_BF16);
            p.q[(size_t)row * p.n_q + (size_t)head * p.d + i] = value;
            if (kept) p.ring_queries[at + i] = value;
        }
        return;
    }
    uint32_t block, slot;
    place(p, sequence, s, row, is_k ? head - p.n_heads : head - p.n_heads - p.n_kv_heads, &block, &slot);
    store_slot(p.pool, block, slot, is_k ? 0 : 1, x, lane);
    if (!is_k || lane > 0) return;
    p.pool.positions[(size_t)block * BLOCK_TOKENS + slot] = p.positions[row];
    if (p.pool.bits) p.pool.closed[block] = false; /* until the step's end */
    if (p.pool.accumulated) p.pool.accumulated[(size_t)block * BLOCK_TOKENS + slot] = 0;
}

void rows_append(struct cuda *cuda, uint32_t layer, const struct step_shape *shape) {
    const struct program *program = cuda->program;
    const struct device_layer *weights = &cuda->layers[layer];
    struct append p = {};
    p.header = cuda->dev.header;
    p.positions = cuda->dev.positions;
    p.row_sequence = cuda->dev.row_sequence;
    p.lane_tokens = cuda->dev.lane_tokens;
    p.tables = cuda->tables;
    p.sequences = cuda->dev.sequences;
    p.qkv = cuda->qkv;
    p.bias = weights->qkv_bias;
    p.q_norm = weights->q_norm;
    p.k_norm = weights->k_norm;
    p.rope = cuda->rope;
    p.q = cuda->q;
    p.ring_queries = cuda->ring_queries;
    p.pool = cuda->pool;
    p.layer = layer;
    p.n_layers = program->n_layers;
    p.n_lanes = cuda->n_lanes;
    p.n_heads = program->n_heads;
    p.n_kv_heads = program->n_kv_heads;
    p.d = program->head_dim;
    p.n_q = cuda->n_q;
    p.n_kv = cuda->n_kv;
    p.pairs = program->rope_dims / 2;
    p.ring_rows = cuda->limits.ring_rows;
    p.lane_blocks = cuda->lane_blocks;
    p.epsilon = program->norm_epsilon;
    p.adjacent = program->rope_pairs == ROPE_PAIRS_ADJACENT;
    const dim3 grid(shape->rows, div_up(program->n_heads + 2 * program->n_kv_heads, HEADS_A_BLOCK));
    launch(kv_transforms(cuda->pool.dtype) ? append_kernel<true> : append_kernel<false>, grid, 32 * HEADS_A_BLOCK, 0, cuda->stream, p);
}

/* Two values at a time; n_ff is a multiple of 8 (supported.cu). */
static __global__ void __launch_bounds__(ACTIVATE_THREADS) activate_kernel(const struct step_header *header, const __half2 *gate_up, uint32_t half_ff, __half2 *g) {
    const uint32_t row = blockIdx.y, i = blockIdx.x * ACTIVATE_THREADS + threadIdx.x;
    if (row >= header->n_rows || i >= half_ff) return;
    const float2 gate = __half22float2(gate_up[(size_t)row * 2 * half_ff + i]), up = __half22float2(gate_up[(size_t)row * 2 * half_ff + half_ff + i]);
    g[(size_t)row * half_ff + i] = __halves2half2(half_finite(gate.x / (1 + expf(-gate.x)) * up.x), half_finite(gate.y / (1 + expf(-gate.y)) * up.y));
}

void rows_activate(struct cuda *cuda, const struct step_shape *shape) {
    const uint32_t half_ff = cuda->program->n_ff / 2;
    const dim3 grid(div_up(half_ff, ACTIVATE_THREADS), shape->rows);
    launch(activate_kernel, grid, ACTIVATE_THREADS, 0, cuda->stream, cuda->dev.header, (const __half2 *)cuda->gate_up, half_ff, (__half2 *)cuda->g);
}
