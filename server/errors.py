"""The errors a client gets, and the one place where an exception becomes OpenAI's error object.

    ApiError
    ├── InvalidRequest          400  invalid_request_error
    │   ├── NotFused            400  invalid_request_error  code unsupported_parameter
    │   ├── ContextTooLong      400  invalid_request_error  code context_length_exceeded
    │   ├── BodyTooLarge        413  invalid_request_error  code request_too_large
    │   └── UnsupportedMediaType 415 invalid_request_error  code unsupported_media_type
    ├── Rejection               the request may be fine, but not now or not from this client
    │   ├── InvalidApiKey       401  invalid_request_error  code invalid_api_key
    │   ├── UntrustedHost       400  invalid_request_error  code untrusted_host
    │   ├── RateLimited         429  requests               code rate_limit_exceeded
    │   ├── Overloaded          503  server_error           code server_overloaded
    │   └── ShuttingDown        503  server_error           code shutting_down
    └── TimedOut                504  server_error           code request_timeout

Everything else (vLLM's errors, FastAPI's, ours that nobody foresaw) is translated by `as_api_error`. A client's fault
is always 4xx: the official client sends a request that failed with 429 or 5xx three times, unless `x-should-retry` is
false, as it is for every 500: the same request would fail again. Knows no routes.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling import error_response
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.exception_handling.handlers.validation import clean_loc_for_param
from vllm.entrypoints.serve.exception_handling.utils import sanitize_message
from vllm.exceptions import MaxQueuedTokensError, QueueOverflowError, VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError

from server.engine.core.nonfinite import NONFINITE_OUTPUT, NonfiniteOutputError

MAX_MESSAGE_CHARS = 1000
"""A message may quote the request, but must not send it back whole."""

MAX_PARAM_CHARS = 100
"""So may `param`: where a field is an object its keys are the client's."""

_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    431: "headers_too_large",
    500: "internal_error",
    503: "server_overloaded",
}
_NOT_AGAIN = {"x-should-retry": "false"}
_SOON_AGAIN = {"Retry-After": "1"}


def sanitized(message: str) -> str:
    """A message without addresses, paths and tracebacks; cut before it is searched, which takes the square of its
    length."""
    cut = f"{message[:MAX_MESSAGE_CHARS]} [...]" if len(message) > MAX_MESSAGE_CHARS else message
    return sanitize_message(cut)


# vLLM's own error responses are made of whole messages.
error_response.sanitize_message = sanitized


class ApiError(Exception):
    """What a client is told instead of an answer: OpenAI's error object and its HTTP status."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    code: str | None = "internal_error"
    headers: Mapping[str, str] = _NOT_AGAIN

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    @property
    def type(self) -> str:
        """OpenAI's two kinds: the client must change the request, or the server failed."""
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body: `{"error": {"message", "type", "param", "code"}}`."""
        message = sanitized(self.message)
        param = self.param and self.param[:MAX_PARAM_CHARS]
        return {"error": {"message": message, "type": self.type, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body(), status_code=self.status, headers=dict(self.headers))

    def last_events(self) -> str:
        """The server-sent events that end a stream which has already begun: this error, and that there is no more."""
        return f"data: {json.dumps(self.body(), ensure_ascii=False)}\n\ndata: [DONE]\n\n"


class InvalidRequest(ApiError, ValueError):
    """The request cannot be served as it is; `param` names the field to change."""

    status = HTTPStatus.BAD_REQUEST
    code: str | None = None
    headers: Mapping[str, str] = {}


class NotFused(InvalidRequest):
    """The request asks for something that vLLM has and a fused model has not."""

    code = "unsupported_parameter"


class ContextTooLong(InvalidRequest):
    """The longest rendering of the prompt leaves no room for a response."""

    code = "context_length_exceeded"


class BodyTooLarge(InvalidRequest):
    """The body is longer than the server reads; the connection ends, for the rest of it is still to come."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "request_too_large"
    headers: Mapping[str, str] = {"Connection": "close"}


class UnsupportedMediaType(InvalidRequest):
    """The body is not declared to be JSON."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    code = "unsupported_media_type"


class Rejection(ApiError):
    """Turned away before it was looked at: counted by reason."""

    headers: Mapping[str, str] = {}
    reason: str
    """Its label in `fused_rejections_total`."""


class InvalidApiKey(Rejection):
    """The bearer token is missing or wrong."""

    status = HTTPStatus.UNAUTHORIZED
    code = "invalid_api_key"
    headers: Mapping[str, str] = {"WWW-Authenticate": "Bearer"}
    reason = "auth"


class UntrustedHost(Rejection):
    """The Host header has a name that is not one of the server's."""

    status = HTTPStatus.BAD_REQUEST
    code = "untrusted_host"
    reason = "host"


class RateLimited(Rejection):
    """The key has used up what it may."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "rate_limit_exceeded"

    def __init__(self, message: str, reason: str, wait_seconds: float) -> None:
        super().__init__(message)
        self.reason = reason
        self.headers = {"Retry-After": str(math.ceil(wait_seconds))}

    @property
    def type(self) -> str:
        """OpenAI's word for a limit on the number of requests."""
        return "requests"


class Overloaded(Rejection):
    """As many requests as the server takes are unfinished."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "server_overloaded"
    headers: Mapping[str, str] = {"Retry-After": "1"}

    def __init__(self, reason: str = "queue_full") -> None:
        super().__init__("The server has as many requests as it takes; try again later.")
        self.reason = reason


class ShuttingDown(Rejection):
    """The server is about to end."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "shutting_down"
    headers: Mapping[str, str] = {"Retry-After": "1", "Connection": "close"}
    reason = "shutting_down"

    def __init__(self) -> None:
        super().__init__("The server is shutting down; send the request to another one, or later.")


class TimedOut(ApiError):
    """The server's limit on a request's time has passed. Tried again, it would most likely pass again."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    code = "request_timeout"
    headers: Mapping[str, str] = {"x-should-retry": "false"}


def as_api_error(error: Exception | ErrorResponse) -> ApiError:
    """The error a client gets for whatever went wrong. Internal details of a server fault stay in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ErrorResponse):
        return _with_status(error.error.code, error.error.message, error.error.param)
    if isinstance(error, RequestValidationError):
        return _from_validation(error)
    if isinstance(error, HTTPException):
        told_http = _with_status(error.status_code, str(error.detail))
        told_http.headers = {**told_http.headers, **(error.headers or {})}
        return told_http
    if isinstance(error, EngineDeadError):
        return _engine_dead()
    if isinstance(error, QueueOverflowError | MaxQueuedTokensError):
        return Overloaded("queue_full" if isinstance(error, QueueOverflowError) else "queued_tokens")
    if isinstance(error, NonfiniteOutputError):
        return _nonfinite(error)
    told = create_error_response(error).error
    if told.code >= 500 and told.code != HTTPStatus.SERVICE_UNAVAILABLE:
        return _with_status(told.code, "The server failed to process the request; its log has the reason.")
    # vLLM appends "(parameter=..., value=...)" to the text of a validation error; the error object has `param`.
    message = str(error.args[0]) if isinstance(error, VLLMValidationError) else told.message
    return _with_status(told.code, message, told.param or _named_field(message))


def _with_status(status: int, message: str, param: str | None = None) -> ApiError:
    error = ApiError(message, param)
    # 422 is FastAPI's habit and 501 vLLM's; to OpenAI's clients both are plain bad requests.
    error.status = HTTPStatus(400 if status in (422, 501) else status)
    error.code = "model_not_found" if (status, param) == (404, "model") else _CODES.get(error.status)
    if error.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        error.headers = _SOON_AGAIN
    elif error.status < 500:
        error.headers = {}
    return error


def _engine_dead() -> ApiError:
    error = ApiError("The engine has stopped; the server is about to end.")
    error.code = "engine_dead"
    return error


def _nonfinite(error: NonfiniteOutputError) -> ApiError:
    told = ApiError(str(error))
    told.code = NONFINITE_OUTPUT
    told.headers = {"x-should-retry": "false"}  # the same request would most likely end so again
    return told


def _from_validation(error: RequestValidationError) -> ApiError:
    told = _most_telling(error.errors())
    cause = told.get("ctx", {}).get("error")
    if isinstance(cause, VLLMValidationError):
        return as_api_error(cause)
    param = _field(told)
    return InvalidRequest(f"{param or 'body'}: {told['msg']}", param)


def _most_telling(errors: Sequence[Any]) -> Any:
    """Where a union is wrong, each of its branches complains: take the field that most of them name, and of its
    complaints one that is not just "another type was expected"."""
    ((field, _),) = Counter(_field(error) for error in errors).most_common(1)
    complaints = [error for error in errors if _field(error) == field]
    return next((c for c in complaints if not c["type"].endswith(("_type", "literal_error"))), complaints[0])


def _field(error: Any) -> str | None:
    """The field of the body, without the classes of a union's branches: a client knows fields only."""
    loc = [part for part in error["loc"][1:] if not re.match(r"[A-Z]", str(part))]
    return clean_loc_for_param(tuple(loc)) or None


def _named_field(message: str) -> str | None:
    """The field that one of vLLM's messages begins with: "n must be at least 1"."""
    match = re.match(r"`?([a-z_]+)`? (must|cannot|should) ", message)
    return match[1] if match else None
