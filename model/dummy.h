/* Weights from a seed instead of a file. Inside model/ only. */
#pragma once

#include "model/compile.h"

struct dummy {
    void *bytes; /* a mapping of its own, as a file's weights are: backends may drop its pages and read them again */
    size_t length;
    uint64_t parameters, weight_bytes;
};

/* The shapes there are: "tiny", "smollm2-135m". The same shape and seed give the same bytes on every machine. */
enum status dummy_make(const char *shape, uint64_t seed, struct dummy *dummy, struct hyper_parameters *parameters, struct program **program,
                       struct error *error);
void dummy_done(struct dummy *dummy);
