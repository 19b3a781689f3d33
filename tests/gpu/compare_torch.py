#!/usr/bin/env python3
"""The same work by PyTorch on the same device, for comparison: compare_torch.py attention|generate [--ours bench.json] prints one JSON object.

attention  scaled_dot_product_attention at 8B's shape (32 query heads on 8 KV heads of 128): 64 sequences that decode at 4,096 tokens each, and one prompt of 6,000, by every
           implementation that PyTorch has; beside them the attention phase of kvasir, from the stage `bench` of tests/gpu/run, by layer.
generate   transformers' generate on a random Llama-3.1-8B: 1 and 64 sequences of 1,024 + 64 tokens.

Exit status 77: PyTorch or transformers, or a device, is not there."""
import argparse
import json
import statistics
import sys
import time

SKIPPED = 77


def skip(words):
    print(f"compare_torch: {words}", file=sys.stderr)
    sys.exit(SKIPPED)


def timed(torch, function, seconds=2.0, rounds_max=50):
    """Median of the device's time in seconds, after two rounds that are not counted."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    times, began = [], time.monotonic()
    while len(times) < 5 or (time.monotonic() - began < seconds and len(times) < rounds_max):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth(torch):
    source = torch.full((1 << 28,), 3.0, device="cuda")  # 1 GiB
    destination = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / timed(torch, lambda: destination.copy_(source), 1)


def implementations(torch):
    """[(name, context manager)] of those this PyTorch can be told to use."""
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        import contextlib
        return [("default", contextlib.nullcontext)]
    names = [name for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH") if hasattr(SDPBackend, name)]
    return [(name.lower(), lambda name=name: sdpa_kernel(getattr(SDPBackend, name))) for name in names]


def measure_attention(torch, q, k, v, causal):
    """Seconds by implementation. Where none shares keys among a group by itself, they are repeated beforehand, which is not timed but read in full."""
    import torch.nn.functional as F
    found = {}
    group = q.shape[1] // k.shape[1]
    for name, using in implementations(torch):
        for shared in (True, False):
            try:
                keys, values = (k, v) if shared else (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
                options = {"enable_gqa": True} if shared else {}
                with using():
                    seconds = timed(torch, lambda: F.scaled_dot_product_attention(q, keys, values, is_causal=causal, **options))
                found[name + ("" if shared else " (keys repeated)")] = seconds
                break
            except (RuntimeError, TypeError) as problem:  # not for this shape, or not in this version
                found.setdefault("refused", {})[f"{name}{'' if shared else ' (keys repeated)'}"] = str(problem).splitlines()[0][:160]
                torch.cuda.empty_cache()
    return found


def ours_attention(path, layers=32):
    """Microseconds a layer of kvasir's attention phase, by (test, batch, tokens), of the steps of stage bench."""
    found = {}
    if not path:
        return found
    with open(path) as file:
        for step in json.load(file)["steps"]:
            for row in (step.get("result") or {}).get("phases", []):
                if row["phase"] == "ATTN" and (step.get("result") or {}).get("model") == "llama-3.1-8b":
                    found[f"{step['name']}: {row['test']}, batch {row['batch']}, {row['context'] or row['n_prompt']} tokens"] = {"us_a_layer": row["us"] / layers, "gb_s": row["gb_s"], "of_copy": row["of_ceiling"]}
    return found


def attention(torch, options):
    heads, kv_heads, width = 32, 8, 128
    batch, context, prompt = (4, 128, 256) if options.small else (64, 4096, 6000)
    bandwidth = copy_bandwidth(torch)
    result = {"torch": torch.__version__, "device": torch.cuda.get_device_name(), "copy_gb_s": bandwidth / 1e9, "kvasir": ours_attention(options.ours)}

    def tensor(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.float16)

    k, v = tensor(batch, kv_heads, context, width), tensor(batch, kv_heads, context, width)
    seconds = measure_attention(torch, tensor(batch, heads, 1, width), k, v, False)
    moved = 2 * k.numel() * k.element_size()
    result["decode"] = {"batch": batch, "context": context, "bytes": moved, "refused": seconds.pop("refused", {}),
                        "by": {name: {"us": 1e6 * s, "gb_s": moved / s / 1e9, "of_copy": moved / s / bandwidth} for name, s in seconds.items()}}
    del k, v
    seconds = measure_attention(torch, tensor(1, heads, prompt, width), tensor(1, kv_heads, prompt, width), tensor(1, kv_heads, prompt, width), True)
    work = 4 * heads * width * prompt * (prompt + 1) / 2
    result["prompt"] = {"tokens": prompt, "flop": work, "refused": seconds.pop("refused", {}), "by": {name: {"us": 1e6 * s, "tflop_s": work / s / 1e12} for name, s in seconds.items()}}
    return result


def generate(torch, options):
    try:
        import transformers
    except ImportError as problem:
        skip(f"no transformers: {problem}")
    shape = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, vocab_size=1000) if options.small else \
        dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256)
    config = transformers.LlamaConfig(**shape, max_position_embeddings=131072, rope_theta=500000.0, tie_word_embeddings=False, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).eval()
    result = {"torch": torch.__version__, "transformers": transformers.__version__, "device": torch.cuda.get_device_name(), "runs": []}
    context, tokens = (64, 8) if options.small else (1024, 64)
    for batch in (1, 4) if options.small else (1, 64):
        ids = torch.randint(0, config.vocab_size, (batch, context), device="cuda")
        mask = torch.ones_like(ids)

        def run(n):
            torch.cuda.synchronize()
            began = time.monotonic()
            with torch.inference_mode():
                model.generate(ids, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0, eos_token_id=None)
            torch.cuda.synchronize()
            return time.monotonic() - began

        run(2)
        first, all_of_them = run(1), run(tokens)
        result["runs"].append({"batch": batch, "context": context, "tokens": tokens, "prompt_s": first, "total_s": all_of_them, "decode_tok_s": batch * (tokens - 1) / max(all_of_them - first, 1e-9)})
        print(json.dumps(result["runs"][-1]), file=sys.stderr, flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("attention", "generate"))
    parser.add_argument("--ours", help="bench.json of tests/gpu/run")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that it works")
    options = parser.parse_args()
    try:
        import torch
    except ImportError as problem:
        skip(f"no PyTorch: {problem}")
    if not torch.cuda.is_available():
        skip("PyTorch sees no device")
    print(json.dumps((attention if options.what == "attention" else generate)(torch, options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
