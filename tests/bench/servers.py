"""Servers under load, one at a time: started on a free port of loopback, asked until ready, stopped by SIGTERM. And the load client, whose one JSON object is the answer."""
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

READY_S = 120
STOP_S = 30


def held_port():
    """A socket on a free port of loopback, which nobody else is given while it is open; a server that sets either option may listen there. Until one does, connections are refused."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("127.0.0.1", 0))
    return held


def own_environment():
    """KVASIR_* configures the daemon of the person at the keyboard, not the one that is measured."""
    return {name: value for name, value in os.environ.items() if not name.startswith("KVASIR_")}


class Server:
    """`port` None: the server chooses it and prints "listening on URL"."""

    def __init__(self, command, port=None):
        self.port = port
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT, env=own_environment())
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def _wait_ready(self):
        end = time.monotonic() + READY_S
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.process.args[0]}: exit status {self.process.returncode}: {self.words()}")
            try:
                self.port = self.port or self._port_printed()
                if self.port:
                    self.get("/health")
                    return
            except OSError:  # not listening yet, or 503: loading
                pass
            if time.monotonic() > end:
                raise RuntimeError(f"{self.process.args[0]}: not ready in {READY_S} s: {self.words()}")
            time.sleep(0.05)

    def _printed(self):
        return os.pread(self.log.fileno(), os.fstat(self.log.fileno()).st_size, 0).decode("utf-8", "replace")  # the server writes where the file's own position is

    def _port_printed(self):
        match = re.search(r"^listening on \S+:(\d+)$", self._printed(), re.M)
        return match and int(match[1])

    def words(self):
        return self._printed()[-600:].strip()

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return answer.read().decode()

    def metrics(self):
        """{name: sum over its labels} of /metrics."""
        sums = {}
        for name, value in re.findall(r"^([a-z_:]+)(?:\{.*\})? (\S+)$", self.get("/metrics"), re.M):
            sums[name] = sums.get(name, 0) + float(value)
        return sums

    def cpu_seconds(self):
        """{thread name: seconds it has run}; the first thread, which in kvasir is the one that speaks HTTP, as "first"."""
        seconds = {}
        for task in pathlib.Path(f"/proc/{self.process.pid}/task").iterdir():
            try:
                name = "first" if int(task.name) == self.process.pid else (task / "comm").read_text().strip()
                run = int((task / "schedstat").read_text().split()[0]) / 1e9
            except FileNotFoundError:  # it ended
                continue
            seconds[name] = seconds.get(name, 0) + run
        return seconds

    def peak_mib(self):
        match = re.search(r"^VmHWM:\s+(\d+) kB$", pathlib.Path(f"/proc/{self.process.pid}/status").read_text(), re.M)
        return round(int(match[1]) / 1024, 1)

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def kvasir(program, *flags):
    return Server([program, "serve", "--port", 0, "--log-level", "warn", *flags])


def llama_server(folder, *flags):
    with held_port() as held:
        port = held.getsockname()[1]
        return Server([pathlib.Path(folder) / "default/bin/llama-server", "--host", "127.0.0.1", "--port", port, "--no-webui", "--log-disable", "--cache-ram", 0, *flags], port)


def load_command(program, port, **options):
    command = [str(program), "--port", str(port)]
    for name, value in options.items():
        command += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return command


def load(program, port, strict=True, **options):
    """Runs the load client; every answer must be whole unless not `strict`. extra={...}: members of each request's body."""
    timeout = options.setdefault("timeout", 600)
    done = subprocess.run(load_command(program, port, **options), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout + 30)
    if done.returncode not in (0, 1) or not done.stdout:
        raise RuntimeError(f"load: exit status {done.returncode}: {done.stderr.strip()[-400:]}")
    result = json.loads(done.stdout)
    if strict and done.returncode != 0:
        raise RuntimeError(f"load: {result['whole']} of {result['requests']} answers are whole, {result['failed']} failed: {result['problem'] or 'cut short, or fewer tokens than asked for'}")
    return result
