/* The program: finds the command, reads its options, runs it. Main thread. Deliberately does nothing of its own: each command has a file. */
#include <stdio.h>
#include <string.h>

#include "cli/cli.h"
#include "config/options.h"

static void print_usage(FILE *out) {
    fprintf(out, "kvasir serves language models over the OpenAI HTTP API.\n\nusage: kvasir COMMAND [options]\n\n");
    for (size_t i = 0; i < commands_count(); i++) fprintf(out, "  %-13s%-9s %s\n", commands[i].name, commands[i].arguments, commands[i].summary);
    fprintf(out, "\n  --version    print the version\n  --help       print this, or after a command its options\n");
}

static const struct command *find_command(const char *name) {
    for (size_t i = 0; i < commands_count(); i++)
        if (strcmp(commands[i].name, name) == 0) return &commands[i];
    return NULL;
}

static int unknown_command(const char *name) {
    const char *nearest = commands[0].name;
    for (size_t i = 1; i < commands_count(); i++)
        if (edit_distance(name, commands[i].name) < edit_distance(name, nearest)) nearest = commands[i].name;
    struct error error;
    bool near = edit_distance(name, nearest) <= 1 + strlen(name) / 3;
    (void)error_set(&error, STATUS_INVALID, "unknown command \"%.40s\"%s%s%s; --help lists them", name, near ? " (did you mean \"" : "",
                    near ? nearest : "", near ? "\"?)" : "");
    return cli_fail(&error);
}

/* What follows the options: at most one argument. */
static enum status take_argument(const struct command *command, struct config *config, int argc, char **argv, const char **argument,
                                 struct error *error) {
    *argument = NULL;
    if (argc == 0) return STATUS_OK;
    if (argc > 1 || !command->arguments[0])
        return error_set(error, STATUS_INVALID, "kvasir %s: argument \"%.100s\" is one too many", command->name, argv[argc > 1 ? 1 : 0]);
    if (!command->takes_model) {
        *argument = argv[0];
        return STATUS_OK;
    }
    const struct option_info *option = option_by_key("model");
    if (config->source[option - options] == CONFIG_SOURCE_FLAG)
        return error_set(error, STATUS_INVALID, "model: given twice, as -m %.100s and as %.100s", config->model, argv[0]);
    config->source[option - options] = CONFIG_SOURCE_ARGUMENT;
    return option_set(option, config, argv[0], strlen(argv[0]), "model", error);
}

int main(int argc, char **argv) {
    if (argc < 2) {
        print_usage(stderr);
        return CLI_BAD_SETUP;
    }
    if (strcmp(argv[1], "--version") == 0) {
        printf("kvasir %s\n", KVASIR_VERSION);
        return CLI_OK;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0) {
        print_usage(stdout);
        return CLI_OK;
    }
    const struct command *command = find_command(argv[1]);
    if (!command) return unknown_command(argv[1]);

    static struct config config; /* const from here on: larger than a stack frame should be */
    struct error error;
    int first = 0;
    bool help = false;
    enum status status = config_load(&config, argc - 1, argv + 1, &first, &help, &error);
    if (status == STATUS_OK && help) {
        printf("kvasir %s: %s\n\nusage: kvasir %s [options] %s\n\n", command->name, command->summary, command->name, command->arguments);
        config_print_help(stdout, command->name);
        return CLI_OK;
    }
    const char *argument = NULL;
    if (status == STATUS_OK) status = take_argument(command, &config, argc - 1 - first, argv + 1 + first, &argument, &error);
    if (status != STATUS_OK) {
        (void)cli_fail(&error);
        return CLI_BAD_SETUP;
    }
    int code = command->run(&config, argument);
    if (fflush(stdout) != 0 && code == CLI_OK) {
        perror("kvasir: standard output");
        code = CLI_FAILED;
    }
    return code;
}
