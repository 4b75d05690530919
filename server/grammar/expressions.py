"""Regular expressions as trees: what strings they match, how long these are, and their text for the grammar library.

The library drops what it does not know (a lookahead, an anchor in the middle) and lets some characters through that are
none; so expressions are read here (`expression_parser.py`) and given to it as plain characters, groups and repetitions.
"""

from dataclasses import dataclass
from functools import reduce

from ultrafuser.server.grammar.characters import ALL, NONE, Characters, both

_SEAMS = (0x7FF, 0xFFFF)
"""Last characters of two and of three bytes: the library lets overlong bytes through where a range crosses them."""


@dataclass(frozen=True)
class OneOf:
    """A single character of a set."""

    characters: Characters


@dataclass(frozen=True)
class Sequence:
    """One after the other; empty: the empty string."""

    items: tuple["Expression", ...]


@dataclass(frozen=True)
class Choice:
    """Any of them; empty: nothing matches."""

    options: tuple["Expression", ...]


@dataclass(frozen=True)
class Repetition:
    """The same again and again."""

    item: "Expression"
    low: int
    high: int | None


Expression = OneOf | Sequence | Choice | Repetition

EMPTY = Sequence(())
NOTHING = Choice(())
ANYTHING = Repetition(OneOf(ALL), 0, None)


def restricted(tree: Expression, characters: Characters) -> Expression:
    """Only the strings that are made of these characters; NOTHING if there are none."""
    match tree:
        case OneOf():
            own = both(tree.characters, characters)
            return OneOf(own) if own != NONE else NOTHING
        case Sequence():
            return sequence([restricted(item, characters) for item in tree.items])
        case Choice():
            return choice([restricted(option, characters) for option in tree.options])
        case Repetition():
            return repetition(restricted(tree.item, characters), tree.low, tree.high)


def sequence(items: list[Expression]) -> Expression:
    """One after the other."""
    if NOTHING in items:
        return NOTHING
    own = [item for item in items if item != EMPTY]
    return own[0] if len(own) == 1 else Sequence(tuple(own))


def choice(options: list[Expression]) -> Expression:
    """Any of them."""
    own = list(dict.fromkeys(option for option in options if option != NOTHING))
    return own[0] if len(own) == 1 else Choice(tuple(own))


def repetition(item: Expression, low: int, high: int | None) -> Expression:
    """Again and again."""
    if high is not None and high < low:
        return NOTHING
    if item == NOTHING:
        return NOTHING if low else EMPTY
    if item == EMPTY or high == 0:
        return EMPTY
    return item if (low, high) == (1, 1) else Repetition(item, low, high)


def lengths(tree: Expression) -> tuple[int, int | None]:
    """The shortest and the longest string, in characters; None: there is no longest."""
    match tree:
        case OneOf():
            return 1, 1
        case Sequence():
            total: tuple[int, int | None] = (0, 0)
            return reduce(_added, (lengths(item) for item in tree.items), total)
        case Choice():
            own = [lengths(option) for option in tree.options] or [(0, 0)]
            highs = [high for _, high in own]
            return min(low for low, _ in own), None if None in highs else max(high or 0 for high in highs)
        case Repetition():
            low, high = lengths(tree.item)
            most = None if tree.high is None or high is None else high * tree.high
            return low * tree.low, 0 if high == 0 else most


def of_length(tree: Expression, low: int, high: int | None) -> Expression:
    """Strings of the expression within these lengths: all of them where at most one part varies, else fewer.

    Where several parts vary, what is left over is shared out evenly among them.
    """
    shortest, longest = lengths(tree)
    if low <= shortest and (high is None or (longest is not None and longest <= high)):
        return tree
    if (high is not None and shortest > high) or (longest is not None and longest < low):
        return NOTHING
    match tree:
        case Choice():
            return choice([of_length(option, low, high) for option in tree.options])
        case Sequence():
            return _sequence_of_length(tree, low, high)
        case Repetition():
            least, most = lengths(tree.item)
            if least == most and least:
                fewest, times = max(tree.low, -(-low // least)), None if high is None else high // least
                return repetition(tree.item, fewest, _lesser(tree.high, times))
            return NOTHING
    return NOTHING


def _sequence_of_length(tree: Sequence, low: int, high: int | None) -> Expression:
    ranges = [lengths(item) for item in tree.items]
    shortest = sum(least for least, _ in ranges)
    varying = sum(least != most for least, most in ranges)
    spare = None if high is None else high - shortest
    missing = max(low - shortest, 0)
    items: list[Expression] = []
    for item, (least, most) in zip(tree.items, ranges, strict=True):
        if least == most:
            items.append(item)
            continue
        share = None if spare is None else -(-spare // varying)
        own_high = None if share is None else least + max(share, 0)
        room = _lesser(own_high, most)
        more = missing if room is None else min(missing, room - least)
        items.append(of_length(item, least + more, own_high))
        missing -= more
        spare = None if spare is None else spare - (share or 0)
        varying -= 1
    return NOTHING if missing else sequence(items)


def library_text(tree: Expression) -> str:
    """The expression in the grammar library's syntax."""
    match tree:
        case OneOf():
            return _class_text(tree.characters)
        case Sequence():
            return "(?:" + "".join(library_text(item) for item in tree.items) + ")"
        case Choice():
            return "(?:" + "|".join(library_text(option) for option in tree.options) + ")"
        case Repetition():
            count = f"{{{tree.low},{'' if tree.high is None else tree.high}}}"
            return f"(?:{library_text(tree.item)}){count}"


def matches(tree: Expression, text: str) -> bool:
    """Whether it matches the whole text."""
    return len(text) in _ends(tree, text, {0})


def _ends(tree: Expression, text: str, starts: set[int]) -> set[int]:
    """Where a match can end that begins at one of these positions."""
    match tree:
        case OneOf():
            inside = (start for start in starts if start < len(text))
            return {start + 1 for start in inside if _has(tree.characters, ord(text[start]))}
        case Sequence():
            for item in tree.items:
                starts = _ends(item, text, starts) if starts else starts
            return starts
        case Choice():
            return set[int]().union(*(_ends(option, text, starts) for option in tree.options))
        case Repetition():
            return _repeated_ends(tree, text, starts)


def _repeated_ends(tree: Repetition, text: str, starts: set[int]) -> set[int]:
    found: set[int] = set() if tree.low else set(starts)
    count = 0
    while starts and (tree.high is None or count < tree.high):
        onward, count = _ends(tree.item, text, starts), count + 1
        if count < tree.low and onward == starts:
            return onward  # as it will be each time
        if count >= tree.low and onward <= found:
            return found
        if count >= tree.low:
            found |= onward
        starts = onward
    return found


def _has(characters: Characters, number: int) -> bool:
    return any(low <= number <= high for low, high in characters)


def _class_text(characters: Characters) -> str:
    ranges = []
    for low, high in characters:
        for seam in _SEAMS:
            if low <= seam < high:
                ranges += [(low, seam - 1)] if low < seam else []
                low = seam + 1
        ranges.append((low, high))
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        character = chr(ranges[0][0])
        return character if character.isascii() and character.isalnum() else _escaped(ord(character))
    return "[" + "".join(f"{_escaped(low)}-{_escaped(high)}" for low, high in ranges) + "]"


def _escaped(number: int) -> str:
    return f"\\u{{{number:x}}}"


def _added(left: tuple[int, int | None], right: tuple[int, int | None]) -> tuple[int, int | None]:
    return left[0] + right[0], None if left[1] is None or right[1] is None else left[1] + right[1]


def _lesser(left: int | None, right: int | None) -> int | None:
    return left if right is None else right if left is None else min(left, right)
