"""What every request passes before a route sees it: an id and a log line, and the key check. Reads no bodies."""

import logging
import re
import time
import uuid
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from server.api.playground import FILES as PLAYGROUND_FILES
from server.errors import InvalidApiKey, as_api_error
from server.log import request_id
from server.metrics import DISCONNECTS

PUBLIC_PATHS = frozenset({"/health", "/ready", "/metrics", *PLAYGROUND_FILES})
"""Paths that need no key. Everything else does, so that a new route is closed until somebody opens it."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_QUIET_PATHS = PUBLIC_PATHS | {"/version"}
_CLIENT_LEFT = 499

logger = logging.getLogger(__name__)


class RequestLog:
    """Gives each request an id, says how it ended, and answers 500 when nothing further in did.

    A client's own X-Request-Id is kept if it is short and plain, else replaced: it ends up in log lines and in the id
    of the response. vLLM reads it from the headers, so `chatcmpl-ID` and a request's log lines name the same id.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        token = request_id.set(exchange.id)
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except Exception as error:
            logger.exception("the request failed")
            if exchange.status is not None:
                raise
            await as_api_error(error).response()(scope, exchange.receive, exchange.send)
        finally:
            exchange.log()
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
            MutableHeaders(scope=message)["x-request-id"] = self.id
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._is_complete = True

    def log(self) -> None:
        if self._client_left:
            DISCONNECTS.inc()
        status = _CLIENT_LEFT if self._client_left else self.status
        level = logging.DEBUG if self._scope["path"] in _QUIET_PATHS else logging.INFO
        duration_ms = 1000 * (time.monotonic() - self._start)
        # %r: a path is the client's, and must not be able to begin a line of its own.
        logger.log(level, "%s %r %s %.0f ms", self._scope["method"], self._scope["path"], status, duration_ms)


class ApiKeys(AuthenticationMiddleware):
    """Answers 401 to a request without one of the keys; vLLM's check of the token, our choice of paths.

    vLLM guards a list of prefixes; here every path is guarded but the public ones. The decision rests on the path that
    is routed, never on what a Host header makes of it.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        super().__init__(app, tokens=list(keys))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and path not in PUBLIC_PATHS and not self.verify_token(Headers(scope=scope)):
            error = InvalidApiKey("Missing or wrong API key: send it as `Authorization: Bearer KEY`.")
            await error.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)
