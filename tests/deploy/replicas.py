"""Replicas that say what a test wants, and which of them was asked what; and the DNS that knows them. Know no model."""

import json
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from tests.e2e.process import wait_for

NUM_EVENTS = 40


class Replica:
    """One of them, at 127.0.0.N."""

    def __init__(self, number: int, port: int) -> None:
        self.name = f"replica-{number}"
        self._address = (f"127.0.0.{number}", port)
        self._server: _Server | None = None
        self.reset()

    def reset(self) -> None:
        """Answer everything, at once, and forget what was asked; listen."""
        self.status = 200
        self.headers: Mapping[str, str] = {}
        """With the status: of answers to requests."""

        self.is_ready = True
        self.probe_seconds = 0.0
        """Until `/ready` is answered."""

        self.seconds = 0.0
        """Until a request is answered, or between two events of a stream."""

        self.breaks_off = False
        """Whether it closes the connection instead of an answer."""

        self.asked: list[dict[str, str]] = []
        """Headers of the requests that came here, with the replica's name and the length of the body."""

        self.num_running = 0
        self.num_probes = 0
        self.left_at: list[float] = []
        """When clients of streams were found to have left."""
        self.listen()

    def listen(self) -> None:
        """Listen, if it does not."""
        if self._server is None:
            self._server = _Server(self._address, _Handler)
            self._server.replica = self
            threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class Replicas:
    """So many, numbered from 1, at one port."""

    def __init__(self, count: int, port: int) -> None:
        self.port = port
        self.each: Sequence[Replica] = [Replica(number, port) for number in range(1, count + 1)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for replica in self.each:
            replica.close()

    def reset(self) -> None:
        """All as at first."""
        for replica in self.each:
            replica.reset()

    def named(self, name: str) -> Replica:
        """The one of this name."""
        return next(replica for replica in self.each if replica.name == name)

    def asked(self) -> list[dict[str, str]]:
        """What any was asked since this was last called."""
        asked = [request for replica in self.each for request in replica.asked]
        for replica in self.each:
            replica.asked = []
        return asked

    def await_probes(self, count: int) -> None:
        """Wait until each has answered so many more probes."""
        aims = [replica.num_probes + count for replica in self.each]
        wait_for(lambda: all(r.num_probes >= aim for r, aim in zip(self.each, aims, strict=True)), "probes", 60)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    replica: Replica

    def handle_error(self, *_: object) -> None:
        """Clients may leave when they like."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        replica = self.server.replica
        if self.path == "/ready":
            time.sleep(replica.probe_seconds)
            self._answer(200 if replica.is_ready else 503, {})
            replica.num_probes += 1
        else:
            self._note(0)
            self._answer(200, {})

    def do_POST(self) -> None:
        replica = self.server.replica
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._note(len(body))
        replica.num_running += 1
        try:
            if replica.breaks_off:
                self.close_connection = True
            elif b'"stream":true' in body.replace(b" ", b""):
                self._stream()
            else:
                time.sleep(replica.seconds)
                self._answer(replica.status, replica.headers)
        finally:
            replica.num_running -= 1

    def _note(self, length: int) -> None:
        headers = {name.lower(): ", ".join(self.headers.get_all(name, [])) for name in self.headers}
        replica = self.server.replica
        replica.asked.append(headers | {"replica": replica.name, "length": str(length)})

    def _answer(self, status: int, headers: Mapping[str, str]) -> None:
        content = json.dumps({"status": status}).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for number in range(NUM_EVENTS):
                event = f"data: {number} {time.monotonic()}\n\n".encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
                time.sleep(self.server.replica.seconds)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.server.replica.left_at.append(time.monotonic())

    def log_message(self, *_: Any) -> None:
        """Nothing: the requests are in `asked`."""


class Names:
    """A DNS server that knows the addresses of some names, and of no other."""

    def __init__(self, addresses: dict[str, list[str]], at: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self.addresses = addresses
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(at)
        self.port = self._socket.getsockname()[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                query, client = self._socket.recvfrom(4096)
                self._socket.sendto(self._answer(query), client)
            except OSError:
                return

    def _answer(self, query: bytes) -> bytes:
        end = query.index(b"\0", 12)
        labels, at = [], 12
        while at < end:
            labels.append(query[at + 1 : at + 1 + query[at]].decode())
            at += 1 + query[at]
        question = query[12 : end + 5]
        is_known = question.endswith(b"\0\x01\0\x01")  # addresses, on the internet
        addresses = self.addresses.get(".".join(labels), []) if is_known else []
        status = b"\x81\x80" if addresses else b"\x81\x83"  # no such name
        head = query[:2] + status + b"\0\x01" + len(addresses).to_bytes(2, "big") + b"\0\0\0\0"
        record = b"\xc0\x0c\0\x01\0\x01\0\0\0\x01\0\x04"
        return head + question + b"".join(record + socket.inet_aton(address) for address in addresses)
