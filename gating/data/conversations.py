"""Files of conversations: JSON lines, plain or gzipped, checked row by row.

A row is one JSON object: `{"domain": "code", "messages": [{"role": "user", "content": ...}, ...]}`; other fields are
ignored. A row that cannot be used is reported with file, line and reason. Knows no tokens.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ultrafuser.gating.errors import DataError
from ultrafuser.gating.files import read_lines, split_name

ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True)
class DataFile:
    """One file of conversations."""

    path: Path
    """JSON lines, UTF-8; gzipped if the name ends in `.gz`."""

    domain: str | None = None
    """Domain of every row; null takes each row's own `domain`."""

    @classmethod
    def parse(cls, argument: str) -> "DataFile":
        """`FILE`, or `DOMAIN=FILE`.

        Raises:
            DataError: there is no such file.
        """
        domain, path = split_name(argument)
        if not path.is_file():
            raise DataError(f"{path}: no such data file; give JSON lines, FILE or DOMAIN=FILE")
        return cls(path.resolve(), domain or None)


@dataclass(frozen=True)
class BadRow:
    """A row that was left out."""

    file: str

    line: int
    """Line in the file, from 1."""

    domain: str | None
    """The row's domain, if it has one."""

    reason: str
    """What is wrong with it."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Conversation:
    """A row that can be used, as far as its form goes."""

    domain: str

    messages: list[dict[str, str]]
    """Roles and texts; the last one is a response."""


def read_conversations(file: DataFile) -> Iterator[tuple[int, Conversation | BadRow, float]]:
    """Line number, what the line holds, and the share of the file that has been read; blank lines are skipped.

    Raises:
        DataError: the file is not gzip although its name says so.
    """
    for line, text, share in read_lines(file.path):
        yield line, _parse(file, line, text), share


def check_row(row: object) -> list[dict[str, str]]:
    """The messages of one row.

    Raises:
        DataError: what is wrong, without file and line.
    """
    if not isinstance(row, dict):
        raise DataError("not a JSON object")
    domain = row.get("domain")
    if domain is not None and (not isinstance(domain, str) or not domain.strip()):
        raise DataError(f"domain: must be a name, is {domain!r}")
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError("messages: must be a list of at least two messages")
    if row.get("tools"):
        raise DataError("tools: cannot be trained on; write calls and results as text")
    plain = [_check_message(index, message) for index, message in enumerate(messages)]
    _check_turns([message["role"] for message in plain])
    return plain


def _check_message(index: int, message: object) -> dict[str, str]:
    if not isinstance(message, dict):
        raise DataError(f"messages.{index}: not a JSON object")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"messages.{index}.role: is {role!r}, need one of {', '.join(ROLES)}")
    if message.get("tool_calls"):
        raise DataError(f"messages.{index}.tool_calls: cannot be trained on; write calls as text")
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"messages.{index}.content: must be text that is not empty")
    return {"role": role, "content": content}


def _check_turns(roles: Sequence[str]) -> None:
    if roles[-1] != "assistant":
        raise DataError(f"messages: must end with an assistant message, ends with {roles[-1]}")
    for index, (before, role) in enumerate(zip(["", *roles], roles, strict=False)):
        if role == "assistant" and before != "user":
            raise DataError(f"messages.{index}: an assistant message must follow a user message")


def _parse(file: DataFile, line: int, text: bytes) -> Conversation | BadRow:
    domain = file.domain
    try:
        row = json.loads(text)
        if domain is None and isinstance(row, dict) and isinstance(row.get("domain"), str):
            domain = row["domain"]
        messages = check_row(row)
        if domain is None:
            raise DataError("domain: missing; add it, or name it for the whole file: DOMAIN=FILE")
        return Conversation(domain, messages)
    except UnicodeDecodeError:
        return BadRow(file.path.name, line, domain, "not UTF-8")
    except json.JSONDecodeError as error:
        return BadRow(file.path.name, line, domain, f"not JSON ({error})")
    except DataError as error:
        return BadRow(file.path.name, line, domain, str(error))
