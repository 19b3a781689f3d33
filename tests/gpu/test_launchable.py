"""tests/gpu/launchable on kernels with one mistake each: it says so, with the kernel's name; and says nothing of one that has none. Needs nvcc (KVASIR_NVCC) and no device."""
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

HERE = pathlib.Path(__file__).resolve().parent

GOOD = """
#include "kernels/cuda/ptx.h"
enum { ONE = 1 };
struct shape { static const unsigned THREADS = 4 * 64; };
static __global__ void __launch_bounds__(4 * 64) good(float *x) { x[threadIdx.x] = 1; }
static __global__ void unbounded(float *x) { dynamic_shared<float>()[threadIdx.x] = x[threadIdx.x]; }
template <int N, int M> static __global__ void __launch_bounds__(ONE * 32, 2) many(float *x) { x[N] = M; }
void run(float *x, bool first) {
    launch(good, 1, shape::THREADS, 0, 0, x); /* launch(good, 1, 1, 0, 0, x) in words */
    launch(unbounded, dim3(1, 2), 1024, 64, 0, x);
    launch(first ? many<1, 2> : many<1, 3>, 1, ONE * 32, 0, 0, x);
}
"""

OTHER_BLOCK = """
#include "kernels/cuda/ptx.h"
static __global__ void __launch_bounds__(128) other_block(float *x) { x[threadIdx.x] = 1; }
void run(float *x) {
    launch(other_block, 1, 256, 0, 0, x);
}
"""

# Numbers that are all there at a barrier: as many registers.
TOO_MANY_REGISTERS = """
#include "kernels/cuda/ptx.h"
static __global__ void too_many_registers(const float *in, float *out) {
    float x[100];
#pragma unroll
    for (int i = 0; i < 100; i++) x[i] = in[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 100; i++) out[i * 1024 + threadIdx.x] = x[99 - i];
}
void run(const float *in, float *out) { launch(too_many_registers, 1, 1024, 0, 0, in, out); }
"""

BOTH_MEMORIES = """
#include "kernels/cuda/ptx.h"
static __global__ void both_memories(float *x) {
    __shared__ float own[64];
    own[threadIdx.x] = x[threadIdx.x];
    dynamic_shared<float>()[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = own[63 - threadIdx.x] + dynamic_shared<float>()[63 - threadIdx.x];
}
void run(float *x) { launch(both_memories, 1, 64, 256, 0, x); }
"""

NOT_LAUNCHED = """
#include "kernels/cuda/ptx.h"
__global__ void not_launched(float *x) { x[threadIdx.x] = 1; }
"""

HIDDEN = """
#include "kernels/cuda/ptx.h"
#define KERNEL __global__ void
KERNEL hidden(float *x) { x[threadIdx.x] = 1; }
"""

TOO_MUCH_STATIC = """
#include "kernels/cuda/ptx.h"
static __global__ void too_much_static(float *x) {
    __shared__ float own[13 << 10];
    own[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = own[63 - threadIdx.x];
}
void run(float *x) { launch(too_much_static, 1, 64, 0, 0, x); }
"""


class Launchable(unittest.TestCase):
    def says(self, source, code, *words):
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "planted.cu"
            file.write_text(source)
            done = subprocess.run([sys.executable, str(HERE / "launchable"), "--nvcc", os.environ["KVASIR_NVCC"], "--arch", "80", "--", str(file)], capture_output=True, text=True, timeout=300)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        for word in words:
            self.assertIn(word, done.stdout + done.stderr)

    def test_none(self):
        self.says(GOOD, 0, "4 kernels for 8.0: all can be launched")

    def test_mistakes(self):
        for source, words in (
            (OTHER_BLOCK, "planted.cu:5: other_block has __launch_bounds__(128) and is launched with blocks of 256"),
            (TOO_MANY_REGISTERS, "too_many_registers: "),
            (TOO_MANY_REGISTERS, "it has no __launch_bounds__"),
            (BOTH_MEMORIES, "both_memories: 256 bytes of static shared memory beside dynamic memory"),
            (NOT_LAUNCHED, "not_launched: nothing is seen to launch it"),
            (HIDDEN, "hidden: is not seen in the sources"),
            (TOO_MUCH_STATIC, "does not compile"),
        ):
            with self.subTest(words):
                self.says(source, 1, words)


if __name__ == "__main__":
    unittest.main()
