"""Compression through HTTP: a request asks for it, memory comes free within a step, others are admitted with it, the report and the counters say so, the operator's limits hold.

KVASIR_TEST_LONG=1: a stream of 32,000 tokens instead of 4,000."""
import json
import os
import tempfile
import unittest

import harness

LANES = 90  # of the sample model: 30 layers x 3 heads
BLOCK = 32
LONG = os.environ.get("KVASIR_TEST_LONG", "") not in ("", "0")
PATIENCE = 1800 if harness.SHORT else 300  # seconds: a prompt of 4,096 tokens on a slow machine
FIELDS = {"policy", "tokens_seen", "slots_kept", "slots_evicted", "blocks", "bytes", "heads", "hit_rate", "hit_rate_heads", "pressure_compressions"}


def prompt(count, seed=1):
    """Token ids that are no text in particular."""
    return [1000 + (i * 7919 + i * i * 31 + seed * 104729) % 40000 for i in range(count)]


class Stream:
    """A streamed completion, chunk by chunk."""

    def __init__(self, daemon, **fields):
        self.connection = daemon.stream(**fields)
        self.connection.socket.settimeout(PATIENCE)
        self.head = self.connection.read_head()
        assert self.head.status == 200, (self.head, self.connection.read_to_end())
        self.pending = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.connection.close()

    def next(self):
        """The next event's JSON; None at [DONE]."""
        while True:
            while b"\n\n" not in self.pending:
                self.pending += self.connection.read_chunk()
            block, self.pending = self.pending.split(b"\n\n", 1)
            if block.startswith(b"data: "):
                return None if block == b"data: [DONE]" else json.loads(block[6:])

    def rest(self):
        chunks = []
        while (chunk := self.next()) is not None:
            chunks.append(chunk)
        return chunks


class CompressionCase(harness.DaemonCase):
    def used(self):
        return self.daemon.load()[2]

    def patient(self, **fields):
        with self.daemon.stream(**{"stream": False, **fields}) as connection:
            connection.socket.settimeout(PATIENCE)
            response = connection.read_response()
        self.assertEqual(response.status, 200, response)
        return response.json()

    def assertReport(self, kv, policy, seen, lanes=LANES):
        self.assertEqual(set(kv), FIELDS, kv)
        self.assertEqual((kv["policy"], kv["tokens_seen"]), (policy, seen), kv)
        self.assertEqual(kv["slots_kept"] + kv["slots_evicted"], seen * lanes, kv)
        self.assertEqual(set(kv["heads"]), {"min", "median", "max"})
        self.assertLessEqual(kv["heads"]["min"], kv["heads"]["median"])
        self.assertLessEqual(kv["heads"]["median"], kv["heads"]["max"])
        self.assertLessEqual(kv["slots_kept"], kv["blocks"] * BLOCK)
        self.assertGreater(kv["slots_kept"] + BLOCK * lanes, kv["blocks"] * BLOCK, "more than one block a lane is not full")
        page = self.daemon.metrics()
        total = sum(v for k, v in page.items() if k.startswith("kvasir_kv_cache_blocks{") and 'state="total"' in k)
        memory = sum(v for k, v in page.items() if k.partition("{")[0] == "kvasir_kv_cache_bytes")
        self.assertEqual(kv["bytes"], kv["blocks"] * memory / total)


class Real(CompressionCase):
    """A pool of 5,600 tokens for sequences of 4,608."""

    @classmethod
    def start(cls):
        return harness.Daemon("-m", harness.sample_model(), "--max-model-len", "4608", "--kv-memory", "128MiB", "--max-sequences", "4", "--kv-dtype", "f16")

    def test_memory_comes_free_and_others_are_admitted(self):
        length = 2048 if harness.SHORT else 4096
        budget = length // 8
        before = self.daemon.metrics()
        with Stream(self.daemon, prompt=prompt(length), max_tokens=24, ignore_eos=True, temperature=0, stream_options={"include_usage": True},
                    kv={"policy": "kv_compress", "budget_tokens": budget, "report": True}) as stream:
            self.assertIn("choices", stream.next())  # drawn in the step that ended the prompt
            stream.next()  # one step later
            self.assertLessEqual(self.used(), budget * LANES // BLOCK + LANES)
            chunks = stream.rest()
        reports = [chunk["kv"] for chunk in chunks if "kv" in chunk]
        self.assertEqual(len(reports), 1, "with the last chunk")
        self.assertIn("kv", chunks[-1])
        self.assertReport(reports[0], "kv_compress", length + 23)
        self.assertLessEqual(reports[0]["blocks"], budget * LANES // BLOCK + LANES)
        self.assertTrue(0 < reports[0]["hit_rate"] <= 1, reports)
        rates = [rate for heads in reports[0]["hit_rate_heads"] for rate in heads]
        self.assertEqual(len(rates), LANES)
        self.assertTrue(0 <= min(rates) < reports[0]["hit_rate"] < max(rates) <= 1, reports)
        self.daemon.wait_idle()
        after = self.daemon.metrics()
        grown = {series: after[series] - before.get(series, 0) for series in after}
        pick = lambda name, *parts: sum(v for k, v in grown.items() if k.partition("{")[0] == "kvasir_" + name and all(p in k for p in parts))
        self.assertEqual(pick("compressions_total", 'policy="kv_compress"', 'trigger="prompt_end"'), 1)
        self.assertEqual(pick("kv_slots_evicted_total"), reports[0]["slots_evicted"])
        self.assertEqual(pick("kv_layer_slots_kept_total"), pick("kv_slots_kept_total"))
        self.assertAlmostEqual(pick("kv_layer_hits_total", 'key="kept"') / pick("kv_layer_hits_total"), reports[0]["hit_rate"])
        self.assertGreaterEqual(pick("kv_blocks_freed_total"), (length - budget) * LANES // BLOCK - LANES)
        self.assertGreater(pick("compression_seconds_total"), 0)

    def test_a_request_that_did_not_fit_is_admitted(self):
        if harness.SHORT:
            self.skipTest("takes a prompt that fills the pool")
        before = self.daemon.gauge("admissions_by_compression_total")
        with self.daemon.stream(prompt=prompt(4096, 2), max_tokens=200, ignore_eos=True, temperature=0, kv={"policy": "snapkv", "budget_tokens": 512}) as first:
            harness.wait_until(lambda: self.daemon.load()[0] == 1, "the first one runs")
            with self.daemon.stream(stream=False, prompt=prompt(2048, 3), max_tokens=2, ignore_eos=True, temperature=0, kv={"policy": "none", "report": True}) as second:
                harness.wait_until(lambda: self.daemon.load()[1] == 1, "the second one waits")
                first.socket.settimeout(PATIENCE)
                second.socket.settimeout(PATIENCE)
                report = second.read_response().json()["kv"]
                self.assertEqual(self.daemon.load()[0], 1, "the first one has ended before the second was served")
            self.assertReport(report, "none", 2049)
            self.assertEqual(report["slots_evicted"], 0)
            self.assertEqual(len(harness.events(first.read_response().body)), 200)
        self.assertEqual(self.daemon.gauge("admissions_by_compression_total"), before + 1)

    def test_what_fits_is_as_without(self):
        texts = [self.patient(prompt="The capital of France is", max_tokens=12, temperature=0, logprobs=1, kv=kv)["choices"][0]
                 for kv in ({}, {"policy": "snapkv", "budget_tokens": 512}, {"policy": "h2o", "keep_ratio": 1}, {"policy": "streaming_llm", "budget_tokens": 256})]
        self.assertIn("Paris", texts[0]["text"])
        for text in texts[1:]:
            self.assertEqual(text, texts[0])


class Endless(CompressionCase):
    """Streams that go on beyond what the model may have in its context."""

    budget = 1024 if LONG else 128

    @classmethod
    def start(cls):
        return harness.Daemon("-m", harness.sample_model(), "--max-model-len", "2048" if LONG else "512", "--max-sequences", "2", "--kv-memory", "64MiB",
                              "--request-timeout", "3600")

    def test_blocks_stay_as_many_as_they_were(self):
        count = 32000 if LONG else harness.rounds(4000, 700)
        most = (self.budget + 32 + 2 * BLOCK) * LANES // BLOCK
        with Stream(self.daemon, prompt="Once upon a time", max_tokens=count, ignore_eos=True, temperature=1, seed=5,
                    kv={"policy": "streaming_llm", "budget_tokens": self.budget, "report": True}) as stream:
            seen, kv, usage = 0, None, set()
            while (chunk := stream.next()) is not None:
                seen += 1
                kv = chunk.get("kv", kv)
                if seen > self.budget + 64 and seen % 100 == 0 and kv is None:
                    used = self.used()
                    if used > 0:  # a reader that is behind may look when the stream has ended
                        usage.add(used)
        self.assertIsNotNone(kv)
        self.assertGreaterEqual(kv["tokens_seen"], count)
        self.assertGreater(len(usage), 0)
        self.assertLessEqual(max(usage), most, usage)
        self.assertGreaterEqual(min(usage), self.budget * LANES // BLOCK - 2 * LANES, usage)
        self.assertReport(kv, "streaming_llm", kv["tokens_seen"])

    def test_without_it_the_context_is_the_end(self):
        for kv in ({"policy": "none"}, {"policy": "streaming_llm", "budget_tokens": 4096}, {"policy": "streaming_llm", "keep_ratio": 0.5},
                   {"policy": "keydiff", "budget_tokens": 64}):
            response = self.daemon.complete(prompt="Once", max_tokens=3000, ignore_eos=True, kv=kv)
            self.assertError(response, 400, param="prompt" if response.json()["error"]["param"] == "prompt" else "max_tokens",
                             code="context_length_exceeded")


class Limits(CompressionCase):
    """What may be asked for; without a model."""

    def test_every_policy_may_be_asked_for(self):
        for policy in ("none random streaming_llm h2o scissorhands fastgen snapkv pyramidkv ada_snapkv ada_pyramidkv kv_compress expected_attention "
                       "keydiff tova").split():
            body = self.daemon.complete(prompt="x" * 200, max_tokens=60, ignore_eos=True, kv={"policy": policy, "budget_tokens": 64, "report": True}).json()
            self.assertEqual(body["usage"]["completion_tokens"], 60, body)
            lanes = (body["kv"]["slots_kept"] + body["kv"]["slots_evicted"]) // body["kv"]["tokens_seen"]
            self.assertReport(body["kv"], policy, 259, lanes)
            if policy not in ("none", "fastgen"):
                self.assertGreater(body["kv"]["slots_evicted"], 0)
            self.assertNotIn("kv", self.daemon.complete(max_tokens=1, kv={"policy": policy}).json())

    def test_wishes_that_make_no_sense(self):
        for kv, field in (({"policy": "snap"}, "kv.policy"), ({"policy": 3}, "kv.policy"), ({"policy": ""}, "kv.policy"),
                          ({"policy": "snapkv", "budget_tokens": 35}, "kv.budget_tokens"), ({"policy": "snapkv", "budget_tokens": 0}, "kv.budget_tokens"),
                          ({"policy": "snapkv", "budget_tokens": -1}, "kv.budget_tokens"), ({"policy": "snapkv", "budget_tokens": "64"}, "kv.budget_tokens"),
                          ({"policy": "snapkv", "keep_ratio": 0}, "kv.keep_ratio"), ({"policy": "snapkv", "keep_ratio": 1.01}, "kv.keep_ratio"),
                          ({"policy": "snapkv", "keep_ratio": 0.5, "budget_tokens": 64}, "kv.keep_ratio"),
                          ({"budget_tokens": 64}, "kv.budget_tokens"), ({"keep_ratio": 0.5}, "kv.keep_ratio"),
                          ({"policy": "snapkv", "budget_tokens": 64, "protect_tokens": 60}, "kv.protect_tokens"),
                          ({"policy": "snapkv", "protect_tokens": -1}, "kv.protect_tokens"), ({"policy": "snapkv", "report": 1}, "kv.report"), ([], "kv"),
                          ({"policy": "snapkv\u0000"}, "kv.policy"), ({"polizy": "snapkv"}, "kv.polizy"), ({"Policy": "snapkv"}, "kv.Policy")):
            with self.subTest(kv=kv):
                self.assertError(self.daemon.complete(kv=kv), 400, param=field)
        self.assertWorks()

    def test_candidates_are_summed(self):
        body = self.daemon.complete(prompt="y" * 100, n=3, max_tokens=20, ignore_eos=True, kv={"policy": "keydiff", "budget_tokens": 64, "report": True}).json()
        one = self.daemon.complete(prompt="y" * 100, max_tokens=20, ignore_eos=True, kv={"policy": "keydiff", "budget_tokens": 64, "report": True}).json()
        for name in ("tokens_seen", "slots_kept", "slots_evicted", "blocks", "bytes"):
            self.assertEqual(body["kv"][name], 3 * one["kv"][name], name)

    def test_heads_of_all_choices(self):
        """The median is that of all heads of all of them, whichever prompt they answer and whoever ends last."""
        lengths = [10, 200, 20, 100, 30]
        for order in (lengths, lengths[::-1], sorted(lengths)):
            body = self.daemon.complete(prompt=["p" * length for length in order], max_tokens=1, kv={"report": True}).json()
            self.assertEqual(body["kv"]["heads"], {"min": 10, "median": 30, "max": 200}, order)
        seen = set()
        for seed in range(20):
            fields = {"prompt": "q" * 10, "n": 3, "seed": seed, "max_tokens": 60, "stop_token_ids": list(range(0, 256, 16)), "return_token_ids": True}
            body = self.daemon.complete(kv={"report": True}, **fields).json()
            ends = sorted(10 + len(choice["token_ids"]) - 1 for choice in body["choices"])
            self.assertEqual(body["kv"]["heads"], {"min": ends[0], "median": ends[1], "max": ends[2]}, body)
            seen.add(tuple(ends))
        self.assertGreater(len(seen), 5)


class Operator(CompressionCase):
    """[compression] in the configuration file."""

    @classmethod
    def start(cls):
        cls.file = tempfile.NamedTemporaryFile("w", suffix=".toml")
        cls.file.write('[compression]\npolicy = "snapkv"\nbudget_tokens = 100\nallowed_policies = "tova, random"\nmin_budget = 80\nmay_disable = false\n')
        cls.file.flush()
        cls.addClassCleanup(cls.file.close)
        return harness.Daemon(*harness.MOCK, "--config", cls.file.name)

    def ask(self, **kv):
        return self.daemon.complete(prompt="z" * 300, max_tokens=2, ignore_eos=True, kv=kv)

    def test_limits(self):
        for kv, field in (({"policy": "h2o"}, "kv.policy"), ({"policy": "none"}, "kv.policy"), ({"budget_tokens": 79}, "kv.budget_tokens"),
                          ({"policy": "tova", "budget_tokens": 79}, "kv.budget_tokens")):
            with self.subTest(kv=kv):
                self.assertError(self.ask(**kv), 400, param=field)

    def test_what_is_allowed(self):
        for kv, policy, budget in (({}, "snapkv", 100), ({"policy": "tova"}, "tova", 100), ({"policy": "random", "budget_tokens": 80}, "random", 80)):
            report = self.ask(report=True, **kv).json()["kv"]
            self.assertEqual((report["policy"], report["heads"]["max"]), (policy, budget + 1), report)
        self.assertNotIn("kv", self.daemon.complete(prompt="z" * 300, max_tokens=2).json())
        self.assertGreaterEqual(self.daemon.gauge("compressions_total"), 4)


if __name__ == "__main__":
    unittest.main()
