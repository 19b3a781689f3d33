/* Runs a fuzz target without libFuzzer: every file of a corpus folder, then a fixed number of mutations of them. The same seed gives the same inputs, so that a
 * failure here can be repeated; the work is bounded by counts, never by the clock. Input lies in memory of exactly its size, so that a sanitizer sees any
 * byte read past the end.   driver FOLDER [MUTATIONS [SEED]] */
#include <dirent.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/random.h"

#define FILES_MAX 1024
#define INPUT_MAX (64u << 10)
#define MUTATIONS 20000u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct input {
    uint8_t *bytes;
    size_t length;
};

static struct input read_input(const char *folder, const char *name) {
    char path[4096];
    (void)snprintf(path, sizeof path, "%s/%s", folder, name);
    struct input input = {check_calloc(INPUT_MAX, 1), 0};
    FILE *file = fopen(path, "rb");
    CHECK(file != NULL);
    input.length = fread(input.bytes, 1, INPUT_MAX, file);
    CHECK(feof(file) && !ferror(file)); /* larger files would be tried cut short, and in silence */
    (void)fclose(file);
    return input;
}

static void run(const uint8_t *bytes, size_t length) {
    uint8_t *exact = malloc(length ? length : 1);
    CHECK(exact != NULL);
    if (length > 0) memcpy(exact, bytes, length);
    CHECK(LLVMFuzzerTestOneInput(exact, length) == 0);
    free(exact);
}

/* One edit in place; `bytes` has room for INPUT_MAX. */
static size_t edit(struct random *random, uint8_t *bytes, size_t length, const struct input *other) {
    static const uint8_t telling[] = {0x00, 0x01, 0x7f, 0x80, 0xff, ' ', '\n', '"', '{', '<'};
    if (length == 0) {
        bytes[0] = (uint8_t)random_next(random);
        return 1;
    }
    size_t at = random_below(random, (uint32_t)length), count = 1 + random_below(random, 16);
    switch (random_below(random, 7)) {
    case 0: bytes[at] ^= (uint8_t)(1u << random_below(random, 8)); break;
    case 1: bytes[at] = telling[random_below(random, sizeof telling)]; break;
    case 2: bytes[at] = (uint8_t)random_next(random); break;
    case 3: return at; /* cut */
    case 4:            /* take out */
        if (count > length - at) count = length - at;
        memmove(bytes + at, bytes + at + count, length - at - count);
        return length - count;
    case 5: /* double a run */
        if (count > length - at) count = length - at;
        if (length + count > INPUT_MAX) break;
        memmove(bytes + at + count, bytes + at, length - at);
        return length + count;
    default: /* a run of another file */
        if (other->length == 0) break;
        for (size_t i = 0, from = random_below(random, (uint32_t)other->length); i < count && at + i < length && from + i < other->length; i++)
            bytes[at + i] = other->bytes[from + i];
    }
    return length;
}

int main(int argc, char **argv) {
    CHECK(argc >= 2 && argc <= 4);
    uint32_t mutations = argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 10) : MUTATIONS;
    struct random random = {.state = argc > 3 ? strtoull(argv[3], NULL, 10) : 1};
    struct input inputs[FILES_MAX];
    struct dirent **entries;
    int found = scandir(argv[1], &entries, NULL, alphasort);
    CHECK(found >= 0);
    uint32_t count = 0;
    for (int i = 0; i < found; i++) {
        if (entries[i]->d_name[0] != '.') {
            CHECK(count < FILES_MAX);
            inputs[count++] = read_input(argv[1], entries[i]->d_name);
        }
        free(entries[i]);
    }
    free(entries);
    CHECK(count > 0);
    run((const uint8_t *)"", 0);
    for (uint32_t i = 0; i < count; i++) run(inputs[i].bytes, inputs[i].length);
    uint8_t *bytes = check_calloc(INPUT_MAX, 1);
    for (uint32_t i = 0; i < mutations; i++) {
        const struct input *input = &inputs[random_below(&random, count)];
        size_t length = input->length;
        memcpy(bytes, input->bytes, length);
        for (uint32_t edits = 1 + random_below(&random, 8); edits > 0; edits--)
            length = edit(&random, bytes, length, &inputs[random_below(&random, count)]);
        run(bytes, length);
    }
    printf("%" PRIu32 " files, %" PRIu32 " mutations\n", count, mutations);
    for (uint32_t i = 0; i < count; i++) free(inputs[i].bytes);
    free(bytes);
    return 0;
}
