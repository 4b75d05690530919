"""Strings: patterns and lengths as one expression."""

from ultrafuser.server.grammar.alternatives import Text
from ultrafuser.server.grammar.characters import JSON_CHARACTERS, single, without
from ultrafuser.server.grammar.errors import at
from ultrafuser.server.grammar.expression_parser import parse_search
from ultrafuser.server.grammar.expressions import (
    ANYTHING,
    EMPTY,
    NOTHING,
    Expression,
    OneOf,
    choice,
    of_length,
    restricted,
    sequence,
)

_MAX_SPELLED = 100


def text_expression(text: Text) -> Expression | None:
    """What the string may be, in characters that JSON does not escape; None: whatever it likes.

    Raises:
        ConstraintError: several patterns, which cannot be kept together.
    """
    patterns = dict.fromkeys(pattern for pattern, _ in sorted(text.patterns))
    if len(patterns) > 1:
        places = sorted(place for _, place in text.patterns)
        raise at(places[-1], f"cannot be kept together with {places[0]}; write one pattern")
    if not patterns and not text.low and text.high is None:
        return None
    tree = parse_search(*patterns) if patterns else ANYTHING
    return of_length(restricted(tree, JSON_CHARACTERS), text.low, text.high)


def other_than(names: list[str]) -> Expression:
    """Every string without escapes that is none of these names; if one of them is long, only shorter strings."""
    shorter = [name for name in names if len(name) < _MAX_SPELLED]
    tree = _other(shorter)
    return tree if len(shorter) == len(names) else of_length(tree, 0, _MAX_SPELLED - 1)


def _other(names: list[str]) -> Expression:
    if not names:
        return restricted(ANYTHING, JSON_CHARACTERS)
    further: dict[str, list[str]] = {}
    for name in names:
        if name:
            further.setdefault(name[0], []).append(name[1:])
    others = JSON_CHARACTERS
    for character in further:
        others = without(others, single(character))
    options = [NOTHING if "" in names else EMPTY, sequence([OneOf(others), restricted(ANYTHING, JSON_CHARACTERS)])]
    options += [
        sequence([restricted(OneOf(single(first)), JSON_CHARACTERS), _other(rest)]) for first, rest in further.items()
    ]
    return choice(options)
