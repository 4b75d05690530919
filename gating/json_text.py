"""JSON that others wrote: its value, or in a few words why it cannot be used. Knows no files.

Stricter than the JSON of Python's library, whose values can break whatever handles them later: half of a surrogate
pair is no text, thousands of brackets are no data, and of a key that is there twice one value would be lost.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 100
"""Of arrays and objects within each other; every walk through a value is then safe from Python's recursion limit."""

MAX_DIGITS = 1000
"""Of a whole number: Python itself refuses to read or write more than 4,300."""

_SHOWN_CHARACTERS = 60
_HALF_PAIR = re.compile("[\ud800-\udfff]")
# Where none of these is in a text, nothing has to be looked for in its value.
_SUSPECT = re.compile("[\ud800-\udfff]|\\\\u[dD][89a-fA-F]")
_LONG_NUMBER = re.compile(rf"[0-9]{{{MAX_DIGITS + 1}}}")
# Each character is looked at once: possessive, and a string without an end is one, too.
_STRUCTURE = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


class JsonError(ValueError):
    """A text is no usable JSON: `FIELD: what is wrong`, without the field where the whole is meant."""


def parse_json(content: bytes | str, *, allows_line_breaks: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        content: UTF-8, with or without a byte order mark, or text.
        allows_line_breaks: within its texts, as language models write them.

    Raises:
        JsonError: what is wrong, and in which field.
    """
    text = _decode(content) if isinstance(content, bytes) else content
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(text)
    options: dict[str, Any] = {"strict": not allows_line_breaks, "object_pairs_hook": _object}
    try:
        # Only a slower reader of numbers can tell the field of one that is too long.
        if has_long_number := _LONG_NUMBER.search(text) is not None:
            options["parse_int"] = _integer
        value = json.loads(text, **options)
    except json.JSONDecodeError as error:
        raise JsonError(f"not JSON ({error})") from error
    if has_long_number or _SUSPECT.search(text):
        _check_values(value)
    return value


class _LongNumber:
    """Stands in a value for a number that cannot be read."""

    def __init__(self, digits: str) -> None:
        self.reason = f"a number of {len(digits.lstrip('-')):,} digits is too long"


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JsonError(f"not JSON (not UTF-8: byte {error.start + 1})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise JsonError(f"{_shown(twice)}: the key is there twice")
    return value


def _integer(digits: str) -> int | _LongNumber:
    return int(digits) if len(digits) <= MAX_DIGITS else _LongNumber(digits)


def _check_depth(text: str) -> None:
    """Looks at brackets alone, before anything is parsed."""
    depth, name, last = 0, "", ""
    for match in _STRUCTURE.finditer(text):
        mark = match[0]
        if mark in "[{":
            depth += 1
            name = last if depth == 2 else name
            if depth > MAX_DEPTH:
                raise JsonError(
                    _at([name] if name else [], f"arrays and objects are nested more than {MAX_DEPTH} deep")
                )
        elif mark in "]}":
            depth -= 1
        elif depth == 1:
            last = mark[1:-1]


def _check_values(value: Any) -> None:
    for place, found in _walk(value):
        if isinstance(found, _LongNumber):
            raise JsonError(_at(place, found.reason))
        if half := _HALF_PAIR.search(found):
            raise JsonError(_at(place, f"has half of a surrogate pair ({ascii(half[0])[1:-1]}), which is no text"))


def _walk(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """All texts, keys among them, and numbers that are too long, with the keys that lead there."""
    if isinstance(value, str | _LongNumber):
        yield place, value
    elif isinstance(value, dict):
        for name, own in value.items():
            yield (*place, name), name
            yield from _walk(own, (*place, name))
    elif isinstance(value, list):
        for index, own in enumerate(value):
            yield from _walk(own, (*place, index))


def _at(place: list[str] | tuple[str | int, ...], reason: str) -> str:
    return ": ".join([".".join(map(_shown, place)), reason] if place else [reason])


def _shown(name: str | int) -> str:
    text = str(name)
    return text if text.isprintable() and len(text) <= _SHOWN_CHARACTERS else ascii(text)[:_SHOWN_CHARACTERS]
