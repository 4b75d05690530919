"""A connection between two nodes of an engine: JSON objects, one a line, and the news that the other is gone.

It says nothing secret and believes nothing that would harm: no pickle. Neither side is authenticated, and nothing is
encrypted. Knows no engine.
"""

import json
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Self

SILENCE_SECONDS = 15
"""After so long without a sign of life, asked for by the kernel, a machine or the network to it counts as gone."""

_MAX_LINE_BYTES = 2**20
_PROBE_SECONDS = 3
_RECEIVE_BYTES = 2**16

Message = Mapping[str, Any]


class Wire:
    """One end of a connection. May be sent to by any thread, and received from by one."""

    def __init__(self, connection: socket.socket) -> None:
        for option, value in (
            (socket.TCP_KEEPIDLE, _PROBE_SECONDS),
            (socket.TCP_KEEPINTVL, _PROBE_SECONDS),
            (socket.TCP_KEEPCNT, SILENCE_SECONDS // _PROBE_SECONDS - 1),
            (socket.TCP_USER_TIMEOUT, SILENCE_SECONDS * 1000),
        ):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._connection = connection
        self._received = b""
        self._lock = threading.Lock()
        self.address: str = connection.getpeername()[0]
        self.own_address: str = connection.getsockname()[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, **message: Any) -> None:
        """Send an object; if the other is gone, `receive` will tell."""
        with self._lock, suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float | None = None) -> Message | None:
        """The next object; None if the other is gone, has not said all of it after so many seconds, or says anything
        else."""
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            message = json.loads(self._line(deadline))
        except (OSError, EOFError, ValueError, RecursionError):  # ValueError: no JSON, or closed here
            return None
        return message if isinstance(message, dict) else None

    def _line(self, deadline: float | None) -> bytes:
        while b"\n" not in self._received:
            if len(self._received) > _MAX_LINE_BYTES:
                raise ValueError("too long a line")
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError
            self._connection.settimeout(left)
            some = self._connection.recv(_RECEIVE_BYTES)
            self._connection.settimeout(None)
            if not some:
                raise EOFError
            self._received += some
        line, _, self._received = self._received.partition(b"\n")
        return line

    @property
    def is_open(self) -> bool:
        """Whether the other end has not been closed."""
        try:
            return self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        """End the connection, and a `receive` that waits."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
