/* What a program that checks counts and says: each difference is one, the first ones are printed. For one file of a program. */
#pragma once

#include <stdint.h>
#include <stdio.h>

enum { WRONG_LINES_MAX = 10 };
static uint32_t n_wrong;

#define WRONG(...)                                                                                                                                   \
    do {                                                                                                                                             \
        if (n_wrong++ < WRONG_LINES_MAX) printf("wrong: " __VA_ARGS__), puts("");                                                                    \
    } while (0)
