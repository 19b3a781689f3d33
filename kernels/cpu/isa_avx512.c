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

#include "kernels/cpu/isa_table.inc.h"

static bool present(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has_f16c() && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

CPU_ISA(cpu_isa_avx512, "avx512", "AVX-512 F, BW, DQ, VL and VNNI");
#endif
