#include "tests/host_device/execution_state.h"
void host_accesses_begin_block(void) {}
void host_access_shared(const void *, size_t, bool) {}
void host_access_atomic(const void *, size_t) {}
