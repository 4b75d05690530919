"""Strings: patterns and lengths as one expression."""

from ultrafuser.server.grammar.alternatives import Text, least
from ultrafuser.server.grammar.characters import JSON_CHARACTERS, either, single, without
from ultrafuser.server.grammar.errors import at
from ultrafuser.server.grammar.expression_parser import MAX_REPEAT, parse_search
from ultrafuser.server.grammar.expressions import (
    ANYTHING,
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
    return of_length(restricted(tree, JSON_CHARACTERS), text.low, least(text.high, MAX_REPEAT))


def other_than(names: list[str]) -> Expression:
    """Every string without escapes that is none of these names; if one of them is long, only shorter strings."""
    shorter = [name for name in names if len(name) < _MAX_SPELLED]
    tree = _other(shorter)
    return tree if len(shorter) == len(names) else of_length(tree, 0, _MAX_SPELLED - 1)


def _other(names: list[str]) -> Expression:
    """A choice among what they begin with and how it goes on otherwise: groups within groups may not nest deeply."""
    whole = set(names)
    further: dict[str, set[str]] = {"": set()}
    for name in names:
        for number, character in enumerate(name):
            further.setdefault(name[:number], set()).add(character)
            further.setdefault(name[: number + 1], set())
    options: list[Expression] = []
    for start, characters in further.items():
        spelled = [restricted(OneOf(single(character)), JSON_CHARACTERS) for character in start]
        others = without(JSON_CHARACTERS, either([single(character) for character in characters]))
        options.append(NOTHING if start in whole else sequence(spelled))
        options.append(sequence([*spelled, OneOf(others), restricted(ANYTHING, JSON_CHARACTERS)]))
    return choice(options)
