"""kvasir bench: its options, its JSON. That its numbers are true is tests/bench's business; here they must only be numbers of what was asked for."""
import json
import unittest

import tiny_gguf as gguf
from program import Case, kvasir


class Bench(Case):
    def rows(self, *arguments):
        printed = self.works("bench", "--json", "-r", "3", *arguments)
        result = json.loads(printed)
        self.assertEqual(printed.count("\n"), 1)
        for key in ("model", "commit", "cpu"):
            self.assertIsInstance(result[key], str)
            self.assertTrue(result[key])
        self.assertIsInstance(result["threads"], int)
        self.assertGreater(result["copy_gb_s"], 0)
        for row in result["rows"]:
            bound = {"weight_bytes", "kv_bytes", "bound_tok_s", "of_bound", "host_us", "steps_ahead"} if row["test"] == "tg" else set()
            self.assertEqual(set(row), {"test", "batch", "n_prompt", "n_gen", "context", "tok_s", "tok_s_min", "tok_s_max", "rounds"} | bound)
            self.assertEqual(row["rounds"], 3)
            self.assertTrue(0 < row["tok_s_min"] <= row["tok_s"] <= row["tok_s_max"], row)
        return result, [(row["test"], row["batch"], row["n_prompt"], row["n_gen"], row["context"]) for row in result["rows"]]

    def test_rows_are_what_was_asked_for(self):
        result, rows = self.rows("--dummy", "tiny", "-p", "5,40", "-n", "7", "-b", "1,3", "-d", "33", "-t", "1")
        self.assertEqual(rows, [("pp", 1, 5, 0, 0), ("pp", 1, 40, 0, 0), ("tg", 1, 0, 7, 33), ("tg", 3, 0, 7, 33)])
        self.assertEqual((result["model"], result["threads"]), ("tiny", 1))

    def test_parts_can_be_left_out(self):
        self.assertEqual(self.rows("--dummy", "tiny", "-p", "0", "-n", "4", "-b", "2", "-d", "0")[1], [("tg", 2, 0, 4, 0)])
        self.assertEqual(self.rows("--dummy", "tiny", "-p", "9", "-n", "0")[1], [("pp", 1, 9, 0, 0)])

    def test_prompt_longer_than_a_step(self):
        self.assertEqual(self.rows("--dummy", "tiny", "-p", "100", "-n", "0", "--max-rows", "32")[1], [("pp", 1, 100, 0, 0)])

    def test_a_file_on_every_backend_and_dtype(self):
        path = self.file("tiny.gguf", gguf.build())
        for backend in ("reference", "cpu"):
            for dtype in ("f32", "f16", "bf16", "q8"):
                result, _ = self.rows(path, "--backend", backend, "--kv-dtype", dtype, "-p", "4", "-n", "2", "-b", "1", "-d", "4")
                self.assertEqual((result["model"], result["kv_dtype"]), ("tiny", dtype))

    def test_phases(self):
        printed = self.works("bench", "--json", "--phases", "--dummy", "tiny", "--backend", "reference", "-p", "40", "-n", "6", "-b", "1,2", "-d", "8", "-r", "2", "--max-rows", "32")
        result = json.loads(printed)
        self.assertGreater(result["ceilings"]["gmac_s"], 0)
        self.assertGreater(result["ceilings"]["gb_s"], 0)
        names = ["EMBED", "ATTN_IN", "ATTN", "ATTN_OUT", "MLP_IN", "MLP_OUT", "HEAD"]
        self.assertEqual([(row["test"], row["batch"], row["phase"]) for row in result["phases"]],
                         [(*test, name) for test in (("pp", 1), ("tg", 1), ("tg", 2)) for name in names])
        for row in result["phases"]:
            self.assertGreater(row["us"], 0, row)
            self.assertGreater(row["gb_s"], 0, row)
        # tiny: 2 layers, 64 wide, 4 heads on 2 KV heads, feed forward 128. MLP_IN of 40 rows is 2 * 40 * 2 * 64 * 128 multiply-adds.
        mlp = result["phases"][4]
        self.assertAlmostEqual(mlp["gmac_s"] * mlp["us"] * 1e3, 2 * 40 * 2 * 64 * 128, delta=1)
        # Attention of a prompt of 40: each row sees itself and those before it; 2 * 4 heads * 16 dimensions a slot, 2 layers.
        attention = result["phases"][2]
        self.assertAlmostEqual(attention["gmac_s"] * attention["us"] * 1e3, 2 * 2 * 4 * 16 * 40 * 41 / 2, delta=1)

    def test_bound_is_what_a_step_must_read(self):
        # tiny: 2 layers of 64 x (64 + 32 + 32 + 64) and 3 x 64 x 128 weights, a head of 320 x 64, all Q8_0: 34 bytes for 32. 5 norms of 64 f32. 4 lanes, head_dim 16.
        weights = (2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128) + 320 * 64) / 32 * 34 + 5 * 64 * 4
        for dtype, slot in (("f32", 128), ("f16", 64), ("q8", 40)):
            result, _ = self.rows("--dummy", "tiny", "--backend", "reference", "--kv-dtype", dtype, "-p", "0", "-n", "7", "-b", "1,3", "-d", "33")
            for row in result["rows"]:
                self.assertEqual(row["weight_bytes"], weights)
                self.assertEqual(row["kv_bytes"], row["batch"] * 4 * (33 + 8 / 2) * slot)
                bound = row["batch"] * result["copy_gb_s"] * 1e9 / (row["weight_bytes"] + row["kv_bytes"])
                self.assertAlmostEqual(row["bound_tok_s"] / bound, 1)
                self.assertAlmostEqual(row["of_bound"], row["tok_s"] / bound)
                # The host's part of a step is some of it, and what the reference computes is none of that.
                self.assertTrue(0 < row["host_us"] < 1e6 * row["batch"] / row["tok_s_min"], row)

    def test_ragged_heads_hold_less(self):
        whole, _ = self.rows("--dummy", "tiny", "-p", "0", "-n", "5", "-b", "8", "-d", "320", "-t", "1")
        ragged, rows = self.rows("--dummy", "tiny", "-p", "0", "-n", "5", "-b", "8", "-d", "320", "-t", "1", "--ragged")
        self.assertEqual(rows, [("tg", 8, 0, 5, 320)])
        share = ragged["rows"][0]["kv_bytes"] / whole["rows"][0]["kv_bytes"]
        self.assertTrue(0.4 < share < 0.7, share)  # 32 lanes, shares spread evenly between 1/16 and 1

    def test_dummies_that_the_backend_makes(self):
        # 8 billion parameters and no memory taken for them: mock reads no weights.
        result = self.requests("--backend", "mock", "--requests", "2", "-p", "40", "-n", "3", "--kv-memory", "64MiB", shape="llama-3.1-8b")
        self.assertEqual((result["model"], result["weight_bytes"]), ("llama-3.1-8b", 0))
        self.refused("bench", "--dummy", "tiny", "--backend", "mock", says="--requests")

    def requests(self, *arguments, shape="tiny"):
        printed = self.works("bench", "--json", "--dummy", shape, "-t", "1", *arguments)
        self.assertEqual(printed.count("\n"), 1)
        result = json.loads(printed)
        for run in result["runs"]:
            self.assertEqual(run["output_tokens"], run["requests"] * run["n_gen"])
            self.assertAlmostEqual(run["output_tok_s"], run["output_tokens"] / run["wall_s"])
            self.assertTrue(0 < run["reading_s"] and 0 < run["decode_s"] and run["reading_s"] + run["decode_s"] + run["compression_s"] <= run["wall_s"], run)
            self.assertTrue(0 < run["decode_steps"] < run["steps"] and 0 < run["batch_mean"] <= run["batch_max"] <= min(run["requests"], run["max_sequences"]), run)
            self.assertTrue(run["host_us"] > 0 and run["decode_bound_s"] > 0)
        return result

    def test_requests_through_the_engine(self):
        result = self.requests("--backend", "cpu", "--requests", "24", "-p", "200", "-n", "200", "--policies", "none,kv_compress", "--keep", "0.5,0.25", "--kv-memory", "800KiB", "--max-rows", "64")
        self.assertGreater(result["copy_gb_s"], 0)
        none, half, quarter = result["runs"]
        self.assertEqual([(run["policy"], run["keep"]) for run in result["runs"]], [("none", 1), ("kv_compress", 0.5), ("kv_compress", 0.25)])
        for run in result["runs"]:
            self.assertEqual((run["requests"], run["n_prompt"], run["n_gen"], run["max_sequences"], run["kv_limit_bytes"]), (24, 200, 200, 24, 800 << 10))
            self.assertTrue(0.98 * run["kv_limit_bytes"] < run["pool_bytes"] + run["ring_bytes"] <= run["kv_limit_bytes"], run)
        # Memory is what limits the batch: 336 blocks, of which a prompt takes 28 and a whole sequence 52.
        self.assertEqual((none["ring_bytes"], none["compressions"], none["slots_kept"], none["ratio"]), (0, 0, 1, 0))
        self.assertLessEqual(none["batch_max"], 12)
        self.assertLess(none["batch_mean"], 9)
        for run, keep in ((half, 0.5), (quarter, 0.25)):
            self.assertEqual(run["ring_bytes"], 24 * 2 * 32 * 64 * 2)  # sequences, layers, window, queries' width, f16
            self.assertGreaterEqual(run["compressions"], 24)
            self.assertTrue(keep - 0.05 < run["slots_kept"] < keep + 0.15, run)  # whole blocks within the budget, and what came since
            self.assertTrue(0 < run["compression_s"] and 0 < run["compression_share"] < 1)
            self.assertAlmostEqual(run["ratio"], run["output_tok_s"] / none["output_tok_s"])
            self.assertAlmostEqual(run["ratio_of_steps"], (none["reading_s"] + none["decode_s"]) / (run["reading_s"] + run["decode_s"]))
            self.assertAlmostEqual(run["of_steps"], run["ratio"] / run["ratio_of_steps"])
        self.assertGreater(quarter["batch_mean"], none["batch_mean"])

    def test_requests_with_several_prompts(self):
        result = self.requests("--backend", "mock", "--requests", "3", "-p", "5,70", "-n", "4", "--max-sequences", "2")
        self.assertEqual([(run["n_prompt"], run["policy"], run["max_sequences"]) for run in result["runs"]], [(5, "none", 2), (70, "none", 2)])
        printed = self.works("bench", "--dummy", "tiny", "--backend", "cpu", "--requests", "3", "-p", "20", "-n", "4", "--policies", "streaming_llm", "--keep", "0.9")
        self.assertRegex(printed, r"\| streaming_llm +\| +0.9 \| 3 x 20\+4 +\|")

    def test_requests_that_cannot_be(self):
        for flags, says in ((["-p", "0"], "--prompt"), (["-n", "0"], "--generate"), (["-p", "8000", "-n", "500"], "8192"), (["--policies", "nonesuch"], ["nonesuch", "kv_compress"]),
                            (["--policies", ""], "--policies"), (["--keep", "0"], "--keep"), (["--keep", "1.5"], "--keep"), (["--keep", "0.5,"], "--keep"), (["--keep", "nan"], "--keep"),
                            (["--kv-memory", "1KiB"], "engine.kv_memory"), (["--kv-memory", "12KiB", "--policies", "snapkv"], "--window"), (["-p", ",".join(["9"] * 32), "--policies", "none,tova,keydiff"], "64 runs"),
                            (["--policies", "snapkv", "--triggers", "pressure,nonesuch"], "compression.triggers")):
            self.refused("bench", "--dummy", "tiny", "--requests", "2", *([] if "-p" in flags else ["-p", "20"]), *([] if "-n" in flags else ["-n", "4"]), *flags, says=says)

    def test_table(self):
        printed = self.works("bench", "--dummy", "tiny", "-p", "8", "-n", "4", "-b", "2", "-r", "2", "-d", "16")
        self.assertRegex(printed, r"\| tiny +\| +[0-9.]+ MiB \| +[0-9.]+ M \| +1 \| pp8 +\|")
        self.assertRegex(printed, r"\| +2 \| tg4 @ d16 +\|.+\| +[0-9]+ \| +[0-9.]+ % \| +[0-9.]+ \|\n")
        self.assertIn("batch 2: ", printed)

    def test_wrong_options(self):
        for flags in (["-p", "x"], ["-p", "1,,2"], ["-p", "1,"], ["-p", "-1"], ["-p", ""], ["-b", "0"], ["-b", "1,5000"], ["-n", "-1"], ["-r", "0"], ["-d", "1.5"],
                      ["-b", ",".join(["1"] * 40)], ["-b", "64", "--max-rows", "32"], ["--threads", "x"]):
            self.refused("bench", "--dummy", "tiny", *flags)
        self.refused("bench", "--dummy", "nonesuch", says=["nonesuch", "tiny"])
        self.refused("bench", "--dummy", "tiny", "-m", "x.gguf", says="--dummy")
        self.refused("bench", says="model: none given")
        self.refused("bench", "--dummy", "tiny", "-p", "0", "-n", "1000000", "-b", "4096", "--max-rows", "4096", "-d", "16777216", says="4096 sequences")
        self.assertEqual(kvasir("bench", "--json", "absent.gguf").stdout, b"")


if __name__ == "__main__":
    unittest.main()
