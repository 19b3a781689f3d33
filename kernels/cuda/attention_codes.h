/* KIVI in attention: which of a lane's pieces are codes for whom, their copies, and operands of products from codes. Included by attention.h. Device code alone; owns nothing.
 *
 * A piece is two blocks, of which a row reads none, the first, or both as codes: its view of the piece. Rows of a tile mostly agree. Where they do not the piece is gone through once a view,
 * each row seeing the slots in its own and nothing in the others, which changes nothing for it: what a row gets does not depend on its tile. */
#pragma once

#include "kernels/cuda/codes.h"

template <int KV> constexpr uint32_t code_bits = KV == KV_KIVI4 ? 4 : KV == KV_KIVI2 ? 2 : 0; /* 0: no KIVI dtype */

/* Where the two blocks of a piece come from. */
struct piece_source {
    uint2 ids;
    /* KIVI: the f16 blocks of those that are not codes; which are, a bit each */
    uint2 places;
    uint32_t coded;
};

/* The view that a row has of the piece at `slot` if it reads `codes` blocks of the lane as codes. */
template <int KV> ATTENTION_INLINE uint32_t view_of(uint32_t codes, uint32_t slot) {
    if constexpr (code_bits<KV> == 0) return 0;
    const uint32_t first = slot / BLOCK_TOKENS;
    return codes <= first ? 0 : min(codes - first, (uint32_t)(PIECE_SLOTS / BLOCK_TOKENS));
}

/* ids of blocks that begin at `end` or behind it may be anything valid. */
template <int KV>
ATTENTION_INLINE struct piece_source source_of(const struct attention_args &args, uint2 ids, uint32_t slot, uint32_t end, uint32_t view) {
    struct piece_source source = {ids, {0, 0}, 0};
    if constexpr (code_bits<KV> != 0) {
        source.coded = (1u << view) - 1;
        if (view < 1 && slot < end) source.places.x = args.place[ids.x];
        if (view < 2 && slot + BLOCK_TOKENS < end) source.places.y = args.place[ids.y];
        if (source.places.x == RAW_NONE) source.coded |= 1; /* codes.h, is_lost */
        if (source.places.y == RAW_NONE) source.coded |= 2;
    }
    return source;
}

/* Copies of a piece's blocks, half of the threads for each: codes to where its rows of K would be, or f16 rows; of K alone, or of both. All columns are written, as codes were there before. */
template <int KV, int DIMS, bool VALUES>
ATTENTION_INLINE void copy_blocks(const struct attention_args &args, uint32_t to, const struct piece_source &source, uint32_t visible) {
    constexpr uint32_t THREADS = ATTENTION_THREADS / 2, pitch = piece<KV, DIMS>::pitch, columns = piece<KV, DIMS>::row / 16, rows = THREADS / columns;
    const uint32_t b = threadIdx.x / THREADS, thread = threadIdx.x % THREADS;
    to += b * BLOCK_TOKENS * pitch;
    if (source.coded >> b & 1) {
        constexpr uint32_t most = codes_block_bytes(code_bits<KV>, DIMS) / 16 / (VALUES ? 1 : 2);
        const uint8_t *from = args.kv + (b ? source.ids.y : source.ids.x) * args.block_bytes + thread * 16;
        const uint32_t n = (uint32_t)args.block_bytes / 16 / (VALUES ? 1 : 2);
        to += thread * 16;
        if (n == most) {
#pragma unroll
            for (uint32_t i = 0; i < most; i += THREADS)
                if (i + THREADS <= most || i + thread < most) copy_16(to + i * 16, from + i * 16, 16);
            return;
        }
#pragma unroll 1
        for (uint32_t i = 0; i + thread < n; i += THREADS) copy_16(to + i * 16, from + i * 16, 16);
        return;
    }
    const uint8_t *from = args.raw + (b ? source.places.y : source.places.x) * args.raw_bytes;
    const uint32_t row = thread / columns, column = thread % columns * 16, at = column < args.row_bytes ? row * args.row_bytes + column : 0;
    const uint32_t seen = visible > b * BLOCK_TOKENS && column < args.row_bytes ? visible - b * BLOCK_TOKENS : 0;
    to += row * pitch + column;
#pragma unroll 4
    for (uint32_t i = 0; i < BLOCK_TOKENS; i += rows) {
        copy_16(to + i * pitch, from + at + i * args.row_bytes, row + i < seen ? 16 : 0);
        if (VALUES) copy_16(to + piece<KV, DIMS>::k_bytes + i * pitch, from + (BLOCK_TOKENS + i) * args.row_bytes + at, row + i < seen ? 16 : 0);
    }
}

/* The same of a piece whose blocks both are codes, of DIMS dims, so that every distance is a constant. */
template <int KV, int DIMS> ATTENTION_INLINE void copy_codes(const struct attention_args &args, uint32_t to, uint2 ids) {
    constexpr uint32_t THREADS = ATTENTION_THREADS / 2, bytes = codes_block_bytes(code_bits<KV>, DIMS);
    const uint32_t b = threadIdx.x / THREADS, at = threadIdx.x % THREADS * 16;
    const uint8_t *from = args.kv + (size_t)(b ? ids.y : ids.x) * bytes + at;
    to += b * BLOCK_TOKENS * piece<KV, DIMS>::pitch + at;
#pragma unroll
    for (uint32_t i = 0; i < bytes; i += THREADS * 16)
        if (i + THREADS * 16 <= bytes || i + at < bytes) copy_16(to + i, from + i, 16);
}

/* ---- operands ---- */

/* A piece whose blocks may be codes. */
struct coded_piece {
    const uint8_t *at;    /* shared */
    uint32_t coded, dims; /* dims as codes have them */
};
template <int KV, int DIMS> ATTENTION_INLINE const uint8_t *codes_at(const struct coded_piece &piece_of, uint32_t block) {
    return piece_of.at + block * BLOCK_TOKENS * piece<KV, DIMS>::pitch;
}

ATTENTION_INLINE uint2 scales_at(const uint8_t *scales, uint32_t pair) { return ((const uint2 *)(const void *)scales)[pair]; }

/* Words of 16 n, two tiles of 8, and 32 k: group g of 16 n. */
template <int BITS> ATTENTION_INLINE uint2 code_words(const uint8_t *codes, uint32_t g, uint32_t lane) {
    const uint32_t *words = (const uint32_t *)(const void *)codes;
    if constexpr (BITS == 4) return make_uint2(words[2 * g * 32 + lane], words[(2 * g + 1) * 32 + lane]);
    return make_uint2(words[g * 32 + lane], 0);
}

/* Scales of 16 k: of the thread's two pairs. scales: of 32 k, of which these are step's. */
struct pair_scales {
    uint2 first, second;
};
ATTENTION_INLINE struct pair_scales pair_scales_of(const uint8_t *scales, uint32_t step, uint32_t lane) {
    return {scales_at(scales, 8 * step + lane % 4), scales_at(scales, 8 * step + 4 + lane % 4)};
}

/* The operand of step `step` (16 k) of the words' two. */
template <int BITS> ATTENTION_INLINE void code_operand(uint32_t b[4], uint2 words, uint32_t step, const struct pair_scales &scales) {
    const uint32_t other = BITS == 4 ? words.y : words.x;
    const int pair = (int)(2 * step), other_pair = BITS == 4 ? pair : 4 + pair;
    b[0] = pair_numbers<BITS>(words.x, pair, scales.first);
    b[1] = pair_numbers<BITS>(words.x, pair + 1, scales.second);
    b[2] = pair_numbers<BITS>(other, other_pair, scales.first);
    b[3] = pair_numbers<BITS>(other, other_pair + 1, scales.second);
}

/* ---- products of blocks that are codes. Without a branch inside, for loads and conversions to overlap products ---- */

/* s += q . k of slots [16 slots, + 16) of the piece. What would lie behind the codes' dims is taken from the first ones, times queries that are 0 there. */
template <int KV, int DIMS>
ATTENTION_INLINE void multiply_coded_keys(float s[2][4], const uint32_t q[DIMS / 16][4], const struct coded_piece &from, uint32_t slots,
                                          uint32_t lane) {
    constexpr uint32_t BITS = code_bits<KV>;
    const uint8_t *side = codes_at<KV, DIMS>(from, slots / 2), *scales = side + codes_bytes(BITS, from.dims);
#pragma unroll
    for (uint32_t g = 0; g < DIMS / KIVI_GROUP; g++) {
        const uint32_t group = g + 1 == DIMS / KIVI_GROUP && from.dims < DIMS ? 0 : g; /* dims are DIMS, or a group less */
        const uint2 words = code_words<BITS>(side, 2 * group + slots % 2, lane);
#pragma unroll
        for (uint32_t step = 0; step < 2; step++) {
            uint32_t b[4];
            code_operand<BITS>(b, words, step, pair_scales_of(scales + group * 128, step, lane));
            multiply<KV>(s[0], q[2 * g + step], b[0], b[1]);
            multiply<KV>(s[1], q[2 * g + step], b[2], b[3]);
        }
    }
}

/* o += p . v of a block of the piece, PAIRS times 16 dims from 16 first on, of one group; p: of its two 16 slots. Columns behind the codes' dims get anything. */
template <int KV, int DIMS, uint32_t PAIRS>
ATTENTION_INLINE void multiply_coded_values(float o[][4], const uint32_t p[2][4], const struct coded_piece &from, uint32_t block, uint32_t first,
                                            uint32_t lane) {
    static_assert(PAIRS * 16 <= KIVI_GROUP, "one group");
    constexpr uint32_t BITS = code_bits<KV>;
    if (first * 16 >= from.dims) first = 0;
    const uint8_t *side = codes_at<KV, DIMS>(from, block) + codes_side_bytes(BITS, from.dims),
                  *scales = side + codes_bytes(BITS, from.dims) + first / 2 * 128;
    uint2 words[PAIRS];
#pragma unroll
    for (uint32_t i = 0; i < PAIRS; i++) words[i] = code_words<BITS>(side, first + i, lane);
#pragma unroll
    for (uint32_t step = 0; step < 2; step++) {
        const struct pair_scales of_step = pair_scales_of(scales, step, lane);
#pragma unroll
        for (uint32_t i = 0; i < PAIRS; i++) {
            uint32_t b[4];
            code_operand<BITS>(b, words[i], step, of_step);
            multiply<KV>(o[2 * i], p[step], b[0], b[1]);
            multiply<KV>(o[2 * i + 1], p[step], b[2], b[3]);
        }
    }
}

/* ---- products of a whole piece, by one warp ---- */

/* s += q . k of all slots. at: K's rows in f16, with k_offset. */
template <int KV, int DIMS>
ATTENTION_INLINE void multiply_keys(float s[][4], const uint32_t q[DIMS / 16][4], uint32_t at, const struct coded_piece &from, uint32_t lane) {
    constexpr uint32_t GROUP = code_bits<KV> != 0 ? BLOCK_TOKENS / 16 : PIECE_SLOTS / 16; /* 16 slots each, that are all codes or none */
#pragma unroll
    for (uint32_t first = 0; first < PIECE_SLOTS / 16; first += GROUP) {
        if constexpr (code_bits<KV> != 0) {
            if (from.coded >> first / GROUP & 1) {
#pragma unroll
                for (uint32_t i = first; i < first + GROUP; i++) multiply_coded_keys<KV, DIMS>(s + 2 * i, q, from, i, lane);
                continue;
            }
        }
#pragma unroll
        for (uint32_t k = 0; k < DIMS / 16; k++) {
#pragma unroll
            for (uint32_t i = first; i < first + GROUP; i++) {
                uint32_t b[4];
                load_k<KV>(b, at + i * 16 * piece<KV, DIMS>::pitch + k * dims_step<KV>);
                multiply<KV>(s[2 * i], q[k], b[0], b[1]);
                multiply<KV>(s[2 * i + 1], q[k], b[2], b[3]);
            }
        }
    }
}

/* o += p . v of slots [16 k, + 16), all dims; p: of k - 1, k where k is odd, k, anything where it is even. at: V's rows in f16, with v_offset. Codes wait for the second half of their block. */
template <int KV, int DIMS>
ATTENTION_INLINE void multiply_values(float o[][4], const uint32_t p[2][4], uint32_t at, const struct coded_piece &from, uint32_t k, uint32_t lane) {
    if constexpr (code_bits<KV> != 0) {
        if (from.coded >> k / 2 & 1) {
            if (k % 2 == 0) return;
#pragma unroll
            for (uint32_t i = 0; i < DIMS / 16; i += 2) multiply_coded_values<KV, DIMS, 2>(o + 2 * i, p, from, k / 2, i, lane);
            return;
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < DIMS / 16; i++) {
        uint32_t b[4];
        load_v<KV>(b, at + k * 16 * piece<KV, DIMS>::pitch + i * dims_step<KV>);
        multiply<KV>(o[2 * i], p[k % 2], b[0], b[1]);
        multiply<KV>(o[2 * i + 1], p[k % 2], b[2], b[3]);
    }
}
