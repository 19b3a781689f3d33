/* How much of what came on a TCP socket has been read from it, and of what was written to it has been taken by the peer's system; by whomever. Loop thread. */
#pragma once

#include <stdint.h>

/* Bytes read since the connection began; UINT64_MAX: the system does not say, or bytes come at this moment. The peer's end of the stream does not count. */
uint64_t socket_bytes_taken(int socket);
/* Bytes that the peer's system has acknowledged since the connection began, 0 where this one does not say. */
uint64_t socket_bytes_acked(int socket);
