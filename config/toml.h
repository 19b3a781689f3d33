/* TOML documents for the rest of this room, which is C: toml++ parses, this shim walks. Nothing of toml++ is visible here.
 * Owns nothing after it returns. One document is bounded (TOML_BYTES_MAX, TOML_DOTS_MAX): what a hostile file can make the parser do is bounded with it. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TOML_BYTES_MAX ((size_t)1 << 20)
/* Every dot of a dotted key nests one level deeper, and levels are freed by recursion: the stack bounds them. */
#define TOML_DOTS_MAX 4096

enum toml_kind { TOML_KIND_STRING, TOML_KIND_INTEGER, TOML_KIND_FLOAT, TOML_KIND_BOOL, TOML_KIND_DATE, TOML_KIND_ARRAY, TOML_KIND_TABLE };

const char *toml_kind_name(enum toml_kind kind); /* "a string", as an error says it */

/* One value, in the order of the document. A table is reported before what is in it; an array once, as a whole. */
struct toml_value {
    const char *key; /* dotted: "server.port"; a part that is not a bare key is quoted and escaped */
    enum toml_kind kind;
    const char *text; /* STRING: its bytes, terminated, may hold NUL; ARRAY of strings: joined with ','; else NULL */
    size_t text_length;
    int64_t integer;
    double number;
    bool boolean;
    uint32_t key_line, key_column; /* 1-based */
    uint32_t line, column;         /* of the value */
};

struct toml_failure {
    char text[256]; /* one line */
    uint32_t line, column;
};

/* false: stop here (the visitor has its own error). */
typedef bool toml_visitor(void *context, const struct toml_value *value);

enum toml_outcome { TOML_READ, TOML_STOPPED, TOML_BROKEN };

/* TOML_BROKEN: not a TOML document (bad UTF-8, a key twice, too large, ...); *failure says what and where. */
enum toml_outcome toml_walk(const char *text, size_t length, toml_visitor *visitor, void *context, struct toml_failure *failure);

#ifdef __cplusplus
}
#endif
