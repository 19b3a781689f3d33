/* Weights as a model file stores them: a type, a shape, an address. Formats are GGUF's (ggml's block quantisations). */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum tensor_type {
    TENSOR_F32, TENSOR_F16, TENSOR_BF16,
    TENSOR_Q8_0, TENSOR_Q4_0, TENSOR_Q4_1, TENSOR_Q5_0, TENSOR_Q5_1,
    TENSOR_Q4_K, TENSOR_Q5_K, TENSOR_Q6_K,
    TENSOR_TYPES
};

struct tensor_type_info {
    const char *name;    /* as GGUF tools print it: "Q4_1" */
    uint32_t block_size; /* elements a block: 1, 32 or 256 */
    uint32_t block_bytes;
};

const struct tensor_type_info *tensor_type_info(enum tensor_type type);

/* A matrix of `rows` outputs by `cols` inputs (y = W x, row-major: the file's innermost dimension is cols), or a vector (rows = 1).
 * data == NULL: absent. Row r starts at data + r * tensor_row_bytes(). Addresses may be unaligned by the type's needs: read with memcpy. */
struct tensor {
    enum tensor_type type;
    uint32_t rows, cols;
    const void *data;
};

size_t tensor_row_bytes(const struct tensor *tensor);
size_t tensor_bytes(const struct tensor *tensor);

/* Widens `count` elements (a multiple of the type's block size) to f32. The oracle of every product: plain C, exact. */
void tensor_dequantize(enum tensor_type type, const void *source, float *destination, size_t count);
/* One row. */
void tensor_row_f32(const struct tensor *tensor, uint32_t row, float *destination);
