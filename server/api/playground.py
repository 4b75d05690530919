"""GET / and its files: the playground, a page that chats with the model and shows which specialist writes each token.

The files are read once, when the application is made; a path that is not in the table does not exist. Knows no model:
whatever the page shows it asks of the API, with the user's key.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

FOLDER = Path(__file__).parent.parent / "playground"

FILES: Mapping[str, str] = {
    "/": "index.html",
    "/favicon.ico": "icon.svg",
    **{
        f"/playground/{name}": name
        for name in (
            "icon.svg",
            "style.css",
            "frame.css",
            "chat.css",
            "card.css",
            "answer.js",
            "api.js",
            "app.js",
            "card.js",
            "controls.js",
            "conversation.js",
            "errors.js",
            "key.js",
            "marks.js",
            "mix.js",
            "sse.js",
            "tokens.js",
            "walk.js",
        )
    },
}
"""Paths of the page and what they answer. They need no key: there is nothing secret in them."""

_MEDIA_TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# What a model writes is hostile: the page may load its own files and talk to its own server, nothing else; and text
# becomes markup nowhere (trusted types), so that even a mistake in the scripts opens no hole.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_HEADERS: Mapping[str, str] = {
    "Cache-Control": "no-cache",  # kept, but asked after: an upgrade shows at once
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def playground_router() -> APIRouter:
    """The routes of the page and its files; not in the API's schema."""
    router = APIRouter()
    for path, name in FILES.items():
        router.add_route(path, _File(FOLDER / name).answer, methods=["GET", "HEAD"], include_in_schema=False)
    return router


class _File:
    """A file of the page, as it was when the application was made."""

    def __init__(self, path: Path) -> None:
        self._content = path.read_bytes()
        self._media_type = _MEDIA_TYPES[path.suffix]
        self._etag = f'"{hashlib.sha256(self._content).hexdigest()[:32]}"'

    async def answer(self, request: Request) -> Response:
        """The file, or 304 if the client has it already."""
        headers = {**_HEADERS, "ETag": self._etag}
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self._etag in known or known == ["*"]:
            return Response(status_code=304, headers=headers)
        return Response(self._content, media_type=self._media_type, headers=headers)
