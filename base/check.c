/* See check.h. Owns nothing; any thread. */
#include "base/check.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

_Noreturn void check_failed(const char *file, int line, const char *condition) {
    (void)fprintf(stderr, "kvasir: bug: %s:%d: %s is false; stopping\n", file, line, condition);
    abort();
}

void *check_calloc(size_t count, size_t size) {
    void *memory = calloc(count ? count : 1, size ? size : 1);
    CHECK(memory);
    return memory;
}

void *check_realloc(void *memory, size_t count, size_t size) {
    size_t bytes;
    CHECK(size_mul(count, size, &bytes));
    void *larger = realloc(memory, bytes ? bytes : 1);
    CHECK(larger);
    return larger;
}

char *check_strdup(const char *text) {
    char *copy = strdup(text);
    CHECK(copy);
    return copy;
}
