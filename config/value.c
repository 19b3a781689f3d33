/* One option's value from text, to text, and the words for its range. The same parser serves defaults, TOML, environment and flags, so that a value means the same
 * wherever it stands. Owns nothing; any thread. */
#include "config/options.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

static bool field_is_text(const struct option_info *option) {
    return option->type == OPTION_TEXT || option->type == OPTION_LIST || option->type == OPTION_ENUM;
}

/* What the user wrote, fit for one line of an error. */
static void quote(const char *text, size_t length, char *out, size_t size) {
    size_t used = 0;
    out[used++] = '"';
    for (size_t i = 0; i < length && used + 6 < size; i++) {
        unsigned char byte = (unsigned char)text[i];
        out[used++] = byte < 0x20 || byte == 0x7f ? '?' : (char)byte;
        if (used > 60) {
            memcpy(out + used, "...", 3);
            used += 3;
            break;
        }
    }
    out[used++] = '"';
    out[used] = '\0';
}

static const struct {
    const char *name;
    uint64_t factor;
} size_units[] = {
    {"", 1},
    {"b", 1},
    {"k", 1ull << 10},
    {"m", 1ull << 20},
    {"g", 1ull << 30},
    {"t", 1ull << 40},
    {"kib", 1ull << 10},
    {"mib", 1ull << 20},
    {"gib", 1ull << 30},
    {"tib", 1ull << 40},
    {"kb", 1000ull},
    {"mb", 1000000ull},
    {"gb", 1000000000ull},
    {"tb", 1000000000000ull},
};

/* Digits with at most one point, then a unit. Fractions only with a unit that makes whole bytes likely: "1.5GiB". */
static bool parse_size(const char *text, uint64_t *bytes) {
    char *end;
    if (!isdigit((unsigned char)text[0])) return false;
    errno = 0;
    uint64_t whole = strtoull(text, &end, 10);
    if (errno) return false;
    double fraction = 0;
    if (*end == '.') {
        double scale = 0.1;
        if (!isdigit((unsigned char)end[1])) return false;
        for (end++; isdigit((unsigned char)*end); end++, scale /= 10) fraction += scale * (*end - '0');
    }
    while (*end == ' ') end++;
    for (size_t i = 0; i < sizeof size_units / sizeof *size_units; i++) {
        if (strcasecmp(end, size_units[i].name) != 0) continue;
        uint64_t product;
        if (fraction > 0 && size_units[i].factor == 1) return false;
        if (__builtin_mul_overflow(whole, size_units[i].factor, &product)) return false;
        return !__builtin_add_overflow(product, (uint64_t)(fraction * (double)size_units[i].factor), bytes);
    }
    return false;
}

/* "90", "90s", "1m30s", "2h": whole seconds. */
static bool parse_duration(const char *text, uint64_t *seconds) {
    *seconds = 0;
    if (!isdigit((unsigned char)text[0])) return false;
    while (*text) {
        char *end;
        if (!isdigit((unsigned char)*text)) return false;
        errno = 0;
        uint64_t count = strtoull(text, &end, 10), factor;
        if (errno) return false;
        switch (*end) {
        case '\0':
            if (*seconds) return false; /* "1m30": of what? */
            factor = 1;
            break;
        case 's': factor = 1; break;
        case 'm': factor = 60; break;
        case 'h': factor = 3600; break;
        case 'd': factor = 86400; break;
        default: return false;
        }
        if (*end) end++;
        if (__builtin_mul_overflow(count, factor, &count) || __builtin_add_overflow(*seconds, count, seconds)) return false;
        text = end;
    }
    return true;
}

static bool parse_whole(const char *text, uint64_t *value) {
    char *end;
    if (!isdigit((unsigned char)text[0])) return false;
    errno = 0;
    *value = strtoull(text, &end, 10);
    return errno == 0 && *end == '\0';
}

static bool parse_float(const char *text, double *value) {
    char *end;
    if (!isdigit((unsigned char)text[0]) && text[0] != '-' && text[0] != '+' && text[0] != '.') return false; /* no "inf", no "nan" */
    *value = strtod(text, &end);
    return end != text && *end == '\0' && isfinite(*value);
}

static bool parse_bool(const char *text, bool *value) {
    static const char *const yes[] = {"true", "yes", "on", "1"}, *const no[] = {"false", "no", "off", "0"};
    for (size_t i = 0; i < 4; i++) {
        if (strcasecmp(text, yes[i]) == 0) return *value = true, true;
        if (strcasecmp(text, no[i]) == 0) return *value = false, true;
    }
    return false;
}

static bool choice_known(const char *choices, const char *text) {
    size_t length = strcspn(text, ","); /* "f32, f16" is a piece of the list too, and no choice */
    if (text[length] != '\0') return false;
    for (const char *at = choices; length && at; at = strstr(at, ", ") ? strstr(at, ", ") + 2 : NULL)
        if (strncmp(at, text, length) == 0 && (at[length] == ',' || at[length] == '\0')) return true;
    return false;
}

static enum status set_text(const struct option_info *option, char *field, const char *text, size_t length, const char *where, struct error *error) {
    char quoted[80];
    quote(text, length, quoted, sizeof quoted);
    for (size_t i = 0; i < length; i++)
        if ((unsigned char)text[i] < 0x20 || text[i] == 0x7f)
            return error_set(error, STATUS_INVALID, "%s: %s has a control character in it", where, quoted);
    if (length >= option->size) return error_set(error, STATUS_INVALID, "%s: longer than %d bytes", where, option->size - 1);
    char copy[CONFIG_TEXT] = "";
    memcpy(copy, text, length);
    if (option->type == OPTION_ENUM && !choice_known(option->choices, copy))
        return error_set(error, STATUS_INVALID, "%s: %s is none of %s", where, quoted, option->choices);
    memset(field, 0, option->size);
    memcpy(field, copy, length);
    return STATUS_OK;
}

/* Numbers of every kind: parsed, compared with the range, narrowed. */
static enum status set_number(const struct option_info *option, char *field, const char *text, const char *where, struct error *error) {
    static const char *const kinds[] = {[OPTION_PORT] = "a whole number",
                                        [OPTION_COUNT] = "a whole number",
                                        [OPTION_NUMBER] = "a whole number",
                                        [OPTION_SIZE] = "a size such as 512MiB",
                                        [OPTION_DURATION] = "a duration such as 30s or 5m",
                                        [OPTION_FLOAT] = "a number"};
    char quoted[80], range[160];
    quote(text, strlen(text), quoted, sizeof quoted);
    option_range(option, range, sizeof range);
    uint64_t whole = 0;
    double number = 0;
    bool right = false;
    if (option->zero && strcasecmp(text, option->zero) == 0)
        right = true;
    else if (option->type == OPTION_SIZE)
        right = parse_size(text, &whole);
    else if (option->type == OPTION_DURATION)
        right = parse_duration(text, &whole);
    else if (option->type == OPTION_FLOAT)
        right = parse_float(text, &number);
    else
        right = parse_whole(text, &whole);
    bool negative = !right && text[0] == '-' && isdigit((unsigned char)text[1]); /* a number, but out of every range here */
    if (!right && !negative) return error_set(error, STATUS_INVALID, "%s: %s is not %s (%s)", where, quoted, kinds[option->type], range);
    if (option->type != OPTION_FLOAT) number = (double)whole;
    if (negative || number < option->min || number > option->max)
        return error_set(error, STATUS_INVALID, "%s: %s is out of range (%s)", where, quoted, range);
    uint16_t port = (uint16_t)whole;
    uint32_t count = (uint32_t)whole;
    switch (option->type) {
    case OPTION_PORT: memcpy(field, &port, sizeof port); break;
    case OPTION_COUNT:
    case OPTION_DURATION: memcpy(field, &count, sizeof count); break;
    case OPTION_FLOAT: memcpy(field, &number, sizeof number); break;
    default: memcpy(field, &whole, sizeof whole); break;
    }
    return STATUS_OK;
}

enum status option_set(const struct option_info *option, struct config *config, const char *text, size_t length, const char *where,
                       struct error *error) {
    char *field = (char *)config + option->offset;
    if (field_is_text(option)) return set_text(option, field, text, length, where, error);
    char quoted[80], copy[64] = "";
    quote(text, length, quoted, sizeof quoted);
    if (length >= sizeof copy || memchr(text, '\0', length)) return error_set(error, STATUS_INVALID, "%s: %s is not a value", where, quoted);
    memcpy(copy, text, length);
    copy[length] = '\0';
    if (option->type != OPTION_BOOL) return set_number(option, field, copy, where, error);
    bool value;
    if (!parse_bool(copy, &value)) return error_set(error, STATUS_INVALID, "%s: %s is neither true nor false", where, quoted);
    memcpy(field, &value, sizeof value);
    return STATUS_OK;
}

static void size_text(uint64_t bytes, char *text, size_t size) {
    static const char *const units[] = {"", "KiB", "MiB", "GiB", "TiB"};
    size_t unit = 0;
    while (unit < 4 && bytes && bytes % 1024 == 0) bytes /= 1024, unit++;
    (void)snprintf(text, size, "%" PRIu64 "%s", bytes, units[unit]);
}

static void duration_text(uint64_t seconds, char *text, size_t size) {
    static const struct {
        uint64_t factor;
        char unit;
    } units[] = {{86400, 'd'}, {3600, 'h'}, {60, 'm'}};
    for (size_t i = 0; i < 3; i++)
        if (seconds >= 2 * units[i].factor && seconds % units[i].factor == 0) {
            (void)snprintf(text, size, "%" PRIu64 "%c", seconds / units[i].factor, units[i].unit);
            return;
        }
    (void)snprintf(text, size, "%" PRIu64 "s", seconds);
}

static void number_text(const struct option_info *option, double number, char *text, size_t size) {
    if (option->type == OPTION_SIZE)
        size_text((uint64_t)number, text, size);
    else if (option->type == OPTION_DURATION)
        duration_text((uint64_t)number, text, size);
    else if (option->type == OPTION_FLOAT)
        (void)snprintf(text, size, "%.15g", number);
    else
        (void)snprintf(text, size, "%.0f", number);
}

void option_text(const struct option_info *option, const struct config *config, char *text, size_t size) {
    const char *field = (const char *)config + option->offset;
    if (field_is_text(option)) {
        (void)snprintf(text, size, "%.*s", (int)option->size, field);
        return;
    }
    bool truth = false;
    uint16_t port = 0;
    uint32_t count = 0;
    uint64_t whole = 0;
    double number = 0;
    switch (option->type) {
    case OPTION_BOOL:
        memcpy(&truth, field, sizeof truth);
        (void)snprintf(text, size, "%s", truth ? "true" : "false");
        return;
    case OPTION_PORT: memcpy(&port, field, sizeof port), whole = port; break;
    case OPTION_COUNT:
    case OPTION_DURATION: memcpy(&count, field, sizeof count), whole = count; break;
    case OPTION_FLOAT: memcpy(&number, field, sizeof number); break;
    default: memcpy(&whole, field, sizeof whole); break;
    }
    if (option->type != OPTION_FLOAT) number = (double)whole;
    if (option->zero && number == 0)
        (void)snprintf(text, size, "%s", option->zero);
    else
        number_text(option, number, text, size);
}

void option_range(const struct option_info *option, char *words, size_t size) {
    if (option->type == OPTION_ENUM) {
        (void)snprintf(words, size, "%s", option->choices);
    } else if (option->type == OPTION_BOOL) {
        (void)snprintf(words, size, "true, false");
    } else if (field_is_text(option)) {
        words[0] = '\0';
    } else {
        char low[32], high[32];
        double min = option->zero && option->min == 0 && option->type != OPTION_FLOAT ? 1 : option->min; /* 0 has its word */
        number_text(option, min, low, sizeof low);
        number_text(option, option->max, high, sizeof high);
        (void)snprintf(words, size, "%s%s%s to %s", option->zero ? option->zero : "", option->zero ? " or " : "", low, high);
    }
}

bool option_quoted(const struct option_info *option, const char *text) {
    if (option->type == OPTION_BOOL) return false;
    if (field_is_text(option)) return true;
    for (const char *c = text; *c; c++)
        if (!isdigit((unsigned char)*c) && *c != '.' && *c != '-' && *c != '+' && *c != 'e') return true;
    return false;
}
