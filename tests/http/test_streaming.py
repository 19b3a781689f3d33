"""Server-sent events to the byte: framing, order, what each chunk may and must carry, UTF-8 and stop strings across tokens, and errors before and after the first token.

The mock backend's tokens 0..255 are bytes, and its sampler is the real one: falling logit biases and a repetition penalty that forbids a second use dictate an answer."""
import json
import unittest

import harness
import raw

CHUNK = {"id", "object", "created", "model", "choices", "system_fingerprint"}


def dictate(data, **fields):
    """A request whose greedy answer begins with these bytes (at most 5, all different)."""
    assert len(set(data)) == len(data) <= 5
    return {"prompt": [5, 6, 7], "temperature": 0, "repetition_penalty": 100000, "logit_bias": {str(byte): 100 - 20 * i for i, byte in enumerate(data)},
            "max_tokens": len(data), "ignore_eos": True, **fields}


class Streams(harness.DaemonCase):
    def stream(self, **fields):
        """(response, its JSON chunks)"""
        with self.daemon.stream(**fields) as connection:
            response = connection.read_response()
            self.assertEqual(response.status, 200, response)
            return response, harness.events(response.body)

    def whole(self, **fields):
        response = self.daemon.complete(**fields)
        self.assertEqual(response.status, 200, response)
        return response.json()

    def same(self, **fields):
        """A stream says what the whole answer says. Returns the whole answer's choices."""
        choices = self.whole(**fields)["choices"]
        chunks = self.stream(**fields)[1]
        for choice in choices:
            self.assertEqual(harness.text_of(chunks, choice["index"]), choice["text"], fields)
        self.assertEqual({c["index"] for chunk in chunks for c in chunk["choices"]}, {choice["index"] for choice in choices})
        return choices


class Framing(Streams):
    def test_head(self):
        response, _ = self.stream(max_tokens=3)
        self.assertEqual(response.version, "HTTP/1.1")
        self.assertEqual(response.header("Content-Type").partition(";")[0], "text/event-stream")
        self.assertIn("no-cache", response.header("Cache-Control"))
        self.assertEqual(response.header("Transfer-Encoding"), "chunked")
        self.assertIsNone(response.header("Content-Length"))
        self.assertEqual(response.header("X-Accel-Buffering"), "no")
        self.assertTrue(response.header("X-Request-Id"))

    def test_chunks(self):
        response, chunks = self.stream(max_tokens=5, n=2, ignore_eos=True)
        for chunk in chunks:
            self.assertEqual(set(chunk) - {"system_fingerprint"}, CHUNK - {"system_fingerprint"})
            self.assertEqual(chunk["object"], "text_completion")
            self.assertEqual(chunk["model"], self.daemon.model)
            self.assertEqual(len(chunk["choices"]), 1)
            choice = chunk["choices"][0]
            self.assertLessEqual({"index", "text", "logprobs", "finish_reason"}, set(choice))
            self.assertIsInstance(choice["text"], str)
        self.assertEqual(len({(chunk["id"], chunk["created"]) for chunk in chunks}), 1)
        self.assertTrue(chunks[0]["id"].startswith("cmpl-"))
        self.assertNotIn(b": ", response.body.replace(b"data: ", b"").replace(b'": ', b'":'))  # one line of compact JSON an event, no comments

    def test_finish_reason_ends_each_choice(self):
        for fields in ({"max_tokens": 4, "n": 5}, {"prompt": ["a", "b", "c"], "max_tokens": 3, "n": 2}, {"max_tokens": 1}):
            chunks = self.stream(**fields, ignore_eos=True)[1]
            for index in {c["index"] for chunk in chunks for c in chunk["choices"]}:
                reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]
                self.assertEqual(reasons[-1], "length")
                self.assertEqual(set(reasons[:-1]) - {None}, set())

    def test_a_token_is_a_chunk(self):
        """Load tools take the time between chunks for the time between tokens."""
        chunks = self.stream(max_tokens=40, temperature=0, logit_bias={"97": 100}, stream_options={"include_usage": True})[1]
        self.assertEqual(chunks[-1]["usage"]["completion_tokens"], 40)
        self.assertEqual([chunk["choices"][0]["text"] for chunk in chunks[:-1] if chunk["choices"][0]["text"]], ["a"] * 40)
        self.assertEqual(chunks[0]["choices"][0]["text"], "a")  # the first is the first token

    def test_usage_when_asked(self):
        for ask in (None, {}, {"include_usage": False}, {"include_usage": None}):
            chunks = self.stream(max_tokens=3, stream_options=ask)[1]
            self.assertTrue(all(chunk["choices"] and "usage" not in chunk for chunk in chunks), ask)
        response, chunks = self.stream(prompt="12345", max_tokens=3, n=2, ignore_eos=True, stream_options={"include_usage": True})
        self.assertTrue(all(chunk["choices"] and chunk.get("usage") is None for chunk in chunks[:-1]))
        self.assertEqual(chunks[-1]["choices"], [])
        usage = chunks[-1]["usage"]
        self.assertEqual((usage["completion_tokens"], usage["total_tokens"]), (6, usage["prompt_tokens"] + 6))
        self.assertGreaterEqual(usage["prompt_tokens"], 5)
        self.assertEqual(chunks[-1]["id"], chunks[0]["id"])
        self.assertTrue(response.body.endswith(b"\n\ndata: [DONE]\n\n"))

    def test_running_usage_when_asked(self):
        chunks = self.stream(max_tokens=6, ignore_eos=True, logit_bias={"97": 100}, stream_options={"include_usage": True, "continuous_usage_stats": True})[1]
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        self.assertEqual(counts, sorted(counts))
        self.assertEqual((counts[0], counts[-1]), (1, 6))

    def test_the_connection_lives_on(self):
        with self.daemon.connect() as connection:
            for fields in ({"stream": True}, {"stream": False}, {"stream": True, "n": 3}):
                body = json.dumps({"model": self.daemon.model, "prompt": "a", "max_tokens": 2, **fields}).encode()
                connection.send(raw.request_bytes("POST", "/v1/completions", body))
                self.assertEqual(connection.read_response().status, 200)
            self.assertEqual(connection.buffer, b"")

    def test_no_tokens(self):
        _, chunks = self.stream(prompt="abc", max_tokens=0, echo=True)
        self.assertEqual(harness.text_of(chunks), "abc")
        self.assertEqual(chunks[-1]["choices"][0]["finish_reason"], "length")
        _, chunks = self.stream(prompt="abc", max_tokens=0)
        self.assertEqual(harness.text_of(chunks), "")


class Text(Streams):
    def test_dictation(self):
        """The tests below rest on it."""
        for data in (b"a", b"abcde", b"zyx"):
            self.assertEqual(self.same(**dictate(data))[0]["text"], data.decode())

    def test_characters_are_never_split(self):
        for text in ("é", "aé", "€", "😀", "😀!", "é€", "ßa", "中b"):
            with self.subTest(text=text):
                chunks = self.stream(**dictate(text.encode()))[1]
                self.assertEqual([c["choices"][0]["text"] for c in chunks if c["choices"][0]["text"]], list(text))
                self.assertEqual(self.same(**dictate(text.encode()))[0]["text"], text)

    def test_characters_cut_short(self):
        """max_tokens ends in the middle of a character, or the bytes are none at all: replacement characters, the same in both forms."""
        for data in ("😀".encode()[:1], "😀".encode()[:2], "😀".encode()[:3], "€".encode()[:2], b"a\xc3", b"\xff", b"\xff\xfe", b"\x80a", b"\xc3a", b"\xf0\x9fab", b"\xed\xa0\x80",
                     b"\xc0\xaf", b"\xf4\x90\x80\x81", b"\xf8\x88"):
            with self.subTest(data=data):
                text = self.same(**dictate(data))[0]["text"]
                self.assertIn("\ufffd", text)
                self.assertEqual([c for c in text if c != "\ufffd"], [chr(b) for b in data if b < 128])

    def test_control_characters(self):
        for data in (b"\x00a", b"\n\r\t", b"\x1b[", b'"\\/', b"\x7f\x01", b"data:"[:3]):
            self.assertEqual(self.same(**dictate(data))[0]["text"], data.decode())

    def test_random_bytes(self):
        for seed in range(harness.rounds(30, 6)):
            self.same(prompt="a", seed=seed, n=2, max_tokens=60, ignore_eos=True, temperature=2)

    def test_echo(self):
        for prompt in ("abc", "é😀", "two words", [104, 105]):
            for n in (1, 2):
                for choice in self.same(prompt=prompt, max_tokens=4, n=n, echo=True, seed=1):
                    self.assertTrue(choice["text"].startswith(prompt if isinstance(prompt, str) else "hi"))


class Stops(Streams):
    def test_every_stop_of_a_text(self):
        """All parts of a text of five tokens: the answer ends before, no byte of the stop string is shown, and what comes after is not counted."""
        text = "abcde"
        for start in range(5):
            for end in range(start + 1, 6):
                stop = text[start:end]
                with self.subTest(stop=stop):
                    request = dictate(text.encode(), stop=stop, stream_options={"include_usage": True}, max_tokens=9)
                    chunks = self.stream(**request)[1]
                    self.assertEqual(harness.text_of(chunks), text[:start])
                    self.assertEqual(chunks[-2]["choices"][0]["finish_reason"], "stop")
                    self.assertEqual(chunks[-1]["usage"]["completion_tokens"], end)
                    del request["stream_options"]
                    whole = self.whole(**request)
                    self.assertEqual((whole["choices"][0]["text"], whole["choices"][0]["finish_reason"]), (text[:start], "stop"))
                    self.assertEqual(whole["usage"]["completion_tokens"], end)

    def test_almost_a_stop(self):
        """What began like a stop string and went on differently is given out, all of it."""
        for stop in ("abx", "bcdex", "ex", "abcdef", "bd", "é", "aa", ["cx", "dx", "ex"]):
            choice = self.same(**dictate(b"abcde", stop=stop))[0]
            self.assertEqual((choice["text"], choice["finish_reason"]), ("abcde", "length"), stop)

    def test_several(self):
        for stops, text in ((["d", "bc"], "a"), (["bcd", "c"], "ab"), (["x", "e"], "abcd"), (["abcde", "cd"], "ab"), (["de", "cde", "e"], "ab"), (["a", "b"], "")):
            choice = self.same(**dictate(b"abcde", stop=stops))[0]
            self.assertEqual((choice["text"], choice["finish_reason"]), (text, "stop"), stops)

    def test_inside_a_character(self):
        choice = self.same(**dictate("é€".encode(), stop="€"))[0]
        self.assertEqual((choice["text"], choice["finish_reason"]), ("é", "stop"))

    def test_kept(self):
        choice = self.same(**dictate(b"abcde", stop="bc", include_stop_str_in_output=True))[0]
        self.assertEqual((choice["text"], choice["finish_reason"]), ("abc", "stop"))

    def test_not_before_min_tokens(self):
        choice = self.same(**dictate(b"abcde", stop="ab", min_tokens=4))[0]
        self.assertTrue(choice["text"].startswith("abcde"[:4]), choice)
        choice = self.same(**dictate(b"abcde", stop="de", min_tokens=3))[0]
        self.assertEqual((choice["text"], choice["finish_reason"]), ("abc", "stop"))

    def test_not_in_the_echo(self):
        fields = dictate(b"abcde", stop="xy", echo=True)
        fields["prompt"] = "xyz"
        self.assertEqual(self.same(**fields)[0]["text"], "xyzabcde")

    def test_each_choice_by_itself(self):
        """One of several is stopped; the others go on, and the stopped one's blocks are back at the end."""
        choices = self.same(prompt="a", n=8, seed=3, max_tokens=30, stop=["e", "t", "5", "\n"], ignore_eos=True, temperature=2)
        self.assertEqual({choice["finish_reason"] for choice in choices}, {"stop", "length"})
        self.daemon.wait_idle()

    def test_stop_tokens(self):
        for stop, text in ((99, "ab"), (97, ""), (101, "abcd")):
            choice = self.same(**dictate(b"abcde", stop_token_ids=[stop, 200]))[0]
            self.assertEqual(choice["finish_reason"], "stop")
            self.assertTrue(choice["text"] in (text, text + chr(stop)), choice)


class Logprobs(Streams):
    def collected(self, **fields):
        """The stream's logprobs put together, by index."""
        chunks = self.stream(**fields)[1]
        whole = {}
        for chunk in chunks:
            for choice in chunk["choices"]:
                mine = whole.setdefault(choice["index"], {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []})
                for name, values in (choice["logprobs"] or {}).items():
                    mine[name] += values
        return whole

    def test_equal_those_of_the_whole(self):
        for fields in ({"n": 2, "seed": 5, "logprobs": 3}, {"temperature": 0, "logprobs": 0}, {"echo": True, "logprobs": 2, "seed": 1}, {"echo": True, "logprobs": 1, "max_tokens": 0},
                       {"prompt": ["ab", "cd"], "logprobs": 1, "echo": True, "seed": 2}, {"logprobs": 5, "seed": 4, "temperature": 2, "max_tokens": 40}):
            fields = {"prompt": "abc", "max_tokens": 6, "ignore_eos": True, **fields}
            with self.subTest(fields=fields):
                whole = self.whole(**fields)
                streamed = self.collected(**fields)
                for choice in whole["choices"]:
                    self.assertEqual(streamed[choice["index"]], choice["logprobs"])
                    lengths = {len(values) for values in choice["logprobs"].values()}
                    self.assertEqual(len(lengths), 1)

    def test_offsets_count_characters(self):
        fields = dictate("é€".encode(), logprobs=1, echo=True)
        fields["prompt"] = "xyz"
        answer = self.whole(**fields)["choices"][0]
        offsets = answer["logprobs"]["text_offset"]
        self.assertEqual(answer["text"], "xyzé€")
        self.assertEqual(offsets, sorted(offsets))
        self.assertEqual(offsets[:4], [0, 1, 2, 3])
        self.assertLessEqual(offsets[-1], len(answer["text"]))

    def test_tokens_as_ids(self):
        answer = self.whole(**dictate(b"abc", logprobs=1, return_tokens_as_token_ids=True))["choices"][0]
        self.assertEqual(answer["logprobs"]["tokens"], ["token_id:97", "token_id:98", "token_id:99"])
        self.assertTrue(all(name.startswith("token_id:") for top in answer["logprobs"]["top_logprobs"] for name in top))

    def test_infinities_are_not_json(self):
        """A token the sampler was forced to, whatever its probability: every number is finite."""
        answer = self.daemon.complete(**dictate(b"abc", logprobs=5))
        for word in (b"inf", b"nan", b"Inf", b"NaN"):
            self.assertNotIn(word, answer.body)


class Errors(Streams):
    def test_before_the_first_token(self):
        for fields, status in (({"temperature": 9}, 400), ({"model": "nobody"}, 404), ({"prompt": "x" * 20000}, 400), ({"best_of": 3}, 400)):
            with self.daemon.stream(**fields) as connection:
                response = connection.read_response()
                self.assertEqual(response.status, status)
                self.assertEqual(response.header("Content-Type").partition(";")[0], "application/json")
                self.assertIn("error", response.json())


class Slow(Streams):
    """A model that takes its time: 100 rows a second."""

    flags = (*harness.MOCK, "--mock-tokens-per-second", "100", "--first-byte-timeout", "1s", "--heartbeat", "1s", "--prefix-cache=false")

    def test_the_head_waits_for_the_first_token(self):
        """30 rows of prompt: the head and the first chunk come together, not before."""
        with self.daemon.stream(prompt="x" * 30, max_tokens=2, ignore_eos=True, logit_bias={"97": 100}) as connection:
            head = connection.read_head()
            self.assertEqual(head.status, 200)
            self.assertIn(b'"text":"a"', connection.read_chunk())

    def test_a_long_prompt(self):
        """250 rows take 2.5 s: the head comes after 1 s, comments while nothing else is to be said, then the answer."""
        with self.daemon.stream(prompt="x" * 250, max_tokens=3, ignore_eos=True, logit_bias={"97": 100}) as connection:
            response = connection.read_response()
            self.assertEqual(response.status, 200)
            self.assertTrue(response.body.startswith(b":"), response.body[:100])
            self.assertEqual(harness.text_of(harness.events(response.body)), "aaa")


class OutOfTime(Streams):
    """As slow, with less time. In small steps: one that has begun is finished, whoever has given up."""

    flags = (*Slow.flags, "--max-rows", "20", "--header-timeout", "2s", "--body-timeout", "2s", "--request-timeout", "2s")

    def test_before_the_first_token(self):
        """Without a stream, and with one whose head has not gone out: an HTTP error."""
        response = self.daemon.complete(prompt="x" * 1000, max_tokens=1)
        self.assertIn(response.status, (408, 503, 504), response)
        self.assertIn("message", response.json()["error"])
        self.daemon.wait_idle()

    def test_in_a_stream(self):
        """After the head: an event with an error, then [DONE]."""
        with self.daemon.stream(max_tokens=4000, ignore_eos=True, logit_bias={"97": 100}) as connection:
            response = connection.read_response()
        chunks = harness.events(response.body)
        self.assertGreater(len(chunks), 10)
        self.assertEqual(set(chunks[-1]), {"error"}, chunks[-1])
        self.assertEqual(set(chunks[-1]["error"]), {"message", "type", "param", "code"})
        self.assertTrue(all("error" not in chunk for chunk in chunks[:-1]))
        self.daemon.wait_idle()


if __name__ == "__main__":
    unittest.main(verbosity=2)
