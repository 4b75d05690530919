"""Which texts share a run of 13 words with a test set (paper: "UltraChat 2"), and where.

Words are letters and digits, lower case, however their accents are encoded; where a script sets no spaces between
them (Chinese, Japanese), characters. A text of a test set that has 6 to 12 words counts as one run; shorter ones say
too little. Knows files of JSON lines, whatever their fields are called; does not know benchmarks.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ultrafuser.gating.errors import DataError
from ultrafuser.gating.files import input_file, read_json_lines, split_name

RUN = 13
LEAST = 6
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003134f"  # kana and Chinese characters
_WORD = re.compile(rf"[^\W_{_UNSPACED}]+|[{_UNSPACED}]")


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
        path = input_file(path, "give JSON lines, FILE or NAME=FILE")
        return cls(name or path.name.partition(".")[0], path)


def parse_test_sets(arguments: Sequence[str], taken: Iterable[str] = ()) -> list[TestSet]:
    """Test sets, each of a name of its own; reports have a key for each, beside the names that are `taken`.

    Raises:
        DataError: a file that cannot be read, or a name that is there twice.
    """
    test_sets = [TestSet.parse(argument) for argument in arguments]
    names = [*taken, *(own.name for own in test_sets)]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{name}: is the name of two files; give each test set its own, NAME=FILE")
    return test_sets


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
        self._runs: dict[int, dict[str, tuple[str, int]]] = {}
        self._begins: set[tuple[str, str]] = set()
        for test_set in test_sets:
            num_runs = 0
            for line, row in read_json_lines(test_set.path):
                num_runs += sum(self._add(text, (test_set.name, line)) for text in _strings(row))
            if not num_runs:
                raise DataError(
                    f"{test_set.path.name}: has no text of {LEAST} words to compare with; give another file"
                )

    def find(self, text: str) -> Hit | None:
        """The first run of a text that is in a test set."""
        found = words(text)
        for begin, pair in enumerate(pairwise(found)):
            if pair not in self._begins:  # as nearly everywhere: no run has to be put together
                continue
            for size, runs in self._runs.items():
                run = " ".join(found[begin : begin + size])
                if run in runs:
                    return Hit(*runs[run], run)
        return None

    def _add(self, text: str, place: tuple[str, int]) -> int:
        """Returns how many runs a text has."""
        found = words(text)
        size = min(len(found), RUN)
        if size < LEAST:
            return 0
        runs = self._runs.setdefault(size, {})
        for begin in range(len(found) - size + 1):
            self._begins.add((found[begin], found[begin + 1]))
            runs.setdefault(" ".join(found[begin : begin + size]), place)
        return len(found) - size + 1


def words(text: str) -> list[str]:
    """What runs are made of."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


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
