/* How many compute threads are sensible: physical cores within the affinity mask, and no more than the cgroup's CPU quota pays for. Linux files only; what
 * cannot be read does not limit. */
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/workers.h"

/* true if `cpu` is the first of its core's hardware threads that are in the mask. */
static bool leads_its_core(int cpu, const cpu_set_t *mask) {
    char path[96], line[256];
    (void)snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
    FILE *file = fopen(path, "re");
    if (!file) return true;
    bool read = fgets(line, sizeof line, file) != NULL;
    (void)fclose(file);
    if (!read) return true;
    /* "0,8" or "0-1": siblings, ascending */
    for (char *at = line; *at >= '0' && *at <= '9';) {
        long first = strtol(at, &at, 10), last = first;
        if (*at == '-') last = strtol(at + 1, &at, 10);
        for (long i = first; i <= last && i < CPU_SETSIZE; i++)
            if (CPU_ISSET((size_t)i, mask)) return i == cpu;
        if (*at == ',') at++;
    }
    return true;
}

/* CPUs that a quota file pays for; 0: no limit found. v2: "max 100000" or "150000 100000"; v1: two files. */
static double read_quota(const char *path, const char *period_path) {
    FILE *file = fopen(path, "re");
    if (!file) return 0;
    double quota = 0, period = 0;
    int found = fscanf(file, "%lf %lf", &quota, &period);
    (void)fclose(file);
    if (period_path) {
        file = found >= 1 ? fopen(period_path, "re") : NULL;
        if (!file) return 0;
        found = fscanf(file, "%lf", &period) == 1 ? 2 : 0;
        (void)fclose(file);
    }
    return found == 2 && quota > 0 && period > 0 ? quota / period : 0;
}

/* The tightest quota of the process's cgroup and those above it. */
static double cgroup_cpus(void) {
    double least = 0;
    char line[1024], path[1200];
    FILE *file = fopen("/proc/self/cgroup", "re");
    if (!file) return 0;
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        if (strncmp(line, "0::", 3) != 0) continue;
        for (char *group = line + 3;;) {
            (void)snprintf(path, sizeof path, "/sys/fs/cgroup%s/cpu.max", strcmp(group, "/") == 0 ? "" : group);
            double cpus = read_quota(path, NULL);
            if (cpus > 0 && (least == 0 || cpus < least)) least = cpus;
            char *slash = strrchr(group, '/');
            if (!slash) break;
            *slash = 0;
        }
    }
    (void)fclose(file);
    double old = read_quota("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us");
    return old > 0 && (least == 0 || old < least) ? old : least;
}

uint32_t workers_default_count(void) {
    cpu_set_t mask;
    uint32_t cores = 0;
    if (sched_getaffinity(0, sizeof mask, &mask) == 0)
        for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
            if (CPU_ISSET((size_t)cpu, &mask) && leads_its_core(cpu, &mask)) cores++;
    double quota = cgroup_cpus();
    /* A fraction of a CPU more is not a thread more: it would be throttled while the others wait for it. */
    if (quota > 0 && quota < cores) cores = (uint32_t)quota;
    return cores < 1 ? 1 : cores > WORKERS_MAX ? WORKERS_MAX : cores;
}
