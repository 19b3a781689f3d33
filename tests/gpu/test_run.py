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
import time
import unittest

HERE = pathlib.Path(__file__).resolve().parent
BUILD = pathlib.Path(os.environ["KVASIR_BUILD"])
DEADLINE = 300


def load(name):
    loader = importlib.machinery.SourceFileLoader(f"gpu_{name}", str(HERE / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class Case(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def run_stages(self, *words, script=HERE / "run", cwd=None, code=0):
        done = subprocess.run([sys.executable, str(script), "--out", str(self.folder / "out"), "--backend", "cpu", "--small", *words], capture_output=True, text=True, timeout=DEADLINE, cwd=cwd)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done.stdout

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

    def test_a_stage_ends_in_time(self):
        began = time.monotonic()
        command = [sys.executable, str(HERE / "run"), "--out", str(self.folder / "out"), "--backend", "cpu", "--small", "--build", str(BUILD), "--stage", "bench", "--seconds", "0.001"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
        self.assertIn(done.returncode, (0, 1), done.stderr)
        self.assertLess(time.monotonic() - began, 60)
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
        for words in (["--stage", "nonesuch"], ["--model", "/nonesuch"], ["--build", "/nonesuch"]):
            done = subprocess.run([sys.executable, str(HERE / "run"), "--out", str(self.folder), *words], capture_output=True, text=True, timeout=DEADLINE)
            self.assertNotEqual(done.returncode, 0)
            self.assertIn("nonesuch", done.stderr)


class Pack(Case):
    def test_the_folder_runs_alone(self):
        pack = self.folder / "pack"
        done = subprocess.run([sys.executable, str(HERE / "run"), "--pack", str(pack), "--build", str(BUILD)], capture_output=True, text=True, timeout=DEADLINE)
        self.assertIn(done.returncode, (0, 1) if os.environ.get("KVASIR_SANITIZED") else (0,), done.stdout + done.stderr)  # sanitized programs are large
        self.assertEqual({path.name for path in pack.iterdir()}, {"run", "compare_torch.py", "files.tar.xz"})
        self.run_stages("--stage", "facts", "--stage", "bench", script=pack / "run", cwd="/")
        for name in ("bin/kvasir", "tests/golden/tiny/logits.txt", "tests/golden/llama/llama.bin"):
            self.assertTrue((pack / "unpacked" / name).exists(), name)
        libraries = {path.name for path in (pack / "unpacked/lib").iterdir()}
        self.assertTrue(any(name.startswith("libuv.so") for name in libraries), libraries)
        self.assertFalse({name for name in libraries if name.startswith(("libc.so", "libm.so", "libcuda", "libcublas"))})
        self.assertEqual(self.steps("facts")["machine"]["result"]["lacking"], {})
        self.assertEqual(self.steps("facts")["machine"]["status"], "ok")
        self.assertEqual(self.steps("bench")["8b-decode"]["status"], "ok")
        # Made again in the same place, and never over what it did not make.
        subprocess.run([sys.executable, str(HERE / "run"), "--pack", str(self.folder / "out"), "--build", str(BUILD)], capture_output=True, timeout=DEADLINE)
        self.assertTrue((self.folder / "out/bench.json").exists())

    def test_without_a_device(self):
        if shutil.which("nvidia-smi"):
            self.skipTest("there may be a device")
        self.run_stages("--build", str(BUILD), "--backend", "cuda")
        for stage in ("checks", "sanitizer", "golden", "bench", "headline", "torch"):
            self.assertEqual([step["status"] for step in self.steps(stage).values()], ["skipped"], stage)


class Pieces(unittest.TestCase):
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
