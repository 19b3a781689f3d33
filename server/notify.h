/* The service manager's protocol (sd_notify(3)): one datagram a message to NOTIFY_SOCKET. Without that variable every call does nothing. Loop thread. */
#pragma once

#include <stdint.h>

struct notify {
    int socket;           /* -1: nobody listens */
    uint64_t watchdog_ns; /* WATCHDOG_USEC; 0: no watchdog */
};

/* Reads and removes the variables from the environment, so that no child inherits them. */
void notify_open(struct notify *notify);
void notify_close(struct notify *notify);
/* "READY=1\nSTATUS=serving" */
void notify_send(const struct notify *notify, const char *format, ...) __attribute__((format(printf, 2, 3)));
