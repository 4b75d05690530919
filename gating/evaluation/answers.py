"""The folder of a run: its settings, and every answer as a line of a file, written when it comes.

A second run finds what the first one left, whenever that ended. Knows files, not servers or scores.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from gating.evaluation.items import Answer, BenchmarkError, Item, Request
from gating.provenance import write_json

SETTINGS_FILE = "settings.json"
ANSWERS_FILE = "answers.jsonl"


@contextmanager
def sole_run(output: Path) -> Iterator[None]:
    """Keep other runs out of a folder.

    Raises:
        BenchmarkError: one is in it.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BenchmarkError(f"output: another run writes to {output}; wait for it, or name another folder") from error
    try:
        yield
    finally:
        lock.release()


def keep_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note the settings of a folder's answers, or hold them against those that are noted there.

    Raises:
        BenchmarkError: the folder is of a run with other settings; names the first that differs.
    """
    path = folder / SETTINGS_FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BenchmarkError(f"{path}: not JSON ({error}); name another output folder") from error
    for name in sorted(before.keys() | settings.keys()):
        if before.get(name) != settings.get(name):
            raise BenchmarkError(
                f"output: {folder} holds answers with {name} {before.get(name)!r}, now it is {settings.get(name)!r};"
                " name another folder, or give what it had"
            )


class AnswersFile:
    """The answers of one benchmark, on disk and in memory. A context manager."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a last line without its end was being written when a run was killed, and is cut off.

        Raises:
            BenchmarkError: a line is no answer.
        """
        self._answers = {answer.id: answer for answer in _read_whole_lines(path)}
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)

    def append(self, answer: Answer) -> None:
        """Keep an answer; it is in the file when this returns."""
        line = f"{json.dumps(asdict(answer), ensure_ascii=False)}\n".encode()
        while line:  # all at once, but for a full disk or a signal
            line = line[os.write(self._file, line) :]
        self._answers[answer.id] = answer

    def missing(self, requests: Sequence[Request]) -> list[Request]:
        """Those to be asked: without an answer, or failed in a way that may not happen again."""
        return [request for request in requests if not (answer := self._answers.get(request.id)) or not answer.is_final]

    def of(self, item: Item) -> list[Answer]:
        """The answers to an item's requests, in their order; all must have been asked."""
        return [self._answers[request.id] for request in item.requests]


def _read_whole_lines(path: Path) -> list[Answer]:
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return [_parse(path, number, line) for number, line in enumerate(whole.splitlines(), start=1)]


def _parse(path: Path, number: int, line: bytes) -> Answer:
    try:
        content = json.loads(line)
        for name in ("texts", "finish_reasons"):
            content[name] = tuple(content[name])
        if content["top_logprobs"] is not None:
            content["top_logprobs"] = tuple((token, logprob) for token, logprob in content["top_logprobs"])
        return Answer(**content)
    except (ValueError, LookupError, TypeError) as error:
        raise BenchmarkError(f"{path}:{number}: not an answer ({error}); delete the line to ask again") from error
