/* The memory plan, as a person reads it: a table for each memory there is, what of it is the KV cache, what was chosen and what was lowered. Owns nothing; any thread. */
#include <inttypes.h>
#include <stdio.h>

#include "engine/engine.h"

static const char *readable(uint64_t bytes, char text[32]) {
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double value = (double)bytes;
    int unit = 0;
    while (value >= 1024 && unit < 6) value /= 1024, unit++;
    (void)snprintf(text, 32, unit ? "%.2f %s" : "%.0f %s", value, units[unit]);
    return text;
}

static void print_table(const struct memory_plan *plan, const char *title, bool of_device, uint64_t total_bytes, uint64_t available_bytes,
                        FILE *out) {
    char total[32];
    (void)fprintf(out, "%-16s %12s   %14s   %12s\n", title, "count", "bytes each", "total");
    for (uint32_t i = 0; i < plan->n_lines; i++) {
        const struct memory_line *line = &plan->lines[i];
        if (plan->has_device && line->host == of_device) continue;
        (void)fprintf(out, "%-16s %12" PRIu64 " x %14" PRIu64 " = %12s\n", line->what, line->count, line->bytes_each,
                      readable(line->count * line->bytes_each, total));
    }
    (void)fprintf(out, "%-16s %12s   %14s   %12s", "all", "", "", readable(total_bytes, total));
    if (available_bytes != UINT64_MAX) (void)fprintf(out, " of %s available", readable(available_bytes, total));
    (void)fprintf(out, "\n");
}

/* Both ways to keep the weights: what they take, and the tokens of KV cache that would fit beside them. */
static void print_weights(const struct memory_plan *plan, FILE *out) {
    char bytes[32];
    for (int mode = WEIGHTS_F16; mode <= WEIGHTS_NATIVE; mode++)
        (void)fprintf(out, "%-16s %-6s %12s, leaving room for %" PRIu64 " tokens%s\n", "weights", weights_mode_name((enum weights_mode)mode),
                      readable(plan->weights_plans[mode].bytes, bytes), plan->weights_plans[mode].kv_tokens,
                      (enum weights_mode)mode == plan->weights ? " (chosen)" : "");
}

void memory_plan_print(const struct memory_plan *plan, FILE *out) {
    if (plan->has_device) print_table(plan, "device memory", true, plan->device_bytes, plan->device_available_bytes, out);
    print_table(plan, plan->has_device ? "host memory" : "memory", false, plan->total_bytes, plan->available_bytes, out);
    if (plan->has_device) print_weights(plan, out);
    (void)fprintf(out, "%-16s %" PRIu64 " tokens (%s), %u sequences at once of at most %u tokens, %u rows a step\n", "KV cache", plan->kv_tokens,
                  kv_dtype_name(plan->kv_dtype), plan->max_sequences, plan->max_model_len, plan->max_rows);
    if (plan->lowered[0]) (void)fprintf(out, "%-16s %s\n", "lowered", plan->lowered);
}
