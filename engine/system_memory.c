/* See system_memory.h. Owns nothing; any thread. Files that are not there or make no sense limit nothing. */
#include "engine/system_memory.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LINE = 4096, PATH = 4096 };

/* The digits that `text` begins with; `end`: what follows them. false: none, or more than fit. */
static bool parse_number(const char *text, uint64_t *number, char **end) {
    if (*text < '0' || *text > '9') return false;
    errno = 0;
    *number = strtoull(text, end, 10);
    return errno == 0;
}

/* "123" alone on the first line; "max" and everything else: false. */
static bool read_number(const char *path, uint64_t *number) {
    FILE *file = fopen(path, "re");
    if (!file) return false;
    char line[64];
    bool read = fgets(line, sizeof line, file) != NULL;
    (void)fclose(file);
    char *end;
    return read && parse_number(line, number, &end) && (*end == '\n' || *end == 0);
}

/* The number behind "key" at a line's start. */
static bool read_field(const char *path, const char *key, uint64_t *number) {
    FILE *file = fopen(path, "re");
    if (!file) return false;
    char line[LINE], *end;
    size_t length = strlen(key);
    bool found = false;
    while (!found && fgets(line, sizeof line, file))
        if (strncmp(line, key, length) == 0) found = parse_number(line + length + strspn(line + length, " \t"), number, &end);
    (void)fclose(file);
    return found;
}

struct hierarchy {
    const char *mount, *limit, *usage, *reclaimable;
};
static const struct hierarchy version2 = {"/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file "};
static const struct hierarchy version1 = {"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "};

static bool join(char *path, const char *root, const struct hierarchy *hierarchy, const char *group, const char *name) {
    int length = snprintf(path, PATH, "%s%s%s/%s", root, hierarchy->mount, group, name);
    return length > 0 && length < PATH;
}

/* What one group leaves. Pages of files that were not used lately are given back before the limit strikes. */
static uint64_t left_in_group(const char *root, const struct hierarchy *hierarchy, const char *group) {
    char path[PATH];
    uint64_t limit, usage, reclaimable;
    if (!join(path, root, hierarchy, group, hierarchy->limit) || !read_number(path, &limit)) return UINT64_MAX;
    if (!join(path, root, hierarchy, group, hierarchy->usage) || !read_number(path, &usage)) usage = 0;
    if (!join(path, root, hierarchy, group, "memory.stat") || !read_field(path, hierarchy->reclaimable, &reclaimable)) reclaimable = 0;
    usage -= reclaimable < usage ? reclaimable : usage;
    return limit > usage ? limit - usage : 0;
}

/* From the group itself up to the root of the mount. */
static uint64_t left_in_hierarchy(const char *root, const struct hierarchy *hierarchy, char *group) {
    uint64_t left = UINT64_MAX;
    for (;;) {
        size_t length = strlen(group);
        while (length > 0 && group[length - 1] == '/') group[--length] = 0;
        uint64_t here = left_in_group(root, hierarchy, group);
        if (here < left) left = here;
        char *slash = strrchr(group, '/');
        if (!slash) return left;
        *slash = 0;
    }
}

static bool names_memory(const char *controllers) {
    for (const char *at = controllers; *at;) {
        size_t length = strcspn(at, ",");
        if (length == 6 && strncmp(at, "memory", 6) == 0) return true;
        at += length + (at[length] == ',');
    }
    return false;
}

/* Lines "0::/path" (v2) and "4:cpu,memory:/path" (v1). */
static uint64_t left_in_groups(const char *root) {
    char path[PATH], line[LINE];
    int length = snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    if (length < 0 || length >= (int)sizeof path) return UINT64_MAX;
    FILE *file = fopen(path, "re");
    if (!file) return UINT64_MAX;
    uint64_t left = UINT64_MAX;
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        char *controllers = strchr(line, ':'), *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) continue;
        *group++ = 0;
        bool second = strcmp(line, "0:") == 0 && controllers[1] == 0;
        if (!second && !names_memory(controllers + 1)) continue;
        uint64_t here = left_in_hierarchy(root, second ? &version2 : &version1, group);
        if (here < left) left = here;
    }
    (void)fclose(file);
    return left;
}

uint64_t system_memory_available(const char *root) {
    char path[PATH];
    uint64_t kibibytes, left = left_in_groups(root);
    int length = snprintf(path, sizeof path, "%s/proc/meminfo", root);
    if (length < 0 || length >= (int)sizeof path || !read_field(path, "MemAvailable:", &kibibytes)) return left;
    uint64_t available = kibibytes > UINT64_MAX / 1024 ? UINT64_MAX : kibibytes * 1024;
    return available < left ? available : left;
}
