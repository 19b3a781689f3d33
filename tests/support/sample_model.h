/* Where tests find the sample model. A test that needs it fails without it, with a line that says what to do. */
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* KVASIR_TEST_MODEL, else ${XDG_CACHE_HOME:-~/.cache}/kvasir/SmolLM2-135M-Instruct.Q4_1.gguf; NULL, after a line on stderr, if there is no such file. */
static inline const char *sample_model_path(char *path, size_t size) {
    const char *named = getenv("KVASIR_TEST_MODEL"), *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    if (named && *named)
        (void)snprintf(path, size, "%s", named);
    else if (cache && *cache)
        (void)snprintf(path, size, "%s/kvasir/SmolLM2-135M-Instruct.Q4_1.gguf", cache);
    else
        (void)snprintf(path, size, "%s/.cache/kvasir/SmolLM2-135M-Instruct.Q4_1.gguf", home ? home : "");
    if (access(path, R_OK) == 0) return path;
    (void)fprintf(stderr, "the sample model is not at %s: run tests/run, which fetches it, or set KVASIR_TEST_MODEL\n", path);
    return NULL;
}
