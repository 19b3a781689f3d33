/* kvasir check-config: reads a configuration as serve would, says what is wrong with it or what it comes to, and starts nothing. Main thread.
 * A model that is named must be there and fit, and a file of keys must have some: that is most of what goes wrong at a start. */
#include <string.h>

#include "cli/cli.h"
#include "engine/engine.h"
#include "server/keys.h"

static enum status check_model(const struct config *config, struct error *error) {
    struct model *model = NULL;
    struct memory_plan plan;
    enum status status = cli_open_model(config, &model, error);
    if (status == STATUS_OK) status = engine_plan_memory(config, model, &plan, error);
    model_close(model);
    return status;
}

static enum status check_keys(const struct config *config, struct error *error) {
    struct keys keys = {0};
    enum status status = keys_load(&keys, config->api_key_file, error);
    keys_done(&keys);
    if (status != STATUS_OK) config_locate_value(config, "server.api_key_file", error);
    return status;
}

int command_check_config(const struct config *config, const char *argument) {
    if (config->print_example) {
        config_print_example(stdout);
        return CLI_OK;
    }
    if (config->print_manual) {
        manual_print(stdout);
        return CLI_OK;
    }
    static struct config checked;
    checked = *config;
    struct error error;
    enum status status = STATUS_OK;
    if (argument) status = config_load_file(&checked, argument, &error);
    if (status == STATUS_OK) status = config_check(&checked, &error);
    if (status == STATUS_OK) status = compression_check(&checked, &error);
    if (status == STATUS_OK) status = check_keys(&checked, &error);
    if (status == STATUS_OK && checked.model[0]) status = check_model(&checked, &error);
    if (status != STATUS_OK) {
        config_locate(&checked, &error);
        return cli_fail(&error);
    }
    cli_warn_environment();
    config_print(&checked, stdout);
    return CLI_OK;
}
