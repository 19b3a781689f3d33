/* kvasir inspect: what is in a model file, and what memory it would take at a context (--max-model-len) and a concurrency (--max-sequences). Main thread. */
#include <inttypes.h>

#include "cli/cli.h"
#include "engine/engine.h"
#include "kernels/backend.h"

/* The plan above it is cut to the memory that is free; this says what the asked for would take. */
static void print_demand(const struct program *program, const struct memory_plan *plan, const struct config *config) {
    uint64_t context = config->max_model_len ? config->max_model_len : program->context_train;
    uint64_t sequences = config->max_sequences ? config->max_sequences : plan->max_sequences;
    uint64_t blocks = (context + BLOCK_TOKENS - 1) / BLOCK_TOKENS * program_lanes(program);
    double bytes = (double)(blocks * plan->block_bytes); /* at most 2^24 / 32 * 2^20 * 2^20: fits */
    printf("%-16s %.2f MiB a sequence of %" PRIu64 " tokens (%u lanes, %s), %.2f GiB for %" PRIu64 " of them\n", "KV cache", bytes / 0x1p20, context,
           program_lanes(program), kv_dtype_name(plan->kv_dtype), bytes * (double)sequences / 0x1p30, sequences);
}

int command_inspect(const struct config *config, const char *argument) {
    (void)argument;
    struct error error;
    struct model *model = NULL;
    enum status status = cli_open_model(config, &model, &error);
    if (status != STATUS_OK) return cli_fail(&error);
    model_describe(model, stdout);
    struct memory_plan plan;
    status = engine_plan_memory(config, model, &plan, &error);
    if (status == STATUS_OK) {
        cli_warn_backend(config);
        print_demand(model_program(model), &plan, config);
        printf("\n");
        memory_plan_print(&plan, stdout);
    }
    model_close(model);
    return status == STATUS_OK ? CLI_OK : cli_fail(&error);
}
