/* cuBLASLt, loaded when a device is first looked for: it takes a quarter of a second and half a gigabyte, and a program that computes elsewhere needs neither it nor its file.
 * Types and constants are the toolkit's header's; functions are called through cublas_lt(). */
#pragma once

extern "C" {
#include "base/error.h"
}

#include <cublasLt.h>

#define CUBLAS_LT_FUNCTIONS(X)                                                                                                                                  \
    X(Create)                                                                                                                                                   \
    X(Destroy)                                                                                                                                                  \
    X(GetStatusString)                                                                                                                                          \
    X(Matmul)                                                                                                                                                   \
    X(MatmulAlgoGetHeuristic)                                                                                                                                   \
    X(MatmulDescInit_internal)                                                                                                                                  \
    X(MatmulDescSetAttribute)                                                                                                                                   \
    X(MatmulPreferenceInit_internal)                                                                                                                            \
    X(MatmulPreferenceSetAttribute)                                                                                                                             \
    X(MatrixLayoutInit_internal)

struct cublas_lt {
#define MEMBER(name) decltype(&cublasLt##name) name;
    CUBLAS_LT_FUNCTIONS(MEMBER)
#undef MEMBER
};

/* Loads the library, the first time; any thread. STATUS_UNSUPPORTED: it is not there, or not whole, and where it is looked for. */
extern "C" enum status cublas_lt_open(struct error *error);
/* After cublas_lt_open has succeeded. */
const struct cublas_lt *cublas_lt(void);
