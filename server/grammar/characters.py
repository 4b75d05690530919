"""Sets of characters, as sorted ranges of code points that neither overlap nor touch; surrogates are in none."""

import re
import sys
from collections.abc import Iterable
from functools import cache

Characters = tuple[tuple[int, int], ...]

ALL: Characters = ((0, 0xD7FF), (0xE000, sys.maxunicode))
NONE: Characters = ()

JSON_CHARACTERS: Characters = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, sys.maxunicode))
"""What a JSON string may hold without an escape."""


def of(*ranges: tuple[int, int]) -> Characters:
    """The set of all characters in ranges that may overlap."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return both(tuple(merged), ALL)


def single(character: str) -> Characters:
    """The set of one character."""
    return both(((ord(character), ord(character)),), ALL)


def either(sets: Iterable[Characters]) -> Characters:
    """Their union."""
    return of(*(own for characters in sets for own in characters))


def both(left: Characters, right: Characters) -> Characters:
    """Their intersection."""
    pairs = ((max(a, c), min(b, d)) for a, b in left for c, d in right if max(a, c) <= min(b, d))
    return tuple(sorted(pairs))


def without(left: Characters, right: Characters) -> Characters:
    """What is in the first and not in the second."""
    gaps = []
    start = 0
    for low, high in right:
        if start < low:
            gaps.append((start, low - 1))
        start = high + 1
    if start <= sys.maxunicode:
        gaps.append((start, sys.maxunicode))
    return both(left, tuple(gaps))


DIGITS = of((0x30, 0x39))
WORD = of((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
SPACES = of((0x09, 0x0D), (0x20, 0x20))
LINE_ENDS = of((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))


@cache
def every_digit() -> Characters:
    """What some reading of `\\d` matches: ECMAScript's are ASCII's, Python's are Unicode's."""
    return _found(r"\d+")


@cache
def every_word() -> Characters:
    """The same of `\\w`."""
    return _found(r"\w+")


@cache
def every_space() -> Characters:
    """The same of `\\s`."""
    return _found(r"[\s\ufeff]+")


def _found(expression: str) -> Characters:
    text = "".join(map(chr, range(sys.maxunicode + 1)))
    return of(*((found.start(), found.end() - 1) for found in re.finditer(expression, text)))
