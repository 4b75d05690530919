"""What a serving class returned, as an HTTP response: JSON, an event stream, or OpenAI's error object."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from server.errors import as_api_error

EARLY_SECONDS = 1.0
"""How long a stream's headers wait for its first event.

What is wrong with a request often shows only in the engine, milliseconds after the stream was made; within this time
the client gets the right status instead of a stream that begins with an error."""

_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_DONE = "data: [DONE]\n\n"

logger = logging.getLogger(__name__)


async def to_response(result: AsyncGenerator[str, None] | BaseModel) -> Response:
    """The response for what a vLLM serving class returned."""
    if isinstance(result, ErrorResponse):
        return as_api_error(result).response()
    if isinstance(result, BaseModel):
        return JSONResponse(result.model_dump())
    return await _stream(result)


async def answer_error(request: Request, error: Exception) -> Response:
    """The response for an exception; a fault of ours goes into the log, a client's does not."""
    told = as_api_error(error)
    if isinstance(error, HTTPException) and told.status in (404, 405):
        hint = "" if told.status == 405 else "; to generate, POST to /v1/chat/completions or /v1/completions"
        told.message = f"{request.method} {request.scope['path'][:200]}: {error.detail.lower()}{hint}"
    if told.status >= 500 or isinstance(error, TypeError):
        logger.error("answered %d", told.status, exc_info=error)
    return told.response()


async def _stream(events: AsyncGenerator[str, None]) -> Response:
    first: asyncio.Task[str] = asyncio.ensure_future(anext(events))
    try:
        await asyncio.wait({first}, timeout=EARLY_SECONDS)
    except asyncio.CancelledError:
        first.cancel()  # the client has left; the generator aborts its request
        raise
    if first.done() and isinstance(error := first.exception(), Exception):
        raise error
    return StreamingResponse(_events(first, events), media_type="text/event-stream", headers=_STREAM_HEADERS)


async def _events(first: "asyncio.Task[str]", events: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    async with aclosing(events):
        try:
            yield await first
            async for event in events:
                yield event
        # The response has begun: an error can only be told as its last event.
        except Exception as error:
            told = as_api_error(error)
            if told.status >= 500:
                logger.error("a stream ended early", exc_info=error)
            yield told.event()
            yield _DONE


class ErrorObject(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response that is an error."""

    error: ErrorObject


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What the API's schema says of these statuses."""
    return {status: {"model": ErrorBody} for status in statuses}


READ_ERRORS = error_responses(401, 429, 431, 500, 503)
"""How a route that takes no body can fail."""

BODY_ERRORS = READ_ERRORS | error_responses(400, 404, 413, 415)
"""How a route that takes a body can fail."""
