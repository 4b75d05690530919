"""One HTTP connection: uvicorn's protocol with limits for clients that send or read too slowly, or too long headers.

Without them a client that sends half a request, or stops reading its response, would hold its connection, and what was
made for it, for ever. Knows bytes and time, no requests.
"""

import asyncio
import json
import logging
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ultrafuser.server.errors import InvalidRequest

MAX_HEADER_BYTES = 65536
"""Length of a request's line and headers beyond which they are refused."""

logger = logging.getLogger(__name__)


class GuardedProtocol(HttpToolsProtocol):
    """Closes connections of clients that do not keep up."""

    def __init__(self, *args: Any, read_seconds: float, write_seconds: float, **kwargs: Any) -> None:
        """`read_seconds`: for a whole request; `write_seconds`: how long a full write buffer may stay full."""
        super().__init__(*args, **kwargs)
        later = self.loop.call_later
        self._reading = _Timer(partial(later, read_seconds, self._give_up, "sent no whole request in time"))
        self._writing = _Timer(partial(later, write_seconds, self._give_up, "does not read its response"))
        self._num_header_bytes = 0
        self._is_in_headers = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The time for the first request begins."""
        super().connection_made(transport)
        self._reading.start()

    def data_received(self, data: bytes) -> None:
        """Parse; headers that do not end are refused."""
        super().data_received(data)
        if self._is_in_headers:
            self._num_header_bytes += len(data)
            if self._num_header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
                self.send_400_response(f"The headers are longer than {MAX_HEADER_BYTES} bytes.")

    def on_message_begin(self) -> None:
        """The time for a further request on the same connection begins.

        Raises:
            HttpParserError: there is an answer under way. Nobody sends requests behind each other; one whose body does
                not come would hold its place for ever, and hide that the client has left.
        """
        if self._is_answering:
            raise httptools.HttpParserError("a request behind another")
        super().on_message_begin()
        self._is_in_headers = True
        self._reading.start()

    def on_headers_complete(self) -> None:
        """From here on the body is read."""
        super().on_headers_complete()
        self._is_in_headers = False
        self._num_header_bytes = 0

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._reading.stop()

    def pause_writing(self) -> None:
        """The client does not read: its time begins."""
        super().pause_writing()
        self._writing.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._writing.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing to wait for any more."""
        self._reading.stop()
        self._writing.stop()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """As uvicorn's, with OpenAI's error object; not amid an answer, after which the connection will end."""
        if self._is_answering:
            self.cycle.keep_alive = False
            return
        body = json.dumps(InvalidRequest(msg).body()).encode()
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _give_up(self, reason: str) -> None:
        logger.info("closed the connection of a client that %s", reason)
        self.transport.abort()


def guarded_protocol(read_seconds: float, write_seconds: float) -> Any:
    """What uvicorn's `http` option takes."""
    return partial(GuardedProtocol, read_seconds=read_seconds, write_seconds=write_seconds)


class _Timer:
    """A time-out that can be started and stopped again and again."""

    def __init__(self, start: "partial[asyncio.TimerHandle]") -> None:
        self._start = start
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin, unless it runs already."""
        self._handle = self._handle or self._start()

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._handle = None
