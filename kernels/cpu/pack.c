/* See pack.h. Plain C, once at load; the formats on both sides are those of tensor.c and layout.h. */
#include "kernels/cpu/pack.h"

#include <string.h>

#include "base/check.h"
#include "base/half.h"

/* Where a block's parts begin within it, and its size. Scales of the 256-element types are in a header before eight blocks. */
struct form {
    size_t header, block; /* bytes */
    size_t nibbles, fifth, top, bytes;
    bool minimum;
};

static const struct form forms[TENSOR_TYPES] = {
    [TENSOR_F32] = {.block = 2048},
    [TENSOR_F16] = {.block = 1024},
    [TENSOR_BF16] = {.block = 1024},
    [TENSOR_Q8_0] = {.block = 544, .bytes = 32},
    [TENSOR_Q4_0] = {.block = 288, .nibbles = 32},
    [TENSOR_Q4_1] = {.block = 320, .nibbles = 64, .minimum = true},
    [TENSOR_Q5_0] = {.block = 352, .nibbles = 96, .fifth = 32},
    [TENSOR_Q5_1] = {.block = 384, .nibbles = 128, .fifth = 64, .minimum = true},
    [TENSOR_Q4_K] = {.header = 64, .block = 288, .nibbles = 32},
    [TENSOR_Q5_K] = {.header = 64, .block = 352, .nibbles = 96, .fifth = 32},
    [TENSOR_Q6_K] = {.header = 32, .block = 416, .nibbles = 160, .top = 32},
};

bool panel_is_float(enum tensor_type type) { return type == TENSOR_F32 || type == TENSOR_F16 || type == TENSOR_BF16; }

struct panel panel_of(const struct tensor *tensor) {
    const struct form *form = &forms[tensor->type];
    struct panel panel = {
        .type = tensor->type,
        .rows = tensor->rows,
        .cols = tensor->cols,
        .n_strips = tensor->rows / STRIP_ROWS + (tensor->rows % STRIP_ROWS != 0),
        .n_blocks = tensor->cols / PANEL_K + (tensor->cols % PANEL_K != 0),
    };
    panel.strip_bytes = panel.n_blocks * form->block + (form->header ? panel.n_blocks / SUPER_BLOCKS * form->header : 0);
    return panel;
}

static size_t block_offset(const struct form *form, uint32_t b) {
    if (!form->header) return b * form->block;
    return b / SUPER_BLOCKS * (form->header + SUPER_BLOCKS * form->block) + form->header + b % SUPER_BLOCKS * form->block;
}

static uint8_t *header_of(const struct form *form, uint8_t *strip, uint32_t b) {
    return strip + b / SUPER_BLOCKS * (form->header + SUPER_BLOCKS * form->block);
}

/* Quant k of row r in a block, as stored: unsigned. */
static void put_quant(const struct form *form, uint8_t *block, int r, int k, int quant) {
    int j = k / 4, at = 4 * r + k % 4;
    if (form->bytes) {
        block[form->bytes + (size_t)(64 * j + at)] = (uint8_t)quant;
        return;
    }
    block[form->nibbles + (size_t)(64 * (j % 4) + at)] |= (uint8_t)((quant & 15) << (j / 4 * 4));
    if (form->fifth) block[form->fifth + (size_t)at] |= (uint8_t)((quant >> 4 & 1) << j);
    if (form->top) block[form->top + (size_t)(64 * (j / 4) + at)] |= (uint8_t)((quant >> 4 & 3) << (j % 4 * 2));
}

static int get_quant(const struct form *form, const uint8_t *block, int r, int k) {
    int j = k / 4, at = 4 * r + k % 4;
    if (form->bytes) return block[form->bytes + (size_t)(64 * j + at)];
    int quant = block[form->nibbles + (size_t)(64 * (j % 4) + at)] >> (j / 4 * 4) & 15;
    if (form->fifth) quant |= (block[form->fifth + (size_t)at] >> j & 1) << 4;
    if (form->top) quant |= (block[form->top + (size_t)(64 * (j / 4) + at)] >> (j % 4 * 2) & 3) << 4;
    return quant;
}

/* One source block of 32 (Q4_0 ... Q8_0): scales of two bytes, then quants. */
static void pack_small(enum tensor_type type, const uint8_t *source, uint8_t *block, int r) {
    const struct form *form = &forms[type];
    memcpy(block + 2 * r, source, 2);
    source += 2;
    if (form->minimum) {
        memcpy(block + 32 + 2 * r, source, 2);
        source += 2;
    }
    uint32_t fifth = 0;
    if (form->fifth) {
        memcpy(&fifth, source, sizeof fifth);
        source += 4;
    }
    for (int k = 0; k < PANEL_K; k++) {
        int quant = form->bytes ? (int8_t)source[k] + 128 : (k < 16 ? source[k] & 15 : source[k - 16] >> 4) | (int)(fifth >> k & 1) << 4;
        put_quant(form, block, r, k, quant);
    }
}

/* 6-bit scale and minimum of group g of Q4_K and Q5_K: see tensor.c. */
static void scale_and_min(const uint8_t *scales, int g, uint8_t *scale, uint8_t *min) {
    if (g < 4) {
        *scale = scales[g] & 63;
        *min = scales[g + 4] & 63;
    } else {
        *scale = (uint8_t)((scales[g + 4] & 15) | (scales[g - 4] >> 6) << 4);
        *min = (uint8_t)(scales[g + 4] >> 4 | (scales[g] >> 6) << 4);
    }
}

/* One source block of 256 into eight panel blocks. */
static void pack_super(enum tensor_type type, const uint8_t *source, uint8_t *strip, uint32_t b, int r) {
    const struct form *form = &forms[type];
    uint8_t *header = header_of(form, strip, b);
    bool six = type == TENSOR_Q6_K;
    memcpy(header + 2 * r, source + (six ? 208 : 0), 2);
    if (!six) memcpy(header + 32 + 2 * r, source + 2, 2);
    for (int g = 0; g < SUPER_BLOCKS; g++) {
        uint8_t *block = strip + block_offset(form, b + (uint32_t)g);
        if (six) {
            block[r] = source[192 + 2 * g];
            block[16 + r] = source[193 + 2 * g];
        } else {
            scale_and_min(source + 4, g, &block[r], &block[16 + r]);
        }
        const uint8_t *fifth = source + 16, *nibbles = source + (form->fifth ? 48 : 16);
        for (int k = 0; k < PANEL_K; k++) {
            int quant;
            if (six) {
                int half = g / 4, quarter = g % 4;
                quant = source[half * 64 + quarter % 2 * 32 + k] >> (quarter / 2 * 4) & 15;
                quant |= (source[128 + half * 32 + k] >> (quarter * 2) & 3) << 4;
            } else {
                quant = nibbles[g / 2 * 32 + k] >> (g % 2 * 4) & 15;
                if (form->fifth) quant |= (fifth[k] >> g & 1) << 4;
            }
            put_quant(form, block, r, k, quant);
        }
    }
}

static void pack_row(const struct panel *panel, const uint8_t *source, uint8_t *strip, int r) {
    const struct tensor_type_info *info = tensor_type_info(panel->type);
    if (panel_is_float(panel->type)) {
        for (size_t k = 0; k < panel->cols; k++)
            memcpy(strip + (k * STRIP_ROWS + (size_t)r) * info->block_bytes, source + k * info->block_bytes, info->block_bytes);
        return;
    }
    for (uint32_t b = 0; b < panel->n_blocks; b += info->block_size / PANEL_K, source += info->block_bytes) {
        if (info->block_size == PANEL_K)
            pack_small(panel->type, source, strip + block_offset(&forms[panel->type], b), r);
        else
            pack_super(panel->type, source, strip, b, r);
    }
}

void panel_pack(const struct panel *panel, const struct tensor *tensor, uint32_t first, uint32_t end) {
    CHECK(panel->type == tensor->type && panel->rows == tensor->rows && panel->cols == tensor->cols && end <= panel->n_strips);
    size_t row_bytes = tensor_row_bytes(tensor);
    for (uint32_t s = first; s < end; s++) {
        uint8_t *strip = panel->data + s * panel->strip_bytes;
        memset(strip, 0, panel->strip_bytes);
        for (uint32_t r = 0; r < STRIP_ROWS && s * STRIP_ROWS + r < panel->rows; r++)
            pack_row(panel, (const uint8_t *)tensor->data + (size_t)(s * STRIP_ROWS + r) * row_bytes, strip, (int)r);
    }
}

static float scale_at(const uint8_t *scales, int r) {
    uint16_t half;
    memcpy(&half, scales + 2 * r, sizeof half);
    return float_from_f16(half);
}

/* The operations of tensor.c's widening, in its order. */
static void block_row_f32(enum tensor_type type, const uint8_t *header, const uint8_t *block, int r, float *x) {
    const struct form *form = &forms[type];
    float d, low_d, m = 0;
    int offset = type == TENSOR_Q8_0 ? 128 : type == TENSOR_Q4_0 ? 8 : type == TENSOR_Q5_0 ? 16 : type == TENSOR_Q6_K ? 32 : 0;
    if (type == TENSOR_Q6_K) {
        low_d = scale_at(header, r) * (float)(int8_t)block[r];
        d = scale_at(header, r) * (float)(int8_t)block[16 + r];
    } else if (form->header) {
        low_d = d = scale_at(header, r) * (float)block[r];
        m = -(scale_at(header + 32, r) * (float)block[16 + r]);
    } else {
        low_d = d = scale_at(block, r);
        if (form->minimum) m = scale_at(block + 32, r);
    }
    bool has_minimum = form->minimum || (form->header && type != TENSOR_Q6_K);
    for (int k = 0; k < PANEL_K; k++) {
        x[k] = (k < 16 ? low_d : d) * (float)(get_quant(form, block, r, k) - offset);
        if (has_minimum) x[k] += m;
    }
}

void panel_row_f32(const struct panel *panel, uint32_t row, float *destination) {
    CHECK(panel->data && row < panel->rows);
    const struct form *form = &forms[panel->type];
    uint8_t *strip = panel->data + row / STRIP_ROWS * panel->strip_bytes;
    int r = (int)(row % STRIP_ROWS);
    if (panel_is_float(panel->type)) {
        const struct tensor_type_info *info = tensor_type_info(panel->type);
        for (size_t k = 0; k < panel->cols; k++)
            tensor_dequantize(panel->type, strip + (k * STRIP_ROWS + (size_t)r) * info->block_bytes, destination + k, 1);
        return;
    }
    for (uint32_t b = 0; b < panel->n_blocks; b++)
        block_row_f32(panel->type, form->header ? header_of(form, strip, b) : NULL, strip + block_offset(form, b), r,
                      destination + (size_t)b * PANEL_K);
}
