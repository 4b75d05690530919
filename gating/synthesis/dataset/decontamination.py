"""Which texts share a run of 13 words with a test set (paper: "UltraChat 2"), and where.

Words are letters and digits, lower case. A text of a test set that has 6 to 12 words counts as one run; shorter ones
say too little. Knows files of JSON lines, whatever their fields are called; does not know benchmarks.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultrafuser.gating.errors import DataError
from ultrafuser.gating.files import input_file, read_json_lines, split_name

RUN = 13
LEAST = 6
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class TestSet:
    """One test set in a file."""

    __test__ = False  # no class of pytest's

    name: str
    """What reports call it."""

    path: Path
    """JSON lines, gzipped if the name ends in `.gz`."""

    @classmethod
    def parse(cls, argument: str) -> "TestSet":
        """`NAME=FILE`, or `FILE`, which names it.

        Raises:
            DataError: the file cannot be read.
        """
        name, path = split_name(argument)
        path = input_file(path, "give NAME=FILE with JSON lines as --test-set")
        return cls(name or path.name.partition(".")[0], path)


@dataclass(frozen=True)
class Hit:
    """A run that a text shares with a test set."""

    test_set: str

    line: int
    """Where the test set has it first, from 1."""

    run: str


class Index:
    """The runs of test sets."""

    def __init__(self, test_sets: list[TestSet]) -> None:
        """Reads the files.

        Raises:
            DataError: a line is not JSON, or a file has no text to compare with.
        """
        self._runs: dict[str, tuple[str, int]] = {}
        self._short: dict[int, dict[str, tuple[str, int]]] = {}
        for test_set in test_sets:
            before = self._size
            for line, row in read_json_lines(test_set.path):
                for text in _strings(row):
                    self._add(text, (test_set.name, line))
            if self._size == before:
                raise DataError(f"test_set: {test_set.path.name}: has no text of {LEAST} words; give another file")

    def find(self, text: str) -> Hit | None:
        """The first run of a text that is in a test set."""
        found = words(text)
        sizes = [(RUN, self._runs), *self._short.items()]
        for size, runs in sizes:
            for begin in range(len(found) - size + 1):
                run = " ".join(found[begin : begin + size])
                if run in runs:
                    return Hit(*runs[run], run)
        return None

    @property
    def _size(self) -> int:
        return len(self._runs) + sum(map(len, self._short.values()))

    def _add(self, text: str, place: tuple[str, int]) -> None:
        found = words(text)
        if LEAST <= len(found) < RUN:
            self._short.setdefault(len(found), {}).setdefault(" ".join(found), place)
        for begin in range(len(found) - RUN + 1):
            self._runs.setdefault(" ".join(found[begin : begin + RUN]), place)


def words(text: str) -> list[str]:
    """What runs are made of."""
    return _WORD.findall(text.lower())


def _strings(value: Any) -> Iterator[str]:
    """All texts in a row, also those that are keys, as answers may be."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, own in value.items():
            yield name
            yield from _strings(own)
    elif isinstance(value, list):
        for own in value:
            yield from _strings(own)
