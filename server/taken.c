/* See taken.h. Owns nothing. A file of its own because <linux/tcp.h>, whose tcp_info alone counts bytes, and <netinet/tcp.h>, which others include, define the same names. */
#include "server/taken.h"

#include <linux/tcp.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#define STATE_CLOSE_WAIT 8 /* TCP_CLOSE_WAIT of <netinet/tcp.h>: the peer has ended its side */

/* Fields up to tcpi_bytes_received, the later of those that are looked at. */
static bool tcp_info_of(int socket, struct tcp_info *info) {
    socklen_t size = sizeof *info;
    memset(info, 0, sizeof *info);
    return getsockopt(socket, IPPROTO_TCP, TCP_INFO, info, &size) == 0 && size >= offsetof(struct tcp_info, tcpi_bytes_received) + sizeof info->tcpi_bytes_received;
}

static uint64_t bytes_received(int socket) {
    struct tcp_info info;
    if (!tcp_info_of(socket, &info)) return UINT64_MAX;
    return info.tcpi_bytes_received - (info.tcpi_state == STATE_CLOSE_WAIT && info.tcpi_bytes_received > 0); /* the end counts as a byte */
}

/* Received less unread, of one moment: what was received must be the same before and after the look at what is unread. */
uint64_t socket_bytes_taken(int socket) {
    int unread = 0;
    uint64_t received = bytes_received(socket);
    if (received == UINT64_MAX || ioctl(socket, FIONREAD, &unread) != 0 || unread < 0) return UINT64_MAX;
    return bytes_received(socket) == received && received >= (uint64_t)unread ? received - (uint64_t)unread : UINT64_MAX;
}

uint64_t socket_bytes_acked(int socket) {
    struct tcp_info info;
    return tcp_info_of(socket, &info) ? info.tcpi_bytes_acked : 0;
}
