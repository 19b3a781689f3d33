/* Is there a device for the CUDA backend? Says which memory it has, or why there is none. Exit status 77 in that case: the tests behind it are skipped. */
#include <stdio.h>

#include "kernels/backend.h"

int main(void) {
    struct error error;
    uint64_t available, total;
    if (backend_cuda.memory(0, &available, &total, &error) != STATUS_OK) {
        printf("skipped: %s\n", error.text);
        return 77;
    }
    printf("device 0: %.1f of %.1f GiB available\n", (double)available / 0x1p30, (double)total / 0x1p30);
    return 0;
}
