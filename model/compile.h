/* From hyper-parameters and named weights to the program that backends walk. Inside model/ only. */
#pragma once

#include "model/architecture.h"

/* One weight the program asks for. Matrices may have any tensor type; vectors are f32. */
struct weight_request {
    const char *name;    /* as GGUF names it: "blk.3.attn_q.weight" */
    uint32_t rows, cols; /* rows is 1 for a vector */
    bool vector;
    bool required; /* else, where there is none, the tensor stays absent (data NULL) */
};

/* Where weights come from: a file, or a generator. `get` fills *tensor; a weight of another shape or type than asked for is an error. */
struct weight_source {
    void *context;
    enum status (*get)(void *context, const struct weight_request *request, struct tensor *tensor, struct error *error);
};

/* Allocates phases and frequencies; weights stay where the source has them and must outlive the program. */
enum status program_compile(const struct hyper_parameters *parameters, const struct weight_source *source, struct program **program,
                            struct error *error);
void program_free(struct program *program); /* NULL is fine */

/* The same from a file, where every tensor must be used: one that is left over belongs to mathematics this program does not do. */
enum status program_compile_gguf(const struct hyper_parameters *parameters, const struct gguf *gguf, struct program **program, struct error *error);
