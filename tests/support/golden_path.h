/* Where golden data lie: in tests/golden/ of the source tree, or, where the tests run far from it, in the folder that KVASIR_TEST_GOLDEN names. */
#pragma once

#include <stdio.h>
#include <stdlib.h>

#define GOLDEN_PATH_MAX 1024

/* The file's path, written to `path`: golden_path("tiny/logits.txt", path). */
static inline const char *golden_path(const char *name, char path[GOLDEN_PATH_MAX]) {
    const char *folder = getenv("KVASIR_TEST_GOLDEN");
    (void)snprintf(path, GOLDEN_PATH_MAX, "%s/%s", folder && *folder ? folder : KVASIR_SOURCE_DIR "/tests/golden", name);
    return path;
}
