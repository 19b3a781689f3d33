/* SHA-256 (FIPS 180-4), for API keys and cache scopes: short inputs in one call. Pure; any thread. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define SHA256_BYTES 32

void sha256(const void *bytes, size_t length, uint8_t digest[SHA256_BYTES]);
