"""What a serving class returned, as an HTTP response: JSON, an event stream, or an error in the route's way."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from time import monotonic
from typing import Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from ultrafuser.server.dialects import dialect_of, error_response, last_events
from ultrafuser.server.errors import ApiError, NonfiniteOutput, Rejection
from ultrafuser.server.metrics import REJECTIONS
from ultrafuser.server.serving.translation import as_api_error, error_in

EARLY_SECONDS = 1.0
"""How long a stream's headers wait for its first event.

What is wrong with a request often shows only in the engine, milliseconds after the stream was made; within this time
the client gets the right status instead of a stream that begins with an error."""

_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

# An event's data ends with its line. JSON escapes what ends one in ASCII; these three it may write as they are, and
# clients that split where Unicode (Python's `splitlines`) ends a line would cut the event there.
_LINE_ENDS = str.maketrans({mark: f"\\u{ord(mark):04x}" for mark in "\u0085\u2028\u2029"})

_GENERATING = "/v1/chat/completions, /v1/responses, /v1/messages or /v1/completions"

logger = logging.getLogger(__name__)


async def to_response(result: AsyncGenerator[str, None] | BaseModel, request: Request) -> Response:
    """The response for what a vLLM serving class returned.

    Raises:
        ApiError: it is an error.
    """
    if (error := error_in(result)) is not None:
        raise error
    if isinstance(result, BaseModel):
        return JSONResponse(result.model_dump())
    return await stream(result, request)


async def answer_error(request: Request, error: Exception) -> Response:
    """The response for an exception; a fault of ours goes into the log, a client's does not."""
    told = as_api_error(error)
    if isinstance(error, HTTPException) and told.status in (404, 405):
        hint = "" if told.status == 405 else f"; to generate, POST to {_GENERATING}"
        told.message = f"{request.method} {request.scope['path'][:200]}: {error.detail.lower()}{hint}"
        if "GET" in told.headers.get("Allow", ""):  # not every route knows that HEAD is answered before it
            told.headers = {**told.headers, "Allow": "GET, HEAD"}
    if isinstance(told, Rejection):
        REJECTIONS.labels(told.reason).inc()
    elif told.status >= 500 or isinstance(error, TypeError):
        _log_failure(f"answered {told.status}", told, error)
    return error_response(told, request.scope)


async def stream(events: AsyncGenerator[str, None], request: Request) -> Response:
    """The response that streams these events, once it shows that the engine takes the request.

    Raises:
        Exception: the events begin with it.
    """
    first: asyncio.Task[str] = asyncio.ensure_future(anext(events))
    try:
        await asyncio.wait({first}, timeout=EARLY_SECONDS)
    except asyncio.CancelledError:
        first.cancel()  # the client has left; the generator aborts its request
        raise
    if first.done() and isinstance(error := first.exception(), Exception):
        raise error
    return EventStream(_events(first, events, request.scope))


class EventStream(StreamingResponse):
    """Events as they come, and signs of life while none comes; the generator is closed when the client leaves."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_STREAM_HEADERS)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        dialect = dialect_of(scope)
        interval = min(scope["app"].state.keep_alive_interval, dialect.longest_silence_seconds)
        line = _KeptAlive(send, interval, dialect.keep_alive)
        async with aclosing(self._events), line:
            await super().__call__(scope, receive, line.send)


class _KeptAlive:
    """A stream's `send`, and a sign of life whenever it was not used for an interval.

    vLLM's `with_sse_keep_alive` does the same with a task for every event, a tenth of what an event costs.
    """

    def __init__(self, send: Send, interval_seconds: float, sign: bytes) -> None:
        self._send = send
        self._interval_seconds = interval_seconds
        self._sign = sign
        self._last_use = monotonic()
        self._is_sending = False
        self._signs: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        if self._interval_seconds:
            self._signs = asyncio.create_task(self._break_silence())

    async def __aexit__(self, *_: object) -> None:
        if self._signs is not None:
            self._signs.cancel()

    async def send(self, message: Message) -> None:
        """Pass a message on; the silence begins anew."""
        self._is_sending = True
        try:
            await self._send(message)
        finally:
            self._is_sending = False
            self._last_use = monotonic()

    async def _break_silence(self) -> None:
        while True:
            rest = self._last_use + self._interval_seconds - monotonic()
            if rest > 0 or self._is_sending:
                await asyncio.sleep(max(rest, self._interval_seconds / 10))
            else:
                self._last_use = monotonic()
                await self._send({"type": "http.response.body", "body": self._sign, "more_body": True})


async def _events(
    first: "asyncio.Task[str]", events: AsyncGenerator[str, None], scope: Scope
) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        try:
            yield _on_one_line(await first)
            async for event in events:
                yield _on_one_line(event)
        # The response has begun: an error can only be told as its last event.
        except Exception as error:
            told = as_api_error(error)
            if told.status >= 500:
                _log_failure("a stream ended early", told, error)
            yield last_events(told, scope)


def _on_one_line(event: str) -> str:
    """The event, whose JSON says the same, with no end of a line but its own, whoever reads it."""
    return event if event.isascii() else event.translate(_LINE_ENDS)


def _log_failure(what: str, told: ApiError, error: Exception) -> None:
    """A fault of ours, with its traceback where that says more than the error."""
    logger.error("%s: %s", what, told.message, exc_info=None if isinstance(told, NonfiniteOutput) else error)


class ErrorObject(BaseModel):
    """OpenAI's description of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response that is an error."""

    error: ErrorObject


class AnthropicErrorObject(BaseModel):
    """Anthropic's description of an error."""

    type: str
    message: str


class AnthropicErrorBody(BaseModel):
    """The body of an error on a route of Anthropic's API."""

    type: Literal["error"]
    error: AnthropicErrorObject
    request_id: str


def error_responses(*statuses: int, body: type[BaseModel] = ErrorBody) -> dict[int | str, dict[str, Any]]:
    """What the API's schema says of these statuses."""
    return {status: {"model": body} for status in statuses}


_OF_READING = (400, 401, 429, 431, 500, 503, 504)
_OF_BODIES = (*_OF_READING, 404, 413, 415)

READ_ERRORS = error_responses(*_OF_READING)
"""How a route that takes no body can fail."""

BODY_ERRORS = error_responses(*_OF_BODIES)
"""How a route that takes a body can fail."""

ANTHROPIC_ERRORS = error_responses(*_OF_BODIES, body=AnthropicErrorBody)
"""How a route of Anthropic's API can fail."""
