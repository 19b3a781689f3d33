/* The host device's matrix instructions: what a warp's lanes hold is put together, computed and given back. An element is a sum in double of exact products in ascending order, the accumulator last,
 * rounded once: within the error of a device's, of which only that it depends on its row and column alone is relied on. */
#include <cuda_fp16.h>

#include "kernels/cuda/ptx.h"

void host_load_matrices(void *const operands[32], uint32_t) {
    const struct host_matrices *const first = (const struct host_matrices *)operands[0];
    for (uint32_t matrix = 0; matrix < first->count; matrix++) {
        uint16_t elements[8][8];
        for (uint32_t row = 0; row < 8; row++) {
            const struct host_matrices *from = (const struct host_matrices *)operands[matrix * 8 + row];
            memcpy(elements[row], host_shared_at(from->at, 16, "a row of a matrix"), 16);
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

struct fragments {
    uint16_t a[16][16], b[16][8];
};

static void put_pair(uint16_t *at, uint32_t stride, uint32_t pair) {
    at[0] = (uint16_t)pair;
    at[stride] = (uint16_t)(pair >> 16);
}

static void multiply(void *const operands[32], double (*widen)(uint16_t)) {
    struct fragments f;
    double a[16][16], b[16][8];
    for (uint32_t lane = 0; lane < 32; lane++) {
        const struct host_product *p = (const struct host_product *)operands[lane];
        const uint32_t g = lane / 4, t = lane % 4 * 2;
        for (uint32_t i = 0; i < 4; i++) put_pair(&f.a[g + i % 2 * 8][t + i / 2 * 8], 1, p->a[i]);
        for (uint32_t i = 0; i < 2; i++) put_pair(&f.b[t + i * 8][g], 8, p->b[i]);
    }
    for (uint32_t i = 0; i < 256; i++) a[i / 16][i % 16] = widen(f.a[i / 16][i % 16]);
    for (uint32_t i = 0; i < 128; i++) b[i / 8][i % 8] = widen(f.b[i / 8][i % 8]);
    for (uint32_t row = 0; row < 16; row++) {
        double sums[8] = {};
        for (uint32_t k = 0; k < 16; k++)
            for (uint32_t column = 0; column < 8; column++) sums[column] += a[row][k] * b[k][column];
        for (uint32_t column = 0; column < 8; column++) {
            float *c = &((const struct host_product *)operands[row % 8 * 4 + column / 2])->c[row / 8 * 2 + column % 2];
            *c = (float)((double)*c + sums[column]);
        }
    }
}

static inline double widen_f16(uint16_t bits) { return (double)host_half_to_float(bits); }
static inline double widen_bf16(uint16_t bits) { return (double)host_bits<float>((uint32_t)bits << 16); }

void host_multiply_f16(void *const operands[32], uint32_t) { multiply(operands, widen_f16); }
void host_multiply_bf16(void *const operands[32], uint32_t) { multiply(operands, widen_bf16); }
