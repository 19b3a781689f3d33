#!/usr/bin/env python3
"""A daemon with a load over HTTP, and what both sides saw of it, as one JSON object: served.py --kvasir FILE --load FILE --model FILE --backend NAME [--small]

The stage `served` of tests/gpu/run. Prompts of random tokens, each its own; a closed loop of so many streams at once. With the whole cache, and with kv_compress at a quarter of the prompt.
Every answer must be whole; the daemon must end by SIGTERM with status 0."""
import argparse
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "bench")]  # a packed folder has the files of both

import servers  # noqa: E402
from report import table  # noqa: E402

COUNTERS = ("kvasir_steps_total", "kvasir_steps_ahead_total", "kvasir_compression_seconds_total", "kvasir_preemptions_total")


def arms(size):
    whole = []
    cut = ["--policy", "kv_compress", "--budget-tokens", size["prompt"] // 4]
    return [("none", whole), ("kv_compress", cut)]


def sizes(small):
    return {"prompt": 160, "tokens": 12, "streams": (1, 3), "each": 2, "ids": "3-250"} if small else {"prompt": 1024, "tokens": 256, "streams": (1, 16, 64, 256), "each": 4, "ids": "1000-20000"}


def measure(options, streams, size, server):
    before = server.metrics()
    result = servers.load(options.load, server.port, streams=streams, requests=streams * size["each"], prompt=size["prompt"], tokens=size["tokens"], ids=size["ids"], timeout=options.seconds)
    after = server.metrics()
    counted = {name: after[name] - before.get(name, 0) for name in COUNTERS if name in after}
    return {"streams": streams, "requests": result["requests"], "output_tok_s": result["output_tok_s"], "ttft_s": result["ttft_s"], "gap_s": result["gap_s"],
            "client_cpu_share": result["client_cpu_share"], "counted": counted}


def run(options):
    size, rows = sizes(options.small), []
    for policy, flags in arms(size):
        most = max(size["streams"])
        with servers.kvasir(options.kvasir, "-m", options.model, "--backend", options.backend, "--max-sequences", most, "--max-queue", 2 * most, *flags) as server:
            for streams in size["streams"]:
                rows.append({"policy": policy, **measure(options, streams, size, server)})
            server.stop()
            if server.process.returncode != 0:
                raise RuntimeError(f"kvasir ended with status {server.process.returncode}")
    return {"prompt": size["prompt"], "tokens": size["tokens"], "rows": rows}


def number(seconds):
    return f"{1000 * seconds:.1f}"


def render(steps):
    """The stage's results as a table."""
    lines = []
    for step in steps:
        result = step.get("result") or {}
        for row in result.get("rows", []):
            lines.append([row["policy"], row["streams"], f"{row['output_tok_s']:.0f}", number(row["ttft_s"]["p50"]), number(row["ttft_s"]["p99"]), number(row["gap_s"]["p50"]), number(row["gap_s"]["p99"]),
                          f"{100 * row['client_cpu_share']:.0f} %"])
    if not lines:
        return ""
    return table(["policy", "streams", "output tok/s", "TTFT ms, median", "p99", "gap ms, median", "p99", "the client's CPU"], lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("kvasir", "load", "model"):
        parser.add_argument(f"--{name}", required=True, type=pathlib.Path)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--seconds", type=int, default=60, help="for each load")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    try:
        print(json.dumps(run(options)))
    except (RuntimeError, OSError, ValueError, KeyError) as problem:
        sys.exit(f"served.py: {problem}")


if __name__ == "__main__":
    main()
