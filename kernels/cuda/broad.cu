/* Products of any number of rows with the bits of skinny.cu: the same eight sums of the same steps, one after the other instead of each in a warp. Owns nothing. Engine's
 * thread, backend's stream.
 *
 * A block has BROAD rows of W by as many activation rows; steps of both pass through a ring of stages in shared memory. In a stage a row is 128 bytes, eight pieces of 16; odd rows
 * have their halves exchanged, so that the eight lanes that are served at a time, two rows of four pieces, meet all banks. */
#include "kernels/cuda/products.h"

/* WARPS_OUT x WARPS_ROW warps of OUTS * 16 rows of W by TILES * 8 activation rows each. */
template <int WARPS_OUT, int WARPS_ROW, int OUTS, int TILES, int STAGES> struct broad_shape {
    static const uint32_t THREADS = WARPS_OUT * WARPS_ROW * 32;
    static const uint32_t BLOCK_OUT = WARPS_OUT * OUTS * 16, BLOCK_ROWS = WARPS_ROW * TILES * 8;
    static const uint32_t STAGE = (BLOCK_OUT + BLOCK_ROWS) * 128, RING = STAGES * STAGE;
    static_assert(BLOCK_OUT % (THREADS / 8) == 0 && BLOCK_ROWS % (THREADS / 8) == 0, "all threads copy the same number of pieces");
    static_assert(RING <= SHARED_BYTES_LEAST, "on every device");
};

static __device__ __forceinline__ uint32_t piece_at(uint32_t row, uint32_t piece) { return row * 128 + (piece ^ (row & 1) * 4) * 16; }

/* COUNT rows from `first` of a matrix of `rows`, columns of one step. */
template <uint32_t COUNT, uint32_t THREADS>
static __device__ __forceinline__ void ask_rows(uint32_t to, const __half *from, uint32_t first, uint32_t rows, uint32_t k, uint32_t step,
                                                bool weights) {
    const uint32_t piece = threadIdx.x % 8, column = step * STEP + piece * 8;
#pragma unroll
    for (uint32_t row = threadIdx.x / 8; row < COUNT; row += THREADS / 8) {
        const __half *at = from + (size_t)min(first + row, rows - 1) * k + column;
        bool inside = first + row < rows && column < k;
        if (weights)
            copy_weights(to + piece_at(row, piece), at, inside);
        else
            copy_activations(to + piece_at(row, piece), at, inside);
    }
}

/* Sum by sum, the steps of each: 0, 8, 16 ..., 1, 9, ... */
struct step_order {
    uint32_t sum, step, steps;
};
static __device__ __forceinline__ void next_step(struct step_order &at) {
    at.step += SUMS;
    if (at.step >= at.steps) at.step = ++at.sum;
}

template <int OUTS, int TILES> static __device__ __forceinline__ void use_stage(float (&sums)[OUTS][TILES][4], uint32_t w, uint32_t in) {
    const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        uint4 b[TILES];
#pragma unroll
        for (uint32_t tile = 0; tile < TILES; tile++) b[tile] = shared_at(in + piece_at(tile * 8 + g, half * 4 + t));
#pragma unroll
        for (uint32_t i = 0; i < OUTS; i++) {
            uint4 low = shared_at(w + piece_at(i * 16 + g, half * 4 + t)), high = shared_at(w + piece_at(i * 16 + 8 + g, half * 4 + t));
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) multiply(sums[i][tile], low, high, b[tile]);
        }
    }
}

/* The sum that has ended to the total, as add_up of skinny.cu. */
template <int OUTS, int TILES> static __device__ __forceinline__ void add_sums(float (&totals)[OUTS][TILES][4], float (&sums)[OUTS][TILES][4]) {
#pragma unroll
    for (int i = 0; i < OUTS * TILES * 4; i++) {
        totals[i / (TILES * 4)][i / 4 % TILES][i % 4] += sums[i / (TILES * 4)][i / 4 % TILES][i % 4];
        sums[i / (TILES * 4)][i / 4 % TILES][i % 4] = 0;
    }
}

template <int WARPS_OUT, int WARPS_ROW, int OUTS, int TILES, int STAGES>
static __global__ void __launch_bounds__(WARPS_OUT *WARPS_ROW * 32, 1) broad_product(const struct product_call call) {
    typedef broad_shape<WARPS_OUT, WARPS_ROW, OUTS, TILES, STAGES> shape;
    const uint32_t ring = shared_address(dynamic_shared<uint4>()), warp = threadIdx.x / 32;
    const uint32_t blocks_row = (call.rows + shape::BLOCK_ROWS - 1) / shape::BLOCK_ROWS; /* those with the same rows of W follow each other */
    const uint32_t first_out = blockIdx.x / blocks_row * shape::BLOCK_OUT, first_row = blockIdx.x % blocks_row * shape::BLOCK_ROWS;
    const uint32_t warp_out = warp / WARPS_ROW * OUTS * 16, warp_row = warp % WARPS_ROW * TILES * 8;
    const uint32_t steps = (call.k + STEP - 1) / STEP;
    struct step_order asked = {0, 0, steps}, used = asked;
    for (uint32_t i = 0; i < STAGES - 1; i++) {
        if (i < steps) {
            ask_rows<shape::BLOCK_OUT, shape::THREADS>(ring + i * shape::STAGE, (const __half *)call.w, first_out, call.n, call.k, asked.step, true);
            ask_rows<shape::BLOCK_ROWS, shape::THREADS>(ring + i * shape::STAGE + shape::BLOCK_OUT * 128, call.in, first_row, call.rows, call.k,
                                                        asked.step, false);
            next_step(asked);
        }
        copies_commit();
    }
    float sums[OUTS][TILES][4] = {}, totals[OUTS][TILES][4] = {};
    for (uint32_t i = 0; i < steps; i++) {
        copies_wait<STAGES - 2>();
        __syncthreads(); /* everybody's pieces are there, and nobody reads the stage that is asked for next */
        if (i + STAGES - 1 < steps) {
            const uint32_t stage = ring + (i + STAGES - 1) % STAGES * shape::STAGE;
            ask_rows<shape::BLOCK_OUT, shape::THREADS>(stage, (const __half *)call.w, first_out, call.n, call.k, asked.step, true);
            ask_rows<shape::BLOCK_ROWS, shape::THREADS>(stage + shape::BLOCK_OUT * 128, call.in, first_row, call.rows, call.k, asked.step, false);
            next_step(asked);
        }
        copies_commit();
        const uint32_t stage = ring + i % STAGES * shape::STAGE, sum = used.sum;
        use_stage(sums, stage + warp_out * 128, stage + shape::BLOCK_OUT * 128 + warp_row * 128);
        next_step(used);
        if (used.sum != sum) add_sums(totals, sums);
    }
    const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < OUTS * TILES * 4; i++) {
        uint32_t out = first_out + warp_out + i / (TILES * 4) * 16 + g + i % 4 / 2 * 8,
                 row = first_row + warp_row + i / 4 % TILES * 8 + t * 2 + i % 2;
        if (out < call.n && row < call.rows) store(call, row, out, totals[i / (TILES * 4)][i / 4 % TILES][i % 4]);
    }
}

/* ---- which of two ---- */

#define LARGE 2, 4, 4, 4, 3 /* 128 by 128 */
#define SMALL 4, 2, 1, 4, 6 /* 64 by 64: up to so many rows a block has all of them, and W is read once */

template <int WARPS_OUT, int WARPS_ROW, int OUTS, int TILES, int STAGES> static enum status open_one(struct error *error) {
    typedef broad_shape<WARPS_OUT, WARPS_ROW, OUTS, TILES, STAGES> shape;
    CUDA_TRY(error, cudaFuncSetAttribute(broad_product<WARPS_OUT, WARPS_ROW, OUTS, TILES, STAGES>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         (int)shape::RING));
    return STATUS_OK;
}

template <int WARPS_OUT, int WARPS_ROW, int OUTS, int TILES, int STAGES>
static void run_one(const struct cuda *cuda, const struct product_call *call) {
    typedef broad_shape<WARPS_OUT, WARPS_ROW, OUTS, TILES, STAGES> shape;
    const uint32_t blocks_out = div_up(call->n, shape::BLOCK_OUT), blocks_row = div_up(call->rows, shape::BLOCK_ROWS);
    CHECK(blocks_out <= INT32_MAX / blocks_row);
    launch(broad_product<WARPS_OUT, WARPS_ROW, OUTS, TILES, STAGES>, blocks_out * blocks_row, shape::THREADS, shape::RING, cuda->stream, *call);
    CUDA_CHECK(cudaGetLastError());
}

enum status broad_open(struct error *error) {
    enum status status = open_one<LARGE>(error);
    return status == STATUS_OK ? open_one<SMALL>(error) : status;
}

void broad_run(const struct cuda *cuda, const struct product_call *call) {
    CHECK(call->form == FORM_F16 && call->k % 8 == 0);
    const uint32_t large_blocks = div_up(call->n, 128) * div_up(call->rows, 128);
    if (call->rows <= 64 || large_blocks < (uint32_t)cuda->properties.multiProcessorCount)
        run_one<SMALL>(cuda, call);
    else
        run_one<LARGE>(cuda, call);
}
