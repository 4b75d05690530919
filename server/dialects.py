"""How the APIs that are served tell of an error, as a whole body and as what ends a stream that has begun; and what
they say while they have nothing to say.

A path says which API its client speaks. A stream whose end needs more than the error (a number, what came before)
leaves in its scope who writes it. Knows paths and errors, no routes.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import Scope

from ultrafuser.server.errors import MAX_PARAM_CHARS, ApiError, ContextTooLong, sanitized
from ultrafuser.server.log import request_id

LastEvents = Callable[[ApiError], str]
"""Server-sent events that end a stream which has begun: this error, and that there is no more."""

_LAST_EVENTS = "last_events"
"""Name in a request's state under which its stream leaves who ends it."""


@dataclass(frozen=True)
class Dialect:
    """One API's way to tell of what is no answer."""

    body: Callable[[ApiError], dict[str, Any]]
    """The JSON body."""

    last_events: LastEvents

    keep_alive: bytes = b": keep-alive\n\n"
    """What a silent stream sends: a comment, or an event that clients pass over."""

    longest_silence_seconds: float = inf
    """How long a stream may be silent, whatever `--keep-alive-interval` says; a client's own limit."""

    id_header: str | None = None
    """Where a response names its request's id, beside `X-Request-Id`."""


def _openai_end(error: ApiError) -> str:
    return f"data: {json.dumps(error.body())}\n\ndata: [DONE]\n\n"


OPENAI = Dialect(ApiError.body, _openai_end)

_ANTHROPIC_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Anthropic's names of errors by status; https://docs.claude.com/en/api/errors."""


def _anthropic_body(error: ApiError) -> dict[str, Any]:
    """Anthropic's JSON has no place for the field that is wrong: the message begins with it."""
    message, param = error.message, error.param and error.param[:MAX_PARAM_CHARS]
    if isinstance(error, ContextTooLong):
        message = f"prompt is too long: {message}"  # agents look for these words to shorten their history
    elif param and not message.startswith(param):
        message = f"{param}: {message}"
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": sanitized(message)}, "request_id": request_id.get()}


def _anthropic_end(error: ApiError) -> str:
    return f"event: error\ndata: {json.dumps(_anthropic_body(error))}\n\n"


ANTHROPIC = Dialect(
    _anthropic_body,
    _anthropic_end,
    keep_alive=b'event: ping\ndata: {"type": "ping"}\n\n',
    longest_silence_seconds=10,
    id_header="request-id",
)

_BY_PREFIX: Mapping[str, Dialect] = {"/v1/messages": ANTHROPIC}
"""APIs with a form of their own, by where their paths begin."""


def dialect_of(scope: Scope) -> Dialect:
    """What the client of this path speaks, wherever the application is mounted."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    own = (dialect for prefix, dialect in _BY_PREFIX.items() if path == prefix or path.startswith(f"{prefix}/"))
    return next(own, OPENAI)


def error_response(error: ApiError, scope: Scope) -> JSONResponse:
    """The response that tells a request's client of an error."""
    body = dialect_of(scope).body(error)
    return JSONResponse(body, status_code=error.status, headers=dict(error.headers))


def ends_with(scope: Scope, last_events: LastEvents) -> None:
    """Have the stream of a request end in a way of its own, whoever ends it."""
    scope.setdefault("state", {})[_LAST_EVENTS] = last_events


def last_events(error: ApiError, scope: Scope) -> str:
    """The events that end a request's stream with an error."""
    own: LastEvents | None = scope.get("state", {}).get(_LAST_EVENTS)
    return (own or dialect_of(scope).last_events)(error)
