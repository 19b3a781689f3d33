/* The cpu backend's inner loops for AVX-512 with VNNI. See isa.h. */
#include "kernels/cpu/isa.h"

#if defined(__x86_64__)
#include "base/half.h"

/* In this order: each builds on those before. */
#include "kernels/cpu/vector_avx512.inc.h"

#include "kernels/cpu/products.inc.h"

#include "kernels/cpu/rows.inc.h"

#include "kernels/cpu/attention.inc.h"

#include "kernels/cpu/scores.inc.h"

#include "kernels/cpu/compact.inc.h"

static bool present(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

const struct cpu_isa cpu_isa_avx512 = {
    .name = "avx512",
    .text = "AVX-512 F, BW, DQ, VL and VNNI",
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
