"""Files and folders: written whole or not at all, told apart by their content, read line by line.

Knows nothing of what is in them.
"""

import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ultrafuser.gating.errors import DataError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside a file or folder, which takes its place at the end; after an error the target is what it was."""
    partial = target.with_name(f"{target.name}.partial")
    _remove(partial)  # of a process that was killed
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        put_in_place(partial, target)
    finally:
        _remove(partial)


def put_in_place(partial: Path, target: Path) -> None:
    """Give a whole file or folder the name of another, which is no more."""
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(partial, target)


def write_file(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, also after the machine has lost its power."""
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def json_bytes(content: object) -> bytes:
    """A JSON file's content, as all of ours are laid out."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, content: object) -> None:
    """Write a JSON file as `write_file` does."""
    write_file(path, json_bytes(content))


def write_json_lines(path: Path, rows: Iterable[object]) -> None:
    """Write a file of one JSON value a line as `write_file` does."""
    write_file(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode())


def read_lines(path: Path) -> Iterator[tuple[int, bytes, float]]:
    """Lines with their number, from 1, and the share of the file that has been read; blank ones are left out.

    Raises:
        DataError: the file is not gzip although its name ends in `.gz`.
    """
    size = max(path.stat().st_size, 1)
    with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else nullcontext(raw) as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line, min(raw.tell() / size, 1.0)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path.name}: not a whole gzip file ({error}); compress it again") from error


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The JSON value of each line that is not blank, with the line's number.

    Raises:
        DataError: not gzip, as `read_lines`; a line that is not JSON.
    """
    for number, line, _ in read_lines(path):
        try:
            yield number, json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            raise DataError(f"{path.name}:{number}: not JSON ({error}); give one JSON object a line") from error


def split_name(argument: str) -> tuple[str, Path]:
    """Name and path of `NAME=PATH`; the name is empty if the whole is a path, as it is where there is one."""
    name, equals, path = argument.partition("=")
    whole = Path(argument).expanduser()
    return ("", whole) if not equals or whole.exists() else (name, Path(path).expanduser())


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
