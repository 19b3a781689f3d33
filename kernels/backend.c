/* The list of backends, what their names and those of KV dtypes and weights stand for. Owns nothing; any thread. */
#include "kernels/backend.h"

#include <string.h>

#include "base/check.h"
#include "kernels/cpu/isa.h"
#include "kernels/kivi.h"

/* Best first: "auto" is the first one that has a device, which is why a backend that invents its numbers comes last. */
const struct backend_ops *const backends[] = {
#ifdef KVASIR_HAVE_CUDA
    &backend_cuda,
#endif
    &backend_cpu,  &backend_reference, &backend_mock, NULL,
};

const struct backend_ops *backend_find(const char *name) {
    for (const struct backend_ops *const *ops = backends; *ops; ops++)
        if (strcmp((*ops)->name, name) == 0) return *ops;
    return NULL;
}

static const struct backend_ops *best_with(uint32_t device) {
    for (const struct backend_ops *const *ops = backends; *ops; ops++)
        if ((*ops)->memory(device, NULL, NULL, NULL) == STATUS_OK) return *ops;
    return NULL;
}

const struct backend_ops *backend_choose(const char *name, uint32_t device) {
    if (strcmp(name, "auto") != 0) return backend_find(name);
    const struct backend_ops *best = best_with(device);
    return best ? best : best_with(0);
}

enum status backend_absent(const char *name, struct error *error) {
    return error_set(error, STATUS_UNSUPPORTED,
                     "engine.backend: this build has no \"%s\": cuda is built where CMake finds the CUDA toolkit, and says why not", name);
}

bool backend_resumes_always(struct backend *backend, uint32_t count, const uint32_t *blocks) {
    (void)backend, (void)count, (void)blocks;
    return true;
}

size_t backend_block_bytes(const struct backend_ops *ops, const struct program *program, enum kv_dtype dtype, bool accumulators) {
    size_t bytes = ops->block_bytes(program, dtype);
    return bytes + (bytes > 0 && kivi_bits(dtype) && accumulators ? BLOCK_TOKENS * sizeof(uint64_t) : 0);
}

enum status backend_host_memory(uint32_t device, uint64_t *available_bytes, uint64_t *total_bytes, struct error *error) {
    if (device > 0) return error_set(error, STATUS_UNSUPPORTED, "no device %u: this backend computes on the host, which is device 0", device);
    if (available_bytes) *available_bytes = 0;
    if (total_bytes) *total_bytes = 0;
    return STATUS_OK;
}

/* The rest is the KV cache's, which is what a larger batch needs; below it, f16 weights are read faster than they could be widened. */
#define F16_WEIGHTS_SHARE 0.4

enum weights_mode weights_choice(uint64_t f16_bytes, uint64_t total_bytes) {
    return (double)f16_bytes > F16_WEIGHTS_SHARE * (double)total_bytes ? WEIGHTS_NATIVE : WEIGHTS_F16;
}

static const char *const weights_modes[] = {[WEIGHTS_AUTO] = "auto", [WEIGHTS_F16] = "f16", [WEIGHTS_NATIVE] = "native"};
#define N_WEIGHTS_MODES (sizeof weights_modes / sizeof *weights_modes)

const char *weights_mode_name(enum weights_mode mode) {
    CHECK((unsigned)mode < N_WEIGHTS_MODES);
    return weights_modes[mode];
}

bool weights_mode_parse(const char *name, enum weights_mode *mode) {
    for (unsigned i = 0; i < N_WEIGHTS_MODES; i++)
        if (strcmp(name, weights_modes[i]) == 0) {
            *mode = (enum weights_mode)i;
            return true;
        }
    return false;
}

/* bf16 costs nothing that could be measured beside f16 and is faster where the CPU multiplies it. SmolLM2-135M Q4_1 over the 2,934 positions of tests/golden/llama: mean KL
 * to the golden distributions 2.65e-3 with f32, 2.66e-3 with f16, 2.65e-3 with bf16 (queries and weights rounded to bf16 too), 2.98e-3 with q8: nearly all of it is the
 * rounding of activations to 8 bits. With 16 of them it is 6e-8, 4e-7, 4e-5 and 2e-4. */
enum kv_dtype backend_kv_dtype(const struct backend_ops *ops, const char *instruction_set) {
    if (ops != &backend_cpu) return KV_F16;
    return strcmp(instruction_set ? instruction_set : cpu_isa_best()->name, "avx512bf16") == 0 ? KV_BF16 : KV_F16;
}

enum status backend_needs_data(const struct backend_ops *ops, const struct program *program, struct error *error) {
    if (program->random_seed == 0) return STATUS_OK;
    return error_set(error, STATUS_UNSUPPORTED, "backend %s: the weights of this model are to be made by the backend, which this one cannot",
                     ops->name);
}

static const char *const kv_dtype_names[KV_DTYPES] = {
    [KV_F32] = "f32", [KV_F16] = "f16", [KV_BF16] = "bf16", [KV_Q8] = "q8", [KV_KIVI4] = "kivi4", [KV_KIVI2] = "kivi2"};

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

bool activation_bits_parse(const char *name, uint32_t *bits) {
    *bits = strcmp(name, "16bit") == 0 ? 16 : 8;
    return *bits == 16 || strcmp(name, "8bit") == 0;
}
