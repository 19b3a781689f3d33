/* What `bench` measures the backend against: how fast the device copies its own memory, and how many bytes of weights a step reads. Owns nothing; no step runs meanwhile. */
#include "kernels/cuda/cuda.h"

enum { PASSES = 10, WARM_UP = 2 };
#define BUFFER_BYTES_MAX ((size_t)1 << 30)
#define BUFFER_BYTES_MIN ((size_t)64 << 20)

/* Seconds of the fastest of several copies; 0: a call failed. */
static double time_copies(void *destination, const void *source, size_t bytes, cudaStream_t stream, cudaEvent_t begin, cudaEvent_t end) {
    double best = 0;
    for (int pass = 0; pass < WARM_UP + PASSES; pass++) {
        float ms = 0;
        if (cudaEventRecord(begin, stream) != cudaSuccess ||
            cudaMemcpyAsync(destination, source, bytes, cudaMemcpyDeviceToDevice, stream) != cudaSuccess ||
            cudaEventRecord(end, stream) != cudaSuccess || cudaEventSynchronize(end) != cudaSuccess ||
            cudaEventElapsedTime(&ms, begin, end) != cudaSuccess)
            return 0;
        if (pass >= WARM_UP && ms > 0 && (best == 0 || ms / 1e3 < best)) best = ms / 1e3;
    }
    return best;
}

/* Half a GiB or more each way: many times the L2 of any device this runs on. Zeros would be compressed where memory is; so the source is filled. */
double cuda_copy_bandwidth(const struct backend_limits *limits) {
    void *source = NULL, *destination = NULL;
    cudaStream_t stream = NULL;
    cudaEvent_t begin = NULL, end = NULL;
    double seconds = 0;
    size_t bytes = BUFFER_BYTES_MAX;
    if (cudaSetDevice((int)limits->device) != cudaSuccess) return 0;
    for (; bytes >= BUFFER_BYTES_MIN; bytes /= 2) {
        if (cudaMalloc(&source, bytes) == cudaSuccess && cudaMalloc(&destination, bytes) == cudaSuccess) break;
        (void)cudaFree(source);
        source = NULL;
        (void)cudaGetLastError(); /* too large is no error here */
    }
    if (destination && cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess && cudaEventCreate(&begin) == cudaSuccess &&
        cudaEventCreate(&end) == cudaSuccess && cudaMemsetAsync(source, 0x5a, bytes, stream) == cudaSuccess)
        seconds = time_copies(destination, source, bytes, stream, begin, end);
    if (begin) (void)cudaEventDestroy(begin);
    if (end) (void)cudaEventDestroy(end);
    if (stream) (void)cudaStreamDestroy(stream);
    (void)cudaFree(source);
    (void)cudaFree(destination);
    return seconds > 0 ? 2.0 * (double)bytes / seconds : 0;
}

/* After weights_lay_out, which may have only counted. Norms and biases are vectors: some thousandths of this, and left out. */
uint64_t cuda_laid_out_weight_bytes(const struct cuda *cuda) {
    uint64_t bytes = weights_matrix_bytes(&cuda->head); /* the embedding itself, where tied */
    for (uint32_t l = 0; l < cuda->program->n_layers; l++) {
        const struct device_layer *layer = &cuda->layers[l];
        bytes += weights_matrix_bytes(&layer->qkv) + weights_matrix_bytes(&layer->o) + weights_matrix_bytes(&layer->gate_up) + weights_matrix_bytes(&layer->down);
    }
    return bytes;
}
