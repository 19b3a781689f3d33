"""Whatever clients do, everything comes back: blocks, places, descriptors. Clients that vanish in every state, readers that do not read, more load than fits, signals at bad times.

States are reached by looking at /metrics, never by waiting a while; each test proves by a counter that it took the path it is about."""
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest

import harness
import raw

LONG = {"max_tokens": 7000, "ignore_eos": True}  # more than is made while anybody looks at it


def descriptors(daemon):
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def status_kb(daemon, name):
    with open(f"/proc/{daemon.process.pid}/status") as file:
        return int(next(line.split()[1] for line in file if line.startswith(name + ":")))


class Notify:
    """What systemd would hear."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.path = os.path.join(self.folder.name, "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.settimeout(harness.DEADLINE)
        self.heard = []

    def wait(self, wanted):
        """Everything up to the first message that says `wanted`."""
        while True:
            message = self.socket.recv(4096).decode().splitlines()
            self.heard.append(message)
            if wanted in message:
                return message

    def close(self):
        self.socket.close()
        self.folder.cleanup()


class Gone(harness.DaemonCase):
    """Two places to run, 2000 rows a second: requests live long enough to be left in any state."""

    flags = (*harness.MOCK, "--max-sequences", "2", "--max-queue", "64", "--mock-tokens-per-second", "2000", "--max-model-len", "8192", "--prefix-cache=false",
             "--first-byte-timeout", "60s")
    LEAVE = {"close": raw.Connection.close, "reset": raw.Connection.reset, "half": lambda connection: connection.socket.shutdown(socket.SHUT_WR)}

    def aborted(self):
        return self.daemon.gauge("requests_aborted_total")

    def decoding(self, stream):
        if stream:
            connection = self.daemon.stream(**LONG)
            connection.read_head()
            connection.read_chunk()
            return connection
        connection = self.daemon.connect()
        before = self.daemon.gauge("computed_generation_tokens_total")
        connection.send(raw.request_bytes("POST", "/v1/completions", json.dumps({"model": self.daemon.model, "prompt": "hello", **LONG}).encode()))
        harness.wait_until(lambda: self.daemon.gauge("computed_generation_tokens_total") > before + 5, "tokens are made")
        return connection

    def leave_each_way(self, make):
        for name, leave in self.LEAVE.items():
            with self.subTest(leave=name):
                before = self.aborted()
                connection = make()
                leave(connection)
                harness.wait_until(lambda: self.aborted() > before, "the abort is counted")
                self.daemon.wait_idle()
                connection.close()
        self.assertWorks()

    def test_in_decode(self):
        self.leave_each_way(lambda: self.decoding(True))

    def test_in_decode_without_a_stream(self):
        self.leave_each_way(lambda: self.decoding(False))

    def test_in_prefill(self):
        def make():
            chunks = self.daemon.gauge("prompt_chunks_total")
            connection = self.daemon.stream(prompt="x" * 8000, max_tokens=100)
            harness.wait_until(lambda: self.daemon.load()[0] == 1 and self.daemon.gauge("prompt_chunks_total") > chunks, "the prompt is being read")
            self.assertGreater(self.daemon.load()[2], 0)
            return connection

        self.leave_each_way(make)

    def test_in_the_queue(self):
        def make():
            hogs = [self.decoding(True), self.decoding(True)]
            connection = self.daemon.stream(**LONG)
            harness.wait_until(lambda: self.daemon.load()[:2] == (2, 1), "one waits")
            return connection, hogs

        for name, leave in self.LEAVE.items():
            with self.subTest(leave=name):
                connection, hogs = make()
                leave(connection)
                harness.wait_until(lambda: self.daemon.load()[:2] == (2, 0), "the queue is empty")
                for hog in hogs:  # they were not harmed
                    hog.read_chunk()
                    hog.close()
                self.daemon.wait_idle()
                connection.close()
        self.assertWorks()

    def test_many_choices(self):
        """Some run, most wait, some are not forked yet."""
        for leave in (raw.Connection.close, raw.Connection.reset):
            before = self.aborted()
            connection = self.daemon.stream(prompt=["x" * 300, "y" * 300, "z" * 300], n=8, **LONG)
            harness.wait_until(lambda: self.daemon.load()[0] == 2, "two run")
            leave(connection)
            harness.wait_until(lambda: self.aborted() == before + 24, "all are aborted")
            self.daemon.wait_idle()

    def test_killed_processes(self):
        """kill -9 of clients, each with streams in every state."""
        client = textwrap.dedent("""
            import json, raw, sys
            port, model, mine = int(sys.argv[1]), sys.argv[2], []
            for i in range(12):
                body = {"model": model, "prompt": "x" * (1 + 300 * (i % 4)), "max_tokens": 3000, "ignore_eos": True, "stream": i % 3 > 0, "n": 1 + i % 2}
                mine.append(raw.Connection(("127.0.0.1", port)))
                mine[-1].send(raw.request_bytes("POST", "/v1/completions", json.dumps(body).encode()))
            print("sent", flush=True)
            sys.stdin.read()
        """)
        before, files = self.aborted(), descriptors(self.daemon)
        for _ in range(harness.rounds(3, 1)):
            clients = [subprocess.Popen([sys.executable, "-c", client, str(self.daemon.port), self.daemon.model], cwd=os.path.dirname(os.path.abspath(__file__)),
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)]
            try:
                for process in clients:
                    self.assertEqual(process.stdout.readline(), b"sent\n")
                harness.wait_until(lambda: self.daemon.load()[0] == 2 and self.daemon.load()[1] > 10, "they run and wait")
            finally:
                for process in clients:
                    process.kill()
                    process.communicate()
            self.daemon.wait_idle()
        self.assertGreaterEqual(self.aborted() - before, 36)
        harness.wait_until(lambda: descriptors(self.daemon) <= files, "the descriptors are back")
        self.assertWorks()

    def test_gone_before_anything(self):
        for data in (b"", b"P", b"POST /v1/completions HTTP/1.1\r\n", b"\r\n\r\n"):
            for leave in self.LEAVE.values():
                connection = self.daemon.connect()
                connection.send(data)
                leave(connection)
                connection.close()
        self.assertWorks()
        harness.wait_until(lambda: self.daemon.gauge("connections") <= 1, "no connection is left but the one that asks")


class Churn(harness.DaemonCase):
    """At full speed: thousands of requests that end, are refused, or are left at a random byte."""

    flags = (*harness.MOCK, "--max-sequences", "8", "--max-queue", "32")

    def test_churn(self):
        threads, count, errors = 8, harness.rounds(250, 40), []
        before = self.daemon.gauge("requests_aborted_total")

        def work(seed):
            chance = random.Random(seed)
            try:
                for _ in range(count):
                    body = {"model": self.daemon.model, "prompt": "x" * chance.choice((1, 31, 32, 33, 400)), "max_tokens": chance.choice((1, 5, 60, 2000)), "ignore_eos": True,
                            "n": chance.choice((1, 1, 1, 3)), "stream": chance.random() < 0.7, "temperature": chance.choice((0, 1))}
                    with self.daemon.connect() as connection:
                        data = raw.request_bytes("POST", "/v1/completions", json.dumps(body).encode())
                        end = chance.choice(("all", "cut", "leave", "reset", "head"))
                        connection.send(data[: chance.randrange(len(data))] if end == "cut" else data)
                        if end == "all":
                            response = connection.read_response()
                            if response.status not in (200, 503):
                                errors.append(response)
                        elif end == "head":
                            connection.read_head()
                        elif end == "reset":
                            connection.reset()
            except Exception as error:  # noqa: BLE001: told below
                errors.append(error)

        files = descriptors(self.daemon)
        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        self.assertEqual(errors, [])
        self.daemon.wait_idle()
        harness.wait_until(lambda: descriptors(self.daemon) <= files + 1, "the descriptors are back")
        self.assertGreater(self.daemon.gauge("requests_aborted_total"), before)
        self.assertWorks()

    def test_gauges_fell_before_the_last_byte(self):
        """Who has read an answer to its end sees no trace of it in the gauges."""
        with self.daemon.connect() as asking, self.daemon.connect() as watching:
            for i in range(harness.rounds(100, 20)):
                body = {"model": self.daemon.model, "prompt": "hello", "max_tokens": 1 + i % 7, "n": 1 + i % 3, "stream": i % 2 == 0, "ignore_eos": True}
                asking.send(raw.request_bytes("POST", "/v1/completions", json.dumps(body).encode()))
                self.assertEqual(asking.read_response().status, 200)
                watching.send(raw.request_bytes("GET", "/metrics"))
                page = harness.parse_metrics(watching.read_response().body.decode())
                gauges = {k: v for k, v in page.items() if k.startswith(("kvasir_requests_running", "kvasir_requests_waiting"))}
                self.assertEqual(len(gauges), 2)
                self.assertEqual(set(gauges.values()), {0}, i)


    def test_many_streams(self):
        """All at once, five times more than run at a time: every one complete, in order, and the same."""
        count, fields = harness.rounds(32 + 8, 20), {"temperature": 0, "max_tokens": 200, "ignore_eos": True, "stream_options": {"include_usage": True}}
        alone = harness.events(self.read(self.daemon.stream(**fields)))
        streams = [self.daemon.stream(**fields) for _ in range(count)]
        for stream in streams:
            chunks = harness.events(self.read(stream))
            self.assertEqual(harness.text_of(chunks), harness.text_of(alone))
            self.assertEqual(chunks[-1]["usage"]["completion_tokens"], 200)

    def read(self, connection):
        with connection:
            response = connection.read_response()
            self.assertEqual(response.status, 200, response)
            return response.body


class Connections(unittest.TestCase):
    def test_more_than_allowed(self):
        """The others wait, and get their turn when one leaves: accepting does not freeze while all connections are streams."""
        with harness.Daemon(*harness.MOCK, "--max-connections", "8", "--mock-tokens-per-second", "2000", "--max-sequences", "32") as daemon:
            streams = []
            for _ in range(6):
                streams.append(daemon.stream(**LONG))
                streams[-1].read_head()
            asking = [daemon.connect() for _ in range(20)]
            for connection in asking:
                connection.send(raw.request_bytes("GET", "/health", headers={"Connection": "close"}))
            for connection in asking[:10]:
                self.assertEqual(connection.read_response().status, 200)
            for stream in streams:
                stream.close()
            for connection in asking[10:]:
                self.assertEqual(connection.read_response().status, 200)
            for connection in asking:
                connection.close()
            daemon.wait_idle()

    def test_no_descriptors(self):
        """When the process has no descriptor left it goes on with what it has, and takes new connections once there is room."""
        with harness.Daemon(*harness.MOCK) as daemon, daemon.connect() as kept:
            kept.send(raw.request_bytes("GET", "/health"))
            self.assertEqual(kept.read_response().status, 200)
            limit = descriptors(daemon) + 10
            resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
            many = [daemon.connect() for _ in range(50)]
            for _ in range(5):
                kept.send(raw.request_bytes("POST", "/v1/completions", json.dumps({"model": daemon.model, "prompt": "a", "max_tokens": 3}).encode()))
                self.assertEqual(kept.read_response().status, 200)
            for connection in many:
                connection.close()
            self.assertEqual(daemon.complete(max_tokens=1).status, 200)

    def test_idle_costs_nothing(self):
        """Processor time over some watchdog periods, with connections open and none of them saying anything."""
        notify = Notify()
        self.addCleanup(notify.close)
        with harness.Daemon(*harness.MOCK, environment={"NOTIFY_SOCKET": notify.path, "WATCHDOG_USEC": "500000"}) as daemon:
            idle = [daemon.connect() for _ in range(50)]
            for connection in idle[:25]:
                connection.send(raw.request_bytes("GET", "/health"))
                self.assertEqual(connection.read_response().status, 200)

            def seconds():
                with open(f"/proc/{daemon.process.pid}/stat") as file:
                    return sum(map(int, file.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")

            for _ in range(2):
                notify.wait("WATCHDOG=1")
            before = seconds()
            for _ in range(6):
                notify.wait("WATCHDOG=1")
            self.assertLess(seconds() - before, 0.3)
            for connection in idle:
                connection.close()


class SlowReaders(harness.DaemonCase):
    flags = (*harness.MOCK, "--stall-timeout", "2s", "--kv-memory", "1GiB", "--max-sequences", "16", "--prefix-cache=false")

    MUCH = {"n": 16, "max_tokens": 6000, "ignore_eos": True, "logprobs": 5}  # tens of MB of text

    def test_who_reads_nothing_is_cut_off(self):
        gone = self.daemon.gauge("clients_gone_total")
        connection = self.daemon.stream(receive_buffer=4096, **self.MUCH)
        harness.wait_until(lambda: self.daemon.gauge("generation_tokens_total") > 0, "tokens are made")
        for _ in range(20):  # others are served meanwhile
            self.assertWorks()
        self.daemon.wait_idle()
        harness.wait_until(lambda: self.daemon.gauge("clients_gone_total") > gone, "the stalled client is given up")
        self.assertNotIn(b"[DONE]", connection.read_to_end())
        connection.close()
        self.assertLess(status_kb(self.daemon, "VmRSS"), 2 * 1024 * 1024 if not harness.SHORT else 1 << 40)

    def test_who_takes_little_at_a_time_is_not_cut_off(self):
        """Far too little for what waits in the system's buffers to shrink much within the timeout, but something."""
        gone = self.daemon.gauge("clients_gone_total")
        with self.daemon.stream(receive_buffer=4096, **self.MUCH) as connection:
            harness.wait_until(lambda: self.daemon.gauge("generation_tokens_total") > 0, "tokens are made")
            end = time.monotonic() + 3 * 2  # of the timeout
            while time.monotonic() < end:
                self.assertTrue(connection.socket.recv(512), "cut off")
                time.sleep(0.1)  # the client's own pace
            self.assertEqual(self.daemon.gauge("clients_gone_total"), gone)
        self.daemon.wait_idle()

    def test_who_reads_slowly_gets_all(self):
        """Small sips through a small window: nothing is lost, whatever waits meanwhile."""
        fields = {"n": 4, "max_tokens": 400, "ignore_eos": True, "seed": 1}
        whole = self.daemon.complete(**fields).json()
        with self.daemon.stream(receive_buffer=2048, **fields) as connection:
            response = connection.read_head()
            real = connection.socket.recv
            connection.socket = type("Sips", (), {"recv": lambda _, n: real(min(n, 512)), "close": connection.socket.close})()
            body = b""
            while chunk := connection.read_chunk():
                body += chunk
        self.assertEqual(response.status, 200)
        chunks = harness.events(body)
        for choice in whole["choices"]:
            self.assertEqual(harness.text_of(chunks, choice["index"]), choice["text"])


class Overload(harness.DaemonCase):
    flags = (*harness.MOCK, "--max-sequences", "2", "--max-queue", "4", "--mock-tokens-per-second", "2000")

    def test_full(self):
        hogs = [self.daemon.stream(**LONG) for _ in range(6)]
        harness.wait_until(lambda: self.daemon.load()[:2] == (2, 4), "2 run, 4 wait")
        for stream in (False, True):
            for n in (1, 3):
                response = self.daemon.complete(max_tokens=1, stream=stream, n=n)
                self.assertEqual(response.status, 503, response)
                self.assertGreater(float(response.header("Retry-After")), 0)
                error = response.json()["error"]
                self.assertEqual(set(error), {"message", "type", "param", "code"})
        self.assertEqual(self.daemon.load()[:2], (2, 4))
        self.assertEqual(self.daemon.get("/health").status, 200)
        self.assertEqual(self.daemon.get("/v1/models").status, 200)
        self.assertGreaterEqual(self.daemon.gauge("requests_rejected_total"), 4)
        for hog in hogs:
            hog.close()
        self.daemon.wait_idle()
        self.assertWorks()

    def test_burst(self):
        """Hundreds at once: each gets an answer, 200 or 503, and those that were taken are right."""
        count, results = harness.rounds(200, 40), []
        connections = [self.daemon.connect() for _ in range(count)]
        body = json.dumps({"model": self.daemon.model, "prompt": "hello", "max_tokens": 3, "temperature": 0}).encode()
        for connection in connections:
            connection.send(raw.request_bytes("POST", "/v1/completions", body))
        for connection in connections:
            results.append(connection.read_response())
            connection.close()
        statuses = {status: sum(r.status == status for r in results) for status in {r.status for r in results}}
        self.assertLessEqual(set(statuses), {200, 503})
        self.assertGreaterEqual(statuses[200], 6)
        self.assertEqual(len({r.json()["choices"][0]["text"] for r in results if r.status == 200}), 1)
        self.assertTrue(all(float(r.header("Retry-After")) > 0 for r in results if r.status == 503))
        self.daemon.wait_idle()

    def test_more_choices_than_places(self):
        """One request that could never fit the queue is refused, and not for ever: with a word or with 503, never by a hang."""
        response = self.daemon.complete(n=20, max_tokens=1)
        self.assertIn(response.status, (400, 503), response)
        self.daemon.wait_idle()


class Drain(unittest.TestCase):
    """SIGTERM: nothing new, what runs is finished or told, and the exit status is 0."""

    def start(self, *flags):
        daemon = harness.Daemon(*harness.MOCK, "--max-sequences", "4", "--mock-tokens-per-second", "1000", *flags)
        self.addCleanup(daemon.kill)
        return daemon

    def test_what_runs_and_waits_is_finished(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            daemon = self.start()
            streams = [daemon.stream(max_tokens=200, ignore_eos=True, stream_options={"include_usage": True}) for _ in range(6)]
            whole = daemon.connect()
            whole.send(raw.request_bytes("POST", "/v1/completions", json.dumps({"model": daemon.model, "prompt": "a", "max_tokens": 100, "ignore_eos": True}).encode()))
            idle = daemon.connect()
            harness.wait_until(lambda: daemon.gauge("prompt_tokens_total") == 6 * len("hello") + 1, "all have been taken")
            daemon.signal(number)
            for stream in streams:
                chunks = harness.events(stream.read_response().body)
                self.assertEqual(chunks[-1]["usage"]["completion_tokens"], 200)
            self.assertEqual(whole.read_response().json()["usage"]["completion_tokens"], 100)
            self.assertTrue(idle.is_closed())
            self.assertEqual(daemon.wait_exit(), 0, daemon.log()[-3000:])
            for connection in (*streams, whole, idle):
                connection.close()

    def test_nothing_new(self):
        daemon = self.start()
        kept = daemon.connect()
        kept.send(raw.request_bytes("GET", "/health"))
        self.assertEqual(kept.read_response().status, 200)
        stream = daemon.stream(max_tokens=1000, ignore_eos=True)
        stream.read_head()
        daemon.signal(signal.SIGTERM)

        def refused():
            try:
                with daemon.connect() as connection:
                    connection.send(raw.request_bytes("GET", "/health"))
                    return connection.read_response().status == 503
            except (ConnectionError, raw.Closed):  # reset: it was in the queue of the listener when that was closed
                return True

        harness.wait_until(refused, "new connections are refused")
        try:  # a connection that was open already: an honest 503, or closed
            kept.send(raw.request_bytes("POST", "/v1/completions", b'{"prompt":"a"}'))
            response = kept.read_response()
            self.assertEqual(response.status, 503)
            self.assertGreater(float(response.header("Retry-After")), 0)
        except (raw.Closed, BrokenPipeError, ConnectionResetError):
            pass
        self.assertTrue(harness.events(b"".join(iter(stream.read_chunk, b""))))
        self.assertEqual(daemon.wait_exit(), 0)

    def test_the_limit(self):
        """What does not end in time is told so: an error event in a stream, an HTTP error otherwise."""
        daemon = self.start("--drain-timeout", "1s", "--request-timeout", "600s")
        stream = daemon.stream(max_tokens=8000, ignore_eos=True)
        stream.read_head()
        whole = daemon.connect()
        whole.send(raw.request_bytes("POST", "/v1/completions", json.dumps({"model": daemon.model, "prompt": "a", "max_tokens": 8000, "ignore_eos": True}).encode()))
        harness.wait_until(lambda: daemon.load()[0] == 2, "both run")
        daemon.signal(signal.SIGTERM)
        chunks = harness.events(b"".join(iter(stream.read_chunk, b"")))
        self.assertIn("error", chunks[-1])
        response = whole.read_response()
        self.assertEqual(response.status, 503, response)
        self.assertEqual(daemon.wait_exit(), 0, daemon.log()[-3000:])

    def test_a_second_signal(self):
        daemon = self.start()
        stream = daemon.stream(max_tokens=8000, ignore_eos=True)
        stream.read_head()
        daemon.signal(signal.SIGTERM)
        harness.wait_until(lambda: self.refuses(daemon), "the first was heard")
        daemon.signal(signal.SIGTERM)
        stream.read_to_end()
        self.assertEqual(daemon.wait_exit(), 0, daemon.log()[-3000:])

    @staticmethod
    def refuses(daemon):
        try:
            daemon.connect().close()
            return False
        except ConnectionError:
            return True

    def test_idle(self):
        daemon = self.start()
        held = daemon.connect()
        half = daemon.connect()
        half.send(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le")
        self.assertEqual(daemon.get("/health").status, 200)
        self.assertEqual(daemon.stop(), 0)
        held.close()
        half.close()

    def test_a_reader_that_does_not_read_holds_nothing_up(self):
        daemon = self.start("--drain-timeout", "1s", "--mock-tokens-per-second", "0")
        stream = daemon.stream(receive_buffer=2048, max_tokens=6000, n=4, logprobs=5, ignore_eos=True)
        harness.wait_until(lambda: daemon.gauge("generation_tokens_total") > 100, "tokens are made")
        self.assertEqual(daemon.stop(), 0)
        stream.close()


class Reload(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.notify = Notify()
        self.addCleanup(self.notify.close)

    def write(self, name, text):
        path = os.path.join(self.folder.name, name)
        with open(path + ".new", "w") as file:
            file.write(text)
        os.rename(path + ".new", path)
        return path

    def config(self, body="64KiB", per_key='"off"', level="info", more=""):
        return self.write("kvasir.toml", f"""
[server]
api_key_file = "{os.path.join(self.folder.name, 'keys')}"
max_body = "{body}"
max_requests_per_key = {per_key}
log_level = "{level}"
{more}
""")

    def reload(self, daemon):
        daemon.signal(signal.SIGHUP)
        self.notify.wait("READY=1")

    def status(self, daemon, key, **fields):
        return daemon.complete({"Authorization": f"Bearer {key}"}, **{"max_tokens": 1, **fields}).status

    def test_reload(self):
        self.write("keys", "first\n")
        daemon = harness.Daemon(*harness.MOCK, "--config", self.config(), "--mock-tokens-per-second", "500", environment={"NOTIFY_SOCKET": self.notify.path}, ready=False)
        self.addCleanup(daemon.kill)
        self.notify.wait("READY=1")
        daemon.model = daemon.get("/v1/models", {"X-Api-Key": "first"}).json()["data"][0]["id"]
        self.assertEqual([self.status(daemon, key) for key in ("first", "second")], [200, 401])

        stream = daemon.stream({"X-Api-Key": "first"}, max_tokens=400, ignore_eos=True)
        stream.read_head()
        self.write("keys", "second\n")
        self.reload(daemon)
        self.assertTrue(any(line.startswith("RELOADING=1") for message in self.notify.heard for line in message))
        self.assertEqual([self.status(daemon, key) for key in ("first", "second")], [401, 200])
        self.assertTrue(harness.events(b"".join(iter(stream.read_chunk, b""))), "what the old key began goes on")

        self.assertEqual(self.status(daemon, "second", user="x" * 3000), 200)
        self.config(body="2KiB", per_key="1", level="debug")
        self.reload(daemon)
        self.assertEqual(self.status(daemon, "second", user="x" * 3000), 413)
        hog = daemon.stream({"X-Api-Key": "second"}, max_tokens=4000, ignore_eos=True)
        hog.read_head()
        self.assertEqual(self.status(daemon, "second"), 429)
        hog.close()
        daemon.wait_idle()

        # A file that is wrong changes nothing, and says so.
        for break_it in (lambda: self.config(body="many"), lambda: self.write("kvasir.toml", "[server\n"), lambda: self.write("keys", "\n# nobody\n"),
                         lambda: os.unlink(os.path.join(self.folder.name, "keys"))):
            self.config()
            self.write("keys", "second\n")
            self.reload(daemon)
            seen = len(daemon.lines)
            break_it()
            self.reload(daemon)
            daemon.wait_line(r"(?i)\b(warn|error)", seen)
            self.assertEqual([self.status(daemon, key) for key in ("first", "second")], [401, 200])
            self.assertEqual(self.status(daemon, "second", user="x" * 3000), 200)

        # What cannot change while serving is named, the rest is taken.
        self.write("keys", "third\n")
        seen = len(daemon.lines)
        self.config(more="max_connections = 77")
        self.reload(daemon)
        daemon.wait_line(r"max_connections", seen)
        self.assertEqual([self.status(daemon, key) for key in ("second", "third")], [401, 200])
        self.assertEqual(daemon.stop(), 0)

    def test_under_load(self):
        """Hundreds of reloads while answers are made: none is lost."""
        self.write("keys", "first\n")
        daemon = harness.Daemon(*harness.MOCK, "--config", self.config(), environment={"NOTIFY_SOCKET": self.notify.path}, ready=False)
        self.addCleanup(daemon.kill)
        self.notify.wait("READY=1")
        key = {"X-Api-Key": "first"}
        daemon.model = daemon.get("/v1/models", key).json()["data"][0]["id"]
        statuses, done = [], threading.Event()

        def ask():
            while not done.is_set():
                statuses.append(daemon.complete(key, max_tokens=20).status)

        worker = threading.Thread(target=ask)
        worker.start()
        try:
            for _ in range(harness.rounds(200, 30)):
                self.reload(daemon)
        finally:
            done.set()
            worker.join()
        self.assertEqual(set(statuses), {200})
        self.assertEqual(daemon.stop(), 0)


class Supervised(unittest.TestCase):
    def test_life_as_systemd_hears_it(self):
        notify = Notify()
        self.addCleanup(notify.close)
        daemon = harness.Daemon(*harness.MOCK, environment={"NOTIFY_SOCKET": notify.path, "WATCHDOG_USEC": "400000"}, ready=False)
        self.addCleanup(daemon.kill)
        notify.wait("READY=1")
        self.assertEqual(daemon.get("/health").status, 200)
        for _ in range(3):  # idle and at work alike
            notify.wait("WATCHDOG=1")
        daemon.model = daemon.get("/v1/models").json()["data"][0]["id"]
        self.assertEqual(daemon.complete(max_tokens=50).status, 200)
        notify.wait("WATCHDOG=1")
        daemon.signal(signal.SIGHUP)
        reloading = notify.wait("RELOADING=1")
        self.assertTrue(any(line.startswith("MONOTONIC_USEC=") for line in reloading), reloading)
        notify.wait("READY=1")
        daemon.signal(signal.SIGTERM)
        notify.wait("STOPPING=1")
        self.assertEqual(daemon.wait_exit(), 0)

    def test_an_abstract_socket(self):
        name = f"kvasir-test-{os.getpid()}"
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listening.bind("\0" + name)
        listening.settimeout(harness.DEADLINE)
        with harness.Daemon(*harness.MOCK, environment={"NOTIFY_SOCKET": "@" + name}):
            while b"READY=1" not in listening.recv(4096):
                pass
        listening.close()

    def test_loading(self):
        """From the first moment the port answers: 503 until the model is there."""
        small = ("--max-rows", "32", "--max-sequences", "4", "--max-model-len", "512")  # what a step costs is measured while loading
        with harness.Daemon("-m", harness.sample_model(), *small, ready=False) as daemon:
            first = daemon.get("/health")
            self.assertEqual(first.status, 503, "the model was loaded before the port was open")
            asked = daemon.post("/v1/completions", {"prompt": "a"})
            if asked.status == 503:  # still loading
                self.assertGreater(float(asked.header("Retry-After")), 0)
                self.assertIn("error", asked.json())
            daemon.wait_ready()
            self.assertEqual(daemon.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status, 200)

    def test_stopped_while_loading(self):
        daemon = harness.Daemon("-m", harness.sample_model(), ready=False)
        self.addCleanup(daemon.kill)
        self.assertEqual(daemon.stop(), 0, daemon.log())

    def test_bad_starts(self):
        """One clear line, exit status 2, no listener left behind."""
        with tempfile.NamedTemporaryFile(suffix=".gguf") as broken, tempfile.NamedTemporaryFile(suffix=".toml") as wrong, tempfile.NamedTemporaryFile() as empty:
            broken.write(b"GGUF\x03\x00\x00\x00" + b"\xff" * 100)
            broken.flush()
            wrong.write(b"[server]\nprot = 1\n")
            wrong.flush()
            for flags, words in ((("-m", "/nonexistent/model.gguf"), "/nonexistent/model.gguf"), (("-m", broken.name), os.path.basename(broken.name)), (("--config", wrong.name), "prot"),
                                 ((*harness.MOCK, "--port", "99999"), "port"), ((*harness.MOCK, "--no-such-flag"), "no-such-flag"), ((*harness.MOCK, "--host", "0.0.0.0"), "api_key_file"),
                                 ((*harness.MOCK, "--api-key-file", empty.name), os.path.basename(empty.name)), ((*harness.MOCK, "--api-key-file", "/nonexistent/keys"), "/nonexistent/keys"), (("--backend", "cpu"), "model")):
                with self.subTest(flags=flags):
                    environment = {name: value for name, value in os.environ.items() if not name.startswith("KVASIR_")}
                    result = subprocess.run([harness.PROGRAM, "serve", "--port", "0", *flags], env=environment, capture_output=True, timeout=harness.DEADLINE, text=True)
                    self.assertEqual(result.returncode, 2, result)
                    self.assertIn(words, result.stderr)
                    if "api-key-file" not in flags[-2]:
                        self.assertNotIn("listening", result.stdout)

    def test_a_file_whose_name_is_no_text(self):
        """Clients ask for a model by the file's name: one that JSON cannot hold needs another."""
        with tempfile.TemporaryDirectory() as folder:
            link = os.path.join(os.fsencode(folder), b"m\xff.gguf")
            os.symlink(harness.sample_model(), link)
            result = subprocess.run([harness.PROGRAM, "serve", "--port", "0", "-m", link], capture_output=True, timeout=harness.DEADLINE)
            self.assertEqual(result.returncode, 2, result)
            self.assertIn(b"served_name", result.stderr)
            with harness.Daemon("--backend", "mock", "-m", link, "--served-name", "modèle", "--kv-memory", "64MiB") as daemon:
                self.assertEqual(daemon.model, "modèle")
                self.assertEqual(daemon.complete(max_tokens=1).status, 200)
                self.assertTrue(daemon.metrics())

    def test_a_port_in_use(self):
        """May be free the next time: another exit status than for what will not mend itself."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            result = subprocess.run([harness.PROGRAM, "serve", *harness.MOCK, "--port", port], capture_output=True, timeout=harness.DEADLINE, text=True)
        self.assertEqual(result.returncode, 1, result)
        self.assertIn(port, result.stderr)

    def test_ipv6(self):
        with harness.Daemon(*harness.MOCK, "--host", "::1") as daemon:
            self.assertEqual(daemon.get("/v1/models", {"Host": f"[::1]:{daemon.port}"}).status, 200)

    def test_a_line_a_request(self):
        with harness.Daemon(*harness.MOCK) as daemon:
            self.assertEqual(daemon.complete({"X-Request-Id": "traced-1"}, max_tokens=3, ignore_eos=True).status, 200)
            line = daemon.wait_line(r"traced-1").string
            for word in ("prompt=", "cached=", "tokens=3", "preemptions=0", "finish=length", "status=200"):
                self.assertIn(word, line)
            with daemon.stream({"X-Request-Id": "traced-2"}, max_tokens=4000, ignore_eos=True) as connection:
                connection.read_head()
            self.assertIn("finish=abort", daemon.wait_line(r"traced-2").string)


if __name__ == "__main__":
    unittest.main(verbosity=2)
