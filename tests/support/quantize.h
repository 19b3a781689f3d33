/* f32 rows into every tensor type, for weights that tests invent. The plainest rounding there is: its error is bounded (test_tensor.c), not minimal. */
#pragma once

#include <stddef.h>

#include "kernels/tensor.h"

/* `count` is a multiple of the type's block size; `destination` holds count / block_size * block_bytes bytes, at any alignment. */
void quantize(enum tensor_type type, const float *source, void *destination, size_t count);
