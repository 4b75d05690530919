"""Where a command writes: seen to before any work begins, so that no hours of it end in an error. Knows no command."""

import os
import tempfile
from pathlib import Path

from ultrafuser.gating.errors import CommandError


def output_folder(folder: str | Path, setting: str) -> Path:
    """The folder, made if it is missing, in which files can be written.

    Raises:
        CommandError: it cannot be; names the setting.
    """
    path = Path(os.path.expanduser(folder))
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # a folder that is there may be read only
    except OSError as error:
        raise CommandError(f"{setting}: {folder}: cannot be a folder ({error.strerror}); name another") from error
    return path


def output_file(file: str | Path, setting: str) -> Path:
    """The path of a file that can be written, its folder made if it is missing.

    Raises:
        CommandError: it cannot be; names the setting.
    """
    path = Path(os.path.expanduser(file))
    output_folder(path.parent, setting)
    if path.is_dir():
        raise CommandError(f"{setting}: {path} is a folder; name a file")
    return path
