/* See guard.h. Owns nothing. */
#include "server/guard.h"

#include <ctype.h>
#include <string.h>
#include <strings.h>

/* RFC 9110 5.6.2: the characters of a field name. */
static bool is_token(const char *text, size_t length) {
    if (length == 0) return false;
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)text[i];
        if (!(isalnum(c) || (c && strchr("!#$%&'*+-.^_`|~", c)))) return false;
    }
    return true;
}

static bool is(const char *name, size_t length, const char *wanted) { return length == strlen(wanted) && strncasecmp(name, wanted, length) == 0; }

void guard_field(struct guard *guard, const char *name, size_t name_length, const char *value, size_t value_length) {
    const char *problem = NULL;
    if (!is_token(name, name_length)) problem = "a header field's name is malformed";
    for (size_t i = 0; i < value_length && !problem; i++)
        if ((unsigned char)value[i] < 0x20 && value[i] != '\t') problem = "a header field's value has a control character";
    if (is(name, name_length, "Content-Length")) {
        guard->content_lengths++;
        if (value_length == 0 || value_length > 19) problem = "Content-Length is malformed";
        guard->content_length = 0;
        for (size_t i = 0; i < value_length && !problem; i++) {
            if (value[i] < '0' || value[i] > '9') problem = "Content-Length is malformed";
            guard->content_length = guard->content_length * 10 + (unsigned)(value[i] - '0');
        }
    } else if (is(name, name_length, "Transfer-Encoding")) {
        guard->transfer_encodings++;
        if (!is(value ? value : "", value_length, "chunked")) problem = "Transfer-Encoding must be chunked";
    } else if (is(name, name_length, "Host")) {
        guard->hosts++;
    } else if (is(name, name_length, "Content-Encoding")) {
        guard->encoded |= value_length > 0 && !is(value, value_length, "identity");
    }
    if (problem && !guard->problem) guard->problem = problem;
}

const char *guard_verdict(const struct guard *guard, bool http_1_1) {
    if (guard->problem) return guard->problem;
    if (guard->content_lengths > 1) return "more than one Content-Length";
    if (guard->transfer_encodings > 1) return "more than one Transfer-Encoding";
    if (guard->content_lengths && guard->transfer_encodings) return "both Content-Length and Transfer-Encoding";
    if (guard->transfer_encodings && !http_1_1) return "Transfer-Encoding needs HTTP/1.1";
    if (guard->hosts > 1) return "more than one Host";
    if (guard->hosts == 0 && http_1_1) return "Host is missing";
    return NULL;
}

/* The line at *at without its end, moving on; false: no line end in what is there. */
static bool next_line(const char *bytes, size_t length, size_t *at, const char **line, size_t *line_length) {
    const char *end = memchr(bytes + *at, '\n', length - *at);
    if (!end) return false;
    *line = bytes + *at;
    *line_length = (size_t)(end - *line);
    *at += *line_length + 1;
    if (*line_length && (*line)[*line_length - 1] == '\r') (*line_length)--;
    return true;
}

static bool ends_with(const char *line, size_t length, const char *end) {
    return length >= strlen(end) && memcmp(line + length - strlen(end), end, strlen(end)) == 0;
}

static void head_field(struct guard *guard, const char *line, size_t length) {
    const char *colon = memchr(line, ':', length);
    if (line[0] == ' ' || line[0] == '\t' || !colon) {
        if (!guard->problem) guard->problem = colon ? "a header field is folded" : "a header field has no colon";
        return;
    }
    const char *value = colon + 1, *end = line + length;
    while (value < end && (*value == ' ' || *value == '\t')) value++;
    while (end > value && (end[-1] == ' ' || end[-1] == '\t')) end--;
    guard_field(guard, line, (size_t)(colon - line), value, (size_t)(end - value));
}

/* true: a request line and all fields, *at behind them. */
static bool read_head(const char *bytes, size_t length, struct guard *guard, bool *is_request, bool *http_1_1, size_t *at) {
    const char *line;
    size_t n;
    *at = 0;
    *is_request = false;
    if (!next_line(bytes, length, at, &line, &n)) return false;
    *http_1_1 = ends_with(line, n, " HTTP/1.1");
    *is_request = *http_1_1 || ends_with(line, n, " HTTP/1.0");
    if (!*is_request) return false;
    while (next_line(bytes, length, at, &line, &n)) {
        if (n == 0) return true;
        head_field(guard, line, n);
    }
    return false;
}

const char *guard_head(const char *bytes, size_t length) {
    struct guard guard = {0};
    bool is_request, http_1_1;
    size_t at;
    return read_head(bytes, length, &guard, &is_request, &http_1_1, &at) ? guard_verdict(&guard, http_1_1) : NULL;
}

bool guard_cut_short(const char *bytes, size_t length) {
    struct guard guard = {0};
    bool is_request, http_1_1;
    size_t at;
    if (!read_head(bytes, length, &guard, &is_request, &http_1_1, &at)) return is_request;
    if (guard.transfer_encodings) return !ends_with(bytes + at, length - at, "\r\n\r\n");
    return length - at < guard.content_length;
}

/* The name in "name:port": brackets stay. false: malformed. */
static bool host_name(const char *host, const char **name, size_t *length) {
    const char *end = host[0] == '[' ? strchr(host, ']') : host + strcspn(host, ":");
    if (!end) return false;
    if (host[0] == '[') end++;
    *name = host;
    *length = (size_t)(end - host);
    /* A trailing dot names the same host. */
    if (*length > 1 && host[0] != '[' && host[*length - 1] == '.') (*length)--;
    if (*length == 0) return false;
    if (*end == '\0') return true;
    if (*end != ':') return false;
    size_t digits = strspn(end + 1, "0123456789");
    return digits <= 5 && end[1 + digits] == '\0';
}

static bool is_loopback_4(const char *name, size_t length) {
    unsigned dots = 0;
    if (length < 9 || strncmp(name, "127.", 4) != 0) return false;
    for (size_t i = 0; i < length; i++) {
        if (name[i] == '.')
            dots++;
        else if (name[i] < '0' || name[i] > '9')
            return false;
    }
    return dots == 3;
}

static bool same_host(const char *name, size_t length, const char *other, size_t other_length) {
    if (length == other_length && strncasecmp(name, other, length) == 0) return true;
    /* An IPv6 address stands in brackets in Host, and without in the configuration. */
    return length == other_length + 2 && name[0] == '[' && strncasecmp(name + 1, other, other_length) == 0 && name[length - 1] == ']';
}

bool guard_host_allowed(const char *host, const char *bound, const char *allowed) {
    const char *name;
    size_t length;
    if (!host_name(host, &name, &length)) return false;
    if (same_host(name, length, "localhost", 9) || same_host(name, length, "::1", 3) || is_loopback_4(name, length)) return true;
    if (bound && *bound && same_host(name, length, bound, strlen(bound))) return true;
    for (const char *entry = allowed ? allowed : ""; *entry;) {
        size_t n = strcspn(entry, ",");
        const char *next = entry + n + (entry[n] == ',');
        while (n > 0 && (*entry == ' ' || *entry == '\t')) {
            entry++;
            n--;
        }
        while (n > 0 && (entry[n - 1] == ' ' || entry[n - 1] == '\t')) n--;
        if (n == 1 && *entry == '*') return true;
        if (n > 0 && same_host(name, length, entry, n)) return true;
        entry = next;
    }
    return false;
}

bool guard_origin_allowed(const char *origin, const char *bound, const char *allowed) {
    const char *host = strstr(origin, "://");
    return host && guard_host_allowed(host + 3, bound, allowed);
}
