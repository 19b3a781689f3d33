/* UTF-8 as the Unicode standard has it (table 3-7): no overlong forms, no surrogates, nothing above U+10FFFF. Pure functions, any thread. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define UTF8_INVALID 0
#define UTF8_PARTIAL (-1)

/* The length of the character at `bytes` (1..4); UTF8_PARTIAL: all `left` bytes begin a valid character that is longer; UTF8_INVALID: bytes[0] can never be
 * part of one that starts here. left > 0. */
static inline int utf8_character(const char *bytes, size_t left) {
    uint8_t first = (uint8_t)bytes[0];
    if (first < 0x80) return 1;
    if (first < 0xc2 || first > 0xf4) return UTF8_INVALID;
    int length = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
    for (int i = 1; i < length; i++) {
        if ((size_t)i >= left) return UTF8_PARTIAL;
        uint8_t low = 0x80, high = 0xbf, byte = (uint8_t)bytes[i];
        if (i == 1 && first == 0xe0) low = 0xa0;
        if (i == 1 && first == 0xed) high = 0x9f;
        if (i == 1 && first == 0xf0) low = 0x90;
        if (i == 1 && first == 0xf4) high = 0x8f;
        if (byte < low || byte > high) return UTF8_INVALID;
    }
    return length;
}

/* Bytes at the start of `text` that are whole valid characters. */
static inline size_t utf8_valid_run(const char *text, size_t length) {
    size_t run = 0;
    while (run < length) {
        int character = utf8_character(text + run, length - run);
        if (character <= 0) break;
        run += (size_t)character;
    }
    return run;
}
