/* Is the host device a judge? Kernels with one mistake each must end their process with words that name it; a kernel without must not, in any order. Each runs in a process of its own.
 * Mistakes that only access.cpp sees are left out under AddressSanitizer, which has its own words. */
#include "kernels/cuda/ptx.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

extern "C" {
#include <cmocka.h>
}

enum { THREADS = 64 };

/* ---- kernels ---- */

/* The sum of all threads' numbers, right: what the mistakes are measured against. */
static __global__ void sum_kernel(const float *in, float *out) {
    __shared__ float sums[THREADS / 32];
    float x = in[threadIdx.x];
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x == 0) *out = sums[0] + sums[1];
}

static __global__ void no_barrier(float *out) {
    float *shared = dynamic_shared<float>();
    shared[threadIdx.x] = 1;
    out[threadIdx.x] = shared[THREADS - 1 - threadIdx.x];
}
static __global__ void no_barrier_static(float *out) {
    __shared__ float shared[THREADS];
    for (int round = 0; round < 2; round++) {
        shared[threadIdx.x] = (float)(threadIdx.x + round); /* in the second round others still read */
        __syncthreads();
        out[threadIdx.x] = shared[(threadIdx.x + 32) % THREADS];
    }
}
static __global__ void no_syncwarp(float *out) {
    float *shared = dynamic_shared<float>();
    shared[threadIdx.x] = 1;
    out[threadIdx.x] = shared[threadIdx.x ^ 1];
}
static __global__ void nobody_wrote(float *out) {
    float *shared = dynamic_shared<float>();
    out[threadIdx.x] = shared[threadIdx.x];
}
static __global__ void two_barriers(float *) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads_count(1);
}
static __global__ void returns_early(float *) {
    if (threadIdx.x == 5) return;
    __syncthreads();
}
static __global__ void half_a_warp(float *out) {
    if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}
static __global__ void not_in_the_mask(float *out) { out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 1); }
static __global__ void beyond_shared(float *) { dynamic_shared<float>()[threadIdx.x + 1] = 1; }
static __global__ void beyond_device(float *out) { out[threadIdx.x + 1] = 1; }
static __global__ void misaligned(float *out) { *(float *)(void *)((char *)out + 2) = 1; }
static __global__ void copy_beyond(float *out) {
    copy_16(shared_address(dynamic_shared<float>()) + threadIdx.x * 16, out, 16);
    copies_commit();
}
static __global__ void no_wait_for_copy(float *in) { /* and nobody can tell from the value alone that it was wrong: it is NaN */
    float *shared = dynamic_shared<float>();
    copy_4(shared_address(shared) + threadIdx.x * 4, in + threadIdx.x, 4);
    copies_commit();
    copies_wait<1>();
    if (shared[threadIdx.x] != shared[threadIdx.x]) host_fail("a copy has not landed");
}
static __global__ void arrives_twice(float *) {
    cluster_arrive();
    cluster_arrive();
}
static __global__ void other_block_returned(float *) {
    if (blockIdx.x == 0) return;
    cluster_arrive();
    cluster_wait();
    *of_rank(dynamic_shared<float>(), 0) = 1;
}
static __global__ void static_in_cluster(float *out) {
    __shared__ float shared[THREADS];
    shared[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = shared[THREADS - 1 - threadIdx.x];
}

/* ---- running them ---- */

static const struct mistake {
    const char *name;
    void (*kernel)(float *);
    size_t shared_bytes;
    unsigned cluster;
    bool by_access; /* access.cpp's */
    const char *words;
} mistakes[] = {
    {"no barrier between writing and reading", no_barrier, THREADS * 4, 1, true, "reads shared memory"},
    {"no barrier before the next round", no_barrier_static, 0, 1, true, "with no barrier between"},
    {"no __syncwarp between lanes", no_syncwarp, THREADS * 4, 1, true, "reads shared memory"},
    {"shared memory that nobody wrote", nobody_wrote, THREADS * 4, 1, true, "nobody has written"},
    {"two barriers at once", two_barriers, 0, 1, false, "others of its block at __syncthreads"},
    {"a thread returns before a barrier", returns_early, 0, 1, false, "return"},
    {"half a warp shuffles", half_a_warp, 0, 1, false, "__shfl_xor_sync"},
    {"a lane that its mask does not name", not_in_the_mask, 0, 1, false, "does not name the lane itself"},
    {"beyond shared memory", beyond_shared, THREADS * 4, 1, true, "of dynamic shared memory"},
    {"beyond an allocation", beyond_device, 0, 1, true, "outside of every allocation"},
    {"not aligned", misaligned, 0, 1, true, "not a multiple"},
    {"a copy beyond shared memory", copy_beyond, THREADS * 4, 1, false, "a copy at byte"},
    {"no wait for a copy", no_wait_for_copy, THREADS * 4, 1, false, "a copy has not landed"},
    {"arrives twice", arrives_twice, 0, 2, false, "a second time"},
    {"memory of a block that has returned", other_block_returned, 64, 2, false, "which has returned"},
    {"static memory in a cluster", static_in_cluster, 0, 2, true, "in a cluster"},
};

static void launch_one(const struct mistake *m, float *out) {
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {m->cluster, 1, 1};
    cudaLaunchConfig_t config = {dim3(m->cluster), dim3(THREADS), m->shared_bytes, 0, m->cluster > 1 ? &cluster : NULL, m->cluster > 1};
    (void)cudaLaunchKernelEx(&config, m->kernel, out);
    (void)cudaDeviceSynchronize();
}

/* What a child that does `what` says to stderr; its status. */
template <class F> static int in_child(char *text, size_t bytes, F what) {
    int ends[2], status;
    size_t used = 0;
    assert_int_equal(pipe(ends), 0);
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        (void)signal(SIGABRT, SIG_DFL);
        (void)dup2(ends[1], STDERR_FILENO);
        what();
        _exit(0);
    }
    (void)close(ends[1]);
    for (ssize_t n; used + 1 < bytes && (n = read(ends[0], text + used, bytes - 1 - used)) > 0;) used += (size_t)n;
    text[used] = '\0';
    (void)close(ends[0]);
    assert_int_equal(waitpid(child, &status, 0), child);
    return status;
}

static void is_noticed(const char *name, int status, const char *text, const char *words) {
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGABRT || !strstr(text, words))
        fail_msg("%s: status %d, \"%s\" without \"%s\"", name, status, text, words);
}

static void test_mistakes_are_noticed(void **) {
    static char text[4096];
    for (const struct mistake &m : mistakes) {
#ifdef KVASIR_SANITIZED
        if (m.by_access) continue;
#endif
        const int status = in_child(text, sizeof text, [&] {
            float *out;
            (void)cudaMalloc(&out, THREADS * sizeof *out);
            (void)cudaMemset(out, 0, THREADS * sizeof *out);
            launch_one(&m, out);
        });
        is_noticed(m.name, status, text, m.words);
        if (!strstr(text, "block (") || !strstr(text, "thread (")) fail_msg("%s: \"%s\" does not say where", m.name, text);
    }
}

static void test_pointers_of_the_other_side(void **) {
    static char text[4096];
    float *device, host[THREADS] = {};
    (void)cudaMalloc(&device, sizeof host);
    is_noticed("a copy between the wrong ends",
               in_child(text, sizeof text, [&] { (void)cudaMemcpy(host, device, sizeof host, cudaMemcpyHostToDevice); }), text, "of the device");
    is_noticed("a copy of too much", in_child(text, sizeof text, [&] { (void)cudaMemset(device, 0, sizeof host + 1); }), text, "of which");
#ifndef KVASIR_SANITIZED
    float *const heap = (float *)malloc(sizeof host);
    is_noticed("a pointer of the host",
               in_child(text, sizeof text,
                        [&] {
                            launch(sum_kernel, 1, THREADS, 0, 0, heap, device);
                            (void)cudaDeviceSynchronize();
                        }),
               text, "outside of every allocation");
    free(heap);
    is_noticed("a pointer of the device", in_child(text, sizeof text, [&] { host[0] = device[0]; }), text, "host code reads");
#endif
    (void)cudaFree(device);
}

/* Right in every order; work on a stream is done when somebody waits for it, in the order in which it was put there, from a graph as often as it is launched. */
static void test_streams(void **) {
    float *in, *out, *pinned, result;
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    assert_int_equal(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    assert_int_equal(cudaMalloc(&in, THREADS * sizeof *in), cudaSuccess);
    assert_int_equal(cudaMalloc(&out, sizeof *out), cudaSuccess);
    assert_int_equal(cudaMallocHost((void **)&pinned, (THREADS + 1) * sizeof *pinned), cudaSuccess);
    for (int i = 0; i < THREADS; i++) pinned[i] = (float)i;
    assert_int_equal(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    assert_int_equal(cudaStreamSynchronize(stream), cudaErrorStreamCaptureUnsupported);
    (void)cudaMemcpyAsync(in, pinned, THREADS * sizeof *in, cudaMemcpyHostToDevice, stream);
    launch(sum_kernel, 1, THREADS, 0, stream, in, out);
    (void)cudaMemcpyAsync(pinned + THREADS, out, sizeof *out, cudaMemcpyDeviceToHost, stream);
    assert_int_equal(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    assert_int_equal(cudaGraphDestroy(graph), cudaSuccess);
    for (int round = 0; round < 2; round++) {
        pinned[THREADS] = -1;
        pinned[0] = 100; /* before it is launched; after it, what the copy sees is anybody's guess: here the latest */
        assert_int_equal(cudaGraphLaunch(exec, stream), cudaSuccess);
        pinned[0] = (float)(1000 * round);
        assert_true(pinned[THREADS] == -1);
        assert_int_equal(cudaStreamSynchronize(stream), cudaSuccess);
        assert_true(pinned[THREADS] == (float)(THREADS * (THREADS - 1) / 2 + 1000 * round));
    }
    launch(sum_kernel, 1, THREADS, 64 << 10, stream, in, out); /* more than was allowed */
    assert_int_equal(cudaGetLastError(), cudaErrorInvalidValue);
    assert_int_equal(cudaGetLastError(), cudaSuccess);
    assert_int_equal(cudaMemcpy(&result, out, sizeof result, cudaMemcpyDeviceToHost), cudaSuccess);
    assert_true(result == pinned[THREADS]);
    (void)cudaGraphExecDestroy(exec);
    (void)cudaStreamDestroy(stream);
    (void)cudaFreeHost(pinned);
    (void)cudaFree(in);
    (void)cudaFree(out);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_mistakes_are_noticed), cmocka_unit_test(test_pointers_of_the_other_side),
                                       cmocka_unit_test(test_streams)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
