#!/usr/bin/env python3
"""Writes policies.txt: recorded queries, keys and values of a few lanes, and which slots each policy's paper keeps of them.

A direct transcription of each paper's formulas in numpy (float64, full matrices, full sorts), apart from all code of the project. Two models: one query head a KV
head, and three. Format: see read_case() in ../test_policies.c.

    pip install numpy && python3 make_policies.py > policies.txt
"""
import numpy as np

LAYERS, HEADS, D, N, W = 3, 2, 16, 150, 8
SINKS, RECENT, KERNEL, FLOOR, RECOVERY, RAMP, BLOCK, AHEAD = 4, 8, 5, 0.2, 0.8, 20, 8, 32
BUDGET = 56
BASE = 10000.0


def hexes(array):
    """f16, little-endian."""
    return np.ascontiguousarray(array, dtype=np.float16).tobytes().hex()


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rope(x, position, inverse=False):
    """Adjacent pairs."""
    angle = position * BASE ** (-2 * np.arange(D // 2) / D)
    if inverse:
        angle = -angle
    c, s = np.cos(angle), np.sin(angle)
    out = np.empty_like(x)
    out[0::2], out[1::2] = x[0::2] * c - x[1::2] * s, x[0::2] * s + x[1::2] * c
    return out


def attention(q, k):
    """q [N, D], k [N, D] -> causal A [N, N]."""
    s = q @ k.T / np.sqrt(D)
    s[np.triu_indices(N, 1)] = -np.inf
    return softmax(s)


def max_pool(x, kernel):
    half = kernel // 2
    return np.array([x[max(0, i - half): i + half + 1].max() for i in range(len(x))])


def best(score, candidates, count):
    """The `count` highest of `candidates`, ties to the older."""
    return sorted(candidates, key=lambda s: (-score[s], s))[:count]


def keep_uniform(scores, always, budget):
    kept = []
    for score in scores:
        rest = [s for s in range(N) if s not in always]
        kept.append(sorted(set(always) | set(best(score, rest, budget - len(always)))))
    return kept


def pyramid(budget, always):
    c = budget - len(always)
    low, high = c // RAMP, 2 * c - c // RAMP
    n = N - len(always)
    if n < 2 * c:
        return [budget] * LAYERS
    if high > n:
        high, low = n, 2 * c - n
    return [high - int(np.floor(layer * (high - low) / (LAYERS - 1) + 0.5)) + len(always) for layer in range(LAYERS)]


def ada(scores, always, budgets):
    kept = []
    rest = [s for s in range(N) if s not in always]
    for layer in range(LAYERS):
        heads = range(layer * HEADS, (layer + 1) * HEADS)
        base = budgets[layer] - len(always)
        flat = sorted(((-scores[h][s], h, s) for h in heads for s in rest))[:HEADS * base]
        for h in heads:
            hits = sum(1 for entry in flat if entry[1] == h)
            count = int(np.rint((1 - FLOOR) * hits + FLOOR * base))
            kept.append(sorted(set(always) | set(best(scores[h], rest, count))))
    return kept


def kv_compress(scores, always, budget):
    lanes = LAYERS * HEADS
    target = budget * lanes // BLOCK
    evict = lanes * -(-N // BLOCK) - target
    m = (N - 1) % BLOCK + 1
    orders, costs = [], []
    for lane in range(lanes):
        order = sorted((s for s in range(N) if s not in always), key=lambda s: (scores[lane][s], -s))
        orders.append(order)
        j = 1
        while (j - 1) * BLOCK + m <= len(order):
            costs.append((scores[lane][order[(j - 1) * BLOCK + m - 1]], j, lane))
            j += 1
    freed = [0] * lanes
    for _, _, lane in sorted(costs)[:evict]:
        freed[lane] += 1
    kept = []
    for lane in range(lanes):
        gone = set(orders[lane][:(freed[lane] - 1) * BLOCK + m]) if freed[lane] else set()
        kept.append([s for s in range(N) if s not in gone])
    return kept


def fastgen(mean_attention, classes, always, budget):
    kept = []
    for score in mean_attention:
        rungs = []
        keep = set(always) | {s for s in range(N) if classes[s] == 1}
        rungs.append(set(keep))
        keep |= {s for s in range(N) if classes[s] == 2}
        rungs.append(set(keep))
        # Protected slots are the first of the heavy hitters, as they stay anyway.
        ranked = sorted(range(N), key=lambda s: (s not in always, -score[s], s))
        keep |= set(ranked[:int(0.3 * N)])
        rungs.append(set(keep))
        keep |= set(range(N - int(0.3 * N), N))
        rungs.append(set(keep))
        rungs.append(set(range(N)))
        chosen = next(r for r in rungs if len(r) == N or sum(score[s] for s in r) / W >= RECOVERY)
        if len(chosen) > budget:
            rest = [s for s in chosen if s not in always]
            chosen = set(always) | set(best(score, rest, budget - len(always)))
        kept.append(sorted(chosen))
    return kept


def expected(q, k, group):
    """Per query head of each lane: softmax of mu.k/sqrt(d) + k' S k/(2d), moments of the window's un-rotated queries, rotation averaged over the next AHEAD positions."""
    angles = np.arange(N, N + AHEAD)[:, None] * BASE ** (-2 * np.arange(D // 2) / D)[None, :]
    c, s = np.cos(angles).mean(0), np.sin(angles).mean(0)
    rotation = np.zeros((D, D))
    for i in range(D // 2):
        rotation[2 * i, 2 * i], rotation[2 * i, 2 * i + 1] = c[i], -s[i]
        rotation[2 * i + 1, 2 * i], rotation[2 * i + 1, 2 * i + 1] = s[i], c[i]
    out = []
    for lane in range(LAYERS * HEADS):
        rows = []
        for h in range(group):
            raw = np.array([rope(q[lane, h, p], p, inverse=True) for p in range(N - W, N)])
            mu = rotation @ raw.mean(0)
            sigma = rotation @ np.cov(raw.T, bias=True) @ rotation.T
            rows.append(softmax(k[lane] @ mu / np.sqrt(D) + np.einsum("sd,de,se->s", k[lane], sigma, k[lane]) / (2 * D)))
        out.append(np.mean(rows, 0))
    return np.array(out)


def case(group, seed):
    rng = np.random.default_rng(seed)
    lanes = LAYERS * HEADS
    # Keys and queries share directions, so that attention is peaked; heads and layers differ in how much.
    topics = rng.standard_normal((12, D))
    topic = rng.integers(0, 12, N)
    k = np.empty((lanes, N, D))
    q = np.empty((lanes, group, N, D))
    for lane in range(lanes):
        sharp = 0.4 + 0.5 * lane
        k[lane] = [rope(topics[topic[p]] + rng.standard_normal(D), p) for p in range(N)]
        for h in range(group):
            q[lane, h] = [rope(sharp * topics[rng.integers(0, 12)] + rng.standard_normal(D), p) for p in range(N)]
    k, q = k.astype(np.float16).astype(np.float64), q.astype(np.float16).astype(np.float64)
    v = rng.standard_normal((lanes, N, D)) * rng.uniform(0.2, 3, (lanes, N, 1))
    v = v.astype(np.float16).astype(np.float64)
    classes = rng.choice([0, 0, 0, 1, 2], N)
    full = np.array([[attention(q[lane, h], k[lane]) for h in range(group)] for lane in range(lanes)])  # [lanes, group, N, N]
    window = full[:, :, N - W:, :]

    always = sorted(set(range(SINKS)) | set(range(N - RECENT, N)))
    sums, squares = window.sum(2), (window ** 2).sum(2)
    mean = sums.mean(1)
    snap = [max_pool(row, KERNEL) for row in mean]
    compress = [sum(max_pool(row, KERNEL) for row in heads) for heads in squares]
    visible = np.arange(N - W + 1, N + 1)[None, None, :, None]
    counts = ((window * visible >= 1) & (window > 0)).sum(2)
    half = sorted(set(range(SINKS)) | set(range(N - BUDGET // 2, N)))
    unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
    keydiff = [-(unit[lane] @ unit[lane].mean(0)) / np.linalg.norm(unit[lane].mean(0)) for lane in range(lanes)]
    last = full[:, :, N - 1, :].mean(1).reshape(LAYERS, HEADS, N).mean(1)
    tova = [last[lane // HEADS] for lane in range(lanes)]
    norms = np.linalg.norm(v, axis=-1)
    kept = {
        "h2o": keep_uniform(full.sum((1, 2)), half, BUDGET),
        "scissorhands": keep_uniform(counts.mean(1), always, BUDGET),
        "fastgen": fastgen(mean, classes, always, BUDGET),
        "snapkv": keep_uniform(snap, always, BUDGET),
        "pyramidkv": [keep_uniform([snap[lane]], always, pyramid(BUDGET, always)[lane // HEADS])[0] for lane in range(lanes)],
        "ada_snapkv": ada(snap, always, [BUDGET] * LAYERS),
        "ada_pyramidkv": ada(snap, always, pyramid(BUDGET, always)),
        "kv_compress": kv_compress(compress, always, BUDGET),
        "expected_attention": ada(expected(q, k, group) * norms, always, [BUDGET] * LAYERS),
        "keydiff": keep_uniform(keydiff, always, BUDGET),
        "tova": keep_uniform(tova, always, BUDGET),
        "snapkv+value": keep_uniform([snap[lane] * norms[lane] for lane in range(lanes)], always, BUDGET),
        "kv_compress+value": kv_compress([compress[lane] * norms[lane] ** 2 for lane in range(lanes)], always, BUDGET),
    }
    print(f"case {LAYERS} {HEADS} {group} {D} {N} {W} {SINKS} {RECENT} {KERNEL} {FLOOR} {RECOVERY} {RAMP} {BLOCK} {AHEAD} {BUDGET}")
    print("q", hexes(q[:, :, :, :].transpose(0, 2, 1, 3)))  # [lanes][N][group][D]
    print("k", hexes(k))
    print("v", hexes(v))
    print("classes", "".join(str(c) for c in classes))
    print("hit_counts", " ".join(str(int(c)) for c in counts.sum((1, 2))))
    for name, lists in kept.items():
        print("policy", name)
        for slots in lists:
            bits = np.zeros(N, dtype=int)
            bits[slots] = 1
            print("".join(map(str, bits)))
    print("end")


case(1, 11)
case(3, 12)
