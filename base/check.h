/* CHECK(condition): a bug if it is false. On in every build: the process stops with file, line and words, and the supervisor starts a new one.
 * Never for input: a request, a model file or a config that can make a CHECK fail is a security bug. */
#pragma once

#include <stdbool.h>
#include <stddef.h>

void check_failed(const char *file, int line, const char *condition) __attribute__((noreturn));

#define CHECK(condition) (__builtin_expect(!!(condition), 1) ? (void)0 : check_failed(__FILE__, __LINE__, #condition))

/* Memory asked for at start or by the loop thread in sizes bounded by limits: if the system has none, the process stops (CHECK).
 * Zeroed. Sizes are checked for overflow. Free with free(). */
void *check_calloc(size_t count, size_t size) __attribute__((malloc, warn_unused_result));
void *check_realloc(void *memory, size_t count, size_t size) __attribute__((warn_unused_result));
char *check_strdup(const char *text) __attribute__((malloc, warn_unused_result));

/* Sizes from outside: overflow is an answer. true and *result on success. */
static inline bool size_mul(size_t a, size_t b, size_t *result) { return !__builtin_mul_overflow(a, b, result); }
static inline bool size_add(size_t a, size_t b, size_t *result) { return !__builtin_add_overflow(a, b, result); }
