"""The one place where vLLM's, FastAPI's and unforeseen exceptions become our errors (`server/errors.py`)."""

import re
from collections import Counter
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling import error_response
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.exception_handling.handlers.validation import clean_loc_for_param
from vllm.exceptions import MaxQueuedTokensError, QueueOverflowError, VLLMError, VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError

from ultrafuser.server.engine.client.nonfinite import NonfiniteOutputError
from ultrafuser.server.errors import (
    UNFORESEEN,
    ApiError,
    EngineDead,
    InvalidRequest,
    NonfiniteOutput,
    Overloaded,
    sanitized,
)

# The last four are how vLLM's older code reports a bad request; anything else is a fault of ours and ends as a 500.
TRANSLATED_ERRORS: tuple[type[Exception], ...] = (
    ApiError,
    VLLMError,
    HTTPException,
    RequestValidationError,
    TemplateError,
    ValueError,
    TypeError,
    OverflowError,
    NotImplementedError,
)
"""Exceptions that become OpenAI's error object inside the app, where the request metrics see their status."""

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
_SOON_AGAIN = {"Retry-After": "1"}

# vLLM's own error responses are made of whole messages.
error_response.sanitize_message = sanitized


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
        return EngineDead()
    if isinstance(error, QueueOverflowError | MaxQueuedTokensError):
        return Overloaded("queue_full" if isinstance(error, QueueOverflowError) else "queued_tokens")
    if isinstance(error, NonfiniteOutputError):
        return NonfiniteOutput(str(error))
    told = create_error_response(error).error
    if told.code >= 500 and told.code != HTTPStatus.SERVICE_UNAVAILABLE:
        return _with_status(told.code, UNFORESEEN)
    # vLLM appends "(parameter=..., value=...)" to the text of a validation error; the error object has `param`.
    message = str(error.args[0]) if isinstance(error, VLLMValidationError) else told.message
    return _with_status(told.code, message, told.param or _named_field(message))


def error_in(result: object) -> ApiError | None:
    """The error that one of vLLM's serving classes has returned in place of an answer; None if it is an answer."""
    return as_api_error(result) if isinstance(result, ErrorResponse) else None


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
    field = clean_loc_for_param(tuple(loc))
    # vLLM takes the arguments of a tool call for one of pydantic's own words, too.
    return (f"{field}.arguments" if loc[-2:] == ["function", "arguments"] else field) or None


def _named_field(message: str) -> str | None:
    """The field that one of vLLM's messages begins with: "n must be at least 1"."""
    match = re.match(r"`?([a-z_]+)`? (must|cannot|should) ", message)
    return match[1] if match else None
