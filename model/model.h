/* An opened model file: its description, its weights (mapped, read-only), its tokenizer, and the program compiled from its architecture.
 * Const after model_open: read freely by every thread until model_close. */
#pragma once

#include <stdint.h>
#include <stdio.h>

#include "base/error.h"
#include "kernels/program.h"
#include "model/tokenizer.h"

struct model;

/* GGUF v2 or v3. Every count, offset, type and size is checked against the file's length; a file that is broken, truncated or not supported ends here
 * with one clear line (what was found, what is supported). Nothing is read past the mapping, whatever the file says. */
enum status model_open(const char *path, struct model **model, struct error *error);
void model_close(struct model *model);

const struct program *model_program(const struct model *model);
const struct tokenizer *model_tokenizer(const struct model *model);
const char *model_path(const struct model *model);
const char *model_name(const struct model *model);         /* the file's name without directory and ".gguf": the default served name */
const char *model_architecture(const struct model *model); /* "llama" */
const char *model_chat_template(const struct model *model, size_t *length); /* NULL: none */
uint64_t model_parameters(const struct model *model);
uint64_t model_bytes(const struct model *model); /* of all tensors, as stored */

/* Architecture, hyper-parameters, tensors by type, tokenizer: what `kvasir inspect` prints. */
void model_describe(const struct model *model, FILE *out);

/* A model without a file for tests of what is above: `shape` ("tiny", "smollm2-135m", "llama-3.1-8b") with weights from a seed, made in memory: matrices Q8_0 or Q4_0, vectors f32.
 * Its tokenizer maps bytes to ids 0..255 and has EOS 256. */
enum status model_dummy(const char *shape, uint64_t seed, struct model **model, struct error *error);
/* The same, telling how far it is: gigabytes take a while. `report` (NULL: nobody is told) gets the share of the bytes that are made, on this thread, after each tensor; 1 at last. */
struct model_progress {
    void (*report)(void *context, double fraction);
    void *context;
};
enum status model_dummy_told(const char *shape, uint64_t seed, struct model_progress progress, struct model **model, struct error *error);
/* The memory that takes. */
enum status model_dummy_bytes(const char *shape, uint64_t *bytes, struct error *error);
/* The same shape without weights, which a backend makes where it wants them (program.random_seed = seed, not 0); matrices are f16. */
enum status model_dummy_seeded(const char *shape, uint64_t seed, struct model **model, struct error *error);
