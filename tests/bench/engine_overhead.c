/* What a step costs the host beside the forward pass: scheduler, batch building, commit and events, over the mock backend, whose time is not counted (engine_stats.schedule_ns).
 *
 *   engine_overhead [SHAPE]     a shape of model_dummy; tiny (4 lanes) if none is named, smollm2-135m has 90
 *
 * Prints one line for each number of sequences that decode at once, all in step, so that they need new blocks in all lanes together: the most is of such a step. Main thread, and the engine's. */
#include <stdio.h>

#include "tests/support/engine_client.h"

enum { PROMPT = 40, NEW = 100 };

static void measure(const struct model *model, uint32_t n_sequences) {
    struct config config;
    struct client client;
    struct error error;
    config_defaults(&config);
    (void)snprintf(config.backend, sizeof config.backend, "mock");
    config.max_sequences = n_sequences;
    config.max_model_len = 256;
    config.step_ms = 10000;
    struct engine_hooks hooks = client_init(&client);
    if (engine_start(&config, model, &hooks, &client.engine, &error) != STATUS_OK) {
        (void)fprintf(stderr, "engine_overhead: %s\n", error.text);
        exit(1);
    }
    struct job **jobs = check_calloc(n_sequences, sizeof(struct job *));
    struct random random = {1};
    for (uint32_t i = 0; i < n_sequences; i++) {
        int32_t prompt[PROMPT];
        for (uint32_t t = 0; t < PROMPT; t++) prompt[t] = (int32_t)random_below(&random, 256);
        jobs[i] = job_new(prompt, PROMPT, NEW, 1);
        CHECK(client_submit(&client, jobs[i]));
    }
    client_run(&client, 0);
    struct engine_stats stats = client_settled(&client);
    double us = (double)stats.schedule_ns / 1000 / (double)stats.steps, rows = (double)stats.step_rows_sum / (double)stats.steps;
    printf("%9u %8llu %10.1f %12.2f %12.2f %12.3f\n", n_sequences, (unsigned long long)stats.steps, rows, us, (double)stats.schedule_ns_max / 1000,
           us / rows);
    for (uint32_t i = 0; i < n_sequences; i++) job_free(jobs[i]);
    free(jobs);
    client_done(&client);
}

int main(int argc, char **argv) {
    struct model *model;
    struct error error;
    if (model_dummy(argc > 1 ? argv[1] : "tiny", 1, &model, &error) != STATUS_OK) {
        (void)fprintf(stderr, "engine_overhead: %s\n", error.text);
        return 1;
    }
    printf("%u lanes\n%9s %8s %10s %12s %12s %12s\n", program_lanes(model_program(model)), "sequences", "steps", "rows/step", "us/step",
           "us/step max", "us/row");
    static const uint32_t sequences[] = {1, 8, 32, 64, 128, 256};
    for (uint32_t i = 0; i < sizeof sequences / sizeof *sequences; i++) measure(model, sequences[i]);
    model_close(model);
    return 0;
}
