"""Numbers in the form that the grammar library keeps."""

from fractions import Fraction
from functools import reduce
from math import ceil, floor, lcm
from typing import Any

from ultrafuser.server.grammar.alternatives import Bound, Number
from ultrafuser.server.grammar.errors import at
from ultrafuser.server.grammar.fulfilment import whole_bounds

MAX_MULTIPLES = 1000
"""Most multiples that are written down, those next to zero, where a bound stands beside `multipleOf`."""

_MAX_FACTOR = 1024
_LARGEST = 2**63 - 1


def number_schema(own: Number) -> dict[str, Any]:
    """A schema of whole numbers, or of all.

    Raises:
        ConstraintError: a keyword cannot be kept, or there is no such number.
    """
    if own.multiples:
        return _multiples(own)
    if own.is_integer:
        return {"type": "integer"} | _bounded(own)
    return {"type": "number"} | _bound("inimum", own.low) | _bound("aximum", own.high)


def _multiples(own: Number) -> dict[str, Any]:
    """Multiples of a whole number are whole numbers; those of others are written down, if they are few."""
    place = min(place for _, place in own.multiples)
    factor = reduce(_common, (Fraction(str(multiple)) for multiple, _ in own.multiples))
    if own.is_integer:
        factor = _common(factor, Fraction(1))
    is_exact = all(Fraction(multiple) == Fraction(str(multiple)) for multiple, _ in own.multiples)
    if factor == 1 and is_exact:
        return {"type": "integer"} | _bounded(own)
    if factor.denominator == 1 and is_exact and own.low is None and own.high is None and factor <= _MAX_FACTOR:
        return {"type": "integer", "multipleOf": factor.numerator}
    low = None if own.low is None else ceil(_exact(own.low) / factor)
    high = None if own.high is None else floor(_exact(own.high) / factor)
    if factor.denominator > 1 and (low is None or high is None or high - low >= MAX_MULTIPLES):
        raise at(
            place, f"cannot be kept for more than {MAX_MULTIPLES} multiples; give both bounds, or round the answer"
        )
    first, last = _next_to_zero(low, high)
    multiples = [_plain(number * factor) for number in range(first, last + 1)]
    found = [value for value in multiples if _is_inside(own, value) and _divides(own, value)]
    if not found:
        raise at(place, "there is no multiple between the bounds")
    return {"enum": found}


def _next_to_zero(low: int | None, high: int | None) -> tuple[int, int]:
    """At most as many whole numbers between bounds as may be written down."""
    half = MAX_MULTIPLES // 2
    if low is not None and low > -half:
        return low, low + MAX_MULTIPLES - 1 if high is None else min(high, low + MAX_MULTIPLES - 1)
    if high is not None and high < half:
        return high - MAX_MULTIPLES + 1 if low is None else max(low, high - MAX_MULTIPLES + 1), high
    return -half, half


def _common(left: Fraction, right: Fraction) -> Fraction:
    """The least common multiple."""
    denominator = lcm(left.denominator, right.denominator)
    return Fraction(lcm(int(left * denominator), int(right * denominator)), denominator)


def _exact(bound: Bound) -> Fraction:
    return Fraction(str(bound.value))


def _plain(value: Fraction) -> int | float:
    return value.numerator if value.denominator == 1 else float(value)


def _is_inside(own: Number, value: int | float) -> bool:
    is_above = own.low is None or value > own.low.value or (value == own.low.value and not own.low.is_excluded)
    is_below = own.high is None or value < own.high.value or (value == own.high.value and not own.high.is_excluded)
    return abs(value) <= _LARGEST and is_above and is_below


def _divides(own: Number, value: int | float) -> bool:
    """Whether a validator that computes with floats says so, too."""
    return all((value / multiple).is_integer() for multiple, _ in own.multiples)


def _bounded(own: Number) -> dict[str, int]:
    bounds = whole_bounds(own)
    if bounds is None:
        raise at(own.place, "there is no whole number between the bounds")
    low, high = bounds
    if (low is not None and low > _LARGEST) or (high is not None and high < -_LARGEST):
        raise at(own.place, "a bound needs more than 64 bits")
    least = {} if low is None else {"minimum": max(low, -_LARGEST)}
    return least | ({} if high is None else {"maximum": min(high, _LARGEST)})


def _bound(name: str, bound: Bound | None) -> dict[str, int | float]:
    if bound is None:
        return {}
    return {f"exclusiveM{name}" if bound.is_excluded else f"m{name}": bound.value}
