"""Folders on disks: how much is in them, how much room is left. Knows no models."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Storage:
    """A folder that is a cache, or will be."""

    path: str
    bytes: int | None
    """What is in it; None: it is not there yet."""

    free_bytes: int
    """Room on its disk."""

    is_writable: bool


def look_at(folder: Path) -> Storage:
    """What is in a folder; of links the link counts."""
    place = _nearest(folder)
    used = sum(_size(path) for path in folder.rglob("*")) if folder.is_dir() else None
    return Storage(str(folder), used, shutil.disk_usage(place).free, os.access(place, os.W_OK | os.X_OK))


def _nearest(path: Path) -> Path:
    """The folder, or the first above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())


def _size(path: Path) -> int:
    try:
        return 0 if path.is_dir() and not path.is_symlink() else path.lstat().st_size
    except OSError:  # somebody is at work there
        return 0
