/* Weights from a seed instead of a file. Inside model/ only. */
#pragma once

#include "model/compile.h"
#include "model/model.h"

struct dummy {
    void *bytes; /* a mapping of its own, as a file's weights are: backends may drop its pages and read them again */
    size_t length;
    uint64_t parameters, weight_bytes;
};

/* The shapes there are: "tiny", "smollm2-135m", "llama-3.1-8b". The same shape and seed give the same bytes on every machine. */
enum status dummy_make(const char *shape, uint64_t seed, const struct model_progress *progress, struct dummy *dummy,
                       struct hyper_parameters *parameters, struct program **program, struct error *error);
/* Without bytes: program.random_seed is `seed`, not 0. Matrices are f16. */
enum status dummy_make_seeded(const char *shape, uint64_t seed, struct dummy *dummy, struct hyper_parameters *parameters, struct program **program,
                              struct error *error);
/* What dummy_make would allocate. */
enum status dummy_bytes(const char *shape, uint64_t *bytes, struct error *error);
void dummy_done(struct dummy *dummy);
