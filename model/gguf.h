/* GGUF v2 and v3, little-endian: the container of a model file, read in place from a read-only mapping.
 *
 * The file is hostile: every count, offset, type and size is checked against the file's length with overflow-safe arithmetic before it is used, and counts are
 * bounded before anything is allocated for them. What gguf_open returned OK for can be read without further checks; values (hyper-parameters, token ids) are
 * the caller's to judge. Refused: big-endian files, arrays of arrays, duplicate keys and tensor names, tensors outside the file, tensor types not in
 * kernels/tensor.h, tensors that share bytes (so that weights never take more memory than the file), files that are not regular.
 * Out of scope: a file that is changed or cut while it is mapped. Reading a page that is gone raises SIGBUS and ends the process; replace model files by rename.
 *
 * Errors: STATUS_IO (open, map), STATUS_INVALID (broken), STATUS_UNSUPPORTED (well-formed, not served here); the text names path and key or tensor.
 * Const after gguf_open: any number of threads may read until gguf_close. Strings and arrays returned are views into the mapping: no terminator, valid until
 * gguf_close, no alignment: read numbers with the accessors below.
 * Source: github.com/ggml-org/ggml, docs/gguf.md. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "kernels/tensor.h"

/* Limits beyond what the file's own length allows. */
#define GGUF_KEYS_MAX 65536u
#define GGUF_TENSORS_MAX 65536u
#define GGUF_KEY_LENGTH_MAX 65535u
#define GGUF_STRING_LENGTH_MAX (16u << 20)
#define GGUF_TENSOR_NAME_MAX 64u
#define GGUF_ALIGNMENT_MAX 4096u

enum gguf_type { /* of a metadata value, numbered as in the file */
    GGUF_U8, GGUF_I8, GGUF_U16, GGUF_I16, GGUF_U32, GGUF_I32, GGUF_F32, GGUF_BOOL, GGUF_STRING, GGUF_ARRAY, GGUF_U64, GGUF_I64, GGUF_F64,
    GGUF_TYPES
};
const char *gguf_type_name(enum gguf_type type); /* "u32", "string", ... */

struct gguf_string {
    const char *bytes;
    size_t length;
};

struct gguf_array {
    enum gguf_type type; /* of the elements; never GGUF_ARRAY */
    size_t count;
    const uint8_t *bytes;
    size_t length; /* in bytes */
};

struct gguf_tensor {
    struct gguf_string name;
    enum tensor_type type;
    uint32_t n_dims;    /* 1..4 */
    uint64_t dims[4];   /* dims[0] is the innermost (a matrix's cols); 1 beyond n_dims; all > 0; dims[0] a multiple of the type's block */
    uint64_t elements;
    const void *data;
    size_t bytes;
};

struct gguf;

enum status gguf_open(const char *path, struct gguf **gguf, struct error *error);
/* The same over memory that outlives the gguf; `path` is only for words. */
enum status gguf_parse(const void *bytes, size_t length, const char *path, struct gguf **gguf, struct error *error);
void gguf_close(struct gguf *gguf); /* NULL is fine */

const char *gguf_path(const struct gguf *gguf);
uint32_t gguf_version(const struct gguf *gguf);
size_t gguf_file_bytes(const struct gguf *gguf);

size_t gguf_tensor_count(const struct gguf *gguf);
const struct gguf_tensor *gguf_tensor_at(const struct gguf *gguf, size_t index); /* in file order */
const struct gguf_tensor *gguf_tensor_find(const struct gguf *gguf, const char *name); /* NULL: none */

/* Keys. Each getter wants exactly its type: another one is STATUS_INVALID, "key X has type A, expected B". An absent key leaves *value as it was:
 * STATUS_OK if GGUF_OPTIONAL, STATUS_INVALID if GGUF_REQUIRED. */
enum gguf_presence { GGUF_OPTIONAL, GGUF_REQUIRED };
bool gguf_has(const struct gguf *gguf, const char *key);
enum status gguf_get_bool(const struct gguf *gguf, const char *key, enum gguf_presence presence, bool *value, struct error *error);
enum status gguf_get_u16(const struct gguf *gguf, const char *key, enum gguf_presence presence, uint16_t *value, struct error *error);
enum status gguf_get_u32(const struct gguf *gguf, const char *key, enum gguf_presence presence, uint32_t *value, struct error *error);
enum status gguf_get_i32(const struct gguf *gguf, const char *key, enum gguf_presence presence, int32_t *value, struct error *error);
enum status gguf_get_u64(const struct gguf *gguf, const char *key, enum gguf_presence presence, uint64_t *value, struct error *error);
enum status gguf_get_f32(const struct gguf *gguf, const char *key, enum gguf_presence presence, float *value, struct error *error);
enum status gguf_get_string(const struct gguf *gguf, const char *key, enum gguf_presence presence, struct gguf_string *value, struct error *error);
/* An array whose elements have type `element`. */
enum status gguf_get_array(const struct gguf *gguf, const char *key, enum gguf_presence presence, enum gguf_type element, struct gguf_array *value,
                           struct error *error);

/* Elements of fixed-size arrays; index < count (CHECKed), and the array has that element type (CHECKed). */
uint32_t gguf_array_u32(const struct gguf_array *array, size_t index);
int32_t gguf_array_i32(const struct gguf_array *array, size_t index);
float gguf_array_f32(const struct gguf_array *array, size_t index);

/* Strings of an array, in order:  struct gguf_strings cursor = gguf_strings_begin(&array);  while (gguf_strings_next(&cursor, &string)) ... */
struct gguf_strings {
    const uint8_t *next;
    size_t left; /* strings */
};
struct gguf_strings gguf_strings_begin(const struct gguf_array *array);
bool gguf_strings_next(struct gguf_strings *cursor, struct gguf_string *string);

bool gguf_string_equals(struct gguf_string string, const char *text);
/* For words: at most size - 1 bytes, terminated, anything but printable ASCII shown as '?', cut with "...". Returns `out`. */
const char *gguf_printable(struct gguf_string string, char *out, size_t size);
