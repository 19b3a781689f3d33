#!/usr/bin/env python3
"""Whole models and their logits by a forward pass of numpy in double, written from the papers: tiny random files that between them have every tensor type and
architecture, and the sample model.

    pip install gguf numpy && python3 make_tiny.py SmolLM2-135M-Instruct.Q4_1.gguf

<name>.gguf     a tiny model
logits.txt      "tiny <file> <tokens>", then a line "row <number> <logits>" for some rows
sample.txt      "sample <tokens>", then "logits" of the last row, every 64th, and "top" the five highest as token:logit
"""
import os
import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize, quantize

HERE = os.path.dirname(os.path.abspath(__file__))
VOCABULARY, CONTEXT = 48, 64
ROWS = (0, 1, 15, 31, 32, 39)
TOKENS = [7 * i * i % 47 for i in range(40)]
rng = np.random.default_rng(2502)


def random_k_blocks(kind, rows, cols):
    """gguf does not quantise to these: random fields, with scales that bring the weights' deviation near 1/sqrt(cols)."""
    _, length = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows, cols // 256, length), dtype=np.uint8)
    size = 0.7 / np.sqrt(cols)
    d, m, at = {T.Q4_K: (size / 160, size / 21, (0, 2)), T.Q5_K: (size / 320, size / 21, (0, 2)), T.Q6_K: (size / 1370, None, (208,))}[kind]
    for offset, scale in zip(at, (d, m)):
        values = (scale * rng.uniform(0.5, 1.5, blocks.shape[:2])).astype(np.float16)
        blocks[:, :, offset:offset + 2] = values[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


class Builder:
    def __init__(self, name, arch, **keys):
        self.name, self.arch, self.weights = name, arch, {}
        self.keys = dict(layers=2, embd=32, heads=4, kv=2, dim=8, ff=64, window=0, base=10000.0, linear=None, yarn=None, eps=1e-5) | keys
        self.writer = gguf.GGUFWriter(os.path.join(HERE, name), arch)

    def matrix(self, name, kind, rows, cols, deviation=None):
        if kind in (T.Q4_K, T.Q5_K, T.Q6_K):
            data = random_k_blocks(kind, rows, cols)
        else:
            data = quantize((rng.standard_normal((rows, cols)) * (deviation or 1 / np.sqrt(cols))).astype(np.float32), kind)
        self.weights[name] = np.asarray(dequantize(data, kind), dtype=np.float64)
        self.writer.add_tensor(name, data, raw_dtype=kind)

    def vector(self, name, values):
        values = np.asarray(values, dtype=np.float32)
        self.weights[name] = values.astype(np.float64)
        self.writer.add_tensor(name, values)

    def finish(self, kinds, tied):
        k, w, a = self.keys, self.writer, self.arch
        w.add_block_count(k["layers"])
        w.add_embedding_length(k["embd"])
        w.add_feed_forward_length(k["ff"])
        w.add_context_length(CONTEXT)
        w.add_head_count(k["heads"])
        w.add_head_count_kv(k["kv"])
        w.add_key_length(k["dim"])
        w.add_value_length(k["dim"])
        w.add_rope_dimension_count(k["dim"])
        w.add_rope_freq_base(k["base"])
        w.add_layer_norm_rms_eps(k["eps"])
        if k["window"]:
            w.add_sliding_window(k["window"])
        if k["linear"]:
            w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            w.add_rope_scaling_factor(k["linear"])
        if k["yarn"]:
            w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            w.add_rope_scaling_factor(k["yarn"][0])
            w.add_rope_scaling_orig_ctx_len(k["yarn"][1])
        w.add_token_list([f"t{i}" for i in range(VOCABULARY)])
        kind = iter(kinds * 100)
        self.matrix("token_embd.weight", next(kind), VOCABULARY, k["embd"], 1.0)
        q, kv = k["heads"] * k["dim"], k["kv"] * k["dim"]
        for i in range(k["layers"]):
            b = f"blk.{i}."
            self.vector(b + "attn_norm.weight", rng.uniform(0.5, 1.5, k["embd"]))
            for part, rows in (("q", q), ("k", kv), ("v", kv)):
                self.matrix(b + f"attn_{part}.weight", next(kind), rows, k["embd"])
                if a == "qwen2":
                    self.vector(b + f"attn_{part}.bias", rng.standard_normal(rows) * 0.3)
            if a == "qwen3":
                self.vector(b + "attn_q_norm.weight", rng.uniform(0.5, 2, k["dim"]))
                self.vector(b + "attn_k_norm.weight", rng.uniform(0.5, 2, k["dim"]))
            self.matrix(b + "attn_output.weight", next(kind), k["embd"], q)
            self.vector(b + "ffn_norm.weight", rng.uniform(0.5, 1.5, k["embd"]))
            self.matrix(b + "ffn_gate.weight", next(kind), k["ff"], k["embd"])
            self.matrix(b + "ffn_up.weight", next(kind), k["ff"], k["embd"])
            self.matrix(b + "ffn_down.weight", next(kind), k["embd"], k["ff"])
        self.vector("output_norm.weight", rng.uniform(0.5, 1.5, k["embd"]))
        if not tied:
            self.matrix("output.weight", next(kind), VOCABULARY, k["embd"])
        if k.get("factors"):
            self.vector("rope_freqs.weight", k["factors"])
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()


def frequencies(keys, weights):
    """RoPE (2104.09864), position interpolation (2306.15595), YaRN (2309.00071), and llama 3's divisors as a tensor. Angles a position, and the factor on them."""
    dim, base = keys["dim"], keys["base"]
    plain = base ** (-np.arange(0, dim, 2) / dim)
    if "rope_freqs.weight" in weights:
        plain = plain / weights["rope_freqs.weight"]
    if keys["linear"]:
        return plain / keys["linear"], 1.0
    if not keys["yarn"]:
        return plain, 1.0
    factor, original = keys["yarn"]
    # The pair that turns `turns` times within the original context; 32 turns and more stay, 1 turn and less are interpolated, a ramp between.
    pair = lambda turns: dim * np.log(original / (turns * 2 * np.pi)) / (2 * np.log(base))
    low, high = max(np.floor(pair(32)), 0), min(np.ceil(pair(1)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return plain / factor * ramp + plain * (1 - ramp), 1 + 0.1 * np.log(factor)


def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotate(x, angles, magnitude, halves):
    """x [tokens, heads, dim]; halves: dimension i goes with i + dim/2, else 2i with 2i + 1."""
    cos, sin = np.cos(angles)[:, None] * magnitude, np.sin(angles)[:, None] * magnitude
    half = x.shape[-1] // 2
    a, b = (x[..., :half], x[..., half:]) if halves else (x[..., 0::2], x[..., 1::2])
    out = np.empty_like(x)
    first, second = a * cos - b * sin, a * sin + b * cos
    if halves:
        out[..., :half], out[..., half:] = first, second
    else:
        out[..., 0::2], out[..., 1::2] = first, second
    return out


def forward(arch, keys, weights, tokens):
    count, eps = len(tokens), keys["eps"]
    heads, kv, dim = keys["heads"], keys["kv"], keys["dim"]
    frequency, magnitude = frequencies(keys, weights)
    angles = np.arange(count)[:, None] * frequency
    future = np.triu(np.ones((count, count), bool), 1)
    x = weights["token_embd.weight"][tokens].astype(np.float64)
    for i in range(keys["layers"]):
        w = {name[len(f"blk.{i}."):]: value for name, value in weights.items() if name.startswith(f"blk.{i}.")}
        h = norm(x, w["attn_norm.weight"], eps)
        q, k, v = (h @ w[f"attn_{p}.weight"].T + w.get(f"attn_{p}.bias", 0) for p in "qkv")
        q, k, v = q.reshape(count, heads, dim), k.reshape(count, kv, dim), v.reshape(count, kv, dim)
        if arch == "qwen3":
            q, k = norm(q, w["attn_q_norm.weight"], eps), norm(k, w["attn_k_norm.weight"], eps)
        q, k = (rotate(y, angles, magnitude, arch != "llama") for y in (q, k))
        k, v = np.repeat(k, heads // kv, 1), np.repeat(v, heads // kv, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim)
        scores[:, future] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", scores, v).reshape(count, -1) @ w["attn_output.weight"].T
        h = norm(x, w["ffn_norm.weight"], eps)
        gate = h @ w["ffn_gate.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["ffn_up.weight"].T)) @ w["ffn_down.weight"].T
    return norm(x, weights["output_norm.weight"], eps) @ weights.get("output.weight", weights["token_embd.weight"]).T


MODELS = [
    ("llama-f32.gguf", "llama", [T.F32], False, dict(layers=1, factors=[1, 1.5, 4, 8])),
    ("llama-f16.gguf", "llama", [T.F16], True, dict(linear=4.0)),
    ("llama-bf16.gguf", "llama", [T.BF16], False, dict(dim=16, yarn=(4.0, 512), base=500.0)),
    ("mistral-q8_0.gguf", "llama", [T.Q8_0], False, dict(dim=16, heads=6, kv=2, base=1e6, window=4096)),
    ("llama-q4.gguf", "llama", [T.Q4_0, T.Q4_1], True, dict(kv=1)),
    ("qwen2-q5.gguf", "qwen2", [T.Q5_0, T.Q5_1], True, dict(base=1e6, eps=1e-6)),
    ("qwen2-f16.gguf", "qwen2", [T.F16, T.Q8_0], False, dict(kv=4, yarn=(2.0, 32))),
    ("qwen3-q8_0.gguf", "qwen3", [T.Q8_0, T.BF16], False, dict(dim=16, base=1e6, eps=1e-6)),
    ("llama-k.gguf", "llama", [T.Q6_K, T.Q4_K, T.Q5_K, T.Q6_K, T.Q5_K, T.Q4_K], False, dict(layers=1, embd=256, heads=4, kv=1, dim=64, ff=256, base=500000.0)),
]


def numbers(values):
    return " ".join(f"{value:.8g}" for value in values)


def tiny():
    lines = []
    for name, arch, kinds, tied, keys in MODELS:
        builder = Builder(name, arch, **keys)
        builder.finish(kinds, tied)
        logits = forward(arch, builder.keys, builder.weights, TOKENS)
        lines.append(f"tiny {name} " + " ".join(map(str, TOKENS)))
        lines += [f"row {row} {numbers(logits[row])}" for row in ROWS]
        print(name, os.path.getsize(os.path.join(HERE, name)), "bytes, deviation of logits", logits.std().round(2), file=sys.stderr)
    return lines


# "The capital of France is" and others, in the sample model's tokens (tests/golden/tokenizer makes and checks such).
PROMPTS = [[504, 3575, 282, 4649, 314], [1, 4093, 198, 19556, 2, 198, 1, 520, 9531, 198], [33, 34, 35], [28]]


def sample(path):
    reader = gguf.GGUFReader(path)
    field = lambda name: reader.fields[name].contents()
    weights = {t.name: np.asarray(dequantize(t.data, t.tensor_type), dtype=np.float32) for t in reader.tensors}
    keys = dict(layers=field("llama.block_count"), embd=field("llama.embedding_length"), heads=field("llama.attention.head_count"),
                kv=field("llama.attention.head_count_kv"), dim=field("llama.rope.dimension_count"), base=float(field("llama.rope.freq_base")),
                eps=float(field("llama.attention.layer_norm_rms_epsilon")), linear=None, yarn=None)
    lines = []
    for tokens in PROMPTS:
        logits = forward("llama", keys, weights, tokens)[-1]
        lines.append("sample " + " ".join(map(str, tokens)))
        lines.append("logits " + numbers(logits[::64]))
        lines.append("top " + " ".join(f"{token}:{logits[token]:.8g}" for token in np.argsort(-logits)[:5]))
    return lines


def write(name, lines):
    with open(os.path.join(HERE, name), "w", newline="\n") as out:
        out.write("\n".join(lines) + "\n")


write("logits.txt", tiny())
write("sample.txt", sample(sys.argv[1]))
