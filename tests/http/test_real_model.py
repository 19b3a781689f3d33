"""The sample model through HTTP: what is said does not depend on who else is served, on chunks, on the prefix cache, or on being computed twice."""
import concurrent.futures
import json
import math
import unittest

import harness

PROMPTS = [
    "The capital of France is", "Once upon a time there was", "def fibonacci(n):\n", "1, 2, 3, 4,", "Dear Sir or Madam,", "The quick brown fox", "Water boils at",
    "北京是中国的", "Question: How many legs has a spider?\nAnswer:", "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n", "import numpy as np\n\n", "🎉🎉🎉",
    "In the year 1969,", "The three primary colours are", "Yesterday, all my", "SELECT name FROM",
]
TEXT = " ".join(f"In chapter {i} the {('miller', 'baker', 'smith', 'weaver')[i % 4]} counted {i * i} sacks and wrote it down." for i in range(1, 60))


class RealCase(harness.DaemonCase):
    flags = ()

    @classmethod
    def start(cls):
        return harness.Daemon("-m", harness.sample_model(), *cls.flags)

    def choice(self, **fields):
        response = self.daemon.complete(**{"temperature": 0, **fields})
        self.assertEqual(response.status, 200, response)
        return response.json()["choices"][0]

    def text(self, prompt, **fields):
        return self.choice(prompt=prompt, **{"max_tokens": 16, **fields})["text"]

    def together(self, requests):
        """Texts of requests that run at the same time."""
        with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(lambda fields: self.text(**fields), requests))


class Default(RealCase):
    """As a newcomer starts it: -m MODEL and no options."""

    def test_greedy_alone_and_among_16(self):
        tokens = harness.rounds(16, 6)
        alone = [self.text(prompt, max_tokens=tokens) for prompt in PROMPTS]
        self.assertIn("Paris", alone[0])
        self.assertEqual(alone[0], self.text(PROMPTS[0], max_tokens=tokens))
        for _ in range(harness.rounds(2, 1)):
            self.assertEqual(self.together([{"prompt": prompt, "max_tokens": tokens} for prompt in PROMPTS]), alone)

    def test_seeded_alone_and_among_16(self):
        requests = [{"prompt": PROMPTS[i % 4], "max_tokens": 8, "temperature": 1, "seed": i} for i in range(16)]
        alone = [self.text(**fields) for fields in requests]
        self.assertGreater(len(set(alone)), 8)
        self.assertEqual(self.together(requests), alone)

    def test_echo_agrees_with_what_was_generated(self):
        """The model's own answer, given back as a prompt, is scored as it was when it was made."""
        for prompt in PROMPTS[:4]:
            answer = self.choice(prompt=self.daemon.tokens(prompt), max_tokens=8, logprobs=3, ignore_eos=True, return_tokens_as_token_ids=True)
            made = [int(name.removeprefix("token_id:")) for name in answer["logprobs"]["tokens"]]
            self.assertEqual(len(made), 8)
            scored = self.choice(prompt=self.daemon.tokens(prompt) + made, max_tokens=0, echo=True, logprobs=3, return_tokens_as_token_ids=True)["logprobs"]
            self.assertEqual(scored["token_logprobs"][-8:], answer["logprobs"]["token_logprobs"])
            self.assertEqual(scored["top_logprobs"][-8:], answer["logprobs"]["top_logprobs"])
            self.assertTrue(all(value == max(top.values()) for value, top in zip(answer["logprobs"]["token_logprobs"], answer["logprobs"]["top_logprobs"])))

    def test_probabilities_of_a_text(self):
        """Plausible as a whole: English is expected, its letters in disorder are not."""
        def nats(text):
            values = self.choice(prompt=text, max_tokens=0, echo=True, logprobs=0)["logprobs"]["token_logprobs"][1:]
            return -sum(values) / len(values)

        english = nats("It was a bright cold day in spring, and the clocks in the town were striking three when she came back from the market.")
        disorder = nats("town three market cold the from a were day clocks striking in bright the and in she spring was back came when the It")
        self.assertTrue(1 < english < 4.5, english)
        self.assertGreater(disorder, english + 1)

    def test_prefix_cache(self):
        ids = self.daemon.tokens(TEXT)[:400]
        ask = lambda tokens, **fields: self.daemon.complete(prompt=tokens, temperature=0, max_tokens=8, logprobs=2, cache_salt=fields.pop("salt", "one"), **fields).json()
        cached = lambda answer: answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        first = ask(ids)
        self.assertEqual(cached(first), 0)
        again = ask(ids)
        self.assertEqual(cached(again), 384)  # whole blocks of 32, never the last token
        self.assertEqual(again["choices"], first["choices"])
        part = ask(ids[:200] + ids[300:])
        self.assertEqual(cached(part), 192)
        self.assertEqual(part["choices"], ask(ids[:200] + ids[300:], salt="two")["choices"])
        self.assertEqual(cached(ask(ids, salt="three")), 0)  # another scope
        scored = ask(ids, echo=True)
        self.assertEqual(cached(scored), 0)  # every row is needed
        self.assertEqual(scored["choices"][0]["logprobs"]["token_logprobs"][-8:], first["choices"][0]["logprobs"]["token_logprobs"])

    def test_tokenizer_round_trip(self):
        for text in PROMPTS + [TEXT]:
            for special in (False, True):
                answer = self.daemon.post("/tokenize", {"content": text, "add_special": special, "with_pieces": False}).json()
                back = self.daemon.post("/detokenize", {"tokens": answer["tokens"]}).json()
                self.assertEqual(back["content"], text)
                self.assertEqual(answer["count"], len(answer["tokens"]))
        strings = self.daemon.post("/tokenize", {"prompt": PROMPTS[0], "return_token_strs": True}).json()["token_strs"]
        self.assertEqual("".join(strings).replace("Ġ", " "), PROMPTS[0])

    def test_lengths(self):
        for count in (1, 2, 31, 32, 33, 64):
            answer = self.daemon.complete(prompt=PROMPTS[0], max_tokens=count, ignore_eos=True).json()
            self.assertEqual((answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]), (count, "length"))


class Tight(RealCase):
    """Room for little: prompts in small chunks, sequences that give their blocks back and are computed again. The same words all the same."""

    flags = ("--max-model-len", "512", "--max-sequences", "16", "--max-rows", "48", "--kv-memory", "36MiB", "--kv-dtype", "f16")

    def test_nothing_changes(self):
        requests = [{"prompt": TEXT[60 * i : 60 * i + 500], "max_tokens": harness.rounds(96, 48), "ignore_eos": True} for i in range(12)]
        few = requests[: harness.rounds(12, 4)]
        alone = [self.text(**fields) for fields in few]
        before = {name: self.daemon.gauge(name) for name in ("preemptions_total", "prompt_chunks_total")}
        for _ in range(3):
            self.assertEqual(self.together(requests)[: len(few)], alone)
            counts = {name: self.daemon.gauge(name) - value for name, value in before.items()}
            if counts["preemptions_total"] and counts["prompt_chunks_total"] >= 24:
                break
        self.assertGreater(counts["preemptions_total"], 0, "no sequence was preempted: this test tested nothing")
        self.assertGreaterEqual(counts["prompt_chunks_total"], 24)
        self.daemon.wait_idle()

    def test_forks(self):
        before = self.daemon.gauge("forks_total")
        answer = self.daemon.complete(prompt=TEXT[:300], n=6, seed=4, max_tokens=24, ignore_eos=True).json()
        self.assertGreater(self.daemon.gauge("forks_total"), before)
        self.assertGreater(len({choice["text"] for choice in answer["choices"]}), 3)
        self.assertEqual(self.daemon.complete(prompt=TEXT[:300], n=6, seed=4, max_tokens=24, ignore_eos=True).json()["choices"], answer["choices"])
        self.assertEqual(self.daemon.complete(prompt=TEXT[:300], n=2, seed=4, max_tokens=24, ignore_eos=True).json()["choices"], answer["choices"][:2])


class KvTypes(unittest.TestCase):
    def test_each(self):
        """Every type of the cache serves; the answers differ from f32's only where a rounding decides."""
        prompt, values = TEXT[:400], {}
        for dtype in ("f32", "f16", "bf16", "q8"):
            with harness.Daemon("-m", harness.sample_model(), "--kv-dtype", dtype, "--max-model-len", "512") as daemon:
                answer = daemon.complete(prompt=prompt, max_tokens=0, echo=True, logprobs=0).json()["choices"][0]
                values[dtype] = answer["logprobs"]["token_logprobs"][1:]
        exact = values.pop("f32")
        for dtype, others in values.items():
            self.assertEqual(len(others), len(exact))
            self.assertTrue(all(math.isfinite(value) for value in others))
            self.assertLess(abs(sum(others) - sum(exact)) / len(exact), 0.02, dtype)
            self.assertNotEqual(others, exact, dtype)


if __name__ == "__main__":
    unittest.main(verbosity=2)
