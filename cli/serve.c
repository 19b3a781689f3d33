/* kvasir serve: the daemon. The main thread opens the model, which shows most of what can be wrong with it before the port is open, and becomes the loop thread (server_run); repacking
 * the weights runs on the thread that the server starts for it.
 * Owns the model while the server runs. What a person reads goes to stdout (where it listens, the memory plan, a command to try), the log to stderr. */
#include <inttypes.h>
#include <string.h>

#include "base/json_writer.h"
#include "base/log.h"
#include "cli/cli.h"
#include "engine/engine.h"
#include "server/server.h"

struct serving {
    const struct config *config;
    struct model *model;
    struct progress progress;
    struct engine_hooks server_hooks; /* the server's own, behind the bar */
    bool start_failed;
    char name[CONFIG_TEXT];
};

static void report(void *context, double fraction) {
    struct serving *serving = context;
    progress_report(&serving->progress, fraction);
    if (serving->server_hooks.progress) serving->server_hooks.progress(serving->server_hooks.progress_context, fraction);
}

static enum status open_model(const struct config *config, struct model **model, struct error *error) {
    /* The mock backend invents its tokens: any shape will do. */
    if (!config->model[0] && strcmp(config->backend, "mock") == 0) return model_dummy("tiny", 1, model, error);
    return cli_open_model(config, model, error);
}

static const char *served_name(const struct config *config, const struct model *model) {
    return config->served_name[0] ? config->served_name : model_name(model);
}

/* A file may be called anything, a name that clients ask for may not. */
static enum status check_name(const struct config *config, const struct model *model, struct error *error) {
    const char *name = served_name(config, model);
    if (utf8_valid(name, strlen(name))) return STATUS_OK;
    return error_set(error, STATUS_INVALID, "served_name: the model is named after its file, \"%.200s\", which is not valid UTF-8: set another",
                     name);
}

static void describe(struct serving *serving, struct engine *engine, struct server_model *result) {
    const struct model *model = serving->model;
    const char *slash = strrchr(model_path(model), '/');
    *result = (struct server_model){.engine = engine, .tokenizer = model_tokenizer(model), .parameters = model_parameters(model)};
    snprintf(serving->name, sizeof serving->name, "%s", served_name(serving->config, model));
    memcpy(result->served_name, serving->name, sizeof result->served_name);
    snprintf(result->root, sizeof result->root, "%s", slash ? slash + 1 : model_path(model));
    snprintf(result->architecture, sizeof result->architecture, "%.31s", model_architecture(model));
}

/* A better backend is in this build: why "auto" is not that one. */
static void say_why_not(const struct config *config) {
    const struct backend_ops *chosen = backend_choose(config->backend, config->device);
    for (const struct backend_ops *const *ops = backends; strcmp(config->backend, "auto") == 0 && *ops != chosen; ops++) {
        struct error error;
        if ((*ops)->memory(config->device, NULL, NULL, &error) != STATUS_OK)
            log_info("engine.backend: %s, not %s: %s", chosen->name, (*ops)->name, error.text);
    }
}

static enum status load(struct serving *serving, const struct engine_hooks *hooks, struct engine **engine, struct error *error) {
    serving->server_hooks = *hooks;
    struct engine_hooks mine = *hooks;
    mine.progress = report;
    mine.progress_context = serving;
    say_why_not(serving->config);
    progress_begin(&serving->progress, "loading");
    enum status status = engine_start(serving->config, serving->model, &mine, engine, error);
    progress_end(&serving->progress);
    return status;
}

/* server_setup.start. */
static enum status start(void *context, const struct engine_hooks *hooks, struct server_model *result, struct error *error) {
    struct serving *serving = context;
    struct engine *engine = NULL;
    enum status status = load(serving, hooks, &engine, error);
    if (status != STATUS_OK) {
        serving->start_failed = true;
        return status;
    }
    printf("%s: %s\n", model_path(serving->model), engine_describe(engine));
    memory_plan_print(engine_limits(engine), stdout);
    fflush(stdout);
    describe(serving, engine, result);
    return STATUS_OK;
}

static void listening(void *context, const char *url) {
    (void)context;
    printf("listening on %s\n", url);
    fflush(stdout);
}

static void ready(void *context, const char *url) {
    const struct serving *serving = context;
    printf("ready. Try:\n  curl %s/v1/completions -H 'Content-Type: application/json' \\\n"
           "    -d '{\"model\": \"%s\", \"prompt\": \"The capital of France is\", \"max_tokens\": 16, \"temperature\": 0}'\n",
           url, serving->name);
    fflush(stdout);
}

/* What would fail while loading and can be known before: nobody is told that a server listens which is about to end. */
static enum status prepare(const struct config *config, struct model **model, struct error *error) {
    struct memory_plan plan;
    enum status status = config_check(config, error);
    if (status == STATUS_OK) status = compression_check(config, error);
    if (status == STATUS_OK) status = open_model(config, model, error);
    if (status == STATUS_OK) status = check_name(config, *model, error);
    if (status == STATUS_OK) status = engine_plan_memory(config, *model, &plan, error);
    if (status != STATUS_OK) config_locate(config, error);
    return status;
}

int command_serve(const struct config *config, const char *argument) {
    (void)argument;
    static const char *const levels[] = {"error", "warn", "info", "debug"};
    for (int i = 0; i < 4; i++)
        if (strcmp(config->log_level, levels[i]) == 0) log_set_level((enum log_level)i);
    struct error error;
    struct serving serving = {.config = config};
    enum status status = prepare(config, &serving.model, &error);
    if (status != STATUS_OK) {
        model_close(serving.model);
        return cli_fail(&error);
    }
    cli_warn_environment();
    cli_warn_backend(config);
    struct server_setup setup = {.config = config, .start = start, .listening = listening, .ready = ready, .context = &serving};
    status = server_run(&setup, &error);
    model_close(serving.model);
    if (status == STATUS_OK) return CLI_OK;
    int code = cli_fail(&error);
    /* A port in use may be free the next time; a model file that cannot be read, or a key file, will not mend itself. */
    return status == STATUS_IO && !serving.start_failed ? CLI_FAILED : code;
}
