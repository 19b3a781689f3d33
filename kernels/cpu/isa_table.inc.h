/* An instruction set's table (isa.h): which functions it has is the same for all. Included after the files that define them. */
#define CPU_ISA(id, called, words)                                                                                                                   \
    const struct cpu_isa id = {                                                                                                                      \
        .name = (called),                                                                                                                            \
        .text = (words),                                                                                                                             \
        .present = present,                                                                                                                          \
        .product = PRODUCTS,                                                                                                                         \
        .norm = norm,                                                                                                                                \
        .quantize = quantize,                                                                                                                        \
        .quantize_column = quantize_column,                                                                                                          \
        .silu = silu,                                                                                                                                \
        .put_strip = put_strip,                                                                                                                      \
        .add_strip = add_strip,                                                                                                                      \
        .rotate = rotate,                                                                                                                            \
        .hadamard = hadamard,                                                                                                                        \
        .append = append,                                                                                                                            \
        .close_block = close_block,                                                                                                                  \
        .attend = attend,                                                                                                                            \
        .weights = weights,                                                                                                                          \
        .factors = factors,                                                                                                                          \
        .fold = fold,                                                                                                                                \
        .accumulate = accumulate,                                                                                                                    \
        .expected = expected,                                                                                                                        \
        .keydiff = keydiff,                                                                                                                          \
        .value_norms = value_norms,                                                                                                                  \
        .widen_f16 = widen_f16,                                                                                                                      \
        .narrow_f16 = narrow_f16,                                                                                                                    \
        .move_slots = move_slots,                                                                                                                    \
        .merge = merge,                                                                                                                              \
        .track = track,                                                                                                                              \
    }
