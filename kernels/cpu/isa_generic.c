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

#include "kernels/cpu/isa_table.inc.h"

static bool present(void) { return true; }

CPU_ISA(cpu_isa_generic, "generic", "any CPU");
