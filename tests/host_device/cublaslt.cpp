/* cuBLASLt on the host: D = alpha op(A) op(B) + beta C by columns, sums in f32 in the ascending order of k, in as many parts as the algorithm says. Two algorithms are offered, whose results differ in
 * their last bits as a library's do. What kernels/cuda does not use is refused. In place of kernels/cuda/cublas.cu, which loads the library. */
#include "kernels/cuda/cublas.h"

#include <cuda_fp16.h>

#include <vector>

#include "tests/host_device/launch.h"

struct cublasLtContext {
    int unused;
};

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
    *handle = new cublasLtContext{};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}
const char *cublasLtGetStatusString(cublasStatus_t status) {
    return status == CUBLAS_STATUS_SUCCESS ? "success" : status == CUBLAS_STATUS_INVALID_VALUE ? "invalid value" : "not supported";
}

cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDescOpaque_t *desc, size_t, cublasComputeType_t compute, cudaDataType_t scale) {
    *desc = {CUBLAS_OP_N, CUBLAS_OP_N};
    return compute == CUBLAS_COMPUTE_32F && scale == CUDA_R_32F ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDescOpaque_t *desc, cublasLtMatmulDescAttributes_t attribute, const void *value,
                                              size_t size) {
    if (size != sizeof desc->a) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(attribute == CUBLASLT_MATMUL_DESC_TRANSA ? &desc->a : &desc->b, value, size);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayoutOpaque_t *layout, size_t, cudaDataType_t type, uint64_t rows, uint64_t cols,
                                                 int64_t stride) {
    *layout = {type, rows, cols, stride};
    return stride >= (int64_t)rows ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}
cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreferenceOpaque_t *preference, size_t) {
    preference->alignment = 256;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreferenceOpaque_t *preference, cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void *value, size_t) {
    if (attribute == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES) memcpy(&preference->alignment, value, sizeof preference->alignment);
    return CUBLAS_STATUS_SUCCESS;
}

static size_t element_bytes(cudaDataType_t type) { return type == CUDA_R_32F ? 4 : 2; }

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDescOpaque_t *, cublasLtMatrixLayoutOpaque_t *,
                                              cublasLtMatrixLayoutOpaque_t *, cublasLtMatrixLayoutOpaque_t *, cublasLtMatrixLayoutOpaque_t *d,
                                              cublasLtMatmulPreferenceOpaque_t *preference, int asked, cublasLtMatmulHeuristicResult_t *results,
                                              int *found) {
    *found = 0;
    if (preference->alignment < element_bytes(d->type)) return CUBLAS_STATUS_NOT_SUPPORTED;
    for (uint32_t parts = 1; parts <= 2 && *found < asked; parts++) results[(*found)++] = {{parts}, 0, CUBLAS_STATUS_SUCCESS};
    return CUBLAS_STATUS_SUCCESS;
}

struct matmul {
    cublasLtMatrixLayoutOpaque_t a, b, d;
    const uint16_t *a_at, *b_at;
    void *d_at;
    float alpha, beta;
    uint32_t parts;
};

/* A transposed, B as it is: both have k down their columns. */
static void multiply(const struct matmul *m) {
    const uint64_t k = m->a.rows, n = m->a.cols, columns = m->b.cols;
    std::vector<float> w(k), x(k * columns);
    for (uint64_t j = 0; j < columns; j++)
        for (uint64_t i = 0; i < k; i++) x[j * k + i] = host_half_to_float(m->b_at[j * (uint64_t)m->b.stride + i]);
    for (uint64_t row = 0; row < n; row++) {
        for (uint64_t i = 0; i < k; i++) w[i] = host_half_to_float(m->a_at[row * (uint64_t)m->a.stride + i]);
        for (uint64_t j = 0; j < columns; j++) {
            float all = 0;
            for (uint64_t part = 0; part < m->parts; part++) {
                float sum = 0;
                for (uint64_t i = k * part / m->parts; i < k * (part + 1) / m->parts; i++) sum += w[i] * x[j * k + i];
                all += sum;
            }
            const uint64_t at = j * (uint64_t)m->d.stride + row;
            float *as_f32 = (float *)m->d_at + at;
            if (m->d.type == CUDA_R_32F)
                *as_f32 = m->alpha * all + (m->beta != 0 ? m->beta * *as_f32 : 0);
            else
                ((uint16_t *)m->d_at)[at] = host_half_from((double)(m->alpha * all));
        }
    }
    host_time_less();
}

static bool is_on_device(const void *at, const cublasLtMatrixLayoutOpaque_t *layout) {
    const size_t bytes = ((layout->cols - 1) * (size_t)layout->stride + layout->rows) * element_bytes(layout->type);
    return host_device_bytes_from(at) >= bytes;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDescOpaque_t *desc, const void *alpha, const void *a,
                              cublasLtMatrixLayoutOpaque_t *a_layout, const void *b, cublasLtMatrixLayoutOpaque_t *b_layout, const void *beta,
                              const void *c, cublasLtMatrixLayoutOpaque_t *c_layout, void *d, cublasLtMatrixLayoutOpaque_t *d_layout,
                              const cublasLtMatmulAlgo_t *algorithm, void *workspace, size_t workspace_bytes, cudaStream_t stream) {
    if (host_options()->idle) return CUBLAS_STATUS_SUCCESS;
    struct matmul m = {*a_layout, *b_layout, *d_layout, (const uint16_t *)a, (const uint16_t *)b, d, 0, 0, algorithm->parts};
    memcpy(&m.alpha, alpha, sizeof m.alpha);
    memcpy(&m.beta, beta, sizeof m.beta);
    if (desc->a != CUBLAS_OP_T || desc->b != CUBLAS_OP_N || m.a.type != CUDA_R_16F || m.b.type != CUDA_R_16F || c != d)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (m.d.type != CUDA_R_32F && (m.d.type != CUDA_R_16F || m.beta != 0)) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (m.a.rows != m.b.rows || m.d.rows != m.a.cols || m.d.cols != m.b.cols || c_layout->stride != m.d.stride) return CUBLAS_STATUS_INVALID_VALUE;
    if (!is_on_device(a, &m.a) || !is_on_device(b, &m.b) || !is_on_device(d, &m.d) ||
        (workspace_bytes > 0 && host_device_bytes_from(workspace) < workspace_bytes))
        host_fail("cublasLtMatmul: a matrix that is not in device memory, or larger than what was allocated");
    (void)host_enqueue(stream, [m] { multiply(&m); });
    return CUBLAS_STATUS_SUCCESS;
}

/* ---- in place of cublas.cu ---- */

enum status cublas_lt_open(struct error *) { return STATUS_OK; }

const struct cublas_lt *cublas_lt(void) {
#define MEMBER(name) cublasLt##name,
    static const struct cublas_lt functions = {CUBLAS_LT_FUNCTIONS(MEMBER)};
#undef MEMBER
    return &functions;
}
