/* A file's matrix into panels (layout.h) and rows back out. Pure; strips may be packed by several threads at once. */
#pragma once

#include "kernels/cpu/layout.h"

bool panel_is_float(enum tensor_type type);
/* The shape of `tensor` as a panel, data NULL. */
struct panel panel_of(const struct tensor *tensor);
static inline size_t panel_bytes(const struct panel *panel) { return panel->n_strips * panel->strip_bytes; }
/* Packs strips [first, end) into panel->data. */
void panel_pack(const struct panel *panel, const struct tensor *tensor, uint32_t first, uint32_t end);
/* Equal to tensor_row_f32 of the tensor it was packed from, bit for bit. */
void panel_row_f32(const struct panel *panel, uint32_t row, float *destination);
