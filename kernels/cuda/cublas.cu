/* Where cuBLASLt comes from: the loader's own places (LD_LIBRARY_PATH, ld.so.cache), then the folder that it had when this was built. The version is the header's: the layout of what is
 * passed in differs between major versions. Owns the library, which stays until the process ends. */
#include "kernels/cuda/cublas.h"

#include <dlfcn.h>
#include <stdio.h>

extern "C" {
#include "base/check.h"
}

#define TEXT(x) #x
#define TEXT_OF(x) TEXT(x)
#define LIBRARY "libcublasLt.so." TEXT_OF(CUBLAS_VER_MAJOR)

namespace {
struct loaded {
    struct cublas_lt functions;
    char why_not[256]; /* "": it is there */
};
} // namespace

static struct loaded load(void) {
    struct loaded result = {};
    void *library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (!library) (void)snprintf(result.why_not, sizeof result.why_not, "%s", dlerror());
    if (!library) library = dlopen(KVASIR_CUBLASLT_FOLDER "/" LIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (!library) return result;
    result.why_not[0] = '\0';
    const char *missing = NULL;
#define FIND(name)                                                                          \
    result.functions.name = (decltype(result.functions.name))dlsym(library, "cublasLt" #name); \
    if (!result.functions.name) missing = "cublasLt" #name;
    CUBLAS_LT_FUNCTIONS(FIND)
#undef FIND
    if (missing) (void)snprintf(result.why_not, sizeof result.why_not, "it lacks %s", missing);
    return result;
}

static const struct loaded *once(void) {
    static const struct loaded result = load();
    return &result;
}

enum status cublas_lt_open(struct error *error) {
    if (!once()->why_not[0]) return STATUS_OK;
    return error_set(error, STATUS_UNSUPPORTED, LIBRARY ", of the CUDA toolkit or of NVIDIA's cuBLAS package, cannot be loaded: %s. LD_LIBRARY_PATH may name its folder", once()->why_not);
}

const struct cublas_lt *cublas_lt(void) {
    CHECK(!once()->why_not[0]);
    return &once()->functions;
}
