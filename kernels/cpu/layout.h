/* Shapes of everything the cpu backend keeps in memory: weight panels, quantised activations, the KV pool. Shared by all instruction sets, so that
 * one packing serves every one of them.
 *
 * Weight panels. A matrix is cut in strips of 16 rows (outputs; the last one padded with zero rows), a strip in blocks of 32 columns (k), stored k-major: one
 * product reads a strip as one sequential stream. Quants are unsigned bytes or parts of them; "quad j" is the 64 bytes in which byte 4r + c belongs to row r
 * and k = 4j + c, so that one 32-bit lane of a vector is four consecutive k of one row.
 *   nibbles[256]  byte 64j + 4r + c, j < 4: low nibble is quad j, high nibble quad j + 4
 *   fifth[64]     byte 4r + c: bit j is the fifth bit of quad j
 *   top[128]      byte 64h + 4r + c: bits 2i, 2i+1 are the two top bits of quad 4h + i
 *   bytes[512]    quad j at 64j, quant + 128
 * A block of each type, f16 unless said otherwise:
 *   Q4_0  d[16], nibbles            Q4_1  d[16], m[16], nibbles
 *   Q5_0  d[16], fifth, nibbles     Q5_1  d[16], m[16], fifth, nibbles      Q8_0  d[16], bytes
 *   Q4_K, Q5_K: eight blocks after a header d[16], dmin[16]; each scale u8[16], min u8[16], (fifth,) nibbles
 *   Q6_K: eight blocks after a header d[16]; each scale s8[2][16] (one a half of 16 k), top, nibbles
 *   F16, BF16, F32: [32 k][16 rows] elements
 * Bytes a weight are those of the file (Q4_K + 3 %). */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels/backend.h"
#include "kernels/tensor.h"

enum { STRIP_ROWS = 16, PANEL_K = 32, SUPER_BLOCKS = 8 };

struct panel {
    enum tensor_type type;
    uint32_t rows, cols; /* of the matrix */
    uint32_t n_strips;
    uint32_t n_blocks; /* of 32 k; cols / 32 rounded up (float types pad with zeros) */
    size_t strip_bytes;
    uint8_t *data; /* NULL: absent */
};

struct act_plane {
    int32_t nsum;     /* -sum of q, */
    int32_t nsum_low; /* -sum of q[0..15]: takes the offset of unsigned quants away, exactly */
    int8_t q[32];     /* -127..127 */
};

/* 32 activations of one row, quantised once, read by every product of the phase.
 *
 * One plane: x = d q, 8 bits; but the four neighbours among which the largest of the 32 is have 16, x = d (256 high + q), so that d is what the other 28 need: of the
 * 32 a few are often many times the rest, and a step that reaches them would round the rest away. One more quad in the product (1/8) for an eighth of the error. nsum and nsum_low
 * count 256 high.
 * Two planes: x = d (256 q + q'), 16 bits for all; weights are unpacked once for both. */
enum { ACT_PLANES = 2 /* at most */, QUAD = 4 };
struct act_block {
    float d;
    float s;           /* sum of x: what a minimum is multiplied with */
    uint32_t quad;     /* one plane: high is of x[4 quad..] */
    int8_t high[QUAD]; /* -127..127 */
    struct act_plane plane[];
};
static inline size_t act_block_bytes(uint32_t planes) { return sizeof(struct act_block) + planes * sizeof(struct act_plane); }

/* Rows of activations in the forms that the matrices of a phase ask for. */
struct act {
    uint8_t *blocks; /* [row][row_bytes]: blocks of `planes` planes */
    float *values;   /* [row][value_stride], padded with zeros to a multiple of 32 */
    uint32_t planes;
    size_t row_bytes, value_stride;
};
static inline struct act_block *act_block_at(const struct act *act, size_t row, size_t block) {
    return (struct act_block *)(void *)(act->blocks + row * act->row_bytes + block * act_block_bytes(act->planes));
}

/* KV block of one lane: 32 slots, dims padded to 16.
 *   f32, f16, bf16  K [dims/2][32][2], V [16][dims][2] elements: pair dot products for both, without a transpose
 *   q8              K u8 [dims/4][32][4] (value + 128), V s8 [32][dims], then f32 scales: K [32], V [32]
 *   kivi4, kivi2    codes of K and V in the order of f16 elements, 32 of them packed together: byte i holds elements i, i + 16 (4 bits), or i, i + 8,
 *                   i + 16, i + 24 (2 bits), from its lowest bits up; then scales (struct kivi_scale): K [dims], V [32][KIVI_GROUPs]
 * A KIVI block that is in the residual is kept as an f16 block as well (raw.h).
 * Keys of q8 are kept transformed (isa.h: hadamard), and meet queries that are transformed too, which leaves products as they are: what a few dims have too much of is shared
 * among all, so that one scale a slot loses less. (As Ashkboos et al. do with keys in QuaRot, 2024.) */
struct kv_shape {
    enum kv_dtype dtype;
    uint32_t head_dim, dims; /* dims: head_dim rounded up to 16 */
    size_t v_offset, scale_offset;
    size_t bytes;     /* of a block, without its positions */
    size_t raw_bytes; /* of an f16 block; 0: no KIVI dtype */
};

/* What of a KIVI lane is read in f16: blocks from n_codes on, block b at pool + of[b] * raw_bytes. */
struct residual {
    const uint8_t *pool;
    const uint32_t *of;
    uint32_t n_codes;
};
static inline bool kv_transforms(const struct kv_shape *shape) { return shape->dtype == KV_Q8; }

enum { SPLIT_SLOTS = 256, KV_PAD = 16, KV_DIMS_MAX = 1024 };
