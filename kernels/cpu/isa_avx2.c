/* The cpu backend's inner loops for AVX2 with FMA and F16C. See isa.h. */
#include "kernels/cpu/isa.h"

#if defined(__x86_64__)
#include "base/half.h"

/* In this order: each builds on those before. */
#include "kernels/cpu/vector_avx2.inc.h"

#include "kernels/cpu/products.inc.h"

#include "kernels/cpu/rows.inc.h"

#include "kernels/cpu/attention.inc.h"

#include "kernels/cpu/scores.inc.h"

#include "kernels/cpu/compact.inc.h"

static bool present(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

const struct cpu_isa cpu_isa_avx2 = {
    .name = "avx2",
    .text = "AVX2, FMA and F16C",
    .present = present,
    .product = PRODUCTS,
    .norm = norm,
    .quantize = quantize,
    .quantize_column = quantize_column,
    .silu = silu,
    .put_strip = put_strip,
    .add_strip = add_strip,
    .rotate = rotate,
    .hadamard = hadamard,
    .append = append,
    .close_block = close_block,
    .attend = attend,
    .weights = weights,
    .factors = factors,
    .fold = fold,
    .accumulate = accumulate,
    .expected = expected,
    .keydiff = keydiff,
    .value_norms = value_norms,
    .widen_f16 = widen_f16,
    .narrow_f16 = narrow_f16,
    .move_slots = move_slots,
    .merge = merge,
    .track = track,
};
#endif
