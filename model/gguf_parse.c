/* From the bytes of a GGUF file to tables of keys and tensors. This is where a hostile file is met: a cursor that cannot leave the file, counts bounded by the
 * bytes that are left before they are used, sizes by checked arithmetic. Everything gguf.c hands out has passed here.
 * Owns nothing; runs on the thread that opens the model. Does not judge what keys mean, general.alignment excepted.
 * Layout (docs/gguf.md): "GGUF", version u32, tensor count u64, key count u64, keys, tensor infos, padding to the alignment, tensor data. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "model/gguf_internal.h"

#define KEY_BYTES_MIN 14u    /* length 8, a letter, type 4, a one-byte value */
#define TENSOR_BYTES_MIN 33u /* length 8, a letter, dimensions 4, one of them 8, type 4, offset 8 */
#define ALIGNMENT_DEFAULT 32u

_Static_assert(sizeof(size_t) >= sizeof(uint64_t), "file offsets are 64 bits");
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "numbers of a GGUF file are read in place: little-endian machines only"
#endif

/* clang-format off */
static const struct { const char *name; int type; } file_types[] = { /* by ggml's number; type -1: known by name only; no name: withdrawn */
    [0]  = {"F32", TENSOR_F32},   [1]  = {"F16", TENSOR_F16},
    [2]  = {"Q4_0", TENSOR_Q4_0}, [3]  = {"Q4_1", TENSOR_Q4_1}, [6]  = {"Q5_0", TENSOR_Q5_0}, [7]  = {"Q5_1", TENSOR_Q5_1},
    [8]  = {"Q8_0", TENSOR_Q8_0}, [9]  = {"Q8_1", -1},          [10] = {"Q2_K", -1},          [11] = {"Q3_K", -1},
    [12] = {"Q4_K", TENSOR_Q4_K}, [13] = {"Q5_K", TENSOR_Q5_K}, [14] = {"Q6_K", TENSOR_Q6_K}, [15] = {"Q8_K", -1},
    [16] = {"IQ2_XXS", -1}, [17] = {"IQ2_XS", -1}, [18] = {"IQ3_XXS", -1}, [19] = {"IQ1_S", -1}, [20] = {"IQ4_NL", -1}, [21] = {"IQ3_S", -1},
    [22] = {"IQ2_S", -1},   [23] = {"IQ4_XS", -1}, [24] = {"I8", -1},      [25] = {"I16", -1},   [26] = {"I32", -1},    [27] = {"I64", -1},
    [28] = {"F64", -1},     [29] = {"IQ1_M", -1},  [30] = {"BF16", TENSOR_BF16},
    [34] = {"TQ1_0", -1},   [35] = {"TQ2_0", -1},  [39] = {"MXFP4", -1},   [40] = {"NVFP4", -1},
};
/* clang-format on */
#define FILE_TYPES (sizeof file_types / sizeof *file_types)

struct reader {
    const char *path;
    const uint8_t *bytes;
    size_t length, position; /* position <= length */
    char what[96];           /* what is being read, for words: "key general.name", "tensor 3 of 10" */
    struct error *error;
};

static size_t left(const struct reader *reader) { return reader->length - reader->position; }

static enum status cut(const struct reader *reader) {
    return error_set(reader->error, STATUS_INVALID, "%s: %s: the file ends inside it, at byte %zu", reader->path, reader->what, reader->length);
}

static enum status broken(const struct reader *reader, const char *problem, uint64_t found, const char *supported) {
    return error_set(reader->error, STATUS_INVALID, "%s: %s: %s %" PRIu64 " (%s)", reader->path, reader->what, problem, found, supported);
}

static enum status read_bytes(struct reader *reader, size_t length, const uint8_t **bytes) {
    if (length > left(reader)) return cut(reader);
    *bytes = reader->bytes + reader->position;
    reader->position += length;
    return STATUS_OK;
}

static enum status read_number(struct reader *reader, void *value, size_t size) {
    if (size > left(reader)) return cut(reader);
    memcpy(value, reader->bytes + reader->position, size);
    reader->position += size;
    return STATUS_OK;
}

static enum status read_string(struct reader *reader, uint64_t length_max, struct gguf_string *string) {
    uint64_t length = 0;
    enum status status = read_number(reader, &length, sizeof length);
    if (status != STATUS_OK) return status;
    if (length > length_max)
        return error_set(reader->error, STATUS_INVALID, "%s: %s: string of %" PRIu64 " bytes (at most %" PRIu64 ")", reader->path, reader->what,
                         length, length_max);
    const uint8_t *bytes = NULL;
    status = read_bytes(reader, (size_t)length, &bytes);
    if (status == STATUS_OK) *string = (struct gguf_string){(const char *)bytes, (size_t)length};
    return status;
}

static enum status read_type(struct reader *reader, enum gguf_type *type) {
    uint32_t number = 0;
    enum status status = read_number(reader, &number, sizeof number);
    if (status != STATUS_OK) return status;
    if (number >= GGUF_TYPES) return broken(reader, "value type", number, "known: 0 to 12");
    *type = (enum gguf_type)number;
    return STATUS_OK;
}

static enum status read_array(struct reader *reader, struct gguf_array *array) {
    uint64_t count = 0;
    enum status status = read_type(reader, &array->type);
    if (status == STATUS_OK) status = read_number(reader, &count, sizeof count);
    if (status != STATUS_OK) return status;
    if (array->type == GGUF_ARRAY)
        return error_set(reader->error, STATUS_UNSUPPORTED, "%s: %s: array of arrays; supported: arrays of numbers, bools, strings", reader->path,
                         reader->what);
    size_t start = reader->position, element = gguf_type_bytes(array->type);
    if (count > left(reader) / (element ? element : sizeof(uint64_t)))
        return broken(reader, "array with more elements than the file has room for:", count, "the file ends first");
    array->count = (size_t)count;
    array->bytes = reader->bytes + start;
    if (element) reader->position += (size_t)count * element;
    for (uint64_t i = 0; !element && i < count; i++) {
        struct gguf_string string;
        status = read_string(reader, GGUF_STRING_LENGTH_MAX, &string);
        if (status != STATUS_OK) return status;
    }
    array->length = reader->position - start;
    return STATUS_OK;
}

static enum status read_value(struct reader *reader, size_t index, size_t count, struct gguf_value *value) {
    char name[64];
    (void)snprintf(reader->what, sizeof reader->what, "key %zu of %zu", index + 1, count);
    enum status status = read_string(reader, GGUF_KEY_LENGTH_MAX, &value->key);
    if (status != STATUS_OK) return status;
    if (value->key.length == 0) return error_set(reader->error, STATUS_INVALID, "%s: %s has no name", reader->path, reader->what);
    (void)snprintf(reader->what, sizeof reader->what, "key %s", gguf_printable(value->key, name, sizeof name));
    status = read_type(reader, &value->type);
    if (status != STATUS_OK) return status;
    if (value->type == GGUF_STRING) return read_string(reader, GGUF_STRING_LENGTH_MAX, &value->text);
    if (value->type == GGUF_ARRAY) return read_array(reader, &value->array);
    status = read_bytes(reader, gguf_type_bytes(value->type), &value->bytes);
    if (status == STATUS_OK && value->type == GGUF_BOOL && *value->bytes > 1) return broken(reader, "bool of value", *value->bytes, "0 or 1");
    return status;
}

static int order_values(const void *a, const void *b) {
    return gguf_string_compare(((const struct gguf_value *)a)->key, ((const struct gguf_value *)b)->key);
}

static int order_tensors(const void *a, const void *b) {
    return gguf_string_compare((*(const struct gguf_tensor *const *)a)->name, (*(const struct gguf_tensor *const *)b)->name);
}

static enum status read_values(struct reader *reader, struct gguf *gguf, size_t count) {
    gguf->values = check_calloc(count ? count : 1, sizeof *gguf->values);
    gguf->n_values = count;
    for (size_t i = 0; i < count; i++) {
        enum status status = read_value(reader, i, count, &gguf->values[i]);
        if (status != STATUS_OK) return status;
    }
    qsort(gguf->values, count, sizeof *gguf->values, order_values);
    for (size_t i = 1; i < count; i++) {
        char name[64];
        if (gguf_string_compare(gguf->values[i - 1].key, gguf->values[i].key) == 0)
            return error_set(reader->error, STATUS_INVALID, "%s: key %s appears twice", gguf->path,
                             gguf_printable(gguf->values[i].key, name, sizeof name));
    }
    return STATUS_OK;
}

static enum status supported_type(struct reader *reader, uint32_t number, enum tensor_type *type) {
    if (number < FILE_TYPES && file_types[number].name && file_types[number].type >= 0) {
        *type = (enum tensor_type)file_types[number].type;
        return STATUS_OK;
    }
    char supported[160] = "";
    size_t used = 0;
    for (int i = 0; i < TENSOR_TYPES && used < sizeof supported; i++)
        used += (size_t)snprintf(supported + used, sizeof supported - used, "%s%s", i ? ", " : "", tensor_type_info((enum tensor_type)i)->name);
    if (number < FILE_TYPES && file_types[number].name)
        return error_set(reader->error, STATUS_UNSUPPORTED, "%s: %s has type %s; supported: %s", reader->path, reader->what, file_types[number].name,
                         supported);
    return error_set(reader->error, STATUS_UNSUPPORTED, "%s: %s has type number %" PRIu32 "; supported: %s", reader->path, reader->what, number,
                     supported);
}

/* Elements and bytes of a shape whose dims are still the file's words. */
static enum status measure_tensor(struct reader *reader, struct gguf_tensor *tensor) {
    const struct tensor_type_info *info = tensor_type_info(tensor->type);
    size_t elements = 1;
    for (uint32_t i = 0; i < tensor->n_dims; i++) {
        if (tensor->dims[i] == 0)
            return error_set(reader->error, STATUS_INVALID, "%s: %s: dimension %" PRIu32 " is 0", reader->path, reader->what, i);
        if (!size_mul(elements, tensor->dims[i], &elements))
            return error_set(reader->error, STATUS_INVALID, "%s: %s: the product of its dimensions overflows", reader->path, reader->what);
    }
    if (tensor->dims[0] % info->block_size != 0)
        return error_set(reader->error, STATUS_INVALID, "%s: %s: rows of %" PRIu64 " elements, not a multiple of %s's block of %" PRIu32,
                         reader->path, reader->what, tensor->dims[0], info->name, info->block_size);
    tensor->elements = elements;
    if (!size_mul(elements / info->block_size, info->block_bytes, &tensor->bytes))
        return error_set(reader->error, STATUS_INVALID, "%s: %s: its size in bytes overflows", reader->path, reader->what);
    return STATUS_OK;
}

/* Leaves the offset within the data section in *offset: where that begins is known only after the last info. */
static enum status read_tensor(struct reader *reader, size_t index, size_t count, struct gguf_tensor *tensor, uint64_t *offset) {
    char name[GGUF_TENSOR_NAME_MAX + 4];
    (void)snprintf(reader->what, sizeof reader->what, "tensor %zu of %zu", index + 1, count);
    enum status status = read_string(reader, GGUF_TENSOR_NAME_MAX, &tensor->name);
    if (status != STATUS_OK) return status;
    if (tensor->name.length == 0) return error_set(reader->error, STATUS_INVALID, "%s: %s has no name", reader->path, reader->what);
    (void)snprintf(reader->what, sizeof reader->what, "tensor %s", gguf_printable(tensor->name, name, sizeof name));
    status = read_number(reader, &tensor->n_dims, sizeof tensor->n_dims);
    if (status != STATUS_OK) return status;
    if (tensor->n_dims < 1 || tensor->n_dims > 4) return broken(reader, "dimensions:", tensor->n_dims, "supported: 1 to 4");
    for (uint32_t i = 0; i < 4; i++) tensor->dims[i] = 1;
    uint32_t type = 0;
    status = read_number(reader, tensor->dims, tensor->n_dims * sizeof *tensor->dims);
    if (status == STATUS_OK) status = read_number(reader, &type, sizeof type);
    if (status == STATUS_OK) status = read_number(reader, offset, sizeof *offset);
    if (status == STATUS_OK) status = supported_type(reader, type, &tensor->type);
    if (status == STATUS_OK) status = measure_tensor(reader, tensor);
    return status;
}

/* Turns the offset, kept in `bytes` until now, into an address inside the file. */
static enum status place_tensor(const struct gguf *gguf, size_t data_start, uint32_t alignment, uint64_t offset, struct gguf_tensor *tensor,
                                struct error *error) {
    char name[GGUF_TENSOR_NAME_MAX + 4];
    gguf_printable(tensor->name, name, sizeof name);
    if (offset % alignment != 0)
        return error_set(error, STATUS_INVALID, "%s: tensor %s: data offset %" PRIu64 " is not a multiple of the alignment %" PRIu32, gguf->path,
                         name, offset, alignment);
    size_t room = data_start <= gguf->length ? gguf->length - data_start : 0;
    if (offset > room || tensor->bytes > room - offset)
        return error_set(error, STATUS_INVALID,
                         "%s: tensor %s: %zu bytes at data offset %" PRIu64 ", but the file has %zu bytes of data (cut short?)", gguf->path, name,
                         tensor->bytes, offset, room);
    tensor->data = gguf->bytes + data_start + offset;
    return STATUS_OK;
}

static int order_data(const void *a, const void *b) {
    const uint8_t *first = (*(const struct gguf_tensor *const *)a)->data, *second = (*(const struct gguf_tensor *const *)b)->data;
    return (first > second) - (first < second);
}

/* Weights that share bytes would let a small file describe a model of any size. */
static enum status check_disjoint(struct gguf *gguf, struct error *error) {
    qsort(gguf->by_name, gguf->n_tensors, sizeof *gguf->by_name, order_data);
    for (size_t i = 1; i < gguf->n_tensors; i++) {
        const struct gguf_tensor *before = gguf->by_name[i - 1], *tensor = gguf->by_name[i];
        char name[GGUF_TENSOR_NAME_MAX + 4], other[GGUF_TENSOR_NAME_MAX + 4];
        if ((const uint8_t *)tensor->data - (const uint8_t *)before->data < (ptrdiff_t)before->bytes)
            return error_set(error, STATUS_INVALID, "%s: tensor %s: its data overlaps that of tensor %s", gguf->path,
                             gguf_printable(tensor->name, name, sizeof name), gguf_printable(before->name, other, sizeof other));
    }
    return STATUS_OK;
}

static enum status index_tensors(struct gguf *gguf, struct error *error) {
    gguf->by_name = check_calloc(gguf->n_tensors ? gguf->n_tensors : 1, sizeof *gguf->by_name);
    for (size_t i = 0; i < gguf->n_tensors; i++) gguf->by_name[i] = &gguf->tensors[i];
    enum status status = check_disjoint(gguf, error);
    if (status != STATUS_OK) return status;
    qsort(gguf->by_name, gguf->n_tensors, sizeof *gguf->by_name, order_tensors);
    for (size_t i = 1; i < gguf->n_tensors; i++) {
        char name[GGUF_TENSOR_NAME_MAX + 4];
        if (gguf_string_compare(gguf->by_name[i - 1]->name, gguf->by_name[i]->name) == 0)
            return error_set(error, STATUS_INVALID, "%s: tensor %s appears twice", gguf->path,
                             gguf_printable(gguf->by_name[i]->name, name, sizeof name));
    }
    return STATUS_OK;
}

static enum status read_tensors(struct reader *reader, struct gguf *gguf, size_t count) {
    uint32_t alignment = ALIGNMENT_DEFAULT;
    enum status status = gguf_get_u32(gguf, "general.alignment", GGUF_OPTIONAL, &alignment, reader->error);
    if (status != STATUS_OK) return status;
    if (alignment < 8 || alignment > GGUF_ALIGNMENT_MAX || (alignment & (alignment - 1)) != 0)
        return error_set(reader->error, STATUS_INVALID, "%s: key general.alignment is %" PRIu32 "; supported: powers of two from 8 to %u", gguf->path,
                         alignment, GGUF_ALIGNMENT_MAX);

    gguf->tensors = check_calloc(count ? count : 1, sizeof *gguf->tensors);
    gguf->n_tensors = count;
    uint64_t *offsets = check_calloc(count ? count : 1, sizeof *offsets);
    for (size_t i = 0; i < count && status == STATUS_OK; i++) status = read_tensor(reader, i, count, &gguf->tensors[i], &offsets[i]);
    /* position <= length <= SSIZE_MAX: rounding up cannot overflow. */
    size_t data_start = (reader->position + alignment - 1) & ~(size_t)(alignment - 1);
    for (size_t i = 0; i < count && status == STATUS_OK; i++)
        status = place_tensor(gguf, data_start, alignment, offsets[i], &gguf->tensors[i], reader->error);
    free(offsets);
    return status == STATUS_OK ? index_tensors(gguf, reader->error) : status;
}

static enum status check_version(struct reader *reader, uint32_t version) {
    if (version == 2 || version == 3) return STATUS_OK;
    uint32_t swapped = __builtin_bswap32(version);
    if (swapped >= 1 && swapped <= 65535 && version > 65535)
        return error_set(reader->error, STATUS_UNSUPPORTED, "%s: big-endian GGUF version %" PRIu32 "; supported: little-endian versions 2 and 3",
                         reader->path, swapped);
    return error_set(reader->error, STATUS_UNSUPPORTED, "%s: GGUF version %" PRIu32 "; supported: 2 and 3", reader->path, version);
}

static enum status bounded(const struct reader *reader, const char *what, uint64_t count, uint32_t limit, uint32_t bytes_min) {
    if (count > limit)
        return error_set(reader->error, STATUS_INVALID, "%s: header: %" PRIu64 " %s (at most %" PRIu32 ")", reader->path, count, what, limit);
    if (count > left(reader) / bytes_min)
        return error_set(reader->error, STATUS_INVALID, "%s: header: %" PRIu64 " %s do not fit into the %zu bytes that follow", reader->path, count,
                         what, left(reader));
    return STATUS_OK;
}

enum status gguf_read(struct gguf *gguf, struct error *error) {
    struct reader reader = {.path = gguf->path, .bytes = gguf->bytes, .length = gguf->length, .what = "header", .error = error};
    if (gguf->length < 4 || memcmp(gguf->bytes, "GGUF", 4) != 0)
        return error_set(error, STATUS_INVALID, "%s: not a GGUF file (it does not begin with \"GGUF\")", gguf->path);
    reader.position = 4;
    uint64_t n_tensors = 0, n_values = 0;
    enum status status = read_number(&reader, &gguf->version, sizeof gguf->version);
    if (status == STATUS_OK) status = check_version(&reader, gguf->version);
    if (status == STATUS_OK) status = read_number(&reader, &n_tensors, sizeof n_tensors);
    if (status == STATUS_OK) status = read_number(&reader, &n_values, sizeof n_values);
    if (status == STATUS_OK) status = bounded(&reader, "keys", n_values, GGUF_KEYS_MAX, KEY_BYTES_MIN);
    if (status == STATUS_OK) status = bounded(&reader, "tensors", n_tensors, GGUF_TENSORS_MAX, TENSOR_BYTES_MIN);
    if (status == STATUS_OK) status = read_values(&reader, gguf, (size_t)n_values);
    if (status == STATUS_OK) status = read_tensors(&reader, gguf, (size_t)n_tensors);
    return status;
}
