"""The stage `peer` of tests/gpu/run: llama.cpp's CUDA build and kvasir on the same device, the same files, in turn. And the folder in which that build travels.

Both sides: KV f16, random tokens, a cache of its own for each sequence, all layers on the device. llama.cpp computes on the file's types, with flash attention; of its micro-batches of
512 and 2,048 rows the faster one counts. kvasir runs with its default, which widens weights to f16 where the device has the room, and with --weights native where that is another thing. Its
time includes sampling, llama.cpp's does not."""
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import statistics
import sys
import tempfile
import time

import carry
import llama_cpp
import report
import rounds

HERE = pathlib.Path(__file__).resolve().parent
PROGRAMS = ("llama-bench", "llama-batched-bench")
ARCHIVE = "peer.tar.xz"
SIDES = ("auto", "native", "llama")  # kvasir's --weights, and the other
KINDS = ("decode", "prompt")
STEP_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Size:
    batches: tuple
    context: int
    generate: int
    prompts: tuple
    repeats: int  # within a round, whose median counts
    rounds: int
    shaped: int  # bytes of the file of 8B's shape, at most


FULL = Size((1, 64), 1024, 64, (512, 6000), 3, 3, 5 * 10**9)
SMALL = Size((1, 2), 32, 4, (16, 48), 1, 2, 50 * 10**6)


@dataclasses.dataclass(frozen=True)
class Model:
    name: str
    title: str
    path: pathlib.Path


def beside(name):
    """A file of tests/bench; in a packed folder it lies here."""
    return next((path for path in (HERE / name, HERE.parent / "bench" / name) if path.exists()), HERE / name)


# ---- what each side is asked, and says ----

def kvasir_command(run, model, side, kind, size):
    what = ["-p", "0", "-n", size.generate, "-b", listed(size.batches), "-d", size.context] if kind == "decode" else ["-p", listed(size.prompts), "-n", "0"]
    return [run.programs["kvasir"], "bench", "--json", "--backend", run.options.backend, "-m", model.path, "--weights", side, "--kv-dtype", "f16", "-r", size.repeats,
            *(["-t", "2"] if run.options.small else ["--max-rows", "2048"]), *what]


def llama_command(folder, run, model, kind, size):
    common = ["-m", model.path, "-ngl", "99", "-fa", "on", "-ctk", "f16", "-ctv", "f16", "-b", "2048", *(["-t", "2"] if run.options.small else [])]
    if kind == "prompt":
        return [folder / "bin/llama-bench", *common, "-ub", "512,2048", "-p", listed(size.prompts), "-n", "0", "-r", size.repeats, "-o", "json"]
    each = (size.context + size.generate + 255) // 256 * 256
    # -pps reads one prompt and copies its keys and values to each sequence's own cache: the same memory is read as after reading each prompt. The first of each batch only warms up.
    return [folder / "bin/llama-batched-bench", *common, "-ub", "512", "-pps", "-no-kvu", "-c", max(size.batches) * each, "-npp", size.context, "-ntg", size.generate,
            "-npl", listed(batch for batch in size.batches for _ in range(size.repeats + 1)), "--output-format", "jsonl"]


def listed(numbers):
    return ",".join(map(str, numbers))


def kvasir_speeds(text, kind):
    """[{of: sequences or tokens of the prompt, tok_s}]"""
    answer = next(iter(llama_cpp.objects(text)), {})
    key = "batch" if kind == "decode" else "n_prompt"
    return [{"of": row[key], "tok_s": row["tok_s"]} for row in answer.get("rows", [])]


def llama_speeds(text, kind):
    """The same; of prompts with the rows of a micro-batch."""
    if kind == "prompt":
        return [{"of": tokens, "ubatch": rows, "tok_s": statistics.median(samples), "samples": samples} for (tokens, rows), samples in llama_cpp.prompts(text).items()]
    return [{"of": batch, "tok_s": statistics.median(samples[1:]), "samples": samples[1:]} for batch, samples in llama_cpp.decodes(text).items() if len(samples) > 1]


def weights_of(text):
    """How kvasir keeps them on the device; None where its backend has but one way."""
    match = re.search(r"weights (\w+)", str(next(iter(llama_cpp.objects(text)), {}).get("backend")))
    return match[1] if match else None


# ---- the rounds ----

class Rounds:
    def __init__(self, run, folder, environment, models, size):
        self.run, self.folder, self.environment, self.models, self.size = run, folder, environment, models, size
        self.over = set()  # (model, kind, side) that failed, or that another one is the same as

    def measure(self, model, kind, side, number):
        run, size = self.run, self.size
        ours = side != "llama"
        speeds = kvasir_speeds if ours else llama_speeds
        wanted = set(size.batches if kind == "decode" else size.prompts)

        def parse(text):
            result = {"model": model.title, "kind": kind, "side": side, "round": number, "context": size.context, "speeds": speeds(text, kind)}
            return {**result, "weights": weights_of(text)} if ours else result

        def judge(text):
            lacking = wanted - {row["of"] for row in speeds(text, kind)}
            if not ours and run.options.backend == "cuda" and "no usable GPU found" in text:
                return "llama.cpp did not find the device"
            return f"no speed at {listed(sorted(lacking))}" if lacking else None

        command = kvasir_command(run, model, side, kind, size) if ours else llama_command(self.folder, run, model, kind, size)
        result = run.step(f"{model.name}-{kind}-{side}-{number}", command, STEP_SECONDS, parse=parse, judge=judge, environment=None if ours else self.environment, both=not ours)
        if run.steps[-1]["status"] != "ok":
            self.over.add((model, kind, side))
        elif side == "auto" and result["weights"] != "f16" and (model, kind, "native") not in self.over:
            self.over.update((model, kind, "native") for kind in KINDS)
            run.note(f"{model.name}-native", "skipped", why="the default keeps the file's types here")

    def round(self, number):
        for model in self.models:
            for kind in KINDS:
                for side in SIDES if number % 2 else SIDES[::-1]:
                    if not {(model, kind, side), (model, kind, "llama")} & self.over:
                        self.measure(model, kind, side, number)

    def all(self):
        """As many as there is time for; the first one always."""
        longest = 0
        for number in range(1, self.size.rounds + 1):
            began = time.monotonic()
            if number > 1 and longest > self.run.end - began:
                self.run.note(f"round-{number}", "left out", why="the stage's time is nearly over")
                break
            self.round(number)
            longest = max(longest, 1.1 * (time.monotonic() - began))


# ---- the stage ----

def found(run):
    """(the peer's folder, its environment), or None: not here, and a note says why."""
    named = run.options.peer
    if not named:
        return run.note("llama.cpp", "skipped", why="no peer: --peer FOLDER")
    try:
        folder = carry.unpack(named / ARCHIVE, "kvasir-gpu-peer") if (named / ARCHIVE).exists() else named
    except carry.NOT_UNPACKED as problem:
        return run.note("llama.cpp", "failed", why=f"{ARCHIVE}: {problem}")
    programs = [folder / "bin" / name for name in PROGRAMS]
    absent = [path.name for path in programs if not path.exists()]
    if absent:
        return run.note("llama.cpp", "skipped", why=f"no {' and no '.join(absent)} in {named.name}/bin")
    search = carry.search_path(programs, [str(folder / "lib")] if (folder / "lib").exists() else [], os.environ.get("LD_LIBRARY_PATH", ""))
    lacking = sorted({soname for path in programs for soname, library in carry.libraries_of(path, search) if library is None})
    if lacking:
        return run.note("llama.cpp", "skipped", why=f"this machine lacks {', '.join(lacking)}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA_", "GGML_"))}
    environment["LD_LIBRARY_PATH"] = search
    environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # kvasir's device is the first, llama.cpp would take all
    run.note("llama.cpp", "ok", result={"built": described(folder), "libraries": [place if place.startswith("/usr") else pathlib.Path(place).name for place in search.split(":") if place]})
    return folder, environment


def described(folder):
    """What tests/bench/peer wrote about its build."""
    for path in (folder / "peer.json", folder.parent / "peer.json"):
        with contextlib.suppress(OSError, ValueError):
            return json.loads(path.read_text())
    return None


@contextlib.contextmanager
def scratch(size):
    """A folder with room for so many bytes: in memory if that is large, else among the temporary ones; None: nowhere."""
    memory = int(re.search(r"^MemAvailable:\s+(\d+)", pathlib.Path("/proc/meminfo").read_text(), re.M)[1]) << 10
    for place, enough in (("/dev/shm", memory > 8 * size), (tempfile.gettempdir(), True)):
        with contextlib.suppress(OSError):
            if enough and shutil.disk_usage(place).free > 1.2 * size:
                folder = tempfile.TemporaryDirectory(prefix="kvasir-gpu-", dir=place)
                break
    else:
        folder = contextlib.nullcontext()
    with folder as name:
        yield pathlib.Path(name) if name else None


def shaped(run, folder):
    """The file of 8B's shape, or None."""
    if not folder:
        return run.note("8b-file", "skipped", why="no room for it")
    path = folder / "8b.gguf"
    run.step("8b-file", [sys.executable, beside("shaped-model"), *(["--small"] if run.options.small else []), "--tokenizer", run.options.model, path], STEP_SECONDS, ours=False)
    return Model("8b", "8B's shape, Q4_K_M" + (", in small" if run.options.small else ""), path) if run.steps[-1]["status"] == "ok" else None


def stage(run):
    here = found(run)
    if not here:
        return
    if not run.options.model:
        run.note("llama.cpp against kvasir", "skipped", why="no model: --model FILE")
        return
    folder, environment = here
    no_device = lambda text: None if run.options.backend != "cuda" or re.search(r"^\s+CUDA0: ", text, re.M) else "llama.cpp finds no device"
    run.step("devices", [folder / "bin/llama-bench", "--list-devices"], STEP_SECONDS, judge=no_device, environment=environment, both=True)
    if run.steps[-1]["status"] != "ok":
        return
    size = SMALL if run.options.small else FULL
    with scratch(size.shaped) as place:
        models = [Model("sample", run.options.model.stem, run.options.model), shaped(run, place)]
        Rounds(run, folder, environment, [model for model in models if model], size).all()


# ---- what it comes to ----

def collected(steps):
    """{(model, kind, of): {side: {round: tokens/s}}}, of the peer's micro-batches the faster one, and {(model, kind, of): its rows}."""
    seen = {}
    for step in steps:
        result = step.get("result") or {}
        for row in result.get("speeds", []) if step["status"] == "ok" else []:
            seen.setdefault((result["model"], result["kind"], row["of"]), {}).setdefault((result["side"], row.get("ubatch")), {})[result["round"]] = row["tok_s"]
    best, ubatch = {}, {}
    for key, arms in seen.items():
        fastest = {}
        for (side, rows), speeds in arms.items():
            fastest.setdefault(side, []).append((statistics.median(speeds.values()), rows, speeds))
        best[key] = {side: max(choices, key=lambda choice: choice[0])[2] for side, choices in fastest.items()}
        ubatch[key] = max(fastest["llama"], key=lambda choice: choice[0])[1] if "llama" in fastest else None
    return best, ubatch


def render(steps):
    best, ubatch = collected(steps)
    if not best:
        return ""
    results = [step["result"] for step in steps if (step.get("result") or {}).get("speeds")]
    context = results[0]["context"]
    spread = lambda values: report.ranged(rounds.spread(list(values))) if values else "-"
    rows = []
    for (model, kind, of), sides in best.items():
        theirs = sides.get("llama", {})
        ratio = lambda side: spread([speed / theirs[number] for number, speed in sides.get(side, {}).items() if number in theirs])
        what = f"decode, batch {of}, context {context:,}" if kind == "decode" else f"prompt of {of:,}"
        rows.append([model, what, *(spread(sides.get(side, {}).values()) for side in SIDES), ratio("auto"), ratio("native"), ubatch[(model, kind, of)] or "", len(theirs)])
    weights = sorted({result["weights"] for result in results if result.get("weights") and result["side"] == "auto"})
    built = next((step["result"]["built"] for step in steps if (step.get("result") or {}).get("built")), None) or {}
    columns = ["model", "", "kvasir tok/s", "kvasir --weights native", "llama.cpp", "kvasir / llama.cpp", "native / llama.cpp", "llama.cpp's -ub", "rounds"]
    return report.table(columns, rows) + "\n\nMedian (min..max) of the rounds, in which the sides take turns; ratios are within rounds. " \
        + (f"kvasir's default weights here: {', '.join(weights)}. " if weights else "") + f"llama.cpp {built.get('llama_cpp_commit', 'of unknown commit')}, KV f16 and random tokens on both sides."


# ---- the folder to carry ----

def pack(source, folder):
    """llama.cpp's programs with what they need, as --peer takes them; the exit status."""
    programs = {name: source / "bin" / name for name in PROGRAMS}
    for path in programs.values():
        if not path.exists():
            carry.stop(f"no {path.name} in {source.name}/bin: tests/bench/peer --out DIR cuda builds it, in DIR/cuda")
    folder = carry.begin(folder, ARCHIVE)
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        carry.gather(programs, place, carry.search_path(programs.values(), []), own=source)
        built = described(source)
        if built:
            (place / "peer.json").write_text(json.dumps(built) + "\n")
        names = sorted(path.name for path in (place / "lib").iterdir())
        return carry.told(folder, carry.write_archive(place, folder / ARCHIVE, preset=6), ", ".join(names))
