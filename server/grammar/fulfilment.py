"""Which schemas can be fulfilled by a text that comes to an end: what only goes on for ever cannot."""

from math import ceil, floor

from ultrafuser.server.grammar.alternatives import (
    ANY,
    Alternative,
    Array,
    Number,
    Object,
    Places,
    Text,
    Values,
    element,
)
from ultrafuser.server.grammar.expressions import NOTHING
from ultrafuser.server.grammar.normal_form import NormalForm
from ultrafuser.server.grammar.texts import text_expression


class Fulfilment:
    """Tells for sets of places whether something fulfils all of them."""

    def __init__(self, normal_form: NormalForm) -> None:
        self._normal_form = normal_form
        self._known: dict[Places, bool] = {ANY: True}

    def is_possible(self, places: Places) -> bool:
        """Whether a value is allowed at all these places."""
        if places not in self._known:
            self._find(places)
        return self._known[places]

    def has(self, one: Alternative) -> bool:
        """Whether a value is allowed by an alternative, as far as is known of its children."""
        match one:
            case Values():
                return bool(one.values)
            case Number():
                return whole_bounds(one) is not None if one.is_integer else _has_number(one)
            case Text():
                return text_expression(one) != NOTHING
            case Array():
                return self._has_array(one)
            case Object():
                return self._has_object(one)
        raise AssertionError(f"no {type(one).__name__}")

    def _find(self, places: Places) -> None:
        """Take all that is unknown for impossible, until no more turns out to be possible."""
        waiting, unknown = [places], {}
        while waiting:
            own = waiting.pop()
            if own not in self._known and own not in unknown:
                unknown[own] = self._normal_form.of(own)
                waiting += [child for one in unknown[own] for child in _children(one)]
        self._known |= dict.fromkeys(unknown, False)
        has_changed = True
        while has_changed:
            has_changed = False
            for own, alternatives in unknown.items():
                if not self._known[own] and any(self.has(one) for one in alternatives):
                    self._known[own] = has_changed = True

    def _has_array(self, own: Array) -> bool:
        if own.high is not None and own.high < own.low:
            return False
        needed = [element(own, number) for number in range(min(own.low, len(own.prefix) + 1))]
        return all(self._known.get(places, False) for places in needed)

    def _has_object(self, own: Object) -> bool:
        if own.high is not None and own.high < max(own.low, len(own.required)):
            return False
        return all(self._known.get(own.child(name), False) for name in own.required)


def whole_bounds(own: Number) -> tuple[int | None, int | None] | None:
    """The least and the largest whole number; None: there is none between."""
    low, high = own.low, own.high
    least = None if low is None else floor(low.value) + 1 if low.is_excluded else ceil(low.value)
    most = None if high is None else ceil(high.value) - 1 if high.is_excluded else floor(high.value)
    return None if least is not None and most is not None and least > most else (least, most)


def _has_number(own: Number) -> bool:
    if own.low is None or own.high is None or own.low.value < own.high.value:
        return True
    return own.low.value == own.high.value and not (own.low.is_excluded or own.high.is_excluded)


def _children(one: Alternative) -> list[Places]:
    match one:
        case Array():
            return [*one.prefix, one.rest or ANY]
        case Object():
            required = [one.child(name) for name in one.required]
            return [*one.properties.values(), *required, *one.patterns.values(), one.additional or ANY]
    return []
