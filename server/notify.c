/* See notify.h. */
#include "server/notify.h"

#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

void notify_open(struct notify *notify) {
    const char *path = getenv("NOTIFY_SOCKET"), *usec = getenv("WATCHDOG_USEC"), *pid = getenv("WATCHDOG_PID");
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    *notify = (struct notify){.socket = -1};
    if (path && (path[0] == '/' || path[0] == '@') && path[1] && strlen(path) < sizeof address.sun_path) {
        memcpy(address.sun_path, path, strlen(path));
        if (path[0] == '@') address.sun_path[0] = '\0'; /* abstract */
        notify->socket = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        socklen_t length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(path));
        if (notify->socket >= 0 && connect(notify->socket, (struct sockaddr *)&address, length) != 0) {
            (void)close(notify->socket);
            notify->socket = -1;
        }
    }
    if (notify->socket >= 0 && usec && (!pid || strtol(pid, NULL, 10) == (long)getpid())) notify->watchdog_ns = strtoull(usec, NULL, 10) * 1000;
    (void)unsetenv("NOTIFY_SOCKET");
    (void)unsetenv("WATCHDOG_USEC");
    (void)unsetenv("WATCHDOG_PID");
}

void notify_close(struct notify *notify) {
    if (notify->socket >= 0) (void)close(notify->socket);
    notify->socket = -1;
}

void notify_send(const struct notify *notify, const char *format, ...) {
    char message[512];
    va_list args;
    if (notify->socket < 0) return;
    va_start(args, format);
    int length = vsnprintf(message, sizeof message, format, args);
    va_end(args);
    if (length <= 0) return;
    /* A manager that does not read loses messages; it is not worth waiting for. */
    (void)!send(notify->socket, message, (size_t)length < sizeof message ? (size_t)length : sizeof message - 1, MSG_NOSIGNAL);
}
