"""Whether a value fulfils alternatives: the values of an `enum` are looked at one by one."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from ultrafuser.server.grammar.alternatives import Alternative, Array, Number, Object, Places, Text, Values, element
from ultrafuser.server.grammar.document import canonical
from ultrafuser.server.grammar.expression_parser import parse_search
from ultrafuser.server.grammar.expressions import matches

Fulfils = Callable[[Places, Any], bool]


def admits(alternative: Alternative, value: Any, fulfils: Fulfils) -> bool:
    """Whether one alternative allows a value; `fulfils` is asked for its children."""
    match alternative:
        case Values():
            return canonical(value) in alternative.values
        case Number():
            return isinstance(value, int | float) and not isinstance(value, bool) and _number(alternative, value)
        case Text():
            return isinstance(value, str) and _text(alternative, value)
        case Array():
            return isinstance(value, list) and _array(alternative, value, fulfils)
        case Object():
            return isinstance(value, dict) and _object(alternative, value, fulfils)
    raise AssertionError(f"no {type(alternative).__name__}")


def _number(own: Number, value: int | float) -> bool:
    if own.is_integer and value != int(value):
        return False
    if own.low and (value < own.low.value or (own.low.is_excluded and value == own.low.value)):
        return False
    if own.high and (value > own.high.value or (own.high.is_excluded and value == own.high.value)):
        return False
    return all((Fraction(str(value)) / Fraction(str(multiple))).denominator == 1 for multiple, _ in own.multiples)


def _text(own: Text, value: str) -> bool:
    is_fitting = own.low <= len(value) and (own.high is None or len(value) <= own.high)
    return is_fitting and all(matches(parse_search(pattern), value) for pattern, _ in own.patterns)


def _array(own: Array, value: list[Any], fulfils: Fulfils) -> bool:
    if len(value) < own.low or (own.high is not None and len(value) > own.high):
        return False
    if own.unique and len({canonical(one) for one in value}) < len(value):
        return False
    if any(sum(fulfils(places, one) for one in value) < count for places, count, _ in own.contained):
        return False
    return all(fulfils(element(own, number), one) for number, one in enumerate(value))


def _object(own: Object, value: dict[str, Any], fulfils: Fulfils) -> bool:
    if len(value) < own.low or (own.high is not None and len(value) > own.high):
        return False
    if not set(own.required) <= value.keys() or not all(fulfils(own.names, name) for name in value):
        return False
    return all(fulfils(own.child(name), one) for name, one in value.items())
