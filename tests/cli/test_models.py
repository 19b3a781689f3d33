"""Model files, good, broken and hostile: each ends in a description or in one clear line and exit 2, never in a crash."""
import os
import random
import re
import struct
import unittest

import tiny_gguf as gguf
from program import SHORT, Case, kvasir


class Models(Case):
    def test_inspect_describes(self):
        path = self.file("tiny.gguf", gguf.build())
        printed = self.works("inspect", path)
        steady = lambda text: re.sub(r" of [0-9.]+ [KMGT]?i?B available", "", text)  # the machine's other processes come and go
        self.assertEqual(steady(printed), steady(self.works("inspect", "-m", path)))
        for words in ("architecture     llama", "layers           1", "11 x F32", "257 tokens", "KV cache", "weights"):
            self.assertIn(words, printed)

    def test_inspect_says_what_a_context_and_a_concurrency_take(self):
        path = self.file("tiny.gguf", gguf.build())
        # One lane of head dimension 16, f32: 32 slots of K and V and a position are 32 * (2 * 16 * 4 + 4) bytes at least.
        printed = self.works("inspect", path, "--max-model-len", "128", "--max-sequences", "3", "--kv-dtype", "f32", "--backend", "reference")
        self.assertIn("a sequence of 128 tokens (1 lanes, f32)", printed)
        self.assertIn("for 3 of them", printed)

    def test_what_has_no_such_device(self):
        path = self.file("tiny.gguf", gguf.build())
        self.refused("inspect", path, "--backend", "reference", "--device", "1", says=["engine.backend: reference: no device 1"])
        self.refused("bench", path, "--backend", "cpu", "--device", "2", says=["engine.backend: cpu: no device 2"])
        words = self.refused("inspect", path, "--backend", "cuda", "--device", "63")
        self.assertRegex(words, r'engine\.backend: (this build has no "cuda"|cuda: no CUDA device)')

    def test_f16_weights_are_said_to_change_nothing(self):
        """Where there is no device to widen them for. The file's own types are what such a backend reads, and need no word."""
        path = self.file("tiny.gguf", gguf.build())
        commands = {"inspect": (), "bench": ("-p", "4", "-n", "0", "-r", "1")}
        for command, more in commands.items():
            for backend in ("cpu", "reference", "mock") if command == "inspect" else ("cpu",):
                done = kvasir(command, path, "--backend", backend, "--weights", "f16", *more)
                words = done.stderr.decode()
                self.assertEqual((done.returncode, words.count("\n")), (0, 1), words)
                self.assertRegex(words, rf'warn +engine\.weights: "f16" changes nothing, the {backend} backend ')
                self.works(command, path, "--backend", backend, "--weights", "native", *more)

    def test_what_is_no_model(self):
        self.refused("inspect", os.path.join(self.folder.name, "absent.gguf"), says=["absent.gguf", "No such file"])
        self.refused("inspect", self.folder.name, says=self.folder.name)
        self.refused("inspect", "/dev/zero", says="/dev/zero")
        for name, content in (("empty", b""), ("text", b"hello, world\n" * 100), ("magic", b"GGUF"), ("zeros", bytes(4096)), ("big-endian", b"GGUF\0\0\0\3" + bytes(100))):
            self.refused("inspect", self.file(name, content), says=name)
        self.refused("inspect", self.file("new\nline.gguf", b"x"), says="new?line.gguf")

    def test_where_a_model_was_named(self):
        absent, text = "/nowhere/model.gguf", self.file("text.gguf", b"hello")
        for model, says in ((absent, "No such file"), (text, "text.gguf")):
            path = self.file("kvasir.toml", "[server]\nport = 0\n[engine]\nthreads = 1\n")
            named = self.file("named.toml", f"# the model\nmodel = '{model}'\n")
            for arguments in (("check-config", named), ("check-config", "--config", named), ("serve", "--config", named), ("inspect", "--config", named)):
                self.refused(*arguments, says=[f"kvasir: {named}:2: model: {model}: ", says])
            for command in (("check-config", path), ("check-config", named), ("serve", "--config", named), ("bench",)):
                self.refused(*command, environment={"KVASIR_MODEL": model}, says=[f"kvasir: KVASIR_MODEL: {model}: ", says])
                self.refused(*command, "--model", model, environment={"KVASIR_MODEL": absent}, says=[f"kvasir: --model: {model}: ", says])
            self.refused("serve", "--config", named, model, environment={"KVASIR_MODEL": absent}, says=[f"kvasir: model: {model}: ", says])
        good = self.file("good.gguf", gguf.build())
        named = self.file("named.toml", f"model = '{good}'\n")
        # What is wrong is not the model, though the words speak of it.
        for command in (("check-config", named), ("serve", "--config", named)):
            self.refused(*command, "--max-model-len", "1000000", says="kvasir: engine.max_model_len: 1000000 tokens; the model was trained for ")

    def test_wrong_keys(self):
        cases = [
            (gguf.changed("general.architecture", gguf.STRING, "mamba"), "mamba"),
            (gguf.changed("general.architecture"), "general.architecture"),
            (gguf.changed("llama.block_count", gguf.U32, 0), "llama.block_count"),
            (gguf.changed("llama.block_count", gguf.U32, 2), "blk.1"),
            (gguf.changed("llama.block_count", gguf.U32, 0xFFFFFFFF), "llama.block_count"),
            (gguf.changed("llama.block_count", gguf.STRING, "one"), "llama.block_count"),
            (gguf.changed("llama.embedding_length", gguf.U32, 64), "token_embd.weight"),
            (gguf.changed("llama.attention.head_count", gguf.U32, 0), "llama.attention.head_count"),
            (gguf.changed("llama.attention.head_count_kv", gguf.U32, 3), "3 KV heads"),
            (gguf.changed("llama.context_length", gguf.U32, 0), "llama.context_length"),
            (gguf.changed("llama.attention.layer_norm_rms_epsilon", gguf.F32, float("nan")), "layer_norm_rms_epsilon"),
            (gguf.changed("tokenizer.ggml.model", gguf.STRING, "bert"), "bert"),
            (gguf.changed("tokenizer.ggml.pre", gguf.STRING, "nonesuch"), "nonesuch"),
            (gguf.changed("tokenizer.ggml.tokens", gguf.ARRAY, (gguf.STRING, ["a", "b"])), "token"),
            (gguf.changed("tokenizer.ggml.tokens", gguf.ARRAY, (gguf.I8, [1, 2, 3])), "tokenizer.ggml.tokens"),
            (gguf.changed("tokenizer.ggml.merges", gguf.ARRAY, (gguf.STRING, ["no-space"])), "tokenizer.ggml.merges"),
            (gguf.changed("tokenizer.ggml.eos_token_id", gguf.U32, 1 << 31), "tokenizer.ggml.eos_token_id"),
            (gguf.build(version=99), "99"),
            (gguf.build(gguf.keys() + [("general.name", gguf.STRING, "again")]), "general.name"),
            (gguf.build(tensors_list=gguf.tensors()[:-1]), "ffn_down"),
            (gguf.build(tensors_list=gguf.tensors() + [("blk.0.surprise.weight", (4,), [0.0] * 4)]), "surprise"),
        ]
        for content, says in cases:
            self.refused("inspect", self.file("wrong.gguf", content), says=["wrong.gguf", says])

    def test_counts_that_lie(self):
        good = gguf.build()
        for offset in (8, 16):  # tensors, keys
            for count in (1 << 63, (1 << 64) - 1, 1 << 40, 65537):
                self.refused("inspect", self.file("lies.gguf", good[:offset] + struct.pack("<Q", count) + good[offset + 8:]), says="lies.gguf")
        at = good.index(b"general.architecture")
        for length in (1 << 63, (1 << 64) - 1, (1 << 64) - 8, 1 << 32):
            self.refused("inspect", self.file("lies.gguf", good[: at - 8] + struct.pack("<Q", length) + good[at:]), says="lies.gguf")
        at = good.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight")
        for dims in ((1 << 63, 2), (1 << 32, 1 << 32), (0, 32), (1 << 62, 4)):
            self.refused("inspect", self.file("lies.gguf", good[: at + 4] + struct.pack("<QQ", *dims) + good[at + 20:]), says="lies.gguf")
        for offset in ((1 << 64) - 32, 1 << 62, 31, len(good)):
            self.refused("inspect", self.file("lies.gguf", good[: at + 24] + struct.pack("<Q", offset) + good[at + 32:]), says="lies.gguf")

    def test_cut_anywhere(self):
        good = gguf.build()
        header = good.index(b"token_embd.weight")
        cuts = sorted({*range(0, 64), *range(64, header + 700, 211 if SHORT else 23), *range(header + 700, len(good), len(good) // 20), len(good) - 1})
        for cut in cuts:
            self.refused("inspect", self.file("cut.gguf", good[:cut]), says="cut.gguf")

    def test_flipped_bits(self):
        good = gguf.build()
        end = good.index(b"blk.0.ffn_down.weight") + 60  # weights may hold anything
        generator = random.Random(7)
        refused = 0
        for round_number in range(60 if SHORT else 400):
            bad = bytearray(good)
            for _ in range(generator.choice((1, 1, 1, 4, 16))):
                bad[generator.randrange(end)] ^= 1 << generator.randrange(8)
            path = self.file("flipped.gguf", bytes(bad))
            done = kvasir("inspect", path, "--max-sequences", "2")
            self.assertIn(done.returncode, (0, 2), (round_number, done.stderr))
            if done.returncode == 2:
                refused += 1
                self.assertEqual(done.stderr.count(b"\n"), 1, done.stderr)
                self.assertTrue(done.stderr.startswith(b"kvasir: "), done.stderr)
        self.assertGreater(refused, 20)


if __name__ == "__main__":
    unittest.main()
