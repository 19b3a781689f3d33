/* See json_reader.h. Owns the nodes of the documents it fills. */
#include "server/json_reader.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/json_writer.h"

struct reader {
    struct json_document *document;
    size_t at;
    uint32_t max_nodes;
    struct json_failure *failure;
    struct {
        uint32_t node;
        bool object;
    } stack[JSON_DEPTH_MAX];
    uint32_t depth;
    uint32_t member; /* key node of the outermost object's current member; 0: none (node 0 is the root) */
};

static bool fail(struct reader *reader, const char *what) {
    struct json_failure *failure = reader->failure;
    struct json_document *document = reader->document;
    failure->offset = reader->at;
    failure->what = what;
    failure->key[0] = '\0';
    if (reader->member && reader->member < document->n_nodes) {
        const struct json_node *key = &document->nodes[reader->member];
        size_t length = key->length < sizeof failure->key - 1 ? key->length : sizeof failure->key - 1;
        memcpy(failure->key, document->text + key->start, length);
        failure->key[length] = '\0';
    }
    return false;
}

static uint32_t add(struct reader *reader, enum json_type type) {
    struct json_document *document = reader->document;
    if (document->n_nodes == reader->max_nodes) return UINT32_MAX;
    if (document->n_nodes == document->capacity) {
        document->capacity = document->capacity ? document->capacity * 2 : 64;
        document->nodes = check_realloc(document->nodes, document->capacity, sizeof *document->nodes);
    }
    document->nodes[document->n_nodes] = (struct json_node){.type = (uint8_t)type, .next = document->n_nodes + 1};
    return document->n_nodes++;
}

static bool at_end(const struct reader *reader) { return reader->at == reader->document->length; }
static char peek(const struct reader *reader) { return reader->document->text[reader->at]; }

static void skip_space(struct reader *reader) {
    while (!at_end(reader)) {
        char c = peek(reader);
        if (c != ' ' && c != '\t' && c != '\n' && c != '\r') break;
        reader->at++;
    }
}

static int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
}

/* Four hex digits at `text`; -1: not. */
static int32_t unit_at(const char *text, size_t left) {
    int32_t unit = 0;
    if (left < 4) return -1;
    for (int i = 0; i < 4; i++) {
        int digit = hex_digit(text[i]);
        if (digit < 0) return -1;
        unit = unit * 16 + digit;
    }
    return unit;
}

/* reader->at is behind the backslash. */
static bool read_escape(struct reader *reader) {
    const char *text = reader->document->text;
    size_t length = reader->document->length;
    if (at_end(reader)) return fail(reader, "the string does not end");
    char c = peek(reader);
    if (c != 'u') {
        if (!memchr("\"\\/bfnrt", c, 8)) return fail(reader, "no such escape in a string");
        reader->at++;
        return true;
    }
    int32_t unit = unit_at(text + reader->at + 1, length - reader->at - 1);
    if (unit < 0) return fail(reader, "\\u needs four hex digits");
    if (unit >= 0xdc00 && unit < 0xe000) return fail(reader, "a lone surrogate");
    reader->at += 5;
    if (unit >= 0xd800 && unit < 0xdc00) {
        if (length - reader->at < 6 || text[reader->at] != '\\' || text[reader->at + 1] != 'u') return fail(reader, "a lone surrogate");
        int32_t low = unit_at(text + reader->at + 2, length - reader->at - 2);
        if (low < 0xdc00 || low >= 0xe000) return fail(reader, "a lone surrogate");
        reader->at += 6;
    }
    return true;
}

/* reader->at is on the opening quote. */
static bool read_string(struct reader *reader, uint32_t *node) {
    *node = add(reader, JSON_STRING);
    if (*node == UINT32_MAX) return fail(reader, "too many values");
    size_t start = ++reader->at;
    bool escaped = false;
    for (;;) {
        if (at_end(reader)) return fail(reader, "the string does not end");
        unsigned char c = (unsigned char)peek(reader);
        if (c == '"') break;
        if (c < 0x20) return fail(reader, "a control character in a string must be escaped");
        reader->at++;
        if (c == '\\') {
            escaped = true;
            if (!read_escape(reader)) return false;
        }
    }
    struct json_node *string = &reader->document->nodes[*node];
    string->start = (uint32_t)start;
    string->length = (uint32_t)(reader->at - start);
    string->escaped = escaped;
    reader->at++;
    return true;
}

static bool digits(struct reader *reader) {
    size_t start = reader->at;
    while (!at_end(reader) && peek(reader) >= '0' && peek(reader) <= '9') reader->at++;
    return reader->at > start;
}

static bool read_number(struct reader *reader) {
    uint32_t node = add(reader, JSON_NUMBER);
    if (node == UINT32_MAX) return fail(reader, "too many values");
    size_t start = reader->at;
    if (peek(reader) == '-') reader->at++;
    size_t first = reader->at;
    if (!digits(reader)) return fail(reader, "a value was expected");
    if (reader->document->text[first] == '0' && reader->at > first + 1) return fail(reader, "a number must not begin with 0");
    if (!at_end(reader) && peek(reader) == '.') {
        reader->at++;
        if (!digits(reader)) return fail(reader, "a digit was expected");
    }
    if (!at_end(reader) && (peek(reader) == 'e' || peek(reader) == 'E')) {
        reader->at++;
        if (!at_end(reader) && (peek(reader) == '+' || peek(reader) == '-')) reader->at++;
        if (!digits(reader)) return fail(reader, "a digit was expected");
    }
    reader->document->nodes[node].start = (uint32_t)start;
    reader->document->nodes[node].length = (uint32_t)(reader->at - start);
    return true;
}

static bool read_word(struct reader *reader) {
    static const struct {
        const char *word;
        enum json_type type;
    } words[] = {{"null", JSON_NULL}, {"true", JSON_TRUE}, {"false", JSON_FALSE}};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        size_t length = strlen(words[i].word);
        if (reader->document->length - reader->at < length || memcmp(reader->document->text + reader->at, words[i].word, length) != 0) continue;
        reader->at += length;
        if (add(reader, words[i].type) == UINT32_MAX) return fail(reader, "too many values");
        return true;
    }
    return fail(reader, "a value was expected");
}

static bool key_is_new(struct reader *reader, uint32_t key) {
    const struct json_document *document = reader->document;
    const struct json_node *nodes = document->nodes;
    for (uint32_t i = 1; i < key; i = nodes[i + 1].next)
        if (nodes[i].length == nodes[key].length && memcmp(document->text + nodes[i].start, document->text + nodes[key].start, nodes[i].length) == 0)
            return false;
    return true;
}

/* A key and its colon. */
static bool read_key(struct reader *reader) {
    uint32_t key;
    if (reader->depth == 1) reader->member = 0;
    if (at_end(reader) || peek(reader) != '"') return fail(reader, "a key in quotes was expected");
    if (!read_string(reader, &key)) return false;
    if (reader->depth == 1) {
        reader->member = key;
        /* The check is quadratic: bounded, since no request has more fields than this. */
        if (reader->document->nodes[0].length >= 256) return fail(reader, "too many keys");
        if (!key_is_new(reader, key)) return fail(reader, "the key stands twice");
    }
    skip_space(reader);
    if (at_end(reader) || peek(reader) != ':') return fail(reader, "a colon was expected");
    reader->at++;
    skip_space(reader);
    return true;
}

static bool open_container(struct reader *reader, bool object) {
    uint32_t node = add(reader, object ? JSON_OBJECT : JSON_ARRAY);
    if (node == UINT32_MAX) return fail(reader, "too many values");
    if (reader->depth == JSON_DEPTH_MAX) return fail(reader, "nested too deeply");
    reader->stack[reader->depth].node = node;
    reader->stack[reader->depth++].object = object;
    reader->at++;
    return true;
}

/* Behind a value: closes what ends here, or steps to the next element. *done: the outermost value is complete. */
static bool after_value(struct reader *reader, bool *done) {
    *done = false;
    while (reader->depth > 0) {
        struct json_node *parent = &reader->document->nodes[reader->stack[reader->depth - 1].node];
        bool object = reader->stack[reader->depth - 1].object;
        parent->length++;
        skip_space(reader);
        if (at_end(reader)) return fail(reader, "the text ends early");
        char c = peek(reader);
        if (c == ',') {
            reader->at++;
            skip_space(reader);
            return !object || read_key(reader);
        }
        if (c != (object ? '}' : ']')) return fail(reader, object ? "a comma or } was expected" : "a comma or ] was expected");
        reader->at++;
        parent->next = reader->document->n_nodes;
        reader->depth--;
    }
    *done = true;
    return true;
}

/* A value's beginning. *open: a container was entered and its first element comes next. */
static bool read_value(struct reader *reader, bool *open) {
    *open = false;
    if (at_end(reader)) return fail(reader, reader->depth ? "the text ends early" : "a value was expected");
    char c = peek(reader);
    if (c == '"') {
        uint32_t node;
        return read_string(reader, &node);
    }
    if (c == '-' || (c >= '0' && c <= '9')) return read_number(reader);
    if (c != '{' && c != '[') return read_word(reader);
    if (!open_container(reader, c == '{')) return false;
    skip_space(reader);
    if (at_end(reader)) return fail(reader, "the text ends early");
    if (peek(reader) == (c == '{' ? '}' : ']')) { /* empty */
        reader->at++;
        reader->depth--;
        return true;
    }
    *open = true;
    return c == '[' || read_key(reader);
}

/* How many bytes are valid UTF-8. */
static size_t utf8_prefix(const char *text, size_t length) {
    size_t at = 0;
    if (utf8_valid(text, length)) return length;
    for (size_t n; (n = utf8_sequence_length(text + at, length - at)) > 0;) at += n;
    return at;
}

bool json_read(struct json_document *document, const char *text, size_t length, uint32_t max_nodes, struct json_failure *failure) {
    *document = (struct json_document){.text = text, .length = length};
    struct reader reader = {.document = document, .max_nodes = max_nodes, .failure = failure};
    bool good = true, done = false;
    if (length >= UINT32_MAX)
        good = fail(&reader, "too long");
    else {
        document->length = utf8_prefix(text, length); /* read so far, so that it is known where the wrong bytes stand */
        skip_space(&reader);
    }
    while (good && !done) {
        bool open;
        good = read_value(&reader, &open);
        if (good && !open) good = after_value(&reader, &done);
    }
    if (good) {
        skip_space(&reader);
        reader.member = 0;
        if (!at_end(&reader)) good = fail(&reader, "something follows the value");
    }
    if (document->length < length && (good || at_end(&reader))) good = fail(&reader, "not valid UTF-8");
    if (!good) json_document_done(document);
    return good;
}

void json_document_done(struct json_document *document) {
    free(document->nodes);
    document->nodes = NULL;
    document->n_nodes = document->capacity = 0;
}

/* ---- values ---- */

bool json_number(const struct json_document *document, uint32_t node, double *value) {
    const struct json_node *number = &document->nodes[node];
    char text[64];
    if (number->type != JSON_NUMBER) return false;
    /* The text is not terminated. A number of more than 63 characters is cut to those: 1e-17 of it at most, but its exponent must stay. */
    if (number->length >= sizeof text) {
        char *copy = check_calloc(number->length + 1, 1);
        memcpy(copy, document->text + number->start, number->length);
        *value = strtod(copy, NULL);
        free(copy);
    } else {
        memcpy(text, document->text + number->start, number->length);
        text[number->length] = '\0';
        *value = strtod(text, NULL);
    }
    return isfinite(*value);
}

bool json_int64(const struct json_document *document, uint32_t node, int64_t *value) {
    const struct json_node *number = &document->nodes[node];
    const char *text = document->text + number->start;
    if (number->type != JSON_NUMBER) return false;
    bool plain = number->length < 24;
    for (uint32_t i = 0; i < number->length && plain; i++) plain = text[i] == '-' || (text[i] >= '0' && text[i] <= '9');
    if (plain) {
        char copy[24];
        memcpy(copy, text, number->length);
        copy[number->length] = '\0';
        errno = 0;
        *value = strtoll(copy, NULL, 10);
        return errno == 0;
    }
    double wide;
    /* Beyond 2^53 a double no longer says which integer was meant. */
    if (!json_number(document, node, &wide) || wide != floor(wide) || fabs(wide) > 9007199254740992.0) return false;
    *value = (int64_t)wide;
    return true;
}

static void append_code_point(struct buffer *out, uint32_t point) {
    char bytes[4];
    size_t n;
    if (point < 0x80) {
        bytes[0] = (char)point;
        n = 1;
    } else if (point < 0x800) {
        bytes[0] = (char)(0xc0 | (point >> 6));
        bytes[1] = (char)(0x80 | (point & 0x3f));
        n = 2;
    } else if (point < 0x10000) {
        bytes[0] = (char)(0xe0 | (point >> 12));
        bytes[1] = (char)(0x80 | ((point >> 6) & 0x3f));
        bytes[2] = (char)(0x80 | (point & 0x3f));
        n = 3;
    } else {
        bytes[0] = (char)(0xf0 | (point >> 18));
        bytes[1] = (char)(0x80 | ((point >> 12) & 0x3f));
        bytes[2] = (char)(0x80 | ((point >> 6) & 0x3f));
        bytes[3] = (char)(0x80 | (point & 0x3f));
        n = 4;
    }
    buffer_append(out, bytes, n);
}

void json_string_append(const struct json_document *document, uint32_t node, struct buffer *out) {
    const struct json_node *string = &document->nodes[node];
    const char *text = document->text + string->start, *end = text + string->length;
    if (!string->escaped) {
        buffer_append(out, text, string->length);
        return;
    }
    while (text < end) {
        const char *slash = memchr(text, '\\', (size_t)(end - text));
        buffer_append(out, text, (size_t)((slash ? slash : end) - text));
        if (!slash) break;
        text = slash + 2;
        switch (slash[1]) {
        case 'b': buffer_append_byte(out, '\b'); break;
        case 'f': buffer_append_byte(out, '\f'); break;
        case 'n': buffer_append_byte(out, '\n'); break;
        case 'r': buffer_append_byte(out, '\r'); break;
        case 't': buffer_append_byte(out, '\t'); break;
        case 'u': {
            uint32_t point = (uint32_t)unit_at(text, 4);
            text += 4;
            if (point >= 0xd800 && point < 0xdc00) { /* json_read saw to it that the other half follows */
                point = 0x10000 + ((point - 0xd800) << 10) + ((uint32_t)unit_at(text + 2, 4) - 0xdc00);
                text += 6;
            }
            append_code_point(out, point);
            break;
        }
        default: buffer_append_byte(out, slash[1]);
        }
    }
}

bool json_string_equals(const struct json_document *document, uint32_t node, const char *text) {
    const struct json_node *string = &document->nodes[node];
    if (string->type != JSON_STRING) return false;
    if (!string->escaped) return strlen(text) == string->length && memcmp(document->text + string->start, text, string->length) == 0;
    struct buffer bytes = {0};
    json_string_append(document, node, &bytes);
    bool equal = bytes.length == strlen(text) && (bytes.length == 0 || memcmp(bytes.bytes, text, bytes.length) == 0);
    buffer_done(&bytes);
    return equal;
}
