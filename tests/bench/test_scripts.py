"""The measuring scripts in small, so that they cannot rot: their arithmetic, what they ask for, and each of them from end to end on a tiny model.

Where a peer is needed, a program of a few lines stands in for it that prints what llama.cpp's benches print, so that the outcome is known; for llama-server, kvasir does.
No number that is measured is judged."""
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import unittest

HERE = pathlib.Path(__file__).resolve().parent
BUILD = pathlib.Path(os.environ["KVASIR_BUILD"])
DEADLINE = 300  # a bound for a machine on which much else runs, not a time
CONTEXT, LONG = 8192, 8000  # LONG: tokens of streams that something else is to end, however late it comes
sys.path[:0] = [str(HERE), str(HERE.parent / "cli")]

import machine  # noqa: E402
import report  # noqa: E402
import rounds  # noqa: E402
import servers  # noqa: E402
import tiny_gguf  # noqa: E402


def script(name):
    """A script without .py, as a module."""
    loader = importlib.machinery.SourceFileLoader(name.replace("-", "_"), str(HERE / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module  # dataclasses look there
    loader.exec_module(module)
    return module


compare, fixed_pool, server_compare, everything = script("compare"), script("fixed-pool"), script("server-compare"), script("all")


class Rounds(unittest.TestCase):
    def test_moved(self):
        self.assertFalse(rounds.moved(50, 55))
        self.assertTrue(rounds.moved(50, 55.1))
        self.assertTrue(rounds.moved(50, 44.9))

    def test_sides_take_turns_and_the_ratio_is_of_pairs(self):
        order, ours, theirs = [], iter([10, 30, 20]), iter([10, 10, 10])
        pairs = rounds.run(lambda: order.append("o") or next(ours), lambda: order.append("t") or next(theirs), lambda: 50, 3, deadline=float("inf"))
        self.assertEqual("".join(order), "ot" "to" "ot")
        summary = rounds.summary(pairs)
        self.assertEqual(summary["ratio"], {"median": 2, "min": 1, "max": 3})
        self.assertEqual((summary["rounds"], summary["repeats"], summary["unsteady"]), (3, 0, 0))

    def test_a_pair_is_repeated_if_the_machine_moved(self):
        probes, ours = iter([50, 40, 50, 51]), iter([1, 2])
        pair = rounds.measure_pair(lambda: next(ours), lambda: 1, lambda: next(probes), True)
        self.assertEqual((pair["ours"], pair["repeats"], pair["steady"], pair["probe"]), (2, 1, True, [50, 51]))

    def test_repeats_are_bounded(self):
        probes, measured = iter([50, 10] * 9), []
        pair = rounds.measure_pair(lambda: measured.append(1) or 1, lambda: 1, lambda: next(probes), True, retries=2)
        self.assertEqual((len(measured), pair["repeats"], pair["steady"]), (3, 2, False))
        self.assertEqual(rounds.summary([pair])["unsteady"], 1)

    def test_a_deadline_leaves_one_pair(self):
        for deadline, count in ((-1, 1), (2, 3)):
            clock = iter(range(100))  # is looked at before each pair but the first
            self.assertEqual(len(rounds.run(lambda: 1, lambda: 1, lambda: 1, 50, deadline, now=lambda: next(clock))), count)


class Compare(unittest.TestCase):
    def test_scenarios(self):
        known = compare.scenarios()
        self.assertEqual([known[f"decode-{batch}"].target for batch in (1, 8, 32)], [2.5, 5, 5])
        self.assertEqual([known[name].target for name in ("prompt-512", "prompt-2048", "prompt-512-best", "prompt-2048-best", "q4_0-decode-8", "q4_0-prompt-512")], [5, 4, 2, 1.8, 1.3, 1.5])
        self.assertEqual(known["decode-32-long-q8"].kv, "q8")
        for _, _, words in everything.pieces(options(peer="p", quick=False, rounds=5, only=None)):
            for flag, name in zip(words, words[1:]):
                if words[0] == "compare" and flag == "--scenario":
                    self.assertIn(name, known)

    def test_commands(self):
        known = compare.scenarios()
        ours = [str(word) for word in compare.kvasir_command("kvasir", "m.gguf", known["decode-32-long-q8"], 2)]
        self.assertEqual(ours, "kvasir bench --json -m m.gguf -t 2 -r 1 -p 0 -n 32 -b 32 -d 1024 --kv-dtype q8".split())
        theirs = [str(word) for word in compare.peer_command(pathlib.Path("p"), "default", ["-fa", "on", "-ub", 512], "m.gguf", known["decode-32-long-q8"], 2)]
        self.assertEqual(theirs, ("p/default/bin/llama-batched-bench -m m.gguf -t 2 -b 2048 -ctk q8_0 -ctv q8_0 -fa on -ub 512 -pps -no-kvu -tb 2 -c 40960 -npp 1024 -ntg 32 -npl 32 "
                                  "--output-format jsonl").split())
        prompt = [str(word) for word in compare.peer_command(pathlib.Path("p"), "blas", ["-fa", "off"], "m.gguf", known["prompt-512-best"], 2)]
        self.assertEqual(prompt, "p/blas/bin/llama-bench -m m.gguf -t 2 -b 2048 -ctk f16 -ctv f16 -fa off -p 512 -n 0 -r 3 -o json".split())

    def test_candidates(self):
        known = compare.scenarios()
        flags = lambda name, builds: [(build, " ".join(map(str, flags))) for build, flags in compare.candidates(known[name], builds)]
        self.assertEqual(flags("decode-8", ["default"]), [("default", "-fa on -ub 512"), ("default", "-fa off -ub 512"), ("default", "-fa on -ub 512 -kvu")])
        self.assertEqual(flags("decode-32-long-q8", ["default", "blas"]), [("default", "-fa on -ub 512")])
        self.assertEqual({build for build, _ in flags("prompt-2048-best", ["default", "blas"])}, {"default", "blas"})
        self.assertEqual({build for build, _ in flags("prompt-2048", ["default", "blas"])}, {"default"})

    def test_what_the_peer_prints(self):
        known = compare.scenarios()
        self.assertEqual(compare.peer_speed(known["prompt-512"], "noise\n" + json.dumps([{"samples_ts": [3, 1, 2]}]), ""), 2)
        self.assertEqual(compare.peer_speed(known["decode-1"], '\n{"speed_tg": 5.0}\nnoise\n', '{"speed_tg": 7.0}\n{"speed_tg": 6.0}\n'), 6)
        with self.assertRaises(RuntimeError):
            compare.peer_speed(known["decode-1"], "nothing\n", "")

    def test_what_kvasir_prints(self):
        self.assertEqual(compare.kvasir_speed('{"rows": [{"tok_s": 7.5}]}\n', "2000-01-01T00:00:00.000Z info  loading: 40 %\n"), 7.5)


class FixedPool(unittest.TestCase):
    def test_pool(self):
        inspected = "KV cache         188.44 MiB a sequence of 8192 tokens (90 lanes, f16)\nKV block                23040 x           8576 =   188.44 MiB\n"
        blocks = 2 * 64 * 90
        self.assertEqual(fixed_pool.pool_bytes(inspected, 2, 2048), (blocks + 236) * 8576)
        self.assertLessEqual((blocks + 236) // 50, 236)  # what admission leaves free is what was added

    def test_means(self):
        samples = [(0, 4), (1, 2), (3, 6)]
        self.assertEqual(fixed_pool.mean_between(samples, 0, 4), (4 + 2 * 2 + 6) / 4)
        self.assertEqual(fixed_pool.mean_between(samples, 0.5, 1.5), (4 * 0.5 + 2 * 0.5) / 1)
        self.assertEqual(fixed_pool.begun_not_ended([[0, 1, 3, 3, 9, 9], [0, 2, 5, 5, 9, 9], [0, 0, 0, 0, 0, 0]], 1, 4), (2 + 2) / 3)


class Machine(unittest.TestCase):
    def test_own_children_are_not_others(self):
        watch = machine.Watch()
        _, busy, stolen, own = watch.begin
        watch._look = lambda: (watch.begin[0] + 10, busy + 7, stolen + 1, own + 4)
        cores = os.cpu_count()
        self.assertEqual({key: watch.report()[key] for key in ("others", "stolen")}, {"others": round(3 / 10 / cores, 3), "stolen": round(1 / 10 / cores, 3)})
        before = machine.Watch()
        subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
        self.assertGreater(before._look()[3], before.begin[3])

    def test_describe(self):
        self.assertTrue(all(machine.describe(BUILD / "kvasir")[key] for key in ("cpu", "cores", "memory_gib", "system", "commit", "date")))


class Report(unittest.TestCase):
    def test_command_line(self):
        before, sys.argv = sys.argv, ["/somewhere/else/tests/bench/compare", "--peer", "/home/a/peer", "--out=/tmp/results", "--rounds", "5", "--peer-flag=-kvu"]
        try:
            self.assertEqual(report.command_line(), "tests/bench/compare --peer peer --out=results --rounds 5 --peer-flag=-kvu")
        finally:
            sys.argv = before

    def test_numbers(self):
        self.assertEqual([report.number(value) for value in (None, 0.01234, 4.567, 78.94, 1234.5)], ["-", "0.0123", "4.57", "78.9", "1234"])


class options:
    def __init__(self, **values):
        self.__dict__.update(values)


class EndToEnd(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)
        cls.path = pathlib.Path(cls.folder.name)
        cls.model = cls.path / "tiny.gguf"
        cls.model.write_bytes(tiny_gguf.changed("llama.context_length", tiny_gguf.U32, CONTEXT))
        # The real programs, but a machine that never moves: pairs are not repeated.
        cls.build = cls.path / "build"
        (cls.build / "tests/bench").mkdir(parents=True)
        for name in ("kvasir", "tests/bench/load"):
            (cls.build / name).symlink_to((BUILD / name).resolve())
        cls.program(cls.build / "tests/bench/bandwidth", "print(50.0)")

    @staticmethod
    def program(path, text):
        path.write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}")
        path.chmod(0o755)

    def run_script(self, name, *words, status=0):
        done = subprocess.run([sys.executable, HERE / name, "--out", self.path / "out", "--model", self.model, "--build", self.build, *map(str, words)], capture_output=True, text=True, timeout=DEADLINE)
        self.assertEqual(done.returncode, status, done.stdout + done.stderr)
        return done.stdout + done.stderr

    def result(self, name):
        self.assertTrue((self.path / "out" / f"{name}.md").read_text().strip())
        return json.loads((self.path / "out" / f"{name}.json").read_text())

    def peer(self, **programs):
        """A folder as tests/bench/peer leaves it, of Python programs."""
        folder = pathlib.Path(tempfile.mkdtemp(dir=self.path))
        (folder / "default/bin").mkdir(parents=True)
        (folder / "peer.json").write_text(json.dumps({"package": "p", "version": "1", "llama_cpp_commit": "c", "compiler": "cc", "variants": ["default"]}))
        for name, text in programs.items():
            self.program(folder / "default/bin" / name.replace("_", "-"), text)
        return folder

    # ---- the load client ----

    def mock(self, *flags):
        return servers.kvasir(BUILD / "kvasir", "-m", self.model, "--backend", "mock", *flags)

    def test_closed_and_open_loop(self):
        with self.mock() as server:
            for how in ({"streams": 3, "requests": 7}, {"rate": 200.0, "requests": 5}):
                result = servers.load(BUILD / "tests/bench/load", server.port, prompt=9, tokens=6, ids="0-256", timeout=DEADLINE, **how)
                n = how["requests"]
                self.assertEqual((result["requests"], result["whole"], result["failed"], result["output_tokens"]), (n, n, 0, 6 * n))
                self.assertEqual(result["ttft_s"]["count"], n)
                self.assertGreaterEqual(result["gap_s"]["max"], result["gap_s"]["p50"])
                self.assertGreater(result["client_cpu_s"], 0)
                for submit, first, last, end, tokens, _ in result["each"]:
                    self.assertTrue(0 < submit <= first <= last <= end)
                    self.assertEqual(tokens, 6)
            self.assertEqual(server.metrics()["kvasir_generation_tokens_total"], 12 * 6)

    def test_arrival(self):
        # Steps so long that the whole prompt is one: 100 rows at 500 a second are a gap of 0.2 s for the others, which ends after the prompt's first token.
        with self.mock("--mock-tokens-per-second", "500", "--step-ms", "60000") as server:
            result = servers.load(BUILD / "tests/bench/load", server.port, streams=2, prompt=8, tokens=LONG, arrive="100:1:4", ids="0-256", timeout=DEADLINE)
            arrival = result["arrival"]
            self.assertGreater(arrival["ttft_s"], 0.19)
            self.assertEqual(arrival["others_over_before"], 0)
            self.assertGreaterEqual(arrival["others_gap_s"]["count"], 2)
            # The gaps of each of the two cover the time between; when the client was let read what had come, only the machine knows.
            self.assertGreater(arrival["others_gap_s"]["max"] * arrival["others_gap_s"]["count"], 2 * 0.19)
            *others, arrived = result["each"]
            for _, _, last, _, tokens, _ in others:
                self.assertGreater(last, arrived[1])  # heard of again
                self.assertLess(tokens, LONG)
            self.assertEqual(result["whole"], 1)  # the run ends soon after what arrived

    def test_failures_are_told(self):
        with self.mock() as server:
            with self.assertRaisesRegex(RuntimeError, "0 of 2 .* status 404"):
                servers.load(BUILD / "tests/bench/load", server.port, streams=2, prompt=4, tokens=2, ids="0-256", model="absent", timeout=DEADLINE)
            with self.assertRaisesRegex(RuntimeError, "0 of 1 .* status 400"):
                servers.load(BUILD / "tests/bench/load", server.port, streams=1, prompt=4, tokens=2, ids="0-256", extra={"kv": {"policy": "nonesuch"}}, timeout=DEADLINE)
        with servers.held_port() as held, self.assertRaisesRegex(RuntimeError, "refused"):
            servers.load(BUILD / "tests/bench/load", held.getsockname()[1], streams=1, timeout=DEADLINE)

    def test_interrupted_it_reports_what_there_was(self):
        with self.mock("--mock-tokens-per-second", "50") as server:
            command = servers.load_command(BUILD / "tests/bench/load", server.port, streams=2, prompt=4, tokens=LONG, ids="0-256")
            load = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            end = time.monotonic() + DEADLINE
            while server.metrics()["kvasir_computed_generation_tokens_total"] < 4:
                self.assertLess(time.monotonic(), end)
                time.sleep(0.01)
            load.send_signal(signal.SIGINT)
            printed, _ = load.communicate(timeout=DEADLINE)
            self.assertEqual(load.returncode, 1)
            self.assertEqual((json.loads(printed)["requests"], json.loads(printed)["whole"]), (2, 0))

    def test_usage(self):
        for words in ([], ["--port", "0"], ["--port", "80", "--streams", "x"], ["--port", "80", "--ids", "5-5"], ["--port", "80", "--extra", "[]"], ["--port", "80", "more"],
                      ["--port", "80", "--arrive", "1"], ["--port", "80", "--rate", "-1"], ["--port", "80", "--host", "nowhere"], ["--port", "80", "--arrive", "5:5:5", "--rate", "1"]):
            done = subprocess.run([BUILD / "tests/bench/load", *words], capture_output=True, text=True, timeout=DEADLINE)
            self.assertEqual((done.returncode, done.stdout), (2, ""), words)

    # ---- the scripts ----

    def test_bandwidth(self):
        self.assertGreater(machine.Probe(BUILD / "tests/bench/bandwidth", 1 << 20, 1)(), 0)
        self.assertEqual(subprocess.run([BUILD / "tests/bench/bandwidth", "0", "1"], capture_output=True).returncode, 2)

    def test_compare(self):
        peer = self.peer(
            llama_bench="""
                import sys
                print('[{"samples_ts": [50.0, 40.0, 60.0]}]')""",
            llama_batched_bench="""
                import sys
                slow = "off" if sys.argv[sys.argv.index("-fa") + 1] == "off" else ""
                for _ in sys.argv[sys.argv.index("-npl") + 1].split(","):
                    print('{"speed_tg": %d}' % (80 if slow else 100), file=sys.stderr)""")
        self.run_script("compare", "--peer", peer, "--threads", 1, "--rounds", 2, "--scenario", "decode-8")
        result = self.result("compare")
        self.assertTrue(result["complete"])
        row = result["results"]["decode-8"]
        self.assertEqual((row["build"], row["flags"]), ("default", "-fa on -ub 512"))
        self.assertEqual([trial["tok_s"] for trial in row["trials"]], [100, 80, 100])
        self.assertEqual(len(row["pairs"]), 2)
        for pair in row["pairs"]:
            self.assertEqual(pair["theirs"], 100)
            self.assertAlmostEqual(pair["ratio"], pair["ours"] / 100)

    def test_compare_tells_what_failed_and_goes_on(self):
        peer = self.peer(llama_bench="print('[{\"samples_ts\": [50.0]}]')", llama_batched_bench="raise SystemExit('no memory for that')")
        self.run_script("compare", "--peer", peer, "--threads", 1, "--rounds", 1, "--no-tune", "--name", "half", "--scenario", "decode-8", "--scenario", "prompt-512", status=1)
        result = self.result("half")
        self.assertFalse(result["complete"])
        self.assertIn("no memory for that", result["results"]["decode-8"]["error"])
        self.assertEqual(result["results"]["prompt-512"]["summary"]["rounds"], 1)

    def test_ended_early_the_scripts_keep_what_there_is(self):
        """The peer's third run waits for ever; by then two pairs are whole."""
        calls = pathlib.Path(tempfile.mkdtemp(dir=self.path))
        peer = self.peer(llama_bench="", llama_batched_bench=f"""
            import pathlib, signal
            calls = pathlib.Path({str(calls)!r})
            number = len(list(calls.iterdir()))
            (calls / str(number)).touch()
            if number == 2:
                signal.pause()
            print('{{"speed_tg": 60.0}}')""")
        for program, name, more in (("compare", "early", ["--rounds", 3, "--scenario", "decode-8", "--scenario", "decode-1", "--no-tune"]), ("all", "decode", ["--only", "decode", "--rounds", 3])):
            for path in calls.iterdir():
                path.unlink()
            words = [sys.executable, HERE / program, "--out", self.path / "out", "--model", self.model, "--build", self.build, "--peer", peer, *(["--name", name, "--threads", 1] if program == "compare" else []), *more]
            script = subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            end = time.monotonic() + DEADLINE
            while not (calls / "2").exists():
                self.assertLess(time.monotonic(), end)
                self.assertIsNone(script.poll())
                time.sleep(0.01)
            script.terminate()
            printed, _ = script.communicate(timeout=DEADLINE)
            self.assertEqual(script.returncode, 130, printed)
            self.assertFalse(self.result(name)["complete"])
            if program == "compare":
                self.assertEqual(len(self.result(name)["results"]["decode-8"]["pairs"]), 2)

    def test_server_compare(self):
        peer = self.peer(llama_server=f"""
            import os, sys
            port = sys.argv[sys.argv.index("--port") + 1]
            os.execv({str(BUILD / "kvasir")!r}, ["kvasir", "serve", "--port", port, "--backend", "mock", "--mock-tokens-per-second", "500", "-m", {str(self.model)!r}])""")
        self.run_script("server-compare", "--peer", peer, "--threads", 1, "--rounds", 1, "--streams", 3, "--prompt", 16, "--tokens", 8, "--decoding", 2, "--decoding-tokens", LONG,
                        "--long-prompt", 150, "--ubatch", 64, "--ids", "0-256", "--warm-prompt", 16, "--flag=--backend=mock", "--flag=--mock-tokens-per-second=500")
        result = self.result("server")
        self.assertTrue(result["complete"])
        burst, arrival = result["results"]["burst"], result["results"]["arrival"]
        self.assertEqual(burst["summary"]["rounds"], 1)
        self.assertIn("first", burst["details"]["ours"][0]["thread_share"])
        self.assertEqual(set(arrival["rounds"][0]), {"probe", "kvasir", "-b 64 -ub 64"})

    def test_fixed_pool(self):
        self.run_script("fixed-pool", "--threads", 1, "--requests", 6, "--prompt", 100, "--tokens", 100, "--max-model-len", 200, "--budget", 64, "--ids", "0-256", "--period", 0.01)
        result = self.result("fixed-pool")
        self.assertTrue(result["complete"])
        (none,), (cut,) = result["results"].values()
        for arm in (none, cut):
            self.assertEqual(arm["output_tokens"], 600)
            self.assertEqual(len(arm["each"]), 6)
            self.assertLessEqual(arm["pool_bytes"], result["pool_bytes"])
            self.assertGreaterEqual(arm["polls"], 1)
        self.assertEqual((none["compressions"], none["compression_share"]), (0, 0))
        self.assertGreater(cut["compressions"], 0)
        self.assertGreater(cut["compression_share"], 0)

    def test_host_cost(self):
        program = BUILD / "tests/host_device/host_device_kvasir"
        if not program.exists():
            self.skipTest("this build has no host device")
        arguments = ["--program", program, "--out", self.path / "out", "--dummy", "tiny", "--batch", "4", "--context", "40", "--tokens", "512", "--rounds", "2"]
        done = subprocess.run([sys.executable, HERE / "host-cost", *map(str, arguments)], capture_output=True, text=True, timeout=DEADLINE)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        results = self.result("host-cost")["results"]
        self.assertEqual([len(row["us"]) for row in results.values()], [2] * 4)
        for name, row in results.items():
            self.assertGreater(min(row["us"]), 0)
            # A decode step is one graph. How many of the engine's steps have all requests is up to when they arrive.
            self.assertAlmostEqual(row["calls"]["graphs"], 1, delta=0.6 if name.startswith("engine") else 0.1, msg=name)

    def test_all(self):
        peer = self.peer(llama_bench="print('[{\"samples_ts\": [50.0]}]')", llama_batched_bench="print('{\"speed_tg\": 60.0}')")
        words = self.run_script("all", "--quick", "--peer", peer, "--only", "decode", "--only", "prompt")
        self.assertIn("2 of 2 pieces are whole", words)
        tables = (self.path / "out/README.md").read_text()
        self.assertLess(tables.index("## decode"), tables.index("## prompt"))
        for title in ("decode, batch 32, context 1,024", "prompt 2,048, default build"):
            self.assertIn(title, tables)

    def test_all_leaves_out_what_needs_a_peer_and_what_is_too_late(self):
        names = [name for name, _, _ in everything.pieces(options(peer=None, quick=False, rounds=5, only=None))]
        self.assertEqual(names, ["fixed-pool"])
        words = self.run_script("all", "--minutes", 0.1, status=1)
        self.assertIn("fixed-pool: left out", words)


if __name__ == "__main__":
    unittest.main()
