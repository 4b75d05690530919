"""API keys: where they come from, how a request's is found, and which salt its prefix cache gets.

Only hashes are kept, and every one of them is compared, in constant time. A key's number stands for it everywhere
else. Knows headers, no routes.
"""

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from ultrafuser.server.settings import ServerSettings, SettingsError

CACHE_SALT = "cache_salt"
"""Name in a request's state under which the salt of its key travels."""

NEED_KEYS = ("requests_per_minute", "concurrent_requests", "cache_salt_per_key")
"""Settings that are about keys."""

Headers = Iterable[tuple[bytes, bytes]]


class KeyRing:
    """The keys that open the server, as hashes."""

    def __init__(self, keys: Iterable[SecretStr]) -> None:
        self._digests = [hashlib.sha256(key.get_secret_value().encode()).digest() for key in keys]
        self._secret = secrets.token_bytes(32)

    def __len__(self) -> int:
        return len(self._digests)

    def find(self, headers: Headers) -> int | None:
        """The number of the key in the only Authorization header, or in Anthropic's only x-api-key, or in both; None if
        it is missing, double or wrong, or if the two differ."""
        given = [(name, value) for name, value in headers if name in (b"authorization", b"x-api-key")]
        tokens = {_token(name, value) for name, value in given}
        if len({name for name, _ in given}) < len(given) or len(tokens) != 1 or (token := tokens.pop()) is None:
            return None
        digest = hashlib.sha256(token).digest()
        matches = [hmac.compare_digest(digest, own) for own in self._digests]
        return matches.index(True) if any(matches) else None

    def salt(self, number: int) -> str:
        """What separates this key's prefix cache from the others'; nobody outside can work it out."""
        return hmac.new(self._secret, self._digests[number], hashlib.sha256).hexdigest()


def _token(header: bytes, value: bytes) -> bytes | None:
    """The key that a header's value has; None if it is of another scheme."""
    if header == b"x-api-key":
        return value
    scheme, _, token = value.partition(b" ")
    return token if scheme.lower() == b"bearer" else None


def salt_cache(request: Any, state: Any) -> None:
    """Put the key's salt, if there is one, before the request's own, so that no other key can ask for it."""
    if salt := getattr(state, CACHE_SALT, None):
        request.cache_salt = salt + (request.cache_salt or "")


def with_all_keys(settings: ServerSettings) -> ServerSettings:
    """The settings with the key file's keys among `api_key`; the file is read once, it may be a pipe.

    Raises:
        SettingsError: a key is empty or cannot be sent in a header, the file cannot be read or has no key, or there
            are limits per key and no keys. No message contains a key.
    """
    keys = settings.api_key
    if any(not _is_sendable(key.get_secret_value()) for key in keys):
        raise SettingsError("--api-key: a key is empty or not plain ASCII without spaces; choose another")
    if settings.api_key_file is not None:
        keys += tuple(map(SecretStr, _read_keys(Path(settings.api_key_file))))
    for name in NEED_KEYS:
        if not keys and getattr(settings, name):
            raise SettingsError(f"--{name.replace('_', '-')}: is per key and there are none; set --api-key-file")
    return settings.model_copy(update={"api_key": keys})


def _read_keys(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)).lower() if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError(f"--api-key-file: cannot read {file}: {reason}; name a readable file") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
    wrong = next((number for number, key in numbered if not _is_sendable(key)), None)
    if wrong is not None:
        raise SettingsError(f"--api-key-file: line {wrong} of {file} is not plain ASCII without spaces; correct it")
    if not numbered:
        raise SettingsError(f"--api-key-file: {file} has no key; write one a line, or leave the setting out")
    return [key for _, key in numbered]


def _is_sendable(key: str) -> bool:
    return key.isascii() and key.isprintable() and key != "" and " " not in key
