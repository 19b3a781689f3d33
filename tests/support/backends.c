/* See backends.h. */
#include "tests/support/backends.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"

static const char *wanted(void) {
    const char *names = getenv("KVASIR_TEST_BACKENDS");
    return names && *names ? names : NULL;
}

static bool is_named(const char *names, const char *name) {
    size_t length = strlen(name);
    for (const char *at = names; *at; at += strcspn(at, ","), at += *at == ',')
        if (strcspn(at, ",") == length && strncmp(at, name, length) == 0) return true;
    return false;
}

/* Once: every name is that of a backend in this build. */
static void check_names(void) {
    static bool checked;
    if (checked || !wanted()) return;
    checked = true;
    for (const char *at = wanted(); *at; at += strcspn(at, ","), at += *at == ',') {
        char name[32];
        (void)snprintf(name, sizeof name, "%.*s", (int)strcspn(at, ","), at);
        if (backend_find(name) && strcmp(name, "auto") != 0) continue;
        (void)fprintf(stderr, "KVASIR_TEST_BACKENDS: this build has no backend \"%s\"\n", name);
        exit(strcmp(name, "cuda") == 0 ? TEST_SKIPPED : 1);
    }
}

bool test_runs_on(const struct backend_ops *ops) {
    static const struct backend_ops *said;
    check_names();
    if (wanted() ? !is_named(wanted(), ops->name) : ops == &backend_mock) return false;
    struct error error;
    if (ops->memory(0, NULL, NULL, &error) == STATUS_OK) return true;
    if (said != ops) (void)fprintf(stderr, "not on this machine: %s (%s)\n", ops->name, error.text);
    said = ops;
    if (wanted()) exit(TEST_SKIPPED);
    return false;
}

bool test_runs_on_name(const char *name) {
    check_names();
    const struct backend_ops *ops = backend_find(name);
    return ops && test_runs_on(ops);
}

bool test_has_device(const struct backend_ops *ops) {
    uint64_t available, total;
    CHECK(ops->memory(0, &available, &total, NULL) == STATUS_OK);
    return total > 0;
}
