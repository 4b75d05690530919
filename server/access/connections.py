"""One HTTP connection: uvicorn's protocol with limits for clients that send or read too slowly, or too long headers.

Without them a client that sends half a request, or stops reading its response, would hold its connection, and what was
made for it, for ever. And what uvicorn leaves out of HTTP: an offer of another protocol is passed over, an answer to
HTTP/1.0 comes without chunks, and a body that breaks off in nonsense ends its request. Knows bytes and time, no
requests.
"""

import asyncio
import json
import logging
from functools import partial
from typing import Any

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ultrafuser.server.errors import InvalidRequest

MAX_HEADER_BYTES = 65536
"""Length of a request's line and headers beyond which they are refused."""

LINGER_SECONDS = 10.0
"""How long the rest of a request is read and dropped if the answer came first, and ends the connection."""

LINGER_BYTES = 2**23
"""How much of it: as much as the longest body has by default, and not what never ends."""

logger = logging.getLogger(__name__)


_INVALID = "Invalid HTTP request received."


class GuardedProtocol(HttpToolsProtocol):
    """Closes connections of clients that do not keep up; speaks HTTP/1.0 and 1.1, whatever else is offered."""

    def __init__(self, *args: Any, read_seconds: float, write_seconds: float, **kwargs: Any) -> None:
        """`read_seconds`: for a whole request; `write_seconds`: how long a full write buffer may stay full."""
        super().__init__(*args, **kwargs)
        later = self.loop.call_later
        self._reading = _Timer(partial(later, read_seconds, self._give_up, "sent no whole request in time"))
        self._writing = _Timer(partial(later, write_seconds, self._give_up, "does not read its response"))
        self._lingering = _Timer(partial(later, LINGER_SECONDS, self._end))
        self._num_dropped_bytes = 0
        self._num_header_bytes = 0
        """What the parser keeps at most, of a head or of headers behind a body that have not come to their end."""
        self._has_come_on = False
        self._is_in_headers = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The time for the first request begins."""
        super().connection_made(transport)
        self._reading.start()

    def data_received(self, data: bytes) -> None:
        """Parse; headers that do not end are refused."""
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response(_INVALID)
        self._num_header_bytes += len(data)
        if self._has_come_on:
            self._num_header_bytes, self._has_come_on = 0, False
        elif self._num_header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The headers are longer than {MAX_HEADER_BYTES} bytes.")
            self.transport.close()  # amid an answer, too: the parser would keep what comes

    def _parse(self, data: bytes) -> None:
        """As if nobody offered another protocol: the parser takes what follows an offer for that protocol, so the head
        is read again without it, then the rest."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            (num_read,) = offer.args
            head = self._head_without_offer()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            self._parse(head + data[num_read:])

    def _head_without_offer(self) -> bytes:
        request_line = b"%s %s HTTP/%s" % (
            self.parser.get_method(),
            self.url,
            self.parser.get_http_version().encode(),
        )
        headers = [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([request_line, *headers, b"", b""])

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

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; those behind the body come too late to say anything about the request."""
        if self._is_in_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """From here on the body is read.

        Raises:
            HttpParserError: the client takes the server for a proxy.
        """
        if self.parser.get_method() == b"CONNECT":
            raise httptools.HttpParserError("nobody is connected to elsewhere")
        if not self.parser.should_upgrade():  # else this head will be read again
            super().on_headers_complete()
        self._is_in_headers = False
        self._has_come_on = True

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._has_come_on = True
        if self._lingering.is_running:
            self._num_dropped_bytes += len(body)
            if self._num_dropped_bytes > LINGER_BYTES:
                self._end()
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._has_come_on = True
        if not self.parser.should_upgrade():
            super().on_message_complete()
            self._reading.stop()
            if self._lingering.is_running:
                self._end()

    def end_behind_request(self) -> None:
        """Close the connection, but not while the request is still coming: that resets it, and a client or a proxy that
        is sending may then never see the answer."""
        if self.cycle.more_body and self.cycle.response_complete:
            self._lingering.start()
        else:
            self._end()

    def _end(self) -> None:
        self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        cycle.transport = _UnhurriedTransport(self)  # type: ignore[assignment]
        is_old = cycle.scope["http_version"] != "1.1"
        super()._start_asgi_task(cycle, _without_chunks(cycle, app) if is_old else app)  # type: ignore[arg-type]

    def pause_writing(self) -> None:
        """The client does not read: its time begins."""
        super().pause_writing()
        self._writing.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._writing.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing to wait for any more."""
        for timer in (self._reading, self._writing, self._lingering):
            timer.stop()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """As uvicorn's, with OpenAI's error object; not amid an answer, after which the connection will end.

        A request whose body is wrong, and which nothing was answered yet, ends as if its client had left.
        """
        if self._lingering.is_running:
            self._end()
            return
        if self._is_answering:
            if self.cycle.response_started or not self.cycle.more_body:
                self.cycle.keep_alive = False
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
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


def _without_chunks(cycle: RequestResponseCycle, app: ASGIApp) -> ASGIApp:
    """An application whose answers HTTP/1.0 can read: no interim ones, no chunks; the connection ends with the body."""
    cycle.keep_alive = cycle.waiting_for_100_continue = False

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_plain(message: Message) -> None:
            cycle.chunked_encoding = False
            # Where there are no chunks uvicorn holds a body to its length; here whatever comes is right.
            cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_plain)

    return answer


class _UnhurriedTransport:
    """A connection as it is handed to what answers: all of the transport, but for its end."""

    def __init__(self, protocol: GuardedProtocol) -> None:
        self._protocol = protocol
        self.write, self.is_closing = protocol.transport.write, protocol.transport.is_closing

    def close(self) -> None:
        """See `end_behind_request`."""
        self._protocol.end_behind_request()


class _Timer:
    """A time-out that can be started and stopped again and again."""

    def __init__(self, start: "partial[asyncio.TimerHandle]") -> None:
        self._start = start
        self._handle: asyncio.TimerHandle | None = None

    @property
    def is_running(self) -> bool:
        """Whether it was started, and not stopped."""
        return self._handle is not None

    def start(self) -> None:
        """Begin, unless it runs already."""
        self._handle = self._handle or self._start()

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._handle = None
