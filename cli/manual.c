/* The manual page, for man: the words are here, commands and options come from their tables. deploy/kvasir.1 is what it prints, and a test compares. */
#include "cli/cli.h"

void manual_print(FILE *out) {
    fprintf(out,
            ".\\\" Printed by \"kvasir check-config --print-manual\".\n"
            ".TH KVASIR 1 \"\" \"kvasir %s\" \"User Commands\"\n"
            ".SH NAME\nkvasir \\- serve language models over the OpenAI HTTP API\n"
            ".SH SYNOPSIS\n.B kvasir\n.I COMMAND\n[options]\n"
            ".SH DESCRIPTION\n"
            ".B kvasir\nloads a language model from a GGUF file and serves it to any OpenAI client, many requests at once, from a KV cache that is "
            "paged per head.\n"
            "With a model and no options it starts and fits: it listens on 127.0.0.1:8080 and sizes its memory by what is free.\n"
            ".SH COMMANDS\n",
            KVASIR_VERSION);
    for (size_t i = 0; i < commands_count(); i++) {
        fputs(".TP\n\\fB", out);
        for (const char *c = commands[i].name; *c; c++) fputs(*c == '-' ? "\\-" : (char[2]){*c, '\0'}, out);
        fprintf(out, "\\fR %s\n%s.\n", commands[i].arguments, commands[i].summary);
    }
    config_print_manual(out);
    fputs(".SH ENVIRONMENT\n"
          "Each option that is not one command's alone is also read from the environment: \\fB\\-\\-max\\-queue\\fR from \\fBKVASIR_MAX_QUEUE\\fR.\n"
          ".TP\n\\fBKVASIR_CONFIG\\fR\nthe configuration file where \\fB\\-\\-config\\fR names none.\n"
          ".SH FILES\n.TP\n\\fI/etc/kvasir/kvasir.toml\\fR\nwhat the systemd unit reads. Every setting with its default is printed by\n"
          ".BR \"kvasir check\\-config \\-\\-print\\-example\" .\n"
          ".SH SIGNALS\n"
          ".TP\n\\fBSIGTERM\\fR, \\fBSIGINT\\fR\ntake no more requests, finish those that run within \\fBdrain_timeout\\fR, exit; a second one: at "
          "once.\n"
          ".TP\n\\fBSIGHUP\\fR\nread the file again: API keys, limits and the log level change, the rest stays.\n"
          ".SH EXIT STATUS\n.TP\n0\ndone.\n.TP\n1\nit failed while running: the address is in use, a device broke.\n"
          ".TP\n2\nthe configuration or the model is wrong; one line on standard error says what. Starting it again will not help.\n"
          ".SH EXAMPLES\n.nf\nkvasir serve \\-m model.gguf \\-\\-port 8080\n"
          "kvasir inspect model.gguf \\-\\-max\\-model\\-len 4096 \\-\\-max\\-sequences 32\n"
          "kvasir bench \\-m model.gguf \\-p 512 \\-n 128 \\-b 1,8,32 \\-\\-json\n"
          "kvasir eval \\-m model.gguf \\-\\-text book.txt \\-\\-policies snapkv,kv_compress \\-\\-keep 0.5,0.25 \\-\\-svg eval.svg\n.fi\n",
          out);
}
