"""kvasir eval: its options, its JSON, and what must hold for any model: nothing evicted is nothing lost, equal shares take equal blocks, the same run gives the same numbers."""
import json
import math
import os
import re
import unittest
import xml.etree.ElementTree as xml

from program import Case

POLICIES = ["random", "streaming_llm", "h2o", "scissorhands", "fastgen", "snapkv", "pyramidkv", "ada_snapkv", "ada_pyramidkv", "kv_compress",
            "expected_attention", "keydiff", "tova"]
KEYS = {"policy", "keep", "blocks", "bytes", "kl_mean", "kl_p99", "same_top1", "ppl_ratio", "passkey", "passkey_after", "copy", "hit_rate", "hit_rate_heads",
        "attention_error", "attention_error_heads", "kept"}
LANES = 4  # of the tiny shape: 2 layers, 2 KV heads
TEXT = "".join(f"Once {i} ships sailed past the {i % 7} lighthouses of port {i * i % 101}; nobody counted them. " for i in range(80))


class Eval(Case):
    def eval(self, *arguments):
        return self.works("eval", "--dummy", "tiny", *arguments)

    def result(self, *arguments):
        printed = self.eval("--json", *arguments)
        self.assertEqual(printed.count("\n"), 1)
        return json.loads(printed)

    def test_rows(self):
        result = self.result("--windows", "2", "--prompt", "256", "--tasks", "1", "--keep", "0.5,0.25")
        self.assertEqual((result["model"], result["windows"], result["prompt"], result["text"]), ("tiny", 2, 256, "made up"))
        self.assertEqual([(row["policy"], row["keep"]) for row in result["rows"]], [("none", 1)] + [(name, keep) for name in POLICIES for keep in (0.5, 0.25)])
        for row in result["rows"]:
            self.assertEqual(set(row), KEYS)
            self.assertGreaterEqual(row["kl_p99"], 0)
            self.assertTrue(0 < row["same_top1"] <= 1 and 0 < row["hit_rate"] <= 1 and row["ppl_ratio"] > 0, row)
            self.assertEqual([len(heads) for heads in row["kept"]], [2, 2])
            rates = [rate for heads in row["hit_rate_heads"] for rate in heads]
            self.assertEqual([len(heads) for heads in row["hit_rate_heads"]], [2, 2])
            self.assertTrue(0 <= min(rates) <= row["hit_rate"] <= max(rates) <= 1, row)  # the total is a mean, weighted by each head's pairs
            self.assertEqual([len(heads) for heads in row["attention_error_heads"]], [4, 4])
            if row["policy"] != "none":
                self.assertTrue(0 < row["kl_mean"] <= row["kl_p99"] and row["attention_error"] > 0, row)
                self.assertLess(row["hit_rate"], 1, row)
                self.assertGreater(len(set(rates)), 1, row)
        hits = {(row["policy"], row["keep"]): row["hit_rate"] for row in result["rows"]}
        for keep in (0.5, 0.25):  # what scissorhands counts is what the rate counts
            self.assertEqual(max(hits[name, keep] for name in ("random", "streaming_llm", "snapkv", "scissorhands", "keydiff")), hits["scissorhands", keep])
        full = result["rows"][0]
        self.assertEqual((full["blocks"], full["kl_mean"], full["kl_p99"], full["same_top1"], full["ppl_ratio"], full["hit_rate"], full["attention_error"]),
                         (256 / 32 * LANES, 0, 0, 1, 1, 1, 0))
        self.assertEqual({kind: result["tasks"][kind]["depths"] for kind in result["tasks"]}, {"passkey": 5, "passkey_after": 5, "copy": 5})

    def test_equal_blocks(self):
        # 300 tokens: half are 4.69 blocks a lane, 5 when rounded; an eighth are 1.17.
        for keep, blocks in (("0.5", 5), ("0.25", 2), ("0.7", 7)):
            result = self.result("--windows", "1", "--prompt", "300", "--tasks", "0", "--keep", keep)
            for row in result["rows"][1:]:
                if row["policy"] in ("random", "h2o", "scissorhands", "snapkv", "keydiff", "tova", "kv_compress"):
                    self.assertEqual(row["blocks"], blocks * LANES, row["policy"])
                self.assertLessEqual(row["blocks"], (blocks + 1) * LANES, row["policy"])
                if row["policy"] not in ("kv_compress", "streaming_llm"):  # these two think in blocks; the others keep tokens
                    self.assertLessEqual(sum(map(sum, row["kept"])), blocks * 32 * LANES + LANES, row["policy"])

    def test_nothing_evicted_is_nothing_lost(self):
        for backend in ("cpu", "reference"):
            for prompt in ("128", "301"):
                result = self.result("--windows", "1", "--prompt", prompt, "--tasks", "1", "--keep", "1", "--recovery", "1", "--backend", backend)
                self.assertEqual(len(result["rows"]), 1 + len(POLICIES))
                for row in result["rows"]:
                    self.assertEqual((row["kl_mean"], row["kl_p99"], row["same_top1"], row["ppl_ratio"], row["attention_error"]), (0, 0, 1, 1, 0), row["policy"])
                    self.assertEqual((row["passkey"], row["copy"]), (result["rows"][0]["passkey"], result["rows"][0]["copy"]))
                    self.assertEqual(row["blocks"], result["rows"][0]["blocks"])
                for difference in result["differences"]:
                    self.assertEqual((difference["mean"], difference["low"], difference["high"]), (0, 0, 0))

    def test_backends_agree(self):
        """What stays is a matter of positions here, so both evict the same, and the exact backend is the oracle of the other."""
        rows = []
        for backend in ("cpu", "reference"):
            result = self.result("--windows", "1", "--prompt", "256", "--tasks", "0", "--keep", "0.25", "--policies", "random,streaming_llm", "--backend", backend,
                                 "--kv-dtype", "f32", "--seed", "3")
            rows.append(result["rows"][1:])
        for cpu, reference in zip(*rows):
            self.assertEqual((cpu["kept"], cpu["blocks"]), (reference["kept"], reference["blocks"]))
            self.assertAlmostEqual(cpu["kl_mean"] / reference["kl_mean"], 1, delta=0.05)
            self.assertAlmostEqual(cpu["attention_error"] / reference["attention_error"], 1, delta=0.05)

    def test_differences(self):
        arguments = ["--windows", "3", "--prompt", "128", "--tasks", "0", "--keep", "0.5,0.25"]
        result = self.result(*arguments, "--policies", "snapkv, kv_compress ,random")
        self.assertEqual([(d["policy"], d["against"], d["keep"]) for d in result["differences"]],
                         [("kv_compress", other, keep) for keep in (0.5, 0.25) for other in ("snapkv", "random")])
        means = {(row["policy"], row["keep"]): row["kl_mean"] for row in result["rows"]}
        for d in result["differences"]:
            self.assertAlmostEqual(d["mean"], means["kv_compress", d["keep"]] - means[d["against"], d["keep"]], delta=1e-6)
            self.assertTrue(d["low"] <= d["mean"] <= d["high"], d)
        self.assertEqual(self.result(*arguments, "--policies", "snapkv,none,snapkv")["differences"], [])

    def test_same_run_same_numbers(self):
        arguments = ["--windows", "2", "--prompt", "128", "--tasks", "1", "--seed", "5"]
        first = self.result(*arguments, "-t", "1")
        second = self.result(*arguments, "-t", "2", "--max-rows", "32")  # neither threads nor chunks change a row
        self.assertEqual(first["rows"], second["rows"])

    def test_text(self):
        path = self.file("text.txt", TEXT)
        result = self.result("--text", path, "--windows", "4", "--prompt", "2000", "--tasks", "0", "--policies", "random", "--keep", "0.5")
        self.assertEqual((result["text"], result["text_tokens"], result["windows_overlap"]), (path, len(TEXT), True))
        self.assertFalse(self.result("--text", path, "--windows", "4", "--prompt", "128", "--tasks", "0", "--policies", "random")["windows_overlap"])
        self.assertIn("overlap, evenly", self.eval("--text", path, "--windows", "4", "--prompt", "2000", "--tasks", "0", "--policies", "random"))
        self.refused("eval", "--dummy", "tiny", "--text", self.file("short.txt", "too short"), says=["--text", "9 tokens"])
        self.refused("eval", "--dummy", "tiny", "--text", self.file("empty.txt", ""), says="empty")
        self.refused("eval", "--dummy", "tiny", "--text", "absent.txt", says="absent.txt")
        self.refused("eval", "--dummy", "tiny", "--text", self.folder.name, says="--text")
        self.eval("--text", self.file("bytes.txt", bytes(range(256)) * 4), "--windows", "1", "--prompt", "128", "--policies", "tova")

    def test_stream(self):
        path = self.file("text.txt", TEXT)
        result = self.result("--text", path, "--windows", "0", "--stream", "5000")
        self.assertEqual(result["rows"], [])
        self.assertEqual([(window["from"], window["to"]) for window in result["stream"]], [(0, 4096), (4096, 5000)])
        self.assertTrue(all(window["ppl"] > 1 for window in result["stream"]))
        first, second = result["stream"]
        self.assertEqual(first["ppl"], first["ppl_anew"])
        self.assertAlmostEqual(second["ppl"] / second["ppl_anew"], 1, delta=0.2)
        longer = self.result("--text", path, "--windows", "0", "--stream", "1000000")["stream"]
        self.assertEqual(longer[-1]["to"], len(TEXT) - 1)  # what the text has
        self.assertEqual([longer[0][key] for key in ("ppl", "ppl_anew")], [first[key] for key in ("ppl", "ppl_anew")])
        with_rows = self.result("--text", path, "--windows", "1", "--prompt", "128", "--tasks", "0", "--policies", "random", "--stream", "100")
        self.assertEqual((len(with_rows["rows"]), [w["to"] for w in with_rows["stream"]]), (3, [100]))
        # Positions beyond the 8,192 that the shape was made for.
        made_up = self.result("--windows", "0", "--stream", "10000")["stream"]
        self.assertEqual([window["to"] for window in made_up], [4096, 8192, 10000])
        self.assertIn("streaming_llm over 5000 tokens", self.eval("--text", path, "--windows", "0", "--stream", "5000"))

    def test_streams(self):
        """Several streams begin evenly over the text; a window tells of all of them."""
        path = self.file("text.txt", TEXT)
        both = self.result("--text", path, "--windows", "0", "--stream", "5000", "--streams", "2")
        first = self.result("--text", path, "--windows", "0", "--stream", "5000")
        behind = self.result("--text", self.file("end.txt", TEXT[-5001:]), "--windows", "0", "--stream", "5000")  # a token a byte
        self.assertEqual((both["streams"], first["streams"]), (2, 1))
        for all_of, *singles in zip(both["stream"], first["stream"], behind["stream"]):
            for key in ("ppl", "ppl_anew"):
                self.assertAlmostEqual(all_of[key], math.sqrt(singles[0][key] * singles[1][key]), delta=1e-6 * all_of[key])
            ppl = [single["ppl"] for single in singles]
            self.assertAlmostEqual(all_of["ppl_least"], min(ppl), delta=1e-6 * min(ppl))
            self.assertAlmostEqual(all_of["ppl_most"], max(ppl), delta=1e-6 * max(ppl))
        n = [window["to"] - window["from"] for window in both["stream"]]
        mean = math.exp(sum(w * math.log(window["ppl"]) for w, window in zip(n, both["stream"])) / sum(n))
        for window in both["stream"]:
            self.assertAlmostEqual(window["by_first_two"], window["ppl"] / mean, delta=1e-6)
        self.assertIn("2 streams", self.eval("--text", path, "--windows", "0", "--stream", "5000", "--streams", "2"))
        self.assertEqual(self.result("--text", path, "--windows", "0", "--stream", "1000000", "--streams", "3")["streams"], 1)

    def test_picture(self):
        path = os.path.join(self.folder.name, "a.svg")
        self.eval("--windows", "1", "--prompt", "128", "--tasks", "0", "--svg", path)
        root = xml.parse(path).getroot()
        words = "".join(root.itertext())
        for name in POLICIES:
            self.assertIn(name, words)
        titles = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
        kept, hits = ([title for title in titles if re.fullmatch(r"layer \d, head \d: " + words, title)] for words in (r"\d+ tokens", r"hit rate \d+\.\d %"))
        self.assertEqual((len(titles), len(kept), len(hits)), (LANES * 6, LANES * 2, LANES * 4))  # a heat map a share; of hit rates for snapkv too
        self.eval("--windows", "1", "--prompt", "128", "--tasks", "0", "--policies", "random", "--svg", path)
        self.assertEqual(list(xml.parse(path).getroot().iter("{http://www.w3.org/2000/svg}title")), [])
        self.eval("--windows", "1", "--prompt", "128", "--tasks", "0", "--keep", "1", "--recovery", "1", "--policies", "random,kv_compress", "--svg", path)
        self.assertNotRegex(xml.tostring(xml.parse(path).getroot(), "unicode"), r"nan|inf\b")
        self.refused("eval", "--dummy", "tiny", "--svg", os.path.join(self.folder.name, "no", "a.svg"), says="--svg")
        self.refused("eval", "--dummy", "tiny", "--svg", path, "--windows", "0", "--stream", "10", says="--svg")

    def test_table(self):
        printed = self.eval("--windows", "1", "--prompt", "256", "--tasks", "1", "--policies", "snapkv,kv_compress")
        self.assertIn("made up", printed)
        self.assertRegex(printed, r"\| none +\| +1 \| +32\.0 \| +0\.00000 \|")
        self.assertRegex(printed, r"\| kv_compress +\| +0\.25 \| +8\.0 \|")
        self.assertIn("of 5 depths", printed)
        self.assertIn("paired bootstrap", printed)

    def test_wrong_options(self):
        for flags, says in ((["--keep", "0"], "--keep"), (["--keep", "1.01"], "--keep"), (["--keep", "0.5,"], "--keep"), (["--keep", ""], "--keep"),
                            (["--keep", "nan"], "--keep"), (["--keep", "0x1p-1x"], "--keep"), (["--keep", ",".join(["0.5"] * 17)], "--keep"),
                            (["--policies", "snapvk"], ["snapvk", "kv_compress"]), (["--policies", "x" * 400], "--policies"), (["--prompt", "100"], "--prompt"),
                            (["--prompt", "8000"], "8192"), (["--windows", "0"], "--windows"), (["--windows", "-1"], "--windows"), (["--pooling-kernel", "4"], "pooling_kernel"),
                            (["--rounds", "3"], "belongs to kvasir bench"), (["--stream", "x"], "--stream"),
                            (["--streams", "2"], "--streams"), (["-m", "x.gguf"], "--dummy")):
            self.refused("eval", "--dummy", "tiny", *flags, says=says)
        self.refused("eval", "--dummy", "tiny", "--prompt", "127", says="128")
        self.assertIn("at least 128", self.works("eval", "--help"))  # the table of options knows the word auto and no least number beside it
        self.refused("eval", says="model: none given")
        self.refused("eval", "--json", "absent.gguf", says="absent.gguf")
        self.refused("bench", "--svg", "x", says="belongs to kvasir eval")


if __name__ == "__main__":
    unittest.main()
