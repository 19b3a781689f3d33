/* How much of what came on a TCP socket has been read from it, by whomever. Loop thread. */
#pragma once

#include <stdint.h>

/* Bytes read since the connection began; UINT64_MAX: the system does not say, or bytes come at this moment. The peer's end of the stream does not count. */
uint64_t socket_bytes_taken(int socket);
