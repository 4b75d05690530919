"""Which of many texts say the same: equal ones, and near ones by MinHash, checked by their true similarity.

Texts are compared as sets of five characters in a row, lower case, without marks; two are near when their sets' Jaccard
similarity is at least the threshold. Knows texts and ids.
"""

import hashlib
import re
from collections.abc import Callable, Iterable

EXACT, NEAR = "duplicate", "near_duplicate"
NUM_PERMUTATIONS = 128
SHINGLE = 5

_LARGEST_INDEXED = 0.9
_MARKS = re.compile(r"[\W_]+")


def normalised(text: str) -> str:
    """Lower case words with one space between them."""
    return _MARKS.sub(" ", text.lower()).strip()


def find_duplicates(texts: Iterable[tuple[str, str]], threshold: float, tick: Callable[[], object]) -> dict[str, str]:
    """The ids to be dropped, each with the reason; of those alike, the first one stays.

    Args:
        texts: ids and texts, in the order of preference.
        threshold: Jaccard similarity from 0 to 1, from which on texts are near.
        tick: called for every text.
    """
    from datasketch import MinHash, MinHashLSH

    # Only candidates: what it finds is compared. Above this threshold it has no two bands to look in.
    index = MinHashLSH(threshold=min(threshold, _LARGEST_INDEXED), num_perm=NUM_PERMUTATIONS)
    blank = MinHash(num_perm=NUM_PERMUTATIONS)
    seen: set[bytes] = set()
    kept: dict[str, str] = {}
    dropped: dict[str, str] = {}
    for identity, text in texts:
        tick()
        plain = normalised(text)
        digest = hashlib.sha256(plain.encode()).digest()
        if digest in seen:
            dropped[identity] = EXACT
            continue
        seen.add(digest)
        shingles = _shingles(plain)
        sketch = blank.copy()
        sketch.update_batch([shingle.encode() for shingle in shingles])
        if any(_similarity(shingles, _shingles(kept[other])) >= threshold for other in index.query(sketch)):
            dropped[identity] = NEAR
            continue
        index.insert(identity, sketch, check_duplication=False)
        kept[identity] = plain
    return dropped


def _shingles(plain: str) -> set[str]:
    return {plain[begin : begin + SHINGLE] for begin in range(max(1, len(plain) - SHINGLE + 1))}


def _similarity(first: set[str], second: set[str]) -> float:
    return len(first & second) / len(first | second)
