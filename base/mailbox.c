/* See mailbox.h. */
#include "base/mailbox.h"

#include <stdlib.h>
#include <string.h>

#include "base/check.h"

void mailbox_init(struct mailbox *mailbox, size_t letter_size, size_t capacity_min) {
    uint64_t capacity = 1;
    while (capacity < capacity_min) capacity *= 2;
    mailbox->letters = check_calloc(capacity, letter_size);
    mailbox->letter_size = letter_size;
    mailbox->capacity = capacity;
    atomic_init(&mailbox->put_count, 0);
    atomic_init(&mailbox->taken_count, 0);
}

void mailbox_done(struct mailbox *mailbox) {
    free(mailbox->letters);
    mailbox->letters = NULL;
}

static char *place(struct mailbox *mailbox, uint64_t count) { return mailbox->letters + (count & (mailbox->capacity - 1)) * mailbox->letter_size; }

void *mailbox_blank(struct mailbox *mailbox) {
    uint64_t put = atomic_load_explicit(&mailbox->put_count, memory_order_relaxed);
    if (put - atomic_load_explicit(&mailbox->taken_count, memory_order_acquire) == mailbox->capacity) return NULL;
    return place(mailbox, put);
}

void mailbox_put_blank(struct mailbox *mailbox) {
    atomic_store_explicit(&mailbox->put_count, atomic_load_explicit(&mailbox->put_count, memory_order_relaxed) + 1, memory_order_release);
}

const void *mailbox_first(struct mailbox *mailbox) {
    uint64_t taken = atomic_load_explicit(&mailbox->taken_count, memory_order_relaxed);
    if (atomic_load_explicit(&mailbox->put_count, memory_order_acquire) == taken) return NULL;
    return place(mailbox, taken);
}

void mailbox_take_first(struct mailbox *mailbox) {
    atomic_store_explicit(&mailbox->taken_count, atomic_load_explicit(&mailbox->taken_count, memory_order_relaxed) + 1, memory_order_release);
}

bool mailbox_put(struct mailbox *mailbox, const void *letter) {
    void *blank = mailbox_blank(mailbox);
    if (!blank) return false;
    memcpy(blank, letter, mailbox->letter_size);
    mailbox_put_blank(mailbox);
    return true;
}

bool mailbox_take(struct mailbox *mailbox, void *letter) {
    const void *first = mailbox_first(mailbox);
    if (!first) return false;
    memcpy(letter, first, mailbox->letter_size);
    mailbox_take_first(mailbox);
    return true;
}

size_t mailbox_waiting(struct mailbox *mailbox) {
    uint64_t taken = atomic_load_explicit(&mailbox->taken_count, memory_order_acquire);
    return (size_t)(atomic_load_explicit(&mailbox->put_count, memory_order_acquire) - taken);
}

size_t mailbox_room(struct mailbox *mailbox) {
    uint64_t put = atomic_load_explicit(&mailbox->put_count, memory_order_relaxed);
    return (size_t)(mailbox->capacity - (put - atomic_load_explicit(&mailbox->taken_count, memory_order_acquire)));
}
