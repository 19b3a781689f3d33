/* Linked into every test program: CMOCKA_TEST_FILTER='name*' runs the tests of that name alone. Debian's cmocka has the filter, but no name in the
 * environment for it. Runs before main. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

__attribute__((constructor)) static void filter_from_environment(void) {
    const char *pattern = getenv("CMOCKA_TEST_FILTER");
    if (pattern && *pattern) cmocka_set_test_filter(pattern);
}
