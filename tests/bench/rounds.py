"""Interleaved comparison: two sides measured close together in time, again and again; what counts is the ratio within each pair, so that a machine that drifts drifts for both.

A pair between whose ends the machine itself moved (its read bandwidth, by more than MOVED) is measured again, a bounded number of times; one that never held still is kept and marked."""
import statistics
import time

MOVED = 0.10
RETRIES = 2


def moved(before, after, limit=MOVED):
    return abs(after - before) > limit * before


def measure_pair(ours, theirs, probe, ours_first, retries=RETRIES):
    """ours, theirs: functions that measure a number. Returns the pair as a dict."""
    repeats = 0
    while True:
        before = probe()
        sides = {}
        for name, measure in (("ours", ours), ("theirs", theirs)) if ours_first else (("theirs", theirs), ("ours", ours)):
            sides[name] = measure()
        after = probe()
        steady = not moved(before, after)
        if steady or repeats == retries:
            return {**sides, "ratio": sides["ours"] / sides["theirs"], "probe": [before, after], "repeats": repeats, "steady": steady}
        repeats += 1


def run(ours, theirs, probe, rounds, deadline, done=lambda pair: None, now=time.monotonic):
    """A B, B A, A B, ...: `rounds` pairs, fewer if the deadline (of `now`'s clock) passes; one at least. `done` is told of each."""
    pairs = []
    while len(pairs) < rounds and (not pairs or now() < deadline):
        pairs.append(measure_pair(ours, theirs, probe, ours_first=len(pairs) % 2 == 0))
        done(pairs[-1])
    return pairs


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(pairs):
    return {
        **{key: spread([pair[key] for pair in pairs]) for key in ("ours", "theirs", "ratio")},
        "bandwidth": spread([gb_s for pair in pairs for gb_s in pair["probe"]]),
        "rounds": len(pairs),
        "repeats": sum(pair["repeats"] for pair in pairs),
        "unsteady": sum(not pair["steady"] for pair in pairs),
    }
