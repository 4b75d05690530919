"""What a schema allows, as a list of alternatives: each of one type of JSON, or one of some values.

Keywords say something of one type only, so that a schema is a choice among types, and schemas that must hold together
are the pairs of their alternatives. Children are not looked into: they are named by the places of all the schemas that
must hold for them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ultrafuser.server.grammar.expression_parser import parse_search
from ultrafuser.server.grammar.expressions import matches

Places = frozenset[str]
"""Places of schemas that all must hold; none: everything is allowed."""

ANY: Places = frozenset()


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """One of the alternatives."""

    is_implied: bool = False
    """Nobody wrote of this type: allowed since keywords speak of another one; left out where there is a better."""


@dataclass(frozen=True)
class Values(Alternative):
    """One of these."""

    values: Mapping[str, Any]
    """By what equal values have in common."""

    place: str


@dataclass(frozen=True)
class Bound:
    """A least or largest number."""

    value: int | float
    is_excluded: bool


@dataclass(frozen=True)
class Number(Alternative):
    """A number."""

    is_integer: bool = False
    low: Bound | None = None
    high: Bound | None = None
    multiples: frozenset[tuple[int | float, str]] = frozenset()
    """What it must be a multiple of, and where that is said."""

    place: str = ""


@dataclass(frozen=True)
class Text(Alternative):
    """A string."""

    low: int = 0
    high: int | None = None
    patterns: frozenset[tuple[str, str]] = frozenset()
    """Expressions that must be found in it, and where they stand."""

    format: str | None = None


@dataclass(frozen=True)
class Array(Alternative):
    """An array."""

    prefix: tuple[Places, ...] = ()
    rest: Places | None = None
    """For elements behind the prefix; None: nothing is said of them."""

    low: int = 0
    high: int | None = None
    contained: tuple[tuple[Places, int, str], ...] = ()
    """How many elements at least have to be such, and where that is said."""

    unique: str | None = None
    """Where it is said that elements differ."""


@dataclass(frozen=True)
class Object(Alternative):
    """An object."""

    properties: Mapping[str, Places] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    patterns: Mapping[str, Places] = field(default_factory=dict)
    additional: Places | None = None
    """For other properties; None: nothing is said of them."""

    names: Places = ANY
    is_described: bool = False
    """Whether somebody has written what properties there are, be it none."""

    low: int = 0
    high: int | None = None
    place: str = ""

    def child(self, name: str) -> Places:
        """What must hold for a property."""
        if name in self.properties:
            return self.properties[name]
        own = [places for pattern, places in self.patterns.items() if matches(parse_search(pattern), name)]
        return ANY.union(*own) if own else self.additional or ANY


def together(left: Alternative, right: Alternative) -> Alternative | None:
    """What both allow, of whom neither is `Values`; None: nothing."""
    is_implied = left.is_implied and right.is_implied
    match left, right:
        case Number(), Number():
            return replace(
                left,
                is_implied=is_implied,
                is_integer=left.is_integer or right.is_integer,
                low=max((b for b in (left.low, right.low) if b), key=_tightest_low, default=None),
                high=min((b for b in (left.high, right.high) if b), key=_tightest_high, default=None),
                multiples=left.multiples | right.multiples,
            )
        case Text(), Text():
            return Text(
                is_implied=is_implied,
                low=max(left.low, right.low),
                high=least(left.high, right.high),
                patterns=left.patterns | right.patterns,
                format=left.format or right.format,
            )
        case Array(), Array():
            return replace(_arrays(left, right), is_implied=is_implied)
        case Object(), Object():
            return replace(_objects(left, right), is_implied=is_implied)
    return None


def least(*bounds: int | None) -> int | None:
    """The smallest of those that there are."""
    return min((bound for bound in bounds if bound is not None), default=None)


def _arrays(left: Array, right: Array) -> Array:
    length = max(len(left.prefix), len(right.prefix))
    prefix = tuple(element(left, number) | element(right, number) for number in range(length))
    return Array(
        prefix=prefix,
        rest=_both(left.rest, right.rest),
        low=max(left.low, right.low),
        high=least(left.high, right.high),
        contained=(*left.contained, *right.contained),
        unique=left.unique or right.unique,
    )


def element(array: Array, number: int) -> Places:
    """What must hold for an element."""
    return array.prefix[number] if number < len(array.prefix) else array.rest or ANY


def _objects(left: Object, right: Object) -> Object:
    patterns: dict[str, Places] = {}
    for own, other in ((left, right), (right, left)):
        for pattern, places in own.patterns.items():
            beside = other.patterns.get(pattern) or (other.additional if not other.patterns else None) or ANY
            patterns[pattern] = patterns.get(pattern, ANY) | places | beside
    names = dict.fromkeys([*left.properties, *right.properties])
    return Object(
        properties={name: left.child(name) | right.child(name) for name in names},
        required=tuple(dict.fromkeys([*left.required, *right.required])),
        patterns=patterns,
        additional=_both(left.additional, right.additional),
        names=left.names | right.names,
        is_described=left.is_described or right.is_described,
        low=max(left.low, right.low),
        high=least(left.high, right.high),
        place=left.place or right.place,
    )


def _both(left: Places | None, right: Places | None) -> Places | None:
    return None if left is None and right is None else (left or ANY) | (right or ANY)


def _tightest_low(bound: Bound) -> tuple[Any, bool]:
    return bound.value, bound.is_excluded


def _tightest_high(bound: Bound) -> tuple[Any, bool]:
    return bound.value, not bound.is_excluded


def written(alternatives: Iterable[Alternative]) -> list[Alternative]:
    """Those that are not implied only, if there are any."""
    own = list(alternatives)
    return [one for one in own if not one.is_implied] or own
