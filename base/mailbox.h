/* A bounded single-producer single-consumer queue of fixed-size letters, without locks.
 *
 * Exactly one thread puts, exactly one thread takes. A letter put before mailbox_put returns true is seen whole by the thread that takes it
 * (release/acquire on the counters). Waking the consumer is the caller's business: put a batch, then wake once. */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct mailbox {
    char *letters;
    size_t letter_size;
    uint64_t capacity; /* a power of two */
    _Alignas(64) _Atomic uint64_t put_count;
    _Alignas(64) _Atomic uint64_t taken_count;
};

void mailbox_init(struct mailbox *mailbox, size_t letter_size, size_t capacity_min);
void mailbox_done(struct mailbox *mailbox);
/* false: full ("not now"). */
bool mailbox_put(struct mailbox *mailbox, const void *letter);
/* false: empty. */
bool mailbox_take(struct mailbox *mailbox, void *letter);
/* The same in place, for letters of which little is written or read. Where the next letter goes, NULL: full; what is written there, over what some letter before has left, is put by
 * mailbox_put_blank. And the letter that waits longest, NULL: none, which is there until mailbox_take_first. */
void *mailbox_blank(struct mailbox *mailbox);
void mailbox_put_blank(struct mailbox *mailbox);
const void *mailbox_first(struct mailbox *mailbox);
void mailbox_take_first(struct mailbox *mailbox);
/* Letters waiting, as either side may see it; and free places, exact on the producer's side (it can only grow). */
size_t mailbox_waiting(struct mailbox *mailbox);
size_t mailbox_room(struct mailbox *mailbox);
