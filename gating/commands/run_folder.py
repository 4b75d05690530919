"""The folder of a run that may be stopped and started again: who writes to it, with what settings, line by line.

Knows files, and nothing of what is in them.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ultrafuser.gating.commands.places import output_folder
from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.files import read_json, write_json

SETTINGS_FILE = "settings.json"
"""What a run that goes on must have in common with the one before."""

MANIFEST_FILE = "manifest.json"
"""Where a training run's result comes from, with its log."""

RUN_FOLDER = "run"
"""A training run's settings, checkpoints and TensorBoard log, in its output folder."""

CONFIG_FILE = "config.yaml"
"""A training run's settings, in its run folder, as `--config` takes them."""


@contextmanager
def sole_run(output: Path) -> Iterator[None]:
    """Keep other runs out of a folder.

    Raises:
        CommandError: one is in it, or it cannot be written to.
    """
    output_folder(output, "output")
    try:
        lock = FileLock(output / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise CommandError(f"output: another run writes to {output}; wait for it, or name another folder") from error
    with lock:
        yield


def keep_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note the settings of a folder's content, or hold them against those that are noted there.

    Raises:
        CommandError: the folder is of a run with other settings; names the first that differs.
    """
    path = folder / SETTINGS_FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        return
    before = read_json(path, "name another output folder")
    for name in sorted(before.keys() | settings.keys()):
        if before.get(name) != settings.get(name):
            raise CommandError(
                f"output: {folder} was made with {name} {before.get(name)!r:.200}, now it is"
                f" {settings.get(name)!r:.200}; name another folder, or give what it had"
            )


def append_line(file: int, text: str) -> int:
    """Add a line to an open file (by its descriptor); returns its bytes. It outlives this process from then on."""
    line = f"{text}\n".encode()
    rest = line
    while rest:  # all at once, but for a full disk or a signal
        rest = rest[os.write(file, rest) :]
    return len(line)


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file; a last line without its end was being written when a run was killed, and is cut off."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return whole.splitlines()
