/* A block's dynamic shared memory as instructions address it, copies on their way to it, and what lanes of a warp exchange (execution.h, intrinsics.h). */
#include "tests/host_device/execution_state.h"

void *host_dynamic_shared(void) { return host_running.thread->block->dynamic; }

uint32_t host_shared_address(const void *at) {
    const uintptr_t offset = (uintptr_t)at - (uintptr_t)host_running.thread->block->dynamic;
    if (offset > host_running.call->shared_bytes) host_fail("takes the 32-bit address of what is not in the block's dynamic shared memory");
    return SHARED_WINDOW + (uint32_t)offset;
}

void *host_shared_at(uint32_t address, uint32_t bytes, const char *what) {
    const size_t all = host_running.call->shared_bytes;
    if (address < SHARED_WINDOW || address - SHARED_WINDOW + (size_t)bytes > all)
        host_fail("%s at byte %lld of %zu of dynamic shared memory", what, (long long)address - SHARED_WINDOW, all);
    if (address % bytes != 0)
        host_fail("%s at byte %u of dynamic shared memory, which is not a multiple of %u", what, address - SHARED_WINDOW, bytes);
    return host_running.thread->block->dynamic + (address - SHARED_WINDOW);
}

/* ---- copies ---- */

void host_copy_ask(uint32_t to, const void *from, uint32_t bytes, uint32_t take) {
    struct host_thread *t = host_running.thread;
    uint8_t *at = (uint8_t *)host_shared_at(to, bytes, "a copy");
    if (take > bytes) host_fail("a copy of %u bytes, of which %u are read", bytes, take);
    if ((uintptr_t)from % bytes != 0) host_fail("a copy of %u bytes from an address that is not a multiple of it", bytes);
    if (take > 0 && host_device_bytes_from(from) < take) host_fail("a copy of %u bytes from outside of device memory", take);
    host_access_shared(at, bytes, true);
    memset(at, 0xff, bytes); /* until it is waited for: NaN in every type of float */
    t->copies.push_back({at, (const uint8_t *)from, bytes, take, t->groups});
}

void host_copy_commit(void) { host_running.thread->groups++; }

void host_copy_wait(uint32_t pending) {
    struct host_thread *t = host_running.thread;
    size_t left = 0;
    for (size_t i = 0; i < t->copies.size(); i++) {
        const struct host_copy copy = t->copies[i];
        if (copy.group + pending >= t->groups) {
            t->copies[left++] = copy;
            continue;
        }
        host_access_shared(copy.to, copy.bytes, true);
        memcpy(copy.to, copy.from, copy.take);
        memset(copy.to + copy.take, 0, copy.bytes - copy.take);
    }
    t->copies.resize(left);
}

/* ---- exchanges ---- */

void host_shuffle(void *const operands[32], uint32_t mask) {
    for (uint32_t lane = 0; lane < 32; lane++) {
        struct host_exchange *to = (struct host_exchange *)operands[lane];
        if (!to) continue;
        if (!(mask >> to->source & 1)) host_fail("a shuffle with mask %08x: lane %u wants the value of lane %u", mask, lane, to->source);
        to->result = ((const struct host_exchange *)operands[to->source])->value;
    }
}

/* Calls of f(lane, its exchange). */
template <class F> static void each(void *const operands[32], F f) {
    for (uint32_t lane = 0; lane < 32; lane++)
        if (operands[lane]) f(lane, (struct host_exchange *)operands[lane]);
}

void host_ballot(void *const operands[32], uint32_t) {
    uint32_t votes = 0;
    each(operands, [&](uint32_t lane, struct host_exchange *e) { votes |= (uint32_t)e->value << lane; });
    each(operands, [&](uint32_t, struct host_exchange *e) { e->result = votes; });
}
void host_match_any(void *const operands[32], uint32_t) {
    each(operands, [&](uint32_t, struct host_exchange *mine) {
        each(operands, [&](uint32_t lane, struct host_exchange *e) { mine->result |= (uint64_t)(e->value == mine->value) << lane; });
    });
}
void host_reduce_max(void *const operands[32], uint32_t) {
    uint64_t most = 0;
    each(operands, [&](uint32_t, struct host_exchange *e) { most = e->value > most ? e->value : most; });
    each(operands, [&](uint32_t, struct host_exchange *e) { e->result = most; });
}
void host_reduce_add(void *const operands[32], uint32_t) {
    uint64_t sum = 0;
    each(operands, [&](uint32_t, struct host_exchange *e) { sum += e->value; });
    each(operands, [&](uint32_t, struct host_exchange *e) { e->result = sum; });
}
void host_no_exchange(void *const *, uint32_t) {}

/* ---- atomics ---- */

unsigned host_atomic(unsigned *at, unsigned value, int what) {
    host_access_atomic(at, sizeof *at);
    const unsigned before = *at;
    switch (what) {
    case HOST_ATOMIC_ADD: *at = before + value; break;
    case HOST_ATOMIC_MIN: *at = min(before, value); break;
    case HOST_ATOMIC_MAX: *at = max(before, value); break;
    case HOST_ATOMIC_OR: *at = before | value; break;
    default: *at = value;
    }
    return before;
}

unsigned long long host_atomic_add(unsigned long long *at, unsigned long long value) {
    host_access_atomic(at, sizeof *at);
    const unsigned long long before = *at;
    *at = before + value;
    return before;
}
