/* The list of backends and the names of KV dtypes. Owns nothing; any thread. */
#include "kernels/backend.h"

#include <string.h>

#include "base/check.h"
#include "kernels/cpu/isa.h"

/* Best first: "auto" is the first one, which is why a backend that invents its numbers comes last. */
const struct backend_ops *const backends[] = {
    &backend_cpu,
    &backend_reference,
    &backend_mock,
    NULL,
};

const struct backend_ops *backend_find(const char *name) {
    if (strcmp(name, "auto") == 0) return backends[0];
    for (const struct backend_ops *const *ops = backends; *ops; ops++)
        if (strcmp((*ops)->name, name) == 0) return *ops;
    return NULL;
}

/* bf16 costs nothing that could be measured beside f16 and is faster where the CPU multiplies it. SmolLM2-135M Q4_1 over the 2,934 positions of tests/golden/llama: mean KL
 * to the golden distributions 2.65e-3 with f32, 2.66e-3 with f16, 2.65e-3 with bf16 (queries and weights rounded to bf16 too), 3.65e-3 with q8: what is left is the
 * rounding of activations to 8 bits. */
enum kv_dtype backend_kv_dtype(const struct backend_ops *ops, const char *instruction_set) {
    if (ops != &backend_cpu) return KV_F16;
    return strcmp(instruction_set ? instruction_set : cpu_isa_best()->name, "avx512bf16") == 0 ? KV_BF16 : KV_F16;
}

enum status backend_needs_data(const struct backend_ops *ops, const struct program *program, struct error *error) {
    if (program->random_seed == 0) return STATUS_OK;
    return error_set(error, STATUS_UNSUPPORTED, "backend %s: the weights of this model are to be made by the backend, which this one cannot",
                     ops->name);
}

static const char *const kv_dtype_names[KV_DTYPES] = {[KV_F32] = "f32", [KV_F16] = "f16", [KV_BF16] = "bf16", [KV_Q8] = "q8"};

const char *kv_dtype_name(enum kv_dtype dtype) {
    CHECK((unsigned)dtype < KV_DTYPES);
    return kv_dtype_names[dtype];
}

bool kv_dtype_parse(const char *name, enum kv_dtype *dtype) {
    for (int i = 0; i < KV_DTYPES; i++)
        if (strcmp(name, kv_dtype_names[i]) == 0) {
            *dtype = (enum kv_dtype)i;
            return true;
        }
    return false;
}
