"""Files of conversations: JSON lines, plain or gzipped, checked row by row.

A row is one JSON object: `{"domain": "code", "messages": [{"role": "user", "content": ...}, ...]}`; an assistant's
message may have `reasoning` (or `reasoning_content`), other fields are ignored. A row that cannot be used is reported
with file, line and reason. Knows no tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ultrafuser.gating.errors import DataError
from ultrafuser.gating.files import input_file, read_lines, split_name
from ultrafuser.gating.json_text import JsonError, parse_json
from ultrafuser.gating.templates import TemplateError, reasoning_of

ROLES = ("system", "developer", "user", "assistant")

RESERVED_DOMAINS = ("mean",)
"""Keys that stand beside the domains' in results: a domain of such a name would take their place."""


@dataclass(frozen=True)
class DataFile:
    """One file of conversations."""

    path: Path
    """JSON lines, UTF-8; gzipped if the name ends in `.gz`."""

    domain: str | None = None
    """Domain of every row; null takes each row's own `domain`."""

    origin: str | None = None
    """What its rows were copied from, as `--data` would name it: a data set of the hub at a commit."""

    @property
    def name(self) -> str:
        """What messages and reports call it."""
        return self.origin or self.path.name

    @classmethod
    def parse(cls, argument: str) -> "DataFile":
        """`FILE`, or `DOMAIN=FILE`.

        Raises:
            DataError: the file cannot be read, or the domain cannot be called so.
        """
        domain, path = split_name(argument)
        if domain:
            check_domain(domain)
        return cls(input_file(path, "give JSON lines, FILE or DOMAIN=FILE", kind="data file").resolve(), domain or None)


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
        DataError: the file cannot be read, or is not whole gzip although its name says so.
    """
    for line, text, share in read_lines(file.path):
        yield line, parse_row(file, line, text), share


def parse_row(file: DataFile, line: int, text: bytes) -> Conversation | BadRow:
    """What a line of a file holds."""
    domain = file.domain
    try:
        row = parse_json(text)
        if domain is None and isinstance(row, dict) and isinstance(row.get("domain"), str):
            domain = row["domain"]
        messages = check_row(row)
        if domain is None:
            raise DataError("domain: missing; add it, or name it for the whole file: DOMAIN=FILE")
        return Conversation(domain, messages)
    except (JsonError, DataError) as error:
        return BadRow(file.name, line, domain, str(error))


def check_domain(domain: object) -> str:
    """The name of a domain: in one place for data files, their rows, and files that describe a domain.

    Raises:
        DataError: it cannot be called so.
    """
    if not isinstance(domain, str) or not domain.strip() or not domain.isprintable():
        raise DataError(f"domain: must be a name, is {domain!r:.60}")
    if domain in RESERVED_DOMAINS:
        raise DataError(f"domain: {domain!r} is the name of a result of all domains; choose another name")
    return domain


def check_row(row: object) -> list[dict[str, str]]:
    """The messages of one row.

    Raises:
        DataError: what is wrong, without file and line.
    """
    if not isinstance(row, dict):
        raise DataError("not a JSON object")
    if row.get("domain") is not None:
        check_domain(row["domain"])
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
        raise DataError(f"messages.{index}.role: is {role!r:.60}, need one of {', '.join(ROLES)}")
    if message.get("tool_calls"):
        raise DataError(f"messages.{index}.tool_calls: cannot be trained on; write calls as text")
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"messages.{index}.content: must be text that is not empty")
    try:
        reasoning = reasoning_of(message) if role == "assistant" else None
    except TemplateError as error:
        raise DataError(f"messages.{index}: {error}") from error
    return {"role": role, "content": content} | ({} if reasoning is None else {"reasoning": reasoning})


def _check_turns(roles: Sequence[str]) -> None:
    if roles[-1] != "assistant":
        raise DataError(f"messages: must end with an assistant message, ends with {roles[-1]}")
    for index, (before, role) in enumerate(zip(["", *roles], roles, strict=False)):
        if role == "assistant" and before != "user":
            raise DataError(f"messages.{index}: an assistant message must follow a user message")
