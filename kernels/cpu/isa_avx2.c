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

#include "kernels/cpu/isa_table.inc.h"

static bool present(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has_f16c(); }

CPU_ISA(cpu_isa_avx2, "avx2", "AVX2, FMA and F16C");
#endif
