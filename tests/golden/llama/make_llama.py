#!/usr/bin/env python3
"""Writes llama.bin beside this script: what llama.cpp makes of text/*.txt, teacher-forced, with the sample model.

    pip install llama-cpp-python gguf numpy
    make_llama.py ~/.cache/kvasir/SmolLM2-135M-Instruct.Q4_1.gguf

Made with llama-cpp-python 0.3.36 on a CPU. Each text is one sequence from position 0.

llama.cpp runs the file's weights widened to f32 (by PyPI gguf; same values, a temporary file), with K and V as f32: its products on
Q4_1 itself first round every activation to 8 bits, and that rounding is worth more than the gate allows. The script shows it: it ends
by comparing llama.cpp with itself, on the file as it is with K and V as f32 and as f16, which differ from each other as much as from the f32 run.

The file, little-endian:
    char magic[8] "KVLLAMA1";  u32 sequences, positions (of all), top (32), vocabulary
    each sequence:  char name[16];  u32 n;  u32 token[n]
    each position, sequence by sequence:  u16 token[top], descending by probability;  f32 logprob[top];  f32 logprob of all the rest together
"""
import pathlib
import struct
import sys
import tempfile

import gguf
import llama_cpp
import numpy as np
from gguf.quants import dequantize

TOP = 32
F16, F32 = llama_cpp.GGML_TYPE_F16, llama_cpp.GGML_TYPE_F32
HERE = pathlib.Path(__file__).parent


def widen(source, path):
    """The same model with every tensor as f32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def log_softmax(logits):
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def forward(path, kv_type, texts):
    """Token ids of each text, and the log-probabilities after each of them."""
    model = llama_cpp.Llama(str(path), n_ctx=2048, n_batch=256, n_threads=2, logits_all=True, verbose=False, type_k=kv_type, type_v=kv_type)
    tokens, logprobs = [], []
    for text in texts:
        tokens.append(model.tokenize(text.read_bytes(), add_bos=False, special=True))
        model.reset()
        model.eval(tokens[-1])
        logprobs.append(log_softmax(np.array(model.scores[: len(tokens[-1])])).astype(np.float32))
    return tokens, logprobs


def records(logprobs):
    """The bytes of each position: ids, log-probabilities, the log of what is left; ties to the lower id."""
    ids = np.argsort(-logprobs, axis=1, kind="stable")[:, :TOP]
    top = np.take_along_axis(logprobs, ids, axis=1)
    rest = logprobs.astype(np.float64)
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    rest = np.log(np.exp(rest).sum(axis=1))
    for row in zip(ids.astype("<u2"), top.astype("<f4"), rest.astype("<f4")):
        yield b"".join(part.tobytes() for part in row)


def compare(what, p, q):
    p, q = np.concatenate(p).astype(np.float64), np.concatenate(q).astype(np.float64)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    print(f"{what}: mean KL {kl.mean():.2e}, max {kl.max():.2e}, same top-1 {100 * (p.argmax(axis=1) == q.argmax(axis=1)).mean():.2f} %")


def main(path):
    texts = sorted((HERE / "text").glob("*.txt"))
    with tempfile.TemporaryDirectory() as scratch:
        wide = pathlib.Path(scratch) / "f32.gguf"
        widen(path, wide)
        tokens, exact = forward(wide, F32, texts)
        half = forward(wide, F16, texts)[1]
    body = b""
    for text, ids in zip(texts, tokens):
        body += struct.pack("<16sI", text.stem.encode(), len(ids)) + np.array(ids, "<u4").tobytes()
    rows = [row for logprobs in exact for row in records(logprobs)]
    header = struct.pack("<8s4I", b"KVLLAMA1", len(texts), len(rows), TOP, exact[0].shape[1])
    (HERE / "llama.bin").write_bytes(header + body + b"".join(rows))
    print(f"{len(texts)} sequences, {len(rows)} positions")

    own, own_half = forward(path, F32, texts)[1], forward(path, F16, texts)[1]
    compare("f32 weights: f32 K and V against f16", exact, half)
    compare("f32 weights against the file as it is", exact, own)
    compare("the file as it is: f32 K and V against f16", own, own_half)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
