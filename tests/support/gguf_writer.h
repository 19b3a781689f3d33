/* Writes GGUF files into memory, for tests: well-formed ones, and ones with a single thing wrong. Keys and tensors may be replaced and dropped by name after
 * they were added, so that a test says only what is special about its file. Not for large models: everything is copied. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "base/buffer.h"
#include "kernels/tensor.h"
#include "model/gguf.h"

struct gguf_record { /* a key or a tensor */
    char name[96];
    uint32_t type; /* as the file numbers it */
    uint32_t n_dims;
    uint64_t dims[4];
    struct buffer value;
};

struct gguf_writer {
    uint32_t version, alignment; /* 0: 3 and 32 */
    struct gguf_record *keys, *tensors;
    size_t n_keys, n_tensors;
};

void gguf_writer_done(struct gguf_writer *writer);

void gguf_writer_bool(struct gguf_writer *writer, const char *key, bool value);
void gguf_writer_u16(struct gguf_writer *writer, const char *key, uint16_t value);
void gguf_writer_u32(struct gguf_writer *writer, const char *key, uint32_t value);
void gguf_writer_i32(struct gguf_writer *writer, const char *key, int32_t value);
void gguf_writer_u64(struct gguf_writer *writer, const char *key, uint64_t value);
void gguf_writer_f32(struct gguf_writer *writer, const char *key, float value);
void gguf_writer_string(struct gguf_writer *writer, const char *key, const char *value);
void gguf_writer_strings(struct gguf_writer *writer, const char *key, const char *const *values, size_t count);
void gguf_writer_numbers(struct gguf_writer *writer, const char *key, enum gguf_type type, const void *values, size_t count); /* u32, i32, f32 */
void gguf_writer_drop(struct gguf_writer *writer, const char *key);

/* dims as GGUF has them, the innermost first; data: the bytes of the whole tensor, NULL: zeros. */
void gguf_writer_tensor(struct gguf_writer *writer, const char *name, enum tensor_type type, const uint64_t *dims, uint32_t n_dims, const void *data);
void gguf_writer_matrix(struct gguf_writer *writer, const char *name, uint64_t cols, uint64_t rows); /* f32; rows 0: a vector */
void gguf_writer_drop_tensor(struct gguf_writer *writer, const char *name);

void gguf_writer_finish(const struct gguf_writer *writer, struct buffer *file);

/* A whole model of one layer (embedding 8, 2 heads on 1 KV head, f32) of the architecture, with a byte-level vocabulary of TINY_MODEL_VOCABULARY tokens:
 * the 256 bytes' characters in order of bytes, "he", "<|end|>" (control, EOS). */
#define TINY_MODEL_VOCABULARY 258u
void gguf_writer_tiny_model(struct gguf_writer *writer, const char *architecture);

/* The keys of a small SPM vocabulary: <unk> <s> </s>, the 256 byte tokens from SPM_BYTES on, then these pieces; "ab" scores above " a", "<turn>" is user-defined. */
enum { SPM_BYTES = 3, SPM_SPACE = 259, SPM_A, SPM_B, SPM_AB, SPM_SPACE_A, SPM_LESS, SPM_S, SPM_GREATER, SPM_TURN, SPM_TOKENS };
void gguf_writer_spm_vocabulary(struct gguf_writer *writer);
