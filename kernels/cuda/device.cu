/* Which devices there are, and what memory they have. Owns nothing; any thread, whose current device stays as it was. */
#include "kernels/cuda/cublas.h"
#include "kernels/cuda/cuda.h"

#include <pthread.h>

/* Why there is none. The runtime says of a missing driver that it is too old. */
static enum status no_device(cudaError_t found, struct error *error) {
    int driver = 0, runtime = 0;
    if (found == cudaSuccess) return error_set(error, STATUS_UNSUPPORTED, "no CUDA device: the driver lists none");
    if (found != cudaErrorInsufficientDriver || cudaDriverGetVersion(&driver) != cudaSuccess || cudaRuntimeGetVersion(&runtime) != cudaSuccess)
        return error_set(error, STATUS_UNSUPPORTED, "no CUDA device: %s", cudaGetErrorString(found));
    if (driver == 0) return error_set(error, STATUS_UNSUPPORTED, "no CUDA device: no NVIDIA driver is installed");
    return error_set(error, STATUS_UNSUPPORTED, "no CUDA device: the driver is for CUDA %d.%d, this program needs %d.%d or newer", driver / 1000,
                     driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
}

enum status cuda_find_device(uint32_t device, cudaDeviceProp *properties, struct error *error) {
    int count = 0;
    const cudaError_t found = cudaGetDeviceCount(&count);
    if (found != cudaSuccess || count == 0) return no_device(found, error);
    if (device >= (uint32_t)count) return error_set(error, STATUS_UNSUPPORTED, "no CUDA device %u: there are %d, the first is 0", device, count);
    CUDA_TRY(error, cudaGetDeviceProperties(properties, (int)device));
    if (properties->major < 8)
        return error_set(error, STATUS_UNSUPPORTED, "CUDA device %u, %s: compute capability %d.%d; 8.0 is needed", device, properties->name,
                         properties->major, properties->minor);
    if (cuda_code_of(properties) == 0)
        return error_set(error, STATUS_UNSUPPORTED,
                         "CUDA device %u, %s: compute capability %d.%d, older than what this program was built for (KVASIR_CUDA_ARCHITECTURES)",
                         device, properties->name, properties->major, properties->minor);
    return cublas_lt_open(error);
}

struct asked {
    int device;
    size_t available, total;
    cudaError_t result;
    const char *what; /* was called last */
};

/* On a thread of its own, as each has a current device: to set another's back would take memory of that other device, and could not where it has none left. */
static void *ask_memory(void *argument) {
    struct asked *asked = (struct asked *)argument;
    asked->result = cudaSetDevice(asked->device);
    if (asked->result != cudaSuccess) return NULL;
    asked->what = "cudaMemGetInfo";
    asked->result = cudaMemGetInfo(&asked->available, &asked->total);
    return NULL;
}

enum status cuda_memory(uint32_t device, uint64_t *available_bytes, uint64_t *total_bytes, struct error *error) {
    cudaDeviceProp properties;
    const enum status status = cuda_find_device(device, &properties, error);
    if (status != STATUS_OK || (!available_bytes && !total_bytes)) return status;
    struct asked asked = {(int)device, 0, 0, cudaSuccess, "cudaSetDevice"};
    pthread_t thread;
    if (pthread_create(&thread, NULL, ask_memory, &asked) != 0)
        return error_set(error, STATUS_NO_MEMORY, "CUDA device %u: no thread to ask for its memory", device);
    CHECK(pthread_join(thread, NULL) == 0);
    if (asked.result != cudaSuccess) return cuda_status(error, asked.result, asked.what);
    if (available_bytes) *available_bytes = asked.available;
    if (total_bytes) *total_bytes = asked.total;
    return STATUS_OK;
}
