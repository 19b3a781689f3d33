"""HTTP/1.1 over a plain socket: sends any bytes, reads strictly. For what an HTTP library would never send, and for exact framing."""
import json
import os
import socket
import struct

SHORT = os.environ.get("KVASIR_TEST_SHORT", "") not in ("", "0")  # a sanitized program: fewer rounds, and it takes its time
TIMEOUT = 900 if SHORT else 300  # seconds: a bound on a machine that has much else to do, never a pause


class Closed(Exception):
    """The peer closed before the message was complete."""


class Response:
    def __init__(self, version, status, headers, body, complete=True):
        self.version, self.status, self.headers, self.body, self.complete = version, status, headers, body, complete

    def header(self, name):
        values = [value for key, value in self.headers if key.lower() == name.lower()]
        if len(values) > 1:
            raise AssertionError(f"{name} stands {len(values)} times")
        return values[0] if values else None

    def json(self):
        return json.loads(self.body)

    def __repr__(self):
        return f"<{self.status} {self.headers} {self.body[:300]!r}>"


class Connection:
    def __init__(self, address, timeout=TIMEOUT, receive_buffer=None):
        self.socket = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(timeout)
        self.socket.connect(address)
        self.buffer = b""
        self.raw = b""  # everything received

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.socket.close()

    def reset(self):
        """RST instead of FIN."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)

    def try_send(self, data):
        """The server may have hung up already."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def try_shutdown(self):
        """FIN: nothing more will be sent."""
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def _receive(self):
        try:
            data = self.socket.recv(65536)
        except ConnectionResetError:
            data = b""
        if not data:
            raise Closed(f"closed after {self.buffer[:200]!r}")
        self.buffer += data
        self.raw += data

    def _until(self, mark):
        while mark not in self.buffer:
            self._receive()
        data, self.buffer = self.buffer.split(mark, 1)
        return data

    def _exactly(self, count):
        while len(self.buffer) < count:
            self._receive()
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def read_head(self):
        """Status line and header fields; interim answers (100) are passed over."""
        while True:
            lines = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
            version, status = lines[0].split(" ", 2)[:2]
            headers = []
            for line in lines[1:]:
                name, colon, value = line.partition(":")
                if not colon or name != name.strip():
                    raise AssertionError(f"malformed header line {line!r}")
                headers.append((name, value.strip()))
            if int(status) >= 200:
                return Response(version, int(status), headers, b"")

    def read_chunk(self):
        """The next chunk of a chunked body; b"" at its end."""
        size = int(self._until(b"\r\n"), 16)
        data = self._exactly(size)
        if self._exactly(2) != b"\r\n":
            raise AssertionError("a chunk does not end in CRLF")
        return data

    def read_response(self, head=False):
        response = self.read_head()
        if head or response.status in (204, 304):
            return response
        if (response.header("Transfer-Encoding") or "").lower() == "chunked":
            while chunk := self.read_chunk():
                response.body += chunk
        elif response.header("Content-Length") is not None:
            response.body = self._exactly(int(response.header("Content-Length")))
        else:
            response.body = self.read_to_end()
        return response

    def read_to_end(self):
        try:
            while True:
                self._receive()
        except Closed:
            data, self.buffer = self.buffer, b""
            return data

    def is_closed(self):
        """Waits for the peer's FIN or RST; what comes before it is an error."""
        return self.read_to_end() == b""


def request_bytes(method, path, body=b"", headers=(), host="localhost"):
    fields = dict(headers)
    lines = [f"{method} {path} HTTP/1.1"]
    if "Host" not in fields:
        fields["Host"] = host
    if body and "Content-Length" not in fields and "Transfer-Encoding" not in fields:
        fields["Content-Length"] = str(len(body))
    if body and "Content-Type" not in fields:
        fields["Content-Type"] = "application/json"
    lines += [f"{name}: {value}" for name, value in fields.items() if value is not None]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body
