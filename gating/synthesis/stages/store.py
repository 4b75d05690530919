"""What a run has made, on disk: for every stage a folder of JSON lines in shards, and a manifest of all.

One process writes (`run_folder.sole_run`). A line is written whole as soon as its call ends, so a process that is
killed loses the calls in flight and no other; lines reach the disk itself within a second, and when a run ends. A last
line without its end is cut off. An id is there once. Knows files and records, not what they are for.
"""

import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import ValidationError

from ultrafuser.gating.commands.run_folder import append_line, whole_lines
from ultrafuser.gating.errors import StoreError
from ultrafuser.gating.files import file_digest, read_json, write_json
from ultrafuser.gating.synthesis.stages.records import Miss, Record

MANIFEST_FILE = "manifest.json"
MISSES_FILE = "misses.jsonl"
SHARD_LINES = 10_000
SYNC_SECONDS = 1.0

Line = TypeVar("Line", Record, Miss)


class Store:
    """Records of all stages and misses, by id. A context manager."""

    def __init__(self, folder: Path, *, shard_lines: int = SHARD_LINES) -> None:
        """
        Raises:
            StoreError: a line is no record, an id is there twice, or a closed shard is not what it was.
        """
        self._folder = folder
        self._shard_lines = shard_lines
        self._closed: dict[str, dict[str, Any]] = self._read_manifest()
        self._ids: dict[str, set[str]] = {}
        self._misses: dict[str, Miss] = {}
        self._num_rejections: Counter[str] = Counter()
        self._open: dict[str, _Shard] = {}
        self._tokens: Counter[str] = Counter()
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*/?????.jsonl")):
            self._check_closed(path)
            self._add_ids(path)
        for name in self._closed:
            if not (folder / name).exists():
                raise StoreError(f"{folder / name}: is gone; put it back, or name another folder")
        for number, line in enumerate(whole_lines(folder / MISSES_FILE), start=1):
            self._note(_parse(Miss, folder / MISSES_FILE, number, line))
        self._misses_file = os.open(folder / MISSES_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        # A busy disk may take a second to sync; calls do not wait for it.
        self._files_lock = threading.Lock()
        self._is_closing = threading.Event()
        self._syncing = threading.Thread(target=self._sync_regularly, daemon=True)
        self._syncing.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._is_closing.set()
        self._syncing.join()
        self._sync()
        self._write_manifest()
        for shard in self._open.values():
            os.close(shard.file)
        os.close(self._misses_file)

    def ids(self, stage: str) -> set[str]:
        """Ids of a stage's records."""
        return self._ids.setdefault(stage, set())

    def miss(self, identity: str) -> Miss | None:
        """The last miss of a call that is not made yet."""
        return self._misses.get(identity)

    def num_rejections(self, identity: str) -> int:
        """How many answers to a call were rejected."""
        return self._num_rejections[identity]

    @property
    def misses(self) -> tuple[Miss, ...]:
        """The last miss of every call that is not made yet."""
        return tuple(self._misses.values())

    @property
    def tokens(self) -> tuple[int, int]:
        """Of prompts and completions, of all calls that ended."""
        return self._tokens["prompt"], self._tokens["completion"]

    def records(self, stage: str) -> Iterator[Record]:
        """A stage's records in the order in which they came, read from disk; not while it is written."""
        for path in sorted((self._folder / stage).glob("?????.jsonl")):
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    yield _parse(Record, path, number, line)

    def append(self, record: Record) -> None:
        """Keep a record; from then on it survives the end of this process."""
        ids = self.ids(record.stage)
        assert record.id not in ids, f"made twice: {record.id}"
        shard = self._shard(record.stage)
        append_line(shard.file, record.model_dump_json(exclude_defaults=True))
        shard.lines += 1
        ids.add(record.id)
        self._misses.pop(record.id, None)
        self._tokens += Counter(prompt=record.prompt_tokens, completion=record.completion_tokens)

    def append_miss(self, miss: Miss) -> None:
        append_line(self._misses_file, miss.model_dump_json())
        self._note(miss)

    def _sync_regularly(self) -> None:
        while not self._is_closing.wait(SYNC_SECONDS):
            self._sync()

    def _sync(self) -> None:
        """Wait until all lines are on the disk."""
        with self._files_lock:
            for file in [self._misses_file, *(shard.file for shard in list(self._open.values()))]:
                os.fsync(file)

    def _shard(self, stage: str) -> "_Shard":
        """The shard that takes the stage's next line; a full one is closed for good."""
        shard = self._open.get(stage) or _Shard.last_of(self._folder / stage)
        if shard.lines >= self._shard_lines:
            with self._files_lock:
                os.fsync(shard.file)
                os.close(shard.file)
                self._open.pop(stage, None)
            name = shard.path.relative_to(self._folder).as_posix()
            self._closed[name] = {"lines": shard.lines, "sha256": file_digest(shard.path)}
            self._write_manifest()
            shard = _Shard(shard.path.with_name(f"{int(shard.path.stem) + 1:05}.jsonl"))
        self._open[stage] = shard
        return shard

    def _add_ids(self, path: Path) -> None:
        ids = self.ids(path.parent.name)
        for number, line in enumerate(whole_lines(path), start=1):
            record = _parse(Record, path, number, line)
            if record.id in ids:
                raise StoreError(f"{path}:{number}: {record.id} is there twice; delete one of the lines")
            ids.add(record.id)
            self._tokens += Counter(prompt=record.prompt_tokens, completion=record.completion_tokens)

    def _note(self, miss: Miss) -> None:
        self._tokens += Counter(prompt=miss.prompt_tokens, completion=miss.completion_tokens)
        self._num_rejections[miss.id] += miss.is_final
        if miss.id not in self.ids(miss.stage):
            self._misses[miss.id] = miss

    def _read_manifest(self) -> dict[str, dict[str, Any]]:
        path, way_out = self._folder / MANIFEST_FILE, "put the original back, or name another folder"
        if not path.exists():
            return {}
        closed = read_json(path, way_out).get("closed")
        if not isinstance(closed, dict) or not all(isinstance(own, dict) for own in closed.values()):
            raise StoreError(f"{path}: closed: missing, or another form; {way_out}")
        return closed

    def _check_closed(self, path: Path) -> None:
        known: Mapping[str, Any] | None = self._closed.get(path.relative_to(self._folder).as_posix())
        if known is not None and file_digest(path) != known.get("sha256"):
            raise StoreError(f"{path}: was changed after it was closed; put the original back")

    def _write_manifest(self) -> None:
        stages = {stage: len(ids) for stage, ids in self._ids.items()}
        prompt, completion = self.tokens
        tokens = {"prompt_tokens": prompt, "completion_tokens": completion}
        write_json(self._folder / MANIFEST_FILE, {"records": stages, **tokens, "closed": self._closed})


class _Shard:
    """A file that is written to."""

    def __init__(self, path: Path, lines: int = 0) -> None:
        path.parent.mkdir(exist_ok=True)
        self.path = path
        self.lines = lines
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    @classmethod
    def last_of(cls, folder: Path) -> "_Shard":
        last = max(folder.glob("?????.jsonl"), default=None)
        return cls(last, len(whole_lines(last))) if last else cls(folder / "00000.jsonl")


def _parse(kind: type[Line], path: Path, number: int, line: bytes) -> Line:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        field = "".join(f"{part}: " for part in (".".join(map(str, first["loc"])),) if part)
        raise StoreError(f"{path}:{number}: {field}{first['msg']}; delete the line to make it again") from error
