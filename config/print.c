/* The table in words: --help, the example file, the effective values. Owns nothing; any thread. */
#include <string.h>

#include "config/options.h"

static const struct {
    const char *prefix;
    const char *title;
} sections[] = {
    {"", "the model"},
    {"server", "HTTP, limits, log"},
    {"metrics", "/metrics"},
    {"engine", "what computes, and with how much memory"},
    {"compression", "what the KV cache forgets"},
};

#define SECTIONS (sizeof sections / sizeof *sections)

static bool in_section(const struct option_info *option, const char *prefix) {
    size_t length = strlen(prefix);
    const char *dot = strchr(option->key, '.');
    return length == 0 ? dot == NULL : strncmp(option->key, prefix, length) == 0 && option->key[length] == '.';
}

/* Words wrapped at `width` columns; every line but the first begins with `indent`. */
static void print_wrapped(FILE *out, const char *words, const char *indent, size_t column, size_t width) {
    while (*words) {
        size_t length = strcspn(words, " ");
        if (column + length + 1 > width && column > strlen(indent)) {
            fprintf(out, "\n%s", indent);
            column = strlen(indent);
        }
        fprintf(out, "%.*s", (int)length, words);
        column += length;
        words += length;
        while (*words == ' ') words++;
        if (*words) fputc(' ', out), column++;
    }
}

/* Its flag is the one that turns it off, which has to be said: `help` is of the setting. */
static bool is_on(const struct option_info *option) { return option->type == OPTION_BOOL && strcmp(option->initial, "true") == 0; }
static const char turns_off[] = "turns this off: ";

static void print_option_help(FILE *out, const struct option_info *option) {
    static const char indent[] = "        ";
    char flag[64], range[160], words[512];
    option_flag_name(option, flag, sizeof flag);
    fprintf(out, "  ");
    if (option->flag) fprintf(out, "-%c, ", option->flag);
    const bool on = is_on(option), told = option->initial[0] && !on;
    if (on)
        fprintf(out, "--no-%s", flag + 2);
    else
        fprintf(out, "%s", flag);
    if (option->argument) fprintf(out, " %s", option->argument);
    fprintf(out, "\n%s", indent);
    option_range(option, range, sizeof range);
    bool ranged = range[0] && option->type != OPTION_BOOL;
    (void)snprintf(words, sizeof words, "%s%s%s%s%s%s%s%s", on ? turns_off : "", option->help, ranged ? " (" : "", ranged ? range : "",
                   ranged ? ")" : "", told ? " [" : "", told ? option->initial : "", told ? "]" : "");
    print_wrapped(out, words, indent, strlen(indent), 100);
    fputc('\n', out);
}

/* Keys of command_options: "bench.json", "bench.rounds". */
static bool same_command(const char *key, const char *before) {
    size_t length = strcspn(key, ".");
    return strncmp(key, before, length) == 0 && before[length] == '.';
}

void config_print_help(FILE *out, const char *command) {
    int bit = option_command(command);
    fprintf(out, "  -c, --config FILE\n        read settings from a TOML file; deploy/kvasir.toml shows all of them\n");
    for (size_t s = 0; s < SECTIONS; s++) {
        bool titled = false;
        for (size_t i = 0; i < options_count(); i++) {
            if (!in_section(&options[i], sections[s].prefix) || !(options[i].commands & bit)) continue;
            if (!titled)
                fprintf(out, "\n%s%s%s%s:\n", sections[s].prefix[0] ? "[" : "", sections[s].prefix, sections[s].prefix[0] ? "] " : "",
                        sections[s].title);
            titled = true;
            print_option_help(out, &options[i]);
        }
    }
    const char *command_before = "";
    for (size_t i = 0; i < command_options_count(); i++) {
        const struct option_info *option = &command_options[i];
        if (!(option->commands & bit)) continue;
        if (!same_command(option->key, command_before)) fprintf(out, "\n%.*s alone:\n", (int)strcspn(option->key, "."), option->key);
        command_before = option->key;
        print_option_help(out, option);
    }
    fprintf(out,
            "\nEvery option%s is also a key of the TOML file (--max-queue is server.max_queue) and an environment name (KVASIR_MAX_QUEUE).\n"
            "The flag wins over the environment, that over the file, that over the default in [brackets].\n",
            command_before[0] ? " that is not one command's alone" : "");
}

/* ---- the manual page ---- */

/* Text for man: a hyphen stays a hyphen, nothing begins a request. */
static void print_roff(FILE *out, const char *text) {
    if (*text == '.' || *text == '\'') fputs("\\&", out);
    for (; *text; text++) {
        if (*text == '-')
            fputs("\\-", out);
        else if (*text == '\\')
            fputs("\\e", out);
        else
            fputc(*text, out);
    }
}

static void print_option_manual(FILE *out, const struct option_info *option) {
    char flag[64], range[160];
    option_flag_name(option, flag, sizeof flag);
    const bool on = is_on(option);
    fprintf(out, ".TP\n\\fB");
    if (option->flag) fprintf(out, "\\-%c\\fR, \\fB", option->flag);
    if (on) print_roff(out, "--no-");
    print_roff(out, on ? flag + 2 : flag);
    fprintf(out, "\\fR");
    if (option->argument) fprintf(out, " \\fI%s\\fR", option->argument);
    fputc('\n', out);
    if (on) fputs(turns_off, out);
    print_roff(out, option->help);
    option_range(option, range, sizeof range);
    if (range[0] && option->type != OPTION_BOOL) {
        fputs(" (", out);
        print_roff(out, range);
        fputc(')', out);
    }
    fputs(".\n", out);
    if (option->initial[0] && !on) {
        fputs("Default: ", out);
        print_roff(out, option->initial);
        fputs(".\n", out);
    }
}

void config_print_manual(FILE *out) {
    fputs(".SH OPTIONS\n.TP\n\\fB\\-c\\fR, \\fB\\-\\-config\\fR \\fIFILE\\fR\nread settings from a TOML file.\n", out);
    for (size_t s = 0; s < SECTIONS; s++) {
        fprintf(out, ".SS %s%s%s%s\n", sections[s].prefix[0] ? "[" : "", sections[s].prefix, sections[s].prefix[0] ? "] " : "", sections[s].title);
        for (size_t i = 0; i < options_count(); i++)
            if (in_section(&options[i], sections[s].prefix)) print_option_manual(out, &options[i]);
    }
    const char *command_before = "";
    for (size_t i = 0; i < command_options_count(); i++) {
        const struct option_info *option = &command_options[i];
        if (!same_command(option->key, command_before)) {
            fputs(".SS ", out);
            print_roff(out, "kvasir ");
            for (const char *c = option->key; *c != '.'; c++) fprintf(out, "%s", *c == '-' ? "\\-" : (char[2]){*c, '\0'});
            fputs(" alone\n", out);
        }
        command_before = option->key;
        print_option_manual(out, option);
    }
}

/* ---- TOML ---- */

/* A TOML basic string. Values hold no control characters (option_set refuses them). */
static void print_quoted(FILE *out, const char *text) {
    fputc('"', out);
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') fputc('\\', out);
        fputc(*text, out);
    }
    fputc('"', out);
}

static void print_value(FILE *out, const struct option_info *option, const char *text) {
    if (option_quoted(option, text))
        print_quoted(out, text);
    else
        fprintf(out, "%s", text);
}

void config_print_example(FILE *out) {
    fprintf(out, "# Every setting of kvasir with its default. Take away the # in front of a key to change it.\n"
                 "# Each is also a flag (server.max_queue: --max-queue) and an environment name (KVASIR_MAX_QUEUE); a flag wins over the "
                 "environment, that over this file.\n"
                 "# Sizes: a number of bytes, or \"512M\", \"4GiB\" (1024 each), \"4GB\" (1000 each). Durations: a number of seconds, or \"30s\", "
                 "\"5m\", \"1h\".\n"
                 "# \"kvasir check-config FILE\" says what is wrong with a file. Settings marked (reload) are read again on SIGHUP.\n");
    struct config defaults;
    config_defaults(&defaults);
    for (size_t s = 0; s < SECTIONS; s++) {
        fputc('\n', out);
        if (sections[s].prefix[0]) fprintf(out, "[%s] # %s\n", sections[s].prefix, sections[s].title);
        for (size_t i = 0; i < options_count(); i++) {
            const struct option_info *option = &options[i];
            if (!in_section(option, sections[s].prefix)) continue;
            char text[CONFIG_TEXT], range[160];
            option_text(option, &defaults, text, sizeof text);
            option_range(option, range, sizeof range);
            fprintf(out, "\n# %s", option->help);
            if (range[0]) fprintf(out, " (%s)", range);
            fprintf(out, "%s\n# %s = ", option->reload ? " (reload)" : "", option_leaf(option));
            print_value(out, option, text);
            fputc('\n', out);
        }
    }
}

void config_print(const struct config *config, FILE *out) {
    static const char *const sources[] = {"default", "file", "environment", "flag", "argument"};
    for (size_t i = 0; i < options_count(); i++) {
        char text[CONFIG_TEXT];
        option_text(&options[i], config, text, sizeof text);
        fprintf(out, "%s = ", options[i].key);
        print_value(out, &options[i], text);
        fprintf(out, " # %s\n", sources[config->source[i] <= CONFIG_SOURCE_ARGUMENT ? config->source[i] : 0]);
    }
}
