"""The official OpenAI Python client against the daemon: every documented way of /v1/completions, its errors, its retries, its streams.

Answers come from the sample model where their content matters, from the mock backend where only the protocol does."""
import asyncio
import json
import tempfile
import time
import unittest

import httpx2 as httpx
import openai

import harness
import raw

PROMPT = "The capital of France is"
GREEDY = {"prompt": PROMPT, "temperature": 0}


def client(daemon, key="none", retries=0, **options):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{daemon.port}/v1", api_key=key, max_retries=retries, timeout=harness.DEADLINE, **options)


class RealModel(harness.DaemonCase):
    flags = ("--max-model-len", "1024")

    @classmethod
    def start(cls):
        return harness.Daemon("-m", harness.sample_model(), *cls.flags)

    def setUp(self):
        self.client = client(self.daemon)
        self.addCleanup(self.client.close)

    def create(self, **fields):
        return self.client.completions.create(model=self.daemon.model, **fields)

    def tokens(self, text):
        return self.daemon.tokens(text)


class Plain(RealModel):
    def test_answer(self):
        before = int(time.time())
        answer = self.create(**GREEDY, max_tokens=8)
        self.assertEqual(answer.object, "text_completion")
        self.assertRegex(answer.id, r"^cmpl-[0-9A-Za-z-]{8,}$")
        self.assertTrue(before - 1 <= answer.created <= time.time() + 1)
        self.assertEqual(answer.model, self.daemon.model)
        self.assertEqual([choice.index for choice in answer.choices], [0])
        self.assertIn("Paris", answer.choices[0].text)
        self.assertEqual(answer.choices[0].finish_reason, "length")
        self.assertIsNone(answer.choices[0].logprobs)
        self.assertEqual(answer.usage.prompt_tokens, len(self.tokens(PROMPT)))
        self.assertEqual(answer.usage.completion_tokens, 8)
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + 8)
        self.assertGreaterEqual(answer.usage.prompt_tokens_details.cached_tokens, 0)

    def test_defaults(self):
        self.assertEqual(self.create(prompt=PROMPT, extra_body={"ignore_eos": True}).usage.completion_tokens, 16)

    def test_null_means_default(self):
        fields = ("max_tokens", "temperature", "top_p", "n", "best_of", "echo", "logprobs", "logit_bias", "stop", "stream", "stream_options", "presence_penalty",
                  "frequency_penalty", "seed", "suffix")
        answer = self.create(prompt=PROMPT, extra_body={**dict.fromkeys(fields), "user": "someone", "ignore_eos": True, "not_a_field": {"a": [1]}})
        self.assertEqual(answer.usage.completion_tokens, 16)

    def test_eos_ends_an_answer(self):
        chat = "<|im_start|>user\nSay just the word yes.<|im_end|>\n<|im_start|>assistant\n"
        answer = self.create(prompt=chat, temperature=0, max_tokens=200)
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        self.assertLess(answer.usage.completion_tokens, 200)
        self.assertNotIn("<|im_end|>", answer.choices[0].text)
        longer = self.create(prompt=chat, temperature=0, max_tokens=answer.usage.completion_tokens + 8, extra_body={"ignore_eos": True})
        self.assertEqual(longer.choices[0].finish_reason, "length")
        self.assertTrue(longer.choices[0].text.startswith(answer.choices[0].text))
        least = self.create(prompt=chat, temperature=0, max_tokens=60, extra_body={"min_tokens": answer.usage.completion_tokens + 5})
        self.assertGreaterEqual(least.usage.completion_tokens, answer.usage.completion_tokens + 5)

    def test_models(self):
        listed = self.client.models.list().data
        self.assertEqual([model.id for model in listed], [self.daemon.model])
        self.assertEqual(listed[0].object, "model")
        self.assertEqual(self.client.models.retrieve(self.daemon.model).id, self.daemon.model)
        extra = listed[0].model_extra
        self.assertIn("root", extra)  # what vLLM's load tool reads
        self.assertEqual(extra["max_model_len"], 1024)

    def test_raw_response(self):
        raw = self.client.completions.with_raw_response.create(model=self.daemon.model, **GREEDY, max_tokens=1, extra_headers={"X-Request-Id": "test-17"})
        self.assertEqual(raw.headers["x-request-id"], "test-17")
        self.assertEqual(raw.headers["content-type"].partition(";")[0], "application/json")
        self.assertEqual(raw.parse()._request_id, "test-17")
        own = self.client.completions.with_raw_response.create(model=self.daemon.model, **GREEDY, max_tokens=1)
        self.assertRegex(own.headers["x-request-id"], r"^[!-~]{8,96}$")
        odd = self.client.completions.with_raw_response.create(model=self.daemon.model, **GREEDY, max_tokens=1,
                                                              extra_headers={"X-Request-Id": "a b\"c'\\d<e>" + "x" * 500})
        self.assertRegex(odd.headers["x-request-id"], r"^[0-9A-Za-z._:/-]{1,96}$")


class Choices(RealModel):
    def test_n(self):
        answer = self.create(prompt=PROMPT, n=4, seed=7, max_tokens=12)
        self.assertEqual([choice.index for choice in answer.choices], [0, 1, 2, 3])
        self.assertGreater(len({choice.text for choice in answer.choices}), 1)
        self.assertEqual(answer.usage.prompt_tokens, len(self.tokens(PROMPT)))
        self.assertLessEqual(answer.usage.completion_tokens, 48)
        greedy = self.create(**GREEDY, n=3, max_tokens=6)
        self.assertEqual(len({choice.text for choice in greedy.choices}), 1)

    def test_seed(self):
        texts = lambda seed: [choice.text for choice in self.create(prompt=PROMPT, n=2, seed=seed, max_tokens=12).choices]
        first = texts(11)
        self.assertEqual(first, texts(11))
        self.assertNotEqual(first, texts(12))
        self.assertNotEqual(texts(-(2**63)), texts(2**63 - 1))
        without = {self.create(prompt=PROMPT, max_tokens=12).choices[0].text for _ in range(4)}
        self.assertGreater(len(without), 1)

    def test_best_of(self):
        fields = {"prompt": PROMPT, "seed": 5, "max_tokens": 10, "logprobs": 0, "extra_body": {"ignore_eos": True}}
        every = self.create(**fields, n=6).choices
        best = self.create(**fields, n=2, best_of=6)
        mean = lambda choice: sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)
        expected = sorted(every, key=mean, reverse=True)[:2]
        self.assertEqual([choice.text for choice in best.choices], [choice.text for choice in expected])
        self.assertEqual([choice.index for choice in best.choices], [0, 1])
        self.assertIn(best.usage.completion_tokens, (20, 60))  # of the shown, or of all that were made
        plain = self.create(prompt=PROMPT, seed=5, max_tokens=10, n=2, best_of=6, extra_body={"ignore_eos": True})
        self.assertEqual([choice.text for choice in plain.choices], [choice.text for choice in expected])
        self.assertTrue(all(choice.logprobs is None for choice in plain.choices))

    def test_prompts_and_choices(self):
        prompts = [PROMPT, "Once upon a time", "1, 2, 3,"]
        answer = self.create(prompt=prompts, n=2, temperature=0, max_tokens=5)
        self.assertEqual([choice.index for choice in answer.choices], list(range(6)))
        for i, prompt in enumerate(prompts):
            alone = self.create(prompt=prompt, temperature=0, max_tokens=5).choices[0].text
            self.assertEqual([answer.choices[2 * i].text, answer.choices[2 * i + 1].text], [alone, alone])
        self.assertEqual(answer.usage.prompt_tokens, sum(len(self.tokens(prompt)) for prompt in prompts))

    def test_token_prompts(self):
        ids = self.tokens(PROMPT)
        text = self.create(**GREEDY, max_tokens=6).choices[0].text
        self.assertEqual(self.create(prompt=ids, temperature=0, max_tokens=6).choices[0].text, text)
        other = self.tokens("Once upon a time")
        both = self.create(prompt=[ids, other], temperature=0, max_tokens=6)
        self.assertEqual(both.choices[0].text, text)
        self.assertEqual(both.usage.prompt_tokens, len(ids) + len(other))
        self.assertEqual(self.create(prompt=[PROMPT], temperature=0, max_tokens=6).choices[0].text, text)


class Logprobs(RealModel):
    def check(self, logprobs, text, first_is_null):
        n = len(logprobs.tokens)
        self.assertEqual([len(logprobs.token_logprobs), len(logprobs.top_logprobs), len(logprobs.text_offset)], [n, n, n])
        self.assertEqual("".join(logprobs.tokens), text)
        self.assertEqual(logprobs.text_offset, [sum(map(len, logprobs.tokens[:i])) for i in range(n)])
        for i in range(n):
            if i == 0 and first_is_null:
                self.assertIsNone(logprobs.token_logprobs[0])
                self.assertIsNone(logprobs.top_logprobs[0])
                continue
            self.assertLessEqual(logprobs.token_logprobs[i], 0)
            top = logprobs.top_logprobs[i]
            self.assertIn(logprobs.token_logprobs[i], top.values())
            self.assertLessEqual(sum(2.718281828459045 ** value for value in top.values()), 1 + 1e-4)

    def test_generated(self):
        answer = self.create(**GREEDY, max_tokens=8, logprobs=5)
        logprobs = answer.choices[0].logprobs
        self.check(logprobs, answer.choices[0].text, False)
        for value, top in zip(logprobs.token_logprobs, logprobs.top_logprobs):
            self.assertEqual(len(top), 5)
            self.assertEqual(value, max(top.values()))  # as equal floats: lm-eval asks it
        sampled = self.create(prompt=PROMPT, seed=3, temperature=2, max_tokens=16, logprobs=1).choices[0].logprobs
        self.assertTrue(any(len(top) == 2 for top in sampled.top_logprobs), "a sample outside the likeliest adds itself")
        self.assertTrue(all(1 <= len(top) <= 2 for top in sampled.top_logprobs))

    def test_zero(self):
        logprobs = self.create(**GREEDY, max_tokens=4, logprobs=0).choices[0].logprobs
        self.assertEqual([len(top or {}) <= 1 for top in logprobs.top_logprobs], [True] * 4)
        self.assertEqual(len(logprobs.token_logprobs), 4)

    def test_echo(self):
        answer = self.create(**GREEDY, max_tokens=4, echo=True)
        alone = self.create(**GREEDY, max_tokens=4)
        self.assertEqual(answer.choices[0].text, PROMPT + alone.choices[0].text)
        self.assertEqual(answer.usage.completion_tokens, 4)

    def test_echo_with_logprobs(self):
        answer = self.create(**GREEDY, max_tokens=4, echo=True, logprobs=3)
        logprobs = answer.choices[0].logprobs
        self.check(logprobs, answer.choices[0].text, True)
        self.assertEqual(len(logprobs.tokens), len(self.tokens(PROMPT)) + 4)

    def test_scoring_only(self):
        ids = self.tokens(PROMPT + " Paris")
        answer = self.create(prompt=ids, max_tokens=0, echo=True, logprobs=1)
        self.check(answer.choices[0].logprobs, PROMPT + " Paris", True)
        self.assertEqual(answer.usage.completion_tokens, 0)
        self.assertEqual(answer.choices[0].finish_reason, "length")

    def test_as_lm_eval_asks(self):
        """A batch of token lists, one token more, greedy: loglikelihoods of continuations."""
        batch = [self.tokens(PROMPT + end) for end in (" Paris", " Berlin", " the")]
        answer = self.create(prompt=batch, max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234)
        scores = []
        for ids, choice in zip(batch, answer.choices):
            self.assertEqual(len(choice.logprobs.token_logprobs), len(ids) + 1)
            self.assertTrue(all(value is not None for value in choice.logprobs.token_logprobs[1:]))
            context = len(self.tokens(PROMPT))
            scores.append(sum(choice.logprobs.token_logprobs[context:-1]))
        self.assertEqual(scores[0], max(scores))


class Sampling(RealModel):
    def test_stop(self):
        whole = self.create(**GREEDY, max_tokens=24, extra_body={"ignore_eos": True}).choices[0].text
        for stop in (whole[6:9], whole[3:4], whole[5:12]):
            end = whole.index(stop)
            answer = self.create(**GREEDY, max_tokens=24, stop=stop, extra_body={"ignore_eos": True})
            self.assertEqual(answer.choices[0].text, whole[:end], stop)
            self.assertEqual(answer.choices[0].finish_reason, "stop")
            self.assertLess(answer.usage.completion_tokens, 24)
            many = self.create(**GREEDY, max_tokens=24, stop=["\x01never", stop, "neither does this"], extra_body={"ignore_eos": True})
            self.assertEqual(many.choices[0].text, whole[:end])
            kept = self.create(**GREEDY, max_tokens=24, stop=[stop], extra_body={"ignore_eos": True, "include_stop_str_in_output": True})
            self.assertEqual(kept.choices[0].text, whole[: end + len(stop)])
        none = self.create(**GREEDY, max_tokens=24, stop=[], extra_body={"ignore_eos": True})
        self.assertEqual((none.choices[0].text, none.choices[0].finish_reason), (whole, "length"))

    def test_stop_token_ids(self):
        ids = self.tokens(self.create(**GREEDY, max_tokens=8).choices[0].text)
        answer = self.create(**GREEDY, max_tokens=8, extra_body={"stop_token_ids": [ids[3]]})
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        self.assertLessEqual(answer.usage.completion_tokens, 4)

    def test_logit_bias(self):
        token = self.tokens(" apple")[0]
        forced = self.create(**GREEDY, max_tokens=4, logit_bias={str(token): 100}).choices[0].text
        self.assertEqual(forced, " apple" * 4)
        paris = self.tokens(" Paris")[0]
        banned = self.create(**GREEDY, max_tokens=8, logit_bias={str(paris): -100}).choices[0].text
        self.assertNotIn(" Paris", banned)
        self.assertEqual(self.create(**GREEDY, max_tokens=8, logit_bias={}).choices[0].text, self.create(**GREEDY, max_tokens=8).choices[0].text)

    def test_filters(self):
        greedy = self.create(**GREEDY, max_tokens=10).choices[0].text
        for extra in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
            self.assertEqual(self.create(prompt=PROMPT, max_tokens=10, seed=1, extra_body=extra).choices[0].text, greedy, extra)
        for extra in ({"top_k": 0}, {"top_k": -1}, {"top_p": 1}, {"min_p": 0}):  # off
            self.assertEqual(self.create(prompt=PROMPT, max_tokens=10, seed=1, extra_body=extra).choices[0].text,
                             self.create(prompt=PROMPT, max_tokens=10, seed=1).choices[0].text, extra)

    def test_penalties(self):
        token = str(self.tokens(" apple")[0])
        for extra in ({"repetition_penalty": 1000.0},):
            text = self.create(**GREEDY, max_tokens=6, logit_bias={token: 30}, extra_body=extra).choices[0].text
            self.assertLessEqual(text.count(" apple"), 2, text)
        loop = {"prompt": "a b a b a b a b a b a b", "temperature": 0, "max_tokens": 24}
        plain = self.create(**loop).choices[0].text
        for extra in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
            self.assertNotEqual(self.create(**loop, **extra).choices[0].text, plain)


class Streams(RealModel):
    def test_equals_the_whole_answer(self):
        for fields in ({"temperature": 0}, {"seed": 9, "n": 3}, {"temperature": 0, "echo": True}, {"temperature": 0, "stop": [" of"]}):
            whole = self.create(prompt=PROMPT, max_tokens=16, **fields)
            chunks = list(self.create(prompt=PROMPT, max_tokens=16, stream=True, **fields))
            for choice in whole.choices:
                text = "".join(c.text for chunk in chunks for c in chunk.choices if c.index == choice.index)
                self.assertEqual(text, choice.text, fields)
                reasons = [c.finish_reason for chunk in chunks for c in chunk.choices if c.index == choice.index]
                self.assertEqual(reasons[-1], choice.finish_reason)
                self.assertEqual(set(reasons[:-1]) - {None}, set())
            self.assertEqual(len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}), 1)
            self.assertTrue(all(len(chunk.choices) == 1 for chunk in chunks), "no usage unless asked")
            self.assertTrue(all(chunk.usage is None for chunk in chunks))

    def test_usage(self):
        chunks = list(self.create(**GREEDY, max_tokens=5, stream=True, stream_options={"include_usage": True}))
        self.assertEqual(chunks[-1].choices, [])
        self.assertEqual(chunks[-1].usage.completion_tokens, 5)
        self.assertEqual(chunks[-1].usage.total_tokens, chunks[-1].usage.prompt_tokens + 5)
        self.assertTrue(all(chunk.usage is None and chunk.choices for chunk in chunks[:-1]))

    def test_cancelled(self):
        for _ in range(harness.rounds(5, 2)):
            stream = self.create(prompt=PROMPT, max_tokens=900, stream=True, extra_body={"ignore_eos": True})
            for _, chunk in zip(range(3), stream):
                self.assertEqual(len(chunk.choices), 1)
            stream.close()
        self.daemon.wait_idle()

    def test_many_at_once(self):
        """An asynchronous client with 16 streams; each gets its own text."""
        texts = {n: self.create(prompt=f"{n}, {n + 1}, {n + 2},", temperature=0, max_tokens=8).choices[0].text for n in range(16)}

        async def one(connection, n):
            stream = await connection.completions.create(model=self.daemon.model, prompt=f"{n}, {n + 1}, {n + 2},", temperature=0, max_tokens=8, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        async def all_of_them():
            async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{self.daemon.port}/v1", api_key="x", max_retries=0, timeout=harness.DEADLINE) as connection:
                return await asyncio.gather(*(one(connection, n) for n in range(16)))

        self.assertEqual(asyncio.run(all_of_them()), list(texts.values()))


class Errors(harness.DaemonCase):
    flags = (*harness.MOCK, "--max-model-len", "512")

    def create(self, **fields):
        with client(self.daemon) as connection:
            return connection.completions.create(**{"model": self.daemon.model, "prompt": "hello", "max_tokens": 2, **fields})

    def test_not_found(self):
        with self.assertRaises(openai.NotFoundError) as caught:
            self.create(model="gpt-17")
        self.assertEqual((caught.exception.code, caught.exception.param, caught.exception.type), ("model_not_found", "model", "invalid_request_error"))
        self.assertIn("gpt-17", caught.exception.message)
        with self.assertRaises(openai.NotFoundError), client(self.daemon) as connection:
            connection.models.retrieve("gpt-17")
        with self.assertRaises(openai.NotFoundError), client(self.daemon) as connection:
            connection.moderations.create(input="hello")

    def test_bad_request(self):
        for fields, param in (({"temperature": 3}, "temperature"), ({"n": 0}, "n"), ({"best_of": 2, "n": 3}, "best_of"), ({"stop": ["x"] * 1000}, "stop"),
                              ({"best_of": 4, "stream": True}, "best_of"), ({"stream_options": {"include_usage": True}}, "stream_options"),
                              ({"prompt": []}, "prompt"), ({"prompt": ""}, "prompt"), ({"suffix": "end"}, "suffix"), ({"logprobs": 1000}, "logprobs")):
            with self.assertRaises(openai.BadRequestError, msg=str(fields)) as caught:
                self.create(**fields)
            self.assertEqual(caught.exception.param, param)
            self.assertEqual(caught.exception.type, "invalid_request_error")
            self.assertTrue(caught.exception.request_id)

    def test_too_long(self):
        for stream in (False, True):  # a stream too: the error comes before it begins
            with self.assertRaises(openai.BadRequestError) as caught:
                self.create(prompt="x" * 600, max_tokens=16, stream=stream)
            self.assertEqual((caught.exception.code, caught.exception.param), ("context_length_exceeded", "prompt"))
            for number in ("512", "600", "16"):
                self.assertIn(number, caught.exception.message)
        self.assertEqual(self.create(prompt="x" * 500, max_tokens=12, extra_body={"ignore_eos": True}).usage.total_tokens, 512)

    def test_what_is_not_offered(self):
        attempts = []
        connection = openai.OpenAI(base_url=f"http://127.0.0.1:{self.daemon.port}/v1", api_key="x", max_retries=2, timeout=harness.DEADLINE,
                                   http_client=httpx.Client(event_hooks={"request": [attempts.append]}))
        with self.assertRaises(openai.APIStatusError) as caught, connection:
            connection.embeddings.create(model=self.daemon.model, input="hello")
        self.assertIn(caught.exception.status_code, (404, 501))
        self.assertEqual(len(attempts), 1, "for ever is not worth a retry")


def stopped_of(test, daemon, kinds, headers=()):
    """Asks one after another, (fields, how often) of each kind; every one is answered. How many answers a stop string ended."""
    stopped = 0
    for fields, rounds in kinds:
        with daemon.connect() as connection:
            for i in range(rounds):
                body = {"model": daemon.model, "prompt": f"number {i}", "seed": i, **fields}
                connection.send(raw.request_bytes("POST", "/v1/completions", json.dumps(body).encode(), headers))
                answer = connection.read_response()
                test.assertEqual(answer.status, 200, (fields, i))
                stopped += b'"finish_reason":"stop"' in answer.body
    return stopped


class Keys(unittest.TestCase):
    def test_keys_and_their_limit(self):
        with tempfile.NamedTemporaryFile("w", suffix=".keys") as file:
            file.write("# keys of the test\nsk-first\n\n  sk-second  \n")
            file.flush()
            with harness.Daemon(*harness.MOCK, "--api-key-file", file.name, "--max-requests-per-key", "1", "--mock-tokens-per-second", "100", ready=False) as daemon:
                daemon.wait_ready()
                daemon.model = daemon.get("/v1/models", {"Authorization": "Bearer sk-first"}).json()["data"][0]["id"]
                self.wrong_keys(daemon)
                self.limit(daemon)
                self.one_after_another(daemon)
                self.caches(daemon)
                daemon.wait_idle()
            self.assertNotIn("sk-first", daemon.log())

    def wrong_keys(self, daemon):
        for key in ("sk-third", "sk-firs", "sk-first1", "SK-FIRST", "# keys of the test"):
            with self.assertRaises(openai.AuthenticationError) as caught, client(daemon, key) as connection:
                connection.completions.create(model=daemon.model, prompt="hello", max_tokens=1)
            self.assertEqual((caught.exception.code, caught.exception.type), ("invalid_api_key", "authentication_error"))
            self.assertNotIn(key, caught.exception.message)
        for path in ("/v1/models", f"/v1/models/{daemon.model}"):
            self.assertEqual(daemon.get(path).status, 401, path)
        for path in ("/tokenize", "/detokenize", "/v1/completions"):
            self.assertEqual(daemon.post(path, {}).status, 401, path)
        for headers in ({"Authorization": "sk-first"}, {"Authorization": "Basic sk-first"}, {"Authorization": "Bearer"}, {"X-Api-Key": ""}):
            self.assertEqual(daemon.get("/v1/models", headers).status, 401, headers)
        for headers in ({"Authorization": "Bearer sk-second"}, {"authorization": "bearer sk-second"}, {"X-Api-Key": "sk-second"}):
            self.assertEqual(daemon.get("/v1/models", headers).status, 200, headers)
        self.assertEqual(daemon.get("/health").status, 200)  # for supervisors, which have no key

    def limit(self, daemon):
        with client(daemon, "sk-first") as first, client(daemon, "sk-second") as second:
            fields = {"model": daemon.model, "prompt": "hello", "extra_body": {"ignore_eos": True}}
            stream = first.completions.create(**fields, max_tokens=4000, stream=True)
            next(stream)
            with self.assertRaises(openai.RateLimitError) as caught:
                first.completions.create(**fields, max_tokens=1)
            self.assertEqual(caught.exception.code, "rate_limit_exceeded")
            self.assertGreater(float(caught.exception.response.headers["retry-after"]), 0)
            self.assertEqual(second.completions.create(**fields, max_tokens=1).usage.completion_tokens, 1)
            stream.close()
            daemon.wait_idle()
            self.assertEqual(first.completions.create(**fields, max_tokens=1).usage.completion_tokens, 1)

    def one_after_another(self, daemon):
        """Who has an answer to its end may ask again at once, although the engine learns only then that a stop string ended it."""
        stops = {"stop": ["e", " ", "a", "t"], "max_tokens": 40}
        kinds = (({"max_tokens": 2}, 5), (stops, 8), ({**stops, "stream": True}, 8), ({**stops, "n": 3}, 2), ({**stops, "best_of": 2}, 2))
        self.assertGreater(stopped_of(self, daemon, kinds, {"Authorization": "Bearer sk-first"}), 3)

    def caches(self, daemon):
        """What one key has asked is not found faster by another."""
        def cached(key, **extra):
            with client(daemon, key) as connection:
                answer = connection.completions.create(model=daemon.model, prompt="one and the same " * 6, max_tokens=1, extra_body=extra)
                return answer.usage.prompt_tokens_details.cached_tokens

        self.assertEqual([cached("sk-first"), cached("sk-first"), cached("sk-second"), cached("sk-second")], [0, 96, 0, 96])
        self.assertEqual([cached("sk-first", cache_salt="x"), cached("sk-first", cache_salt="x"), cached("sk-first")], [0, 96, 96])


class Retries(unittest.TestCase):
    """One place to run, one to wait: the third is told to come back, and the client does so by itself."""

    def test_full(self):
        flags = (*harness.MOCK, "--max-sequences", "1", "--max-queue", "1", "--mock-tokens-per-second", "200")
        with harness.Daemon(*flags) as daemon:
            fields = {"model": daemon.model, "prompt": "hello", "max_tokens": 1}
            running = daemon.stream(max_tokens=4000, ignore_eos=True)
            running.read_head()
            waiting = daemon.stream(max_tokens=4000, ignore_eos=True)
            harness.wait_until(lambda: daemon.load()[:2] == (1, 1), "one runs, one waits")

            with self.assertRaises(openai.InternalServerError) as caught, client(daemon) as connection:
                connection.completions.create(**fields)
            self.assertEqual(caught.exception.status_code, 503)
            self.assertGreater(float(caught.exception.response.headers["retry-after"]), 0)
            self.assertEqual(daemon.get("/health").status, 200)

            statuses = []

            def answered(response):
                statuses.append(response.status_code)
                if len(statuses) == 1:  # there is room from now on
                    running.close()
                    waiting.reset()
                    daemon.wait_idle()

            connection = client(daemon, retries=5, http_client=httpx.Client(event_hooks={"response": [answered]}))
            answer = connection.completions.create(**fields)
            self.assertEqual(answer.usage.completion_tokens, 1)
            self.assertEqual(statuses, [503, 200])
            connection.close()

    def test_one_after_another(self):
        """With one place and no queue, who has an answer to its end may ask again at once, although the engine learns only then that a stop string ended it."""
        with harness.Daemon(*harness.MOCK, "--max-sequences", "1", "--max-queue", "0", "--mock-tokens-per-second", "2000") as daemon:
            stops = {"stop": ["e", " ", "a", "t"], "max_tokens": 40}
            kinds = (({"max_tokens": 2}, 5), (stops, 40), ({**stops, "stream": True}, 40))
            self.assertGreater(stopped_of(self, daemon, kinds), 10)
            daemon.wait_idle()
        with harness.Daemon(*harness.MOCK, "--max-sequences", "1", "--max-queue", "3", "--mock-tokens-per-second", "2000") as daemon:
            kinds = (({**stops, "n": 4}, 10), ({**stops, "n": 4, "stream": True}, 10), ({**stops, "prompt": ["a", "b"], "n": 2}, 10))
            self.assertGreater(stopped_of(self, daemon, kinds), 10)
            daemon.wait_idle()


if __name__ == "__main__":
    unittest.main(verbosity=2)
