"""GET / and its files: the playground, a page that chats with the model and shows which specialist writes each token.

The files are read once, when the application is made; nothing but the page's own folder is served. Knows no model:
whatever the page shows it asks of the API, with the user's key.
"""

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

FOLDER = Path(__file__).parent.parent / "playground"

_MEDIA_TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

FILES: Mapping[str, str] = {"/": "index.html", "/favicon.ico": "icon.svg"} | {
    f"/playground/{path.name}": path.name for path in sorted(FOLDER.iterdir()) if path.suffix in {".css", ".js", ".svg"}
}
"""Paths of the page and what they answer. They need no key: there is nothing secret in them."""

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
        router.add_route(path, _answering(FOLDER / name), methods=["GET"], include_in_schema=False)
    return router


def _answering(path: Path) -> Callable[[Request], Awaitable[Response]]:
    """A route for the file as it is now: its content, or 304 if the client has it already."""
    content = path.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": etag}

    async def answer(request: Request) -> Response:
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if etag in known or known == ["*"]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=_MEDIA_TYPES[path.suffix], headers=headers)

    return answer
