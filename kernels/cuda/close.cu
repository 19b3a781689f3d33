/* KIVI: filled blocks become codes (kernels/kivi.h says which, codes.h how they lie), and codes f16 blocks again. A group of threads a block. Launched on cuda->stream; what is closed was
 * written by launches before. Owns nothing. */
#include "kernels/cuda/close.h"

constexpr uint32_t Z_MAX = 64; /* blocks of a lane that a launch closes side by side */

struct close_pass {
    const struct step_header *header;
    const struct step_sequence *sequences;
    const uint32_t *lane_tokens, *tables;
    struct device_pool pool;
    uint32_t first_lane, n_lanes, lane_blocks;
};

/* Grid: lanes from first_lane on, sequences, blocks of the lane in turn. */
static __global__ void __launch_bounds__(CLOSE_THREADS) close_step_kernel(const struct close_pass pass) {
    __shared__ uint8_t codes[BLOCK_TOKENS * HEAD_DIM_MAX];
    const uint32_t lane = pass.first_lane + blockIdx.x, s = blockIdx.y;
    if (s >= pass.header->n_sequences) return;
    const struct step_sequence sequence = pass.sequences[s];
    const uint32_t before = pass.lane_tokens[(size_t)s * pass.n_lanes + lane], end = before + sequence.n_rows;
    const uint32_t *blocks = pass.tables + ((size_t)sequence.table * pass.n_lanes + lane) * pass.lane_blocks;
    for (uint32_t b = before / BLOCK_TOKENS + blockIdx.z; b < end / BLOCK_TOKENS; b += gridDim.z) close_block(pass.pool, blocks[b], codes);
}

void close_step(struct cuda *cuda, uint32_t layer, const struct step_shape *shape) {
    const uint32_t heads = cuda->program->n_kv_heads, most = shape->rows / BLOCK_TOKENS + 1;
    struct close_pass pass = {};
    if (cuda->pool.bits == 0) return;
    pass.header = cuda->dev.header;
    pass.sequences = cuda->dev.sequences;
    pass.lane_tokens = cuda->dev.lane_tokens;
    pass.tables = cuda->tables;
    pass.pool = cuda->pool;
    pass.first_lane = layer == UINT32_MAX ? 0 : layer * heads;
    pass.n_lanes = cuda->n_lanes;
    pass.lane_blocks = cuda->lane_blocks;
    const dim3 grid(layer == UINT32_MAX ? cuda->n_lanes : heads, shape->sequences, shape->tiles == 0 ? 1u : most < Z_MAX ? most : Z_MAX);
    launch(close_step_kernel, grid, CLOSE_THREADS, 0, cuda->stream, pass);
}

static __global__ void __launch_bounds__(CLOSE_THREADS) open_kernel(const struct device_pool pool, uint32_t block) {
    const uint32_t dims = codes_dims(pool.d);
    __half *rows = (__half *)(void *)raw_of(pool, block);
    for (uint32_t i = threadIdx.x; i < 2 * BLOCK_TOKENS * pool.d; i += CLOSE_THREADS) {
        const int which = i < BLOCK_TOKENS * pool.d ? WHICH_K : WHICH_V;
        const uint8_t *side = pool.kv + block * pool.block_bytes + (which == WHICH_K ? 0 : codes_side_bytes(pool.bits, dims));
        rows[i] = __float2half_rn(fminf(code_number(pool.bits, dims, side, which, i / pool.d % BLOCK_TOKENS, i % pool.d), 65504.0f));
    }
}

void open_block(struct cuda *cuda, uint32_t block) {
    launch(open_kernel, 1, CLOSE_THREADS, 0, cuda->stream, cuda->pool, block);
    CUDA_CHECK(cudaGetLastError());
}
