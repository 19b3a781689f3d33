#!/usr/bin/env python3
"""Writes kivi.txt: recorded keys and values of a lane, their KIVI codes, scales and minima, and what queries at some positions get from the lane.

A direct transcription of KIVI (Liu et al. 2024, arXiv 2402.02750, section 3.2 and algorithm 1) in numpy, apart from all code of the project: keys are quantised by channel over groups of 32
tokens, values by token over groups of 32 channels, scale and minimum in f16; position p reads block j as codes iff 32 (j + 1) + 64 <= p, else as it was cached, in f16.
Format: see read_case() in ../test_kivi.c.

    pip install numpy && python3 make_kivi.py > kivi.txt
"""
import numpy as np

TOKENS, RESIDUAL, GROUP = 32, 64, 32


def hexes(array, dtype):
    """Little-endian."""
    return np.ascontiguousarray(array, dtype=dtype).tobytes().hex()


def digits(codes):
    return "".join(f"{c:x}" for c in codes.reshape(-1))


def quantize(x, bits):
    """x [..., n] f16 values in f32, groups along the last axis -> codes, scale, minimum (f16)."""
    levels = np.float32(2**bits - 1)
    low, high = x.min(-1), x.max(-1)
    scale, minimum = ((high - low) / levels).astype(np.float16), low.astype(np.float16)
    step = scale.astype(np.float32)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint((x - minimum.astype(np.float32)[..., None]) / step)
    return np.clip(np.where(step > 0, codes, 0), 0, levels).astype(np.uint8), scale, minimum


def numbers(codes, scale, minimum):
    return codes.astype(np.float32) * scale.astype(np.float32)[..., None] + minimum.astype(np.float32)[..., None]


def attend(q, k, v):
    """q [heads, d], k and v [n, d], in f64."""
    scores = q @ k.T / np.sqrt(k.shape[1])
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v


def case(bits, d, n, heads, positions, seed):
    random = np.random.default_rng(seed)
    # Keys have a few channels with large values, as real ones do.
    channel = np.where(random.random(d) < 0.1, 8.0, 1.0) * random.standard_normal(d)
    k = (random.standard_normal((n, d)) + channel).astype(np.float16)
    v = (random.standard_normal((n, d)) * 0.5).astype(np.float16)
    k[40:45, 1] = 0  # and a group may hold one number only
    k[64:96, 2] = 3
    v[70, :] = -0.25
    q = (2 * random.standard_normal((len(positions), heads, d))).astype(np.float16)
    print("case", bits, d, n, heads, len(positions))
    print("k", hexes(k, np.float16))
    print("v", hexes(v, np.float16))
    k32, v32 = k.astype(np.float32), v.astype(np.float32)
    seen_k, seen_v, blocks = k32.copy(), v32.copy(), n // TOKENS
    for j in range(blocks):
        slots = slice(TOKENS * j, TOKENS * (j + 1))
        codes, scale, minimum = quantize(k32[slots].T, bits)
        seen_k[slots] = numbers(codes, scale, minimum).T
        print("keys", digits(codes.T), hexes(scale, np.float16), hexes(minimum, np.float16))
        value_codes, value_scales, value_minima = np.empty((TOKENS, d), np.uint8), [], []
        for first in range(0, d, GROUP):
            part = slice(first, min(first + GROUP, d))
            codes, scale, minimum = quantize(v32[slots, part], bits)
            seen_v[slots, part] = numbers(codes, scale, minimum)
            value_codes[:, part] = codes
            value_scales.append(scale)
            value_minima.append(minimum)
        print("values", digits(value_codes), hexes(np.stack(value_scales, 1), np.float16), hexes(np.stack(value_minima, 1), np.float16))
    for i, p in enumerate(positions):
        coded = max(0, (p - RESIDUAL) // TOKENS) * TOKENS
        keys = np.concatenate([seen_k[:coded], k32[coded : p + 1]]).astype(np.float64)
        values = np.concatenate([seen_v[:coded], v32[coded : p + 1]]).astype(np.float64)
        out = attend(q[i].astype(np.float64), keys, values)
        print("row", p, coded // TOKENS, hexes(q[i], np.float16), hexes(out, np.float32))


case(4, 64, 200, 3, [5, 95, 96, 127, 128, 160, 199], 1)
case(2, 64, 170, 3, [63, 96, 160, 169], 2)
case(4, 80, 110, 1, [100, 109], 3)
case(2, 20, 130, 1, [129], 4)
