/* The host device's side of the CUDA runtime: devices, streams, events, graphs, launches.
 *
 * What is put on a stream is kept and done as late as it may be: when somebody waits for the stream, an event on it or the device. A missing wait then shows as old contents. Streams do not
 * wait for one another. Times are numbers of what was done: they measure nothing. One lock is held while a stream is worked off; the rest is any thread's. */
#include "tests/host_device/launch.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include <atomic>
#include <deque>
#include <map>
#include <mutex>
#include <vector>

extern "C" {
#include "base/check.h"
}

struct CUgraph_st {
    std::vector<std::function<void()>> nodes;
};
struct CUgraphExec_st {
    std::vector<std::function<void()>> nodes;
};
struct CUstream_st {
    std::deque<std::function<void()>> queue;
    struct CUgraph_st *captured; /* to where its work goes; NULL: none */
};
struct CUevent_st {
    bool recorded, passed;
    cudaStream_t stream;
    uint64_t at; /* things done until then */
};

struct function_limits {
    int shared_bytes = 48 << 10;
    bool large_clusters = false;
};

static std::recursive_mutex lock;
static std::vector<cudaStream_t> streams;
static struct CUstream_st default_stream;
static std::map<const void *, struct function_limits> functions;
static thread_local cudaError_t last_error;
static uint64_t done; /* things, on all streams */
static bool lost;     /* the device, for good: who waits for it gets an error */

/* ---- options ---- */

static struct host_options read_options(void) {
    struct host_options options = {ORDER_ASCENDING, 0, 90, 0, false, false, false};
    static const char *const orders[] = {"ascending", "descending", "random", "lockstep"};
    static const struct {
        const char *words;
        uint32_t number;
    } capabilities[] = {{"7.5", 75}, {"8.0", 80}, {"8.6", 86}, {"8.9", 89}};
    const char *at = getenv("KVASIR_HOST_DEVICE");
    for (at = at ? at : ""; *at; at += strspn(at, " ")) {
        const size_t length = strcspn(at, " ");
        bool known = false;
        for (int i = 0; i < 4; i++)
            if (strncmp(at, orders[i], length) == 0 && strlen(orders[i]) == length) options.order = (enum host_order)i, known = true;
        for (int i = 0; i < 4; i++)
            if (strncmp(at, capabilities[i].words, length) == 0 && length == 3) options.capability = capabilities[i].number, known = true;
        for (int i = 0; i < 4; i++)
            if (length == 9 && strncmp(at, "first=", 6) == 0 && strncmp(at + 6, capabilities[i].words, 3) == 0)
                options.first = capabilities[i].number, known = true;
        if (strncmp(at, "for=", 4) == 0) options.compiled_for = (uint32_t)strtoul(at + 4, NULL, 10), known = true;
        if (strncmp(at, "second", length) == 0) options.second = known = true;
        if (strncmp(at, "eager", length) == 0) options.eager = known = true;
        if (strncmp(at, "idle", length) == 0) options.idle = known = true;
        if (strncmp(at, "seed=", 5) == 0) options.seed = strtoull(at + 5, NULL, 10), known = true;
        if (!known) host_fail("KVASIR_HOST_DEVICE: \"%.*s\" is no option", (int)length, at);
        at += length;
    }
    return options;
}

const struct host_options *host_options(void) {
    static const struct host_options options = read_options();
    return &options;
}

/* ---- a device that does nothing ---- */

enum { IDLE_COPIES = 1 << 20 }; /* bytes of what is copied and filled all the same: counts and flags that the host reads. Larger ones are weights and the pool */
enum idle_kind { IDLE_LAUNCH, IDLE_GRAPH, IDLE_COPY, IDLE_FILL, IDLE_RECORD, IDLE_WAIT, IDLE_KINDS };

/* Calls that a device's driver would have had; told at the end. */
static std::atomic<uint64_t> idle_calls[IDLE_KINDS];

static void tell_idle_calls(void) {
    static const char *const names[IDLE_KINDS] = {"launches", "graphs", "copies", "fills", "events", "waits"};
    (void)fprintf(stderr, "host device: idle:");
    for (int i = 0; i < IDLE_KINDS; i++) (void)fprintf(stderr, " %" PRIu64 " %s", idle_calls[i].load(), names[i]);
    (void)fputc('\n', stderr);
}

static cudaError_t idle_call(enum idle_kind kind) {
    static const int once = atexit(tell_idle_calls);
    (void)once;
    idle_calls[kind].fetch_add(1, std::memory_order_relaxed);
    return cudaSuccess;
}

/* ---- errors and devices ---- */

extern "C" void host_lose_device(void) { lost = true; }

static uint32_t refused_in; /* launches; 0: none is */
extern "C" void host_refuse_launch(uint32_t which) { refused_in = which; }
static bool is_refused(void) { return refused_in > 0 && --refused_in == 0; }

void host_set_error(cudaError_t error) { last_error = error; }

static cudaError_t result_of(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

cudaError_t cudaGetLastError(void) {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorNotReady: return "device not ready";
    case cudaErrorLaunchOutOfResources: return "too many resources requested for launch";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorInvalidClusterSize: return "cluster misconfiguration";
    default: return "unknown error";
    }
}

enum { MULTIPROCESSORS = 4, THREADS_MULTIPROCESSOR = 2048, BLOCKS_MULTIPROCESSOR = 32, IDLE_MULTIPROCESSORS = 132 };
#define IDLE_BYTES ((size_t)1 << 40) /* nothing of it is touched */

static bool is_there(int device) { return device == 0 || (device == 1 && host_options()->second); }

cudaError_t cudaGetDeviceCount(int *count) {
    *count = host_options()->second ? 2 : 1;
    return cudaSuccess;
}
static int current_device(void) { return host_options()->second ? 1 : 0; }
cudaError_t cudaGetDevice(int *device) {
    *device = current_device();
    return cudaSuccess;
}
static uint32_t capability_of(int device) {
    return device < current_device() && host_options()->first ? host_options()->first : host_options()->capability;
}
/* Makes the device's context. */
cudaError_t cudaSetDevice(int device) {
    if (!is_there(device)) return result_of(cudaErrorInvalidDevice);
    return result_of(host_options()->second && device == 0 ? cudaErrorMemoryAllocation : cudaSuccess);
}
cudaError_t cudaDriverGetVersion(int *version) { return cudaRuntimeGetVersion(version); }
cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = 12000;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device) {
    if (!is_there(device)) return result_of(cudaErrorInvalidDevice);
    const uint32_t capability = capability_of(device);
    const size_t shared_kib = capability >= 90 ? 228 : capability == 80 ? 164 : capability == 75 ? 64 : 100;
    *properties = {};
    (void)snprintf(properties->name, sizeof properties->name, "host device (no GPU)");
    properties->major = (int)capability / 10;
    properties->minor = (int)capability % 10;
    properties->multiProcessorCount = host_options()->idle ? IDLE_MULTIPROCESSORS : MULTIPROCESSORS;
    properties->totalGlobalMem = host_options()->idle ? IDLE_BYTES : (size_t)8 << 30;
    properties->sharedMemPerBlock = 48 << 10;
    properties->reservedSharedMemPerBlock = 1 << 10;
    properties->sharedMemPerMultiprocessor = shared_kib << 10;
    properties->sharedMemPerBlockOptin = (shared_kib - 1) << 10;
    return cudaSuccess;
}
int host_compiled_for(int which) { return host_options()->compiled_for ? (int)host_options()->compiled_for * 10 : which == 0 ? 800 : 900; }
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    cudaDeviceProp properties;
    (void)cudaGetDeviceProperties(&properties, current_device());
    *total = properties.totalGlobalMem;
    *available = *total - host_device_bytes_used();
    return cudaSuccess;
}

/* ---- streams ---- */

static cudaStream_t stream_of(cudaStream_t stream) { return stream ? stream : &default_stream; }

cudaError_t host_enqueue(cudaStream_t stream, std::function<void()> what) {
    const std::lock_guard<std::recursive_mutex> locked(lock);
    stream = stream_of(stream);
    if (stream->captured) {
        stream->captured->nodes.push_back(std::move(what));
        return cudaSuccess;
    }
    stream->queue.push_back(std::move(what));
    return host_options()->eager ? cudaStreamSynchronize(stream) : cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    const std::lock_guard<std::recursive_mutex> locked(lock);
    stream = stream_of(stream);
    if (stream->captured) return result_of(cudaErrorStreamCaptureUnsupported);
    if (lost) return result_of(cudaErrorLaunchFailure);
    while (!stream->queue.empty()) {
        const std::function<void()> what = std::move(stream->queue.front());
        stream->queue.pop_front();
        what();
        done += 2;
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) {
    const std::lock_guard<std::recursive_mutex> locked(lock);
    for (cudaStream_t stream : streams)
        if (!stream->captured) (void)cudaStreamSynchronize(stream);
    return cudaStreamSynchronize(NULL);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    const std::lock_guard<std::recursive_mutex> locked(lock);
    *stream = new CUstream_st{};
    streams.push_back(*stream);
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithFlags(stream, 0); }

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    const std::lock_guard<std::recursive_mutex> locked(lock);
    (void)cudaStreamSynchronize(stream); /* what was put on it is still done */
    std::erase(streams, stream);
    delete stream;
    return cudaSuccess;
}

/* ---- copies ---- */

static void check_place(const void *at, size_t bytes, bool device, const char *what) {
    const size_t there = host_device_bytes_from(at);
    if (device && there < bytes) host_fail("%s: %zu bytes, of which %zu are in one allocation of the device", what, bytes, there);
    if (!device && there > 0) host_fail("%s: this end is memory of the device", what);
}

static cudaError_t copy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream, bool async) {
    if (bytes == 0) return cudaSuccess;
    if (host_options()->idle) {
        if (bytes <= IDLE_COPIES && !stream_of(stream)->captured) memmove(to, from, bytes);
        return idle_call(IDLE_COPY);
    }
    const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice,
               from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    check_place(to, bytes, to_device, "a copy's destination");
    check_place(from, bytes, from_device, "a copy's source");
    const bool host_is_pinned = (to_device && from_device) || host_pinned_bytes_from(to_device ? from : to) >= bytes;
    if (async && host_is_pinned) return host_enqueue(stream, [to, from, bytes] { memmove(to, from, bytes); });
    if (async && to_device) { /* of memory that is not pinned, the driver has a copy when the call returns */
        const uint8_t *bytes_of = (const uint8_t *)from;
        return host_enqueue(stream, [to, copied = std::vector<uint8_t>(bytes_of, bytes_of + bytes)] { memcpy(to, copied.data(), copied.size()); });
    }
    const cudaError_t result = host_enqueue(stream, [to, from, bytes] { memmove(to, from, bytes); });
    return result == cudaSuccess ? cudaStreamSynchronize(stream) : result; /* captured: an error, as on a device */
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    return result_of(copy(to, from, bytes, kind, stream, true));
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) { return result_of(copy(to, from, bytes, kind, NULL, false)); }
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    if (bytes == 0) return cudaSuccess;
    if (host_options()->idle) {
        if (bytes <= IDLE_COPIES && !stream_of(stream)->captured) memset(to, value, bytes);
        return idle_call(IDLE_FILL);
    }
    check_place(to, bytes, true, "a fill");
    return result_of(host_enqueue(stream, [to, value, bytes] { host_device_fill(to, value, bytes); }));
}
cudaError_t cudaMemset(void *to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes, NULL); }

/* ---- events ---- */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    *event = new CUevent_st{};
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    const std::lock_guard<std::recursive_mutex> locked(lock);
    if (event->recorded && !event->passed) (void)cudaStreamSynchronize(event->stream);
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    if (host_options()->idle) {
        event->recorded = event->passed = true;
        return idle_call(IDLE_RECORD);
    }
    const std::lock_guard<std::recursive_mutex> locked(lock);
    event->recorded = true;
    event->passed = false;
    event->stream = stream_of(stream);
    return host_enqueue(stream, [event] {
        event->passed = true;
        event->at = done;
    });
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (host_options()->idle) return idle_call(IDLE_WAIT);
    const std::lock_guard<std::recursive_mutex> locked(lock);
    return event->recorded && !event->passed ? cudaStreamSynchronize(event->stream) : cudaSuccess;
}

/* As many microseconds as things were done between, half of that for a product of cuBLASLt's. */
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end) {
    const std::lock_guard<std::recursive_mutex> locked(lock);
    if (!begin->recorded || !end->recorded) return result_of(cudaErrorInvalidResourceHandle);
    if (!begin->passed || !end->passed) return result_of(cudaErrorNotReady);
    *ms = host_options()->idle ? 1e-3f : (float)(end->at - begin->at) * 1e-3f;
    return cudaSuccess;
}

void host_time_less(void) { done--; }

/* ---- graphs ---- */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    const std::lock_guard<std::recursive_mutex> locked(lock);
    if (!stream || stream->captured) return result_of(cudaErrorStreamCaptureUnsupported);
    stream->captured = new CUgraph_st;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    const std::lock_guard<std::recursive_mutex> locked(lock);
    *graph = stream->captured;
    stream->captured = NULL;
    return result_of(*graph ? cudaSuccess : cudaErrorInvalidValue);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
    *exec = new CUgraphExec_st{graph->nodes};
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    if (host_options()->idle) return idle_call(IDLE_GRAPH);
    const std::lock_guard<std::recursive_mutex> locked(lock);
    cudaError_t result = is_refused() ? cudaErrorLaunchOutOfResources : cudaSuccess;
    for (size_t i = 0; i < exec->nodes.size() && result == cudaSuccess; i++) result = host_enqueue(stream, exec->nodes[i]);
    return result_of(result);
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    delete exec;
    return cudaSuccess;
}

/* ---- launches ---- */

cudaError_t host_function_set(const void *kernel, cudaFuncAttribute attribute, int value) {
    const std::lock_guard<std::recursive_mutex> locked(lock);
    cudaDeviceProp properties;
    (void)cudaGetDeviceProperties(&properties, current_device());
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
        if (value < 0 || (size_t)value > properties.sharedMemPerBlockOptin) return result_of(cudaErrorInvalidValue);
        functions[kernel].shared_bytes = value > 48 << 10 ? value : 48 << 10;
    }
    if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) functions[kernel].large_clusters = value != 0;
    return cudaSuccess;
}

cudaError_t host_occupancy(int *blocks, const void *, int threads, size_t shared_bytes) {
    cudaDeviceProp properties;
    (void)cudaGetDeviceProperties(&properties, current_device());
    const size_t by_memory = properties.sharedMemPerMultiprocessor / (shared_bytes + properties.reservedSharedMemPerBlock);
    const size_t by_threads = (size_t)THREADS_MULTIPROCESSOR / (size_t)threads;
    *blocks = (int)min((unsigned long)BLOCKS_MULTIPROCESSOR, min((unsigned long)by_memory, (unsigned long)by_threads));
    return cudaSuccess;
}

/* What is wrong with a launch; its cluster's blocks. */
static cudaError_t check_launch(const cudaLaunchConfig_t *config, const void *kernel, uint32_t *cluster) {
    const std::lock_guard<std::recursive_mutex> locked(lock);
    const struct function_limits limits = functions[kernel];
    const uint64_t blocks = (uint64_t)config->gridDim.x * config->gridDim.y * config->gridDim.z,
                   threads = (uint64_t)config->blockDim.x * config->blockDim.y * config->blockDim.z;
    *cluster = 1;
    if (blocks == 0 || config->gridDim.x > INT32_MAX || config->gridDim.y > 65535 || config->gridDim.z > 65535 || threads == 0 || threads > 1024)
        return cudaErrorInvalidConfiguration;
    if (config->dynamicSmemBytes > (size_t)limits.shared_bytes) return cudaErrorInvalidValue;
    for (unsigned i = 0; i < config->numAttrs; i++) {
        if (host_options()->capability < 90) return cudaErrorInvalidConfiguration;
        if (config->attrs[i].id != cudaLaunchAttributeClusterDimension) continue;
        *cluster = config->attrs[i].val.clusterDim.x;
        if (config->attrs[i].val.clusterDim.y != 1 || config->attrs[i].val.clusterDim.z != 1 || *cluster == 0 ||
            *cluster > (limits.large_clusters ? 16u : 8u))
            return cudaErrorInvalidClusterSize;
        if (config->gridDim.x % *cluster != 0) return cudaErrorInvalidClusterSize;
    }
    return cudaSuccess;
}

cudaError_t host_max_clusters(int *clusters, const void *kernel, const cudaLaunchConfig_t *config) {
    uint32_t cluster;
    const cudaError_t result = check_launch(config, kernel, &cluster);
    *clusters = result == cudaSuccess ? 1 : 0;
    return result_of(result);
}

cudaError_t host_launch(const cudaLaunchConfig_t *config, const void *kernel, void (*run)(const void *), const void *context, size_t context_bytes) {
    if (host_options()->idle) return idle_call(IDLE_LAUNCH);
    const std::shared_ptr<void> owner(malloc(context_bytes), free);
    CHECK(owner);
    memcpy(owner.get(), context, context_bytes);
    host_launch_call call = {kernel, config->gridDim, config->blockDim, 1, config->dynamicSmemBytes, run, owner.get(), context_bytes, owner};
    cudaError_t result = check_launch(config, kernel, &call.cluster);
    if (result == cudaSuccess && is_refused()) result = cudaErrorLaunchOutOfResources;
    if (result != cudaSuccess) return result_of(result);
    return result_of(host_enqueue(config->stream, [call = std::move(call)] { host_run(&call); }));
}
