/* See version.h. A file of its own, so that a new commit recompiles this alone (cmake/commit.cmake defines KVASIR_COMMIT for it). */
#include "cli/version.h"

const char *version_commit(void) { return KVASIR_COMMIT; }
