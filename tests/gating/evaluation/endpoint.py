"""A real HTTP server that answers chat completions as a script says, faults included, and notes what it was asked."""

import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "scripted"


@dataclass(frozen=True)
class Reply:
    """What the server does with one request."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    """Sent instead of a completion."""
    resets: bool = False
    """End the connection instead of answering."""
    wait_seconds: float = 0.0
    """Before anything is sent."""
    tokens: list[dict[str, Any]] | None = None
    """`logprobs.content`, if the request asked for it."""
    finish_reason: str = "stop"
    """Of the completion."""
    usage: dict[str, int] | None = None
    """Of the completion."""
    is_cut: bool = False
    """End the connection in the middle of the answer."""


Script = Callable[[str, int], Reply]
"""The last user message, and how often it was asked before -> what to do."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # the default of 5 makes many connections at once wait a second


class Endpoint:
    """A running server."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self._counts: Counter[str] = Counter()
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    @property
    def questions(self) -> list[str]:
        """The last user message of every request, in order."""
        return [body["messages"][-1]["content"] for body in self.asked]

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def decide(self, body: dict[str, Any], before: int) -> Reply:
        """What to do with a request whose last message was seen so often before."""
        return self.script(body["messages"][-1]["content"], before)

    def reply(self, body: dict[str, Any], headers: dict[str, str]) -> Reply:
        """Note a request and look up what to do."""
        question = body["messages"][-1]["content"]
        with self._lock:
            before = self._counts[question]
            self._counts[question] += 1
            self.asked.append(body)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        reply = self.decide(body, before)
        time.sleep(reply.wait_seconds)
        with self._lock:
            self._at_once -= 1
        return reply

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._send(200, {}, json.dumps({"object": "list", "data": [{"id": MODEL}]}).encode())

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["content-length"]))
                if not content:  # the client was killed
                    self.close_connection = True
                    return
                body = json.loads(content)
                reply = endpoint.reply(body, dict(self.headers))
                if reply.resets:
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.close_connection = True
                    self.connection.close()
                    return
                content = reply.raw if reply.raw is not None else _content(body, reply)
                self._send(reply.status, reply.headers, content, is_cut=reply.is_cut)

            def _send(self, status: int, headers: dict[str, str], content: bytes, *, is_cut: bool = False) -> None:
                try:
                    self.send_response(status)
                    for name, value in {**headers, "Content-Length": str(len(content))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content[: len(content) // 2] if is_cut else content)
                    self.close_connection = self.close_connection or is_cut
                except OSError:  # the client has given up
                    self.close_connection = True

            def finish(self) -> None:
                try:
                    super().finish()
                except (OSError, ValueError):
                    self.close_connection = True

        return Handler


@contextmanager
def serving(script: Script) -> Iterator[Endpoint]:
    """A server for as long as the block runs."""
    endpoint = Endpoint(script)
    try:
        yield endpoint
    finally:
        endpoint.close()


def _content(body: dict[str, Any], reply: Reply) -> bytes:
    if reply.status != 200:
        return json.dumps({"error": {"message": reply.text or "scripted", "type": "error", "code": "x"}}).encode()
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": reply.text},
        "finish_reason": reply.finish_reason,
    }
    if body.get("logprobs") and reply.tokens is not None:
        choice["logprobs"] = {"content": reply.tokens}
    completion = {"id": "x", "object": "chat.completion", "model": MODEL, "choices": [choice], "usage": reply.usage}
    return json.dumps(completion).encode()
