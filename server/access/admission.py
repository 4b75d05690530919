"""Which requests are let in, and how they end when their time is up: a full server, its shutdown, a deadline.

A full server turns a request away before its body is read, unless a place is held by one whose own body does not come:
the one that has been waited for longest goes instead, so that clients which send slowly keep nobody out.

A request that has to end is ended as if its client had left: everything that works for it stops, the engine included.
Then the client is told why, by a status or, in a stream, by a last event. Probes and metrics are never turned away.
Knows ASGI messages, no routes and no engine.
"""

import asyncio
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from math import inf
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ultrafuser.server.access.middleware import is_among, refuse
from ultrafuser.server.dialects import error_response, last_events
from ultrafuser.server.errors import ApiError, Overloaded, Rejection, ShuttingDown, TimedOut
from ultrafuser.server.metrics import REJECTIONS

MOST_REQUESTS = 1024
"""Unfinished requests that a server takes, however many its engine computes at once, if nothing else is set."""

MIN_ARRIVAL_SECONDS = 1.0
"""How long the body of a request may take before its place is given away, if another needs one."""

_DISCONNECT: Message = {"type": "http.disconnect"}


def default_max_requests(num_places: int) -> int:
    """Unfinished requests that a server takes if nothing else is set; its engine computes `num_places` at once.

    As many again may wait, if they are not too many for one process: none of them waits much longer than an answer
    takes, and no place is empty for want of one. With more waiting, everybody's first token is late under a load that
    lasts, and no more is answered.
    """
    return min(2 * num_places, MOST_REQUESTS)


class Admission:
    """The requests that are running, and whether one more is let in."""

    def __init__(self, max_requests: int = MOST_REQUESTS) -> None:
        self._max_requests = max_requests
        self._running: dict[RunningRequest, None] = {}  # the oldest first
        self._is_closed = False
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    @property
    def num_running(self) -> int:
        """Requests that were let in and are not answered yet."""
        return len(self._running)

    def refusal(self) -> Rejection | None:
        """Why one more request is not let in; None if it is. May end one whose body has not come."""
        if self._is_closed:
            return ShuttingDown()
        is_full = sum(not request.is_ended for request in self._running) >= self._max_requests
        return Overloaded() if is_full and not self._end_a_slow_one() else None

    def _end_a_slow_one(self) -> bool:
        """End the request whose body has been waited for longest; whether there was one that is late."""
        slow = next((request for request in self._running if request.is_late), None)
        if slow is not None:
            error = Overloaded("slow_body")
            REJECTIONS.labels(error.reason).inc()
            slow.end(error)
        return slow is not None

    @contextmanager
    def holding(self, request: "RunningRequest") -> Iterator[None]:
        """Count a request while it runs."""
        self._running[request] = None
        self._is_empty.clear()
        try:
            yield
        finally:
            del self._running[request]
            if not self._running:
                self._is_empty.set()

    async def drain(self, seconds: float) -> bool:
        """Let nobody in any more and wait so long; whether all running requests have ended."""
        self._is_closed = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._is_empty.wait(), seconds)
        return not self._running

    def end_all(self, error: ApiError | None = None) -> None:
        """Let nobody in any more and end whatever runs, with this error, or else since the server shuts down."""
        self._is_closed = True
        for request in self._running:
            request.end(error or ShuttingDown())


class RunningRequest:
    """One request, which can be ended from outside."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._end: asyncio.Future[ApiError] = asyncio.get_running_loop().create_future()
        self._is_started = self._is_stream = self._is_complete = False
        self._waits_since: float | None = None  # when its body was first asked for; infinite once it is there

    @property
    def is_late(self) -> bool:
        """Whether its body has been waited for long, and is still not here."""
        if self._waits_since is None or self.is_ended:
            return False
        return asyncio.get_running_loop().time() - self._waits_since >= MIN_ARRIVAL_SECONDS

    @property
    def is_ended(self) -> bool:
        """Whether it was ended from outside."""
        return self._end.done()

    def end(self, error: ApiError) -> None:
        """Stop what works for it; the client will be told this error. Later calls change nothing."""
        if not self._end.done():
            self._end.set_result(error)

    async def receive(self) -> Message:
        """The client's next message; that it has left, once the request was ended."""
        if self._waits_since is None:
            self._waits_since = asyncio.get_running_loop().time()
        arrival = asyncio.ensure_future(self._receive())
        either: tuple[asyncio.Future[Any], ...] = (arrival, self._end)
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            message = arrival.result() if arrival.done() and not self.is_ended else _DISCONNECT
            if not message.get("more_body", False):
                self._waits_since = inf
            return message
        finally:
            arrival.cancel()

    async def send(self, message: Message) -> None:
        """Pass a message on, unless the request was ended; a response with a fixed length is not cut."""
        if self.is_ended and (self._is_stream or not self._is_started):
            return
        if message["type"] == "http.response.start":
            self._is_started = True
            self._is_stream = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
        self._is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def tell(self, scope: Scope) -> None:
        """Give the client the error with which the request was ended, as far as its response still allows."""
        if not self.is_ended or self._is_complete:
            return
        error = self._end.result()
        if not self._is_started:
            await error_response(error, scope)(scope, self._receive, self._send)
        elif self._is_stream:
            body = last_events(error, scope).encode()
            await self._send({"type": "http.response.body", "body": body, "more_body": False})


class AdmissionControl:
    """Turns requests away when the server is full or ends, and ends those that run out of time."""

    def __init__(
        self, app: ASGIApp, admission: Admission, timeout_seconds: float | None, public_paths: Collection[str]
    ) -> None:
        self.app = app
        self._admission = admission
        self._timeout_seconds = timeout_seconds
        self._public_paths = public_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_among(scope, self._public_paths):
            await self.app(scope, receive, send)
            return
        if (rejection := self._admission.refusal()) is not None:
            await refuse(rejection, scope, receive, send)
            return
        request = RunningRequest(receive, send)
        with self._admission.holding(request), self._deadline(request):
            try:
                await self.app(scope, request.receive, request.send)
            except Exception:
                if not request.is_ended:
                    raise
            await request.tell(scope)

    @contextmanager
    def _deadline(self, request: RunningRequest) -> Iterator[None]:
        if self._timeout_seconds is None:
            yield
            return
        error = TimedOut(f"The request was not finished within the server's limit of {self._timeout_seconds:g} s.")
        timer = asyncio.get_running_loop().call_later(self._timeout_seconds, request.end, error)
        try:
            yield
        finally:
            timer.cancel()
