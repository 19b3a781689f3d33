/* What the commands share. See cli.h. Owns nothing. */
#include "cli/cli.h"

#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "engine/system_memory.h"

const struct command commands[] = {
    {"serve", "[MODEL]", "serve a model over HTTP", true, command_serve},
    {"bench", "[MODEL]", "measure prompt and generation speed", true, command_bench},
    {"eval", "[MODEL]", "measure what compressing the KV cache costs in quality", true, command_eval},
    {"inspect", "[MODEL]", "describe a model file and the memory it would take", true, command_inspect},
    {"check-config", "[FILE]", "say whether a configuration is valid, and what it comes to", false, command_check_config},
};

size_t commands_count(void) { return sizeof commands / sizeof *commands; }

int cli_fail(const struct error *error) {
    char line[sizeof error->text];
    size_t length = 0;
    /* Paths may hold anything; the line stays one line. */
    for (; length + 1 < sizeof line && error->text[length]; length++) {
        unsigned char byte = (unsigned char)error->text[length];
        line[length] = byte < 0x20 || byte == 0x7f ? '?' : (char)byte;
    }
    line[length] = '\0';
    fprintf(stderr, "kvasir: %s\n", line);
    return error->status == STATUS_DEVICE ? CLI_FAILED : CLI_BAD_SETUP;
}

enum status cli_open_model(const struct config *config, struct model **model, struct error *error) {
    if (!config->model[0]) return error_set(error, STATUS_INVALID, "model: none given; -m FILE names a GGUF file");
    enum status status = model_open(config->model, model, error);
    if (status != STATUS_OK) config_locate_value(config, "model", error);
    return status;
}

enum status cli_dummy_fits(const char *shape, uint64_t bytes, uint64_t available, struct error *error) {
    if (bytes <= available / 2) return STATUS_OK;
    return error_set(error, STATUS_NO_MEMORY,
                     "--dummy %s: %.1f MiB of random weights and as much for the backend's copy of them are %.1f MiB; %.1f MiB are available", shape,
                     (double)bytes / 0x1p20, (double)bytes * 2 / 0x1p20, (double)available / 0x1p20);
}

/* NULL for what is not wanted of its memory. */
static enum status find_backend(const struct config *config, uint64_t *available_bytes, uint64_t *total_bytes, const struct backend_ops **found,
                                struct error *error) {
    const struct backend_ops *ops = *found = backend_choose(config->backend, config->device);
    if (!ops) return backend_absent(config->backend, error);
    enum status status = ops->memory(config->device, available_bytes, total_bytes, error);
    if (status != STATUS_OK) (void)error_prefix(error, "engine.backend: %s", ops->name);
    return status;
}

enum status cli_open_dummy(const struct config *config, const char *shape, struct model **model, struct error *error) {
    uint64_t bytes;
    if (config->model[0]) return error_set(error, STATUS_INVALID, "--dummy: there is a model already, %.200s", config->model);
    const struct backend_ops *ops;
    enum status status = model_dummy_bytes(shape, &bytes, error);
    if (status == STATUS_OK) status = find_backend(config, NULL, NULL, &ops, error); /* before gigabytes are made for one that is not there */
    if (status == STATUS_OK) status = cli_dummy_fits(shape, bytes, system_memory_available(""), error);
    if (status != STATUS_OK) return status;
    struct progress progress;
    progress_begin(&progress, "making weights");
    status = model_dummy_told(shape, 1, (struct model_progress){.report = progress_report, .context = &progress}, model, error);
    progress_end(&progress);
    return status;
}

enum status cli_choose_backend(const struct config *config, const struct program *program, struct cli_backend *chosen, struct error *error) {
    const struct backend_ops *ops;
    const char *set = strcmp(config->instruction_set, "auto") == 0 ? NULL : config->instruction_set;
    uint64_t available_bytes, total_bytes;
    enum status status = find_backend(config, &available_bytes, &total_bytes, &ops, error);
    if (status != STATUS_OK) return status;
    *chosen = (struct cli_backend){.ops = ops,
                                   .limits = {.kv_dtype = backend_kv_dtype(ops, set),
                                              .device = config->device,
                                              .deterministic = config->deterministic,
                                              .threads = config->threads,
                                              .instruction_set = set,
                                              .drop_source_pages = true}};
    (void)kv_dtype_parse(config->kv_dtype, &chosen->limits.kv_dtype);   /* "auto": as it is */
    (void)weights_mode_parse(config->weights, &chosen->limits.weights); /* one of the option's choices */
    (void)activation_bits_parse(config->activations, &chosen->limits.activation_bits);
    chosen->memory_bytes = total_bytes;
    chosen->on_host = chosen->memory_bytes == 0;
    if (chosen->on_host) chosen->memory_bytes = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    chosen->block_bytes = ops->block_bytes(program, chosen->limits.kv_dtype);
    if (chosen->block_bytes > 0) return STATUS_OK;
    return error_set(error, STATUS_UNSUPPORTED, "engine.kv_dtype: the %s backend does not store %s", ops->name,
                     kv_dtype_name(chosen->limits.kv_dtype));
}

void cli_warn_environment(void) {
    char names[256];
    if (config_unknown_environment(names, sizeof names) > 0) log_warn("environment: no such option: %s", names);
}

void cli_warn_backend(const struct config *config) {
    const struct backend_ops *ops = backend_choose(config->backend, config->device);
    uint64_t own_bytes = 0;
    struct error error;
    if (strcmp(config->weights, "f16") != 0 || !ops || ops->memory(config->device, NULL, &own_bytes, &error) != STATUS_OK || own_bytes > 0) return;
    log_warn("engine.weights: \"f16\" changes nothing, the %s backend reads weights in the file's types", ops->name);
}

/* ---- progress ---- */

#define BAR_WIDTH 40
#define LINE_EVERY_NS 2000000000ull

void progress_begin(struct progress *progress, const char *what) {
    uint64_t now = clock_now_ns();
    *progress = (struct progress){.what = what, .terminal = isatty(STDERR_FILENO) == 1, .shown = -1, .begun_ns = now, .next_ns = now + LINE_EVERY_NS};
}

/* ", about 1:05 left", once a guess is worth something. */
static void time_left(const struct progress *progress, uint64_t now, double fraction, char *words, size_t size) {
    words[0] = '\0';
    double elapsed = (double)(now - progress->begun_ns) / 1e9;
    if (elapsed < 5 || fraction <= 0.01 || fraction >= 1) return;
    unsigned left = (unsigned)(elapsed * (1 - fraction) / fraction);
    (void)snprintf(words, size, ", about %u:%02u left", left / 60, left % 60);
}

void progress_report(void *context, double fraction) {
    struct progress *progress = context;
    int percent = fraction <= 0 ? 0 : fraction >= 1 ? 100 : (int)(fraction * 100);
    uint64_t now = clock_now_ns();
    char left[48];
    if (progress->terminal ? percent <= progress->shown && now < progress->next_ns : percent <= progress->shown || now < progress->next_ns) return;
    progress->next_ns = now + LINE_EVERY_NS;
    progress->shown = percent;
    time_left(progress, now, fraction, left, sizeof left);
    if (!progress->terminal) {
        log_info("%s: %d %%%s", progress->what, percent, left);
        return;
    }
    char bar[BAR_WIDTH + 1];
    int filled = percent * BAR_WIDTH / 100;
    memset(bar, ' ', BAR_WIDTH);
    memset(bar, '#', (size_t)filled);
    bar[BAR_WIDTH] = '\0';
    fprintf(stderr, "\r%s [%s] %3d %%%s\033[K", progress->what, bar, percent, left);
}

void progress_end(struct progress *progress) {
    if (progress->terminal && progress->shown >= 0) fprintf(stderr, "\r\033[K");
    progress->shown = -1;
}
