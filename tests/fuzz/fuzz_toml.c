/* A configuration file of any bytes: loaded, or refused with one line that names it. What was loaded reads back from what is printed. Rooms: config base
 * Corpus: the example file, files of tests/unit/config, and TOML's corners (dotted keys, inline tables, arrays of tables, dates, multi-line strings, escapes). */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/check.h"
#include "config/config.h"
#include "config/options.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Loads `bytes` as a file, over the defaults. */
static enum status load(const void *bytes, size_t size, struct config *config, char path[64], struct error *error) {
    int file = memfd_create("config", MFD_CLOEXEC);
    CHECK(file >= 0 && (size == 0 || write(file, bytes, size) == (ssize_t)size));
    (void)snprintf(path, 64, "/proc/self/fd/%d", file);
    config_defaults(config);
    enum status status = config_load_file(config, path, error);
    (void)close(file);
    return status;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static struct config config, again, defaults;
    struct error error = {0};
    char path[64];
    config_defaults(&defaults);
    enum status status = load(data, size, &config, path, &error);
    if (status != STATUS_OK) {
        CHECK(error.status == status && strncmp(error.text, path, strlen(path)) == 0 && !strchr(error.text, '\n'));
        for (size_t i = 0; i < options_count(); i++) /* all or nothing */
            CHECK(memcmp((char *)&config + options[i].offset, (char *)&defaults + options[i].offset, options[i].size) == 0);
        return 0;
    }
    char *printed = NULL;
    size_t length = 0;
    FILE *out = open_memstream(&printed, &length);
    CHECK(out);
    config_print(&config, out);
    CHECK(fclose(out) == 0);
    if (load(printed, length, &again, path, &error) != STATUS_OK) {
        fprintf(stderr, "%s\n%s", error.text, printed);
        CHECK(!"what is printed reads back");
    }
    for (size_t i = 0; i < options_count(); i++)
        CHECK(memcmp((char *)&config + options[i].offset, (char *)&again + options[i].offset, options[i].size) == 0);
    free(printed);
    return 0;
}
