#!/usr/bin/env python3
"""Writes quants.txt: random blocks of every tensor type and what PyPI's gguf widens them to.

A line: type, blocks in hex, the f32 values' bits in hex. Scales are random finite f16 values, subnormal, zero and negative ones among them;
all other bytes are uniformly random, so that every bit of every packed field is exercised.

    pip install gguf numpy && python3 make_quants.py > quants.txt
"""
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

# type: (blocks, byte offsets of f16 scales within a block)
TYPES = {
    "F32": (32, None), "F16": (32, None), "BF16": (32, None),
    "Q8_0": (6, (0,)), "Q4_0": (6, (0,)), "Q4_1": (6, (0, 2)), "Q5_0": (6, (0,)), "Q5_1": (6, (0, 2)),
    "Q4_K": (3, (0, 2)), "Q5_K": (3, (0, 2)), "Q6_K": (3, (208,)),
}
rng = np.random.default_rng(20240917)


def finite_f16(count):
    bits = rng.integers(0, 1 << 16, count, dtype=np.uint16)
    bits[(bits & 0x7C00) == 0x7C00] ^= 0x4000
    return bits


for name, (blocks, scales) in TYPES.items():
    kind = GGMLQuantizationType[name]
    size, length = GGML_QUANT_SIZES[kind]
    if name == "F32":
        data = rng.standard_normal(blocks).astype(np.float32).view(np.uint8).reshape(blocks, length)
    elif name == "F16":
        data = finite_f16(blocks).view(np.uint8).reshape(blocks, length)
        data[0], data[1] = (0x01, 0x00), (0xFF, 0x83)  # the smallest and a large negative subnormal
    elif name == "BF16":
        data = (rng.standard_normal(blocks).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(blocks, length)
    else:
        data = rng.integers(0, 256, (blocks, length), dtype=np.uint8)
        for offset in scales:
            data[:, offset:offset + 2] = finite_f16(blocks).view(np.uint8).reshape(blocks, 2)
        data[-1, scales[0]:scales[0] + 2] = (0x03, 0x80)  # a negative subnormal scale
    source = np.ascontiguousarray(data).reshape(-1)
    if name == "F32":
        wide = source.view(np.float32)
    elif name == "F16":
        wide = source.view(np.float16).astype(np.float32)
    else:
        wide = dequantize(source.reshape(1, -1), kind).reshape(-1)
    assert wide.dtype == np.float32 and wide.size == blocks * size and np.isfinite(wide).all()
    print(name, source.tobytes().hex(), "".join(f"{bits:08x}" for bits in np.ascontiguousarray(wide).view(np.uint32)))
