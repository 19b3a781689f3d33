/* Products of few rows, which take as long as W takes to be read. Owns nothing on the device; the table of kernels is made once. Engine's thread, backend's stream.
 *
 * A block has 16 or 32 rows of W and all activation rows; its eight warps take the columns in turn, a step each. Each warp keeps some steps on their way into its own ring
 * in shared memory. A lane copies what it will read itself and nothing else, so that nobody waits for anybody before the end. Native weights are widened on their way
 * from the ring to the matrix instruction, to the f16 values that products.cu widens them to for more rows. */
#include <stdlib.h>

#include "kernels/cuda/products.h"

enum {
    WARPS = SUMS,
    TILE_OUT = 16,            /* rows of W of a matrix instruction */
    HALF_STEP = STEP / 2 * 2, /* bytes of f16 */
    NARROW = 3072,            /* rows of W: below, a block per 16 of them, or units are left without work */
};

/* Bytes in the ring: of a lane's weights of one step and 16 rows, of all lanes' of a step. */
template <enum native_form FORM> static __host__ __device__ constexpr uint32_t lane_bytes() {
    return FORM == FORM_F16 ? 64 : native_quant_bytes(FORM) + native_scale_bytes(FORM);
}

/* Bytes in memory from a step of a lane to the next. */
template <enum native_form FORM> static __host__ __device__ constexpr uint32_t step_bytes() {
    return FORM == FORM_F16 ? STEP * sizeof(__half) : native_tile_bytes(FORM);
}

template <enum native_form FORM, int OUTS, int TILES, int DEEP> struct skinny_shape {
    static const uint32_t WEIGHTS = OUTS * 32 * lane_bytes<FORM>(); /* of a stage; activations follow */
    static const uint32_t STAGE = WEIGHTS + TILES * 32 * 32;
    static const uint32_t RING = WARPS * DEEP * STAGE;
    static const uint32_t STRIDE = OUTS * TILE_OUT + 4; /* of partial sums; + 4: lanes of a store fall into different banks */
    static_assert(RING >= WARPS * TILES * 8 * STRIDE * 4, "partial sums lie where the ring was");
};

/* Where a lane reads next: pointers run, so that a step costs an addition each. */
template <int OUTS, int TILES> struct skinny_lane {
    const uint8_t *w[OUTS][2]; /* f16: rows g and g + 8 of each 16; native: quants and scales of the tile */
    const uint8_t *in[TILES];  /* row g of each 8 */
    bool w_inside[OUTS][2], in_inside[TILES];
    uint32_t lane, k;
    uint32_t w_column, in_column; /* the first of the step that is asked for next */
};

/* The warp's next step of weights, if there is one, to the stage. */
template <enum native_form FORM, int OUTS, int TILES>
static __device__ __forceinline__ void ask_weights(skinny_lane<OUTS, TILES> &lane, uint32_t stage) {
    if (lane.w_column >= lane.k) return;
#pragma unroll
    for (int i = 0; i < OUTS; i++, stage += 32 * lane_bytes<FORM>()) {
        const uint32_t to = stage + lane.lane * 16;
        if constexpr (FORM == FORM_F16) {
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int high = 0; high < 2; high++)
                    copy_weights(to + (uint32_t)(half * 2 + high) * 512, lane.w[i][high] + half * HALF_STEP,
                                 lane.w_inside[i][high] && lane.w_column + (uint32_t)half * (STEP / 2) + lane.lane % 4 * 8 < lane.k);
        } else {
            copy_weights(to, lane.w[i][0], true);
            if constexpr (FORM == FORM_8) copy_weights(to + 512, lane.w[i][0] + 512, true);
            if constexpr (FORM == FORM_6)
                copy_8(stage + 512 + lane.lane * 8, lane.w[i][0] - native_quants_at(lane.lane) + native_high_bits_at(lane.lane));
            const uint32_t scales = stage + 32 * native_quant_bytes(FORM) + lane.lane * native_scale_bytes(FORM);
            if constexpr (FORM == FORM_4_OFFSET)
                copy_weights(scales, lane.w[i][1], true);
            else
                copy_8(scales, lane.w[i][1]);
        }
        lane.w[i][0] += WARPS * step_bytes<FORM>();
        lane.w[i][1] += WARPS * step_bytes<FORM>();
    }
    lane.w_column += WARPS * STEP;
}

template <int OUTS, int TILES> static __device__ __forceinline__ void ask_activations(skinny_lane<OUTS, TILES> &lane, uint32_t to) {
    if (lane.in_column >= lane.k) return;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++)
            copy_activations(to + (uint32_t)(half * TILES + tile) * 512 + lane.lane * 16, lane.in[tile] + half * HALF_STEP,
                             lane.in_inside[tile] && lane.in_column + (uint32_t)half * (STEP / 2) + lane.lane % 4 * 8 < lane.k);
        lane.in[tile] += WARPS * STEP * sizeof(__half);
    }
    lane.in_column += WARPS * STEP;
}

static __device__ __forceinline__ void put_16(uint32_t *to, const uint4 &v) {
    to[0] = v.x;
    to[1] = v.y;
    to[2] = v.z;
    to[3] = v.w;
}
static __device__ __forceinline__ void put_8(uint32_t *to, const uint2 &v) {
    to[0] = v.x;
    to[1] = v.y;
}

/* Low and high row of both halves of a step, as f16. */
template <enum native_form FORM> static __device__ __forceinline__ void take_weights(uint4 (&w)[2][2], uint32_t stage, uint32_t lane) {
    if constexpr (FORM == FORM_F16) {
#pragma unroll
        for (int i = 0; i < 4; i++) w[i / 2][i % 2] = shared_at(stage + (uint32_t)i * 512 + lane * 16);
    } else {
        native_lane<FORM> native;
        put_16(native.quants, shared_at(stage + lane * 16));
        if constexpr (FORM == FORM_8) put_16(native.quants + 4, shared_at(stage + 512 + lane * 16));
        if constexpr (FORM == FORM_6) put_8(native.quants + 4, shared_8_at(stage + 512 + lane * 8));
        const uint32_t scales = stage + 32 * native_quant_bytes(FORM) + lane * native_scale_bytes(FORM);
        if constexpr (FORM == FORM_4_OFFSET)
            put_16(native.scales, shared_at(scales));
        else
            put_8(native.scales, shared_8_at(scales));
#pragma unroll
        for (int i = 0; i < 4; i++) w[i / 2][i % 2] = native_widen<FORM>(native, i / 2, i % 2);
    }
}

template <enum native_form FORM, int OUTS, int TILES>
static __device__ __forceinline__ void use_step(float (&sums)[OUTS][TILES][4], uint32_t stage, uint32_t activations, uint32_t lane) {
    uint4 b[2][TILES];
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) b[i / TILES][i % TILES] = shared_at(activations + (uint32_t)i * 512 + lane * 16);
#pragma unroll
    for (int i = 0; i < OUTS; i++) {
        uint4 w[2][2];
        take_weights<FORM>(w, stage + (uint32_t)i * 32 * lane_bytes<FORM>(), lane);
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) multiply(sums[i][tile], w[half][0], w[half][1], b[half][tile]);
    }
}

/* The eight warps' sums, in their order, to where they belong. `partial` is [WARPS][TILES * 8][STRIDE]. */
template <int OUTS, int TILES, uint32_t STRIDE>
static __device__ __forceinline__ void add_up(const float (&sums)[OUTS][TILES][4], float *partial, const struct product_call &call, uint32_t first) {
    const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < OUTS * TILES * 4; i++) {
        uint32_t out = i / (TILES * 4) * TILE_OUT + g + i % 4 / 2 * 8, row = i / 4 % TILES * 8 + t * 2 + i % 2;
        partial[(warp * TILES * 8 + row) * STRIDE + out] = sums[i / (TILES * 4)][i / 4 % TILES][i % 4];
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < TILES * 8 * OUTS * TILE_OUT; i += WARPS * 32) {
        uint32_t row = i / (OUTS * TILE_OUT), out = i % (OUTS * TILE_OUT);
        float sum = partial[row * STRIDE + out];
#pragma unroll
        for (uint32_t w = 1; w < WARPS; w++) sum += partial[(w * TILES * 8 + row) * STRIDE + out];
        if (row < call.rows && first + out < call.n) store(call, row, first + out, sum);
    }
}

template <enum native_form FORM, int OUTS, int TILES>
static __device__ __forceinline__ void find_lane(skinny_lane<OUTS, TILES> &lane, const struct product_call &call, uint32_t first) {
    const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, column = warp * STEP + threadIdx.x % 4 * 8;
    lane.lane = threadIdx.x % 32;
    lane.k = call.k;
    lane.w_column = lane.in_column = warp * STEP;
#pragma unroll
    for (int i = 0; i < OUTS; i++) {
        if constexpr (FORM == FORM_F16) {
#pragma unroll
            for (int high = 0; high < 2; high++) {
                uint32_t row = first + (uint32_t)(i * 16 + high * 8) + g;
                lane.w_inside[i][high] = row < call.n;
                lane.w[i][high] = (const uint8_t *)call.w + ((size_t)min(row, call.n - 1) * call.k + column) * sizeof(__half);
            }
        } else { /* past the last band: the last again; its results are not stored */
            const uint32_t band = min(first / TILE_OUT + (uint32_t)i, (call.n - 1) / TILE_OUT), steps = (call.k + STEP - 1) / STEP;
            const uint8_t *tile = (const uint8_t *)call.w + ((size_t)band * steps + warp) * native_tile_bytes(FORM);
            lane.w[i][0] = tile + native_quants_at(lane.lane);
            lane.w[i][1] = tile + native_scales_at(FORM, lane.lane);
        }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        uint32_t row = (uint32_t)tile * 8 + g;
        lane.in_inside[tile] = row < call.rows;
        lane.in[tile] = (const uint8_t *)call.in + ((size_t)min(row, call.rows - 1) * call.k + column) * sizeof(__half);
    }
}

template <enum native_form FORM, int OUTS, int TILES, int DEEP>
static __global__ void __launch_bounds__(WARPS * 32, 2) skinny_product(const struct product_call call) {
    typedef skinny_shape<FORM, OUTS, TILES, DEEP> shape;
    uint4 *const ring = dynamic_shared<uint4>(); /* [WARPS][DEEP] stages */
    const uint32_t warp = threadIdx.x / 32, first = blockIdx.x * (OUTS * TILE_OUT);
    skinny_lane<OUTS, TILES> lane;
    find_lane<FORM>(lane, call, first);
    const uint32_t mine = shared_address(ring) + warp * DEEP * shape::STAGE, end = mine + DEEP * shape::STAGE;
    for (uint32_t stage = mine; stage < end; stage += shape::STAGE) ask_weights<FORM>(lane, stage);
    let_next_begin(); /* a launch may overlap the end of the one before: weights are asked for before that is waited for, activations after */
    wait_for_previous();
    for (uint32_t stage = mine; stage < end; stage += shape::STAGE) {
        ask_activations(lane, stage + shape::WEIGHTS);
        copies_commit();
    }
    float sums[OUTS][TILES][4] = {};
    for (uint32_t column = warp * STEP, stage = mine; column < call.k; column += WARPS * STEP) {
        copies_wait<DEEP - 1>();
        use_step<FORM>(sums, stage, stage + shape::WEIGHTS, lane.lane);
        ask_weights<FORM>(lane, stage);
        ask_activations(lane, stage + shape::WEIGHTS);
        copies_commit();
        stage += shape::STAGE;
        if (stage == end) stage = mine;
    }
    copies_wait<0>();
    __syncthreads();
    add_up<OUTS, TILES, shape::STRIDE>(sums, (float *)ring, call, first);
}

/* ---- which of them ---- */

typedef void skinny_kernel(const struct product_call call);

/* One way to run a product: which of them changes no result, only how many bytes are on their way and how often activations are read. */
struct variant {
    skinny_kernel *kernel;
    uint32_t outs; /* rows of W of a block */
    uint32_t shared_bytes;
};
template <enum native_form FORM, int OUTS, int TILES, int DEEP> static struct variant variant_of() {
    return {skinny_product<FORM, OUTS, TILES, DEEP>, OUTS * TILE_OUT, skinny_shape<FORM, OUTS, TILES, DEEP>::RING};
}

struct skinny_device {
    struct variant up_to_8[FORM_6 + 1], up_to_16[FORM_6 + 1]; /* activation rows; by form */
    struct variant narrow;                                    /* up_to_16 of f16 where W has few rows */
};

/* The last choice of each, which is taken where no other fits. */
template <enum native_form FORM, int OUTS, int TILES, int DEEP> static constexpr bool fits_anywhere() {
    return skinny_shape<FORM, OUTS, TILES, DEEP>::RING <= SHARED_BYTES_LEAST;
}

/* The first, which is the deepest, of which two blocks fit a unit; else the last. */
static enum status open_variant(const struct cuda *cuda, const struct variant *choices, uint32_t count, struct variant *chosen, struct error *error) {
    const size_t unit = cuda->properties.sharedMemPerMultiprocessor, reserved = cuda->properties.reservedSharedMemPerBlock;
    uint32_t i = 0;
    while (i + 1 < count && 2 * (choices[i].shared_bytes + reserved) > unit) i++;
    *chosen = choices[i];
    size_t percent = (2 * (chosen->shared_bytes + reserved) * 100 + unit - 1) / unit; /* the rest is L1, where activations are met again */
    CUDA_TRY(error, cudaFuncSetAttribute(chosen->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)chosen->shared_bytes));
    CUDA_TRY(error, cudaFuncSetAttribute(chosen->kernel, cudaFuncAttributePreferredSharedMemoryCarveout, percent < 100 ? (int)percent : 100));
    return STATUS_OK;
}

template <enum native_form FORM> static enum status open_native(const struct cuda *cuda, struct skinny_device *skinny, struct error *error) {
    const struct variant up_to_8[] = {variant_of<FORM, 2, 1, 4>(), variant_of<FORM, 2, 1, 2>()};
    const struct variant up_to_16[] = {variant_of<FORM, 2, 2, 3>(), variant_of<FORM, 2, 2, 2>()};
    static_assert(fits_anywhere<FORM, 2, 1, 2>() && fits_anywhere<FORM, 2, 2, 2>(), "on every device");
    enum status status = open_variant(cuda, up_to_8, 2, &skinny->up_to_8[FORM], error);
    return status == STATUS_OK ? open_variant(cuda, up_to_16, 2, &skinny->up_to_16[FORM], error) : status;
}

enum status skinny_open(const struct cuda *cuda, struct skinny_device **result, struct error *error) {
    struct skinny_device *skinny = *result = (struct skinny_device *)check_calloc(1, sizeof *skinny);
    const struct variant up_to_8[] = {variant_of<FORM_F16, 1, 1, 4>(), variant_of<FORM_F16, 1, 1, 3>(), variant_of<FORM_F16, 1, 1, 2>()};
    const struct variant up_to_16[] = {variant_of<FORM_F16, 2, 2, 2>()};
    const struct variant narrow[] = {variant_of<FORM_F16, 1, 2, 3>(), variant_of<FORM_F16, 1, 2, 2>()};
    static_assert(fits_anywhere<FORM_F16, 1, 1, 2>() && fits_anywhere<FORM_F16, 2, 2, 2>() && fits_anywhere<FORM_F16, 1, 2, 2>(), "on every device");
    enum status status = open_variant(cuda, up_to_8, 3, &skinny->up_to_8[FORM_F16], error);
    if (status == STATUS_OK) status = open_variant(cuda, up_to_16, 1, &skinny->up_to_16[FORM_F16], error);
    if (status == STATUS_OK) status = open_variant(cuda, narrow, 2, &skinny->narrow, error);
    if (status == STATUS_OK) status = open_native<FORM_4>(cuda, skinny, error);
    if (status == STATUS_OK) status = open_native<FORM_4_OFFSET>(cuda, skinny, error);
    if (status == STATUS_OK) status = open_native<FORM_8>(cuda, skinny, error);
    if (status == STATUS_OK) status = open_native<FORM_6>(cuda, skinny, error);
    return status;
}

void skinny_run(const struct cuda *cuda, const struct skinny_device *skinny, const struct product_call *call) {
    CHECK(call->rows <= SKINNY_ROWS && call->k % 8 == 0);
    const bool narrow = call->form == FORM_F16 && call->n < NARROW;
    const struct variant *variant = call->rows <= 8 ? &skinny->up_to_8[call->form] : narrow ? &skinny->narrow : &skinny->up_to_16[call->form];
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(div_up(call->n, variant->outs));
    config.blockDim = dim3(WARPS * 32);
    config.dynamicSmemBytes = variant->shared_bytes;
    config.stream = cuda->stream;
    config.attrs = &early;
    config.numAttrs = cuda_code_of(&cuda->properties) >= 90 ? 1 : 0;
    CUDA_CHECK(cudaLaunchKernelEx(&config, variant->kernel, *call));
}
