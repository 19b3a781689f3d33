/* The host device's matrix instructions: what a warp's lanes hold is put together, computed and given back. An element is a sum in double of exact products in ascending order, the accumulator last,
 * rounded once: within the error of a device's, of which only that it depends on its row and column alone is relied on. */
#include <cuda_fp16.h>

#include "kernels/cuda/ptx.h"
#include "tests/host_device/execution_state.h"

void host_load_matrices(void *const operands[32], uint32_t) {
    const struct host_matrices *const first = (const struct host_matrices *)operands[0];
    for (uint32_t matrix = 0; matrix < first->count; matrix++) {
        uint16_t elements[8][8];
        for (uint32_t row = 0; row < 8; row++) {
            const struct host_matrices *from = (const struct host_matrices *)operands[matrix * 8 + row];
            const void *at = host_shared_at(from->at, 16, "a row of a matrix");
            host_access_shared(at, 16, false);
            memcpy(elements[row], at, 16);
        }
        for (uint32_t lane = 0; lane < 32; lane++) {
            const struct host_matrices *to = (const struct host_matrices *)operands[lane];
            const uint32_t row = lane / 4, column = lane % 4 * 2;
            const uint16_t low = to->transposed ? elements[column][row] : elements[row][column];
            const uint16_t high = to->transposed ? elements[column + 1][row] : elements[row][column + 1];
            to->r[matrix] = low | (uint32_t)high << 16;
        }
    }
}

/* Rows of A and, turned, columns of B: pairs of neighbours, as the lanes hold them. */
static void collect(void *const operands[32], uint32_t a[16][8], uint32_t b[8][8]) {
    for (uint32_t lane = 0; lane < 32; lane++) {
        const struct host_product *p = (const struct host_product *)operands[lane];
        const uint32_t g = lane / 4, t = lane % 4;
        a[g][t] = p->a[0], a[g + 8][t] = p->a[1], a[g][t + 4] = p->a[2], a[g + 8][t + 4] = p->a[3];
        b[g][t] = p->b[0], b[g][t + 4] = p->b[1];
    }
}

/* Written so that the compiler makes vectors of it: as wide as the machine has, whose sums are the same. */
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
__attribute__((target_clones("avx2", "default")))
#endif
static void
multiply(void *const operands[32], const double a[16][16], const double b[8][16]) {
    double columns[16][8];
    for (uint32_t k = 0; k < 16; k++)
        for (uint32_t column = 0; column < 8; column++) columns[k][column] = b[column][k];
    for (uint32_t row = 0; row < 16; row++) {
        double sums[8] = {};
        for (uint32_t k = 0; k < 16; k++)
            for (uint32_t column = 0; column < 8; column++) sums[column] += a[row][k] * columns[k][column];
        for (uint32_t column = 0; column < 8; column++) {
            float *c = &((const struct host_product *)operands[row % 8 * 4 + column / 2])->c[row / 8 * 2 + column % 2];
            *c = (float)((double)*c + sums[column]);
        }
    }
}

template <class W> static inline __attribute__((always_inline)) void widen_all(const uint32_t *pairs, uint32_t n, double *out, W widen) {
    for (uint32_t i = 0; i < n; i++) {
        out[2 * i] = (double)widen(pairs[i] & 0xffff);
        out[2 * i + 1] = (double)widen(pairs[i] >> 16);
    }
}

template <class W> static inline __attribute__((always_inline)) void multiply_pairs(void *const operands[32], W widen) {
    uint32_t a[16][8], b[8][8];
    double wide_a[16][16], wide_b[8][16];
    collect(operands, a, b);
    widen_all(&a[0][0], 128, &wide_a[0][0], widen);
    widen_all(&b[0][0], 64, &wide_b[0][0], widen);
    multiply(operands, wide_a, wide_b);
}

void host_multiply_f16(void *const operands[32], uint32_t) {
    multiply_pairs(operands, [](uint32_t half) { return host_half_to_float((uint16_t)half); });
}
void host_multiply_bf16(void *const operands[32], uint32_t) {
    multiply_pairs(operands, [](uint32_t bits) { return host_bits<float>(bits << 16); });
}
