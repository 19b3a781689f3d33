/* What the kernels of attention share: the pieces they load, the products of a piece, the softmax.
 *
 * The row contract: the result of a query (one row, one head) is a function of that query and of the slots it sees, bit for bit, whichever kernel and tile it is in. So there is one order:
 *
 *   a lane is cut into splits of SPLIT_SLOTS at absolute slots; each split starts at the identity (m = -inf, l = 0, o = 0) and goes through its pieces of PIECE_SLOTS in order:
 *     s  = q . k            one chain of m16n8k16 products in f32, d ascending; q8: of the integers, then times the slot's scale; -inf where the query does not see the slot
 *     m' = max(m, max of s * scale), in units of log2;  a = exp2(m - m');  p = exp2(s * scale - m'), rounded to the 16-bit type
 *     l  = l * a + sum of p  by a product with ones, o = o * a + p . v  one chain of products in f32, slots ascending
 *     q8: o takes p * (the slot's V scale * Q8_V_ONE), rounded, by the integers; l takes the rounded p
 *   splits merge in ascending order, from the identity: fold(). The result is o / l.
 *
 *   KIVI: s and p . v of numbers that codes are widened to, in f16; which blocks are codes is a function of the row's position (kernels/kivi.h)
 *
 * What is not in there does not matter: which queries share a tile, which warp computes which columns, who merges. It rests on two properties of the matrix units, which tests/gpu/attention.cu
 * checks: an element of a product depends on its row and column alone, and a product with zeros leaves an accumulator as it is (pieces and slots that a query does not see). */
#pragma once

#include "kernels/cuda/cuda.h"

constexpr uint32_t ATTENTION_THREADS = 128; /* of decode, prefill and accumulation */
constexpr uint32_t ATTENTION_WARPS = ATTENTION_THREADS / 32;
constexpr float Q8_V_ONE = 256; /* keeps p * (V scale) among f16's normal numbers; V of up to 32,000 */

/* A lane of a sequence of the step's decode list, made once a step for all layers: [n_layers][max_sequences * n_kv_heads], (index in the list) * n_kv_heads + KV head. */
struct attention_lane {
    uint32_t table, before; /* slots filled before the step */
    uint32_t first_row, n_rows;
    uint32_t partial, n_head; /* of a lane cut between CTAs: its first partial, and how many splits are folded in that */
    uint32_t codes_first, codes_last; /* KIVI: blocks that its first row reads as codes, its last */
};
/* Where a CTA's part begins; it ends where the next one's does. */
struct attention_cut {
    uint32_t lane, split;
    uint32_t partial; /* first of the partials that the CTA writes */
    uint32_t unused;
};

struct attention_args {
    const uint8_t *kv;
    const float *scales;
    const uint32_t *tables;
    const uint16_t *q;
    __half *a;
    float *row_max, *row_sum;
    uint64_t *accumulated;
    const struct step_header *header;
    const struct step_sequence *sequences;
    const uint32_t *lane_tokens;
    const struct prefill_tile *tiles;
    struct attention_lane *lanes;     /* of this layer */
    const struct attention_cut *cuts; /* of this layer */
    float *partial_o;                 /* [partials][d] */
    float2 *partial_ml;               /* [partials] */
    uint32_t *arrived;                /* [max_sequences * n_kv_heads] splits done of a lane that is cut */
    size_t block_bytes;
    float scale_log2; /* attention_scale * log2(e) */
    uint32_t layer, d, row_bytes, n_kv_heads, n_heads, group, n_q, n_lanes, lane_blocks;
    uint32_t stages; /* pieces of the decode kernel's ring */
    /* KIVI (struct device_pool); positions: the pool's, and the rows' */
    const uint8_t *raw;
    const uint32_t *place;
    const int32_t *positions, *row_positions;
    size_t raw_bytes;
};

typedef void (*attention_kernel)(struct attention_args);

/* What attention.cu owns on the device, and what it chose for it. */
constexpr uint32_t PLAN_THREADS = 1024;
constexpr uint32_t CTAS_MAX = PLAN_THREADS - 1; /* of the decode kernel: each thread of the plan finds a cut */
struct attention_device {
    struct attention_lane *lanes; /* [n_layers][max_lanes] */
    uint32_t *costs;              /* [n_layers][max_lanes + 1] what lies before a lane */
    struct attention_cut *cuts;   /* [n_layers][CTAS_MAX + 1] */
    uint32_t *arrived;            /* [max_lanes] */
    float *partial_o;
    float2 *partial_ml;
    uint32_t max_lanes;
    uint32_t partial_queries; /* partials there is room for; one a query */
    uint32_t dims, stages, ctas, accumulate_ctas;
    attention_kernel decode, prefill, accumulate;
    size_t decode_shared, prefill_shared, accumulate_shared;
};

/* The kernel for a pool's type and the dims it is padded to (64 or 128), and its dynamic shared memory with `stages` pieces. */
attention_kernel attention_decode_kernel(enum kv_dtype dtype, uint32_t dims);
size_t attention_decode_shared(enum kv_dtype dtype, uint32_t dims, uint32_t stages);
attention_kernel attention_prefill_kernel(enum kv_dtype dtype, uint32_t dims);
size_t attention_prefill_shared(enum kv_dtype dtype, uint32_t dims);
attention_kernel attention_accumulate_kernel(enum kv_dtype dtype, uint32_t dims);
size_t attention_accumulate_shared(enum kv_dtype dtype, uint32_t dims);

/* ---- a piece in shared memory: K rows, V rows, then of q8 the scales of K and of V. Rows are padded to DIMS and by 16 bytes, an odd number of 16-byte columns: no bank conflicts ---- */
template <int KV, int DIMS> struct piece {
    static constexpr uint32_t row = KV == KV_Q8 ? DIMS : 2 * DIMS;
    static constexpr uint32_t pitch = row + 16;
    static constexpr uint32_t k_bytes = PIECE_SLOTS * pitch;
    static constexpr uint32_t scales = 2 * k_bytes;
    static constexpr uint32_t bytes = scales + (KV == KV_Q8 ? 2 * PIECE_SLOTS * sizeof(float) : 0);
};

#define ATTENTION_INLINE static __device__ __forceinline__

ATTENTION_INLINE uint32_t splits_of(uint32_t slots) { return (slots + SPLIT_SLOTS - 1) / SPLIT_SLOTS; }

/* c += a b: 16 x 16 by 16 x 8. A thread has of c the elements (row lane / 4, columns 2 (lane % 4) and the next), then the same of row + 8. */
template <int KV> ATTENTION_INLINE void multiply(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    if constexpr (KV == KV_BF16)
        multiply_bf16(c, a[0], a[1], a[2], a[3], b0, b1);
    else
        multiply_f16(c, a[0], a[1], a[2], a[3], b0, b1);
}

template <int KV> ATTENTION_INLINE uint32_t pack(float low, float high) {
    if constexpr (KV == KV_BF16) {
        __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *(uint32_t *)&pair;
    } else {
        __half2 pair = __floats2half2_rn(low, high);
        return *(uint32_t *)&pair;
    }
}
template <int KV> ATTENTION_INLINE uint32_t ones(void) { return KV == KV_BF16 ? 0x3f803f80u : 0x3c003c00u; }

/* Two of four int8 as f16, exactly: a byte plus 128 beside 0x64 is 1024 + 128 + it. `which`: the bytes, as __byte_perm's selector. */
ATTENTION_INLINE uint32_t widen(uint32_t bytes_plus_128, uint32_t which) {
    uint32_t biased = __byte_perm(bytes_plus_128, 0x64646464u, which), bias = 0x64806480u;
    __half2 exact = __hsub2(*(__half2 *)&biased, *(__half2 *)&bias);
    return *(uint32_t *)&exact;
}

/* ---- operands. `lane` is the thread's place in its warp ---- */

/* Of K as the second operand: 16 slots by 16 dims; b[0], b[1] of the first 8 slots, b[2], b[3] of the others. at: K's rows + k_offset() + slot * pitch + (dim / 16) * k_step. */
template <int KV, int DIMS> ATTENTION_INLINE uint32_t k_offset(uint32_t lane) {
    if constexpr (KV == KV_Q8) return lane % 16 * piece<KV, DIMS>::pitch;
    return (lane / 16 * 8 + lane % 8) * piece<KV, DIMS>::pitch + lane / 8 % 2 * 16;
}
template <int KV> constexpr uint32_t dims_step = KV == KV_Q8 ? 16 : 32; /* bytes of 16 dims */

/* q8: of the 16 dims a thread has 4 t .. 4 t + 3, t = lane % 4, where the product says 2 t, 2 t + 1, 2 t + 8, 2 t + 9. The queries are loaded in the same order. */
template <int KV> ATTENTION_INLINE void load_k(uint32_t b[4], uint32_t at) {
    if constexpr (KV == KV_Q8) {
        uint32_t bytes[2];
        load_matrices_2(bytes, at);
        for (int i = 0; i < 2; i++) {
            bytes[i] ^= 0x80808080u;
            b[2 * i] = widen(bytes[i], 0x4140);
            b[2 * i + 1] = widen(bytes[i], 0x4342);
        }
    } else {
        load_matrices_4(b, at);
    }
}

/* Of V as the second operand: 16 slots by 16 dims; b[0], b[1] of a first tile of 8 columns, b[2], b[3] of a second. at: V's rows + v_offset() + slot * pitch + (dim / 16) * dims_step.
 * Column c of the tiles is dim c and 8 + c of the 16; of q8, dim 2 c and 2 c + 1. */
template <int KV, int DIMS> ATTENTION_INLINE uint32_t v_offset(uint32_t lane) {
    return lane % 16 * piece<KV, DIMS>::pitch + (KV == KV_Q8 ? 0 : lane / 16 * 16);
}
template <int KV> ATTENTION_INLINE void load_v(uint32_t b[4], uint32_t at) {
    if constexpr (KV == KV_Q8) {
        uint32_t bytes[2];
        load_matrices_2_trans(bytes, at);
        for (int i = 0; i < 2; i++) {
            bytes[i] ^= 0x80808080u;
            b[i] = widen(bytes[i], 0x4240);
            b[2 + i] = widen(bytes[i], 0x4341);
        }
    } else {
        load_matrices_4_trans(b, at);
    }
}

/* Queries as the first operand: of the two rows that the thread has a part of. NULL: zeros. */
template <int KV, int DIMS>
ATTENTION_INLINE void load_queries(uint32_t a[DIMS / 16][4], const uint16_t *low, const uint16_t *high, uint32_t d, uint32_t lane) {
#pragma unroll
    for (uint32_t k = 0; k < DIMS / 16; k++) {
        if constexpr (KV == KV_Q8) {
            uint32_t dim = 16 * k + lane % 4 * 4;
            uint2 zero = {0, 0};
            uint2 first = low && dim < d ? *(const uint2 *)(low + dim) : zero, second = high && dim < d ? *(const uint2 *)(high + dim) : zero;
            a[k][0] = first.x, a[k][1] = second.x, a[k][2] = first.y, a[k][3] = second.y;
        } else {
            uint32_t dim = 16 * k + lane % 4 * 2;
            a[k][0] = low && dim < d ? *(const uint32_t *)(low + dim) : 0;
            a[k][1] = high && dim < d ? *(const uint32_t *)(high + dim) : 0;
            a[k][2] = low && dim + 8 < d ? *(const uint32_t *)(low + dim + 8) : 0;
            a[k][3] = high && dim + 8 < d ? *(const uint32_t *)(high + dim + 8) : 0;
        }
    }
}

/* Two tiles of 8 columns (of 16 dims): calls of f(dim, x, y) with two neighbouring dims of the thread's row `half` (0: lane / 4, 1: that + 8). */
template <int KV, class F> ATTENTION_INLINE void each_pair(const float first[4], const float second[4], uint32_t lane, int half, F f) {
    uint32_t t = lane % 4;
    if constexpr (KV == KV_Q8) {
        f(4 * t, first[2 * half], second[2 * half]);
        f(4 * t + 2, first[2 * half + 1], second[2 * half + 1]);
    } else {
        f(2 * t, first[2 * half], first[2 * half + 1]);
        f(2 * t + 8, second[2 * half], second[2 * half + 1]);
    }
}

#include "kernels/cuda/attention_codes.h"

/* ---- loading a piece ---- */

ATTENTION_INLINE const uint32_t *lane_blocks_of(const struct attention_args &args, uint32_t table, uint32_t head) {
    return args.tables + ((size_t)table * args.n_lanes + args.layer * args.n_kv_heads + head) * args.lane_blocks;
}

/* The two blocks of the piece that begins at `slot`; what lies past `end` is not looked at. */
ATTENTION_INLINE uint2 piece_blocks(const uint32_t *blocks, uint32_t slot, uint32_t end) {
    uint2 ids = {0, 0};
    if (slot < end) ids.x = __ldg(blocks + slot / BLOCK_TOKENS);
    if (slot + BLOCK_TOKENS < end) ids.y = __ldg(blocks + slot / BLOCK_TOKENS + 1);
    return ids;
}

/* K or V rows of a piece (source: their offset in a block). Slots from `end` on become zeros: what lies there may be anything, and 0 * NaN is NaN. */
template <int KV, int DIMS>
ATTENTION_INLINE void copy_rows(const struct attention_args &args, uint32_t to, uint2 ids, size_t offset, uint32_t visible) {
    constexpr uint32_t pitch = piece<KV, DIMS>::pitch, columns = piece<KV, DIMS>::row / 16, rows = ATTENTION_THREADS / columns;
    const uint8_t *first = args.kv + ids.x * args.block_bytes + offset, *second = args.kv + ids.y * args.block_bytes + offset;
    if (args.row_bytes % 16 == 0) {
        uint32_t row = threadIdx.x / columns, column = threadIdx.x % columns * 16, at = row * args.row_bytes + column;
        if (column >= args.row_bytes) return;
        to += row * pitch + column;
#pragma unroll
        for (uint32_t i = 0; i < PIECE_SLOTS; i += rows)
            copy_16(to + i * pitch, (i < BLOCK_TOKENS ? first : second) + at + i % BLOCK_TOKENS * args.row_bytes, row + i < visible ? 16 : 0);
    } else {
        uint32_t words = args.row_bytes / 4;
        for (uint32_t i = threadIdx.x; i < PIECE_SLOTS * words; i += ATTENTION_THREADS) {
            uint32_t row = i / words, byte = i % words * 4;
            copy_4(to + row * pitch + byte, (row < BLOCK_TOKENS ? first : second) + row % BLOCK_TOKENS * args.row_bytes + byte,
                   row < visible ? 4 : 0);
        }
    }
}

/* visible: slots of the piece before `end`; ids of blocks that have none may be anything valid. */
template <int KV, int DIMS> ATTENTION_INLINE void copy_scales(const struct attention_args &args, uint32_t to, uint2 ids, uint32_t visible) {
    static_assert(BLOCK_TOKENS == 32 && PIECE_SLOTS == 64, "a piece is two blocks");
    if (KV != KV_Q8 || threadIdx.x >= 32) return;
    uint32_t block = threadIdx.x / 16, v = threadIdx.x / 8 % 2, slot = threadIdx.x % 8 * 4, in_piece = block * BLOCK_TOKENS + slot;
    const float *from = args.scales + (size_t)(block ? ids.y : ids.x) * 2 * BLOCK_TOKENS + v * BLOCK_TOKENS + slot;
    uint32_t take = in_piece >= visible ? 0 : visible - in_piece < 4 ? (visible - in_piece) * 4 : 16;
    copy_16(to + (v * PIECE_SLOTS + in_piece) * sizeof(float), from, take);
}

/* K and V rows of a piece of which all is there, as are most: of DIMS dims, so that every distance is a constant. */
template <int KV, int DIMS> ATTENTION_INLINE void copy_whole(const struct attention_args &args, uint32_t to, uint2 ids) {
    using layout = piece<KV, DIMS>;
    constexpr uint32_t columns = layout::row / 16, rows = ATTENTION_THREADS / columns;
    const uint32_t row = threadIdx.x / columns, column = threadIdx.x % columns * 16;
    const uint8_t *first = args.kv + ids.x * args.block_bytes + threadIdx.x * 16, *second = args.kv + ids.y * args.block_bytes + threadIdx.x * 16;
    to += row * layout::pitch + column;
#pragma unroll
    for (uint32_t v = 0; v < 2; v++) {
#pragma unroll
        for (uint32_t i = 0; i < PIECE_SLOTS; i += rows)
            copy_16(to + v * layout::k_bytes + i * layout::pitch,
                    (i < BLOCK_TOKENS ? first : second) + (v * BLOCK_TOKENS + i % BLOCK_TOKENS) * layout::row, 16);
    }
}

template <int KV, int DIMS>
ATTENTION_INLINE void copy_piece(const struct attention_args &args, uint32_t to, const struct piece_source &source, uint32_t visible) {
    if constexpr (code_bits<KV> != 0) {
        copy_blocks<KV, DIMS, true>(args, to, source, visible);
        return;
    }
    const uint2 ids = source.ids;
    using layout = piece<KV, DIMS>;
    if (args.row_bytes == layout::row && visible >= PIECE_SLOTS) {
        copy_whole<KV, DIMS>(args, to, ids);
    } else {
        copy_rows<KV, DIMS>(args, to, ids, 0, visible);
        copy_rows<KV, DIMS>(args, to + layout::k_bytes, ids, (size_t)BLOCK_TOKENS * args.row_bytes, visible);
    }
    copy_scales<KV, DIMS>(args, to + layout::scales, ids, visible);
}

/* Columns that no copy writes, when d is less than DIMS. */
ATTENTION_INLINE void clear_shared(uint8_t *shared, uint32_t bytes) {
    uint4 zero = {0, 0, 0, 0};
    for (uint32_t i = threadIdx.x * 16; i < bytes; i += ATTENTION_THREADS * 16) *(uint4 *)(shared + i) = zero;
}

/* ---- softmax ---- */

/* What m is where nothing was seen: exp2(-inf - this) is 0, not NaN. */
ATTENTION_INLINE float finite_max(float m) { return m == -INFINITY ? 0 : m; }

ATTENTION_INLINE float max_of_quad(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

/* p of a score s whose maximum is m (finite). */
ATTENTION_INLINE float weight_of(float s, float scale_log2, float m) { return power_of_2(__fmaf_rn(s, scale_log2, -m)); }

/* q8: what of p goes with V's integers. */
ATTENTION_INLINE float with_v_scale(float p, float scale) { return fminf(__fmul_rn(p, scale * Q8_V_ONE), 65504.f); }

/* What both sides of a merge are multiplied by; the maximum moves on. A split of which the query saw nothing changes nothing. */
struct merge_factors {
    float old, now;
    bool none;
};
ATTENTION_INLINE struct merge_factors merge_max(float *maximum, float m) {
    float merged = fmaxf(*maximum, m), finite = finite_max(merged);
    struct merge_factors f = {power_of_2(*maximum - finite), power_of_2(m - finite), m == -INFINITY};
    *maximum = merged;
    return f;
}
ATTENTION_INLINE float fold(struct merge_factors f, float total, float x) { return f.none ? total : __fmaf_rn(total, f.old, __fmul_rn(x, f.now)); }

/* The factor from o to the result. */
template <int KV> ATTENTION_INLINE float result_factor(float l) { return KV == KV_Q8 ? __frcp_rn(l) * (1 / Q8_V_ONE) : __frcp_rn(l); }
ATTENTION_INLINE __half2 result_pair(float x, float y, float factor) {
    x = fminf(fmaxf(__fmul_rn(x, factor), -65504.f), 65504.f);
    y = fminf(fmaxf(__fmul_rn(y, factor), -65504.f), 65504.f);
    return __floats2half2_rn(x, y);
}
