/* KIVI blocks on the device (kernels/kivi.h has the method): how codes lie, and how they become numbers again.
 *
 * Codes lie as the matrix units take them, so that a warp reads a matrix in whole 128-byte lines and each thread has its operand in words of its own. Both K and V are second operands of
 * m16n8k16 products, with n over columns and k over what is summed: of q . k, n is the slot and k the dim; of p . v, n is the dim and k the slot. A word holds, for one n and four
 * (4 bits) or twice four (2 bits: of n and n + 8) pairs of neighbouring k eight apart, 8 or 16 codes: a pair's codes are 16 bits apart, pairs `bits` bits. Thread t of a warp has
 * n = t / 4 and k = 2 (t % 4), + 1, and its words are the t-th of each 32.
 *
 * Scales and minima go along k: of K one pair a dim, of V one a slot for each KIVI_GROUP dims. Those of two neighbouring k are one uint2: scale, scale; minimum, minimum.
 *
 * A block: K's codes, K's scales, V's codes, V's scales; dims are padded to a multiple of KIVI_GROUP, with zeros. Device code but for the sizes. Owns nothing. */
#pragma once

#include "kernels/cuda/cuda.h"

extern "C" {
#include "kernels/kivi.h"
}

static_assert(KIVI_GROUP == 32 && BLOCK_TOKENS == 32, "32 k are a word's pairs and, of V, a group's slots");

static constexpr __host__ __device__ uint32_t codes_dims(uint32_t d) { return (d + KIVI_GROUP - 1) / KIVI_GROUP * KIVI_GROUP; }
static constexpr __host__ __device__ uint32_t codes_bytes(uint32_t bits, uint32_t dims) { return BLOCK_TOKENS * dims * bits / 8; } /* of K or V */
static constexpr __host__ __device__ uint32_t codes_side_bytes(uint32_t bits, uint32_t dims) {
    return codes_bytes(bits, dims) + dims * (uint32_t)sizeof(struct kivi_scale); /* V: dims / 32 groups of 32 slots, as many */
}
static constexpr __host__ __device__ uint32_t codes_block_bytes(uint32_t bits, uint32_t d) { return 2 * codes_side_bytes(bits, codes_dims(d)); }

enum { WHICH_K, WHICH_V };

#define CODES_INLINE static __device__ __forceinline__

/* Where the code of a slot's dim is: a word of its side, and the lowest of its bits there. */
struct code_place {
    uint32_t word, shift;
};
static inline __host__ __device__ struct code_place code_place_of(uint32_t bits, uint32_t dims, int which, uint32_t slot, uint32_t dim) {
    const uint32_t n = which == WHICH_K ? slot : dim, k = which == WHICH_K ? dim : slot, n_count = which == WHICH_K ? BLOCK_TOKENS : dims;
    const uint32_t tiles = 4 / bits; /* of 8 n, in a word */
    return {((k / 32) * (n_count / (8 * tiles)) + n / (8 * tiles)) * 32 + n % 8 * 4 + k % 8 / 2,
            bits * (k % 32 / 8 + 4 * (n / 8 % tiles)) + 16 * (k % 2)};
}

/* The uint2 of a slot's dim, of its side. */
static inline __host__ __device__ uint32_t code_scales_of(int which, uint32_t slot, uint32_t dim) {
    return which == WHICH_K ? dim / 2 : dim / KIVI_GROUP * (BLOCK_TOKENS / 2) + slot / 2;
}

/* One number, as every backend has it. side: K's or V's half of the block. */
CODES_INLINE float code_number(uint32_t bits, uint32_t dims, const uint8_t *side, int which, uint32_t slot, uint32_t dim) {
    const struct code_place place = code_place_of(bits, dims, which, slot, dim);
    const uint2 scales = ((const uint2 *)(const void *)(side + codes_bytes(bits, dims)))[code_scales_of(which, slot, dim)];
    const uint32_t half = 16 * (which == WHICH_K ? dim % 2 : slot % 2);
    const struct kivi_scale scale = {(uint16_t)(scales.x >> half), (uint16_t)(scales.y >> half)};
    return kivi_number((uint8_t)(((const uint32_t *)(const void *)side)[place.word] >> place.shift & ((1u << bits) - 1)), scale);
}

CODES_INLINE __half2 half2_of(uint32_t bits) {
    __half2 pair;
    memcpy(&pair, &bits, sizeof pair);
    return pair;
}
CODES_INLINE uint32_t bits_of(__half2 pair) {
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

/* A pair's numbers rounded to f16, once: codes are exact in f16, so is their product with the scale inside the fused operation. They lie in f16's range (kivi_quantize). */
CODES_INLINE uint32_t code_numbers(__half2 codes, uint2 scales) { return bits_of(__hfma2(codes, half2_of(scales.x), half2_of(scales.y))); }

/* The codes of pair `pair` of a word, exactly: under an exponent of 2^10, c << s is 1024 + 2^s c. */
template <int BITS> CODES_INLINE __half2 pair_codes(uint32_t word, int pair) {
    constexpr uint32_t LOWEST = ((1u << BITS) - 1) * 0x00010001u;
    constexpr int A_BYTE = 8 / BITS; /* pairs whose codes lie in bits 0 to 7 and 16 to 23 */
    const int shift = pair % A_BYTE * BITS;
    const uint32_t shifted = word >> (pair / A_BYTE * 8), zero = 0x64006400u;
    const uint32_t biased = shift == 0          ? masked_into<LOWEST>(zero, shifted)
                            : shift == BITS     ? masked_into<LOWEST << BITS>(zero, shifted)
                            : shift == 2 * BITS ? masked_into<LOWEST << 2 * BITS>(zero, shifted)
                                                : masked_into<LOWEST << 3 * BITS>(zero, shifted);
    if (shift == 0) return __hsub2(half2_of(biased), half2_of(0x64006400u));
    const uint32_t step = (uint32_t)(15 - shift) << 10, minus = 0x8000u | (uint32_t)(25 - shift) << 10; /* 2^-shift, -1024 times that */
    return __hfma2(half2_of(biased), half2_of(step | step << 16), half2_of(minus | minus << 16));
}
template <int BITS> CODES_INLINE uint32_t pair_numbers(uint32_t word, int pair, uint2 scales) {
    return code_numbers(pair_codes<BITS>(word, pair), scales);
}

/* The same where the pair is known only as the program runs. */
CODES_INLINE uint32_t pair_numbers_at(uint32_t bits, uint32_t word, uint32_t pair, uint2 scales) {
    const uint32_t biased = (word >> (bits * pair) & (((1u << bits) - 1) * 0x00010001u)) | 0x64006400u;
    return code_numbers(__hsub2(half2_of(biased), half2_of(0x64006400u)), scales);
}

/* Eight dims of a slot's key, `chunk` the eighth of them, as f16 in order. */
CODES_INLINE uint4 code_key_chunk(uint32_t bits, uint32_t dims, const uint8_t *side, uint32_t slot, uint32_t chunk) {
    const struct code_place place = code_place_of(bits, dims, WHICH_K, slot, chunk * 8);
    const uint4 words = *(const uint4 *)(const void *)((const uint32_t *)(const void *)side + place.word);
    const uint4 *scales = (const uint4 *)(const void *)(side + codes_bytes(bits, dims)) + chunk * 2;
    const uint4 first = scales[0], second = scales[1];
    const uint32_t pair = place.shift / bits;
    return make_uint4(
        pair_numbers_at(bits, words.x, pair, make_uint2(first.x, first.y)), pair_numbers_at(bits, words.y, pair, make_uint2(first.z, first.w)),
        pair_numbers_at(bits, words.z, pair, make_uint2(second.x, second.y)), pair_numbers_at(bits, words.w, pair, make_uint2(second.z, second.w)));
}

/* ---- which blocks are read as codes ---- */

/* Blocks of a lane that a row at `position`, with `before` slots of the lane before its own, reads as codes: the first ones. Blocks are in order of age: the search ends after at most
 * KIVI_RAW_BLOCKS. */
CODES_INLINE uint32_t codes_before(const int32_t *positions, const uint32_t *blocks, uint32_t before, int32_t position) {
    uint32_t n = before / BLOCK_TOKENS;
    while (n > 0 && !kivi_reads_codes(positions[(size_t)blocks[n - 1] * BLOCK_TOKENS + BLOCK_TOKENS - 1], position)) n--;
    return n;
}

/* A block that should be read in f16 but has lost that: lanes that are cut, or read on from an earlier slot, by measurements, which do not care for the last bits. (An engine goes on where
 * residual_resumes says so.) Then its codes stand for it. */
CODES_INLINE bool is_lost(const struct device_pool &pool, uint32_t block) { return pool.place[block] == RAW_NONE; }
CODES_INLINE uint8_t *raw_of(const struct device_pool &pool, uint32_t block) { return pool.raw + pool.place[block] * pool.raw_bytes; }
