/* Fibers: stacks that one OS thread changes between. Switching takes some nanoseconds, where swapcontext() makes a system call; hence the few lines of assembly, of x86-64
 * alone. AddressSanitizer is told of each switch. */
#pragma once

#include <stddef.h>
#include <stdint.h>

struct fiber {
    void *context;  /* where it goes on, while it does not run */
    uint8_t *stack; /* lowest address; NULL: the OS thread's own */
    size_t bytes;
    void *fake_stack; /* AddressSanitizer's */
};

/* A stack, with a page below it that faults. Kept by the caller and used again. */
uint8_t *fiber_stack_new(size_t bytes);
/* It will begin with main(), which must end by leaving the fiber for good. `offset`: bytes of the stack left unused, so that many stacks do not compete for the same cache lines. */
void fiber_start(struct fiber *fiber, uint8_t *stack, size_t bytes, size_t offset, void (*main)(void));
/* From the running fiber to another. last: `from` will not run again. */
void fiber_switch(struct fiber *from, struct fiber *to, bool last);
/* First of all in main(). */
void fiber_entered(void);
