"""Which of many texts say the same: equal ones, and near ones by MinHash, checked by their true similarity.

Texts are compared as sets of five characters in a row, lower case, without marks; two are near when their sets' Jaccard
similarity is at least the threshold. Knows texts and ids.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

EXACT, NEAR = "duplicate", "near_duplicate"
NUM_PERMUTATIONS = 128
SHINGLE = 5

_LARGEST_INDEXED = 0.9
_MARKS = re.compile(r"[\W_]+")


def normalised(text: str) -> str:
    """Lower case words with one space between them."""
    return _MARKS.sub(" ", text.lower()).strip()


@dataclass(frozen=True)
class Repeat:
    """What makes a text a duplicate."""

    reason: str

    of: str
    """Id of the text that stays in its place."""


class Duplicates:
    """Texts that are each unlike all before them."""

    def __init__(self, threshold: float) -> None:
        """`threshold`: Jaccard similarity from 0 to 1, from which on texts are near."""
        from datasketch import MinHash, MinHashLSH

        self._threshold = threshold
        # Only candidates: what it finds is compared. Above this threshold it has no two bands to look in.
        self._index = MinHashLSH(threshold=min(threshold, _LARGEST_INDEXED), num_perm=NUM_PERMUTATIONS)
        self._blank = MinHash(num_perm=NUM_PERMUTATIONS)
        self._seen: dict[bytes, str] = {}
        self._kept: list[tuple[str, str]] = []

    def find(self, identity: str, text: str) -> Repeat | None:
        """What a text repeats; one that repeats nothing is kept, and those that follow are held against it."""
        plain = normalised(text) or text.strip()
        digest = hashlib.sha256(plain.encode()).digest()
        if digest in self._seen:
            return Repeat(EXACT, self._seen[digest])
        shingles = _shingles(plain)
        sketch = self._blank.copy()
        sketch.update_batch([shingle.encode() for shingle in shingles])
        for place in sorted(self._index.query(sketch)):
            other, other_plain = self._kept[place]
            if _similarity(shingles, _shingles(other_plain)) >= self._threshold:
                self._seen[digest] = other
                return Repeat(NEAR, other)
        self._index.insert(len(self._kept), sketch, check_duplication=False)
        self._kept.append((identity, plain))
        self._seen[digest] = identity
        return None


def find_duplicates(texts: Iterable[tuple[str, str]], threshold: float, tick: Callable[[], object]) -> dict[str, str]:
    """The ids to be dropped, each with the reason; of those alike, the first one stays.

    Args:
        texts: ids and texts, in the order of preference.
        threshold: as in `Duplicates`.
        tick: called for every text.
    """
    duplicates = Duplicates(threshold)
    dropped: dict[str, str] = {}
    for identity, text in texts:
        tick()
        if repeat := duplicates.find(identity, text):
            dropped[identity] = repeat.reason
    return dropped


def _shingles(plain: str) -> set[str]:
    return {plain[begin : begin + SHINGLE] for begin in range(max(1, len(plain) - SHINGLE + 1))}


def _similarity(first: set[str], second: set[str]) -> float:
    return len(first & second) / len(first | second)
