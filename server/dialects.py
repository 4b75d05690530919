"""How the APIs that are served tell of an error: as a whole body, and as what ends a stream that has begun.

A path says which API its client speaks. A stream whose end needs more than the error (a number, what came before)
leaves in its scope who writes it. Knows paths and errors, no routes.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import Scope

from ultrafuser.server.errors import ApiError

LastEvents = Callable[[ApiError], str]
"""Server-sent events that end a stream which has begun: this error, and that there is no more."""

_LAST_EVENTS = "last_events"
"""Name in a request's state under which its stream leaves who ends it."""


@dataclass(frozen=True)
class Dialect:
    """One API's way to tell of an error."""

    body: Callable[[ApiError], dict[str, Any]]
    """The JSON body."""

    last_events: LastEvents


def _openai_end(error: ApiError) -> str:
    return f"data: {json.dumps(error.body())}\n\ndata: [DONE]\n\n"


OPENAI = Dialect(ApiError.body, _openai_end)


def dialect_of(scope: Scope) -> Dialect:
    """What the client of this path speaks, wherever the application is mounted."""
    return OPENAI


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
