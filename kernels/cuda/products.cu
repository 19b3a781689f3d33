/* Products of the step: out[row] = W in[row], W and in f16, sums in f32. Owns the cuBLASLt handle and the algorithms chosen so far; the workspace lies in the backend's
 * arena. Runs on the engine's thread and the backend's stream.
 *
 * Up to SKINNY_ROWS rows, and always when deterministic, the products are ours: memory-bound, W straight from memory to registers. More rows are cuBLASLt's.
 *
 * The order of additions of ours is a function of W's shape alone, which is what makes a row's result independent of its neighbours. The columns are cut into steps of
 * 64; warp i of 8 adds steps i, i + 8, i + 16, ... one after the other in f32 (four mma.m16n8k16 a step); the eight sums are added in order of i. Only the choice of how
 * many rows share a load of W depends on the number of rows. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cuda.h"

extern "C" {
#include "base/random.h"
}

enum {
    WARPS = 8,     /* of a block: so many parts of the columns */
    STEP = 64,     /* columns: 128 bytes of a row, a cache line */
    TILE_OUT = 16, /* rows of W of a block: one mma tile */
    NARROW = 3072, /* rows of W: below, a block per 16 of them, or units are left without work */
    PLAIN_WARPS = 4,
    ALGORITHMS = 1024, /* of cuBLASLt, remembered by shape: far more than a model has */
    PROBES = 8,
};

/* ---- what the kernels are made of ---- */

/* Where a launch may overlap the end of the one before (compute capability 9.0), weights are asked for before this and activations after it. */
static __device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
static __device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* 16 bytes from global to shared memory, on their own; zeros where not `inside`. Not through registers: a thread's loads into registers are waited for all at once, copies in the
 * order of their groups. Weights are read once a step and get no place in L1; activations, which every block of a unit reads, do. */
static __device__ __forceinline__ void copy_weights(uint32_t to, const void *from, bool inside) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
static __device__ __forceinline__ void copy_activations(uint32_t to, const void *from, bool inside) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
static __device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> static __device__ __forceinline__ void wait_for_groups() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
static __device__ __forceinline__ uint4 shared_at(uint32_t at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
}

/* c += A B for 16 x 16 of f16 by 16 x 8. With g = lane / 4 and t = lane % 4: a0 = A[g][2t, 2t+1], a1 = A[g+8][the same], a2 = A[g][2t+8, 2t+9], a3 = A[g+8][those];
 * b0 = B[2t, 2t+1][g], b1 = B[2t+8, 2t+9][g]; c = C[g][2t], C[g][2t+1], C[g+8][2t], C[g+8][2t+1] (PTX, "Matrix fragments for mma.m16n8k16"). */
static __device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* Half a step, 32 columns: `low` and `high` are 8 of them of rows g and g + 8 of W, `b` the same 8 of activation row g. Which columns a fragment's places stand for is
 * free as long as A and B agree: each lane's own eight, so that it reads 16 bytes in one go. */
static __device__ __forceinline__ void multiply(float (&c)[4], const uint4 &low, const uint4 &high, const uint4 &b) {
    mma(c, low.x, high.x, low.y, high.y, b.x, b.y);
    mma(c, low.z, high.z, low.w, high.w, b.z, b.w);
}

static __device__ __forceinline__ void store(void *out, enum product_out kind, size_t at, float value) {
    if (kind == PRODUCT_F16)
        ((__half *)out)[at] = __float2half_rn(fminf(fmaxf(value, -65504.0f), 65504.0f));
    else if (kind == PRODUCT_F32)
        ((float *)out)[at] = value;
    else
        ((float *)out)[at] += value;
}

/* ---- few rows ---- */

struct skinny {
    const __half *w, *in;
    void *out;
    uint32_t n, k, rows; /* W's rows and columns; activation rows, chunks * SKINNY_ROWS at most */
    uint32_t chunks;     /* of SKINNY_ROWS rows; blocks that share W's rows follow each other */
    enum product_out kind;
};

/* A block: OUTS * 16 rows of W by up to TILES * 8 activation rows. Each warp keeps DEEP steps in shared memory or on their way there. A lane copies what it will read
 * itself and nothing else, so that nobody waits for anybody before the end. */
template <int OUTS, int TILES, int DEEP> struct skinny_shape {
    static const int PIECES = OUTS * 4 + TILES * 2; /* of 16 bytes a lane and step */
    static const int RING = WARPS * DEEP * PIECES * 32 * 16;
    static const int STRIDE = OUTS * TILE_OUT + 4; /* of partial sums; + 4: lanes of a store fall into different banks */
    static_assert(RING >= WARPS * TILES * 8 * STRIDE * 4, "partial sums lie where the ring was");
};

template <int OUTS, int TILES> struct skinny_lane {
    const __half *w[OUTS][2]; /* rows g and g + 8 of each 16 */
    const __half *in[TILES];  /* row g of each 8 */
    bool w_inside[OUTS][2], in_inside[TILES];
    uint32_t k, steps, column; /* column: of the lane's 8 within half a step */
};

template <int OUTS, int TILES> static __device__ __forceinline__ void ask_weights(const skinny_lane<OUTS, TILES> &lane, uint32_t step, uint32_t to) {
    if (step >= lane.steps) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t column = step * STEP + (uint32_t)half * (STEP / 2) + lane.column;
#pragma unroll
        for (int i = 0; i < OUTS * 2; i++)
            copy_weights(to + (uint32_t)(half * OUTS * 2 + i) * 512, lane.w[i / 2][i % 2] + column, lane.w_inside[i / 2][i % 2] && column < lane.k);
    }
}

template <int OUTS, int TILES>
static __device__ __forceinline__ void ask_activations(const skinny_lane<OUTS, TILES> &lane, uint32_t step, uint32_t to) {
    if (step >= lane.steps) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t column = step * STEP + (uint32_t)half * (STEP / 2) + lane.column;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
            copy_activations(to + (uint32_t)(OUTS * 4 + half * TILES + tile) * 512, lane.in[tile] + column, lane.in_inside[tile] && column < lane.k);
    }
}

template <int OUTS, int TILES> static __device__ __forceinline__ void use_step(float (&sums)[OUTS][TILES][4], uint32_t from) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint4 b[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) b[tile] = shared_at(from + (uint32_t)(OUTS * 4 + half * TILES + tile) * 512);
#pragma unroll
        for (int i = 0; i < OUTS; i++) {
            uint4 low = shared_at(from + (uint32_t)(half * OUTS * 2 + i * 2) * 512),
                  high = shared_at(from + (uint32_t)(half * OUTS * 2 + i * 2 + 1) * 512);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) multiply(sums[i][tile], low, high, b[tile]);
        }
    }
}

/* The eight warps' sums, in their order, to where they belong. `partial` is [WARPS][TILES * 8][STRIDE]. */
template <int OUTS, int TILES, int STRIDE>
static __device__ __forceinline__ void add_up(const float (&sums)[OUTS][TILES][4], float *partial, const struct skinny &p, uint32_t first,
                                              uint32_t first_row, uint32_t rows) {
    const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < OUTS; i++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                partial[(warp * TILES * 8 + (uint32_t)tile * 8 + t * 2 + (uint32_t)c % 2) * STRIDE + (uint32_t)i * TILE_OUT + g +
                        (uint32_t)c / 2 * 8] = sums[i][tile][c];
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < TILES * 8 * OUTS * TILE_OUT; i += WARPS * 32) {
        uint32_t row = i / (OUTS * TILE_OUT), out = i % (OUTS * TILE_OUT);
        float sum = partial[row * STRIDE + out];
#pragma unroll
        for (uint32_t w = 1; w < WARPS; w++) sum += partial[(w * TILES * 8 + row) * STRIDE + out];
        if (row < rows && first + out < p.n) store(p.out, p.kind, (size_t)(first_row + row) * p.n + first + out, sum);
    }
}

template <int OUTS, int TILES, int DEEP> static __global__ void __launch_bounds__(WARPS * 32) skinny_product(const struct skinny p) {
    typedef skinny_shape<OUTS, TILES, DEEP> shape;
    extern __shared__ uint4 ring[]; /* [WARPS][DEEP][PIECES][32] */
    const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
    const uint32_t first = blockIdx.x / p.chunks * (OUTS * TILE_OUT), first_row = blockIdx.x % p.chunks * SKINNY_ROWS;
    const uint32_t rows = min(p.rows - first_row, (uint32_t)(TILES * 8));
    skinny_lane<OUTS, TILES> lane;
#pragma unroll
    for (int i = 0; i < OUTS * 2; i++) {
        uint32_t row = first + (uint32_t)i * 8 + g;
        lane.w_inside[i / 2][i % 2] = row < p.n;
        lane.w[i / 2][i % 2] = p.w + (size_t)min(row, p.n - 1) * p.k;
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        uint32_t row = (uint32_t)tile * 8 + g;
        lane.in_inside[tile] = row < rows;
        lane.in[tile] = p.in + (size_t)(first_row + min(row, rows - 1)) * p.k;
    }
    lane.k = p.k;
    lane.steps = (p.k + STEP - 1) / STEP;
    lane.column = threadIdx.x % 4 * 8;

    const uint32_t stage_bytes = shape::PIECES * 512;
    const uint32_t mine = (uint32_t)__cvta_generic_to_shared(ring) + warp * DEEP * stage_bytes + threadIdx.x % 32 * 16;
    for (uint32_t i = 0; i < DEEP; i++) ask_weights(lane, warp + i * WARPS, mine + i * stage_bytes);
    let_next_begin();
    wait_for_previous();
    for (uint32_t i = 0; i < DEEP; i++) {
        ask_activations(lane, warp + i * WARPS, mine + i * stage_bytes);
        end_group();
    }
    float sums[OUTS][TILES][4] = {};
    for (uint32_t step = warp, stage = 0; step < lane.steps; step += WARPS) {
        wait_for_groups<DEEP - 1>();
        use_step(sums, mine + stage * stage_bytes);
        ask_weights(lane, step + DEEP * WARPS, mine + stage * stage_bytes);
        ask_activations(lane, step + DEEP * WARPS, mine + stage * stage_bytes);
        end_group();
        stage = stage + 1 == DEEP ? 0 : stage + 1;
    }
    wait_for_groups<0>();
    __syncthreads();
    add_up<OUTS, TILES, shape::STRIDE>(sums, (float *)ring, p, first, first_row, rows);
}

/* Widths that are no multiple of 8 columns, whose rows are not aligned: a warp an element, plainly. Such models are toys. */
static __global__ void __launch_bounds__(PLAIN_WARPS * 32) plain_product(const struct skinny p) {
    const uint32_t n = blockIdx.x * PLAIN_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    wait_for_previous();
    for (uint32_t row = 0; row < p.rows && n < p.n; row++) {
        float sum = 0;
        for (uint32_t i = lane; i < p.k; i += 32) sum += __half2float(p.w[(size_t)n * p.k + i]) * __half2float(p.in[(size_t)row * p.k + i]);
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
        if (lane == 0) store(p.out, p.kind, (size_t)row * p.n + n, sum);
    }
}

typedef void skinny_kernel(const struct skinny p);

/* One way to run the product: which of them changes no result, only how many bytes are on their way and how often activations are read. */
struct variant {
    skinny_kernel *kernel;
    uint32_t outs; /* rows of W of a block */
    uint32_t shared_bytes;
};
template <int OUTS, int TILES, int DEEP> static struct variant variant_of() {
    return {skinny_product<OUTS, TILES, DEEP>, OUTS * TILE_OUT, skinny_shape<OUTS, TILES, DEEP>::RING};
}

static void launch(const struct cuda *cuda, skinny_kernel *kernel, uint32_t blocks, uint32_t threads, uint32_t shared_bytes, const struct skinny *p) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = cuda->stream;
    config.attrs = &early;
    config.numAttrs = cuda->properties.major >= 9 ? 1 : 0;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, *p));
}

/* ---- many rows ---- */

struct algorithm {
    uint32_t rows, n, k; /* rows: of the bucket; 0: a free place */
    enum product_out kind;
    bool usable; /* false: cuBLASLt has none, the product is ours */
    cublasLtMatmulAlgo_t algorithm;
};

struct product_device {
    struct variant up_to_8, up_to_16, up_to_16_narrow; /* by activation rows; narrow: matrices of few rows */
    cublasLtHandle_t handle;
    struct algorithm algorithms[ALGORITHMS]; /* by hash, PROBES places each */
};

static void check_lt(cublasStatus_t result, const char *what) {
    if (result == CUBLAS_STATUS_SUCCESS) return;
    char text[160];
    (void)snprintf(text, sizeof text, "%s: %s", what, cublasLtGetStatusString(result));
    cuda_check(cudaErrorUnknown, text, __FILE__, __LINE__);
}

/* Row counts share an algorithm with the next of 32, 48, 64, 96, 128, ... */
static uint32_t bucket_of(uint32_t rows) {
    uint32_t bucket = 32;
    while (bucket < rows) bucket = bucket % 3 == 0 ? bucket / 3 * 4 : bucket / 2 * 3;
    return bucket;
}

/* cuBLAS counts in columns: out^T [n][rows] = W^T^T [n][k] in^T [k][rows]; our rows are its columns, all of them contiguous. */
struct lt_problem {
    cublasLtMatmulDescOpaque_t operation;
    cublasLtMatrixLayoutOpaque_t w, in, out;
};

static void describe(struct lt_problem *problem, uint32_t rows, uint32_t n, uint32_t k, enum product_out kind) {
    const cublasOperation_t transposed = CUBLAS_OP_T;
    cudaDataType_t out = kind == PRODUCT_F16 ? CUDA_R_16F : CUDA_R_32F;
    check_lt(cublasLtMatmulDescInit(&problem->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescInit");
    check_lt(cublasLtMatmulDescSetAttribute(&problem->operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed), "transposing");
    check_lt(cublasLtMatrixLayoutInit(&problem->w, CUDA_R_16F, k, n, k), "layout of weights");
    check_lt(cublasLtMatrixLayoutInit(&problem->in, CUDA_R_16F, k, rows, k), "layout of activations");
    check_lt(cublasLtMatrixLayoutInit(&problem->out, out, n, rows, n), "layout of results");
}

/* Asks cuBLASLt for its best for this shape. No CUDA call that a capture would forbid. */
static void choose(const struct product_device *products, struct algorithm *entry) {
    enum { ASKED = 8 };
    struct lt_problem problem;
    cublasLtMatmulPreferenceOpaque_t preference;
    cublasLtMatmulHeuristicResult_t found[ASKED];
    const uint64_t most = WORKSPACE_BYTES;
    int count = 0;
    describe(&problem, entry->rows, entry->n, entry->k, entry->kind);
    check_lt(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit");
    check_lt(cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &most, sizeof most), "workspace");
    cublasStatus_t result = cublasLtMatmulAlgoGetHeuristic(products->handle, &problem.operation, &problem.w, &problem.in, &problem.out, &problem.out,
                                                           &preference, ASKED, found, &count);
    entry->usable = false;
    for (int i = 0; result == CUBLAS_STATUS_SUCCESS && i < count && !entry->usable; i++) {
        if (found[i].state != CUBLAS_STATUS_SUCCESS || found[i].workspaceSize > WORKSPACE_BYTES) continue;
        entry->algorithm = found[i].algo;
        entry->usable = true;
    }
}

static struct algorithm *algorithm_for(struct product_device *products, uint32_t rows, uint32_t n, uint32_t k, enum product_out kind) {
    uint64_t hash = random_mix(random_mix(((uint64_t)rows << 32 | n)) ^ ((uint64_t)k << 8 | (uint64_t)kind));
    struct algorithm *entry = NULL;
    for (uint32_t i = 0; i < PROBES; i++) {
        entry = &products->algorithms[(hash + i) % ALGORITHMS];
        if (entry->rows == rows && entry->n == n && entry->k == k && entry->kind == kind) return entry;
        if (entry->rows == 0) break;
    } /* all taken: the last one looked at is forgotten */
    *entry = {.rows = rows, .n = n, .k = k, .kind = kind, .usable = false, .algorithm = {}};
    choose(products, entry);
    return entry;
}

/* false: cuBLASLt cannot. */
static bool lt_product(struct cuda *cuda, const struct matrix *w, const __half *in, uint32_t rows, void *out, enum product_out kind) {
    const struct algorithm *entry = algorithm_for(cuda->products, bucket_of(rows), w->rows, w->cols, kind);
    if (!entry->usable) return false;
    struct lt_problem problem;
    const float one = 1, beta = kind == PRODUCT_ADD_F32 ? 1 : 0;
    describe(&problem, rows, w->rows, w->cols, kind);
    check_lt(cublasLtMatmul(cuda->products->handle, &problem.operation, &one, w->data, &problem.w, in, &problem.in, &beta, out, &problem.out, out,
                            &problem.out, &entry->algorithm, cuda->workspace, WORKSPACE_BYTES, cuda->stream),
             "cublasLtMatmul");
    return true;
}

/* ---- */

static void own_product(const struct cuda *cuda, const struct matrix *w, const __half *in, uint32_t rows, void *out, enum product_out kind) {
    const struct product_device *products = cuda->products;
    struct skinny p = {.w = (const __half *)w->data, .in = in, .out = out, .n = w->rows, .k = w->cols, .rows = rows, .chunks = 1, .kind = kind};
    if (w->cols % 8 != 0) {
        launch(cuda, plain_product, div_up(w->rows, PLAIN_WARPS), PLAIN_WARPS * 32, 0, &p);
        return;
    }
    const struct variant *variant = rows <= 8 ? &products->up_to_8 : w->rows < NARROW ? &products->up_to_16_narrow : &products->up_to_16;
    p.chunks = div_up(rows, SKINNY_ROWS);
    uint32_t blocks = div_up(w->rows, variant->outs);
    CHECK(blocks <= INT32_MAX / p.chunks);
    launch(cuda, variant->kernel, blocks * p.chunks, WARPS * 32, variant->shared_bytes, &p);
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

static enum status open_variants(struct cuda *cuda, struct error *error) {
    struct product_device *products = cuda->products;
    const struct variant up_to_8[] = {variant_of<1, 1, 4>(), variant_of<1, 1, 3>(), variant_of<1, 1, 2>()};
    const struct variant up_to_16[] = {variant_of<2, 2, 2>()};
    const struct variant narrow[] = {variant_of<1, 2, 3>(), variant_of<1, 2, 2>()};
    enum status status = open_variant(cuda, up_to_8, 3, &products->up_to_8, error);
    if (status == STATUS_OK) status = open_variant(cuda, up_to_16, 1, &products->up_to_16, error);
    if (status == STATUS_OK) status = open_variant(cuda, narrow, 2, &products->up_to_16_narrow, error);
    return status;
}

void products_lay_out(struct cuda *cuda, struct device_arena *arena) { cuda->workspace = (uint8_t *)device_take(arena, WORKSPACE_BYTES, 1); }

enum status products_open(struct cuda *cuda, struct error *error) {
    cuda->products = (struct product_device *)check_calloc(1, sizeof *cuda->products);
    cublasStatus_t result = cublasLtCreate(&cuda->products->handle);
    if (result != CUBLAS_STATUS_SUCCESS) {
        cuda->products->handle = NULL;
        return error_set(error, STATUS_DEVICE, "cuBLASLt: %s", cublasLtGetStatusString(result));
    }
    return open_variants(cuda, error);
}

void products_close(struct cuda *cuda) {
    if (!cuda->products) return;
    if (cuda->products->handle) (void)cublasLtDestroy(cuda->products->handle);
    free(cuda->products);
    cuda->products = NULL;
}

void product(struct cuda *cuda, const struct matrix *w, const __half *in, uint32_t rows, void *out, enum product_out kind) {
    CHECK(rows > 0 && w->rows > 0 && w->cols > 0 && w->data && in && out);
    CHECK(w->type == TENSOR_F16);
    bool ours = rows <= SKINNY_ROWS || cuda->deterministic || w->cols % 8 != 0;
    if (ours || !lt_product(cuda, w, in, rows, out, kind)) own_product(cuda, w, in, rows, out, kind);
}

void products_warm(struct cuda *cuda, uint32_t rows) {
    const struct device_layer *layer = &cuda->layers[0];
    uint32_t head_rows = rows < cuda->max_head_rows ? rows : cuda->max_head_rows;
    product(cuda, &layer->qkv, cuda->h, rows, cuda->qkv, PRODUCT_F32);
    product(cuda, &layer->o, cuda->a, rows, cuda->x, PRODUCT_ADD_F32);
    product(cuda, &layer->gate_up, cuda->h, rows, cuda->gate_up, PRODUCT_F16);
    product(cuda, &layer->down, cuda->g, rows, cuda->x, PRODUCT_ADD_F32);
    if (head_rows > 0) product(cuda, &cuda->head, cuda->head_h, head_rows, cuda->logits, PRODUCT_F32);
}
