/* How much of what was written to a TCP socket has been taken by the peer's system. Loop thread. */
#pragma once

#include <stdint.h>

/* Bytes that the peer's system has acknowledged since the connection began, 0 where this one does not say. */
uint64_t socket_bytes_acked(int socket);
