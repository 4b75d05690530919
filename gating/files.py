"""Files and folders: written whole or not at all, told apart by their content, read line by line.

The only reader of files of JSON, and of what users name as a file: whatever is wrong with one is an error with its name
and row. Knows nothing of what is in them.
"""

import gzip
import hashlib
import io
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ultrafuser.gating.errors import CommandError, DataError
from ultrafuser.gating.json_text import JsonError, parse_json

MAX_HASHED_BYTES = 64 * 1024**2
"""Larger files are not read as a whole to tell their content apart."""

_NUM_PIECES, _PIECE_BYTES = 1024, 16 * 1024


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
    """Write a file of one JSON value a line as `write_file` does; gzipped if its name ends in `.gz`, as it is read."""
    content = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()
    write_file(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


@contextmanager
def new_lines(path: Path) -> Iterator[io.BufferedIOBase]:
    """A file that is there whole or not at all, to be written line by line; gzipped if its name ends in `.gz`, without
    name and time in it: equal lines are equal bytes."""
    with replacing(path) as partial, partial.open("wb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
                yield file
        else:
            yield raw


def read_lines(path: Path) -> Iterator[tuple[int, bytes, float]]:
    """Lines with their number, from 1, and the share of the file that has been read; blank ones are left out.

    Raises:
        DataError: the file cannot be read, or is not whole gzip although its name ends in `.gz`; names the row.
    """
    number = 0
    try:
        size = max(path.stat().st_size, 1)
        with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else nullcontext(raw) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line, min(raw.tell() / size, 1.0)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path.name}:{number + 1}: not a whole gzip file ({error}); compress it again") from error
    except OSError as error:
        raise DataError(f"{path.name}:{number + 1}: cannot be read ({error.strerror}); correct the file") from error


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The JSON value of each line that is not blank, with the line's number.

    Raises:
        DataError: as `read_lines`; a line that is no usable JSON.
    """
    for number, line, _ in read_lines(path):
        try:
            yield number, parse_json(line)
        except JsonError as error:
            raise DataError(f"{path.name}:{number}: {error}; give one JSON object a line") from error


def read_json(path: Path, way_out: str) -> dict[str, Any]:
    """A file with one JSON object, as a run of ours wrote it.

    Raises:
        CommandError: it cannot be read, or is something else; ends with the way out.
    """
    try:
        content = parse_json(path.read_bytes())
        if isinstance(content, dict):
            return content
        reason = "not a JSON object"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    except JsonError as error:
        reason = str(error)
    raise CommandError(f"{path}: {reason}; {way_out}")


def input_file(argument: str | Path, way_out: str, kind: str = "file") -> Path:
    """The path of a file that can be read.

    Raises:
        DataError: it cannot; names it.
    """
    path = Path(os.path.expanduser(argument))
    if not os.path.isfile(path):  # unlike pathlib's, an answer for names that are too long, too
        reason = "is no file" if os.path.exists(path) else f"no such {kind}"
        raise DataError(f"{argument!s:.200}: {reason}; {way_out}")
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"{argument}: cannot be read ({error.strerror}); {way_out}") from error
    return path


def split_name(argument: str) -> tuple[str, Path]:
    """Name and path of `NAME=PATH`; the name is empty if the whole is a path, as it is where there is one."""
    name, equals, path = argument.partition("=")
    whole = os.path.expanduser(argument)
    is_whole = not equals or os.path.exists(whole)
    return ("", Path(whole)) if is_whole else (name, Path(os.path.expanduser(path)))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path: Path) -> str:
    """What a file's content is known by, wherever and whenever it was copied.

    SHA-256 of the whole; of a large one (weights), of its size and 1,024 pieces spread evenly over it: weights that
    learnt differ nearly everywhere, and reading all of them would take minutes.
    """
    size = path.stat().st_size
    if size <= MAX_HASHED_BYTES:
        return file_digest(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for index in range(_NUM_PIECES):
            file.seek(index * (size - _PIECE_BYTES) // (_NUM_PIECES - 1))
            digest.update(file.read(_PIECE_BYTES))
    return f"pieces:{digest.hexdigest()}"


def note_contents(folder: Path, note: Path) -> None:
    """Write down how long a folder's files are, as the last thing before it gets its name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != note)
    write_json(note, {path.relative_to(folder).as_posix(): path.stat().st_size for path in files})


def find_damage(folder: Path, note: Path) -> str | None:
    """Which file of a folder is not as long as was noted: after a full disk or a loss of power. None if all are, or if
    nothing was noted."""
    if not note.exists():
        return None
    try:
        sizes = read_json(note, "")
    except CommandError:
        return f"{note.name} is cut off"
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found:,} bytes of {size:,}"
    return None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
