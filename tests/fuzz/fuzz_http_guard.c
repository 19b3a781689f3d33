/* The head of a request, any bytes: what the guards let pass has one reading. Rooms: server
 * Whatever guard_bytes accepts is read again here by a second, strict reader of our own, which must find at most one length, no length beside chunked, and only whole field names. */
#include <ctype.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <strings.h>

#include "base/buffer.h"
#include "base/check.h"
#include "server/guard.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static bool is_field(const char *line, size_t length, const char *name) {
    size_t n = strlen(name);
    return length > n && strncasecmp(line, name, n) == 0 && line[n] == ':';
}

/* Position behind the empty line, or 0: the head is not complete. */
static size_t head_end(const char *bytes, size_t length) {
    for (size_t i = 0; i < length; i++) {
        if (bytes[i] != '\n') continue;
        size_t next = i + 1;
        if (next < length && bytes[next] == '\r') next++;
        if (next < length && bytes[next] == '\n') return next + 1;
    }
    return 0;
}

static void check_accepted(const char *bytes, size_t end) {
    unsigned lengths = 0, encodings = 0, hosts = 0;
    size_t at = (size_t)((const char *)memchr(bytes, '\n', end) - bytes) + 1;
    while (at < end) {
        const char *line = bytes + at;
        size_t n = (size_t)((const char *)memchr(line, '\n', end - at) - line);
        at += n + 1;
        if (n && line[n - 1] == '\r') n--;
        if (n == 0) break;
        CHECK(!memchr(line, '\r', n) && !memchr(line, '\0', n));
        CHECK(line[0] != ' ' && line[0] != '\t' && memchr(line, ':', n));
        for (size_t i = 0; line[i] != ':'; i++) CHECK(isgraph((unsigned char)line[i]));
        lengths += is_field(line, n, "content-length");
        encodings += is_field(line, n, "transfer-encoding");
        hosts += is_field(line, n, "host");
    }
    CHECK(lengths + encodings <= 1 && hosts <= 1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const char *bytes = (const char *)data;
    size_t end = head_end(bytes, size);
    struct guard_refusal refusal;
    bool problem = guard_bytes(bytes ? bytes : "", size, &refusal);
    const char *first = memchr(bytes ? bytes : "", '\n', size);
    if (end && !problem) {
        size_t n = (size_t)(first - bytes);
        if (n && bytes[n - 1] == '\r') n--;
        bool request = n >= 9 && (memcmp(bytes + n - 9, " HTTP/1.1", 9) == 0 || memcmp(bytes + n - 9, " HTTP/1.0", 9) == 0);
        /* An empty line right behind the request line leaves no fields to look at. */
        if (request && first + 1 < bytes + end) check_accepted(bytes, end);
    }
    /* Nothing is said of what is not there yet, but that it is too much, that it is TLS, or that a whole line or field is wrong. */
    CHECK(!problem || first || refusal.status == 414 || bytes[0] == 0x16);
    bool of_fields = problem && strcmp(refusal.code, "bad_framing") == 0;
    CHECK(!of_fields || end || memchr(first + 1, '\n', size - (size_t)(first + 1 - bytes)));

    /* Hosts: the text up to the first zero byte. What is allowed is one of few names, whatever stands around it. */
    struct buffer host = {0};
    buffer_append(&host, bytes, size < 300 ? size : 300);
    buffer_append_byte(&host, '\0');
    if (guard_host_allowed(host.bytes, "bound.example", "one.example,[::2]")) {
        const char *text = host.bytes;
        CHECK(strncasecmp(text, "localhost", 9) == 0 || strncmp(text, "127.", 4) == 0 || strncmp(text, "[::1]", 5) == 0 ||
              strncasecmp(text, "bound.example", 13) == 0 || strncasecmp(text, "one.example", 11) == 0 || strncmp(text, "[::2]", 5) == 0);
        CHECK(!strchr(text, '@') && !strchr(text, '/') && !strchr(text, ' '));
    }
    (void)guard_origin_allowed(host.bytes, "bound.example", "");
    buffer_done(&host);
    return 0;
}
