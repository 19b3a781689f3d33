/* The cpu backend's inner loops for AVX2 with AVX-VNNI. See isa.h. */
#include "kernels/cpu/isa.h"

#if defined(__x86_64__)
#define AVX_VNNI 1
#include "base/half.h"

/* In this order: each builds on those before. */
#include "kernels/cpu/vector_avx2.inc.h"

#include "kernels/cpu/products.inc.h"

#include "kernels/cpu/rows.inc.h"

#include "kernels/cpu/attention.inc.h"

#include "kernels/cpu/scores.inc.h"

#include "kernels/cpu/compact.inc.h"

#include "kernels/cpu/isa_table.inc.h"

/* Compilers that know the name for __builtin_cpu_supports are newer than those this is built with: leaf 7, sub-leaf 1, EAX bit 4. That the system saves the
 * wide registers is what "avx2" above asks. */
static bool has_avx_vnni(void) {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}

static bool present(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has_f16c() && has_avx_vnni();
}

CPU_ISA(cpu_isa_avxvnni, "avxvnni", "AVX2, FMA, F16C and AVX-VNNI");
#endif
