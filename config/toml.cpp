/* See toml.h. The only C++ of the program: toml++ behind an extern "C" shim, without exceptions. Owns nothing beyond the call; any thread.
 * Deliberately knows no option: what a key means is options.c's business. */
#undef TOML_HEADER_ONLY /* Debian's shared library is built with exceptions; the header alone is enough */
#undef TOML_SHARED_LIB
#define TOML_HEADER_ONLY 1
#define TOML_EXCEPTIONS 0
#define TOML_ENABLE_FORMATTERS 0
#include <toml++/toml.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "config/toml.h"

namespace {

struct walk {
    toml_visitor *visitor;
    void *context;
};

void append_key_part(std::string &path, std::string_view part) {
    bool bare = !part.empty() && std::all_of(part.begin(), part.end(), [](unsigned char byte) {
        return (byte >= 'a' && byte <= 'z') || (byte >= 'A' && byte <= 'Z') || (byte >= '0' && byte <= '9') || byte == '_' || byte == '-';
    });
    if (!path.empty()) path += '.';
    if (bare) {
        path += part;
        return;
    }
    path += '"';
    for (unsigned char byte : part) {
        char escaped[8];
        if (byte < 0x20 || byte == 0x7f)
            std::snprintf(escaped, sizeof escaped, "\\x%02x", static_cast<unsigned>(byte));
        else if (byte == '"' || byte == '\\')
            std::snprintf(escaped, sizeof escaped, "\\%c", byte);
        else
            std::snprintf(escaped, sizeof escaped, "%c", byte);
        path += escaped;
    }
    path += '"';
}

bool joined_strings(const toml::array &array, std::string &text) {
    bool first = true;
    for (const toml::node &element : array) {
        const auto *string = element.as_string();
        if (!string) return false;
        if (!first) text += ',';
        text += string->get();
        first = false;
    }
    return true;
}

struct child {
    const toml::key *key;
    const toml::node *node;
};

bool walk_table(const walk &state, const toml::table &table, std::string &path, int depth) {
    std::vector<child> children;
    for (auto &&[key, node] : table) children.push_back({&key, &node});
    std::stable_sort(children.begin(), children.end(), [](const child &a, const child &b) {
        const auto &x = a.key->source().begin, &y = b.key->source().begin;
        return x.line != y.line ? x.line < y.line : x.column < y.column;
    });
    const std::size_t length = path.size();
    for (const child &item : children) {
        path.resize(length);
        append_key_part(path, item.key->str());
        toml_value value{};
        std::string text;
        value.key = path.c_str();
        value.key_line = item.key->source().begin.line, value.key_column = item.key->source().begin.column;
        value.line = item.node->source().begin.line, value.column = item.node->source().begin.column;
        const toml::table *below = nullptr;
        switch (item.node->type()) {
        case toml::node_type::string:
            value.kind = TOML_KIND_STRING, text = item.node->as_string()->get();
            value.text = text.c_str(), value.text_length = text.size();
            break;
        case toml::node_type::integer: value.kind = TOML_KIND_INTEGER, value.integer = item.node->as_integer()->get(); break;
        case toml::node_type::floating_point: value.kind = TOML_KIND_FLOAT, value.number = item.node->as_floating_point()->get(); break;
        case toml::node_type::boolean: value.kind = TOML_KIND_BOOL, value.boolean = item.node->as_boolean()->get(); break;
        case toml::node_type::array:
            value.kind = TOML_KIND_ARRAY;
            if (joined_strings(*item.node->as_array(), text)) value.text = text.c_str(), value.text_length = text.size();
            break;
        case toml::node_type::table: value.kind = TOML_KIND_TABLE, below = item.node->as_table(); break;
        default: value.kind = TOML_KIND_DATE; break;
        }
        if (!state.visitor(state.context, &value)) return false;
        /* A visitor that accepts a table this deep is a bug of ours; bounded all the same. */
        if (below && depth < 16 && !walk_table(state, *below, path, depth + 1)) return false;
    }
    return true;
}

void fail(toml_failure *failure, std::string_view text, std::uint32_t line, std::uint32_t column) {
    std::size_t length = std::min(text.size(), sizeof failure->text - 1);
    for (std::size_t i = 0; i < length; i++) {
        unsigned char byte = static_cast<unsigned char>(text[i]);
        failure->text[i] = byte < 0x20 || byte == 0x7f ? '?' : static_cast<char>(byte);
    }
    failure->text[length] = '\0';
    failure->line = line, failure->column = column;
}

} // namespace

extern "C" const char *toml_kind_name(enum toml_kind kind) {
    switch (kind) {
    case TOML_KIND_STRING: return "a string";
    case TOML_KIND_INTEGER: return "a whole number";
    case TOML_KIND_FLOAT: return "a number with a fraction";
    case TOML_KIND_BOOL: return "true or false";
    case TOML_KIND_DATE: return "a date or time";
    case TOML_KIND_ARRAY: return "an array";
    case TOML_KIND_TABLE: return "a table";
    }
    return "unknown";
}

extern "C" enum toml_outcome toml_walk(const char *text, size_t length, toml_visitor *visitor, void *context, struct toml_failure *failure) {
    if (length > TOML_BYTES_MAX) {
        fail(failure, "larger than 1 MiB", 1, 1);
        return TOML_BROKEN;
    }
    if (std::count(text, text + length, '.') > TOML_DOTS_MAX) {
        fail(failure, "more than 4096 dots in one file", 1, 1);
        return TOML_BROKEN;
    }
    toml::parse_result parsed = toml::parse(std::string_view(text, length));
    if (!parsed) {
        const toml::parse_error &error = parsed.error();
        fail(failure, error.description(), error.source().begin.line, error.source().begin.column);
        return TOML_BROKEN;
    }
    std::string path;
    return walk_table({visitor, context}, parsed.table(), path, 0) ? TOML_READ : TOML_STOPPED;
}
