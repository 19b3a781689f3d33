/* The API keys: only their SHA-256 digests are kept, and a caller's is compared with all of them in constant time. Also the count of live requests of each, which survives a reload.
 * Loop thread. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "server/sha256.h"

#define KEY_NONE UINT32_MAX
#define KEYS_MAX 4096
#define KEY_BYTES_MAX 256

struct key {
    uint8_t digest[SHA256_BYTES];
    bool valid;    /* in the file as last read; an old key stays while its requests live */
    uint32_t live; /* requests */
};

struct keys {
    bool required; /* a file was given: no request without a key */
    uint32_t n_keys, capacity, n_valid;
    struct key *keys;
};

void keys_done(struct keys *keys);
/* path "": none required. One key a line; spaces around it and lines that begin with # do not count. An empty file: STATUS_INVALID (it would lock out everybody, or nobody).
 * On failure `keys` is as it was. */
enum status keys_load(struct keys *keys, const char *path, struct error *error);
/* Index of a valid key, or KEY_NONE. Takes the same time whichever key it is. */
uint32_t keys_find(const struct keys *keys, const char *key, size_t length);
/* The key in the two forms clients send: "Bearer KEY" (Authorization) or bare (X-Api-Key); NULL: field absent. *length: the key's; NULL: none. */
const char *keys_from_headers(const char *authorization, const char *x_api_key, size_t *length);
