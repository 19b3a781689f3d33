"""Input that is wrong, absurd or hostile: each is answered with a 4xx in OpenAI's form that names the field, and the next request works.

Bodies first (a table of fields and values), then the wire: framing that could smuggle a request past a proxy, slowness, excess."""
import itertools
import json
import random
import select
import ssl
import unittest
import unittest.mock

import harness
import raw

NUL = "\x00"
HUGE = 10**400

# field: values that are wrong. Written as JSON text where Python has no such value.
NOT_A_NUMBER = ['"1"', '"x"', "[]", "[1]", "{}", "true", "false", '{"a":1}']
NOT_AN_INTEGER = NOT_A_NUMBER + ["1.5", "0.1", "1e-1", str(HUGE), "1e308", "9223372036854775808", "-9223372036854775809"]
NOT_A_BOOL = ["0", "1", '"true"', '"false"', '""', "[]", "{}", "1.0"]
NOT_A_LIST = ["1", "0.5", '"1"', "true", "{}", '{"a":1}']
NOT_JSON_NUMBERS = ["NaN", "Infinity", "-Infinity", "nan", "inf", "+1", "01", "1.", ".5", "0x10", "1e", "1e+", "--1", "1_000", "1e999", "-1e999"]
TABLE = {
    "model": ["1", "[]", "{}", "true", '["a"]'],
    "prompt": ["1", "true", "{}", '""', "[]", "[[]]", '[""]', '["a",""]', '["a",1]', "[1,\"a\"]", '["a",["b"]]', "[[1],2]", "[[1],\"a\"]", "[1,[2]]", "[null]", '["a",null]',
               "[true]", "[{}]", "[1.5]", "[[1.5]]", "[-1]", "[[-1]]", "[1000000]", "[[1000000]]", "[2147483648]", "[4294967296]", "[-2147483649]", "[1e99]", "[[[1]]]",
               "[[\"a\"]]", "[" + ",".join(["[1]"] * 2000) + "]", "[" + ",".join(['"a"'] * 2000) + "]"],
    "max_tokens": NOT_AN_INTEGER + ["-1", "-100", "2147483648", "4294967296", "-2147483648"],
    "temperature": NOT_A_NUMBER + ["-1", "-0.001", "2.001", "1e30", "-1e30", str(HUGE)],
    "top_p": NOT_A_NUMBER + ["0", "-0.1", "1.001", "2", "1e30"],
    "n": NOT_AN_INTEGER + ["0", "-1", "129", "100000", "2147483647", "4294967297"],
    "best_of": NOT_AN_INTEGER + ["0", "-1", "129", "100000", "2147483647", "4294967297"],
    "echo": NOT_A_BOOL,
    "stream": NOT_A_BOOL,
    "logprobs": NOT_AN_INTEGER + ["-1", "21", "1000", "4294967296"],
    "logit_bias": ["1", '"a"', "true", '{"a":1}', '{"":1}', '{"-1":1}', '{"1.5":1}', '{" 1":1}', '{"1 ":1}', '{"1000000":1}', '{"99999999999999999999":1}', '{"4294967297":1}',
                   '{"1":101}', '{"1":-101}', '{"1":"5"}', '{"1":null}', '{"1":[]}', '{"1":{}}', '{"1":1e99}', "[1]", "[[1]]", "[[1,2,3]]", '[["a",1]]',
                   "{" + ",".join(f'"{i}":1' for i in range(3000)) + "}"],
    "stop": ["1", "true", "{}", '""', '["a",""]', "[1]", "[null]", "[[]]", '["a",1]', json.dumps(list("abcde")), json.dumps(["x"] * 1000), json.dumps("x" * 100000), json.dumps(["ok", "x" * 100000])],
    "presence_penalty": NOT_A_NUMBER + ["-2.001", "2.001", "1e30", "-1e30"],
    "frequency_penalty": NOT_A_NUMBER + ["-2.001", "2.001", "1e30", "-1e30"],
    "repetition_penalty": NOT_A_NUMBER + ["0", "-1", "1e30"],
    "seed": NOT_AN_INTEGER,
    "suffix": ["1", "[]", "{}", "true", '"end"'],
    "top_k": NOT_AN_INTEGER + ["-2", "4294967296"],
    "min_p": NOT_A_NUMBER + ["-0.1", "1.001", "1e30"],
    "ignore_eos": NOT_A_BOOL,
    "min_tokens": NOT_AN_INTEGER + ["-1", "17", "4294967296"],
    "stop_token_ids": NOT_A_LIST + ['["a"]', "[-1]", "[1.5]", "[1000000]", "[4294967296]", "[null]", "[[1]]", "[" + ",".join(["1"] * 100000) + "]"],
    "include_stop_str_in_output": NOT_A_BOOL,
    "skip_special_tokens": NOT_A_BOOL,
    "add_special_tokens": NOT_A_BOOL,
    "truncate_prompt_tokens": NOT_AN_INTEGER + ["0", "-2", "4294967296"],
    "return_tokens_as_token_ids": NOT_A_BOOL,
    "return_token_ids": NOT_A_BOOL,
    "priority": NOT_AN_INTEGER + ["2147483648", "-2147483649"],
    "cache_salt": ["1", "[]", "{}", "true", '""', json.dumps("s" * 5000)],
    "stream_options": ["1", "true", "[]", '"a"'],
}
NUMBERS = ("max_tokens", "temperature", "n", "seed", "logprobs", "top_p", "min_p", "top_k", "presence_penalty", "priority")

# Bodies that are no JSON object. All are the body's fault, not a field's.
BROKEN = [
    b" ", b"{", b"}", b"[", b"{}x", b"{} {}", b"null", b"true", b"1", b'"text"', b"[]", b'[{"prompt":"a"}]', b"{'prompt':'a'}", b'{prompt:"a"}', b'{"prompt"}', b'{"prompt":}',
    b'{"prompt" "a"}', b'{"prompt":"a",}', b'{,"prompt":"a"}', b'{"prompt":"a"', b'{"prompt":"a', b'{"prompt":"a\\', b'{"prompt":"a\\u12"}', b'{"prompt":"a\\x41"}',
    b'{"prompt":"a\nb"}', b'{"prompt":"a\tb"}', b'{"prompt":"a\x00b"}', b'{"prompt":"a"}\x00', b"\x00{}", b'{"prompt":"a"}{"prompt":"b"}', b'{"prompt":"a"}]', b"\xef\xbb\xbf",
    b'{"prompt":tru}', b'{"prompt":truee}', b'{"prompt":nul}', b'{"prompt":"a" /* c */}', b'// c\n{"prompt":"a"}', b'{"prompt":"\\ud800"}', b'{"prompt":"\\udc00"}',
    b'{"prompt":"\\ud800\\u0041"}', b'{"prompt":"\xff"}', b'{"prompt":"\xc3"}', b'{"prompt":"\xc0\xaf"}', b'{"prompt":"\xed\xa0\x80"}', b'{"prompt":"\xf4\x90\x80\x80"}',
    b'{"prompt":"\xe2\x82"}', b'{"prompt":"\x80"}', b'{"\xff":1}', b'{"prompt":"a","prompt":"b"}', b'{"prompt":"a","stream":false,"stream":true}',
    b"<html></html>", b"prompt=a&model=b", b"--boundary\r\nContent-Disposition: form-data\r\n\r\na\r\n--boundary--", b"\x1f\x8b\x08\x00\x00\x00\x00\x00", b"\x00" * 1000, b"\xff\xfe{\x00}\x00",
    b"[" * 100000, b'{"a":' * 50000, b'{"prompt":' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"x":' + b"[" * 100000 + b"]" * 100000 + b',"prompt":"a"}', b'{"prompt":"a","x":' + b'{"a":' * 999,
]


class Bodies(harness.DaemonCase):
    flags = (*harness.MOCK, "--max-model-len", "2048", "--kv-memory", "64MiB")

    def setUp(self):
        self.connection = self.daemon.connect()
        self.addCleanup(self.connection.close)

    def post(self, body, path="/v1/completions", **headers):
        """On one kept-alive connection: an answer that breaks the framing breaks the next one."""
        self.connection.send(raw.request_bytes("POST", path, body, headers))
        return self.connection.read_response()

    def body(self, field, value):
        fields = {"model": json.dumps(self.daemon.model), "prompt": '"hello"', "max_tokens": "1"}
        if field in ("min_tokens",):
            del fields["max_tokens"]
        fields[field] = value
        if field == "stream_options":
            fields["stream"] = "true"
        return ("{" + ",".join(f'"{name}":{text}' for name, text in fields.items()) + "}").encode()

    def works(self):
        response = self.post(self.body("max_tokens", "1"))
        self.assertEqual(response.status, 200, response)
        self.assertEqual(response.json()["usage"]["completion_tokens"], 1)

    def test_every_field(self):
        count = 0
        for field, values in TABLE.items():
            for value in values:
                with self.subTest(field=field, value=value[:60]):
                    response = self.post(self.body(field, value))
                    error = self.assertError(response, 400, field)
                    self.assertIn(field, error["message"])
                    self.works()
                    count += 1
        self.assertGreater(count, 300)

    def test_two_spellings_of_a_field(self):
        """The same name once more, escaped: twice all the same."""
        for field, value in (("prompt", '["a","b"]'), ("stop", '["a","b","c","d"]'), ("stop_token_ids", json.dumps([1] * 100)), ("logit_bias", '{"1":1,"2":1}'), ("max_tokens", "1"), ("kv", "{}")):
            body = self.body(field, value)[:-1] + b',"\\u%04x%s":%s}' % (ord(field[0]), field[1:].encode(), value.encode())
            self.assertError(self.post(body), 400, field)
            self.works()
        self.assertError(self.post(b'{"tokens":[1],"token\\u0073":[1,2,3,4,5,6,7,8]}', "/detokenize"), 400, "tokens")

    def test_numbers_that_are_none(self):
        for field, value in itertools.product(NUMBERS, NOT_JSON_NUMBERS):
            with self.subTest(field=field, value=value):
                response = self.post(self.body(field, value))
                self.assertEqual(response.status, 400, response)
                self.assertIn(response.json()["error"]["param"], (field, None))
                self.works()

    def test_null_is_the_default(self):
        for field in TABLE:
            with self.subTest(field=field):
                self.assertEqual(self.post(self.body(field, "null")).status, 200)

    def test_edges_are_allowed(self):
        for field, value in (("temperature", "0"), ("temperature", "2"), ("temperature", "1e-30"), ("temperature", "-0.0"), ("top_p", "1"), ("top_p", "1e-30"), ("n", "1"), ("n", "128"),
                             ("n", "2.0"), ("n", "1e0"), ("logprobs", "0"), ("logprobs", "20"), ("logit_bias", '{"0":-100,"1":100}'), ("logit_bias", "{}"), ("logit_bias", '{"5":0.5}'),
                             ("stop", "[]"), ("stop", '["a","b","c","d"]'), ("presence_penalty", "-2"), ("frequency_penalty", "2"), ("repetition_penalty", "1e-3"),
                             ("seed", "9223372036854775807"), ("seed", "-9223372036854775808"), ("top_k", "-1"), ("top_k", "0"), ("top_k", "2147483647"), ("min_p", "0"), ("min_p", "1"),
                             ("min_tokens", "0"), ("min_tokens", "16"), ("priority", "-2147483648"), ("priority", "2147483647"), ("suffix", '""'), ("user", '"x"'), ("user", "17"),
                             ("max_tokens", "0"), ("prompt", '"\\u0000"'), ("prompt", '"\\ud83d\\ude00"'), ("prompt", "[0]"), ("prompt", "[[0],[1]]"), ("no such field", "{}"),
                             ("truncate_prompt_tokens", "-1"), ("truncate_prompt_tokens", "1"), ("stream_options", "{}"), ("cache_salt", '"a"')):
            with self.subTest(field=field, value=value):
                response = self.post(self.body(field, value))
                self.assertEqual(response.status, 200, response)

    def test_broken_bodies(self):
        for body in BROKEN:
            with self.subTest(body=body[:60]):
                self.assertError(self.post(body), 400, unittest.mock.ANY)  # or the member in which it lies
                self.works()

    def test_every_truncation_of_a_body(self):
        whole = json.dumps({"model": self.daemon.model, "prompt": ["aé😀\n", "b"], "logit_bias": {"5": 1.5}, "stop": ["x"], "stream": False, "max_tokens": 1},
                           ensure_ascii=False).encode()
        self.assertEqual(self.post(whole).status, 200)
        for end in range(1, len(whole), harness.rounds(1, 7)):
            response = self.post(whole[:end])
            self.assertEqual(response.status, 400, whole[:end])
            self.assertEqual(response.json()["error"]["type"], "invalid_request_error")
        self.works()

    def test_mutations_of_a_body(self):
        """Bytes changed, taken away and put in at random: an answer or a reason, always in JSON, and never a stop."""
        whole = json.dumps({"model": self.daemon.model, "prompt": ["hello", "é😀"], "max_tokens": 2, "logit_bias": {"65": -1.5}, "stop": ["x", "yz"], "seed": 7, "n": 1, "top_p": 0.9,
                            "stream_options": None, "echo": True, "logprobs": 2}).encode()
        chance = random.Random(20240917)
        seen = set()
        for _ in range(harness.rounds(1500, 150)):
            body = bytearray(whole)
            for _ in range(chance.choice((1, 1, 2, 5))):
                at = chance.randrange(len(body))
                byte = chance.choice((chance.randrange(256), ord(chance.choice('{}[]",:0123456789.eE-+\\ntfu '))))
                if (kind := chance.randrange(3)) == 0:
                    body[at] = byte
                elif kind == 1:
                    del body[at : at + chance.choice((1, 1, 8))]
                else:
                    body.insert(at, byte)
            response = self.post(bytes(body))
            seen.add(response.status)
            self.assertIn(response.status, (200, 400, 404), (bytes(body), response))
            self.assertIn("error" if response.status != 200 else "choices", response.json())
        self.assertEqual(seen, {200, 400, 404})
        self.works()

    def test_empty_body(self):
        for headers in ({"Content-Length": "0"}, {}):
            self.connection.send(raw.request_bytes("POST", "/v1/completions", b"", headers))
            self.assertError(self.connection.read_response(), 400)
        self.works()

    def test_prompt_is_needed(self):
        self.assertError(self.post(b'{"model":' + json.dumps(self.daemon.model).encode() + b"}"), 400, "prompt")
        self.assertError(self.post(b"{}"), 400, "prompt")

    def test_rules_between_fields(self):
        for fields, param in (({"n": 3, "best_of": 2}, "best_of"), ({"best_of": 3, "stream": True}, "best_of"), ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
                              ({"stream_options": {"include_usage": True}}, "stream_options"), ({"stream": False, "stream_options": {}}, "stream_options")):
            with self.subTest(fields=fields):
                self.assertError(self.daemon.complete(**fields), 400, param)
        # What each allows and the product does not.
        for fields in ({"prompt": ["a"] * 100, "n": 100, "max_tokens": 1}, {"prompt": ["a"] * 129, "max_tokens": 1}, {"prompt": ["a"] * 2, "best_of": 128, "n": 1, "max_tokens": 1}):
            with self.subTest(fields=str(fields)[:60]):
                response = self.daemon.complete(**fields)
                self.assertEqual(response.status, 400)
                self.assertIn(response.json()["error"]["param"], ("n", "best_of", "prompt"))
        self.works()

    def test_stream_options_members(self):
        for value in ("1", '"true"', "[]", "{}"):
            for name in ("include_usage", "continuous_usage_stats"):
                response = self.post(self.body("stream_options", f'{{"{name}":{value}}}'))
                self.assertEqual(response.status, 400, response)
                self.assertTrue(response.json()["error"]["param"].startswith("stream_options"), response)

    def test_too_long(self):
        for fields in ({"prompt": "x" * 2048, "max_tokens": 1}, {"prompt": "x" * 100_000, "max_tokens": 1}, {"prompt": [1] * 2048, "max_tokens": 1},
                       {"prompt": "x" * 2000, "max_tokens": 49}, {"prompt": ["ok", "x" * 3000], "max_tokens": 1}, {"prompt": "x" * 3_000_000, "max_tokens": 1},
                       {"prompt": "x", "max_tokens": 2**31 - 1}):
            response = self.daemon.complete(**fields)
            self.assertEqual(response.status, 400, response)
            error = response.json()["error"]
            self.assertIn(error["param"], ("prompt", "max_tokens"))
            self.assertEqual(error["code"], "context_length_exceeded")
            self.assertIn("2048", error["message"])
            self.works()
        self.assertEqual(self.daemon.complete(prompt="x" * 2000, max_tokens=48).status, 200)
        cut = self.daemon.complete(prompt="x" * 3000, max_tokens=8, truncate_prompt_tokens=100)
        self.assertEqual(cut.json()["usage"]["prompt_tokens"], 100)

    def test_unknown_model(self):
        for model in ("", "gpt-4", "../../etc/passwd", "x" * 100_000, "a\u0000b", self.daemon.model + " ", self.daemon.model.upper() + "x"):
            self.assertError(self.daemon.complete(model=model), 404, "model", code="model_not_found")
        self.works()

    def test_tokenize(self):
        for path, body in (("/tokenize", b"{}"), ("/tokenize", b'{"prompt":1}'), ("/tokenize", b'{"prompt":["a"]}'), ("/tokenize", b'{"prompt":"a","add_special_tokens":1}'),
                           ("/tokenize", b"[]"), ("/tokenize", b'{"prompt":"\xff"}'), ("/detokenize", b"{}"), ("/detokenize", b'{"tokens":1}'), ("/detokenize", b'{"tokens":["a"]}'),
                           ("/detokenize", b'{"tokens":[-1]}'), ("/detokenize", b'{"tokens":[1000000]}'), ("/detokenize", b'{"tokens":[1.5]}'), ("/detokenize", b'{"tokens":[[1]]}')):
            response = self.post(body, path)
            self.assertEqual(response.status, 400, (path, body, response))
            self.assertEqual(response.json()["error"]["type"], "invalid_request_error")
        self.works()
        text = "Grüße 😀 \u0000 end"
        tokens = self.post(json.dumps({"prompt": text, "add_special_tokens": False}).encode(), "/tokenize").json()
        self.assertEqual(tokens["tokens"], list(text.encode()))
        self.assertEqual((tokens["count"], tokens["max_model_len"]), (len(text.encode()), 2048))
        back = self.post(json.dumps({"tokens": tokens["tokens"]}).encode(), "/detokenize").json()
        self.assertEqual((back["prompt"], back["content"]), (text, text))

    def test_the_log_has_no_prompts(self):
        secret = "a secret that stays one"
        self.daemon.complete(prompt=secret, max_tokens=1)
        self.post(json.dumps({"prompt": secret, "n": secret}).encode())
        self.post(b'{"prompt":"' + secret.encode())
        self.assertNotIn(secret, self.daemon.log())


class Routes(harness.DaemonCase):
    ROUTES = {"/v1/completions": "POST", "/tokenize": "POST", "/detokenize": "POST", "/v1/models": "GET", "/health": "GET", "/metrics": "GET"}

    def test_unknown_paths(self):
        for path in ("/", "/v1", "/v1/", "/v2/completions", "/v1/completion", "/v1/completions/", "/v1//completions", "/V1/completions", "/v1/completions%20", "/health/", "/healthz",
                     "/metrics/x", "/../etc/passwd", "/v1/../health", "/%2e%2e/health", "/v1/models/", "/favicon.ico", "/" + "a" * 5000, "/%", "/%zz", "/%00"):
            for method in ("GET", "POST"):
                with self.subTest(path=path[:40], method=method):
                    response = self.daemon.request(method, path, b"{}" if method == "POST" else b"")
                    self.assertEqual(response.status, 404, response)
                    self.assertIn("message", response.json()["error"])
        self.assertError(self.daemon.get("/v1/models/nobody"), 404, "model", code="model_not_found")

    def test_a_nul_in_the_path(self):
        """It does not end there: what stands behind it counts."""
        for path in (f"/v1/models/{self.daemon.model}", "/health", "/v1/models", "/metrics"):
            self.assertEqual(self.daemon.get(path).status, 200)
            for end in ("%00", "%00evil", "%00/x?a=b", "%00%00"):
                with self.subTest(path=path + end):
                    self.assertEqual(self.daemon.get(path + end).status, 404)
            self.assertEqual(self.daemon.get(path + "?a=%00").status, 200)
        with self.daemon.connect() as connection:  # on one connection: it is forgotten with the request
            for path, status in (("/health%00", 404), ("/health", 200)):
                connection.send(raw.request_bytes("GET", path))
                self.assertEqual(connection.read_response().status, status)

    def test_a_long_name(self):
        """As long as a name may be: it is a path too, and one more or less is another one."""
        name = "n/" * 200 + "m" * 111
        with harness.Daemon(*harness.MOCK, "--served-name", name) as daemon:
            self.assertEqual(daemon.get(f"/v1/models/{name}").json()["id"], name)
            for other in (name + "m", name[:-1], name + "m" * 3000, name + "%00", name + "/", name[:250]):
                self.assertEqual(daemon.get(f"/v1/models/{other}").status, 404)
            self.assertEqual(daemon.complete(max_tokens=1).json()["model"], name)

    def test_encoded_bodies(self):
        body = json.dumps({"model": self.daemon.model, "prompt": "a", "max_tokens": 1}).encode()
        for path in ("/v1/completions", "/tokenize"):
            for encoding in ("gzip", "deflate", "br", "zstd", "gzip, identity", "identity, gzip", "x"):
                with self.subTest(path=path, encoding=encoding):
                    response = self.daemon.post(path, body, {"Content-Encoding": encoding})
                    self.assertError(response, 415, code="unsupported_content_encoding")
                    self.assertEqual(response.header("Accept-Encoding"), "identity")
        for encoding in ("identity", "Identity", ""):
            self.assertEqual(self.daemon.post("/v1/completions", body, {"Content-Encoding": encoding}).status, 200)
        self.assertEqual(self.daemon.get("/health", {"Content-Encoding": "gzip"}).status, 200)  # it has no body

    def test_methods(self):
        for path, right in self.ROUTES.items():
            for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "TRACE", "BREW", "get"):
                if method == right:
                    continue
                with self.subTest(path=path, method=method):
                    response = self.daemon.request(method, path)
                    self.assertEqual(response.status, 405, response)
                    allowed = {name.strip() for name in response.header("Allow").split(",")}
                    self.assertIn(right, allowed)
                    self.assertNotIn(method, allowed)
                    self.assertIn("message", response.json()["error"])

    def test_head(self):
        for path in ("/health", "/v1/models", "/metrics"):
            with self.daemon.connect() as connection:
                connection.send(raw.request_bytes("HEAD", path))
                self.assertEqual(connection.read_response(head=True).status, 200)
                connection.send(raw.request_bytes("GET", "/health"))  # no body was sent: the next answer follows at once
                self.assertEqual(connection.read_response().status, 200)

    def test_options(self):
        for path in self.ROUTES:
            response = self.daemon.request("OPTIONS", path)
            self.assertIn(response.status, (200, 204), response)
            self.assertIn(self.ROUTES[path], response.header("Allow") or "")
        response = self.daemon.request("OPTIONS", "*")  # of the server as a whole (RFC 9110 9.3.7)
        self.assertEqual((response.status, response.header("Allow")), (204, "GET, HEAD, POST, OPTIONS"))
        self.assertEqual(self.daemon.get("*").status, 404)

    def test_query_strings_do_not_matter(self):
        self.assertEqual(self.daemon.get("/health?verbose=1").status, 200)
        self.assertEqual(self.daemon.get("/v1/models?limit=20&a=%00").status, 200)

    def test_content_types(self):
        body = json.dumps({"model": self.daemon.model, "prompt": "a", "max_tokens": 1}).encode()
        for kind in ("application/json", "application/json; charset=utf-8", "APPLICATION/JSON", "application/x-www-form-urlencoded", "text/plain", None):
            response = self.daemon.post("/v1/completions", body, {"Content-Type": kind})
            self.assertIn(response.status, (200, 400), (kind, response))
            if response.status == 400:  # then it says which header is wrong
                self.assertIn("Content-Type", response.json()["error"]["message"])
        self.assertEqual(self.daemon.post("/v1/completions", body, {"Content-Type": "application/json; charset=utf-8"}).status, 200)

    def test_hosts(self):
        for host in ("localhost", "LOCALHOST", "127.0.0.1", "127.0.0.1:80", "localhost:8080", "[::1]", "[::1]:99", f"127.0.0.1:{self.daemon.port}"):
            self.assertEqual(self.daemon.get("/v1/models", {"Host": host}).status, 200, host)
        for host in ("example.com", "localhost.example.com", "127.0.0.1.example.com", "localhost@example.com", "evil.com:80", "127.0.0.1:80@evil.com", "0.0.0.0", "localhos", "[::2]",
                     "localhost:8080x", "", "localhost, example.com", "127.0.0.1#", "[::1", "10.0.0.1", "x" * 3000):
            for path in ("/v1/models", "/health", "/metrics"):
                response = self.daemon.get(path, {"Host": host})
                self.assertIn(response.status, (400, 403), (host, path, response))
                self.assertIn("error", response.json())
        self.assertError(self.daemon.get("/v1/models", {"Host": "example.com"}), 403, kind="permission_error")

    def test_targets_with_a_host(self):
        """The absolute form: a host in the target counts as one in Host does, and both must be ours."""
        for target, host, status in (("http://localhost/health", "localhost", 200), ("HTTP://127.0.0.1:80/v1/models?limit=1", "localhost", 200), ("http://localhost", "localhost", 404),
                                     ("http://localhost/nowhere", "localhost", 404), ("http://evil.example/health", "localhost", 403), ("http://localhost/health", "evil.example", 403),
                                     ("http:///health", "localhost", 403), ("http://localhost@evil.example/health", "localhost", 403), ("http://" + "a" * 400 + "/health", "localhost", 403),
                                     ("https://localhost/health", "localhost", 404)):
            with self.subTest(target=target[:40]):
                response = self.daemon.get(target, {"Host": host})
                self.assertEqual(response.status, status, response)

    def test_other_sites_pages(self):
        body = {"model": self.daemon.model, "prompt": "a", "max_tokens": 1}
        response = self.daemon.post("/v1/completions", body, {"Origin": "http://evil.example"})
        self.assertNotEqual(response.header("Access-Control-Allow-Origin"), "*")
        self.assertNotEqual(response.header("Access-Control-Allow-Origin"), "http://evil.example")
        self.assertEqual(self.daemon.post("/v1/completions", body, {"Origin": f"http://localhost:{self.daemon.port}"}).status, 200)


class Limits(harness.DaemonCase):
    flags = (*harness.MOCK, "--max-body", "64KiB")

    def test_large_bodies(self):
        fits = json.dumps({"model": self.daemon.model, "prompt": "a", "max_tokens": 1}).encode()
        fits += b" " * (65536 - len(fits))
        self.assertEqual(self.daemon.post("/v1/completions", fits).status, 200)
        for extra in (1, 1000, 10**6):
            with self.daemon.connect() as connection:
                connection.try_send(raw.request_bytes("POST", "/v1/completions", fits + b" " * extra))
                self.assertError(connection.read_response(), 413)
        self.assertWorks()

    def test_said_to_be_large(self):
        """Refused by what it says of itself, before a byte of it is asked for."""
        for length in (65537, 2**31, 2**32 + 5, 10**17):
            with self.daemon.connect() as connection:
                connection.send(raw.request_bytes("POST", "/v1/completions", headers={"Content-Length": str(length), "Expect": "100-continue", "Content-Type": "application/json"}))
                response = connection.read_response()
                self.assertError(response, 413)
                self.assertNotIn(b"100 Continue", connection.raw)
                self.assertTrue(connection.is_closed())
        self.assertWorks()

    def test_large_chunked(self):
        with self.daemon.connect() as connection:
            connection.send(raw.request_bytes("POST", "/v1/completions", headers={"Transfer-Encoding": "chunked", "Content-Type": "application/json"}))
            for _ in range(200):
                if select.select([connection.socket], [], [], 0)[0]:
                    break  # an answer, before all was sent
                connection.try_send(b"400\r\n" + b" " * 1024 + b"\r\n")
            self.assertError(connection.read_response(), 413)
            self.assertTrue(connection.is_closed())
        self.assertWorks()

    def test_expect(self):
        body = json.dumps({"model": self.daemon.model, "prompt": "a", "max_tokens": 1}).encode()
        with self.daemon.connect() as connection:
            head = raw.request_bytes("POST", "/v1/completions", headers={"Content-Length": str(len(body)), "Expect": "100-continue", "Content-Type": "application/json"})
            connection.send(head)
            self.assertRegex(connection._until(b"\r\n\r\n"), rb"^HTTP/1\.1 100 ")
            connection.send(body)
            self.assertEqual(connection.read_response().status, 200)

    def test_large_headers(self):
        for headers in ({"X-Large": "x" * 60_000}, {f"X-{i}": "y" * 20 for i in range(5000)}, {"Authorization": "Bearer " + "k" * 100_000}):
            with self.daemon.connect() as connection:
                connection.try_send(raw.request_bytes("GET", "/health", headers=headers))
                self.assertError(connection.read_response(), 431)
                self.assertTrue(connection.is_closed())
        with self.daemon.connect() as connection:
            connection.try_send(raw.request_bytes("GET", "/health?" + "a" * 100_000))
            self.assertError(connection.read_response(), 414)
            self.assertTrue(connection.is_closed())
        with self.daemon.connect() as connection:  # piece by piece, and no end
            for part in [b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ", *[b"y" * 1000] * 40]:
                connection.try_send(part)
                self.assertEqual(self.daemon.get("/health").status, 200)  # what came before was read
            self.assertError(connection.read_response(), 431)
            self.assertTrue(connection.is_closed())
        self.assertEqual(self.daemon.get("/health", {"X-Some": "x" * 16_000}).status, 200)
        self.assertEqual(self.daemon.get("/health", {f"X-{i}": "x" * 100 for i in range(120)}).status, 200)
        self.assertWorks()


class Framing(harness.DaemonCase):
    """What must not be understood in two ways. A second request is hidden in what a wrong reading would take for the next message; only one answer may come."""

    flags = (*harness.MOCK, "--header-timeout", "2s", "--body-timeout", "3s")

    def smuggle(self, head, body=b"", allowed=(400,)):
        """Sends it; nothing but one error in OpenAI's form may come back, and the connection must close."""
        with self.daemon.connect() as connection:
            connection.try_send(head.replace(b"\n", b"\r\n") + b"\r\n\r\n" + body)
            response = connection.read_response()
            self.assertIn(response.status, allowed, response)
            self.assertEqual(response.header("Connection"), "close", response)
            rest = connection.read_to_end()
            self.assertNotRegex(connection.raw, rb"HTTP/1\.1 [123]")
            self.assertEqual(rest, b"")
            self.assertEqual(set(response.json()["error"]), {"message", "type", "param", "code"})

    HIDDEN = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    POST = b"POST /v1/completions HTTP/1.1\nHost: localhost\nContent-Type: application/json"

    def test_ambiguous_lengths(self):
        cases = [
            b"\nContent-Length: 5\nContent-Length: 6", b"\nContent-Length: 5\nContent-Length: 5", b"\nContent-Length: 5\ncontent-length: 50", b"\nContent-Length: 5, 5",
            b"\nContent-Length: 5,6", b"\nContent-Length: 5\nTransfer-Encoding: chunked", b"\nTransfer-Encoding: chunked\nContent-Length: 5", b"\nContent-Length : 5",
            b"\nContent-Length\t: 5", b"\nTransfer-Encoding : chunked", b"\nContent-Length: +5", b"\nContent-Length: -1", b"\nContent-Length: 0x5", b"\nContent-Length: 5 5",
            b"\nContent-Length: five", b"\nContent-Length: ", b"\nContent-Length: 18446744073709551616", b"\nContent-Length: 99999999999999999999999", b"\nContent-Length: 5.0",
            b"\nTransfer-Encoding: gzip", b"\nTransfer-Encoding: chunked, gzip", b"\nTransfer-Encoding: gzip, chunked", b"\nTransfer-Encoding: identity",
            b"\nTransfer-Encoding: chunked\nTransfer-Encoding: identity", b"\nTransfer-Encoding: chunked\nTransfer-Encoding: chunked", b"\nTransfer-Encoding: xchunked",
            b"\nTransfer-Encoding: \x0bchunked", b"\nTransfer-Encoding: 'chunked'", b"\nTransfer-Encoding: chunked;q=1",
        ]
        for case in cases:
            with self.subTest(case=case):
                self.smuggle(self.POST + case, b"0\r\n\r\n" + self.HIDDEN, (400, 413, 501))
        self.assertWorks()

    def test_two_hosts(self):
        for case in (b"GET /v1/models HTTP/1.1\nHost: localhost\nHost: localhost", b"GET /v1/models HTTP/1.1\nHost: localhost\nhost: evil.example",
                     b"GET /v1/models HTTP/1.1", b"GET /v1/models HTTP/1.1\nX: y", b"GET /v1/models HTTP/1.1\nHost : localhost"):
            with self.subTest(case=case):
                self.smuggle(case)

    def test_malformed_fields(self):
        for case in (b"\nX y: z", b"\n: empty", b"\nX-\x01: y", b"\nX: a\x00b", b"\nX(y): z", b'\nX"y: z', b"\nX: \x7f\x01"):
            with self.subTest(case=case):
                self.smuggle(b"GET /v1/models HTTP/1.1\nHost: localhost" + case)

    def test_malformed_request_lines(self):
        for case in (b"GET", b"GET /", b"GET  /health HTTP/1.1", b"GET /health", b"GET /health HTTP/9.9", b"GET /health HTTP/1.1 x", b"GET /health http/1.1", b"\x16\x03\x01\x02\x00\x01\x00",
                     b"GET health HTTP/1.1", b"GET http://evil.example/health HTTP/1.1", b"CONNECT evil.example:443 HTTP/1.1", b"G\x00T /health HTTP/1.1", b"SSH-2.0-x", b"PRI * HTTP/2.0"):
            with self.subTest(case=case):
                with self.daemon.connect() as connection:
                    connection.try_send(case + b"\r\nHost: localhost\r\n\r\n")
                    connection.try_shutdown()
                    answer = connection.read_to_end()
                self.assertNotIn(b"\r\n200 ", answer)
                if not answer.startswith(b"HTTP/1.1 200"):
                    self.assertRegex(answer, rb"^HTTP/1\.1 (400|403|404|405|505) ")
                    self.assertEqual(set(json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]), {"message", "type", "param", "code"})
        self.assertWorks()

    def test_mutations_of_a_request(self):
        """The same for the whole message: whatever it has become, the next client is served."""
        body = json.dumps({"model": self.daemon.model, "prompt": "a", "max_tokens": 1}).encode()
        whole = raw.request_bytes("POST", "/v1/completions", body, {"Expect": "100-continue", "Connection": "keep-alive", "X-Request-Id": "a"})
        head = whole.index(b"\r\n\r\n") + 4
        chance = random.Random(4)
        for i in range(harness.rounds(400, 60)):
            data = bytearray(whole)
            for _ in range(chance.choice((1, 2, 4))):
                at = chance.randrange(head)
                if chance.randrange(2):
                    data[at] = chance.choice((chance.randrange(256), 13, 10, 32, 58, 0))
                else:
                    del data[at : at + chance.choice((1, 2, 10))]
            with self.daemon.connect() as connection:
                connection.try_send(bytes(data))
                connection.try_shutdown()
                answer = connection.read_to_end()
            if answer:  # a good one that takes time has nobody to wait for it any more
                self.assertRegex(answer, rb"^HTTP/1\.[01] [1245]\d\d ", bytes(data))
            self.assertNotIn(b"<html", answer, bytes(data))
            if i % 20 == 0:
                self.assertWorks()
        self.assertWorks()

    def test_chunk_sizes(self):
        body = json.dumps({"model": self.daemon.model, "prompt": "a", "max_tokens": 1}).encode()
        head = self.POST + b"\nTransfer-Encoding: chunked"
        for chunks in (b"zz\r\n" + body, b"-5\r\nabcde\r\n0\r\n\r\n", b"+5\r\nabcde\r\n0\r\n\r\n", b"0x5\r\nabcde\r\n0\r\n\r\n", b"ffffffffffffffff\r\nabc", b"10000000000000000000\r\nabc",
                       b"5\r\nabcdeXX0\r\n\r\n", b"5 5\r\nabcde\r\n0\r\n\r\n", b"\r\nabc\r\n0\r\n\r\n", b"7fffffffffffffff\r\nabc"):
            with self.subTest(chunks=chunks[:40]):
                self.smuggle(head, chunks + self.HIDDEN, (400, 413))
        self.assertWorks()

    def test_chunked_body(self):
        body = json.dumps({"model": self.daemon.model, "prompt": "a", "max_tokens": 1}).encode()
        for size in (1, 7, 1000):
            with self.daemon.connect() as connection:
                pieces = [body[i : i + size] for i in range(0, len(body), size)]
                connection.send((self.POST + b"\nTransfer-Encoding: chunked\n\n").replace(b"\n", b"\r\n"))
                for piece in pieces:
                    connection.send(b"%x\r\n%s\r\n" % (len(piece), piece))
                connection.send(b"0\r\n\r\n")
                self.assertEqual(connection.read_response().status, 200)
                connection.send(raw.request_bytes("GET", "/health"))
                self.assertEqual(connection.read_response().status, 200)

    def test_pipelining(self):
        body = json.dumps({"model": self.daemon.model, "prompt": "a", "max_tokens": 3}).encode()
        with self.daemon.connect() as connection:
            connection.send(raw.request_bytes("GET", "/health") + raw.request_bytes("POST", "/v1/completions", body) + raw.request_bytes("GET", "/nowhere") +
                            raw.request_bytes("POST", "/v1/completions", b'{"prompt":') + raw.request_bytes("GET", "/v1/models"))
            for status in (200, 200, 404, 400, 200):
                response = connection.read_response()
                self.assertEqual(response.status, status)
                self.assertNotEqual((response.header("Connection") or "").lower(), "close")
            streamed = json.dumps({"model": self.daemon.model, "prompt": "a", "max_tokens": 3, "stream": True, "logit_bias": {"97": 100}}).encode()
            connection.send(raw.request_bytes("POST", "/v1/completions", streamed) + raw.request_bytes("GET", "/health"))
            self.assertEqual(len(harness.events(connection.read_response().body)), 3)
            self.assertEqual(connection.read_response().status, 200)

    def test_http_1_0(self):
        with self.daemon.connect() as connection:
            connection.send(b"GET /health HTTP/1.0\r\n\r\n")
            self.assertEqual(connection.read_response().status, 200)
            self.assertTrue(connection.is_closed())
        body = json.dumps({"model": self.daemon.model, "prompt": "a", "max_tokens": 3, "stream": True, "logit_bias": {"97": 100}}).encode()
        with self.daemon.connect() as connection:
            connection.send(b"POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            response = connection.read_response()
            self.assertIsNone(response.header("Transfer-Encoding"))
            self.assertEqual(len(harness.events(response.body)), 3)

    def test_truncated_body(self):
        """The client leaves in the middle of its body: nothing of it is answered, nothing of it stays."""
        body = json.dumps({"model": self.daemon.model, "prompt": "a", "max_tokens": 1}).encode()
        for cut in (0, 1, len(body) // 2, len(body) - 1):
            for leave in (raw.Connection.close, raw.Connection.reset):
                connection = self.daemon.connect()
                connection.send(raw.request_bytes("POST", "/v1/completions", body)[: cut - len(body)])
                leave(connection)
        self.assertWorks()
        self.daemon.wait_idle()

    def test_a_body_that_ends_early(self):
        """The client says that nothing more comes, and listens."""
        body = json.dumps({"model": self.daemon.model, "prompt": "a", "max_tokens": 1}).encode()
        chunked = raw.request_bytes("POST", "/v1/completions", headers={"Transfer-Encoding": "chunked", "Content-Type": "application/json"})
        whole = raw.request_bytes("POST", "/v1/completions", body)
        for request in (*(whole[: cut - len(body)] for cut in (0, 1, len(body) // 2, len(body) - 1)), chunked + b"20\r\n{", chunked + b"1\r\n{\r\n"):
            for at_once in (True, False):  # or when the server waits for the rest
                with self.subTest(request=request[-40:], at_once=at_once), self.daemon.connect() as connection:
                    connection.send(request)
                    if not at_once:
                        self.assertWorks()
                    connection.try_shutdown()
                    self.assertError(connection.read_response(), 400, None, code="truncated_body")
                    self.assertTrue(connection.is_closed())
        with self.daemon.connect() as connection:  # whole, and wrong: the end of the stream does not take the answer away
            connection.send(whole[: -len(body)])
            self.assertWorks()
            connection.send(b"x" * len(body))
            connection.try_shutdown()
            self.assertError(connection.read_response(), 400, None, code="invalid_json")
        self.assertWorks()

    def drip(self, start, byte):
        """One byte whenever the server has not yet hung up; the answer, or None for a bare close. Bounded by the server's deadline, which is the test."""
        with self.daemon.connect(timeout=0.2) as connection:
            connection.send(start)
            for _ in range(150):
                try:
                    connection.try_send(byte)
                    connection._receive()
                except TimeoutError:
                    continue
                except raw.Closed:
                    return None
                connection.socket.settimeout(raw.TIMEOUT)
                response = connection.read_response()
                self.assertTrue(connection.is_closed())
                return response
        self.fail("the deadline passed and the connection is still open")

    def test_slow_headers(self):
        for start, byte in ((b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ", b"a"), (b"", b"G"), (b"POST /v1/completions HTTP/1.1\r\n", b"")):
            self.assertError(self.drip(start, byte), 408, None, code="request_timeout")
        self.assertIsNone(self.drip(b"", b""))  # nothing was asked
        self.assertWorks()

    def test_tls(self):
        """A hello of TLS holds no whole line: its client is answered all the same, and not by the deadline of the headers."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
        with self.assertRaises(ssl.SSLWantReadError):
            client.do_handshake()
        real = outgoing.read()
        for pieces in ((b"\x16",), (b"\x16\x03\x01\x02\x00\x01\x00" + b"h" * 500,), (b"\x16", b"\x03\x01" + b"h" * 500), (real,), (real[:3], real[3:])):
            with self.subTest(pieces=pieces), self.daemon.connect() as connection:
                for piece in pieces:
                    connection.try_send(piece)
                error = self.assertError(connection.read_response(), 400, None, code="bad_request_line")
                self.assertIn("TLS", error["message"])
                self.assertIn("plain HTTP", error["message"])
                self.assertEqual(connection.read_to_end(), b"")
        with self.assertRaises(ssl.SSLError), self.daemon.connect() as connection:
            ssl.create_default_context().wrap_socket(connection.socket, server_hostname="localhost")
        self.assertWorks()

    def test_slow_body(self):
        head = raw.request_bytes("POST", "/v1/completions", headers={"Content-Length": "1000", "Content-Type": "application/json"})
        self.assertError(self.drip(head, b" "), 408, None, code="request_timeout")
        self.assertWorks()

    def test_many_slow_clients(self):
        """Others are answered while hundreds hold a half request open."""
        held = [self.daemon.connect() for _ in range(harness.rounds(300, 60))]
        for connection in held:
            connection.send(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n")
        for _ in range(20):
            self.assertEqual(self.daemon.get("/health").status, 200)
        self.assertWorks()
        for connection in held:  # the deadline ends them all
            connection.read_to_end()
            connection.close()
        self.assertWorks()


if __name__ == "__main__":
    unittest.main(verbosity=2)
