/* The mailbox: full and empty are answers, order is kept, and two threads see whole letters (run under ThreadSanitizer too). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <pthread.h>
#include <sched.h>

#include "base/mailbox.h"
#include "base/random.h"

static void test_full_and_empty(void **state) {
    (void)state;
    struct mailbox mailbox;
    mailbox_init(&mailbox, sizeof(int), 5); /* rounded up to 8 */
    int letter = 0, got = -1;
    assert_false(mailbox_take(&mailbox, &got));
    assert_int_equal(got, -1);
    size_t capacity = mailbox_room(&mailbox);
    assert_true(capacity >= 5);
    for (size_t i = 0; i < capacity; i++, letter++) {
        assert_int_equal(mailbox_waiting(&mailbox), i);
        assert_true(mailbox_put(&mailbox, &letter));
    }
    assert_int_equal(mailbox_room(&mailbox), 0);
    assert_false(mailbox_put(&mailbox, &letter));
    for (int i = 0; i < letter; i++) {
        assert_true(mailbox_take(&mailbox, &got));
        assert_int_equal(got, i);
    }
    assert_false(mailbox_take(&mailbox, &got));
    mailbox_done(&mailbox);
}

static void test_capacities(void **state) {
    (void)state;
    for (size_t least = 1; least < 70; least++) {
        struct mailbox mailbox;
        mailbox_init(&mailbox, 1, least);
        assert_true(mailbox_room(&mailbox) >= least && mailbox_room(&mailbox) < 2 * least);
        mailbox_done(&mailbox);
    }
}

/* Many times around the ring, in random bursts, against two counters. */
static void test_around_the_ring(void **state) {
    (void)state;
    struct mailbox mailbox;
    mailbox_init(&mailbox, 3, 16);
    struct random random = {8};
    uint32_t put = 0, taken = 0;
    for (int step = 0; step < 50000; step++) {
        for (uint32_t n = random_below(&random, 20); n > 0; n--) {
            uint8_t letter[3] = {(uint8_t)put, (uint8_t)(put >> 8), (uint8_t)(put >> 16)};
            bool room = put - taken < 16;
            assert_int_equal(mailbox_put(&mailbox, letter), room);
            put += room;
        }
        assert_int_equal(mailbox_waiting(&mailbox), put - taken);
        for (uint32_t n = random_below(&random, 20); n > 0; n--) {
            uint8_t letter[3];
            bool waiting = put != taken;
            assert_int_equal(mailbox_take(&mailbox, letter), waiting);
            if (!waiting) continue;
            assert_int_equal(letter[0] | letter[1] << 8 | letter[2] << 16, taken & 0xffffff);
            taken++;
        }
    }
    mailbox_done(&mailbox);
}

/* Without copies: a blank is not there for the taker before it is put, and the first letter stays, and keeps its place, until it is taken. */
static void test_in_place(void **state) {
    (void)state;
    struct mailbox mailbox;
    mailbox_init(&mailbox, sizeof(uint32_t), 4);
    struct random random = {5};
    uint32_t put = 0, taken = 0, letter;
    assert_null(mailbox_first(&mailbox));
    for (int step = 0; step < 2000; step++) {
        uint32_t *blank = mailbox_blank(&mailbox);
        assert_int_equal(blank == NULL, put - taken == 4);
        if (blank) *blank = put;
        const uint32_t *first = mailbox_first(&mailbox);
        assert_int_equal(first == NULL, put == taken);
        if (first) assert_int_equal(*first, taken);
        assert_ptr_equal(mailbox_first(&mailbox), first);
        assert_ptr_equal(mailbox_blank(&mailbox), blank);
        switch (random_below(&random, 4)) {
        case 0:
            if (blank) mailbox_put_blank(&mailbox), put++;
            break;
        case 1:
            if (first) mailbox_take_first(&mailbox), taken++;
            break;
        case 2: /* and with copies, in turn */
            assert_int_equal(mailbox_put(&mailbox, &put), blank != NULL);
            put += blank != NULL;
            break;
        default:
            if (!mailbox_take(&mailbox, &letter)) break;
            assert_int_equal(letter, taken);
            taken++;
        }
        assert_int_equal(mailbox_waiting(&mailbox), put - taken);
        assert_int_equal(mailbox_room(&mailbox), 4 - (put - taken));
    }
    mailbox_done(&mailbox);
}

enum { LETTERS = 300000, WORDS = 9 };
struct letter {
    uint64_t words[WORDS];
};

static void *produce(void *context) {
    struct mailbox *mailbox = context;
    for (uint64_t n = 0; n < LETTERS; n++) {
        struct letter letter;
        for (uint64_t w = 0; w < WORDS; w++) letter.words[w] = random_at(n, w, 0, 0);
        while (!mailbox_put(mailbox, &letter)) (void)sched_yield();
    }
    return NULL;
}

static void test_two_threads(void **state) {
    (void)state;
    struct mailbox mailbox;
    mailbox_init(&mailbox, sizeof(struct letter), 32);
    pthread_t producer;
    assert_int_equal(pthread_create(&producer, NULL, produce, &mailbox), 0);
    uint32_t wrong = 0; /* counted, not asserted: a longjmp would leave the other thread behind */
    for (uint64_t n = 0; n < LETTERS; n++) {
        struct letter letter;
        while (!mailbox_take(&mailbox, &letter)) (void)sched_yield();
        for (uint64_t w = 0; w < WORDS; w++) wrong += letter.words[w] != random_at(n, w, 0, 0);
        wrong += mailbox_waiting(&mailbox) > 32;
    }
    assert_int_equal(pthread_join(producer, NULL), 0);
    assert_int_equal(wrong, 0);
    assert_int_equal(mailbox_waiting(&mailbox), 0);
    mailbox_done(&mailbox);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_full_and_empty), cmocka_unit_test(test_capacities),  cmocka_unit_test(test_around_the_ring),
        cmocka_unit_test(test_in_place),       cmocka_unit_test(test_two_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
