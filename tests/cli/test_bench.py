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
        for row in result["rows"]:
            self.assertEqual(set(row), {"test", "batch", "n_prompt", "n_gen", "context", "tok_s", "tok_s_min", "tok_s_max", "rounds"})
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

    def test_table(self):
        printed = self.works("bench", "--dummy", "tiny", "-p", "8", "-n", "4", "-b", "2", "-r", "2", "-d", "16")
        self.assertRegex(printed, r"\| tiny +\| +[0-9.]+ MiB \| +[0-9.]+ M \| +1 \| pp8 +\|")
        self.assertRegex(printed, r"\| +2 \| tg4 @ d16 +\|")

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
