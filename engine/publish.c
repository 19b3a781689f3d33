/* What crosses threads beside the mailboxes: the statistics as one consistent copy, and the word the engine thread sleeps on. No locks.
 *
 * Why nothing is missed: whoever has news stores it, then changes the bell's word; the engine changes the word, then looks for news, then sleeps only if the word is
 * still what it made it. The two changes are ordered, so either the engine sees the news or the other one sees that it sleeps. */
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/check.h"
#include "engine/internal.h"

/* A reader that sees a new word also sees the odd number stored before it, and looks again. */
void publisher_write(struct publisher *publisher, const struct engine_stats *stats) {
    uint64_t words[STATS_WORDS] = {0};
    memcpy(words, stats, sizeof *stats);
    uint32_t sequence = atomic_load_explicit(&publisher->sequence, memory_order_relaxed);
    atomic_store_explicit(&publisher->sequence, sequence + 1, memory_order_relaxed);
    for (size_t i = 0; i < STATS_WORDS; i++) atomic_store_explicit(&publisher->words[i], words[i], memory_order_release);
    atomic_store_explicit(&publisher->sequence, sequence + 2, memory_order_release);
}

void publisher_read(const struct publisher *publisher, struct engine_stats *stats) {
    uint64_t words[STATS_WORDS];
    uint32_t before, after;
    do {
        before = atomic_load_explicit(&publisher->sequence, memory_order_acquire);
        for (size_t i = 0; i < STATS_WORDS; i++) words[i] = atomic_load_explicit(&publisher->words[i], memory_order_acquire);
        after = atomic_load_explicit(&publisher->sequence, memory_order_relaxed);
    } while (before != after || before % 2 != 0);
    memcpy(stats, words, sizeof *stats);
}

static void futex_wake(_Atomic uint32_t *word) { (void)syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0); }

void bell_ring(struct bell *bell) {
    if (atomic_fetch_add(&bell->word, BELL_COUNT) & BELL_ASLEEP) futex_wake(&bell->word);
}

void bell_ring_room(struct bell *bell) {
    if (atomic_fetch_add(&bell->word, BELL_COUNT) & BELL_WANTS_ROOM) futex_wake(&bell->word);
}

uint32_t bell_begin(struct bell *bell, bool wants_room) {
    uint32_t bits = BELL_ASLEEP | (wants_room ? BELL_WANTS_ROOM : 0);
    return atomic_fetch_or(&bell->word, bits) | bits;
}

void bell_wait(struct bell *bell, uint32_t ticket) {
    while (atomic_load(&bell->word) == ticket) {
        long answer = syscall(SYS_futex, &bell->word, FUTEX_WAIT_PRIVATE, ticket, NULL, NULL, 0);
        CHECK(answer == 0 || errno == EAGAIN || errno == EINTR);
    }
}

void bell_end(struct bell *bell) { atomic_fetch_and(&bell->word, ~(uint32_t)(BELL_ASLEEP | BELL_WANTS_ROOM)); }
