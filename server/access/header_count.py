"""How many headers a request may send; their length is the connection's affair (`server.access.connections`)."""

from collections.abc import Mapping
from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError

MAX_HEADERS = 200
"""Most header lines of a request; no client has a tenth of them."""


class TooManyHeaders(ApiError):
    """More header lines than a request has use for."""

    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    code = "headers_too_large"
    headers: Mapping[str, str] = {"Connection": "close"}


class HeaderCount:
    """Answers 431 to a request with too many headers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and len(scope["headers"]) > MAX_HEADERS:
            error = TooManyHeaders(f"The request has {len(scope['headers'])} headers, at most {MAX_HEADERS} are read.")
            await error.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)
