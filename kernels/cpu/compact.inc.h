/* Kept slots of one block moved into another, or forward within it, by rows of the layout (layout.h), over the vectors of the file that includes this one. In place is fine: a slot
 * never moves backward, and of each row all is read that is needed before it is written. */

/* Rows of 32 elements of four bytes: K of every type but f32, scales. */
#if LANES == 16
static void squeeze_rows(const uint32_t *source, uint32_t *destination, uint32_t n_rows, const struct slot_run *run) {
    uint32_t from[BLOCK_TOKENS] = {0};
    for (uint32_t i = 0; i < run->n; i++) from[run->to + i] = run->from[i];
    const __m512i low = _mm512_loadu_si512(from), high = _mm512_loadu_si512(from + 16);
    const uint32_t written = (uint32_t)(((uint64_t)1 << run->n) - 1) << run->to;
    for (uint32_t row = 0; row < n_rows; row++, source += BLOCK_TOKENS, destination += BLOCK_TOKENS) {
        const __m512i a = _mm512_loadu_si512(source), b = _mm512_loadu_si512(source + 16);
        _mm512_mask_storeu_epi32(destination, (__mmask16)written, _mm512_permutex2var_epi32(a, low, b));
        _mm512_mask_storeu_epi32(destination + 16, (__mmask16)(written >> 16), _mm512_permutex2var_epi32(a, high, b));
    }
}
#else
static void squeeze_rows(const uint32_t *source, uint32_t *destination, uint32_t n_rows, const struct slot_run *run) {
    for (uint32_t row = 0; row < n_rows; row++, source += BLOCK_TOKENS, destination += BLOCK_TOKENS)
        for (uint32_t i = 0; i < run->n; i++) destination[run->to + i] = source[run->from[i]];
}
#endif

static void squeeze_wide_rows(const uint64_t *source, uint64_t *destination, uint32_t n_rows, const struct slot_run *run) {
    for (uint32_t row = 0; row < n_rows; row++, source += BLOCK_TOKENS, destination += BLOCK_TOKENS)
        for (uint32_t i = 0; i < run->n; i++) destination[run->to + i] = source[run->from[i]];
}

/* Rows of V, [dims] pairs of elements: a vector of pairs, each half of `bits` bits. */
typedef uint32_t pairs_16 __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint64_t pairs_32 __attribute__((vector_size(LANES * 4), aligned(8), may_alias));

/* V of two-byte or four-byte elements, [16 pairs][dims][2]: the slots of a destination pair come from one half each of two source pairs, or one of them stays as it is. */
#define MOVE_VALUES(name, vector, element, bits)                                                                                                     \
    static void name(const void *source, void *destination, uint32_t dims, const struct slot_run *run) {                                             \
        const element mask = (element)-1 >> (bits);                                                                                                  \
        for (uint32_t i = 0; i < run->n;) {                                                                                                          \
            const uint32_t to = run->to + i;                                                                                                         \
            const bool first = to % 2 == 0, second = !first || i + 1 < run->n;                                                                       \
            const uint32_t a = first ? run->from[i++] : 0, b = second ? run->from[i++] : 0;                                                          \
            element *out = (element *)destination + (size_t)(to / 2) * dims;                                                                         \
            const element *low = first ? (const element *)source + (size_t)(a / 2) * dims : out;                                                     \
            const element *high = second ? (const element *)source + (size_t)(b / 2) * dims : out;                                                   \
            const int low_shift = first && a % 2 ? (bits) : 0, high_shift = !second || b % 2 ? (bits) : 0;                                           \
            for (uint32_t d = 0; d < dims; d += LANES * 4 / sizeof *out) {                                                                           \
                vector x = *(const vector *)(const void *)(low + d) >> low_shift, y = *(const vector *)(const void *)(high + d) >> high_shift;       \
                *(vector *)(void *)(out + d) = (x & mask) | y << (bits);                                                                             \
            }                                                                                                                                        \
        }                                                                                                                                            \
    }
MOVE_VALUES(move_values_16, pairs_16, uint32_t, 16)
MOVE_VALUES(move_values_32, pairs_32, uint64_t, 32)
#undef MOVE_VALUES

static void move_slots(const struct kv_shape *shape, const uint8_t *source, uint8_t *destination, const struct slot_run *run) {
    const uint32_t dims = shape->dims;
    const void *values = source + shape->v_offset;
    void *values_to = destination + shape->v_offset;
    switch (shape->dtype) {
    case KV_F32:
        squeeze_wide_rows((const uint64_t *)(const void *)source, (uint64_t *)(void *)destination, dims / 2, run);
        move_values_32(values, values_to, dims, run);
        break;
    case KV_Q8:
        squeeze_rows((const uint32_t *)(const void *)source, (uint32_t *)(void *)destination, dims / 4, run);
        for (uint32_t i = 0; i < run->n; i++)
            memmove((uint8_t *)values_to + (size_t)(run->to + i) * dims, (const uint8_t *)values + (size_t)run->from[i] * dims, dims);
        squeeze_rows((const uint32_t *)(const void *)(source + shape->scale_offset), (uint32_t *)(void *)(destination + shape->scale_offset), 2, run);
        break;
    default:
        squeeze_rows((const uint32_t *)(const void *)source, (uint32_t *)(void *)destination, dims / 2, run);
        move_values_16(values, values_to, dims, run);
    }
}
