/* The cpu backend's inner loops for AVX-512 with VNNI and BF16. See isa.h. */
#include "kernels/cpu/isa.h"

#if defined(__x86_64__)
#define BF16_PAIRS 1
#include "base/half.h"

/* In this order: each builds on those before. */
#include "kernels/cpu/vector_avx512.inc.h"

#include "kernels/cpu/products.inc.h"

#include "kernels/cpu/rows.inc.h"

#include "kernels/cpu/attention.inc.h"

#include "kernels/cpu/scores.inc.h"

#include "kernels/cpu/compact.inc.h"

#include "kernels/cpu/isa_table.inc.h"

static bool present(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has_f16c() && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

CPU_ISA(cpu_isa_avx512bf16, "avx512bf16", "AVX-512 F, BW, DQ, VL, VNNI and BF16");
#endif
