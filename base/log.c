/* See log.h. Owns the process's log level, the one piece of global state: it changes on SIGHUP and is read everywhere. */
#include "base/log.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static _Atomic int level_now = LOG_LEVEL_INFO;

void log_set_level(enum log_level level) { atomic_store(&level_now, (int)level); }

void log_write(enum log_level level, const char *format, ...) {
    static const char *const names[] = {"error", "warn", "info", "debug"};
    static const char *const priorities[] = {"<3>", "<4>", "<6>", "<7>"};
    if ((int)level > atomic_load_explicit(&level_now, memory_order_relaxed)) return;
    char line[2048];
    size_t used = 0;
    int n;
    if (getenv("JOURNAL_STREAM")) { /* the journal has its own clock */
        n = snprintf(line, sizeof line, "%s%s ", priorities[level], names[level]);
    } else {
        struct timespec now;
        struct tm parts;
        clock_gettime(CLOCK_REALTIME, &now);
        gmtime_r(&now.tv_sec, &parts);
        n = snprintf(line, sizeof line, "%04d-%02d-%02dT%02d:%02d:%02d.%03dZ %-5s ", parts.tm_year + 1900, parts.tm_mon + 1, parts.tm_mday,
                     parts.tm_hour, parts.tm_min, parts.tm_sec, (int)(now.tv_nsec / 1000000), names[level]);
    }
    used = n > 0 ? (size_t)n : 0;
    va_list args;
    va_start(args, format);
    n = vsnprintf(line + used, sizeof line - used - 1, format, args);
    va_end(args);
    if (n > 0) used += (size_t)n;
    if (used > sizeof line - 2) used = sizeof line - 2;
    line[used++] = '\n';
    ssize_t ignored = write(STDERR_FILENO, line, used);
    (void)ignored;
}
