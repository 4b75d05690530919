"""The syntax of regular expressions: what ECMAScript and Python read alike; what they do not, or the grammar library
cannot keep, is refused with its position.

`\\d`, `\\w` and `\\s` are taken for what both understand by them, so that no answer is refused by either.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from string import hexdigits
from sys import maxunicode

from ultrafuser.server.grammar import characters as sets
from ultrafuser.server.grammar.characters import Characters
from ultrafuser.server.grammar.errors import ConstraintError
from ultrafuser.server.grammar.expressions import (
    ANYTHING,
    EMPTY,
    Choice,
    Expression,
    OneOf,
    Repetition,
    Sequence,
    choice,
    repetition,
    restricted,
    sequence,
)

MAX_REPEAT = 100_000
"""Largest bound of a repetition; the library would have to write each of them down."""

_MAX_DEPTH = 100

_MAX_SPELT = 20
"""Characters within which the bounds of a repetition end, or the digits of an escape."""

_CONTROLS = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v"}
_SYNTAX = frozenset("^$\\.*+?()[]{}|/-")
_REFUSED_ESCAPES = {
    "b": "a word boundary",
    "B": "a word boundary",
    "p": "a Unicode property",
    "P": "a Unicode property",
}
_REFUSED_GROUPS = {"?=": "lookahead", "?!": "lookahead", "?<=": "lookbehind", "?<!": "lookbehind"}
_CLASSES: dict[str, tuple[Characters, Callable[[], Characters]]] = {
    "d": (sets.DIGITS, sets.every_digit),
    "w": (sets.WORD, sets.every_word),
    "s": (sets.SPACES, sets.every_space),
}


@dataclass(frozen=True)
class _Anchor(Sequence):
    """`^` or `$`, until it is known to stand at an edge."""

    sign: str = ""


_START, _END = _Anchor((), "^"), _Anchor((), "$")


@lru_cache(1024)
def parse_whole(text: str) -> Expression:
    """The strings that an expression matches from their start to their end; anchors there say nothing new.

    Raises:
        ConstraintError: with the position of what is wrong or not kept.
    """
    return restricted(_anchored(_Parser(text).parse(), EMPTY), sets.ALL)


@lru_cache(1024)
def parse_search(text: str) -> Expression:
    """The strings in which an expression is found, as a schema's `pattern` means it; raises as above."""
    return restricted(_anchored(_Parser(text).parse(), ANYTHING), sets.ALL)


def _anchored(tree: Expression, around: Expression) -> Expression:
    if isinstance(tree, Choice):
        return choice([_anchored(option, around) for option in tree.options])
    items = list(tree.items) if isinstance(tree, Sequence) and not isinstance(tree, _Anchor) else [tree]
    if len(items) == 1 and isinstance(items[0], Choice):
        return _anchored(items[0], around)
    is_started, is_ended = items[:1] == [_START], items[-1:] == [_END]
    inner = items[is_started : len(items) - is_ended]
    for item in inner:
        _refuse_anchors(item)
    if not inner and not is_started:
        return around
    return sequence([*([] if is_started else [around]), *inner, *([] if is_ended else [around])])


def _refuse_anchors(tree: Expression) -> None:
    match tree:
        case _Anchor():
            raise ConstraintError(f"{tree.sign} is kept at the expression's edges only")
        case Sequence():
            children = tree.items
        case Choice():
            children = tree.options
        case Repetition():
            children = (tree.item,)
        case OneOf():
            return
    for child in children:
        _refuse_anchors(child)


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._position, self._depth = text, 0, 0

    def parse(self) -> Expression:
        tree = self._choice()
        if self._position < len(self._text):
            raise self._wrong("unmatched )")
        return tree

    def _choice(self) -> Expression:
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        return choice(options) if len(options) > 1 else options[0]

    def _sequence(self) -> Expression:
        items: list[Expression] = []
        while self._position < len(self._text) and self._peek() not in "|)":
            items.append(self._repeated())
        return items[0] if len(items) == 1 and not isinstance(items[0], _Anchor) else Sequence(tuple(items))

    def _repeated(self) -> Expression:
        start = self._position
        item = self._atom()
        bounds = self._bounds()
        if bounds is None:
            return item
        if isinstance(item, _Anchor):
            raise self._wrong("nothing to repeat", start)
        self._take("?")  # lazy: the same strings
        if self._peek() in ("*", "+", "?") or self._counts():
            raise self._wrong("a repetition of a repetition; use a group")
        low, high = bounds
        if high is not None and high < low:
            raise self._wrong("a repetition whose bounds are swapped", start)
        return repetition(item, low, high)

    def _bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return bounds
        counts = self._counts()
        if counts is None:
            return None
        self._position += len(counts) + 2
        low, comma, high = counts.partition(",")
        if max(int(low), int(high or 0)) > MAX_REPEAT:
            raise self._wrong(f"a repetition of more than {MAX_REPEAT} times")
        return int(low), (int(high) if high else None) if comma else int(low)

    def _counts(self) -> str | None:
        """What stands in the braces of a repetition that begins here."""
        if self._peek() != "{":
            return None
        counts = self._text[self._position + 1 : self._position + 1 + _MAX_SPELT].partition("}")[0]
        low, _, high = counts.partition(",")
        is_one = _is_number(low) and (not high or _is_number(high)) and len(counts) < _MAX_SPELT
        return counts if is_one and self._text[self._position + 1 + len(counts) :][:1] == "}" else None

    def _atom(self) -> Expression:
        character = self._next()
        if character == "(":
            return self._group()
        if character == "[":
            return OneOf(self._class())
        if character == "\\":
            return OneOf(self._escape()[0])
        if character == ".":
            return OneOf(sets.without(sets.ALL, sets.LINE_ENDS))
        if character in "^$":
            return _START if character == "^" else _END
        if character in "*+?{}]":
            reason = "nothing to repeat" if character in "*+?" else f"a lone {character}; write \\{character}"
            raise self._wrong(reason, self._position - 1)
        return OneOf(sets.single(character))

    def _group(self) -> Expression:
        start = self._position - 1
        for mark, name in sorted(_REFUSED_GROUPS.items(), reverse=True):
            if self._text.startswith(mark, self._position):
                raise self._wrong(f"{name} cannot be kept", start)
        if self._take("?") and not self._take(":"):
            name, end, _ = self._text[self._position :].partition(">")
            if not (name[:1] == "<" and name[1:].isidentifier() and end):
                raise self._wrong("a flag or group that is not supported", start)
            self._position += len(name) + 1
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._wrong(f"groups nest more than {_MAX_DEPTH} deep", start)
        tree = self._choice()
        self._depth -= 1
        if not self._take(")"):
            raise self._wrong("a group that is not closed", start)
        return tree

    def _class(self) -> Characters:
        start = self._position - 1
        is_negated = self._take("^")
        narrow: list[Characters] = []
        wide: list[Characters] = []
        if self._peek() == "]":
            raise self._wrong("an empty class", start)
        while not self._take("]"):
            if self._position >= len(self._text):
                raise self._wrong("a class that is not closed", start)
            own, widest = self._class_item()
            narrow.append(own)
            wide.append(widest)
        return sets.without(sets.ALL, sets.either(wide)) if is_negated else sets.either(narrow)

    def _class_item(self) -> tuple[Characters, Characters]:
        start = self._position
        low, widest = self._class_atom()
        if not (self._peek() == "-" and self._text[self._position + 1 :][:1] not in ("]", "")):
            return low, widest
        self._position += 1
        high, _ = self._class_atom()
        if not (_is_single(low) and _is_single(high)):
            raise self._wrong("a range between classes; write the - first", start)
        if low[0][0] > high[0][0]:
            raise self._wrong("a range whose ends are swapped", start)
        between = sets.of((low[0][0], high[0][0]))
        return between, between

    def _class_atom(self) -> tuple[Characters, Characters]:
        character = self._next()
        if character == "\\":
            return self._escape()
        if character == "[" and self._peek() in (":", ".", "="):
            raise self._wrong("a class of POSIX", self._position - 1)
        return sets.single(character), sets.single(character)

    def _escape(self) -> tuple[Characters, Characters]:
        """What an escape surely matches, and what it matches in any reading."""
        start = self._position - 1
        character = self._next()
        if character.lower() in _CLASSES:
            narrow, wide = _CLASSES[character.lower()]
            if character.islower():
                return narrow, wide()
            return sets.without(sets.ALL, wide()), sets.without(sets.ALL, narrow)
        if character in _REFUSED_ESCAPES:
            raise self._wrong(f"{_REFUSED_ESCAPES[character]} cannot be kept", start)
        if character in "xu":
            return (sets.single(self._hexadecimal(character, start)),) * 2
        if character.isdigit() and character != "0":
            raise self._wrong("a reference to a group cannot be kept", start)
        plain = _CONTROLS.get(character, "\0" if character == "0" else character)
        if plain == character and character not in _SYNTAX and (character.isalnum() or character == "_"):
            raise self._wrong(f"the escape \\{character} is unknown", start)
        return (sets.single(plain),) * 2

    def _hexadecimal(self, character: str, start: int) -> str:
        rest = self._text[self._position : self._position + _MAX_SPELT]  # all of it would be copied for each
        if character == "u" and rest.startswith("{"):
            digits, end, _ = rest[1:].partition("}")
            self._position += len(digits) + 2
        else:
            digits, end = rest[: 2 if character == "x" else 4], "}"
            self._position += len(digits)
            end = end if len(digits) == (2 if character == "x" else 4) else ""
        if not end or not 0 < len(digits) <= 6 or not set(digits) <= set(hexdigits) or int(digits, 16) > maxunicode:
            raise self._wrong(f"\\{character} without its hexadecimal digits", start)
        return chr(int(digits, 16))

    def _next(self) -> str:
        if self._position >= len(self._text):
            raise self._wrong("it ends in a lone \\" if self._text else "it is empty")
        self._position += 1
        return self._text[self._position - 1]

    def _peek(self) -> str:
        return self._text[self._position : self._position + 1]

    def _take(self, sign: str) -> bool:
        is_there = self._peek() == sign
        self._position += is_there
        return is_there

    def _wrong(self, reason: str, position: int | None = None) -> ConstraintError:
        where = self._position if position is None else position
        return ConstraintError(f"{reason} (position {where + 1} of the expression)")


def _is_single(characters: Characters) -> bool:
    return len(characters) == 1 and characters[0][0] == characters[0][1]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
