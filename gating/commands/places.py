"""Where a command writes: seen to before any work begins, so that no hours of it end in an error. Knows no command."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ultrafuser.gating.errors import CommandError


def output_folder(folder: str | Path, setting: str) -> Path:
    """The folder, made if it is missing, in which files can be written.

    Raises:
        CommandError: it cannot be; names the setting.
    """
    path = Path(os.path.expanduser(folder))
    with _told(folder, setting):
        path.mkdir(parents=True, exist_ok=True)
        _try_to_write(path)
    return path


def check_folder(folder: str | Path, setting: str) -> None:
    """See that files can be written in a folder, now or once it is made; makes none, as other input may yet be wrong.

    Raises:
        CommandError: they cannot be; names the setting.
    """
    with _told(folder, setting):
        _try_to_write(_nearest(Path(os.path.expanduser(folder))))


def output_file(file: str | Path, setting: str) -> Path:
    """The path of a file that can be written, now or once its folder is made.

    Raises:
        CommandError: it cannot be; names the setting.
    """
    path = Path(os.path.expanduser(file))
    check_folder(path.parent, setting)
    if path.is_dir():
        raise CommandError(f"{setting}: {path} is a folder; name a file")
    return path


@contextmanager
def _told(folder: str | Path, setting: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(f"{setting}: {folder}: cannot be a folder ({error.strerror}); name another") from error


def _try_to_write(folder: Path) -> None:
    tempfile.TemporaryFile(dir=folder).close()  # a folder that is there may be read only


def _nearest(path: Path) -> Path:
    """What is there of a path: all of it, or the first parent that is."""
    while True:
        try:
            path.lstat()
        except FileNotFoundError:
            path = path.parent
        else:
            return path
