/* A choice from its beginning to its lanes, for tests that want nothing else meanwhile. */
#pragma once

#include "policies/choose.h"

static inline void choose_all(const struct choose_request *request, struct backend *backend, uint32_t place, struct choose_lane *lanes, void *scratch) {
    struct chooser *chooser = choose_begin(request, backend, place, lanes, scratch);
    while (chooser) {
        backend->ops->settle(backend);
        if (!choose_go_on(chooser)) chooser = NULL;
    }
}
