/* Which backends a test runs on: those that KVASIR_TEST_BACKENDS names ("cuda", "cpu,reference"; not set: all that compute), if this machine has what they need. Main thread of a test.
 *
 * A backend without a device is left out and said once; one that was asked for by name ends the program with TEST_SKIPPED, which ctest counts as skipped. A name that is none ends it too. */
#pragma once

#include <stdbool.h>

#include "kernels/backend.h"

enum { TEST_SKIPPED = 77 };

/* false for the mock unless it is named. */
bool test_runs_on(const struct backend_ops *ops);
bool test_runs_on_name(const char *name); /* false: not in this build */
/* Does it compute in a memory of its own, so that products depend on how many rows there are unless limits.deterministic? */
bool test_has_device(const struct backend_ops *ops);
