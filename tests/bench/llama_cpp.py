"""What llama.cpp's own benches print, llama-bench with -o json and llama-batched-bench with --output-format jsonl, as speeds. Whatever else stands there, and what was cut off, is passed over."""
import json
import math


def objects(text):
    """The whole JSON objects in it: of an array, of lines, or among other words."""
    decoder, found, at = json.JSONDecoder(), [], text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
            found.append(value)
        except (ValueError, RecursionError):
            end = at + 1
        at = text.find("{", end)
    return found


def speeds(values):
    """As floats, where they all are speeds; else none."""
    good = isinstance(values, list) and all(isinstance(value, (int, float)) and math.isfinite(value) and value > 0 for value in values)
    return [float(value) for value in values] if good else []


def count(row, name):
    return row[name] if isinstance(row.get(name), int) else None


def prompts(text):
    """llama-bench: {(tokens of the prompt, rows of a micro-batch): [tokens/s]}; None for what is not said."""
    found = {}
    for row in objects(text):
        found.setdefault((count(row, "n_prompt"), count(row, "n_ubatch")), []).extend(speeds(row.get("samples_ts")))
    return {key: samples for key, samples in found.items() if samples}


def decodes(text):
    """llama-batched-bench: {sequences at once: [tokens/s of generation, in the order measured]}."""
    found = {}
    for row in objects(text):
        found.setdefault(count(row, "pl"), []).extend(speeds([row.get("speed_tg")]))
    return {batch: samples for batch, samples in found.items() if samples}
