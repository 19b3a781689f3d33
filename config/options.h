/* The table of options: everything that is said about a setting is said once, here. It gives TOML keys, flags, environment names, defaults, ranges, --help,
 * the example file, the manual page and the shell completion. Const. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "base/error.h"
#include "config/config.h"

enum option_type {
    OPTION_BOOL,
    OPTION_PORT,     /* uint16_t */
    OPTION_COUNT,    /* uint32_t */
    OPTION_NUMBER,   /* uint64_t */
    OPTION_SIZE,     /* uint64_t bytes: "4GiB", "512M", "1000000" */
    OPTION_DURATION, /* uint32_t seconds: "30s", "1m", "2h", or a bare number of seconds */
    OPTION_FLOAT,    /* double, finite */
    OPTION_TEXT,
    OPTION_LIST, /* text, comma-separated; TOML takes an array of strings too */
    OPTION_ENUM, /* text, one of `choices` */
};

enum { COMMAND_SERVE = 1, COMMAND_BENCH = 2, COMMAND_INSPECT = 4, COMMAND_CHECK = 8, COMMAND_EVAL = 16 };

struct option_info {
    const char *key; /* "server.port": TOML; its last part gives --port and KVASIR_PORT */
    char flag;       /* 'm' for -m; 0: none */
    enum option_type type;
    uint16_t offset, size; /* in struct config */
    const char *initial;   /* default, as a user would write it */
    double min, max;       /* of numbers; unused else */
    const char *zero;      /* the word that stands for 0 ("auto", "off"); NULL: none */
    const char *choices;   /* OPTION_ENUM: "auto, cpu, mock" */
    const char *argument;  /* in --help: "FILE" */
    bool reload;           /* may change on SIGHUP */
    int commands;          /* that look at it */
    const char *help;      /* one sentence or two, no full stop at the end of the last */
};

extern const struct option_info options[];
size_t options_count(void);

/* Flags of one command alone ("bench --rounds"): same rows, but neither TOML keys nor environment names; their key's first part is the command. */
extern const struct option_info command_options[];
size_t command_options_count(void);
/* COMMAND_BENCH for "bench"; every bit for a word that is no command. */
int option_command(const char *name);

/* "port", from "server.port". */
const char *option_leaf(const struct option_info *option);
/* "--max-queue", "KVASIR_MAX_QUEUE". `size` >= 64 holds any. */
void option_flag_name(const struct option_info *option, char *name, size_t size);
void option_environment_name(const struct option_info *option, char *name, size_t size);

/* NULL: no such. Flags and letters: of both tables; of several commands' own flags of one name ("--prompt"), the row that one of `commands` looks at, else the first. */
const struct option_info *option_by_key(const char *key);
const struct option_info *option_by_flag(const char *name, size_t length, int commands); /* without the dashes */
const struct option_info *option_by_letter(char letter, int commands);

/* The known name nearest to `name` by edit distance, if near enough to be meant; NULL: none. NAMES of options in the form they are compared in. */
enum option_form { OPTION_FORM_KEY, OPTION_FORM_FLAG, OPTION_FORM_ENVIRONMENT };
/* Writes ' (did you mean "server.port"?)' or nothing. */
void option_suggest(const char *name, enum option_form form, char *words, size_t size);
/* Distance in inserted, deleted, changed or swapped bytes; words longer than 63 bytes are as far as they are long. */
unsigned edit_distance(const char *a, const char *b);

/* config/value.c: one option's value from and to text. `where` begins the error: "kvasir.toml:3:8: server.port". */
enum status option_set(const struct option_info *option, struct config *config, const char *text, size_t length, const char *where,
                       struct error *error);
void option_text(const struct option_info *option, const struct config *config, char *text, size_t size); /* as a user would write it */
void option_range(const struct option_info *option, char *words, size_t size); /* "0 to 65535", "\"auto\" or 1 to 512"; empty: anything */
bool option_quoted(const struct option_info *option, const char *text);        /* does this value stand in quotes in TOML? */
