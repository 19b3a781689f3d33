"""`kvasir serve` as the tests see it: started on a free port, watched through its log, /health and /metrics, stopped by SIGTERM.

KVASIR_PROGRAM is the program; the sample model is KVASIR_TEST_MODEL, or SmolLM2-135M-Instruct.Q4_1.gguf in the cache folder. KVASIR_TEST_SHORT=1: fewer rounds of
the long tests (sanitized builds)."""
import json
import os
import pathlib
import re
import signal
import subprocess
import tempfile
import threading
import time
import unittest

import raw

SHORT = raw.SHORT
PROGRAM = os.environ.get("KVASIR_PROGRAM", "kvasir")
DEADLINE = raw.TIMEOUT  # seconds, of every wait
TICK = 0.01  # between two looks at something that gives no signal

# The mock backend computes nothing, with a tokenizer whose ids 0..255 are bytes: for what lies above the kernels.
MOCK = ("--backend", "mock")


def sample_model():
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    path = pathlib.Path(os.environ.get("KVASIR_TEST_MODEL") or cache / "kvasir" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    if not path.is_file():
        raise AssertionError(f"the sample model is not at {path}: let tests/run fetch it, or set KVASIR_TEST_MODEL")
    return str(path)


def rounds(count, short):
    return short if SHORT else count


def wait_until(condition, what, seconds=DEADLINE):
    """For states that give no signal (a number on /metrics): looks again and again, with a bound."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"after {seconds} s still not: {what() if callable(what) else what}")
        time.sleep(TICK)


class Daemon:
    def __init__(self, *flags, environment=None, ready=True):
        self.lines = []
        self.changed = threading.Condition()
        clean = {name: value for name, value in os.environ.items() if not name.startswith("KVASIR_") and name != "NOTIFY_SOCKET"}
        self.process = subprocess.Popen([PROGRAM, "serve", "--port", "0", *flags], env={**clean, **(environment or {})}, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        try:
            host, port = self.wait_line(r"http://(127\.0\.0\.1|\[::1\]):(\d+)").groups()
            self.address = (host.strip("[]"), int(port))
            self.port = int(port)
            if ready:
                self.wait_ready()
                self.model = self.get("/v1/models").json()["data"][0]["id"]
        except BaseException:
            self.kill()
            raise

    def _read(self):
        for line in self.process.stdout:
            with self.changed:
                self.lines.append(line.decode("utf-8", "replace").rstrip("\n"))
                self.changed.notify_all()
        with self.changed:
            self.lines.append(None)  # the end
            self.changed.notify_all()

    def log(self):
        with self.changed:
            return "\n".join(line for line in self.lines if line is not None)

    def wait_line(self, pattern, first=0):
        """The first log line from index `first` on that matches."""
        expression = re.compile(pattern)
        end = time.monotonic() + DEADLINE
        at = first
        with self.changed:
            while True:
                while at < len(self.lines):
                    if self.lines[at] is None:
                        raise AssertionError(f"the daemon ended without a line like {pattern!r}; its log:\n" + "\n".join(self.lines[:-1]))
                    if match := expression.search(self.lines[at]):
                        return match
                    at += 1
                if not self.changed.wait(end - time.monotonic()):
                    raise AssertionError(f"no line like {pattern!r} in {DEADLINE} s; the log:\n" + "\n".join(self.lines))

    def wait_ready(self):
        self.wait_line(r"^ready\b")
        assert self.get("/health").status == 200

    # ---- requests ----

    def connect(self, **options):
        return raw.Connection(self.address, **options)

    def request(self, method, path, body=b"", headers=()):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        with self.connect() as connection:
            connection.send(raw.request_bytes(method, path, body, headers))
            return connection.read_response(head=method == "HEAD")

    def get(self, path, headers=()):
        return self.request("GET", path, headers=headers)

    def post(self, path, body, headers=()):
        return self.request("POST", path, body, headers)

    def complete(self, headers=(), **fields):
        return self.post("/v1/completions", {"model": self.model, "prompt": "hello", **fields}, headers)

    def tokens(self, text):
        return self.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"]

    def stream(self, headers=(), receive_buffer=None, **fields):
        """A connection on which a streamed answer begins; nothing of it is read yet."""
        connection = self.connect(receive_buffer=receive_buffer)
        body = json.dumps({"model": self.model, "prompt": "hello", "stream": True, **fields}).encode()
        connection.send(raw.request_bytes("POST", "/v1/completions", body, headers))
        return connection

    # ---- numbers ----

    def metrics(self, headers=()):
        """{name{labels}: value}"""
        response = self.get("/metrics", headers)
        assert response.status == 200, response
        return parse_metrics(response.body.decode())

    def gauge(self, name):
        """One number of the page whose labels do not matter: the sum over them."""
        found = [value for series, value in self.metrics().items() if series.partition("{")[0] == "kvasir_" + name]
        assert found, f"/metrics has no kvasir_{name}"
        return sum(found)

    def load(self):
        """(running, waiting, used blocks)"""
        page = self.metrics()
        value = lambda prefix, part="": sum(v for k, v in page.items() if k.partition("{")[0] == prefix and part in k)
        assert any(k.startswith("kvasir_requests_running") for k in page), "no kvasir_requests_running"
        assert any(k.startswith("kvasir_kv_cache_blocks") and 'state="used"' in k for k in page), "no used blocks"
        return value("kvasir_requests_running"), value("kvasir_requests_waiting"), value("kvasir_kv_cache_blocks", 'state="used"')

    def wait_idle(self):
        """Nothing runs, nothing waits, and every block is back."""
        wait_until(lambda: self.load() == (0, 0, 0), lambda: f"idle (running, waiting, used blocks are {self.load()})")

    # ---- the end ----

    def signal(self, number):
        self.process.send_signal(number)

    def wait_exit(self):
        self.process.wait(DEADLINE + 30)
        self.reader.join(DEADLINE)
        self.process.stdout.close()
        return self.process.returncode

    def stop(self):
        """SIGTERM; the exit status."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        return self.wait_exit()

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.wait_exit()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind:
            self.kill()
            return
        code = self.stop()
        assert code == 0, f"exit status {code}; the log:\n{self.log()[-6000:]}"


def parse_metrics(text):
    """The text format, strictly: {series as printed: value}."""
    series = {}
    for line in text.splitlines():
        if line.startswith("#") or not line:
            continue
        match = re.fullmatch(r'([a-zA-Z_:][a-zA-Z0-9_:]*(?:\{(?:[a-z_]+="(?:[^"\\\n]|\\[\\"n])*",?)*\})?) (\S+)', line)
        assert match, f"malformed line {line!r}"
        assert match[1] not in series, f"{match[1]} stands twice"
        series[match[1]] = float(match[2].replace("+Inf", "inf"))
    return series


class DaemonCase(unittest.TestCase):
    """A daemon for all tests of a class. After each test it lives; after the last it is idle and exits 0 on SIGTERM."""

    flags = MOCK
    maxDiff = None

    @classmethod
    def start(cls):
        return Daemon(*cls.flags)

    @classmethod
    def setUpClass(cls):
        cls.daemon = cls.start()

    @classmethod
    def tearDownClass(cls):
        with cls.daemon as daemon:
            daemon.wait_idle()

    def tearDown(self):
        self.assertIsNone(self.daemon.process.poll(), self.daemon.log()[-6000:])

    def assertError(self, response, status, param=None, kind="invalid_request_error", code=None):
        """OpenAI's error object, complete."""
        self.assertEqual(response.status, status, response)
        self.assertEqual(response.header("Content-Type").partition(";")[0], "application/json")
        body = response.json()
        self.assertEqual(set(body), {"error"}, body)
        error = body["error"]
        self.assertEqual(set(error), {"message", "type", "param", "code"}, error)
        self.assertIsInstance(error["message"], str)
        self.assertGreater(len(error["message"]), 5)
        self.assertEqual((error["type"], error["param"]), (kind, param), error)
        if code:
            self.assertEqual(error["code"], code)
        return error

    def assertWorks(self):
        response = self.daemon.complete(prompt="still there?", max_tokens=1)
        self.assertEqual(response.status, 200, response)
        self.assertEqual(response.json()["usage"]["completion_tokens"], 1)


def events(body):
    """The JSON values of a stream, its framing checked to the byte: `data: {...}` and one blank line each, `data: [DONE]` last. Comments are left out."""
    assert body.endswith(b"\n\n"), body[-100:]
    assert b"\r" not in body
    values, done = [], False
    for block in body[:-2].split(b"\n\n"):
        if block.startswith(b":"):
            continue
        assert b"\n" not in block and block.startswith(b"data: ") and not done, block
        if block == b"data: [DONE]":
            done = True
        else:
            values.append(json.loads(block[6:].decode("utf-8")))
    assert done, body[-200:]
    return values


def text_of(chunks, index=0):
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == index)


