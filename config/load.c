/* See config.h. Fills struct config from defaults, a file, the environment and flags, in this order, and remembers where each value came from.
 * Called before threads are started, and by the loop thread on SIGHUP. Deliberately knows no single option: the table does. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/check.h"
#include "config/options.h"
#include "config/toml.h"

extern char **environ;

enum { PIPE_WAIT_MS = 10000 };

static void mark(struct config *config, const struct option_info *option, enum config_source source) {
    config->source[option - options] = (uint8_t)source;
}

static bool of_one_command(const struct option_info *option) {
    return option >= command_options && option < command_options + command_options_count();
}

static enum config_source source_of(const struct config *config, const struct option_info *option) {
    return (enum config_source)config->source[option - options];
}

static void set_default(struct config *config, const struct option_info *option) {
    CHECK(option_set(option, config, option->initial, strlen(option->initial), option->key, NULL) == STATUS_OK);
    if (!of_one_command(option)) mark(config, option, CONFIG_SOURCE_DEFAULT);
}

void config_defaults(struct config *config) {
    memset(config, 0, sizeof *config);
    for (size_t i = 0; i < options_count(); i++) set_default(config, &options[i]);
    for (size_t i = 0; i < command_options_count(); i++) set_default(config, &command_options[i]);
}

/* ---- file ---- */

struct reading {
    struct config *config;
    const char *path;
    struct error *error;
};

static bool table_known(const char *key) {
    size_t length = strlen(key);
    for (size_t i = 0; i < options_count(); i++)
        if (strncmp(options[i].key, key, length) == 0 && options[i].key[length] == '.') return true;
    return false;
}

static bool kind_fits(const struct option_info *option, const struct toml_value *value) {
    bool zero_word = value->kind == TOML_KIND_STRING && option->zero && strcmp(value->text, option->zero) == 0;
    switch (option->type) {
    case OPTION_BOOL: return value->kind == TOML_KIND_BOOL;
    case OPTION_PORT:
    case OPTION_COUNT:
    case OPTION_NUMBER: return value->kind == TOML_KIND_INTEGER || zero_word;
    case OPTION_SIZE:
    case OPTION_DURATION: return value->kind == TOML_KIND_INTEGER || value->kind == TOML_KIND_STRING;
    case OPTION_FLOAT: return value->kind == TOML_KIND_INTEGER || value->kind == TOML_KIND_FLOAT || zero_word;
    case OPTION_TEXT:
    case OPTION_ENUM: return value->kind == TOML_KIND_STRING;
    case OPTION_LIST: return value->kind == TOML_KIND_STRING || (value->kind == TOML_KIND_ARRAY && value->text);
    }
    return false;
}

static const char *kind_wanted(const struct option_info *option) {
    switch (option->type) {
    case OPTION_BOOL: return "true or false";
    case OPTION_PORT:
    case OPTION_COUNT:
    case OPTION_NUMBER: return "a whole number";
    case OPTION_SIZE: return "a size: a number of bytes or a string such as \"512MiB\"";
    case OPTION_DURATION: return "a duration: a number of seconds or a string such as \"30s\"";
    case OPTION_FLOAT: return "a number";
    case OPTION_LIST: return "a string or an array of strings";
    default: return "a string";
    }
}

static bool take_value(void *context, const struct toml_value *value) {
    struct reading *reading = context;
    struct error *error = reading->error;
    const struct option_info *option = option_by_key(value->key);
    if (!option) {
        if (value->kind == TOML_KIND_TABLE && table_known(value->key)) return true;
        if (value->kind != TOML_KIND_TABLE && table_known(value->key)) {
            (void)error_set(error, STATUS_INVALID, "%s:%u:%u: %s: %s where a table belongs: [%s]", reading->path, value->key_line, value->key_column,
                            value->key, toml_kind_name(value->kind), value->key);
            return false;
        }
        char suggestion[96];
        option_suggest(value->key, OPTION_FORM_KEY, suggestion, sizeof suggestion);
        (void)error_set(error, STATUS_INVALID, "%s:%u:%u: unknown key \"%.80s\"%s", reading->path, value->key_line, value->key_column, value->key,
                        suggestion);
        return false;
    }
    if (!kind_fits(option, value)) {
        char range[160];
        option_range(option, range, sizeof range);
        (void)error_set(error, STATUS_INVALID, "%s:%u:%u: %s: %s where %s belongs%s%s%s", reading->path, value->line, value->column, option->key,
                        toml_kind_name(value->kind), kind_wanted(option), range[0] ? " (" : "", range, range[0] ? ")" : "");
        return false;
    }
    if (source_of(reading->config, option) > CONFIG_SOURCE_FILE) return true;
    char where[CONFIG_TEXT / 2 + 96], number[32];
    (void)snprintf(where, sizeof where, "%.*s:%u:%u: %s", CONFIG_TEXT / 2, reading->path, value->line, value->column, option->key);
    const char *text = value->text;
    size_t length = value->text_length;
    if (!text) {
        if (value->kind == TOML_KIND_BOOL)
            (void)snprintf(number, sizeof number, "%s", value->boolean ? "true" : "false");
        else if (value->kind == TOML_KIND_INTEGER)
            (void)snprintf(number, sizeof number, "%lld", (long long)value->integer);
        else
            (void)snprintf(number, sizeof number, "%.17g", value->number);
        text = number, length = strlen(number);
    }
    if (option_set(option, reading->config, text, length, where, error) != STATUS_OK) return false;
    mark(reading->config, option, CONFIG_SOURCE_FILE);
    reading->config->line[option - options] = value->line;
    return true;
}

/* The whole file, bounded: *text is the caller's to free. */
static enum status read_file(const char *path, char **text, size_t *length, struct error *error) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return error_set(error, STATUS_IO, "%s: %s", path, strerror(errno));
    struct stat facts;
    if (fstat(fd, &facts) == 0 && S_ISDIR(facts.st_mode)) {
        close(fd);
        return error_set(error, STATUS_IO, "%s: is a directory", path);
    }
    char *bytes = check_calloc(1, TOML_BYTES_MAX + 1);
    size_t used = 0;
    ssize_t got;
    while (used <= TOML_BYTES_MAX && (got = read(fd, bytes + used, TOML_BYTES_MAX + 1 - used)) != 0) {
        if (got < 0 && errno == EINTR) continue;
        struct pollfd pipe = {.fd = fd, .events = POLLIN}; /* `--config <(command)`: what it writes may come later */
        if (got < 0 && errno == EAGAIN && poll(&pipe, 1, PIPE_WAIT_MS) > 0) continue;
        if (got < 0) {
            int failure = errno == EAGAIN ? ETIMEDOUT : errno;
            close(fd);
            free(bytes);
            return error_set(error, STATUS_IO, "%s: %s", path, strerror(failure));
        }
        used += (size_t)got;
    }
    close(fd);
    *text = bytes, *length = used;
    return STATUS_OK;
}

enum status config_load_file(struct config *config, const char *path, struct error *error) {
    char *text = NULL;
    size_t length = 0;
    enum status status = read_file(path, &text, &length, error);
    if (status != STATUS_OK) return status;
    struct config next = *config;
    for (size_t i = 0; i < options_count(); i++)
        if (source_of(&next, &options[i]) == CONFIG_SOURCE_FILE) set_default(&next, &options[i]);
    struct error local;
    struct reading reading = {.config = &next, .path = path, .error = error ? error : &local};
    struct toml_failure failure;
    enum toml_outcome outcome = toml_walk(text, length, take_value, &reading, &failure);
    free(text);
    if (outcome == TOML_BROKEN) return error_set(error, STATUS_INVALID, "%s:%u:%u: %s", path, failure.line, failure.column, failure.text);
    if (outcome == TOML_STOPPED) return reading.error->status;
    (void)snprintf(next.config_file, sizeof next.config_file, "%.*s", CONFIG_TEXT - 1, path);
    *config = next;
    return STATUS_OK;
}

enum status config_reload(const struct config *now, struct config *next, char *refused, size_t refused_size, struct error *error) {
    *next = *now;
    if (refused_size) refused[0] = '\0';
    if (!now->config_file[0]) return STATUS_OK;
    struct stat facts;
    if (stat(now->config_file, &facts) == 0 && !S_ISREG(facts.st_mode) && !S_ISDIR(facts.st_mode)) {
        (void)snprintf(refused, refused_size, "%.200s, which is no file that could be read again", now->config_file);
        return STATUS_OK;
    }
    struct config fresh = *now;
    enum status status = config_load_file(&fresh, now->config_file, error);
    if (status != STATUS_OK) return status;
    size_t used = 0;
    for (size_t i = 0; i < options_count(); i++) {
        const struct option_info *option = &options[i];
        char *field = (char *)&fresh + option->offset;
        const char *before = (const char *)now + option->offset;
        if (option->reload || memcmp(field, before, option->size) == 0) continue;
        memcpy(field, before, option->size);
        mark(&fresh, option, source_of(now, option));
        if (used < refused_size) used += (size_t)snprintf(refused + used, refused_size - used, "%s%s", used ? ", " : "", option->key);
    }
    status = config_check(&fresh, error);
    if (status != STATUS_OK) return status;
    *next = fresh;
    return STATUS_OK;
}

/* ---- environment ---- */

static enum status load_environment(struct config *config, struct error *error) {
    for (size_t i = 0; i < options_count(); i++) {
        char name[64];
        option_environment_name(&options[i], name, sizeof name);
        const char *text = getenv(name);
        if (!text || !text[0]) continue; /* empty: as if it were not there */
        if (source_of(config, &options[i]) == CONFIG_SOURCE_FLAG) continue;
        enum status status = option_set(&options[i], config, text, strlen(text), name, error);
        if (status != STATUS_OK) return status;
        mark(config, &options[i], CONFIG_SOURCE_ENVIRONMENT);
    }
    return STATUS_OK;
}

size_t config_unknown_environment(char *names, size_t size) {
    size_t count = 0, used = 0;
    if (size) names[0] = '\0';
    for (char **entry = environ; entry && *entry; entry++) {
        const char *equals = strchr(*entry, '=');
        if (strncmp(*entry, "KVASIR_", 7) != 0 || !equals) continue;
        size_t length = (size_t)(equals - *entry);
        bool known = length == 13 && memcmp(*entry, "KVASIR_CONFIG", 13) == 0;
        for (size_t i = 0; i < options_count() && !known; i++) {
            char name[64];
            option_environment_name(&options[i], name, sizeof name);
            known = strlen(name) == length && memcmp(name, *entry, length) == 0;
        }
        if (known) continue;
        if (used < size) used += (size_t)snprintf(names + used, size - used, "%s%.*s", count ? ", " : "", (int)(length < 64 ? length : 64), *entry);
        count++;
    }
    return count;
}

/* ---- flags ---- */

struct flag {
    const struct option_info *option;
    const char *value; /* NULL: none was given with '=' */
    bool negated;      /* --no-prefix-cache */
    bool config_file, help;
    char name[64]; /* as it was written, for errors */
};

/* What one argument beginning with '-' names. */
static enum status parse_flag(const char *command, char *argument, struct flag *flag, struct error *error) {
    *flag = (struct flag){0};
    size_t length = strcspn(argument, "=");
    int bit = option_command(command);
    (void)snprintf(flag->name, sizeof flag->name, "%.*s", (int)(length < 60 ? length : 60), argument);
    if (argument[1] != '-') { /* -m FILE or -mFILE */
        flag->option = option_by_letter(argument[1], bit);
        flag->config_file = argument[1] == 'c', flag->help = argument[1] == 'h';
        (void)snprintf(flag->name, sizeof flag->name, "%.2s", argument);
        if (argument[2]) flag->value = argument + 2;
    } else {
        if (argument[length] == '=') flag->value = argument + length + 1;
        flag->config_file = length == 8 && memcmp(argument, "--config", 8) == 0;
        flag->help = length == 6 && memcmp(argument, "--help", 6) == 0;
        flag->option = option_by_flag(argument + 2, length - 2, bit);
        if (!flag->option && length > 5 && memcmp(argument, "--no-", 5) == 0) {
            const struct option_info *option = option_by_flag(argument + 5, length - 5, bit);
            if (option && option->type == OPTION_BOOL && !flag->value) flag->option = option, flag->negated = true;
        }
    }
    if (flag->option && of_one_command(flag->option) && !(flag->option->commands & bit))
        return error_set(error, STATUS_INVALID, "option %s belongs to kvasir %.*s", flag->name, (int)strcspn(flag->option->key, "."),
                         flag->option->key);
    if (flag->option || flag->config_file || flag->help) return STATUS_OK;
    char suggestion[96];
    option_suggest(flag->name, OPTION_FORM_FLAG, suggestion, sizeof suggestion);
    return error_set(error, STATUS_INVALID, "unknown option %s%s; --help lists them", flag->name, suggestion);
}

static enum status set_path(char *path, const char *value, struct error *error) {
    if (strlen(value) >= CONFIG_TEXT) return error_set(error, STATUS_INVALID, "config file: longer than %d bytes", CONFIG_TEXT - 1);
    (void)snprintf(path, CONFIG_TEXT, "%s", value);
    return STATUS_OK;
}

/* Reads flags into `config`, moves positional arguments to the end. */
static enum status load_flags(struct config *config, int argc, char **argv, int *first_positional, bool *help, struct error *error) {
    char **positional = check_calloc((size_t)argc + 1, sizeof *positional);
    int n_positional = 0, n_flags = 1;
    bool flags_ended = false;
    enum status status = STATUS_OK;
    for (int i = 1; i < argc && status == STATUS_OK; i++) {
        char *argument = argv[i];
        if (flags_ended || argument[0] != '-' || argument[1] == '\0') {
            positional[n_positional++] = argument;
            continue;
        }
        argv[n_flags++] = argument;
        if (strcmp(argument, "--") == 0) {
            flags_ended = true;
            continue;
        }
        struct flag flag;
        status = parse_flag(argv[0], argument, &flag, error);
        if (status != STATUS_OK) break;
        if (flag.help) {
            *help = true;
            break;
        }
        const char *value = flag.value;
        bool boolean = flag.option && flag.option->type == OPTION_BOOL;
        if (boolean && !value) {
            value = flag.negated ? "false" : "true";
        } else if (!value) {
            if (i + 1 >= argc) {
                status = error_set(error, STATUS_INVALID, "%s: a value must follow", flag.name);
                break;
            }
            value = argv[n_flags++] = argv[++i];
        }
        if (flag.config_file)
            status = set_path(config->config_file, value, error);
        else if ((status = option_set(flag.option, config, value, strlen(value), flag.name, error)) == STATUS_OK && !of_one_command(flag.option))
            mark(config, flag.option, CONFIG_SOURCE_FLAG);
    }
    if (status == STATUS_OK) {
        *first_positional = argc - n_positional;
        memcpy(argv + *first_positional, positional, (size_t)n_positional * sizeof *positional);
    }
    free(positional);
    return status;
}

enum status config_load(struct config *config, int argc, char **argv, int *first_positional, bool *help, struct error *error) {
    *help = false;
    *first_positional = argc;
    config_defaults(config);
    /* Flags win over the environment, and that over the file: each reader leaves alone what a stronger one has set. */
    enum status status = load_flags(config, argc, argv, first_positional, help, error);
    if (status != STATUS_OK || *help) return status;
    const char *path = getenv("KVASIR_CONFIG");
    if (!config->config_file[0] && path) status = set_path(config->config_file, path, error);
    if (status == STATUS_OK) status = load_environment(config, error);
    if (status != STATUS_OK || !config->config_file[0]) return status;
    return config_load_file(config, config->config_file, error);
}
