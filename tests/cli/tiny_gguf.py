"""A small valid model file, and the pieces to break it: one layer of llama, byte-level BPE without merges, all weights f32.

The bytes are built from a list of keys and a list of tensors, so that a test can change one and leave the rest."""
import random
import struct

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
EMBD, HEADS, KV_HEADS, FF, CONTEXT = 32, 2, 1, 64, 256


def string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(kind, data):
    formats = {U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", F32: "<f", BOOL: "<B", U64: "<Q", I64: "<q", F64: "<d"}
    if kind == STRING:
        return string(data)
    if kind == ARRAY:
        element, items = data
        return struct.pack("<IQ", element, len(items)) + b"".join(value(element, item) for item in items)
    return struct.pack(formats[kind], data)


def byte_tokens():
    """The 256 printable stand-ins of GPT-2's byte-level vocabulary, and an end."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names, extra = {}, 256
    for byte in range(256):
        if byte in plain:
            names[byte] = chr(byte)
        else:
            names[byte] = chr(extra)
            extra += 1
    return [names[byte] for byte in range(256)] + ["<|end|>"]


def keys():
    tokens = byte_tokens()
    return [
        ("general.architecture", STRING, "llama"),
        ("general.name", STRING, "tiny"),
        ("llama.block_count", U32, 1),
        ("llama.context_length", U32, CONTEXT),
        ("llama.embedding_length", U32, EMBD),
        ("llama.feed_forward_length", U32, FF),
        ("llama.attention.head_count", U32, HEADS),
        ("llama.attention.head_count_kv", U32, KV_HEADS),
        ("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
        ("llama.rope.freq_base", F32, 10000.0),
        ("tokenizer.ggml.model", STRING, "gpt2"),
        ("tokenizer.ggml.pre", STRING, "gpt-2"),
        ("tokenizer.ggml.tokens", ARRAY, (STRING, tokens)),
        ("tokenizer.ggml.token_type", ARRAY, (I32, [1] * 256 + [3])),
        ("tokenizer.ggml.merges", ARRAY, (STRING, [])),
        ("tokenizer.ggml.eos_token_id", U32, 256),
    ]


def tensors():
    """(name, dims with the innermost first, f32 values)"""
    generator = random.Random(1)
    head = EMBD // HEADS
    shapes = [("token_embd.weight", (EMBD, 257)), ("output_norm.weight", (EMBD,)), ("blk.0.attn_norm.weight", (EMBD,)),
              ("blk.0.attn_q.weight", (EMBD, EMBD)), ("blk.0.attn_k.weight", (EMBD, KV_HEADS * head)), ("blk.0.attn_v.weight", (EMBD, KV_HEADS * head)),
              ("blk.0.attn_output.weight", (EMBD, EMBD)), ("blk.0.ffn_norm.weight", (EMBD,)), ("blk.0.ffn_gate.weight", (EMBD, FF)),
              ("blk.0.ffn_up.weight", (EMBD, FF)), ("blk.0.ffn_down.weight", (FF, EMBD))]
    result = []
    for name, dims in shapes:
        count = 1
        for dim in dims:
            count *= dim
        result.append((name, dims, [1.0 if len(dims) == 1 else generator.uniform(-0.2, 0.2) for _ in range(count)]))
    return result


def build(keys_list=None, tensors_list=None, version=3, magic=b"GGUF", alignment=32):
    keys_list = keys() if keys_list is None else keys_list
    tensors_list = tensors() if tensors_list is None else tensors_list
    head = magic + struct.pack("<IQQ", version, len(tensors_list), len(keys_list))
    head += b"".join(string(name) + struct.pack("<I", kind) + value(kind, data) for name, kind, data in keys_list)
    data = b""
    for name, dims, values in tensors_list:
        head += string(name) + struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", dim) for dim in dims) + struct.pack("<IQ", 0, len(data))
        data += struct.pack(f"<{len(values)}f", *values)
        data += bytes(-len(data) % alignment)
    return head + bytes(-len(head) % alignment) + data


def changed(name, kind=None, data=None):
    """The file with one key replaced, or left out if no kind is given."""
    out = [(n, k, d) for n, k, d in keys() if n != name]
    if kind is not None:
        out.append((name, kind, data))
    return build(out)
