/* How much memory this process may still take: what the system has free, and what the limits of its control groups (v2 and v1, at every level up to the root) leave. */
#pragma once

#include <stdint.h>

/* Bytes; UINT64_MAX if nothing is known. Everything is read below `root` ("" for the real system; tests bring a tree of their own: root/proc/meminfo,
 * root/proc/self/cgroup, root/sys/fs/cgroup/...). */
uint64_t system_memory_available(const char *root);
