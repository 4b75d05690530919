"""A folder of prepared artifacts: each is built once, whole or not at all, and found again by what it is made of.

Several processes may share it. Knows files and locks only; it does not know models, and reads no environment.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ultrafuser.gating.files import MAX_HASHED_BYTES, file_digest, find_damage, note_contents, replacing

Tick = Callable[[float], None]
"""Called by a build now and then with the share of it that is done, 0 to 1."""

Report = Callable[[str, float], None]
"""Called with what is being done now and the share of it that is done, 0 to 1."""


def cache_folder(chosen: str | Path | None) -> Path:
    """The cache's folder: the one that was chosen, or ~/.cache/ultrafuser."""
    return Path(chosen or "~/.cache/ultrafuser").expanduser().absolute()


@dataclass(frozen=True)
class Artifact:
    """One folder of the cache."""

    name: str
    """First part of the folder's name, for people who look into the cache."""

    label: str
    """What building it means, for the progress display: "merging adapter x"."""

    parts: Mapping[str, object]
    """Everything the content depends on, as JSON values; equal parts name the same folder."""

    build: Callable[[Path, Tick], None]
    """Fills an empty folder."""

    @property
    def key(self) -> str:
        """Hexadecimal digest of the parts."""
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()[:16]

    def folder(self, cache_dir: Path) -> Path:
        """Where the artifact is, or will be."""
        return cache_dir / f"{self.name}-{self.key}"

    def is_built(self, cache_dir: Path) -> bool:
        """Whether it is there, and whole: a folder of its name was, but a disk may have lost what it had promised."""
        folder = self.folder(cache_dir)
        return folder.is_dir() and find_damage(folder, _note(folder)) is None


def build_once(artifact: Artifact, cache_dir: Path, report: Report) -> Path:
    """The artifact's folder, built now if it is missing. A second process waits for the first instead of building too.

    An interrupted build leaves nothing that looks complete; what has been damaged since is built anew.
    """
    folder = artifact.folder(cache_dir)
    if artifact.is_built(cache_dir):
        return folder
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock"), artifact.label, report):
        if not artifact.is_built(cache_dir):
            with replacing(folder) as partial:
                partial.mkdir()
                report(artifact.label, 0.0)
                artifact.build(partial, lambda share: report(artifact.label, share))
                note_contents(partial, _note(folder))
    return folder


def _note(folder: Path) -> Path:
    """Beside the folder, which may be a model's and is read by others."""
    return folder.with_name(f"{folder.name}.json")


def fingerprint(folder: Path) -> list[list[object]]:
    """Names and contents of a folder's files, as JSON values: [name, digest], or [name, size, time] of large ones."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [[path.relative_to(folder).as_posix(), *_identity(path)] for path in files]


def _identity(path: Path) -> list[object]:
    stat = path.stat()
    # Hashing the weights of a large model would take minutes at every start.
    return [file_digest(path)] if stat.st_size <= MAX_HASHED_BYTES else [stat.st_size, stat.st_mtime_ns]


def _locked(path: Path, label: str, report: Report) -> AbstractContextManager[object]:
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        report(f"{label} (another process is at it: waiting)", 0.0)
        return lock.acquire()
