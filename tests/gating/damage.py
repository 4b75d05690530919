"""Rows as they arrive from the field: cut, bent and broken in every way that a seed can draw."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1.5, 10**40, 10**400, 1e308, float("nan"), float("-inf"), "", " ", "\x00",
    "\ud83d", "a\udc00b", "\u2028", "a\nb", "mean", "1e999", "1e-99", "1/0", "9" * 5000, "x" * 3000, [], [[]], {},
    {"": None}, {"\udfff": 1}, [None], ["\ud800"], {"role": "user"},
)  # fmt: skip
"""What a field may hold instead of what is asked for."""

MARK = "\ue123"
TEXTS = (
    "7" * 5000,
    "[" * 100_000,
    '{"a":' * 1000,
    '"\\ud83d"',
    '"\\udc00\\ud83d"',
    "NaN",
    "-Infinity",
    "1e999",
    "\x00",
    "}",
    "",
)
"""What may stand in a line where a value was."""


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Keys that lead to every value within a value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, own in pairs:
        yield (*place, key)
        yield from places(own, (*place, key))


def bent(row: Any, random: Random) -> Any:
    """The row with one value replaced, left out, added or doubled."""
    row = json.loads(json.dumps(row))
    *path, last = random.choice(list(places(row)))
    holder = row
    for key in path:
        holder = holder[key]
    kind = random.randrange(4)
    if kind == 0:
        del holder[last]
    elif kind == 1 and isinstance(holder, dict):
        holder[random.choice(["\ud83d", "x", "domain", "tools"])] = random.choice(VALUES)
    elif kind == 2 and isinstance(holder, list):
        holder.insert(last, random.choice(VALUES))
    else:
        holder[last] = random.choice(VALUES)
    return row


def broken(row: Any, random: Random) -> bytes:
    """The row's line with something in it that no encoder would write."""
    row = json.loads(json.dumps(row))
    *path, last = random.choice(list(places(row)))
    holder = row
    for key in path:
        holder = holder[key]
    holder[last] = MARK
    return json.dumps(row).replace(json.dumps(MARK), random.choice(TEXTS)).encode()


def damaged(content: bytes, random: Random) -> bytes:
    """Bytes of which some are changed, lost, added, or missing at the end."""
    spot, kind = random.randrange(len(content)), random.randrange(4)
    noise = bytes(random.randrange(256) for _ in range(random.choice([1, 1, 8])))
    if kind == 0:
        return content[:spot]
    end = spot if kind == 1 else spot + len(noise)
    return content[:spot] + (b"" if kind == 2 else noise) + content[end:]


def write_damaged(path: Path, rows: list[Any], random: Random) -> Path:
    """A file of rows, one of which is not as it was; gzipped ones may be damaged as a whole."""
    lines = [json.dumps(row).encode() for row in rows]
    spot, kind = random.randrange(len(rows)), random.randrange(4)
    if kind == 0:
        lines[spot] = broken(rows[spot], random)
    elif kind == 1:
        lines[spot] = damaged(lines[spot], random)
    elif kind == 2:
        lines[spot] = json.dumps(bent(rows[spot], random), ensure_ascii=random.random() < 0.8).encode(
            errors="surrogatepass"
        )
    content = b"\n".join(lines) + b"\n" * random.randrange(2)
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    path.write_bytes(damaged(content, random) if kind == 3 else content)
    return path
