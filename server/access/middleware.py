"""What every request passes before a route sees it: an id and a log line, its headers' number, its host's name, its
key; and HEAD, which is answered like GET. Reads no bodies."""

import logging
import re
import time
import uuid
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from http import HTTPStatus

from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ultrafuser.server.access.keys import CACHE_SALT, KeyRing
from ultrafuser.server.access.quotas import Quota
from ultrafuser.server.dialects import dialect_of, error_response
from ultrafuser.server.errors import (
    UNFORESEEN,
    ApiError,
    InvalidApiKey,
    InvalidHost,
    RateLimited,
    Rejection,
    TooManyHeaders,
    UntrustedHost,
)
from ultrafuser.server.log import request_id
from ultrafuser.server.metrics import DISCONNECTS, REJECTIONS

PROBE_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""Of the probes. Which paths need no key is the application's decision; a new route is closed until it opens it."""

MAX_HEADERS = 200
"""Most header lines of a request; no client has a tenth of them. Their length is the connection's affair."""

_HOST = re.compile(
    rb"(\[[0-9A-Fa-fv:.!$&'()*+,;=_~-]+\]|([A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)(:[0-9]*)?"  # RFC 3986
)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_CLIENT_LEFT = 499
_OTHER_REPLICAS = b"x-other-replicas"

logger = logging.getLogger(__name__)


class RequestLog:
    """Gives each request an id, says how it ended, and answers 500 when nothing further in did.

    A client's own X-Request-Id is kept if it is short and plain, else replaced: it ends up in log lines and in the id
    of the response. vLLM reads it from the headers, so `chatcmpl-ID` and a request's log lines name the same id.
    """

    def __init__(self, app: ASGIApp, quiet_paths: Collection[str]) -> None:
        """`quiet_paths`: machines and browsers ask for them again and again; their log lines are for debugging."""
        self.app = app
        self._quiet_paths = quiet_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = _Exchange(scope, receive, send)
        token = request_id.set(exchange.id)
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except Exception:
            logger.exception("the request failed")
            if exchange.status is not None:
                raise
            await error_response(ApiError(UNFORESEEN), scope)(scope, exchange.receive, exchange.send)
        finally:
            exchange.log(logging.DEBUG if scope["path"] in self._quiet_paths else logging.INFO)
            request_id.reset(token)


class _Exchange:
    """One request and its response, as seen from outside."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._start = time.monotonic()
        self._is_complete = False
        self._client_left = False
        self.status: int | None = None
        headers = MutableHeaders(scope=scope)
        given = headers.get("x-request-id", "")
        self.id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        headers["x-request-id"] = self.id

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._is_complete:
            self._client_left = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.id
            if own := dialect_of(self._scope).id_header:
                headers[own] = self.id
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._is_complete = True

    def log(self, level: int) -> None:
        if self._client_left:
            DISCONNECTS.inc()
        status = _CLIENT_LEFT if self._client_left else self.status
        duration_ms = 1000 * (time.monotonic() - self._start)
        # %r: a path is the client's, and must not be able to begin a line of its own.
        logger.log(level, "%s %r %s %.0f ms", self._scope["method"], self._scope["path"], status, duration_ms)


class ApiKeys:
    """Answers 401 to a request without one of the keys, and 429 to one whose key has used up its share.

    Every path is guarded but the public ones. The decision rests on the path that is routed, never on what a Host
    header makes of it.
    """

    def __init__(
        self, app: ASGIApp, keys: KeyRing, quotas: Sequence[Quota], salts_cache: bool, public_paths: Collection[str]
    ) -> None:
        """`quotas`: one for each key, in their order; `salts_cache`: give every key a prefix cache of its own."""
        self.app = app
        self._keys = keys
        self._quotas = quotas
        self._salts_cache = salts_cache
        self._public_paths = public_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_among(scope, self._public_paths):
            await self.app(scope, receive, send)
            return
        number = self._keys.find(scope["headers"])
        if number is None:
            error = InvalidApiKey(
                "Missing or wrong API key: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`."
            )
            await refuse(error, scope, receive, send)
            return
        if self._salts_cache:
            scope.setdefault("state", {})[CACHE_SALT] = self._keys.salt(number)
        with ExitStack() as share:
            try:
                share.enter_context(self._quotas[number].use())
            except RateLimited as error:
                await refuse(error, scope, receive, send)
                return
            await self.app(scope, receive, send)


class HeaderCount:
    """Answers 431 to a request with too many headers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (count := len(scope["headers"])) > MAX_HEADERS:
            error = TooManyHeaders(f"The request has {count} headers, at most {MAX_HEADERS} are read.")
            await error_response(error, scope)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class HostHeader:
    """Answers 400 where it is not said once, and in letters a host can have, which host is asked: then the server and a
    proxy before it may take one request for two different ones. HTTP/1.0 may leave it out."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        is_missing = not hosts and scope["http_version"] >= "1.1"
        if is_missing or len(hosts) > 1 or not all(map(_HOST.fullmatch, hosts)):
            await refuse(InvalidHost("The request needs one valid Host header."), scope, receive, send)
        else:
            await self.app(scope, receive, send)


class TrustedHosts:
    """Starlette's check of the Host header, with our error; probes and metrics pass under every name."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str], public_paths: Collection[str]) -> None:
        self.app = app
        self._public_paths = public_paths
        self._check = TrustedHostMiddleware(_pass_on, hosts, www_redirect=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        verdict: list[str] = []

        async def note(message: Message) -> None:
            verdict.append(message["type"])

        if not is_among(scope, self._public_paths):
            await self._check(scope, receive, note)
        if verdict:
            await refuse(UntrustedHost("The Host header is not one of this server's names."), scope, receive, send)
        else:
            await self.app(scope, receive, send)


class Head:
    """Answers HEAD as GET, without the body, for whatever is behind it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        if scope["method"] == "HEAD":
            await self.app({**scope, "method": "GET"}, receive, send_head)
        else:
            await self.app(scope, receive, send)


def is_among(scope: Scope, paths: Collection[str]) -> bool:
    """Whether a request is for one of these paths, wherever the application is mounted."""
    return scope["path"].removeprefix(scope.get("root_path", "")) in paths


async def refuse(error: Rejection, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with a rejection and count it.

    A balancer that offers to ask another replica is told so by a status of its own, since nothing has run; beside it
    stands what to tell the client if no other takes the request. A status that clients know would not say that: a
    request that the shutdown's deadline has cut gets 503 as well.
    """
    REJECTIONS.labels(error.reason).inc()
    response = error_response(error, scope)
    if error.is_of_this_server and any(name == _OTHER_REPLICAS for name, _ in scope["headers"]):
        response.headers["X-Refused"] = str(response.status_code)
        response.status_code = HTTPStatus.TOO_EARLY
    await response(scope, receive, send)


async def _pass_on(_scope: Scope, _receive: Receive, _send: Send) -> None:
    """The application behind Starlette's check, which says nothing."""
