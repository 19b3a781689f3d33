/* See guard.h. Owns nothing. */
#include "server/guard.h"

#include <ctype.h>
#include <string.h>
#include <strings.h>

#define TLS_HANDSHAKE 0x16 /* how a hello of TLS begins (RFC 8446 5.1), and no request: its sender waits for an answer, not for a line to end */
#define CHUNK_SIZE_MAX (1ull << 40) /* more than any body may have */

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

static unsigned count(const char *bytes, size_t length, char a, char b) {
    unsigned n = 0;
    for (size_t i = 0; i < length; i++) n += bytes[i] == a || bytes[i] == b;
    return n;
}

/* A list of tokens, comma-separated. */
static bool has_token(const char *list, size_t length, const char *wanted) {
    for (size_t at = 0; at < length;) {
        const char *comma = memchr(list + at, ',', length - at), *token = list + at;
        size_t n = comma ? (size_t)(comma - token) : length - at;
        at += n + 1;
        for (; n && (*token == ' ' || *token == '\t'); n--) token++;
        while (n && (token[n - 1] == ' ' || token[n - 1] == '\t')) n--;
        if (is(token, n, wanted)) return true;
    }
    return false;
}

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
    } else if (is(name, name_length, "Connection")) {
        guard->close |= has_token(value, value_length, "close");
        guard->keep_alive |= has_token(value, value_length, "keep-alive");
    } else if (is(name, name_length, "Cookie")) {
        guard->cookies += 1 + count(value, value_length, ';', ',');
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

static bool refuse(struct guard_refusal *refusal, int status, const char *code, const char *problem) {
    *refusal = (struct guard_refusal){status, code, problem};
    return true;
}

enum version { VERSION_NONE, VERSION_1_0, VERSION_1_1, VERSION_1_X, VERSION_OTHER };

/* The end of a request line. 1.2 and above are read as 1.1 (RFC 9110 2.5). */
static enum version version_of(const char *line, size_t length) {
    if (length < 9 || memcmp(line + length - 9, " HTTP/", 6) != 0 || line[length - 2] != '.') return VERSION_NONE;
    char major = line[length - 3], minor = line[length - 1];
    if (!isdigit((unsigned char)major) || !isdigit((unsigned char)minor)) return VERSION_NONE;
    return major != '1' ? VERSION_OTHER : minor == '0' ? VERSION_1_0 : minor == '1' ? VERSION_1_1 : VERSION_1_X;
}

/* METHOD SP TARGET SP VERSION, and nothing in the target that would end it. */
static bool is_request_line(const char *line, size_t length) {
    const char *space = memchr(line, ' ', length);
    if (!space || !is_token(line, (size_t)(space - line)) || version_of(line, length) == VERSION_NONE) return false;
    const char *target = space + 1, *end = line + length - 9;
    if (target >= end) return false;
    for (const char *c = target; c < end; c++)
        if ((unsigned char)*c <= 0x20 || *c == 0x7f) return false;
    return true;
}

static void head_field(struct guard *guard, const char *line, size_t length) {
    const char *colon = memchr(line, ':', length);
    if (line[0] == ' ' || line[0] == '\t' || !colon) {
        if (!guard->problem) guard->problem = colon ? "a header field is folded" : "a header field has no colon";
        return;
    }
    const char *value = colon + 1, *end = line + length;
    while (value < end && (*value == ' ' || *value == '\t')) value++;
    /* Of these libmicrohttpd reads a blank behind the value as a part of it. */
    const size_t name = (size_t)(colon - line);
    bool trimmed = !is(line, name, "Content-Length") && !is(line, name, "Transfer-Encoding");
    while (trimmed && end > value && (end[-1] == ' ' || end[-1] == '\t')) end--;
    guard_field(guard, line, name, value, (size_t)(end - value));
}

enum chunk_state { CHUNK_SIZE, CHUNK_EXTENSION, CHUNK_SIZE_LF, CHUNK_DATA, CHUNK_DATA_END, CHUNK_DATA_LF, TRAILER_BEGIN, TRAILER, TRAILER_LF };

static enum guard_chunked broken(struct guard_refusal *refusal, int status, const char *code, const char *problem) {
    (void)refuse(refusal, status, code, problem);
    return GUARD_CHUNKS_BROKEN;
}

/* Fields behind the last chunk, which mean nothing here: each has a name and a colon, none is folded or holds a control character. */
static bool trailer_byte(const struct guard_chunks *chunks, unsigned char c) {
    if (chunks->state == TRAILER_LF) return c == '\n';
    if (chunks->state == TRAILER && chunks->digits) return c >= ' ' || c == '\t' || c == '\r' || c == '\n';
    return is_token((const char *)&c, 1) || (chunks->state == TRAILER ? c == ':' : c == '\r' || c == '\n');
}

static enum guard_chunked trailer_end(struct guard_chunks *chunks, unsigned char c) {
    bool empty = chunks->state == TRAILER_BEGIN || chunks->empty;
    if (c == '\n' && empty) return GUARD_CHUNKS_END;
    if (chunks->state == TRAILER_BEGIN) chunks->digits = false;
    chunks->empty = empty && c == '\r';
    chunks->digits = chunks->digits || c == ':';
    chunks->state = c == '\n' ? TRAILER_BEGIN : c == '\r' ? TRAILER_LF : TRAILER;
    return GUARD_CHUNKS_GO_ON;
}

static enum guard_chunked chunk_byte(struct guard_chunks *chunks, unsigned char c, struct guard_refusal *refusal) {
    static const char size[] = "a chunk's size is malformed", end[] = "a chunk does not end where its size says";
    if (chunks->state >= CHUNK_DATA && chunks->state < TRAILER_BEGIN)
        chunks->length = 0;
    else if (++chunks->length > GUARD_CHUNK_MAX)
        return chunks->state < CHUNK_DATA ? broken(refusal, 400, "bad_framing", "the line of a chunk's size is too long")
                                          : broken(refusal, 431, "header_too_large", "the trailer fields are too long");
    switch ((enum chunk_state)chunks->state) {
    case CHUNK_SIZE:
        if (isxdigit(c)) {
            chunks->digits = true;
            chunks->size = chunks->size << 4 | (uint64_t)(c <= '9' ? c - '0' : tolower(c) - 'a' + 10);
            if (chunks->size > CHUNK_SIZE_MAX) return broken(refusal, 413, "body_too_large", "a chunk's size is beyond all bodies");
            break;
        }
        /* Nor does libmicrohttpd take a blank behind it. */
        if (!chunks->digits || !strchr(";\r\n", c) || c == '\0') return broken(refusal, 400, "bad_framing", size);
        chunks->state = c == ';' ? CHUNK_EXTENSION : c == '\r' ? CHUNK_SIZE_LF : chunks->size ? CHUNK_DATA : TRAILER_BEGIN;
        break;
    case CHUNK_EXTENSION:
    case CHUNK_SIZE_LF:
        if (c == '\n')
            chunks->state = chunks->size ? CHUNK_DATA : TRAILER_BEGIN;
        else if (chunks->state == CHUNK_SIZE_LF || (c < 0x20 && c != '\t' && c != '\r'))
            return broken(refusal, 400, "bad_framing", size);
        else if (c == '\r')
            chunks->state = CHUNK_SIZE_LF;
        break;
    case CHUNK_DATA:
    case CHUNK_DATA_END:
    case CHUNK_DATA_LF:
        if (c == '\r' && chunks->state != CHUNK_DATA_LF)
            chunks->state = CHUNK_DATA_LF;
        else if (c == '\n')
            *chunks = (struct guard_chunks){0};
        else
            return broken(refusal, 400, "bad_framing", end);
        break;
    case TRAILER_BEGIN:
    case TRAILER:
    case TRAILER_LF: return trailer_byte(chunks, c) ? trailer_end(chunks, c) : broken(refusal, 400, "bad_framing", "a trailer field is malformed");
    }
    return GUARD_CHUNKS_GO_ON;
}

enum guard_chunked guard_chunks(struct guard_chunks *chunks, const char *bytes, size_t length, size_t *used, struct guard_refusal *refusal) {
    enum guard_chunked outcome = GUARD_CHUNKS_GO_ON;
    for (*used = 0; *used < length && outcome == GUARD_CHUNKS_GO_ON;) {
        if (chunks->state == CHUNK_DATA && chunks->size > 0) {
            size_t part = chunks->size < length - *used ? (size_t)chunks->size : length - *used;
            chunks->size -= part;
            *used += part;
            continue;
        }
        outcome = chunk_byte(chunks, (unsigned char)bytes[*used], refusal);
        ++*used;
    }
    return outcome;
}

/* The fields of a request whose line is there: `fields` is where they begin. */
static bool refuse_fields(const char *bytes, size_t length, size_t fields, enum version version, unsigned arguments, struct guard_refusal *refusal) {
    struct guard guard = {0};
    const char *line;
    size_t at = fields, n = 1;
    for (size_t n_fields = 0; next_line(bytes, length, &at, &line, &n) && n > 0; n_fields++) {
        if (n_fields == GUARD_FIELDS_MAX) return refuse(refusal, 431, "header_too_large", "too many header fields");
        head_field(&guard, line, n);
    }
    const bool whole = n == 0;
    if ((whole ? at : length) > GUARD_HEAD_MAX) return refuse(refusal, 431, "header_too_large", "the header fields are too long");
    if (arguments + guard.cookies > GUARD_PARTS_MAX) return refuse(refusal, 431, "header_too_large", "too many query arguments and cookies");
    /* libmicrohttpd does not wait for the end of a head to stumble over a field. */
    const char *problem = whole ? guard_verdict(&guard, version != VERSION_1_0) : guard.problem;
    return problem && refuse(refusal, 400, "bad_framing", problem);
}

size_t guard_empty_lines(const char *bytes, size_t length) {
    size_t at = 0;
    while (at < length && (bytes[at] == '\n' || (bytes[at] == '\r' && at + 1 < length && bytes[at + 1] == '\n'))) at++;
    return at;
}

bool guard_bytes(const char *bytes, size_t length, struct guard_refusal *refusal) {
    const char *line;
    size_t at = guard_empty_lines(bytes, length), n = 0;
    const size_t begin = at;
    if (begin < length && bytes[begin] == TLS_HANDSHAKE)
        return refuse(refusal, 400, "bad_request_line",
                      "it begins as TLS does, and this port speaks plain HTTP: ask http://, or a proxy that speaks TLS");
    bool whole = next_line(bytes, length, &at, &line, &n);
    if ((whole ? n : length - begin) > GUARD_LINE_MAX) return refuse(refusal, 414, "uri_too_long", "the request line is too long");
    if (!whole) return false;
    if (!is_request_line(line, n)) return refuse(refusal, 400, "bad_request_line", "the request line is not METHOD TARGET HTTP/1.1");
    enum version version = version_of(line, n);
    if (version == VERSION_OTHER) return refuse(refusal, 505, "http_version_not_supported", "the versions spoken are HTTP/1.0 and HTTP/1.1");
    const char *query = memchr(line, '?', n);
    unsigned arguments = query ? 1 + count(query, (size_t)(line + n - query), '&', '&') : 0;
    return refuse_fields(bytes + begin, length - begin, at - begin, version, arguments, refusal);
}

size_t guard_head(const char *bytes, size_t length, struct guard_framing *framing) {
    struct guard guard = {0};
    const char *line;
    size_t at = guard_empty_lines(bytes, length), n;
    bool whole = next_line(bytes, length, &at, &line, &n);
    while (whole && (whole = next_line(bytes, length, &at, &line, &n)) && n > 0) head_field(&guard, line, n);
    if (!whole) return 0;
    *framing = (struct guard_framing){guard.transfer_encodings > 0, guard.content_lengths ? guard.content_length : 0};
    return at;
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
    return memchr(other, ':', other_length) && length == other_length + 2 && name[0] == '[' && strncasecmp(name + 1, other, other_length) == 0 &&
           name[length - 1] == ']';
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
