/* What the two writers of bench's results share. */
#pragma once

#include "base/json_writer.h"
#include "cli/bench.h"

static inline void json_key_unsigned(struct json_writer *json, const char *key, uint64_t value) {
    json_key(json, key);
    json_unsigned(json, value);
}

static inline void json_key_text(struct json_writer *json, const char *key, const char *text) {
    json_key(json, key);
    json_text(json, text);
}

static inline void json_key_double(struct json_writer *json, const char *key, double value) {
    json_key(json, key);
    json_double(json, value);
}

/* bench_print.c: "AMD EPYC 9R45"; model, machine, build and bandwidth as the first keys of the object. */
void bench_cpu_name(char *name, size_t size);
void bench_json_head(struct json_writer *json, const struct bench_report *report);
