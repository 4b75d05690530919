"""The errors a client gets: what each says, its status, and OpenAI's error object.

    ApiError
    ├── InvalidRequest          400  invalid_request_error
    │   ├── UnsupportedParameter 400 invalid_request_error  code unsupported_parameter
    │   ├── ContextTooLong      400  invalid_request_error  code context_length_exceeded
    │   ├── ModelNotFound       404  invalid_request_error  code model_not_found
    │   ├── NotStored           404  invalid_request_error  code not_found
    │   ├── BodyTooLarge        413  invalid_request_error  code request_too_large
    │   └── UnsupportedMediaType 415 invalid_request_error  code unsupported_media_type
    ├── Rejection               the request may be fine, but not now or not from this client
    │   ├── InvalidApiKey       401  invalid_request_error  code invalid_api_key
    │   ├── InvalidHost         400  invalid_request_error  code invalid_host
    │   ├── UntrustedHost       400  invalid_request_error  code untrusted_host
    │   ├── RateLimited         429  requests               code rate_limit_exceeded
    │   ├── Overloaded          503  server_error           code server_overloaded
    │   └── ShuttingDown        503  server_error           code shutting_down
    ├── TooManyHeaders          431  invalid_request_error  code headers_too_large
    ├── EngineDead              500  server_error           code engine_dead
    ├── NonfiniteOutput         500  server_error           code nonfinite_output
    └── TimedOut                504  server_error           code request_timeout

Everything else (vLLM's errors, FastAPI's, ours that nobody foresaw) is translated by `server/serving/translation.py`. A
client's fault is always 4xx: the official client sends a request that failed with 429 or 5xx three times, unless
`x-should-retry` is false, as it is for every 500: the same request would fail again. Knows no routes and no vLLM.
"""

import math
import re
from collections.abc import Mapping
from http import HTTPStatus

MAX_MESSAGE_CHARS = 1000
"""A message may quote the request, but must not send it back whole."""

MAX_PARAM_CHARS = 100
"""So may `param`: where a field is an object its keys are the client's."""

UNFORESEEN = "The server failed to process the request; its log has the reason."
"""What is said of a fault that nobody foresaw."""

_INTERNALS = (
    (re.compile(r" at 0x[0-9a-fA-F]+>"), ">"),
    (re.compile(r'\n?\s*File "[^"]+", line \d+, in \S+(\n\s+.*)?'), ""),
    (re.compile(r"/(?:home|usr|opt|var|tmp|root|lib|mnt|srv)(?:/[\w.\-]+)+"), "<path>"),
    (re.compile(r"(?:/[\w\-]+)+/[\w\-]+\.\w+"), "<path>"),
)


def sanitized(message: str) -> str:
    """A message without addresses, paths and tracebacks; cut before it is searched, which takes the square of its
    length."""
    cut = f"{message[:MAX_MESSAGE_CHARS]} [...]" if len(message) > MAX_MESSAGE_CHARS else message
    for pattern, replacement in _INTERNALS:
        cut = pattern.sub(replacement, cut)
    return cut.strip()


class ApiError(Exception):
    """What a client is told instead of an answer: OpenAI's error object and its HTTP status."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    code: str | None = "internal_error"
    headers: Mapping[str, str] = {"x-should-retry": "false"}

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    @property
    def type(self) -> str:
        """OpenAI's two kinds: the client must change the request, or the server failed."""
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's JSON: `{"error": {"message", "type", "param", "code"}}`; others' are in `server/dialects.py`."""
        message = sanitized(self.message)
        param = self.param and self.param[:MAX_PARAM_CHARS]
        return {"error": {"message": message, "type": self.type, "param": param, "code": self.code}}


class InvalidRequest(ApiError, ValueError):
    """The request cannot be served as it is; `param` names the field to change."""

    status = HTTPStatus.BAD_REQUEST
    code: str | None = None
    headers: Mapping[str, str] = {}


class UnsupportedParameter(InvalidRequest):
    """The request asks for something that vLLM has and a fused model has not."""

    code = "unsupported_parameter"


class ContextTooLong(InvalidRequest):
    """The longest rendering of the prompt leaves no room for a response."""

    code = "context_length_exceeded"


class ModelNotFound(InvalidRequest):
    """There is no model of this name; the message may say which there is."""

    status = HTTPStatus.NOT_FOUND
    code = "model_not_found"


class NotStored(InvalidRequest):
    """Something is asked for by its id that this server does not keep."""

    status = HTTPStatus.NOT_FOUND
    code = "not_found"


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

    is_of_this_server: bool = False
    """Whether another replica may take the request."""


class InvalidApiKey(Rejection):
    """The key is missing or wrong."""

    status = HTTPStatus.UNAUTHORIZED
    code = "invalid_api_key"
    headers: Mapping[str, str] = {"WWW-Authenticate": "Bearer"}
    reason = "auth"


class InvalidHost(Rejection):
    """HTTP/1.1 without a Host header, any request with two, or one that cannot be a host's name."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_host"
    headers: Mapping[str, str] = {"Connection": "close"}
    reason = "host"


class UntrustedHost(Rejection):
    """The Host header has a name that is not one of the server's."""

    status = HTTPStatus.BAD_REQUEST
    code = "untrusted_host"
    reason = "host"


class RateLimited(Rejection):
    """The key has used up what it may."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "rate_limit_exceeded"
    is_of_this_server = True

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
    is_of_this_server = True

    def __init__(self, reason: str = "queue_full") -> None:
        super().__init__("The server has as many requests as it takes; try again later.")
        self.reason = reason


class ShuttingDown(Rejection):
    """The server is about to end."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "shutting_down"
    headers: Mapping[str, str] = {"Retry-After": "1", "Connection": "close"}
    reason = "shutting_down"
    is_of_this_server = True

    def __init__(self) -> None:
        super().__init__("The server is shutting down; send the request to another one, or later.")


class TooManyHeaders(ApiError):
    """More header lines than a request has use for."""

    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    code = "headers_too_large"
    headers: Mapping[str, str] = {"Connection": "close"}


class EngineDead(ApiError):
    """The engine's processes have ended, and the server will."""

    code = "engine_dead"

    def __init__(self) -> None:
        super().__init__("The engine has stopped; the server is about to end.")


class NonfiniteOutput(ApiError):
    """A specialist or the gate computed NaN or infinity for this request."""

    code = "nonfinite_output"


class TimedOut(ApiError):
    """The server's limit on a request's time has passed. Tried again, it would most likely pass again."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    code = "request_timeout"
