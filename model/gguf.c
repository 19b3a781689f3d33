/* Opening a GGUF file, and looking things up in one that has been read (gguf_parse.c does the reading and all checks of form).
 * Owns the mapping and the tables over it. Any thread after gguf_open. Judges no value: that a hyper-parameter makes sense is for architecture.c. */
#include "model/gguf.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/check.h"
#include "model/gguf_internal.h"

/* clang-format off */
static const struct { const char *name; size_t bytes; } types[GGUF_TYPES] = {
    [GGUF_U8]     = {"u8", 1},     [GGUF_I8]    = {"i8", 1},    [GGUF_U16] = {"u16", 2}, [GGUF_I16] = {"i16", 2},
    [GGUF_U32]    = {"u32", 4},    [GGUF_I32]   = {"i32", 4},   [GGUF_F32] = {"f32", 4}, [GGUF_BOOL] = {"bool", 1},
    [GGUF_STRING] = {"string", 0}, [GGUF_ARRAY] = {"array", 0},
    [GGUF_U64]    = {"u64", 8},    [GGUF_I64]   = {"i64", 8},   [GGUF_F64] = {"f64", 8},
};
/* clang-format on */

const char *gguf_type_name(enum gguf_type type) { return (unsigned)type < GGUF_TYPES ? types[type].name : "unknown"; }
size_t gguf_type_bytes(enum gguf_type type) { return types[type].bytes; }

static enum status open_file(struct gguf *gguf, int file, struct error *error) {
    struct stat info;
    if (fstat(file, &info) != 0) return error_set(error, STATUS_IO, "%s: %s", gguf->path, strerror(errno));
    if (!S_ISREG(info.st_mode)) return error_set(error, STATUS_INVALID, "%s: not a regular file", gguf->path);
    if (info.st_size <= 0) return error_set(error, STATUS_INVALID, "%s: the file is empty", gguf->path);
    gguf->length = (size_t)info.st_size;
    void *mapping = mmap(NULL, gguf->length, PROT_READ, MAP_SHARED, file, 0);
    if (mapping == MAP_FAILED) return error_set(error, STATUS_IO, "%s: cannot map %zu bytes: %s", gguf->path, gguf->length, strerror(errno));
    gguf->mapping = mapping;
    gguf->bytes = mapping;
    return gguf_read(gguf, error);
}

enum status gguf_open(const char *path, struct gguf **result, struct error *error) {
    /* O_NONBLOCK: opening a FIFO must not wait for its writer; a regular file does not mind. */
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0) return error_set(error, STATUS_IO, "%s: %s", path, strerror(errno));
    struct gguf *gguf = check_calloc(1, sizeof *gguf);
    gguf->path = check_strdup(path);
    enum status status = open_file(gguf, file, error);
    (void)close(file);
    if (status != STATUS_OK) {
        gguf_close(gguf);
        return status;
    }
    *result = gguf;
    return STATUS_OK;
}

enum status gguf_parse(const void *bytes, size_t length, const char *path, struct gguf **result, struct error *error) {
    struct gguf *gguf = check_calloc(1, sizeof *gguf);
    gguf->path = check_strdup(path);
    gguf->bytes = bytes;
    gguf->length = length;
    enum status status = gguf_read(gguf, error);
    if (status != STATUS_OK) {
        gguf_close(gguf);
        return status;
    }
    *result = gguf;
    return STATUS_OK;
}

void gguf_close(struct gguf *gguf) {
    if (!gguf) return;
    if (gguf->mapping) (void)munmap(gguf->mapping, gguf->length);
    free(gguf->values);
    free(gguf->tensors);
    free(gguf->by_name);
    free(gguf->path);
    free(gguf);
}

const char *gguf_path(const struct gguf *gguf) { return gguf->path; }
uint32_t gguf_version(const struct gguf *gguf) { return gguf->version; }
size_t gguf_file_bytes(const struct gguf *gguf) { return gguf->length; }
size_t gguf_tensor_count(const struct gguf *gguf) { return gguf->n_tensors; }

const struct gguf_tensor *gguf_tensor_at(const struct gguf *gguf, size_t index) {
    CHECK(index < gguf->n_tensors);
    return &gguf->tensors[index];
}

int gguf_string_compare(struct gguf_string a, struct gguf_string b) {
    size_t shared = a.length < b.length ? a.length : b.length;
    int order = shared ? memcmp(a.bytes, b.bytes, shared) : 0;
    if (order != 0) return order;
    return (a.length > b.length) - (a.length < b.length);
}

static struct gguf_string string_of(const char *text) { return (struct gguf_string){text, strlen(text)}; }

bool gguf_string_equals(struct gguf_string string, const char *text) { return gguf_string_compare(string, string_of(text)) == 0; }

static int compare_name(const void *key, const void *entry) {
    return gguf_string_compare(*(const struct gguf_string *)key, (*(const struct gguf_tensor *const *)entry)->name);
}

const struct gguf_tensor *gguf_tensor_find(const struct gguf *gguf, const char *name) {
    if (gguf->n_tensors == 0) return NULL;
    struct gguf_string key = string_of(name);
    const struct gguf_tensor *const *found = bsearch(&key, gguf->by_name, gguf->n_tensors, sizeof *gguf->by_name, compare_name);
    return found ? *found : NULL;
}

static int compare_key(const void *key, const void *entry) {
    return gguf_string_compare(*(const struct gguf_string *)key, ((const struct gguf_value *)entry)->key);
}

static const struct gguf_value *find_value(const struct gguf *gguf, const char *name) {
    if (gguf->n_values == 0) return NULL;
    struct gguf_string key = string_of(name);
    return bsearch(&key, gguf->values, gguf->n_values, sizeof *gguf->values, compare_key);
}

bool gguf_has(const struct gguf *gguf, const char *key) { return find_value(gguf, key) != NULL; }

/* *value is NULL when an optional key is absent. */
static enum status get_value(const struct gguf *gguf, const char *key, enum gguf_presence presence, enum gguf_type type,
                             const struct gguf_value **value, struct error *error) {
    *value = find_value(gguf, key);
    if (!*value) {
        if (presence == GGUF_OPTIONAL) return STATUS_OK;
        return error_set(error, STATUS_INVALID, "%s: key %s is missing", gguf->path, key);
    }
    if ((*value)->type == type) return STATUS_OK;
    return error_set(error, STATUS_INVALID, "%s: key %s has type %s, expected %s", gguf->path, key, gguf_type_name((*value)->type),
                     gguf_type_name(type));
}

static enum status get_scalar(const struct gguf *gguf, const char *key, enum gguf_presence presence, enum gguf_type type, void *destination,
                              size_t size, struct error *error) {
    const struct gguf_value *value;
    enum status status = get_value(gguf, key, presence, type, &value, error);
    if (status == STATUS_OK && value) memcpy(destination, value->bytes, size);
    return status;
}

enum status gguf_get_bool(const struct gguf *gguf, const char *key, enum gguf_presence presence, bool *result, struct error *error) {
    const struct gguf_value *value;
    enum status status = get_value(gguf, key, presence, GGUF_BOOL, &value, error);
    if (status == STATUS_OK && value) *result = *value->bytes != 0;
    return status;
}

enum status gguf_get_u16(const struct gguf *gguf, const char *key, enum gguf_presence presence, uint16_t *value, struct error *error) {
    return get_scalar(gguf, key, presence, GGUF_U16, value, sizeof *value, error);
}

enum status gguf_get_u32(const struct gguf *gguf, const char *key, enum gguf_presence presence, uint32_t *value, struct error *error) {
    return get_scalar(gguf, key, presence, GGUF_U32, value, sizeof *value, error);
}

enum status gguf_get_i32(const struct gguf *gguf, const char *key, enum gguf_presence presence, int32_t *value, struct error *error) {
    return get_scalar(gguf, key, presence, GGUF_I32, value, sizeof *value, error);
}

enum status gguf_get_u64(const struct gguf *gguf, const char *key, enum gguf_presence presence, uint64_t *value, struct error *error) {
    return get_scalar(gguf, key, presence, GGUF_U64, value, sizeof *value, error);
}

enum status gguf_get_f32(const struct gguf *gguf, const char *key, enum gguf_presence presence, float *value, struct error *error) {
    return get_scalar(gguf, key, presence, GGUF_F32, value, sizeof *value, error);
}

enum status gguf_get_string(const struct gguf *gguf, const char *key, enum gguf_presence presence, struct gguf_string *result, struct error *error) {
    const struct gguf_value *value;
    enum status status = get_value(gguf, key, presence, GGUF_STRING, &value, error);
    if (status == STATUS_OK && value) *result = value->text;
    return status;
}

enum status gguf_get_array(const struct gguf *gguf, const char *key, enum gguf_presence presence, enum gguf_type element, struct gguf_array *result,
                           struct error *error) {
    const struct gguf_value *value;
    enum status status = get_value(gguf, key, presence, GGUF_ARRAY, &value, error);
    if (status != STATUS_OK || !value) return status;
    if (value->array.type != element)
        return error_set(error, STATUS_INVALID, "%s: key %s has type array of %s, expected array of %s", gguf->path, key,
                         gguf_type_name(value->array.type), gguf_type_name(element));
    *result = value->array;
    return STATUS_OK;
}

static void array_read(const struct gguf_array *array, enum gguf_type type, size_t index, void *destination) {
    CHECK(array->type == type && index < array->count);
    memcpy(destination, array->bytes + index * types[type].bytes, types[type].bytes);
}

uint32_t gguf_array_u32(const struct gguf_array *array, size_t index) {
    uint32_t value;
    array_read(array, GGUF_U32, index, &value);
    return value;
}

int32_t gguf_array_i32(const struct gguf_array *array, size_t index) {
    int32_t value;
    array_read(array, GGUF_I32, index, &value);
    return value;
}

float gguf_array_f32(const struct gguf_array *array, size_t index) {
    float value;
    array_read(array, GGUF_F32, index, &value);
    return value;
}

struct gguf_strings gguf_strings_begin(const struct gguf_array *array) {
    CHECK(array->type == GGUF_STRING || array->count == 0);
    return (struct gguf_strings){array->bytes, array->count};
}

bool gguf_strings_next(struct gguf_strings *cursor, struct gguf_string *string) {
    if (cursor->left == 0) return false;
    uint64_t length; /* gguf_read has walked the array: what it says is inside the file */
    memcpy(&length, cursor->next, sizeof length);
    *string = (struct gguf_string){(const char *)cursor->next + sizeof length, (size_t)length};
    cursor->next += sizeof length + (size_t)length;
    cursor->left--;
    return true;
}

const char *gguf_printable(struct gguf_string string, char *out, size_t size) {
    CHECK(size >= 4);
    bool cut = string.length > size - 1;
    size_t shown = cut ? size - 4 : string.length;
    for (size_t i = 0; i < shown; i++) out[i] = string.bytes[i] >= 0x20 && string.bytes[i] < 0x7f ? string.bytes[i] : '?';
    memcpy(out + shown, cut ? "..." : "", cut ? 4 : 1);
    return out;
}
