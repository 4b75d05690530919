"""Where a server is and what opens it, as a user writes them: checked before any work, so that a slip is one line.

Knows addresses; asks nobody, and imports nothing that takes time.
"""

import ipaddress
import re
from urllib.parse import SplitResult, urlsplit

from ultrafuser.gating.errors import EndpointError

_WAY_OUT = "give one such as http://127.0.0.1:8000/v1"


def check_endpoint(base_url: str, api_key: str | None) -> None:
    """An OpenAI API's address, and the key that it wants.

    Raises:
        EndpointError: no request could be sent there; names the setting, and no password.
    """
    if reason := _why_not(base_url):
        shown = re.sub(r"//.*@", "//...@", base_url, flags=re.DOTALL)
        raise EndpointError(f"base_url: {shown!r:.200} is no address; {_WAY_OUT} ({reason})")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise EndpointError("api_key: has characters that no header can have; give plain ASCII in one line")


def _why_not(base_url: str) -> str:
    """What is wrong with an address; empty: nothing."""
    if not base_url.isprintable() or re.search(r"\s", base_url):
        return "no spaces and control characters"
    try:
        parts = urlsplit(base_url)
        port = parts.port
    except ValueError:
        return "a port from 1 to 65535, and IPv6 in brackets"
    if parts.scheme not in ("http", "https"):
        return "it begins with http:// or https://"
    if port == 0:
        return "a port from 1 to 65535"
    if "@" in parts.netloc:
        return "no user and password; a key is its own setting"
    if "?" in base_url or "#" in base_url:
        return "nothing after its path"
    return "" if _has_host(parts) else "it names a host"


def _has_host(parts: SplitResult) -> bool:
    host = parts.hostname or ""
    try:
        if ":" in host or re.fullmatch(r"\d+(\.\d+){3}", host):
            ipaddress.ip_address(host.partition("%")[0])
        return bool(host.encode("idna"))
    except ValueError:  # UnicodeError is one
        return False
