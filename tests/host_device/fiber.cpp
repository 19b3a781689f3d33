/* See fiber.h. */
#include "tests/host_device/fiber.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" {
#include "base/check.h"
}

uint8_t *fiber_stack_new(size_t bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    void *at = mmap(NULL, page + bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    CHECK(at != MAP_FAILED && mprotect(at, page, PROT_NONE) == 0);
    return (uint8_t *)at + page;
}

#if defined(__x86_64__)

/* What a function must preserve lies on the stack that is left; the return address of the next begins its stack. */
extern "C" void fiber_change(void **save, void *load);
asm(".text\n.globl fiber_change\n.type fiber_change, @function\nfiber_change:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size fiber_change, .-fiber_change\n");

static void *first_context(uint8_t *top, void (*main)(void)) {
    void **at = (void **)((uintptr_t)top & ~(uintptr_t)15);
    *--at = NULL; /* main()'s return address: it never returns */
    *--at = (void *)main;
    for (int i = 0; i < 6; i++) *--at = NULL;
    return at;
}

#else
#error "fiber.cpp: the switch of another architecture is missing"
#endif

void fiber_start(struct fiber *fiber, uint8_t *stack, size_t bytes, size_t offset, void (*main)(void)) {
    fiber->stack = stack;
    fiber->bytes = bytes;
    fiber->fake_stack = NULL;
    fiber->context = first_context(stack + bytes - offset, main);
}

#if defined(__SANITIZE_ADDRESS__)

static struct fiber *left; /* by the switch on its way */

static void arrived(void *fake_stack) {
    const void *bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(fake_stack, &bottom, &bytes);
    if (!left->stack) { /* the OS thread's, which only it knows */
        left->bytes = bytes;
        left->stack = (uint8_t *)bottom;
    }
}

void fiber_entered(void) { arrived(NULL); }

void fiber_switch(struct fiber *from, struct fiber *to, bool last) {
    left = from;
    __sanitizer_start_switch_fiber(last ? NULL : &from->fake_stack, to->stack, to->bytes);
    fiber_change(&from->context, to->context);
    arrived(from->fake_stack);
}

#else

void fiber_entered(void) {}
void fiber_switch(struct fiber *from, struct fiber *to, bool) { fiber_change(&from->context, to->context); }

#endif
