/* See keys.h. */
#include "server/keys.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/check.h"

#define KEY_FILE_BYTES_MAX (1u << 20)

void keys_done(struct keys *keys) {
    free(keys->keys);
    *keys = (struct keys){0};
}

static bool is_space(char c) { return c == ' ' || c == '\t' || c == '\r'; }

/* The whole file, terminated; the caller frees it. */
static enum status read_file(const char *path, char **text, size_t *length, struct error *error) {
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat info;
    if (file < 0) return error_set(error, STATUS_INVALID, "%s: %s", path, strerror(errno));
    if (fstat(file, &info) != 0 || !S_ISREG(info.st_mode) || info.st_size > KEY_FILE_BYTES_MAX) {
        (void)close(file);
        return error_set(error, STATUS_INVALID, "%s: not a regular file of at most 1 MiB", path);
    }
    char *bytes = check_calloc((size_t)info.st_size + 1, 1);
    size_t used = 0;
    while (used < (size_t)info.st_size) {
        ssize_t n = read(file, bytes + used, (size_t)info.st_size - used);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) {
            enum status status = error_set(error, STATUS_IO, "%s: %s", path, strerror(errno));
            (void)close(file);
            free(bytes);
            return status;
        }
        if (n == 0) break;
        used += (size_t)n;
    }
    (void)close(file);
    *text = bytes;
    *length = used;
    return STATUS_OK;
}

static uint32_t find_digest(const struct keys *keys, const uint8_t digest[SHA256_BYTES]) {
    for (uint32_t i = 0; i < keys->n_keys; i++)
        if (memcmp(keys->keys[i].digest, digest, SHA256_BYTES) == 0) return i;
    return KEY_NONE;
}

/* Into a free entry, or a new one. */
static void put_digest(struct keys *keys, const uint8_t digest[SHA256_BYTES]) {
    uint32_t i = 0;
    while (i < keys->n_keys && (keys->keys[i].valid || keys->keys[i].live)) i++;
    if (i == keys->capacity) {
        keys->capacity = keys->capacity ? keys->capacity * 2 : 16;
        keys->keys = check_realloc(keys->keys, keys->capacity, sizeof *keys->keys);
    }
    if (i == keys->n_keys) keys->n_keys++;
    keys->keys[i] = (struct key){.valid = true};
    memcpy(keys->keys[i].digest, digest, SHA256_BYTES);
}

/* Digests of the file's keys into `found`. */
static enum status parse(const char *path, const char *text, size_t length, struct keys *found, struct error *error) {
    unsigned line = 0;
    for (size_t at = 0; at < length;) {
        const char *end = memchr(text + at, '\n', length - at);
        const char *first = text + at, *last = end ? end : text + length;
        at = (size_t)(last - text) + 1;
        line++;
        while (first < last && is_space(*first)) first++;
        while (last > first && is_space(last[-1])) last--;
        if (first == last || *first == '#') continue;
        size_t n = (size_t)(last - first);
        if (n > KEY_BYTES_MAX) return error_set(error, STATUS_INVALID, "%s:%u: a key has at most %d bytes", path, line, KEY_BYTES_MAX);
        for (size_t i = 0; i < n; i++)
            if ((unsigned char)first[i] <= 0x20 || (unsigned char)first[i] >= 0x7f)
                return error_set(error, STATUS_INVALID, "%s:%u: a key consists of visible ASCII characters without spaces", path, line);
        if (found->n_keys == KEYS_MAX) return error_set(error, STATUS_INVALID, "%s: more than %d keys", path, KEYS_MAX);
        uint8_t digest[SHA256_BYTES];
        sha256(first, n, digest);
        if (find_digest(found, digest) == KEY_NONE) put_digest(found, digest);
    }
    if (found->n_keys == 0) return error_set(error, STATUS_INVALID, "%s: no key in it (one a line, # begins a comment)", path);
    return STATUS_OK;
}

enum status keys_load(struct keys *keys, const char *path, struct error *error) {
    struct keys found = {0};
    if (*path) {
        char *text = NULL;
        size_t length = 0;
        enum status status = read_file(path, &text, &length, error);
        if (status != STATUS_OK) return status;
        CHECK(text);
        status = parse(path, text, length, &found, error);
        explicit_bzero(text, length);
        free(text);
        if (status != STATUS_OK) {
            keys_done(&found);
            return status;
        }
    }
    /* Live requests hold an index: a key that is gone stays as an invalid entry until its entry is used again. First those that are still there, then the new ones. */
    for (uint32_t i = 0; i < keys->n_keys; i++) keys->keys[i].valid = find_digest(&found, keys->keys[i].digest) != KEY_NONE;
    for (uint32_t i = 0; i < found.n_keys; i++)
        if (find_digest(keys, found.keys[i].digest) == KEY_NONE) put_digest(keys, found.keys[i].digest);
    keys->required = *path != '\0';
    keys->n_valid = found.n_keys;
    keys_done(&found);
    return STATUS_OK;
}

uint32_t keys_find(const struct keys *keys, const char *key, size_t length) {
    uint8_t digest[SHA256_BYTES];
    uint32_t found = KEY_NONE;
    if (length > KEY_BYTES_MAX) return KEY_NONE;
    sha256(key, length, digest);
    for (uint32_t i = 0; i < keys->n_keys; i++) {
        uint8_t difference = keys->keys[i].valid ? 0 : 1;
        for (int j = 0; j < SHA256_BYTES; j++) difference |= (uint8_t)(keys->keys[i].digest[j] ^ digest[j]);
        uint32_t equal = (uint32_t)0 - (uint32_t)(difference == 0); /* all ones or zero */
        found = (found & ~equal) | (i & equal);
    }
    return found;
}

const char *keys_from_headers(const char *authorization, const char *x_api_key, size_t *length) {
    const char *key = NULL;
    if (authorization && strncasecmp(authorization, "Bearer ", 7) == 0) {
        key = authorization + 7;
        while (*key == ' ') key++;
    } else if (x_api_key) {
        key = x_api_key;
    }
    *length = key ? strlen(key) : 0;
    return *length ? key : NULL;
}
