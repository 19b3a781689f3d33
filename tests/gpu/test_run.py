"""tests/gpu/run where there is no GPU: that its stages run, keep what they have when they are cut short, and travel. The numbers mean nothing here."""
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import types
import unittest

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / name) for name in ("bench", "cli"))]

import llama_cpp  # noqa: E402
import peer  # noqa: E402
import tiny_gguf  # noqa: E402

BUILD = pathlib.Path(os.environ["KVASIR_BUILD"])
DEADLINE = 300


def load(name):
    loader = importlib.machinery.SourceFileLoader(f"gpu_{name}", str(HERE / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


# Stand-ins that print what llama.cpp's benches print, at speeds that tell which number was taken: the first of each batch only warms up, and large micro-batches are faster.
LLAMA_BENCH = """
    import json, sys
    if "--list-devices" in sys.argv:
        print("Available devices:\\n  (none)")
        sys.exit()
    value = lambda flag: [int(word) for word in sys.argv[sys.argv.index(flag) + 1].split(",")]
    print("ggml: found nothing {", file=sys.stderr)
    print(json.dumps([{"n_prompt": tokens, "n_ubatch": rows, "samples_ts": [rows + tokens]} for rows in value("-ub") for tokens in value("-p")], indent=2))"""
LLAMA_BATCHED = """
    import json, sys
    seen = set()
    for batch in sys.argv[sys.argv.index("-npl") + 1].split(","):
        print(json.dumps({"pl": int(batch), "speed_tg": 100.0 * int(batch) if batch in seen else 1.0}), file=sys.stderr)
        seen.add(batch)"""


class Case(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def run_stages(self, *words, script=HERE / "run", cwd=None, code=0):
        done = subprocess.run([sys.executable, str(script), "--out", str(self.folder / "out"), "--backend", "cpu", "--small", *words], capture_output=True, text=True, timeout=DEADLINE, cwd=cwd)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done.stdout

    def tiny(self):
        path = self.folder / "tiny.gguf"
        path.write_bytes(tiny_gguf.changed("llama.context_length", tiny_gguf.U32, 8192))
        return path

    def peer(self, bench=LLAMA_BENCH, batched=LLAMA_BATCHED):
        """A folder as tests/bench/peer leaves it, of stand-ins."""
        folder = self.folder / "peer"
        (folder / "bin").mkdir(parents=True)
        (folder / "peer.json").write_text('{"llama_cpp_commit": "c0ffee"}')
        for name, text in (("llama-bench", bench), ("llama-batched-bench", batched)):
            (folder / "bin" / name).write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}")
            (folder / "bin" / name).chmod(0o755)
        return folder

    def steps(self, stage):
        return {step["name"]: step for step in json.loads((self.folder / "out" / f"{stage}.json").read_text())["steps"]}


class Stages(Case):
    def test_numbers_of_bench_and_headline(self):
        self.run_stages("--build", str(BUILD), "--stage", "facts", "--stage", "bench", "--stage", "headline")
        facts = self.steps("facts")
        self.assertEqual((facts["machine"]["status"], facts["kvasir"]["status"]), ("ok", "ok"))
        self.assertIn("kvasir", facts["machine"]["result"]["programs"])
        bench = self.steps("bench")
        self.assertEqual([row["batch"] for row in bench["8b-decode"]["result"]["rows"]], [1, 2])
        self.assertIn("--ragged", bench["8b-attention-ragged"]["command"])
        self.assertEqual(len(bench["8b-attention"]["result"]["phases"]), 7)
        arms = self.steps("headline")["kv-400KiB"]["result"]["runs"]
        self.assertEqual([(arm["policy"], arm["keep"]) for arm in arms], [("none", 1), ("kv_compress", 0.5), ("kv_compress", 0.25)])
        summary = (self.folder / "out/summary.md").read_text()
        for words in ("| decode | batch |", "| attention phase |", "| KV limit | policy |", "5.18 x"):
            self.assertIn(words, summary)
        self.assertNotIn(str(self.folder), summary)

    def test_a_served_load(self):
        self.run_stages("--build", str(BUILD), "--stage", "served", "--model", str(self.tiny()))
        step = self.steps("served")["served"]
        self.assertEqual(step["status"], "ok", step)
        rows = step["result"]["rows"]
        self.assertEqual([(row["policy"], row["streams"]) for row in rows], [(policy, streams) for policy in ("none", "kv_compress") for streams in (1, 3)])
        for row in rows:
            self.assertTrue(row["output_tok_s"] > 0 and row["ttft_s"]["p50"] > 0 and row["counted"]["kvasir_steps_total"] > 0, row)
            self.assertEqual(row["counted"]["kvasir_compression_seconds_total"] > 0, row["policy"] != "none")
        self.assertIn("| policy | streams |", (self.folder / "out/summary.md").read_text())

    def test_what_is_not_served(self):
        broken = self.folder / "broken.gguf"
        broken.write_bytes(b"GGUF")
        self.run_stages("--build", str(BUILD), "--stage", "served", "--model", str(broken), code=1)
        step = self.steps("served")["served"]
        self.assertEqual(step["status"], "failed")
        self.assertIn("broken.gguf", step["tail"])

    def test_a_stage_ends_in_time(self):
        command = [sys.executable, str(HERE / "run"), "--out", str(self.folder / "out"), "--backend", "cpu", "--small", "--build", str(BUILD), "--stage", "bench", "--seconds", "0.001"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
        self.assertIn(done.returncode, (0, 1), done.stderr)
        self.assertEqual({step["status"] for step in self.steps("bench").values()}, {"left out"})

    def test_a_signal_keeps_what_there_is(self):
        with open(self.folder / "printed", "w+") as printed:
            process = subprocess.Popen([sys.executable, str(HERE / "run"), "--out", str(self.folder / "out"), "--build", str(BUILD), "--backend", "cpu", "--small", "--stage", "facts", "--stage", "bench"],
                                       stdout=printed, stderr=subprocess.STDOUT)
            end = time.monotonic() + DEADLINE
            while "8b-decode" not in (self.folder / "printed").read_text():
                self.assertIsNone(process.poll())
                self.assertLess(time.monotonic(), end)
                time.sleep(0.05)  # a look at what it has printed
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(DEADLINE), 130)
        steps = self.steps("bench")
        self.assertEqual(steps["8b-decode"]["status"], "ok")
        self.assertEqual(steps["interrupted"]["status"], "interrupted")
        self.assertIn("interrupted", (self.folder / "out/summary.md").read_text())

    def test_what_the_sanitizer_runs_compacts(self):
        tool = self.folder / "compute-sanitizer"
        tool.write_text("""#!/bin/sh
while [ "$1" != --target-processes ]; do shift; done
shift 2
echo "========= COMPUTE-SANITIZER"
"$@" || exit
echo "========= ERROR SUMMARY: 0 errors"
""")
        tool.chmod(0o755)
        path = f"{self.folder}:{os.environ['PATH']}"
        command = [sys.executable, str(HERE / "run"), "--out", str(self.folder / "out"), "--backend", "cpu", "--small", "--build", str(BUILD), "--stage", "sanitizer"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, env={**os.environ, "PATH": path})
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        steps = self.steps("sanitizer")
        for kind in ("memcheck", "racecheck"):
            requests = [name for name in steps if name.startswith(f"{kind}-requests-")]
            self.assertEqual(len(requests), 5, requests)
            self.assertEqual({steps[name]["status"] for name in requests}, {"ok"})

    def test_what_is_wrong_is_said(self):
        for words in (["--stage", "nonesuch"], ["--model", "/nonesuch"], ["--build", "/nonesuch"], ["--out", "/dev/null/nonesuch", "--build", str(BUILD)]):
            done = subprocess.run([sys.executable, str(HERE / "run"), "--out", str(self.folder), *words], capture_output=True, text=True, timeout=DEADLINE)
            self.assertNotEqual(done.returncode, 0)
            self.assertIn("nonesuch", done.stderr)
            self.assertNotIn("Traceback", done.stderr)
        done = subprocess.run([sys.executable, str(HERE / "run"), "--out", str(self.folder), "--seconds", "0"], capture_output=True, text=True, timeout=DEADLINE)
        self.assertEqual(done.returncode, 2)
        self.assertIn("--seconds", done.stderr.splitlines()[-1])


class Pack(Case):
    def test_the_folder_runs_alone(self):
        pack = self.folder / "pack"
        done = subprocess.run([sys.executable, str(HERE / "run"), "--pack", str(pack), "--build", str(BUILD)], capture_output=True, text=True, timeout=DEADLINE)
        self.assertIn(done.returncode, (0, 1) if os.environ.get("KVASIR_SANITIZED") else (0,), done.stdout + done.stderr)  # sanitized programs are large
        self.assertEqual({path.name for path in pack.iterdir()}, {"run", "carry.py", "peer.py", "served.py", "compare_torch.py", "llama_cpp.py", "report.py", "rounds.py", "servers.py", "shaped-model", "files.tar.xz"})
        self.run_stages("--stage", "served", "--stage", "facts", "--stage", "bench", "--stage", "peer", "--peer", str(self.peer()), "--model", str(self.tiny()), script=pack / "run", cwd="/")
        for name in ("bin/kvasir", "tests/golden/tiny/logits.txt", "tests/golden/llama/llama.bin"):
            self.assertTrue((pack / "unpacked" / name).exists(), name)
        libraries = {path.name for path in (pack / "unpacked/lib").iterdir()}
        self.assertTrue(any(name.startswith("libuv.so") for name in libraries), libraries)
        self.assertFalse({name for name in libraries if name.startswith(("libc.so", "libm.so", "libcuda", "libcublas"))})
        self.assertEqual(self.steps("facts")["machine"]["result"]["lacking"], {})
        self.assertEqual(self.steps("facts")["machine"]["status"], "ok")
        self.assertEqual(self.steps("bench")["8b-decode"]["status"], "ok")
        self.assertEqual(self.steps("peer")["8b-prompt-auto-2"]["status"], "ok")
        # Made again in the same place, and never over what it did not make.
        subprocess.run([sys.executable, str(HERE / "run"), "--pack", str(self.folder / "out"), "--build", str(BUILD)], capture_output=True, timeout=DEADLINE)
        self.assertTrue((self.folder / "out/bench.json").exists())

    def test_without_a_device(self):
        if shutil.which("nvidia-smi"):
            self.skipTest("there may be a device")
        self.run_stages("--build", str(BUILD), "--backend", "cuda")
        for stage in ("checks", "sanitizer", "golden", "bench", "headline", "torch", "peer"):
            self.assertEqual([step["status"] for step in self.steps(stage).values()], ["skipped"], stage)
            self.assertRegex(self.steps(stage)["all"]["why"], "^(no CUDA device|this build has no CUDA backend)")


class Peer(Case):
    def run_peer(self, *words, code=0):
        self.run_stages("--build", str(BUILD), "--stage", "peer", "--model", str(self.tiny()), *map(str, words), code=code)
        return self.steps("peer")

    def test_sides_take_turns(self):
        steps = self.run_peer("--peer", self.peer())
        order = [name for name in steps if name.startswith("sample-") and name != "sample-native"]
        self.assertEqual(order, ["sample-decode-auto-1", "sample-decode-llama-1", "sample-prompt-auto-1", "sample-prompt-llama-1",
                                 "sample-decode-llama-2", "sample-decode-auto-2", "sample-prompt-llama-2", "sample-prompt-auto-2"])
        self.assertEqual({step["status"] for step in steps.values()}, {"ok", "skipped"})
        self.assertEqual([name for name, step in steps.items() if step["status"] == "skipped"], ["sample-native", "8b-native"])
        self.assertEqual(steps["llama.cpp"]["result"]["built"], {"llama_cpp_commit": "c0ffee"})
        self.assertEqual([(row["of"], row["tok_s"]) for row in steps["8b-decode-llama-2"]["result"]["speeds"]], [(1, 100), (2, 200)])
        self.assertEqual([row["of"] for row in steps["8b-decode-auto-2"]["result"]["speeds"]], [1, 2])
        self.assertEqual(steps["sample-decode-llama-1"]["command"], "llama-batched-bench -m tiny.gguf -ngl 99 -fa on -ctk f16 -ctv f16 -b 2048 -t 2 -ub 512 -pps -no-kvu -c 512 -npp 32 -ntg 4 -npl 1,1,2,2 "
                         "--output-format jsonl")
        self.assertEqual(steps["8b-prompt-llama-1"]["command"], "llama-bench -m 8b.gguf -ngl 99 -fa on -ctk f16 -ctv f16 -b 2048 -t 2 -ub 512,2048 -p 16,48 -n 0 -r 1 -o json")
        self.assertIn("--weights auto --kv-dtype f16", steps["8b-prompt-auto-1"]["command"])
        summary = (self.folder / "out/summary.md").read_text()
        self.assertIn("prompt of 48 |", summary)
        self.assertIn("| 2096 (2096..2096) |", summary)  # of micro-batches the faster
        self.assertIn("llama.cpp c0ffee", summary)
        self.assertNotIn(str(self.folder), summary)

    def test_without_a_peer_it_says_so(self):
        for words in ([], ["--peer", self.folder]):
            steps = self.run_peer(*words)
            self.assertEqual([(name, step["status"]) for name, step in steps.items()], [("llama.cpp", "skipped")])
            self.assertIn("llama-batched-bench" if words else "--peer", steps["llama.cpp"]["why"])

    def test_a_peer_that_fails(self):
        steps = self.run_peer("--peer", self.peer(batched="raise SystemExit('no memory for that')"), code=1)
        failed = {name: step for name, step in steps.items() if step["status"] == "failed"}
        self.assertEqual(list(failed), ["sample-decode-llama-1", "8b-decode-llama-1"])  # and no second time, nor kvasir alone
        self.assertIn("no memory for that", failed["8b-decode-llama-1"]["tail"])
        self.assertNotIn("sample-decode-auto-2", steps)
        self.assertEqual(steps["8b-prompt-llama-2"]["status"], "ok")
        self.assertIn("prompt of 16 |", (self.folder / "out/summary.md").read_text())

    def test_a_peer_that_prints_nothing_of_use(self):
        steps = self.run_peer("--peer", self.peer(batched="print('{\"pl\": 2, \"speed_tg\": 0} {\"pl\": [3')", bench="print('[{\"n_prompt\": 16, \"samples_ts\": [1]}]')"), code=1)
        self.assertEqual(steps["sample-decode-llama-1"]["why"], "no speed at 1,2")
        self.assertEqual(steps["sample-prompt-llama-1"]["why"], "no speed at 48")

    def test_an_archive_that_is_not_whole(self):
        (self.folder / "peer").mkdir()
        (self.folder / "peer/peer.tar.xz").write_bytes(b"\xfd7zXZ\0not at all")
        self.assertEqual(self.run_peer("--peer", self.folder / "peer", code=1)["llama.cpp"]["status"], "failed")

    def test_ended_by_a_signal_it_leaves_no_file(self):
        path = self.folder / "path"
        folder = self.peer(batched=f"""
            import os, pathlib, signal, sys
            print('{{"pl": 1, "speed_tg": 1}}\\n' * 2 + '{{"pl": 2, "speed_tg": 1}}\\n' * 2, flush=True)
            model = sys.argv[sys.argv.index("-m") + 1]
            if model.endswith("8b.gguf"):
                pathlib.Path({str(path)!r} + ".new").write_text(model)
                os.replace({str(path)!r} + ".new", {str(path)!r})
                signal.pause()""")
        process = subprocess.Popen([sys.executable, str(HERE / "run"), "--out", str(self.folder / "out"), "--build", str(BUILD), "--backend", "cpu", "--small", "--stage", "peer", "--model", str(self.tiny()),
                                    "--peer", str(folder)], stdout=subprocess.DEVNULL)
        end = time.monotonic() + DEADLINE
        while not path.exists():
            self.assertIsNone(process.poll())
            self.assertLess(time.monotonic(), end)
            time.sleep(0.05)  # a look at whether it is there
        file = pathlib.Path(path.read_text())
        self.assertTrue(file.exists())
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(DEADLINE), 130)
        self.assertFalse(file.parent.exists())
        steps = self.steps("peer")
        self.assertEqual((steps["sample-prompt-llama-1"]["status"], steps["interrupted"]["status"]), ("ok", "interrupted"))

    def test_the_folder_to_carry(self):
        built, carried = self.peer(), self.folder / "carried"
        for name in peer.PROGRAMS:
            (built / "bin" / name).unlink()
            shutil.copy(BUILD / "kvasir", built / "bin" / name)  # any program with a library
        done = subprocess.run([sys.executable, str(HERE / "run"), "--peer", str(built), "--pack-peer", str(carried)], capture_output=True, text=True, timeout=DEADLINE)
        self.assertIn(done.returncode, (0, 1) if os.environ.get("KVASIR_SANITIZED") else (0,), done.stdout + done.stderr)
        self.assertEqual([path.name for path in carried.iterdir()], ["peer.tar.xz"])
        steps = self.run_peer("--peer", carried, code=1)
        self.assertEqual(steps["llama.cpp"]["result"]["built"], {"llama_cpp_commit": "c0ffee"})
        self.assertIn("kvasir: unknown command", steps["devices"]["tail"])  # it ran
        libraries = {path.name for path in (carried / "unpacked/lib").iterdir()}
        self.assertTrue(any(name.startswith("libuv.so") for name in libraries), libraries)
        self.assertFalse({name for name in libraries if name.startswith(("libc.so", "libm.so", "libcuda.so", "libcublas"))})
        again = subprocess.run([sys.executable, str(HERE / "run"), "--peer", str(self.folder), "--pack-peer", str(carried)], capture_output=True, text=True, timeout=DEADLINE)
        self.assertIn("no llama-bench", again.stderr)
        self.assertTrue((carried / "peer.tar.xz").exists())


class FakeRun:
    """What the stage sees of Runner, on a machine with a device: programs answer at once."""

    def __init__(self, end=1e9, answer=None):
        self.options = types.SimpleNamespace(backend="cuda", small=False)
        self.programs, self.steps, self.end = {"kvasir": "kvasir"}, [], time.monotonic() + end
        self.answer = answer or self.speeds

    @staticmethod
    def speeds(name, command):
        words = [str(word) for word in command]
        value = lambda flag: [int(word) for word in words[words.index(flag) + 1].split(",")]
        if words[0] == "kvasir":
            rows = [{"batch": batch, "n_prompt": 0, "tok_s": 30.0 * batch} for batch in value("-b")] if "-b" in words else [{"batch": 1, "n_prompt": tokens, "tok_s": 300.0} for tokens in value("-p")]
            return json.dumps({"backend": "cuda 0, NVIDIA H100 80GB HBM3 (9.0), weights " + ("f16" if "auto" in words else "Q4_K"), "rows": rows})
        if words[0].endswith("batched-bench"):
            return "\n".join(json.dumps({"pl": batch, "speed_tg": 20.0 * batch}) for batch in value("-npl"))
        return json.dumps([{"n_prompt": tokens, "n_ubatch": rows, "samples_ts": [100.0]} for rows in value("-ub") for tokens in value("-p")])

    def note(self, name, status, **more):
        self.steps.append({"name": name, "status": status, **more})

    def step(self, name, command, limit, parse=None, judge=None, **_):
        text = self.answer(name, command)
        why = judge(text)
        self.note(name, "failed" if why else "ok", why=why, result=parse(text), command=[str(word) for word in command])
        return self.steps[-1]["result"]


class PeerRounds(unittest.TestCase):
    MODEL = peer.Model("8b", "8B's shape", pathlib.Path("/m.gguf"))

    def rounds(self, run):
        peer.Rounds(run, pathlib.Path("/p"), {}, [self.MODEL], peer.FULL).all()
        return [step["name"] for step in run.steps]

    def test_both_ways_of_keeping_weights(self):
        run = FakeRun()
        names = self.rounds(run)
        self.assertEqual(names[:9], [*(f"8b-{kind}-{side}-1" for kind in ("decode", "prompt") for side in ("auto", "native", "llama")), *(f"8b-decode-{side}-2" for side in ("llama", "native", "auto"))])
        self.assertEqual(len(names), 18)
        decode, prompt = run.steps[2]["command"], run.steps[5]["command"]
        self.assertEqual(decode[decode.index("-c") + 1], str(64 * 1280))
        self.assertEqual(decode[decode.index("-npl") + 1], "1,1,1,1,64,64,64,64")
        self.assertEqual(prompt[prompt.index("-p") + 1], "512,6000")
        self.assertNotIn("-t", decode)
        table = peer.render(run.steps)
        self.assertIn("| 8B's shape | decode, batch 64, context 1,024 | 1920 (1920..1920) | 1920 (1920..1920) | 1280 (1280..1280) | 1.5 (1.5..1.5) | 1.5 (1.5..1.5) |  | 3 |", table)
        self.assertIn("| 8B's shape | prompt of 6,000 | 300 (300..300) |", table)
        self.assertIn("default weights here: f16", table)

    def test_no_round_begins_that_would_not_end(self):
        names = self.rounds(FakeRun(end=0))
        self.assertEqual(len(names), 7)
        self.assertEqual(names[-1], "round-2")

    def test_a_peer_without_the_device(self):
        run = FakeRun(answer=lambda name, command: "warning: no usable GPU found\n" + FakeRun.speeds(name, command))
        self.rounds(run)
        self.assertEqual([(step["name"], step["why"]) for step in run.steps if step["status"] == "failed"],
                         [(f"8b-{kind}-llama-1", "llama.cpp did not find the device") for kind in ("decode", "prompt")])

    def test_ratios_are_of_rounds(self):
        step = lambda side, number, speed, **more: {"status": "ok", "name": "", "result": {"model": "m", "kind": "prompt", "side": side, "round": number, "context": 1, "speeds": [{"of": 9, "tok_s": speed, **more}]}}
        table = peer.render([step("auto", 1, 10), step("llama", 1, 5, ubatch=512), step("auto", 2, 30), step("llama", 2, 10, ubatch=512), step("auto", 3, 99)])
        self.assertIn("| m | prompt of 9 | 30.0 (10.0..99.0) | - | 7.5 (5..10.0) | 2.5 (2..3) | - | 512 | 2 |", table)
        self.assertEqual(peer.render([{"status": "failed", "name": "x"}]), "")


class Pieces(unittest.TestCase):
    def test_what_llama_cpp_prints(self):
        self.assertEqual(llama_cpp.decodes('x { {"pl": 1, "speed_tg": 2}\n{"pl": 1, "speed_tg": 3} {"pl": 4, "speed_tg": NaN} {"pl": 4, "sp'), {1: [2, 3]})
        self.assertEqual(llama_cpp.prompts('[{"n_prompt": 1, "n_ubatch": 2, "samples_ts": [3, 4]},\n{"n_prompt": [], "samples_ts": "x"}, {"n_prompt": 5'), {(1, 2): [3, 4]})
        self.assertEqual(llama_cpp.objects("{" * 100000), [])

    def test_output_that_was_cut_off(self):
        json_of = load("run").json_of
        whole = '{"model":"m","runs":[{"a":1},{"a":2}]}\n'
        self.assertEqual(json_of(whole)["runs"], [{"a": 1}, {"a": 2}])
        self.assertEqual(json_of('{"model":"m","runs":[{"a":1}')["runs"], [{"a": 1}])
        self.assertEqual(json_of('{"model":"m","runs":[{"a":1},{"a"')["runs"], [{"a": 1}])
        self.assertIsNone(json_of('{"model'))
        self.assertIsNone(json_of("kvasir: no"))

    def test_what_the_sanitizer_says(self):
        clean_of = load("run").clean_of
        self.assertIsNone(clean_of("========= ERROR SUMMARY: 0 errors"))
        self.assertIsNone(clean_of("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"))
        self.assertIn("3", clean_of("========= ERROR SUMMARY: 3 errors"))
        self.assertIn("1", clean_of("========= RACECHECK SUMMARY: 1 hazard displayed"))
        self.assertIn("no summary", clean_of("all is well"))

    def test_what_was_compacted(self):
        compressed_of = load("run").compressed_of

        def output(*arms, errors=0):
            runs = [{"policy": policy, "compressions": compressions, "slots_kept": kept} for policy, compressions, kept in arms]
            return f"========= COMPUTE-SANITIZER\n{json.dumps({'runs': runs})}\n========= ERROR SUMMARY: {errors} errors"

        self.assertIsNone(compressed_of(output(("none", 0, 1), ("h2o", 3, 0.7))))
        self.assertIn("h2o", compressed_of(output(("kv_compress", 3, 0.7), ("h2o", 0, 1))))
        self.assertIn("h2o", compressed_of(output(("h2o", 3, 1))))
        self.assertIn("no run", compressed_of(output(("none", 0, 1))))
        self.assertIn("2 error", compressed_of(output(("h2o", 3, 0.7), errors=2)))
        self.assertIn("no run", compressed_of("========= ERROR SUMMARY: 0 errors"))


if __name__ == "__main__":
    unittest.main()
