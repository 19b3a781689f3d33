/* bandwidth BYTES THREADS: how fast this machine reads memory right now, in GB/s: a buffer of that size, by so many threads, the best of a few passes. Comparisons ask before
 * and after each pair of measurements whether the machine is still the same one. Main thread. */
#include <stdio.h>
#include <stdlib.h>

#include "cli/bench.h"

int main(int argc, char **argv) {
    struct bench_ceilings ceilings;
    struct error error;
    char *end = "";
    unsigned long long bytes = argc == 3 ? strtoull(argv[1], &end, 10) : 0;
    unsigned long threads = argc == 3 && *end == '\0' ? strtoul(argv[2], &end, 10) : 0;
    if (bytes == 0 || bytes > 1ull << 40 || threads == 0 || threads > 1024 || *end != '\0') {
        (void)fprintf(stderr, "bandwidth BYTES THREADS\n");
        return 2;
    }
    if (bench_measure_ceilings((uint32_t)threads, bytes, &ceilings, &error) != STATUS_OK) {
        (void)fprintf(stderr, "bandwidth: %s\n", error.text);
        return 1;
    }
    printf("%.2f\n", ceilings.gb_s);
    return 0;
}
