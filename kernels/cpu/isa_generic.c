/* The cpu backend's inner loops in plain C: any machine. See isa.h. */
#include "base/half.h"
#include "kernels/cpu/isa.h"

/* In this order: each builds on those before. */
#include "kernels/cpu/vector_generic.inc.h"

#include "kernels/cpu/products.inc.h"

#include "kernels/cpu/rows.inc.h"

#include "kernels/cpu/attention.inc.h"

#include "kernels/cpu/scores.inc.h"

#include "kernels/cpu/compact.inc.h"

static bool present(void) { return true; }

const struct cpu_isa cpu_isa_generic = {
    .name = "generic",
    .text = "any CPU",
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
